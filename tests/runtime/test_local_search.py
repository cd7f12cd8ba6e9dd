"""Swaps: nothing gets worse, a bad start is mended, and no swap of one block would be better in the end."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from formulas import penalised

from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.local_search import swap_blocks
from liar_opt.runtime.solve import Problem, select_greedy

RIDGE = 1e-3


def problem(seed: int, blocks: Any = None, width: int = 8, columns: int = 3, scale: float = 1.0) -> Problem:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((60, width)) @ rng.standard_normal((width, width))
    return Problem(
        np.cov(rows.T, bias=True),
        rng.standard_normal((width, columns)),
        np.arange(width) if blocks is None else np.asarray(blocks),
        scale,
    )


def residual(problems: list[Problem], kept: Any) -> float:
    return penalised(problems, kept, RIDGE)


@pytest.mark.parametrize("seed", range(6))
def test_no_single_swap_is_better(seed: int) -> None:
    problems = [problem(seed), problem(seed + 50, columns=11, scale=0.3)]
    start = np.sort(np.random.default_rng(seed).permutation(8)[:4])
    found = swap_blocks(problems, start, RIDGE, trials=100)
    assert found.size == 4 and found.tolist() == sorted(set(found.tolist()))
    assert found.tolist() == start.tolist() or residual(problems, found) < residual(problems, start)
    for inside, outside in itertools.product(found, np.setdiff1d(np.arange(8), found)):
        swapped = np.append(found[found != inside], outside)
        assert residual(problems, swapped) >= residual(problems, found) * (1 - 1e-6)


def test_it_ends_below_greedy_and_near_the_best() -> None:
    for seed in range(10):
        problems = [problem(seed, np.repeat(np.arange(4), 2))]
        greedy = select_greedy(problems, 2, RIDGE).kept_blocks
        best = min(residual(problems, list(c)) for c in itertools.combinations(range(4), 2))
        found = residual(problems, swap_blocks(problems, greedy, RIDGE))
        assert best * (1 - 1e-9) <= found <= residual(problems, greedy) * (1 + 1e-9)


def test_bounds() -> None:
    start = np.array([0, 1, 2, 3])
    assert swap_blocks([problem(0)], start, RIDGE, trials=0).tolist() == [0, 1, 2, 3]
    assert swap_blocks([problem(0)], np.arange(8), RIDGE).tolist() == list(range(8))
    with pytest.raises(InternalError, match="ridge 0"):
        swap_blocks([problem(0)], start, 0.0)
