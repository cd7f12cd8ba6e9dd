"""The code on docs/writing-a-pass.md does what the page says."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import liar_opt
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.rules import operators
from liar_opt.frontend.rules.table import Op
from liar_opt.passes.base import State

PAGE = Path(__file__).parents[1] / "docs" / "writing-a-pass.md"
WIDTH = 12


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the blocks of code define."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def feed_forward(between: str, width: int, domain: str = "") -> onnx.ModelProto:
    """x [n, 8] -> WIDTH -> ``between`` -> ``width`` -> [n, 8]."""
    rng = np.random.default_rng(0)
    text = f"""<ir_version: 8, opset_import: ["" : 17{f', "{domain}" : 1' if domain else ""}]>
    g (float[n, 8] x) => (float[n, 8] y) {{
        a = MatMul(x, up)
        b = {between}(a)
        y = MatMul(b, down)
    }}"""
    proto = onnx.parser.parse_model(text)
    for name, shape in (("up", (8, WIDTH)), ("down", (width, 8))):
        values = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return proto


def test_the_pass(page: dict[str, Any]) -> None:
    state = State(OnnxModel.from_proto(feed_forward("Relu", WIDTH)))
    page["CountOperatorsPass"](least=2)(state)
    assert state.found(page["Operators"]).counts == {"MatMul": 2}


def test_the_operator(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = feed_forward("example.Halve", WIDTH // 2, "example")
    assert not liar_opt.inspect(model).groups
    monkeypatch.setitem(operators.OPERATORS, ("example", "Halve"), [Op("Halve", page["halve"])])
    (group,) = liar_opt.inspect(model).groups
    assert (group.kind, group.size) == ("ffn", WIDTH // 2)


@pytest.mark.parametrize("name", ["score", "repair"])
def test_the_score_and_the_repair(page: dict[str, Any], name: str) -> None:
    given = {"score": page["energy"], "repair": page["mean_only"]}
    data = [{"x": np.random.default_rng(seed).standard_normal((16, 8)).astype(np.float32)} for seed in range(4)]
    result = liar_opt.prune(feed_forward("Relu", WIDTH), data, ffn=0.5, multiple_of=2, latency=False, **{name: given[name]})
    assert result.report["groups"][0]["after"] == WIDTH // 2
    assert given[name].__name__ in str(result.report["options"])
