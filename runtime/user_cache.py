"""Where things are kept between runs."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Returns `liar-opt` under $XDG_CACHE_HOME, or in the folder that the system has for caches; it may not exist yet."""
    # The XDG specification: a path that is not absolute is to be ignored.
    if not Path(given := os.environ.get("XDG_CACHE_HOME", "")).is_absolute():
        found = user_cache_path("liar-opt", appauthor=False)
        return found if found.is_absolute() else Path.home() / ".cache" / "liar-opt"
    return Path(given) / "liar-opt"
