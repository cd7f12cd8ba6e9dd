"""Results that are kept under the user's cache folder between runs, a file each: error curves and tables of latencies.

The name of a file says all that the result depends on, as a digest: what differs has another name, and is never taken. A
cache that cannot be read or written costs the next run its time, nothing else.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from liar_opt.runtime.user_cache import cache_folder
from liar_opt.runtime.whole_file import whole_file

MOST = 64
"""Files of one kind that are kept; those that were not used for longest go."""
T = TypeVar("T")


def file_of(kind: str, given: Mapping[str, Any], suffix: str) -> Path:
    """Returns the file for a result.

    Args:
        kind: the name of the folder.
        given: all that it depends on, as plain data.
        suffix: of the file.
    """
    key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / kind / f"{key}{suffix}"


def load_result(path: Path, read: Callable[[IO[bytes]], T]) -> T | None:
    """Returns what ``read`` makes of a file; None where there is none, or ``read`` raises anything."""
    try:
        with path.open("rb") as stream:
            found = read(stream)
        path.touch()
    except Exception:  # whatever a broken file raises
        return None
    return found


def store_result(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Keeps a result, whole or not at all."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            write(stream)
        by_age = sorted(path.parent.glob(f"*{path.suffix}"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in by_age[MOST:]:
            old.unlink(missing_ok=True)


@functools.cache
def code_digest() -> str:
    """Returns the SHA-256 of the package's own source files, for what another version would measure otherwise."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for part in ("frontend", "passes", "runtime"):
        for path in sorted((root / part).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
