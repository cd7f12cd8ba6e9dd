"""Moments of activations in torch: added up batch by batch, or on a device and handed over once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.torch_backend import RunningMoments, batch_moments, real_rows

BOUNDS = (0, 4, 11)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
def test_batches_add_up(weighted: bool, device: str) -> None:
    rng = np.random.default_rng(0)
    moments = Moments(11)
    sums = RunningMoments(moments, BOUNDS)
    seen: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {False: [], True: []}
    for held_back in (False, True, False, False):
        x = rng.standard_normal((2, 7, 11)).astype(np.float32)
        gain = rng.random((14, 1)).astype(np.float32) if weighted else np.ones((14, 1), np.float32)
        rows = real_rows(torch.from_numpy(x).to(device), -1, None)
        sums.add(batch_moments(rows, BOUNDS, torch.from_numpy(gain).to(device) if weighted else None), held_back)
        seen[held_back].append((x.reshape(14, 11).astype(np.float64), gain.astype(np.float64)))
    sums.finish()
    sums.finish()  # hands over once
    for held_back in (False, True):
        x = np.concatenate([x for x, _ in seen[held_back]])
        weight = np.concatenate([g for _, g in seen[held_back]]) ** 2
        found = moments.statistics("held_back" if held_back else "training")
        np.testing.assert_allclose(found.count, weight.sum(), rtol=1e-6)
        np.testing.assert_allclose(found.mean, (weight * x).sum(0) / weight.sum(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.uncentred, (weight * x).T @ x / weight.sum(), rtol=1e-4, atol=1e-5)
        assert moments.rows("held_back" if held_back else "training") == len(x)


def test_sums_of_batches_are_float64() -> None:
    first = batch_moments(torch.full((1, 1), 4096.0), (0, 1)).double()
    for _ in range(3):
        first = first.plus(batch_moments(torch.ones(1, 1), (0, 1)))
    assert float(first.second[0]) == 4096.0**2 + 3  # float32 ends at 2^24
    assert (first.rows, float(first.count), float(first.total)) == (4, 4.0, 4099.0)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_finite_is_refused(device: str) -> None:
    sums = RunningMoments(Moments(2), (0, 2))
    with pytest.raises(OptionError):
        sums.add(batch_moments(torch.tensor([[1.0, torch.inf]], device=device), (0, 2)), False)
        sums.finish()
