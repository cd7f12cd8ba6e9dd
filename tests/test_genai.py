"""Decoders of fused operators: groups, the oracle through their caches, the whole job."""

from __future__ import annotations

from pathlib import Path

import decoding
import numpy as np
import onnx
import oracle
import pytest
import zoo_genai

PROMPT = np.random.default_rng(5).integers(4, zoo_genai.VOCABULARY, (1, 7))


@pytest.mark.parametrize("name", zoo_genai.SHAPES)
def test_generation_through_the_pruned_cache_is_the_masked_originals(name: str, tmp_path: Path) -> None:
    shape = zoo_genai.SHAPES[name]
    onnx.save(zoo_genai.decoder(shape), tmp_path / "model.onnx")
    tolerance = decoding.TOLERANCE[np.dtype(shape.dtype)]
    found, _ = decoding.prove_decoder(tmp_path / "model.onnx", PROMPT, tolerance=tolerance)
    heads = [("heads", shape.groups)] if shape.groups > 1 else []
    assert [(g.kind, g.size) for g in found.groups] == [*heads, ("ffn", shape.ffn)] * shape.layers
    blocks = [g.block_width for g in found.groups if g.kind == "heads"]
    assert blocks == [shape.heads // shape.groups * shape.width] * len(blocks)


def test_the_check_of_generation_can_fail(tmp_path: Path) -> None:
    onnx.save(zoo_genai.decoder(zoo_genai.SHAPES["llama"]), tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    model, state, found = oracle.analyse(tmp_path / "model.onnx")
    kept = oracle.random_kept(found.groups, 0)
    reference = oracle.masked(tmp_path / "model.onnx", found, kept)
    pruned = oracle.prune(model, state, found, kept)
    weight = next(w for w in pruned.graph.initializer if w.name == "layers.1.qkv.weight")
    value = np.array(onnx.numpy_helper.to_array(weight))
    value[:, -1] += 1.0
    weight.CopyFrom(onnx.numpy_helper.from_array(value, weight.name))
    with pytest.raises(AssertionError):
        decoding.prove_generation(proto, pruned, reference, PROMPT, 1e-4)
