"""Experts with weights of their own: what is followed, and what of a module is said to be another way.

That a cut graph equals the original is in `tests/passes/test_cut_experts.py`.
"""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import pytest
import torch

import liar_opt
from liar_opt.frontend.lone_experts import Selection, only_theirs, silenced
from liar_opt.runtime.errors import ModelError

TEXT = """f (float[b, 6] x, float[b, 1] g) => (float[b, 6] y) {
    u = MatMul(x, up)  h = Relu(u)  f = MatMul(h, down)  %s  rest = MatMul(x, other)  y = Add(rest, t) }"""
WEIGHTS: dict[str, Any] = {"up": (6, 5), "down": (5, 6), "other": (6, 6), "zero": np.float32(0)}


def left(body: str) -> tuple[list[tuple[str, str]], list[str], str]:
    """What goes where g is zero, with what is left of it; the weights that go along; why it is not known."""
    _, walk, _ = graphs.analyse(graphs.parse(TEXT % body, WEIGHTS))
    nodes = walk.model.graph.nodes
    order = {id(n): i for i, n in enumerate(nodes)}
    given = next(t for t in walk.model.graph.inputs if t.name == "g")
    found = silenced(walk, order, [Selection(0, nodes[0], given)])
    weights = [] if found.refused else only_theirs(order, nodes, found)
    return [(n.op, t.name) for n, t in found.joins], sorted(t.name for t in weights if t.values.size > 1), found.refused


@pytest.mark.parametrize(
    "body",
    [
        "t = Mul(f, g)",
        "n = Neg(g)  t = Mul(n, f)",
        "k = Greater(g, zero)  t = Where(k, f, zero)",
        "k = Greater(g, zero)  c = Cast<to = 1>(k)  t = Mul(c, f)",
        "a = Add(g, zero)  t = Mul(f, a)",
    ],
)
def test_zero_is_followed_to_the_sum(body: str) -> None:
    assert left(body) == ([("Add", "rest")], ["down", "up"], "")


@pytest.mark.parametrize(
    ("body", "op"),
    [("e = Exp(g)  t = Mul(f, e)", "Exp"), ("t = Div(f, g)", "Div"), ("t = Where(b, g, f)", "Where")],
)
def test_what_is_no_zero_is_refused(body: str, op: str) -> None:
    body = f"b = Greater(f, zero)  {body}" if op == "Where" else body
    assert f"{op} reads what the router says of one expert" in left(body)[2]


class Mixture(torch.nn.Module):
    """Five experts, each a module."""

    def __init__(self, compared: bool) -> None:
        super().__init__()
        self.compared, self.router = compared, torch.nn.Linear(8, 5, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(8, 11), torch.nn.ReLU(), torch.nn.Linear(11, 8)) for _ in range(5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds up what the two best say."""
        logits = self.router(x)
        best, chosen = logits.topk(2, -1)
        best, result = best.softmax(-1), x
        gates = torch.zeros_like(logits).scatter(-1, chosen, best)
        for i, expert in enumerate(self.experts):
            own = (best * (chosen == i)).sum(-1, keepdim=True) if self.compared else gates[..., i : i + 1]
            result = result + own * expert(x)
        return result


@pytest.mark.parametrize("compared", [False, True])
def test_experts_that_are_modules_are_sent_to_their_onnx_file(compared: bool) -> None:
    data: list[dict[str, Any]] = [{"x": np.ones((4, 8), np.float32) * i} for i in range(3)]
    with pytest.raises(ModelError, match="no expert can go: each is a module of its own, which goes in an ONNX file alone"):
        liar_opt.prune(Mixture(compared), data, experts=0.4, provider="cpu", latency=False)
