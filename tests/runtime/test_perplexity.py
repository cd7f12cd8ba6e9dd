import numpy as np
import pytest

from liar_opt.runtime.perplexity import negative_log_likelihood


def logits_of(rng: np.random.Generator, ids: np.ndarray, words: int = 7) -> np.ndarray:
    return (3 * rng.standard_normal((*ids.shape, words))).astype(np.float32)


def test_equals_what_is_written_out() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 7, (3, 5))
    scores = logits_of(rng, ids)
    found = negative_log_likelihood(scores, ids)
    for row, t in np.ndindex(3, 5):
        p = np.exp(scores[row, t].astype(np.float64))
        assert found[row, t] == pytest.approx(-np.log(p[ids[row, t]] / p.sum()), rel=1e-6)


def test_a_model_that_knows_nothing_has_the_size_of_its_vocabulary() -> None:
    found = negative_log_likelihood(np.full((2, 4, 11), -3.0, np.float16), np.zeros((2, 4), np.int64))
    np.testing.assert_allclose(np.exp(found), 11)


def test_large_logits_do_not_overflow() -> None:
    scores = np.array([[[1e4, 0.0, -1e4]]], np.float32)
    assert negative_log_likelihood(scores, np.array([[0]])) == pytest.approx(0.0)
    assert negative_log_likelihood(scores, np.array([[2]])) == pytest.approx(2e4)
