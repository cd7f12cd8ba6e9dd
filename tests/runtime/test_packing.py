import numpy as np
import pytest

from liar_opt.runtime.packing import pack, packed_rows

SEPARATOR = 99


@pytest.mark.parametrize("window", [1, 3, 4, 7, 50])
def test_the_stream_is_cut_without_loss(window: int) -> None:
    rng = np.random.default_rng(window)
    texts = [rng.integers(0, 90, rng.integers(0, 9)).tolist() for _ in range(17)]
    full, tail = pack(texts, window, SEPARATOR)
    assert full.dtype == tail.dtype == np.int64
    assert full.shape[1] == window and len(tail) < window
    expected: list[int] = []
    for text in filter(None, texts):
        expected += ([SEPARATOR] if expected else []) + text
    assert [*full.reshape(-1).tolist(), *tail.tolist()] == expected


def test_texts_meet_over_one_separator_or_none() -> None:
    assert pack([[1, 2], [3], [4]], 6, SEPARATOR)[0].tolist() == [[1, 2, SEPARATOR, 3, SEPARATOR, 4]]
    assert pack([[1, 2], [3], [4]], 4, None)[0].tolist() == [[1, 2, 3, 4]]
    assert pack([[1, 2], []], 3, SEPARATOR)[1].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("windows", "window", "most", "rows"),
    [(512, 128, 32, 32), (512, 512, 32, 8), (64, 128, 32, 6), (8, 2048, 32, 1), (5, 8192, 32, 1), (1000, 8, 32, 32)],
)
def test_rows_of_a_packed_batch(windows: int, window: int, most: int, rows: int) -> None:
    assert packed_rows(windows, window, most) == rows
