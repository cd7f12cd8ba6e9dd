"""The words of a graph: tables that token ids look up, heads that give a logit for each word, and cutting both.

Found by how tensors are used, not by their names:

- a *table* is a constant whose rows are looked up by a graph input, through casts, reshapes and the like (`tables`); of
  tables of several sizes the largest that token ids look up is that of the words (an input that is called so, where one
  is: entities or places on a page may have larger ones), and all as large, or stored once for several, go together;
- a *head* is a product with a constant that has a column a word, whose result reaches a graph output without another such
  product: tied (the table itself, turned round or not), a copy of it, or one of its own;
- what is added or multiplied behind a head, a number a word, belongs to it.

Of V words K are kept, in their order. Inside a graph whose interface stays, ids go through m, int32 [V], and logits y come
back at full width:

    lookup   table[ids]            ->  table'[m[ids]],   m[w] = place of w among the kept, or that of the word it is read as
    logits   y [.., V]             ->  z [.., V], z[.., kept] = y', -inf elsewhere

ScatterElements lays logits out: it is the fastest way in ONNX Runtime (half the time of a Gather), and no quantiser
touches it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.graph_tensors import is_constant, is_float, like
from liar_opt.frontend.model import Model
from liar_opt.frontend.rules.operators import has, operator
from liar_opt.frontend.rules.table import ATEN, Trait
from liar_opt.frontend.tables import INDEX_STEPS, LOOKUPS, ids_of
from liar_opt.runtime.errors import ModelError
from liar_opt.runtime.signatures import Signature

STILL_IDS = frozenset(
    {"Where", "where", "Mul", "mul", "Clip", "clamp", "masked_fill", "Min", "Max", "minimum", "maximum", "Mod", "remainder"}
)
"""Operators that make ids of token ids, beside those that move them: other tables are looked up by these."""
ELEMENTWISE = Trait.UNARY | Trait.ARITHMETIC | Trait.EXTREMES | Trait.DROPS
"""Operators behind a head that keep a number a word."""


@dataclass(frozen=True, eq=False)
class Place:
    """An input of a node; ``axis`` is that of the words, in the constant that it reads, turned round or not."""

    node: gs.Node
    position: int
    constant: gs.Constant
    axis: int


@dataclass(frozen=True, eq=False)
class Words:
    """The words of a graph.

    Attributes:
        size: how many there are.
        inputs: the graph inputs whose ids look them up.
        lookups: (node, position) of the ids.
        places: of the constants with a row or a column a word.
        logits: tensors with a logit a word, [.., V]: behind them words mean something else, or the graph ends.
        wide: outputs of the graph that have a number a word last.
    """

    size: int
    inputs: tuple[str, ...]
    lookups: tuple[tuple[gs.Node, int], ...]
    places: tuple[Place, ...]
    logits: tuple[gs.Variable, ...]
    wide: frozenset[str]

    def bytes(self) -> int:
        """Returns what the constants take, each counted once."""
        return sum(_elements(c) * np.dtype(_stored(c)).itemsize for c in self._constants())

    def parameters(self) -> int:
        """Returns the elements of the constants."""
        return sum(map(_elements, self._constants()))

    def _constants(self) -> Collection[gs.Constant]:
        return {id(p.constant): p.constant for p in self.places}.values()


def find_words(model: Model) -> Words:
    """Finds the words of a normalised graph.

    Raises:
        ModelError: no ids look a table up, or something reads one in a way that is not followed.
    """
    nodes = {id(n) for n in model.graph.nodes}
    signature = Signature.read(model.inputs(), None)
    roles = signature.roles
    ends = {t.name for t in model.graph.inputs if roles.get(t.name) not in ("position", "type", "mask")}
    tables: dict[int, tuple[gs.Constant, int, list[str]]] = {}  # one may be looked up by several inputs
    computed = False
    for node in model.graph.nodes:
        for table, ids in LOOKUPS.get(node.op, ()):
            if len(node.inputs) <= max(table, ids) or is_constant(node.inputs[ids]):
                continue
            found = _origin(node.inputs[table], int(node.attrs.get("axis", 0)))
            if found is None or len(found[0].shape) != 2 or not is_float(found[0].dtype):
                continue
            sources = ids_of(node.inputs[ids])
            if len(sources) == 1 and sources <= ends:
                tables.setdefault(id(found[0]), (*found, []))[2].extend(sources)
            else:
                computed = True
    if not tables:
        why = "the ids that look its tables up are computed inside" if computed else "no input of it looks a table up"
        raise ModelError(f"the model has no vocabulary to cut: {why}")
    named = {signature.ids, *(name for name, role in roles.items() if role == "decoder_ids")}
    of_words = [t for t in tables.values() if not named.isdisjoint(t[2])]
    size = max(int(c.shape[axis]) for c, axis, _ in of_words or tables.values())
    own = {key: t for key, t in tables.items() if int(t[0].shape[t[1]]) == size}
    waiting = [Place(n, p, c, a) for c, axis, _ in own.values() for n, p, a in _readers(c, axis)]
    waiting += [place for place in _products(model, size) if id(place.constant) not in own]
    lookups, places, logits = [], [], []
    for place in waiting:
        node = place.node
        if id(node) not in nodes:
            raise ModelError(f"the table '{place.constant.name}' is read in a branch (node '{node.name}'); its words stay")
        lookup = next((ids for table, ids in LOOKUPS.get(node.op, ()) if table == place.position), None)
        if lookup is not None and (node.op != "Gather" or int(node.attrs.get("axis", 0)) == place.axis):
            lookups.append((node, lookup))
            places.append(_at_source(place))
        elif id(place.constant) in own and _columns(node, place.position, len(place.constant.shape)) != place.axis:
            raise ModelError(
                f"node '{node.name}' ({node.op}) reads the table '{place.constant.name}' neither by ids nor for logits: "
                "its words stay"
            )
        else:
            end, beside = _end_of(node, size, model)
            places += [_at_source(place), *beside]
            logits.append(end)
    if any(t is p.constant for p in places for t in model.graph.outputs):
        raise ModelError("a table of words is an output of the graph; its words stay")
    inputs = tuple(dict.fromkeys(itertools.chain.from_iterable(t[2] for t in own.values())))
    behind = _behind(logits)
    wide = {t.name for t in model.graph.outputs if id(t) in behind and (t.shape or [size])[-1] == size}
    return Words(size, inputs, tuple(lookups), tuple(places), tuple(logits), frozenset(wide))


def require_no_other_lookup(model: Model, words: Words) -> None:
    """Checks that nothing else is looked up by token ids, which has no row for new ones.

    Raises:
        ModelError: a table is, whose ids are computed of them.
    """
    known = {(id(node), position) for node, position in words.lookups}
    ids = set(words.inputs)
    for node in model.graph.nodes:
        reads = [i for i, t in enumerate(node.inputs) if t.name in ids]
        other = next((p for _, p in LOOKUPS.get(node.op, ()) if p in reads and (id(node), p) not in known), None)
        if other is not None:
            raise ModelError(
                f"node '{node.name}' ({node.op}) looks '{node.inputs[0].name}' up by ids that are computed of the tokens', "
                "and new ids have other rows there; write ONNX without small-tokenizer (of a checkpoint with --format onnx)"
            )
        if reads and (has(node, INDEX_STEPS) or node.op in STILL_IDS):
            ids |= {t.name for t in node.outputs}


def cut_words(model: Model, words: Words, kept: NDArray[np.int64], unknown: int, tables: bool = True) -> None:
    """Cuts a graph to some words.

    Args:
        model: whose words were found.
        words: what was found.
        kept: ids, ascending [K].
        unknown: the kept id that others are read as.
        tables: whether the interface stays; otherwise ids are places among the kept, and logits as many.
    """
    taken = set(model.graph.tensors()) | {n.name for n in model.graph.nodes}
    names = (n for n in (f"liar_opt_words_{k}" for k in itertools.count()) if n not in taken)
    constants: dict[int, gs.Constant] = {}
    for place in words.places:
        old = place.constant
        if id(old) not in constants:
            value = np.ascontiguousarray(np.take(np.asarray(old.values), kept, place.axis))
            constants[id(old)] = like(old, old.name, model.settled(value))
        _set_constant(place, constants[id(old)])
    for place in words.places:
        if place.constant.outputs:  # something else reads it
            constants[id(place.constant)].name = next(names)
    if not tables:
        _renumber(model, words, kept)
        return
    numbers = np.full(words.size, np.searchsorted(kept, unknown), np.int32)
    numbers[kept] = np.arange(len(kept), dtype=np.int32)
    number = gs.Constant(next(names), numbers)
    made: dict[int, gs.Tensor] = {}
    for node, position in words.lookups:
        ids = node.inputs[position]
        if id(ids) not in made:
            made[id(ids)] = gs.Variable(next(names), np.int32, ids.shape)
            lookup = gs.Node("Gather", next(names), {"axis": 0}, [number, ids], [made[id(ids)]])
            model.graph.nodes.insert(_index(model, node), lookup)
        node.inputs[position] = made[id(ids)]
    shared = {
        "kept": gs.Constant(next(names), kept.astype(np.int32)),
        "size": gs.Constant(next(names), np.asarray([words.size], np.int64)),
        "first": gs.Constant(next(names), np.asarray([0], np.int64)),
        "last": gs.Constant(next(names), np.asarray([-1], np.int64)),
    }
    for tensor in words.logits:
        _lay_out(model, tensor, shared, names)


def hide_logits(model: Model, words: Words, kept: NDArray[np.int64]) -> None:
    """Adds -inf to the logits of words that are not kept: what a cut graph must compute for texts of those that are."""
    for k, tensor in enumerate(words.logits):
        hidden = np.full(words.size, -np.inf, np.float32)
        hidden[kept] = 0.0
        dtype = np.dtype(tensor.dtype or np.float32)
        (node,) = tensor.inputs
        whole = gs.Variable(f"liar_opt_whole_{k}", dtype)
        node.outputs[[id(t) for t in node.outputs].index(id(tensor))] = whole
        mask = gs.Constant(f"liar_opt_hidden_{k}", hidden.astype(dtype))
        added = gs.Node("Add", f"liar_opt_hide_{k}", {}, [whole, mask], [tensor])
        model.graph.nodes.insert(_index(model, node) + 1, added)


# -- finding ----------------------------------------------------------------------------------------------------------


def _elements(constant: gs.Constant) -> int:
    return int(np.prod(constant.shape, dtype=np.int64))


def _stored(constant: gs.Constant) -> Any:
    stored = getattr(constant, "stored", None)
    return constant.dtype if stored is None else stored.dtype


def _turned(node: gs.Node, axis: int, back: bool = False) -> int | None:
    """Where an axis is behind (or, ``back``, before) a node that gives a constant on, turned or not; None: it does not."""
    if has(node, Trait.COPIES) and node.op != "Dropout":
        return axis
    if node.op != "Transpose":
        return None
    rank = len(node.attrs.get("perm") or ()) or 2
    perm = list(node.attrs.get("perm") or range(rank)[::-1])
    return perm[axis] if back else perm.index(axis)


def _origin(tensor: gs.Tensor, axis: int) -> tuple[gs.Constant, int] | None:
    """The constant that a tensor is, turned or not, and an axis of it."""
    while not is_constant(tensor):
        if len(tensor.inputs) != 1:
            return None
        before = _turned(tensor.inputs[0], axis, back=True)
        if before is None:
            return None
        tensor, axis = tensor.inputs[0].inputs[0], before
    return tensor, axis


def _readers(tensor: gs.Tensor, axis: int) -> Iterator[tuple[gs.Node, int, int]]:
    """Yields what reads a constant: node, position, and the axis there; what only turns it round is looked behind."""
    for node in {id(n): n for n in tensor.outputs}.values():
        behind = _turned(node, axis)
        if behind is not None:
            yield from _readers(node.outputs[0], behind)
            continue
        yield from ((node, i, axis) for i, t in enumerate(node.inputs) if t is tensor)


def _at_source(place: Place) -> Place:
    """The same place with the axis that the constant itself has."""
    found = _origin(place.node.inputs[place.position], place.axis)
    assert found is not None and found[0] is place.constant
    return Place(place.node, place.position, *found)


def _columns(node: gs.Node, position: int, rank: int) -> int | None:
    """The axis of the columns in the weight of a product; None where it is none that gives one a column last."""
    product = node.op == "linear" if node.domain == ATEN else 1 in operator(node.domain, node.op).contracts
    if position != 1 or not product or node.op == "Einsum" or "Conv" in node.op:
        return None
    return rank - 2 if node.op == "linear" or node.attrs.get("transB") else rank - 1


def _products(model: Model, size: int) -> Iterator[Place]:
    """Yields products with a constant of a column a word that reach a graph output without another product."""
    for node in model.graph.nodes:
        if len(node.inputs) < 2:
            continue
        rank = len(node.inputs[1].shape or ()) or 2
        columns = _columns(node, 1, rank)
        found = None if columns is None else _origin(node.inputs[1], columns)
        if found is None or columns is None or int(found[0].shape[found[1]]) != size:
            continue
        shape = found[0].shape
        if int(np.prod(shape[:-2], dtype=np.int64)) == 1 and _ends_there(node, model):
            yield Place(node, 1, found[0], columns)


def _ends_there(node: gs.Node, model: Model) -> bool:
    """Whether what a product gives reaches an output of the graph, and no other product with a constant."""
    outputs, seen = {id(t) for t in model.graph.outputs}, set()
    waiting, reached = list(node.outputs), False
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        reached = reached or id(tensor) in outputs
        for reader in tensor.outputs:
            if not has(reader, ELEMENTWISE | Trait.BROADCASTS) and any(map(_is_matrix, reader.inputs)):
                return False
            waiting += reader.outputs
    return reached


def _is_matrix(tensor: gs.Tensor) -> bool:
    found = _origin(tensor, 0)
    return found is not None and is_float(found[0].dtype) and sum(int(n) > 1 for n in found[0].shape) > 1


def _end_of(node: gs.Node, size: int, model: Model) -> tuple[gs.Variable, list[Place]]:
    """The last tensor behind a product with a number a word, and the constants on the way that have one, too."""
    outputs = {id(t) for t in model.graph.outputs}
    places = []
    if node.op.endswith(("Gemm", "linear")) and len(node.inputs) > 2 and _is_row(node.inputs[2], size):
        places.append(_row(node, 2))
    tensor = node.outputs[0]
    while id(tensor) not in outputs and len(tensor.outputs) == 1:
        reader = tensor.outputs[0]
        others = [(i, t) for i, t in enumerate(reader.inputs) if t is not tensor]
        numbers = all(is_constant(t) and (_is_row(t, size) or int(np.prod(t.shape)) == 1) for _, t in others)
        result = reader.outputs[0]
        kind = reader.attrs.get("to", result.dtype)
        kept = Trait.BROADCASTS if reader.domain == ATEN else ELEMENTWISE
        if not has(reader, kept) or not numbers or len(others) + 1 != len(reader.inputs) or not _floats(kind):
            break
        if not any(reader is n for n in model.graph.nodes):
            break
        places += [_row(reader, i) for i, t in others if _is_row(t, size)]
        tensor = result
    return tensor, places


def _behind(tensors: Collection[gs.Tensor]) -> set[int]:
    """The tensors that are made of some, and these."""
    seen: set[int] = set()
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        if id(tensor) not in seen:
            seen.add(id(tensor))
            waiting += [t for reader in tensor.outputs for t in reader.outputs]
    return seen


def _floats(kind: Any) -> bool:
    if isinstance(kind, int):
        return kind in (1, 10, 11, 16)  # of onnx.TensorProto
    return kind is None or is_float(kind)


def _is_row(tensor: gs.Tensor, size: int) -> bool:
    return is_constant(tensor) and bool(tensor.shape) and tensor.shape[-1] == size == int(np.prod(tensor.shape))


def _row(node: gs.Node, position: int) -> Place:
    return Place(node, position, node.inputs[position], len(node.inputs[position].shape) - 1)


# -- cutting ----------------------------------------------------------------------------------------------------------


def _index(model: Model, node: gs.Node) -> int:
    return next(i for i, n in enumerate(model.graph.nodes) if n is node)


def _set_constant(place: Place, new: gs.Constant) -> None:
    """Has a place read another constant: what lies between them is read by other places of the constant, too."""
    tensor, holder, position = place.node.inputs[place.position], place.node, place.position
    while not is_constant(tensor):
        holder, position = tensor.inputs[0], 0
        tensor.shape = None
        tensor = holder.inputs[0]
    holder.inputs[position] = new


def _lay_out(model: Model, tensor: gs.Variable, shared: dict[str, gs.Constant], names: Iterator[str]) -> None:
    """Lays the logits that are left out at full width, -inf elsewhere."""
    dtype = np.dtype(tensor.dtype or np.float32)
    (node,) = tensor.inputs
    kept = gs.Variable(next(names), dtype)
    node.outputs[[id(t) for t in node.outputs].index(id(tensor))] = kept
    made: list[gs.Node] = []

    def then(op: str, inputs: Sequence[gs.Tensor], dtype: Any = np.int64, **attributes: Any) -> gs.Variable:
        output = gs.Variable(next(names), dtype)
        made.append(gs.Node(op, next(names), attributes, list(inputs), [output]))
        return output

    nothing = gs.Constant(next(names), np.asarray(-np.inf, dtype))
    shape = then("Shape", [kept])
    rows = then("Slice", [shape, shared["first"], shared["last"]])
    whole = then("Concat", [rows, shared["size"]], axis=0)
    base = then("Expand", [nothing, whole], dtype)
    places = then("Expand", [shared["kept"], shape], np.int32)
    scatter = "ScatterElements" if model.opset >= 11 else "Scatter"
    made.append(gs.Node(scatter, next(names), {"axis": -1}, [base, places, kept], [tensor]))
    at = _index(model, node) + 1
    model.graph.nodes[at:at] = made


def _renumber(model: Model, words: Words, kept: NDArray[np.int64]) -> None:
    """Gives the outputs their new widths, and what ids are compared with its new number."""
    for tensor in model.graph.outputs:
        if tensor.name in words.wide and tensor.shape is not None:
            model.resize(tensor, len(tensor.shape) - 1, len(kept))
    for node in model.graph.nodes:
        for i, t in enumerate(node.inputs[:2]):
            other = node.inputs[1 - i] if len(node.inputs) > 1 else None
            if node.op != "Equal" or not is_constant(t) or other is None or not ids_of(other) <= set(words.inputs):
                continue
            place = np.searchsorted(kept, np.asarray(t.values))
            known = np.isin(t.values, kept)
            node.inputs[i] = gs.Constant(f"{t.name}/{node.name}", np.where(known, place, -1).astype(t.dtype))
