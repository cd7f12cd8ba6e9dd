"""Time the solver by width, in numpy and in torch, beside one Cholesky factorisation of that width in each.

    python tools/dev/bench.py solver                                   # 1,536 to 4,096, numpy and torch on the CPU
    python tools/dev/bench.py solver --widths 8192 16384               # many minutes, and 12 n^2 numbers of memory
    python tools/dev/bench.py solver --devices cuda --single           # float32 factors, refined

Selection is greedy, of half of the channels; the repair is one solution and its fold. Both are O(n^3). Of torch it is said
how many of the kept channels are those of numpy, and how far the repaired weights of the same channels are from numpy's.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from liar_opt.runtime.arrays import HOST, Arrays, TorchArrays, solving_on
from liar_opt.runtime.solve import Problem, RidgeChoice, half_the_threads, repair_weight, select_greedy
from liar_opt.tools.dev.harness import Others, say, setting, table

WIDTHS = (1536, 2048, 3072, 4096)
TURNS = 3
WIDE = 2048
"""Above this width each thing is timed once."""
RIDGE = 1e-3


def problem_of(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the covariance of made-up rows whose channels are mixed, [n, n], a weight [n, n / 4] and a mean [n]."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((2 * n, n), np.float32) @ (
        np.eye(n, dtype=np.float32) + rng.standard_normal((n, n), np.float32) / np.float32(np.sqrt(n))
    )
    covariance = (mixed.T @ mixed / np.float32(2 * n)).astype(np.float64)
    return covariance, rng.standard_normal((n, n // 4)) / np.sqrt(n), rng.standard_normal(n)


def seconds_of(work: Callable[[], Any], arrays: Arrays, turns: int) -> tuple[float, Any]:
    """Returns the median over some turns, and what it gave."""
    found, result = [], None
    for _ in range(turns):
        result = None
        began = time.perf_counter()
        result = work()
        if isinstance(arrays, TorchArrays) and arrays.device.type == "cuda":
            arrays.torch.cuda.synchronize(arrays.device)
        found.append(time.perf_counter() - began)
    return statistics.median(found), result


def solved(n: int, seed: int, arrays: Arrays, before: dict[str, Any] | None) -> tuple[list[str], dict[str, Any]]:
    """Times one width in one place.

    Args:
        n: the width.
        seed: of the problem.
        arrays: where.
        before: what numpy has found; None where this is numpy.

    Returns:
        A row of the table, and the kept channels with the repaired weight.
    """
    covariance, weight, mean = (arrays.real(a) for a in problem_of(n, seed))
    turns = TURNS if n <= WIDE else 1
    with solving_on(arrays), half_the_threads(n):  # as pruning calls them
        cholesky, _ = seconds_of(lambda: arrays.factor(covariance, 1e-3, 2.0), arrays, turns)
        problem = Problem(covariance, weight, np.arange(n))
        select, selection = seconds_of(lambda: select_greedy([problem], n // 2, RIDGE), arrays, turns)
        kept = np.arange(n)[::2]  # the same everywhere, so that weights can be compared
        removed, choice = np.setdiff1d(np.arange(n), kept), RidgeChoice("repair", RIDGE)
        repair, fit = seconds_of(lambda: repair_weight(covariance, mean, weight, kept, removed, choice), arrays, turns)
    found = {"kept": selection.kept_blocks, "weight": fit.on_host().weight}
    cells = [f"{s:.3f} s" for s in (cholesky, select, repair)]
    cells += [f"{select / cholesky:.1f}x", f"{repair / cholesky:.1f}x", f"{1e12 * (select + repair) / n**3:.0f}"]
    if before is None:
        return [f"{n:,}", "numpy", *cells, "-", "-"], found
    same = np.intersect1d(found["kept"], before["kept"]).size
    off = float(np.abs(found["weight"] - before["weight"]).max() / np.abs(before["weight"]).max())
    named = f"{arrays.where}, {'float32 refined' if arrays.precision.single else 'float64'}"
    return [f"{n:,}", named, *cells, f"{same:,} of {n // 2:,}", f"{off:.0e}"], found


def rows_of(widths: tuple[int, ...], seed: int, places: list[Arrays]) -> str:
    """Returns the table."""
    rows = []
    for n in widths:
        before: dict[str, Any] | None = None
        for arrays in places:
            row, found = solved(n, seed, arrays, before)
            before = found if before is None else before
            rows.append(row)
            say(f"solver: {row}")
    head = ["n", "in", "Cholesky", "select half", "repair", "selection over Cholesky", "repair over Cholesky", "ps / n^3"]
    return table([*head, "kept as numpy", "weights off by"], rows)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the dimensions that are solved")
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="of torch (default: cpu)")
    parser.add_argument("--single", action="store_true", help="with float32 factors and refinement in torch as well")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Prints the table."""
    places: list[Arrays] = [HOST]
    for device in options.devices:
        places += [TorchArrays(device, single) for single in ((False, True) if options.single else (False,))]
    given, others = setting(options.seed), Others()
    text = rows_of(tuple(options.widths), options.seed, places)
    machine = f"{given['cores']} cores, {given['processor']}, BLAS kernels for {' and '.join(given['blas'])}"
    print(f"Seed {given['seed']}; commit {given['commit']}, {given['date']}; {machine}; {others.sentence()}.\n\n{text}")
    return 0
