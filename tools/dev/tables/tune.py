"""Tune SmolLM2-135M behind pruning: perplexity before, and after so many minutes, by which subset is trained.

    python tools/dev/bench.py tune                                             # the table; hours on 2 cores
    python tools/dev/bench.py tune --ratios 0.35 --minutes 5 --subsets biases  # one cell

Needs what `bench.py smollm2` needs. Texts, windows and the file of finished cells are those of `bench.py decoder`. The
model is pruned once for each ratio, as a checkpoint with stock widths; each subset is trained from there, with the machine
for itself: minutes are of the clock, and what they buy depends on it. "refit" is the closed form of `--refit`.
"""

import argparse
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np

from liar_opt.frontend.fx_module import Executor
from liar_opt.passes.base import Pass, State
from liar_opt.passes.prune_job import prune
from liar_opt.passes.refit_vectors import Refitted, RefitVectorsPass
from liar_opt.passes.tune_module import SUBSETS, Tuned, TuneModulePass
from liar_opt.passes.verify_model import VerifyModelPass
from liar_opt.runtime.perplexity import perplexity
from liar_opt.tools.dev.harness import say, table
from liar_opt.tools.dev.subjects.smollm2 import load_model
from liar_opt.tools.dev.tables.checkpoint import of_module
from liar_opt.tools.dev.tables.decoder import Workplace, add_setting, batches_of, feed

RATIOS, MINUTES = (0.2, 0.35, 0.5), (5.0, 20.0)
REFIT = "refit"


class Pruned:
    """The model, pruned to a share when it is first asked for; what is trained of it is taken back afterwards."""

    def __init__(self, work: Workplace, ratio: float) -> None:
        self.work, self.ratio = work, ratio

    @cached_property
    def state(self) -> State:
        """Behind the check of the cut."""
        o, ids, found = self.work.options, self.work.calibration("brown"), list[State]()

        def keep(step: Pass[Any], result: Any) -> None:
            if isinstance(step, VerifyModelPass):
                found.append(result.state)

        prune(
            load_model(),
            feed(ids),
            sparsity=self.ratio,
            batch_size=8,
            samples=len(ids),
            seed=o.seed,
            provider="cpu",
            latency=False,
            observer=keep,
        )
        return found[-1]

    def value(self) -> float:
        """Perplexity of the graph as it is now."""
        model: Any = self.state.model
        executor, batches = Executor(model, model.device), batches_of(self.work.held)

        def logits(given: Mapping[str, np.ndarray]) -> np.ndarray:
            return executor.run(given, wanted=[model.results[0]])[model.results[0]].numpy()

        return perplexity(logits, batches, [None] * len(batches)).value

    def before(self) -> dict[str, Any]:
        """Perplexity without any training."""
        return {"perplexity": self.value()}

    def after(self, step: Pass[Any]) -> dict[str, Any]:
        """Perplexity with it, and what the report says."""
        old = [(c, c.values) for c in self.state.model.constants()]
        step(self.state)
        value = self.value()
        for constant, array in old:
            constant.values = array
        entry = self.state.get(Refitted if isinstance(step, RefitVectorsPass) else Tuned)
        return {"perplexity": value, **{k: v for k, v in vars(entry).items() if isinstance(v, (int, float, str))}}


def rows(work: Workplace) -> Iterator[list[str]]:
    """Measures what is missing, a row as soon as it is there."""
    o = work.options
    for ratio in o.ratios:
        pruned = Pruned(work, ratio)
        before = work.cached({"tune": None, "share": ratio}, pruned.before)
        yield [f"{ratio:.0%}", "nothing", "", "", "", "", f"{before['perplexity']:.2f}"]
        for subset in o.subsets:
            for minutes in (0.0,) if subset == REFIT else o.minutes:
                step = RefitVectorsPass() if subset == REFIT else TuneModulePass(minutes, subset, o.seed)
                key = {"tune": subset, "minutes": minutes, "share": ratio}
                found = work.cached(key, partial(pruned.after, step))
                share = "" if subset == REFIT else f"{100 * found['share']:.2g} %"
                losses = f"{found['before']:.3f} -> {found['after']:.3f}"
                steps = "" if subset == REFIT else f"{found['steps']}"
                spent = f"{found['seconds']:.0f}"
                yield [f"{ratio:.0%}", subset, share, spent, steps, losses, f"{found['perplexity']:.2f}"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of the prunable parameters, to remove")
    parser.add_argument("--minutes", type=float, nargs="+", default=MINUTES, help="of training")
    parser.add_argument("--subsets", choices=(REFIT, *SUBSETS), nargs="+", default=(REFIT, *SUBSETS), help="trained")
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
    ratios, minutes = (" ".join(f"{v:g}" for v in values) for values in (options.ratios, options.minutes))
    print(
        f"`python tools/dev/bench.py tune --ratios {ratios} --minutes {minutes} --calibration-tokens "
        f"{options.calibration_tokens} --evaluation-tokens {options.evaluation_tokens} --window {options.window} --seed "
        f"{options.seed}`\n\nPerplexity of SmolLM2-135M-Instruct (4-bit weights, dequantised) on "
        f"{options.evaluation_tokens:,} tokens of {options.held_out}; calibrated and tuned on "
        f"{options.calibration_tokens:,} of Brown. Dense: {dense['perplexity']:.2f}.\n"
    )
    head = ["removed", "trained", "of the parameters", "seconds", "steps", "loss on held-back batches", "perplexity"]
    print(table(head, found), end="")
    return 0
