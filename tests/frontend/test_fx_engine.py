"""What a traced module costs: its operations, and how it is timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from liar_opt.frontend.fx_engine import TimedModule, count_flops
from liar_opt.frontend.fx_module import FxModel, analyse, lower, trace
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.passes.blank_cut import blank_cut, deployed, in_one_form
from liar_opt.passes.find_groups import find_groups

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    """Six heads share two keys and values; ``divided``: their width is computed from that of the input, not said."""

    def __init__(self, divided: bool = False) -> None:
        super().__init__()
        self.query, self.out, self.divided, self.heads, self.width = nn.Linear(30, 30), nn.Linear(30, 30), divided, 6, 5
        self.both = nn.Linear(30, 2 * 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, wide = x.shape
        width = wide // self.heads if self.divided else self.width
        q = self.query(x).view(b, s, self.heads, width).transpose(1, 2)
        k, v = (part.view(b, s, -1, width).transpose(1, 2) for part in self.both(x).chunk(2, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        made: torch.Tensor = x + self.out(y.transpose(1, 2).reshape(b, s, -1))
        return made


class Convolutions(nn.Module):
    """A dense, a depthwise and a strided convolution, and a product that einsum says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.apart = nn.Conv2d(3, 14, 3, padding=1), nn.Conv2d(14, 14, 3, groups=14)
        self.last, self.mix = nn.Conv2d(14, 8, 3, stride=2), nn.Parameter(torch.randn(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.apart(self.first(x).relu()).relu())
        return torch.einsum("bchw,cn->bnhw", x, self.mix)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(11, 42), nn.Linear(42, 11)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(self.one(x).relu())
        return result


SHAPES = {Attention: (3, 7, 30), Convolutions: (3, 3, 9, 12), Mlp: (3, 11)}


def lowered(module: nn.Module) -> FxModel:
    module = module.eval()
    return lower(trace(module, {"x": torch.randn(SHAPES[type(module)])}), module)


@pytest.mark.parametrize("kind", SHAPES)
def test_operations_are_those_of_the_walk(kind: type[nn.Module]) -> None:
    model = lowered(kind())
    counted = count_flops(model, {"x": torch.randn(SHAPES[kind])})
    assert counted == analyse(model).flops > 0
    wider = (6, *SHAPES[kind][1:])
    assert count_flops(model, {"x": torch.randn(wider).numpy()}) == 2 * counted


def test_what_does_not_fit_is_not_counted() -> None:
    assert count_flops(lowered(Mlp()), {"x": torch.randn(3, 12)}) is None


def test_a_cut_module_is_timed_in_its_own_code() -> None:
    model = lowered(Mlp())
    (group,) = find_groups(analyse(model)).groups
    cut, ends = blank_cut(model.original, {group.name: 14})
    assert not ends and isinstance(cut, FxModel)
    feeds = {"x": torch.randn(4, 11).numpy()}
    assert 3 * (count_flops(cut, feeds) or 0) == count_flops(model, feeds)
    dense, small = in_one_form([deployed(model, "cpu"), deployed(cut, "cpu")])
    assert dense.module is model.module and type(small.module) is Mlp
    assert small.module.one.weight.shape == (14, 11)
    small.run(feeds)
    assert small.inputs == ["x"]
    assert cut.structure() != model.structure() == lower(*_of(model)).structure()


def _of(model: FxModel) -> Any:
    return model.program, model.module


def test_where_no_code_fits_both_are_traced_graphs() -> None:
    model = lowered(Attention(divided=True))
    analysis = analyse(model)
    (group,) = (g for g in find_groups(analysis).groups if g.kind == "heads")
    Rewriter(analysis).cut(group.cut([0]))
    small = TimedModule.of(model)
    assert not small.own_code and isinstance(small.module, torch.fx.GraphModule)
    dense, same = in_one_form([TimedModule.of(model.original.model()), small])
    assert same is small and isinstance(dense.module, torch.fx.GraphModule)
    for timed in (dense, small):
        timed.run({"x": torch.randn(4, 7, 30).numpy()})
