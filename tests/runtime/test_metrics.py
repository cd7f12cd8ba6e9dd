"""Metrics: by hand, and against scipy and scikit-learn where they have them."""

import numpy as np
import pytest
import scipy.stats

from liar_opt.runtime import metrics

WANTED = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2])
SAID = np.array([0, 0, 1, 1, 0, 2, 2, 2, 0])


def test_confusion() -> None:
    assert metrics.confusion(SAID, WANTED, 3).tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 3]]


def test_accuracy_by_hand() -> None:
    assert metrics.accuracy(SAID, WANTED) == 6 / 9


def test_f1_by_hand() -> None:
    # precision and recall: 2/4 and 2/3, 1/2 and 1/2, 3/3 and 3/4
    each = [4 / 7, 1 / 2, 6 / 7]
    assert metrics.f1_macro(SAID, WANTED, 3) == pytest.approx(np.mean(each))
    assert metrics.f1_macro(SAID, WANTED, 5) == pytest.approx(np.mean(each))  # classes that nobody names do not count


def test_f1_binary_by_hand() -> None:
    wanted, said = np.array([1, 1, 1, 0, 0]), np.array([1, 0, 1, 1, 0])
    assert metrics.f1_binary(said, wanted) == pytest.approx(2 / 3)
    assert metrics.f1_binary(said, wanted, positive=0) == pytest.approx(1 / 2)
    assert metrics.f1_binary(np.zeros(5, int), wanted) == 0.0


def test_matthews_by_hand() -> None:
    wanted, said = np.array([1, 1, 1, 0, 0]), np.array([1, 0, 1, 1, 0])
    # tp 2, tn 1, fp 1, fn 1: (2*1 - 1*1) / sqrt(3 * 3 * 2 * 2)
    assert metrics.matthews(said, wanted, 2) == pytest.approx(1 / 6)
    assert metrics.matthews(np.ones(5, int), wanted, 2) == 0.0
    assert metrics.matthews(wanted, wanted, 2) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
def test_matthews_is_the_correlation_of_two_classes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted, said = rng.integers(0, 2, 71), rng.integers(0, 2, 71)
    assert metrics.matthews(said, wanted, 2) == pytest.approx(scipy.stats.pearsonr(said, wanted).statistic)


@pytest.mark.parametrize("seed", range(3))
def test_many_classes_against_scikit_learn(seed: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    wanted, said = rng.integers(0, 4, 57), rng.integers(0, 4, 57)
    assert metrics.f1_macro(said, wanted, 4) == pytest.approx(sklearn.f1_score(wanted, said, average="macro"))
    assert metrics.matthews(said, wanted, 4) == pytest.approx(sklearn.matthews_corrcoef(wanted, said))


@pytest.mark.parametrize("seed", range(3))
def test_correlations_against_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = rng.integers(0, 6, 53).astype(np.float64)  # many ties
    scores = (wanted + rng.standard_normal(53)).round(1)
    assert metrics.pearson(scores, wanted) == pytest.approx(scipy.stats.pearsonr(scores, wanted).statistic)
    assert metrics.spearman(scores, wanted) == pytest.approx(scipy.stats.spearmanr(scores, wanted).statistic)


def test_scores_that_are_all_alike_correlate_with_nothing() -> None:
    assert metrics.pearson(np.ones(4), np.arange(4)) == 0.0
    assert metrics.spearman(np.ones(4), np.arange(4)) == 0.0


def test_cosines() -> None:
    x, y = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]])
    assert metrics.cosines(x, y) == pytest.approx([24 / 25, -1.0, 0.0])


def test_neighbours_are_the_nearest_others() -> None:
    angles = np.radians([0, 10, 30, 100, 115])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1) * np.array([[1.0], [9.0], [2.0], [0.1], [3.0]])
    assert [set(row) for row in metrics.neighbours(vectors, 2).tolist()] == [{1, 2}, {0, 2}, {0, 1}, {4, 2}, {3, 2}]


def test_neighbours_of_more_rows_than_a_block() -> None:
    vectors = np.random.default_rng(0).standard_normal((1030, 3))
    found = metrics.neighbours(vectors, 1)[:, 0]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    near = unit @ unit.T - 3 * np.eye(1030)
    assert (found == near.argmax(1)).all()


def test_overlap_does_not_ask_for_an_order() -> None:
    found, wanted = np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 5]])
    assert metrics.overlap(found, wanted).tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Cat, a dog.", "cat dog"), ("An apple", "apple"), ("theatre", "theatre"), ("U.S.", "us"), ("!", "")],
)
def test_answers_are_normalised_as_squad_does(text: str, normal: str) -> None:
    assert metrics.normal_answer(text) == normal


def test_answers() -> None:
    gold = ["the Denver Broncos", "Denver"]
    assert metrics.exact_match("Denver Broncos!", gold) == 1.0
    assert metrics.exact_match("Broncos", gold) == 0.0
    assert metrics.answer_f1("Broncos", gold) == pytest.approx(2 / 3)
    assert metrics.answer_f1("in Denver", gold) == pytest.approx(2 / 3)
    assert metrics.answer_f1("Seattle", gold) == 0.0


def test_a_question_without_an_answer() -> None:
    assert metrics.exact_match("", []) == metrics.answer_f1("", []) == 1.0
    assert metrics.exact_match("Denver", []) == metrics.answer_f1("Denver", []) == 0.0


def test_divergence_is_that_of_the_probabilities() -> None:
    p, q = np.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]), np.array([[0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    # 0.5 ln 2 - 0.25 ln 2, whatever is added to the logits of a row
    found = metrics.divergences(np.log(p) + 7.0, np.log(q).astype(np.float32))
    np.testing.assert_allclose(found, [0.25 * np.log(2), 0.0], atol=1e-6)
