"""Measured differences: what is equal, what is not, and what padding may hide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from liar_opt.runtime.compare import (
    SIGMOID_STEP,
    TOLERANCES,
    DifferenceMeter,
    holds_logits,
    relative_difference,
    require_close,
    require_repeatable,
)
from liar_opt.runtime.errors import CheckError, ModelError


def test_relative_to_the_largest_magnitude() -> None:
    reference = np.asarray([1.0, -4.0, 0.0], np.float32)
    assert relative_difference(reference, reference) == 0.0
    assert relative_difference(reference + np.float32(0.5), reference) == pytest.approx(0.125)
    assert relative_difference(np.full(3, 0.25), np.zeros(3)) == 0.25
    assert relative_difference(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0


def test_steps_of_what_computed_a_number_are_no_difference() -> None:
    """A sigmoid of -15 is some five steps of float32 at one."""
    value, other = (np.asarray(v, np.float32) for v in ([3e-7, 2e-7], [3.6e-7, 2e-7]))
    assert relative_difference(other, value) > 0.1
    assert relative_difference(other, value, SIGMOID_STEP) == pytest.approx(6e-8, rel=0.01)
    assert relative_difference(10 * other, 10 * value, SIGMOID_STEP) > 0.1


def test_shapes_and_integers_are_exact() -> None:
    assert relative_difference(np.zeros((2, 3)), np.zeros((3, 2))) == np.inf
    assert relative_difference(np.asarray([1, 2]), np.asarray([1, 2])) == 0.0
    assert relative_difference(np.asarray([1, 3]), np.asarray([1, 2])) == np.inf


def test_infinities_and_nan_must_be_the_same() -> None:
    x = np.asarray([1.0, np.inf, -np.inf, np.nan])
    assert relative_difference(x, x) == 0.0
    assert relative_difference(np.asarray([1.0, 2.0, -np.inf, np.nan]), x) == np.inf
    assert relative_difference(np.asarray([1.0, -np.inf, -np.inf, np.nan]), x) == np.inf
    assert relative_difference(np.asarray([1.0, np.nan, -np.inf, np.nan]), x) == np.inf


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_require_close_raises_above_the_tolerance(dtype: str) -> None:
    y = np.asarray([2.0, 1.0])
    allowed = TOLERANCES[dtype]
    assert require_close({"y": y + allowed}, {"y": y}, dtype, "check") <= allowed
    with pytest.raises(CheckError, match="check: output 'y' differs"):
        require_close({"y": y + 3 * allowed}, {"y": y}, dtype, "check")
    with pytest.raises(CheckError, match="inf"):
        require_close({"y": np.asarray([np.nan, 1.0])}, {"y": y}, dtype, "check")


def measure(x: np.ndarray, y: np.ndarray, mask: np.ndarray | None = None) -> tuple[float, float, int]:
    meter = DifferenceMeter()
    meter.add("y", x, y, mask)
    result = meter.result()["y"]
    return result.relative_rms, result.cosine, result.rows


def test_meter_against_numpy() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 5, 7))
    rms, cosine, rows = measure(x, y)
    assert rows == 15
    assert rms == pytest.approx(np.sqrt(((x - y) ** 2).mean() / (y**2).mean()))
    wanted = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert cosine == pytest.approx(wanted.mean())
    mask = np.asarray([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    assert measure(x, y, mask)[2] == 7
    assert measure(x, y, mask)[1] == pytest.approx(wanted[mask].mean())


def test_padding_is_left_out() -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((3, 5, 7))
    mask = np.asarray([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    assert measure(np.where(mask[..., None], y, 9.0), y, mask)[0] == 0.0
    assert measure(np.where(mask[:, :1, None], y, 9.0)[:, 0], y[:, 0], mask)[::2] == (0.0, 2)


def test_outputs_of_another_size_are_compared_as_far_as_both_go() -> None:
    rng = np.random.default_rng(0)
    dense, pruned = rng.standard_normal((2, 1, 9)), rng.standard_normal((2, 1, 7))
    meters = DifferenceMeter(), DifferenceMeter()
    meters[0].add("y", pruned, dense, None)
    meters[1].add("y", pruned, dense[:, :, :7], None)
    assert meters[0].result() == meters[1].result()
    assert (meters[0].uneven, meters[1].uneven) == ({"y"}, set())


def test_a_dead_output_is_not_perfect() -> None:
    y = np.ones((4, 3))
    assert measure(np.zeros((4, 3)), y)[:2] == (1.0, 0.0)
    assert measure(np.zeros((4, 3)), np.zeros((4, 3)))[1] == 1.0
    assert np.isnan(measure(np.full((4, 3), np.nan), y)[1])


def test_what_has_no_rows_is_left_out() -> None:
    meter = DifferenceMeter()
    meter.add("scalar", np.asarray(1.0), np.asarray(1.0), None)
    meter.add("labels", np.asarray([1]), np.asarray([1]), None)
    assert meter.result() == {}


def test_a_model_that_is_not_the_same_twice() -> None:
    first = {"y": np.linspace(-1, 1, 9, dtype=np.float32)}
    require_repeatable(first, {"y": first["y"] * np.float32(1 + 1e-6)})
    with pytest.raises(ModelError, match=r"another output 'y' each time it runs .* draws random numbers"):
        require_repeatable(first, {"y": first["y"][::-1]})


def test_how_often_the_largest_changes() -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((3, 5, 7))
    x = y.copy()
    x[0, 1, y[0, 1].argmin()] = x[1, 4, y[1, 4].argmin()] = x[2, 2, y[2, 2].argmin()] = 99.0
    mask = np.asarray([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    meter = DifferenceMeter()
    meter.add("logits", x, y, mask, logits=True)
    meter.add("logits", y, y, mask, logits=True)
    meter.add("hidden", x, y, mask)
    assert meter.result()["logits"].changed_top1 == pytest.approx(2 / 14)
    assert meter.result()["hidden"].changed_top1 is None


@pytest.mark.parametrize(
    ("arguments", "holds"),
    [
        (("logits", (2, 3)), True),
        (("start_Logits", (2, 5)), True),
        (("logits", (2, 1)), False),  # a regression
        (("logits", (2, 3, 8, 8)), False),  # classes are no last axis
        (("out", (2, 5, 90), 90), True),
        (("last_hidden_state", (2, 5, 6), 90), False),
        (("probabilities", (2, 3), None, "Softmax"), True),
        (("probabilities", (2, 3), None, "Sigmoid"), False),
    ],
)
def test_which_outputs_hold_logits(arguments: tuple[Any, ...], holds: bool) -> None:
    assert holds_logits(*arguments) is holds
