"""Scores and draws of the samples are tried, and what loses least on samples that no try has seen is the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from test_both_engines import batches, export, made

import liar_opt
from liar_opt.passes.judge import shared_out
from liar_opt.passes.model_job import ModelJob
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.signatures import InputSpec, Signature
from liar_opt.tools.report import footnotes

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN: dict[str, Any] = {"latency": False, "provider": "cpu", "multiple_of": 4, "fresh": True}


def test_samples_are_dealt_out_once() -> None:
    """No sample is in two parts, each part has its own of all batches, and a fixed batch stays whole."""
    lengths, number = (7, 5, 9, 3), 0
    feeds, masks = [], []
    for length in lengths:
        feeds.append({"x": np.arange(number, number + length)[:, None], "scale": np.ones(3)})
        masks.append(np.ones((length, 1), bool))
        number += length
    data = CalibrationData(tuple(feeds), tuple(masks), number, number, "", (), False)
    inputs = [InputSpec("x", np.dtype(np.int64), ("b", 1)), InputSpec("scale", np.dtype(np.float64), (3,))]
    signature = Signature.read(inputs, None)
    parts = shared_out(data, [8, 8, 5], signature, 0)
    rows = [np.concatenate([batch["x"][:, 0] for batch in part.batches]).tolist() for part in parts]
    assert [len(part) for part in rows] == [8, 8, 5] == [part.samples for part in parts]
    assert len({row for part in rows for row in part}) == 21
    for part in parts:
        for batch, mask in zip(part.batches, part.row_masks, strict=True):
            assert mask is not None and len(mask) == len(batch["x"]) and len(batch["scale"]) == 3
    whole = shared_out(data, [12, 12], Signature(**{**vars(signature), "batch": 6}), 0)
    assert sum(len(part.batches) for part in whole) == 4
    assert all(any(batch is feed for feed in feeds) for part in whole for batch in part.batches)


@pytest.mark.parametrize(
    "options",
    [
        {"ffn": 0.5, "heads": 0.25, "choose": "score,samples", "choose_tries": 3, "score": "magnitude"},
        {"pattern": "2:4", "choose": "score", "choose_tries": 2, "pattern_solver": "magnitude"},
    ],
    ids=["widths", "pattern"],
)
def test_the_best_try_is_the_result(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    judged = oracle.judged(monkeypatch)
    result = liar_opt.prune(export("llama"), batches(), samples=12, **options, **PLAIN)
    found = result.report["choice"]
    errors = [one["error"] for one in found["tried"]]
    assert found["chosen"] == int(np.argmin(errors)) and found["stopped"] in ("tries", "all")
    assert len({(one["score"], one["draw"]) for one in found["tried"]}) == len(errors) == options["choose_tries"]
    assert errors[found["chosen"]] < errors[0]  # greedy and sparsegpt lose less than magnitudes
    assert all(data is judged[0] for data in judged)
    lost = oracle.relative_square(result.model, export("llama"), judged[0].batches)
    assert errors[found["chosen"]] == pytest.approx(lost, rel=1e-3)
    assert any("chosen among" in line and found["tried"][0]["score"] in line for line in footnotes(result.report))


def test_all_tries_have_the_widths_of_the_first_on_a_module_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A try that fails is told."""
    widths = []
    cut = ModelJob.checked

    def noted(job: Any) -> Any:
        if job.options.score == "activation-weighted":
            raise ModelError("it does not work")
        done = cut(job)
        widths.append({name: keep for name, keep in job.state.keep.items() if name in job.decided["keep"]})
        return done

    monkeypatch.setattr(ModelJob, "checked", noted)
    options: dict[str, Any] = {"sparsity": 0.3, "choose": "score", "choose_tries": 3, "checkpoint": False}
    found = liar_opt.prune(made("llama"), batches(), samples=12, **options, **PLAIN).report["choice"]
    assert [one["score"] for one in found["tried"]] == ["greedy", "activation-weighted", "output-approximation"]
    assert found["tried"][1]["why"] == "it does not work" and found["tried"][1]["error"] is None
    assert len(widths) == 2 and widths[0] == widths[1] and found["stopped"] == "tries"


def test_minutes_end_the_tries() -> None:
    options: dict[str, Any] = {"pattern": "0.5", "pattern_solver": "magnitude", "choose": "score", "choose_minutes": 1e-3}
    found = liar_opt.prune(export("llama"), batches(), samples=12, **options, **PLAIN).report["choice"]
    assert [one["score"] for one in found["tried"]] == ["magnitude"] and found["stopped"] == "minutes"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"choose": "scores"}, "choose 'scores' is unknown; choose one of score, samples"),
        ({"choose_tries": 3}, "choose-tries is the budget of --choose"),
        ({"choose": "score", "choose_tries": 1}, "choose-tries 1 compares nothing"),
        ({"choose": "score", "choose_minutes": 0.0}, "choose-minutes 0 is no time"),
        ({"choose": "score", "choose_minutes": float("inf")}, "choose-minutes inf is no time"),
        ({"choose": "score", "max_drop": 0.1}, "max-drop decides widths by pruning"),
        ({"choose": "score", "blocks": 1}, "blocks go first"),
        ({"choose": "score", "calibration": None}, "choose judges by calibration data"),
        ({"choose": "samples", "samples": 512}, "choose needs samples that are in no other draw: there are"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        liar_opt.prune(export("llama"), options.pop("calibration", batches()), **options, **PLAIN)
