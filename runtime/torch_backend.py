"""Moments of activations in torch: what a measured ONNX graph computes, on the device where the activations are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class BatchMoments:
    """Moments of one batch, as ``Moments.add_block_rows`` takes them.

    Attributes:
        rows: number of rows.
        count: the sum of their weights.
        total: weighted column sums [n].
        second: X^T X by block rows.
    """

    rows: int
    count: float
    total: NDArray[Any]
    second: list[NDArray[Any]]


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


def batch_moments(x: torch.Tensor, bounds: Sequence[int], gain: torch.Tensor | None = None) -> BatchMoments:
    """Returns the moments of the rows ``x`` [r, n].

    Args:
        x: the rows, float32.
        bounds: column bounds of the blocks of X^T X, of which the upper triangle is computed.
        gain: factor of each row [r, 1]; moments are weighted by its square.
    """
    rows = len(x)
    if gain is None:
        count, total = float(rows), x.sum(0)
    else:
        x = x * gain
        count, total = float((gain * gain).sum()), (gain * x).sum(0)
    second = [(x[:, low:high].T @ x[:, low:]).cpu().numpy() for low, high in pairwise(bounds)]
    return BatchMoments(rows, count, total.cpu().numpy(), second)


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
