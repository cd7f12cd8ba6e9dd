"""Scores and repairs by name: small functions on moments, so that a user can add one.

A score takes the consumers of one group and returns the blocks to keep; a repair turns a kept set into new weights.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.moments import Moments, Statistics
from liar_opt.runtime.solve import (
    Problem,
    RepairKind,
    RidgeChoice,
    choose_ridge,
    repair_weight,
    score_activation_weighted,
    score_magnitude,
    select_greedy,
    sketched,
)

SELECTION_RIDGE = 1e-3
DEFAULT_RIDGE = 1e-2
"""Used where there are too few rows to hold any back."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One consumer of a group with its moments.

    Attributes:
        weight: W, [n, m], float64 or the model's own type.
        owners: block of each channel, int64 [n].
        moments: of its input x [.., n], all uses pooled.
        target_scale: what the node multiplies x W by.
    """

    weight: NDArray[Any]
    owners: NDArray[np.int64]
    moments: Moments
    target_scale: float = 1.0

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Mean and covariance over all rows."""
        return self.moments.statistics()

    @functools.cached_property
    def folds(self) -> tuple[Statistics, Statistics] | None:
        """The training and the held-back rows, or None where a fold is too small to say anything."""
        if min(self.moments.rows("training"), self.moments.rows("held_back")) < 2:
            return None
        return self.moments.statistics("training"), self.moments.statistics("held_back")

    def errors(self, kept: NDArray[np.int64], removed: NDArray[np.int64], repaired: "Repaired") -> dict[str, float]:
        """Returns the mean squared errors of y = x W over all rows, relative to E|y|^2.

        "none" leaves the kept weights alone, "bias" adds the mean of what is lost, "repair" is ``repaired``. They are
        reported, not computed with: in float32, and E|y|^2 is estimated (``solve.sketched``) where W is large.
        """
        mean, weight, lost = self.statistics.mean, self.weight.astype(np.float32), self.weight[removed].astype(np.float32)
        covariance = self.statistics.covariance.astype(np.float32)
        few = sketched(weight)
        power = float(np.vdot(few, covariance @ few)) + float(np.square(mean @ self.weight).sum()) or 1.0
        bias = float(np.vdot(lost, covariance[np.ix_(removed, removed)] @ lost))
        none = bias + float(np.square(mean[removed] @ self.weight[removed]).sum())
        if repaired.explained is None:
            change = -weight
            change[kept] += repaired.weight.astype(np.float32)
            error = float(np.vdot(change, covariance @ change))
            error += float(np.square(mean[kept] @ repaired.weight - mean @ self.weight + repaired.bias).sum())
        elif repaired.kind == "none":
            error = none
        else:
            error = bias - repaired.explained
        return {"none": none / power, "bias": bias / power, "repair": max(error, 0.0) / power}


Score = Callable[[Sequence[Measured], int, np.random.Generator], NDArray[np.int64]]
"""(consumers, number of blocks to keep, random generator) -> kept blocks, ascending."""


@dataclass(frozen=True, eq=False)
class Repaired:
    """New weights [u, m] and what to add to the bias [m] of one consumer, with what the report says of them.

    ``explained`` is what the new weights take off the error of the bias alone, where that is known.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    ridge: float
    kind: str
    raised: bool = False
    explained: float | None = None


Repair = Callable[[Measured, NDArray[np.int64], NDArray[np.int64], "float | None"], Repaired]
"""(consumer, kept channels, removed channels, ridge or None to choose it) -> new weights."""


def _top(scores: NDArray[np.float64], keep: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(-scores, kind="stable")[:keep]).astype(np.int64)


def _magnitude(consumers: Sequence[Measured], keep: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return _top(np.sqrt(sum(np.square(score_magnitude([c.weight], c.owners)) for c in consumers)), keep)


def _activation_weighted(consumers: Sequence[Measured], keep: int, rng: np.random.Generator) -> NDArray[np.int64]:
    squares = [np.square(score_activation_weighted(c.statistics.mean_square, [c.weight], c.owners)) for c in consumers]
    return _top(np.sqrt(sum(squares)), keep)


def _greedy(consumers: Sequence[Measured], keep: int, rng: np.random.Generator) -> NDArray[np.int64]:
    problems = [Problem(c.statistics.covariance, [c.weight], c.owners, c.target_scale**2) for c in consumers]
    return select_greedy(problems, keep, SELECTION_RIDGE).kept_blocks


def _random(consumers: Sequence[Measured], keep: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return np.sort(rng.permutation(int(consumers[0].owners.max()) + 1)[:keep]).astype(np.int64)


def _chosen(consumer: Measured, kept: NDArray[np.int64], removed: NDArray[np.int64], choice: RidgeChoice) -> Repaired:
    statistics = consumer.statistics
    fit = repair_weight(statistics.covariance, statistics.mean, consumer.weight, kept, removed, choice)
    return Repaired(fit.weight, fit.bias, fit.ridge_used, choice.kind, fit.raised, fit.explained)


def _fixed(kind: RepairKind, ridge: float) -> RidgeChoice:
    return RidgeChoice(kind, ridge, np.nan, np.nan, np.nan)


def _none(consumer: Measured, kept: NDArray[np.int64], removed: NDArray[np.int64], ridge: float | None) -> Repaired:
    return _chosen(consumer, kept, removed, _fixed("none", np.inf))


def _bias(consumer: Measured, kept: NDArray[np.int64], removed: NDArray[np.int64], ridge: float | None) -> Repaired:
    return _chosen(consumer, kept, removed, _fixed("bias", np.inf))


def _liar(consumer: Measured, kept: NDArray[np.int64], removed: NDArray[np.int64], ridge: float | None) -> Repaired:
    if ridge is None and consumer.folds is not None:
        return _chosen(consumer, kept, removed, choose_ridge(*consumer.folds, [consumer.weight], kept, removed))
    return _chosen(consumer, kept, removed, _fixed("repair", DEFAULT_RIDGE if ridge is None else ridge))


SCORES: dict[str, Score] = {
    "greedy": _greedy,
    "activation-weighted": _activation_weighted,
    "magnitude": _magnitude,
    "random": _random,
}
REPAIRS: dict[str, Repair] = {"liar": _liar, "bias": _bias, "none": _none}


def lookup(kind: str, table: dict[str, Any], name: str) -> Any:
    """Returns an entry by name.

    Raises:
        OptionError: there is none of that name; the names are listed.
    """
    if name not in table:
        raise OptionError(f"{kind} '{name}' is unknown; choose one of {', '.join(table)}")
    return table[name]
