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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from liar_opt.frontend.onnx_engine import OnnxEngine
from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.frontend.onnx_quantise import (
    BLOCKS,
    SCHEMES,
    STATIC,
    RefusedError,
    Scheme,
    quantised,
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


@dataclass(eq=False)
class Corners:
    """The models that there are, and how they are run.

    Attributes:
        state: behind the checks.
        scheme: how they are quantised.
        load: returns what runs one of them.
        deployed: returns what is timed of one.
        models: with the bytes of its file, each by its name and whether it is quantised; the dense one first.
        refused: why there is no quantised one, by name.
        rounded: what came of rounding with error feedback.
    """

    state: State
    scheme: Scheme
    load: Callable[[Any], Any]
    deployed: Callable[[Any], Any]
    models: dict[tuple[str, bool], tuple[Any, int]]
    refused: dict[str, str] = field(default_factory=dict)
    rounded: Rounded = field(default_factory=Rounded)

    def __post_init__(self) -> None:
        self.began, self.feeds = time.perf_counter(), Feeds(self.state)
        self.state.progress("quantise", 0, 2)

    def quantise(self, make: Callable[[str, Any], tuple[Any, int]], batch: Mapping[str, Any]) -> None:
        """Adds both models quantised, where they can be and run then; ``make`` returns one, with its bytes."""
        for done, name in enumerate(("dense", "pruned")):
            try:
                small, size = make(name, self.models[name, False][0])
                _require_runs(self.load, small, self.feeds.of(name, batch))
                self.models[name, True] = small, size
            except RefusedError as err:
                self.refused[name] = str(err)
            self.state.progress("quantise", done + 1, 2)

    def compared(self, batch: Mapping[str, Any], timed: bool) -> Quantised:
        """Compares them and adds what was found; ``batch`` is timed where anything is."""
        assert self.state.calibration is not None
        held = held_batches(len(self.state.calibration.batches))[:HELD]
        output, rows, quality = _quality(self, held)
        times, shapes = _times(self, batch) if timed else ({}, None)
        corners = [
            Corner(name, small, size, times.get((name, small)), *quality.get((name, small), (None, None)))
            for (name, small), (_, size) in sorted(self.models.items(), key=lambda entry: (entry[0][1], entry[0][0]))
        ]
        found = Quantised(
            self.scheme.name,
            self.scheme.block if self.scheme.name == BLOCKS else None,
            self.refused.get("pruned"),
            self.refused.get("dense"),
            output,
            rows,
            shapes,
            self.rounded,
            corners,
            time.perf_counter() - self.began,
        )
        self.state.add(found)
        return found


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
    engine = OnnxEngine(state.device)
    found = Corners(
        state,
        scheme,
        engine.whole,
        lambda model: deployed(model, state.device),
        {("dense", False): (dense, _bytes(dense)), ("pruned", False): (pruned, _bytes(pruned))},
    )

    def make(name: str, model: OnnxOriginal) -> tuple[OnnxOriginal, int]:
        rows = found.feeds.rows(name)
        small, size = quantised(model, scheme, rows[0].feeds if scheme.name == STATIC else ())
        if name == "pruned":
            small, found.rounded = rounded_anew(model, small, *rows, engine)
        return small, size

    found.quantise(make, batch)
    if ("pruned", True) in found.models:
        state.add(QuantisedModel(found.models["pruned", True][0]))
    return found.compared(batch, timed)


class Feeds:
    """What each model is fed: what shrank is cut, ids of words that stay are numbered anew where the model wants that."""

    def __init__(self, state: State) -> None:
        cut = state.get(Cut)
        self.ends = {} if cut is None else cut.ends
        self.words = state.get(ChosenWords)
        self.data = state.calibration

    def rows(self, name: str) -> tuple[Rows, Rows]:
        """Returns the calibration batches as a model is fed, with which rows are real, and those that are held back."""
        data = self.data
        assert data is not None
        held = held_batches(len(data.batches))
        fitted = [i for i in range(len(data.batches)) if i not in held or len(held) == len(data.batches)]
        fed = ([self.of(name, data.batches[i]) for i in places] for places in (fitted, held))
        masks = ([data.row_masks[i] for i in places] for places in (fitted, held))
        return Rows(next(fed), next(masks)), Rows(next(fed), next(masks))

    def of(self, name: str, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what a batch is for the dense or the pruned model."""
        feeds = [dict(batch), cut_arrays(dict(batch), self.ends)]
        if self.words is not None:
            feeds = [dict(f) for f in self.words.beside(*feeds)]
        return feeds[name == "pruned"]


def _bytes(model: OnnxOriginal) -> int:
    light, arrays = model.as_written()
    return int(light.ByteSize()) + sum(a.nbytes for a in arrays.values())


def _require_runs(load: Callable[[Any], Any], model: Any, feeds: Mapping[str, Any]) -> None:
    """Runs a quantised model once.

    Raises:
        RefusedError: it cannot be loaded, does not run, or gives what is not finite.
    """
    try:
        found = load(model).run(feeds, arrays=True)
    except MemoryError:
        raise
    except Exception as err:
        raise RefusedError(f"what it made does not run: {words_of(err)}") from err
    for name, value in found.items():
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise RefusedError(f"output '{name}' of what it made holds numbers that are none (NaN)")


def _quality(found: Corners, held: Sequence[int]) -> tuple[str | None, int, dict[tuple[str, bool], tuple[float, float]]]:
    """Returns the output that is compared, its rows, and cosine and difference of each model; one is loaded at a time."""
    data, feeds = found.state.calibration, found.feeds
    assert data is not None
    wanted: dict[int, dict[str, Any]] = {}
    first, rows = None, 0
    result = {}
    for key, (model, _) in found.models.items():
        session, meter = found.load(model), DifferenceMeter()
        for i in held:
            outputs = session.run(feeds.of(key[0], data.batches[i]), arrays=True)
            if key == ("dense", False):
                wanted[i] = cut_arrays(outputs, feeds.ends)
            for name, theirs in wanted[i].items():
                ours = outputs[name] if key[0] == "pruned" else cut_arrays({name: outputs[name]}, feeds.ends)[name]
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


def _times(found: Corners, batch: Mapping[str, Any]) -> tuple[dict[tuple[str, bool], float], str | None]:
    """Returns the seconds of each model, timed in turns, and what they ran on."""
    try:
        times = measure_latency(
            [found.deployed(model) for model, _ in found.models.values()],
            [found.feeds.of(name, batch) for name, _ in found.models],
            budget=SECONDS,
            least=8,
        )
    except CannotTime:
        return {}, None
    return dict(zip(found.models, times.seconds, strict=True)), times.batch
