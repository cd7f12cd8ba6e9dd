"""The largest sparsity inside a limit: built in, by a user's metric, and what goes wrong with those."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
from streams import BLOCK, batches

from liar_opt import prune
from liar_opt.passes import limit_drop
from liar_opt.passes.limit_drop import parse_drop
from liar_opt.runtime.errors import OptionError

TEXT = f"f (float[b, s, 6] x0) => (float[b, s, 6] x2) {{ {BLOCK.format(0, 1)}\n {BLOCK.format(1, 2)} }}"
SIZES: graphs.Weights = {"w0": (6, 60), "b0": (60,), "v0": (60, 6), "w1": (6, 60), "b1": (60,), "v1": (60, 6)}
PROTO = graphs.parse(TEXT, SIZES)
FEEDS = batches(20, 0)


def run(**options: Any) -> Any:
    return prune(PROTO, FEEDS, multiple_of=1, latency=False, **options)


def distance(model: onnx.ModelProto) -> float:
    """Relative squared difference on rows that were not measured."""
    lost = power = 0.0
    for feeds in batches(5, 77):
        (x,), (y,) = oracle.run(model, feeds), oracle.run(PROTO, feeds)
        lost, power = lost + float(((x - y) ** 2).sum()), power + float((y**2).sum())
    return lost / power


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.05", 0.05), (0.2, 0.2), ("12.5 %", 0.125)])
def test_limits_are_read(text: Any, value: float) -> None:
    assert parse_drop(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "much", "0", "-1%", "100%", "nan", "1.2.3%"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match=r"max-drop .* is not between"):
        parse_drop(text)


def test_more_is_removed_where_more_may_be_lost() -> None:
    sparsities = []
    for limit in (0.001, 0.02):
        result = run(max_drop=limit)
        target = result.report["target"]
        assert 0 <= target["found"] <= limit and len(target["tried"]) <= 6
        tried = dict(target["tried"])
        # Something was tried beyond, and was too much, or what was found is near the limit.
        assert target["found"] >= 0.9 * limit or any(loss > limit for s, loss in tried.items() if s > target["sparsity"])
        removed = sum(g["before"] - g["after"] for g in result.report["groups"]) / 120
        assert removed == pytest.approx(target["sparsity"], abs=0.02)
        assert result.report["verification"]["exact_difference"] < 1e-4
        sparsities.append(target["sparsity"])
    assert sparsities[0] < sparsities[1]


def test_a_users_metric() -> None:
    def quality(model: onnx.ModelProto) -> float:
        return 50.0 * (1.0 - distance(model))

    result = run(max_drop="1%", metric=quality)
    assert quality(result.model) >= 49.5
    assert result.report["target"]["found"] == pytest.approx(distance(result.model), rel=1e-3)
    assert result.report["options"]["limit-drop"]["metric"] == "quality"


def test_a_metric_that_raises_at_once_is_the_users() -> None:
    def broken(model: onnx.ModelProto) -> float:
        raise KeyError("label")

    with pytest.raises(
        OptionError, match=r"metric function 'broken' failed .KeyError: 'label'.; nothing was pruned"
    ) as err:
        run(max_drop=0.1, metric=broken)
    assert isinstance(err.value.__cause__, KeyError)
    with pytest.raises(OptionError, match="it returned nan"):
        run(max_drop=0.1, metric=lambda model: np.nan)


def test_a_metric_that_raises_later_keeps_the_last_good_model() -> None:
    calls = []

    def tired(model: onnx.ModelProto) -> float:
        calls.append(model)
        if len(calls) > 2:
            raise RuntimeError("no more")
        return 1.0

    with pytest.warns(UserWarning, match=r"'tired' failed; the last model(.|\n)*RuntimeError: no more"):
        result = run(max_drop=0.1, metric=tired)
    assert result.report["target"]["sparsity"] > 0 and "no more" in result.report["target"]["stopped"]
    assert distance(result.model) > 0


def test_nothing_is_inside() -> None:
    with pytest.raises(OptionError, match=r"max-drop '1e-12' cannot be kept: 2% loses .*; allow more"):
        run(max_drop=1e-12)


def test_forms_exclude_each_other() -> None:
    for options in ({"sparsity": 0.3}, {"ffn": 0.0}, {"target": "size=0.5x"}):
        with pytest.raises(OptionError, match="exclude each other"):
            run(max_drop=0.1, **options)
    with pytest.raises(OptionError, match="a metric needs max-drop"):
        run(metric=distance)


def test_the_loss_is_measured_on_rows_that_nothing_is_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, held = [], []
    evaluate = limit_drop._Search._difference

    def noted(self: Any, trial: Any) -> float:
        fitted.append({id(feeds) for feeds in trial.calibration.batches})
        held.append({id(self.data.batches[i]) for i in self.held})
        return evaluate(self, trial)

    monkeypatch.setattr(limit_drop._Search, "_difference", noted)
    report = run(max_drop=0.02).report
    assert fitted and not any(a & b for a, b in zip(fitted, held, strict=True))
    assert len(fitted[0] | held[0]) == report["calibration"]["batches"]
    assert report["target"]["held_back"] and not any("max-drop was" in note for note in report["model"]["notes"])


def test_few_samples_are_divided_and_one_is_told() -> None:
    options: dict[str, Any] = {"max_drop": 0.3, "multiple_of": 1, "latency": False}
    report = prune(PROTO, FEEDS[0], **options).report
    assert report["target"]["held_back"] and report["calibration"]["batches"] == 8
    one = {"x0": FEEDS[0]["x0"][:1]}
    report = prune(PROTO, one, **options).report
    assert not report["target"]["held_back"]
    assert any("measured on the rows that the repair was fitted to" in note for note in report["model"]["notes"])
