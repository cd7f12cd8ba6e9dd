"""Where results go: nothing that a run reads is written to, and nothing is written twice.

One :class:`Places` knows every file of the input, and each result is put before it, before any work. A result is a plain
file or a folder: devices, pipes and sockets are refused, and so are symbolic links, since a link's target may be the data
of another model, and data beside a link is not where its readers look for it. Files are told from each other as the system
does, so that neither a link on the way nor a second name (hard link) hides one.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.whole_file import kind_of, require_room_for_names

InputFile = tuple[Path, str]
"""A file that is read, and what a message calls it."""


@dataclass(eq=False)
class Places:
    """What a run reads, and the results that it will write.

    Attributes:
        inputs: gives every file that is read; asked when a result exists already.
    """

    inputs: Callable[[], Iterable[InputFile]] = tuple
    _read: dict[tuple[int, int], str] | None = None
    _folders: list[tuple[Path, str]] = field(default_factory=list)
    _files: dict[tuple[int, int, str], tuple[Path, str]] = field(default_factory=dict)

    def file(self, path: Path, what: str, *, replace: bool = True, probe: bool = True) -> None:
        """Takes a file as a result.

        Args:
            path: the file.
            what: what a message calls it.
            replace: whether it may exist.
            probe: whether to try that its folder can be written.

        Raises:
            OptionError: it is a file that is read or written as well, or none, or it exists and must not, or its folder
                does not exist or cannot be written.
        """
        with _named(path, what):
            kind = kind_of(path)
            self._check_read(path, what)
            if kind not in (None, "file"):
                raise _no_file(path, what, str(kind))
            if kind is not None and not replace:
                raise OptionError(f"{what} '{path}' exists; give --force to replace it or choose another path")
            _check_folder_of(path, what)
            key = _key(path)
            if key in self._files:
                raise _both(path, what, self._files[key][1])
            for folder, owner in self._folders:
                if path.resolve().is_relative_to(folder):
                    raise OptionError(f"{what} '{path}' is within {owner}; choose another path")
            self._files[key] = path.resolve(), f"the {what}"
            if probe:
                # Asking for permission says little (root, read-only disks); a nameless file shows it and leaves nothing.
                with tempfile.TemporaryFile(dir=path.parent):
                    pass

    def folder(self, path: Path, what: str) -> None:
        """Takes a folder as a result, with all that will be in it.

        Raises:
            OptionError: it is none, what is read or written as well is within it, or it is within a folder that is written.
        """
        with _named(path, what):
            kind = kind_of(path)
            if kind == "file":
                self._check_read(path, what)
                more = ", or one that ends in .onnx" if what == "output" else ""
                raise OptionError(f"{what} '{path}' is a file; give the path of a folder{more}")
            if kind not in (None, "folder"):
                raise OptionError(f"{what} '{path}' is a {kind}; give the path of a folder")
            _check_folder_of(path, what)
            place = path.resolve()
            if kind == "folder":
                for file, called in self.inputs():
                    if any(p.is_relative_to(place) for p in (file.parent.resolve(), file.resolve().parent)):
                        raise OptionError(
                            f"{what} '{path}' is the input, or holds it ('{file}', {called}); choose another path, inputs "
                            "are never written to"
                        )
            for other, owner in self._folders:
                if place.is_relative_to(other) or other.is_relative_to(place):
                    raise _both(path, what, owner)
            for file, owner in self._files.values():
                if file == place:
                    raise _both(path, what, owner)
                if file.is_relative_to(place):
                    raise OptionError(f"{owner} '{file}' is within the {what} '{path}'; choose another path")
            self._folders.append((place, f"the {what}"))

    def _check_read(self, path: Path, what: str) -> None:
        if not path.exists():
            return
        if self._read is None:
            self._read = {}
            for file, called in self.inputs():
                with contextlib.suppress(OSError, ValueError):
                    found = file.stat()
                    self._read.setdefault((found.st_dev, found.st_ino), called)
        there = path.stat()
        known = self._read.get((there.st_dev, there.st_ino))
        if known is not None:
            raise OptionError(
                f"{what} '{path}' is {known}, a file that this command reads or writes as well; choose another path, "
                "inputs are never written to"
            )


def _key(path: Path) -> tuple[int, int, str]:
    folder = path.parent.stat()
    return folder.st_dev, folder.st_ino, os.path.normcase(path.name)


def _both(path: Path, what: str, owner: str) -> OptionError:
    return OptionError(f"{what} '{path}' is {owner}, which this command reads or writes as well; choose another path")


def _no_file(path: Path, what: str, kind: str) -> OptionError:
    more = (
        f" to '{os.path.realpath(path)}'; give the path of the file itself"
        if kind == "symbolic link"
        else "; give the path of a file"
    )
    return OptionError(f"{what} '{path}' is a {kind}{more}")


def _check_folder_of(path: Path, what: str) -> None:
    if not path.absolute().parent.is_dir():
        raise OptionError(f"folder '{path.absolute().parent}' of {what} '{path}' does not exist; make it first")


@contextlib.contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    try:
        require_room_for_names(path)
        yield
    except (OSError, ValueError) as err:  # a NUL in it
        reason = getattr(err, "strerror", None) or err
        raise OptionError(f"{what} '{path}' cannot be written ({reason}); choose another path") from err
