"""Round the weights of a quantised model anew, with error feedback, on the moments of what its products read.

The quantiser rounds each number by itself. Here its grids stay, scales and zeros, and the numbers on them are chosen again
(`runtime.feedback_rounding`) by the second moments of the rows that each product reads in the pruned float model. A weight
is kept so where it loses less than the quantiser's own on rows that were held back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from liar_opt.frontend.onnx_engine import OnnxEngine
from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.frontend.weight_files import EXTERNAL_LIMIT, lightened
from liar_opt.runtime.compare import output_rows
from liar_opt.runtime.feedback_rounding import lost, rounded_with_feedback

Array = NDArray[Any]
TOGETHER = 8
"""Tensors whose moments are summed up in one pass over the data."""
SIGNED = (-127, 127)
"""Ends of weights in 8 bits, which have no zero."""
NIBBLE = (0, 15)


@dataclass(frozen=True)
class Rows:
    """Feeds, with which rows of each are real."""

    feeds: Sequence[Mapping[str, Array]]
    masks: Sequence[NDArray[np.bool_] | None]


@dataclass
class Rounded:
    """What came of it: weights that were rounded anew, of how many, and what all lose together, before and after."""

    kept: int = 0
    weights: int = 0
    before: float = 0.0
    after: float = 0.0


def rounded_anew(
    whole: OnnxOriginal, small: OnnxOriginal, fitted: Rows, held: Rows, engine: OnnxEngine
) -> tuple[OnnxOriginal, Rounded]:
    """Returns a quantised model whose weights lose less, and what came of it.

    Args:
        whole: the float model.
        small: the same, quantised.
        fitted: data that weights are rounded by.
        held: data that decides which are kept.
        engine: runs the float model.
    """
    if _large(whole):
        return small, Rounded()
    target = small.as_given()
    names = (t.name for t in whole.as_written()[0].graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    grids = {name: grid for name in names if (grid := grid_of(name, target)) is not None}
    found = round_products(whole, grids, fitted, held, engine)
    for grid in grids.values():
        grid.write()
    return (OnnxOriginal(*lightened(target)) if found.kept else small), found


def _large(model: OnnxOriginal) -> bool:
    """Returns whether a model would not fit into one proto."""
    return sum(a.nbytes for a in model.as_written()[1].values()) > EXTERNAL_LIMIT


def round_products(
    whole: OnnxOriginal, grids: Mapping[str, Numbers], fitted: Rows, held: Rows, engine: OnnxEngine
) -> Rounded:
    """Rounds weights of products anew, each kept so where it loses less; see `rounded_anew`.

    Args:
        whole: the float model.
        grids: the whole numbers of its weights, by name, which are changed.
        fitted: data that weights are rounded by.
        held: data that decides which are kept.
        engine: runs the float model.
    """
    found = Rounded()
    if _large(whole):
        return found
    source = whole.as_given()
    floats = {t.name: t for t in source.graph.initializer if t.name in grids}
    read: dict[str, list[str]] = {}
    for node in source.graph.node:
        if node.op_type == "MatMul" and node.input[1] in floats:
            read.setdefault(node.input[0], []).append(node.input[1])
    once = [name for names in read.values() for name in names]
    read = {a: [n for n in names if once.count(n) == 1] for a, names in read.items()}
    inner = {name for node in source.graph.node for name in node.output}
    places = [a for a, names in read.items() if names and a in inner]
    for start in range(0, len(places), TOGETHER):
        some = places[start : start + TOGETHER]
        session = engine.session(_with_outputs(source, {place: floats[read[place][0]].data_type for place in some}))
        sums, others = (_moments(session, some, rows) for rows in (fitted, held))
        for place in some:
            for name in read[place]:
                weight = onnx.numpy_helper.to_array(floats[name]).astype(np.float64)
                if place in sums and len(weight) == len(sums[place]):
                    _round(grids[name], weight, sums[place], others.get(place, sums[place]), found)
    return found


def _round(grid: Numbers, weight: Array, moments: Array, judge: Array, found: Rounded) -> None:
    """Rounds one weight anew, and takes that where it loses less."""
    q = rounded_with_feedback(weight, grid.scale, grid.zero, grid.ends, moments)
    differences = (np.asarray(weight - (n - grid.zero) * grid.scale, np.float64) for n in (grid.numbers, q))
    before, after = (lost(difference, judge) for difference in differences)
    found.weights += 1
    found.before += before
    found.after += min(before, after)
    if after < before:
        found.kept += 1
        grid.numbers = q


@dataclass(eq=False)
class Numbers:
    """The whole numbers of a quantised weight, [n, m], between ``ends``, with scales and zeros, which broadcast."""

    numbers: Array
    scale: Array
    zero: Array
    ends: tuple[int, int]


@dataclass(eq=False)
class Grid(Numbers):
    """The same, and where they are kept."""

    tensor: onnx.TensorProto
    nibbles: tuple[int, ...] = ()

    def write(self) -> None:
        """Puts the numbers back."""
        if not self.nibbles:
            self.tensor.CopyFrom(onnx.numpy_helper.from_array(self.numbers.astype(np.int8), self.tensor.name))
            return
        codes = _unpacked(onnx.numpy_helper.to_array(self.tensor))  # what fills up the last block stays
        codes[:, : len(self.numbers)] = self.numbers.T
        packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8).reshape(self.nibbles)
        self.tensor.CopyFrom(onnx.numpy_helper.from_array(packed, self.tensor.name))


def grid_of(name: str, model: onnx.ModelProto) -> Grid | None:
    """Returns the grid that a float weight was rounded to, by the names that ONNX Runtime's quantiser gives its parts."""
    tensors = {t.name: t for t in model.graph.initializer if t.name.startswith(f"{name}_")}
    arrays = {k: onnx.numpy_helper.to_array(t) for k, t in tensors.items() if t.data_type not in (21, 22)}
    four, eight = f"{name}_Q4", f"{name}_quantized"
    if four in arrays and f"{name}_scales" in arrays and f"{name}_zero_points" in arrays:
        packed = arrays[four]
        columns, blocks, bytes_ = packed.shape
        scales = arrays[f"{name}_scales"].reshape(columns, blocks).astype(np.float64)
        zeros = _unpacked(arrays[f"{name}_zero_points"].reshape(columns, -1))[:, :blocks]
        size = next(
            (
                a.i
                for node in model.graph.node
                if node.op_type == "MatMulNBits" and node.input[1] == four
                for a in node.attribute
                if a.name == "K"
            ),
            0,
        )
        wide = [np.repeat(a, 2 * bytes_, axis=1)[:, :size].T for a in (scales, zeros)]
        return Grid(_unpacked(packed)[:, :size].T, wide[0], wide[1], NIBBLE, tensors[four], packed.shape) if size else None
    scale, zero = arrays.get(f"{name}_scale"), arrays.get(f"{name}_zero_point")
    if eight not in arrays or scale is None or arrays[eight].dtype != np.int8 or arrays[eight].ndim != 2:
        return None
    if (zero is not None and np.any(zero)) or scale.size not in (1, arrays[eight].shape[1]):
        return None
    return Grid(
        arrays[eight].astype(np.int64), scale.reshape(1, -1).astype(np.float64), np.zeros((1, 1)), SIGNED, tensors[eight]
    )


def _unpacked(packed: Array) -> Array:
    """Returns numbers of 4 bits, the low ones of each byte first: [.., bytes] -> [first, 2 bytes]."""
    rows = packed.reshape(len(packed), -1)
    return np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(packed), -1).astype(np.int64)


def _with_outputs(model: onnx.ModelProto, kinds: Mapping[str, int]) -> tuple[bytes, dict[str, Array]]:
    """Returns a model that gives inner tensors, of the element types ``kinds``, too, as a session takes it."""
    light, arrays = lightened(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(light)
    given = {value.name for value in copy.graph.output}
    added = {name: kind for name, kind in kinds.items() if name not in given}
    copy.graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in added.items())
    return OnnxOriginal(copy, arrays).detached()


def _moments(session: Any, names: Sequence[str], rows: Rows) -> dict[str, Array]:
    """Returns sums of x^T x over all real rows, by tensor."""
    sums: dict[str, Array] = {}
    for name, part in _parts(session, names, rows):
        sums[name] = sums.get(name, 0.0) + part.T @ part
    return sums


def _parts(session: Any, names: Sequence[str], rows: Rows) -> Iterator[tuple[str, Array]]:
    for feeds, mask in zip(rows.feeds, rows.masks, strict=True):
        for name, value in session.run(feeds, list(names), arrays=True).items():
            if value.ndim > 1:
                yield name, output_rows(value, mask).astype(np.float64)
