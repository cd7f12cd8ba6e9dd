"""Rules of ONNX operators that need the whole of an axis: softmax, reductions, the largest of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.rules.numbers import axes_of

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def along_axis(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    default = -1 if node.op in ("LpNormalization",) or (w.model.opset >= 13 and node.op not in ("ArgMax", "ArgMin")) else 1
    axis = int(node.attrs.get("axis", 0 if node.op.startswith("Arg") else default))
    if node.op in ("CumSum", "CumProd"):
        known = w.value(node, 1)
        if known is None:
            w.give_up(node, f"{node.op} over an axis that is not known")
            return
        axis = int(known)
    axis %= len(axes)
    coerced = w.model.opset < 13 and node.op in ("Softmax", "LogSoftmax", "Hardmax")
    w.pin(axes[axis:] if coerced else axes[axis : axis + 1], f"{node.op} runs over it (node '{node.name}')")
    if node.op.startswith("Arg"):
        tail = axes[axis + 1 :]
        axes = (*axes[:axis], *((w.fresh(1),) if node.attrs.get("keepdims", 1) else ()), *tail)
    w.output(node, axes)


def top_k(w: GraphWalk, node: gs.Node) -> None:
    axes, count = w.input_axes(node, 0), w.value(node, 1)
    assert axes is not None
    if count is None:
        w.give_up(node, "TopK of a number that is not known")
        return
    axis = int(node.attrs.get("axis", -1)) % len(axes)
    where = f"TopK runs over it (node '{node.name}')"
    w.pin([axes[axis]], where)
    chosen = w.fresh(int(np.asarray(count).reshape(-1)[0]), where)
    for position in (0, 1):
        w.output(node, (*axes[:axis], chosen, *axes[axis + 1 :]), position)


def reduce(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
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
    w.pin([axes[a] for a in gone], f"{node.op} runs over it (node '{node.name}')")
    keep = bool(node.attrs.get("keepdims", 1))
    w.output(node, tuple(w.fresh(1) if i in gone else f for i, f in enumerate(axes) if keep or i not in gone))
