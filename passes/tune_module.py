"""Train a small subset of a pruned module against the dense one: vectors alone, or products of low rank with them.

PERP ("Rethinking the Prune-Retrain Paradigm", arXiv 2312.15230) finds that biases and the gains of normalisations, some
hundredths of a percent of the parameters, recover most of what retraining all would, and that LoRA closes the rest.
Nothing is labelled here: what is learned is the output of the dense model on the calibration data, by KL(dense || pruned)
where that is logits over a vocabulary, else by the relative squared error. It runs behind the repair and behind the check
that the cut is exact; what the report says of the outputs is measured again afterwards.

Batches that are held back judge: the best state on them is kept, and where none is better than before, nothing changes.
In a run that can be resumed the folder keeps how the training stands whenever they are looked at; another goes on from it.
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.fx_module import FxModel
from liar_opt.frontend.fx_training import RANK, Batch, Distillation, Subset
from liar_opt.frontend.graph_tensors import is_float
from liar_opt.frontend.tables import vocabulary
from liar_opt.passes.base import Change, Finding, OutputNames, Pass, PassResult, State, WholeModel
from liar_opt.passes.calibrate import divided
from liar_opt.passes.checkpoint import TRAINING
from liar_opt.passes.cut_vocabulary import WIDTHS, words_alone
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.prune_groups import Cut
from liar_opt.passes.registry import lookup
from liar_opt.passes.sweep import cut_arrays, held_batches
from liar_opt.passes.verify_model import compared_again
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.compare import holds_logits
from liar_opt.runtime.errors import InternalError, OptionError
from liar_opt.runtime.ranks import current
from liar_opt.runtime.training import Budget, KeptTraining, Schedule, Trained, train

SUBSETS = {"biases": Schedule(2e-3), "lora": Schedule(1e-3)}
"""What may be trained, and how: biases and gains of normalisations; those, and LoRA on the matrices of linear layers."""
STEP_ROWS = 512
"""Tokens of one step: many small steps are worth more than few large ones where time is short."""
HELD_ROWS = 4096
"""Tokens on which a state is judged, at the most."""
COMPARED = 4
"""Outputs that are compared, the first ones, where none are logits: caches come behind."""


@dataclass(frozen=True)
class Tuned(Finding):
    """What tuning came to, as the report has it.

    Attributes:
        what: the subset that was trained.
        parameters: how many numbers were trained.
        share: of the parameters of the pruned model; numbers of low rank, which are merged, are counted, too.
        rank: of what was added to matrices; None where none was.
        loss: "kl" or "mse": the distance between the outputs.
        outputs: that were compared.
        before: the loss on held-back batches before; None where there are none, or it is not finite.
        after: and at the state that was best on them, which was kept.
        kept: whether that is better than before; else everything is as it was.
        steps: that were made.
        best: the step behind which the kept state was.
        stopped: why it ended before its time; None where it did not.
        rows: tokens (or samples) of the batches that were trained on, and of those held back.
        budget: the seconds that were given.
        seconds: that it took, in interrupted runs as well.
    """

    by: ClassVar[str] = "tune-module"
    what: str
    parameters: int
    share: float
    rank: int | None
    loss: str
    outputs: list[str]
    before: float | None
    after: float | None
    kept: bool
    steps: int
    best: int
    stopped: str | None
    rows: tuple[int, int]
    budget: float
    seconds: float


@dataclass(frozen=True)
class TuneModulePass(Pass[Subset]):
    """Train a small subset of the pruned module for some minutes against the dense model's outputs.

    Attributes:
        tune: minutes.
        tune_what: the subset, of ``SUBSETS``.
        seed: for all that is drawn.
    """

    name: ClassVar[str] = "tune-module"
    tune: float = 5.0
    tune_what: str = "biases"
    seed: int = 0

    def requires(self, state: State) -> None:
        """Checks that there is what it works on."""
        if state.calibration is None or not isinstance(state.model, FxModel):
            raise InternalError("what is tuned is a module that was pruned on calibration data")

    def plan(self, state: State) -> Subset:
        """Returns the parameters that will be trained."""
        return Subset(state.analysed(), self.tune_what == "lora", vocabulary(state.model), self.seed)

    def apply(self, state: State, plan: Subset) -> PassResult:
        """Trains them; adds ``Tuned``, and measures the outputs anew where they changed."""
        file = None if state.checkpoint is None else KeptTraining(state.checkpoint.folder / TRAINING)
        used = 0.0 if file is None else file.seconds
        budget = Budget(time.monotonic(), 60.0 * self.tune, time.monotonic, used)
        known, held = self._batches(state)
        distillation = _distillation(state, plan, known[0])
        done = self._trained(state, plan, distillation, (known, held), budget, file)
        kept = done.best > 0
        if kept:
            plan.write()
        total = state.model.parameters()
        state.add(
            Tuned(
                self.tune_what,
                plan.numbers,
                plan.numbers / total,
                RANK if self.tune_what == "lora" else None,
                "kl" if distillation.logits else "mse",
                [_shown(state, name) for name in distillation.outputs],
                done.before if math.isfinite(done.before) else None,
                done.after if math.isfinite(done.after) else None,
                kept,
                done.steps,
                done.best,
                done.stopped,
                (sum(map(_rows_of, known)), sum(map(_rows_of, held))),
                budget.seconds,
                budget.passed,
            )
        )
        if not kept:
            return PassResult(state)
        compared_again(state)
        return PassResult(state, (Change("tune", f"{self.tune_what} of the module", plan.numbers, plan.numbers),))

    def _trained(
        self,
        state: State,
        subset: Subset,
        distillation: Distillation,
        batches: tuple[list[Batch], list[Batch]],
        budget: Budget,
        file: KeptTraining | None,
    ) -> Trained:
        known, held = batches
        if not subset.leaves or not distillation.outputs or not held:
            reason = "there is one sample alone, and none to hold back" if not held else "nothing of that kind was found"
            return Trained(math.nan, math.nan, 0, 0, reason)
        return train(
            subset.leaves,
            lambda i: distillation.loss(known[i]),
            lambda: distillation.distance(held),
            len(known),
            budget,
            SUBSETS[self.tune_what],
            self.seed,
            lambda done, all_: state.progress("tune", done, all_),
            file,
        )

    def _batches(self, state: State) -> tuple[list[Batch], list[Batch]]:
        """Returns batches of a step each, and those that are held back."""
        assert state.calibration is not None
        data = divided(state.calibration, state.model.inputs())
        away = set(held_batches(len(data.batches))) if len(data.batches) > 1 else set()
        cut = state.get(Cut)
        ends = {} if cut is None else cut.ends
        found: tuple[list[Batch], list[Batch]] = ([], [])
        free, rows = all(not i.shape or not isinstance(i.shape[0], int) for i in state.model.inputs()), 0
        for index, (feeds, mask) in enumerate(zip(data.batches, data.row_masks, strict=True)):
            own = replace(data, batches=(feeds,), row_masks=(mask,)).in_batches_of(_samples(feeds, mask, free))
            for part in _parts(own, ends):
                rows += _rows_of(part) if index in away else 0
                if index not in away or rows <= HELD_ROWS or not found[1]:
                    found[index in away].append(part)
        return found


def require_tuning(options: PruneOptions, calibration: Any) -> None:
    """Checks what is asked for.

    Raises:
        OptionError: there is no time or no data to train on, or another option excludes it.
    """
    if options.refit:
        _require_widths("refit", options)
        if calibration is None:
            raise OptionError("refit fits to the dense model on calibration data; give some (--calibration texts.txt)")
    if options.tune is None:
        if options.given("tune_what"):
            raise OptionError("tune-what says what --tune trains; give --tune MINUTES beside it")
        return
    lookup("tune-what", SUBSETS, options.tune_what)
    if not (options.tune > 0 and math.isfinite(options.tune)):
        raise OptionError(f"tune {options.tune:g} is no time to train in; give minutes above zero")
    if calibration is None:
        raise OptionError("tune learns what the dense model gives on calibration data; give some (--calibration texts.txt)")
    _require_widths("tune", options)
    if current().size > 1:
        raise OptionError("tune runs in one process; prune with many, then tune the result in one with --sparsity 0")


def _require_widths(name: str, options: PruneOptions) -> None:
    if options.pattern is not None and not any(options.given(name) for name in WIDTHS):
        raise OptionError(
            f"{name} stands behind a cut of widths, not a pattern; run it on the result, with a sparsity of 0"
        )
    alone = (options.experts, options.blocks) != (None, None) and not any(options.given(name) for name in WIDTHS)
    if alone or words_alone(options):
        raise OptionError(f"{name} stands behind a cut of widths; give a sparsity (0 cuts none) beside it")


def _parts(data: CalibrationData, ends: Any) -> list[Batch]:
    pairs = zip(data.batches, data.row_masks, strict=True)
    return [Batch(feeds, cut_arrays(dict(feeds), ends), mask) for feeds, mask in pairs]


def _samples(feeds: dict[str, NDArray[Any]], mask: NDArray[np.bool_] | None, free: bool) -> int:
    """Returns how many samples make a step; all of a batch where samples have no tokens, or it has a fixed size."""
    lengths = [v.shape[1] for v in feeds.values() if v.ndim == 2 and not is_float(v.dtype)]
    length = mask.shape[1] if mask is not None and mask.ndim == 2 else max(lengths, default=0)
    everything = max((len(v) for v in feeds.values() if v.ndim), default=1)
    return max(1, STEP_ROWS // length) if length and free else everything


def _rows_of(batch: Batch) -> int:
    """Returns the rows of a batch that count: tokens, or samples."""
    if batch.mask is not None:
        return int(batch.mask.sum())
    sizes = [v.size if v.ndim == 2 and not is_float(v.dtype) else len(v) for v in batch.feeds.values() if v.ndim]
    return max(sizes, default=1)


def _distillation(state: State, subset: Subset, batch: Batch) -> Distillation:
    """Returns the pruned module beside the model as it came: logits over a vocabulary alone, else the first outputs."""
    model, whole = state.model, state.get(WholeModel)
    dense = state.as_it_came().model()
    assert isinstance(model, FxModel) and isinstance(dense, FxModel)
    names = {t.name: t.name for t in model.graph.outputs if is_float(t.dtype)}
    if whole is not None:
        names = {name: whole.names.get(name, name) for name in names}
    theirs = state.engine().whole(dense).run(batch.dense, list(names.values()), arrays=True)
    ours = state.engine().whole(model).run(batch.feeds, list(names), arrays=True)
    names = {n: m for n, m in names.items() if n in ours and m in theirs and ours[n].shape == theirs[m].shape}
    words = vocabulary(model)
    logits = [n for n in names if ours[n].ndim == 3 and words and holds_logits(_shown(state, n), ours[n].shape, words)]
    chosen = logits[:1] or list(names)[:COMPARED]
    outputs = {name: names[name] for name in chosen}
    return Distillation(dense, model, subset, outputs, bool(logits), state.memory.limit // 4)


def _shown(state: State, name: str) -> str:
    """Returns what the module calls an output."""
    named = state.get(OutputNames)
    return name if named is None else named.by_tensor.get(name, name)
