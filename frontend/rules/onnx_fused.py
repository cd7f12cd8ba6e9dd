"""Rules of other fused operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def mixture_of_experts(w: GraphWalk, node: gs.Node) -> None:
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


def bias_split_gelu(w: GraphWalk, node: gs.Node) -> None:
    """X [b, s, 2 n] + bias, of which the left half is multiplied by the Gelu of the right one."""
    x, bias = w.input_axes(node, 0), w.input_axes(node, 1)
    assert x is not None and bias is not None
    size = w.algebra.size(x[-1])
    halves = w.algebra.cut(x[-1], [size // 2, size - size // 2])
    w.unify(halves[0], halves[1])
    w.unify(x[-1], bias[-1])
    w.output(node, (*x[:-1], halves[0]))


def swiglu(w: GraphWalk, node: gs.Node) -> None:
    """Gate and value of one shape, element by element."""
    gate, value = w.input_axes(node, 0), w.input_axes(node, 1)
    assert gate is not None and value is not None
    w.output(node, w.broadcast(gate, value))


def channels_last_conv(w: GraphWalk, node: gs.Node) -> None:
    """X [b, .., n], W [m, n / groups, ..], bias [m], and a tensor like the result that is added before an activation.

    Where the kernel covers one place it is a product over the last axis; the input channels of others stay.
    """
    x, weight, bias, added = (w.input_axes(node, i) for i in range(4))
    assert x is not None and weight is not None
    where = f"slid over by a convolution (node '{node.name}')"
    kernel, groups = w.shape(weight[2:]), int(node.attrs.get("group", 1))
    spatial = slid_sizes(node, w.shape(x[1:-1]), kernel)
    w.pin([*x[1:-1], *weight[2:]], where)
    if groups == 1:
        w.unify(x[-1], weight[1])
        if w.constant(node, 1) is not None and all(k == 1 for k in kernel):
            w.consumer(node, 0, -1, 1, 1, bias=("input", 2))
        else:
            w.pin(x[-1:], f"input channels of a convolution that is no matrix product (node '{node.name}')")
    elif groups == w.algebra.size(x[-1]) == w.algebra.size(weight[0]):
        w.unify(x[-1], weight[0])  # depthwise: every channel by itself
        w.size_use(node, ("attribute", "group", -1), x[-1])
    else:
        w.pin([x[-1], *weight], f"grouped convolution (node '{node.name}')")
    if bias is not None:
        w.unify(weight[0], bias[0])
    if not w.slid(node, spatial, w.shape(x[1:-1])):
        return
    w.flops += 2 * math.prod([w.algebra.size(x[0]), *w.shape(weight), *spatial])
    result = (x[0], *(w.fresh(s, where) for s in spatial), weight[0])
    w.output(node, result if added is None else w.broadcast(result, added))


def slid_sizes(node: gs.Node, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Returns for how many places a kernel slides over axes of ``sizes``, by the attributes of a convolution."""
    n = len(kernel)
    strides, dilations = node.attrs.get("strides") or [1] * n, node.attrs.get("dilations") or [1] * n
    pads, automatic = node.attrs.get("pads") or [0] * 2 * n, str(node.attrs.get("auto_pad", "NOTSET"))
    if automatic.startswith("SAME"):
        return [-(-size // step) for size, step in zip(sizes, strides, strict=True)]
    both = [pads[i] + pads[n + i] if automatic == "NOTSET" else 0 for i in range(n)]
    return [(sizes[i] + both[i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(n)]


def gated_rms_norm(w: GraphWalk, node: gs.Node) -> None:
    """X and gate [.., heads*n], scale [n]: each run of n is normalised, then multiplied by its activated gate."""
    x, scale, gate = (w.input_axes(node, i) for i in range(3))
    assert x is not None and scale is not None and gate is not None
    axes, width = w.broadcast(x, gate), w.algebra.size(scale[-1])
    parts = w.algebra.split(axes[-1], [w.algebra.size(axes[-1]) // width, width])
    w.unify(parts[1], scale[-1])
    w.pin(parts[1:], f"{node.op} runs over it (node '{node.name}')")
    w.output(node, axes)
