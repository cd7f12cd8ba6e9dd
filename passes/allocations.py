"""How a goal is shared out among the groups: widths from what each width costs and what it loses.

Every group comes with its :class:`Candidates`: the widths that it may have and, for each, what it costs in the target's
currency (parameters, operations, seconds) and the error after repair. An allocation picks one width of each so that the
costs add up to the goal, as nearly as the steps allow:

    uniform   the same share of every group
    curves    least sum of errors: the multiple-choice knapsack, by dynamic programming
    global    one threshold for all blocks' scores, each divided by its group's mean
    flap      one threshold for all blocks' scores, standardised within their group: (s - mean) / deviation, the deviation
              over single channels (FLAP, arXiv 2312.11983)

Errors are in one currency for all kinds: the mean square that is lost, relative to the variance of the residual stream
behind the consumer (`passes.measure_curves`). Small errors of different groups add up there, and the normalisation that
follows divides by that variance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
BISECTIONS = 60
PARTS = 2048
"""Of the goal: costs are rounded to them."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """What one group may become.

    Attributes:
        name: of the group.
        widths: numbers of blocks, ascending; the last is all of them.
        costs: what each width costs, [w].
        errors: what each width loses, [w]; zeros where nothing was measured.
        values: the score of every block, [k]; empty where nothing was measured.
        deviation: the standard deviation of the score over channels; None: that of the values.
    """

    name: str
    widths: Indices
    costs: Array
    errors: Array
    values: Array
    deviation: float | None = None

    @property
    def size(self) -> int:
        """Number of blocks."""
        return int(self.widths[-1])

    def nearest(self, width: float) -> int:
        """Returns the index of the width nearest to a number, the larger of two."""
        return int(np.flatnonzero(np.abs(self.widths - width) == np.abs(self.widths - width).min())[-1])


Allocation = Callable[[Sequence[Candidates], float], dict[str, int]]
"""(candidates, what all groups together may cost) -> width by group name."""


def uniform(candidates: Sequence[Candidates], goal: float) -> dict[str, int]:
    """The same share of every group; single steps settle the rest."""
    return _widths(candidates, _bisected(candidates, goal, lambda share: [m.nearest(share * m.size) for m in candidates]))


def curves(candidates: Sequence[Candidates], goal: float) -> dict[str, int]:
    """The widths of least total error: dynamic programming over the goal in equal parts; single steps settle the rest."""
    unit = max(goal, 0.0) / PARTS or 1.0
    best = np.zeros(PARTS + 1)  # least error of the groups so far that costs so many parts at the most
    picks = np.zeros((len(candidates), PARTS + 1), dtype=np.int64)
    for choice, picked in zip(candidates, picks, strict=True):
        longer = np.full(PARTS + 1, np.inf)
        for index, parts in enumerate(np.rint(choice.costs / unit).astype(np.int64)):
            if parts > PARTS:
                break
            tried = best[: PARTS + 1 - parts] + choice.errors[index]
            better = tried <= longer[parts:]  # the wider of equals
            longer[parts:][better] = tried[better]
            picked[parts:][better] = index
        best = longer
    chosen, left = [0] * len(candidates), PARTS
    for place in reversed(range(len(candidates)) if np.isfinite(best[PARTS]) else ()):
        chosen[place] = int(picks[place, left])
        left -= int(np.rint(candidates[place].costs[chosen[place]] / unit))
    return _widths(candidates, _settled(candidates, goal, chosen))


def globally(candidates: Sequence[Candidates], goal: float) -> dict[str, int]:
    """One threshold for scores in units of their group's mean."""
    return _by_threshold(candidates, [m.values / (float(m.values.mean()) or 1.0) for m in candidates], goal)


def flap(candidates: Sequence[Candidates], goal: float) -> dict[str, int]:
    """One threshold for standardised scores.

    FLAP standardises over the channels of a layer and averages over the channels of a head then. Heads, being averages, lie
    near zero so, and few of them fall below a threshold that many channels fall below.
    """
    spread = [float(m.values.std()) if m.deviation is None else m.deviation for m in candidates]
    values = [(m.values - m.values.mean()) / (s or 1.0) for m, s in zip(candidates, spread, strict=True)]
    return _by_threshold(candidates, values, goal)


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "curves": curves, "global": globally, "flap": flap}
MEASURED = ("curves", "global", "flap")
"""Allocations that need the dense model measured."""


def _by_threshold(candidates: Sequence[Candidates], values: Sequence[Array], goal: float) -> dict[str, int]:
    pooled = np.unique(np.concatenate(values))

    def at(share: float) -> list[int]:
        # share 1 keeps everything: the threshold is below the lowest value then.
        place = round((1.0 - share) * pooled.size)
        threshold = pooled[place] if place < pooled.size else np.inf
        return [m.nearest(int(np.count_nonzero(v >= threshold))) for m, v in zip(candidates, values, strict=True)]

    return _widths(candidates, _bisected(candidates, goal, at))


def _widths(candidates: Sequence[Candidates], chosen: Sequence[int]) -> dict[str, int]:
    return {m.name: int(m.widths[i]) for m, i in zip(candidates, chosen, strict=True)}


class _Step(NamedTuple):
    gain: float
    size: float
    place: int
    choice: int
    spent: float


def _bisected(candidates: Sequence[Candidates], goal: float, at: Callable[[float], list[int]]) -> list[int]:
    """Bisects the generosity of ``at``, in [0, 1], to the most that stays within the goal; then settles."""
    best, low, high = at(0.0), 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        chosen = at(middle)
        if _cost(candidates, chosen) <= goal:
            best, low = chosen, middle
        else:
            high = middle
    return _settled(candidates, goal, best)


def _settled(candidates: Sequence[Candidates], goal: float, chosen: Sequence[int]) -> list[int]:
    """Takes single steps towards the goal while they bring the costs nearer, those first that gain the most."""
    best, spent = [*chosen], _cost(candidates, chosen)
    direction = 1 if spent < goal else -1
    while True:
        steps = []
        for place, choice in enumerate(candidates):
            index = best[place] + direction
            if 0 <= index < choice.widths.size:
                more = float(choice.costs[index] - choice.costs[best[place]])
                if more and abs(spent + more - goal) < abs(spent - goal):
                    gained = float(choice.errors[best[place]] - choice.errors[index])
                    # Where nothing was measured the largest step comes first: it settles the most.
                    steps.append(_Step(gained / abs(more), abs(more), place, index, spent + more))
        if not steps:
            return best
        step = max(steps, key=lambda s: (s.gain, s.size))
        best[step.place], spent = step.choice, step.spent


def _cost(candidates: Sequence[Candidates], chosen: Sequence[int]) -> float:
    return sum(float(m.costs[i]) for m, i in zip(candidates, chosen, strict=True))
