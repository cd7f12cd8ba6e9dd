"""Is a model causal, and how many positions has it: read from the structure of its graph, without running it.

Signs of a causal model, any of which is enough:

- an attention operator that says so (`GroupQueryAttention`; `is_causal`, `unidirectional`);
- a key-value cache among its inputs;
- a triangle over positions: `Trilu`, a constant lower triangle, or a comparison of two ranges of positions.

An encoder has none of them. A graph of both an encoder and a decoder is no causal model here: its texts are not a stream.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import is_constant, is_float
from liar_opt.frontend.model import Model
from liar_opt.frontend.rules.operators import MOVERS, has, operator
from liar_opt.frontend.rules.table import Trait
from liar_opt.runtime.signatures import Signature

CAUSAL_ATTRIBUTES = ("is_causal", "unidirectional", "causal")


def is_causal(model: Model) -> bool:
    """Returns whether no token of the model sees those behind it."""
    signature = Signature.read(model.inputs(), None)
    if "decoder_ids" in signature.roles.values():
        return False
    return bool(signature.past) or any(_says_causal(node) or _is_triangle(node) for node in _nodes(model.graph))


def positions(model: Model) -> int | None:
    """Returns for how many tokens the model has positions; None where nothing in the graph limits them.

    The least of: rows of a table that is looked up by positions or cut to a computed length, rows of the tables of rotary
    operators. A table of learned positions may begin with rows for padding (RoBERTa has two): they are counted, so the
    limit may be too high by them.
    """
    roles = Signature.read(model.inputs(), None).roles
    limits = []
    for node in _nodes(model.graph):
        if node.op == "Gather" and is_constant(node.inputs[0]) and len(node.inputs[0].shape) == 2:
            if node.attrs.get("axis", 0) == 0 and _counts(node.inputs[1], roles):
                limits.append(int(node.inputs[0].shape[0]))
        if node.op == "Slice" and len(node.inputs) > 2 and is_constant(node.inputs[0]) and not is_constant(node.inputs[2]):
            limits += _rows_cut(node)
        place = operator(node.domain, node.op).cosines or len(node.inputs)
        if place < len(node.inputs) and is_constant(node.inputs[place]):
            limits.append(int(node.inputs[place].shape[0]))
    return min(limits, default=None)


def _rows_cut(node: gs.Node) -> list[int]:
    """The length of a table of vectors, of which a Slice takes as many as the program says."""
    table = node.inputs[0]
    shape = [int(d) for d in table.shape]
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    if not is_float(table.dtype) or len(shape) < 2 or not (axes is None or is_constant(axes)):
        return []
    cut = range(len(shape)) if axes is None else [int(a) % len(shape) for a in axes.values.reshape(-1)]
    long = [shape[a] for a in cut if a != len(shape) - 1 and shape[a] > 1]
    return long[:1]


def _nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    for node in graph.nodes:
        yield node
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from _nodes(value)


def _says_causal(node: gs.Node) -> bool:
    return has(node, Trait.CAUSAL) or any(node.attrs.get(name) for name in CAUSAL_ATTRIBUTES)


def _is_triangle(node: gs.Node) -> bool:
    if node.op == "Trilu":
        return True
    if has(node, Trait.COMPARES):
        return all(getattr(_origin(tensor), "op", None) == "Range" for tensor in node.inputs)
    return any(is_constant(tensor) and _is_lower_triangle(tensor) for tensor in node.inputs)


def _is_lower_triangle(tensor: gs.Constant) -> bool:
    """Whether a constant mask [.., s, s] has one value above its diagonal, and another on it."""
    shape = tuple(tensor.shape)
    square = len(shape) >= 2 and shape[-1] == shape[-2] > 1 and int(np.prod(shape[:-2])) == 1
    if not square or (len(shape) == 2 and np.dtype(tensor.dtype) != np.bool_):  # else a weight, not worth reading
        return False
    mask = np.asarray(tensor.values).reshape(shape[-2:])
    above = mask[0, 1]
    return bool((mask[np.triu_indices(len(mask), 1)] == above).all() and (np.diagonal(mask) != above).all())


def _counts(tensor: Any, roles: dict[str, str]) -> bool:
    """Whether a tensor of indices numbers positions."""
    waiting, seen = [tensor], set()
    while waiting:
        origin = _origin(waiting.pop())
        if id(origin) in seen:  # what a node doubles is looked at once
            continue
        seen.add(id(origin))
        if not isinstance(origin, gs.Node):
            found = roles.get(origin.name) == "position"
        elif origin.op in ("Add", "Sub", "Mul"):  # behind a cache, or where a mask is
            waiting += [t for t in origin.inputs if not is_constant(t)]
            continue
        else:
            found = origin.op in ("Range", "CumSum") or (origin.op == "Slice" and _ascends(origin.inputs[0]))
        if found:
            return True
    return False


def _ascends(tensor: Any) -> bool:
    """Whether a tensor is a constant of rising numbers; a buffer of token types, all zeros, is none."""
    return is_constant(tensor) and bool((np.diff(np.asarray(tensor.values).reshape(-1)) > 0).all())


def _origin(tensor: Any) -> Any:
    """The node or graph input that gave a tensor its values, which may have been moved and shifted by a constant since."""
    while tensor.inputs:
        node = tensor.inputs[0]
        varying = [t for t in node.inputs if not is_constant(t)]
        if node.op in ("Add", "Sub") and len(varying) == 1:
            tensor = varying[0]
        elif has(node, MOVERS):
            tensor = node.inputs[0]
        else:
            return node
    return tensor
