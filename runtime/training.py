"""Trains a few tensors of torch for some time: AdamW, a linear warm-up and a linear decay, gradients clipped.

What is trained and what the loss is are the caller's. The best state by the loss on held-back batches is what is left at
the end; where none is better than the start, that is the start. The schedule follows the clock, since the time is what was
given: with s the share of the budget that has passed,

    rate(s) = rate * min(s / warm-up, (1 - s) / (1 - warm-up))

the linear decay that "How to Prune Your Language Model" (arXiv 2312.13547) finds for pruned models, over one cycle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

LOOKS = 8
"""How often the held-back batches are run within the budget."""
LOOKING = 0.15
"""The share of the time that this may take, beside the first and the last."""


@dataclass(frozen=True)
class Schedule:
    """How is trained.

    Attributes:
        rate: the highest learning rate.
        warm_up: the share of the budget in which it rises.
        clip: the largest norm of the gradients.
    """

    rate: float
    warm_up: float = 0.1
    clip: float = 1.0

    def at(self, share: float) -> float:
        """Returns the rate when a share of the budget has passed; a twentieth of the highest at the least."""
        part = min(share / self.warm_up, (1.0 - share) / (1.0 - self.warm_up))
        return self.rate * min(1.0, max(0.05, part))


@dataclass(frozen=True)
class Budget:
    """Time, by a clock that never goes back.

    Attributes:
        began: when it began.
        seconds: how long it is.
        clock: what tells the time.
    """

    began: float
    seconds: float
    clock: Callable[[], float] = time.monotonic

    @property
    def passed(self) -> float:
        """The seconds that have passed."""
        return self.clock() - self.began

    @property
    def share(self) -> float:
        """The share that has passed, 1 at the most."""
        return min(1.0, self.passed / self.seconds)


@dataclass(frozen=True)
class Trained:
    """What training came to.

    Attributes:
        before: the loss on held-back batches at the start.
        after: the least that was seen.
        steps: that were made.
        best: the step behind which the tensors are as they are left; 0 where that is the start.
        stopped: why it ended before its time; None where it did not.
    """

    before: float
    after: float
    steps: int
    best: int
    stopped: str | None = None


def train(
    tensors: Sequence[torch.Tensor],
    loss: Callable[[int], torch.Tensor],
    held: Callable[[], float],
    batches: int,
    budget: Budget,
    schedule: Schedule,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Trains tensors in place, one step at the least; leaves them as they were best.

    Args:
        tensors: leaves that want gradients, in float32 or float64.
        loss: of one batch, a scalar.
        held: the loss on the batches that are held back.
        batches: how many ``loss`` can be asked for; all once in a drawn order, then all again.
        budget: the time; what has passed of it counts.
        schedule: how.
        seed: of the order.
        progress: called with the seconds that have passed, and all.
    """
    rng, order = np.random.default_rng(seed), list[int]()
    optimiser = _adam(tensors, schedule.rate)
    looked = budget.clock()
    before = held()
    looking = budget.clock() - looked
    if not np.isfinite(before):
        return Trained(before, before, 0, 0, "the loss on held-back batches is not finite")
    best, at, kept = before, 0, [t.detach().clone() for t in tensors]
    step, last, stopped = 0, budget.passed, None
    gap = max(budget.seconds / LOOKS, looking / LOOKING)
    while step == 0 or budget.passed + looking < budget.seconds:
        order = order or rng.permutation(batches).tolist()
        stopped = _step(tensors, loss, order.pop(), optimiser, schedule, budget.share)
        if stopped is not None:
            stopped = f"{stopped} at step {step + 1}"
            break
        step += 1
        progress(min(int(budget.passed), int(budget.seconds)), max(1, int(budget.seconds)))
        if budget.passed - last >= gap:
            best, at, kept = _better(tensors, held(), step, (best, at, kept))
            last = budget.passed
    if stopped is None:
        best, at, kept = _better(tensors, held(), step, (best, at, kept))
    _restore(tensors, kept)
    return Trained(before, best, step, at, stopped)


def _adam(tensors: Sequence[torch.Tensor], rate: float) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(list(tensors), lr=rate, weight_decay=0.0)


def _step(
    tensors: Sequence[torch.Tensor],
    loss: Callable[[int], torch.Tensor],
    batch: int,
    optimiser: torch.optim.Optimizer,
    schedule: Schedule,
    share: float,
) -> str | None:
    """Makes one step; returns why it was not made, where the loss or a gradient is not finite."""
    import torch

    for group in optimiser.param_groups:
        group["lr"] = schedule.at(share)
    optimiser.zero_grad()
    value = loss(batch)
    if not bool(torch.isfinite(value)):
        return "the loss was not finite"
    value.backward()  # type: ignore[no-untyped-call]
    if not bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(list(tensors), schedule.clip))):
        return "a gradient was not finite"
    optimiser.step()
    return None


def _better(
    tensors: Sequence[torch.Tensor], value: float, step: int, known: tuple[float, int, list[torch.Tensor]]
) -> tuple[float, int, list[torch.Tensor]]:
    """Returns the least loss, its step and the state there; NaN is never less."""
    return (value, step, [t.detach().clone() for t in tensors]) if value < known[0] else known


def _restore(tensors: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]) -> None:
    import torch

    with torch.no_grad():
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)


def divergence(logits: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Returns sum over rows of KL(dense || other), for logits [n, v]."""
    import torch

    wanted, found = (torch.log_softmax(x.float(), dim=-1) for x in (dense, logits))
    return (wanted.exp() * (wanted - found)).sum()


def squares(values: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Returns |dense - other|^2, of arrays of one shape."""
    return (values.float() - dense.float()).square().sum()
