"""Rules of operators that move elements between axes or pick places.

Channels go through most of them one by one: what is mixed, sampled or counted through (rows and columns, places within a
block, boxes) is pinned, and outputs have known sizes, so that what is behind them is found.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.rules import meaning

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def _known(w: GraphWalk, node: gs.Node, position: int) -> list[int] | None:
    """Returns the whole numbers of an input, or None where they are not known."""
    value = w.value(node, position)
    return None if value is None else [int(v) for v in np.asarray(value).reshape(-1)]


# -- blocks ---------------------------------------------------------------------------------------------------------


def depth_to_space(w: GraphWalk, node: gs.Node) -> None:
    """With mode CRD the channels are [c, n, n]."""
    meaning.depth_to_space(w, node, int(node.attrs["blocksize"]), str(node.attrs.get("mode", "DCR")) == "DCR")


def space_to_depth(w: GraphWalk, node: gs.Node) -> None:
    """With mode CRD (opset 28) the channels are [c, n, n]."""
    meaning.space_to_depth(w, node, int(node.attrs["blocksize"]), str(node.attrs.get("mode", "DCR")) == "DCR")


def columns_to_image(w: GraphWalk, node: gs.Node) -> None:
    image, block = _known(w, node, 1), _known(w, node, 2)
    if image is None or block is None or w.algebra.size(w.axes_of(node)[1]) % math.prod(block):
        w.give_up(node, "Col2Im of sizes that are not known")
        return
    meaning.columns_to_image(w, node, image, block)


def center_crop_pad(w: GraphWalk, node: gs.Node) -> None:
    axes, target = w.axes_of(node), _known(w, node, 1)
    chosen = [int(a) % len(axes) for a in node.attrs.get("axes") or range(len(axes))]
    if target is None or len(target) != len(chosen):
        w.give_up(node, "CenterCropPad to a size that is not known")
        return
    result, where = list(axes), f"{node.op} runs over it (node '{node.name}')"
    for element, (axis, size) in enumerate(zip(chosen, target, strict=True)):
        if size == w.algebra.size(axes[axis]):
            w.size_use(node, ("input", 1, element), axes[axis])
            continue
        w.pin([axes[axis]], where)
        result[axis] = w.fresh(size, where)
    w.output(node, tuple(result))


# -- places that are picked -----------------------------------------------------------------------------------------


def reverse_sequence(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    w.pin(axes[:2], f"reversed by {node.op} (node '{node.name}')")  # one is the time, the other the batch
    w.output(node, axes)


def affine_grid(w: GraphWalk, node: gs.Node) -> None:
    """Matrices [b, r, r + 1] and a size [b, c, ..] -> the places of a grid [b, .., r]."""
    axes, size = w.axes_of(node), _known(w, node, 1)
    where = f"made by AffineGrid (node '{node.name}')"
    w.pin(axes, where)
    if size is None:
        w.give_up(node, "AffineGrid of a size that is not known")
        return
    w.output(node, (axes[0], *(w.fresh(n, where) for n in size[2:]), w.fresh(len(size) - 2, where)))


def regions(w: GraphWalk, node: gs.Node) -> None:
    """X [b, c, h, w] is pooled within boxes [n, ..]: [n, c, rows, columns]."""
    axes, boxes = w.axes_of(node), w.axes_of(node, 1)
    where = f"pooled by {node.op} (node '{node.name}')"
    w.pin([axes[0], *axes[2:], *boxes, *(w.input_axes(node, 2) or ())], where)
    pooled = node.attrs.get("pooled_shape") or [node.attrs.get(f"output_{k}", 1) for k in ("height", "width")]
    w.output(node, (boxes[0], axes[1], *(w.fresh(int(n), where) for n in pooled)))


def max_unpool(w: GraphWalk, node: gs.Node) -> None:
    """The indices count through channels and places alike, so that all of them stay."""
    axes, kernel = w.axes_of(node), [int(k) for k in node.attrs["kernel_shape"]]
    n, where = len(kernel), f"written to places that are counted by {node.op} (node '{node.name}')"
    w.pin([*axes, *(w.input_axes(node, 1) or ())], where)
    strides, pads = node.attrs.get("strides") or [1] * n, node.attrs.get("pads") or [0] * 2 * n
    spatial = [(s - 1) * strides[i] + kernel[i] - pads[i] - pads[n + i] for i, s in enumerate(w.shape(axes[2:]))]
    if len(node.inputs) > 2 and present(node.inputs[2]):
        written = _known(w, node, 2)
        if written is None:
            w.give_up(node, "MaxUnpool to a size that is not known")
            return
        spatial = written[-n:]
    w.output(node, (*axes[:2], *(w.fresh(int(s), where) for s in spatial)))


def tensor_scatter(w: GraphWalk, node: gs.Node) -> None:
    """A cache [b, .., length, ..] is written over from places of its own for each sample."""
    past, update = w.axes_of(node), w.axes_of(node, 1)
    axis, where = int(node.attrs.get("axis", -2)) % len(past), f"written to by {node.op} (node '{node.name}')"
    for i, (a, b) in enumerate(zip(past, update, strict=True)):
        if i != axis:
            w.unify(a, b)
    w.pin([past[axis], update[axis], *(w.input_axes(node, 2) or ())], where)
    w.output(node, past)


def deformable(w: GraphWalk, node: gs.Node) -> None:
    """X [b, n, ..] is read at offsets [b, .., places] before it meets W [m, n / groups, ..]: no plain product."""
    x, weight, offset, bias = w.axes_of(node), w.axes_of(node, 1), w.axes_of(node, 2), w.input_axes(node, 3)
    where = f"slid over by a deformable convolution (node '{node.name}')"
    w.unify(x[0], offset[0])
    w.pin([*x[1:], *weight[1:], *offset[1:], *(w.input_axes(node, 4) or ())], where)
    if int(node.attrs.get("group", 1)) > 1:
        w.pin(weight[:1], where)
    if bias is not None:
        w.unify(weight[0], bias[0])
    w.flops += 2 * math.prod([w.algebra.size(x[0]), *w.shape(weight), *w.shape(offset[2:])])
    w.output(node, (x[0], weight[0], *offset[2:]))


# -- as many as the data says ---------------------------------------------------------------------------------------


def suppression(w: GraphWalk, node: gs.Node) -> None:
    where = f"counted through by {node.op} (node '{node.name}')"
    for i in range(len(node.inputs)):
        w.pin(w.input_axes(node, i), where)
    w.output(node, (w.fresh(w.unforeseen(), where), w.fresh(3, where)))


def unique(w: GraphWalk, node: gs.Node) -> None:
    axes, where = w.axes_of(node), f"compared by {node.op} (node '{node.name}')"
    w.pin(axes, where)
    found = w.fresh(w.unforeseen(), where)
    axis = None if "axis" not in node.attrs else int(node.attrs["axis"]) % len(axes)
    total = math.prod(w.shape(axes)) if axis is None else w.algebra.size(axes[axis])
    w.output(node, (found,) if axis is None else (*axes[:axis], found, *axes[axis + 1 :]))
    w.output(node, (found,), 1)
    w.output(node, (w.fresh(total, where),), 2)
    w.output(node, (found,), 3)


def drawn_by(w: GraphWalk, node: gs.Node) -> None:
    axes, where = w.axes_of(node), f"drawn from by {node.op} (node '{node.name}')"
    w.pin(axes, where)
    w.output(node, (axes[0], w.fresh(int(node.attrs.get("sample_size", 1)), where)))


def drawn_from(w: GraphWalk, node: gs.Node) -> None:
    w.output(
        node, tuple(w.fresh(int(s), f"random numbers are drawn for it (node '{node.name}')") for s in node.attrs["shape"])
    )


def resize(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    places = [int(a) % len(axes) for a in node.attrs.get("axes") or range(len(axes))]
    sizes = w.shape([axes[a] for a in places])
    given, written = w.constant(node, 1 if len(node.inputs) == 2 else 2), w.value(node, 3)
    scales = None if given is None else given.values
    if "scales" in node.attrs:  # as Upsample said them before opset 9
        scales = np.asarray(node.attrs["scales"], np.float32)
    target, same = None, np.zeros(len(places), bool)
    stretched = node.attrs.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if written is not None and len(written) == len(places) and stretched:
        target, same = written, written == np.asarray(sizes)
    elif written is None and scales is not None and scales.size == len(places):
        target, same = np.floor(np.asarray(sizes) * scales).astype(np.int64), scales == 1.0
    if target is None:
        w.give_up(node, f"{node.op} to a size that is not known")
        return
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        same = np.zeros(len(places), bool)
    result, where = list(axes), f"{node.op} runs over it (node '{node.name}')"
    for element, place in enumerate(places):
        if not same[element]:
            w.pin([axes[place]], where)
            result[place] = w.fresh(int(target[element]), where)
        elif written is not None:
            w.size_use(node, ("input", 3, element), axes[place])
    w.output(node, tuple(result))
