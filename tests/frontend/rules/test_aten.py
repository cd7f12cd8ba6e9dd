"""The ATen operator table: small convolutional modules, cut through each operator, equal to the masked original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import liar_opt
from liar_opt.frontend.fx_module import analyse, lower, trace
from liar_opt.passes.find_groups import find_groups

pytestmark = pytest.mark.usefixtures("one_thread")


class Between(nn.Module):
    """Something between two convolutions of one place."""

    def __init__(self, width: int, behind: int, between: Callable[[Tensor], Tensor], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(6, width, 1), nn.Conv2d(behind, 7, 1)
        self.between, self.norm = between, norm

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.enter(x))
        result: Tensor = self.leave(self.between(hidden if self.norm is None else self.norm(hidden)))
        return result


def native(x: Tensor) -> Tensor:
    y, mean, deviation = torch.ops.aten.native_group_norm(x, None, None, x.shape[0], 15, x.shape[2] * x.shape[3], 5, 1e-5)
    result: Tensor = y * (1.0 + mean.mean() * deviation.mean())
    return result


def sampled(x: Tensor) -> Tensor:
    rows = torch.linspace(-0.9, 0.9, 4)
    grid = torch.stack(torch.meshgrid(rows, rows, indexing="xy"), -1)
    return F.grid_sample(x, grid.expand(x.shape[0], 4, 4, 2), align_corners=False)


# name: (module, blocks of the group, channels in one)
MATCH: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "group_norm": (lambda: Between(15, 15, F.silu, nn.GroupNorm(5, 15)), 5, 3),
    "max_pool2d with indices": (lambda: Between(11, 11, lambda x: _pooled(x)), 11, 1),
    "max_pool2d": (lambda: Between(11, 11, lambda x: F.max_pool2d(x, 2)), 11, 1),
    "adaptive_max_pool2d": (lambda: Between(11, 11, lambda x: F.adaptive_max_pool2d(x, 2)), 11, 1),
    "reflection pad": (lambda: Between(11, 11, lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect")), 11, 1),
    "replication_pad2d": (lambda: Between(11, 11, lambda x: torch.ops.aten.replication_pad2d(x, [1, 2, 0, 1])), 11, 1),
    "pixel_shuffle": (lambda: Between(20, 5, lambda x: F.pixel_shuffle(x, 2)), 5, 1),
    "pixel_unshuffle": (lambda: Between(5, 20, lambda x: F.pixel_unshuffle(x, 2)), 5, 4),
    "channel_shuffle": (lambda: Between(15, 15, lambda x: F.channel_shuffle(x, 3)), 5, 3),
    "unfold and fold": (lambda: Between(11, 11, lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 4), 2, stride=2)), 11, 1),
    "grid_sampler": (lambda: Between(11, 11, sampled), 11, 1),
    "glu": (lambda: Between(22, 11, lambda x: F.glu(x, 1)), 11, 1),
    "diagonal": (lambda: Between(11, 11, lambda x: torch.diagonal(x, 1, 2, 3)[:, :, :, None]), 11, 1),
    "asinh": (lambda: Between(11, 11, torch.asinh), 11, 1),
}


def _pooled(x: Tensor) -> Tensor:
    values, indices = F.max_pool2d(x, 2, return_indices=True)
    return values + 0.01 * indices


@pytest.mark.parametrize("name", MATCH)
def test_match(name: str) -> None:
    torch.manual_seed(0)
    make, blocks, width = MATCH[name]
    data = [{"x": torch.randn(3, 6, 6, 4)} for _ in range(4)]
    options: dict[str, Any] = {"repair": "none", "multiple_of": 1, "latency": False}
    result = liar_opt.prune(make().eval(), data, ffn=0.4, **options)
    (group,) = result.report["groups"]
    assert (group["kind"], group["before"], group["block_width"]) == ("ffn", blocks, width)
    assert group["after"] < group["before"]
    assert result.report["verification"]["exact_difference"] < 1e-5
    (output,) = result.report["verification"]["outputs"].values()
    assert output["relative_rms"] > 1e-3


def groups_of(module: nn.Module) -> list[tuple[str, int]]:
    state = analyse(lower(trace(module.eval(), {"x": torch.randn(3, 6, 6, 4)}), module))
    return [(g.kind, g.size) for g in find_groups(state).groups]


def test_native_group_norm() -> None:
    assert groups_of(Between(15, 15, native)) == []  # its means are looked at over all groups
    plain = Between(15, 15, lambda x: torch.ops.aten.native_group_norm(x, None, None, 3, 15, 24, 5, 1e-5)[0])
    assert groups_of(plain) == [("ffn", 5)]


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.group_norm(x, 1),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 0))[:, 1:],
        lambda x: F.local_response_norm(x, 3),
    ],
    ids=["one group", "channels are padded", "neighbours"],
)
def test_near_miss(between: Callable[[Tensor], Tensor]) -> None:
    assert groups_of(Between(11, 11, between)) == []


def test_the_groups_of_a_normalisation_are_set_in_its_module() -> None:
    torch.manual_seed(0)
    data = [{"x": torch.randn(3, 6, 6, 4)} for _ in range(4)]
    result: Any = liar_opt.prune(
        Between(15, 15, F.silu, nn.GroupNorm(5, 15)).eval(), data, ffn=0.4, multiple_of=1, latency=False
    )
    kept = result.report["groups"][0]["after"]
    norm = result.module.norm
    assert (norm.num_groups, norm.num_channels, norm.weight.shape[0]) == (kept, 3 * kept, 3 * kept)
