"""Quantise what was pruned, and compare the four corners: dense and pruned, in float and quantised.

    bytes     of each file
    latency   all four in turns, on the batch that is timed
    quality   the difference of the first output to the dense float model's, on calibration batches that were held back:
              neither a repair nor a range was fitted to them

The quantised result is checked: ONNX Runtime loads it, and runs it without making what is no number. Where the quantiser
does not take the graph, its words are in the report, and the result stays the float model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from liar_opt.frontend.engine import Engine
from liar_opt.frontend.onnx_engine import OnnxEngine
from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.frontend.onnx_quantise import (
    BLOCKS,
    SCHEMES,
    STATIC,
    RefusedError,
    Scheme,
    quantised,
    require_quantiser,
    words_of,
)
from liar_opt.frontend.onnx_rounding import Rounded, Rows, rounded_anew
from liar_opt.passes.base import Finding, State
from liar_opt.passes.blank_cut import deployed
from liar_opt.passes.cut_vocabulary import ChosenWords, words_alone
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.prune_groups import Cut
from liar_opt.passes.registry import lookup
from liar_opt.passes.runtimes import BLOCK, RUNTIMES
from liar_opt.passes.sweep import cut_arrays, held_batches
from liar_opt.runtime.compare import DifferenceMeter
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.latency import CannotTime, measure_latency
from liar_opt.runtime.memory import show_size

HELD = 2
"""Held-back batches on which quality is measured."""
SECONDS = 1.0


@dataclass(frozen=True)
class Corner:
    """One of the four models.

    Attributes:
        name: "dense" or "pruned".
        quantised: whether it is.
        bytes: of its file.
        seconds: median time of one run; None where it was not timed.
        cosine: mean cosine of the first output to the dense float model's; None where there is none to compare.
        relative_rms: sqrt(mean |x - y|^2 / mean |y|^2) of it.
    """

    name: str
    quantised: bool
    bytes: int
    seconds: float | None = None
    cosine: float | None = None
    relative_rms: float | None = None


@dataclass(frozen=True)
class Quantised(Finding):
    """What quantising came to, as the report has it.

    Attributes:
        scheme: int8, int8-static or int4.
        block: of 4-bit weights; None of others.
        refused: why the result is the float model after all; None where it is not.
        dense_refused: why there is no quantised dense model to compare with.
        output: the output whose difference was measured.
        rows: of it.
        batch: what was timed; None where nothing was.
        rounded: how many weights of the result were rounded with error feedback, and what that gained on held-back rows.
        corners: the models that there are.
        seconds: that it took.
    """

    by: ClassVar[str] = "quantise_result"
    scheme: str
    block: int | None
    refused: str | None
    dense_refused: str | None
    output: str | None
    rows: int
    batch: str | None
    rounded: Rounded
    corners: list[Corner] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class QuantisedModel(Finding):
    """The quantised result."""

    by: ClassVar[str] = "quantise_result"
    model: OnnxOriginal


def scheme_of(options: PruneOptions) -> Scheme | None:
    """Returns how the result is to be quantised; None where it is not."""
    if options.quantize is None:
        return None
    row = RUNTIMES.get(options.runtime or "")
    return Scheme(options.quantize, BLOCK if row is None else row.block, options.runtime == "tensorrt")


def require_quantisable(options: PruneOptions) -> None:
    """Checks what can be said of quantising before the model is opened.

    Raises:
        OptionError: the scheme is unknown, what runs the result does not take it, or no width is cut.
    """
    name = options.quantize
    if name is None:
        return
    lookup("quantize", dict.fromkeys(SCHEMES), name)
    require_quantiser(name)
    row = RUNTIMES.get(options.runtime or "")
    if row is not None and name not in row.schemes:
        raise OptionError(
            f"{options.runtime} does not run {name}; give {' or '.join(row.schemes)}, or leave quantize out: its own tools "
            "quantise"
        )
    if words_alone(options):
        raise OptionError("quantize stands behind a cut of widths; give a sparsity (0 cuts none) beside the vocabulary")


def require_room(state: State, options: PruneOptions) -> None:
    """Checks that the model can be quantised where it is: one graph, which the memory holds whole.

    Raises:
        OptionError: it cannot.
    """
    if options.quantize is not None and state.model.merged is not None:
        raise OptionError(
            "quantize does not take a merged decoder, whose branches are run by one switch; give the decoder without its"
            " cache, or with it, as a file of its own, or leave quantize out"
        )
    if options.quantize is not None and state.memory.low:
        limit = show_size(state.memory.limit)
        raise OptionError(f"quantize holds the whole model in memory, which {limit} does not; give more, or leave it out")


def quantise_result(
    state: State,
    scheme: Scheme,
    dense: OnnxOriginal,
    pruned: OnnxOriginal,
    batch: Mapping[str, Any],
    timed: bool,
) -> Quantised:
    """Quantises both models, checks the result and compares the corners; adds both findings.

    Args:
        state: behind the checks.
        scheme: how.
        dense: the original, as ONNX.
        pruned: the result, as ONNX.
        batch: what is timed.
        timed: whether anything is.
    """
    assert state.calibration is not None
    began, data = time.perf_counter(), state.calibration
    state.progress("quantise", 0, 2)
    held = held_batches(len(data.batches))
    fitted = [i for i in range(len(data.batches)) if i not in held or len(held) == len(data.batches)]
    feeds, engine, rounded = _Feeds(state), OnnxEngine(state.device), Rounded()
    models: dict[tuple[str, bool], tuple[OnnxOriginal, int]] = {
        ("dense", False): (dense, _bytes(dense)),
        ("pruned", False): (pruned, _bytes(pruned)),
    }
    refused: dict[str, str | None] = {"dense": None, "pruned": None}
    for done, (name, model) in enumerate((("dense", dense), ("pruned", pruned))):
        try:
            ranges = [feeds.of(name, data.batches[i]) for i in fitted] if scheme.name == STATIC else ()
            small, size = quantised(model, scheme, ranges)
            if name == "pruned":
                small, rounded = rounded_anew(model, small, feeds.rows(name, fitted), feeds.rows(name, held), engine)
            _require_runs(engine, small, feeds.of(name, batch))
            models[name, True] = small, size
        except RefusedError as err:
            refused[name] = str(err)
        state.progress("quantise", done + 1, 2)
    output, rows, quality = _quality(state, models, feeds, held[:HELD])
    times, shapes = _times(state, models, feeds, batch) if timed else ({}, None)
    corners = [
        Corner(name, small, size, times.get((name, small)), *quality.get((name, small), (None, None)))
        for (name, small), (_, size) in sorted(models.items(), key=lambda entry: (entry[0][1], entry[0][0]))
    ]
    found_all = Quantised(
        scheme.name,
        scheme.block if scheme.name == BLOCKS else None,
        refused["pruned"],
        refused["dense"],
        output,
        rows,
        shapes,
        rounded,
        corners,
        time.perf_counter() - began,
    )
    state.add(found_all)
    if ("pruned", True) in models:
        state.add(QuantisedModel(models["pruned", True][0]))
    return found_all


class _Feeds:
    """What each model is fed: what shrank is cut, ids of words that stay are numbered anew where the model wants that."""

    def __init__(self, state: State) -> None:
        cut = state.get(Cut)
        self.ends = {} if cut is None else cut.ends
        self.words = state.get(ChosenWords)
        self.data = state.calibration

    def rows(self, name: str, places: Sequence[int]) -> Rows:
        """Returns some of the calibration batches as a model is fed, with which rows are real."""
        assert self.data is not None
        return Rows([self.of(name, self.data.batches[i]) for i in places], [self.data.row_masks[i] for i in places])

    def of(self, name: str, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a batch is for the dense or the pruned model."""
        feeds = [dict(batch), cut_arrays(dict(batch), self.ends)]
        if self.words is not None:
            feeds = [dict(f) for f in self.words.beside(*feeds)]
        return feeds[name == "pruned"]


def _bytes(model: OnnxOriginal) -> int:
    light, arrays = model.as_written()
    return int(light.ByteSize()) + sum(a.nbytes for a in arrays.values())


def _require_runs(engine: Engine, model: OnnxOriginal, feeds: Mapping[str, Any]) -> None:
    """Runs a quantised model once.

    Raises:
        RefusedError: it cannot be loaded, does not run, or gives what is not finite.
    """
    try:
        found = engine.whole(model).run(feeds, arrays=True)
    except MemoryError:
        raise
    except Exception as err:
        raise RefusedError(f"ONNX Runtime does not run what it made: {words_of(err)}") from err
    for name, value in found.items():
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise RefusedError(f"output '{name}' of what it made holds numbers that are none (NaN)")


def _quality(
    state: State,
    models: Mapping[tuple[str, bool], tuple[OnnxOriginal, int]],
    feeds: _Feeds,
    held: Sequence[int],
) -> tuple[str | None, int, dict[tuple[str, bool], tuple[float, float]]]:
    """Returns the output that is compared, its rows, and cosine and difference of each model; one is loaded at a time."""
    assert state.calibration is not None
    data, engine = state.calibration, OnnxEngine(state.device)
    wanted: dict[int, dict[str, Any]] = {}
    first, rows = None, 0
    result = {}
    for key, (model, _) in models.items():  # the dense one first
        session, meter = engine.whole(model), DifferenceMeter()
        for i in held:
            found = session.run(feeds.of(key[0], data.batches[i]), arrays=True)
            if key == ("dense", False):
                wanted[i] = cut_arrays(found, feeds.ends)
            for name, theirs in wanted[i].items():
                ours = found[name] if key[0] == "pruned" else cut_arrays({name: found[name]}, feeds.ends)[name]
                if ours.shape != theirs.shape or ours.dtype.kind != "f":
                    continue
                both = np.isfinite(ours) & np.isfinite(theirs)  # logits of words that went are -inf
                meter.add(name, np.where(both, ours, 0), np.where(both, theirs, 0), data.row_masks[i])
        del session
        found_here = meter.result()
        if first is None:
            first = next(iter(found_here), None)
        if first in found_here:
            assert first is not None
            rows = found_here[first].rows
            result[key] = (found_here[first].cosine, found_here[first].relative_rms)
    return first, rows, result


def _times(
    state: State, models: Mapping[tuple[str, bool], tuple[OnnxOriginal, int]], feeds: _Feeds, batch: Mapping[str, Any]
) -> tuple[dict[tuple[str, bool], float], str | None]:
    """Returns the seconds of each model, timed in turns, and what they ran on."""
    try:
        found = measure_latency(
            [deployed(model, state.device) for model, _ in models.values()],
            [feeds.of(name, batch) for name, _ in models],
            budget=SECONDS,
            least=8,
        )
    except CannotTime:
        return {}, None
    return dict(zip(models, found.seconds, strict=True)), found.batch
