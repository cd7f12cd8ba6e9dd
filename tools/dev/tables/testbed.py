"""The testbed: four models that stand for what users have, dense and at each sparsity, on real tasks.

    python tools/dev/bench.py testbed                                 # what is missing, then the tables; half an hour
    python tools/dev/bench.py testbed --only sentiment --ratios 0.5  # one cell
    python tools/dev/bench.py testbed --seconds 800                   # begins no other cell after so long
    python tools/dev/bench.py testbed --tables-only --chart docs/testbed.svg

- sentiment: MiniLM fine-tuned as a classifier of film reviews (`sentiment.py`); calibrated on texts of its train part.
- minilm: all-MiniLM-L6-v2; calibrated on NYT editorials; cosine to itself on film reviews, and Spearman's correlation with
  what people said of 1,225 pairs of news items (Lee et al. 2005) and of word pairs (WordSim-353, SimLex-999; gensim's test
  data).
- whisper: Whisper tiny.en (`bench.py whisper`): word error rate.
- smollm2: SmolLM2-135M-Instruct (`smollm2.py`): perplexity on Wikipedia, windows of 128; calibrated on Brown.

A cell is two commands of the product, `liar-opt --sparsity` with its defaults and `liar-opt eval` of the dense and the
pruned model. What it found is kept in `--cells` (JSON) and not measured again. Some more belong to the classifier: the
largest sparsity, in steps of 5 %, that keeps 99 % of the accuracy on dev, found by bisection; it is measured on test, once.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools import cli
from liar_opt.tools.demo_assets import export_minilm, minilm_folder, moved_into_place, sentences, split
from liar_opt.tools.dev.harness import Cells, commit, parser_of, say
from liar_opt.tools.dev.subjects import sentiment, smollm2

MODELS = ("sentiment", "minilm", "whisper", "smollm2")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
REVIEWS = 1024
WINDOW, WINDOWS, CALIBRATION_WINDOWS = 128, 64, 128
STEPS = 20
ENOUGH = 0.99
"""Of the accuracy on dev."""


class Task(NamedTuple):
    """One figure: what it is called, how `liar-opt eval` measures it, and which of its metrics it is."""

    label: str
    options: tuple[str, ...]
    metric: str


class Subject(NamedTuple):
    """A model with what prunes and what measures it."""

    model: Path
    tokenizer: Path
    calibration: tuple[str, ...]
    tasks: tuple[Task, ...]


Cell = dict[str, Any]
Missing = tuple[str, Callable[[], Cell]]


# The models and their data ---------------------------------------------------------------------------------------------


def sentiment_subject(folder: Path, part: str = "test") -> Subject:
    """The classifier, measured on one of its parts."""
    bed = sentiment.ensure(folder / "sentiment")
    task = Task("accuracy", ("--task", "classification", "--data", str(bed.part(part))), "accuracy")
    return Subject(bed.model, bed.checkpoint, ("--calibration", str(bed.part("train"))), (task,))


def sentiment_dev(folder: Path) -> Subject:
    """The classifier, measured where something is chosen."""
    return sentiment_subject(folder, "dev")


def minilm_subject(folder: Path) -> Subject:
    """MiniLM as it is."""
    model = folder / "testbed" / "minilm.onnx"
    if not model.is_file():
        export_minilm(model)
    reviews = (s.text for s in split("reviews", REVIEWS, 0).chosen)
    texts = rows_file(folder / "testbed" / "reviews.jsonl", ({"text": text} for text in reviews))
    nyt = rows_file(folder / "testbed" / "nyt.jsonl", ({"text": s.text} for s in sentences("nyt")))
    tasks = [Task("cosine", ("--task", "embeddings", "--data", str(texts)), "cosine")]
    for label, name, pairs in (
        ("Lee50", "lee50", lee_pairs),
        ("WordSim-353", "wordsim353", lambda: word_pairs("wordsim353.tsv")),
        ("SimLex-999", "simlex999", lambda: word_pairs("simlex999.txt")),
    ):
        data = folder / "testbed" / f"{name}.jsonl"
        if not data.is_file():
            rows_file(data, ({"sentence1": a, "sentence2": b, "score": score} for a, b, score in pairs()))
        tasks.append(Task(label, ("--task", "sts", "--data", str(data)), "spearman"))
    return Subject(model, minilm_folder(), ("--calibration", str(nyt)), tuple(tasks))


def smollm2_subject(folder: Path) -> Subject:
    """The decoder."""
    model, tokenizer = smollm2.ensure(folder / "smollm2")
    files = {}
    for name, windows in (("brown", CALIBRATION_WINDOWS), ("wikipedia", WINDOWS)):
        files[name] = folder / "testbed" / f"{name}.txt"
        if not files[name].is_file():
            # more than a token a word, so that there are enough
            lines = "\n".join(smollm2.draw(name, WINDOW * windows, 0)).splitlines()  # type: ignore[arg-type]
            files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    calibration = ("--calibration", str(files["brown"]), "--samples", str(CALIBRATION_WINDOWS))
    task = Task(
        "perplexity",
        ("--task", "perplexity", "--data", str(files["wikipedia"]), "--window", str(WINDOW), "--samples", str(WINDOWS)),
        "perplexity",
    )
    return Subject(model, tokenizer, (*calibration, "--sequence-length", str(WINDOW), "--batch-size", "8"), (task,))


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "sentiment": sentiment_subject,
    "minilm": minilm_subject,
    "smollm2": smollm2_subject,
}


def lee_pairs() -> Iterator[tuple[str, str, float]]:
    """Pairs of news items with the mean of what people said: 0 (unlike) to 1 (alike)."""
    texts = smollm2._gensim("lee.cor").decode("latin-1").splitlines()
    said = np.array([line.split() for line in smollm2._gensim("similarities0-1.txt").decode("ascii").splitlines()], float)
    for i, j in zip(*np.triu_indices(len(texts), 1), strict=True):
        yield texts[i], texts[j], float(said[i, j])


def word_pairs(name: str) -> Iterator[tuple[str, str, float]]:
    """Pairs of words with what people said, of one of gensim's files."""
    for line in smollm2._gensim(name).decode("utf-8").splitlines():
        if not line.startswith("#"):
            first, second, score = line.split("\t")
            yield first, second, float(score)


def rows_file(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """Writes rows as .jsonl where the file is not there yet."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with moved_into_place(path) as temporary:
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# Cells -----------------------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> None:
    """Runs the product's command in this process; its tables go to stderr.

    Raises:
        SystemExit: it failed.
    """
    with contextlib.redirect_stdout(sys.stderr):
        code = cli.main([*map(str, arguments), "--quiet"])
    if code:
        raise SystemExit(f"liar-opt {' '.join(map(str, arguments))} ended with {code}")


def pruned(subject: Subject, output: Path, *options: str) -> Cell:
    """Prunes with the command and says what became of the model."""
    report = output.with_suffix(".json")
    began = time.perf_counter()
    shared = ("--tokenizer", subject.tokenizer, "--provider", "cpu", "--no-latency", "--report", report)
    run("prune", subject.model, "-o", output, *subject.calibration, *options, *shared)
    return summary(json.loads(report.read_text(encoding="utf-8")), time.perf_counter() - began)


def summary(report: dict[str, Any], seconds: float) -> Cell:
    """What a cell keeps of the report of a pruning."""
    groups = report["groups"]
    gone = sum(g["parameters"] * (1 - g["after"] / g["before"]) for g in groups)
    return {
        "parameters": [report[side]["parameters"] for side in ("before", "after")],
        "removed": gone / sum(g["parameters"] for g in groups),
        "widths": {g["name"]: [g["kind"], g["after"], g["before"]] for g in groups},
        "prune_seconds": round(seconds, 1),
    }


def measured(subject: Subject, output: Path) -> dict[str, Cell]:
    """Figures of the dense and the pruned model, by the label of their task."""
    found = {}
    for task in subject.tasks:
        report = output.with_suffix(".eval.json")
        shared = ("--tokenizer", subject.tokenizer, "--provider", "cpu", "--no-latency", "--report", report)
        run("eval", subject.model, output, *task.options, "--metric", task.metric, *shared)
        (metric,) = json.loads(report.read_text(encoding="utf-8"))["metrics"].values()
        dense, value = metric["values"]
        (difference,) = metric["differences"]
        found[task.label] = {"dense": dense, "value": value, "samples": metric["samples"], **difference}
    return found


def subject_cell(make: Callable[[Path], Subject], folder: Path, *options: str) -> Cell:
    """Prunes with some options and measures."""
    subject = make(folder)
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "pruned.onnx"
        return {**pruned(subject, output, *options), "tasks": measured(subject, output)}


def whisper_cell(folder: Path, ratio: float) -> Cell:
    """Word errors of both halves pruned with the defaults; dense at 0."""
    from liar_opt.tools.dev.tables.whisper import Workplace

    work = Workplace(parser_of("tables.whisper").parse_args(["--folder", str(folder / "whisper")]))
    found = work.cell({"sparsity": ratio, "fresh": False} if ratio else {})
    return {key: found[key] for key in ("errors", "words", "left", "prune_seconds") if key in found}


# Which there are -------------------------------------------------------------------------------------------------------


def wanted(names: Sequence[str], ratios: Sequence[float], folder: Path, cells: dict[str, Cell]) -> Iterator[Missing]:
    """Names of all cells in the order in which they are made, each with what makes it."""
    for name in (n for n in MODELS if n in names):
        for ratio in ratios:
            if name == "whisper":
                yield f"{name} {ratio:g}", partial(whisper_cell, folder, ratio)
            else:
                yield f"{name} {ratio:g}", partial(subject_cell, SUBJECTS[name], folder, "--sparsity", f"{ratio:g}")
        if name == "whisper":
            yield f"{name} 0", partial(whisper_cell, folder, 0.0)
    if "sentiment" in names:
        yield from largest(folder, cells)


def largest(folder: Path, cells: dict[str, Cell]) -> Iterator[Missing]:
    """The cells of the bisection on dev, each chosen by those before it, and that of its end on test."""
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        ratio = f"{middle / STEPS:g}"
        yield f"dev {ratio}", partial(subject_cell, sentiment_dev, folder, "--sparsity", ratio)
        task = cells[f"dev {ratio}"]["tasks"]["accuracy"]
        low, high = (middle, high) if task["value"] >= ENOUGH * task["dense"] else (low, middle)
    ratio = f"{low / STEPS:g}"
    yield f"largest {ratio}", partial(subject_cell, sentiment_subject, folder, "--sparsity", ratio)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--only", choices=MODELS, action="append", help="this model alone (may be repeated)")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of the prunable parameters, to remove")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no other cell after so many")
    parser.add_argument("--tables-only", action="store_true", help="measure nothing")
    parser.add_argument("--chart", type=Path, metavar="SVG", help="write the chart of scores against size")
    parser.add_argument("--folder", type=Path, default=cache_folder(), help="of models and data (default: the cache)")
    parser.add_argument("--cells", type=Path, default=cache_folder() / "testbed-cells.json", help="finished cells")


def main(options: argparse.Namespace) -> int:
    """The command."""
    from liar_opt.tools.dev.tables import testbed_tables

    names = options.only or MODELS
    (options.folder / "testbed").mkdir(parents=True, exist_ok=True)
    cells = Cells(options.cells)
    began, made = time.perf_counter(), False
    for key, make in () if options.tables_only else wanted(names, options.ratios, options.folder, cells.found):
        if key in cells.found:
            continue
        if made and time.perf_counter() - began > options.seconds:
            print(f"not all: '{key}' is the next cell; call again", file=sys.stderr)
            return 1
        say(key)
        cell, made = cells.made(key, lambda make=make: {**make(), "commit": commit()}), True  # type: ignore[misc]
        say(f"{key}: {cell.get('tasks', cell)}")
    for text in testbed_tables.markdown(cells.found, names, options.ratios):
        print(text, flush=True)
    if options.chart is not None:
        options.chart.write_text(testbed_tables.chart(cells.found, options.ratios), encoding="utf-8")
    return 0
