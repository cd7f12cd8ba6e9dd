"""Rules of operators that normalise over more than one axis.

A normalisation by groups takes its mean and variance over the channels of one group: of channels only whole groups may go,
and with them the number of groups: ``channels = groups x rest`` with ``rest`` pinned. Its groups are no attention heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.rules import meaning
from liar_opt.frontend.rules.meaning import normalised_by_groups

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def group_normalization(w: GraphWalk, node: gs.Node) -> None:
    """X [b, c, ..]; scale and shift [groups] in opset 18, [c] since 21."""
    axes = w.axes_of(node)
    normalised_by_groups(w, node, axes, 1, "num_groups")
    w.output(node, axes)


def contrib_group_norm(w: GraphWalk, node: gs.Node) -> None:
    """X [b, h, w, c] (or channels first), scale and shift [c]; skip as X, [b, 1, 1, c] or [b, c], and bias [c]."""
    axes, skip, bias = w.axes_of(node), w.input_axes(node, 3), w.input_axes(node, 4)
    channel = len(axes) - 1 if node.attrs.get("channels_last", 1) else 1
    if skip is not None and len(skip) == len(axes):
        axes = w.broadcast(axes, skip)
    elif skip is not None:
        w.unify(skip[0], axes[0])
        w.unify(skip[-1], axes[channel])
    if bias is not None:
        w.unify(bias[0], axes[channel])
    normalised_by_groups(w, node, axes, channel, "groups")
    w.output(node, axes)
    w.output(node, axes, 1)


def local_response(w: GraphWalk, node: gs.Node) -> None:
    """Each channel is divided by what its neighbours hold."""
    axes = w.axes_of(node)
    w.pin(axes[1:2], f"LRN runs along it (node '{node.name}')")
    w.output(node, axes)


def mean_variance(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    chosen = {int(a) % len(axes) for a in node.attrs.get("axes", [0, 2, 3])}
    w.pin([axes[a] for a in chosen], f"{node.op} runs over it (node '{node.name}')")
    w.output(node, axes)


def bias_softmax(w: GraphWalk, node: gs.Node) -> None:
    """Softmax, over all axes from one on, of scores plus a bias whose axes are theirs or one."""
    axes, bias = w.axes_of(node), w.axes_of(node, 1)
    where = f"{node.op} runs over it (node '{node.name}')"
    first = int(node.attrs.get("axis", 1)) % len(axes)
    w.pin(axes[first:], where)
    aligned = zip(w.shape(bias)[::-1], w.shape(axes)[::-1], strict=False)
    if len(bias) <= len(axes) and all(a in (1, b) for a, b in aligned):
        w.output(node, w.broadcast(axes, bias))
        return
    w.pin([*axes, *bias], where)
    w.output(node, axes)


def channel_normalization(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    if int(node.attrs.get("training_mode", 0)) or len(node.outputs) > 1:
        w.give_up(node, f"{node.op} in training mode")
        return
    meaning.normalise_channels(w, node, axes, node.op == "InstanceNormalization")


def layer_normalization(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    meaning.normalise(w, node, axes, int(node.attrs.get("axis", -1)) % len(axes))


def skip_layer_normalization(w: GraphWalk, node: gs.Node) -> None:
    x, skip = w.axes_of(node), w.axes_of(node, 1)
    axes = w.broadcast(x, skip)
    w.pin(axes[-1:], f"{node.op} runs over it (node '{node.name}')")
    for i in range(2, len(node.inputs)):
        extra = w.input_axes(node, i)
        if extra is not None:
            w.unify(axes[-1], extra[-1])
    w.output(node, axes)
    for i in (1, 2):
        w.output(node, (*axes[:-1], w.fresh(1)), i)
    w.output(node, axes, 3)


def embed_layer_normalization(w: GraphWalk, node: gs.Node) -> None:
    ids = w.input_axes(node, 0)
    tables = [w.input_axes(node, i) for i in range(2, 7)]
    assert ids is not None
    known = [t for t in tables if t is not None]
    where = f"{node.op} runs over it (node '{node.name}')"
    for table in known:
        w.pin(table, where)
    hidden = known[0][-1]
    axes = (*ids, hidden)
    w.output(node, axes)
    w.output(node, (ids[0],), 1)
    w.output(node, axes, 2)
