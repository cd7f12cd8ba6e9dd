# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Several processes, started by torchrun, give what one gives; one that fails or dies ends all, and the run can go on."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import zoo_fx

from liar_opt.runtime import ranks
from liar_opt.runtime.moments import Moments
from liar_opt.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = (24, 40, 32, 24)
BLOCK = "n{0} = LayerNormalization<axis=-1>(x{0}, g{0})  u{0} = MatMul(n{0}, w{0})  a{0} = Add(u{0}, b{0})  h{0} = Relu(a{0})  z{0} = MatMul(h{0}, v{0})  x{1} = Add(x{0}, z{0})"
PLAIN = ("--sparsity", "0.4", "--batch-size", "4", "--multiple-of", "4", "--no-latency")
KILL = """
import os, signal, sys
from liar_opt.passes.checkpoint import Checkpoint
from liar_opt.tools.cli import main
save = Checkpoint.save
def killed(self, number, finished, alive):
    save(self, number, finished, alive)
    if number == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = killed
sys.exit(main())
"""
OTHERWISE = """
import os, sys
from liar_opt.tools.cli import main
if os.environ["RANK"] == "1":
    sys.argv += ["--sparsity", "0.3"]
sys.exit(main())
"""


def stream(path: Path) -> Path:
    """Writes a residual stream of four feed-forward blocks of several widths."""
    weights: dict[str, Any] = {}
    for i, width in enumerate(WIDTHS):
        weights |= {f"g{i}": np.ones(12, np.float32), f"w{i}": (12, width), f"b{i}": (width,), f"v{i}": (width, 12)}
    blocks = "\n".join(BLOCK.format(i, i + 1) for i in range(len(WIDTHS)))
    onnx.save(graphs.parse(f"f (float[b, s, 12] x0) => (float[b, s, 12] x4) {{ {blocks} }}", weights), path)
    return path


def rows(path: Path, broken: int | None = None) -> Path:
    """Writes samples near a plane; one of them with a number that is none."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 7, 6)) @ rng.standard_normal((6, 12)) + 0.1 * rng.standard_normal((64, 7, 12))
    if broken is not None:
        x[broken] = np.nan
    np.savez(path, x0=x.astype(np.float32))
    return path


def together(count: int, arguments: Sequence[str], script: Path | None = None) -> tuple[int, list[str]]:
    """Runs the command in several processes; returns whether it went wrong, and our own lines of stderr."""
    what = ["-m", "liar_opt"] if script is None else [str(script)]
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *what]
    done = subprocess.run([*started, *arguments], capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("liar-opt: ") and "warning" not in line]
    return done.returncode, [line for line in said if " of " not in line or "error" in line]


def weights(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".onnx":
        return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    from safetensors.numpy import load_file

    return dict(load_file(path / "model.safetensors"))


def require_alike(one: Path, several: Path) -> None:
    """Requires the same kept sets, and weights that differ by rounding alone."""
    kept = [[g.get("kept") for g in json.loads(p.with_suffix(".json").read_text())["groups"]] for p in (one, several)]
    assert kept[0] == kept[1] and any(kept[0])
    ours, theirs = weights(one), weights(several)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name].shape == value.shape
        np.testing.assert_allclose(theirs[name], value, rtol=0, atol=1e-6 * float(np.abs(value).max() or 1), err_msg=name)


@pytest.mark.parametrize(
    ("count", "more"), [(2, ()), pytest.param(3, ("--repair", "dense", "--ffn", "0.5"), marks=pytest.mark.rest)]
)
def test_a_graph(count: int, more: tuple[str, ...], tmp_path: Path) -> None:
    plain = [a for a in PLAIN if not more or a not in ("--sparsity", "0.4")]
    arguments = [str(stream(tmp_path / "m.onnx")), "--calibration", str(rows(tmp_path / "d.npz")), *plain, *more, "--fresh"]
    for name in ("one", "several"):
        given = [*arguments, "-o", str(tmp_path / f"{name}.onnx"), "--report", str(tmp_path / f"{name}.json")]
        assert (main(given) if name == "one" else together(count, given)[0]) == 0
    require_alike(tmp_path / "one.onnx", tmp_path / "several.onnx")
    processes = json.loads((tmp_path / "several.json").read_text())["processes"]
    assert [p["rank"] for p in processes] == list(range(count)) and sum(p["batches"] for p in processes) == 16
    assert all(p["seconds"] >= p["waited"] > 0 and p["resident_peak"] for p in processes)
    assert "processes" not in json.loads((tmp_path / "one.json").read_text())


def test_a_checkpoint(tmp_path: Path) -> None:
    zoo_fx.build("llama").save_pretrained(tmp_path / "model")
    parts = [zoo_fx.feeds("llama", batch=8, seed=s) for s in range(4)]
    np.savez(tmp_path / "d.npz", **{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})  # type: ignore[arg-type, unused-ignore]
    arguments = [str(tmp_path / "model"), "--calibration", str(tmp_path / "d.npz"), *PLAIN, "--fresh"]
    for name in ("one", "several"):
        given = [*arguments, "-o", str(tmp_path / name), "--report", str(tmp_path / f"{name}.json")]
        assert (main(given) if name == "one" else together(2, given)[0]) == 0
    require_alike(tmp_path / "one", tmp_path / "several")


def test_one_is_killed_and_three_go_on(tmp_path: Path) -> None:
    (tmp_path / "kill.py").write_text(KILL)
    arguments = [str(stream(tmp_path / "m.onnx")), "--calibration", str(rows(tmp_path / "d.npz")), *PLAIN, "--fresh"]
    several = [*arguments, "-o", str(tmp_path / "several.onnx"), "--report", str(tmp_path / "several.json")]
    several += ["--resume", str(tmp_path / "resume")]
    code, said = together(2, several, tmp_path / "kill.py")
    assert code != 0 and not (tmp_path / "several.onnx").exists()
    assert len(said) == 1 and "process 1 of this run ended" in said[0] and "--resume goes on" in said[0]
    assert together(3, several)[0] == 0
    assert json.loads((tmp_path / "several.json").read_text())["resumed"] >= 1 and not (tmp_path / "resume").exists()
    assert main([*arguments, "-o", str(tmp_path / "one.onnx"), "--report", str(tmp_path / "one.json")]) == 0
    require_alike(tmp_path / "one.onnx", tmp_path / "several.onnx")


def test_one_has_other_options(tmp_path: Path) -> None:
    (tmp_path / "otherwise.py").write_text(OTHERWISE)
    arguments = [str(stream(tmp_path / "m.onnx")), "--calibration", str(rows(tmp_path / "d.npz")), *PLAIN]
    code, said = together(2, [*arguments, "-o", str(tmp_path / "out.onnx")], tmp_path / "otherwise.py")
    assert code != 0 and not (tmp_path / "out.onnx").exists()
    assert said == ["liar-opt: error: process 1 has another option sparsity than process 0 (0.3, not 0.4); start all alike"]


def test_the_batch_of_one_is_broken(tmp_path: Path) -> None:
    data = rows(tmp_path / "d.npz", broken=5)
    arguments = [str(stream(tmp_path / "m.onnx")), "--calibration", str(data), *PLAIN, "--allocate", "uniform"]
    code, said = together(2, [*arguments, "-o", str(tmp_path / "out.onnx")])
    assert code != 0 and len(said) == 1 and "NaN or Inf" in said[0] and not (tmp_path / "out.onnx").exists()


def test_there_are_fewer_batches(tmp_path: Path) -> None:
    arguments = [str(stream(tmp_path / "m.onnx")), "--calibration", str(rows(tmp_path / "d.npz")), "--batch-size", "64"]
    code, said = together(2, [*arguments, "-o", str(tmp_path / "out.onnx")])
    assert code != 0 and len(said) == 1 and "2 processes have 1 batch of calibration data" in said[0]


def test_an_environment_that_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    assert main([str(tmp_path / "m.onnx")]) == 2
    assert "MASTER_ADDR, MASTER_PORT is not in the environment; start them with torchrun" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "m.onnx")]) == 2
    assert "'inspect' is the work of one process" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before and ranks.current().size == 1


def test_cross_moments_that_some_have() -> None:
    rng, parts = np.random.default_rng(0), [Moments(3), Moments(3)]
    whole = Moments(3)
    for part, held in ((0, False), (1, False), (1, True)):
        x, y = rng.standard_normal((20, 3)), rng.standard_normal((20, 2))
        for moments in (parts[part], whole):
            moments.add(20, x.sum(axis=0), x.T @ x, held)
            moments.add_cross(20, x.T @ y, y.sum(axis=0), float(np.square(y).sum()), held)
    crosses = parts[0].crosses | parts[1].crosses
    assert crosses == {"training": (3, 2), "held_back": (3, 2)} and parts[0].crosses == {"training": (3, 2)}
    sent: list[np.ndarray] = []
    parts[1].add_up(lambda array: sent.append(array.copy()), crosses)
    waiting = iter(sent)

    def add(array: np.ndarray) -> None:
        array += next(waiting)

    parts[0].add_up(add, crosses)
    assert next(waiting, None) is None and parts[0].count == whole.count == 60
    for fold in ("training", "held_back", "all"):
        np.testing.assert_allclose(parts[0].statistics(fold).covariance, whole.statistics(fold).covariance, rtol=1e-12)
        ours, theirs = parts[0].cross_statistics(fold), whole.cross_statistics(fold)
        np.testing.assert_allclose(ours.covariance, theirs.covariance, rtol=1e-12)
        np.testing.assert_allclose(ours.target_variance, theirs.target_variance, rtol=1e-12)
