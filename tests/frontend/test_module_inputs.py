"""Batches by position, with and without labels, and the sentences about those that do not fit."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from liar_opt.frontend.module_inputs import named_batch, named_source, required_tensors
from liar_opt.runtime.errors import OptionError

X, Y, MASK, LABEL = torch.ones(3, 5), torch.zeros(3, 5, 2), torch.ones(3, 5), torch.arange(3)


class One(nn.Module):
    def forward(self, x: Any, labels: Any = None) -> Any:
        return x


class Two(nn.Module):
    def forward(self, x: Any, y: Any, mask: Any = None) -> Any:
        return x


class Open(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def shapes(batch: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in batch.items()}


@pytest.mark.parametrize(
    ("module", "batch", "expected"),
    [
        (One(), X, {"x": (3, 5)}),
        (One(), X.numpy(), {"x": (3, 5)}),
        (One(), (X,), {"x": (3, 5)}),
        (One(), (X, LABEL), {"x": (3, 5)}),
        (One(), (X, ["cat", "dog", "cow"]), {"x": (3, 5)}),
        (One(), [X, {"boxes": Y}], {"x": (3, 5)}),
        (One(), ({"x": X}, LABEL), {"x": (3, 5)}),
        (One(), {"x": X, "mask": None}, {"x": (3, 5)}),
        (Two(), (X, Y), {"x": (3, 5), "y": (3, 5, 2)}),
        (Two(), (X, Y, MASK), {"x": (3, 5), "y": (3, 5, 2), "mask": (3, 5)}),
        (Two(), (X, Y, MASK, LABEL), {"x": (3, 5), "y": (3, 5, 2), "mask": (3, 5)}),
        (Two(), ([X, Y], {"mask": MASK}), {"x": (3, 5), "y": (3, 5, 2), "mask": (3, 5)}),
        (nn.Sequential(nn.Identity()), X, {"input": (3, 5)}),
    ],
)
def test_positions_are_arguments(module: nn.Module, batch: Any, expected: dict[str, tuple[int, ...]]) -> None:
    assert shapes(named_batch(module, batch, "example")) == expected


@pytest.mark.parametrize(
    ("module", "batch", "sentence"),
    [
        (Two(), (X,), r"has 1 items \(float32 \[3, 5\]\), and Two.forward takes 2 to 3: x, y, mask"),
        (Two(), (X, Y, MASK, LABEL, LABEL), "has 5 items"),
        (One(), (X, torch.zeros(7)), "has 2 items"),  # a label has an entry for each sample
        (Two(), (X, Y, LABEL), r"\(int64 \[3\]\) may be a label, or the argument 'mask' of Two.forward"),
        (Open(), X, "Open.forward names no arguments; give dicts of tensors by name"),
        (One(), "text", "example is of type 'str'; give a tensor"),
    ],
)
def test_what_does_not_fit_is_said(module: nn.Module, batch: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        named_batch(module, batch, "example")


def test_sources_of_batches() -> None:
    pairs = TensorDataset(torch.randn(7, 5), torch.arange(7))
    for source in ([(X, LABEL), (X, LABEL)], DataLoader(pairs, batch_size=3), iter([X, X]), pairs, (X, X, X)):
        named = named_source(One(), source, batch_size=4)
        assert next(iter(named)).keys() == {"x"}, "looking at the first batch must not lose it"
        assert all(batch.keys() == {"x"} for batch in named)
    generator = named_source(One(), (b for b in [X, 2 * X]))
    assert next(iter(generator))["x"].mean() == 1 and [float(b["x"].mean()) for b in generator] == [1, 2]
    assert shapes(named_source(Two(), (X, Y))) == {"x": (3, 5), "y": (3, 5, 2)}
    texts, path = ["one", "two"], "calibration.npz"
    assert named_source(One(), texts) == texts and named_source(One(), path) is path
    with pytest.raises(OptionError, match="item 1 of the calibration data has 3 items"):
        named_source(One(), [X, (X, LABEL, LABEL)])


def test_inputs_are_one_tensor_each() -> None:
    required_tensors(One(), {"x": [[1, 2], [3, 4]], "y": np.ones(3)}, "the example")
    for value, kind in (([X, Y], "list"), ({"a": X}, "dict")):
        with pytest.raises(OptionError, match=f"input 'x' is a {kind} of tensors in the example"):
            required_tensors(One(), {"x": value}, "the example")
    with pytest.raises(OptionError, match="input 'x' of the example is of type 'str' and no tensor"):
        required_tensors(One(), {"x": "text"}, "the example")
