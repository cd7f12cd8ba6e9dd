"""Results in what serves them: outputs equal ONNX Runtime's, or those of torch; each skips where its runtime is missing."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import zoo

import liar_opt
from liar_opt.tools.dev.runners import RUNNERS, Ran

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, WORDS = 4, 61


@functools.cache
def made() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    module: torch.nn.Module = transformers.BertModel(config, add_pooling_layer=False).eval()
    return module


def batch(rows: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(3, WORDS, (rows, 11))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


@functools.cache
def written(kind: str) -> Path:
    """A pruned file of a kind, each layer with its own widths where that can be said."""
    path = zoo.session_folder() / f"served{kind or '-checkpoint'}"
    with zoo.alone(path.name):
        if not path.exists():
            data = [batch(4, seed) for seed in range(3)]
            ratios = {"ffn": 0.4} if not kind else {"sparsity": 0.4}
            liar_opt.prune(made(), data, checkpoint=not kind, latency=False, **ratios).save(path)  # type: ignore[arg-type]
    return path


@functools.cache
def expected(kind: str) -> Ran:
    name = {".onnx": "onnxruntime", ".pt2": "torch.export", "": "transformers"}[kind]
    return RUNNERS[name].run(written(kind), batch(), 0)


COMMON = ("onnxruntime", "torch.export", "transformers")
"""What is there always, and what other tests run in."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.rest) if n in COMMON else n for n in RUNNERS])
def test_it_computes_the_same(name: str) -> None:
    runner = RUNNERS[name]
    if runner.missing is not None:
        pytest.skip(f"{runner.missing} is not installed")
    found = runner.run(written(runner.reads), batch(), 1)
    assert found.seconds > 0
    np.testing.assert_allclose(found.outputs[0], expected(runner.reads).outputs[0], rtol=1e-3, atol=1e-4)
