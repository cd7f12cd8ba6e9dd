"""Trains a few tensors of torch for some time: AdamW, a linear warm-up and a linear decay, gradients clipped.

What is trained and what the loss is are the caller's. The best state by the loss on held-back batches is what is left at
the end; where none is better than the start, that is the start. The schedule follows the clock, since the time is what was
given: with s the share of the budget that has passed,

    rate(s) = rate * min(s / warm-up, (1 - s) / (1 - warm-up))

the linear decay that "How to Prune Your Language Model" (arXiv 2312.13547) finds for pruned models, over one cycle.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.whole_file import patient_file

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
        used: seconds that an interrupted training has used already.
    """

    began: float
    seconds: float
    clock: Callable[[], float] = time.monotonic
    used: float = 0.0

    @property
    def passed(self) -> float:
        """The seconds that have passed."""
        return self.used + self.clock() - self.began

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


@dataclass
class Standing:
    """Where a training stands.

    Attributes:
        before: the loss on held-back batches at the start.
        looking: seconds that it takes to find it.
        best: the least that was seen.
        kept: the tensors there.
        at: the step behind which that was.
        step: how many were made.
    """

    before: float
    looking: float
    best: float
    kept: list[torch.Tensor]
    at: int = 0
    step: int = 0

    def look(self, tensors: Sequence[torch.Tensor], value: float) -> None:
        """Keeps the state where its loss is the least; NaN is never less."""
        if value < self.best:
            self.best, self.at, self.kept = value, self.step, [t.detach().clone() for t in tensors]


@dataclass(frozen=True)
class KeptTraining:
    """The file from which an interrupted training goes on.

    Attributes:
        path: of the file.
    """

    path: Path

    @functools.cached_property
    def found(self) -> dict[str, Any] | None:
        """What an interrupted training has left; None where there is nothing.

        Raises:
            OptionError: it cannot be read.
        """
        import torch

        if not self.path.is_file():
            return None
        try:
            kept: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
            float(kept["seconds"])
        except Exception as err:  # whatever a broken file raises
            raise self._damaged() from err
        return kept

    @property
    def seconds(self) -> float:
        """What was used of the budget."""
        return 0.0 if self.found is None else float(self.found["seconds"])

    def take_up(self, tensors: Sequence[torch.Tensor], optimiser: torch.optim.Optimizer) -> Standing | None:
        """Gives tensors and optimiser the state in which they were interrupted; None where they were not.

        Raises:
            OptionError: what is kept is not of these tensors.
        """
        if self.found is None:
            return None
        try:
            standing = Standing(**self.found["standing"])
            _restore(tensors, self.found["tensors"])
            optimiser.load_state_dict(self.found["optimiser"])
            standing.kept = [k.to(t).reshape(t.shape) for k, t in zip(standing.kept, tensors, strict=True)]
        except (KeyError, TypeError, ValueError, RuntimeError) as err:
            raise self._damaged() from err
        return standing

    def keep(
        self, tensors: Sequence[torch.Tensor], optimiser: torch.optim.Optimizer, standing: Standing, seconds: float
    ) -> None:
        """Writes how it stands, whole or not at all.

        Raises:
            OptionError: the disk is full.
        """
        import torch

        own = [t.detach() for t in tensors]
        state = {"standing": vars(standing), "tensors": own, "optimiser": optimiser.state_dict(), "seconds": seconds}
        try:
            with patient_file(self.path) as stream:
                torch.save(state, stream)
        except OSError as err:
            raise OptionError(f"'{self.path}' cannot be written ({err.strerror or err}); free space and go on") from err

    def _damaged(self) -> OptionError:
        return OptionError(
            f"'{self.path}' of an earlier run is damaged; remove the folder '{self.path.parent}' and begin again"
        )


def train(
    tensors: Sequence[torch.Tensor],
    loss: Callable[[int], torch.Tensor],
    held: Callable[[], float],
    batches: int,
    budget: Budget,
    schedule: Schedule,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    file: KeptTraining | None = None,
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
        file: where the state is kept whenever the held-back batches are looked at; what is there already is gone on from.
    """
    optimiser = _adam(tensors, schedule.rate)
    now = None if file is None else file.take_up(tensors, optimiser)
    if now is None:
        looked = budget.clock()
        before = held()
        now = Standing(before, budget.clock() - looked, before, [t.detach().clone() for t in tensors])
    if not np.isfinite(now.before):
        return Trained(now.before, now.before, 0, 0, "the loss on held-back batches is not finite")
    last, stopped = budget.passed, None
    gap = max(budget.seconds / LOOKS, now.looking / LOOKING)
    while now.step == 0 or budget.passed + now.looking < budget.seconds:
        number = _batch(now.step, batches, seed)
        stopped = _step(tensors, loss, number, optimiser, schedule, budget.share)
        if stopped is not None:
            stopped = f"{stopped} at step {now.step + 1}"
            break
        now.step += 1
        progress(min(int(budget.passed), int(budget.seconds)), max(1, int(budget.seconds)))
        if budget.passed - last >= gap:
            now.look(tensors, held())
            last = budget.passed
            if file is not None:
                file.keep(tensors, optimiser, now, last)
    if stopped is None:
        now.look(tensors, held())
    _restore(tensors, now.kept)
    return Trained(now.before, now.best, now.step, now.at, stopped)


def _batch(step: int, batches: int, seed: int) -> int:
    """Returns the batch of a step: all in a drawn order, then all in another."""
    turn, place = divmod(step, batches)
    return int(np.random.default_rng([seed, turn]).permutation(batches)[place])


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
