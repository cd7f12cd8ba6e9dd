"""Targets: reading them, landing on them, and what cannot be reached."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import graphs
import numpy as np
import pytest
from streams import BLOCK, batches, data, prepared

from liar_opt.passes import meet_target
from liar_opt.passes.base import DenseModel, State
from liar_opt.passes.blank_cut import blank_cut, operations
from liar_opt.passes.meet_target import Landed, MeetTargetPass, MetTarget, Target, parse_target, preferred
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.runtime.errors import ModelError, OptionError

WIDE = f"f (float[b, s, 6] x0) => (float[b, s, 6] x2) {{ {BLOCK.format(0, 1)}\n {BLOCK.format(1, 2)} }}"
SIZES: graphs.Weights = {"w0": (6, 900), "b0": (900,), "v0": (900, 6), "w1": (6, 700), "b1": (700,), "v1": (700, 6)}


def ready() -> State:
    return prepared(graphs.parse(WIDE, SIZES), 1.0, data(batches(3, 0)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size=40MB", Target("size", 40e6, False)),
        ("size = 1.5MiB", Target("size", 1.5 * 2**20, False)),
        ("params=0.5x", Target("params", 0.5, True)),
        ("params=12M", Target("params", 12e6, False)),
        ("flops=3e9", Target("flops", 3e9, False)),
        ("latency=2x", Target("latency", 2.0, True)),
        ("latency=5ms", Target("latency", 5e-3, False)),
    ],
)
def test_targets_are_read(text: str, expected: Target) -> None:
    assert parse_target(text) == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("fast", "not understood"),
        ("speed=2x", "not understood"),
        ("size=40", ""),
        ("size=40ms", "unit 'ms'; choose one of x, B, kB"),
        ("latency=5", "unit ''; choose one of x, s, ms"),
        ("params=2x", "more than the model has.*0.5x is half"),
        ("latency=0.5x", "more than the model has.*2x is twice"),
        ("params=0x", "not above zero"),
        ("params=1.2.3x", "no number"),
    ],
)
def test_targets_that_are_none(text: str, match: str) -> None:
    if not match:
        assert parse_target(text).value == 40
        return
    with pytest.raises(OptionError, match=match):
        parse_target(text)


def test_absolute_values() -> None:
    assert parse_target("latency=2x").absolute(0.3) == pytest.approx(0.15)
    assert parse_target("size=0.25x").absolute(80.0) == 20.0


@pytest.mark.parametrize("kind", ["params", "size", "flops"])
@pytest.mark.parametrize("factor", [0.45, 0.8])
def test_counted_targets_are_met_within_one_percent(kind: str, factor: float) -> None:
    state = ready()
    MeetTargetPass(target=f"{kind}={factor}x", multiple_of=1, allocate="uniform")(state)
    feeds = state.calibration.batches[0] if state.calibration else {}
    dense, _ = blank_cut(state.found(DenseModel).stored, {})
    PruneGroupsPass()(state)  # the repaired model, not the blank one
    measure: Any = {
        "params": lambda m: m.parameters(),
        "size": lambda m: m.file_bytes(),
        "flops": lambda m: operations(m, feeds),
    }[kind]
    assert measure(state.model) == pytest.approx(factor * measure(dense), rel=0.01)
    assert state.found(MetTarget).found == pytest.approx(state.found(MetTarget).wanted, rel=0.01)


def test_what_cannot_be_reached_is_said_with_the_best() -> None:
    with pytest.raises(OptionError, match=r"'params=0\.001x' cannot be reached.*best is params=0\.0\d+x .* holds"):
        MeetTargetPass(target="params=0.001x", multiple_of=8, allocate="uniform")(ready())
    with pytest.raises(OptionError, match="is met already"):
        MeetTargetPass(target="params=1G", allocate="uniform")(ready())
    empty = ready()
    empty.groups = ()
    with pytest.raises(ModelError, match="no prunable group"):
        MeetTargetPass()(empty)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A machine whose time is a known function of the widths; counts how often it is asked."""
    asked = [0]

    def time_of(model: Any) -> float:
        weights = [c for c in model.constants() if len(c.shape) == 2]
        return float(0.01 + 1e-5 * sum(float(np.prod(c.shape)) ** 0.8 for c in weights))

    def measure(sessions: Any, feeds: Any, **options: Any) -> Any:
        asked[0] += 1
        seconds = [time_of(s) for s in sessions]
        return SimpleNamespace(seconds=seconds, speedup=seconds[0] / seconds[-1], spread=0.001)

    monkeypatch.setattr(meet_target, "deployed", lambda model, device: model)
    monkeypatch.setattr(meet_target, "measure_latency", measure)
    return asked


@pytest.mark.parametrize("speedup", [1.3, 1.9])
def test_latency_lands_though_it_is_not_linear(clock: list[int], speedup: float) -> None:
    state = ready()
    MeetTargetPass(target=f"latency={speedup}x", multiple_of=1, allocate="uniform")(state)
    found = state.found(MetTarget)
    assert found.dense / found.found == pytest.approx(speedup, rel=0.02)


def test_the_latency_table_is_kept_and_used_again(clock: list[int], tmp_path: Path) -> None:
    counts = []
    for _ in range(2):
        before = clock[0]
        state = ready()
        MeetTargetPass(target="latency=1.3x", multiple_of=1, allocate="uniform")(state)
        counts.append(clock[0] - before)
    assert counts[1] < counts[0]
    (path,) = (tmp_path / "cache" / "latency").iterdir()
    assert state.found(MetTarget).table == f"cache {path}"
    table = json.loads(path.read_text(encoding="utf-8"))
    values: list[Any] = [1, None, [["a"], ["b"]], [[], []], [[1], [float("nan")]]]
    for text in ("{", json.dumps(list(table)), *(json.dumps(dict.fromkeys(table, value)) for value in values)):
        path.write_text(text, encoding="utf-8")  # a broken cache is measured again
        state = ready()
        MeetTargetPass(target="latency=1.3x", multiple_of=1, allocate="uniform")(state)
        assert state.found(MetTarget).table == "measured"


def test_a_speed_that_cannot_be_reached(clock: list[int]) -> None:
    with pytest.raises(OptionError, match=r"'latency=50x' cannot be reached.*best is latency=\d+\.\d+x"):
        MeetTargetPass(target="latency=50x", multiple_of=1, allocate="uniform")(ready())


def test_groups_of_one_shape_share_their_costs() -> None:
    same = dict(SIZES, w1=(6, 900), b1=(900,), v1=(900, 6))
    state = prepared(graphs.parse(WIDE, same), 1.0, data(batches(3, 0)))
    MeetTargetPass(target="params=0.5x", multiple_of=1, allocate="uniform")(state)
    assert len(set(state.keep.values())) == 1


def points(saved: list[float], error: float, work: float = 1.0) -> meet_target.Points:
    widths = np.asarray([8, 16, 32, 48, 64])
    gone = (widths[-1] - widths[:-1]) * work
    return meet_target.Points(widths, np.asarray(saved), np.full(4, error), gone.astype(np.float64))


def test_noise_in_a_table_is_evened_out() -> None:
    noisy = points([0.0563, 0.0474, 0.0325, 0.0155], 0.001)
    (times,) = meet_target.smoothed([noisy])
    np.testing.assert_allclose(times, 0.001 * np.asarray([0, 8, 24, 40, 56]), rtol=0.02)


def test_shapes_that_the_clock_cannot_tell_apart_cost_the_same_an_operation() -> None:
    one, other = points([0.056, 0.048, 0.032, 0.016], 0.001), points([0.114, 0.097, 0.0645, 0.0325], 0.002, 2.0)
    times = meet_target.smoothed([one, other])
    np.testing.assert_allclose(times[1], 2.0 * times[0], rtol=1e-9)
    dear = points([0.3, 0.255, 0.17, 0.085], 0.002, 2.0)  # five seconds an operation, and no doubt about it
    times = meet_target.smoothed([one, dear])
    assert times[1][-1] > 4.0 * times[0][-1]


def test_steps_that_are_real_stay_and_never_fall() -> None:
    (times,) = meet_target.smoothed([points([0.050, 0.050, 0.010, 0.012], 0.0005)])
    assert np.all(np.diff(times) >= 0)
    assert times[1] == pytest.approx(0.0, abs=1e-3)  # narrower than 16 saves nothing more
    assert times[-1] == pytest.approx(0.050, rel=0.02)


def test_widths_by_a_table_must_be_clearly_better() -> None:
    """A table that was measured beside other work is wrong in ways that it does not know."""

    def landed(miss: float, error: float) -> Landed:
        return Landed({}, 1.0, miss, 0.02, error)

    assert preferred(landed(0.01, 1.0), landed(0.0, 0.85))
    assert not preferred(landed(0.01, 1.0), landed(0.0, 0.7))
    assert preferred(landed(0.01, 1.0), landed(0.05, 0.5))
    assert not preferred(landed(0.05, 0.5), landed(0.01, 1.0))
    assert preferred(landed(0.05, 1.0), landed(0.07, 0.5))
