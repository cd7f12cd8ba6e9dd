"""The tables that token ids look up: how many rows they have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import is_constant, is_float
from liar_opt.frontend.rules.operators import MOVERS, has
from liar_opt.frontend.rules.table import Trait
from liar_opt.runtime.signatures import Signature

if TYPE_CHECKING:
    from liar_opt.frontend.model import Model

INDEX_STEPS = MOVERS | Trait.INDEXES
"""Operators between token ids and the table that they look up."""
LOOKUPS = {"Gather": ((0, 1),), "EmbedLayerNormalization": ((2, 0),), "embedding": ((0, 1),)}
"""Operators that look rows up: the inputs with the table and with the ids."""


def vocabulary(model: Model) -> int | None:
    """Returns the number of rows of the table that token ids look up: the largest of those read by a graph input."""
    if model.traced:
        return max(looked_up(model).values(), default=None)
    roles = Signature.read(model.inputs(), None).roles
    inputs = {t.name for t in model.graph.inputs if roles.get(t.name) != "position"}
    sizes = []
    for node in model.graph.nodes:
        for table, ids in LOOKUPS.get(node.op, ()):
            rows, axis = node.inputs[table], 0
            if rows.inputs and rows.inputs[0].op == "Transpose":  # the weight of the head, turned round
                rows, axis = rows.inputs[0].inputs[0], 1
            numbered = is_constant(rows) and len(rows.shape) == 1 and not is_float(rows.dtype)  # where words went
            if is_constant(rows) and (len(rows.shape) == 2 or numbered):
                sources = ids_of(node.inputs[ids])
                sizes += [int(rows.shape[axis])] if len(sources) == 1 and sources <= inputs else []
    return max(sizes, default=None)


def looked_up(model: Model) -> dict[str, int]:
    """Returns the rows of the smallest table that each graph input of whole numbers looks up as it is."""
    inputs = {t.name for t in model.graph.inputs}
    rows: dict[str, int] = {}
    for node in model.graph.nodes:
        if node.op not in ("Gather", "embedding") or not is_constant(node.inputs[0]) or is_constant(node.inputs[1]):
            continue
        table, index = node.inputs
        while index.inputs and has(index.inputs[0], MOVERS):
            index = index.inputs[0].inputs[0]
        if index.name in inputs:
            size = int(table.shape[int(node.attrs.get("axis", 0))])
            rows[index.name] = min(size, rows.get(index.name, size))
    return rows


def ids_of(tensor: gs.Tensor) -> set[str]:
    """Returns the names of the tensors that indices come from.

    Steps as those that add the length to negative ones (TensorFlow, JAX) are looked behind.
    """
    found: set[str] = set()
    seen: set[int] = set()
    waiting = [tensor]
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen or is_constant(tensor):
            continue
        seen.add(id(tensor))
        if tensor.inputs and has(tensor.inputs[0], INDEX_STEPS):
            moved = has(tensor.inputs[0], MOVERS)
            waiting += tensor.inputs[0].inputs[: 1 if moved else None]
        else:
            found.add(tensor.name)
    return found
