"""Operators that no other test writes down: many between two layers, summed, cut through, equal to the masked original."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import graphs
import numpy as np
import onnx
import onnx.parser
import pytest

from liar_opt.frontend.rules.operators import OPERATORS
from liar_opt.frontend.rules.table import ATEN

ONE_EACH = {
    "unary": (
        "Abs Asin Acos Asinh Atan Atanh Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity "
        "LeakyRelu Log Mish Neg Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Tan Tanh "
        "ThresholdedRelu"
    ).split(),
    "binary": "Add Div Max Mean Min Mul Pow Sub Sum".split(),
    "compared": "Equal Greater GreaterOrEqual Less LessOrEqual".split(),
    "logic": "And Or Xor".split(),
    "bits": "BitwiseAnd BitwiseOr BitwiseXor".split(),
    "reduced": (
        "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
    ).split(),
    "along": "Softmax LogSoftmax Hardmax LpNormalization".split(),
}
"""Operators of one form; the rest are written out."""


def summed(lines: list[str]) -> str:
    """Returns a graph of two layers that sums what each line makes of ``h``, in (0, 1), named r0, r1, ..."""
    made = ", ".join(f"r{i}" for i in range(len(lines)))
    body = "\n".join(line.replace("@", f"r{i}") for i, line in enumerate(lines))
    return f"""f (float[b, s, 6] x) => (float[b, s, 7] y) {{
        a = MatMul(x, w1)
        h = Sigmoid(a)
        more = Add(h, one)
        large = Mul(h, ten)
        whole = Cast<to = 6>(large)
        half = Greater(h, mid)
        other = Less(h, few)
        {body}
        total = Sum({made})
        y = MatMul(total, w2)
    }}"""


LINES = [
    *(f"@ = {op}(h)" for op in ONE_EACH["unary"]),
    *(f"@ = {op}(h, c)" for op in ONE_EACH["binary"]),
    *(f"t_@ = {op}(h, c)\n@ = Cast<to = 1>(t_@)" for op in ONE_EACH["compared"]),
    *(f"t_@ = {op}(half, other)\n@ = Cast<to = 1>(t_@)" for op in ONE_EACH["logic"]),
    *(f"t_@ = {op}(whole, whole)\n@ = Cast<to = 1>(t_@)" for op in ONE_EACH["bits"]),
    *(f"@ = {op}(h, second)" for op in ONE_EACH["reduced"]),
    *(f"@ = {op}<axis = 1>(h)" for op in ONE_EACH["along"]),
    "@ = Acosh(more)",
    "@ = CastLike(h, one)",
    "@ = Clip(h, few, mid)",
    "@ = Dropout(h)",
    "@ = Mod<fmod = 1>(h, few)",
    "@ = PRelu(a, c)",
    "@ = Where(half, h, a)",
    "@ = CumSum(h, place)",
    "t_@ = IsInf(h)\n@ = Cast<to = 1>(t_@)",
    "t_@ = IsNaN(h)\n@ = Cast<to = 1>(t_@)",
    "t_@ = Not(half)\n@ = Cast<to = 1>(t_@)",
    "t_@ = BitwiseNot(whole)\n@ = Cast<to = 1>(t_@)",
    'u_@ = Cast<to = 12>(large)\nt_@ = BitShift<direction = "RIGHT">(u_@, u_@)\n@ = Cast<to = 1>(t_@)',
    "t_@ = ArgMax<axis = 1>(h)\n@ = Cast<to = 1>(t_@)",
]
WEIGHTS: graphs.Weights = {
    "w1": (6, 11),
    "w2": (11, 7),
    "c": np.linspace(0.2, 1.4, 11, dtype=np.float32),
    "one": np.float32(1.0),
    "ten": np.float32(10.0),
    "mid": np.float32(0.5),
    "few": np.float32(0.3),
    "second": np.asarray([1]),
    "place": np.asarray(1),
}


@pytest.mark.parametrize("part", range(4))
def test_element_by_element_and_along_an_axis(part: int) -> None:
    text = summed(LINES[part::4])
    names = {w for w in WEIGHTS if f" {w})" in text or f" {w}," in text}
    proto = graphs.parse(text, {k: v for k, v in WEIGHTS.items() if k in names}, opset=20)
    assert graphs.sizes(proto) == [("ffn", 11)]
    graphs.prove(proto, {"b": 2, "s": 5}, seeds=1)


def test_pools_of_all_places() -> None:
    text = """f (float[b, 6, 8, 8] x) => (float[b, 7, 8, 8] y) {
        a = Conv(x, w1)
        h = Sigmoid(a)
        p = GlobalAveragePool(h)
        q = GlobalMaxPool(h)
        r = LpPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(h)
        t = Sum(h, p, q, r)
        y = Conv(t, w2)
    }"""
    proto = graphs.parse(text, {"w1": (11, 6, 1, 1), "w2": (7, 11, 1, 1)})
    assert graphs.sizes(proto) == [("ffn", 11)]
    graphs.prove(proto, {"b": 2}, seeds=1)


@pytest.mark.parametrize("op, opset", [("Upsample", 9), ("Scatter", 10)])
def test_operators_of_old_sets(op: str, opset: int) -> None:
    weights: dict[str, tuple[int, ...] | np.ndarray | np.generic] = {"w1": (11, 6, 1, 1), "w2": (7, 11, 1, 1)}
    if op == "Upsample":
        weights["scales"] = np.asarray([1, 1, 2, 2], np.float32)
        between = "t = Upsample(h, scales)"
    else:
        weights |= {"places": np.zeros((2, 11, 1, 8), np.int64), "new": np.ones((2, 11, 1, 8), np.float32)}
        between = "t = Scatter<axis = 2>(h, places, new)"
    text = f"""f (float[2, 6, 8, 8] x) => (float[m, 7, u, v] y) {{
        a = Conv(x, w1)
        h = Sigmoid(a)
        {between}
        y = Conv(t, w2)
    }}"""
    proto = graphs.parse(text, weights, opset=opset)
    assert graphs.sizes(proto) == [("ffn", 11)]
    graphs.prove(proto, seeds=1)


BETWEEN: dict[str, tuple[str, graphs.Weights]] = {
    "AffineGrid": (
        "g = AffineGrid(theta, shape)\nt = GridSample(h, g)",
        {"theta": np.asarray([[[0.9, 0.1, 0], [0, 0.8, 0.1]]] * 2, np.float32), "shape": np.asarray([2, 11, 8, 8])},
    ),
    "Det": ("d = Det(h)\nu = Unsqueeze(d, places)\nt = Add(h, u)", {"places": np.asarray([2, 3])}),
}


@pytest.mark.parametrize("op", BETWEEN)
def test_between_convolutions(op: str) -> None:
    lines, weights = BETWEEN[op]
    text = f"""f (float[2, 6, 8, 8] x) => (float[2, 7, 8, 8] y) {{
        a = Conv(x, w1)
        h = Sigmoid(a)
        {lines}
        y = Conv(t, w2)
    }}"""
    proto = graphs.parse(text, {"w1": (11, 6, 1, 1), "w2": (7, 11, 1, 1), **weights}, opset=20)
    assert graphs.sizes(proto) == [("ffn", 11)]
    graphs.prove(proto, seeds=1)


def test_swish() -> None:
    text = """f (float[b, s, 6] x) => (float[b, s, 7] y) {
        a = MatMul(x, w1)
        h = Swish(a)
        y = MatMul(h, w2)
    }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 7)}, opset=24)
    assert graphs.sizes(proto) == [("ffn", 11)]
    written = '<opset_import: ["" : 24], domain: "">\nSwish (x) => (y) { s = Sigmoid(x)\n y = Mul(x, s) }'
    graphs.prove(proto, {"b": 2, "s": 5}, seeds=1, functions=[onnx.parser.parse_function(written)])


def test_embeddings_of_onnx_runtime() -> None:
    text = """f (int32[b, s] ids, int32[b, s] kinds) => (float[b, s, 6] y) {
        e, m = com.microsoft.EmbedLayerNormalization(ids, kinds, words, places, table, gamma, beta)
        a = MatMul(e, w1)
        h = Sigmoid(a)
        y = MatMul(h, w2)
    }"""
    tables: graphs.Weights = {"words": (9, 6), "places": (12, 6), "table": (2, 6), "gamma": (6,), "beta": (6,)}
    proto = graphs.parse(text, {**tables, "w1": (6, 11), "w2": (11, 6)})
    assert graphs.sizes(proto) == [("ffn", 11)]
    graphs.prove(proto, {"b": 2, "s": 5}, seeds=1)


CONTRIB: dict[str, tuple[str, graphs.Weights]] = {
    "BiasAdd": ("t = com.microsoft.BiasAdd(h, c, h)\ny = MatMul(t, w2)", {"w2": (11, 7), "c": (11,)}),
    "BiasSplitGelu": ("t = com.microsoft.BiasSplitGelu(h, c)\ny = MatMul(t, w2)", {"w2": (11, 7), "c": (22,)}),
    "FusedGemm": (
        'g = Reshape(h, rows)\ny = com.microsoft.FusedGemm<activation = "Relu", transB = 1>(g, w2, c)',
        {"w2": (7, 11), "c": (7,), "rows": np.asarray([-1, 11])},
    ),
    "TransposeMatMul": ("y = com.microsoft.TransposeMatMul<transB = 1>(h, w2)", {"w2": (7, 11)}),
}


@pytest.mark.parametrize("op", CONTRIB)
def test_operators_of_onnx_runtime(op: str) -> None:
    lines, weights = CONTRIB[op]
    text = f"""f (float[b, s, 6] x) => (float y) {{
        a = MatMul(x, w1)
        h = Sigmoid(a)
        {lines}
    }}"""
    proto = graphs.parse(text, {"w1": (6, 22 if op == "BiasSplitGelu" else 11), **weights})
    assert graphs.sizes(proto) == [("ffn", 11)]
    if op in ("FusedGemm", "TransposeMatMul"):  # the others have no kernel on the CPU
        graphs.prove(proto, {"b": 2, "s": 5}, seeds=1)


def test_every_row_of_onnx_is_in_a_test_or_says_why_not() -> None:
    """Graphs are written as ONNX text, or made by names in quotes."""
    words: set[str] = set()
    for path in Path(__file__).parents[2].rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        told = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
        texts = (
            n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in told
        )
        words.update(word for text in texts for word in re.findall(r"\w+", str(text.value)))
    for (domain, name), rows in OPERATORS.items():
        if domain != ATEN and rows[-1].rule:
            assert (name in words) != bool(rows[-1].untested), (domain, name)
