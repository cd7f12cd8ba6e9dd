"""How far apart two sets of outputs are, and how far they may be.

Two claims are kept apart. *Exact*: a cut graph computes what the masked original computes, to rounding
(:data:`TOLERANCES`, by the model's dtype). *Approximate*: the pruned model's outputs are near the dense model's; how near
is measured and reported, never asserted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import CheckError, ModelError

Array = NDArray[Any]
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Largest difference relative to the largest magnitude of the reference, by the least precise dtype of the weights."""
LOOSEST = {"float64": 1e-8, "float32": 1e-3, "float16": 1e-1, "bfloat16": 4e-1}
"""What a model that magnifies rounding by itself may differ by at the most; an index cut wrongly differs by far more."""
SIGMOID_STEP = 2.0**-22
"""ONNX Runtime computes a sigmoid to so much, however small it is: as a half and what is over it."""
REPEATED = 1e-2
"""What two runs of one model may differ by: more than the order of a device's sums makes."""
ROUNDING_FACTOR = 16.0
"""Allowed over the effect of one rounding of every weight: sums of another length round in another order at every node."""
CHAOTIC_FACTOR = 4.0
"""The same where one rounding alone moves the outputs by more than ``LOOSEST``, up to ten times that."""


def allowed_difference(dtype: str, rounding: float) -> float:
    """Returns the tolerance for a model whose outputs move by ``rounding`` when each weight is rounded once."""
    if rounding == 0.0:
        return TOLERANCES[dtype]
    most = min(ROUNDING_FACTOR * rounding, LOOSEST[dtype])
    return max(TOLERANCES[dtype], most, min(CHAOTIC_FACTOR * rounding, 10 * LOOSEST[dtype]))


def relative_difference(actual: Array, reference: Array, step: float = 0.0) -> float:
    """Returns max |actual - reference| / max |reference| (absolute where the reference is all zero); inf on a mismatch.

    Positions at which both are the same infinity or NaN are equal. A difference of no more than ``step`` stays absolute.
    """
    if actual.shape != reference.shape:
        return float("inf")
    if reference.size == 0:
        return 0.0
    if reference.dtype.kind not in "fc" and reference.dtype.name != "bfloat16":
        return 0.0 if np.array_equal(actual, reference) else float("inf")
    x, y = actual.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(finite, np.isfinite(x)) or not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    scale, most = float(np.abs(y[finite]).max()) or 1.0, float(np.abs(x[finite] - y[finite]).max())
    return most if most <= step else most / scale


def require_close(
    actual: Mapping[str, Array],
    reference: Mapping[str, Array],
    dtype: str,
    what: str,
    rounding: float = 0.0,
    steps: Mapping[str, float] | None = None,
) -> float:
    """Returns the largest relative difference over all outputs.

    Args:
        actual: outputs by name.
        reference: what they should be.
        dtype: the least precise type of the weights.
        what: names the check.
        rounding: how far the outputs move by rounding alone, where that is known.
        steps: the steps, whatever the size of the numbers, in which outputs are computed.

    Raises:
        CheckError: it is above the tolerance of ``dtype``.
    """
    worst, allowed = 0.0, allowed_difference(dtype, rounding)
    for name, expected in reference.items():
        measured = relative_difference(actual[name], expected, (steps or {}).get(name, 0.0))
        if not measured <= allowed:
            raise CheckError(
                f"{what}: output '{name}' differs by {measured:.2e}, allowed {allowed:.0e} in {dtype}; "
                "nothing was written; please report the model's structure as a bug"
            )
        worst = max(worst, measured)
    return worst


def require_repeatable(first: Mapping[str, Array], second: Mapping[str, Array]) -> None:
    """Checks that two runs of one model on the same inputs gave the same.

    Raises:
        ModelError: they did not.
    """
    for name, value in first.items():
        if not relative_difference(second[name], value) <= REPEATED:
            raise ModelError(
                f"the model gives another output '{name}' each time it runs on the same inputs: it draws random numbers, "
                "and what is left of it cannot be compared with it; switch that off, or give what is drawn as an input"
            )


@dataclass(frozen=True)
class OutputDifference:
    """How far the pruned model is from the dense one, on one output.

    Attributes:
        relative_rms: sqrt(mean |x - y|^2 / mean |y|^2).
        cosine: mean cosine over the last axis, rows that are padding left out; nan for outputs of rank 0.
        rows: number of rows.
        changed_top1: share of the rows in which another position is the largest, where the output holds logits or
            probabilities; None elsewhere.
    """

    relative_rms: float
    cosine: float
    rows: int
    changed_top1: float | None = None


def output_rows(output: Array, mask: NDArray[np.bool_] | None, most: int | None = None) -> Array:
    """Returns the rows of an output that are real, [rows, width]: its last axis is the width.

    Args:
        output: of rank 1 or more.
        mask: [b, s] or [b], true where a row is real; where its shape does not fit, all rows are.
        most: so many rows at most, spread over all; None: all of them.
    """
    rows = output.reshape(-1, output.shape[-1])
    if mask is None or output.ndim < 2 or output.shape[0] != mask.shape[0]:
        real = None
    else:
        fits = output.ndim > mask.ndim and output.shape[: mask.ndim] == mask.shape
        own = mask if fits or mask.ndim == 1 else np.asarray(mask.any(axis=1))
        each = math.prod(output.shape[own.ndim : -1])
        real = np.flatnonzero(np.repeat(own.reshape(-1), each))
    if most is not None:
        count = len(rows) if real is None else len(real)
        spread = np.unique(np.linspace(0, count - 1, most).round().astype(np.int64)) if count else np.arange(0)
        real = spread if real is None else real[spread]
    return rows if real is None else rows[real]


def holds_logits(name: str, shape: Sequence[int], vocabulary: int | None = None, made_by: str | None = None) -> bool:
    """Returns whether the largest number of a row of an output decides: rows are logits or probabilities.

    They are where the output's name says so ("logits"), where it is as wide as the vocabulary, and where a softmax makes
    it; other rows are embeddings.

    Args:
        name: of the output.
        shape: [b, classes] or [b, s, classes]; others hold none in their last axis.
        vocabulary: rows of the embedding table, where there is one.
        made_by: the operator that computes it, where that is known.
    """
    if len(shape) not in (2, 3) or shape[-1] < 2:
        return False
    return "logit" in name.lower() or shape[-1] == vocabulary or made_by in ("Softmax", "LogSoftmax")


def common_part(one: Array, other: Array) -> tuple[Array, Array]:
    """Returns two arrays of one rank as far as both go along every axis."""
    inside = tuple(slice(min(n, m)) for n, m in zip(one.shape, other.shape, strict=True))
    return one[inside], other[inside]


class DifferenceMeter:
    """Adds up output differences over batches.

    Attributes:
        uneven: outputs whose size is another, since it depends on the data (the length of speech); they are compared as far
            as both go.
    """

    def __init__(self) -> None:
        self.uneven: set[str] = set()
        self._square: dict[str, float] = {}
        self._power: dict[str, float] = {}
        self._cosine: dict[str, float] = {}
        self._rows: dict[str, int] = {}
        self._changed: dict[str, int] = {}

    def add(self, name: str, actual: Array, reference: Array, mask: NDArray[np.bool_] | None, logits: bool = False) -> None:
        """Adds one batch of one output.

        Args:
            name: of the output.
            actual: what the pruned model gives.
            reference: what the dense one gives.
            mask: [b, s] or [b], which rows are real, where its shape fits.
            logits: whether its rows are logits or probabilities, so that the largest decides.
        """
        if (reference.dtype.kind != "f" and reference.dtype.name != "bfloat16") or reference.ndim == 0:
            return
        if actual.shape != reference.shape:
            self.uneven.add(name)
            actual, reference = common_part(actual, reference)
        x, y = (output_rows(a, mask).astype(np.float64) for a in (actual, reference))
        lengths = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
        norms = lengths[0] * lengths[1]
        equal = np.where(lengths[0] == lengths[1], 1.0, 0.0)  # where a row is all zero: are both?
        cosines = np.divide((x * y).sum(axis=1), norms, out=equal, where=norms != 0)
        self._square[name] = self._square.get(name, 0.0) + float(((x - y) ** 2).sum())
        self._power[name] = self._power.get(name, 0.0) + float((y**2).sum())
        self._cosine[name] = self._cosine.get(name, 0.0) + float(cosines.sum())
        self._rows[name] = self._rows.get(name, 0) + len(x)
        if logits and x.shape[1] > 1:
            self._changed[name] = self._changed.get(name, 0) + int((x.argmax(axis=1) != y.argmax(axis=1)).sum())

    def result(self) -> dict[str, OutputDifference]:
        """Returns the differences by output name."""
        return {
            name: OutputDifference(
                float(np.sqrt(self._square[name] / (self._power[name] or 1.0))),
                self._cosine[name] / max(rows, 1),
                rows,
                self._changed[name] / max(rows, 1) if name in self._changed else None,
            )
            for name, rows in self._rows.items()
        }
