"""Where things are kept between runs."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns `liar-opt` under $XDG_CACHE_HOME, or under ~/.cache; it may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a path that is not absolute is to be ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "liar-opt"
