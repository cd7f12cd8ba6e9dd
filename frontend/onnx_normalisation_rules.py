"""The rules of operators that normalise over more than one axis; :mod:`liar_opt.frontend.onnx_rules` imports them.

A normalisation by groups takes its mean and variance over the channels of one group: of channels only whole groups may go,
and with them the number of groups: ``channels = groups x rest`` with ``rest`` pinned. Its groups are no attention heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.onnx_rule_table import MICROSOFT, Axes, rule

if TYPE_CHECKING:
    from liar_opt.frontend.axes import Factor
    from liar_opt.frontend.onnx_rules import GraphWalk


def normalised_by_groups(w: GraphWalk, node: gs.Node, axes: Axes, channel: int, number: str) -> Factor | None:
    """Splits the channels into groups and pins what lies within one.

    Args:
        w: the walk.
        node: the operator; its inputs 1 and 2 have an entry for each channel (or, before opset 21, for each group).
        axes: of the tensor that is normalised.
        channel: the axis of the channels.
        number: the attribute that says how many groups there are.

    Returns:
        The factor that counts the groups; None where the channels cannot be split.
    """
    groups, size = int(node.attrs.get(number, 0)), w.algebra.size(axes[channel])
    vectors = [v for position in (1, 2) if (v := w.input_axes(node, position)) is not None]
    where = f"{node.op} runs over it (node '{node.name}')"
    w.pin([f for i, f in enumerate(axes) if i not in (0, channel)], where)
    if groups <= 0 or size % groups or any(w.shape(v) not in ([size], [groups]) for v in vectors):
        where = f"{node.op} of {size} channels in {groups} groups (node '{node.name}')"
        w.pin([axes[channel], *(f for v in vectors for f in v)], where)
        return None
    outer, inner = w.algebra.split(axes[channel], [groups, size // groups])
    w.pin([inner], where)
    w.channels.append(axes[channel])
    w.size_use(node, ("attribute", number, -1), outer)
    for (vector,) in vectors:
        w.unify(vector, axes[channel] if w.algebra.size(vector) == size else outer)
    return outer


@rule("GroupNormalization")
def _group_normalization(w: GraphWalk, node: gs.Node) -> None:
    """X [b, c, ..]; scale and shift [groups] in opset 18, [c] since 21."""
    axes = w.input_axes(node, 0)
    assert axes is not None
    normalised_by_groups(w, node, axes, 1, "num_groups")
    w.output(node, axes)


@rule("GroupNorm", "SkipGroupNorm", domain=MICROSOFT)
def _contrib_group_norm(w: GraphWalk, node: gs.Node) -> None:
    """X [b, h, w, c] (or channels first), scale and shift [c]; skip as X, [b, 1, 1, c] or [b, c], and bias [c]."""
    axes, skip, bias = w.input_axes(node, 0), w.input_axes(node, 3), w.input_axes(node, 4)
    assert axes is not None
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


@rule("LRN")
def _local_response(w: GraphWalk, node: gs.Node) -> None:
    """Each channel is divided by what its neighbours hold."""
    axes = w.input_axes(node, 0)
    assert axes is not None
    w.pin(axes[1:2], f"LRN runs along it (node '{node.name}')")
    w.output(node, axes)


@rule("MeanVarianceNormalization")
def _mean_variance(w: GraphWalk, node: gs.Node) -> None:
    axes = w.input_axes(node, 0)
    assert axes is not None
    chosen = {int(a) % len(axes) for a in node.attrs.get("axes", [0, 2, 3])}
    w.pin([axes[a] for a in chosen], f"{node.op} runs over it (node '{node.name}')")
    w.output(node, axes)


@rule("BiasSoftmax", domain=MICROSOFT)
def _bias_softmax(w: GraphWalk, node: gs.Node) -> None:
    """Softmax, over all axes from one on, of scores plus a bias whose axes are theirs or one."""
    axes, bias = w.input_axes(node, 0), w.input_axes(node, 1)
    assert axes is not None and bias is not None
    where = f"{node.op} runs over it (node '{node.name}')"
    first = int(node.attrs.get("axis", 1)) % len(axes)
    w.pin(axes[first:], where)
    aligned = zip(w.shape(bias)[::-1], w.shape(axes)[::-1], strict=False)
    if len(bias) <= len(axes) and all(a in (1, b) for a, b in aligned):
        w.output(node, w.broadcast(axes, bias))
        return
    w.pin([*axes, *bias], where)
    w.output(node, axes)
