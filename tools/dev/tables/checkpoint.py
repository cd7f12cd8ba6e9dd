"""Prune SmolLM2-135M as a checkpoint with stock widths, as a module with free widths, and as ONNX: perplexity of each.

    python tools/dev/bench.py checkpoint                                     # the table; hours on 2 cores
    python tools/dev/bench.py checkpoint --ratios 0.2 --doors stock          # one cell

Needs what `bench.py smollm2` needs. Texts, windows and the file of finished cells are those of `bench.py decoder`. A stock
configuration has one width of a kind for all layers, so what goes is a step beside what was asked for: the two other doors
are asked for the share of the prunable parameters that the checkpoint lost. Seconds are of the pruning alone.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from liar_opt.passes.prune_job import prune
from liar_opt.tools.dev.harness import say, table
from liar_opt.tools.dev.subjects.smollm2 import load_model, perplexity
from liar_opt.tools.dev.tables.decoder import Workplace, add_setting, batches_of, feed, measure

RATIOS = (0.2, 0.35, 0.5)
STOCK = "stock"
DOORS: dict[str, tuple[str, dict[str, Any]]] = {
    STOCK: ("checkpoint, one width of a kind", {}),
    "free": ("module, free widths", {"checkpoint": False}),
    "onnx": ("ONNX", {}),
}


def of_module(module: Any, held: np.ndarray) -> float:
    """Perplexity of a module over windows [n, s]."""
    import torch

    def logits(given: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(module(**{k: torch.from_numpy(v) for k, v in given.items()}, use_cache=False).logits)

    return perplexity(logits, batches_of(held))


def cell(work: Workplace, door: str, share: float) -> dict[str, Any]:
    """Prunes once, to a share of the prunable parameters, and measures."""
    o, ids = work.options, work.calibration("brown")
    model = work.model if door == "onnx" else load_model()
    began = time.perf_counter()
    result: Any = prune(
        model,
        feed(ids),
        sparsity=share,
        batch_size=8,
        samples=len(ids),
        seed=o.seed,
        provider="cpu",
        latency=False,
        fresh=True,
        **DOORS[door][1],
    )
    seconds, report = time.perf_counter() - began, result.report
    value = measure(result.model, work.held) if door == "onnx" else of_module(result.module, work.held)
    prunable = 1.0 - report["prunable"]["after"] / report["prunable"]["before"]
    parameters = 1.0 - report["after"]["parameters"] / report["before"]["parameters"]
    return {"perplexity": value, "prunable": prunable, "parameters": parameters, "seconds": seconds}


def rows(work: Workplace) -> Iterator[list[str]]:
    """Measures what is missing, a row as soon as it is there."""
    for ratio in work.options.ratios:
        share = ratio
        for door in work.options.doors:
            found = work.cached({"door": door, "share": share}, partial(cell, work, door, share))
            if door == STOCK:
                share = round(found["prunable"], 4)
            shares = [f"{found[k]:.1%}" for k in ("prunable", "parameters")]
            yield [f"{ratio:.0%}", DOORS[door][0], *shares, f"{found['perplexity']:.2f}", f"{found['seconds']:.0f}"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of the prunable parameters, to remove")
    parser.add_argument("--doors", choices=DOORS, nargs="+", default=tuple(DOORS), help="in the order of the rows")
    add_setting(parser)
    parser.set_defaults(calibration_tokens=8192)


def main(options: argparse.Namespace) -> int:
    """The command."""
    work = Workplace(options)
    dense = work.cached({"dense": "module"}, lambda: {"perplexity": of_module(load_model(), work.held)})
    found = []
    for row in rows(work):
        found.append(row)
        say(" | ".join(row))
    ratios = " ".join(f"{ratio:g}" for ratio in options.ratios)
    print(
        f"`python tools/dev/bench.py checkpoint --ratios {ratios} --calibration-tokens {options.calibration_tokens} "
        f"--evaluation-tokens {options.evaluation_tokens} --window {options.window} --seed {options.seed}`\n\n"
        f"Perplexity of SmolLM2-135M-Instruct (4-bit weights, dequantised) on {options.evaluation_tokens:,} tokens of "
        f"{options.held_out}; calibrated on {options.calibration_tokens:,} of Brown. Dense: {dense['perplexity']:.2f}.\n"
    )
    head = ["asked for", "door", "of the prunable removed", "of all parameters", "perplexity", "seconds"]
    print(table(head, found), end="")
    return 0
