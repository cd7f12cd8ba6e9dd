"""Rules of ONNX operators that work element by element."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import is_constant, is_float

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def equal(w: GraphWalk, node: gs.Node) -> None:
    """Whole numbers that are compared with many constant ones are a look-up written as a product: one row for each."""
    operands = [a for i in range(2) if (a := w.input_axes(node, i)) is not None]
    for axes, tensor in zip(operands, node.inputs, strict=True):
        if is_constant(tensor) and not is_float(tensor.dtype):
            w.pin([f for f in axes if w.algebra.size(f) > 1], f"looked up by Equal (node '{node.name}')")
    w.output(node, w.broadcast(*operands))
