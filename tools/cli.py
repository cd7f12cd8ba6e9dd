"""The command: ``liar-opt model.onnx``, and ``inspect``, ``eval`` and ``demo``.

Results go to stdout, with the verdict in the last line; progress, warnings and errors go to stderr. Exit codes: 0 done,
1 a check failed and nothing was written, 2 something that the user can change (one line says what), 3 a bug of ours, with
its traceback, 130 interrupted (Ctrl-C, or SIGTERM or SIGHUP, which do the same). Paths of results are checked before the
long work: none may be a file that the input consists of, or anything but a plain file or folder; links are refused.
"""

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from liar_opt.runtime.errors import CheckError, LiarOptError, LiarOptWarning, OptionError
from liar_opt.runtime.ranks import Elsewhere, RankLost, Ranks, asked, current, join, leave
from liar_opt.tools.cli_options import BESIDE_OUTPUT, COMMANDS, DEMO_FFN, parse
from liar_opt.tools.printable import printable
from liar_opt.tools.result_files import check_reports, check_results, file_bytes, sha256, write_reports

if TYPE_CHECKING:
    from liar_opt.frontend.input_files import Inputs

DEMO_MODEL = "all-MiniLM-L6-v2.onnx"
DEMO_SENTENCES = 1024
PLAIN_PROGRESS_SECONDS = 10.0
FIRST_SAYS_IT = 0.5
"""Seconds that other processes leave the first to say what all of them would."""
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
    _ready_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "prune"
    run = _Run()
    try:
        with _ended_like_ctrl_c(), _warnings_as_lines(run):
            try:
                return _command(command, arguments, run)
            except Elsewhere:
                return 0
            except BaseException as err:
                return _ended(err, run)
    except KeyboardInterrupt:
        return 130
    finally:
        leave()


def _ready_streams() -> None:
    """Opens stdin, stdout and stderr where they were closed (``>&-``): the next file would be taken for one of them.

    What stdout cannot encode is written as an escape, as on stderr.
    """
    if getattr(sys.stdout, "errors", None) == "strict" and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files where a terminal takes ASCII alone
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    if not closed:
        return
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:  # those of the three that are free stay taken
        pass
    os.close(free)
    for name in closed:
        setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w", encoding="utf-8"))


def _command(command: str, arguments: list[str], run: "_Run") -> int:
    if asked() and command != "prune":
        raise OptionError(f"'{command}' is the work of one process; start it without torchrun")
    ranks = join()
    if ranks.size == 1:
        options = parse(command, arguments)
    else:
        options = _parse_together(ranks, arguments)
        _require_same(ranks, options)
    {"prune": _prune, "inspect": _inspect, "eval": _eval, "demo": _demo}[command](options, run)
    sys.stdout.flush()
    return 0


def _parse_together(ranks: Ranks, arguments: list[str]) -> argparse.Namespace:
    """Parses what several processes were given; one of them says what is wrong with it."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return parse("prune", arguments)
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 2
        if ranks.failed(code) is None:
            print(out.getvalue(), end="")
            print(err.getvalue(), end="", file=sys.stderr)
        raise


def _require_same(ranks: Ranks, options: argparse.Namespace) -> None:
    """Checks that all processes of a run were started alike, and has all but the first be quiet.

    Raises:
        OptionError: one has another version, or another option.
    """
    from liar_opt.passes.options import OPTIONS
    from liar_opt.passes.report import versions_of
    from liar_opt.runtime.kept_results import code_digest
    from liar_opt.runtime.memory import share_out

    given = {f"option {name.replace('_', '-')}": str(v) for name, v in sorted(vars(options).items()) if name in OPTIONS}
    versions = {f"version of {name}": version for name, version in versions_of().items()}
    ranks.require_same({**versions, "liar-opt": code_digest(), "model": str(options.model), **given})
    share_out()
    if ranks.rank:
        options.quiet, options.print_between = True, False
        warnings.simplefilter("ignore")


def _ended(err: BaseException, run: "_Run") -> int:
    """Says what has ended the run, unless another of its processes does; returns the exit code."""
    ranks = current()
    if ranks.size > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends what is left
    if isinstance(err, SystemExit):  # --help, --version, and argparse's errors
        return err.code if isinstance(err.code, int) else 2
    if isinstance(err, KeyboardInterrupt) and (gone := ranks.gone()):
        err = RankLost(f"process {', '.join(map(str, gone))} of this run ended")
    if isinstance(err, BrokenPipeError):  # the reader of stdout (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    code, message, kind = _sentence(err, run)
    if ranks.rank and "from_rank" not in vars(err):
        time.sleep(FIRST_SAYS_IT)
    before = code if "from_rank" in vars(err) else ranks.failed(code)
    if before is not None:
        return before
    if code == 3:
        return _bug(err)
    return _fail(code, f"process {ranks.rank}: {message}" if ranks.rank and code in (1, 2) else message, kind)


def _sentence(err: BaseException, run: "_Run") -> tuple[int, str, str]:
    """Returns the exit code, what is said, and what kind of a sentence that is."""
    kind = "error: "
    if isinstance(err, KeyboardInterrupt):
        return 130, f"interrupted; {run.written()}", ""
    if isinstance(err, CheckError):
        return 1, str(err), kind
    if isinstance(err, RankLost):
        return 2, f"{err}; {run.written()}; start it again, and --resume goes on where such a run ended", kind
    if isinstance(err, LiarOptError):
        return 2, str(err), kind
    if isinstance(err, MemoryError):
        return 2, f"out of memory; give a smaller --batch-size or --samples; {run.written()}", kind
    if isinstance(err, OSError) and err.errno in ENVIRONMENT:
        where = f"'{err.filename}': " if err.filename else ""
        return 2, f"{where}{err.strerror}; {run.written()}", kind
    return 3, "", kind


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


@contextlib.contextmanager
def _warnings_as_lines(run: "_Run") -> Iterator[None]:
    """Has warnings of ours be said as the command's own; others go where they went."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", LiarOptWarning)
        elsewhere = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, LiarOptWarning):
                elsewhere(message, category, *place, **more)
            elif str(message) not in run.warned:
                run.warned.add(str(message))
                _warn(str(message))

        warnings.showwarning = show
        yield


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
    warned: set[str] = dataclasses.field(default_factory=set)

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
        inputs = _inputs(options, options.calibration)
        current().once(lambda: check_results(output, options, inputs))
    report = _run_passes(options, options.calibration, output, run)
    _finish(report, options, output, run)


def _output_of(options: argparse.Namespace) -> Path:
    """Returns the path of the result, and settles whether it is a checkpoint: a folder gives a folder, a file a file.

    Raises:
        OptionError: a checkpoint was asked for of an ONNX file, or a folder where a file is written.
    """
    from liar_opt.passes.open_model import is_module_source

    given: str | None = options.output
    output = None if given is None else Path(given)
    options.checkpoint = None
    if options.quantize is not None and output is not None and output.suffix == ".pt2":
        raise OptionError(f"quantize makes ONNX, and '{output}' is not; give a path that ends in .onnx")
    if not is_module_source(options.model):
        if options.format in ("checkpoint", "deci"):
            raise OptionError(
                f"'{options.model}' is an ONNX file: it becomes ONNX; give the folder of a checkpoint for one"
            )
        if output is not None and output.suffix == ".pt2":
            raise OptionError(
                f"'{options.model}' is an ONNX file: it becomes ONNX, and '{output}' would be torch's; give a path "
                "that ends in .onnx"
            )
        place: Path = output or options.model.with_name(f"{options.model.stem}.liar.onnx")
        return _file_of(place, given, options.model)
    plain = output is None or output.suffix not in (".onnx", ".pt2")
    _require_form(options.format, output)
    options.checkpoint = (
        "deci" if options.format == "deci" else options.format == "checkpoint" or (not options.format and plain)
    )
    beside: Path = options.model.absolute() if options.model.is_dir() else Path(options.model.name).absolute()
    place = output or beside.with_name(f"{beside.name}.liar{'' if options.checkpoint else '.onnx'}")
    return place if options.checkpoint else _file_of(place, given, beside)


def _require_form(form: str | None, output: Path | None) -> None:
    """Checks that the path of a result and the form that was asked for say the same.

    Raises:
        OptionError: they do not.
    """
    if form is None or output is None:
        return
    if form == "onnx" and output.suffix != ".onnx":
        raise OptionError(f"format onnx writes a file that ends in .onnx, and '{output}' does not; give another path")
    if form != "onnx" and output.suffix in (".onnx", ".pt2"):
        raise OptionError(f"{form} is a folder, and '{output}' is a file; give a path without {output.suffix}")


def _file_of(place: Path, given: str | None, model: Path) -> Path:
    """Returns the place of a file.

    Raises:
        OptionError: what was given can only be a folder.
    """
    if given is not None and given.endswith(("/", os.sep)):
        name = Path(given) / f"{model.stem}.liar.onnx"
        raise OptionError(f"output '{given}' is a folder; give the path of a file, such as '{name}'")
    return place


def _set_resume(options: argparse.Namespace, output: Path) -> None:
    """Settles which folder ``--resume`` means without one."""
    if options.resume == BESIDE_OUTPUT:
        options.resume = output.parent / f"{output.name}.resume"


def _inputs(options: argparse.Namespace, calibration: Any = None) -> "Inputs":
    from liar_opt.frontend.input_files import Inputs

    more = (options.custom_ops, getattr(options, "vocabulary", None))
    return Inputs((options.model,), calibration, (getattr(options, "tokenizer", None),), more)


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
    check_results(output, options, Inputs((model,), None, (options.tokenizer,)))
    if not model.is_file():
        _note(options, f"exporting all-MiniLM-L6-v2 to '{model}'", run)
        demo_assets.export_minilm(model)
    options.model = model
    report = _run_passes(options, calibration, output, run)
    if not options.dry_run:
        everything = len(demo_assets.sentences("nyt"))
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
    from liar_opt.passes.open_model import is_module_source
    from liar_opt.passes.prune_job import inspect
    from liar_opt.runtime.places import Places
    from liar_opt.tools import report as tables

    if options.model.exists() or is_module_source(options.model):
        check_reports(options, Places(_inputs(options).files))
    found = inspect(options.model, allow_pickle=options.allow_pickle, custom_ops=options.custom_ops).report
    write_reports(found, options)
    console = tables.make_console(sys.stdout)
    for note in found["model"]["notes"]:
        _note(options, note, run)
    if not options.quiet:
        if found["groups"] or found["values"]:
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

    check_reports(options, Places(evaluation.inputs_of(options).files))
    with _progress(options.quiet) as progress, custom_operators(options.custom_ops or ()):
        report = evaluation.run(options, progress)
    write_reports(report, options)
    if not options.quiet:
        console = make_console(sys.stdout)
        console.print(evaluation.metrics_table(report), "", evaluation.models_table(report))
        for line in evaluation.footnotes(report):
            console.print(line, soft_wrap=True)
        console.print()
    _say(f"{evaluation.verdict(report)}; {run.seconds():.1f} s")


def _run_passes(options: argparse.Namespace, calibration: Any, output: Path, run: _Run) -> dict[str, Any]:
    """Prunes, writes the model and returns the report."""
    from liar_opt.passes.options import OPTIONS
    from liar_opt.passes.prune_job import prune

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

    chosen = {name: value for name, value in vars(options).items() if name in OPTIONS}
    with _progress(options.quiet) as progress:
        result = prune(options.model, calibration, **chosen, progress=show, observer=observe)
    report = result.report
    report.setdefault("seconds", seconds)
    for note in report["model"]["notes"]:
        _note(options, note, run)
    data = report.get("calibration", {"warnings": [], "synthetic": False})
    for warning in data["warnings"][1 if data["synthetic"] else 0 :]:  # the first was said before the work
        _warn(warning)
    if report["groups"] and all(g["after"] == g["before"] for g in report["groups"]):
        _warn("the ratios round to nothing, every group keeps its width; give larger ratios or a smaller --multiple-of")
    if options.dry_run:
        return report
    noted = len(report["model"]["notes"])
    result.save(output, force=options.force)
    run.output = output
    for note in report["model"]["notes"][noted:]:
        _note(options, note, run)
    report["before"]["file_bytes"] = file_bytes(options.model, report["before"]["bytes"])
    _note_sizes(report, output)
    report["output"] = {"path": str(output), "sha256": sha256(output)}
    return report


def _note_sizes(report: dict[str, Any], output: Path) -> None:
    """Says what the result takes on disk: in float, where it is quantised, since the table of corners has the rest."""
    from liar_opt.tools.report import quantised_bytes

    if quantised_bytes(report) is None:
        report["after"]["file_bytes"] = file_bytes(output, report["after"]["bytes"])
        return
    for corner in report["quantised"]["corners"]:
        if corner["name"] == "pruned":
            corner["bytes"] = file_bytes(output, 0) if corner["quantised"] else corner["bytes"]
            report["after"]["file_bytes"] = corner["bytes"] if not corner["quantised"] else report["after"]["file_bytes"]


def _finish(report: dict[str, Any], options: argparse.Namespace, output: Path, run: _Run) -> None:
    """Writes the report, prints the tables and the verdict."""
    from liar_opt.tools import report as tables

    try:
        write_reports(report, options)
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
            if "patterned" in report and options.explain:
                console.print("", tables.patterns(report))
            if "quantised" in report:
                console.print("", tables.corners(report))
                for line in tables.corner_notes(report):
                    console.print(line, soft_wrap=True)
            if "target" in report:
                console.print(tables.target_met(report), soft_wrap=True)
            if "fitted" in report:
                console.print(tables.runtime_fit(report), soft_wrap=True)
            console.print()
    if options.dry_run:
        removed = report["prunable"]["before"] - report["prunable"]["after"]
        if report.get("experts") and report["groups"]:
            removed = max(removed, report["experts"]["parameters_before"] - report["experts"]["parameters_after"])
        share = tables.percent(removed, report["before"]["parameters"])
        _say(f"dry run: about {share} of the parameters would go; {run.seconds():.1f} s; '{output}' was not written")
        return
    before = report["before"]["parameters"]
    less = tables.percent(max(before - report["after"]["parameters"], 0), before)
    refused = report.get("quantised", {}).get("refused")
    if refused:
        raise CheckError(f"the quantiser refuses the pruned model ({refused}); it was written in float to '{output}'")
    kept = report.get("kept_scheme", {}).get("refused")
    if kept:
        raise CheckError(f"the result cannot be written in its scheme ({kept}); it was written in float to '{output}'")
    how = f", quantised to {report['quantised']['scheme']}" if "quantised" in report else ""
    if "patterned" in report:
        how = f", {tables.percent(report['patterned']['share'], 1.0)} of those that stay are zero"
    _say(f"pruned: {less} of the parameters removed{how}; {run.seconds():.1f} s; {output}")


def _print_between(name: str, result: Any) -> None:
    """Prints the graph, without its weights, to stderr."""
    import onnx

    model = result.state.model
    listing = getattr(model, "listing", None)  # of a traced module
    text = onnx.printer.to_text(model.skeleton()) if listing is None else listing()
    head = f"// after {name}: {len(model.graph.nodes)} nodes, {model.parameters():,} parameters"
    _say(f"{head}\n{text}", sys.stderr, keep="\n\t")


def _warn(text: str) -> None:
    if not current().rank:
        _say(f"liar-opt: warning: {text}", sys.stderr)


def _note(options: argparse.Namespace, text: str, run: _Run) -> None:
    if not options.quiet and text not in run.warned:
        _say(f"liar-opt: {text}", sys.stderr)


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


if __name__ == "__main__":
    sys.exit(main())
