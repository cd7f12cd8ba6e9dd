"""Latency of models side by side, each in a process of its own, as it is when it is deployed.

Threads of several ONNX Runtime sessions in one process spin beside the one that is timed, and cost the faster model more:
twice as fast then reads as 1.5 times. So every model is loaded by a process that holds nothing else
(`runtime.timing_worker`), and the processes run in turns, short ones, so that drift of the machine hits all alike; the
others sleep. What cannot be given to a process (a torch module) is timed in this one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import OptionError

TURNS = 6
"""Turns of each model in the time that is given."""
FEWEST = 3
"""Runs of each model at the least, however slow it is: fewer tell nothing of how far they are from each other."""
ALIGNMENT = 64
PATIENCE = 600.0
"""Seconds within which a process must have loaded its model and run it once."""
WORKER = Path(__file__).with_name("timing_worker.py")


class Runs(Protocol):
    """What can be timed in this process: a session, or something with its face."""

    inputs: list[str]

    def run(self, feeds: Mapping[str, Any]) -> Any:
        """Runs once."""


@dataclass(frozen=True, eq=False)
class Deployed:
    """A model that is timed in a process of its own.

    Attributes:
        model: its file, or the model as bytes.
        weights: data of the initializers that bytes name as external.
        device: where it runs, "cpu" or "cuda".
        libraries: custom operators that it needs.
        threads: that compute an operator; None leaves their number to ONNX Runtime.
    """

    model: bytes | Path
    weights: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    device: str = "cpu"
    libraries: tuple[str, ...] = ()
    threads: int | None = None


class CannotTime(OptionError):
    """A process could not be started, or the model cannot be loaded in it."""


@dataclass(frozen=True)
class Latency:
    """Median seconds of one run of each model, and the batch that they ran.

    Attributes:
        seconds: of each model.
        runs: of each model, the fewest.
        batch: names and shapes of what they were fed.
        spread: standard error of the ratio of the first to the last, relative to it, over the turns; nan where there was
            one turn.
        apart: whether each model ran in a process of its own.
    """

    seconds: tuple[float, ...]
    runs: int
    batch: str
    spread: float = math.nan
    apart: bool = False

    @property
    def speedup(self) -> float:
        """The first model's time over the last one's."""
        return self.seconds[0] / self.seconds[-1]


def measure_latency(
    models: Sequence[Runs | Deployed],
    feeds: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    budget: float = 2.0,
    least: int = 5,
    most: int = 200,
    close: float = 0.0,
    patience: float = math.inf,
) -> Latency:
    """Times models on ``feeds``, in turns.

    Args:
        models: with the same inputs: all of them ``Deployed``, or all to be run in this process.
        feeds: one batch, or one for each model.
        budget: seconds to spend, about, without what loading takes.
        least: runs of each at the least, whatever the budget.
        most: runs of each at the most.
        patience: seconds for each model within which the least number of runs must be done; a slow one has fewer, but no
            fewer than `FEWEST`, one a turn.
        close: relative standard error of the ratio at which it is enough; until then up to four times the budget is spent.

    Raises:
        CannotTime: a process could not be started, or not load its model.
    """
    batches = [feeds] * len(models) if isinstance(feeds, Mapping) else list(feeds)
    apart = all(isinstance(model, Deployed) for model in models)
    with contextlib.ExitStack() as stack:
        if apart:
            clocks: list[Any] = [Process(m, b) for m, b in zip(models, batches, strict=True) if isinstance(m, Deployed)]
            for clock in clocks:
                stack.callback(clock.close)
            for clock in clocks:
                clock.wait()
        else:
            clocks = [_Here(m, b) for m, b in zip(models, batches, strict=True) if not isinstance(m, Deployed)]
        turns = _in_turns(clocks, budget, least, most, close, patience)
    shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in batches[0].items() if k in clocks[0].inputs)
    seconds = tuple(float(np.median(np.concatenate([turn[i] for turn in turns]))) for i in range(len(clocks)))
    runs = min(sum(len(turn[i]) for turn in turns) for i in range(len(clocks)))
    return Latency(seconds, runs, shapes, _spread(turns), apart)


def _in_turns(
    clocks: Sequence[Any], budget: float, least: int, most: int, close: float, patience: float = math.inf
) -> list[list[list[float]]]:
    """Returns the seconds of single runs by turn and model."""
    turns: list[list[list[float]]] = []
    each = budget / (TURNS * len(clocks))
    start, done = time.perf_counter(), 0
    while done < most:
        spent = time.perf_counter() - start
        enough = not close or spent >= 4 * budget or (len(turns) >= TURNS and _spread(turns) <= close)
        late = done >= FEWEST and spent >= patience * len(clocks)
        if late or (done >= least and spent >= budget and enough):
            break
        few = max(1, -(-(least - done) // max(1, TURNS - len(turns)))) if done < least else 1
        if patience < math.inf and (not done or spent / done / len(clocks) * least > patience):
            few = 1  # each takes so long that the time would be over before all have had their turns
        order = range(len(clocks)) if len(turns) % 2 == 0 else reversed(range(len(clocks)))
        taken: dict[int, list[float]] = {}
        for i in order:
            taken[i] = clocks[i].times(each, min(few, most - done), most - done)
        turns.append([taken[i] for i in range(len(clocks))])
        done = min(sum(len(turn[i]) for turn in turns) for i in range(len(clocks)))
    return turns


def _spread(turns: Sequence[Sequence[Sequence[float]]]) -> float:
    """Returns the standard error of the mean of log(first / last) over the turns: that of the ratio, relatively."""
    if len(turns) < 2:
        return math.nan
    ratios = [math.log(float(np.median(turn[0])) / float(np.median(turn[-1]))) for turn in turns]
    return float(np.std(ratios, ddof=1) / math.sqrt(len(ratios)))


class _Here:
    """A model of this process."""

    def __init__(self, model: Runs, feeds: Mapping[str, Any]) -> None:
        self.model, self.feeds, self.inputs = model, feeds, model.inputs
        model.run(feeds)

    def times(self, seconds: float, least: int, most: int) -> list[float]:
        """Returns the seconds of single runs."""
        result: list[float] = []
        start = time.perf_counter()
        while len(result) < least or (time.perf_counter() - start < seconds and len(result) < most):
            began = time.perf_counter()
            self.model.run(self.feeds)
            result.append(time.perf_counter() - began)
        return result


class Process:
    """A process that holds one model; it loads it meanwhile, and sleeps while nobody asks.

    Args:
        model: what it holds.
        feeds: the batch that it runs, by input name; others than the model's inputs are left out.

    Raises:
        CannotTime: it could not be started.
    """

    def __init__(self, model: Deployed, feeds: Mapping[str, Any]) -> None:
        self.inputs, self._first = list(feeds), 0.0
        self._folder = tempfile.TemporaryDirectory(prefix="liar-opt-timing-", ignore_cleanup_errors=True)
        try:
            job = _write_job(Path(self._folder.name), model, feeds)
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), str(job)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        except (OSError, ValueError) as err:
            self._folder.cleanup()
            raise CannotTime(f"no process can be started to time the model ({err})") from err

    def wait(self) -> None:
        """Waits until the model is loaded.

        Raises:
            CannotTime: it cannot be, or not in time.
        """
        began = time.perf_counter()
        self._answer(PATIENCE)
        self._first = time.perf_counter() - began

    def times(self, seconds: float, least: int, most: int) -> list[float]:
        """Returns the seconds of single runs.

        Raises:
            CannotTime: the process has gone, or does not answer in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{seconds} {least} {most}\n")
            self._process.stdin.flush()
        except OSError as err:
            raise CannotTime(f"the process that times the model has gone ({err})") from err
        return [float(t) for t in self._answer(PATIENCE + seconds + 2 * (least + 2) * self._first)]

    def close(self) -> None:
        """Ends the process and removes what it was given."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._folder.cleanup()

    def _answer(self, seconds: float) -> Any:
        """Returns what the process says next; one that says nothing for so many seconds is ended."""
        assert self._process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        watch = threading.Timer(seconds, end)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if late.is_set():
            raise CannotTime(f"the process that times the model did not answer for {seconds:.0f} s")
        said = json.loads(line) if line.strip() else {"error": f"it ended with exit code {self._process.wait()}"}
        if isinstance(said, dict):
            raise CannotTime(f"the model cannot be timed in a process of its own ({said['error']})")
        return said


def _write_job(folder: Path, model: Deployed, feeds: Mapping[str, Any]) -> Path:
    """Writes what a process is to do; returns the file that says it."""
    blob, end = folder / "arrays", 0
    entries: dict[str, dict[str, Any]] = {"weights": {}, "feeds": {}}
    with blob.open("wb") as stream:
        for kind, name, array in _arrays(model, feeds):
            plain = array.dtype.kind != "V"
            stream.write(b"\0" * (-end % ALIGNMENT))
            end += -end % ALIGNMENT
            own = np.ascontiguousarray(array).reshape(array.shape)
            entries[kind][name] = {
                "offset": end,
                "shape": list(array.shape),
                "dtype": array.dtype.str if plain else "<u2",  # bfloat16 is no type of numpy's own
                "type": None if plain else 16,
            }
            stream.write(own.view(np.uint8).data if own.ndim and own.size else own.tobytes())
            end += own.nbytes
    path = model.model
    if isinstance(path, bytes):
        path = folder / "model.onnx"
        path.write_bytes(model.model if isinstance(model.model, bytes) else b"")
    job = {
        "model": os.fspath(path),
        "device": model.device,
        "libraries": list(model.libraries),
        "threads": model.threads or 0,
        "blob": str(blob),
        "bytes": end,
        **entries,
    }
    written = folder / "job.json"
    written.write_text(json.dumps(job), encoding="utf-8")
    return written


def _arrays(model: Deployed, feeds: Mapping[str, Any]) -> Iterator[tuple[str, str, NDArray[Any]]]:
    for name, weight in model.weights.items():
        yield "weights", name, np.asarray(weight)
    for name, value in feeds.items():
        given = np.asarray(value)
        yield "feeds", name, given.astype(np.float32) if given.dtype.kind == "V" else given
