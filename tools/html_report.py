"""A report as one HTML file: ``render`` takes the plain data of a run of ``prune`` or ``eval`` and returns the page.

The page loads nothing and runs nothing, follows the reader's light or dark, and fits a phone: charts are as wide as the
text, tables scroll in boxes of their own. Its numbers are those of the tables (`report`), which are shown whole.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from liar_opt.tools import eval_command
from liar_opt.tools import report as tables
from liar_opt.tools.html_elements import Markup, document, element, joined, table
from liar_opt.tools.report import Report, milliseconds, quantity
from liar_opt.tools.svg_charts import CHART_STYLE, Mark, columns, dots, intervals, lines, percent, scatter

MARK = "<!DOCTYPE html><!-- liar-opt report -->"
"""How the page begins: a file that does so may be replaced."""
STYLE = (
    CHART_STYLE
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-top: 1px solid var(--grid); padding-top: 1rem; }
h3 { font-size: 1rem; margin: .75rem 0 .25rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .875rem; }
.lead { font-size: 1.1rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.charts > div { min-width: 0; max-width: 36rem; }
.scroll { overflow-x: auto; max-width: 100%; background: var(--box); border-radius: .4rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .3rem .7rem; text-align: left; vertical-align: top; white-space: pre; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--grid); }
.number { text-align: right; }
td:first-child { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 8rem; }
svg { display: block; width: 100%; height: auto; }
.key { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.key svg { display: inline-block; width: .8rem; height: .8rem; vertical-align: -1px; margin-right: .3rem; }
pre { overflow-x: auto; background: var(--box); padding: .7rem; border-radius: .4rem; font-size: .8rem; }
summary { cursor: pointer; }
"""
)


def render(report: Report) -> str:
    """Returns the page of a report of ``prune``, a dry run of it, ``inspect``, or ``eval``."""
    if report.get("command") == "eval":
        return document(f"liar-opt: {report['task']}", MARK, STYLE, *_evaluation(report), _details(report))
    name = PurePath(report["model"]["path"] or "a model in memory").name
    if "prunable_parameters" in report:  # nothing was chosen
        return document(f"liar-opt inspect: {name}", MARK, STYLE, *_inspection(report, name), _details(report))
    return document(f"liar-opt: {name}", MARK, STYLE, *_pruning(report, name), _details(report))


# Pruning --------------------------------------------------------------------------------------------------------------


def _pruning(report: Report, name: str) -> Iterator[Markup | None]:
    yield element("h1", name)
    before, groups = report["before"]["parameters"], report["groups"]
    if "after" in report:
        less = tables.percent(max(before - report["after"]["parameters"], 0), before)
        yield element("p", f"{less} of the parameters removed", class_="lead")
        notes = (element("p", line, class_="note") for line in tables.footnotes(report))
        yield _section("Dense and pruned", table(tables.before_after(report)), *notes)
    else:
        yield element("p", "A dry run: the widths that were chosen. Nothing was cut.", class_="lead")
    if "patterned" in report:
        yield _section("Zeros by weight", table(tables.patterns(report)))
    if "quantised" in report:
        below = (element("p", line, class_="note") for line in tables.corner_notes(report))
        yield _section("In float and quantised", table(tables.corners(report)), *below)
    if "target" in report and "after" in report:
        yield element("p", tables.target_met(report))
    if "fitted" in report and "after" in report:
        yield element("p", tables.runtime_fit(report))
    warnings = [*report["model"]["notes"], *report.get("calibration", {}).get("warnings", ())]
    if warnings:
        yield _section("Warnings", *(element("p", line) for line in warnings))
    kinds = list(dict.fromkeys(g["kind"] for g in groups))
    if not groups:  # the vocabulary or a pattern alone
        return
    yield _section("Sparsity by layer and kind", *_sparsity(groups, kinds))
    yield _section("Error before and after repair", *_errors(groups))
    if report.get("curves"):
        yield _section("Error curves", *_curves(report, kinds))
    if report.get("evaluation"):
        yield _section("Score against size and latency", *_score(report))
    yield _section("Every group", table(tables.groups_pruned(report)))
    yield _refused(report)


def _inspection(report: Report, name: str) -> Iterator[Markup]:
    share = tables.percent(report["prunable_parameters"], report["before"]["parameters"])
    yield element("h1", name)
    yield element("p", f"{share} of {report['before']['parameters']:,} parameters could be narrower", class_="lead")
    for line in report["model"]["notes"]:
        yield element("p", line)
    found = table(tables.groups_found(report, explain=True)) if report["groups"] else element("p", "None was found.")
    yield _section("Groups that may be pruned", found)
    yield _refused(report)


def _refused(report: Report) -> Markup:
    refused = table(tables.refusals(report, explain=True)) if report["refusals"] else element("p", "Nothing was refused.")
    return _section("Left alone, and why", refused)


def _section(title: str, *children: str | None) -> Markup:
    return element("section", element("h2", title), *children)


def _charts(*charts: Markup | None) -> Markup:
    return element("div", *(element("div", chart) for chart in charts if chart is not None), class_="charts")


def _keys(names: Sequence[str], hollow: Sequence[bool] = ()) -> Markup:
    """A legend: the colours in order."""
    shown = []
    for index, name in enumerate(names):
        style = f"{'ring' if index < len(hollow) and hollow[index] else 'dot'} k{index % 6}"
        dot = element("svg", element("circle", cx=5, cy=5, r=4, class_=style), viewBox="0 0 10 10", aria_hidden="true")
        shown.append(element("span", dot, name, class_="key"))
    return element("p", *shown, class_="note")


def _sparsity(groups: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Iterator[Markup]:
    charts = []
    for index, kind in enumerate(kinds):
        own = [(g["name"], g["after"] / g["before"], index) for g in groups if g["kind"] == kind]
        kept = sum(g["after"] for g in groups if g["kind"] == kind)
        whole = sum(g["before"] for g in groups if g["kind"] == kind)
        title = f"{kind}: {kept:,} of {whole:,} kept in {len(own)} {'group' if len(own) == 1 else 'groups'}"
        gone = sum("stand_in" in g for g in groups if g["kind"] == kind)
        title += f", {gone} gone whole" if gone else ""
        charts.append(joined([element("h3", title), columns(own, title, "groups, input to output", "kept")]))
    yield _charts(*charts)


def _errors(groups: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    """The error of each group's worst consumer: without repair, with the bias, with the repair."""
    stages = ("none", "bias", "repair")
    marks = []
    for place, group in enumerate(groups, 1):
        for series, stage in ((0, "repair"), (1, "bias"), (2, "none")):
            found = [r[f"error_{stage}"] for r in group.get("repairs") or ()]
            if found:
                marks.append(
                    Mark(place, max(found), series, f"{group['name']}, {stage}: {100 * max(found):.2f} %", series > 0)
                )
    chart = dots(marks, "Error of each group before and after repair", "group, in order", "relative error")
    if chart is None:
        yield element("p", f"Not measured ({', '.join(stages)}): nothing was cut, or nothing was lost.", class_="note")
        return
    yield _keys(["after repair", "bias only", "no repair"], [False, True, True])
    yield _charts(chart)
    yield element(
        "p",
        "Mean squared error of what the group writes, relative to its mean square, on the calibration rows; of several "
        "readers of one group the worst.",
        class_="note",
    )


def _curves(report: Report, kinds: Sequence[str]) -> Iterator[Markup]:
    chosen = {g["name"]: g["after"] / g["before"] for g in report["groups"]}
    charts = []
    for index, kind in enumerate(kinds):
        series, marks = [], []
        for name, curve in report["curves"].items():
            if curve["kind"] != kind:
                continue
            points = [(kept / curve["size"], error) for kept, error in curve["points"]]
            series.append((name, points))
            share = chosen.get(name, 1.0)
            marks.append(Mark(share, _between(points, share), index, f"{name}: {percent(round(share, 3))} kept"))
        chart = lines(series, marks, index, f"Error curves: {kind}", "kept", "error of the output")
        if chart is not None:
            charts.append(joined([element("h3", kind), chart]))
    yield _charts(*charts)
    yield element(
        "p",
        "What each width would cost the model's output after repair (relative squared difference), measured on the dense "
        "model; one line a group, the stronger the nearer to the output. Dots are the widths that were chosen.",
        class_="note",
    )


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Returns the height of a curve at x, on straight lines between its points."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return 0.0


def _score(report: Report) -> Iterator[Markup]:
    evaluation, latency = report["evaluation"], report.get("latency")
    size = "file_bytes" if "file_bytes" in report["before"] else "bytes"
    scores = (("dense", 1.0, "before"), ("pruned", evaluation["cosine"], "after"))
    sizes = [(name, report[side][size], score) for name, score, side in scores]
    times = [(name, latency[f"{name}_seconds"], score) for name, score, _ in scores] if latency else []
    yield element("h3", evaluation["name"])
    yield _size_and_latency(evaluation["name"], sizes, times)


def _size_and_latency(
    name: str, sizes: Sequence[tuple[str, float, float]], times: Sequence[tuple[str, float, float]]
) -> Markup:
    """Two charts of a score: against bytes, and against seconds; (model, cost, score) each."""

    def chart(points: Sequence[tuple[str, float, float]], what: str, form: Any) -> Markup | None:
        marks = [Mark(cost, score, index, model) for index, (model, cost, score) in enumerate(points)]
        return scatter(marks, f"{name} against {what}", what, "score", form, lambda v: f"{v:.4g}") if points else None

    return _charts(chart(sizes, "bytes on disk", lambda v: quantity(v, "B")), chart(times, "latency", milliseconds))


# Evaluation -----------------------------------------------------------------------------------------------------------


def _evaluation(report: Report) -> Iterator[Markup | None]:
    models = report["models"]
    yield element("h1", report["task"])
    yield element("p", report["data"], class_="lead")
    notes = (element("p", line, class_="note") for line in eval_command.footnotes(report))
    yield _section("Scores", table(eval_command.metrics_table(report)), *notes)
    yield _section("Models", table(eval_command.models_table(report)))
    if len(models) > 1:
        charts = []
        for name, metric in report["metrics"].items():
            rows = [
                (model["name"], d["difference"], d["low"], d["high"], index)
                for index, (model, d) in enumerate(zip(models[1:], metric["differences"], strict=True), 1)
            ]
            told = f"difference to {models[0]['name']}, {100 * report['level']:.0f} % interval"
            charts.append(joined([element("h3", name), intervals(rows, f"Differences of {name}", told)]))
        yield _section("Differences", _charts(*charts))
    charts = []
    for name, metric in report["metrics"].items():
        scores = list(zip(models, metric["values"], strict=True))
        sizes = [(m["name"], m["bytes"], v) for m, v in scores]
        times = [(m["name"], m["latency_seconds"], v) for m, v in scores if "latency_seconds" in m]
        charts.append(joined([element("h3", name), _size_and_latency(name, sizes, times)]))
    yield _section("Scores against size and latency", *charts)


def _details(report: Report) -> Markup:
    """What the run was: versions, options, times."""
    known = ("liar_opt", "versions", "model", "output", "device", "seed", "options", "calibration", "memory", "seconds")
    shown = {key: report[key] for key in known if key in report}
    text = json.dumps(shown, indent=1, ensure_ascii=False, default=str)
    return _section("The run", element("details", element("summary", "Versions, options and times"), element("pre", text)))
