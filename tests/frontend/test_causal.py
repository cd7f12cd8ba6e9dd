"""Causal or not, and how many positions: by structure, held against what the models compute."""

import graphs
import numpy as np
import onnx
import pytest
import zoo
import zoo_decoders

from liar_opt.frontend.causal import is_causal, positions
from liar_opt.frontend.onnx_model import OnnxModel

LLAMA, GPT2 = zoo_decoders.Case("llama", "dynamo"), zoo_decoders.Case("gpt2", "torchscript")
GPT2_CACHED = zoo_decoders.Case("gpt2", "dynamo", cache=True)
DECODERS = [
    LLAMA,
    GPT2,
    zoo_decoders.Case("opt", "torchscript"),
    pytest.param(GPT2_CACHED, marks=pytest.mark.rest),
    pytest.param(zoo_decoders.Case("mistral", "dynamo"), marks=pytest.mark.rest),
]
ENCODERS = [case for case in zoo.cases(fast=True) if case.architecture != "vit"]
PAIRS = [
    zoo_decoders.Case("bart", "torchscript"),
    pytest.param(zoo_decoders.Case("bart", "dynamo"), marks=pytest.mark.rest),
]


def normalised(path: object) -> OnnxModel:
    model = OnnxModel.load(str(path))
    model.normalise()
    return model


def sees_what_is_behind(path: object, feeds: dict[str, np.ndarray]) -> bool:
    """Whether an output changes at a token when the token behind it does."""
    changed = {**feeds, "input_ids": feeds["input_ids"].copy()}
    changed["input_ids"][:, -1] = np.where(changed["input_ids"][:, -1] == 5, 6, 5)
    before, after = (zoo.run(path, feed) for feed in (feeds, changed))  # type: ignore[arg-type]
    name = next(iter(before))
    return bool(np.abs(before[name][:, :-1] - after[name][:, :-1]).max() > 1e-5)


@pytest.mark.parametrize("case", DECODERS, ids=lambda case: case.name)
def test_decoders_are_causal(case: zoo_decoders.Case) -> None:
    built = zoo_decoders.ready(case)
    feeds = {**built.feeds, "attention_mask": np.ones_like(built.feeds["attention_mask"])}
    assert not sees_what_is_behind(built.path, feeds)
    assert is_causal(normalised(built.path))


@pytest.mark.parametrize("case", ENCODERS, ids=lambda case: case.name)
def test_encoders_are_not(case: zoo.Case) -> None:
    assert not is_causal(normalised(zoo.ready(case).path))


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case.name)
def test_encoder_decoders_are_not(case: zoo_decoders.Case) -> None:
    assert not is_causal(normalised(zoo_decoders.ready(case).path))


def test_the_oracle_can_fail() -> None:
    built = zoo.ready(next(case for case in ENCODERS if case.architecture == "bert"))
    assert built.mask is not None
    assert sees_what_is_behind(built.path, {**built.feeds, built.mask: np.ones_like(built.feeds[built.mask])})


def test_positions_of_learned_tables() -> None:
    assert positions(normalised(zoo_decoders.ready(GPT2).path)) == zoo_decoders.POSITIONS
    assert positions(normalised(zoo_decoders.ready(GPT2_CACHED).path)) == zoo_decoders.POSITIONS
    bert = next(case for case in ENCODERS if case.architecture == "bert")
    assert positions(normalised(zoo.ready(bert).path)) == zoo.POSITIONS
    assert positions(normalised(zoo_decoders.ready(LLAMA).path)) is None  # rotary: nothing in the graph ends


def attention(node: str, *more: str) -> OnnxModel:
    text = f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (int64[b, s] input_ids, float[b, s, 24] x) => (float[b, s, n] y) <{", ".join(more)}> {{ {node} }}"""
    return OnnxModel.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize(("table", "limit"), [("float[5, 2]", 5), ("float[1, 5, 2]", 5), ("int64[5, 2]", None)])
def test_a_table_of_positions_that_is_cut_to_the_length(table: str, limit: int | None) -> None:
    """As Keras adds learned positions: no indices, the first rows of the table."""
    axis = 1 if "1, 5" in table else 0
    node = "shape = Shape <start = 1, end = 2>(input_ids)  y = Slice(table, zero, shape, axis)"
    values = ", ".join(["0"] * 10)
    constants = (table + " table = {" + values + "}", "int64[1] zero = {0}", "int64[1] axis = {" + str(axis) + "}")
    assert positions(attention(node, *constants)) == limit


def test_operators_that_say_so() -> None:
    grouped = attention(
        "y = com.microsoft.GroupQueryAttention <num_heads = 3, kv_num_heads = 1>(x, x, x, , , , , cosine, sine)",
        "float[9, 4] cosine = {" + ", ".join(["0"] * 36) + "}",
        "float[9, 4] sine = {" + ", ".join(["0"] * 36) + "}",
    )
    assert is_causal(grouped) and positions(grouped) == 9
    plain = "y = com.microsoft.MultiHeadAttention <num_heads = 3{}>(x, x, x)"
    assert is_causal(attention(plain.format(", unidirectional = 1")))
    assert not is_causal(attention(plain.format(", unidirectional = 0")))


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        ("bool[1, 3, 3] m = {1, 0, 0, 1, 1, 0, 1, 1, 1}", True),
        ("bool[1, 3, 3] m = {1, 1, 0, 1, 1, 0, 1, 1, 1}", False),
        ("bool[1, 3, 3] m = {1, 1, 1, 1, 1, 1, 1, 1, 1}", False),
    ],
)
def test_a_constant_triangle(mask: str, causal: bool) -> None:
    assert is_causal(attention("y = Where(m, x, x)", mask)) == causal


@pytest.mark.parametrize(("buffer", "limit"), [("0, 1, 2, 3", 5), ("0, 0, 0, 0", None)])
def test_a_buffer_counts_where_it_rises(buffer: str, limit: int | None) -> None:
    """Without an input of token types their buffer, all zeros, is cut as that of positions is."""
    node = """
        shape = Shape <start = 1, end = 2>(input_ids)
        ids = Slice(buffer, zero, shape, one)
        y = Gather(table, ids)
    """
    constants = (
        "int64[1, 4] buffer = {" + buffer + "}",
        "int64[1] zero = {0}",
        "int64[1] one = {1}",
        "float[5, 2] table = {" + ", ".join("0" * 10) + "}",
    )
    assert positions(attention(node, *constants)) == limit


def test_a_sum_that_doubles_is_looked_at_once() -> None:
    """Sixty additions of a tensor to itself are 2^60 ways back to the input."""
    doubled = "\n".join(f"a{i + 1} = Add(a{i}, a{i})" for i in range(60))
    text = f"f (int64[b, s] a0) => (float[b, s, 6] y) {{ {doubled}  y = Gather(table, a60) }}"
    model = OnnxModel.from_proto(graphs.parse(text, {"table": (9, 6)}))
    assert positions(model) is None
    named = text.replace("a0", "position_ids").replace("aposition", "position")
    assert positions(OnnxModel.from_proto(graphs.parse(named, {"table": (9, 6)}))) == 9
