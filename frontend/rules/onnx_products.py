"""Rules of ONNX operators that are matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes
from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.rules import meaning

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def _swap(axes: Axes, swap: bool) -> Axes:
    return (*axes[:-2], axes[-1], axes[-2]) if swap and len(axes) >= 2 else axes


def matmul(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, meaning.product(w, node, w.axes_of(node), w.axes_of(node, 1)))


def fused_matmul(w: GraphWalk, node: gs.Node) -> None:
    left, right = w.axes_of(node), w.axes_of(node, 1)
    if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
        w.give_up(node, "FusedMatMul with transposed batch axes")
        return
    swapped = (bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0)))
    left, right = _swap(left, swapped[0]), _swap(right, swapped[1])
    scale = float(node.attrs.get("alpha", 1.0))
    w.output(node, meaning.product(w, node, left, right, swapped=swapped, scale=scale))


def gemm(w: GraphWalk, node: gs.Node) -> None:
    left, right = w.axes_of(node), w.axes_of(node, 1)
    swapped = (bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0)))
    a, b = _swap(left, swapped[0]), _swap(right, swapped[1])
    w.unify(a[-1], b[-2])
    alpha = float(node.attrs.get("alpha", 1.0))
    has_bias = len(node.inputs) > 2 and present(node.inputs[2])
    if w.constant(node, 1) is not None:
        beta = float(node.attrs.get("beta", 1.0))
        w.consumer(
            node, 0, 0 if swapped[0] else 1, 1, 1 if swapped[1] else 0, bias=("input", 2), scale=alpha, bias_scale=beta
        )
        if node.op == "GemmFastGelu" and has_bias and w.constant(node, 2) is None:
            # An addition behind the node would come after the activation.
            w.pin([a[-1]], f"the bias of a fused activation is computed (node '{node.name}')")
    else:
        w.pin([a[-1]], f"contracted between two activations (node '{node.name}')")
    axes: Axes = (*a[:-1], b[-1])
    w.count(a[-1], *axes)
    bias = w.input_axes(node, 2) if has_bias else None
    w.output(node, axes if bias is None else w.broadcast(axes, bias))
