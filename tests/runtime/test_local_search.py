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


@pytest.mark.parametrize("blocks", [list(range(8)), [0, 1, 1, 2, 2, 2, 3, 4]])
@pytest.mark.parametrize("seed", range(6))
def test_the_block_that_gains_most_comes_back_first(seed: int, blocks: list[int]) -> None:
    """One trial: it comes back, and what costs least then goes; both by the formula."""
    problems = [problem(seed, blocks), problem(seed + 50, blocks, columns=11, scale=0.3)]
    number = max(blocks) + 1
    start = np.sort(np.random.default_rng(seed).permutation(number)[: number // 2])
    more = min((np.append(start, b) for b in np.setdiff1d(np.arange(number), start)), key=lambda k: residual(problems, k))
    left = min((more[more != b] for b in more), key=lambda k: residual(problems, k))
    assert swap_blocks(problems, start, RIDGE, trials=1).tolist() == sorted(left)


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
