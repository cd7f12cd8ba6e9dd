"""Words of a graph: found by what looks them up, cut exactly.

The oracle is the original file, loaded by onnx alone, with the rows of words that go set to that of the unknown one, and
the same logits -inf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
import zoo_decoders
from oracle import run

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.tables import vocabulary
from liar_opt.frontend.vocabulary import cut_words, find_words
from liar_opt.runtime.compare import relative_difference
from liar_opt.runtime.errors import ModelError

V = zoo.VOCABULARY
KEPT = np.sort(np.random.default_rng(3).permutation(V)[:41])
KEPT = np.union1d(KEPT, [0, zoo.PADDING, 2])
UNKNOWN = int(KEPT[5])
GONE = np.setdiff1d(np.arange(V), KEPT)


def cut(path: Path, **options: Any) -> OnnxModel:
    model = OnnxModel.load(path)
    model.normalise()
    cut_words(model, find_words(model), KEPT, UNKNOWN, **options)
    return model


def reference(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the original gives where ids of words that go are those of the unknown one."""
    replaced = {}
    for name, value in feeds.items():
        known = np.where(np.isin(value, KEPT), value, UNKNOWN) if name.endswith("input_ids") else value
        replaced[name] = known.astype(value.dtype)
    proto = onnx.load(path)
    outputs = dict(zip((o.name for o in proto.graph.output), run(proto, replaced), strict=True))
    for value in outputs.values():
        if value.shape[-1] == V:
            value[..., GONE] = -np.inf
    return outputs


def check(path: Path, feeds: dict[str, np.ndarray], allowed: float = 1e-5) -> OnnxModel:
    model = cut(path)
    proto = model.to_proto()
    onnx.checker.check_model(proto)
    given = onnx.load(path, load_external_data=False).graph
    assert [o.name for o in proto.graph.output] == [o.name for o in given.output]
    ours = dict(zip((o.name for o in proto.graph.output), run(proto, feeds), strict=True))
    for name, value in reference(path, feeds).items():
        assert relative_difference(ours[name], value) <= allowed, name
    assert not any(t.dims and V in t.dims and t.data_type != onnx.TensorProto.INT32 for t in proto.graph.initializer)
    again = OnnxModel.from_proto(proto)
    again.normalise()
    assert vocabulary(again) == V  # ids are those of the original
    with pytest.raises(ModelError, match="computed inside"):
        find_words(again)
    return model


@pytest.mark.parametrize("exporter", zoo.EXPORTERS)
@pytest.mark.parametrize("half", ["", "torch", "onnxruntime"])
def test_a_tied_head_with_a_bias(exporter: str, half: str) -> None:
    more = {"dtype": "float16", "half_by": half} if half else {}
    if (exporter, half) == ("torchscript", "torch"):
        more = {"dtype": "float16", "half_by": "onnxruntime"}  # the exporter mixes types
    built = zoo.ready(zoo.words_case(exporter, **more))
    check(built.path, built.feeds, 2e-3 if half else 1e-5)
    model = OnnxModel.load(built.path)
    model.normalise()
    words = find_words(model)
    assert words.size == V and words.inputs == ("input_ids",) and len(words.lookups) == len(words.logits) == 1


@pytest.mark.parametrize(
    "case",
    [
        *(zoo_decoders.Case(name, "torchscript") for name in ("gpt2", "llama", "llama-tied-mha", "gemma2", "bart")),
        *(zoo_decoders.Case(name, "torchscript", True) for name in ("gpt2", "llama", "opt")),
        *(zoo_decoders.Case(name, "dynamo") for name in ("gpt2", "llama")),
        zoo_decoders.Case("llama", "dynamo", True),
    ],
    ids=lambda case: case.name,
)
def test_decoders(case: zoo_decoders.Case) -> None:
    built = zoo_decoders.ready(case)
    check(built.path, built.other_feeds)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "mpnet", "albert", "deberta-v3", "electra"])
def test_encoders(name: str) -> None:
    case = next(c for c in zoo.every_case() if (c.architecture, c.exporter, c.axes) == (name, "torchscript", "dynamic"))
    built = zoo.ready(case)
    model = check(built.path, built.feeds)
    assert model.weight_bytes() < OnnxModel.load(built.path).weight_bytes()


def test_an_optimised_graph() -> None:
    case = next(c for c in zoo.every_case() if c.name == "bert-torchscript-eager-dynamic-transformers")
    built = zoo.ready(case)
    assert "EmbedLayerNormalization" in {n.op for n in OnnxModel.load(built.path).graph.nodes}
    check(built.path, built.feeds)
