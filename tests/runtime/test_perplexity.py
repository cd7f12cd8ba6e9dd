import numpy as np
import pytest

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.perplexity import negative_log_likelihood, perplexity


def logits_of(rng: np.random.Generator, ids: np.ndarray, words: int = 7) -> np.ndarray:
    return (3 * rng.standard_normal((*ids.shape, words))).astype(np.float32)


def test_equals_the_sum_written_out() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 7, (3, 5))
    scores = logits_of(rng, ids)
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2, [False] + [True] * 4])
    total, count = 0.0, 0
    for row in range(3):
        for t in range(1, 5):
            if mask[row, t] and mask[row, t - 1]:
                p = np.exp(scores[row, t - 1].astype(np.float64))
                total -= np.log(p[ids[row, t]] / p.sum())
                count += 1
    found = perplexity(lambda feed: scores, [{"input_ids": ids}], [mask])
    assert found.tokens == count == 9
    assert found.nats == pytest.approx(total / count, rel=1e-6)
    assert found.value == pytest.approx(np.exp(total / count), rel=1e-6)


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary() -> None:
    ids = np.zeros((2, 4), np.int64)
    found = perplexity(lambda feed: np.full((2, 4, 11), -3.0, np.float16), [{"input_ids": ids}] * 2, [None, None])
    assert found.value == pytest.approx(11) and found.tokens == 12


def test_large_logits_do_not_overflow() -> None:
    scores = np.array([[[1e4, 0.0, -1e4]]], np.float32)
    assert negative_log_likelihood(scores, np.array([[0]])) == pytest.approx(0.0)
    assert negative_log_likelihood(scores, np.array([[2]])) == pytest.approx(2e4)


def test_what_cannot_be_measured_is_refused() -> None:
    ids = np.zeros((2, 1), np.int64)
    with pytest.raises(OptionError, match="at least two tokens"):
        perplexity(lambda feed: np.zeros((2, 1, 3)), [{"input_ids": ids}], [None])
    with pytest.raises(OptionError, match="NaN or Inf"):
        perplexity(lambda feed: np.full((1, 2, 3), np.nan), [{"input_ids": np.zeros((1, 2), np.int64)}], [None])
