"""The ridge rule from few tokens to many: never worse than no repair, near the best fixed ridge.

Rows are anisotropic, as activations are: a spectrum that falls by four orders of magnitude, a mean, heavy tails, and a few
outlier channels. Errors are taken on many fresh rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from liar_opt.passes.measured import Measured
from liar_opt.passes.repairs import REPAIRS
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.solve import RIDGE_GRID

WIDTH, COLUMNS, BATCHES = 64, 24, 20
MIXING = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)) * np.geomspace(1.0, 1e-2, WIDTH)[:, None]
OUTLIERS = np.where(np.arange(WIDTH) % 17 == 3, 12.0, 1.0)
WEIGHT = np.random.default_rng(1).standard_normal((WIDTH, COLUMNS)) / OUTLIERS[:, None]


def rows(seed: int, count: int) -> Any:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(5, (count, WIDTH)) @ MIXING + 0.1 * rng.standard_normal((count, WIDTH)) + 0.3) * OUTLIERS


def consumer(seed: int, tokens: int) -> Measured:
    """One batch in ten is held back, as in a run."""
    moments = Moments(WIDTH)
    for index, x in enumerate(np.array_split(rows(seed, tokens), BATCHES)):
        if len(x):
            moments.add(len(x), x.sum(0), x.T @ x, held_back=index % 10 == 5)
    return Measured(WEIGHT, np.arange(WIDTH), moments)


FRESH = rows(12345, 20_000)


def error(kept: Any, weight: Any, bias: Any) -> float:
    lost = FRESH @ WEIGHT - FRESH[:, kept] @ weight - bias
    return float((lost**2).sum() / ((FRESH @ WEIGHT) ** 2).sum())


@pytest.mark.parametrize("per_width", [0.5, 1, 2, 5, 10, 50])
def test_from_few_tokens_to_many(per_width: float) -> None:
    order = np.random.default_rng(2).permutation(WIDTH)
    kept, removed = np.sort(order[: WIDTH // 2]), np.sort(order[WIDTH // 2 :])
    chosen, none, best = [], [], []
    for seed in range(8):
        item = consumer(seed, round(per_width * WIDTH))

        def at(ridge: float | None, name: str = "liar", item: Measured = item) -> float:
            repaired = REPAIRS[name](item, kept, removed, ridge)
            return error(kept, repaired.weight, repaired.bias)

        chosen.append(at(None))
        none.append(at(None, "none"))
        best.append(min(at(ridge) for ridge in RIDGE_GRID))
        assert chosen[-1] <= none[-1] * 1.02
    assert np.mean(chosen) < np.mean(none)
    assert np.mean(chosen) <= np.mean(best) * (1.6 if per_width < 2 else 1.25 if per_width < 10 else 1.05)


def test_the_gap_says_what_more_rows_would_bring() -> None:
    """From 5 to 500 tokens a width the error falls by about the share that the gap names."""
    order = np.random.default_rng(2).permutation(WIDTH)
    kept, removed = np.sort(order[: WIDTH // 2]), np.sort(order[WIDTH // 2 :])
    gaps, errors = {}, {}
    for per_width in (5, 50, 500):
        found = [REPAIRS["liar"](consumer(seed, per_width * WIDTH), kept, removed, None) for seed in range(6)]
        gaps[per_width] = float(np.mean([r.gap for r in found if r.gap is not None]))
        errors[per_width] = float(np.mean([error(kept, r.weight, r.bias) for r in found]))
    assert gaps[5] > gaps[50] > gaps[500]
    assert gaps[5] == pytest.approx(1 - errors[500] / errors[5], abs=0.12)
