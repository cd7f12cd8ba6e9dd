"""Rules of ONNX operators that are matrix products, and of Einsum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes
from liar_opt.frontend.graph_tensors import is_constant, present
from liar_opt.frontend.rules.meaning import einstein, experts_product

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


LOOK_UPS = ("Gather", "GatherND")


def _product(w: GraphWalk, node: gs.Node, left: Axes, right: Axes, scale: float, swapped: tuple[bool, bool]) -> Axes:
    """Unifies batch and contracted axes; ``left`` and ``right`` are in multiplication order already."""
    vector_left, vector_right = len(left) == 1, len(right) == 1
    k_left, k_right = left[-1], right[0] if vector_right else right[-2]
    w.unify(k_left, k_right)
    if w.constant(node, 1) is not None and len(right) == 2:
        axis = -2 if swapped[0] else -1
        w.consumer(node, 0, axis, 1, 1 if swapped[1] else 0, scale=scale)
    elif w.constant(node, 0) is not None and len(left) == 2 and not vector_right:
        w.consumer(node, 1, -1 if swapped[1] else -2, 0, 0 if swapped[0] else 1, scale=scale, output_axis=-2)
    elif swapped == (False, False) and experts_product(w, node, left, right, scale):
        pass
    else:
        looked_up = any(t.inputs and t.inputs[0].op in LOOK_UPS and is_constant(t.inputs[0].inputs[0]) for t in node.inputs)
        if looked_up and w.algebra.pinned(k_left) is None:
            w.left.setdefault("weights are looked up for each token, as those of experts: their width stays", []).append(
                node.name
            )
        w.product(node, k_left)
        w.mix(left, right)
    batch_left, batch_right = left[: -2 if not vector_left else -1], right[:-2] if not vector_right else ()
    batch = w.broadcast(batch_left, batch_right) if batch_left or batch_right else ()
    if w.products and w.products[-1].node is node:
        w.batched += batch
    rows = () if vector_left else (left[-2],)
    columns = () if vector_right else (right[-1],)
    result = (*batch, *rows, *columns)
    w.count(k_left, *result)
    return result


def _swap(axes: Axes, swap: bool) -> Axes:
    return (*axes[:-2], axes[-1], axes[-2]) if swap and len(axes) >= 2 else axes


def matmul(w: GraphWalk, node: gs.Node) -> None:
    left, right = w.input_axes(node, 0), w.input_axes(node, 1)
    assert left is not None and right is not None
    w.output(node, _product(w, node, left, right, 1.0, (False, False)))


def fused_matmul(w: GraphWalk, node: gs.Node) -> None:
    left, right = w.input_axes(node, 0), w.input_axes(node, 1)
    assert left is not None and right is not None
    if node.attrs.get("transBatchA", 0) or node.attrs.get("transBatchB", 0):
        w.give_up(node, "FusedMatMul with transposed batch axes")
        return
    swapped = (bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0)))
    alpha = float(node.attrs.get("alpha", 1.0))
    w.output(node, _product(w, node, _swap(left, swapped[0]), _swap(right, swapped[1]), alpha, swapped))


def gemm(w: GraphWalk, node: gs.Node) -> None:
    left, right = w.input_axes(node, 0), w.input_axes(node, 1)
    assert left is not None and right is not None
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


def einsum(w: GraphWalk, node: gs.Node) -> None:
    einstein(w, node, lambda width: w.product(node, width))
