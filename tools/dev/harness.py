"""What all tables share: progress, cells that are kept, processes that are measured, what they are measured beside."""

import argparse
import contextlib
import datetime
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

from liar_opt.runtime.bootstrap import mean_of, paired_difference
from liar_opt.tools.demo_assets import moved_into_place

BUSY_LOAD = 1.5
QUIET_CORES = 0.15
"""Of other programs, over two seconds in which this one sleeps: as quiet as a machine gets."""
HERE = Path(__file__).resolve().parent
PACKAGES = (
    "liar-opt",
    "numpy",
    "scipy",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "onnx-graphsurgeon",
    "torch",
    "transformers",
)

# A process of its own starts the command that is measured: the peak memory of a child counts what its parent held.
MEASURE = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.call(sys.argv[2:])
wall, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
json.dump({"code": code, "wall": wall, "cpu": used.ru_utime + used.ru_stime, "peak": peak}, open(sys.argv[1], "w"))
"""


class Cells:
    """Figures that are made once, by what they are of; in a JSON file where there is one.

    Args:
        path: of the file; None: they are forgotten.
        indent: of its lines.
    """

    def __init__(self, path: Path | None, indent: int = 1) -> None:
        self.path, self.indent = path, indent
        self.found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path and path.is_file() else {}

    def made(self, key: str, make: Callable[[], Any]) -> Any:
        """Takes a figure, or makes and keeps it."""
        if key not in self.found:
            self.found[key] = make()
            if self.path:
                with moved_into_place(self.path) as temporary:
                    temporary.write_text(json.dumps(self.found, indent=self.indent), encoding="utf-8")
        return self.found[key]


class NoEnvironmentError(Exception):
    """An environment that pip cannot make."""


def environment(name: str, packages: Sequence[str], folder: Path) -> Path:
    """The Python of a virtual environment, made with pip where it is not there.

    Raises:
        NoEnvironmentError: pip cannot install the packages; nothing is left of the environment.
    """
    python = folder / name / "bin" / "python"
    if not python.exists():
        say(f"making the environment '{name}' with {', '.join(packages)}")
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", *packages]
        if subprocess.run(pip, stdout=sys.stderr).returncode:
            shutil.rmtree(folder / name)
            raise NoEnvironmentError(f"pip cannot install {', '.join(packages)}")
    return python


@contextlib.contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder where files are made: the one that is given, or a temporary one."""
    with contextlib.ExitStack() as stack:
        folder = given or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def store_batches(path: Path, batches: Sequence[Mapping[str, Any]]) -> Path:
    """Writes batches as `peer_files.py` reads them."""
    arrays: dict[str, Any] = {f"{i:05d}.{n}": value for i, b in enumerate(batches) for n, value in b.items()}
    np.savez(path, **arrays)
    return path


def parser_of(module: str) -> argparse.ArgumentParser:
    """The options of a table, by the name of its module under `tools/dev`."""
    found = importlib.import_module(f"liar_opt.tools.dev.{module}")
    parser = argparse.ArgumentParser(
        prog=f"bench.py {module.rpartition('.')[2].replace('_', '-')}",
        description=found.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_options(parser)
    return parser


def commit() -> str:
    """Of this checkout."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def measured(command: Sequence[str], folder: Path, log: IO[str] | None = None) -> dict[str, Any]:
    """Runs a command; returns its exit code, wall and processor seconds, and peak memory in bytes.

    Args:
        command: program and arguments.
        folder: gets used.json.
        log: takes all that it prints; without one, that goes to stderr.
    """
    result = folder / "used.json"
    start = [sys.executable, "-I", "-S", "-c", MEASURE, str(result), *command]
    subprocess.run(start, check=True, stdout=log or sys.stderr, stderr=log)
    used: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return used


def _processor_seconds() -> tuple[float, float] | None:
    """Seconds that all cores together have worked, and those of this process and the children it has waited for."""
    try:
        fields = [int(f) for f in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = fields
    everybody = (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
    times = os.times()
    return everybody, times.user + times.system + times.children_user + times.children_system


class Others:
    """What other programs (and other guests of the same host) use of the cores, from its making on."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self._wall, self._seconds = time.perf_counter(), _processor_seconds()

    def cores(self) -> float | None:
        """Mean number of cores that others kept busy so far."""
        now = _processor_seconds()
        if now is None or self._seconds is None:
            return None
        (everybody, own), (everybody_before, own_before) = now, self._seconds
        return max(everybody - everybody_before - own + own_before, 0.0) / (time.perf_counter() - self._wall)

    def sentence(self) -> str:
        """For beside the figures."""
        cores, text = self.cores(), f"load average at the start {self.load:.2f}"
        if cores is not None:
            text += f"; other programs kept {cores:.2f} of {os.cpu_count()} cores busy meanwhile"
        busy = self.load > BUSY_LOAD if cores is None else cores > 2 * QUIET_CORES
        return text + (". **Warning: the machine was busy, these times are not to be quoted**" if busy else "")


def wait_for_quiet(seconds: float) -> None:
    """Waits until other programs leave the cores alone, `seconds` at most."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        others = Others()
        time.sleep(2)
        cores = others.cores()
        if (os.getloadavg()[0] < BUSY_LOAD) if cores is None else (cores < QUIET_CORES):
            return
        say(f"waiting: others keep {cores or 0:.2f} cores busy, load average {others.load:.2f}")
        time.sleep(8)


def say(text: str) -> None:
    """Progress, to stderr."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)


def ahead_of(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> str:
    """What the second of two shares right of each sample, [n], is ahead, in points, with its interval."""
    ahead = paired_difference(mean_of(ours), mean_of(theirs), ours.size)
    return f"{100 * ahead.difference:+.2f} ({100 * ahead.low:+.2f} to {100 * ahead.high:+.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *rows))


def setting(seed: int) -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import version

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(ImportError):
            versions[package] = version(package)
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "seed": seed,
        "commit": commit or "unknown",
        "versions": versions,
        "processor": processor,
        "cores": os.cpu_count(),
        "blas": sorted({pool.get("architecture", "?") for pool in threadpool_info() if pool["user_api"] == "blas"}),
    }
