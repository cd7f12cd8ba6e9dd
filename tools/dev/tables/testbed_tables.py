"""What `bench.py testbed` has measured, as markdown tables and as the chart of scores against size."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from liar_opt.tools.dev.harness import table
from liar_opt.tools.html_elements import Markup, element
from liar_opt.tools.svg_charts import (
    BOTTOM,
    CHART_STYLE,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Mark,
    around,
    dot,
    framed,
    percent,
)

Cell = dict[str, Any]
KEY_ROW = 15.0
TITLES = {
    "sentiment": "Sentiment classifier",
    "minilm": "MiniLM",
    "whisper": "Whisper tiny.en",
    "smollm2": "SmolLM2-135M-Instruct",
}
TOLD = {
    "sentiment": "Accuracy on {samples:,} held-out sentences of film reviews; calibrated on 512 others of the train part.",
    "minilm": "Cosine of the embeddings to the dense model's on {samples:,} sentences of film reviews; Spearman's "
    "correlation with people on 1,225 pairs of news items, 353 and 999 pairs of words; calibrated on 512 sentences of NYT "
    "editorials.",
    "smollm2": "Perplexity on {samples} windows of 128 tokens of Wikipedia; calibrated on 128 windows of as many of Brown.",
}


class Series(NamedTuple):
    """A line of the chart."""

    subject: str
    task: str
    name: str


SERIES = (
    Series("sentiment", "accuracy", "classifier: accuracy"),
    Series("minilm", "cosine", "MiniLM: cosine"),
    Series("minilm", "Lee50", "MiniLM: Lee50"),
    Series("minilm", "WordSim-353", "MiniLM: WordSim-353"),
    Series("minilm", "SimLex-999", "MiniLM: SimLex-999"),
)


def markdown(cells: dict[str, Cell], names: Sequence[str], ratios: Sequence[float]) -> Iterator[str]:
    """A heading, what was measured, and the table of each model that has cells."""
    for name in names:
        found = [(ratio, cells[f"{name} {ratio:g}"]) for ratio in ratios if f"{name} {ratio:g}" in cells]
        if not found:
            continue
        yield f"### {TITLES[name]}\n\n`python tools/dev/bench.py testbed --only {name}`\n"
        yield _whisper(cells, found) if name == "whisper" else _subject(name, found)
        if name == "sentiment":
            yield from _largest(cells)


def _subject(name: str, found: Sequence[tuple[float, Cell]]) -> str:
    tasks = found[0][1]["tasks"]
    first = next(iter(tasks))
    dense = found[0][1]
    rows = [["dense", _millions(dense["parameters"][0]), *(_value(n, t["dense"]) for n, t in tasks.items()), "", ""]]
    for ratio, cell in found:
        shown = [_value(n, t["value"]) for n, t in cell["tasks"].items()]
        against = _against_dense(cell["tasks"][first])
        rows.append([f"{100 * ratio:.0f} %", _millions(cell["parameters"][1]), *shown, *against])
    told = TOLD[name].format(samples=tasks[first]["samples"])
    head = ["removed of the prunable", "parameters", *tasks, f"{first} over dense", "difference, 95 % interval"]
    return f"{told}\nSeed 0; {_commits(c for _, c in found)}.\n\n{table(head, rows)}"


def _largest(cells: dict[str, Cell]) -> Iterator[str]:
    """The largest sparsity that keeps 99 % on dev, and what it keeps on test."""
    for key, cell in cells.items():
        if key.startswith("largest "):
            ratio = float(key.removeprefix("largest "))
            dev, task = cells[f"dev {ratio:g}"]["tasks"]["accuracy"], cell["tasks"]["accuracy"]
            kept, interval = _against_dense(task)
            yield (
                f"The largest sparsity, in steps of 5 %, that keeps 99 % of the accuracy on dev is {100 * ratio:.0f} % "
                f"({dev['value']:.4f} of {dev['dense']:.4f}): {_millions(cell['parameters'][1])} parameters. On test it "
                f"keeps {task['value']:.4f} of {task['dense']:.4f} ({kept}; difference {interval}); {_commits([cell])}.\n"
            )


def _whisper(cells: dict[str, Cell], found: Sequence[tuple[float, Cell]]) -> str:
    dense = cells.get("whisper 0")
    rows = []
    for ratio, cell in ([] if dense is None else [(0.0, dense)]) + list(found):
        rate = f"{100 * cell['errors'] / cell['words']:.1f} %"
        rows.append([f"{100 * ratio:.0f} %" if ratio else "dense", f"{100 * cell['left']:.1f} %", rate])
    told = f"Word error rate on {found[0][1]['words']} words of Asterisk's prompts; calibrated on others."
    head = ["removed of the prunable", "parameters left", "word error rate"]
    return f"{told}\nSeed 0; {_commits(c for _, c in found)}.\n\n{table(head, rows)}"


def _against_dense(task: dict[str, Any]) -> tuple[str, str]:
    ratio = task["value"] / task["dense"]
    return f"{100 * ratio:.1f} %", f"{task['low']:+.4f} to {task['high']:+.4f}"


def _value(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "perplexity" else f"{value:.4f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _commits(cells: Any) -> str:
    return f"commit {', '.join(dict.fromkeys(c['commit'] for c in cells))}"


def chart(cells: dict[str, Cell], ratios: Sequence[float]) -> str:
    """Scores over the dense model's against parameters, as a file of its own.

    Raises:
        SystemExit: there is nothing to draw.
    """
    lines = []
    for index, series in enumerate(SERIES):
        found = [cells[f"{series.subject} {r:g}"] for r in ratios if f"{series.subject} {r:g}" in cells]
        if found:
            tasks = [c["tasks"][series.task] for c in found]
            points = [(c["parameters"][1] / 1e6, t["value"] / t["dense"]) for c, t in zip(found, tasks, strict=True)]
            lines.append(Line(series.name, [(found[0]["parameters"][0] / 1e6, 1.0), *points], index))
    if not lines:
        raise SystemExit("no cells of the classifier and of MiniLM to draw; leave out --tables-only")
    return standalone(trends(lines, "Scores against size", "parameters, million", "score over dense"))


class Line(NamedTuple):
    """A line of a chart: its name, its points, and its colour."""

    name: str
    points: Sequence[tuple[float, float]]
    series: int


def trends(drawn: Sequence[Line], label: str, x_label: str, y_label: str) -> Markup:
    """Lines with a dot at every point on linear axes, and their names below."""
    x = around([px for line in drawn for px, _ in line.points], LEFT, WIDTH - RIGHT)
    y = around([py for line in drawn for _, py in line.points], HEIGHT - BOTTOM, TOP)
    shapes = []
    for index, line in enumerate(drawn):
        places = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in line.points)
        shapes.append(element("polyline", points=places, class_=f"line k{line.series % COLOURS}"))
        shapes += [
            dot(x(px), y(py), Mark(px, py, line.series, f"{line.name}: {py:.4f} at {px:.4g}")) for px, py in line.points
        ]
        left, top = (LEFT, (LEFT + WIDTH) / 2)[index % 2], HEIGHT + KEY_ROW * (index // 2) + 6
        shapes.append(element("circle", cx=left, cy=top, r=4.0, class_=f"dot k{line.series % COLOURS}"))
        shapes.append(element("text", line.name, x=left + 9, y=top + 4, class_="ink"))
    below = KEY_ROW * -(-len(drawn) // 2)
    return framed(label, x, y, lambda v: f"{v:g}", percent, x_label, y_label, *shapes, below=below)


def standalone(chart: Markup) -> str:
    """Returns a chart as the text of an SVG file, on paper of its own: the page around it may be light or dark."""
    paper = element("rect", width="100%", height="100%", fill="var(--paper)")
    style = element("style", Markup(CHART_STYLE))
    inside = chart.removeprefix("<svg")
    return f'<svg xmlns="http://www.w3.org/2000/svg"{inside.replace(">", f">{style}{paper}", 1)}\n'
