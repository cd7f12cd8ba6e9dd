"""The choices beyond the default on exported models: one architecture, exporter and kind of fused operator each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import words
import zoo
import zoo_decoders

from liar_opt import prune

CASES = zoo.cases(fast=True)


@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_curves_a_search_and_a_dense_target(case: zoo.Case) -> None:
    """Tied groups, caches, float16, fused attention: measured, searched, fitted to the dense twin, and exact."""
    feeds = [zoo.feeds_of(case, seed=seed) for seed in range(10)]
    result = prune(
        zoo.ready(case).path, feeds, sparsity=0.4, multiple_of=4, search=0.5, repair="residual", seed=3, latency=False
    )
    report = result.report
    assert len(report["curves"]) == len(report["groups"])
    for group in report["groups"]:
        points = report["curves"][group["name"]]["points"]
        assert points[0][0] == 0 and points[-1] == [group["before"], 0.0]
        assert all(a[1] >= b[1] >= 0 for a, b in itertools.pairwise(points))
    assert report["search"]["found"] <= report["search"]["start"]
    prunable = sum(g["parameters"] for g in report["groups"])
    removed = sum(g["parameters"] * (1 - g["after"] / g["before"]) for g in report["groups"])
    largest = max(g["parameters"] / g["before"] * (4 if g["kind"] == "ffn" else 1) for g in report["groups"])
    assert abs(removed - 0.4 * prunable) <= largest + 1


def test_values_within_heads_beside_the_rest() -> None:
    """Values are cut in a second sweep, in which the dense twin runs along again; the search leaves them alone."""
    case = CASES[0]
    feeds = [zoo.feeds_of(case, seed=seed) for seed in range(6)]
    result = prune(
        zoo.ready(case).path, feeds, sparsity=0.3, values=0.5, search=0.2, repair="residual", multiple_of=4, latency=False
    )
    halves = [g["after"] / g["before"] for g in result.report["groups"] if g["kind"] == "values"]
    assert halves and set(halves) == {0.5}
    assert {r["repair"] for g in result.report["groups"] for r in g.get("repairs", ())} <= {"dense", "repair", "bias"}


def test_a_decoder_with_a_cache(tmp_path: Path) -> None:
    """Grouped heads and caches that lose them: curves, a search and a dense twin over the same feeds."""
    texts = ["the cat sat on a mat while rain fell over london", "nobody said one more word about it today"] * 40
    path = zoo_decoders.ready(zoo_decoders.Case("llama", "torchscript", cache=True)).path
    tokenizer = words.plain_tokenizer(tmp_path / "tokenizer")
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "sequence_length": 8,
        "batch_size": 4,
        "multiple_of": 4,
        "latency": False,
    }
    report = prune(path, texts, sparsity=0.4, search=0.5, repair="residual", **options).report
    assert report["search"]["found"] <= report["search"]["start"]
    assert {g["kind"] for g in report["groups"]} == {"ffn", "heads"}
    assert report["verification"]["exact_difference"] < 1e-4
    limited = prune(path, texts, max_drop="5%", **options).report
    assert 0 <= limited["target"]["found"] <= 0.05 and limited["verification"]["exact_difference"] < 1e-4
    smaller = prune(path, texts, target="params=0.85x", **options).report
    assert smaller["after"]["parameters"] / smaller["before"]["parameters"] == pytest.approx(0.85, abs=0.03)
