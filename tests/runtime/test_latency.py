"""Latency: rounds, and the ratio."""

from __future__ import annotations

import os
import time
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest

from liar_opt.runtime import latency
from liar_opt.runtime.latency import CannotTime, Deployed, Latency, Process, measure_latency
from liar_opt.runtime.sessions import Session

pytestmark = pytest.mark.clock

HEAVY = "f (float[n, n] x) => (float[n, n] y) { a = MatMul(x, x)  b = MatMul(a, x)  c = MatMul(b, x)  y = MatMul(c, x) }"
LIGHT = "f (float[n, n] x) => (float[n, n] y) { y = Relu(x) }"


def sessions() -> list[Session]:
    return [Session(graphs.parse(text).SerializeToString()) for text in (HEAVY, LIGHT)]


def test_more_work_takes_longer() -> None:
    feeds = {"x": np.eye(256, dtype=np.float32)}
    result = measure_latency(sessions(), feeds, budget=0.2, least=5)
    assert result.seconds[0] > result.seconds[1] > 0
    assert result.speedup == result.seconds[0] / result.seconds[1] > 1
    assert result.runs >= 5
    assert result.batch == "x [256, 256]"


def test_bounds_on_the_rounds() -> None:
    feeds = {"x": np.eye(2, dtype=np.float32), "other": np.zeros(3)}
    assert measure_latency(sessions(), feeds, budget=0.0, least=3).runs == 3
    assert measure_latency(sessions(), feeds, budget=5.0, least=1, most=7).runs == 7


def test_speedup_is_first_over_last() -> None:
    assert Latency((3.0, 1.5), 1, "").speedup == 2.0


WEIGHTED = """f (float[n, 6] x, int64[n] i) => (float[n, 5] y) {
    a = MatMul(x, w)  j = Cast<to=1>(i)  k = ReduceSum(j)  y = Add(a, k) }"""


def deployed() -> list[Deployed]:
    return [Deployed(graphs.parse(text).SerializeToString()) for text in (HEAVY, LIGHT)]


def test_models_run_in_processes_of_their_own() -> None:
    result = measure_latency(deployed(), {"x": np.eye(256, dtype=np.float32)}, budget=0.3, least=6)
    assert result.apart
    assert result.seconds[0] > result.seconds[1] > 0
    assert result.runs >= 6
    assert np.isfinite(result.spread)


def test_a_process_is_given_weights_and_feeds(tmp_path: Path) -> None:
    model = graphs.parse(WEIGHTED, {"w": (6, 5)})
    (weight,) = model.graph.initializer
    value = onnx.numpy_helper.to_array(weight)
    del model.graph.initializer[:]
    stub = model.graph.initializer.add(name="w", data_type=onnx.TensorProto.FLOAT, dims=value.shape, data_location=1)
    stub.external_data.add(key="location", value="w")
    feeds = {"x": np.ones((3, 6), np.float32), "i": np.arange(3), "unread": np.zeros(2)}
    clock = Process(Deployed(model.SerializeToString(), {"w": value}), feeds)
    try:
        clock.wait()
        assert len(clock.times(0.0, 4, 9)) == 4
        assert len(clock.times(5.0, 1, 3)) == 3
        folder = Path(clock._folder.name)
        assert folder.is_dir()
    finally:
        clock.close()
    assert not folder.exists()
    assert clock._process.poll() is not None


def test_what_cannot_be_loaded_is_said() -> None:
    bad = Deployed(b"no model")
    with pytest.raises(CannotTime, match="cannot be timed in a process of its own"):
        measure_latency([bad], {"x": np.zeros(2)})


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", os.fspath(tmp_path / "none"))
    with pytest.raises(CannotTime, match="no process can be started"):
        measure_latency(deployed(), {"x": np.eye(2, dtype=np.float32)})


@pytest.mark.parametrize("loads", [False, True])
def test_a_process_that_says_nothing_is_ended(loads: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither while it loads, nor when it is asked."""
    worker = tmp_path / "worker.py"
    said = """print('"ready"', flush=True)""" if loads else ""
    worker.write_text(f"import time\n{said}\ntime.sleep(600)", encoding="utf-8")
    monkeypatch.setattr(latency, "WORKER", worker)
    clock = Process(deployed()[0], {"x": np.eye(2, dtype=np.float32)})
    try:
        if loads:
            clock.wait()
            clock._first = 0.0
        monkeypatch.setattr(latency, "PATIENCE", 0.3)
        with pytest.raises(CannotTime, match="did not answer for 0 s"):
            clock.times(0.0, 1, 1) if loads else clock.wait()
        assert clock._process.wait() != 0
    finally:
        clock.close()


class Machine:
    """A clock with known times: the first half of the turns are disturbed, both models alike."""

    def __init__(self, seconds: float) -> None:
        self.inputs = ["x"]
        self.seconds, self.turn = seconds, 0

    def times(self, seconds: float, least: int, most: int) -> list[float]:
        self.turn += 1
        return [self.seconds * (3.0 if self.turn <= 3 else 1.0)] * least


def test_a_disturbance_of_all_alike_is_no_spread() -> None:
    turns = latency._in_turns([Machine(2.0), Machine(1.0)], 0.0, 6, 6, 0.0)
    assert len(turns) == 6
    assert latency._spread(turns) == pytest.approx(0.0, abs=1e-12)


def test_turns_go_on_until_the_ratio_is_known() -> None:
    rng = np.random.default_rng(0)

    class Noisy(Machine):
        def times(self, seconds: float, least: int, most: int) -> list[float]:
            return [self.seconds * float(np.exp(0.1 * rng.standard_normal()))]

    turns = latency._in_turns([Noisy(2.0), Noisy(1.0)], 30.0, 1, 10_000, 0.0)
    assert len(turns) == 10_000  # most
    assert latency._spread(turns) < 0.01


class Slow(Machine):
    """A clock whose runs take time as well."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.asked: list[int] = []

    def times(self, seconds: float, least: int, most: int) -> list[float]:
        self.asked.append(least)
        time.sleep(self.seconds * least)
        return [self.seconds] * least


def test_slow_models_run_a_few_times_alone() -> None:
    """One run a turn, and three turns where the patience is at its end; the spread is over those."""
    clocks = [Slow(0.04), Slow(0.02)]
    turns = latency._in_turns(clocks, 0.02, 12, 200, 0.001, patience=0.05)
    assert [len(turn[0]) for turn in turns] == [1, 1, 1] and clocks[0].asked == [1, 1, 1]
    assert latency._spread(turns) == pytest.approx(0.0, abs=1e-12)
    patient = latency._in_turns([Slow(0.004), Slow(0.002)], 0.02, 12, 200, 0.0, patience=60.0)
    assert sum(len(turn[0]) for turn in patient) >= 12
