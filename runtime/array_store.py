"""Arrays on disk: what need not be in memory is written to a file and mapped.

The file has no name (where the system can do that): it goes with the process, however that ends.
"""

import mmap
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import OptionError

SLAB = 1 << 30
"""Bytes of one file; as long as nothing is written there they take no room."""
PAGE = 4096


class ArrayStore:
    """Takes arrays and gives them back as read-only views of a file.

    Args:
        folder: where the files are; the system's folder for temporary files if None.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.bytes = 0
        self._file: IO[bytes] | None = None
        self._map: mmap.mmap | None = None
        self._end = 0

    def put(self, array: NDArray[Any], least: int = 1 << 16) -> NDArray[Any]:
        """Writes an array and returns it as it is in the file; one below ``least`` bytes is returned as it is.

        Raises:
            OptionError: the disk is full.
        """
        if array.nbytes < least:
            return array
        size = array.nbytes + -array.nbytes % PAGE
        try:
            if self._map is None or self._end + size > len(self._map):
                self._open(max(SLAB, size))
            assert self._file is not None
            assert self._map is not None
            self._file.seek(self._end)
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            self._file.flush()
        except OSError as err:
            folder = self.folder or tempfile.gettempdir()
            raise OptionError(
                f"temporary folder '{folder}' cannot take {size} bytes ({err.strerror or err}); free space, set TMPDIR to "
                "another folder, or give more --memory"
            ) from err
        result = np.frombuffer(self._map, array.dtype, array.size, self._end).reshape(array.shape)
        self._end += size
        self.bytes += size
        return result

    def _open(self, size: int) -> None:
        # An earlier file lives as long as an array in it.
        self._file = tempfile.TemporaryFile(dir=self.folder, prefix="liar-opt-")
        self._file.truncate(size)
        self._map = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ)
        self._end = 0
