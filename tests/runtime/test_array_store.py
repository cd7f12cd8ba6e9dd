"""Arrays on disk are what they were, and leave nothing behind."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from liar_opt.runtime import array_store
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.errors import OptionError


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.int64, np.float16, ml_dtypes.bfloat16])
def test_what_comes_back(dtype: type, tmp_path: Path) -> None:
    store = ArrayStore(tmp_path)
    arrays: list[np.ndarray] = [np.random.default_rng(i).standard_normal((3, 7, i + 1)).astype(dtype) for i in range(4)]
    back = [store.put(a, 0) for a in [*arrays, arrays[0].T]]
    for a, b in zip([*arrays, arrays[0].T], back, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
        assert not b.flags.writeable
    assert store.bytes >= sum(a.nbytes for a in arrays)


def test_small_ones_stay(tmp_path: Path) -> None:
    array = np.ones(10)
    assert ArrayStore(tmp_path).put(array) is array


def test_files_are_begun_as_they_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_store, "SLAB", 10_000)
    store = ArrayStore(tmp_path)
    back = [store.put(np.full(n, n), 0) for n in (700, 700, 5000, 3)]
    for n, array in zip((700, 700, 5000, 3), back, strict=True):
        np.testing.assert_array_equal(array, np.full(n, n))
    del store
    np.testing.assert_array_equal(back[0], np.full(700, 700))


def test_a_folder_that_cannot_take_it(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"temporary folder '.*none' cannot take .*TMPDIR"):
        ArrayStore(tmp_path / "none").put(np.ones(10), 0)
