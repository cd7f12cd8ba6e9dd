"""The rules of operators that hold a whole attention; :mod:`liar_opt.frontend.onnx_rules` imports them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.onnx_model import present
from liar_opt.frontend.onnx_rule_table import MICROSOFT, rule

if TYPE_CHECKING:
    from liar_opt.frontend.onnx_rules import GraphWalk
    from liar_opt.passes.axes import Factor


def _head_split(w: GraphWalk, node: gs.Node, factor: Factor, heads: Factor, width: int) -> Factor:
    """Splits ``factor`` into heads x width, unifies the heads and returns the width's factor."""
    parts = w.algebra.split(factor, [w.algebra.size(heads), width])
    w.unify(parts[0], heads)
    return parts[1]


def _attention_bias(w: GraphWalk, node: gs.Node, position: int, heads: Factor) -> None:
    """Unifies the head axis of an additive attention bias [b or 1, heads or 1, s, t]."""
    axes = w.input_axes(node, position)
    if axes is None:
        return
    if len(axes) == 4 and w.algebra.size(axes[1]) == w.algebra.size(heads):
        w.unify(axes[1], heads)
        w.pin([axes[0], *axes[2:]], f"added to the scores of {node.op} (node '{node.name}')")
    else:
        w.pin(axes, f"added to the scores of {node.op} (node '{node.name}')")


@rule("Attention", domain=MICROSOFT)
def _contrib_attention(w: GraphWalk, node: gs.Node) -> None:
    x, weight, bias = (w.input_axes(node, i) for i in range(3))
    assert x is not None and weight is not None
    count = int(node.attrs.get("num_heads", 0))
    past = len(node.inputs) > 4 and present(node.inputs[4])
    extra_outputs = any(present(t) and t.outputs for t in node.outputs[1:])
    if count <= 0 or w.constant(node, 1) is None or past or extra_outputs or node.attrs.get("do_rotary", 0):
        w.give_up(node, "Attention with a cache, rotary embedding or a variable weight")
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
    # The scale is 1 / sqrt(head width) unless it is an attribute, and kernels take one width for q, k and v.
    w.pin(widths, f"width of a head {where}")
    if bias is not None:
        w.unify(bias[0], weight[1])
    for i in range(3, len(node.inputs)):
        if i == 5:
            _attention_bias(w, node, i, heads)
        else:
            w.pin(w.input_axes(node, i), where)
    w.size_use(node, ("attribute", "num_heads", -1), heads)
    if "qkv_hidden_sizes" in node.attrs:
        for i, part in enumerate(parts):
            w.size_use(node, ("attribute", "qkv_hidden_sizes", i), part)
    w.count(*x, weight[1])
    w.count(x[0], x[1], x[1], parts[0])
    w.count(x[0], x[1], x[1], parts[2])
    w.output(node, (*x[:-1], parts[2]))


@rule("MultiHeadAttention", domain=MICROSOFT)
def _multi_head_attention(w: GraphWalk, node: gs.Node) -> None:
    query, key, value, bias = (w.input_axes(node, i) for i in range(4))
    assert query is not None
    count = int(node.attrs.get("num_heads", 0))
    where = f"inside {node.op} (node '{node.name}')"
    cached = any(len(node.inputs) > i and present(node.inputs[i]) for i in (6, 7))
    extra_outputs = any(present(t) and t.outputs for t in node.outputs[1:])
    if count <= 0 or cached or extra_outputs:
        w.give_up(node, "MultiHeadAttention with a cache")
        return
    heads = w.fresh(count)
    w.size_use(node, ("attribute", "num_heads", -1), heads)
    for i in range(4, len(node.inputs)):
        if i == 5:
            _attention_bias(w, node, i, heads)
        elif i != 3:
            w.pin(w.input_axes(node, i), where)
    if len(query) == 5:
        # Packed [b, s, heads, 3, width].
        w.unify(query[2], heads)
        w.pin(query[3:], f"packed {where}")
        if bias is not None:
            parts = w.algebra.split(bias[0], [3, count, w.algebra.size(query[4])])
            w.pin([parts[0], parts[2]], f"packed {where}")
            w.unify(parts[1], heads)
        w.output(node, (*query[:2], w.algebra.merge([heads, query[4]])))
        return
    widths: list[Factor] = [_head_split(w, node, query[2], heads, w.algebra.size(query[2]) // count)]
    hidden = [query[2]]
    if key is not None and len(key) == 5:
        w.unify(key[2], heads)
        w.pin(key[3:], f"packed {where}")
        widths.append(key[4])
        hidden += [w.algebra.merge([heads, key[4]])] * 2
    else:
        for axes in (key, value):
            if axes is None:
                w.give_up(node, "MultiHeadAttention without key or value")
                return
            if len(axes) == 4:
                w.unify(axes[1], heads)
                w.pin(axes[2:], where)
                widths.append(axes[3])
                hidden.append(w.algebra.merge([heads, axes[3]]))
            else:
                widths.append(_head_split(w, node, axes[2], heads, w.algebra.size(axes[2]) // count))
                hidden.append(axes[2])
    w.unify(widths[0], widths[1])
    w.pin(widths, f"width of a head {where}")
    if bias is not None:
        w.unify(bias[0], w.algebra.join(hidden))
    assert key is not None
    keys = key[2] if len(key) == 4 else key[1]
    w.count(*query, keys)
    w.count(*query[:2], keys, hidden[-1])
    w.output(node, (*query[:2], hidden[-1]))


@rule("Attention")
def _standard_attention(w: GraphWalk, node: gs.Node) -> None:
    """Attention of opset 23: q, k, v are [b, heads, s, width] or, with head counts as attributes, [b, s, heads*width]."""
    query, key, value = (w.input_axes(node, i) for i in range(3))
    where = f"inside {node.op} (node '{node.name}')"
    cached = any(len(node.inputs) > i and present(node.inputs[i]) for i in (4, 5, 6))
    extra_outputs = any(present(t) and t.outputs for t in node.outputs[1:])
    if query is None or key is None or value is None or cached or extra_outputs:
        w.give_up(node, "Attention with a cache")
        return
    if len(query) == 4:
        heads, groups = query[1], key[1]
        q_width, k_width, v_width = query[3], key[3], value[3]
        w.unify(groups, value[1])
    else:
        counts = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
        heads, groups = w.fresh(counts[0]), w.fresh(counts[1])
        w.size_use(node, ("attribute", "q_num_heads", -1), heads)
        w.size_use(node, ("attribute", "kv_num_heads", -1), groups)
        q_width = _head_split(w, node, query[2], heads, w.algebra.size(query[2]) // counts[0])
        k_width = _head_split(w, node, key[2], groups, w.algebra.size(key[2]) // counts[1])
        v_width = _head_split(w, node, value[2], groups, w.algebra.size(value[2]) // counts[1])
    repeat = w.algebra.size(heads) // max(1, w.algebra.size(groups))
    if repeat > 1:
        parts = w.algebra.split(heads, [w.algebra.size(groups), repeat])
        w.unify(parts[0], groups)
        w.pin(parts[1:], f"heads of one group {where}")
    else:
        w.unify(heads, groups)
    w.unify(q_width, k_width)
    w.pin([q_width, k_width], f"contracted between two activations {where}")
    _attention_bias(w, node, 3, heads)
    w.count(query[0], query[-2], key[-2], heads, q_width)
    w.count(query[0], query[-2], key[-2], heads, v_width)
    if len(query) == 4:
        w.output(node, (*query[:3], v_width))
    else:
        w.output(node, (*query[:2], w.algebra.merge([heads, v_width])))
