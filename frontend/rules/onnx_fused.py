"""Rules of other fused operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.rules import meaning

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def mixture_of_experts(w: GraphWalk, node: gs.Node) -> None:
    """Rows [.., d], probabilities [rows, experts], and the experts' matrices: an FFN whose inside is not in the graph."""
    x = w.axes_of(node)
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
        "the widths of experts inside operator MoE stay: what their second matrix reads is inside the operator and cannot "
        "be measured; export the experts as operators of their own",
    )
    w.output(node, x)


def bias_split_gelu(w: GraphWalk, node: gs.Node) -> None:
    """X [b, s, 2 n] + bias, of which the left half is multiplied by the Gelu of the right one."""
    x, bias = w.axes_of(node), w.axes_of(node, 1)
    w.unify(x[-1], bias[-1])
    w.output(node, (*x[:-1], meaning.halves(w, x[-1])))


def gated_rms_norm(w: GraphWalk, node: gs.Node) -> None:
    """X and gate [.., heads*n], scale [n]: each run of n is normalised, then multiplied by its activated gate."""
    x, scale, gate = (w.axes_of(node, i) for i in range(3))
    axes, width = w.broadcast(x, gate), w.algebra.size(scale[-1])
    parts = w.algebra.split(axes[-1], [w.algebra.size(axes[-1]) // width, width])
    w.unify(parts[1], scale[-1])
    w.pin(parts[1:], f"{node.op} runs over it (node '{node.name}')")
    w.output(node, axes)
