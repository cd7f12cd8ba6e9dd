"""Rules of ONNX operators that lay a tensor out anew: reshape, turn, cut, join, repeat, pad."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.rules import meaning
from liar_opt.frontend.rules.numbers import Array, axes_of, slice_arguments, slices

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def reshape(w: GraphWalk, node: gs.Node) -> None:
    target = w.value(node, 1)
    if target is None:
        w.give_up(node, "Reshape to a target that is not known")
        return
    meaning.reshape(w, node, target.tolist(), ("input", 1), bool(node.attrs.get("allowzero", 0)))


def flatten(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    axis = int(node.attrs.get("axis", 1))
    w.output(node, (w.algebra.merge(axes[:axis]), w.algebra.merge(axes[axis:])))


def transpose(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    w.output(node, tuple(axes[p] for p in node.attrs.get("perm") or range(len(axes))[::-1]))


def squeeze(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    chosen = axes_of([None, w.value(node, 1)], node.attrs, 1)
    gone = {a % len(axes) for a in chosen} if chosen is not None else {i for i, s in enumerate(w.shape(axes)) if s == 1}
    w.output(node, tuple(f for i, f in enumerate(axes) if i not in gone))


def unsqueeze(w: GraphWalk, node: gs.Node) -> None:
    axes, chosen = w.axes_of(node), axes_of([None, w.value(node, 1)], node.attrs, 1)
    if chosen is None:
        w.give_up(node, "Unsqueeze of axes that are not known")
        return
    rank = len(axes) + len(chosen)
    places, source = {a % rank for a in chosen}, iter(axes)
    w.output(node, tuple(w.fresh(1) if i in places else next(source) for i in range(rank)))


def concat(w: GraphWalk, node: gs.Node) -> None:
    operands = [w.input_axes(node, i) for i in range(len(node.inputs))]
    known = [a for a in operands if a is not None]
    axis = int(node.attrs["axis"]) % len(known[0])
    w.output(node, w.concatenate(known, axis))
    for tensor in node.inputs:
        w.cache(tensor, node.outputs[0], axis)


def parted(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    axis = int(node.attrs.get("axis", 0)) % len(axes)
    size, count = w.algebra.size(axes[axis]), len(node.outputs)
    given = node.attrs.get("split")
    where: tuple[str, int | str] | None = ("attribute", "split") if given is not None else None
    if given is None and len(node.inputs) > 1 and present(node.inputs[1]):
        given, where = w.value(node, 1), ("input", 1)
    if given is None:
        step = -(-size // count)
        given = [min(step, size - step * i) for i in range(count)]
        if where is not None:
            w.give_up(node, "Split into sizes that are not known")
            return
    for i, piece in enumerate(meaning.split(w, node, axes, axis, given)):
        # Equal parts by count: the operator itself divides; it is told the sizes where they differ after a cut.
        w.size_use(node, (*(where or ("split", "")), i), piece)


def sliced(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    arguments = slice_arguments([None, *(w.value(node, i) for i in range(1, 5))], node.attrs)
    if len(node.inputs) > 3 and present(node.inputs[3]) and w.value(node, 3) is None:
        arguments = None
    if arguments is None:
        w.give_up(node, "Slice with bounds that are not known")
        return
    starts, ends, chosen, _ = arguments
    places = [a % len(axes) for a in (chosen if chosen is not None else range(len(starts)))]
    result = list(axes)
    for element, (axis, cut) in enumerate(zip(places, [slices(len(axes), *arguments)[p] for p in places], strict=True)):
        result[axis], before, pieces = meaning.part(w, node, axes[axis], cut)
        where = ("attribute", "starts", "ends") if "starts" in node.attrs else ("input", 1, 2)
        if before:
            watched = pieces if starts[element] < 0 else ()
            w.size_use(node, (str(where[0]), where[1], element), *before, watched=watched)
        if len(pieces) > len(before) + 1:
            watched = pieces if ends[element] < 0 else ()
            w.size_use(node, (str(where[0]), where[2], element), *before, result[axis], watched=watched)
    w.output(node, tuple(result))


def expand(w: GraphWalk, node: gs.Node) -> None:
    axes, target = w.axes_of(node), w.value(node, 1)
    if target is None:
        w.give_up(node, "Expand to a target that is not known")
        return
    meaning.expand(w, node, axes, [int(d) for d in target], ("input", 1))


def tile(w: GraphWalk, node: gs.Node) -> None:
    axes, repeats = w.axes_of(node), w.value(node, 1)
    if repeats is None:
        w.give_up(node, "Tile by counts that are not known")
        return
    meaning.repeat(w, node, axes, [int(r) for r in repeats], ("input", 1))


def pad(w: GraphWalk, node: gs.Node) -> None:
    axes, pads = w.axes_of(node), w.value(node, 1)
    pads = np.asarray(node.attrs["pads"]) if "pads" in node.attrs else pads
    chosen: Array | None = np.arange(len(axes))
    if len(node.inputs) > 3 and present(node.inputs[3]):  # the axes that are padded, in any order
        chosen = w.value(node, 3)
    if pads is None or chosen is None or len(pads) != 2 * len(chosen):
        w.give_up(node, "Pad by widths that are not known")
        return
    sides = zip(pads[: len(chosen)].tolist(), pads[len(chosen) :].tolist(), strict=True)
    meaning.pad(w, node, axes, dict(zip((int(a) % len(axes) for a in chosen), sides, strict=True)))
