"""Rules of ONNX operators with a window that slides: convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes
from liar_opt.frontend.records import Window

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def conv(w: GraphWalk, node: gs.Node) -> None:
    """X [b, n, ..], W [m, n / groups, ..], bias [m]; a fused one adds a tensor like the result, before an activation."""
    x, weight = w.input_axes(node, 0), w.input_axes(node, 1)
    assert x is not None and weight is not None
    where = f"(node '{node.name}')"
    kernel, groups = w.shape(weight)[2:], int(node.attrs.get("group", 1))
    if groups == 1:
        w.unify(x[1], weight[1])
        w.channels += [x[1], weight[0]]
        pointwise = all(k == 1 for k in kernel)
        window = None if pointwise else _window(node, kernel)
        if w.constant(node, 1) is None or (window is None and not pointwise):
            w.pin([x[1]], f"input channels of a convolution that is no matrix product {where}")
        else:
            under = None if window is None else w.algebra.merge([*weight[2:], weight[1]])
            more: dict[str, Any] = {} if under is None else {"window": window, "width": under, "channels": weight[1]}
            w.consumer(node, 0, 1, 1, 1, bias=("input", 2), output_axis=1 - len(x), **more)
    elif groups == w.algebra.size(x[1]) == w.algebra.size(weight[0]) and w.constant(node, 1) is not None:
        w.unify(x[1], weight[0])  # depthwise: every channel by itself
        w.size_use(node, ("attribute", "group", -1), x[1])
    else:
        w.pin([x[1], *weight], f"grouped convolution {where}")
    bias = w.input_axes(node, 2)
    if bias is not None:
        w.unify(weight[0], bias[0])
    w.pin([*x[2:], *weight[2:]], f"slid over by a convolution {where}")
    spatial = _conv_sizes(node, w.shape(x)[2:], kernel) or w.inferred.get(node.outputs[0].name, ())[2:]
    if len(spatial) != len(kernel):
        w.give_up(node, "convolution of unknown extent")
        return
    if not w.slid(node, spatial, w.shape(x)[2:]):
        return
    w.flops += 2 * int(np.prod([*w.shape((x[0], *weight)), *spatial], dtype=np.int64))
    result: Axes = (x[0], weight[0], *(w.fresh(s, f"slid over by a convolution {where}") for s in spatial))
    added = w.input_axes(node, 3)
    w.output(node, result if added is None else w.broadcast(result, added))


def conv_transpose(w: GraphWalk, node: gs.Node) -> None:
    """What it adds up where its outputs overlap is a matrix product [.., n] [n, m k] of its inputs, without a bias.

    W' is fitted to the addends (k of each output, at most), which bounds what the sums lose.
    """
    x, weight, bias = w.input_axes(node, 0), w.input_axes(node, 1), w.input_axes(node, 2)
    assert x is not None and weight is not None
    where = f"(node '{node.name}')"
    w.unify(x[1], weight[0])
    w.pin([*x[2:], *weight[2:]], f"slid over by a transposed convolution {where}")
    groups = int(node.attrs.get("group", 1))
    if groups > 1 or w.constant(node, 1) is None:
        w.pin(weight, f"{'grouped ' if groups > 1 else ''}transposed convolution {where}")
    else:
        w.consumer(node, 0, 1, 1, 0, bias=("none", 0), output_axis=1 - len(x))
    made = weight[1] if groups == 1 else w.fresh(groups * w.algebra.size(weight[1]), f"grouped convolution {where}")
    if bias is not None:
        w.unify(made, bias[0])
    kernel, sizes, n = w.shape(weight)[2:], w.shape(x)[2:], len(x) - 2
    spatial: Sequence[int] = w.inferred.get(node.outputs[0].name, ())[2:]
    if node.attrs.get("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in node.attrs:
        pads, more = node.attrs.get("pads", [0] * 2 * n), node.attrs.get("output_padding", [0] * n)
        strides, dilations = node.attrs.get("strides", [1] * n), node.attrs.get("dilations", [1] * n)
        spatial = [
            strides[i] * (sizes[i] - 1) + more[i] + (kernel[i] - 1) * dilations[i] + 1 - pads[i] - pads[n + i]
            for i in range(n)
        ]
    if len(spatial) != n:
        w.give_up(node, "transposed convolution of unknown extent")
        return
    w.flops += 2 * int(np.prod([*w.shape((x[0], *weight)), *sizes], dtype=np.int64))
    w.output(node, (x[0], made, *(w.fresh(s, f"slid over by a transposed convolution {where}") for s in spatial)))


def _window(node: gs.Node, kernel: Sequence[int]) -> Window | None:
    """Returns how a convolution slides; None where its padding depends on the size of the input."""
    n = len(kernel)
    strides, dilations = (tuple(node.attrs.get(name, [1] * n)) for name in ("strides", "dilations"))
    automatic = node.attrs.get("auto_pad", "NOTSET")
    pads = tuple(node.attrs.get("pads", [0] * 2 * n)) if automatic == "NOTSET" else (0,) * 2 * n
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        if max(strides) > 1:
            return None
        spread = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        less, more = [s // 2 for s in spread], [s - s // 2 for s in spread]
        pads = (*less, *more) if automatic == "SAME_UPPER" else (*more, *less)
    return Window(tuple(kernel), strides, dilations, pads)


def _conv_sizes(node: gs.Node, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    n = len(kernel)
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return []
    pads = list(node.attrs.get("pads", [0] * 2 * n))
    strides, dilations = list(node.attrs.get("strides", [1] * n)), list(node.attrs.get("dilations", [1] * n))
    return [(sizes[i] + pads[i] + pads[n + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(n)]


def pool(w: GraphWalk, node: gs.Node) -> None:
    axes, shape = w.input_axes(node, 0), w.inferred.get(node.outputs[0].name)
    assert axes is not None
    if shape is None:
        w.give_up(node, f"{node.op} of unknown extent")
        return
    if not w.slid(node, shape[2:], w.shape(axes)[2:]):
        return
    where = f"slid over by {node.op} (node '{node.name}')"
    w.pin(axes[2:], where)
    if len(node.outputs) > 1 and w.read(node.outputs[1]):
        w.pin(axes[:2], f"counted by the indices of {node.op} (node '{node.name}')")
    for position in range(len(node.outputs)):
        w.output(node, (*axes[:2], *(w.fresh(s, where) for s in shape[2:])), position)


def global_pool(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    w.pin(axes[2:], f"{node.op} runs over it (node '{node.name}')")
    w.output(node, (*axes[:2], *(w.fresh(1) for _ in axes[2:])))
