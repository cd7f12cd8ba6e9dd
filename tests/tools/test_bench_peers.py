"""The benchmark against other tools: the files between it and a driver, and what its table says."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from liar_opt.tools.dev.peers.peer_tasks import Task
from liar_opt.tools.dev.peers.peer_tools import ENVIRONMENTS, HERE, PEERS, REPOSITORIES, Peer
from liar_opt.tools.dev.tables import peers
from liar_opt.tools.dev.tables.peers import (
    Cells,
    PeerError,
    draws_table,
    folds_table,
    make_cell,
    near,
    packed_bits,
    run_peer,
    task_table,
    unpacked_bits,
    verdicts,
)

DRIVER = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
from peer_files import Job
job = Job(Path(sys.argv[1]))
with job.timed():
    total = sum(int(batch["input_ids"].sum()) for batch in job.batches())
if job.method == "fails":
    raise SystemExit("this tool takes no such graph")
(job.folder / "pruned.onnx").write_text(str(total))
job.finish("a tool 1.0", "plain ONNX", f"{{job.ratio}} of {{job.checkpoint.name}}, {{job.onnx.name}}, seed {{job.seed}}")
"""


def a_task(folder: Path, higher: bool = True) -> Task:
    """A model that no tool here reads: its score is what the driver wrote."""
    calibration = folder / "calibration.npz"
    arrays: dict[str, Any] = {"00001.input_ids": np.full((2, 3), 5), "00000.input_ids": np.ones((1, 3), np.int64)}
    np.savez(calibration, **arrays)
    return cast(
        Task,
        SimpleNamespace(
            name="minilm",
            metric="score",
            higher=higher,
            digits=2,
            checkpoint=folder / "checkpoint",
            calibration=calibration,
            graph=lambda kind: folder / "dense.onnx",
            score=lambda path: float(path.read_text()),
            removed=lambda path, graph: 0.5,
            beside=lambda path: {"agreement": 0.75},
            right=lambda path: np.array([True] * 9 + [False]),
        ),
    )


def options(folder: Path, again: bool = False) -> argparse.Namespace:
    """Of the command."""
    return argparse.Namespace(folder=folder, venvs=folder, repositories=folder / "clones", seed=3, again=again)


def a_peer(folder: Path, method: str = "", repository: str | None = None) -> Peer:
    """A tool whose driver is the script above."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    return Peer("peer", "a peer", ("minilm",), str(driver), method, repository=repository)


def test_a_driver_gets_its_job_and_the_batches_in_order_and_its_report_comes_back(tmp_path: Path) -> None:
    cell = make_cell(a_peer(tmp_path), a_task(tmp_path), 0.35, options(tmp_path))
    assert cell["score"] == 2 * 3 * 5 + 3
    assert (cell["tool"], cell["artefact"]) == ("a tool 1.0", "plain ONNX")
    assert cell["note"] == "0.35 of checkpoint, dense.onnx, seed 3"
    assert unpacked_bits(cell).tolist() == [1] * 9 + [0]
    assert 0 <= cell["seconds"] <= cell["process_seconds"] and cell["peak_mib"] > 1


def test_a_model_that_is_pruned_already_is_only_scored(tmp_path: Path) -> None:
    task, peer = a_task(tmp_path), a_peer(tmp_path)
    first = make_cell(peer, task, 0.35, options(tmp_path))
    (tmp_path / "driver.py").write_text("raise SystemExit('started')", encoding="utf-8")
    assert make_cell(peer, task, 0.35, options(tmp_path)) == first
    assert make_cell(peer, task, 0.35, options(tmp_path, again=True)) == {"error": "started"}


def test_what_cannot_be_run_is_a_cell_with_the_reason(tmp_path: Path) -> None:
    task = a_task(tmp_path)
    assert make_cell(a_peer(tmp_path, "fails"), task, 0.5, options(tmp_path)) == {"error": "this tool takes no such graph"}
    assert "github.com/microsoft/TransformerCompression" in make_cell(
        a_peer(tmp_path, repository="slicegpt"), task, 0.5, options(tmp_path)
    ).get("error", "")


def test_a_tool_that_takes_too_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "LIMIT", 0.01)
    with pytest.raises(PeerError, match="stopped after"):
        run_peer(a_peer(tmp_path), a_task(tmp_path), 0.5, tmp_path, options(tmp_path))


def test_cells_are_kept_by_model_tool_ratio_and_seed(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    Cells(path, 0).put("minilm", "liar-opt", 0.5, {"score": 1.0})
    Cells(path, 1).put("minilm", "liar-opt", 0.5, {"score": 2.0})
    Cells(path, 0, 3).put("minilm", "liar-opt", 0.5, {"score": 3.0})
    assert Cells(path, 0).all() == {("minilm", "liar-opt", 0.5): {"score": 1.0}}
    assert Cells(path, 0).seeds() == [0, 1] and Cells(path, 0).folds() == [0, 3] and Cells(path, 1).folds() == [0]


def a_cell(score: float, seconds: float, **more: Any) -> dict[str, Any]:
    """A finished cell."""
    told = {"tool": "t 1", "artefact": "plain ONNX", "note": "n", "busy": 0.0, "peak_mib": 100.0, "removed": 0.2}
    return {"score": score, "seconds": seconds, **told, **more}


def test_the_table_says_where_liar_opt_is_not_first_and_who_is_faster(tmp_path: Path) -> None:
    cells: dict[tuple[str, float], Any] = {
        ("liar-opt", 0.2): a_cell(0.9, 10.0, busy=1.0),
        ("liar-opt", 0.5): a_cell(0.8, 10.0, removed=0.5, latency=[2.0, 1.0], beside={"agreement": 0.75}),
        ("osscar", 0.2): a_cell(0.85, 5.0),
        ("osscar", 0.5): a_cell(0.79, 5.0, removed=0.5),
        ("flap", 0.5): a_cell(0.99, 1.0, removed=0.4),  # it took less than was asked: no rival
        ("torch-pruning-l2", 0.2): a_cell(0.95, 20.0),
        ("qonnx", 0.2): {"error": "no rule for MatMul"},
    }
    task = a_task(tmp_path)
    assert list(verdicts(task, cells, (0.2, 0.5))) == [
        "20 %: liar-opt is behind Torch-Pruning, group L2.",
        "50 %: liar-opt is first; faster within 2 % of its score: OSSCAR.",
    ]
    text = task_table(task, cells, (0.2, 0.5))
    assert "| liar-opt | 0.90 | **0.80** | 20/50 | 10.0 s | 100 MiB | 2.00 | plain ONNX |" in text
    assert "| Torch-Pruning, group L2 | **0.95** |  |" in text
    assert "- qonnx PruneChannels: no rule for MatMul" in text
    assert "- Kwon et al.: needs the loss of a labelled task" in text and "- liar-opt, same widths" in text
    assert "at 50 %:\n\n| tool | score | agreement |" in text and "| liar-opt | 0.80 | 0.7500 |" in text
    cells["liar-opt", 0.5]["busy"] = 1.0
    assert "~10.0 s" in task_table(task, cells, (0.2, 0.5))


def test_several_draws_are_averaged_and_compared_sample_by_sample(tmp_path: Path) -> None:
    task, path = a_task(tmp_path), tmp_path / "cells.json"
    ours, theirs = np.ones(100, bool), np.ones(100, bool)
    ours[:10], theirs[:20] = False, False  # theirs is wrong about ten more
    for seed in (0, 1):
        assert draws_table(task, Cells(path, 0)) == ""
        for name, right in (("liar-opt", ours), ("kwon", theirs)):
            packed = {"right": packed_bits(right), "samples": 100}
            Cells(path, seed).put("minilm", name, 0.2, a_cell(float(right.mean()) + seed / 100, 1.0, **packed))
        Cells(path, 0).put("minilm", "osscar", 0.2, a_cell(0.5, 1.0, **packed))  # of one seed: no place in the table
    lines = [line for line in draws_table(task, Cells(path, 0)).splitlines() if line.startswith("| ")]
    assert lines[2] == "| liar-opt | 0.9050 (0.0071) |  |"
    assert lines[3].startswith("| Kwon et al. | 0.8050 (0.0071) | -10.00 (-1")
    assert len(lines) == 4


def test_folds_are_measured_together_each_beside_its_dense_model(tmp_path: Path) -> None:
    task, path = a_task(tmp_path), tmp_path / "cells.json"
    for fold, samples in ((0, 100), (1, 300)):
        assert folds_table(task, Cells(path, 0)) == ""
        for name, wrong in (("dense", 10), ("liar-opt", 15), ("kwon", 20)):
            right = np.arange(samples) >= wrong
            cell = a_cell(float(right.mean()), 1.0, right=packed_bits(right), samples=samples)
            ratio = 0.0 if name == "dense" else 0.2
            Cells(path, 0, fold).put("minilm", name, ratio, {**cell, "beside": {"agreement": 1.0 - fold}})
    Cells(path, 0).put("minilm", "osscar", 0.2, cell)  # of one fold: no place in the table
    text = folds_table(task, Cells(path, 0))
    assert "400 held-out samples" in text and "Dense: 0.95." in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[2].startswith("| liar-opt | 0.93 | -2.50 (-") and lines[2].endswith(" |  | 0.2500 |")
    assert lines[3].startswith("| Kwon et al. | 0.90 | -5.00 (-") and "| -2.50 (-" in lines[3]
    assert len(lines) == 4


def test_less_is_better_where_the_task_says_so(tmp_path: Path) -> None:
    task = a_task(tmp_path, higher=False)
    assert near(task, 101.0, 100.0) and near(task, 50.0, 100.0) and not near(task, 103.0, 100.0)


def test_every_tool_names_what_there_is() -> None:
    for peer in PEERS.values():
        assert peer.environment is None or peer.environment in ENVIRONMENTS
        assert peer.repository is None or peer.repository in REPOSITORIES
        assert not peer.driver or (HERE / peer.driver).is_file()
