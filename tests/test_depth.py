"""Models of four layers, not all alike: every second one has other heads and another feed-forward width.

Two layers hide what order, ties over layers and accumulation do. Each family and exporter is pruned twice: all kinds of
groups at once, by random cuts, against the masked original; and as the command does it when nothing is said, curves and
repair included. A cache must then give, token by token, what the whole text gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import oracle
import pytest
import zoo
import zoo_decoders
from _pytest.mark import ParameterSet

import liar_opt
from liar_opt.passes.groups import KINDS
from liar_opt.passes.sweep import cut_arrays
from liar_opt.runtime.compare import TOLERANCES

Feeds = dict[str, np.ndarray]
TOLERANCE = TOLERANCES["float32"]
QUICK = {
    *("bert-torchscript-sdpa-dynamic-deep", "vit-torchscript-sdpa-dynamic-deep", "mpnet-torchscript-eager-dynamic-deep"),
    *("deberta-v3-torchscript-eager-dynamic-deep", "bert-dynamo-sdpa-dynamic-deep", "llama-dynamo-cache-deep"),
    *("t5-torchscript-deep", "whisper-torchscript-deep", "mixtral-torchscript-deep"),
    *(f"{name}-torchscript-cache-deep" for name in ("gpt2", "llama", "qwen3", "gemma3", "phi3", "falcon-mqa", "bloom")),
}
"""One of each way to lay heads, caches, ties and gates out."""
ALIKE = {"albert", "bloom", "mpt"}
"""Families whose layers share their weights, or whose configuration has one width and one number of heads."""


def marked(case: zoo.Case | zoo_decoders.Case) -> ParameterSet:
    return pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.rest)


SIZES = ((1, 9), (2, 13), (3, 1))
"""(batch, tokens) of the beginnings behind which a cache is read, for STEPS tokens."""
STEPS = 3


def prune(path: Path) -> liar_opt.PruneResult:
    """Prunes as the command does it when nothing is said but how few samples to draw, and that nothing is timed."""
    return liar_opt.prune(path, samples=12, sequence_length=11, batch_size=6, latency=False, provider="cpu")


def prove(path: Path, batches: Sequence[Feeds], expected: dict[str, int], alike: bool) -> None:
    """Asserts that random cuts of all groups at once equal the masked original, at the sizes of every batch."""
    original = onnx.load(path)
    model, state, found = oracle.analyse(path)
    counts = Counter(g.kind for g in found.groups)
    assert counts == {kind: n for kind, n in expected.items() if kind in KINDS}
    assert (len({(g.kind, g.size, g.block_width) for g in found.groups}) == len(counts)) == alike
    whole = oracle.with_values(found)
    kept = oracle.random_kept(whole.groups, 1)
    reference = oracle.masked(path, whole, kept)
    pruned, ends = oracle.prune_with_ends(model, state, whole, kept)
    masked, dense, cut = oracle.uncut_runner(reference, ends), oracle.uncut_runner(original, ends), oracle.runner(pruned)
    for feeds in batches:
        wanted = masked(feeds)
        assert oracle.difference(cut(cut_arrays(feeds, ends)), wanted) <= TOLERANCE
        assert oracle.difference(dense(feeds), wanted) > 2 * TOLERANCE


class Session:
    """A model in ONNX Runtime, on as many threads as a test worker has."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.own = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.own.get_inputs()}
        self.outputs = [o.name for o in self.own.get_outputs()]

    def __call__(self, feeds: Feeds) -> Feeds:
        return dict(zip(self.outputs, self.own.run(None, feeds), strict=True))


def stepwise_error(proto: onnx.ModelProto, sizes: tuple[tuple[int, int], ...] = SIZES) -> float:
    """Returns how far logits through the cache, token by token, are from those of the whole text, at several sizes."""
    model, worst = Session(proto), 0.0
    for batch, length in sizes:
        ids = np.random.default_rng(length).integers(4, zoo_decoders.VOCABULARY, (batch, length + STEPS))
        empty = {
            n: np.zeros((batch, i.shape[1], 0, i.shape[3]), np.float32)
            for n, i in model.inputs.items()
            if n.startswith("past")
        }
        cache, steps = empty, []
        for start, end in [(0, length), *((length + i, length + i + 1) for i in range(STEPS))]:
            mask = np.ones((batch, end), np.int64)
            outputs = model({"input_ids": ids[:, start:end], "attention_mask": mask, **cache})
            cache = {n: outputs[n.replace("past_key_values", "present")] for n in empty}
            steps.append(outputs["logits"])
        whole = model({"input_ids": ids, "attention_mask": np.ones_like(ids), **empty})["logits"]
        worst = max(worst, oracle.difference([np.concatenate(steps, axis=1)], [whole]))
    return worst


def prove_default(path: Path, batches: Sequence[Feeds]) -> liar_opt.PruneResult:
    """Asserts that what is pruned by default is exact and smaller, and runs at the sizes of every batch."""
    result = prune(path)
    assert result.report["verification"]["exact_difference"] <= TOLERANCE
    assert result.report["after"]["parameters"] < result.report["before"]["parameters"]
    assert {g["kind"] for g in result.report["groups"] if g["after"] < g["before"]} == {"ffn", "heads"}
    caches, run = result.report.get("cache_shapes", {}), oracle.runner(result.model)
    for feeds in batches:
        cut = {n: v[:, : caches[n][1]] if n in caches else v for n, v in feeds.items()}
        assert all(np.isfinite(v).all() for v in run(cut))
    return result


@pytest.mark.parametrize("case", [marked(case) for case in zoo.deep_cases()])
def test_encoders(case: zoo.Case) -> None:
    built = zoo.ready(case)
    assert isinstance(case.expected, dict)
    assert built.other_feeds is not None
    batches = (built.feeds, built.other_feeds)
    prove(built.path, batches, case.expected, case.architecture in ALIKE)
    prove_default(built.path, batches)


@pytest.mark.parametrize("case", [marked(case) for case in zoo_decoders.deep_cases()])
def test_decoders(case: zoo_decoders.Case) -> None:
    built = zoo_decoders.ready(case)
    batches = (built.feeds, built.other_feeds)
    prove(built.path, batches, case.expected, case.architecture in ALIKE)
    result = prove_default(built.path, batches)
    if case.cache:
        assert stepwise_error(result.model) <= TOLERANCE


def test_the_check_of_a_cache_can_fail() -> None:
    """One number of what goes into the third layer's cache is another."""
    proto = onnx.load(zoo_decoders.ready(zoo_decoders.Case("gpt2", "torchscript", cache=True, deep=True)).path)
    assert stepwise_error(proto) <= TOLERANCE
    ends = {o: n for n in proto.graph.node for o in n.output}
    concat = ends["present.2.value"]
    assert concat.op_type == "Concat"
    half = onnx.numpy_helper.from_array(np.asarray(0.5, np.float32), "half")
    proto.graph.initializer.append(half)
    place = list(proto.graph.node).index(concat)
    proto.graph.node.insert(place, onnx.helper.make_node("Mul", [concat.input[0], half.name], ["less"]))
    concat.input[0] = "less"
    assert stepwise_error(proto) > 10 * TOLERANCE
