"""The experts of a graph: layers in which a router chooses some of E experts for each token.

Found by how tensors are used, not by their names: rows of the data look weights up in constants [E, ..] by numbers that a
choice of the k largest scores gives (TopK), or an operator has all experts inside (MoE), or each has weights of its own and
its number is taken out of the scores (`frontend.lone_experts`). The scores are a product with a constant that has a column
an expert, the *router*, behind which may be a softmax, a sigmoid, a correction.

The dimension E is pinned in the axis algebra: a softmax and a choice run over it. Indices may go all the same, because the
model without some experts is another model of the same kind: the one whose router gives -inf to those that went. That is
what :func:`hidden` makes of the original, and what a cut must equal.

Where experts come in groups, and the best groups are chosen first (DeepSeek), E is groups x experts of each, and each group
loses as many.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.axes import AxisAlgebra
from liar_opt.frontend.engine import ConstantPatch, Patch
from liar_opt.frontend.graph_tensors import is_constant, is_float, present
from liar_opt.frontend.lone_experts import (
    ALL,
    Selection,
    counted,
    in_modules,
    leave_out_experts,
    moved,
    only_theirs,
    renumber,
    selections,
    silenced,
)
from liar_opt.frontend.records import ConstantUse, ConsumerUse
from liar_opt.frontend.rewrite import CannotFollow, Cut, Rewriter, Within
from liar_opt.frontend.rules.operators import POINTWISE, has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.walk import GraphWalk
from liar_opt.runtime.errors import InternalError

CHOICES = frozenset({"TopK", "topk"})
"""Operators that choose the largest, and say which."""
WHOLE = frozenset({"MoE"})
"""Operators that have all experts inside; their second input is the router's product."""
PLACED = frozenset({"GatherElements", "ScatterElements", "gather", "scatter", "scatter_add"})
"""Operators that read or write the score of an expert by its number."""
OVER_ALL = frozenset(
    {"ReduceSum", "ReduceMax", "ReduceL1", "sum", "amax", "zeros_like", "ConstantOfShape", "Expand", "expand", "OneHot"}
)
"""Operators over the scores of all experts to which one that has none is as good as gone."""
MODULES = "each is a module of its own, which goes in an ONNX file alone: export the module, and prune that"
SUMMED = frozenset({"MatMul", "Einsum"})
"""Operators that may sum what experts give, each by its gate."""
BETWEEN = POINTWISE | Trait.KEEPS_ORDER | Trait.TURNS | Trait.SHAPES | Trait.SHARES | Trait.LOOKS_UP


@dataclass(frozen=True, eq=False)
class Term:
    """What experts add to the layer's output, a row for each token and expert that was chosen for it.

    Attributes:
        tensor: its name; the gate's factor is in it where that was found.
        use: the last product of the experts, whose rows are in the same order.
        numbers: the name of the tensor with the number of the expert of each row.
    """

    tensor: str
    use: ConsumerUse
    numbers: str


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """Experts that go together with their rows of the router.

    Attributes:
        name: the node that chooses.
        factor: the leaf factor that loses indices: E, or the experts of each group.
        size: experts.
        groups: of which so many are chosen from first; 1 without groups.
        outer: the leaf factor of the groups.
        top_k: experts of each token.
        least: the fewest that may stay, in each group.
        router: the product that gives the scores.
        added: constants with a number an expert that are added to scores.
        constants: all that have the dimension.
        terms: what they add to the output; where it is inside an operator, ``scores`` says what there is.
        scores: the name of the router's product.
        taken: where single experts are taken out that have weights of their own; empty of experts in one constant.
        own: the weights of each that are its alone.
        given: the name of what each adds to the output; empty where that is not seen.
        units: the leaves of single experts, where the axis is cut into them.
    """

    name: str
    factor: int
    size: int
    groups: int
    outer: int | None
    top_k: int
    least: int
    router: tuple[ConsumerUse, ...]
    added: tuple[ConstantUse, ...]
    constants: tuple[gs.Constant, ...]
    terms: tuple[Term, ...] = ()
    scores: str = ""
    taken: tuple[Selection, ...] = ()
    own: tuple[tuple[gs.Constant, ...], ...] = ()
    given: tuple[str, ...] = ()
    units: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements of all constants that have the dimension, and of those that are of one expert."""
        constants = itertools.chain(self.constants, *self.own)
        return sum(int(np.prod(c.shape, dtype=np.int64)) for c in constants)

    def left(self, kept: Sequence[int]) -> int:
        """Returns how many of those elements stay with the experts ``kept``."""
        alone = [sum(int(np.prod(c.shape, dtype=np.int64)) for c in own) for own in self.own]
        shared = (self.parameters - sum(alone)) * len(kept) / self.size
        return round(shared) + sum(alone[i] for i in kept if alone)

    def cut(self, kept: Sequence[int]) -> dict[int, Cut]:
        """Returns what ``Rewriter.cut`` keeps where the experts ``kept`` stay: as many of each group."""
        if self.units:
            return {leaf: [] for i, leaf in enumerate(self.units) if i not in kept}
        if self.outer is None:
            return {self.factor: list(kept)}
        own = self.size // self.groups
        return {self.factor: Within(self.outer, [[i % own for i in kept if i // own == g] for g in range(self.groups)])}


@dataclass(frozen=True)
class Unfit:
    """Experts that cannot go, and why."""

    name: str
    size: int
    reason: str


def find_experts(walk: GraphWalk) -> tuple[tuple[ExpertLayer, ...], tuple[Unfit, ...]]:
    """Returns the layers of experts of an analysed graph, in its order, and those of which no expert can go."""
    for one in (walk, *walk.others):
        _tie(one)
    found: dict[int, list[tuple[gs.Node, gs.Tensor]]] = defaultdict(list)
    taken: dict[int, list[Selection]] = {}
    unfit: list[Unfit] = []
    for node, scores, apart in _choosing(walk):
        axis = _scored(walk, node, scores)
        if axis is None:
            continue
        root = walk.algebra.find(axis)
        if apart and node.op == "topk":  # of a module's graph, whose code would have to lose modules
            if in_modules(walk, root, node.outputs[1:]):
                unfit.append(Unfit(node.name, walk.algebra.size(root), MODULES))
            continue
        if apart and root not in taken:
            taken[root] = selections(walk, root, node.outputs[1:])
        if not apart or {one.expert for one in taken[root]} - {ALL} == set(range(walk.algebra.size(root))):
            found[root].append((node, scores))
    result: list[ExpertLayer] = []
    for factor, choices in found.items():
        layer = _layer(walk, factor, choices, taken.get(factor, ()))
        if isinstance(layer, str):
            unfit.append(Unfit(choices[0][0].name, walk.algebra.size(factor), layer))
        else:
            result.append(layer)
    return tuple(result), tuple(unfit)


def _choosing(walk: GraphWalk) -> Iterator[tuple[gs.Node, gs.Tensor, bool]]:
    """Yields the nodes that choose, with the tensor of their scores, in the graph's order.

    What they choose by are experts, or may be experts that lie apart; this is said behind.
    """
    roots = {id(lookup.root) for lookup in walk.lookups.values()}
    for node in walk.model.graph.nodes:
        inside = node.op in WHOLE and len(node.inputs) > 2
        if inside or node.op in CHOICES:
            yield node, node.inputs[1 if inside else 0], not inside and not any(id(t) in roots for t in node.outputs[1:])


def _scored(walk: GraphWalk, node: gs.Node, scores: gs.Tensor) -> int | None:
    """Returns the factor of the experts among the axes of the scores: the one along which is chosen."""
    axes = walk.axes.get(scores.name)
    if not axes:
        return None
    axis = -1 if node.op in WHOLE else int(node.attrs.get("dim", node.attrs.get("axis", -1)))
    return axes[axis]


def _tie(walk: GraphWalk) -> None:
    """Says in the algebra that what is looked up by chosen numbers has as many entries as there are scores."""
    for lookup in walk.lookups.values():
        maker = lookup.root.inputs[0] if lookup.root.inputs else None
        if maker is not None and maker.op in CHOICES:
            axis = _scored(walk, maker, maker.inputs[0])
            if axis is not None and walk.algebra.size(axis) == walk.algebra.size(lookup.stack):
                walk.algebra.unify(axis, lookup.stack)
    for node in walk.model.graph.nodes:
        axis = _scored(walk, node, node.inputs[0]) if node.op in CHOICES else None
        if axis is not None:
            _tie_placed(walk, axis, node.outputs[1])
        axis = _scored(walk, node, node.inputs[1]) if node.op in WHOLE and len(node.inputs) > 2 else None
        for position in range(2, len(node.inputs) if axis is not None else 0):
            own = walk.input_axes(node, position)
            if own and axis is not None and walk.algebra.size(own[0]) == walk.algebra.size(axis):
                walk.algebra.unify(axis, own[0])


def _tie_placed(walk: GraphWalk, axis: int, numbers: gs.Tensor) -> None:
    """Says the same of what is read or written at the chosen numbers, or counts them."""
    for tensor in moved([numbers]):
        for node in tensor.outputs:
            axes, place = None, int(node.attrs.get("axis", -1 if node.op == "OneHot" else 0))
            if node.op == "OneHot" and tensor is node.inputs[0]:
                axes = walk.axes.get(node.outputs[0].name)
            elif node.op in ("GatherElements", "ScatterElements") and tensor is node.inputs[1]:
                axes = walk.input_axes(node, 0)
            elif node.op == "Equal":
                other = int(tensor is node.inputs[0])
                own = counted(walk, node, other, walk.algebra.size(axis))
                axes, place = (None, 0) if own is None else (walk.input_axes(node, other), own)
            along = axes[place] if axes else None
            if along is not None and walk.algebra.size(along) == walk.algebra.size(axis):
                walk.algebra.unify(axis, along)


def _layer(
    walk: GraphWalk, factor: int, choices: Sequence[tuple[gs.Node, gs.Tensor]], taken: Sequence[Selection]
) -> ExpertLayer | str:
    """Returns the layer of a factor that is chosen along, or why it keeps all of its experts."""
    algebra, size = walk.algebra, walk.algebra.size(factor)
    leaves = algebra.leaves(factor)
    units = tuple(leaves) if taken and len(leaves) == size else ()
    if not units and (not 1 <= len(leaves) <= 2 or size != math.prod(map(algebra.size, leaves))):
        return "its scores are laid out in a way that is not followed"
    outer = leaves[0] if len(leaves) == 2 and not units else None
    own = frozenset(units or leaves[-1:])
    touching = [n for n in walk.model.graph.nodes if _has(walk, n, own)]
    constants = [u for u in walk.constant_uses if any(not own.isdisjoint(algebra.leaves(f)) for f in u.axes)]
    routers = tuple(u for u in walk.consumers if u.lookup is None and _columns(algebra, u, walk, own))
    made = {id(u.node) for u in routers}
    whole = {id(n) for n, _ in choices if n.op in WHOLE}
    unfit = _unfit(walk, own, choices, touching, made | whole, taken)
    if unfit:
        return unfit
    node, scores = choices[0]
    top_k = int(node.attrs["k"]) if node.op in WHOLE else walk.shape(walk.axes[node.outputs[0].name] or ())[_axis(node)]
    added = tuple(u for u in constants if id(u.node) not in made and (u.node.op == "Sum" or has(u.node, Trait.ADDS)))
    layer = ExpertLayer(
        name=str(node.name),
        factor=leaves[-1],
        size=size,
        groups=1 if outer is None else algebra.size(outer),
        outer=outer,
        top_k=top_k,
        least=_least(walk, touching, leaves[-1], outer, top_k),
        router=routers,
        added=added,
        constants=tuple({id(u.constant): u.constant for u in constants if is_float(u.constant.dtype)}.values()),
        terms=() if whole else tuple(_terms(walk, [n for n, _ in choices])),
        scores=str(scores.name) if whole else "",
        units=units,
    )
    return _with_its_own(walk, layer, taken) if taken else layer


def _unfit(
    walk: GraphWalk,
    leaves: frozenset[int],
    choices: Sequence[tuple[gs.Node, gs.Tensor]],
    touching: Sequence[gs.Node],
    known: set[int],
    taken: Sequence[Selection],
) -> str:
    """Returns why no expert of a layer can go, or ""; ``known`` nodes make the scores, or have the experts inside."""
    ends = (t.name for t in walk.model.graph.outputs)
    seen = next(
        (n for n in ends if any(not leaves.isdisjoint(walk.algebra.leaves(f)) for f in walk.axes.get(n) or ())), None
    )
    if seen is not None:
        return f"the scores of its router are an output of the model ('{seen}')"
    if not known - {id(n) for n, _ in choices if n.op in WHOLE}:
        return "its scores are not made by a product with a constant"
    taking = {id(one.node) for one in taken}
    over = CHOICES | PLACED | OVER_ALL | (SUMMED if taken else frozenset())
    for node in touching:
        if id(node) not in known | taking and node.op not in over and not has(node, BETWEEN):
            return f"{node.op} reads the scores of all experts (node '{node.name}')"
    for node, _ in choices:
        other = None if node.op in WHOLE else _other_reader(walk, node.outputs[1], leaves, taking)
        if other is not None:
            return f"the numbers of chosen experts are read by {other.op} (node '{other.name}')"
    return ""


def _with_its_own(walk: GraphWalk, layer: ExpertLayer, taken: Sequence[Selection]) -> ExpertLayer | str:
    """Returns a layer with what each of its experts has for itself, or why none can go."""
    nodes = walk.model.graph.nodes
    order = {id(n): i for i, n in enumerate(nodes)}
    alone = [silenced(walk, order, [one for one in taken if one.expert == i]) for i in range(layer.size)]
    refused = next((found.refused for found in alone if found.refused), None)
    if refused is not None:
        return refused
    seen = all(len(found.terms) == 1 for found in alone)
    return replace(
        layer,
        taken=tuple(taken),
        own=tuple(tuple(only_theirs(order, nodes, found)) for found in alone),
        given=tuple(str(found.terms[0].name) for found in alone) if seen else (),
        scores="" if seen else str(layer.router[0].node.outputs[0].name),
    )


def _axis(node: gs.Node) -> int:
    return int(node.attrs.get("dim", node.attrs.get("axis", -1)))


def _has(walk: GraphWalk, node: gs.Node, leaves: frozenset[int]) -> bool:
    """Returns whether a tensor that is no constant has one of some leaves, among those that a node reads and makes."""
    tensors = [t for t in (*node.inputs, *node.outputs) if present(t) and not is_constant(t)]
    return any(not leaves.isdisjoint(walk.algebra.leaves(f)) for t in tensors for f in walk.axes.get(t.name) or ())


def _columns(algebra: AxisAlgebra, use: ConsumerUse, walk: GraphWalk, leaves: frozenset[int]) -> bool:
    """Returns whether a weight has a column an expert."""
    axes = walk.input_axes(use.node, use.weight_position) or ()
    return any(not leaves.isdisjoint(algebra.leaves(f)) for i, f in enumerate(axes) if i != use.weight_axis)


def _other_reader(walk: GraphWalk, numbers: gs.Tensor, leaves: frozenset[int], taking: set[int]) -> gs.Node | None:
    """Returns the first node that does more with the numbers of experts than to look something of theirs up."""

    def has_experts(axes: Sequence[int] | None) -> bool:
        return any(not leaves.isdisjoint(walk.algebra.leaves(f)) for f in axes or ())

    waiting = [numbers]
    while waiting:
        tensor = waiting.pop()
        for node in tensor.outputs:
            if node.op in CHOICES or (has(node, Trait.KEEPS_ORDER | Trait.TURNS) and tensor is node.inputs[0]):
                waiting += node.outputs
                continue
            if id(node) in taking or (node.op == "OneHot" and has_experts(walk.axes.get(node.outputs[0].name))):
                continue
            looks = has(node, Trait.LOOKS_UP) or node.op in PLACED
            if not looks or tensor is node.inputs[0] or not has_experts(walk.input_axes(node, 0)):
                return node
    return None


def _least(walk: GraphWalk, nodes: Sequence[gs.Node], leaf: int, outer: int | None, top_k: int) -> int:
    """Returns how many experts must stay, in each group, so that every choice has as many as it takes."""
    algebra, groups, within = walk.algebra, 1, 1
    for node in walk.model.graph.nodes:
        axes = walk.axes.get(node.inputs[0].name) if node.op in CHOICES else None
        if not axes:
            continue
        factor, taken = axes[_axis(node)], walk.shape(walk.axes[node.outputs[0].name] or ())[_axis(node)]
        if outer is not None and algebra.leaves(factor) == [outer]:
            groups = taken
        elif outer is not None and algebra.leaves(factor) == [leaf]:  # what a group is chosen by: its best few
            within = max(within, taken)
    return top_k if outer is None else max(-(-top_k // groups), within)


def _terms(walk: GraphWalk, choices: Sequence[gs.Node]) -> Iterator[Term]:
    """Yields, for each node that chooses, what its experts add to the output."""
    order = {id(n): i for i, n in enumerate(walk.model.graph.nodes)}
    for choice in choices:
        own = [u for u in walk.consumers if u.lookup is not None and any(u.lookup.root is t for t in choice.outputs)]
        if own:
            last = max(own, key=lambda u: order[id(u.node)])
            assert last.lookup is not None
            yield Term(_gated(walk, last), last, str(last.lookup.numbers.name))


def _gated(walk: GraphWalk, use: ConsumerUse) -> str:
    """Returns the tensor behind the last product of experts in which the gates multiply it, or the product's own."""
    tensor = use.node.outputs[0]
    size = math.prod(walk.shape(walk.axes[tensor.name] or ()))
    first = tensor
    while len(tensor.outputs) == 1:
        node = tensor.outputs[0]
        axes = walk.axes.get(node.outputs[0].name)
        if axes is None or math.prod(walk.shape(axes)) != size or not has(node, POINTWISE | Trait.KEEPS_ORDER):
            break
        others = [t for t in node.inputs if present(t) and t is not tensor]
        tensor = node.outputs[0]
        if node.op in ("Mul", "mul") and not is_constant(others[0]):
            return str(tensor.name)
    return str(first.name)


def hidden(walk: GraphWalk, layers: Mapping[ExpertLayer, Sequence[int]]) -> list[Patch | ConstantPatch]:
    """Returns what makes the original never choose experts: its router gives -inf to all but those that are kept.

    Args:
        walk: the analysis in which the layers were found.
        layers: the experts that stay, of each.
    """
    patches: list[Patch | ConstantPatch] = []
    for layer, kept in layers.items():
        gone = np.ones(layer.size, bool)
        gone[list(kept)] = False
        for use in layer.router:
            shift = np.where(gone, -np.inf, 0.0)
            patches.append(Patch((use,), np.asarray(use.weight.values), shift))
        for constant in layer.added:
            value = np.array(constant.constant.values)
            if value.size != layer.size:
                raise InternalError(f"constant '{constant.constant.name}' has no number for each of {layer.size} experts")
            value.reshape(-1)[gone] = -np.inf
            patches.append(ConstantPatch((constant.node, constant.position), value))
    return patches


def cut_experts(walk: GraphWalk, layers: Mapping[ExpertLayer, Sequence[int]]) -> None:
    """Leaves only some experts in a graph, with their columns of the routers.

    Raises:
        CannotFollow: a number that depends on how many there are is written in a way that cannot be followed.
    """
    for layer, kept in layers.items():
        if not layer.taken:
            continue
        order = {id(n): i for i, n in enumerate(walk.model.graph.nodes)}
        found = silenced(walk, order, [one for one in layer.taken if one.expert not in (ALL, *kept)])
        if found.refused:
            raise CannotFollow(found.refused)
        leave_out_experts(walk, found)
    rewriter = Rewriter(walk)
    for layer, kept in layers.items():
        rewriter.cut(layer.cut(kept), chosen=True)
        renumber(rewriter, layer.taken, kept)


def rows_by_expert(term: NDArray[Any], numbers: NDArray[Any], size: int, rows: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Returns, of what experts add, the sum of the norms of the rows of each and how many rows it has, float64 [2, size].

    Args:
        term: [S, ..], one row for each token and expert of it; the rows may be on several axes.
        numbers: the expert of each row, [S].
        size: experts.
        rows: which rows count, bool [S]; None: all.
    """
    own = np.asarray(numbers).reshape(-1)
    norms = np.linalg.norm(np.asarray(term, np.float64).reshape(len(own), -1), axis=1)
    if rows is not None:
        own, norms = own[rows], norms[rows]
    return np.stack([np.bincount(own, norms, size)[:size], np.bincount(own, minlength=size)[:size].astype(np.float64)])


def mass_by_expert(scores: NDArray[Any], top_k: int, rows: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Returns the same of the gates alone, where what experts add lies inside an operator: softmax of the k largest scores.

    Args:
        scores: [.., E].
        top_k: experts of each token.
        rows: which tokens count.
    """
    flat = np.asarray(scores, np.float64).reshape(-1, scores.shape[-1])
    flat = flat if rows is None else flat[rows]
    gates = np.exp(flat - flat.max(axis=1, keepdims=True))
    gates /= gates.sum(axis=1, keepdims=True)
    chosen = np.argsort(-flat, axis=1)[:, :top_k]
    mass = np.take_along_axis(gates, chosen, 1)
    size = flat.shape[1]
    return np.stack([np.bincount(chosen.ravel(), mass.ravel(), size), np.bincount(chosen.ravel(), minlength=size)])
