"""Operators that hold a whole attention: what may go, by the oracle, and what is refused and why."""

from __future__ import annotations

import graphs
import numpy as np
import pytest

H, K, D, M = 6, 3, 8, 10  # query heads, key heads, width of a head, hidden
Q, KV = H * D, K * D
SIZES = {"b": 1, "s": 3, "p": 4, "t": 7}


Values = dict[str, tuple[int, ...] | np.ndarray | np.generic]


def weights(**more: tuple[int, ...] | np.ndarray | np.generic) -> Values:
    base = {"wq": (M, Q), "wk": (M, KV), "wv": (M, KV), "wo": (Q, M)}
    lengths = {"last": np.full(1, SIZES["t"] - 1, np.int32), "total": np.asarray(SIZES["t"], np.int32)}
    return {**base, **lengths, **more}


PROJECT = "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
CACHE = f"float[b, {K}, p, {D}] past_k, float[b, {K}, p, {D}] past_v"
PRESENT = f"float[b, {K}, t, {D}] present_k, float[b, {K}, t, {D}] present_v"
GROUPS = f"num_heads = {H}, kv_num_heads = {K}"
FULL = {"wk": (M, Q), "wv": (M, Q)}
FULL_CACHE, FULL_PRESENT = CACHE.replace(f"{K}, p", f"{H}, p"), PRESENT.replace(f"{K}, t", f"{H}, t")


def cached(body: str, cache: str = CACHE, present: str = PRESENT, inputs: str = "") -> str:
    ends = f"(float[b, s, {M}] x, {cache}{inputs}) => (float[b, s, {M}] y, {present})"
    return f"f {ends} {{ {PROJECT}  {body}  y = MatMul(c, wo) }}"


GQA = f"c, present_k, present_v = com.microsoft.GroupQueryAttention<{GROUPS}{{}}>(q, k, v, past_k, past_v, last, total{{}})"
CASES = {
    "group query": (cached(GQA.format("", "")), weights(), 17, K),
    "group query, bias and sinks for each head": (
        cached(GQA.format(", softcap = 5.0, scale = 0.3", ", , , , bias, sinks")),
        weights(bias=(1, H, SIZES["s"], SIZES["t"]), sinks=(H,)),
        17,
        K,
    ),
    "group query, one bias for all heads": (
        cached(GQA.format(", local_window_size = 2", ", , , , bias")),
        weights(bias=(1, 1, SIZES["s"], SIZES["t"])),
        17,
        K,
    ),
    "multi-head with a cache": (
        cached(
            f"c, present_k, present_v = com.microsoft.MultiHeadAttention<num_heads = {H}, unidirectional = 1>"
            "(q, k, v, d, , bias, past_k, past_v)",
            FULL_CACHE,
            FULL_PRESENT,
        ),
        weights(**FULL, d=(3 * Q,), bias=(1, H, SIZES["s"], SIZES["t"])),
        17,
        H,
    ),
    "projections inside, keys and values stacked": (
        f"f (float[b, s, {M}] x, float[2, b, {H}, p, {D}] past) => (float[b, s, {M}] y, float[2, b, {H}, t, {D}] present)"
        f" {{ c, present = com.microsoft.Attention<num_heads = {H}, unidirectional = 1>(x, w, d, , past)"
        "  y = MatMul(c, wo) }",
        weights(w=(M, 3 * Q), d=(3 * Q,)),
        17,
        H,
    ),
    "opset 23, flat": (
        cached(
            f"c, present_k, present_v = Attention<q_num_heads = {H}, kv_num_heads = {K}, is_causal = 1, softcap = 4.0>"
            "(q, k, v, bias, past_k, past_v)"
        ),
        weights(bias=(H, SIZES["s"], SIZES["t"])),
        23,
        K,
    ),
    "opset 23, heads on an axis": (
        cached(
            "rq = Reshape(q, to_q)  tq = Transpose<perm = [0, 2, 1, 3]>(rq)  rk = Reshape(k, to_k)"
            "  tk = Transpose<perm = [0, 2, 1, 3]>(rk)  rv = Reshape(v, to_k)  tv = Transpose<perm = [0, 2, 1, 3]>(rv)"
            "  a, present_k, present_v = Attention<scale = 0.2>(tq, tk, tv, , past_k, past_v)"
            "  ta = Transpose<perm = [0, 2, 1, 3]>(a)  c = Reshape(ta, back)"
        ),
        weights(to_q=np.asarray([0, 0, H, D]), to_k=np.asarray([0, 0, K, D]), back=np.asarray([0, 0, Q])),
        23,
        K,
    ),
    "opset 24, real lengths": (
        f"f (float[b, s, {M}] x) => (float[b, s, {M}] y) {{ {PROJECT}"
        f"  c = Attention<q_num_heads = {H}, kv_num_heads = {K}>(q, k, v, , , , lengths)  y = MatMul(c, wo) }}",
        weights(lengths=np.asarray([2])),
        24,
        K,
    ),
    "cross-attention over keys with a head axis": (
        f"f (float[b, s, {M}] x, float[b, t, {M}] z) => (float[b, s, {M}] y) {{ q = MatMul(x, wq)  k = MatMul(z, wk)"
        "  v = MatMul(z, wv)  rk = Reshape(k, to_k)  tk = Transpose<perm = [0, 2, 1, 3]>(rk)  rv = Reshape(v, to_k)"
        f"  tv = Transpose<perm = [0, 2, 1, 3]>(rv)  c = com.microsoft.MultiHeadAttention<num_heads = {H}>(q, tk, tv)"
        "  y = MatMul(c, wo) }",
        weights(**FULL, to_k=np.asarray([0, 0, H, D])),
        17,
        H,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_heads_go_with_all_that_is_theirs(name: str) -> None:
    text, values, opset, heads = CASES[name]
    proto = graphs.parse(text, values, opset)
    assert graphs.sizes(proto) == [("heads", heads)]
    pruned = graphs.prove(proto, SIZES)
    (node,) = (n for n in pruned.graph.node if "Attention" in n.op_type)
    numbers = {a.name: a.i for a in node.attribute if "num_heads" in a.name}
    left = {w.name: list(w.dims) for w in pruned.graph.initializer}["wo"][0] // D
    assert numbers == {n: left // (H // K) if n.startswith("kv") else left for n in numbers}


V = 5  # width of values
LINEAR = "a, state = com.microsoft.LinearAttention<q_num_heads = {}, kv_num_heads = {}{}>(q, k, v{})"
LINEAR_CASES = {
    "linear": ("", "", {}),
    "a decay by head": (', update_rule = "gated"', ", , g", {"wg": (M, K)}),
    "a decay by channel": (', update_rule = "gated", scale = 0.4', ", , g", {"wg": (M, KV)}),
    "delta rule": (', update_rule = "delta"', ", , , r", {"wr": (M, K)}),
    "one rate for all heads": (', update_rule = "delta"', ", , , r", {"wr": (M, 1)}),
    "all of it": ("", ", , g, r", {"wg": (M, K), "wr": (M, K)}),
}


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("name", LINEAR_CASES)
def test_heads_of_a_linear_attention(name: str, shared: int) -> None:
    """Heads with their keys, rates and states; the values of each, too, since every column of a state is moved alone."""
    attributes, inputs, more = LINEAR_CASES[name]
    if name == "linear":
        attributes = ', update_rule = "linear"'
    gates = "  ".join(f"{k[1]}0 = MatMul(x, {k})  {k[1]} = {'Softsign' if k == 'wg' else 'Sigmoid'}({k[1]}0)" for k in more)
    text = f"""f (float[b, s, {M}] x) => (float[b, s, {M}] y) {{ {PROJECT}  {gates}
        {LINEAR.format(K * shared, K, attributes, inputs)}  y = MatMul(a, wo) }}"""
    widths = {"wq": (M, K * shared * D), "wv": (M, K * V), "wo": (K * shared * V, M)}
    scaled = {
        k: np.random.default_rng(3).standard_normal(s).astype(np.float32) * 0.3 for k, s in ({"wk": (M, KV)} | more).items()
    }
    proto = graphs.parse(text, weights(**widths, **scaled))
    assert graphs.sizes(proto) == [("heads", K)]
    assert [(g.kind, g.size) for g in graphs.analyse(proto)[2].values] == [("values", V)]
    graphs.prove(proto, SIZES)
    graphs.prove(proto, {**SIZES, "s": 5}, seeds=2, values=True)


def test_a_gated_position_bias_has_heads() -> None:
    """The bias of WavLM, which an attention adds: as many heads as its query. ONNX Runtime has no kernel on the CPU."""
    text = f"""f (float[b, s, {M}] x) => (float[b, s, {M}] y) {{ q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
        g = com.microsoft.GatedRelativePositionBias<num_heads = {H}>(q, d, positions, wg, bg, eco)
        c = com.microsoft.MultiHeadAttention<num_heads = {H}>(q, k, v, , , g)  y = MatMul(c, wo) }}"""
    more = {"d": (Q,), "positions": (1, H, 3, 3), "wg": (D, 8), "bg": (8,), "eco": (1, H, 1, 1)}
    proto = graphs.parse(text, weights(**FULL, **more))
    assert graphs.sizes(proto) == [("heads", H)]
    (group,) = graphs.analyse(proto)[2].groups
    pruned = graphs.cut(proto, {group.name + group.kind: [1, 4]})
    dims = {t.name: list(t.dims) for t in pruned.graph.initializer}
    assert (dims["d"], dims["positions"], dims["eco"], dims["wg"]) == ([2 * D], [1, 2, 3, 3], [1, 2, 1, 1], [D, 8])
    assert [a.i for n in pruned.graph.node for a in n.attribute if a.name == "num_heads"] == [2, 2]


ROTARY: dict[str, tuple[int, str, Values]] = {
    "flat, the number of heads from the tables": (
        17,
        "r = com.microsoft.RotaryEmbedding(q, positions, cos, sin)",
        {"cos": (9, D // 2), "sin": (9, D // 2)},
    ),
    "flat, a part of the width": (
        17,
        f"r = com.microsoft.RotaryEmbedding<num_heads = {H}, rotary_embedding_dim = 4, interleaved = 1>"
        "(q, positions, cos, sin)",
        {"cos": (9, 2), "sin": (9, 2)},
    ),
    "opset 23, flat": (
        23,
        f"r = RotaryEmbedding<num_heads = {H}>(q, cos, sin, positions)",
        {"cos": (9, D // 2), "sin": (9, D // 2)},
    ),
    "heads on an axis": (
        23,
        "h = Reshape(q, to_q)  t = Transpose<perm = [0, 2, 1, 3]>(h)  u = RotaryEmbedding(t, cos, sin, positions)"
        "  v = Transpose<perm = [0, 2, 1, 3]>(u)  r = Reshape(v, back)",
        {"cos": (9, D // 2), "sin": (9, D // 2), "to_q": np.asarray([0, 0, H, D]), "back": np.asarray([0, 0, -1])},
    ),
}


@pytest.mark.parametrize("name", ROTARY)
def test_heads_that_are_turned_may_go(name: str) -> None:
    opset, body, more = ROTARY[name]
    text = f"""f (float[b, s, {M}] x, int64[b, s] positions) => (float[b, s, {M}] y) {{
        q = MatMul(x, wq)  {body}  y = MatMul(r, wo) }}"""
    proto = graphs.parse(text, {"wq": (M, Q), "wo": (Q, M), **more}, opset)
    assert graphs.sizes(proto) == [("heads", H)]
    graphs.prove(proto, SIZES)


def no_heads(text: str, values: Values, opset: int = 17) -> str:
    proto = graphs.parse(text, values, opset)
    assert graphs.sizes(proto) == []
    return graphs.reasons(proto)


def test_scores_that_are_returned_hold_the_heads() -> None:
    text = f"""f (float[b, s, {M}] x) => (float[b, s, {M}] y, float[b, {H}, s, s] scores) {{ {PROJECT}
        c, , , scores = Attention<q_num_heads = {H}, kv_num_heads = {K}>(q, k, v)  y = MatMul(c, wo) }}"""
    assert "graph output 'scores'" in no_heads(text, weights(), 23)


def test_a_cache_that_is_not_handed_on_holds_the_heads() -> None:
    text = cached(GQA.format("", "")).replace(PRESENT, "float z").replace("y = MatMul", "z = Identity(one)  y = MatMul")
    assert "graph input 'past_k'" in no_heads(text, weights(one=np.ones((), np.float32)))


def test_keys_that_are_returned_without_having_been_taken_hold_the_heads() -> None:
    text = f"""f (float[b, s, {M}] x) => (float[b, s, {M}] y, float[b, {H}, s, {D}] present_k,
        float[b, {H}, s, {D}] present_v) {{ {PROJECT}
        c, present_k, present_v = com.microsoft.MultiHeadAttention<num_heads = {H}>(q, k, v)  y = MatMul(c, wo) }}"""
    assert "graph output 'present_k'" in no_heads(text, weights(**FULL))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (GQA.format(', k_quant_type = "PER_TENSOR"', ""), "with a quantised cache"),
        (GQA.format("", "").replace("(q, k, v,", "(q, k, ,"), "with a key and no value"),
        (GQA.format("", "").replace(f"num_heads = {H},", "num_heads = 4,"), "no multiple of its key heads"),
        (
            f"c, present_k, present_v = com.microsoft.MultiHeadAttention<num_heads = {H}>"
            "(q, k, v, , , , past_k, past_v, , beams)",
            "cache indirection",
        ),
        ("c, present_k, present_v = Attention(q, k, v, , past_k, past_v)", "without numbers of heads"),
        (
            f"c, present_k, present_v = com.microsoft.DecoderMaskedMultiHeadAttention<num_heads = {H}>"
            "(q, k, v, , , past_k, past_v)",
            "buffers of beam search",
        ),
        (
            f"c, present_k, present_v = com.microsoft.SparseAttention<{GROUPS}, sparse_block_size = 16>"
            "(q, k, v, past_k, past_v, rows, columns, total, last)",
            "sparse layouts to the heads in turn",
        ),
    ],
)
def test_what_is_refused_says_why(body: str, reason: str) -> None:
    more = {
        "beams": np.zeros((1, 1, 7), np.int32),
        "rows": np.zeros((1, 2), np.int32),
        "columns": np.zeros((1, 1), np.int32),
    }
    opset = 23 if "Attention(q" in body else 17
    assert reason in no_heads(cached(body), weights(**more), opset)


def test_sizes_that_operators_need_of_caches() -> None:
    text = cached(GQA.format(", local_window_size = 5, sliding_window_cache = 1", "")).replace(f"p, {D}]", "p, d]")
    _, state, _ = graphs.analyse(graphs.parse(text, weights()))
    shapes = {i.name: i.shape for i in state.input_specs()}
    assert shapes == {"x": ("b", "s", M), "past_k": ("b", K, 5, D), "past_v": ("b", K, 5, D)}


def test_a_mixture_of_experts_is_named_and_does_not_hide_what_is_behind_it() -> None:
    text = f"""f (float[b, s, {M}] x) => (float[b, s, {M}] y) {{ r = MatMul(x, wr)  p = Reshape(r, rows)
        e = com.microsoft.MoE<k = 1, activation_type = "relu">(x, p, w1, , w2)
        a = MatMul(e, wq)  g = Relu(a)  y = MatMul(g, wo) }}"""
    shapes: Values = {"wr": (M, 4), "rows": np.asarray([-1, 4]), "w1": (4, 12, M), "w2": (4, M, 12)}
    proto = graphs.parse(text, {**shapes, "wq": (M, Q), "wo": (Q, M)})
    assert graphs.sizes(proto) == [("ffn", Q)]
    assert "the widths of experts inside operator MoE stay" in graphs.reasons(proto)
    graphs.prove(proto, SIZES)
