"""The oracle of every rule: a graph pruned with repair off equals the original with the removed inputs zeroed.

The reference is made without any of the code that prunes: the original file, loaded by onnx alone, with a Mul by a 0/1
vector in front of every consumer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.frontend.walk import GraphWalk, walk
from liar_opt.passes import judge
from liar_opt.passes.find_groups import Found, find_groups
from liar_opt.passes.groups import ChannelGroup, Consumer, kept_positions
from liar_opt.passes.sweep import cut_arrays
from liar_opt.passes.verify_model import first_difference

Kept = dict[str, list[int]]
Ends = dict[str, dict[int, np.ndarray]]


def analyse(path: Path) -> tuple[OnnxModel, GraphWalk, Found]:
    """Loads, normalises and analyses a model."""
    model = OnnxModel.load(path)
    model.normalise()
    state = walk(model)
    return model, state, find_groups(state)


def random_kept(groups: tuple[ChannelGroup, ...], seed: int) -> Kept:
    """Draws a kept set for every group: between one block and all but one, of every index set as many."""
    rng = np.random.default_rng(seed)
    result = {}
    for g in groups:
        count = rng.integers(1, g.size)
        drawn = [i * g.size + rng.permutation(g.size)[:count] for i in range(g.sets)]
        result[g.name + g.kind] = sorted(np.concatenate(drawn).tolist())
    return result


def with_values(found: Found) -> Found:
    """Returns the groups with those that are cut when asked for alone."""
    return dataclasses.replace(found, groups=(*found.groups, *found.values))


def prune(model: OnnxModel, state: GraphWalk, found: Found, kept: Kept) -> onnx.ModelProto:
    """Cuts the graph without any repair."""
    return prune_with_ends(model, state, found, kept)[0]


def prune_with_ends(model: OnnxModel, state: GraphWalk, found: Found, kept: Kept) -> tuple[onnx.ModelProto, Ends]:
    """Cuts the graph without any repair; returns too what is left of inputs and outputs that shrank."""
    rewriter = Rewriter(state)
    for group in found.groups:
        rewriter.cut(group.cut(kept[group.name + group.kind]))
    model.graph.cleanup(remove_unused_node_outputs=False).toposort()
    return model.to_proto(), rewriter.ends()


def masked(path: Path, found: Found, kept: Kept) -> onnx.ModelProto:
    """Returns the original with the removed indices of every consumer's input multiplied by zero."""
    proto = onnx.load(path)
    nodes = {n.name or f"{n.op_type}_{i}": n for i, n in enumerate(proto.graph.node)}
    outputs = {o: n for n in proto.graph.node for o in n.output}
    for k, group in enumerate(found.groups):
        for k_expert, consumer in enumerate(c for c in group.consumers if c.expert in (None, 0)):
            if consumer.expert is not None:
                _mask_experts(proto, group, consumer, kept[group.name + group.kind], f"mask_{k}_{k_expert}")
                continue
            keep = np.zeros(consumer.width, np.float32)
            keep[kept_positions(consumer.owners, kept[group.name + group.kind])] = 1
            for j, use in enumerate(consumer.uses):
                node = nodes[use.node.name] if use.node.name in nodes else outputs[use.node.outputs[0].name]
                if use.activation in use.node.outputs:  # what an operator made one step before: zero columns of its weight
                    tensor = next(t for t in proto.graph.initializer if t.name == node.input[use.weight_position])
                    value = onnx.numpy_helper.to_array(tensor) * keep.astype(use.weight.dtype)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
                    continue
                position = list(use.node.inputs).index(use.activation)
                dtype = use.weight.dtype
                vector = None
                if node.op_type == "Einsum" and use.node.op == "MatMul":  # several axes are summed over
                    position, vector = _mask_over_axes(proto, node, keep.astype(dtype))
                rank = len(use.activation.shape or ()) or None
                tail = 0 if use.activation_axis in (-1,) or rank is None else rank - 1 - use.activation_axis
                if use.weight_position == 0 or use.node.attrs.get("transA", 0):
                    tail = 1
                if use.window is not None:  # every place under the kernel has the channels
                    keep = keep[: use.weight.shape[1]]
                if use.node.op in ("Conv", "ConvTranspose", "FusedConv"):
                    tail = len(use.weight.shape) - 2
                name = f"mask_{k}_{j}_{use.node.name}"
                if vector is None:
                    vector = keep.astype(dtype).reshape(-1, *([1] * tail))
                proto.graph.initializer.append(onnx.numpy_helper.from_array(vector, name))
                masked_name = f"{name}_applied"
                index = next(i for i, n in enumerate(proto.graph.node) if n is node or n == node)
                proto.graph.node.insert(
                    index, onnx.helper.make_node("Mul", [node.input[position], name], [masked_name], name=name)
                )
                target = next(n for n in proto.graph.node if n.output and list(n.output) == list(node.output))
                target.input[position] = masked_name
                nodes[use.node.name] = target
    return proto


def _mask_over_axes(proto: onnx.ModelProto, node: onnx.NodeProto, keep: np.ndarray) -> tuple[int, np.ndarray]:
    """Returns the input of an Einsum that is no weight, and a mask that it is multiplied by."""
    shapes = {i.name: list(i.dims) for i in proto.graph.initializer}
    weight = next(i for i, name in enumerate(node.input) if name in shapes)
    terms = str(onnx.helper.get_node_attr_value(node, "equation").decode()).split("->")[0].split(",")
    summed = [c for c in terms[weight] if c in terms[1 - weight]]
    sizes = dict(zip(terms[weight], shapes[node.input[weight]], strict=True))
    ordered = sorted(summed, key=terms[1 - weight].index)
    mask = keep.reshape([sizes[c] for c in summed]).transpose([summed.index(c) for c in ordered])
    return 1 - weight, mask.reshape([sizes[c] if c in summed else 1 for c in terms[1 - weight]])


def _mask_experts(proto: onnx.ModelProto, group: ChannelGroup, consumer: Consumer, blocks: list[int], name: str) -> None:
    """Multiplies each row by the zeros and ones of its expert, looked up by the numbers that look its weight up."""
    (use,) = consumer.uses
    keep = np.zeros(group.sets * group.size, np.float32)
    keep[blocks] = 1
    shape = [group.sets, *(group.size if i == use.activation_axis else 1 for i in (1, 2))]
    table, flat = onnx.numpy_helper.from_array(keep.reshape(shape), name), f"{name}_numbers"
    proto.graph.initializer.extend([table, onnx.numpy_helper.from_array(np.asarray([-1]), f"{name}_flat")])
    index = next(i for i, n in enumerate(proto.graph.node) if use.node.outputs[0].name in n.output)
    node = proto.graph.node[index]
    position = list(node.input).index(use.activation.name)
    made = [
        onnx.helper.make_node("Reshape", [use.lookup.numbers.name, f"{name}_flat"], [flat]),
        onnx.helper.make_node("Gather", [name, flat], [f"{name}_own"], axis=0),
        onnx.helper.make_node("Mul", [node.input[position], f"{name}_own"], [f"{name}_applied"]),
    ]
    node.input[position] = f"{name}_applied"
    for i, new in enumerate(made):
        proto.graph.node.insert(index + i, new)


Feeds = dict[str, np.ndarray]


def runner(proto: onnx.ModelProto) -> Callable[[Feeds], list[np.ndarray]]:
    """Loads a model in ONNX Runtime on the CPU, without graph optimisations that would change rounding."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    return lambda feeds: list(session.run(None, {k: v for k, v in feeds.items() if k in wanted}))


def run(proto: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    """Runs a model once; see `runner`."""
    return runner(proto)(feeds)


def uncut_runner(proto: onnx.ModelProto, ends: Ends) -> Callable[[Feeds], list[np.ndarray]]:
    """Loads a model that was not cut; its outputs lose what the cut one's lost."""
    names, run_once = [o.name for o in proto.graph.output], runner(proto)
    return lambda feeds: list(cut_arrays(dict(zip(names, run_once(feeds), strict=True)), ends).values())


def difference(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Returns the largest difference over the outputs, relative to the largest magnitude of each."""
    assert len(a) == len(b)
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and np.isfinite(y).all() and np.isfinite(x).all()
        scale = float(np.abs(y.astype(np.float64)).max()) or 1.0
        worst = max(worst, float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max()) / scale)
    return worst


def relative_square(model: onnx.ModelProto, original: Path, batches: Sequence[Feeds]) -> float:
    """Returns |y - y'|^2 / |y|^2 of the first output over the real tokens of all batches."""
    lost, power, runs = 0.0, 0.0, [runner(proto) for proto in (model, onnx.load(original))]
    for feeds in batches:
        ours, theirs = (run_(feeds)[0] for run_ in runs)
        real = feeds["attention_mask"].astype(bool)
        lost += float(np.square(ours[real] - theirs[real]).sum())
        power += float(np.square(theirs[real]).sum())
    return lost / power


def judged(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns a list that gets the data on which each of several whole runs is judged."""
    seen: list[Any] = []

    def noted(*arguments: Any) -> Any:
        seen.append(arguments[2])
        return first_difference(*arguments)

    monkeypatch.setattr(judge, "first_difference", noted)
    return seen
