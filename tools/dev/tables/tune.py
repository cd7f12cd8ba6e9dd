"""Tune a pruned model: quality before, and after so many minutes, by which subset is trained.

    python tools/dev/bench.py tune                                             # SmolLM2-135M; hours on 2 cores
    python tools/dev/bench.py tune --subject minilm --minutes 2                # all-MiniLM-L6-v2
    python tools/dev/bench.py tune --ratios 0.35 --minutes 5 --subsets biases  # one cell

SmolLM2's perplexity needs what `bench.py smollm2` needs; its texts, windows and the file of finished cells are those of
`bench.py decoder`. MiniLM's is the mean cosine of sentence embeddings, calibrated on 512 sentences of editorials, measured
on 1,024 of reviews. The model is pruned once for each ratio, as a checkpoint with stock widths; each subset is trained from
there. Minutes are of the clock, and what they buy depends on the machine. "refit" is the closed form of `--refit`.
"""

import argparse
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.fx_module import Executor
from liar_opt.passes.base import Pass, State
from liar_opt.passes.prune_job import prune
from liar_opt.passes.refit_vectors import Refitted, RefitVectorsPass
from liar_opt.passes.tune_module import SUBSETS, Tuned, TuneModulePass
from liar_opt.passes.verify_model import VerifyModelPass
from liar_opt.tools.demo import tokenise
from liar_opt.tools.demo_assets import minilm_folder, split
from liar_opt.tools.dev.harness import Cells, commit, say, table
from liar_opt.tools.dev.subjects.minilm import CALIBRATION, HELD_OUT
from liar_opt.tools.dev.subjects.smollm2 import load_model, perplexity
from liar_opt.tools.dev.tables.decoder import Workplace, add_setting, batches_of, feed

RATIOS, MINUTES = (0.2, 0.35, 0.5), (5.0, 20.0)
REFIT = "refit"


class Subject(ABC):
    """A model, what it is calibrated on, and how good it is.

    Args:
        options: of the command.
    """

    measure = ""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.cells = options, Cells(options.cells)

    def cached(self, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Looks a cell up by what makes it, or makes and keeps it."""
        name = json.dumps({**key, "subject": self.options.subject, "seed": self.options.seed}, sort_keys=True)
        found: dict[str, Any] = self.cells.made(name, lambda: {**make(), "commit": commit()})
        say(f"{name}: {found}")
        return found

    @abstractmethod
    def given(self) -> tuple[Any, Any, dict[str, Any]]:
        """Returns the model, the calibration data and the options that go with it."""

    @abstractmethod
    def value(self, state: State) -> float:
        """Returns how good the graph is, as it is now."""


class SmolLM2(Subject):
    """A decoder, by its perplexity."""

    measure = "perplexity"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.work = Workplace(options)

    def cached(self, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """As of the decoder's table."""
        return self.work.cached(key, make)

    def given(self) -> tuple[Any, Any, dict[str, Any]]:
        """Windows of Brown."""
        ids = self.work.calibration("brown")
        return load_model(), feed(ids), {"batch_size": 8, "samples": len(ids)}

    def value(self, state: State) -> float:
        """Over windows that are held out."""
        model: Any = state.model
        executor = Executor(model, model.device)

        def logits(given: Mapping[str, np.ndarray]) -> np.ndarray:
            return executor.run(given, wanted=[model.results[0]])[model.results[0]].numpy()

        return perplexity(logits, batches_of(self.work.held))


class MiniLM(Subject):
    """An encoder, by the cosine of its embeddings to the dense model's."""

    measure = "cosine"

    def given(self) -> tuple[Any, Any, dict[str, Any]]:
        """Sentences of editorials."""
        return minilm_folder(), [s.text for s in split("nyt", CALIBRATION, self.options.seed).chosen], {}

    def value(self, state: State) -> float:
        """Over reviews."""
        dense, pruned = (self._embeddings(model) for model in (state.as_it_came().model(), state.model))
        return float((dense * pruned).sum(1).mean())

    def _embeddings(self, model: Any) -> NDArray[np.float64]:
        executor, parts = Executor(model, model.device), []
        for _, feeds in tokenise([s.text for s in split("reviews", HELD_OUT, self.options.seed).chosen], minilm_folder()):
            hidden = executor.run(feeds, wanted=[model.results[0]])[model.results[0]].double().numpy()
            mask = feeds["attention_mask"][..., None]
            pooled = (hidden * mask).sum(1)
            parts.append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
        return np.concatenate(parts)


SUBJECTS: dict[str, type[Subject]] = {"smollm2": SmolLM2, "minilm": MiniLM}


class Pruned:
    """The model, pruned to a share when it is first asked for; what is trained of it is taken back afterwards."""

    def __init__(self, subject: Subject, ratio: float) -> None:
        self.subject, self.ratio = subject, ratio

    @cached_property
    def state(self) -> State:
        """Behind the check of the cut."""
        found = list[State]()

        def keep(step: Pass[Any], result: Any) -> None:
            if isinstance(step, VerifyModelPass):
                found.append(result.state)

        model, data, more = self.subject.given()
        o = self.subject.options
        more |= {"seed": o.seed, "allocate": o.allocate, "provider": "cpu", "latency": False}
        prune(model, data, sparsity=self.ratio, observer=keep, **more)
        return found[-1]

    def before(self) -> dict[str, Any]:
        """Without any training."""
        return {"value": self.subject.value(self.state)}

    def after(self, step: Pass[Any]) -> dict[str, Any]:
        """With it, and what the report says."""
        old = [(c, c.values) for c in self.state.model.constants()]
        step(self.state)
        value = self.subject.value(self.state)
        for constant, array in old:
            constant.values = array
        entry = self.state.get(Refitted if isinstance(step, RefitVectorsPass) else Tuned)
        return {"value": value, **{k: v for k, v in vars(entry).items() if isinstance(v, (int, float, str))}}


def rows(subject: Subject) -> Iterator[list[str]]:
    """Measures what is missing, a row as soon as it is there."""
    o, cached = subject.options, subject.cached
    for ratio in o.ratios:
        pruned = Pruned(subject, ratio)
        key = {"tune": None, "share": ratio, **({} if o.allocate is None else {"allocate": o.allocate})}
        before = cached(key, pruned.before)
        yield [f"{ratio:.0%}", "nothing", "", "", "", "", f"{before['value']:.4g}"]
        for subset in o.subsets:
            for minutes in (0.0,) if subset == REFIT else o.minutes:
                step = RefitVectorsPass() if subset == REFIT else TuneModulePass(minutes, subset, o.seed)
                found = cached({**key, "tune": subset, "minutes": minutes}, partial(pruned.after, step))
                share, steps = ("", "") if subset == REFIT else (f"{100 * found['share']:.2g} %", f"{found['steps']}")
                losses = f"{found['before']:.4f} -> {found['after']:.4f}"
                yield [f"{ratio:.0%}", subset, share, f"{found['seconds']:.0f}", steps, losses, f"{found['value']:.4g}"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--subject", choices=SUBJECTS, default="smollm2")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of the prunable parameters, to remove")
    parser.add_argument("--allocate", choices=("uniform", "curves"), help="how the ratio is shared out (default: prune's)")
    parser.add_argument("--minutes", type=float, nargs="+", default=MINUTES, help="of training")
    parser.add_argument("--subsets", choices=(REFIT, *SUBSETS), nargs="+", default=(REFIT, *SUBSETS), help="trained")
    add_setting(parser)
    parser.set_defaults(calibration_tokens=8192)


def main(options: argparse.Namespace) -> int:
    """The command."""
    subject = SUBJECTS[options.subject](options)
    found = []
    for row in rows(subject):
        found.append(row)
        say(" | ".join(row))
    ratios, minutes = (" ".join(f"{v:g}" for v in values) for values in (options.ratios, options.minutes))
    setting = f"--allocate {options.allocate} " if options.allocate else ""
    setting += f"--calibration-tokens {options.calibration_tokens} --evaluation-tokens {options.evaluation_tokens} "
    shown = f"{setting}--window {options.window} " if options.subject == "smollm2" else ""
    print(
        f"`python tools/dev/bench.py tune --subject {options.subject} --ratios {ratios} --minutes {minutes} {shown}--seed "
        f"{options.seed}`\n"
    )
    head = ["removed", "trained", "of the parameters", "seconds", "steps", "loss on held-back batches", subject.measure]
    print(table(head, found), end="")
    return 0
