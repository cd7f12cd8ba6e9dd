"""Greedy generation through the cache of a decoder graph, and the oracle on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import oracle

from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.find_groups import Found
from liar_opt.passes.groups import ChannelGroup

STEPS = 16
TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float16): 2e-2}


class Decoder:
    """A decoder graph in ONNX Runtime: token ids in, logits and a cache out, by the names that exporters use."""

    def __init__(self, proto: onnx.ModelProto, capacity: int = 64) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 3
        self.session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in proto.graph.input}
        self.capacity = capacity
        self.outputs = [o.name for o in proto.graph.output]
        past = sorted(n for n in self.inputs if "past" in n and _rank(self.inputs[n]) >= 4)
        present = sorted(n for n in self.outputs if "present" in n)
        assert [_tail(n) for n in past] == [_tail(n) for n in present]
        self.pairs = dict(zip(past, present, strict=True))

    def empty(self, batch: int) -> dict[str, np.ndarray]:
        """Returns a cache with nothing in it; one of a fixed or sliding length is as long as can be, and zero."""
        result = {}
        for name in self.pairs:
            kind = self.inputs[name].type.tensor_type
            shape = []
            for axis, d in enumerate(kind.shape.dim):
                if d.HasField("dim_value"):
                    shape.append(d.dim_value)
                elif axis == len(kind.shape.dim) - 4:
                    shape.append(batch)
                elif axis == len(kind.shape.dim) - 1:
                    shape.append(self.width)
                else:
                    shape.append(self.capacity if "sliding" in d.dim_param else 0)
            result[name] = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
        return result

    width = 16

    def step(self, ids: np.ndarray, seen: int, cache: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Runs ``ids`` [b, s] behind ``seen`` tokens and returns the logits and the new cache."""
        batch, length = ids.shape
        total = seen + length
        feeds = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": np.tile(np.arange(seen, total, dtype=np.int64), (batch, 1)),
            "cache_position": np.arange(seen, total, dtype=np.int64),
            "seqlens_k": np.full(batch, total - 1, np.int32),
            "total_sequence_length": np.asarray(total, np.int32),
            **cache,
        }
        dtypes = {n: onnx.helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for n, i in self.inputs.items()}
        values = self.session.run(None, {n: feeds[n].astype(dtypes[n]) for n in self.inputs})
        named = dict(zip(self.outputs, values, strict=True))
        return named[self.outputs[0]], {past: named[present] for past, present in self.pairs.items()}

    def generate(self, prompt: np.ndarray, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids [b, steps] that greedy generation adds to ``prompt`` and the logits of every step."""
        ids, seen, cache, made, logits = prompt, 0, self.empty(len(prompt)), [], []
        for _ in range(steps):
            values, cache = self.step(ids, seen, cache)
            seen += ids.shape[1]
            logits.append(values[:, -1].astype(np.float64))
            ids = values[:, -1].argmax(-1)[:, None]
            made.append(ids)
        return np.concatenate(made, 1), np.stack(logits, 1)


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _tail(name: str) -> str:
    return ".".join(name.split(".")[1:]) if "." in name else name.split("_", 1)[1]


def prove_generation(
    proto: onnx.ModelProto, pruned: onnx.ModelProto, reference: onnx.ModelProto, prompt: np.ndarray, tolerance: float
) -> float:
    """Asserts that the pruned graph generates what the masked original does, step by step through its cache.

    Returns:
        The largest difference of the logits, relative to their magnitude.
    """
    ids, logits = Decoder(pruned).generate(prompt)
    wanted, wanted_logits = Decoder(reference).generate(prompt)
    assert np.array_equal(ids, wanted)
    scale = float(np.abs(wanted_logits).max())
    worst = float(np.abs(logits - wanted_logits).max()) / scale
    assert worst <= tolerance
    dense = Decoder(proto).generate(prompt)[1]
    assert float(np.abs(dense[:, 0] - wanted_logits[:, 0]).max()) / scale > 10 * tolerance  # the cut does something
    return worst


def prove_decoder(path: Path, prompt: np.ndarray, seeds: int = 2, tolerance: float = 1e-4) -> tuple[Found, float]:
    """Random cuts of a decoder graph: caches shrink to the heads that are left, and generation is the masked original's."""
    proto = onnx.load(path)
    worst = 0.0
    for seed in range(seeds):
        model, state, found = oracle.analyse(path)
        assert found.groups
        kept = oracle.random_kept(found.groups, seed)
        reference = oracle.masked(path, found, kept)
        pruned, ends = oracle.prune_with_ends(model, state, found, kept)
        _check_cache_shapes(proto, pruned, state, found.groups, kept)
        assert bool(ends) == any(g.kind == "heads" for g in found.groups)
        worst = max(worst, prove_generation(proto, pruned, reference, prompt, tolerance))
    return found, worst


def _check_cache_shapes(
    proto: onnx.ModelProto,
    pruned: onnx.ModelProto,
    state: GraphWalk,
    groups: tuple[ChannelGroup, ...],
    kept: oracle.Kept,
) -> None:
    wanted = {}
    for cache in state.caches.values():
        for name in (cache.past, cache.present):
            for axis, factor in enumerate(state.axes[name] or ()):
                for group in (g for g in groups if state.algebra.same(factor, g.factor)):
                    wanted[name, axis] = len(kept[group.name + group.kind])
    for before, after in zip(
        [*proto.graph.input, *proto.graph.output], [*pruned.graph.input, *pruned.graph.output], strict=True
    ):
        assert before.name == after.name
        shapes = [[d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in (before, after)]
        changes = {i: b for i, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b}
        sizes = {axis: n for (name, axis), n in wanted.items() if name == before.name}
        assert changes == {axis: n for axis, n in sizes.items() if n != shapes[0][axis]}
