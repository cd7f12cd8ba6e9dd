"""Words of a graph: found by what looks them up, cut exactly.

The oracle is the original file, loaded by onnx alone, with the rows of words that go set to that of the unknown one, and
the same logits -inf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
import zoo_decoders
from oracle import run

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.tables import vocabulary
from liar_opt.frontend.vocabulary import cut_words, find_words, hide_logits, require_no_other_lookup
from liar_opt.runtime.compare import relative_difference
from liar_opt.runtime.errors import ModelError

V = zoo.VOCABULARY
KEPT = np.sort(np.random.default_rng(3).permutation(V)[:41])
KEPT = np.union1d(KEPT, [0, zoo.PADDING, 2])
UNKNOWN = int(KEPT[5])
GONE = np.setdiff1d(np.arange(V), KEPT)


def cut(path: Path, **options: Any) -> OnnxModel:
    model = OnnxModel.load(path)
    model.normalise()
    cut_words(model, find_words(model), KEPT, UNKNOWN, **options)
    return model


def reference(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the original gives where ids of words that go are those of the unknown one."""
    replaced = {}
    for name, value in feeds.items():
        known = np.where(np.isin(value, KEPT), value, UNKNOWN) if name.endswith("input_ids") else value
        replaced[name] = known.astype(value.dtype)
    proto = onnx.load(path)
    outputs = dict(zip((o.name for o in proto.graph.output), run(proto, replaced), strict=True))
    for value in outputs.values():
        if value.shape[-1] == V:
            value[..., GONE] = -np.inf
    return outputs


def check(path: Path, feeds: dict[str, np.ndarray], allowed: float = 1e-5) -> OnnxModel:
    model = cut(path)
    proto = model.to_proto()
    onnx.checker.check_model(proto)
    given = onnx.load(path, load_external_data=False).graph
    assert [o.name for o in proto.graph.output] == [o.name for o in given.output]
    ours = dict(zip((o.name for o in proto.graph.output), run(proto, feeds), strict=True))
    for name, value in reference(path, feeds).items():
        assert relative_difference(ours[name], value) <= allowed, name
    assert not any(t.dims and V in t.dims and t.data_type != onnx.TensorProto.INT32 for t in proto.graph.initializer)
    again = OnnxModel.from_proto(proto)
    again.normalise()
    assert vocabulary(again) == V  # ids are those of the original
    with pytest.raises(ModelError, match="computed inside"):
        find_words(again)
    return model


@pytest.mark.parametrize("exporter", zoo.EXPORTERS)
@pytest.mark.parametrize("half", ["", "torch", "onnxruntime"])
def test_a_tied_head_with_a_bias(exporter: str, half: str) -> None:
    more = {"dtype": "float16", "half_by": half} if half else {}
    if (exporter, half) == ("torchscript", "torch"):
        more = {"dtype": "float16", "half_by": "onnxruntime"}  # the exporter mixes types
    built = zoo.ready(zoo.words_case(exporter, **more))
    check(built.path, built.feeds, 2e-3 if half else 1e-5)
    model = OnnxModel.load(built.path)
    model.normalise()
    words = find_words(model)
    assert words.size == V and words.inputs == ("input_ids",) and len(words.lookups) == len(words.logits) == 1


@pytest.mark.parametrize(
    "case",
    [
        *(zoo_decoders.Case(name, "torchscript") for name in ("gpt2", "llama", "llama-tied-mha", "gemma2", "bart")),
        *(zoo_decoders.Case(name, "torchscript", True) for name in ("gpt2", "llama", "opt")),
        *(zoo_decoders.Case(name, "dynamo") for name in ("gpt2", "llama")),
        zoo_decoders.Case("llama", "dynamo", True),
    ],
    ids=lambda case: case.name,
)
def test_decoders(case: zoo_decoders.Case) -> None:
    built = zoo_decoders.ready(case)
    check(built.path, built.other_feeds)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "mpnet", "albert", "deberta-v3", "electra"])
def test_encoders(name: str) -> None:
    case = next(c for c in zoo.every_case() if (c.architecture, c.exporter, c.axes) == (name, "torchscript", "dynamic"))
    built = zoo.ready(case)
    model = check(built.path, built.feeds)
    assert model.weight_bytes() < OnnxModel.load(built.path).weight_bytes()


def test_an_optimised_graph() -> None:
    case = next(c for c in zoo.every_case() if c.name == "bert-torchscript-eager-dynamic-transformers")
    built = zoo.ready(case)
    assert "EmbedLayerNormalization" in {n.op for n in OnnxModel.load(built.path).graph.nodes}
    check(built.path, built.feeds)


HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
g (int64[b, s] input_ids, int64[b, s] position_ids) => ({outputs})
<float[11, 4] table, float[29, 4] places, float[4, 11] head, float[11] bias, float scale = {{0.5}}>
{{
  flat = Cast<to = 6>(input_ids)
  words = Gather(table, flat)
  there = Gather(places, position_ids)
  x = Add(words, there)
  {body}
}}
"""
FILLED = {"table": (11, 4), "places": (29, 4), "head": (4, 11), "bias": (11,)}
FEW = np.asarray([0, 2, 3, 7])


def small_graph(body: str, outputs: str) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(HEAD.format(body=body, outputs=outputs))
    rng = np.random.default_rng(0)
    for tensor in [t for t in proto.graph.initializer if t.name in FILLED]:
        proto.graph.initializer.remove(tensor)
    for name, shape in FILLED.items():
        value = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return proto


def normalised(proto: onnx.ModelProto) -> OnnxModel:
    model = OnnxModel.from_proto(proto)
    model.normalise()
    return model


IDS = {"input_ids": np.asarray([[2, 7, 3], [0, 0, 2]]), "position_ids": np.asarray([[0, 1, 2], [0, 1, 28]])}
BODIES = {
    "softmax": ("z = MatMul(x, head) y = Softmax(z)", "float[b, s, 11] y", 1),
    "two readers": (
        "z = MatMul(x, head) y = LogSoftmax(z) w = ArgMax<axis = -1>(z)",
        "float[b, s, 11] y, int64[b, s, 1] w",
        1,
    ),
    "a bias and a bounded range": (
        "z = MatMul(x, head) a = Add(z, bias) c = Mul(a, scale) t = Tanh(c) y = Div(t, scale)",
        "float[b, s, 11] y",
        2,
    ),
    "the largest few": ("z = MatMul(x, head) k = Constant<value_ints = [2]>() y, w = TopK(z, k)", "float[b, s, 2] y", 1),
    "tied": ("r = Transpose<perm = [1, 0]>(table) y = MatMul(x, r)", "float[b, s, 11] y", 0),
    "no logits": ("y = Relu(x)", "float[b, s, 4] y", 0),
}


@pytest.mark.parametrize("case", BODIES)
def test_what_reads_logits(case: str) -> None:
    """What is computed of logits is computed as if those of words that went were -inf."""
    body, outputs, constants = BODIES[case]
    proto = small_graph(body, outputs)
    model, reference = normalised(proto), normalised(proto)
    words = find_words(model)
    assert (words.size, words.inputs, len({id(p.constant) for p in words.places})) == (11, ("input_ids",), 1 + constants)
    cut_words(model, words, FEW, 2)
    hide_logits(reference, find_words(reference), FEW)
    ours, theirs = run(model.to_proto(), IDS), run(reference.to_proto(), IDS)
    assert all(relative_difference(a, b) <= 1e-6 for a, b in zip(ours, theirs, strict=True))
    if case == "a bias and a bounded range":
        assert np.isneginf(ours[0][..., [1, 4, 10]]).all()
    gone = run(model.to_proto(), {**IDS, "input_ids": IDS["input_ids"] * 0 + 9})
    unknown = run(model.to_proto(), {**IDS, "input_ids": IDS["input_ids"] * 0 + 2})
    assert all(np.array_equal(a, b) for a, b in zip(gone, unknown, strict=True))


def test_a_constant_that_something_else_reads_stays() -> None:
    """The bias of the head is added to something else, too: there it keeps its numbers."""
    proto = small_graph(
        "z = MatMul(x, head) y = Add(z, bias) q = Constant<value_floats = [1.0]>() w = Mul(bias, q) v = Sub(w, y)",
        "float[b, s, 11] y, float[b, s, 11] v",
    )
    model, reference = normalised(proto), normalised(proto)
    cut_words(model, find_words(model), FEW, 2)
    hide_logits(reference, find_words(reference), FEW)
    assert all(
        relative_difference(a, b) <= 1e-6
        for a, b in zip(run(model.to_proto(), IDS), run(reference.to_proto(), IDS), strict=True)
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("z = MatMul(x, head) p = Softmax(z) y = MatMul(p, table)", "neither by ids nor for logits"),
        ("c = Cos(table) q = ReduceSum(c) y = Add(x, q)", "neither by ids nor for logits"),
    ],
)
def test_a_table_that_is_read_otherwise(body: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        find_words(normalised(small_graph(body, "float[b, s, 4] y")))


def test_a_larger_table_of_something_else_is_not_that_of_words() -> None:
    """Entities, or places on a page, may be more than there are words."""
    proto = small_graph("y = MatMul(x, head)", "float[b, s, 11] y")
    for node in (*proto.graph.node, proto.graph):
        for value in node.input:
            if isinstance(value, onnx.ValueInfoProto) and value.name == "position_ids":
                value.name = "entity_ids"
        if isinstance(node, onnx.NodeProto):
            node.input[:] = ["entity_ids" if name == "position_ids" else name for name in node.input]
    words = find_words(normalised(proto))
    assert (words.size, words.inputs) == (11, ("input_ids",))
    assert {p.constant.name for p in words.places} == {"table", "head"}


def test_another_table_of_computed_ids() -> None:
    """With new ids it would give other rows; with the table of ids in the graph it does not."""
    body = "one = Clip(input_ids) there_too = Gather(places, one) z = Add(x, there_too) y = MatMul(z, head)"
    proto = normalised(small_graph(body, "float[b, s, 11] y"))
    with pytest.raises(ModelError, match=r"looks '(table|places)' up by ids that are computed of the tokens'"):
        require_no_other_lookup(proto, find_words(proto))
    plain = normalised(small_graph("y = MatMul(x, head)", "float[b, s, 11] y"))
    require_no_other_lookup(plain, find_words(plain))


def test_ids_that_are_computed() -> None:
    proto = small_graph("y = Relu(x)", "float[b, s, 4] y")
    proto.graph.node[0].CopyFrom(onnx.helper.make_node("CumSum", ["input_ids", "axis"], ["flat"]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(1), "axis"))
    with pytest.raises(ModelError, match="computed inside"):
        find_words(normalised(proto))
