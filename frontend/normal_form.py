"""A graph in the form that the analysis expects: constants as initializers, exporters' habits brought to one form."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.fold_weights import fold_weights
from liar_opt.frontend.graph_tensors import (
    NARROW,
    SKELETON_LIMIT,
    STANDARD,
    Gridded,
    Narrow,
    constant_value,
    is_constant,
    like,
    present,
)
from liar_opt.frontend.merged_decoder import side_by_side
from liar_opt.frontend.rules.numbers import tensor_attribute
from liar_opt.frontend.rules.operators import MOVERS, has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.shape_values import MOST_ELEMENTS, evaluate, result_elements
from liar_opt.runtime.errors import ModelError

if TYPE_CHECKING:
    from liar_opt.frontend.onnx_model import OnnxModel

CARRIED = MOVERS | Trait.LOOKS_UP | Trait.SLICES | Trait.SPLITS
"""Operators whose results hold values of their first input."""
FUSION_NAME = re.compile(r"_token_\d+$|^gemm_(input|output)_shape$")


def normalise(model: OnnxModel) -> int:
    """Brings the graph to the form that the analysis expects; returns the number of nodes removed.

    Constant nodes become initializers, Identity and no-op Dropout and Cast go, what depends on constants alone is
    folded (so that a weight under a Transpose is stored transposed; see ``fold_weights`` for those that are computed),
    an Einsum of a weight with several axes on a side becomes a MatMul between Reshapes, what is repeated for several
    readers (a mask by heads, for all layers) is repeated for each, initial states of zeros go, nodes and
    tensors get unique names, dead nodes go. Sharing is kept: the same fold of the same constant gives one constant.
    """
    graph = model.graph
    before = len(graph.nodes)
    names = _unique_names(graph)
    for constant in model.constants():
        # ONNX Runtime 1.31 gives what its fusions add such names, and fails on a saved graph that has them already.
        if FUSION_NAME.search(constant.name):
            constant.values = np.array(constant.values)  # the file's own tensor must keep its name
            constant.name = f"{constant.name}_"
    folded: dict[tuple[object, ...], list[gs.Constant]] = {}
    flat: dict[tuple[object, ...], tuple[gs.Constant, gs.Constant]] = {}
    outputs = {id(t) for t in graph.outputs}

    def narrowed(node: gs.Node, name: str, values: np.ndarray, kind: np.dtype[Any]) -> gs.Constant:
        return Narrow(name, values, np.dtype(kind), f"{name}/{np.dtype(kind).name}", node.name, model.settled)

    for node in graph.nodes:
        if node.op == "Constant" and node.domain in STANDARD and len(node.outputs) == 1:
            value = constant_value(node)
            if value is not None and id(node.outputs[0]) not in outputs:
                _replace(node.outputs[0], gs.Constant(node.outputs[0].name, value))
                node.outputs.clear()
    model.computed, untouched = fold_weights(graph, _shares_table, narrowed, model.settled)
    for node in list(graph.nodes):
        if node.op == "Constant":
            continue
        if _is_identity(node) and id(node.outputs[0]) not in outputs:
            _replace(node.outputs[0], node.inputs[0])
            node.outputs.clear()
            node.inputs.clear()
            continue
        if node.op == "Einsum" and node.domain in STANDARD:
            graph.nodes.extend(_as_product(node, flat, names, model.settled))
        if id(node) not in untouched:
            _fold(node, folded, outputs, names, model.settled)
    _drop_zero_states(graph)
    graph.cleanup(remove_unused_node_outputs=False)
    if model.merged is None:
        graph.toposort()
        _part_repeats(graph, names)
    else:
        graph.nodes = side_by_side(graph.nodes, model.merged.nodes_of_first(graph.nodes))
    return before - len(graph.nodes)


def _is_identity(node: gs.Node) -> bool:
    if node.domain not in STANDARD or not node.outputs:
        return False
    if node.op == "Identity" or (node.op == "Concat" and len(node.inputs) == 1):
        return True
    if node.op == "Dropout":
        mask_used = len(node.outputs) > 1 and present(node.outputs[1]) and bool(node.outputs[1].outputs)
        training = node.inputs[2] if len(node.inputs) > 2 else None
        off = training is None or not present(training) or (is_constant(training) and not bool(np.any(training.values)))
        return off and not mask_used
    return False


def _replace(old: gs.Tensor, new: gs.Tensor) -> None:
    for consumer in list(old.outputs):
        for position, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[position] = new


def _is_looked_up(tensor: gs.Tensor) -> bool:
    """Returns whether rows of a tensor are looked up."""
    return any(n.op == "Gather" and n.inputs[0] is tensor and not is_constant(n.inputs[1]) for n in tensor.outputs)


def _shares_table(node: gs.Node) -> bool:
    """Returns whether a node makes, of embeddings, the weight of the head, or the other way round."""
    large = [t for t in node.inputs if is_constant(t) and sum(int(n) > 1 for n in t.shape) > 1]
    made = any(_is_looked_up(t) for t in node.outputs)
    return any(_is_looked_up(t) or (made and len(t.outputs) > 1) for t in large)


def _fold(
    node: gs.Node,
    folded: dict[tuple[object, ...], list[gs.Constant]],
    outputs: set[int],
    names: Iterator[str],
    keep: Callable[[np.ndarray], np.ndarray],
) -> None:
    if node.domain not in STANDARD or not node.inputs or not node.outputs:
        return
    if not all(is_constant(t) or not present(t) for t in node.inputs):
        return
    if any(id(t) in outputs for t in node.outputs) or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
        return
    if _shares_table(node) or _shares_narrow(node):
        return  # folded, the table would be stored twice
    attributes = tuple(sorted((k, repr(v)) for k, v in node.attrs.items() if not hasattr(v, "values")))
    key: tuple[object, ...] = (node.op, attributes, tuple(id(t) for t in node.inputs))
    if any(hasattr(v, "values") for v in node.attrs.values()):
        key = (*key, node.name)
    results = folded.get(key)
    if results is None:
        inputs = [t.values if is_constant(t) else None for t in node.inputs]
        if node.op == "Shape" and not node.attrs:
            values: list[np.ndarray] | None = [np.asarray(node.inputs[0].shape, np.int64)]
        else:
            made = result_elements(node.op, inputs, node.attrs)
            if made > MOST_ELEMENTS:
                raise ModelError(
                    f"node '{node.name}' ({node.op}) makes a constant of {made:,} elements, more than a machine holds; "
                    "export the model again"
                )
            values = evaluate(node.op, inputs, node.attrs)
        if values is None or len(values) < len(node.outputs):
            return
        # The constants stay alive through the key's owner list, so that ids are not reused.
        results = [
            _result(node, t.name or next(names), keep(np.ascontiguousarray(v).reshape(v.shape)), keep)
            for t, v in zip(node.outputs, values, strict=False)
        ]
        folded[key] = results
        folded[("alive", *key)] = [t for t in node.inputs if is_constant(t)]
    for old, new in zip(node.outputs, results, strict=True):
        _replace(old, new)
    node.outputs.clear()
    node.inputs.clear()


def _result(node: gs.Node, name: str, value: np.ndarray, keep: Callable[[np.ndarray], np.ndarray]) -> gs.Constant:
    """Returns what a node gives, folded; a weight that it widens, or moves after that, is still stored as it was."""
    old = node.inputs[0]
    if node.op == "Cast" and old.dtype in NARROW and value.dtype in (np.float32, np.float64):
        return Narrow(name, value, np.dtype(old.dtype), old.name, node.name, keep)
    if isinstance(old, Gridded):  # where the whole numbers would be moved in a way that cannot be told, they are given up
        turned = node.op == "Transpose" and value.ndim == len(old.axes)
        perm = node.attrs.get("perm", range(value.ndim)[::-1])
        return old.transposed(name, value, perm) if turned else gs.Constant(name, value)
    carried = has(node, CARRIED)
    return like(old, name, value) if carried else gs.Constant(name, value)


def _shares_narrow(node: gs.Node) -> bool:
    """Returns whether a node widens a large weight that others read as it is."""
    old = node.inputs[0]
    large = node.op == "Cast" and old.dtype in NARROW and int(np.prod(old.shape, dtype=np.int64)) > SKELETON_LIMIT
    return large and any(not has(reader, MOVERS) for reader in old.outputs)


def _as_product(
    node: gs.Node,
    flat: dict[tuple[object, ...], tuple[gs.Constant, gs.Constant]],
    names: Iterator[str],
    keep: Callable[[np.ndarray], np.ndarray],
) -> list[gs.Node]:
    """Turns an Einsum of a weight that has several axes on a side into a MatMul; returns the nodes around it.

    The axes that are summed over are joined, and so are those that come out: "bsd,dhk->bshk" is a product with
    [d, h * k] whose result is split, "bshk,hkd->bsd" one with [h * k, d] whose input is joined. What has one axis on
    each side, or an axis in weight, input and result, stays.
    """
    equation = str(node.attrs["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    weight = next((i for i, t in enumerate(node.inputs) if is_constant(t)), None)
    if not arrow or "." in equation or len(terms) != 2 or weight is None:
        return []
    w, x = terms[weight], terms[1 - weight]
    rows = [c for c in x if c not in w]
    summed, columns = [c for c in w if c in x], [c for c in w if c not in x]
    plain = all(len(set(t)) == len(t) for t in (w, x, right)) and set(right) == {*rows, *columns}
    constant = node.inputs[weight]
    if not plain or not summed or not columns or len(summed) == len(columns) == 1 or len(constant.shape) != len(w):
        return []
    sizes = dict(zip(w, constant.shape, strict=True))
    order = [w.index(c) for c in [*summed, *columns]]
    key = (id(constant), *order, len(summed))
    if key not in flat:
        matrix = constant.values.transpose(order).reshape(-1, int(np.prod([sizes[c] for c in columns], dtype=np.int64)))
        # The weight itself is held, too, so that its id is not another's.
        flat[key] = (like(constant, f"{constant.name}_{next(names)}", keep(np.ascontiguousarray(matrix))), constant)
    nodes: list[gs.Node] = []

    def then(op: str, tensor: gs.Tensor, *inputs: gs.Tensor, **attributes: Any) -> gs.Tensor:
        result = gs.Variable(next(names), dtype=tensor.dtype)
        nodes.append(gs.Node(op, f"{node.name}/{op}_{len(nodes)}", attributes, [tensor, *inputs], [result]))
        return result

    def shape(*dims: int) -> gs.Constant:
        return gs.Constant(next(names), np.asarray([*[0] * len(rows), *dims], np.int64))

    tensor, result = node.inputs[1 - weight], node.outputs[0]
    turn = [x.index(c) for c in [*rows, *summed]]
    if turn != sorted(turn):
        tensor = then("Transpose", tensor, perm=turn)
    if len(summed) > 1:
        tensor = then("Reshape", tensor, shape(-1))
    node.op, node.attrs, node.inputs = "MatMul", {}, [tensor, flat[key][0]]
    back = [[*rows, *columns].index(c) for c in right]
    if len(columns) > 1 or back != sorted(back):
        inner = gs.Variable(next(names), dtype=result.dtype)
        node.outputs = [inner]
        if len(columns) > 1:
            inner = then("Reshape", inner, shape(*(sizes[c] for c in columns)))
        if back != sorted(back):
            inner = then("Transpose", inner, perm=back)
        nodes[-1].outputs = [result]
    return nodes


def _part_repeats(graph: gs.Graph, names: Iterator[str]) -> None:
    """Gives each reader of what is repeated, by Expand to sizes that are written, a repetition of its own, just before it.

    One for all layers would make them keep the same heads, and holds nothing of its own; one far before its reader would be
    measured with heads that went since. Nodes are in topological order.
    """
    repeats: dict[int, gs.Node] = {}
    for node in graph.nodes:
        source = node.inputs[0].inputs[0] if node.inputs and node.inputs[0].inputs else None
        written = node.op == "Expand" and is_constant(node.inputs[1]) and bool(np.any(node.inputs[1].values > 1))
        if written or (has(node, MOVERS) and id(source) in repeats):
            repeats[id(node)] = node
    outputs = {id(t) for t in graph.outputs}
    place = {id(node): (i, 0) for i, node in enumerate(graph.nodes)}
    for node in reversed(repeats.values()):
        (result,) = node.outputs
        readers = {id(n): n for n in result.outputs}
        if id(result) in outputs or not readers or not readers.keys() <= place.keys():
            continue
        apart = sorted((n for n in readers.values() if n.op != "Shape"), key=lambda n: place[id(n)])[1:]
        for reader in apart:
            own = gs.Variable(next(names), result.dtype, result.shape)
            copy = gs.Node(node.op, f"{node.name}_{own.name}", dict(node.attrs), list(node.inputs), [own])
            for position, tensor in enumerate(reader.inputs):
                if tensor is result:
                    reader.inputs[position] = own
            graph.nodes.append(copy)
            place[id(copy)] = (place[id(reader)][0], place[id(reader)][1] - 1)
        first, depth = min(place[id(n)] for n in result.outputs)
        place[id(node)] = (first, depth - 1)
    if repeats:
        graph.nodes = sorted(graph.nodes, key=lambda n: place[id(n)])


def _drop_zero_states(graph: gs.Graph) -> None:
    """Takes initial states of zeros from recurrent operators, which begin with zeros where none is given.

    Exporters make one tensor of them for all layers, whose hidden units would have to stay the same ones then.
    """
    for node in graph.nodes:
        if not has(node, Trait.RECURS):
            continue
        for position in (5, 6):
            if len(node.inputs) > position and _is_zeros(node.inputs[position]):
                node.inputs[position] = gs.Variable.empty()


def _is_zeros(tensor: gs.Tensor) -> bool:
    """Returns whether a tensor holds zeros alone: a constant, or what was made or repeated of some, and moved about."""
    while not is_constant(tensor) and tensor.inputs:
        node = tensor.inputs[0]
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            return value is None or not np.any(tensor_attribute(value))
        if not has(node, CARRIED):
            return False
        tensor = node.inputs[0]
    return is_constant(tensor) and not np.any(tensor.values)


def _unique_names(graph: gs.Graph) -> Iterator[str]:
    """Names nodes that have none (or share one) and returns a source of unused tensor names."""
    taken: set[str] = set()
    for index, node in enumerate(graph.nodes):
        if not node.name or node.name in taken:
            name = f"{node.name or node.op}_{index}"
            others = (f"{name}_{k}" for k in itertools.count())
            node.name = next(n for n in itertools.chain([name], others) if n not in taken)
        taken.add(node.name)
    tensors = set(graph.tensors())
    return (n for n in (f"liar_opt_{k}" for k in itertools.count()) if n not in tensors)
