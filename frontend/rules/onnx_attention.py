"""Rules of operators that hold a whole attention.

All of them work on heads independently of each other, so that heads may go: with all that is per head (biases added to
the scores, sinks, caches, the scores as an output). Where several query heads share one key and value head, the shared
head goes with all of its query heads: ``heads = groups x repeat`` with ``repeat`` pinned. The width of a head stays: it
is in the default scale 1 / sqrt(width), rotary embeddings turn pairs within it, and kernels take few widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes
from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.rules.meaning import attend, share_heads

if TYPE_CHECKING:
    from liar_opt.frontend.axes import Factor
    from liar_opt.frontend.walk import GraphWalk


# -- parts of the rules ---------------------------------------------------------------------------------------------


def _given(tensors: Sequence[gs.Tensor], *positions: int) -> bool:
    """Returns whether any of some optional inputs or outputs is there."""
    return any(len(tensors) > i and present(tensors[i]) for i in positions)


def _head_split(w: GraphWalk, node: gs.Node, factor: Factor, heads: Factor, width: int) -> Factor:
    """Splits ``factor`` into heads x width, unifies the heads and returns the width's factor."""
    w.batched.append(heads)
    parts = w.algebra.split(factor, [w.algebra.size(heads), width])
    w.unify(parts[0], heads)
    return parts[1]


def _unify_heads(w: GraphWalk, node: gs.Node, axes: Axes, axis: int, heads: Factor) -> None:
    """Unifies one axis with the heads and pins the others; a single entry serves all heads."""
    where = f"inside {node.op} (node '{node.name}')"
    if len(axes) > axis and w.algebra.size(axes[axis]) == w.algebra.size(heads):
        w.unify(axes[axis], heads)
        w.pin([f for i, f in enumerate(axes) if i != axis], where)
    else:
        w.pin(axes, where)


def _attention_bias(w: GraphWalk, node: gs.Node, position: int, heads: Factor) -> None:
    """Unifies the head axis of an additive attention bias [b or 1, heads or 1, s, t] (leading axes may be missing)."""
    axes = w.input_axes(node, position)
    if axes is not None:
        _unify_heads(w, node, axes, len(axes) - 3 if len(axes) >= 3 else len(axes), heads)


def _cache(
    w: GraphWalk,
    node: gs.Node,
    position: int,
    output: int,
    axis: int,
    heads: Factor,
    width: int,
    new: Factor,
    *,
    shared: bool = False,
    capacity: int = 0,
) -> Factor:
    """Ties a cache [.., heads, length, width] at an input, and what it becomes at an output, to the heads.

    Args:
        w: the walk.
        node: the operator.
        position: the input; it may be absent.
        output: the output; it may be absent.
        axis: the head axis; the length and the width follow it.
        heads: the heads that the cache holds.
        width: the width of a head.
        new: what is appended.
        shared: the length stays, because the cache is written in place.
        capacity: the least length that the operator takes.

    Returns:
        The length of the keys that are attended to.
    """
    where = f"a cache inside {node.op} (node '{node.name}')"
    past = w.input_axes(node, position)
    if past is not None and len(past) != axis + 3:
        w.pin(past, where)
        past = None
    sizes = [w.algebra.size(new)] if past is None else [w.algebra.size(past[axis + 1])]
    if past is not None and not shared:
        sizes.append(w.algebra.size(new))
    total = w.fresh(sum(sizes), where)
    if past is not None:
        _unify_heads(w, node, past, axis, heads)
        w.need(node, position, axis + 2, width)
        if shared:
            w.in_place.add(node.inputs[position].name)
        if capacity:
            w.need(node, position, axis + 1, capacity)
    if _given(node.outputs, output):
        leading = past[:axis] if past is not None else (w.input_axes(node, 0) or ())[:1]
        w.output(node, (*leading, heads, total, w.fresh(width, where)), output)
        if shared:
            w.unspecified.add(node.outputs[output].name)
        if past is not None:
            w.cache(node.inputs[position], node.outputs[output], axis + 1)
    return total


def _refuse(w: GraphWalk, node: gs.Node, reason: str) -> None:
    """Pins all that an attention touches and says why; what is behind it stays open to the analysis.

    The output has the rows of the query and, but for packed inputs, its width.
    """
    w.give_up(node, f"{node.op} {reason}")
    w.leave(node, f"{node.op} {reason}")
    query, key = w.input_axes(node, 0), w.input_axes(node, 1)
    if query is None or key is None or len(query) != len(key) or node.op in ("Attention", "PackedAttention"):
        return
    where = f"{node.op} {reason} (node '{node.name}')"
    w.output(node, (*query[:-1], w.fresh(w.algebra.size(query[-1]), where)))


def _refused(w: GraphWalk, node: gs.Node, *reasons: tuple[object, str]) -> bool:
    """Refuses for the first reason that holds."""
    for holds, reason in reasons:
        if holds:
            _refuse(w, node, reason)
            return True
    return False


# -- com.microsoft --------------------------------------------------------------------------------------------------


def contrib_attention(w: GraphWalk, node: gs.Node) -> None:
    """The projections of q, k and v are inside: input [b, s, d], weights [d, q + k + v], past [2, b, heads, p, width]."""
    x, weight, bias = (w.input_axes(node, i) for i in range(3))
    assert x is not None and weight is not None
    count = int(node.attrs.get("num_heads", 0))
    if _refused(
        w,
        node,
        (count <= 0, "without a number of heads"),
        (w.constant(node, 1) is None, "with a variable weight"),
        (node.attrs.get("do_rotary", 0), "with rotary embedding inside"),
    ):
        return
    total = w.algebra.size(weight[1])
    sizes = [int(s) for s in node.attrs.get("qkv_hidden_sizes") or [total // 3] * 3]
    where = f"inside {node.op} (node '{node.name}')"
    w.unify(x[-1], weight[0])
    w.consumer(node, 0, -1, 1, 0, bias=("input", 2))
    parts = w.algebra.cut(weight[1], sizes)
    heads = w.fresh(count)
    widths = [_head_split(w, node, part, heads, size // count) for part, size in zip(parts, sizes, strict=True)]
    w.unify(widths[0], widths[1])
    w.pin(widths, f"width of a head {where}")
    if bias is not None:
        w.unify(bias[0], weight[1])
    for i in (3, 6):
        w.pin(w.input_axes(node, i), where)
    _attention_bias(w, node, 5, heads)
    shared = bool(node.attrs.get("past_present_share_buffer", 0))
    keys = _cache(w, node, 4, 1, 2, heads, w.algebra.size(widths[0]), x[1], shared=shared)
    w.size_use(node, ("attribute", "num_heads", -1), heads)
    if "qkv_hidden_sizes" in node.attrs:
        for i, part in enumerate(parts):
            w.size_use(node, ("attribute", "qkv_hidden_sizes", i), part)
    w.count(*x, weight[1])
    w.count(x[0], x[1], keys, parts[0])
    w.count(x[0], x[1], keys, parts[2])
    w.output(node, (*x[:-1], parts[2]))


def multi_head_attention(w: GraphWalk, node: gs.Node) -> None:
    """Query [b, s, heads*width] or packed [b, s, heads, 3, width]; key and value likewise, or [b, heads, t, width]."""
    query, key, value, bias = (w.input_axes(node, i) for i in range(4))
    assert query is not None
    count = int(node.attrs.get("num_heads", 0))
    where = f"inside {node.op} (node '{node.name}')"
    packed = len(query) == 5
    if _refused(
        w,
        node,
        (count <= 0, "without a number of heads"),
        (_given(node.inputs, 9), "with a cache indirection, made for beam search inside the graph"),
        (not packed and key is None, "without a key"),
        (not packed and value is None and len(key or ()) != 5, "without a value"),
    ):
        return
    heads = w.fresh(count)
    w.batched.append(heads)
    w.size_use(node, ("attribute", "num_heads", -1), heads)
    for i in (4, 8):
        w.pin(w.input_axes(node, i), where)
    _attention_bias(w, node, 5, heads)
    if packed:
        w.unify(query[2], heads)
        w.pin(query[3:], f"packed {where}")
        if bias is not None:
            parts = w.algebra.split(bias[0], [3, count, w.algebra.size(query[4])])
            w.pin([parts[0], parts[2]], f"packed {where}")
            w.unify(parts[1], heads)
        widths, hidden, new = [query[4]], [w.algebra.merge([heads, query[4]])], query[1]
    else:
        widths = [_head_split(w, node, query[2], heads, w.algebra.size(query[2]) // count)]
        hidden = [query[2]]
        assert key is not None
        if len(key) == 5:
            w.unify(key[2], heads)
            w.pin(key[3:], f"packed {where}")
            widths.append(key[4])
            hidden += [w.algebra.merge([heads, key[4]])] * 2
        for axes in (key, value) if len(key) != 5 else ():
            assert axes is not None
            if len(axes) == 4:
                _unify_heads(w, node, axes, 1, heads)
                widths.append(axes[3])
                hidden.append(w.algebra.merge([heads, axes[3]]))
            else:
                widths.append(_head_split(w, node, axes[2], heads, w.algebra.size(axes[2]) // count))
                hidden.append(axes[2])
        w.unify(widths[0], widths[1])
        if bias is not None:
            w.unify(bias[0], w.algebra.join(hidden))
        new = key[2] if len(key) == 4 else key[1]
    w.pin(widths, f"width of a head {where}")
    shared = _given(node.inputs, 8)
    keys = _cache(w, node, 6, 1, 1, heads, w.algebra.size(widths[0]), new, shared=shared)
    _cache(w, node, 7, 2, 1, heads, w.algebra.size(widths[-1]), new, shared=shared)
    w.count(query[0], query[1], keys, hidden[0])
    w.count(query[0], query[1], keys, hidden[-1])
    w.output(node, (*query[:2], hidden[-1]))
    w.output(node, (query[0], heads, query[1], keys), 3)


def group_query_attention(w: GraphWalk, node: gs.Node) -> None:
    """Query [b, s, heads*width] with key and value [b, t, groups*width], or all of them packed along the last axis."""
    query, key, value = (w.input_axes(node, i) for i in range(3))
    counts = int(node.attrs.get("num_heads", 0)), int(node.attrs.get("kv_num_heads", 0))
    assert query is not None
    quantised = any(str(node.attrs.get(k, "NONE")) != "NONE" for k in ("k_quant_type", "v_quant_type"))
    if _refused(
        w,
        node,
        (min(counts) <= 0 or counts[0] % counts[1], "whose heads are no multiple of its key heads"),
        ((key is None) != (value is None), "with a key and no value"),
        (quantised or _given(node.inputs, 12, 13), "with a quantised cache"),
    ):
        return
    where = f"inside {node.op} (node '{node.name}')"
    heads, groups = w.fresh(counts[0]), w.fresh(counts[1])
    w.size_use(node, ("attribute", "num_heads", -1), heads)
    w.size_use(node, ("attribute", "kv_num_heads", -1), groups)
    if key is None or value is None:
        width = w.algebra.size(query[2]) // (counts[0] + 2 * counts[1])
        packed = w.algebra.cut(query[2], [counts[0] * width, counts[1] * width, counts[1] * width])
        new = query[1]
    else:
        width = w.algebra.size(query[2]) // counts[0]
        packed, new = [query[2], key[2], value[2]], key[1]
    widths = [_head_split(w, node, packed[0], heads, width)]
    widths += [_head_split(w, node, part, groups, width) for part in packed[1:]]
    w.pin(widths, f"width of a head {where}")
    share_heads(w, node, heads, groups)
    for i in (5, 6, 7, 8, 9, 14, 15):
        w.pin(w.input_axes(node, i), where)
    _attention_bias(w, node, 10, heads)
    sink = w.input_axes(node, 11)
    if sink is not None:
        _unify_heads(w, node, sink, 0, heads)
    sliding = bool(node.attrs.get("sliding_window_cache", 0))
    capacity = max(0, int(node.attrs.get("local_window_size", -1))) if sliding else 0
    for position, output in ((3, 1), (4, 2)):
        keys = _cache(w, node, position, output, 1, groups, width, new, shared=sliding, capacity=capacity)
        w.count(query[0], query[1], keys, packed[0])
    w.output(node, (*query[:2], packed[0]))
    w.output(node, (query[0], heads, query[1], keys), 3)


def contrib_rotary_embedding(w: GraphWalk, node: gs.Node) -> None:
    """Input [b, s, heads*width] or [b, heads, s, width], positions, and tables [length, half of what is turned]."""
    table = w.input_axes(node, 2)
    turned = 2 * w.algebra.size(table[-1]) if table else 0
    _rotary(w, node, 0 if node.attrs.get("rotary_embedding_dim", 0) else turned)


def rotary_embedding(w: GraphWalk, node: gs.Node) -> None:
    """Opset 23: X as above with the number of heads as an attribute, tables of cos and sin, positions."""
    _rotary(w, node, 0)


def _rotary(w: GraphWalk, node: gs.Node, width: int) -> None:
    """Pins the width that is turned; ``width`` is used where the operator does not say the number of heads."""
    x = w.axes_of(node)
    where = f"turned by {node.op} (node '{node.name}')"
    for i in range(1, len(node.inputs)):
        w.pin(w.input_axes(node, i), where)
    count = int(node.attrs.get("num_heads", 0))
    if len(x) == 4:
        w.pin(x[3:], where)
        if count and count == w.algebra.size(x[1]):
            w.size_use(node, ("attribute", "num_heads", -1), x[1])
    elif count or width:
        count = count or w.algebra.size(x[2]) // width
        heads, turned = w.algebra.split(x[2], [count, w.algebra.size(x[2]) // count])
        w.pin([turned], where)
        if node.attrs.get("num_heads", 0):
            w.size_use(node, ("attribute", "num_heads", -1), heads)
    else:
        w.pin(x[2:], where)
    w.output(node, x)


def gemma_rotary_embedding(w: GraphWalk, node: gs.Node) -> None:
    """Angles [b, s, width]; q, q turned by half, k, k turned by half: [b, heads, s, width]."""
    where = f"turned by {node.op} (node '{node.name}')"
    w.pin(w.input_axes(node, 0), where)
    for i in (1, 3):
        x, half = w.input_axes(node, i), w.input_axes(node, i + 1)
        assert x is not None and half is not None
        axes = w.broadcast(x, half)
        w.pin(axes[3:], where)
        w.output(node, axes, i // 2)


def attention_left_alone(w: GraphWalk, node: gs.Node) -> None:
    reasons = {
        "Dec": "is made for the buffers of beam search; prune the model before it is converted for that",
        "Lon": "mixes local and global attention",
        "Pac": "reads packed sequences; prune the model before padding is removed",
        "Pag": "reads caches of blocks; prune the model before it is converted for that",
        "Spa": "deals its sparse layouts to the heads in turn",
    }
    _refuse(w, node, reasons[node.op[:3]])


def gated_relative_position_bias(w: GraphWalk, node: gs.Node) -> None:
    """Query [b, s, heads*width], its bias, [1, heads, s, s], weight [width, gates], [gates], [1, heads, 1, 1]."""
    query, query_bias, positions, weight, bias, scale = (w.input_axes(node, i) for i in range(6))
    count = int(node.attrs.get("num_heads", 0))
    reasons = (
        (count <= 0, "without a number of heads"),
        (_given(node.inputs, 6) or query is None or len(query) != 3, "reads packed sequences"),
    )
    assert query is not None and positions is not None
    for holds, reason in reasons:
        if holds:
            w.give_up(node, f"{node.op} {reason}")
            return
    where = f"inside {node.op} (node '{node.name}')"
    heads = w.fresh(count)
    w.pin([_head_split(w, node, query[2], heads, w.algebra.size(query[2]) // count)], f"width of a head {where}")
    if query_bias is not None:
        w.unify(query_bias[0], query[2])
    for axes in (positions, scale):
        if axes is not None:
            _unify_heads(w, node, axes, 1, heads)
    w.pin(weight, where)
    w.pin(bias, where)
    w.size_use(node, ("attribute", "num_heads", -1), heads)
    w.output(node, (query[0], heads, *positions[2:]))


def linear_attention(w: GraphWalk, node: gs.Node) -> None:
    """Query [b, s, heads*k], key [b, s, groups*k], value [b, s, groups*v], state [b, groups, k, v], decay, rate of change.

    Each column of the state [k, v] is moved by itself, whatever the rule of its update, so that values may go too.
    """
    query, key, value, state, decay, rate = (w.input_axes(node, i) for i in range(6))
    assert query is not None and key is not None and value is not None
    counts = int(node.attrs.get("q_num_heads", 0)), int(node.attrs.get("kv_num_heads", 0))
    if _refused(
        w,
        node,
        (min(counts) <= 0 or counts[0] % counts[1], "whose heads are no multiple of its key heads"),
        (node.attrs.get("state_window", 0), "with a window of states"),
    ):
        return
    where = f"inside {node.op} (node '{node.name}')"
    heads, groups = w.fresh(counts[0]), w.fresh(counts[1])
    w.size_use(node, ("attribute", "q_num_heads", -1), heads)
    w.size_use(node, ("attribute", "kv_num_heads", -1), groups)
    width = w.algebra.size(query[2]) // counts[0]
    widths = [_head_split(w, node, query[2], heads, width), _head_split(w, node, key[2], groups, width)]
    column = _head_split(w, node, value[2], groups, w.algebra.size(value[2]) // counts[1])
    w.unify(*widths)
    share_heads(w, node, heads, groups)
    w.unify(query[1], key[1])
    w.unify(query[1], value[1])
    if decay is not None:
        if w.algebra.size(decay[2]) == counts[1]:
            w.unify(decay[2], groups)
        else:
            w.unify(_head_split(w, node, decay[2], groups, w.algebra.size(decay[2]) // counts[1]), widths[1])
    if rate is not None and w.algebra.size(rate[2]) == counts[1]:
        w.unify(rate[2], groups)
    if state is not None:
        w.unify(state[1], groups)
        w.unify(state[2], widths[1])
        w.unify(state[3], column)
        w.need(node, 3, 2, width)
        w.need(node, 3, 3, w.algebra.size(column))
    w.pin(widths, f"width of a head {where}")
    w.pin(query[1:2], where)
    w.mixed.append(column)
    w.count(*query[:2], groups, widths[1], column)
    w.count(*query[:2], heads, widths[0], column)
    w.output(node, (*query[:2], w.algebra.merge([heads, column])))
    w.output(node, (query[0], groups, widths[1], column), 1)


# -- ai.onnx, opset 23 ----------------------------------------------------------------------------------------------


def standard_attention(w: GraphWalk, node: gs.Node) -> None:
    """Attention of opset 23: q, k, v are [b, heads, s, width] or, with head counts as attributes, [b, s, heads*width]."""
    query, key, value = (w.input_axes(node, i) for i in range(3))
    where = f"inside {node.op} (node '{node.name}')"
    assert query is not None and key is not None and value is not None
    flat = len(query) == 3
    counts = int(node.attrs.get("q_num_heads", 0)), int(node.attrs.get("kv_num_heads", 0))
    if _refused(
        w,
        node,
        (any(len(a) != len(query) for a in (key, value)), "with inputs of different ranks"),
        (flat and min(counts) <= 0, "without numbers of heads"),
    ):
        return
    if flat:
        heads, groups = w.fresh(counts[0]), w.fresh(counts[1])
        q_width = _head_split(w, node, query[2], heads, w.algebra.size(query[2]) // counts[0])
        k_width = _head_split(w, node, key[2], groups, w.algebra.size(key[2]) // counts[1])
        v_width = _head_split(w, node, value[2], groups, w.algebra.size(value[2]) // counts[1])
    else:
        heads, groups = query[1], key[1]
        q_width, k_width, v_width = query[3], key[3], value[3]
        w.unify(groups, value[1])
    for name, factor in (("q_num_heads", heads), ("kv_num_heads", groups)):
        if name in node.attrs:
            w.size_use(node, ("attribute", name, -1), factor)
    share_heads(w, node, heads, groups)
    attend(w, node, q_width, k_width, v_width)
    _attention_bias(w, node, 3, heads)
    w.pin(w.input_axes(node, 6), where)
    for position, width in ((4, k_width), (5, v_width)):
        keys = _cache(w, node, position, position - 3, 1, groups, w.algebra.size(width), key[-2])
        w.count(query[0], query[-2], keys, heads, width)
    if flat:
        w.output(node, (*query[:2], w.algebra.merge([heads, v_width])))
    else:
        w.output(node, (*query[:3], v_width))
    w.output(node, (query[0], heads, query[-2], keys), 3)
