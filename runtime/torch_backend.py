"""Moments of activations in torch: what a measured ONNX graph computes, on the device where the activations are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.moments import Moments

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class BatchMoments:
    """Moments of one batch, or of several, where the activations are.

    Attributes:
        rows: number of rows.
        count: the sum of their weights, a tensor of one element.
        total: weighted column sums [n].
        second: X^T X by block rows.
    """

    rows: int
    count: torch.Tensor
    total: torch.Tensor
    second: Sequence[torch.Tensor]

    def double(self) -> BatchMoments:
        """Returns a copy in float64."""
        return BatchMoments(self.rows, self.count.double(), self.total.double(), [s.double() for s in self.second])

    def plus(self, other: BatchMoments) -> BatchMoments:
        """Returns the sum of both, in the memory of this one."""
        second = [own.add_(more) for own, more in zip(self.second, other.second, strict=True)]
        return BatchMoments(self.rows + other.rows, self.count.add_(other.count), self.total.add_(other.total), second)


class RunningMoments:
    """Adds batches to ``Moments`` in float64: on the CPU one by one, on a device there, handed over once.

    Where the solver is on that device they stay there (`runtime.arrays`).

    Args:
        moments: what is added to.
        bounds: column bounds of the blocks of X^T X.
    """

    def __init__(self, moments: Moments, bounds: Sequence[int]) -> None:
        self._moments, self._bounds = moments, bounds
        self._there: dict[bool, BatchMoments] = {}

    def add(self, batch: BatchMoments, held_back: bool) -> None:
        """Adds a batch.

        Raises:
            OptionError: NaN or Inf among its sums, on the CPU.
        """
        if batch.total.device.type == "cpu":
            self._hand_over(batch, held_back)
        elif held_back in self._there:
            self._there[held_back] = self._there[held_back].plus(batch)
        else:
            self._there[held_back] = batch.double()

    def finish(self) -> None:
        """Hands over what is on a device.

        Raises:
            OptionError: NaN or Inf among the sums.
        """
        for held_back, batch in self._there.items():
            self._hand_over(batch, held_back)
        self._there.clear()

    def _hand_over(self, batch: BatchMoments, held_back: bool) -> None:
        self._moments.add_block_rows(float(batch.count), batch.total, batch.second, self._bounds, held_back, batch.rows)


def real_rows(x: torch.Tensor, axis: int, mask: NDArray[np.bool_] | None) -> torch.Tensor:
    """Returns the rows of an activation as float32 [r, n].

    Args:
        x: the activation, contracted over ``axis``.
        axis: the axis of its channels.
        mask: bool [rows], False at padding; None keeps all.
    """
    import torch

    rows = x.movedim(axis, -1).reshape(-1, x.shape[axis])
    if mask is not None:
        rows = rows[torch.from_numpy(mask).to(rows.device)]
    return rows.float()


def under_kernel(
    x: torch.Tensor, kernel: Sequence[int], steps: Sequence[int], dilations: Sequence[int], pads: Sequence[int]
) -> torch.Tensor:
    """Returns what lies under a kernel at every place, [b, places n, ..] of an activation [b, n, ..].

    Args:
        x: the activation.
        kernel: its extent along each axis behind the channels.
        steps: from one place to the next; as long, as are the dilations.
        dilations: from one element of the kernel to the next.
        pads: zeros before each axis, then behind each.
    """
    import torch

    n = len(kernel)
    around = [pad for i in reversed(range(n)) for pad in (pads[i], pads[n + i])]  # torch says the last axis first
    padded = torch.nn.functional.pad(x, around)
    parts = []
    for place in itertools.product(*map(range, kernel)):
        spans = [
            slice(at * wide, size - (last - 1 - at) * wide, step)
            for at, wide, size, last, step in zip(place, dilations, padded.shape[2:], kernel, steps, strict=True)
        ]
        parts.append(padded[(slice(None), slice(None), *spans)])
    return torch.cat(parts, dim=1)


def batch_moments(x: torch.Tensor, bounds: Sequence[int], gain: torch.Tensor | None = None) -> BatchMoments:
    """Returns the moments of the rows ``x`` [r, n].

    Args:
        x: the rows, float32.
        bounds: column bounds of the blocks of X^T X, of which the upper triangle is computed.
        gain: factor of each row [r, 1]; moments are weighted by its square.
    """
    import torch

    rows = len(x)
    if gain is None:
        count, total = x.new_tensor(rows, dtype=torch.float64), x.sum(0)
    else:
        x = x * gain
        count, total = (gain * gain).sum(), (gain * x).sum(0)
    return BatchMoments(rows, count, total, [x[:, low:high].T @ x[:, low:] for low, high in pairwise(bounds)])


def stream_gain(
    x: torch.Tensor,
    terms: Sequence[torch.Tensor],
    weight: NDArray[Any],
    offset: NDArray[Any],
    projection: NDArray[Any],
    floor: float,
) -> torch.Tensor:
    """Returns 1 / sqrt(variance of the residual stream) of each row [r, 1], the stream seen through a projection.

    Args:
        x: the consumer's input [r, n].
        terms: what else is added to the stream [r, m].
        weight: W R, [n, k].
        offset: the constants R, [k].
        projection: R, [m, k].
        floor: added to the variance.
    """
    import torch

    def there(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(x.device)

    seen = x @ there(weight) + there(offset)
    for term in terms:
        seen = seen + term @ there(projection)
    return torch.rsqrt((seen * seen).mean(-1, keepdim=True) + floor)
