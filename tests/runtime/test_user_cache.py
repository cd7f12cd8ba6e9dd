"""Where the cache is."""

from pathlib import Path

import pytest

from liar_opt.runtime.user_cache import cache_folder


def test_a_relative_cache_variable_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "liar-opt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "liar-opt"


def test_without_the_variable_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder().is_absolute() and "liar-opt" in cache_folder().parts
