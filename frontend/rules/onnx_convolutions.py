"""Rules of ONNX operators with a window that slides: convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes
from liar_opt.frontend.records import Window
from liar_opt.frontend.rules import meaning

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def conv(w: GraphWalk, node: gs.Node) -> None:
    """A fused one adds a tensor like the result, input 3, before an activation."""
    _convolved(w, node, w.axes_of(node)[2:], _window(node, w.shape(w.axes_of(node, 1)[2:])), last=False)


def channels_last_conv(w: GraphWalk, node: gs.Node) -> None:
    """The input channels of a kernel of more than one place stay."""
    _convolved(w, node, w.axes_of(node)[1:-1], None, last=True)


def _convolved(w: GraphWalk, node: gs.Node, sides: Axes, window: Window | None, last: bool) -> None:
    spatial = _slid_sizes(node, w.shape(sides), w.shape(w.axes_of(node, 1)[2:]))
    groups, added = ("group", int(node.attrs.get("group", 1))), w.input_axes(node, 3)
    result = meaning.convolve(w, node, groups, spatial, window, computed=last, last=last)
    if result is not None:
        w.output(node, result if added is None else w.broadcast(result, added))


def conv_transpose(w: GraphWalk, node: gs.Node) -> None:
    """What it adds up where its outputs overlap is a matrix product [.., n] [n, m k] of its inputs, without a bias.

    W' is fitted to the addends (k of each output, at most), which bounds what the sums lose.
    """
    x, weight, bias = w.axes_of(node), w.axes_of(node, 1), w.input_axes(node, 2)
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


def _slid_sizes(node: gs.Node, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Returns for how many places a kernel slides over axes of ``sizes``, by the attributes of a convolution."""
    n = len(kernel)
    strides, dilations = node.attrs.get("strides") or [1] * n, node.attrs.get("dilations") or [1] * n
    pads, automatic = node.attrs.get("pads") or [0] * 2 * n, str(node.attrs.get("auto_pad", "NOTSET"))
    if automatic.startswith("SAME"):
        return [-(-size // step) for size, step in zip(sizes, strides, strict=True)]
    both = [pads[i] + pads[n + i] if automatic == "NOTSET" else 0 for i in range(n)]
    return [(sizes[i] + both[i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(n)]


def pool(w: GraphWalk, node: gs.Node) -> None:
    axes, shape = w.axes_of(node), w.inferred.get(node.outputs[0].name)
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
    axes = w.axes_of(node)
    w.pin(axes[2:], f"{node.op} runs over it (node '{node.name}')")
    w.output(node, (*axes[:2], *(w.fresh(1) for _ in axes[2:])))
