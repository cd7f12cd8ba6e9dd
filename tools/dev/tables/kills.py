"""Kill a process at every point of writing, and at random moments: what is there afterwards is the old or the new, whole.

    python tools/dev/bench.py kills --random 200

A child process writes a result over an earlier one and is killed (SIGKILL: nothing can be caught, nothing is cleaned up).
*At each point*: before the first, second, ... of its system calls that touch files (every open, rename, change of mode,
lock, removal and flush that Python announces to an audit hook, every piece that is written), in one child each, until one
comes through. *At random*: after a uniform share of the time that it takes. Then what is there is read by others' code
(onnx and ONNX Runtime, transformers) and compared, number by number, with the old and with the new; and the next run must
come through and leave nothing behind but its result. The exit code is 1 where one is neither, or something is left.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from liar_opt.frontend import weight_files
from liar_opt.frontend.weight_files import lightened, write_model
from liar_opt.runtime import whole_file
from liar_opt.runtime.whole_file import write_whole

EVENTS = (
    *("open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"),
    *("shutil.", "tempfile.", "fcntl.", "ctypes."),
)
"""Beginnings of the audit events before which a child is killed: all that changes files, and the exchange of two names."""
OLD, NEW, BROKEN = "old", "new", "broken"
HEAD = (
    "what is written over an earlier one",
    "kills at each point",
    "old",
    "new",
    "kills at random",
    "old",
    "new",
    "neither",
)


@dataclass(eq=False)
class Case:
    """One kind of result.

    Attributes:
        name: for the table.
        write: writes the old (False) or the new (True) result to a folder.
        read: returns which of them is there; raises anything where it is neither.
        files: what is in the folder when nothing was killed, for the old and for the new.
        restores: whether what is there counts after the next run has begun (where a folder needs two steps).
    """

    name: str
    write: Callable[[Path, bool], None]
    read: Callable[[Path], str]
    files: dict[bool, set[str]] = field(default_factory=dict)
    restores: bool = False


@dataclass
class Outcome:
    """How often the old, the new and neither was there, and what was left behind the next run."""

    points: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """How often it was neither, or something was left."""
        return len(self.problems)


# Killing --------------------------------------------------------------------------------------------------------------


def _child(job: Callable[[], None], stop: int | None) -> int:
    """Starts a process that does a job; it kills itself before its ``stop``-th call."""
    pid = os.fork()
    if pid:
        return pid
    try:
        if stop is not None:
            _kill_before(stop)
        job()
        os._exit(0)
    except BaseException:  # printed here: the child has no caller
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    os._exit(1)


def _kill_before(stop: int) -> None:
    seen = 0

    def count(event: str = "", *_: Any) -> None:
        nonlocal seen
        if event.startswith(EVENTS) or not event:
            seen += 1
            if seen >= stop:
                os.kill(os.getpid(), signal.SIGKILL)

    for module, name in ((weight_files, "_write"), (os, "fsync")):
        setattr(module, name, _after(getattr(module, name), count))
    sys.addaudithook(count)


def _after(function: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        count()
        return function(*arguments)

    return counted


def _ended(pid: int, after: float | None = None) -> bool:
    """Waits for a child, which is killed after some seconds; returns whether it came through.

    Raises:
        RuntimeError: it failed by itself.
    """
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the child failed before it was killed; see above")
    return os.WIFEXITED(status)


def check(case: Case, moments: int, seed: int = 0, every: int = 1) -> Outcome:
    """Kills one writer after the other; ``every`` takes each so-many-th point alone."""
    result = Outcome()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case.write(folder, True)
        case.files[True] = _listing(folder)
        _emptied(folder)
        case.write(folder, False)
        case.files[False] = _listing(folder)
        began = time.perf_counter()
        _ended(_child(lambda: case.write(folder, True), None))
        seconds = time.perf_counter() - began
        assert case.read(folder) == NEW, f"{case.name}: the new result is not read as such"
        stop, through = 1 + rng.randrange(every), False
        while not through:
            _begin(case, folder)
            through = _ended(_child(lambda: case.write(folder, True), stop))
            if not through:
                result.points[_judged(case, folder, f"before call {stop}", result)] += 1
            stop += every
        while result.moments.total() < moments:
            _begin(case, folder)
            share, began = rng.uniform(0, 1), time.perf_counter()
            if not _ended(_child(lambda: case.write(folder, True), None), share * seconds):
                result.moments[_judged(case, folder, f"after {share:.3f} of the time", result)] += 1
            else:  # it was faster than the one that was timed
                seconds = min(seconds, max(time.perf_counter() - began, 1e-3))
    return result


def _begin(case: Case, folder: Path) -> None:
    _emptied(folder)
    case.write(folder, False)
    assert case.read(folder) == OLD, f"{case.name}: the old result is not read as such"


def _judged(case: Case, folder: Path, when: str, result: Outcome) -> str:
    if case.restores:
        whole_file.sweep(folder)
    try:
        found = case.read(folder)
    except Exception as err:  # whatever those who read it raise
        found = BROKEN
        result.problems.append(f"{case.name}, killed {when}: {type(err).__name__}: {str(err)[:200]}")
    case.write(folder, True)
    left = _listing(folder)
    # The data of a model may have either of its two names.
    extra = {_plain(name) for name in left} ^ {_plain(name) for name in case.files[True]}
    if extra or len(left) != len(case.files[True]) or case.read(folder) != NEW:
        result.problems.append(f"{case.name}, killed {when}: behind the next run there is {sorted(left)}")
    return found


def _plain(name: str) -> str:
    parts = name.split(".")
    return ".".join(p for p in parts if not (len(p) == 8 and all(c in "0123456789abcdef" for c in p)))


def _listing(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def _emptied(folder: Path) -> None:
    for entry in sorted(folder.rglob("*"), reverse=True):
        entry.rmdir() if entry.is_dir() and not entry.is_symlink() else entry.unlink()


# What is written ------------------------------------------------------------------------------------------------------


def make_model(seed: int, width: int = 37, hidden: int = 1031) -> onnx.ModelProto:
    """Returns a small model; the seed draws its weights."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> f (float[b, {width}] x) => (float[b, {width}] y)'
    proto = onnx.parser.parse_model(f"{text} {{ h = MatMul(x, up) a = Relu(h) y = MatMul(a, down) }}")
    rng = np.random.default_rng(seed)
    for name, shape in (("up", (width, hidden)), ("down", (hidden, width))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return proto


def _which_model(path: Path, models: dict[str, onnx.ModelProto]) -> str:
    """Returns which model a file is, weight by weight, and that it runs."""
    import onnxruntime

    found = onnx.load(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shape = [3, found.graph.input[0].type.tensor_type.shape.dim[1].dim_value]
    session.run(None, {"x": np.ones(shape, np.float32)})
    for name, model in models.items():
        pairs = zip(found.graph.initializer, model.graph.initializer, strict=True)
        if all(np.array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b)) for a, b in pairs):
            return name
    raise AssertionError("its weights are neither the old nor the new ones")


def file_cases(hidden: int = 1031) -> Iterator[Case]:
    """A model in one file and in two, each over each, and a report."""
    models = {OLD: make_model(0, hidden=hidden), NEW: make_model(1, hidden=hidden)}

    def case(name: str, beside: dict[bool, bool]) -> Case:
        def write(folder: Path, new: bool) -> None:
            limit, weight_files.EXTERNAL_LIMIT = weight_files.EXTERNAL_LIMIT, 1000 if beside[new] else 1 << 30
            try:
                write_model(*lightened(models[NEW if new else OLD]), folder / "out.onnx")
            finally:
                weight_files.EXTERNAL_LIMIT = limit

        return Case(name, write, lambda folder: _which_model(folder / "out.onnx", models))

    yield case("one file", {False: False, True: False})
    yield case("external data over external data", {False: True, True: True})
    yield case("external data over one file", {False: False, True: True})
    yield case("one file over external data", {False: True, True: False})
    texts = {OLD: "old\n" * 9973, NEW: "new\n" * 10007}

    def which(folder: Path) -> str:
        found = (folder / "report.json").read_text()
        return next(name for name, text in texts.items() if text == found)

    yield Case("a report", lambda folder, new: write_whole(folder / "report.json", texts[NEW if new else OLD]), which)


def checkpoint_cases() -> Iterator[Case]:
    """A checkpoint folder, where two folders can change places at once and where they cannot."""
    import torch
    import transformers

    from liar_opt.frontend.hf_checkpoint import quiet_loading, save_checkpoint

    torch.set_num_threads(1)
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
    }
    modules = {}
    for name, width in ((OLD, 72), (NEW, 56)):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes, intermediate_size=width)
        modules[name] = transformers.LlamaForCausalLM(config).eval()
    example = {"input_ids": torch.ones(2, 7, dtype=torch.int64)}

    def write(folder: Path, new: bool) -> None:
        save_checkpoint(modules[NEW if new else OLD], folder / "out", None, (), example, force=True)

    def write_in_two_steps(folder: Path, new: bool) -> None:
        exchange, whole_file._exchange = whole_file._exchange, lambda one, other: False
        try:
            write(folder, new)
        finally:
            whole_file._exchange = exchange

    def which(folder: Path) -> str:
        with quiet_loading():
            loaded, info = transformers.LlamaForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
        assert not any(info.values()), f"does not load: {info}"
        found = loaded.state_dict()
        for name, module in modules.items():
            if all(v.shape == found[k].shape and torch.equal(v, found[k]) for k, v in module.state_dict().items()):
                return name
        raise AssertionError("its weights are neither the old nor the new ones")

    yield Case("a checkpoint folder", write, which)
    yield Case("a checkpoint folder in two steps, the next run begun", write_in_two_steps, which, restores=True)


def command_case() -> Case:
    """The command itself, from reading to the report: killed anywhere, the input and the result before are whole."""
    from liar_opt.tools.cli import main

    source = make_model(2, hidden=211)
    results: dict[str, onnx.ModelProto] = {}

    def write(folder: Path, new: bool) -> None:
        if not (folder / "model.onnx").exists():
            onnx.save(source, folder / "model.onnx")
        options = ["--ffn", "0.5" if new else "0.25", "--samples", "64", "--no-latency", "--quiet", "--force"]
        quiet = os.open(os.devnull, os.O_WRONLY)
        kept = [os.dup(1), os.dup(2)]
        try:
            for stream in (1, 2):
                os.dup2(quiet, stream)
            code = main([str(folder / "model.onnx"), "-o", str(folder / "out.onnx"), *options])
        finally:
            for stream, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
            os.close(quiet)
        if code:
            raise RuntimeError(f"the command ended with {code}")
        results.setdefault(NEW if new else OLD, onnx.load(folder / "out.onnx"))

    def read(folder: Path) -> str:
        assert onnx.load(folder / "model.onnx") == source, "the input was changed"
        return _which_model(folder / "out.onnx", results)

    return Case("the command, from its start", write, read)


# The table ------------------------------------------------------------------------------------------------------------


def cases(only: Iterable[str] = ()) -> Iterator[Case]:
    """Yields all cases, or those that begin with one of some names."""
    wanted = tuple(only) or ("",)
    for case in (*file_cases(20_011), *checkpoint_cases(), command_case()):
        if case.name.startswith(wanted):
            yield case


def row(case: Case, outcome: Outcome) -> str:
    """One line of the table."""
    points, moments = outcome.points, outcome.moments
    cells = (case.name, points.total(), points[OLD], points[NEW], moments.total(), moments[OLD], moments[NEW])
    return f"| {' | '.join(str(c) for c in (*cells, points[BROKEN] + moments[BROKEN]))} |"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--random", type=int, default=200, help="kills at random moments, of each kind")
    parser.add_argument("--only", nargs="*", default=(), help="kinds, by the beginnings of their names")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Prints the table; returns the exit code."""
    print(f"| {' | '.join(HEAD)} |\n|---|{'---:|' * (len(HEAD) - 1)}", flush=True)
    wrong = 0
    for case in cases(options.only):
        outcome = check(case, options.random, options.seed)
        print(row(case, outcome), flush=True)
        for problem in outcome.problems:
            print(problem, file=sys.stderr, flush=True)
        wrong += outcome.wrong
    return 1 if wrong else 0
