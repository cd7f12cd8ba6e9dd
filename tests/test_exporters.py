"""The oracle over the zoo: every architecture from every exporter, cut without repair, equals its masked original.

The table in the terminal summary of `pytest tests/test_exporters.py` counts the groups found by kind and names what is
refused.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
import zoo
from onnx import numpy_helper

from liar_opt import prune
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.walk import walk
from liar_opt.passes.find_groups import Found, find_groups
from liar_opt.passes.groups import KINDS, VALUES
from liar_opt.runtime.compare import TOLERANCES

QUICK = zoo.quick_cases()
CASES = [
    pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.rest) for case in zoo.cases(fast=False)
]
SEEDS = (0, 1)


def kinds(found: Found) -> dict[str, int]:
    return dict(Counter(group.kind for group in found.groups))


def interface(proto: onnx.ModelProto) -> list[tuple[str, int, list[str | int]]]:
    return [
        (v.name, v.type.tensor_type.elem_type, [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
        for v in [*proto.graph.input, *proto.graph.output]
    ]


def checker_accepts(proto: onnx.ModelProto) -> bool:
    """ONNX Runtime's optimizer writes operators of later opsets: such graphs are refused before anything is cut."""
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError:
        return False
    return True


def reanalyse(proto: onnx.ModelProto) -> Found:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    model = OnnxModel.from_proto(copy)
    model.normalise()
    return find_groups(walk(model))


@pytest.mark.parametrize("case", CASES)
def test_pruned_equals_masked_original(case: zoo.Case, record_property: Callable[[str, object], None]) -> None:
    built = zoo.ready(case)
    original = onnx.load(built.path)
    assert not isinstance(case.expected, str)
    batches = [feeds for feeds in (built.feeds, built.other_feeds) if feeds is not None]
    dense = oracle.runner(original)
    worst = 0.0
    for seed in SEEDS:
        model, state, found = oracle.analyse(built.path)
        if seed == 0:
            refused = sorted(
                {f"{r.reason} ({r.size})" for r in found.refusals if "no rule" in r.reason or "follow" in r.reason}
            )
            shown = kinds(found) | ({VALUES: len(found.values)} if found.values else {})
            record_property("zoo", [case.architecture, case.exporter, shown, refused])
        assert kinds(found) == {k: n for k, n in case.expected.items() if k in KINDS}
        assert {g.kind for g in found.values} <= {VALUES}
        assert any("pooler" in r.reason for r in found.refusals) == ("pooler" in case.expected)
        assert len({g.name for g in found.groups}) == len(found.groups)
        before = {node.name for node in model.graph.nodes}
        kept = oracle.random_kept(found.groups, seed)
        reference = oracle.masked(built.path, found, kept)
        pruned = oracle.prune(model, state, found, kept)
        if checker_accepts(original):
            onnx.checker.check_model(pruned)
        assert interface(pruned) == interface(original)
        assert {node.name for node in pruned.graph.node if not node.name.split("_liar_opt_")[-1].isdigit()} <= before
        masked, cut = oracle.runner(reference), oracle.runner(pruned)
        for feeds in batches:
            wanted = masked(feeds)
            difference = oracle.difference(cut(feeds), wanted)
            assert difference <= TOLERANCES[case.dtype]
            assert oracle.difference(dense(feeds), wanted) > 2 * TOLERANCES[case.dtype]
            worst = max(worst, difference)
        again = {g.name: g.size for g in reanalyse(pruned).groups}
        left = {g.name: len(kept[g.name + g.kind]) for g in found.groups}
        assert again == {name: size for name, size in left.items() if size > 1}
        if seed == 0 and found.values:
            model, state, found = oracle.analyse(built.path)
            found = oracle.with_values(found)
            kept = oracle.random_kept(found.groups, 2)
            reference = oracle.masked(built.path, found, kept)
            pruned = oracle.prune(model, state, found, kept)
            masked, cut = oracle.runner(reference), oracle.runner(pruned)
            for feeds in batches:
                difference = oracle.difference(cut(feeds), masked(feeds))
                assert difference <= TOLERANCES[case.dtype]
                worst = max(worst, difference)
    record_property("difference", worst)


def test_a_perturbed_weight_fails_the_oracle() -> None:
    built = zoo.ready(next(case for case in zoo.cases(fast=True) if case.name == "bert-torchscript-eager-dynamic"))
    model, state, found = oracle.analyse(built.path)
    kept = oracle.random_kept(found.groups, 0)
    reference = oracle.run(oracle.masked(built.path, found, kept), built.feeds)
    pruned = oracle.prune(model, state, found, kept)
    names = {u.weight.name for g in found.groups for c in g.consumers for u in c.uses}
    (weight, *_) = (i for i in pruned.graph.initializer if i.name in names)
    value = numpy_helper.to_array(weight).copy()
    value[0, 0] += 0.1
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    assert oracle.difference(oracle.run(pruned, built.feeds), reference) > TOLERANCES["float32"]


def test_another_kept_set_fails_the_oracle() -> None:
    built = zoo.ready(next(case for case in zoo.cases(fast=True) if case.name == "bert-torchscript-eager-dynamic"))
    model, state, found = oracle.analyse(built.path)
    kept = oracle.random_kept(found.groups, 0)
    shifted = {
        name: sorted((i + 1) % next(g.size for g in found.groups if g.name + g.kind == name) for i in indices)
        for name, indices in kept.items()
    }
    reference = oracle.run(oracle.masked(built.path, found, shifted), built.feeds)
    pruned = oracle.prune(model, state, found, kept)
    assert oracle.difference(oracle.run(pruned, built.feeds), reference) > TOLERANCES["float32"]


def test_permuting_the_channels_first_gives_the_same_function(tmp_path: Path) -> None:
    """The kept set follows the channels wherever they stand."""
    case = next(case for case in zoo.cases(fast=True) if case.name == "bert-torchscript-eager-dynamic")
    built = zoo.ready(case)
    proto = onnx.load(built.path)
    rng = np.random.default_rng(3)
    order = rng.permutation(zoo.FFN)
    _, state, found = oracle.analyse(built.path)
    group = next(g for g in found.groups if g.kind == "ffn")
    uses = {u.constant.name: u for u in state.constant_uses if any(group.factor in state.algebra.leaves(f) for f in u.axes)}
    moved = [i for i in proto.graph.initializer if i.name in uses]
    if {i.name for i in moved} != set(uses):
        model = OnnxModel.load(built.path)  # weights under a Transpose are folded under new names
        model.normalise()
        proto = model.to_proto()
        moved = [i for i in proto.graph.initializer if i.name in uses]
    assert len(moved) == 3
    for tensor in moved:
        value = numpy_helper.to_array(tensor)
        axis = next(i for i, size in enumerate(value.shape) if size == zoo.FFN)
        tensor.CopyFrom(numpy_helper.from_array(np.take(value, order, axis), tensor.name))
    path = tmp_path / "permuted.onnx"
    onnx.save(proto, path)
    kept = {g.name + g.kind: list(range(g.size)) for g in found.groups}
    kept[group.name + group.kind] = list(range(0, zoo.FFN, 3))
    places = np.argsort(order)[kept[group.name + group.kind]]
    permuted = {**kept, group.name + group.kind: sorted(places.tolist())}
    first, second = oracle.analyse(built.path), oracle.analyse(path)
    a = oracle.run(oracle.prune(*first, kept), built.feeds)
    b = oracle.run(oracle.prune(*second, permuted), built.feeds)
    assert oracle.difference(a, b) <= TOLERANCES["float32"]


@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_xlnet_with_its_einsums_and_shifted_positions(dynamo: bool, tmp_path: Path) -> None:
    import torch
    from transformers import XLNetConfig, XLNetModel

    torch.manual_seed(0)
    model: torch.nn.Module = XLNetModel(XLNetConfig(vocab_size=60, d_model=24, n_layer=2, n_head=6, d_inner=40)).eval()
    path = tmp_path / "model.onnx"
    options: dict[str, Any] = {"input_names": ["input_ids"], "output_names": ["y"], "dynamo": dynamo, "verbose": False}
    options |= {} if dynamo else {"dynamic_axes": {"input_ids": {0: "batch", 1: "sequence"}}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randint(0, 60, (2, 9)),), str(path), **options)
    rng = np.random.default_rng(0)
    feeds = [{"input_ids": rng.integers(0, 60, (2, 9))} for _ in range(4)]
    report = prune(path, feeds, ffn=0.5, heads=0.5, repair="none", latency=False).report
    assert [(g["kind"], g["before"], g["after"]) for g in report["groups"]] == 2 * [("heads", 6, 3), ("ffn", 40, 24)]
    assert report["verification"]["exact_difference"] < 1e-5
    assert report["verification"]["outputs"]["y"]["relative_rms"] > 1e-3


def test_cases_are_compared_by_what_they_export() -> None:
    assert len({dataclasses.astuple(c)[:-1] for c in zoo.cases(fast=False)}) == len(CASES)
