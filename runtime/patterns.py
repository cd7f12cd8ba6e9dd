"""Patterns of zeros inside a weight that keeps its shape, and the ways to come to them: arrays in, arrays out.

A weight W [n, m] contracts its inputs x in R^n: y = x W. Of the moments H = E[x^T x] (n x n) and a target C = E[x^T y*]
(n x m, the output y* that the layer should have) the error of other weights V is

    E|y* - x V|^2 = tr(V^T H V) - 2 tr(C^T V) + E|y*|^2,          C = H W where nothing before it has changed

    magnitude    |w|                                                 weights that stay are left alone
    wanda        |w| sqrt(H_ii), output by output                    Wanda (arXiv 2306.11695); likewise
    sparsegpt    w^2 / [U_ii]^2, input by input, the error of each   SparseGPT (arXiv 2301.00774)
                 pushed into the inputs to come; H^-1 = U^T U
    fista        1/2 E|y* - x V|^2 + lambda |V|_1 by FISTA, lambda   FISTAPruner (arXiv 2408.03728)
                 by bisection, rounded to the pattern
    refit        as wanda, and those that stay by least squares      LIAR's repair, for any pattern

What of these is ours is said in docs/patterns.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular

from liar_opt.runtime.errors import OptionError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
RIDGE = 0.01
"""Relative to the mean of the diagonal, as SparseGPT has it."""
TOGETHER = 128
"""Inputs whose zeros are chosen together, and whose errors are handed on at once, by SparseGPT."""
STEPS = 32
"""Conjugate gradients, at the most: each lowers the error, so that fewer are no mistake."""
ENOUGH = 1e-2
"""The part of all that the steps have gained that a step must gain for another to be made."""
LITTLE = 1e-3
"""Likewise, where the weights are what is kept, and not compared alone."""
SMALL = 1e-5
"""Likewise, of what the weights are worth as they are by then: those that come from a like problem have little to gain."""
ITERATIONS = 5
"""Of FISTA for each lambda, from where the one before has ended; twice as many on all outputs, for the last lambda."""
BISECTIONS = 6
SOME = 4
"""One output in so many is looked at, to find lambda and to compare what may be kept; the result is solved for on all. Of
blocks all are: they are solved for at once, and zeros are not spread alike over outputs."""
FEWEST = 64
"""Outputs that are looked at, at the least."""
SIZE = r"[0-9]{1,18}"
"""How a number of weights in a pattern is written; more digits no weight has."""
NEAR = 0.002
"""How far the share of zeros may be from what is asked for, where a bisection ends; rounding does the rest."""


@dataclass(frozen=True)
class Pattern:
    """Where zeros have to be.

    Attributes:
        kind: "share" of all weights, "n:m" (of each m inputs of an output in a row n stay), or "blocks".
        ratio: share of the weights that become zero.
        keep: n.
        of: m.
        rows: outputs of a block.
        columns: inputs of a block.
        text: as it was asked for.
    """

    kind: Literal["share", "n:m", "blocks"]
    ratio: float
    keep: int = 0
    of: int = 1
    rows: int = 1
    columns: int = 1
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Reads 2:4, blocks=8x8:0.5 or 0.5.

        Raises:
            OptionError: it is none of these, or what it asks for makes no sense.
        """
        given = text.strip()
        among = re.fullmatch(rf"({SIZE}):({SIZE})", given)
        blocks = re.fullmatch(rf"blocks=({SIZE})x({SIZE}):(.+)", given)
        if among:
            keep, of = int(among[1]), int(among[2])
            if not 1 <= keep < of:
                raise OptionError(
                    f"pattern {given} keeps {keep} of each {of} weights; N:M keeps at least 1 and fewer than M, as 2:4 does"
                )
            return cls("n:m", 1.0 - keep / of, keep, of, text=given)
        try:
            ratio = float(blocks[3] if blocks else given)
        except ValueError as err:
            raise OptionError(
                f"pattern '{given}' is not understood; give N:M as 2:4, blocks=RxC:RATIO as blocks=8x8:0.5, or a RATIO, 0.5"
            ) from err
        if not 0.0 < ratio < 1.0:
            raise OptionError(
                f"pattern {given}: the ratio {ratio:g} is the share that becomes zero; give one between 0 and 1"
            )
        if blocks is None:
            return cls("share", ratio, text=given)
        rows, columns = int(blocks[1]), int(blocks[2])
        if rows * columns < 2:
            raise OptionError(f"pattern {given}: a block of {rows} x {columns} is no block; give RATIO alone")
        return cls("blocks", ratio, rows=rows, columns=columns, text=given)

    @property
    def inputs(self) -> int:
        """Inputs that belong together: what the inputs of a weight must be a multiple of."""
        return self.of if self.kind == "n:m" else self.columns

    def misfit(self, inputs: int, outputs: int) -> str | None:
        """Returns what of a weight of so many inputs and outputs it does not divide; None where it fits."""
        if inputs % self.inputs:
            return f"its {inputs} inputs are no multiple of {self.inputs}"
        if outputs % self.rows:
            return f"its {outputs} outputs are no multiple of {self.rows}"
        return None

    def cleared(self, inputs: int, outputs: int) -> float:
        """Returns the share of a weight that it fits which becomes zero, the ratio rounded to whole numbers or blocks."""
        if self.kind == "n:m":
            return self.ratio
        parts = inputs * outputs // (self.rows * self.columns)
        return round(self.ratio * parts) / parts

    def mask(self, scores: Array, by_output: bool = False, removed: int | None = None) -> Mask:
        """Returns which weights stay, bool [n, m]: those of the largest scores.

        Args:
            scores: of each weight, [n, m]; a block has their sum.
            by_output: whether a share is taken of each output by itself.
            removed: how many weights (or blocks) go; None: as the ratio says.
        """
        n, m = scores.shape
        if self.kind == "n:m":
            groups = scores.reshape(n // self.of, self.of, m)
            order = np.argsort(-groups, axis=1, kind="stable")
            mask = np.zeros(groups.shape, bool)
            np.put_along_axis(mask, order[:, : self.keep], True, axis=1)
            return mask.reshape(n, m)
        if self.kind == "blocks":
            blocks = scores.reshape(n // self.columns, self.columns, m // self.rows, self.rows).sum(axis=(1, 3))
            kept = _largest(blocks, round(self.ratio * blocks.size) if removed is None else removed)
            return np.repeat(np.repeat(kept, self.columns, axis=0), self.rows, axis=1)
        if by_output:
            gone = np.argsort(scores, axis=0, kind="stable")[: round(self.ratio * n)]
            mask = np.ones(scores.shape, bool)
            np.put_along_axis(mask, gone, False, axis=0)
            return mask
        return _largest(scores, round(self.ratio * scores.size) if removed is None else removed)

    def holds(self, weight: NDArray[np.generic]) -> bool:
        """Returns whether the zeros of a weight [n, m] are where they have to be."""
        n, m = weight.shape
        there: Mask = np.asarray(weight != 0)
        if self.kind == "n:m":
            return bool(np.all(there.reshape(n // self.of, self.of, m).sum(axis=1) <= self.keep))
        if self.kind == "blocks":
            there = np.asarray(there.reshape(n // self.columns, self.columns, m // self.rows, self.rows).any(axis=(1, 3)))
        return bool(there.sum() <= there.size - min(round(self.ratio * there.size), m * round(self.ratio * n)))


def _largest(scores: Array, removed: int) -> Mask:
    """Returns all but so many of the smallest, of equals the first stay."""
    mask = np.ones(scores.size, bool)
    if removed > 0:
        mask[np.argsort(-scores, axis=None, kind="stable")[scores.size - removed :]] = False
    return mask.reshape(scores.shape)


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight with what is known of its inputs.

    Attributes:
        weight: W, [n, m].
        moments: H, [n, n].
        cross: C, [n, m]; None: H W.
        power: E|y*|^2; of no account without ``cross``.
        folds: the same on the rows that are fitted to, and on others by which results are compared; None: they are too few.
    """

    weight: Array
    moments: Array
    cross: Array | None = None
    power: float = 0.0
    folds: "tuple[Layer, Layer] | None" = None

    @property
    def local(self) -> "Layer":
        """The layer by itself: its target is what it gives on these inputs."""
        folds = None if self.folds is None else (self.folds[0].local, self.folds[1].local)
        return replace(self, cross=None, folds=folds)

    def of(self, outputs: NDArray[np.int64]) -> "Layer":
        """The layer with some of its outputs alone; its ``error`` means nothing then, and `missed` is what compares."""
        cross = None if self.cross is None else self.cross[:, outputs]
        folds = None if self.folds is None else (self.folds[0].of(outputs), self.folds[1].of(outputs))
        return replace(self, weight=self.weight[:, outputs], cross=cross, folds=folds)

    def missed(self, weight: Array) -> float:
        """Returns E|y* - x V|^2 - E|y*|^2, which compares weights."""
        cross = np.vdot(self.target(), weight)
        return float(np.vdot(weight, self.moments @ weight)) - 2.0 * float(cross)

    def target(self) -> Array:
        """Returns C."""
        return self.moments @ self.weight if self.cross is None else self.cross

    def error(self, weight: Array) -> float:
        """Returns E|y* - x V|^2 relative to E|y*|^2."""
        if self.cross is None:
            gone = self.weight - weight
            return float(np.vdot(gone, self.moments @ gone)) / self._power
        return max(self.missed(weight) + self.power, 0.0) / (self.power or 1.0)

    @property
    def _power(self) -> float:
        return float(np.vdot(self.weight, self.moments @ self.weight)) or 1.0

    def damped(self, ridge: float) -> Array:
        """Returns H + ridge mean(diag H) I."""
        level = float(np.mean(np.diag(self.moments))) or 1.0
        return self.moments + ridge * level * np.eye(len(self.moments))


@dataclass(frozen=True, eq=False)
class Solved:
    """The new weight [n, m], and by which solver: one that keeps the better of several says which."""

    weight: Array
    by: str


def magnitude(layer: Layer, pattern: Pattern, ridge: float = RIDGE) -> Solved:
    """Keeps the largest weights; of blocks, those of the largest sum of squares."""
    del ridge
    return Solved(layer.weight * pattern.mask(np.square(layer.weight)), "magnitude")


def wanda(layer: Layer, pattern: Pattern, ridge: float = RIDGE) -> Solved:
    """Keeps the weights of the largest |w| sqrt(H_ii), a share of each output; of blocks, the sum of their squares."""
    del ridge
    return Solved(layer.weight * wanda_mask(layer, pattern), "wanda")


def wanda_mask(layer: Layer, pattern: Pattern) -> Mask:
    """Returns what Wanda keeps, bool [n, m]."""
    return pattern.mask(np.square(layer.weight) * np.diag(layer.moments)[:, None], by_output=True)


def sparsegpt(layer: Layer, pattern: Pattern, ridge: float = RIDGE) -> Solved:
    """Goes through the inputs; what zeros lose in one, the weights of those to come make up for (OBS)."""
    damped = layer.damped(ridge)
    n, m = layer.weight.shape
    left = layer.weight.copy()
    if layer.cross is not None:  # the quadratic around the best weights for the target
        left = np.asarray(cho_solve(cho_factor(damped), layer.cross + (damped - layer.moments) @ layer.weight))
    # With P the reversal P H P = L L^T, and U^-1 = P L P: H is not inverted.
    upper = solve_triangular(cholesky(damped[::-1, ::-1], lower=True)[::-1, ::-1], np.eye(n), lower=False)
    together = max(1, TOGETHER // pattern.inputs) * pattern.inputs
    units = pattern.rows * pattern.columns
    gone = 0
    for start in range(0, n, together):
        stop = min(start + together, n)
        errors = np.empty((stop - start, m))
        mask = np.ones((stop - start, m), bool)
        if pattern.kind != "n:m":
            removed = round(pattern.ratio * stop * m / units) - gone
            gone += removed
            mask = pattern.mask(_saliency(left[start:stop], upper, start), removed=removed)
        for i in range(start, stop):
            if pattern.kind == "n:m" and (i - start) % pattern.of == 0:
                some = slice(i, i + pattern.of)
                mask[i - start : i - start + pattern.of] = pattern.mask(_saliency(left[some], upper, i))
            error = np.where(mask[i - start], 0.0, left[i]) / upper[i, i]
            left[i + 1 : stop] -= np.outer(upper[i, i + 1 : stop], error)
            left[i] *= mask[i - start]
            errors[i - start] = error
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return Solved(left, "sparsegpt")


def _saliency(weight: Array, upper: Array, start: int) -> Array:
    """Returns w^2 / [U_ii]^2 of the inputs from ``start`` on."""
    return np.square(weight / np.diag(upper)[start : start + len(weight), None])


def refit(layer: Layer, pattern: Pattern, ridge: float = RIDGE) -> Solved:
    """Keeps what Wanda keeps, and solves for it."""
    mask = wanda_mask(layer, pattern)
    return Solved(refitted(layer, mask, layer.weight * mask, ridge), "refit")


def refitted(layer: Layer, mask: Mask, start: Array, ridge: float = RIDGE, enough: float = ENOUGH) -> Array:
    """Returns the best weights that are zero outside a mask; the ridge pulls towards those that there were.

    In closed form where outputs share masks, as blocks do; else by conjugate gradients on all outputs at once, from
    ``start``, whose every step lowers the error, as long as one gains ``enough`` of what all have.
    """
    damped = layer.damped(ridge)
    target = layer.target() + (damped - layer.moments) @ layer.weight
    n, m = mask.shape
    packed, which = np.unique(np.packbits(mask, axis=0), axis=1, return_inverse=True)
    largest = int(mask.sum(axis=0).max())
    if packed.shape[1] * (largest**3 / 3 + largest**2) <= STEPS * n * n * m:
        result = np.zeros((n, m))
        for number in range(packed.shape[1]):
            own = np.flatnonzero(which.reshape(-1) == number)
            kept = np.flatnonzero(mask[:, own[0]])
            if kept.size:
                factor = cho_factor(damped[np.ix_(kept, kept)], lower=True)
                result[np.ix_(kept, own)] = cho_solve(factor, target[np.ix_(kept, own)])
        return result
    return _by_gradients(damped, target, mask, start, enough)


def _by_gradients(damped: Array, target: Array, mask: Mask, start: Array, enough: float) -> Array:
    """Lowers 1/2 tr(V^T H V) - tr(C^T V) over the V inside a mask, each column by itself; in float32."""
    matrix, stays = damped.astype(np.float32), mask.astype(np.float32)
    result = start.astype(np.float32) * stays
    scale = (1.0 / np.diag(damped)).astype(np.float32)[:, None]
    aim, given = target.astype(np.float32), matrix @ result
    worth = abs(float(np.vdot(result, 0.5 * given - aim)))
    rest = (aim - given) * stays
    step = scale * rest
    size = np.einsum("ij,ij->j", rest, step)
    whole = 0.0
    for _ in range(STEPS):
        along = (matrix @ step) * stays
        curved = np.einsum("ij,ij->j", step, along)
        length = np.divide(size, curved, out=np.zeros_like(size), where=curved > 0)
        result += length * step
        rest -= length * along
        gained = 0.5 * float(length @ size)
        whole += gained
        if gained <= max(enough * whole, SMALL * worth):
            break
        steep = scale * rest
        now = np.einsum("ij,ij->j", rest, steep)
        step = steep + np.divide(now, size, out=np.zeros_like(size), where=size > 0) * step
        size = now
    return result.astype(np.float64)


def fista(layer: Layer, pattern: Pattern, ridge: float = RIDGE) -> Solved:
    """Solves the convex problem for a lambda with as many zeros as are asked for, rounds it to the pattern, and refits.

    So it does with the zeros of SparseGPT, whose own weights are tried, too. Of these, and with and without looking at the
    target, what loses least on held-back rows, on some of the outputs, is solved for on all rows and all outputs.
    """
    fitted, judge = (layer, layer) if layer.folds is None else layer.folds
    some = _some(layer.weight.shape[1], pattern)
    greedy = sparsegpt(fitted, pattern, ridge).weight
    tiny = 1e-9 * np.abs(greedy) / (float(np.abs(greedy).max()) or 1.0)  # where more became zero than the pattern asks for
    mask = pattern.mask(_convex(fitted, pattern, ridge, some) + tiny)
    masks = {"sparsegpt refitted": greedy != 0, "fista": mask}
    starts = {"sparsegpt refitted": greedy, "fista": fitted.weight * mask}
    few = fitted.of(some)
    tried = {"sparsegpt": greedy[:, some]}
    tried |= {name: refitted(few, own[:, some], starts[name][:, some], ridge) for name, own in masks.items()}
    lost = {name: judge.of(some).missed(weight) for name, weight in tried.items()}
    by, chosen = min(lost, key=lambda name: lost[name]), layer
    if layer.cross is not None:
        if by == "sparsegpt":
            local = sparsegpt(fitted.local, pattern, ridge).weight[:, some]
        else:
            local = refitted(few.local, masks[by][:, some], tried[by], ridge)
        chosen = layer.local if judge.of(some).missed(local) < lost[by] else layer
    if by == "sparsegpt":
        weight = sparsegpt(chosen, pattern, ridge).weight
    else:
        weight = refitted(chosen, masks[by], starts[by], ridge, LITTLE)
    return Solved(weight, f"{by}{', corrected' if chosen.cross is not None else ''}")


def _some(outputs: int, pattern: Pattern) -> NDArray[np.int64]:
    """Returns the outputs that are looked at, ascending, some of all parts."""
    wanted = outputs if pattern.kind == "blocks" else min(outputs, max(outputs // SOME, FEWEST))
    return np.asarray(np.arange(wanted) * outputs // wanted, np.int64)


def _convex(layer: Layer, pattern: Pattern, ridge: float, some: NDArray[np.int64]) -> Array:
    """Returns |V sqrt(H_ii)| of the convex problem in these coordinates, where every input has as much to say."""
    damped = layer.damped(ridge)
    scale = np.sqrt(np.diag(damped))
    matrix = (damped / np.outer(scale, scale)).astype(np.float32)
    target = ((layer.target() + (damped - layer.moments) @ layer.weight) / scale[:, None]).astype(np.float32)
    step = np.float32(1.0 / _largest_eigenvalue(matrix))
    whole = (layer.weight * scale[:, None]).astype(np.float32)
    values, aim = whole[:, some], target[:, some]
    high = float(np.abs(target).max())
    low = level = high * 1e-5
    for _ in range(BISECTIONS):
        level = float(np.sqrt(low * high))
        values = _shrunk(matrix, aim, values, step, np.float32(level), ITERATIONS)
        share = float(np.mean(values == 0.0))
        if abs(share - pattern.ratio) <= NEAR:
            break
        low, high = (level, high) if share < pattern.ratio else (low, level)
    return np.abs(_shrunk(matrix, target, whole, step, np.float32(level), 2 * ITERATIONS)).astype(np.float64)


def _shrunk(
    matrix: NDArray[np.float32],
    target: NDArray[np.float32],
    start: NDArray[np.float32],
    step: np.float32,
    level: np.float32,
    iterations: int,
) -> NDArray[np.float32]:
    """Makes some iterations of FISTA (Beck and Teboulle 2009) on 1/2 tr(V^T H V) - tr(C^T V) + level |V|_1."""
    values, ahead, pace = start, start, 1.0
    for _ in range(iterations):
        moved = ahead - step * (matrix @ ahead - target)
        new = np.sign(moved) * np.maximum(np.abs(moved) - step * level, np.float32(0.0))
        faster = (1.0 + np.sqrt(1.0 + 4.0 * pace * pace)) / 2.0
        ahead = new + np.float32((pace - 1.0) / faster) * (new - values)
        values, pace = new, faster
    return values


def _largest_eigenvalue(matrix: NDArray[np.float32]) -> float:
    """Returns the largest eigenvalue of a positive matrix, a little too large rather than too small."""
    vector = np.ones(len(matrix), np.float32) + np.arange(len(matrix), dtype=np.float32) / len(matrix)
    for _ in range(30):
        vector = matrix @ vector
        vector /= np.linalg.norm(vector)
    return 1.1 * float(vector @ (matrix @ vector))


Solver = Callable[[Layer, Pattern, float], Solved]
"""(layer, pattern, relative ridge) -> new weight; `LinAlgError` where the moments are those of no numbers."""
SOLVERS: dict[str, Solver] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "refit": refit,
    "fista": fista,
}
CORRECTED = ("fista",)
"""Solvers that look at the dense model's outputs."""
