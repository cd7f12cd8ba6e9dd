"""What the weights that stay become: small functions on moments, each for one consumer.

    none             left alone
    bias             the mean of what is lost goes to the bias                          FLAP (arXiv 2312.11983)
    scaling          one factor a kept block, by least squares                          Kwon et al. (arXiv 2204.09656)
    liar             least squares for all kept weights, bias included                  LIAR (arXiv 2407.13331)
    dense            the same, to the dense model's output                              K-prune (arXiv 2308.03449)
    residual         the same, to the dense model's residual stream                     see `passes.dense_target`

What is fitted is fitted where the moments are (`runtime.arrays`); a repair gives arrays of numpy, a user's own gets them.

A ridge that is not given is chosen on held-back calibration rows, "leave it alone" among the choices. Whatever the repair
and its ridge: where what is fitted to the other rows is worse there than leaving the weights alone, they are left alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.passes.measured import Measured, Repaired
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.scaling import scale_blocks
from liar_opt.runtime.solve import (
    RidgeChoice,
    choose_dense_ridge,
    choose_ridge,
    dense_target_error,
    fit_dense_target,
    repair_weight,
)

DEFAULT_RIDGE = 1e-2
"""Used where there are too few rows to hold any back."""

Channels = NDArray[np.int64]
Repair = Callable[[Measured, Channels, Channels, "float | None"], Repaired]
"""(consumer, kept channels, removed channels, ridge or None to choose it) -> new weights."""
RepairFunction = Callable[[Measured, Channels, Channels], Any]
"""A user's own: (consumer, kept channels, removed channels) -> (new weights [u, m], what to add to the bias [m])."""


def repair_of_function(function: RepairFunction) -> Repair:
    """Makes a repair of a user's function, whose result is checked at every call."""
    name = getattr(function, "__name__", type(function).__name__)

    def repair(consumer: Measured, kept: Channels, removed: Channels, ridge: float | None) -> Repaired:
        expected = (kept.size, consumer.weight.shape[1])
        try:
            weight, bias = (np.asarray(a, dtype=np.float64) for a in function(consumer.on_host(), kept, removed))
        except (TypeError, ValueError) as err:
            raise OptionError(f"repair function '{name}' did not return (weights, bias): {err}") from err
        if weight.shape != expected or bias.shape != expected[1:]:
            raise OptionError(
                f"repair function '{name}' returned weights {list(weight.shape)} and bias {list(bias.shape)}; return "
                f"{list(expected)} and {list(expected[1:])}"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise OptionError(f"repair function '{name}' returned NaN or Inf; return finite weights")
        return Repaired(weight, bias, np.inf, name)

    return repair


def _chosen(consumer: Measured, kept: Channels, removed: Channels, choice: RidgeChoice) -> Repaired:
    statistics = consumer.statistics
    fit = repair_weight(statistics.covariance, statistics.mean, consumer.weight, kept, removed, choice).on_host()
    gap = None if np.isnan(choice.gap) else choice.gap
    return Repaired(fit.weight, fit.bias, fit.ridge_used, choice.kind, fit.raised, fit.explained, gap)


def none(consumer: Measured, kept: Channels, removed: Channels, ridge: float | None) -> Repaired:
    """Leaves the kept weights alone."""
    return _chosen(consumer, kept, removed, RidgeChoice("none", np.inf))


def bias(consumer: Measured, kept: Channels, removed: Channels, ridge: float | None) -> Repaired:
    """Adds the mean of what is lost."""
    if consumer.folds is not None:
        a = consumer.moments.arrays
        lost = a.real(a.take(consumer.weight, removed))
        training, held_back = (a.host(a.take(fold.mean, removed) @ lost) for fold in consumer.folds)
        if np.square(held_back - training).sum() > np.square(held_back).sum():
            return none(consumer, kept, removed, ridge)
    return _chosen(consumer, kept, removed, RidgeChoice("bias", np.inf))


def scaling(consumer: Measured, kept: Channels, removed: Channels, ridge: float | None) -> Repaired:
    """Scales every kept block."""
    consumer = consumer.on_host()
    found = scale_blocks(consumer.statistics, consumer.folds, consumer.weight, consumer.owners, kept, ridge)
    weight = consumer.weight[kept].astype(np.float64) * found.factors[:, None]
    return Repaired(weight, np.zeros(weight.shape[1]), found.ridge, "none" if np.isinf(found.ridge) else "scaling")


def liar(consumer: Measured, kept: Channels, removed: Channels, ridge: float | None) -> Repaired:
    """Fits the kept weights and the bias to the consumer's output on the inputs that it sees."""
    if ridge is None and consumer.folds is not None:
        return _chosen(consumer, kept, removed, choose_ridge(*consumer.folds, consumer.weight, kept, removed))
    if ridge is not None and consumer.folds is not None:
        choice = choose_ridge(*consumer.folds, consumer.weight, kept, removed, [ridge])
        if choice.kind == "none":
            return _chosen(consumer, kept, removed, choice)
    return _chosen(consumer, kept, removed, RidgeChoice("repair", DEFAULT_RIDGE if ridge is None else ridge))


def dense(consumer: Measured, kept: Channels, removed: Channels, ridge: float | None) -> Repaired:
    """Fits to the dense model's target; the ridge pulls towards the local solution, which stays where that does best."""
    a = consumer.moments.arrays
    local, aware, everything = liar(consumer, kept, removed, ridge), consumer.aware, consumer.with_target("all")
    if aware is None or everything is None:
        return local
    used = DEFAULT_RIDGE if ridge is None else ridge
    if min(aware.rows("training"), aware.rows("held_back")) >= 2:
        training, held_back = consumer.with_target("training"), consumer.with_target("held_back")
        assert training is not None and held_back is not None
        if ridge is None:
            used = choose_dense_ridge(training, held_back, kept, local.weight)
        tried = fit_dense_target(*training, kept, local.weight, used)
        alone = a.real(a.take(consumer.weight, kept))
        if dense_target_error(*held_back, kept, tried.weight, tried.bias) > dense_target_error(
            *held_back, kept, alone, np.zeros(alone.shape[1])
        ):
            return none(consumer, kept, removed, ridge)
    fit = fit_dense_target(*everything, kept, local.weight, used).on_host()
    return Repaired(fit.weight, fit.bias, fit.ridge_used, "dense", fit.raised)


REPAIRS: dict[str, Repair] = {
    "liar": liar,
    "dense": dense,
    "residual": dense,
    "scaling": scaling,
    "bias": bias,
    "none": none,
}
AWARE = ("dense", "residual")
"""Repairs that need the dense model to run along; they differ in the target that it gives."""
