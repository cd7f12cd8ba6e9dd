"""Groups of traced modules are proved before they are measured; what a wrong rule has found costs itself alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import liar_opt
from liar_opt.frontend.rules.operators import OPERATORS
from liar_opt.frontend.rules.table import Op
from liar_opt.passes.find_module_groups import FindModuleGroupsPass
from liar_opt.passes.open_module import load_module_state
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.prove_groups import Failure, Proof, ProveGroupsPass, groups_at_fault
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.result import ModuleResult

pytestmark = pytest.mark.usefixtures("one_thread")


class Rolled(nn.Module):
    """Two feed-forward blocks; between the layers of the second one the units change places."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(9, 14), nn.Linear(14, 9)
        self.wide, self.back = nn.Linear(9, 22), nn.Linear(22, 9)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(tokens, 9).float()
        x = x + self.down(torch.tanh(self.up(x)))
        result: torch.Tensor = x + self.back(torch.roll(torch.tanh(self.wide(x)), 3, -1))
        return result


@pytest.fixture
def wrong_rule(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Roll keeps every index in its place, says this rule."""
    monkeypatch.setitem(OPERATORS, ("aten", "roll"), [Op("roll", lambda w, node: w.output(node, w.input_axes(node, 0)))])
    yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def data() -> list[dict[str, Any]]:
    return [{"tokens": torch.randint(0, 9, (4, 7))} for _ in range(3)]


@pytest.mark.usefixtures("wrong_rule")
def test_a_wrong_rule_costs_its_group() -> None:
    result = liar_opt.prune(Rolled().eval(), data(), ffn=0.5, multiple_of=1, latency=False)
    assert isinstance(result, ModuleResult)
    assert [(g["before"], g["after"]) for g in result.report["groups"]] == [(14, 7)]
    (refusal,) = [r for r in result.refusals if "cutting it would be wrong" in r.reason]
    assert "differs by" in refusal.reason and len(refusal.nodes) == 1
    assert result.module.get_submodule("back").weight.shape == (9, 22)


def test_right_rules_are_proved_at_two_sizes() -> None:
    state, _ = load_module_state(Rolled().eval(), data(), PruneOptions())
    FindModuleGroupsPass()(state)
    (group,) = state.groups
    proof = Proof(state, PruneGroupsPass())
    assert [tuple(p["tokens"].shape) for p in proof.feeds] == [(3, 7), (2, 6)]
    assert proof.failure({group.name: 5}, {}) is None
    assert ProveGroupsPass(PruneGroupsPass())(state).refusals == () and state.groups == (group,)


def test_bisection_finds_every_group_at_fault() -> None:
    keep = {name: 1 for name in "abcdefghijk"}
    asked = []

    def failing(some: dict[str, int]) -> Failure | None:
        asked.append(some)
        if "c" in some:
            return Failure("raised", "c")
        return Failure("wrong") if {"e", "k"} & set(some) else None

    assert groups_at_fault(keep, failing) == {"c": "raised", "e": "wrong", "k": "wrong"}
    assert len(asked) < 20 and groups_at_fault({}, failing) == {}
