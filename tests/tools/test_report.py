"""Tables: golden files of one report that has every feature, and what each feature's absence does."""

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import RenderableType

from liar_opt.tools import report as tables

Golden = Callable[[str, str], None]

REPORT: dict[str, Any] = {
    "schema": 1,
    "before": {"parameters": 22565376, "bytes": 90261504, "nodes": 251, "flops": 9600000000, "file_bytes": 90359515},
    "after": {"parameters": 15472000, "bytes": 61888000, "nodes": 155, "flops": 5100000000, "file_bytes": 61990000},
    "device": "cpu",
    "refusals": [
        {
            "reason": "Softmax runs over it (node '/layer.0/[b]attention[/b]')",
            "nodes": ["one", "two", "three", "four", "five"],
            "size": 384,
        },
        {"reason": "operator com.example.Odd has no rule", "nodes": ["/odd"], "size": 0},
    ],
    "calibration": {"source": "texts.txt, 512 of 5119 texts drawn with seed 0", "synthetic": False, "warnings": []},
    "groups": [
        {
            "name": "/layer.0/attention/[0]/MatMul",
            "kind": "heads",
            "before": 12,
            "after": 6,
            "block_width": 32,
            "parameters": 590976,
            "consumers": ["/layer.0/attention/[0]/MatMul", "/layer.1/attention/[0]/MatMul"],
            "repairs": [
                {
                    "node": "/layer.0/attention/[0]/MatMul",
                    "ridge": 1e-3,
                    "ridge_raised": False,
                    "repair": "repair",
                    "error_none": 0.456,
                    "error_bias": 0.0159,
                    "error_repair": 0.0078,
                },
                {
                    "node": "/other/MatMul",
                    "ridge": 1e-2,
                    "ridge_raised": True,
                    "repair": "repair",
                    "error_none": 0.3,
                    "error_bias": 0.2,
                    "error_repair": 0.1,
                },
            ],
        },
        {
            "name": "/layer.0/output/MatMul",
            "kind": "ffn",
            "before": 1536,
            "after": 768,
            "block_width": 1,
            "parameters": 1181184,
            "consumers": ["/layer.0/output/MatMul"],
            "repairs": [
                {
                    "node": "/layer.0/output/MatMul",
                    "ridge": None,
                    "ridge_raised": False,
                    "repair": "bias",
                    "error_none": 0.27,
                    "error_bias": 0.2,
                    "error_repair": 0.2,
                }
            ],
        },
    ],
    "prunable_parameters": 1772160,
    "prunable": {"before": 1772160, "after": 886080},
    "verification": {
        "exact_difference": 3.2e-7,
        "exact_dtype": "float32",
        "outputs": {"last_hidden_state": {"relative_rms": 0.3821, "cosine": 0.9351, "rows": 2246}},
    },
    "latency": {
        "dense_seconds": 0.09532,
        "pruned_seconds": 0.05213,
        "speedup": 1.8285,
        "runs": 12,
        "batch": "input_ids [32, 14]",
    },
    "seconds": {"find-groups": 0.05, "prune-groups": 10.08, "total": 10.2},
}


def text(*renderables: RenderableType, width: int = 140) -> str:
    stream = io.StringIO()
    console = tables.make_console(stream, width)
    for renderable in renderables:
        console.print(renderable)
    return stream.getvalue()


def without(*path: str) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    inner = report
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return report


def test_golden_before_after(golden: Golden) -> None:
    golden("before_after.txt", text(tables.before_after(REPORT), *tables.footnotes(REPORT)))


def test_golden_inspection(golden: Golden) -> None:
    golden("inspection.txt", text(tables.groups_found(REPORT), tables.refusals(REPORT), tables.refusals_counted(REPORT)))


def test_golden_explained(golden: Golden) -> None:
    explained = [tables.groups_found(REPORT, True), tables.groups_pruned(REPORT), tables.refusals(REPORT, True)]
    golden("explained.txt", text(*explained, tables.seconds(REPORT["seconds"])))


def test_a_report_read_from_json_prints_the_same() -> None:
    again = json.loads(json.dumps(REPORT))
    assert text(tables.before_after(again), tables.groups_pruned(again)) == text(
        tables.before_after(REPORT), tables.groups_pruned(REPORT)
    )


def test_names_that_look_like_markup_are_printed_whole() -> None:
    shown = text(tables.groups_pruned(REPORT), tables.refusals(REPORT), width=200)
    assert "/layer.0/attention/[0]/MatMul" in shown
    assert "'/layer.0/[b]attention[/b]'" in shown


def test_without_latency() -> None:
    report = without("latency")
    assert "latency" not in text(tables.before_after(report))
    assert "latency was not measured" in "".join(tables.footnotes(report))


def test_without_file_sizes_the_weights_are_counted() -> None:
    shown = text(tables.before_after(without("after", "file_bytes")))
    assert "bytes of weights" in shown
    assert "bytes on disk" not in shown


def test_a_slower_model_is_called_slower() -> None:
    report = copy.deepcopy(REPORT)
    report["latency"]["speedup"] = 0.5
    assert "2.00 x slower" in text(tables.before_after(report))


def test_synthetic_data_is_called_random() -> None:
    report = copy.deepcopy(REPORT)
    report["calibration"]["synthetic"] = True
    assert "random inputs, not your data" in "".join(tables.footnotes(report))


def test_a_dry_run_has_no_errors() -> None:
    report = copy.deepcopy(REPORT)
    for group in report["groups"]:
        del group["repairs"]
    shown = text(tables.groups_pruned(report))
    assert "768" in shown
    assert "error" not in shown


def test_few_nodes_unless_explained() -> None:
    short, whole = text(tables.refusals(REPORT)), text(tables.refusals(REPORT, True))
    assert "and 2 more" in short
    assert "five" not in short
    assert "five" in whole


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (39321600, "39.3 M"), (9.6e9, "9.6 G"), (5e20, "500000.0 P")],
)
def test_quantity(value: float, shown: str) -> None:
    assert tables.quantity(value) == shown


def test_quantity_with_a_unit() -> None:
    assert tables.quantity(90359515, "B") == "90.4 MB"
    assert tables.quantity(12, "B") == "12 B"


def test_shares_of_nothing_are_blank() -> None:
    assert tables.percent(1, 0) == ""
    assert tables.change({"parameters": 0}, {"parameters": 3}, "parameters") == ""


def test_logits_say_how_often_the_largest_changes() -> None:
    report = copy.deepcopy(REPORT)
    assert "the largest" not in text(tables.before_after(report))
    report["verification"]["outputs"]["last_hidden_state"]["changed_top1"] = 0.0313
    (row,) = (line for line in text(tables.before_after(report)).splitlines() if "the largest" in line)
    assert row.split()[-2:] == ["3.13", "%"]


def test_layers_that_went_whole_are_counted_and_named() -> None:
    report = copy.deepcopy(REPORT)
    first = report["groups"][0]
    gone = {**first, "after": 0, "kept": []}
    report["groups"] += [{**gone, "name": "a", "stand_in": "map"}, {**gone, "name": "b", "stand_in": "map"}]
    report["groups"] += [{**gone, "name": "c", "stand_in": "constant"}]
    stream = io.StringIO()
    console = tables.make_console(stream)
    console.print(tables.before_after(report))
    console.print(tables.groups_pruned(report))
    lines = stream.getvalue().splitlines()
    assert any("layers gone whole" in line and "1 by a constant, 2 by a map" in line for line in lines)
    assert sum("0 (map)" in line for line in lines) == 2 and sum("0 (constant)" in line for line in lines) == 1
    assert "gone whole" not in "".join(map(str, tables.before_after(REPORT).columns[0]._cells))
