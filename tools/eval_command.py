"""``liar-opt eval``: models side by side on a task, each difference to the first with its interval.

A model is an ONNX file, a folder that has one (``model.onnx`` or ``onnx/model.onnx``), or the folder of a transformers
checkpoint, which is exported for the run. Beside it may lie what an exporter wrote of the checkpoint: the tokenizer, which
is the default, and ``config.json``, which names the classes.
"""

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from liar_opt.frontend.input_files import Inputs
from liar_opt.frontend.onnx_interface import Interface, read_interface
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.evaluation import evaluate
from liar_opt.runtime.evaluation_data import Table as EvaluationSet
from liar_opt.runtime.evaluation_data import read_table
from liar_opt.runtime.evaluation_feeds import Candidate, EvaluationOptions, Progress
from liar_opt.runtime.evaluation_tasks import TASKS
from liar_opt.runtime.latency import CannotTime, Deployed, measure_latency
from liar_opt.runtime.sessions import PROVIDERS, Session, resolve_provider
from liar_opt.runtime.signatures import names, one_line
from liar_opt.runtime.text_tokenizer import TOKENIZER_FILES
from liar_opt.runtime.whole_file import scratch_folder
from liar_opt.tools import lm_eval_task
from liar_opt.tools.report import Report, make_table, milliseconds, quantity

SCHEMA = 1
ONNX_IN_FOLDER = ("model.onnx", "onnx/model.onnx")
DATA = (
    "the evaluation set: a .txt, .jsonl, .csv or .npz file, a folder of .npy files, a saved dataset, or the name of one "
    "(name[:config][:split])"
)
OPTIONS = {
    "text_column": (str, "NAME"),
    "text_pair_column": (str, "NAME"),
    "label_column": (str, "NAME"),
    "tokenizer": (Path, "DIR"),
    "samples": (int, "N"),
    "batch_size": (int, "N"),
    "sequence_length": (int, "N"),
    "mask_input": (str, "NAME"),
    "output_name": (str, "NAME"),
    "neighbours": (int, "K"),
    "resamples": (int, "N"),
}
"""Fields of :class:`EvaluationOptions` that are options as they are."""


@dataclass(frozen=True)
class Files:
    """A model that was named.

    Attributes:
        given: its path in the command.
        onnx: what is run.
        beside: folders where its tokenizer and its configuration may be.
        bytes: on disk; None where the ONNX file is what was given.
    """

    given: Path
    onnx: Path
    beside: tuple[Path, ...]
    bytes: int | None = None


def add_arguments(parser: argparse.ArgumentParser, fields: Callable[[Any, Any], Any], seed: Callable[[str], int]) -> None:
    """Adds the options of the command; ``fields`` makes an adder of fields with their documentation (``cli._Fields``)."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "models", nargs="+", metavar="model.onnx", type=Path, help="or checkpoints; the first is the reference"
    )
    task = parser.add_argument_group("task")
    task.add_argument("--task", required=True, help=f"{', '.join(TASKS)}, or lm-eval:NAME (lm-evaluation-harness)")
    task.add_argument("--data", help=DATA)
    task.add_argument("--split", metavar="NAME", help="split of a dataset; by default the one that is evaluated on")
    task.add_argument(
        "--metric", action="append", dest="metrics", metavar="NAME", help="may be repeated; all that fit if not given"
    )
    task.add_argument(
        "--window",
        action="append",
        dest="windows",
        type=int,
        metavar="N",
        help="tokens of the windows of perplexity, may be repeated; 2048 and 128 if not given: two conventions",
    )
    adder = fields(task, EvaluationOptions)
    for name, (kind, metavar) in OPTIONS.items():
        adder.add(name, kind, metavar=metavar)
    adder.add("seed", seed, metavar="N")
    task.add_argument("--provider", choices=PROVIDERS, default="auto", help="where the models run")
    task.add_argument("--no-latency", dest="latency", action="store_false", help="do not time the models")


def inputs_of(options: argparse.Namespace) -> Inputs:
    """Returns what a command reads: the models and what lies beside them, the set, the tokenizer, libraries."""
    inside = [path / place for path in options.models for place in ONNX_IN_FOLDER if path.is_dir()]
    beside = [folder for path in options.models for folder in ((path,) if path.is_dir() else _beside(path))]
    return Inputs((*options.models, *inside), options.data, (options.tokenizer, *beside), (options.custom_ops,))


def run(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Evaluates the models of a command and returns the report.

    Raises:
        ModelError: a model cannot be read or loaded.
        OptionError: an option, the task or the set does not fit.
    """
    harness = options.task.startswith(lm_eval_task.PREFIX)
    if options.task not in TASKS and not harness:
        raise OptionError(f"task '{options.task}' is unknown; choose one of {names(TASKS)}, or lm-eval:NAME")
    if harness:
        lm_eval_task.require()
    with scratch_folder() as exports:
        places = [exports / str(index) for index in range(len(options.models))]
        files = [_files(path, place) for path, place in zip(options.models, places, strict=True)]
        return _run(options, files, harness, progress)


def _run(options: argparse.Namespace, files: list[Files], harness: bool, progress: Progress) -> dict[str, Any]:
    chosen = EvaluationOptions(
        **{name: getattr(options, name) for name in (*OPTIONS, "seed")},
        metrics=tuple(options.metrics or ()),
        windows=tuple(options.windows or ()),
    )
    chosen = _with_tokenizer(chosen, files[0])
    device = resolve_provider(options.provider)
    interfaces = [read_interface(file.onnx) for file in files]
    table = None if harness else _table(options)
    last = {f.given.name for f in files}
    shown = [f.given.name if len(last) == len(files) else str(f.given) for f in files]
    candidates = [
        Candidate(
            name=name,
            session=_session(file.onnx, device),
            inputs=interface.inputs,
            class_names=class_names(file),
            vocabulary=interface.vocabulary,
            positions=interface.positions,
        )
        for name, file, interface in zip(shown, files, interfaces, strict=True)
    ]
    if table is None:
        figures, feeds = lm_eval_task.evaluate(options.task, candidates, chosen, progress)
    else:
        figures, feeds = evaluate(options.task, candidates, table, chosen, progress)
    report = {
        "schema": SCHEMA,
        "command": "eval",
        "liar_opt": importlib.metadata.version("liar-opt"),
        "versions": {"python": platform.python_version(), "onnxruntime": _onnxruntime_version()},
        "task": options.task,
        "data": figures.pop("source"),
        "device": device,
        "seed": chosen.seed,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(chosen).items()},
        "models": [_model(*m) for m in zip(shown, files, interfaces, strict=True)],
        **figures,
    }
    if options.latency and feeds:
        try:
            times = measure_latency([Deployed(f.onnx, device=device) for f in files], feeds, budget=0.5, least=3)
        except CannotTime:  # what ONNX Runtime loads here alone (bfloat16 on a CPU)
            times = measure_latency([c.session.as_deployed() for c in candidates], feeds, budget=0.5, least=3)
        for model, seconds in zip(report["models"], times.seconds, strict=True):
            model["latency_seconds"] = seconds
        report["latency"] = {"runs": times.runs, "batch": times.batch}
    return report


def _table(options: argparse.Namespace) -> EvaluationSet:
    if options.data is None:
        raise OptionError(f"task '{options.task}' needs --data: {DATA}")
    return read_table(options.data, options.split, TASKS[options.task].splits, options.task == "perplexity")


def _files(path: Path, place: Path) -> Files:
    """Finds what belongs to a model; a checkpoint is exported into a folder that may be made.

    Raises:
        ModelError: a folder has no model in it, or it cannot be exported.
    """
    if not path.is_dir():
        return Files(path, path, _beside(path))
    found = next((path / place for place in ONNX_IN_FOLDER if (path / place).is_file()), None)
    if found is not None:
        return Files(path, found, _beside(found))
    if not (path / "config.json").is_file():
        raise ModelError(
            f"folder '{path}' has no model.onnx, no onnx/model.onnx and no config.json of a checkpoint; give the path of "
            "an ONNX model or of a checkpoint"
        )
    from liar_opt.passes.module_backend import export_checkpoint

    place.mkdir()
    export_checkpoint(path, place / "model.onnx")
    return Files(path, place / "model.onnx", (path,), sum(f.stat().st_size for f in path.glob("*.safetensors")))


def _session(file: Path, device: Any) -> Session:
    try:
        return Session(file, device)
    except Exception as err:  # what ONNX Runtime raises for a model that it cannot load has many classes
        raise ModelError(f"ONNX Runtime cannot load '{file}' ({one_line(err)}); export it again") from err


def _model(name: str, file: Files, interface: Interface) -> dict[str, Any]:
    size = file.onnx.stat().st_size if file.bytes is None else file.bytes
    # a file smaller than its weights keeps them beside it, as external data
    whole = file.bytes is not None or size >= interface.weight_bytes
    return {
        "name": name,
        "path": str(file.onnx if file.bytes is None else file.given),
        "parameters": interface.parameters,
        "bytes": size if whole else size + interface.weight_bytes,
    }


def _onnxruntime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _beside(file: Path) -> tuple[Path, ...]:
    """Folders where an exporter puts what belongs to a model."""
    return (file.parent, file.parent.parent) if file.parent.name == "onnx" else (file.parent,)


def _with_tokenizer(options: EvaluationOptions, file: Files) -> EvaluationOptions:
    if options.tokenizer is not None:
        return options
    known = ("tokenizer.json", *TOKENIZER_FILES)
    found = next((folder for folder in file.beside if any((folder / name).is_file() for name in known)), None)
    return EvaluationOptions(**{**vars(options), "tokenizer": found})


def class_names(file: Files) -> tuple[str, ...] | None:
    """Returns the names of a model's classes from the ``id2label`` of the config.json beside it, if it says any.

    Raises:
        OptionError: the file is no JSON object.
    """
    config = next((folder / "config.json" for folder in file.beside if (folder / "config.json").is_file()), None)
    if config is None:
        return None
    try:
        labels = json.loads(config.read_text(encoding="utf-8")).get("id2label")
        found = tuple(str(labels[key]) for key in sorted(labels, key=int)) if labels else ()
    except (ValueError, OSError, AttributeError, TypeError) as err:
        what = f"'{config}', which names the classes of '{file.given}'"
        raise OptionError(f"{what}, cannot be read ({one_line(err)})") from err
    return None if not found or all(name.startswith("LABEL_") for name in found) else found


# Tables ---------------------------------------------------------------------------------------------------------------


def metrics_table(report: Report) -> Table:
    """Values of all models, metric by metric, and the differences to the first with their intervals."""
    shown = make_table("metric", "model", "value", "difference", f"{100 * report['level']:.0f} % interval", left={0, 1})
    for name, metric in report["metrics"].items():
        shown.add_section()
        for index, (model, value) in enumerate(zip(report["models"], metric["values"], strict=True)):
            row = [name if index == 0 else "", model["name"], f"{value:.4f}"]
            if index:
                found = metric["differences"][index - 1]
                row += [f"{found['difference']:+.4f}", f"{found['low']:+.4f} to {found['high']:+.4f}"]
            shown.add_row(*row)
    return shown


def models_table(report: Report) -> Table:
    """What the models cost."""
    timed = all("latency_seconds" in model for model in report["models"])
    shown = make_table("model", "parameters", "bytes on disk", *(["latency"] if timed else []))
    for model in report["models"]:
        row = [model["name"], f"{model['parameters']:,}", quantity(model["bytes"], "B")]
        shown.add_row(*row, *([milliseconds(model["latency_seconds"])] if timed else []))
    return shown


def footnotes(report: Report) -> Iterator[str]:
    """What the numbers were measured on, one line each."""
    yield f"data: {report['data']}"
    counts = ", ".join(dict.fromkeys(f"{m['samples']:,} {_plural(m)}" for m in report["metrics"].values()))
    if len(report["models"]) > 1:
        yield (
            f"intervals: paired bootstrap, {100 * report['level']:.0f} %, {report['resamples']:,} resamples of {counts}, "
            f"seed {report['seed']}; differences are to {report['models'][0]['name']}"
        )
    if "latency" in report:
        timed = report["latency"]
        yield f"latency: one batch, {timed['batch']}, on {report['device']}; median of {timed['runs']} runs, taken in turns"
    yield from report["notes"]


def verdict(report: Report) -> str:
    """One line: what was done."""
    count = len(report["models"])
    counts = ", ".join(dict.fromkeys(f"{m['samples']:,} {_plural(m)}" for m in report["metrics"].values()))
    return f"evaluated: {count} {'model' if count == 1 else 'models'}, {report['task']}, {counts}"


def _plural(metric: Mapping[str, Any]) -> str:
    unit = str(metric["unit"])
    return unit if metric["samples"] == 1 else {"query": "queries"}.get(unit, f"{unit}s")
