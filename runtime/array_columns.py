"""Arrays in files of numpy as columns, of which rows are taken without reading the rest.

``.npy`` files and stored members of ``.npz`` files are memory-mapped, compressed members are read block by block.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.signatures import one_line

Array = NDArray[Any]
BLOCK_BYTES = 1 << 22
"""Read at once from a compressed array."""


class Column(Protocol):
    """An array of which rows can be taken without reading the rest."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array; rows are along the first axis."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements."""
        ...

    def take(self, rows: NDArray[np.int64]) -> Array:
        """Returns rows as an array in memory."""
        ...


@dataclass(frozen=True)
class InMemory:
    """An array in memory, or memory-mapped, as a :class:`Column`."""

    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements."""
        return self.values.dtype

    def take(self, rows: NDArray[np.int64]) -> Array:
        """Returns rows as an array in memory."""
        return np.asarray(self.values[rows] if self.values.ndim else self.values)


@dataclass(frozen=True)
class CompressedColumn:
    """A compressed member of an .npz file in C order: read block by block, of which the wanted rows are kept."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def take(self, rows: NDArray[np.int64]) -> Array:
        """Returns rows as an array in memory.

        Raises:
            OptionError: The file cannot be read.
        """
        kept = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        width = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        block = max(1, BLOCK_BYTES // max(1, width))
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                _read_npy_header(stream)
                for start in range(0, int(wanted[-1]) + 1 if len(wanted) else 0, block):
                    count = min(block, self.shape[0] - start)
                    data = stream.read(count * width)
                    values = np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
                    low, high = np.searchsorted(wanted, [start, start + count])
                    kept[order[low:high]] = values[wanted[low:high] - start]
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as err:
            raise _unreadable(self.path, err) from err
        return kept


def _unreadable(path: Path, err: BaseException) -> OptionError:
    return OptionError(f"calibration file '{path}' cannot be read ({one_line(err)}); write it again with numpy.")


def _pickled(path: Path, name: str) -> OptionError:
    return OptionError(f"array '{name}' of calibration file '{path}' holds Python objects; save an array of numbers.")


def npy_column(path: Path) -> InMemory:
    """Returns an .npy file as a column, memory-mapped.

    Raises:
        OptionError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            shape, _, dtype = _read_npy_header(stream)
        if dtype.hasobject:
            raise _pickled(path, path.stem)
        # an array without elements cannot be mapped
        return InMemory(np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False))
    except (OSError, EOFError, ValueError) as err:
        raise _unreadable(path, err) from err


def npz_columns(path: Path) -> dict[str, Column]:
    """Columns of an .npz file by name, with nothing read but the headers (and what is small)."""
    columns: dict[str, Column] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    shape, fortran, dtype = _read_npy_header(stream)
                    header = stream.tell()
                if dtype.hasobject:
                    raise _pickled(path, name)
                if member.file_size <= BLOCK_BYTES or not shape or (fortran and member.compress_type):
                    with archive.open(member) as stream:
                        columns[name] = InMemory(np.lib.format.read_array(stream, allow_pickle=False))
                elif member.compress_type:
                    columns[name] = CompressedColumn(path, member.filename, shape, dtype)
                else:
                    offset = _data_offset(path, member) + header
                    columns[name] = InMemory(np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C"))
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as err:
        raise _unreadable(path, err) from err
    return columns


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes start: after its local header, whose name and extra field have lengths of their own."""
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        local = stream.read(30)
    return member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
