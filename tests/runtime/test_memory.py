"""Sizes as people write them, and the memory that was used."""

import time

import numpy as np
import pytest

from liar_opt.runtime import memory
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.memory import Memory, MemoryWatch, anonymous, free_memory, parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("2gib", 2 << 30), ("512 MiB", 512 << 20), ("1.5G", 15 * 10**8), (4096, 4096), ("100", 100)],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "2XB", "-1GB", "0", "GB", "1e", True])
def test_what_is_no_size(text: int | str) -> None:
    with pytest.raises(OptionError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize("size", [1, 10**6, 123_456_789, 10**9, 98_765_432_109])
def test_what_is_shown_is_enough(size: int) -> None:
    assert size <= parse_size(show_size(size)) <= 1.2 * size + 10**5


def test_the_default_is_half_of_what_is_free() -> None:
    assert 0.2 * free_memory() < Memory.of(None).limit < 0.8 * free_memory()
    assert Memory.of("1GB").limit == 10**9


def test_large_models_are_left_where_they_lie() -> None:
    assert Memory(1000, 200).low
    assert not Memory(1000, 100).low


@pytest.mark.skipif(anonymous() is None, reason="the system does not tell")
def test_the_peak_is_seen() -> None:
    before = anonymous() or 0
    watch = MemoryWatch(0.001)
    held = np.ones(8 << 20)
    time.sleep(0.1)
    del held
    assert (watch.anonymous or 0) >= before + (60 << 20)
    assert (watch.resident or 0) >= 60 << 20


def test_without_a_proc_the_memory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_numbers", lambda path: {})
    assert (anonymous() or 0) > 10 << 20
    assert (MemoryWatch().resident or 0) > 10 << 20
    assert free_memory() >= 1 << 28
