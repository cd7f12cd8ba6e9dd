"""Error curves are kept between runs, and taken only where nothing differs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from streams import STREAM, WEIGHTS, batches

import liar_opt
from liar_opt.passes import measure_curves
from liar_opt.passes.curves import GroupCurve, load_curves, store_curves
from liar_opt.runtime import kept_results


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the groups whose curve is measured."""
    count = [0]
    note = measure_curves.NoteCurves.note

    def counted(self: Any, *arguments: Any) -> None:
        count[0] += 1
        note(self, *arguments)

    monkeypatch.setattr(measure_curves.NoteCurves, "note", counted)
    return count


def prune(data_seed: int = 3, weights: graphs.Weights = WEIGHTS, **options: Any) -> liar_opt.PruneResult:
    common: dict[str, Any] = {"provider": "cpu", "latency": False, "multiple_of": 1, "batch_size": 8}
    given = {"sparsity": 0.3, **common} | options
    return liar_opt.prune(graphs.parse(STREAM, weights), batches(7, data_seed), **given)


def test_another_sparsity_takes_the_curves_of_the_first(measured: list[int], tmp_path: Path) -> None:
    first = prune()
    groups, measured[0] = measured[0], 0
    assert groups == len(first.report["groups"]) and not any("--fresh" in n for n in first.report["model"]["notes"])
    again, other, drop = prune(), prune(sparsity=0.5), prune(sparsity=None, max_drop="5%")
    assert measured == [0]
    assert again.model.SerializeToString() == first.model.SerializeToString()
    for result in (again, other, drop):
        assert result.report["curves"] == first.report["curves"]
        assert any("an earlier run on the same data; --fresh" in n for n in result.report["model"]["notes"])
    prune(fresh=True)
    assert measured == [groups]


@pytest.mark.parametrize(
    "options",
    [{"data_seed": 4}, {"weights": {**WEIGHTS, "b1": np.ones(19, np.float32)}}, {"score": "ifv"}, {"query_key": "auto"}],
    ids=["data", "model", "score", "queries"],
)
def test_what_differs_is_measured(measured: list[int], options: dict[str, Any]) -> None:
    prune()
    measured[0] = 0
    prune(**options)
    assert measured[0] > 0


def test_scores_of_the_users_own_are_measured_each_time(measured: list[int], tmp_path: Path) -> None:
    for _ in range(2):
        result = prune(score=lambda consumers: np.arange(consumers[0].blocks))
    assert measured[0] == 2 * len(result.report["groups"]) and not (tmp_path / "cache").exists()


def test_a_broken_file_is_measured_again(measured: list[int], tmp_path: Path) -> None:
    prune()
    (path,) = (tmp_path / "cache" / "curves").iterdir()
    path.write_bytes(path.read_bytes()[:200])
    measured[0] = 0
    prune()
    assert measured[0] > 0 and load_curves(path) is not None


@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: a * np.nan, lambda a: a.astype(np.str_), lambda a: a[None]])
def test_an_altered_file_is_measured_again(measured: list[int], tmp_path: Path, change: Callable[[Any], Any]) -> None:
    prune()
    (path,) = (tmp_path / "cache" / "curves").iterdir()
    with np.load(path) as file:
        arrays = {n: change(file[n]) if n.startswith("errors") else file[n] for n in file.files}
    np.savez(path, **arrays)
    measured[0] = 0
    prune()
    assert measured[0] > 0


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert prune().report["curves"]


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_results, "MOST", 2)
    curve = GroupCurve(np.array([1.0, 0.0]), np.array([1.0]), 2.0, None)
    for i in range(3):
        path = tmp_path / f"{i}.npz"
        store_curves(path, {"a/b": curve})
        os.utime(path, (i, i))
    store_curves(tmp_path / "3.npz", {"a/b": curve})
    assert sorted(p.name for p in tmp_path.glob("*.npz")) == ["2.npz", "3.npz"]
    found = load_curves(tmp_path / "3.npz")
    assert found is not None and found["a/b"].worth == 2.0 and found["a/b"].deviation is None
    np.testing.assert_array_equal(found["a/b"].errors, curve.errors)
