"""Scores against their formulas on the rows themselves; what a user's own function may return."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import pytest
from streams import STREAM, WEIGHTS, pruned

from liar_opt.passes.gradient_scores import GRADIENT_SCORES
from liar_opt.passes.measured import Measured
from liar_opt.passes.scores import SCORES
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.moments import Moments

RNG = np.random.default_rng(0)
ROWS = np.random.default_rng(5).standard_normal((211, 12)) @ np.random.default_rng(6).standard_normal((12, 12)) + 0.4
WEIGHT = np.random.default_rng(7).standard_normal((12, 5))


def consumer(owners: Any = None, weight: Any = WEIGHT, rows: Any = ROWS) -> Measured:
    moments = Moments(rows.shape[1])
    moments.add(len(rows), rows.sum(0), rows.T @ rows)
    return Measured(weight, np.arange(rows.shape[1]) if owners is None else np.asarray(owners), moments)


MEASURED = sorted(set(SCORES) - set(GRADIENT_SCORES))
HEADS = np.repeat(np.arange(4), 3)


def grouped(channels: Any, how: Any = np.sum) -> Any:
    return np.asarray([how(channels[HEADS == h]) for h in range(4)])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("magnitude", np.sqrt(grouped((WEIGHT**2).sum(1)))),
        ("magnitude-l1", grouped(np.abs(WEIGHT).sum(1))),
        ("activation-weighted", np.sqrt(grouped((ROWS**2).mean(0) * (WEIGHT**2).sum(1)))),
        ("ifv", grouped(ROWS.var(0), np.mean)),
        ("wifv", grouped(ROWS.var(0) * (WEIGHT**2).sum(1), np.mean)),
        ("wifn", grouped(np.sqrt((ROWS**2).mean(0)) * np.abs(WEIGHT).mean(1), np.mean)),
    ],
)
def test_formulas(name: str, expected: Any) -> None:
    np.testing.assert_allclose(SCORES[name].values([consumer(HEADS)], RNG), expected, rtol=1e-9)


def test_output_approximation_is_that_of_the_rows() -> None:
    y = ROWS @ WEIGHT
    single = [(np.outer(ROWS[:, j], WEIGHT[j]) ** 2).sum(1).mean() for j in range(12)]
    np.testing.assert_allclose(SCORES["output-approximation"].values([consumer()], RNG), single, rtol=1e-9)
    heads = []
    for head in range(4):
        left = y - ROWS[:, head == HEADS] @ WEIGHT[head == HEADS]
        heads.append(1 - (y * left).sum() / np.sqrt((y**2).sum() * (left**2).sum()))
    np.testing.assert_allclose(SCORES["output-approximation"].values([consumer(HEADS)], RNG), heads, rtol=1e-8)


@pytest.mark.parametrize("name", MEASURED)
def test_blocks_may_stand_in_any_order(name: str) -> None:
    """Renaming the blocks renames the choice; a dead block goes first under all that measure."""
    rows = ROWS.copy()
    rows[:, 6:9] = 0.0
    weight = np.where(np.arange(12)[:, None] // 3 == 2, 0.0, WEIGHT)
    plain = SCORES[name].select([consumer(HEADS, weight, rows)], 3, np.random.default_rng(1))
    turned = SCORES[name].select([consumer(3 - HEADS, weight, rows)], 3, np.random.default_rng(1))
    if name != "random":
        assert plain.tolist() == [0, 1, 3]
        assert turned.tolist() == [0, 2, 3]


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("keep", [1, 5, 11])
def test_as_many_blocks_are_kept_as_were_asked_for(name: str, keep: int) -> None:
    kept = SCORES[name].select([consumer(), consumer(weight=WEIGHT[:, ::-1])], keep, np.random.default_rng(3))
    assert kept.dtype == np.int64 and len(set(kept.tolist())) == keep and np.all(np.diff(kept) > 0)
    values = SCORES[name].values([consumer()], np.random.default_rng(3))
    assert values.shape == (12,) and np.isfinite(values).all()


def test_a_users_function() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    _, _, result = pruned(proto, 0.5, score=lambda consumers: -np.arange(consumers[0].blocks))
    assert [c.details["kept"] for c in result.changes] == [list(range(8)), list(range(10))]


def too_short(consumers: Any) -> Any:
    return np.ones(3)


def not_a_number(consumers: Any) -> Any:
    return np.where(np.arange(consumers[0].blocks) == 4, np.nan, 1.0)


def words(consumers: Any) -> Any:
    return ["high"] * consumers[0].blocks


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (too_short, r"'too_short' returned shape \[3\]; return a number for each of 17 blocks"),
        (not_a_number, "'not_a_number' returned NaN for block 4"),
        (words, "'words' did not return numbers"),
    ],
)
def test_a_users_function_that_is_wrong(function: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        pruned(graphs.parse(STREAM, WEIGHTS), 0.5, score=function)
