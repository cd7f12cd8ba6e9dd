"""The axis algebra: which axes of which tensors are the same dimension, and how they are laid out.

Every axis of every tensor is a *factor*: a dimension with a size. A factor may be *refined*, by what the operators
show of it, into a product of factors (outermost first: ``hidden = heads x head_dim``) or a concatenation of factors
(``qkv = q + k + v``). Factors that an operator forces to be equal are unified (union-find); refinements of unified
factors are aligned with each other, which refines them further. A factor that must keep its full extent is *pinned*,
with the reason; a refined factor passes its pin on to its parts.

What is left, a leaf factor without a pin, can lose indices: :meth:`AxisAlgebra.owners` maps every position of any axis
to the index of the leaf that it belongs to, whatever the layout (strided, interleaved, packed).

The algebra knows nothing of graphs. Being unsure (sizes that do not divide, a layout that is not a product or a
concatenation) always pins, so that doubt costs sparsity and never correctness.

A pin that is not *firm* says only that the dimension is contracted between two activations: indices may still go on both
sides together, if the basis is changed so that the product hardly notices (`liar_opt.passes.groups.QUERY_KEY`).
"""

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import InternalError

Factor = int
Axes = tuple[Factor, ...]
Kind = Literal["product", "concat"]


class Refinement(NamedTuple):
    """How a factor is made of others: ``kind`` and its ``parts``, outermost (or first) first."""

    kind: Kind
    parts: tuple[Factor, ...]


WIDEST = 1 << 25
"""Elements of a product of dimensions beyond which its parts are left alone."""
MOST_PARTS = 1 << 16
"""Leaves of a concatenation beyond which they are left alone: what is joined with itself has twice as many each time."""
DEEPEST = 64
"""Refinements within each other beyond which a concatenation of concatenations is written as one."""
MOST_CUTS = 200
"""Pieces of pieces that are cut again; what goes through them goes one deeper for each."""


class AxisAlgebra:
    """Union-find over factors, with refinements and pins."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._pin: list[str | None] = []
        self._firm: list[bool] = []
        self._refinement: list[Refinement | None] = []
        self._depth: list[int] = []  # refinements that a factor was made of, one within another
        self._cuts: list[int] = []  # cuts that a factor is a piece of, one within another
        # What was asked of the present state; whatever changes a class or a refinement clears both.
        self._leaves: dict[Factor, list[Factor]] = {}
        self._owners: dict[tuple[Factor, Factor], NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._parent)

    # -- making factors ---------------------------------------------------------------------------------------------

    def fresh(self, size: int, pin: str | None = None, firm: bool = True) -> Factor:
        """Returns a new factor of ``size``, pinned at once where a reason is given."""
        self._parent.append(len(self._parent))
        self._size.append(int(size))
        self._pin.append(pin)
        self._firm.append(pin is not None and firm)
        self._refinement.append(None)
        self._depth.append(0)
        self._cuts.append(0)
        return len(self._parent) - 1

    def merge(self, factors: Sequence[Factor]) -> Factor:
        """Returns the product of ``factors`` (outermost first); parts of size one vanish.

        What is longer than `WIDEST` is pinned: whose index each position is would be a list as long.
        """
        parts = tuple(f for f in factors if self.size(f) != 1)
        if len(parts) == 1:
            return parts[0]
        merged = self.fresh(math.prod(self.size(f) for f in parts))
        if self.size(merged) > WIDEST:
            self._pin_all([merged, *parts], f"an axis of {self.size(merged):,}, longer than {WIDEST:,}")
        if parts:
            self._refine(merged, "product", parts)
        return merged

    def join(self, factors: Sequence[Factor]) -> Factor:
        """Returns the concatenation of ``factors``; empty parts vanish.

        What has more than `MOST_PARTS` leaves is pinned, and is no concatenation any more.
        """
        parts = tuple(f for f in factors if self.size(f) != 0)
        if len(parts) == 1:
            return parts[0]
        joined = self.fresh(sum(self.size(f) for f in parts))
        if sum(max(1, len(self.leaves(f))) for f in parts) > MOST_PARTS:
            self._pin_all([joined, *parts], f"a concatenation of more than {MOST_PARTS:,} parts")
        elif parts:
            if max(self._depth[self.find(f)] for f in parts) >= DEEPEST:
                parts = tuple(piece for f in parts for piece in self._flat(f, "concat"))
            self._refine(joined, "concat", parts)
        return joined

    def _refine(self, factor: Factor, kind: Kind, parts: tuple[Factor, ...]) -> None:
        self._refinement[factor] = Refinement(kind, parts)
        self._depth[factor] = 1 + max(self._depth[self.find(f)] for f in parts)

    def split(self, factor: Factor, sizes: Sequence[int]) -> list[Factor]:
        """Refines ``factor`` into a product of ``sizes`` (outermost first) and returns its parts.

        Where the known refinement does not agree with the sizes everything involved is pinned.
        """
        parts = [self.fresh(s) for s in sizes]
        if math.prod(sizes) != self.size(factor):
            self._pin_all([factor, *parts], f"split of {self.size(factor)} into {tuple(sizes)}")
            return parts
        self.unify(factor, self.merge(parts))
        return parts

    def cut(self, factor: Factor, sizes: Sequence[int]) -> list[Factor]:
        """Refines ``factor`` into a concatenation of ``sizes`` and returns its parts.

        A piece of a piece, and so on more than `MOST_CUTS` times, is pinned instead.
        """
        parts = [self.fresh(s) for s in sizes]
        if sum(sizes) != self.size(factor):
            self._pin_all([factor, *parts], f"cut of {self.size(factor)} into {tuple(sizes)}")
            return parts
        cuts = self._cuts[self.find(factor)] + 1
        if cuts > MOST_CUTS:
            self._pin_all([factor, *parts], f"cut into pieces of pieces, more than {MOST_CUTS} times")
            return parts
        for part in parts:
            self._cuts[part] = cuts
        self.unify(factor, self.join(parts))
        return parts

    def reshape(self, axes: Sequence[Factor], sizes: Sequence[int]) -> list[Factor]:
        """Returns the axes of a tensor whose ``axes`` are written with other ``sizes``, elements in the same order.

        Runs of axes and sizes that hold as many elements are laid out anew by themselves, so that where one run cannot
        be reconciled the others are not pinned.
        """
        left = list(itertools.accumulate((self.size(f) for f in axes), operator.mul))
        right = list(itertools.accumulate(sizes, operator.mul))
        cuts = sorted({*left} & {*right} | {max([1, *left, *right])})
        result: list[Factor] = []
        for low, high in itertools.pairwise([0, *cuts]):
            run = [f for f, end in zip(axes, left, strict=True) if low < end <= high]
            shape = [n for n, end in zip(sizes, right, strict=True) if low < end <= high]
            same = len(run) == 1 and [self.size(run[0])] == shape
            result += run if same else self.split(self.merge(run), shape)
        return result

    # -- asking -----------------------------------------------------------------------------------------------------

    def find(self, factor: Factor) -> Factor:
        """Returns the representative of the class of ``factor``."""
        root = factor
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[factor] != root:
            self._parent[factor], factor = root, self._parent[factor]
        return root

    def size(self, factor: Factor) -> int:
        """Returns the number of indices of ``factor``."""
        return self._size[factor]

    def pinned(self, factor: Factor) -> str | None:
        """Returns why ``factor`` must keep its full extent, or None."""
        return self._pin[self.find(factor)]

    def firm(self, factor: Factor) -> bool:
        """Returns whether ``factor`` is pinned for more than a contraction between two activations."""
        return self._firm[self.find(factor)]

    def refinement(self, factor: Factor) -> Refinement | None:
        """Returns how ``factor`` is made of others, or None for a leaf."""
        return self._refinement[self.find(factor)]

    def leaves(self, factor: Factor) -> list[Factor]:
        """Returns the leaf factors of ``factor`` in layout order, repeated where they repeat.

        Size one is left out of products; a part of a concatenation counts whatever its size.
        """
        root = self.find(factor)
        if root not in self._leaves:
            refinement = self._refinement[root]
            if self._size[root] == 1:
                found: list[Factor] = []
            elif refinement is None:
                found = [root]
            elif refinement.kind == "concat":
                found = [leaf for part in refinement.parts for leaf in self.leaves(part) or [self.find(part)]]
            else:
                found = [leaf for part in refinement.parts for leaf in self.leaves(part)]
            self._leaves[root] = found
        return self._leaves[root]

    def _changed(self) -> None:
        self._leaves.clear()
        self._owners.clear()

    def same(self, a: Factor, b: Factor) -> bool:
        """Returns whether both are known to be one dimension with one layout."""
        return self.find(a) == self.find(b) or (self.size(a) == self.size(b) and self.leaves(a) == self.leaves(b))

    def owners(self, factor: Factor, leaf: Factor) -> NDArray[np.int64]:
        """Maps positions of ``factor`` to indices of ``leaf``.

        Returns:
            int64 [size(factor)]: the index in ``leaf`` that each position belongs to, -1 where it belongs to none.

        Raises:
            InternalError: ``leaf`` occurs twice in one product, so that a position has two indices.
        """
        root, leaf = self.find(factor), self.find(leaf)
        if (root, leaf) not in self._owners:
            self._owners[root, leaf] = self._mapped(root, leaf)
        return self._owners[root, leaf]

    def _mapped(self, root: Factor, leaf: Factor) -> NDArray[np.int64]:
        if root == leaf:
            return np.arange(self._size[root])
        refinement = self._refinement[root]
        if refinement is None or leaf not in self.leaves(root):
            return np.full(self._size[root], -1)
        maps = [self.owners(part, leaf) for part in refinement.parts]
        if refinement.kind == "concat":
            return np.concatenate(maps)
        result = np.full(1, -1)
        for part in maps:
            outer, inner = np.repeat(result, len(part)), np.tile(part, len(result))
            if np.any((outer >= 0) & (inner >= 0)):
                raise InternalError(f"factor {leaf} occurs twice in one product")
            result = np.maximum(outer, inner)
        return result

    def repeats(self, factor: Factor, leaf: Factor) -> bool:
        """Returns whether ``leaf`` occurs more than once within one product of ``factor`` (it cannot be cut then).

        In what is longer than `WIDEST` it may: that would take too long to tell.
        """
        if self.size(factor) > WIDEST:
            return True
        try:
            self.owners(factor, leaf)
        except InternalError:
            return True
        return False

    def encloses(self, factor: Factor, outer: Factor, inner: Factor) -> bool:
        """Returns whether, wherever ``factor`` has both, ``inner`` lies within each index of ``outer`` and not around it.

        Only then may each index of ``outer`` lose other indices of ``inner``: what is left lies as before.
        """
        refinement = self.refinement(factor)
        if refinement is None:
            return True
        outer, inner = self.find(outer), self.find(inner)
        having = [[leaf in self._with(part) for leaf in (outer, inner)] for part in refinement.parts]
        apart = refinement.kind == "product" and not any(all(both) for both in having)
        if not apart:
            return all(self.encloses(part, outer, inner) for part in refinement.parts)
        places = [[i for i, both in enumerate(having) if both[which]] for which in (0, 1)]
        return not places[0] or not places[1] or max(places[0]) < min(places[1])

    def _with(self, factor: Factor) -> set[Factor]:
        return {self.find(factor), *self.leaves(factor)}

    # -- equating and pinning ---------------------------------------------------------------------------------------

    def pin(self, factor: Factor, reason: str, firm: bool = True) -> None:
        """Marks ``factor`` and all its parts as never to be pruned; the first reason stays, but for one that is firm."""
        root = self.find(factor)
        if self._pin[root] is None or (firm and not self._firm[root]):
            self._pin[root], self._firm[root] = reason, firm
        refinement = self._refinement[root]
        if refinement is not None:
            for part in refinement.parts:
                if self.pinned(part) is None or (firm and not self.firm(part)):
                    self.pin(part, reason, firm)

    def unify(self, a: Factor, b: Factor) -> bool:
        """Makes ``a`` and ``b`` one dimension.

        Returns:
            False where their sizes or layouts cannot be reconciled; both are pinned then.
        """
        a, b = self.find(a), self.find(b)
        if a == b:
            return True
        if self._size[a] != self._size[b]:
            self._pin_all([a, b], f"sizes {self._size[a]} and {self._size[b]} were equated")
            return False
        ra, rb = self._refinement[a], self._refinement[b]
        agreed = True
        if ra is not None and rb is not None:
            agreed = self._reconcile(a, ra, b, rb)
            if not agreed:
                self._pin_all([a, b], "two layouts of one axis that do not align")
                return False
            a, b = self.find(a), self.find(b)
            if a == b:
                return True
        pin_a, pin_b = self._pin[a], self._pin[b]
        firm = self._firm[a] or self._firm[b]
        if firm and pin_a is not None and not self._firm[a]:
            pin_a = None  # the other reason is the firm one
        child, root = (b, a) if self._refinement[a] is not None or self._refinement[b] is None else (a, b)
        self._parent[child] = root
        self._depth[root] = max(self._depth[root], self._depth[child])
        self._cuts[root] = max(self._cuts[root], self._cuts[child])
        self._changed()
        reason = pin_a if pin_a is not None else pin_b
        if reason is not None:
            self._pin[root], self._firm[root] = None, False
            self.pin(root, reason, firm)
            if self._refinement[child] is not None:
                for part in self._refinement[child].parts:  # type: ignore[union-attr]
                    self.pin(part, reason, firm)
        return agreed

    def _pin_all(self, factors: Iterable[Factor], reason: str) -> None:
        for f in factors:
            self.pin(f, reason)

    def _reconcile(self, a: Factor, ra: Refinement, b: Factor, rb: Refinement) -> bool:
        if ra.kind == rb.kind == "product":
            return self._align_products(self._flat(a, "product"), self._flat(b, "product"))
        if ra.kind == rb.kind == "concat":
            return self._align_concats(self._flat(a, "concat"), self._flat(b, "concat"))
        concat, product = (a, b) if ra.kind == "concat" else (b, a)
        return self._align_concats(self._flat(concat, "concat"), [product])

    def _flat(self, factor: Factor, kind: Kind) -> list[Factor]:
        root = self.find(factor)
        refinement = self._refinement[root]
        if refinement is None or refinement.kind != kind:
            return [root] if not (kind == "product" and self._size[root] == 1) else []
        return [f for part in refinement.parts for f in self._flat(part, kind)]

    def _align_products(self, left: list[Factor], right: list[Factor]) -> bool:
        """Unifies two products of equal size part by part, splitting what straddles a boundary."""
        left, right = left[::-1], right[::-1]
        while left and right:
            x, y = left.pop(), right.pop()
            sx, sy = self._size[x], self._size[y]
            if sx == sy:
                if not self.unify(x, y):
                    return False
                continue
            big, small = (x, y) if sx > sy else (y, x)
            stack = left if sx > sy else right
            if max(sx, sy) % min(sx, sy) or self._size[small] == 1:
                return False
            parts = self._split_outer(big, self._size[small])
            if parts is None or not self.unify(parts[0], small):
                return False
            stack.append(parts[1])
        return not left and not right

    def _split_outer(self, factor: Factor, outer: int) -> tuple[Factor, Factor] | None:
        """Refines a leaf (or a concatenation of ``outer`` equal pieces) into ``outer`` x rest."""
        root = self.find(factor)
        refinement = self._refinement[root]
        size = self._size[root]
        if refinement is None:
            pin, firm = self._pin[root], self._firm[root]
            parts = (self.fresh(outer, pin, firm), self.fresh(size // outer, pin, firm))
            self._refinement[root] = Refinement("product", parts)
            self._changed()
            return parts
        if refinement.kind == "product":
            sequence = self._flat(root, "product")
            parts = (self.fresh(outer), self.fresh(size // outer))
            return parts if self._align_products(sequence, list(parts)) else None
        pieces = self._flat(root, "concat")
        if len(pieces) != outer or any(self._size[p] != size // outer for p in pieces):
            return None
        if not all(self.unify(pieces[0], p) for p in pieces[1:]):
            return None
        return self.fresh(outer, "the parts of a packed axis"), pieces[0]

    def _align_concats(self, left: list[Factor], right: list[Factor]) -> bool:
        """Unifies two concatenations of equal size piece by piece, cutting what straddles a boundary."""
        left, right = left[::-1], right[::-1]
        while left and right:
            x, y = left.pop(), right.pop()
            sx, sy = self._size[x], self._size[y]
            if sx == sy:
                if not self.unify(x, y):
                    return False
                continue
            big, small = (x, y) if sx > sy else (y, x)
            stack = left if sx > sy else right
            pieces = self._cut_first(big, self._size[small])
            if pieces is None or not self.unify(pieces[0], small):
                return False
            stack.append(pieces[1])
        return not left and not right

    def _cut_first(self, factor: Factor, first: int) -> tuple[Factor, Factor] | None:
        """Refines a leaf into ``first`` + rest, or a product by cutting its outermost factor."""
        root = self.find(factor)
        refinement = self._refinement[root]
        size = self._size[root]
        pin, firm = self._pin[root], self._firm[root]
        if refinement is None:
            parts = (self.fresh(first, pin, firm), self.fresh(size - first, pin, firm))
            self._refinement[root] = Refinement("concat", parts)
            self._changed()
            return parts
        if refinement.kind == "concat":
            sequence = self._flat(root, "concat")
            parts = (self.fresh(first), self.fresh(size - first))
            return parts if self._align_concats(sequence, list(parts)) else None
        outer, *inner = self._flat(root, "product")
        step = size // self._size[outer]
        if first % step:
            return None
        cut = self._cut_first(outer, first // step)
        if cut is None:
            return None
        return self.merge([cut[0], *inner]), self.merge([cut[1], *inner])
