"""Patterns and their solvers on arrays: where zeros are, what each loses, and what is exact against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.patterns import RIDGE, SOLVERS, Layer, Pattern, magnitude, refitted, sparsegpt

TEXTS = ("2:4", "1:4", "3:8", "0.5", "0.7", "blocks=4x4:0.5", "blocks=1x6:0.25", "blocks=8x2:0.75")


def layer(seed: int = 0, inputs: int = 48, outputs: int = 32, rows: int = 400, noise: float = 0.0) -> Layer:
    """A layer whose inputs are correlated; with ``noise`` those that it sees are not those of the dense model."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((inputs // 3, inputs)) * rng.lognormal(0.0, 0.7, inputs)
    weight = rng.standard_normal((inputs, outputs))

    def of(count: int) -> Layer:
        x = rng.standard_normal((count, inputs // 3)) @ mixed + 0.3 * rng.standard_normal((count, inputs))
        seen = x + noise * x.std() * rng.standard_normal(x.shape) + noise * np.roll(x, 1, axis=1)
        y = x @ weight
        cross = seen.T @ y / count if noise else None
        return Layer(weight, seen.T @ seen / count, cross, float(np.square(y).sum()) / count)

    training, held = of(rows), of(rows // 4)
    return Layer(training.weight, training.moments, training.cross, training.power, (training, held))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_zeros_are_where_the_pattern_says(solver: str, text: str) -> None:
    pattern, found = Pattern.parse(text), layer()
    weight = SOLVERS[solver](found, pattern, RIDGE).weight
    assert weight.shape == found.weight.shape and np.isfinite(weight).all()
    assert pattern.holds(weight)
    assert np.mean(weight == 0) == pytest.approx(pattern.ratio, abs=0.02)
    assert not pattern.holds(found.weight)


def test_what_stays_in_a_pattern() -> None:
    weight = np.asarray([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0], [9.0, 9.0], [0.1, 9.0], [0.2, 0.3], [0.3, 0.4]])
    two = Pattern.parse("2:4").mask(weight)
    assert np.flatnonzero(two[:, 0]).tolist() == [0, 1, 4, 7] and np.flatnonzero(two[:, 1]).tolist() == [2, 3, 4, 5]
    assert np.flatnonzero(Pattern.parse("1:4").mask(weight)[:, 0]).tolist() == [0, 4]
    blocks = Pattern.parse("blocks=2x4:0.5").mask(weight)  # of two outputs and four inputs
    assert not blocks[:4].any() and blocks[4:].all()
    share = Pattern.parse("0.25").mask(weight)
    assert share.sum() == 12 and not share[[5, 6, 7], 0].any() and not share[6, 1]
    by_output = Pattern.parse("0.25").mask(weight, by_output=True)
    assert by_output.sum(axis=0).tolist() == [6, 6]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", ["2:4", "0.5", "blocks=4x4:0.5"])
def test_what_each_loses(text: str, seed: int) -> None:
    found, pattern = layer(seed), Pattern.parse(text)
    lost = {name: found.error(solver(found, pattern, RIDGE).weight) for name, solver in SOLVERS.items()}
    assert lost["fista"] <= lost["sparsegpt"] * 1.001
    assert lost["sparsegpt"] <= lost["wanda"] <= lost["magnitude"]
    assert lost["refit"] <= lost["wanda"]


@pytest.mark.parametrize("text", ["2:4", "blocks=4x4:0.5"])
def test_the_error_of_layers_before_is_corrected(text: str) -> None:
    found, pattern = layer(noise=0.15), Pattern.parse(text)
    lost = {name: found.error(SOLVERS[name](found, pattern, RIDGE).weight) for name in ("fista", "refit")}
    by = SOLVERS["fista"](found, pattern, RIDGE).by
    assert by.endswith("corrected")
    assert lost["fista"] < found.error(SOLVERS["fista"](found.local, pattern, RIDGE).weight)
    x = np.linalg.cholesky(found.moments).T  # rows with these moments
    weight = SOLVERS["fista"](found.local, pattern, RIDGE).weight
    assert found.local.error(weight) == pytest.approx(
        np.square(x @ (weight - found.weight)).sum() / np.square(x @ found.weight).sum()
    )


@pytest.mark.parametrize("text", ["0.5", "blocks=4x4:0.5"])
def test_what_stays_is_solved_for_exactly(text: str) -> None:
    found = layer()
    mask = Pattern.parse(text).mask(np.square(found.weight))
    weight = refitted(found, mask, found.weight * mask, 1e-3)
    damped = found.moments + 1e-3 * np.mean(np.diag(found.moments)) * np.eye(len(found.moments))
    for column in range(found.weight.shape[1]):
        kept = np.flatnonzero(mask[:, column])
        wanted = np.linalg.solve(damped[np.ix_(kept, kept)], damped[kept] @ found.weight[:, column])
        assert np.allclose(weight[kept, column], wanted, atol=0.02 * np.abs(wanted).max())
    assert np.all(weight[~mask] == 0)


def test_without_feedback_from_uncorrelated_inputs_sparsegpt_is_magnitude() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 8))
    found, pattern = Layer(weight, np.eye(16)), Pattern.parse("2:4")
    assert np.allclose(sparsegpt(found, pattern).weight, magnitude(found, pattern).weight)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4:2", "keeps 4 of each 2"),
        ("4:4", "at least 1 and fewer than M"),
        ("0:4", "at least 1"),
        ("0", "between 0 and 1"),
        ("1.0", "between 0 and 1"),
        ("nan", "between 0 and 1"),
        ("blocks=8x8:1.5", "between 0 and 1"),
        ("blocks=8x8", "not understood"),
        ("blocks=0x8:0.5", "is no block"),
        ("half", "not understood; give N:M as 2:4"),
        ("", "not understood"),
    ],
)
def test_what_is_no_pattern(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Pattern.parse(text)


def test_what_a_pattern_divides() -> None:
    sizes: list[tuple[str, tuple[int, int], Any]] = [
        ("2:4", (8, 3), None),
        ("2:4", (6, 3), "its 6 inputs are no multiple of 4"),
        ("blocks=2x4:0.5", (8, 6), None),
        ("blocks=4x2:0.5", (8, 6), "its 6 outputs are no multiple of 4"),
        ("0.5", (7, 5), None),
    ]
    for text, (inputs, outputs), misfit in sizes:
        assert Pattern.parse(text).misfit(inputs, outputs) == misfit
