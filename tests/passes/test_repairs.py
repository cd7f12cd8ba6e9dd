"""Repairs by name and by a user's function, on rows that they have not seen."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import pytest
from streams import STREAM, WEIGHTS, data, error, pruned

from liar_opt.passes.repairs import AWARE, REPAIRS
from liar_opt.passes.report import unrepaired
from liar_opt.passes.sweep import HELD_BACK
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import OptionError


def test_each_repair_is_better_than_none() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    for score in ("greedy", "activation-weighted"):
        errors = {name: error(proto, pruned(proto, 0.5, score=score, repair=name)[0]) for name in REPAIRS}
        assert errors["liar"] == min(e for name, e in errors.items() if name not in AWARE)
        assert all(errors[name] < errors["bias"] for name in AWARE)
        assert errors["scaling"] < errors["none"] and errors["bias"] < errors["none"]


def test_a_users_function_writes_what_it_returns() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)

    def as_none(consumer: Any, kept: Any, removed: Any) -> Any:
        return consumer.weight[kept], np.zeros(consumer.weight.shape[1])

    own, _, result = pruned(proto, 0.5, repair=as_none)
    assert error(proto, own) == pytest.approx(error(proto, pruned(proto, 0.5, repair="none")[0]), rel=1e-5)
    assert result.changes[0].details["consumers"][0]["repair"] == "as_none"
    details = result.changes[0].details["consumers"][0]
    assert details["error_repair"] == pytest.approx(details["error_none"], rel=1e-4)


def one(consumer: Any, kept: Any, removed: Any) -> Any:
    return consumer.weight[kept]


def whole(consumer: Any, kept: Any, removed: Any) -> Any:
    return consumer.weight, np.zeros(6)


def nan(consumer: Any, kept: Any, removed: Any) -> Any:
    return consumer.weight[kept] * np.nan, np.zeros(6)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (one, "'one' did not return"),
        (whole, r"'whole' returned weights \[17, 6\] and bias \[6\]; return \[8, 6\] and \[6\]"),
        (nan, "NaN"),
    ],
)
def test_a_users_function_that_is_wrong(function: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        pruned(graphs.parse(STREAM, WEIGHTS), 0.5, repair=function)


def contradicting() -> CalibrationData:
    """Batches of which those that are held back go the other way: what is fitted to the others is wrong there."""
    rng = np.random.default_rng(5)
    made = []
    for i in range(20):
        sign = -1.0 if i % HELD_BACK == HELD_BACK // 2 else 1.0
        x = rng.standard_normal((8, 5, 1)) * sign * np.ones(6) + sign * np.arange(6) + 0.01 * rng.standard_normal((8, 5, 6))
        made.append({"x0": x.astype(np.float32)})
    return data(tuple(made))


LINEAR = (
    "f (float[b, s, 6] x0) => (float[b, s, 6] y) { u = MatMul(x0, w0)  h = Relu(u)  z = MatMul(h, v0)  y = Add(x0, z) }"
)


@pytest.mark.parametrize("name", [name for name in REPAIRS if name != "none"])
@pytest.mark.parametrize("ridge", [None, 1e-6])
def test_a_repair_that_is_worse_than_none_where_it_was_not_fitted_is_not_written(name: str, ridge: float | None) -> None:
    proto = graphs.parse(LINEAR, {"w0": (6, 17), "v0": (17, 6)}, seed=3)
    written = {}
    for repair in ("none", name):
        _, state, result = pruned(
            proto, 0.5, contradicting(), repair=repair, ridge=ridge, score="magnitude", weighting="none"
        )
        (found,) = result.changes[0].details["consumers"]
        assert found["repair"] == "none"
        assert found["error_repair"] == pytest.approx(found["error_none"], rel=1e-5)
        written[repair] = state.repairs[0]
    np.testing.assert_array_equal(written[name].weight, written["none"].weight)
    assert not written[name].bias.any()
    (found,) = pruned(proto, 0.5, repair=name, ridge=ridge, weighting="none")[2].changes[0].details["consumers"]
    assert found["repair"] != "none"  # where the rows agree it is written


def test_a_repair_that_was_not_written_is_told() -> None:
    repairs = [{"node": f"n{i}", "repair": "none" if i < 5 else "repair"} for i in range(7)]
    report: dict[str, Any] = {"groups": [{"repairs": repairs[:3]}, {}, {"repairs": repairs[3:]}], "refusals": []}
    (note,) = unrepaired(report, "liar")
    assert note.startswith(
        "5 of 7 repairs would be worse than none on held-back rows and were not written ('n0', 'n1', 'n2' and 2"
    )
    assert list(unrepaired(report, "none")) == []  # it was asked for
    report["refusals"] = [{"nodes": [f"n{i}" for i in range(5)]}]  # told already: too few rows
    assert list(unrepaired(report, "liar")) == []
