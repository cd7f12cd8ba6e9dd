"""The oracle over the decoder zoo: language models and encoder-decoders, with and without a cache of keys and values.

Cut without repair each equals its masked original; where the cache lost heads it is compared without them. Generation
through the cut cache gives the tokens of the masked original.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import oracle
import pytest
import zoo_decoders

from liar_opt.frontend.onnx_model import CACHE_SHAPES, OnnxModel
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.find_groups import Found
from liar_opt.passes.groups import VALUES
from liar_opt.passes.sweep import cut_arrays
from liar_opt.runtime.compare import TOLERANCES

CASES = [
    pytest.param(case, id=case.name, marks=() if zoo_decoders.is_quick(case) else pytest.mark.rest)
    for case in zoo_decoders.cases()
]
GENERATED = ("gpt2", "llama", "gemma3", "gpt-neox", "bloom", "qwen3", "falcon-mqa")
TOKENS = 16


def kinds(found: Found) -> dict[str, int]:
    return dict(Counter(group.kind for group in (*found.groups, *found.values)))


def shapes(proto: onnx.ModelProto) -> dict[str, list[int | str]]:
    return {
        v.name: [d.dim_value if d.HasField("dim_value") else d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in [*proto.graph.input, *proto.graph.output]
    }


@pytest.mark.parametrize("case", CASES)
def test_pruned_equals_masked_original(case: zoo_decoders.Case, record_property: Callable[[str, object], None]) -> None:
    built = zoo_decoders.ready(case)
    original = onnx.load(built.path)
    model, state, found = oracle.analyse(built.path)
    refused = sorted({f"{r.reason} ({r.size})" for r in found.refusals if "no rule" in r.reason or "follow" in r.reason})
    record_property("zoo", [case.architecture, case.exporter + (" cache" if case.cache else ""), kinds(found), refused])
    assert {kind: n for kind, n in kinds(found).items() if kind != VALUES} == case.expected
    one_width = case.cache or case.architecture in zoo_decoders.ONE_WIDTH[case.exporter]
    attentions = (1 if zoo_decoders.BY_NAME[case.architecture].reads == "text" else 3) * zoo_decoders.LAYERS
    assert len(found.values) == (0 if one_width else attentions)
    assert {(g.size, g.queries) for g in found.groups if g.kind == "heads"} <= zoo_decoders.BLOCKS
    assert len({g.name for g in found.groups}) == len(found.groups)
    if not (found.groups or found.values):
        return
    worst = cut_and_compare(built, original, (model, state, found), (built.feeds, built.other_feeds))
    if found.values:
        model, state, found = oracle.analyse(built.path)
        worst = max(worst, cut_and_compare(built, original, (model, state, oracle.with_values(found)), (built.feeds,)))
    record_property("difference", worst)


def cut_and_compare(
    built: zoo_decoders.Built,
    original: onnx.ModelProto,
    analysis: tuple[OnnxModel, GraphWalk, Found],
    batches: Sequence[dict[str, np.ndarray]],
) -> float:
    """Cuts and checks the result against the masked original; returns the largest difference."""
    model, state, found = analysis
    kept = oracle.random_kept(found.groups, 1)
    reference = oracle.masked(built.path, found, kept)
    pruned, ends = oracle.prune_with_ends(model, state, found, kept)
    onnx.checker.check_model(pruned, full_check=True)
    before, after = shapes(original), shapes(pruned)
    changed = {
        name: {i for i, (a, b) in enumerate(zip(before[name], after[name], strict=True)) if a != b} for name in before
    }
    assert {name: axes for name, axes in changed.items() if axes} == {name: set(axes) for name, axes in ends.items()}
    assert all(name.startswith(("past", "present")) and set(axes) == {1} for name, axes in ends.items())
    noted = {p.key: json.loads(p.value) for p in pruned.metadata_props if p.key == CACHE_SHAPES}
    assert noted == ({CACHE_SHAPES: {name: after[name] for name in ends}} if ends else {})
    worst = 0.0
    masked, dense, cut = oracle.uncut_runner(reference, ends), oracle.uncut_runner(original, ends), oracle.runner(pruned)
    for feeds in batches if found.groups else ():
        wanted = masked(feeds)
        worst = max(worst, oracle.difference(cut(cut_arrays(feeds, ends)), wanted))
        assert oracle.difference(dense(feeds), wanted) > 2 * TOLERANCES["float32"]
    assert worst <= TOLERANCES["float32"]
    return worst


def generate(proto: onnx.ModelProto, ids: np.ndarray) -> list[int]:
    """Returns greedy tokens, each from a run on one new token and the cache."""
    past = {
        v.name: np.zeros([len(ids), *(d.dim_value for d in v.type.tensor_type.shape.dim[1:])], np.float32)
        for v in proto.graph.input
        if v.name.startswith("past")
    }
    names, run = [o.name for o in proto.graph.output], oracle.runner(proto)
    result: list[int] = []
    seen = 0
    while len(result) < TOKENS:
        seen += ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": np.ones((len(ids), seen), np.int64), **past}
        outputs = dict(zip(names, run(feeds), strict=True))
        result.append(int(outputs["logits"][0, -1].argmax()))
        ids = np.asarray([[result[-1]]])
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    return result


@pytest.mark.parametrize("name", GENERATED)
def test_generation_through_the_cut_cache(name: str) -> None:
    built = zoo_decoders.ready(zoo_decoders.Case(name, "torchscript", True))
    model, state, found = oracle.analyse(built.path)
    kept = oracle.random_kept(found.groups, 5)
    reference = oracle.masked(built.path, found, kept)
    pruned, ends = oracle.prune_with_ends(model, state, found, kept)
    assert bool(ends) == (name != "falcon-mqa")  # all its query heads share one key: its cache stays as it was
    prompt = built.feeds["input_ids"][:1]
    tokens = generate(pruned, prompt)
    assert tokens == generate(reference, prompt)
    assert tokens != generate(onnx.load(built.path), prompt)
