"""The rules of operators that go over a sequence with a state; :mod:`liar_opt.frontend.onnx_rules` imports them.

An RNN, a GRU and an LSTM multiply what they read by W [directions, gates*h, n], whose last axis is contracted: their inputs
may lose channels. What they make is contracted with R [directions, gates*h, h] at the next step: their hidden units stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.onnx_rule_table import MICROSOFT, rule

if TYPE_CHECKING:
    from liar_opt.frontend.onnx_rules import GraphWalk


@rule("GRU", "LSTM", "RNN")
def _recurrent(w: GraphWalk, node: gs.Node) -> None:
    """X [s, b, n], W, R, biases [directions, 2*gates*h], lengths [b], states, and of an LSTM peepholes [directions, 3*h].

    Y [s, directions, b, h]; with layout 1 the batch comes first in X, the states and Y: [b, s, directions, h].
    """
    x, weight, recurrence = (w.input_axes(node, i) for i in range(3))
    assert x is not None and weight is not None and recurrence is not None
    if len(x) != 3 or len(weight) != 3 or len(recurrence) != 3:
        w.give_up(node, f"{node.op} of inputs of other ranks")
        return
    where = f"contracted at the next step of {node.op} (node '{node.name}')"
    first = bool(node.attrs.get("layout", 0))
    batch, length = (x[0], x[1]) if first else (x[1], x[0])
    w.pin([length, *recurrence, *weight[:2]], where)
    for position in range(3, len(node.inputs)):
        w.pin(w.input_axes(node, position), where)
    w.unify(x[2], weight[2])
    if w.constant(node, 1) is None:
        w.pin([x[2]], f"contracted between two activations (node '{node.name}')")
    else:
        w.consumer(node, 0, 2, 1, 2, bias=("none", 0))
    directions, hidden = weight[0], recurrence[2]
    w.count(batch, length, *weight)
    w.count(batch, length, *recurrence)
    w.output(node, (batch, length, directions, hidden) if first else (length, directions, batch, hidden))
    for position in range(1, len(node.outputs)):
        w.output(node, (batch, directions, hidden) if first else (directions, batch, hidden), position)


@rule("CausalConvWithState")
@rule("CausalConvWithState", domain=MICROSOFT)
def _causal_convolution(w: GraphWalk, node: gs.Node) -> None:
    """X [b, c, s] (channels_last: [b, s, c]), a kernel of each channel [c, 1, k], bias [c], state [b, c, (k - 1)*dilation]."""
    x, weight, bias, state = (w.input_axes(node, i) for i in range(4))
    assert x is not None and weight is not None
    if len(x) != 3 or len(weight) != 3 or node.attrs.get("state_window", 0):
        w.give_up(node, f"{node.op} over several axes or with a window of states")
        return
    where = f"slid over by {node.op} (node '{node.name}')"
    last = bool(node.attrs.get("channels_last", 0))
    channels, length = (x[2], x[1]) if last else (x[1], x[2])
    w.unify(channels, weight[0])
    w.pin([length, *weight[1:]], where)
    if bias is not None:
        w.unify(channels, bias[0])
    kept = w.fresh((w.algebra.size(weight[2]) - 1) * int(node.attrs.get("dilation", 1)), where)
    carried = (x[0], kept, channels) if last else (x[0], channels, kept)
    if state is not None:
        w.broadcast(carried, state)
    w.flops += 2 * w.algebra.size(x[0]) * w.algebra.size(length) * w.algebra.size(weight[2]) * w.algebra.size(channels)
    w.output(node, x)
    w.output(node, carried, 1)
