"""Rules of ONNX operators that look up, or write to, places that data says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes, Factor
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.rules import meaning
from liar_opt.frontend.rules.numbers import VALUE_LIMIT

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def gather(w: GraphWalk, node: gs.Node) -> None:
    axes, indices = w.axes_of(node), w.axes_of(node, 1)
    axis = int(node.attrs.get("axis", 0)) % len(axes)
    chosen = _looked_up(w, node, axes[axis], len(indices))
    if axis == 0 and len(axes) > 1 and w.constant(node, 0) is not None and not is_constant(node.inputs[1]):
        w.look_up(node, axes[0])
    w.output(node, (*axes[:axis], *(indices if chosen is None else chosen), *axes[axis + 1 :]))


def _looked_up(w: GraphWalk, node: gs.Node, factor: Factor, rank: int) -> Axes | None:
    """Pins an axis that is looked up; where constant indices pick a run of it, it is cut there and the rest stays free.

    Returns:
        The axis that indices of ``rank`` 1 leave, no axis for a scalar; None for no such run.
    """
    where = f"looked up by {node.op} (node '{node.name}')"
    size = w.algebra.size(factor)
    chosen = _contiguous(node.inputs[1], size) if rank <= 1 else None
    if chosen is None or w.algebra.pinned(factor) is not None:
        w.pin([factor], where)
        return None
    start, count = chosen
    pieces = w.algebra.cut(factor, [s for s in (start, count, size - start - count) if s])
    before, piece = (pieces[:1], pieces[1]) if start else ([], pieces[0])
    w.pin([piece], where)
    for i, index in enumerate(np.asarray(node.inputs[1].values).reshape(-1).tolist()):
        watched = tuple(pieces) if index < 0 else ()
        w.size_use(node, ("input", 1, i), *before, *(w.fresh(1) for _ in range(i)), watched=watched)
    return (piece,) if rank else ()


def _contiguous(indices: gs.Tensor, size: int) -> tuple[int, int] | None:
    """Returns the first index and the number of constant indices that follow one another, a slice; else None."""
    if not is_constant(indices) or len([n for n in indices.shape if n != 1]) > 1 or indices.values.size > VALUE_LIMIT:
        return None
    values = [int(v) % size for v in np.asarray(indices.values).reshape(-1)]
    run = list(range(values[0], values[0] + len(values))) if values else []
    return (values[0], len(values)) if values and values == run and len(values) < size else None


def gather_elements(w: GraphWalk, node: gs.Node) -> None:
    meaning.gather_along(w, node, int(node.attrs.get("axis", 0)) % len(w.axes_of(node)))


def gather_nd(w: GraphWalk, node: gs.Node) -> None:
    axes, indices = w.axes_of(node), w.axes_of(node, 1)
    batch, depth = int(node.attrs.get("batch_dims", 0)), w.algebra.size(indices[-1])
    chosen = _looked_up(w, node, axes[0], 1) if not batch and depth == 1 and len(indices) == 2 else None
    if chosen is not None:
        w.output(node, (*chosen, *axes[1:]))
        return
    if not batch and depth == 1 and w.constant(node, 0) is not None and not is_constant(node.inputs[1]):
        w.look_up(node, axes[0])
    w.pin(axes[: batch + depth], f"looked up by GatherND (node '{node.name}')")
    w.pin(indices[-1:], f"looked up by GatherND (node '{node.name}')")
    w.output(node, (*indices[:-1], *axes[batch + depth :]))


def non_zero(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    where = f"looked for what is not zero (node '{node.name}')"
    w.pin(axes, where)
    w.output(node, (w.fresh(len(axes), where), w.fresh(w.unforeseen(), where)))


def compress(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    where = f"picked from by Compress (node '{node.name}')"
    picked = w.fresh(w.unforeseen(), where)
    if "axis" not in node.attrs:
        w.pin(axes, where)
        w.output(node, (picked,))
        return
    axis = int(node.attrs["axis"]) % len(axes)
    w.pin([axes[axis]], where)
    w.output(node, (*axes[:axis], picked, *axes[axis + 1 :]))


def scatter_nd(w: GraphWalk, node: gs.Node) -> None:
    data, indices, updates = (w.axes_of(node, i) for i in range(3))
    depth = w.algebra.size(indices[-1])
    where = f"written to by ScatterND (node '{node.name}')"
    w.pin([*data[:depth], *indices, *updates[: len(indices) - 1]], where)
    for a, b in zip(data[depth:], updates[len(indices) - 1 :], strict=True):
        w.unify(a, b)
    w.output(node, data)


def scatter_elements(w: GraphWalk, node: gs.Node) -> None:
    meaning.scatter_along(w, node, int(node.attrs.get("axis", 0)) % len(w.axes_of(node)))


def one_hot(w: GraphWalk, node: gs.Node) -> None:
    axes, depth = w.axes_of(node), w.value(node, 1)
    if depth is None:
        w.give_up(node, "OneHot of a depth that is not known")
        return
    axis = int(node.attrs.get("axis", -1)) % (len(axes) + 1)
    classes = w.fresh(int(np.asarray(depth).reshape(-1)[0]), f"made by OneHot (node '{node.name}')")
    w.size_use(node, ("input", 1, 0), classes)
    w.output(node, (*axes[:axis], classes, *axes[axis:]))
