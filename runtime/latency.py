"""Latency of models side by side: interleaved runs in one process, so that drift of the machine hits both alike."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Runs(Protocol):
    """What can be timed: a session, or something with its face."""

    inputs: list[str]

    def run(self, feeds: Mapping[str, Any]) -> Any:
        """Runs once."""


@dataclass(frozen=True)
class Latency:
    """Median seconds of one run of each model, and the batch that they ran."""

    seconds: tuple[float, ...]
    runs: int
    batch: str

    @property
    def speedup(self) -> float:
        """The first model's time over the last one's."""
        return self.seconds[0] / self.seconds[-1]


def measure_latency(
    sessions: Sequence[Runs],
    feeds: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    budget: float = 2.0,
    least: int = 5,
    most: int = 200,
) -> Latency:
    """Times ``sessions`` on ``feeds``, one after the other, round by round.

    Args:
        sessions: models with the same inputs.
        feeds: one batch, or one for each session.
        budget: seconds to spend, about.
        least: rounds at the least, whatever the budget.
        most: rounds at the most.
    """
    batches = [feeds] * len(sessions) if isinstance(feeds, Mapping) else list(feeds)
    for session, batch in zip(sessions, batches, strict=True):
        session.run(batch)
    times: list[list[float]] = [[] for _ in sessions]
    start = time.perf_counter()
    while len(times[0]) < least or (time.perf_counter() - start < budget and len(times[0]) < most):
        for session, batch, own in zip(sessions, batches, times, strict=True):
            began = time.perf_counter()
            session.run(batch)
            own.append(time.perf_counter() - began)
    shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in batches[0].items() if k in sessions[0].inputs)
    return Latency(tuple(float(np.median(t)) for t in times), len(times[0]), shapes)
