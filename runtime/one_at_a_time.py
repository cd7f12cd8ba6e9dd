"""One run at a time, where two would be in each other's way.

Who has a place to itself holds a lock on a file beside it. The system takes the lock back however the process ends: what a
killed run leaves is an empty file that keeps nobody out. Where a file system has no locks, or takes no file, nobody is kept
out either.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

WAITING = "waiting for another run"
ASKED_EVERY = 1.0
"""Seconds between two calls that say that it is still waited for."""


class Held:
    """A lock, until it is closed.

    Args:
        path: of the file; its folder must exist.
        waiting: called again and again while another process holds the lock; None: do not wait.

    Raises:
        BlockingIOError: another process holds it, and it is not waited for.
    """

    def __init__(self, path: Path, waiting: Callable[[], object] | None = None) -> None:
        from filelock import FileLock, Timeout

        self._path, self._lock = path, FileLock(path, thread_local=False)
        while True:
            try:
                self._lock.acquire(timeout=0 if waiting is None else ASKED_EVERY)
            except Timeout:
                if waiting is None:
                    raise BlockingIOError(f"'{path}' is held by another process") from None
                waiting()
                continue
            except (OSError, NotImplementedError):
                pass
            return

    def close(self) -> None:
        """Lets the next one in; nothing is left of the file."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # Windows: it is open
                self._path.unlink()
            self._lock.release()


@contextlib.contextmanager
def one_at_a_time(place: Path | None, waiting: Callable[[], object]) -> Iterator[None]:
    """Has a block that makes a file run in one process at a time.

    Args:
        place: of the file; its folder is made. None: everybody makes one.
        waiting: called again and again while another process is in the block.
    """
    if place is None:
        yield
        return
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Held(place.with_suffix(".lock"), waiting)):
        yield
