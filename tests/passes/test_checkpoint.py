"""An interrupted run goes on from its last finished segment and comes out the same; another run is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import streams

import liar_opt
from liar_opt.passes.sweep import Sweep
from liar_opt.runtime import memory
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.errors import OptionError

BLOCK = streams.BLOCK
TEXT = f"f (float[b, s, 6] x0) => (float[b, s, 6] x3) {{ {' '.join(BLOCK.format(i, i + 1) for i in range(3))} }}"
WEIGHTS: dict[str, tuple[int, ...]] = {}
for number, hidden in enumerate((17, 19, 23)):
    WEIGHTS |= {f"w{number}": (6, hidden), f"b{number}": (hidden,), f"v{number}": (hidden, 6)}


class Stop(KeyboardInterrupt):
    """The interruption."""


@pytest.fixture
def model() -> onnx.ModelProto:
    return graphs.parse(TEXT, WEIGHTS)


def prune(model: onnx.ModelProto, folder: Path | None, **options: Any) -> liar_opt.PruneResult:
    feeds = [dict(f) for f in streams.batches(12, 0)]
    chosen: dict[str, Any] = {"ffn": 0.5, "multiple_of": 1, "latency": False, "samples": 96, "batch_size": 8, **options}
    return liar_opt.prune(model, feeds, resume=folder, **chosen)


def stop_in(segment: int, batches: int) -> Callable[[str, int, int], None]:
    """Interrupts in the second batch of a segment."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "calibrate" and done == segment * batches + 2:
            raise Stop

    return progress


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes which segments are measured."""
    seen: list[int] = []
    segment = Sweep.segment

    def noted(self: Sweep, *arguments: Any) -> Any:
        seen.append(self.number)
        return segment(self, *arguments)

    monkeypatch.setattr(Sweep, "segment", noted)
    return seen


@pytest.mark.parametrize("segment", [0, 1, 2])
@pytest.mark.parametrize("score", ["greedy", "random"])
def test_what_is_resumed_comes_out_the_same(
    segment: int, score: str, model: onnx.ModelProto, tmp_path: Path, measured: list[int]
) -> None:
    whole = prune(model, None, score=score)
    batches = whole.report["calibration"]["batches"]
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        prune(model, folder, score=score, progress=stop_in(segment, batches))
    assert sorted(p.name for p in folder.iterdir()) == ["run.json", *(f"segment-{i + 1}" for i in range(segment))]
    measured.clear()
    resumed = prune(model, folder, score=score)
    assert measured == [1, 2, 3][segment:]
    assert resumed.report["resumed"] == segment
    assert not folder.exists()
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()
    assert resumed.report["groups"] == whole.report["groups"]
    assert resumed.report["verification"] == whole.report["verification"]


def test_large_models_are_resumed_from_disk(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the model and what is alive between segments were larger than the memory: nothing else comes out."""
    plain = prune(model, None)
    monkeypatch.setattr(memory, "LARGE_MODEL", 1 << 40)
    monkeypatch.setattr(memory, "LARGE_STREAM", 1 << 40)
    put, stored = ArrayStore.put, []

    def everything(self: ArrayStore, array: np.ndarray, least: int = 0) -> np.ndarray:
        stored.append(array.nbytes)
        return put(self, array, 0)

    monkeypatch.setattr(ArrayStore, "put", everything)
    whole = prune(model, None)
    assert sum(stored) > 12 * 8 * 5 * 6 * 4 * 2  # the stream of all batches, behind two segments
    assert whole.report["model"]["notes"] == []
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", progress=stop_in(2, whole.report["calibration"]["batches"]))
    resumed = prune(model, tmp_path / "run")
    assert resumed.report["resumed"] == 2
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()
    for a, b in zip(plain.model.graph.initializer, whole.model.graph.initializer, strict=True):
        np.testing.assert_allclose(
            onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b), rtol=1e-3, atol=1e-4, err_msg=a.name
        )


def test_latency_of_large_models_is_not_measured(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE_MODEL", 1 << 40)
    report = prune(model, None, latency=True).report
    assert "latency" not in report
    assert any("latency was not measured" in note for note in report["model"]["notes"])
    assert report["memory"]["estimated_peak"] > 0


@pytest.mark.parametrize("name", ["groups.json", "weights-0-0.npz", "alive-1.npz"])
@pytest.mark.parametrize("content", [b"", b"{}", b"PK no archive"])
def test_a_damaged_segment(name: str, content: bytes, model: onnx.ModelProto, tmp_path: Path) -> None:
    batches = prune(model, None).report["calibration"]["batches"]
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", progress=stop_in(1, batches))
    file = tmp_path / "run" / "segment-1" / name
    assert file.is_file()
    file.write_bytes(content)
    with pytest.raises(OptionError, match="segment-1' of an earlier run is damaged; remove the folder"):
        prune(model, tmp_path / "run")


def test_measured_widths_are_not_measured_again(model: onnx.ModelProto, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ffn": None, "sparsity": 0.4, "allocate": "curves"}
    whole = prune(model, None, **options)
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", progress=stop_in(1, whole.report["calibration"]["batches"]), **options)
    stages = set()
    resumed = prune(model, tmp_path / "run", progress=lambda stage, done, total: stages.add(stage), **options)
    assert stages == {"calibrate", "verify"}
    assert resumed.report["curves"] == whole.report["curves"]
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()


def test_a_finished_run_leaves_nothing(model: onnx.ModelProto, tmp_path: Path) -> None:
    prune(model, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_a_run_removes_its_own_files_alone(model: onnx.ModelProto, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        prune(model, folder, progress=stop_in(2, 12))
    foreign = ["notes.txt", "segment-1/notes.txt", "segment-x/groups.json", "segment-9.bak"]
    for name in foreign:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("precious")
    assert prune(model, folder).report["resumed"] == 2
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == sorted(foreign)


def test_a_run_that_was_killed_at_its_end(model: onnx.ModelProto, tmp_path: Path) -> None:
    """Its segments are left without what says whose they are: the next run begins anew, and leaves nothing."""
    folder = tmp_path / "run"
    with pytest.raises(Stop):
        prune(model, folder, progress=stop_in(2, 12))
    (folder / "run.json").unlink()
    assert prune(model, folder).report["resumed"] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"score": "magnitude"}, "'prune-groups score' was greedy, now it is magnitude"),
        ({"ffn": 0.4}, r"'allocate-widths ffn' was 0\.5, now it is 0\.4"),
        ({"seed": 3}, "'seed' was 0, now it is 3"),
        ({"samples": 48}, "'calibration samples' was 96, now it is 48"),
    ],
)
def test_other_options_are_refused(change: dict[str, Any], match: str, model: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", progress=stop_in(1, 12))
    with pytest.raises(OptionError, match=f"resume folder '.*run' is of another run: {match}"):
        prune(model, tmp_path / "run", **change)


def test_another_model_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", progress=stop_in(1, 12))
    other = onnx.ModelProto()
    other.CopyFrom(model)
    value = onnx.numpy_helper.to_array(other.graph.initializer[0]) + np.float32(0.5)
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(value, other.graph.initializer[0].name))
    with pytest.raises(OptionError, match=r"'model' was .*now it is"):
        prune(other, tmp_path / "run")


def test_folders_that_are_none_of_ours(model: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OptionError, match="is a file; give a folder"):
        prune(model, tmp_path / "file")
    with pytest.raises(OptionError, match="holds other files"):
        prune(model, tmp_path)
    with pytest.raises(OptionError, match="cannot be made"):
        prune(model, tmp_path / "none" / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(OptionError, match="cannot be read"):
        prune(model, tmp_path / "run")
    assert (tmp_path / "file").read_text() == "precious"


def test_two_runs_in_one_folder(model: onnx.ModelProto, tmp_path: Path) -> None:
    """The second says so before it works, and changes nothing; what a killed one leaves of its lock keeps nobody out."""
    folder = tmp_path / "run"

    def second(stage: str, done: int, total: int) -> None:
        if stage == "calibrate" and done == 14:
            before = sorted(p.name for p in folder.rglob("*"))
            with pytest.raises(OptionError, match=r"another run works in the resume folder '.*run'; wait for it, or give"):
                prune(model, folder)
            assert sorted(p.name for p in folder.rglob("*")) == before
            raise Stop

    with pytest.raises(Stop):
        prune(model, folder, progress=second)
    (folder / "run.lock").touch()
    assert prune(model, folder).report["resumed"] == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_behind_blocks_that_went_is_resumed(model: onnx.ModelProto, tmp_path: Path) -> None:
    whole = prune(model, None, blocks=1)
    with pytest.raises(Stop):
        prune(model, tmp_path / "run", blocks=1, progress=stop_in(1, whole.report["calibration"]["batches"]))
    with pytest.raises(OptionError, match="is of another run: 'what went first' was"):
        prune(model, tmp_path / "run")
    resumed = prune(model, tmp_path / "run", blocks=1)
    assert resumed.report["resumed"] == 1 and resumed.report["blocks"] == whole.report["blocks"]
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()


def test_what_cannot_be_resumed(model: onnx.ModelProto, tmp_path: Path) -> None:
    for options in ({"repair": "dense"}, {"max_drop": 0.1, "ffn": None}):
        with pytest.raises(OptionError, match="resume works with ratios or a target"):
            prune(model, tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_was_finished(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    savez, calls = np.savez, []

    def full(file: Path, **arrays: Any) -> None:
        calls.append(file)
        if file.parent.name.startswith("segment-2"):
            raise OSError(28, "No space left on device")
        savez(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OptionError, match=r"cannot take a segment .No space left"):
        prune(model, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["run.json", "segment-1"]
    monkeypatch.undo()
    assert prune(model, tmp_path / "run").report["resumed"] == 1
