"""Swaps: every step is exact, nothing gets worse, and a bad start is mended."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.local_search import swap_blocks
from liar_opt.runtime.solve import Problem, penalised_error, select_greedy

RIDGE = 1e-3


def problem(seed: int, blocks: Any = None, width: int = 8, columns: int = 3, scale: float = 1.0) -> Problem:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((60, width)) @ rng.standard_normal((width, width))
    return Problem(
        np.cov(rows.T, bias=True),
        [rng.standard_normal((width, columns))],
        np.arange(width) if blocks is None else np.asarray(blocks),
        scale,
    )


def residual(problems: list[Problem], kept: Any) -> float:
    total = 0.0
    for p in problems:
        inside = np.isin(p.blocks, kept)
        lam = RIDGE * float(np.diagonal(p.covariance).mean())
        total += p.scale * penalised_error(p.covariance, p.weights[0], np.flatnonzero(inside), np.flatnonzero(~inside), lam)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_residuals_are_exact_and_never_rise(seed: int) -> None:
    problems = [problem(seed), problem(seed + 50, columns=11, scale=0.3)]
    start = np.sort(np.random.default_rng(seed).permutation(8)[:4])
    found = swap_blocks(problems, start, RIDGE, trials=100)
    assert found.before == pytest.approx(residual(problems, start), rel=1e-6)
    assert found.after == pytest.approx(residual(problems, found.kept_blocks), rel=1e-6)
    assert found.after <= found.before and found.kept_blocks.size == 4
    for inside, outside in itertools.product(found.kept_blocks, np.setdiff1d(np.arange(8), found.kept_blocks)):
        swapped = np.append(found.kept_blocks[found.kept_blocks != inside], outside)
        assert residual(problems, swapped) >= found.after * (1 - 1e-6)  # no single swap is better


def test_it_ends_below_greedy_and_near_the_best() -> None:
    for seed in range(10):
        problems = [problem(seed, np.repeat(np.arange(4), 2))]
        greedy = select_greedy(problems, 2, RIDGE).kept_blocks
        best = min(residual(problems, list(c)) for c in itertools.combinations(range(4), 2))
        found = swap_blocks(problems, greedy, RIDGE)
        assert best * (1 - 1e-9) <= found.after <= residual(problems, greedy) * (1 + 1e-9)
        assert found.swaps == 0 or found.after < found.before


def test_bounds() -> None:
    start = np.array([0, 1, 2, 3])
    assert swap_blocks([problem(0)], start, RIDGE, trials=0).kept_blocks.tolist() == [0, 1, 2, 3]
    assert swap_blocks([problem(0)], np.arange(8), RIDGE).swaps == 0
    with pytest.raises(InternalError, match="ridge 0"):
        swap_blocks([problem(0)], start, 0.0)
