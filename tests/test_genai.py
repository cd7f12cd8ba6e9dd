"""Decoders of fused operators: groups, the oracle through their caches, the whole job."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import decoding
import graphs
import numpy as np
import onnx
import oracle
import pytest
import zoo_genai

import liar_opt
from liar_opt.frontend.onnx_model import CACHE_SHAPES
from liar_opt.runtime.compare import TOLERANCES
from liar_opt.runtime.signatures import Signature

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


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt2, stacked", "opset 23"])
def test_four_layers_not_all_alike(name: str, tmp_path: Path) -> None:
    """All kinds at once by random cuts, then as the command does it when nothing is said."""
    shape = zoo_genai.SHAPES[name]
    odd = (4, 2 if shape.groups < shape.heads else 4, 28)
    shape = dataclasses.replace(shape, layers=4, odd=odd)
    path = tmp_path / "model.onnx"
    onnx.save(zoo_genai.decoder(shape), path)
    found, _ = decoding.prove_decoder(path, PROMPT, seeds=1)
    assert [(g.kind, g.size) for g in found.groups] == [
        pair for i in range(4) for pair in (("heads", shape.of(i).groups), ("ffn", shape.of(i).ffn))
    ]
    result = liar_opt.prune(path, samples=8, sequence_length=9, latency=False)
    assert result.report["verification"]["exact_difference"] <= TOLERANCES["float32"]
    assert {g["kind"] for g in result.report["groups"] if g["after"] < g["before"]} == {"heads", "ffn"}
    tokens, logits = decoding.Decoder(result.model).generate(PROMPT, 4)
    whole = decoding.Decoder(result.model)
    values, _ = whole.step(np.concatenate([PROMPT, tokens[:, :3]], axis=1), 0, whole.empty(1))
    assert np.abs(values[:, -1] - logits[:, 3]).max() <= TOLERANCES["float32"] * np.abs(logits).max()


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


def feeds_of(proto: onnx.ModelProto, padding: int = 3) -> list[dict[str, np.ndarray]]:
    """Draws token ids, of which the last of every second row are padding, and empty caches."""
    batches, rows, length = 6, 2, 11
    rng = np.random.default_rng(1)
    empty = decoding.Decoder(proto, capacity=SLIDING).empty(rows)
    mask = np.ones((rows, length), np.int64)
    mask[1::2, length - padding :] = 0
    names = {i.name for i in proto.graph.input}
    positions = np.tile(np.arange(length), (rows, 1))
    result = []
    for _ in range(batches):
        feeds = {"input_ids": rng.integers(4, zoo_genai.VOCABULARY, (rows, length)), "position_ids": positions}
        result.append({n: v for n, v in (feeds | {"attention_mask": mask} | empty).items() if n in names})
    return result


SLIDING = zoo_genai.SHAPES["gemma2"].window


@pytest.mark.parametrize("name", ["llama", "gemma2", "opset 23", "gpt2"])
def test_the_whole_job(name: str, tmp_path: Path) -> None:
    shape = zoo_genai.SHAPES[name]
    proto = zoo_genai.decoder(shape)
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    padding = 0 if shape.sliding else 3  # a sliding cache takes no batch of different lengths
    result = liar_opt.prune(path, feeds_of(proto, padding), heads=0.34, ffn=0.4, latency=False)
    left = round(shape.groups * 0.66)
    assert [(g["kind"], g["after"]) for g in result.report["groups"]] == [("heads", left), ("ffn", 24)] * shape.layers
    masked = "attention_mask" in {i.name for i in proto.graph.input}
    assert result.report["calibration"]["tokens"] == 6 * (11 + (11 - padding if masked else 11))
    result.save(tmp_path / "pruned.onnx")
    pruned = onnx.load(tmp_path / "pruned.onnx")
    caches = {c: s for c, s in result.report["cache_shapes"].items() if c.startswith("past")}
    assert {c: s[1] for c, s in caches.items()} == {
        f"past_key_values.{i}.{n}": left for i in range(shape.layers) for n in ("key", "value")
    }
    assert json.loads({p.key: p.value for p in pruned.metadata_props}[CACHE_SHAPES]) == result.report["cache_shapes"]
    assert decoding.Decoder(pruned).generate(PROMPT)[0].shape == (1, decoding.STEPS)


@pytest.mark.parametrize("name", ["gemma2", "gpt2, stacked"])
def test_texts_need_no_cache_and_no_length(name: str, tmp_path: Path) -> None:
    """Token ids alone: masks, caches of the sizes that operators need, and lengths are made."""
    path = tmp_path / "model.onnx"
    onnx.save(zoo_genai.decoder(zoo_genai.SHAPES[name]), path)
    ids = np.random.default_rng(2).integers(4, zoo_genai.VOCABULARY, (12, 10))
    whole = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    result = liar_opt.prune(path, whole, heads=0.34, batch_size=3, latency=False)
    left = round(zoo_genai.SHAPES[name].groups * 0.66)
    assert {g["after"] for g in result.report["groups"] if g["kind"] == "heads"} == {left}
    assert all(left in shape for shape in result.report["cache_shapes"].values())
    assert result.report["calibration"]["tokens"] == ids.size


def test_rows_of_padding_are_not_measured(tmp_path: Path) -> None:
    proto = zoo_genai.decoder(zoo_genai.SHAPES["llama"])
    feeds = feeds_of(proto)
    other = [{**f, "input_ids": np.where(f["attention_mask"] == 1, f["input_ids"], 5)} for f in feeds]
    first, second = (liar_opt.prune(proto, f, ffn=0.3, latency=False) for f in (feeds, other))
    assert {c.details["rows"] for c in first.changes} == {6 * (11 + 8)}
    for a, b in zip(first.model.graph.initializer, second.model.graph.initializer, strict=True):
        assert a == b


def test_the_length_of_a_window_says_nothing_of_what_was_seen() -> None:
    _, state, _ = graphs.analyse(zoo_genai.decoder(zoo_genai.SHAPES["gemma2"]))
    specs = state.input_specs()
    assert {s.name for s in specs if s.in_place} == {s.name for s in specs if s.name.startswith("past")}
    signature = Signature.read(specs, None)
    feed = signature.feed(np.ones((2, 5), np.int64), np.ones((2, 5), np.bool_))
    assert feed["attention_mask"].shape == (2, 5)
    assert feed["past_key_values.0.key"].shape == (2, 3, SLIDING, 16)


@pytest.mark.slow
def test_an_export_with_the_operators_of_opset_23(tmp_path: Path) -> None:
    """One sample: for more, ONNX Runtime wants tables that this export does not repeat (without position ids)."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 89, "hidden_size": 96, "intermediate_size": 40, "num_hidden_layers": 2, "use_cache": False}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=6, num_key_value_heads=3)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.LlamaForCausalLM(config)
            for weight in self.model.parameters():
                torch.nn.init.normal_(weight, 0.0 if weight.ndim > 1 else 1.0, 0.2)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=input_ids).logits
            return logits

    ids, dynamic = torch.arange(4, 13)[None], torch.export.Dim.DYNAMIC
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Logits().eval(), (ids,), path, dynamo=True, opset_version=23, dynamic_shapes=({1: dynamic},), verbose=False
    )
    model, state, found = oracle.analyse(path)
    assert {"Attention", "RotaryEmbedding"} <= {node.op for node in model.graph.nodes}
    assert [(g.kind, g.size) for g in found.groups] == [("heads", 3), ("ffn", 40)] * 2
    kept = oracle.random_kept(found.groups, 1)
    reference = oracle.masked(path, found, kept)
    feeds = {"input_ids": PROMPT.astype(np.int64)}
    pruned = oracle.run(oracle.prune(model, state, found, kept), feeds)
    assert oracle.difference(pruned, oracle.run(reference, feeds)) <= TOLERANCES["float32"]
    assert oracle.difference(oracle.run(onnx.load(path), feeds), pruned) > 0.01
