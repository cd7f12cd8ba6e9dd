"""Choices between nearly equal numbers: what is cut in front of one that rounding makes stays whole."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import torch
from torch import nn

import liar_opt
from liar_opt.passes.close_calls import repeated
from liar_opt.runtime.errors import ModelError

LAYER = " {0}h = MatMul({0}, {0}_up)\n {0}r = Relu({0}h)\n {0}d = MatMul({0}r, {0}_down)\n"
PLACES = {
    "MaxPool": "pooled, places = MaxPool<kernel_shape=[3], pads=[1,1]>(turned)",
    "TopK": "pooled, places = TopK(turned, all)",
    "ArgMax": "pooled = Identity(turned)\n places = ArgMax<axis=2>(turned)",
}
UNREAD = "pooled, places = MaxPool<kernel_shape=[3], pads=[1,1]>(turned)\n places2 = Identity(pooled)"


def counting(places: str, positions: bool = False, layers: int = 3, behind: int = 1) -> onnx.ModelProto:
    """Returns feed-forward layers around an operator whose places are used as numbers.

    Args:
        places: the operator's line.
        positions: whether a token differs from the same one elsewhere.
        layers: in front of it.
        behind: those behind it.
    """
    front, back = [f"x{i}" for i in range(layers)], [f"y{i}" for i in range(behind)]
    lines = [" words = Gather(table, ids)\n", f" x0 = {'Add(words, where)' if positions else 'Identity(words)'}\n"]
    for name, after in zip(front, [*front[1:], "out"], strict=True):
        lines += [LAYER.format(name), f" {after} = Add({name}, {name}d)\n"]
    number = "places2" if "places2" in places else "numbers"
    lines.append(f" turned = Transpose<perm=[0,2,1]>(out)\n {places}\n")
    lines.append("" if "places2" in places else " numbers = Cast<to=1>(places)\n")
    lines.append(f" small = Mul({number}, tenth)\n both = Add(pooled, small)\n y0 = Transpose<perm=[0,2,1]>(both)\n")
    for name, after in zip(back, [*back[1:], "out2"], strict=False):
        lines += [LAYER.format(name), f" {after} = Add({name}, {name}d)\n"]
    lines.append(f" z = Identity({'out2' if behind else 'y0'})\n")
    widths = {name: 10 + 2 * i for i, name in enumerate([*front, *back])}
    weights: dict[str, Any] = {
        "table": (11, 6),
        "where": (7, 6),
        "tenth": np.float32(0.1),
        "all": np.asarray([7]),
        **{f"{name}_up": (6, n) for name, n in widths.items()},
        **{f"{name}_down": (n, 6) for name, n in widths.items()},
    }
    return graphs.parse(f"g (int64[b,7] ids) => (float[b,7,6] z) {{\n{''.join(lines)}}}", weights)


def pruned(model: Any, **options: Any) -> liar_opt.PruneResult:
    ids = np.random.default_rng(0).integers(11, size=(24, 7))
    return liar_opt.prune(model, {"ids": ids}, latency=False, fresh=True, multiple_of=1, batch_size=8, **options)


def cut_sizes(result: liar_opt.PruneResult) -> set[int]:
    """The widths, as they were, of what was cut."""
    return {change.before for change in result.changes if change.what == "blocks removed"}


@pytest.mark.parametrize("options", [{}, {"ffn": 0.5}, {"sparsity": 0.3, "repair": "none"}], ids=str)
@pytest.mark.parametrize("operator", PLACES)
def test_what_is_in_front_of_a_choice_by_rounding_stays(operator: str, options: dict[str, Any]) -> None:
    result = pruned(counting(PLACES[operator]), **options)
    assert cut_sizes(result) == {16}  # the layer behind it
    (refusal,) = (r for r in result.report["refusals"] if "rounding decides" in r["reason"])
    assert refusal["reason"].startswith("left alone: rounding decides") and f"({operator})" in refusal["reason"]
    assert len(refusal["nodes"]) == 3


@pytest.mark.parametrize("operator", PLACES)
def test_where_no_two_numbers_are_equal_all_layers_go(operator: str) -> None:
    assert cut_sizes(pruned(counting(PLACES[operator], positions=True), ffn=0.5)) == {10, 12, 14, 16}


def test_places_that_nobody_reads_keep_nothing() -> None:
    assert cut_sizes(pruned(counting(UNREAD), ffn=0.5)) == {10, 12, 14, 16}


def test_where_nothing_else_is_left_the_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no group that was asked for is left: rounding decides which"):
        pruned(counting(PLACES["MaxPool"], behind=0), ffn=0.5)


class Counting(nn.Module):
    """Feed-forward layers around an argmax over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 6)) for n in (10, 12, 14, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Adds to every token the place of the largest."""
        x: torch.Tensor = self.table(ids)
        for layer in self.layers[:3]:
            x = x + layer(x)
        x = x + 0.1 * x.argmax(dim=1, keepdim=True).float()
        x = x + self.layers[3](x)
        return x


def test_modules_likewise() -> None:
    torch.manual_seed(0)
    assert cut_sizes(pruned(Counting().eval(), ffn=0.5)) == {16}


def test_every_second_token_is_that_before_it() -> None:
    found = repeated({"ids": np.asarray([[1, 2, 3]]), "x": np.ones((1, 3), np.float32), "n": np.asarray(3)})
    assert found["ids"].tolist() == [[1, 1, 3]] and found["x"].shape == (1, 3) and found["n"] == 3
