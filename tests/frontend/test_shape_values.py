"""Each evaluator against onnx's reference implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from liar_opt.frontend.rules.numbers import resolve_reshape
from liar_opt.frontend.rules.operators import OPERATORS
from liar_opt.frontend.shape_values import evaluate

F = np.float32
I = np.int64  # noqa: E741 - beside F
X = np.linspace(-2, 3, 24, dtype=F).reshape(2, 3, 4)
N = np.arange(24, dtype=I).reshape(2, 3, 4) - 7


def i(*values: int) -> np.ndarray:
    return np.asarray(values, I)


CASES: list[tuple[str, list[np.ndarray | None], dict[str, Any]]] = [
    ("Identity", [X], {}),
    ("Cast", [X], {"to": 7}),
    ("Cast", [X], {"to": 10}),
    ("Cast", [N], {"to": 9}),
    ("Squeeze", [X[:1, :, :1]], {}),
    ("Squeeze", [X[:1, :, :1], i(-1)], {}),
    ("Unsqueeze", [X, i(0, -1)], {}),
    ("OneHot", [i(2, 0, -1), np.asarray(4, I), i(3, 7)], {}),
    ("OneHot", [N[:1, :2, :2] % 3, np.asarray(3, I), np.asarray([0, 1], F)], {"axis": 1}),
    ("Slice", [X, i(1), i(3), i(1)], {}),
    ("Slice", [X, i(0, -3), i(2**62, -1), i(0, -1)], {}),
    ("Slice", [X, i(-1), i(-(2**63)), i(2), i(-1)], {}),
    ("Slice", [X, i(3), i(0), i(2), i(-2)], {}),
    ("Slice", [X, i(1, 1), i(2, 3)], {}),
    ("Reshape", [X, i(0, -1)], {}),
    ("Reshape", [X, i(4, 6)], {}),
    ("Split", [X, i(1, 2)], {"axis": 1}),
    ("Range", [np.asarray(2, I), np.asarray(11, I), np.asarray(3, I)], {}),
    ("Range", [np.asarray(1, F), np.asarray(-1, F), np.asarray(-0.5, F)], {}),
    ("Expand", [X[:, :1], i(3, 1)], {}),
    ("Expand", [X, i(5, 1, 1, 1)], {}),
    ("ConstantOfShape", [i(2, 3)], {}),
    ("ConstantOfShape", [i(2)], {"value": onnx.numpy_helper.from_array(i(7))}),
    ("Gather", [X, i(1, -1)], {"axis": 1}),
    ("Gather", [N[0, 0], np.asarray(2, I)], {}),
    ("Concat", [X, X[:, :1]], {"axis": 1}),
    ("Transpose", [X], {"perm": [2, 0, 1]}),
    ("Transpose", [X], {}),
    ("Flatten", [X], {}),
    ("Flatten", [X], {"axis": 0}),
    ("Flatten", [X], {"axis": -1}),
    ("Tile", [X, i(1, 2, 1)], {}),
    ("Where", [X > 0, X, -X], {}),
    ("ReduceProd", [N, None], {"keepdims": 0}),
    ("ReduceSum", [N, i(1)], {}),
    ("ReduceSum", [N, i(0, -1)], {"keepdims": 0}),
    ("ReduceSum", [N, np.zeros(0, I)], {}),
    ("ReduceSum", [N], {"noop_with_empty_axes": 1}),
    ("ReduceMax", [X], {"axes": [1]}),
    ("ReduceMin", [X], {"axes": [-1], "keepdims": 0}),
    ("Add", [X, X[0]], {}),
    ("Sub", [N, N[:, :1]], {}),
    ("Mul", [N, i(3)], {}),
    ("Div", [X, X[1] + F(9)], {}),
    ("Div", [N, i(4)], {}),
    ("Div", [N, i(-4)], {}),
    ("Div", [np.asarray([2**63 - 1, 2**62 + 1, -(2**62) - 1], I), i(1, 2, 2)], {}),
    ("Mod", [N, i(4)], {}),
    ("Mod", [N, i(-4)], {}),
    ("Mod", [X, X[1] + F(9)], {"fmod": 1}),
    ("Pow", [np.abs(X), np.asarray(0.5, F)], {}),
    ("Pow", [N, i(2)], {}),
    ("Sqrt", [np.abs(X)], {}),
    ("Reciprocal", [X + F(9)], {}),
    ("Neg", [N], {}),
    ("Abs", [N], {}),
    ("Floor", [X], {}),
    ("Ceil", [X], {}),
    ("Min", [X, X[:1], -X], {}),
    ("Max", [X], {}),
    ("Equal", [N, i(3)], {}),
    ("Greater", [N, i(3)], {}),
    ("GreaterOrEqual", [N, i(3)], {}),
    ("Less", [N, i(3)], {}),
    ("LessOrEqual", [N, i(3)], {}),
    ("And", [X > 0, X < 1], {}),
    ("Or", [X > 0, X < -1], {}),
    ("Not", [X > 0], {}),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{op}{k}" for k, (op, *_) in enumerate(CASES)])
def test_against_the_reference(case: tuple[str, list[np.ndarray | None], dict[str, Any]]) -> None:
    op, inputs, attributes = case
    names = ["" if a is None else f"x{k}" for k, a in enumerate(inputs)]
    count = len(inputs[1]) if op == "Split" and inputs[1] is not None else 1
    node = onnx.helper.make_node(op, names, [f"y{k}" for k in range(count)], **attributes)
    ends = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, inputs, strict=True)
        if a is not None
    ]
    outs = [onnx.ValueInfoProto(name=o) for o in node.output]
    graph = onnx.helper.make_graph([node], "g", ends, outs)
    opset = 13 if "axes" in attributes else 18
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    feeds = {n: a for n, a in zip(names, inputs, strict=True) if a is not None}
    wanted = ReferenceEvaluator(model).run(None, feeds)
    got = evaluate(op, inputs, attributes)
    assert got is not None
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == np.asarray(b).shape
        assert a.dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


def test_every_evaluator_is_tested() -> None:
    assert {op for op, *_ in CASES} == {name for (_, name), rows in OPERATORS.items() if rows[-1].evaluate}


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Mystery", [X], {}),
        ("Reshape", [X, i(5, -1)], {}),
        ("Gather", [X, i(9)], {}),
        ("Slice", [X], {}),
        ("Split", [X], {"axis": 0}),
        ("Cast", [X], {}),
        ("Add", [X, np.zeros((5, 5), F)], {}),
        ("Div", [N, i(0)], {}),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_what_cannot_be_evaluated_is_unknown(op: str, inputs: list[np.ndarray | None], attributes: dict[str, Any]) -> None:
    assert evaluate(op, inputs, attributes) is None


def test_reshape_targets() -> None:
    assert resolve_reshape([0, -1], [2, 3, 4]) == [2, 12]
    assert resolve_reshape([4, 6], [2, 3, 4]) == [4, 6]
    assert resolve_reshape([0, 3], [0, 3], allow_zero=True) == [0, 3]
    assert resolve_reshape([-1, -1], [4]) is None
    assert resolve_reshape([5, -1], [4]) is None
    assert resolve_reshape([3], [4]) is None
