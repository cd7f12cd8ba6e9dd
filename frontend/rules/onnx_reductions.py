"""Rules of ONNX operators that need the whole of an axis: softmax, reductions, the largest of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.rules import meaning
from liar_opt.frontend.rules.numbers import axes_of

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def softmax(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    axis = int(node.attrs.get("axis", -1)) % len(axes)
    meaning.along(w, node, axes, axes[axis : axis + 1])


def softmax_of_rows(w: GraphWalk, node: gs.Node) -> None:
    """Before opset 13 all axes from one on are one."""
    axes = w.axes_of(node)
    meaning.along(w, node, axes, axes[int(node.attrs.get("axis", 1)) % len(axes) :])


def cumulated(w: GraphWalk, node: gs.Node) -> None:
    axes, axis = w.axes_of(node), w.value(node, 1)
    if axis is None:
        w.give_up(node, f"{node.op} over an axis that is not known")
        return
    meaning.along(w, node, axes, [axes[int(axis) % len(axes)]])


def place_of_best(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    axis = int(node.attrs.get("axis", 0)) % len(axes)
    meaning.reduce(w, node, axes, {axis}, bool(node.attrs.get("keepdims", 1)))


def top_k(w: GraphWalk, node: gs.Node) -> None:
    axes, count = w.axes_of(node), w.value(node, 1)
    if count is None:
        w.give_up(node, "TopK of a number that is not known")
        return
    axis = int(node.attrs.get("axis", -1)) % len(axes)
    meaning.best(w, node, axes, axis, int(np.asarray(count).reshape(-1)[0]))


def reduce(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    if len(node.inputs) > 1 and present(node.inputs[1]) and w.value(node, 1) is None:
        w.give_up(node, "a reduction over axes that are not known")
        return
    chosen = axes_of([None, w.value(node, 1)], node.attrs, 1)
    if not chosen:
        if node.attrs.get("noop_with_empty_axes", 0):
            w.output(node, axes)
            return
        chosen = list(range(len(axes)))
    gone = {a % len(axes) for a in chosen}
    meaning.reduce(w, node, axes, gone, bool(node.attrs.get("keepdims", 1)))
