"""Rules of ONNX operators that are matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from liar_opt.frontend.rules import meaning

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def matmul(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, meaning.product(w, node, w.axes_of(node), w.axes_of(node, 1)))


def _swapped(node: gs.Node) -> tuple[bool, bool]:
    return bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0))


def fused_matmul(w: GraphWalk, node: gs.Node) -> None:
    if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
        w.give_up(node, "FusedMatMul with transposed batch axes")
        return
    more: dict[str, Any] = {"swapped": _swapped(node), "scale": float(node.attrs.get("alpha", 1.0))}
    w.output(node, meaning.product(w, node, w.axes_of(node), w.axes_of(node, 1), **more))


def gemm(w: GraphWalk, node: gs.Node) -> None:
    left, right, swapped = w.axes_of(node), w.axes_of(node, 1), _swapped(node)
    scales = {"scale": float(node.attrs.get("alpha", 1.0)), "bias_scale": float(node.attrs.get("beta", 1.0))}
    more: dict[str, Any] = {"swapped": swapped, "bias": ("input", 2), "mixing": False, **scales}
    w.output(node, meaning.product(w, node, left, right, **more))
    if node.op == "GemmFastGelu" and w.input_axes(node, 2) is not None and w.constant(node, 2) is None:
        # An addition behind the node would come after the activation.
        w.pin([left[0 if swapped[0] else 1]], f"the bias of a fused activation is computed (node '{node.name}')")
