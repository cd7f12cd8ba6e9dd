"""The pass of Olive, in the workflow of the page, on a small model; skipped where olive-ai is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import words

import liar_opt

pytest.importorskip("olive", reason="olive-ai is not installed")

from liar_opt.passes.options import OPTIONS
from liar_opt.tools.integrations import olive_pass

WORKFLOW = Path(__file__).resolve().parents[2] / "docs" / "olive-minilm.json"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small BERT with its tokenizer, and texts."""
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).eval().save_pretrained(tmp_path / "model")
    words.save_tokenizer(tmp_path / "model")
    rng = np.random.default_rng(0)
    lines = (" ".join(rng.choice(words.WORDS, rng.integers(4, 12))) for _ in range(64))
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def workflow(place: Path, *passes: str, **options: Any) -> dict[str, Any]:
    """The one of the page, with the small model, some of its passes, and other options of the pruning."""
    said: dict[str, Any] = json.loads(WORKFLOW.read_text("utf-8"))
    said["input_model"]["model_path"] = str(place / "model")
    said["output_dir"], said["cache_dir"] = str(place / "out"), str(place / "cache")
    said["passes"]["prune"] |= {"tokenizer": str(place / "model"), "calibration": str(place / "texts.txt"), **options}
    said["passes"] = {name: said["passes"][name] for name in passes}
    return said


def run(place: Path, *passes: str, **options: Any) -> Path:
    import olive.workflows

    olive.workflows.run(workflow(place, *passes, **options), package_config=olive_pass.package_config())
    return place / "out"


def test_a_workflow_converts_prunes_and_quantises(place: Path) -> None:
    import onnx

    out = run(place, "convert", "prune", "quantise")
    (path,) = out.rglob("*.onnx")
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert "DynamicQuantizeLinear" in ops or "MatMulInteger" in ops
    kept = {tuple(t.dims) for t in onnx.load(path).graph.initializer}
    assert (48, 48) in kept and not {(48, 96), (96, 48)} & kept


def test_a_pruned_model_has_its_report(place: Path) -> None:
    out = run(place, "convert", "prune", sparsity=0.3, ffn=None, seed=3)
    (path,) = out.rglob("*.onnx")
    reports = [*place.rglob(olive_pass.REPORT)]
    assert reports
    report = json.loads(reports[0].read_text("utf-8"))
    assert report["seed"] == 3 and report["verification"]["exact_difference"] < 1e-4
    assert {g.kind for g in liar_opt.inspect(path).groups} == {"ffn", "heads"}


def test_a_checkpoint_stays_one(place: Path) -> None:
    out = run(place, "prune")
    (config,) = out.rglob("config.json")
    assert json.loads(config.read_text("utf-8"))["intermediate_size"] == 48


def test_the_package_file_holds_both_lists_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR

    assert olive_pass.main() == 0
    listed = json.loads(capsys.readouterr().out)["passes"]
    assert {"OnnxConversion", olive_pass.NAME} <= listed.keys()
    params = olive_pass.LiarOptPruning.default_config(DEFAULT_CPU_ACCELERATOR)
    assert {name for name, what in OPTIONS.items() if what.group} - olive_pass.BESIDE <= params.keys()
    with pytest.raises(Exception, match="sparsity"):
        olive_pass.LiarOptPruning.generate_config(DEFAULT_CPU_ACCELERATOR, {"sparsity": "much"}, disable_search=True)
