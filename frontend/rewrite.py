"""Cutting indices out of a graph: slice the constants, follow with the sizes, add biases.

:class:`Rewriter` keeps, for each pruned leaf factor, which of its indices stay. :meth:`Rewriter.cut` slices every
constant that has the factor, then brings every number that must equal a size (see ``SizeUse``) in line: an element that
follows by itself, because it is computed from shapes, is left alone; another is replaced where it is written, and in a
copy where others read it too. Numbers computed from shapes that enter the data are frozen at what they were.

Nothing is written through a constant that other nodes read with another meaning: such a constant is cloned under a new
name first.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.graph_tensors import is_constant, like, present
from liar_opt.frontend.onnx_segments import names_read
from liar_opt.frontend.records import ConstantUse, ConsumerUse, SizeUse, StandIn
from liar_opt.frontend.rules.numbers import Array, resolve_reshape
from liar_opt.frontend.rules.operators import has, operator
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.size_sources import Mask, Place, Probe, counterparts, is_written, operands
from liar_opt.frontend.ties import Taken
from liar_opt.frontend.walk import GraphWalk
from liar_opt.runtime.errors import InternalError

Use = TypeVar("Use")


class Within(NamedTuple):
    """Indices that stay within each index of another leaf: channels of each head, as many in each.

    Attributes:
        outer: the leaf that counts the heads.
        kept: for each of its indices, as analysed, those of the leaf that is cut.
    """

    outer: int
    kept: Sequence[Sequence[int]]


Cut = Iterable[int] | Within
"""What stays of a leaf: the same indices everywhere, or others within each index of another leaf."""


class CannotFollow(Exception):
    """A size or a number in the graph depends on what is cut, in a way that cannot be rewritten."""


class _Numbers(NamedTuple):
    """What to write: (node, attribute, value), (node, input position, tensor) and (Split without sizes, its sizes)."""

    attributes: list[tuple[gs.Node, str, Any]]
    inputs: list[tuple[gs.Node, int, gs.Tensor]]
    splits: list[tuple[gs.Node, list[int]]]


def _by_leaf(uses: Iterable[Use], leaves_of: Callable[[Use], Iterable[int]]) -> dict[int, list[tuple[int, Use]]]:
    """Maps each leaf to the uses that have it, with their places in the order of all."""
    result: dict[int, list[tuple[int, Use]]] = defaultdict(list)
    for place, use in enumerate(uses):
        for leaf in leaves_of(use):
            result[leaf].append((place, use))
    return result


def _of_leaves(by_leaf: Mapping[int, Sequence[tuple[int, Use]]], leaves: Iterable[int]) -> list[Use]:
    """Returns the uses that have any of some leaves, each once, in order."""
    found = {place: use for leaf in leaves for place, use in by_leaf.get(leaf, ())}
    return [found[place] for place in sorted(found)]


class Rewriter:
    """Applies cuts to one analysed graph; the analysis stays as it was, ``kept`` says what has gone since."""

    def __init__(self, walk: GraphWalk) -> None:
        self.walk = walk
        self.algebra = walk.algebra
        self.graph: gs.Graph = walk.model.graph
        self._probes = [Probe(walk), *(Probe(other) for other in walk.others)]
        self._counterparts = [counterparts(walk, other) for other in walk.others]
        self._unlike: set[int] = set()  # leaves that are another dimension under other sizes of the inputs
        self._heads: dict[int, int] = {}
        self._sources: dict[int, frozenset[int]] = {}
        self._alive: list[gs.Tensor] = []  # what the ids in _sources belong to
        self._behind: dict[int, gs.Node] = {}  # of nodes that are gone
        self._names = _fresh_names(self.graph)
        # By leaf, so that a cut looks at its own uses and not at all of the graph; found on the graph as it was.
        self._size_uses = _by_leaf(walk.size_uses, self._size_leaves)
        self._value_uses = _by_leaf(walk.value_uses, lambda u: self._leaves_behind(u.node.inputs[u.position]))

    # -- sizes ------------------------------------------------------------------------------------------------------

    @property
    def kept(self) -> dict[int, Mask]:
        """Of leaves that were cut, which indices stay: [size], or [heads, size] where each head has its own."""
        return self._probes[0].kept

    @kept.setter
    def kept(self, kept: dict[int, Mask]) -> None:
        self._probes[0].kept = kept

    def size(self, factor: int) -> int:
        """Returns how many indices of ``factor`` are left."""
        return self._probes[0].size(factor)

    def mask(self, factor: int) -> Mask:
        """Returns bool [size]: the positions of ``factor``, as analysed, that are left."""
        result = np.ones(self.algebra.size(factor), bool)
        present_leaves = set(self.algebra.leaves(factor))
        for leaf, kept in self.kept.items():
            if leaf not in present_leaves:
                continue
            owners = self.algebra.owners(factor, leaf)
            inside = kept[np.maximum(owners, 0)] if kept.ndim == 1 else None
            if inside is None:
                heads = self.algebra.owners(factor, self._heads[leaf])
                if np.any((owners >= 0) & (heads < 0)):
                    raise InternalError(f"factor {leaf} is cut by heads, which are not beside it")
                inside = kept[np.maximum(heads, 0), np.maximum(owners, 0)]
            result &= (owners < 0) | inside
        return result

    # -- cutting ----------------------------------------------------------------------------------------------------

    def cut(self, cuts: Mapping[int, Cut], chosen: bool = False) -> None:
        """Removes from every constant what ``cuts`` does not keep, and brings sizes in line.

        Args:
            cuts: for each leaf factor the indices that stay.
            chosen: whether a choice runs over them, as over experts, which may lose indices though they are pinned.

        Raises:
            CannotFollow: a number that depends on a size is written in a way that cannot be followed; nothing changed.
            InternalError: a leaf is pinned, refined or was cut before.
        """
        wanted = {self.algebra.find(leaf) for leaf in cuts}
        touched = [u for u in self.walk.constant_uses if any(self._changed(f, wanted) for f in u.axes)]
        before = {id(u): self._masks(u) for u in touched}
        roots = self._mark(cuts, chosen)
        try:
            numbers = self._followed_sizes(roots)
            frozen = self._frozen_values(roots)
        except CannotFollow:
            self._unmark()
            raise
        self._slice_constants(touched, before)
        self._pick(roots)
        for tensor in (*self.graph.inputs, *self.graph.outputs):
            for axis, factor in enumerate(self.walk.axes.get(tensor.name) or ()):
                if self._changed(factor, roots):
                    self.walk.model.resize(tensor, axis, self.size(factor))
        for node, name, value in numbers.attributes:
            node.attrs[name] = value
        for node, sizes in numbers.splits:
            self._tell(node, sizes)
        for node, position, tensor in [*numbers.inputs, *frozen]:
            old = node.inputs[position]
            node.inputs[position] = tensor
            if is_constant(old) and not old.outputs and not self._handed_out(old):
                tensor.name = old.name

    def ends(self) -> dict[str, dict[int, NDArray[np.int64]]]:
        """Returns, for graph inputs and outputs that lost indices, the positions that are left, by name and axis."""
        return {
            name: {axis: np.flatnonzero(self.mask((self.walk.axes[name] or ())[axis])) for axis in axes}
            for name, axes in self.walk.model.resized.items()
        }

    def check(self, cuts: Mapping[int, Cut]) -> str | None:
        """Returns why ``cuts`` cannot be made, or None; the graph stays as it is, but for dead nodes."""
        roots = self._mark(cuts)
        try:
            self._followed_sizes(roots)
            self._frozen_values(roots)
        except CannotFollow as err:
            return str(err)
        finally:
            self._unmark()
        return None

    def _mark(self, cuts: Mapping[int, Cut], chosen: bool = False) -> set[int]:
        roots = {self.algebra.find(leaf): kept for leaf, kept in cuts.items()}
        for root, kept in roots.items():
            firm = self.algebra.firm(root) and not chosen
            if firm or self.algebra.refinement(root) is not None or root in self.kept:
                raise InternalError(f"factor {root} cannot be cut: {self.algebra.pinned(root) or 'refined or cut before'}")
            size = self.algebra.size(root)
            mask: Mask
            if isinstance(kept, Within):
                outer = self.algebra.find(kept.outer)
                mask = np.zeros((self.algebra.size(outer), size), bool)
                for row, indices in zip(mask, kept.kept, strict=True):
                    row[list(indices)] = True
                if len(set(mask.sum(axis=1).tolist())) != 1:
                    raise InternalError(f"factor {root} keeps different numbers within {outer}")
                self._heads[root] = outer
            else:
                mask = np.zeros(size, bool)
                mask[list(kept)] = True
            self.kept[root] = mask
        self._probes[0].cutting = set(roots)
        for probe, counterpart in zip(self._probes[1:], self._counterparts, strict=True):
            found = {root: counterpart(root) for root in roots}
            self._unlike |= {root for root, leaf in found.items() if leaf is None}
            probe.cutting = {leaf for leaf in found.values() if leaf is not None}
            probe.kept |= {leaf: self.kept[root] for root, leaf in found.items() if leaf is not None}
        return set(roots)

    def _unmark(self) -> None:
        """Takes back what :meth:`_mark` noted last."""
        self._unlike -= self._probes[0].cutting
        for probe in self._probes:
            for leaf in probe.cutting:
                probe.kept.pop(leaf, None)

    def _masks(self, use: ConstantUse) -> list[Mask]:
        """Returns which positions of each axis are left; [outer, size] where each index of the first axis has its own."""
        return [self._apart(use, axis) if self._is_apart(use, axis) else self.mask(f) for axis, f in enumerate(use.axes)]

    def _is_apart(self, use: ConstantUse, axis: int) -> bool:
        """Whether an axis holds a leaf that is cut within each index of the constant's first axis."""
        outer, leaves = self.algebra.find(use.axes[0]), self.algebra.leaves(use.axes[axis])
        cut = [leaf for leaf in leaves if leaf in self.kept]
        return axis > 0 and outer not in leaves and any(self._heads.get(leaf) == outer for leaf in cut)

    def _apart(self, use: ConstantUse, axis: int) -> Mask:
        """Returns bool [outer, size]: what is left of an axis within each index of the first one."""
        leaf = self.algebra.leaves(use.axes[axis])[0]
        return self.kept[leaf][:, self.algebra.owners(use.axes[axis], leaf)]

    def _changed(self, factor: int, roots: set[int]) -> bool:
        return not roots.isdisjoint(self.algebra.leaves(factor))

    def _slice_constants(self, touched: Sequence[ConstantUse], before: dict[int, list[Mask]]) -> None:
        pending: dict[int, list[tuple[gs.Node, int, tuple[bytes, ...], list[Mask]]]] = defaultdict(list)
        for use in touched:
            masks = [_within(new, old) for new, old in zip(self._masks(use), before[id(use)], strict=True)]
            constant = use.node.inputs[use.position]
            if list(constant.shape) != [m.shape[-1] for m in masks]:
                raise InternalError(
                    f"constant '{constant.name}' is {list(constant.shape)}, expected {[m.shape[-1] for m in masks]}"
                )
            pending[id(constant)].append((use.node, use.position, tuple(m.tobytes() for m in masks), masks))
        for entries in pending.values():
            by_cut: dict[tuple[bytes, ...], list[tuple[gs.Node, int]]] = defaultdict(list)
            for node, position, key, _ in entries:
                by_cut[key].append((node, position))
            masks_of = {key: masks for _, _, key, masks in entries}
            for key, places in by_cut.items():
                value = places[0][0].inputs[places[0][1]].values
                for axis, mask in enumerate(masks_of[key]):
                    if not mask.all():
                        value = _compressed(value, mask, axis)
                self.set_constant(places, np.ascontiguousarray(value))

    def set_constant(self, places: Sequence[tuple[gs.Node, int]], value: NDArray[Any]) -> gs.Constant:
        """Gives the constant at ``places`` (node, input position) a new value, under its name where no one else reads it.

        Returns:
            The constant that is read there now.
        """
        node, position = places[0]
        old = node.inputs[position]
        readers = sum(t is old for n in {id(n): n for n in old.outputs}.values() for t in n.inputs)
        shared = readers > len(set((id(n), p) for n, p in places)) or self._handed_out(old)
        new = like(old, next(self._names) if shared else old.name, value)
        for n, p in places:
            n.inputs[p] = new
        return new

    def _pick(self, roots: set[int]) -> None:
        """Has what reads a table of several layers take the indices that are left to its own."""
        for pick in self.walk.picks:
            if not self._changed(pick.factor, roots):
                continue
            table, size = pick.node.inputs[pick.position], self.algebra.size(pick.factor)
            axes = self.walk.input_axes(pick.node, pick.position)
            assert axes is not None
            apart = self.algebra.size(axes[pick.axis]) != size
            taken = Taken(pick.axis, len(axes), np.flatnonzero(self.mask(pick.factor)), size, apart)
            nodes = self.walk.model.pick(table, taken, self._names)
            index = self._index(pick.node)
            self.graph.nodes[index:index] = nodes
            pick.node.inputs[pick.position] = nodes[-1].outputs[0]
            for probe in self._probes:
                probe.walk.axes[nodes[-1].outputs[0].name] = probe.walk.input_axes(pick.node, pick.position)

    def _handed_out(self, tensor: gs.Tensor) -> bool:
        """Returns whether a tensor is an output of the graph."""
        return any(tensor is t for t in self.graph.outputs)

    # -- numbers that follow sizes ----------------------------------------------------------------------------------

    def _followed_sizes(self, roots: set[int]) -> "_Numbers":
        """Returns what must be written so that every number equals its size again; writes nothing itself."""
        if not self._unlike.isdisjoint(roots):
            raise CannotFollow("how it is laid out depends on the sizes of the graph's inputs")
        made: dict[tuple[object, ...], gs.Tensor] = {}
        readers = [_Reader(probe) for probe in self._probes]
        result = _Numbers([], [], [])
        wanted: dict[tuple[int, str, int | str], list[tuple[SizeUse, int]]] = defaultdict(list)
        for use in _of_leaves(self._size_uses, roots):
            kind, place, _ = use.where
            depends = kind == "input" and not roots.isdisjoint(self._leaves_behind(use.node.inputs[place]))
            if depends or any(self._changed(f, roots) for f in (*use.factors, *use.watched)):
                wanted[id(use.node), kind, place].append((use, sum(self.size(f) for f in use.factors)))
        for (_, kind, place), entries in wanted.items():
            node = entries[0][0].node
            if kind == "split":
                parts = [u for u in self.walk.size_uses if u.node is node and u.where[0] == kind]
                sizes = [sum(self.size(f) for f in u.factors) for u in parts]
                if len(set(sizes)) > 1 or self._told(node):
                    if any(u.dynamic for u in parts):
                        raise CannotFollow(f"parts of node '{node.name}' would differ, whose sizes depend on the input's")
                    result.splits.append((node, sizes))
                continue
            if kind == "attribute":
                value: Any = node.attrs[place]
                for use, size in entries:
                    element = use.where[2]
                    value = size if element < 0 else [size if i == element else v for i, v in enumerate(value)]
                result.attributes.append((node, str(place), value))
                continue
            assert isinstance(place, int)
            followed = self._followed(node, place, [reader.read(node, place) for reader in readers], made)
            if followed is not None:
                result.inputs.append((node, place, followed))
        return result

    def _followed(
        self, node: gs.Node, place: int, read: Sequence["_Read"], made: dict[tuple[object, ...], gs.Tensor]
    ) -> gs.Tensor | None:
        """Returns the shape tensor that a node must read now, or None where the one that it reads has followed."""
        tensor = node.inputs[place]
        if len({r.now.size for r in read}) != 1:
            raise CannotFollow(f"how many sizes node '{node.name}' reads depends on the graph's inputs")
        elements = set(range(read[0].now.size))
        wanted = {e: tuple(int(r.wanted[e]) for r in read) for e in elements}
        static = {e for e in elements if len(set(wanted[e])) == 1}
        implicit = set.intersection(*(r.implicit for r in read))
        wrong = {e for e in elements - implicit if any(r.now[e] != r.wanted[e] for r in read)}
        if not wrong and all(r.fits(r.now) for r in read):
            return None
        # Where a 0 or a -1 that stays would say another size than it did, all that can be written is.
        for fixed in (wrong & static, static) if node.op == "Reshape" else (wrong & static,):
            changes, free = {e: wanted[e][0] for e in fixed}, implicit - fixed
            solved = {e: wanted[e] for e in wrong - static}
            overrides = operands(self._probes, tensor, solved) if solved else {}
            left = [int(r.now[e]) for r in read for e in elements - fixed - set(solved)]
            if overrides is None and node.op == "Reshape" and len(solved) == 1 and -1 not in left:
                # What is left of all elements is what it must be, if the others are right.
                overrides, free = {}, free | set(solved)
                changes |= dict.fromkeys(solved, -1)
            if overrides is None:
                continue
            follows = self._written(tensor, changes, overrides, node, made)
            found = [p.evaluate(follows, {}) for p in self._probes]
            if all(v is not None and r.right(v.reshape(-1), free) for v, r in zip(found, read, strict=True)):
                return follows
        raise CannotFollow(f"a size that node '{node.name}' reads is computed in a way that cannot be followed")

    def _written(
        self,
        tensor: gs.Tensor,
        changes: dict[int, int],
        overrides: dict[Place, Array],
        before: gs.Node,
        made: dict[tuple[object, ...], gs.Tensor],
    ) -> gs.Tensor:
        """Returns a copy of a shape tensor with operands of its arithmetic replaced, then elements by constants."""
        if overrides:
            key = ("recomputed", id(tensor), *sorted((k, v.tobytes()) for k, v in overrides.items()))
            if key not in made:
                made[key] = self._copied(tensor, overrides, before, {})
            tensor = made[key]
        return self._patched(tensor, changes, before, made) if changes else tensor

    def _told(self, node: gs.Node) -> bool:
        return "split" in node.attrs or (len(node.inputs) > 1 and present(node.inputs[1]))

    def _tell(self, node: gs.Node, sizes: list[int]) -> None:
        """Gives a Split that divides by itself the sizes of its parts."""
        node.attrs.pop("num_outputs", None)
        if self.walk.model.opset < 13:
            node.attrs["split"] = sizes
            return
        told = gs.Constant(next(self._names), np.asarray(sizes, np.int64))
        if len(node.inputs) > 1:
            node.inputs[1] = told
        else:
            node.inputs.append(told)

    def _copied(
        self, tensor: gs.Tensor, overrides: dict[tuple[int, int], Array], before: gs.Node, made: dict[int, gs.Tensor]
    ) -> gs.Tensor:
        """Returns ``tensor`` recomputed by copies of the nodes behind it, with constants replaced; others are shared."""
        if is_constant(tensor) or not tensor.inputs or has(tensor.inputs[0], Trait.SHAPES):
            return tensor
        if id(tensor) in made:
            return made[id(tensor)]
        node = tensor.inputs[0]
        inputs: list[gs.Tensor] = []
        for position, source in enumerate(node.inputs):
            if (id(node), position) in overrides:
                inputs.append(gs.Constant(next(self._names), overrides[id(node), position]))
            else:
                inputs.append(self._copied(source, overrides, before, made))
        if all(a is b for a, b in zip(inputs, node.inputs, strict=True)) or len(node.outputs) != 1:
            made[id(tensor)] = tensor
        else:
            made[id(tensor)] = self._insert(node.op, inputs, dict(node.attrs), tensor.dtype, before)
        return made[id(tensor)]

    def _evaluate(self, tensor: gs.Tensor, known: dict[int, Array | None]) -> Array | None:
        """Returns the value of a tensor computed from shapes, under the sizes that are left."""
        return self._probes[0].evaluate(tensor, known)

    def _patched(
        self, tensor: gs.Tensor, changes: dict[int, int], before: gs.Node, made: dict[tuple[object, ...], gs.Tensor]
    ) -> gs.Tensor:
        """Returns a tensor like ``tensor`` with some elements replaced; what produces it is copied, never changed."""
        key = (id(tensor), tuple(sorted(changes.items())))
        if key in made:
            return made[key]
        result: gs.Tensor
        producer = tensor.inputs[0] if tensor.inputs and not is_constant(tensor) else None
        if is_constant(tensor):
            value = np.array(tensor.values)
            for element, size in changes.items():
                value.reshape(-1)[element] = size
            result = gs.Constant(next(self._names), value)
        elif producer is not None and producer.op == "Concat" and (pieces := self._pieces(producer)) is not None:
            inputs = list(producer.inputs)
            for index, (start, stop) in enumerate(pieces):
                inner = {e - start: s for e, s in changes.items() if start <= e < stop}
                if inner and stop - start == 1:
                    inputs[index] = self._single(inputs[index], inner[0], made)
                elif inner:
                    inputs[index] = self._patched(inputs[index], inner, before, made)
            result = self._insert("Concat", inputs, {"axis": 0}, tensor.dtype, before)
        else:
            whole = self._evaluate(tensor, {})
            assert whole is not None  # it was read before
            rank, dtype = whole.size, whole.dtype
            inputs, start = [], 0
            for element, size in [*sorted(changes.items()), (rank, 0)]:
                if element > start:
                    bounds = [gs.Constant(next(self._names), np.asarray([v], np.int64)) for v in (start, element, 0)]
                    inputs.append(self._insert("Slice", [tensor, *bounds], {}, dtype, before))
                if element < rank:
                    inputs.append(gs.Constant(next(self._names), np.asarray([size], dtype)))
                start = element + 1
            result = inputs[0] if len(inputs) == 1 else self._insert("Concat", inputs, {"axis": 0}, dtype, before)
        made[key] = result
        return result

    def _single(self, tensor: gs.Tensor, size: int, made: dict[tuple[object, ...], gs.Tensor]) -> gs.Constant:
        key = ("single", id(tensor), size)
        if key not in made:
            value = self._evaluate(tensor, {})
            made[key] = gs.Constant(next(self._names), np.asarray([size], np.int64 if value is None else value.dtype))
        return made[key]

    def _pieces(self, concat: gs.Node) -> list[tuple[int, int]] | None:
        bounds, start = [], 0
        for tensor in concat.inputs:
            value = self._evaluate(tensor, {})
            if value is None or value.ndim != 1:
                return None
            bounds.append((start, start + value.size))
            start += value.size
        return bounds

    def _insert(self, op: str, inputs: list[gs.Tensor], attrs: dict[str, Any], dtype: Any, before: gs.Node) -> gs.Variable:
        output = gs.Variable(next(self._names), dtype or np.dtype(np.int64))
        node = gs.Node(op, f"{op}_{output.name}", attrs, inputs, [output])
        self.graph.nodes.insert(self._index(before), node)
        value = self._evaluate(output, {})
        if value is not None:
            self.walk.values[output.name] = value
        return output

    def _index(self, node: gs.Node) -> int:
        return next(i for i, n in enumerate(self.graph.nodes) if n is node)

    def _size_leaves(self, use: SizeUse) -> set[int]:
        kind, place, _ = use.where
        behind = self._leaves_behind(use.node.inputs[place]) if kind == "input" else frozenset()
        return {leaf for f in (*use.factors, *use.watched) for leaf in self.algebra.leaves(f)} | behind

    def _leaves_behind(self, tensor: gs.Tensor) -> frozenset[int]:
        """Returns the leaf factors whose sizes a tensor computed from shapes may depend on."""
        if is_constant(tensor) or not tensor.inputs:
            return frozenset()
        if id(tensor) not in self._sources:
            node = tensor.inputs[0]
            if has(node, Trait.SHAPES):
                axes = self.walk.axes.get(node.inputs[0].name) or ()
                found = frozenset(leaf for f in axes for leaf in self.algebra.leaves(f))
            else:
                found = frozenset().union(*(self._leaves_behind(t) for t in node.inputs))
            self._sources[id(tensor)] = found
            self._alive.append(tensor)
        return self._sources[id(tensor)]

    def _frozen_values(self, roots: set[int]) -> list[tuple[gs.Node, int, gs.Tensor]]:
        """Returns the inputs whose value, computed from shapes, would change: they keep what they were."""
        known: dict[int, Array | None] = {}
        result: list[tuple[gs.Node, int, gs.Tensor]] = []
        for use in _of_leaves(self._value_uses, roots):
            tensor = use.node.inputs[use.position]
            if roots.isdisjoint(self._leaves_behind(tensor)):
                continue
            value = self._evaluate(tensor, known)
            if value is not None and np.array_equal(value, use.value):
                continue
            if use.dynamic:
                raise CannotFollow(f"a number that node '{use.node.name}' reads depends on this size and on the input's")
            result.append((use.node, use.position, gs.Constant(next(self._names), np.asarray(use.value))))
        self._require_told_alike(roots, known)
        return result

    def _require_told_alike(self, roots: set[int], known: dict[int, Array | None]) -> None:
        """Checks that what the graph hands out of its shapes stays what it was.

        Args:
            roots: what is being cut.
            known: values of tensors under the sizes that are left, found before.

        Raises:
            CannotFollow: an output says another number then.
        """
        for tensor in self.graph.outputs:
            before = self.walk.values.get(tensor.name)
            if before is None or roots.isdisjoint(self._leaves_behind(tensor)):
                continue
            after = self._evaluate(tensor, known)
            if after is None or not np.array_equal(after, before):
                raise CannotFollow(f"graph output '{tensor.name}' says this size")

    # -- what stands in for a tensor --------------------------------------------------------------------------------

    def replace(self, stand_in: StandIn) -> None:
        """Has a map of another tensor, or a constant, stand in for a tensor; nodes that only the old one needed go.

        A constant is added as it is where a reader spreads it by itself. Names of outputs stay, and what another output
        needs (a cache) is still computed.

        Raises:
            CannotFollow: it is one of several tensors that a node makes, or the source is not made before it.
        """
        graph, (target, source) = self.graph, (self._tensor(stand_in.target), self._tensor(stand_in.source))
        (producer,) = target.inputs
        if sum(present(t) and (bool(t.outputs) or self._handed_out(t)) for t in producer.outputs) > 1:
            raise CannotFollow(f"'{target.name}' is one of several tensors that node '{producer.name}' makes")
        if self.walk.model.traced and producer.outputs[0].name != target.name.partition(".")[0]:
            raise CannotFollow(f"'{target.name}' is one of several tensors that node '{producer.name}' may make")
        place = self._index(producer)
        if source.inputs and self._index(source.inputs[0]) >= place:
            raise CannotFollow(f"'{source.name}' is not made before '{target.name}'")
        settled, taken = self.walk.model.settled, set(graph.tensors())
        name = next(n for n in (f"{target.name}_stand_in{k or ''}" for k in itertools.count()) if f"{n}_bias" not in taken)
        producer.outputs.clear()
        bias = settled(np.ascontiguousarray(stand_in.bias))
        if stand_in.matrix is not None:
            made = self.walk.model.mapped(name, source, settled(stand_in.matrix), bias, target)
        else:
            constant = gs.Constant(f"{name}_bias", bias)
            self.walk.model.adopt(constant)
            for reader in [r for r in target.outputs if self._spreads(r, target)]:
                reader.inputs[next(i for i, t in enumerate(reader.inputs) if t is target)] = constant
            kept = bool(target.outputs) or self._handed_out(target)
            made = self.walk.model.spread(name, source, constant, target) if kept else []
        graph.nodes[place:place] = made
        for probe in self._probes:
            probe.walk.axes |= {
                t.name: probe.walk.axes.get(target.name) for n in made for t in n.outputs if n.op == "MatMul"
            }
        self._drop_dead()

    def _tensor(self, name: str) -> gs.Variable:
        known = next((t for t in self.graph.inputs if t.name == name), None)
        found = (t for node in self.graph.nodes for t in node.outputs if t.name == name)
        tensor = known if known is not None else next(found, None)
        if tensor is None:
            raise InternalError(f"tensor '{name}' is not in the graph")
        return tensor

    def _spreads(self, reader: gs.Node, target: gs.Tensor) -> bool:
        """Returns whether a node adds a tensor to one that has its shape, so that a constant of its last axis will do."""
        if not has(reader, Trait.ADDS) or len(reader.inputs) != 2 or sum(t is target for t in reader.inputs) != 1:
            return False
        other = next(t for t in reader.inputs if t is not target)
        shapes = [self.walk.axes.get(t.name) for t in (target, other)]
        return not is_constant(other) and None not in shapes and len({tuple(self.walk.shape(s or ())) for s in shapes}) == 1

    def now(self, node: gs.Node) -> gs.Node:
        """Returns a node, or the first one behind it in the graph where it is gone."""
        while id(node) in self._behind:
            node = self._behind[id(node)]
        return node

    def _drop_dead(self) -> None:
        """Takes out the nodes that no output needs, and what was recorded of them."""
        needed, alive = {t.name for t in self.graph.outputs}, []
        for node in reversed(self.graph.nodes):
            if any(present(t) and t.name in needed for t in node.outputs):
                alive.append(node)
                needed |= names_read(node)
        keep = set(map(id, alive))
        gone = [n for n in self.graph.nodes if id(n) not in keep]
        behind = None
        for node in reversed(self.graph.nodes):
            if id(node) in keep:
                behind = node
            else:
                self._behind[id(node)] = behind
        self.graph.nodes[:] = alive[::-1]
        for probe in self._probes:
            probe.walk.forget(gone)
        self._size_uses = _by_leaf(self.walk.size_uses, self._size_leaves)
        self._value_uses = _by_leaf(self.walk.value_uses, lambda u: self._leaves_behind(u.node.inputs[u.position]))
        for node in gone:
            node.inputs.clear()
            node.outputs.clear()

    # -- biases -----------------------------------------------------------------------------------------------------

    def add_bias(self, uses: Sequence[ConsumerUse], delta: NDArray[np.float64]) -> None:
        """Adds ``delta`` [m] to the product of every use of one consumer: into a constant that is added already, or new.

        Args:
            uses: contractions that share a weight; a bias vector they share, under one scale, stays shared.
            delta: what to add to x W; each use multiplies it by its own scale.
        """
        shared: dict[tuple[int, float, int], list[tuple[gs.Node, int]]] = defaultdict(list)
        for use in uses:
            place = self._bias_place(use)
            if place is None:
                self._insert_bias(use, delta * use.scale)
            else:
                node, position, scale = place
                axis = -1 if use.bias[0] == "input" else use.output_axis
                shared[id(node.inputs[position]), use.scale / scale, axis].append((node, position))
        for (_, factor, axis), places in shared.items():
            node, position = places[0]
            old = np.asarray(node.inputs[position].values)
            along = _laid_along(delta, axis)
            value = (old.astype(np.float64) + along * factor).astype(old.dtype)
            constant = self.set_constant(places, value)
            if old.ndim < 1 or old.size < delta.size:
                for use in uses:  # a scalar has become a vector
                    self._follow(use.node, use.bias[1], constant, use)

    def has_bias(self, use: ConsumerUse) -> bool:
        """Returns whether a constant bias is added behind a contraction already, and may change."""
        return self._bias_place(use) is not None

    def _bias_place(self, use: ConsumerUse) -> tuple[gs.Node, int, float] | None:
        """Returns (node, input position, scale) of the constant bias behind a contraction, or None."""
        kind, position = use.bias
        if kind == "input":
            if len(use.node.inputs) > position and present(use.node.inputs[position]):
                constant = is_constant(use.node.inputs[position]) and not self._handed_out(use.node.inputs[position])
                return (use.node, position, use.bias_scale) if constant and use.bias_scale else None
            return None
        output, axis = use.node.outputs[0], use.output_axis
        if len(output.outputs) != 1 or any(output is t for t in self.graph.outputs):
            return None
        reader = output.outputs[0]
        if axis != -1 and reader.op != "Add":
            return None
        width = use.weight.shape[1 - use.weight_axis]
        for candidate in operator(reader.domain, reader.op).bias_inputs:
            added = reader.inputs[candidate] if len(reader.inputs) > candidate else None
            if added is not None and is_constant(added) and not self._handed_out(added):
                shape = list(reader.inputs[candidate].shape)
                if len(shape) >= -axis and shape[axis] == width and int(np.prod(shape)) == width:
                    return reader, candidate, 1.0
        return None

    def _open_place(self, use: ConsumerUse) -> tuple[gs.Node, int] | None:
        """Returns (node, input position) of a bias that the only reader of a contraction can take and has none, or None."""
        output = use.node.outputs[0]
        if use.output_axis != -1 or len(output.outputs) != 1 or any(output is t for t in self.graph.outputs):
            return None
        reader = output.outputs[0]
        if not has(reader, Trait.SKIPS):
            return None
        (position,) = operator(reader.domain, reader.op).bias_inputs
        if len(reader.inputs) > position and present(reader.inputs[position]):
            return None
        return (reader, position) if any(output is t for t in reader.inputs[:2]) else None

    def _insert_bias(self, use: ConsumerUse, delta: NDArray[np.float64]) -> None:
        node = use.node
        dtype = node.inputs[use.weight_position].dtype
        kind, position = use.bias
        name = f"{node.inputs[use.weight_position].name}_bias"
        taken = name in self.graph.tensors()
        constant = gs.Constant(next(self._names) if taken else name, delta.astype(dtype))
        if kind == "input" and not (len(node.inputs) > position and present(node.inputs[position])):
            constant.values = (delta / (use.bias_scale or 1.0)).astype(dtype)
            if not use.bias_scale:
                node.attrs["beta"] = 1.0
            _set_input(node, position, constant)
            self._follow(node, position, constant, use)
            return
        open_place = self._open_place(use)
        if open_place is not None:
            _set_input(*open_place, constant)
            self._follow(*open_place, constant, use)
            return
        output = node.outputs[0]
        product = gs.Variable(next(self._names), output.dtype, output.shape)
        node.outputs[0] = product
        constant.values = _laid_along(constant.values, use.output_axis)
        taken_names = {n.name for n in self.graph.nodes}
        label = next(n for n in (f"{node.name}_bias{k or ''}" for k in itertools.count()) if n not in taken_names)
        addition = gs.Node("Add", label, {}, [product, constant], [output])
        self.graph.nodes.insert(self._index(node) + 1, addition)
        for probe in self._probes:
            probe.walk.axes[product.name] = probe.walk.axes.get(output.name)
        self._follow(addition, 1, constant, use)

    def _follow(self, node: gs.Node, position: int, constant: gs.Constant, use: ConsumerUse) -> None:
        """Has later cuts slice a new bias: the outputs of one group's consumer may be the channels of another group."""
        axes = self.walk.input_axes(use.node, use.weight_position)
        assert axes is not None
        rest = (self.algebra.fresh(1),) * (len(constant.shape) - 1)
        width = (axes[1 - use.weight_axis],)
        known = [u for u in self.walk.constant_uses if u.node is node and u.position == position]
        for record in known:
            self.walk.constant_uses.remove(record)
        shape = (*rest, *width) if use.bias[0] == "input" else (*width, *rest)
        self.walk.constant_uses.append(ConstantUse(node, position, constant, shape))


class _Read(NamedTuple):
    """The elements of a shape tensor under one probe.

    Attributes:
        now: what they are, int [n].
        wanted: what they must be; for those that no cut changes, what they were.
        implicit: those that say "as it was" (0) or "whatever is left" (-1): they are written so in the graph.
        data: for a Reshape, the sizes of what it lays out anew.
        zeros: whether a 0 is a size for it.
    """

    now: Array
    wanted: Array
    implicit: set[int]
    data: list[int] | None
    zeros: bool

    def fits(self, numbers: Array) -> bool:
        """Returns whether a Reshape to these numbers gives what is wanted."""
        return self.data is None or resolve_reshape(numbers.tolist(), self.data, self.zeros) == self.wanted.tolist()

    def right(self, numbers: Array, free: set[int]) -> bool:
        """Returns whether numbers are what is wanted, but for those that are ``free`` to be so implicitly."""
        same = numbers.size == self.wanted.size and all(numbers[e] == n or e in free for e, n in enumerate(self.wanted))
        return bool(same) and self.fits(numbers)


class _Reader:
    """Reads shape tensors under one probe, before and after the cut that is being made."""

    def __init__(self, probe: Probe) -> None:
        self.probe, self.before = probe, probe.before()
        self._known: tuple[dict[int, Array | None], dict[int, Array | None]] = ({}, {})

    def read(self, node: gs.Node, place: int) -> _Read:
        """Returns the elements of the shape tensor at an input of a node.

        Raises:
            CannotFollow: what they are or must be is not known.
        """
        tensor, probe, reshape = node.inputs[place], self.probe, node.op == "Reshape" and place == 1
        then, now = (p.evaluate(tensor, k) for p, k in zip((self.before, probe), self._known, strict=True))
        data = probe.sizes(node, 0) if reshape else None
        uses = probe.uses(node, place)
        if then is None or now is None or then.shape != now.shape or (reshape and (data is None or len(uses) != now.size)):
            raise CannotFollow(f"the sizes that node '{node.name}' reads cannot be followed")
        wanted = np.array(then.reshape(-1))
        for element, use in uses.items():
            if reshape or probe.touched(use):
                wanted[element] = sum(probe.size(f) for f in use.factors)
        zeros = bool(node.attrs.get("allowzero", 0))
        said = {e for e, n in enumerate(then.reshape(-1)) if n == -1 or (n == 0 and not zeros)} if reshape else set()
        return _Read(now.reshape(-1), wanted, {e for e in said if is_written(probe, tensor, e)}, data, zeros)


def _within(new: Mask, old: Mask) -> Mask:
    """Returns which of the positions that were left before are left now; [outer, left] where each index has its own."""
    if new.ndim == 1:
        return new[old]
    if old.ndim == 1:
        return new if old.all() else new[:, old]
    return np.ones((len(old), int(old[0].sum())), bool)  # a factor can be cut per head only once, so nothing changes here


def _compressed(value: NDArray[Any], mask: Mask, axis: int) -> NDArray[Any]:
    """Returns the positions of an axis that are left, of each index of the first axis its own."""
    if mask.ndim == 1:
        return np.compress(mask, value, axis)
    return np.stack([np.compress(own, part, axis - 1) for own, part in zip(mask, value, strict=True)])


def _laid_along(vector: NDArray[Any], axis: int) -> NDArray[Any]:
    """Returns a vector [m] as a tensor that has it along ``axis``, counted from the end."""
    return vector.reshape(-1, *([1] * (-1 - axis)))


def _set_input(node: gs.Node, position: int, tensor: gs.Tensor) -> None:
    """Gives a node an optional input; those before it that are absent stay so."""
    while len(node.inputs) <= position:
        node.inputs.append(gs.Variable.empty())
    node.inputs[position] = tensor


def _fresh_names(graph: gs.Graph) -> Iterator[str]:
    taken = set(graph.tensors())
    return (name for name in (f"liar_opt_{k}" for k in itertools.count()) if name not in taken)
