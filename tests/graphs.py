"""Small graphs written as ONNX text, with seeded weights, and the oracle on them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import oracle

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.walk import GraphWalk, walk
from liar_opt.passes.find_groups import Found, find_groups
from liar_opt.passes.sweep import cut_arrays

NEWEST_OPSET = 23
Weights = Mapping[str, tuple[int, ...] | np.ndarray | np.generic]


def parse(text: str, weights: Weights | None = None, opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """Returns the model of a graph in ONNX text; a weight is an array, or a shape to draw normal float32 numbers in."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1, "test" : 1]>\n{text}'
    )
    rng = np.random.default_rng(seed)
    for name, value in (weights or {}).items():
        array = (
            np.asarray(value)
            if isinstance(value, np.ndarray | np.generic)
            else rng.standard_normal(value).astype(np.float32)
        )
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def analyse(proto: onnx.ModelProto) -> tuple[OnnxModel, GraphWalk, Found]:
    """Normalises and analyses a copy of a model."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    model = OnnxModel.from_proto(copy)
    model.normalise()
    state = walk(model)
    return model, state, find_groups(state)


def sizes(proto: onnx.ModelProto) -> list[tuple[str, int]]:
    """Returns (kind, size) of the groups found, sorted."""
    return sorted((g.kind, g.size) for g in analyse(proto)[2].groups)


def reasons(proto: onnx.ModelProto) -> str:
    """Returns the reasons of all refusals, one a line."""
    return "\n".join(r.reason for r in analyse(proto)[2].refusals)


def feeds_of(proto: onnx.ModelProto, symbols: Mapping[str, int] | None = None, seed: int = 1) -> dict[str, np.ndarray]:
    """Draws the inputs of a model; symbolic dimensions get the sizes of ``symbols``."""
    rng = np.random.default_rng(seed)
    result = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else (symbols or {})[d.dim_param] for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        drawn = rng.standard_normal(shape) if np.issubdtype(dtype, np.floating) else rng.integers(0, 2, shape)
        result[value.name] = drawn.astype(dtype)
    return result


def cut(proto: onnx.ModelProto, kept: oracle.Kept) -> onnx.ModelProto:
    """Cuts without repair."""
    return oracle.prune(*analyse(proto), kept)


def with_functions(proto: onnx.ModelProto, functions: Sequence[onnx.FunctionProto]) -> onnx.ModelProto:
    """Returns a model with nodes that are calls of ``functions`` written out, in an opset of ONNX Runtime."""
    if not functions:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.functions.extend(functions)
    written = onnx.inliner.inline_local_functions(copy)
    for opset in written.opset_import:
        opset.version = min(opset.version, NEWEST_OPSET)
    return written


def prove(
    proto: onnx.ModelProto,
    symbols: Mapping[str, int] | None = None,
    seeds: int = 4,
    values: bool = False,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """Asserts that random cuts equal the masked original, which differs from the dense one; returns the last result.

    With ``values`` the widths of values are cut as well. ``functions`` say what operators compute that ONNX Runtime has no
    kernel for on the CPU.
    """
    assert seeds > 0
    for seed in range(seeds):
        model, state, found = analyse(proto)
        found = oracle.with_values(found) if values else found
        assert found.groups
        kept = oracle.random_kept(found.groups, seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(proto, path)
            reference = oracle.masked(path, found, kept)
        pruned, ends = oracle.prune_with_ends(model, state, found, kept)
        feeds = feeds_of(proto, symbols, seed)
        wanted, dense = (oracle.uncut_runner(with_functions(p, functions), ends)(feeds) for p in (reference, proto))
        found_now = oracle.run(with_functions(pruned, functions), cut_arrays(feeds, ends))
        assert oracle.difference(found_now, wanted) <= 1e-5
        assert oracle.difference(dense, wanted) > 1e-3
        assert [v.name for v in pruned.graph.output] == [v.name for v in proto.graph.output]
    return pruned
