"""Refitting of biases and gains: the least squares of numpy, better on held-back batches, undone where it is not."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
from onnx import numpy_helper

import liar_opt
from liar_opt.frontend.channel_vectors import Site, sites_of
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.passes import refit_vectors
from liar_opt.passes.sweep import held_batches
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import OptionError
from liar_opt.tools.cli import main
from liar_opt.tools.report import refitted

LAYERS, WIDTH, INNER = 4, 12, 31
SETTINGS: dict[str, Any] = {"ffn": 0.5, "latency": False, "repair": "none", "multiple_of": 1}


@functools.cache
def residual(norm: str) -> onnx.ModelProto:
    """Four feed-forward layers of unequal strength behind normalisations: as one operator, or as RMS norms of many."""
    lines, weights, stream = [], dict[str, Any](), "x"
    rng = np.random.default_rng(3)
    for i in range(LAYERS + 1):
        weights |= {f"g{i}": 1 + 0.3 * rng.normal(size=WIDTH), f"c{i}": 0.3 * rng.normal(size=WIDTH)}
        if norm == "layer":
            lines.append(f"n{i} = LayerNormalization({stream}, g{i}, c{i})")
        else:
            weights.pop(f"c{i}")
            lines += [
                f"s{i} = Mul({stream}, {stream})  m{i} = ReduceMean<axes = [-1], keepdims = 1>(s{i})",
                f"e{i} = Add(m{i}, small)  q{i} = Sqrt(e{i})  r{i} = Div({stream}, q{i})  n{i} = Mul(g{i}, r{i})",
            ]
        if i == LAYERS:
            break
        weights |= {f"w{i}": (0.3 + 0.1 * i) * rng.normal(size=(WIDTH, INNER)), f"v{i}": rng.normal(size=(INNER, WIDTH))}
        weights |= {f"a{i}": rng.normal(size=INNER), f"b{i}": rng.normal(size=WIDTH)}
        lines.append(f"p{i} = MatMul(n{i}, w{i})  h{i} = Add(p{i}, a{i})  t{i} = Relu(h{i})  z{i} = MatMul(t{i}, v{i})")
        lines.append(f"o{i} = Add(z{i}, b{i})  x{i} = Add({stream}, o{i})")
        stream = f"x{i}"
    weights["small"] = np.asarray([1e-5])
    text = f"f (float[b, s, {WIDTH}] x) => (float[b, s, {WIDTH}] n{LAYERS}) {{ {'  '.join(lines)} }}"
    return graphs.parse(text, {k: np.asarray(v, np.float32) for k, v in weights.items()})


@functools.cache
def convolutions() -> onnx.ModelProto:
    """Four convolutions with biases, one of them behind batch normalisation."""
    rng, widths = np.random.default_rng(4), (3, 10, 14, 18, 12)
    lines, weights, last = [], dict[str, Any](), "x"
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        weights |= {f"w{i}": rng.normal(size=(b, a, 3, 3)) / np.sqrt(9 * a), f"b{i}": 0.3 * rng.normal(size=b)}
        lines.append(f"c{i} = Conv<pads = [1, 1, 1, 1]>({last}, w{i}, b{i})  r{i} = Relu(c{i})")
        last = f"r{i}"
    weights |= {
        "g": 1 + 0.2 * rng.normal(size=12),
        "h": rng.normal(size=12),
        "m": rng.normal(size=12),
        "v": np.full(12, 2.0),
    }
    lines.append(f"y = BatchNormalization({last}, g, h, m, v)")
    text = f"f (float[b, 3, 8, 8] x) => (float[b, 12, 8, 8] y) {{ {'  '.join(lines)} }}"
    return graphs.parse(text, {k: np.asarray(v, np.float32) for k, v in weights.items()})


def batches(proto: onnx.ModelProto, count: int = 12) -> list[dict[str, np.ndarray]]:
    return [graphs.feeds_of(proto, {"b": 6, "s": 9}, seed=s) for s in range(count)]


def fitted(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[dict[str, np.ndarray]]]:
    """A refitted model, and the batches that it was fitted to."""
    seen: list[CalibrationData] = []

    def keep(step: Any, done: Any) -> None:
        if isinstance(step, refit_vectors.RefitVectorsPass):
            seen.append(done.state.calibration)

    result = pruned(proto, refit=True, observer=keep, batch_size=6)
    (data,) = seen
    held = set(held_batches(len(data.batches)))
    assert 0 < len(held) < len(data.batches)
    return result.model, [f for i, f in enumerate(data.batches) if i not in held]


def pruned(proto: onnx.ModelProto, **options: Any) -> liar_opt.PruneResult:
    return liar_opt.prune(proto, batches(proto), **{**SETTINGS, **options})


def weights(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def lost(proto: onnx.ModelProto, dense: onnx.ModelProto, of: list[dict[str, np.ndarray]]) -> float:
    pairs = [(oracle.run(proto, f)[0], oracle.run(dense, f)[0]) for f in of]
    return sum(float(np.square(x - y).sum()) for x, y in pairs) / sum(float(np.square(y).sum()) for _, y in pairs)


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "layer": lambda: residual("layer"),
    "rms": lambda: residual("rms"),
    "convolutions": convolutions,
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_come_nearer_and_matrices_stay(name: str) -> None:
    dense = MODELS[name]()
    before, after = pruned(dense), pruned(dense, refit=True)
    entry = after.report["refit"]
    assert entry["kept"] and entry["after"] < entry["before"] and 0 < entry["refitted"] <= entry["sites"]
    assert "refitted: biases and gains" in refitted(entry)
    other = [graphs.feeds_of(dense, {"b": 6, "s": 9}, seed=s) for s in (101, 102)]
    assert lost(after.model, dense, other) < 0.9 * lost(before.model, dense, other)
    old, new = weights(before.model), weights(after.model)
    assert old.keys() == new.keys()
    changed = {n for n in old if not np.array_equal(old[n], new[n])}
    assert changed and all(old[n].ndim == 1 for n in changed)
    assert not changed & {"m", "v", *(f"a{i}" for i in range(LAYERS))}  # statistics; what was cut has no twin
    shown = [r.report["verification"]["outputs"] for r in (before, after)]
    assert shown[1] != shown[0]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_the_last_gain_and_bias_are_the_least_squares_ones(norm: str) -> None:
    """What stands behind all others is fitted to what these have become: the final model says all of it."""
    dense = residual(norm)
    result, feeds = fitted(dense)
    gain = weights(result)[f"g{LAYERS}"]
    bias = weights(result).get(f"c{LAYERS}", np.zeros(WIDTH, np.float32))
    found, wanted = (np.concatenate([oracle.run(p, f)[0].reshape(-1, WIDTH) for f in feeds]) for p in (result, dense))
    for channel in range(WIDTH):
        columns = [(found[:, channel] - bias[channel]) / gain[channel], np.ones(len(found))][: 2 if norm == "layer" else 1]
        solved = np.linalg.lstsq(np.stack(columns, 1).astype(np.float64), wanted[:, channel], rcond=None)[0]
        assert gain[channel] == pytest.approx(solved[0], rel=1e-3)
        if norm == "layer":
            assert bias[channel] == pytest.approx(solved[1], abs=1e-3)


def test_a_bias_takes_the_mean_that_is_missing() -> None:
    """The sum of the last layer, as it is in the final model, has the mean of the dense one."""
    dense = residual("layer")
    result, feeds = fitted(dense)

    def mean(proto: onnx.ModelProto) -> np.ndarray:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        copy.graph.output.append(onnx.helper.make_tensor_value_info("o3", onnx.TensorProto.FLOAT, None))
        run = oracle.runner(copy)
        return np.asarray(np.concatenate([run(f)[1].reshape(-1, WIDTH) for f in feeds]).mean(0))

    np.testing.assert_allclose(mean(result), mean(dense), atol=1e-4)


def test_what_is_no_better_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains and biases that are made worse, although each site looked better."""
    real = Site.write
    monkeypatch.setattr(Site, "write", lambda self, alpha, beta: real(self, -alpha, beta))
    dense = residual("layer")
    before, after = pruned(dense), pruned(dense, refit=True)
    entry = after.report["refit"]
    assert not entry["kept"] and entry["after"] == entry["before"] and "undone" in refitted(entry)
    old, new = weights(before.model), weights(after.model)
    assert all(np.array_equal(old[n], new[n]) for n in old)


def test_what_others_read_is_left_alone() -> None:
    """A gain that two normalisations share, a constant that is an output, a table, one number for all."""
    text = (
        "f (float[b, s, 5] x) => (float[b, s, 5] y, float[5] c) { "
        "p = LayerNormalization(x, g, b1)  q = LayerNormalization(p, g, b2)  r = Add(q, c)  t = Mul(r, one)  "
        "u = Add(t, table)  v = Mul(u, own)  y = Add(v, last) }"
    )
    shapes = {"g": (5,), "b1": (5,), "b2": (5,), "c": (5,), "one": (1,), "table": (3, 5), "own": (1, 5), "last": (5,)}
    model = OnnxModel.from_proto(graphs.parse(text, shapes))
    model.normalise()
    found = [(s.output, s.gain and s.gain.name, s.bias and s.bias.name) for s in sites_of(model)]
    assert found == [("v", "own", None), ("y", None, "last")]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"blocks": 1}, "behind a cut of widths"), ({"vocabulary": [1, 2]}, "behind a cut of widths")],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        liar_opt.prune(residual("layer"), batches(residual("layer")), refit=True, **options)


def test_the_command_wants_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(residual("layer"), tmp_path / "model.onnx")
    assert main([str(tmp_path / "model.onnx"), "--refit", "--ffn", "0.5"]) == 2
    assert "give some" in capsys.readouterr().err
