"""Write a quantised model that was pruned as floats in the scheme that it had (`frontend.quantised_out`), and check that.

1. A weight that its grids say is on them to the last bit; any other is rounded to new ones, with error feedback where that
   loses less on rows that were held back.
2. What is written computes what the original computes with the written numbers at their old places, zeros where channels
   went, and activations quantised as they were. Both round the same activations and multiply the same whole numbers, but
   for sums in another order, which tip a number over where it lies between two steps, and weights that have no place in
   the original (blocks, values in another basis, what two groups have cut), which tip over more. Where every number falls
   its own way, they differ by twice what a round of quantising does: the masked original with its activations quantised
   beside itself in floats. That they may.
   Both are run by the definition of their operators: with ONNX Runtime's optimizer off, blocks in floats. What runs the
   result may round what its products read to 8 bits (MatMulNBits, into which the optimizer makes a DequantizeLinear and a
   MatMul, too), as far as it did in the original.
3. It is read again, and its scheme must be the one that came.

How far the outputs are from the quantised original's is measured on calibration batches that were held back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.engine import Engine
from liar_opt.frontend.onnx_engine import OnnxEngine
from liar_opt.frontend.onnx_form import is_valid, require_signature, require_valid
from liar_opt.frontend.onnx_model import OnnxModel, OnnxOriginal, onnx_graph
from liar_opt.frontend.onnx_rounding import Numbers, Rounded, round_products
from liar_opt.frontend.quantised_grids import laid_out
from liar_opt.frontend.quantised_in import read_quantised
from liar_opt.frontend.quantised_out import Fit, Written
from liar_opt.frontend.weight_files import with_values, without_data
from liar_opt.passes.base import DenseModel, Finding, State
from liar_opt.passes.cut_vocabulary import wants_words
from liar_opt.passes.open_model import stored_bytes
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.prune_groups import ConsumerRepair, Cut
from liar_opt.passes.quantise_result import Feeds
from liar_opt.passes.sweep import cut_arrays, first_samples
from liar_opt.passes.verify_model import ComparedSessions, dense_session, masked_reference, output_differences
from liar_opt.runtime.compare import TOLERANCES, OutputDifference
from liar_opt.runtime.errors import CheckError, InternalError, ModelError, OptionError

BLOCKS = "blocks"
"""The scheme in which weights alone are whole numbers."""
KERNELS = 4.0
"""What products of blocks may do to outputs beside what they did in the original: what lost channels magnifies it."""
OPTIMIZED = 0.05
"""What ONNX Runtime's optimizer may do to outputs where it did nothing in the original: it decides by widths, too."""
SAMPLES = 4
PRODUCTS = ("MatMul", "Gemm")
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class KeptScheme(Finding):
    """What writing a model in its scheme came to, as the report has it.

    Attributes:
        came: the scheme of the original, in words.
        written: that of the result; None where it is in floats.
        refused: why the result is in floats after all; None where it is not.
        weights: how many are stored in whole numbers.
        unchanged: those that are the same to the last byte.
        grids: scales of all weights.
        kept: those that stayed.
        steps: how far a number is from what it was repaired to, at the most, in steps.
        difference: of the result and the masked original, both quantised: relative RMS, of the worst output.
        step: what quantising does to outputs, by the same measure.
        allowed: what the difference may be.
        floats: nodes that computed on whole numbers, and do on floats now.
        rounded: how many weights were rounded with error feedback, and what that gained on held-back rows.
        outputs: how far each output is from that of the quantised original.
        bytes_before: of the weights that came.
        bytes_after: of those of the result.
        seconds: that it took.
    """

    by: ClassVar[str] = "keep_scheme"
    came: str
    written: str | None = None
    refused: str | None = None
    weights: int = 0
    unchanged: int = 0
    grids: int = 0
    kept: int = 0
    steps: float = 0.0
    difference: float | None = None
    step: float | None = None
    allowed: float | None = None
    floats: list[str] = field(default_factory=list)
    rounded: Rounded = field(default_factory=Rounded)
    outputs: Mapping[str, OutputDifference] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class KeptModel(Finding):
    """The result in the scheme of the original; in floats where it cannot be written so."""

    by: ClassVar[str] = "keep_scheme"
    model: OnnxOriginal


def require_widths_alone(state: State, options: PruneOptions) -> None:
    """Checks that nothing is asked of a quantised model that is not done with one.

    Raises:
        OptionError: it is.
    """
    dense = state.found(DenseModel).original
    if not isinstance(dense, OnnxOriginal) or dense.reading is None:
        return
    if options.quantize is not None:
        raise OptionError(
            f"the model is quantised already ({dense.reading.scheme}), and the result is as it was; leave quantize out"
        )
    more = (options.blocks, options.experts, options.pattern)
    if any(asked is not None for asked in more) or wants_words(options):
        raise OptionError(
            "of a quantised model widths go alone, not blocks, experts, words or patterns; leave these out, or give the "
            "float model"
        )


def keep_scheme(state: State) -> KeptScheme | None:
    """Writes what was cut in the scheme of the original, checks it and adds what was found; None for a float model.

    Raises:
        CheckError: the result is not the masked original to the step of the quantiser.
    """
    dense = state.found(DenseModel).original
    if not isinstance(dense, OnnxOriginal) or dense.reading is None:
        return None
    began = time.perf_counter()
    state.progress("keep the scheme", 0, 2)
    model, reading = onnx_graph(state.model), dense.reading
    came = OnnxOriginal(reading.proto, dict(reading.arrays))
    written, rounded = _rounded_anew(state, model, model.written())
    found = KeptScheme(reading.sentence(), bytes_before=stored_bytes(came), rounded=rounded)
    small = OnnxOriginal(written.proto, written.arrays)
    try:
        require_signature(reading.proto, written.proto, model.resized)
        require_valid(without_data(written.proto), lambda: is_valid(without_data(reading.proto)))
        plain, data, again = read_quantised(written.proto, written.arrays, "the result")
        if again.scheme != reading.scheme:
            raise InternalError(f"a model in {reading.scheme} became one in {again.scheme}")
        session = state.engine().whole(small, "the result in its scheme")
    except (ModelError, CheckError) as err:
        found = replace(found, refused=" ".join(str(err).split()), seconds=time.perf_counter() - began)
        state.add(found, KeptModel(OnnxOriginal(*model.light())))
        return found
    state.progress("keep the scheme", 1, 2)
    original = _runs(state, came)
    exact = _exact(state, reading.scheme, small, lambda: state.engine().whole(OnnxOriginal(plain, data)))
    difference, step, rounding = _compared(state, written, session if exact is None else exact)
    allowed = TOLERANCES[state.model.least_precision()] + 2 * step + rounding  # both round
    if not difference <= allowed:
        raise CheckError(
            f"written in its scheme the cut model differs from the masked original by {difference:.1e}, and quantising "
            f"allows {allowed:.1e}; nothing was written; please report the model's structure as a bug"
        )
    names = _compared_outputs(state)
    before = _exact(state, reading.scheme, came, lambda: dense_session(state))
    _require_kernels(state, (original, before), (session, exact), 0.0 if reading.scheme == BLOCKS else OPTIMIZED)
    state.add(ComparedSessions(original, session))
    outputs = output_differences(state, session, original, names, ends=state.found(Cut).ends).result()
    found = replace(
        found,
        written=again.sentence(),
        **{name: getattr(written, name) for name in ("weights", "unchanged", "grids", "kept", "steps", "floats")},
        difference=difference,
        step=step + rounding,
        allowed=allowed,
        outputs=outputs,
        bytes_after=stored_bytes(small),
        seconds=time.perf_counter() - began,
    )
    state.add(found, KeptModel(small))
    state.progress("keep the scheme", 2, 2)
    return found


def _rounded_anew(state: State, model: OnnxModel, written: Written) -> tuple[Written, Rounded]:
    """Rounds what was repaired anew, on the grids that it got, with error feedback where that loses less."""
    floats = {c.name: np.asarray(c.values) for c in model.constants() if c.name in written.values}
    axes = {name: own for name, (_, own) in model.gridded().items()}
    grids = {}
    for name, (grid, _, _) in written.fits.items():
        if name in floats and grid.numbers.ndim == 2 and not np.array_equal(written.values[name], floats[name]):
            seen = grid.moved(axes[name])
            grids[name] = Numbers(seen.numbers.astype(np.int64), *seen.beside, grid.ends)
    before = {name: grid.numbers for name, grid in grids.items()}
    whole = OnnxOriginal(*model.light())
    found = round_products(whole, grids, *Feeds(state).rows("pruned"), OnnxEngine(state.device)) if grids else Rounded()
    fits = dict(written.fits)
    for name in (n for n, grid in grids.items() if grid.numbers is not before[n]):
        fit, numbers = fits[name], grids[name].numbers.transpose(np.argsort(axes[name]))
        fits[name] = fit._replace(grid=replace(fit.grid, numbers=laid_out(numbers).astype(fit.grid.numbers.dtype)))
    return (model.written(fits=fits) if found.kept else written), found


def _compared_outputs(state: State) -> list[str]:
    return [t.name for t in state.model.graph.outputs if t.name not in state.analysed().unspecified]


def _runs(state: State, came: OnnxOriginal) -> Any:
    """Returns what runs the original, quantised.

    Raises:
        ModelError: it does not run, though its numbers do: ranges of a quantiser may break what floats compute.
    """
    assert state.calibration is not None
    session = state.engine().whole(came)
    try:
        session.run(first_samples(state, state.calibration.batches[0], SAMPLES), arrays=True)
    except MemoryError:
        raise
    except Exception as err:  # of ONNX Runtime: a class of its own for each release
        reason = " ".join(str(err).split())[:300]
        raise ModelError(
            f"the quantised model does not run as it came, and the numbers that it stands for do ({reason}); quantise the "
            "float model again, or prune that"
        ) from err
    return session


def _exact(state: State, scheme: str, model: OnnxOriginal, floats: Callable[[], Any]) -> Any:
    """Returns what runs the numbers of a model by the definition of its operators, whatever kernels make of them.

    ONNX Runtime's optimizer puts DequantizeLinear and MatMul into one product that may round what it reads to 8 bits: it is
    off here. MatMulNBits may do so by itself: its numbers are run in floats.

    Args:
        state: the cut model.
        scheme: of the model.
        model: the model, in its scheme.
        floats: loads the same numbers in floats.
    """
    return floats() if scheme == BLOCKS else OnnxEngine(state.device).session(model, "none")


def _require_kernels(state: State, original: tuple[Any, Any], cut: tuple[Any, Any], spare: float) -> None:
    """Checks that what runs the result computes what its numbers say, as far as it did in the original.

    Products may round what they read to 8 bits (`accuracy_level` of MatMulNBits), which no other operator does alike: what
    that does to the outputs is measured on both models.

    Args:
        state: the cut model.
        original: runs what came, quantised, and runs its numbers by the definition of its operators.
        cut: the same of the result.
        spare: what they may do to outputs whatever they did in the original.

    Raises:
        CheckError: they do not.
    """
    assert state.calibration is not None
    ends, wanted = state.found(Cut).ends, _compared_outputs(state)
    small = first_samples(state, state.calibration.batches[0], SAMPLES)

    def apart(pair: tuple[Any, Any], feeds: Arrays) -> float:
        return relative_rms(*(of.run(feeds, wanted, arrays=True) for of in pair))

    ours = apart(cut, cut_arrays(small, ends))
    least = TOLERANCES[state.model.least_precision()] + spare
    if ours <= least:
        return
    theirs = apart(original, small)
    if not ours <= least + KERNELS * theirs:
        raise CheckError(
            f"products of whole numbers are {ours:.1e} from what these say, and were {theirs:.1e} in the original; "
            "nothing was written; please report the model's structure as a bug"
        )


def _compared(state: State, written: Written, session: Any) -> tuple[float, float, float]:
    """Returns how far the result is from the masked original, what quantising does, and what rounding anew does.

    ``session`` runs the result by the definition of its operators: see `_exact`.

    The last is of weights whose numbers are not at one place in the original (values in another basis, say): the masked
    original has them as they were before they were rounded.
    """
    assert state.calibration is not None
    cut, engine = state.found(Cut), state.engine()
    dense, model = state.found(DenseModel).stored, onnx_graph(state.model)
    scheme = "" if dense.reading is None else dense.reading.scheme
    small = first_samples(state, state.calibration.batches[0], SAMPLES)
    wanted = _compared_outputs(state)

    def run(of: Any, feeds: Arrays, ends: bool) -> Arrays:
        found: Arrays = of.run(feeds, wanted, arrays=True)
        return cut_arrays(dict(found), cut.ends) if ends else found

    repairs, placed = _at_their_places(model, state.repairs, written)
    reference = onnx_graph(masked_reference(dense, repairs, cut.query_forms, cut.stand_ins))
    _zero_what_went(reference, repairs)
    fits = _at_full_width(reference, repairs, model, {n: f for n, f in written.fits.items() if n in placed})
    quantised = reference.written(fits is not None, fits)
    ours = run(session, cut_arrays(small, cut.ends), ends=False)
    masked = OnnxOriginal(quantised.proto, quantised.arrays)
    theirs = run(_exact(state, scheme, masked, lambda: engine.whole(masked)), small, ends=True)
    floats = run(engine.whole(reference, "the masked original"), small, ends=True)
    step = relative_rms(theirs, floats)
    rounding = _rounding(engine, model, written, placed, lambda of: run(of, cut_arrays(small, cut.ends), ends=False))
    return relative_rms(ours, theirs), step, rounding


def _at_full_width(
    reference: OnnxModel, repairs: Sequence[ConsumerRepair], model: OnnxModel, fits: Mapping[str, Fit]
) -> dict[str, Fit] | None:
    """Returns the grids of the repaired weights as the masked original has them, the number of zero where channels went.

    None where they have none: blocks lie otherwise, experts are several in one constant, numbers in another basis have no
    place there, and two groups may have cut one.
    """
    theirs, ours = ({n.name: n for n in m.graph.nodes} for m in (reference, model))
    full, small, found = reference.gridded(), model.gridded(), {}
    assert reference.reading is not None
    for repair in repairs:
        use = repair.uses[0]
        nodes = [own.get(use.holder.name) for own in (theirs, ours)]
        names = ["" if node is None else node.inputs[use.weight_position].name for node in nodes]
        if names[0] not in full or names[1] not in fits or repair.expert is not None:
            return None
        (known, axes), grid = full[names[0]], fits[names[1]].grid
        before = reference.reading.weights[known].grid
        if axes != small[names[1]][1] or grid.block or before.axis != grid.axis:
            return None
        index = [repair.index[axes.index(k)] for k in range(len(axes))]
        if [len(kept) for kept in index] != list(grid.numbers.shape):
            return None
        found[names[0]] = Fit(before.widened(grid, index), 0, 0)
    return found


def _zero_what_went(model: OnnxModel, repairs: Sequence[ConsumerRepair]) -> None:
    """Has what products contract be zero where channels went, as well as their weights: no range has it in it then.

    The range of what is quantised as it comes has zero in it, whatever else it has.
    """
    nodes, done = {n.name: n for n in model.graph.nodes}, set()
    for repair, use in ((own, use) for own in repairs for use in own.uses):
        node = nodes.get(use.node.name)
        if node is None or node.op not in PRODUCTS or use.weight_position != 1 or repair.expert is not None:
            continue
        read, kept = node.inputs[0], repair.index[use.weight_axis]
        size = node.inputs[1].shape[use.weight_axis]
        if not read.inputs or read.name in done or len(kept) == size:
            continue
        done.add(read.name)
        (maker,) = read.inputs
        mask = np.zeros(size, np.dtype(node.inputs[1].dtype))
        mask[kept] = 1
        whole = gs.Variable(f"{read.name}/whole", read.dtype, read.shape)
        maker.outputs[next(i for i, t in enumerate(maker.outputs) if t is read)] = whole
        zeroed = gs.Node(
            "Mul", f"{read.name}/zeroed", inputs=[whole, gs.Constant(f"{read.name}/mask", mask)], outputs=[read]
        )
        model.graph.nodes.insert(model.graph.nodes.index(maker) + 1, zeroed)


def _at_their_places(
    model: OnnxModel, repairs: Sequence[ConsumerRepair], written: Written
) -> tuple[list[ConsumerRepair], set[str]]:
    """Returns the repairs with the numbers that were written for them, and the constants that these were of."""
    nodes = {node.name: node for node in model.graph.nodes}
    result, placed = [], set()
    for repair in repairs:
        use = repair.uses[0]
        node = nodes.get(use.holder.name)
        constant = None if node is None else node.inputs[use.weight_position]
        name = "" if constant is None else constant.name
        same = name in written.values and repair.weight.shape == written.values[name].shape
        if constant is not None and same and repair.expert is None and np.array_equal(constant.values, repair.weight):
            repair = replace(repair, weight=written.values[name])
            placed.add(name)
        result.append(repair)
    return result, placed


def _rounding(engine: Engine, model: OnnxModel, written: Written, placed: set[str], run: Any) -> float:
    """Returns what the rounding of weights does that are at no place in the masked original."""
    floats = {c.name: np.asarray(c.values) for c in model.constants() if c.name in written.values}
    others = {
        name: value
        for name, value in written.values.items()
        if name not in placed and name in floats and not np.array_equal(value, floats[name])
    }
    if not others:
        return 0.0
    rounded = OnnxOriginal(*with_values(*model.light(), others))
    return relative_rms(run(engine.whole(rounded)), run(engine.whole(model, "the pruned model")))


def relative_rms(ours: Arrays, theirs: Arrays) -> float:
    """Returns sqrt(sum |x - y|^2 / sum |y|^2) of the worst output; inf where shapes or what is finite differ."""
    worst = 0.0
    for name, value in theirs.items():
        if value.dtype.kind != "f":
            continue
        if ours[name].shape != value.shape:
            return float("inf")
        x, y = ours[name].astype(np.float64), value.astype(np.float64)
        finite = np.isfinite(y)
        if not np.array_equal(finite, np.isfinite(x)):
            return float("inf")
        apart, size = np.square(x[finite] - y[finite]).sum(), np.square(y[finite]).sum()
        worst = max(worst, float(np.sqrt(apart / size)) if size else float(np.sqrt(apart)))
    return worst
