"""Latency: rounds, and the ratio."""

from __future__ import annotations

import graphs
import numpy as np

from liar_opt.runtime.latency import Latency, measure_latency
from liar_opt.runtime.sessions import Session

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
