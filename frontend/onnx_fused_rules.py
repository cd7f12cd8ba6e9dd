"""The rules of other fused operators of decoders; :mod:`liar_opt.frontend.onnx_rules` imports them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.onnx_rule_table import MICROSOFT, rule

if TYPE_CHECKING:
    from liar_opt.frontend.onnx_rules import GraphWalk


@rule("MoE", domain=MICROSOFT)
def _mixture_of_experts(w: GraphWalk, node: gs.Node) -> None:
    """Rows [.., d], probabilities [rows, experts], and the experts' matrices: an FFN whose inside is not in the graph."""
    x = w.input_axes(node, 0)
    assert x is not None
    where = f"inside {node.op} (node '{node.name}')"
    w.pin(x[-1:], where)
    matrices = []
    for i in range(1, len(node.inputs)):
        axes = w.input_axes(node, i)
        w.pin(axes, where)
        if axes is not None and len(axes) == 3:
            matrices.append(int(np.prod(w.shape(axes[1:]), dtype=np.int64)))
    rows = int(np.prod(w.shape(x[:-1]), dtype=np.int64))
    w.flops += 2 * rows * int(node.attrs.get("k", 1)) * sum(matrices)
    w.leave(
        node,
        "the experts of operator MoE are not pruned: what their second matrix reads is inside the operator and cannot be "
        "measured; export the experts as operators of their own",
    )
    w.output(node, x)


@rule("BiasSplitGelu", domain=MICROSOFT)
def _bias_split_gelu(w: GraphWalk, node: gs.Node) -> None:
    """X [b, s, 2 n] + bias, of which the left half is multiplied by the Gelu of the right one."""
    x, bias = w.input_axes(node, 0), w.input_axes(node, 1)
    assert x is not None and bias is not None
    size = w.algebra.size(x[-1])
    halves = w.algebra.cut(x[-1], [size // 2, size - size // 2])
    w.unify(halves[0], halves[1])
    w.unify(x[-1], bias[-1])
    w.output(node, (*x[:-1], halves[0]))


@rule("GatedRMSNorm", domain=MICROSOFT)
def _gated_rms_norm(w: GraphWalk, node: gs.Node) -> None:
    """X and gate [.., heads*n], scale [n]: each run of n is normalised, then multiplied by its activated gate."""
    x, scale, gate = (w.input_axes(node, i) for i in range(3))
    assert x is not None and scale is not None and gate is not None
    axes, width = w.broadcast(x, gate), w.algebra.size(scale[-1])
    parts = w.algebra.split(axes[-1], [w.algebra.size(axes[-1]) // width, width])
    w.unify(parts[1], scale[-1])
    w.pin(parts[1:], f"{node.op} runs over it (node '{node.name}')")
    w.output(node, axes)
