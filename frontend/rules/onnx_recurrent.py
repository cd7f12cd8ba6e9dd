"""Rules of operators that go over a sequence with a state.

An RNN, a GRU and an LSTM compute, with W [directions, gates*h, n] and R [directions, gates*h, h],

    y[t] = f(x[t] W^T + y[t-1] R^T + b, what was kept of t-1),    where f works on each hidden unit by itself.

Both products are linear contractions with a constant, of the input and of what the operator made one step before. So inputs
may lose channels, and hidden units may go: from W, R, the biases, the peepholes and the states, and from whatever reads y.
Both directions lose the same units. A GRU that resets its state before it multiplies it (linear_before_reset 0) contracts
what is inside it and cannot be measured: its units stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.rules import meaning

if TYPE_CHECKING:
    from liar_opt.frontend.axes import Factor
    from liar_opt.frontend.walk import GraphWalk


def recurrent(w: GraphWalk, node: gs.Node) -> None:
    """X [s, b, n], W, R, biases [directions, 2*gates*h], lengths [b], states, and of an LSTM peepholes [directions, 3*h].

    Y [s, directions, b, h]; with layout 1 the batch comes first in X, the states and Y: [b, s, directions, h].
    """
    x, weight, recurrence = (w.axes_of(node, i) for i in range(3))
    if len(x) != 3 or len(weight) != 3 or len(recurrence) != 3:
        w.give_up(node, f"{node.op} of inputs of other ranks")
        return
    first = bool(node.attrs.get("layout", 0))
    batch, length = (x[0], x[1]) if first else (x[1], x[0])
    directions, hidden = weight[0], recurrence[2]
    w.pin([length, directions, recurrence[0]], f"gone over by {node.op} (node '{node.name}')")
    w.unify(x[2], weight[2])
    _units(w, node, hidden)
    w.count(batch, length, *weight)
    w.count(batch, length, *recurrence)
    w.output(node, (batch, length, directions, hidden) if first else (length, directions, batch, hidden))
    for position in range(1, len(node.outputs)):
        w.output(node, (batch, directions, hidden) if first else (directions, batch, hidden), position)
    if w.constant(node, 1) is None:
        w.pin([x[2]], f"contracted between two activations (node '{node.name}')")
    else:
        w.consumer(node, 0, 2, 1, 2, **meaning.INSIDE)
    if w.constant(node, 2) is not None and present(node.outputs[0]):
        w.consumer(node, 0, 3, 2, 2, reads=node.outputs[0], **meaning.INSIDE)


def _units(w: GraphWalk, node: gs.Node, hidden: Factor) -> None:
    """Unifies the hidden units of all that has them, innermost of an axis; pins them where their product is not seen."""
    size, where = w.algebra.size(hidden), f"contracted at the next step of {node.op} (node '{node.name}')"
    for position in (1, 2, 3, 7):  # W, R, biases, peepholes
        axes = w.input_axes(node, position)
        if axes is None:
            continue
        gates, units = w.algebra.split(axes[1], [w.algebra.size(axes[1]) // size, size])
        w.pin([axes[0], gates], f"the gates of {node.op} (node '{node.name}')")
        w.unify(units, hidden)
    for position in (5, 6):
        state = w.input_axes(node, position)
        if state is not None:
            w.pin(state[:-1], f"a state of {node.op} (node '{node.name}')")
            w.unify(state[-1], hidden)
    w.pin(w.input_axes(node, 4), f"lengths (node '{node.name}')")
    resets = node.op == "GRU" and not node.attrs.get("linear_before_reset", 0)
    if resets or w.constant(node, 2) is None or not (node.outputs and present(node.outputs[0])):
        w.pin([hidden], where)
    if "hidden_size" in node.attrs:
        w.size_use(node, ("attribute", "hidden_size", -1), hidden)


def causal_convolution(w: GraphWalk, node: gs.Node) -> None:
    """X [b, c, s] (channels_last: [b, s, c]), kernels [c, 1, k], bias [c], state [b, c, (k - 1)*dilation]."""
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
