"""Files and folders that appear whole or not at all, and what killed runs left of them.

What is being written has a name of its own beside its place, ``.NAME.xxxxxxxx.liar-opt.tmp``, and is moved there when it is
whole. Until then its process holds a lock on it, which the system takes back however the process ends: whatever bears such
a name and has no lock is what a killed run left, and the next one that writes in that folder removes it (:func:`sweep`).
Where there are no such locks (Windows, some network file systems) it stays.

A file that goes with data beside it is moved behind its data. Two names cannot be moved at once, so the data has a name
that no file had, and a note (``.NAME.xxxxxxxx.liar-opt.pending``) says which data belongs to the file before and which to
the file after: if the process is killed in between, the next one removes what belongs to neither. A folder changes places
with the one before at once where the system can do that (Linux); elsewhere the one before is moved aside
(``.NAME.xxxxxxxx.liar-opt.old``), and moved back by the next run if the process is killed just then.

Symbolic links, devices, pipes and sockets are never replaced and never written through: a link at the place of a result is
refused, whoever means its target gives the target's path.
"""

import contextlib
import ctypes
import errno
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

if sys.platform != "win32":
    import fcntl

LOCKS: bool = sys.platform != "win32"
TEMPORARY, PENDING, OLD = ".liar-opt.tmp", ".liar-opt.pending", ".liar-opt.old"
OURS = re.compile(r"\.(.+)\.[a-z0-9_]{8}(\.liar-opt\.(?:tmp|pending|old))", re.DOTALL)
"""Names of what is not finished: the name of the result, and what it is."""
LONGEST_NAME = 255
"""Bytes of a file's name, on every file system that is common."""
IN_RUST = re.compile(r"\(os error (\d+)\)")
"""How libraries that are written in Rust tell an error of the system."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Constants of renameat2(2)."""


# Files ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which it replaces when the block succeeds; otherwise nothing is left of it.

    Raises:
        OSError: it cannot be written, or ``path`` is a link, a device, a pipe or a socket.
    """
    with temporary_file(path) as temporary:
        yield temporary
        replace_file(temporary, path)


class PatientStream(io.RawIOBase):
    """A file that is written to by code which does not survive that the system refuses: that is raised afterwards.

    What torch writes its archives with ends the whole process where the disk is full.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._refused: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Writes, or does as if it did."""
        if self._refused is None:
            try:
                self._stream.write(data)
            except OSError as err:
                self._refused = err
        return memoryview(data).nbytes

    def seekable(self) -> bool:
        """It is: torch goes to the beginning before it writes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves in the file."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """Returns where in the file it is."""
        return self._stream.tell()

    def settle(self) -> None:
        """Raises what the system refused with.

        Raises:
            OSError: it did.
        """
        if self._refused is not None:
            raise self._refused


@contextlib.contextmanager
def patient_file(path: Path) -> Iterator[IO[bytes]]:
    """The stream of a :func:`whole_file`.

    Raises:
        OSError: it cannot be written, or ``path`` is a link, a device, a pipe or a socket.
    """
    with whole_file(path) as temporary:
        with temporary.open("wb") as stream:
            patient = PatientStream(stream)
            yield cast("IO[bytes]", patient)
            patient.settle()


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Has what a library raises where the system refuses to write (safetensors) be an error of the system.

    Raises:
        OSError: the system did refuse.
    """
    try:
        yield
    except Exception as err:
        number = None if isinstance(err, OSError) else IN_RUST.search(str(err))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from err


def write_whole(path: Path, text: str) -> None:
    """Writes a text; a file of the same name is replaced.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; nothing is left of it unless it was moved (:func:`replace_file`).

    Raises:
        OSError: it cannot be made, or ``path`` is a link, a device, a pipe or a socket.
    """
    _require_plain(path)
    sweep(path.parent)
    temporary, lock = _create(path, TEMPORARY)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _close(lock)


def replace_file(temporary: Path, path: Path, data: tuple[Path, Path] | None = None, old: Iterable[Path] = ()) -> None:
    """Moves a finished file to its place, and the data that goes with it before.

    Args:
        temporary: of :func:`temporary_file`.
        path: its place, in the same folder.
        data: a finished temporary file and its place, in that folder too, at which there must be none.
        old: files of that folder that belong to the file that is replaced; they are removed behind it.

    Raises:
        OSError: it cannot be moved; what was there is as it was.
    """
    _require_plain(path)
    for file in (temporary, *(data[:1] if data else ())):
        _to_disk(file)
        # mkstemp makes a private file; it gets the rights that any new file would have.
        file.chmod(0o666 & ~_umask())
    old = list(old)
    if data is None and not old:
        temporary.replace(path)
        return
    note = {
        "file": path.name,
        "before": _identity(path),
        "after": _identity(temporary),
        "new": {data[1].name: _identity(data[0])} if data else {},
        "old": {file.name: _identity(file) for file in old},
    }
    pending, lock = _create(path, PENDING)
    try:
        pending.write_text(json.dumps(note), encoding="utf-8")
        if data is not None:
            data[0].replace(data[1])
        temporary.replace(path)
    finally:
        _settle(path.parent, note)
        pending.unlink(missing_ok=True)
        _close(lock)


def _settle(folder: Path, note: dict[str, Any]) -> None:
    """Removes the data that belongs to neither file: the new where the file did not come, the old where it did.

    Only what is as it was noted; where the file is neither of the two, nothing.
    """
    there = _identity(folder / note["file"])
    unwanted = note["old"] if there == note["after"] else note["new"] if there == note["before"] else {}
    for name, identity in unwanted.items():
        if Path(name).name == name and identity is not None and _identity(folder / name) == identity:
            (folder / name).unlink()


def _identity(path: Path) -> list[int] | None:
    """What a move leaves as it is, and writing does not."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return [found.st_ino, found.st_size, found.st_mtime_ns]


def _require_plain(path: Path) -> None:
    if (kind := kind_of(path)) not in (None, "file"):
        raise OSError(errno.EINVAL, f"it is a {kind}", str(path))


def kind_of(path: Path) -> str | None:
    """Returns what is at a path, links not followed: file, folder, link, pipe, socket or device; None: nothing.

    Raises:
        OSError: the system does not say, or the name is too long.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "folder",
        stat.S_IFLNK: "symbolic link",
        stat.S_IFIFO: "pipe",
        stat.S_IFSOCK: "socket",
    }
    return kinds.get(stat.S_IFMT(mode), "device")


def require_room_for_names(path: Path) -> None:
    """Checks that what is made beside a result can have its name and the ending that says what it is.

    Raises:
        OSError: the name is too long.
    """
    if len(os.fsencode(path.name)) + len(f"..{'x' * 8}{PENDING}") > LONGEST_NAME:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))


# Folders --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, which it replaces when the block succeeds; otherwise nothing is left of it.

    At each moment the folder before or the new one is there, whole. All of the one before is removed: whoever calls has
    made sure that nothing in it is anybody else's.

    Raises:
        OSError: it cannot be written, or ``path`` is anything but a folder.
    """
    if kind_of(path) not in (None, "folder"):
        raise OSError(errno.ENOTDIR, f"it is a {kind_of(path)}", str(path))
    sweep(path.parent)
    temporary, lock = _create(path, TEMPORARY, folder=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _to_disk(file)
        temporary.chmod(0o777 & ~_umask())
        if kind_of(path) is None:
            temporary.rename(path)
        elif not _exchange(temporary, path):
            _move_aside(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after the exchange this is the one before
        _close(lock)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder among the system's temporary ones for the length of a block; a killed run's is removed by the next."""
    sweep(Path(tempfile.gettempdir()))
    temporary, lock = _create(Path(tempfile.gettempdir()) / "scratch", TEMPORARY, folder=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Has two names change places at once; returns whether the system can."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # a C library before 2018, or another one
        return False
    if rename(AT_FDCWD, os.fsencode(one.absolute()), AT_FDCWD, os.fsencode(other.absolute()), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # of this file system, this kernel
        return False
    raise OSError(number, os.strerror(number), str(other))


def _move_aside(temporary: Path, path: Path) -> None:
    """Puts a folder in the place of another in two steps; :func:`sweep` undoes the first if there is no second."""
    aside, lock = _create(path, OLD, folder=True)
    try:
        path.replace(aside)  # over the empty folder of that name
        try:
            temporary.rename(path)
        except BaseException:
            aside.rename(path)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _close(lock)


# What was left --------------------------------------------------------------------------------------------------------


def sweep(folder: Path) -> None:
    """Removes what killed runs left in a folder: what is ours by its name and whose process is no more.

    A folder that was moved aside and has no successor is moved back. What cannot be removed stays.
    """
    if not LOCKS:
        return
    with contextlib.suppress(OSError):
        for path in [entry for entry in folder.iterdir() if OURS.fullmatch(entry.name)]:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                _sweep_one(path)


def _sweep_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(handle)
        if found.st_uid != os.geteuid() or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError where its process is alive
        if not _is_at(handle, path):
            return
        match = OURS.fullmatch(path.name)
        assert match is not None
        place, kind = path.with_name(match[1]), match[2]
        if kind == OLD and kind_of(place) is None and any(path.iterdir()):
            path.rename(place)
        elif stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
        else:
            try:
                if kind == PENDING:
                    _settle(path.parent, json.loads(path.read_text(encoding="utf-8")))
            finally:
                path.unlink()
    finally:
        os.close(handle)


def _create(path: Path, suffix: str, folder: bool = False) -> tuple[Path, int | None]:
    """Makes a file or folder with a name of its own beside ``path``; returns it, and the lock that says who writes it."""
    prefix = f".{path.name}."
    while True:
        if folder:
            name = tempfile.mkdtemp(suffix, prefix, path.parent)
            lock = os.open(name, os.O_RDONLY) if LOCKS else None
        else:
            lock, name = tempfile.mkstemp(suffix, prefix, path.parent)
        if not LOCKS:
            _close(lock)
            return Path(name), None
        assert lock is not None
        with contextlib.suppress(OSError):  # a file system without locks: nobody else gets one either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_at(lock, Path(name)):  # else another run took it for a leftover before it was locked
            return Path(name), lock
        os.close(lock)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _close(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _to_disk(file: Path) -> None:
    """Has the system write a file out: after a power cut, a name that was moved shall not be one of an empty file."""
    with file.open("rb+" if sys.platform == "win32" else "rb") as stream:
        os.fsync(stream.fileno())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
