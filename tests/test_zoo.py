"""The zoo is what it says: it covers the matrix, agrees with torch, and its check can fail."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import zoo
from onnx import numpy_helper

FAST = zoo.cases(fast=True)


def named(name: str) -> zoo.Case:
    return next(case for case in zoo.every_case() if case.name == name)


def test_cases_cover_the_matrix() -> None:
    every = zoo.cases(fast=False)
    found = {(c.architecture, c.exporter, c.attention, c.axes) for c in every if not c.optimised and c.dtype == "float32"}
    for architecture, exporter, axes in itertools.product(zoo.ARCHITECTURES, zoo.EXPORTERS, zoo.AXES):
        for attention in zoo.attentions(architecture):
            assert (architecture, exporter, attention, axes) in found
    assert {c.opset for c in every if c.exporter == "torchscript"} >= {13, 17}
    assert {c.opset for c in every if c.exporter == "dynamo"} >= {18, zoo.FUSED, zoo.NEWEST}
    assert {(c.exporter, c.dtype) for c in every} == set(itertools.product(zoo.EXPORTERS, ("float32", "float16")))
    fused = {(c.architecture, c.optimiser) for c in every if c.optimised}
    assert fused >= set(itertools.product(("bert", "vit"), ("transformers", "transformers-mha", "extended")))


def test_names_are_unique_and_quick_ones_exist() -> None:
    names = [case.name for case in zoo.every_case()]
    assert len(names) == len(set(names))
    assert {case.name for case in FAST} == zoo.QUICK
    assert set(names) >= zoo.IMPOSSIBLE.keys()


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_export_runs_and_agrees_with_torch(case: zoo.Case) -> None:
    built = zoo.ready(case)
    assert zoo.difference(zoo.run(built.path, built.feeds), built.outputs) <= zoo.RTOL[case.dtype]
    if built.mask is not None:
        assert 0 < built.feeds[built.mask].sum() < built.feeds[built.mask].size
    if case.axes == "static":
        assert built.other_feeds is None
        return
    assert built.other_feeds is not None
    assert built.other_outputs is not None
    assert {n: v.shape for n, v in built.other_feeds.items()} != {n: v.shape for n, v in built.feeds.items()}
    assert zoo.difference(zoo.run(built.path, built.other_feeds), built.other_outputs) <= zoo.RTOL[case.dtype]


def test_padding_does_not_reach_the_words() -> None:
    built = zoo.ready(named("bert-torchscript-eager-dynamic"))
    real = built.feeds["attention_mask"] == 1
    changed = {**built.feeds, "input_ids": np.where(real, built.feeds["input_ids"], zoo.VOCABULARY - 1)}
    after = zoo.run(built.path, changed)["last_hidden_state"]
    before = built.outputs["last_hidden_state"]
    np.testing.assert_allclose(after[real], before[real], atol=1e-5)
    assert np.abs(after[~real] - before[~real]).max() > 0.1


def test_a_perturbed_weight_is_noticed(tmp_path: Path) -> None:
    built = zoo.ready(named("bert-torchscript-eager-dynamic"))
    model = onnx.load(built.path)
    (weight,) = (i for i in model.graph.initializer if i.name.endswith("layer.0.intermediate.dense.bias"))
    value = numpy_helper.to_array(weight).copy()
    value[3] += 0.1
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    onnx.save(model, tmp_path / "perturbed.onnx")
    assert zoo.difference(zoo.run(tmp_path / "perturbed.onnx", built.feeds), built.outputs) > zoo.RTOL["float32"]


def test_random_parameters_are_not_shared_and_initial_ones_are() -> None:
    def biases(name: str) -> int:
        stored = onnx.load(zoo.ready(named(name)).path).graph.initializer
        return sum(i.name.endswith("bias") for i in stored)

    assert biases("bert-torchscript-eager-dynamic") == 17  # one of the embeddings, eight of each layer
    assert biases("bert-torchscript-eager-dynamic-initial") < 4


def test_a_second_build_reuses_the_first(tmp_path: Path) -> None:
    case = named("bert-torchscript-eager-dynamic")
    first = zoo.build(case, tmp_path)
    stamp = first.path.stat().st_mtime_ns
    second = zoo.build(case, tmp_path)
    assert second.path.stat().st_mtime_ns == stamp
    assert zoo.difference(second.outputs, first.outputs) == 0.0
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".npz", ".onnx"]


@pytest.mark.parametrize("name", sorted(zoo.IMPOSSIBLE))
def test_the_impossible_is_still_impossible(name: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="float16"):
        zoo.build(named(name), tmp_path)
    assert not list(tmp_path.glob("*.onnx"))
