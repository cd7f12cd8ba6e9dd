"""Rules of ONNX operators with a window that slides: convolutions and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    kernel, sizes = w.shape(w.axes_of(node, 1)[2:]), w.shape(w.axes_of(node)[2:])
    n, spatial = len(sizes), w.inferred.get(node.outputs[0].name, ())[2:]
    if node.attrs.get("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in node.attrs:
        pads, more = node.attrs.get("pads", [0] * 2 * n), node.attrs.get("output_padding", [0] * n)
        strides, dilations = node.attrs.get("strides", [1] * n), node.attrs.get("dilations", [1] * n)
        spatial = tuple(
            strides[i] * (sizes[i] - 1) + more[i] + (kernel[i] - 1) * dilations[i] + 1 - pads[i] - pads[n + i]
            for i in range(n)
        )
    if len(spatial) != n:
        w.give_up(node, "transposed convolution of unknown extent")
        return
    meaning.convolve_transposed(w, node, int(node.attrs.get("group", 1)), spatial)


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
    if len(node.outputs) > 1 and w.read(node.outputs[1]):
        w.pin(axes[:2], f"counted by the indices of {node.op} (node '{node.name}')")
    meaning.pool(w, node, axes, shape[2:])


def global_pool(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    meaning.pool(w, node, axes, [1] * (len(axes) - 2))
