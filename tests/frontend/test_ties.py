"""Layers that add one table by heads, and heads that go in each layer by themselves."""

from __future__ import annotations

from pathlib import Path

import graphs
import numpy as np
import onnx
import oracle
import pytest

import liar_opt
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.walk import GraphWalk, walk
from liar_opt.passes.find_groups import Found, find_groups

LAYERS, HEADS, DEPTH, BUCKETS, FIXED = 4, 5, 3, 7, 6
WIDTH, LONG = HEADS * DEPTH, 120
APART = """ends = Shape<start = 1, end = 2>(x)  n = Squeeze(ends)  r = Range(none, n, one)  down = Unsqueeze(r, last)
    across = Unsqueeze(r, first)  apart = Sub(down, across)  away = Abs(apart)"""
LOOKED = "turned{0} = Transpose<perm = [2, 0, 1]>(found{0})  bias{0} = Unsqueeze(turned{0}, first)"
BIASES = {
    "looked up": f"{APART}  near = Min(away, most)  found = Gather(table, near)  {LOOKED.format('')}",
    "slopes": f"{APART}  far = Cast<to = 1>(away)  bias = Mul(far, slopes)",
    "expanded over the batch": """b = Shape<start = 0, end = 1>(x)  sizes = Concat<axis = 0>(b, shape)
    wide = Expand(drawn, sizes)  bias = Reshape(wide, flat)""",
    "large": "",
}
NUMBERS: dict[str, np.ndarray | np.generic] = {
    **{"none": np.int64(0), "one": np.int64(1), "most": np.int64(BUCKETS - 1), "half": np.float32(0.5)},
    **{"first": np.array([0]), "last": np.array([-1]), "end": np.array([LONG]), "last_axis": np.array([-1])},
    **{"parts": np.array([0, 0, HEADS, DEPTH]), "joined": np.array([0, 0, WIDTH])},
    **{"shape": np.array([HEADS, 1, FIXED]), "flat": np.array([-1, 1, FIXED])},
    **{"rows": np.array([-1, FIXED, DEPTH]), "columns": np.array([-1, DEPTH, FIXED])},
    **{"heads": np.array([-1, HEADS, FIXED, DEPTH])},
}
TABLES = {"table": (BUCKETS, HEADS), "slopes": (HEADS, 1, 1), "drawn": (1, HEADS, 1, FIXED)}
ADDS = "a{0} = Add(s{0}, bias)"


def layer(number: int, adds: str, flat: bool) -> str:
    """Returns one layer: attention over x0, x1, ... whose scores are [b, h, s, s], or [b x h, s, s] where ``flat``."""
    text = ""
    for t, turn, laid in (("q", "0, 2, 1, 3", "rows"), ("k", "0, 2, 3, 1", "columns"), ("v", "0, 2, 1, 3", "rows")):
        text += f"{t}w# = MatMul(x#, w{t}#)  {t}p# = Reshape({t}w#, parts)  {t}t# = Transpose<perm = [{turn}]>({t}p#)  "
        text += f"{t}# = Reshape({t}t#, {laid})  " if flat else f"{t}# = Identity({t}t#)  "
    text += f"s# = MatMul(q#, k#)  {adds}  p# = Softmax(a#)  m# = MatMul(p#, v#)  "
    text += "c# = Reshape(m#, heads)  " if flat else "c# = Identity(m#)  "
    text += "ct# = Transpose<perm = [0, 2, 1, 3]>(c#)  f# = Reshape(ct#, joined)  o# = MatMul(f#, wo#)  z# = Add(x#, o#)"
    return text.replace("#", str(number)).replace("{0}", str(number)).replace(f"z{number}", f"x{number + 1}")


def stack(bias: str, adds: str = ADDS, **tables: tuple[int, ...]) -> onnx.ModelProto:
    """Returns four layers behind what makes their bias."""
    flat = bias == "expanded over the batch"
    tokens = str(FIXED) if flat else str(LONG) if bias == "large" else "s"
    body = "\n    ".join(layer(i, adds, flat) for i in range(LAYERS))
    text = f"""g (float[b, {tokens}, {WIDTH}] x) => (float[b, {tokens}, {WIDTH}] y) {{
    {BIASES.get(bias, bias)} x0 = Mul(x, half)
    {body}
    y = Mul(x{LAYERS}, half) }}"""
    weights = {f"w{t}{i}": (WIDTH, WIDTH) for t in "qkvo" for i in range(LAYERS)}
    if bias == "large":
        tables["bias"] = (1, HEADS, LONG, LONG)
    read = set(text.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return graphs.parse(text, {n: v for n, v in {**NUMBERS, **TABLES, **tables, **weights}.items() if n in read})


def heads(proto: onnx.ModelProto, tied: bool = False) -> tuple[GraphWalk, Found]:
    """Returns the analysis, and its groups."""
    given = OnnxModel.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    given.normalise()
    given.tied = tied
    state = walk(given)
    return state, find_groups(state)


def added(proto: onnx.ModelProto) -> list[str]:
    """Returns the operators of the nodes that take a layer's heads of a table."""
    return [n.op_type for n in proto.graph.node if n.output[0].startswith("liar_opt_")]


@pytest.mark.parametrize("bias", BIASES)
def test_each_layer_takes_heads_of_its_own(bias: str) -> None:
    proto = stack(bias)
    state, found = heads(proto)
    assert [g.size for g in found.groups if g.kind == "heads"] == [HEADS] * LAYERS
    assert len(state.picks) == LAYERS
    for tokens in (1, 4, 11) if "s" in str(proto.graph.input[0]) else (0,):
        pruned = graphs.prove(proto, {"b": 3 if tokens == 4 else 2, "s": tokens}, seeds=3)
    assert added(pruned).count("Gather") == LAYERS


def test_layers_are_pruned_by_themselves_when_nothing_is_said(tmp_path: Path) -> None:
    onnx.save(stack("looked up"), tmp_path / "m.onnx")
    data = {"x": np.random.default_rng(0).standard_normal((24, 9, WIDTH)).astype(np.float32)}
    result = liar_opt.prune(tmp_path / "m.onnx", data, latency=False)
    sets = [tuple(c.details["kept"]) for c in result.changes if "kept" in c.details]
    assert len(set(sets)) > 1
    assert result.report["verification"]["exact_difference"] < 1e-4
    again = liar_opt.prune(result.model, data, latency=False, heads=0.3)
    assert again.report["after"]["parameters"] < result.report["after"]["parameters"]


def test_a_layer_that_keeps_its_heads_reads_the_table_as_it_is() -> None:
    proto = stack("looked up")
    model, state, found = graphs.analyse(proto)
    kept = {g.name + g.kind: list(range(HEADS)) for g in found.groups}
    first = found.groups[0]
    kept[first.name + first.kind] = [0, 2, 3]
    only = Found((first,), ())
    pruned = oracle.prune(model, state, only, kept)
    assert added(pruned) == ["Gather"]
    assert len(pruned.graph.node) == len(model.graph.nodes)
    unchanged = graphs.analyse(proto)[0]
    assert len(unchanged.graph.nodes) == len(pruned.graph.node) - 1


def test_heads_can_be_left_tied() -> None:
    state, found = heads(stack("looked up"), tied=True)
    assert [g.size for g in found.groups] == [HEADS] and not state.picks
    assert len(found.groups[0].consumers) == LAYERS


def test_a_slice_of_the_table_is_taken_in_each_layer() -> None:
    """What a layer makes of the table alone is still a table."""
    adds = "t{0} = Slice(bias, first, end, last_axis)  a{0} = Add(s{0}, t{0})"
    state, found = heads(stack("slopes", adds))
    assert len(found.groups) == LAYERS
    assert {p.node.op for p in state.picks} == {"Add"}
    graphs.prove(stack("slopes", adds), {"b": 2, "s": 5})


def test_a_table_of_one_layer_is_cut_itself() -> None:
    own = " ".join(f"found{i} = Gather(table{i}, near)  {LOOKED.format(i)}" for i in range(LAYERS))
    tables = {f"table{i}": (BUCKETS, HEADS) for i in range(LAYERS)}
    proto = stack(f"{APART}  near = Min(away, most)  {own}", "a{0} = Add(s{0}, bias{0})", **tables)
    state, found = heads(proto)
    assert len(found.groups) == LAYERS and not state.picks
    pruned = graphs.prove(proto, {"b": 2, "s": 5})
    assert not added(pruned)


def test_layers_that_something_else_ties_read_the_table_as_it_is() -> None:
    """Queries that all layers share tie their heads: the table is cut, once, with them."""
    proto = stack("looked up", "u{0} = MatMul(q0, k{0})  w{0} = Add(s{0}, u{0})  a{0} = Add(w{0}, bias)")
    state, found = heads(proto)
    assert [g.size for g in found.groups] == [HEADS] and not state.picks
    assert not added(graphs.prove(proto, {"b": 2, "s": 5}))
