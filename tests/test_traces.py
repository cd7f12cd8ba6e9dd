"""Traces that tests share: a module gets what it would have been given alone, and another kind of module another one."""

from typing import Any

import pytest
import torch
from torch import nn
from traces import Traces, kind_of

from liar_opt.frontend.fx_module import lower, trace

pytestmark = pytest.mark.usefixtures("one_thread")
FEEDS = {"x": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}


class Powers(nn.Module):
    def __init__(self, seed: int, power: int = 2, width: int = 10, table: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.power, self.table = power, torch.full((width,), table)
        self.enter, self.leave = nn.Linear(6, width), nn.Linear(width, 4)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.leave((self.enter(x) * self.table + self.shift) ** self.power)
        return result


def test_modules_of_a_kind_have_one_trace_and_tensors_of_their_own() -> None:
    shared = Traces()
    for seed in range(3):
        module = Powers(seed).eval()
        found, alone = shared(module, FEEDS), trace(module, FEEDS)
        assert lower(found, module).listing() == lower(alone, module).listing()
        assert all(found.state_dict[name] is value for name, value in module.named_parameters())
        torch.testing.assert_close(found.module()(**FEEDS), module(**FEEDS))
        with torch.no_grad():  # what is done to one does not reach the next
            module.enter.weight.zero_()
    assert len(shared.known) == 1


@pytest.mark.parametrize("more", [{"power": 3}, {"width": 12}, {"table": 2.0}], ids=str)
def test_what_a_trace_holds_makes_another_kind(more: dict[str, Any]) -> None:
    assert kind_of(Powers(0)) == kind_of(Powers(1)) != kind_of(Powers(0, **more))
    assert kind_of(Powers(0).eval()) != kind_of(Powers(0))


def test_code_of_one_test_alone_is_of_no_kind() -> None:
    class Own(Powers):
        pass

    assert kind_of(Own(0)) is None
    changed: Any = Powers(0)
    changed.forward = lambda x: x
    assert kind_of(changed) is None
