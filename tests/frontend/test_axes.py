"""The axis algebra against numpy's own index arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from liar_opt.frontend.axes import DEEPEST, MOST_CUTS, MOST_PARTS, AxisAlgebra
from liar_opt.runtime.errors import InternalError


@pytest.fixture
def algebra() -> AxisAlgebra:
    return AxisAlgebra()


def sizes(algebra: AxisAlgebra, factor: int) -> list[int]:
    return [algebra.size(leaf) for leaf in algebra.leaves(factor)]


def test_split_and_merge(algebra: AxisAlgebra) -> None:
    axis = algebra.fresh(30)
    heads, one, width = algebra.split(axis, [5, 1, 6])
    assert algebra.size(one) == 1
    assert algebra.leaves(axis) == [algebra.find(heads), algebra.find(width)]
    assert algebra.same(algebra.merge([heads, width]), axis)
    assert not algebra.same(algebra.merge([width, heads]), axis)
    assert algebra.merge([one, heads]) == heads


def test_cut_and_join(algebra: AxisAlgebra) -> None:
    axis = algebra.fresh(12)
    first, second = algebra.cut(axis, [5, 7])
    assert algebra.leaves(axis) == [first, second]
    assert algebra.same(algebra.join([first, second]), axis)
    assert algebra.join([first]) == first


@pytest.mark.parametrize("form", ["split", "cut"])
def test_sizes_that_do_not_fit_pin(algebra: AxisAlgebra, form: str) -> None:
    axis = algebra.fresh(12)
    parts = getattr(algebra, form)(axis, [5, 3])
    assert all(algebra.pinned(f) for f in [axis, *parts])


def test_splitting_twice_refines(algebra: AxisAlgebra) -> None:
    axis = algebra.fresh(60)
    a, b = algebra.split(axis, [4, 15])
    c, d = algebra.split(axis, [12, 5])
    assert sizes(algebra, axis) == [4, 3, 5]
    assert sizes(algebra, b) == [3, 5]
    assert sizes(algebra, c) == [4, 3]
    assert algebra.same(d, algebra.leaves(b)[1])
    assert algebra.find(a) == algebra.leaves(axis)[0]


def test_splits_that_straddle_pin(algebra: AxisAlgebra) -> None:
    axis = algebra.fresh(12)
    parts = [*algebra.split(axis, [4, 3]), *algebra.split(axis, [3, 4])]
    assert all(algebra.pinned(f) for f in [axis, *parts])


def test_runs_that_align_are_reshaped_by_themselves(algebra: AxisAlgebra) -> None:
    axes = [algebra.fresh(n) for n in (2, 3, 4, 7, 1, 15)]
    result = algebra.reshape(axes, [1, 2, 3, 7, 4, 5, 3])
    assert [algebra.size(f) for f in result] == [1, 2, 3, 7, 4, 5, 3]
    assert [algebra.pinned(f) is not None for f in axes] == [False, False, True, True, False, False]
    assert [algebra.find(f) for f in result[1:3]] == [algebra.find(f) for f in axes[:2]]
    assert algebra.leaves(axes[5]) == [algebra.find(f) for f in result[5:]]


@pytest.mark.parametrize(
    ("before", "after"), [((), (1,)), ((4, 1), (4,)), ((1, 4), (2, 1, 2)), ((6,), (2, 3, 1, 1)), ((1,), ())]
)
def test_reshapes_with_axes_of_one(algebra: AxisAlgebra, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    axes = [algebra.fresh(n) for n in before]
    result = algebra.reshape(axes, after)
    assert tuple(algebra.size(f) for f in result) == after
    assert algebra.same(algebra.merge(axes), algebra.merge(result)) or not before
    assert not any(algebra.pinned(f) for f in [*axes, *result])


def test_cuts_at_different_places_refine(algebra: AxisAlgebra) -> None:
    axis = algebra.fresh(12)
    algebra.cut(axis, [5, 7])
    algebra.cut(axis, [3, 9])
    assert sizes(algebra, axis) == [3, 2, 7]


def test_packed_parts_of_one_split(algebra: AxisAlgebra) -> None:
    """[3, heads, width] cut into q, k and v: the heads of all three are one factor."""
    packed = algebra.fresh(3 * 5 * 4)
    three, heads, width = algebra.split(packed, [3, 5, 4])
    q, k, v = algebra.cut(packed, [20, 20, 20])
    assert algebra.leaves(q) == algebra.leaves(k) == algebra.leaves(v) == [algebra.find(heads), algebra.find(width)]
    assert three not in algebra.leaves(packed)
    assert algebra.pinned(heads) is None


def test_a_cut_then_a_split_of_all(algebra: AxisAlgebra) -> None:
    packed = algebra.fresh(3 * 5 * 4)
    parts = algebra.cut(packed, [20, 20, 20])
    _, heads, _ = algebra.split(packed, [3, 5, 4])
    for part in parts:
        assert algebra.leaves(part)[0] == algebra.find(heads)
    np.testing.assert_array_equal(algebra.owners(packed, heads), np.tile(np.repeat(np.arange(5), 4), 3))


def test_cutting_across_an_interleaved_layout_pins(algebra: AxisAlgebra) -> None:
    packed = algebra.fresh(5 * 3 * 4)
    _, _, width = algebra.split(packed, [5, 3, 4])
    parts = algebra.cut(packed, [20, 20, 20])
    assert algebra.pinned(packed)
    assert algebra.pinned(width)
    assert all(algebra.pinned(p) for p in parts)


def test_unequal_sizes_pin_both(algebra: AxisAlgebra) -> None:
    a, b = algebra.fresh(3), algebra.fresh(4)
    assert not algebra.unify(a, b)
    assert algebra.pinned(a)
    assert algebra.pinned(b)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("pin_first", [True, False])
@pytest.mark.parametrize("swap", [True, False])
def test_pins_reach_parts_in_any_order(algebra: AxisAlgebra, first: bool, pin_first: bool, swap: bool) -> None:
    a, b = algebra.fresh(12), algebra.fresh(12)
    split = b if first else a
    parts = algebra.split(split, [3, 4]) if pin_first else []
    if pin_first:
        algebra.pin(a, "told")
    algebra.unify(*((b, a) if swap else (a, b)))
    if not pin_first:
        parts = algebra.split(split, [3, 4])
        algebra.pin(a, "told")
    assert {algebra.pinned(f) for f in [a, b, *parts]} == {"told"}


def test_later_refinements_of_a_pinned_factor_are_pinned(algebra: AxisAlgebra) -> None:
    axis = algebra.fresh(60, "told")
    parts = [*algebra.split(axis, [4, 15]), *algebra.split(axis, [12, 5]), *algebra.cut(algebra.fresh(6, "told"), [2, 4])]
    assert {algebra.pinned(leaf) for f in parts for leaf in algebra.leaves(f)} == {"told"}


def test_a_pinned_part_leaves_its_siblings(algebra: AxisAlgebra) -> None:
    axis = algebra.fresh(12)
    heads, width = algebra.split(axis, [3, 4])
    algebra.pin(width, "told")
    assert algebra.pinned(heads) is None
    assert algebra.pinned(axis) is None
    algebra.pin(heads, "first")
    algebra.pin(heads, "second")
    assert algebra.pinned(heads) == "first"


def test_owners_of_layouts(algebra: AxisAlgebra) -> None:
    heads, width, other = algebra.fresh(3), algebra.fresh(2), algebra.fresh(4)
    strided = algebra.merge([heads, width])
    np.testing.assert_array_equal(algebra.owners(strided, heads), [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(algebra.owners(strided, width), [0, 1, 0, 1, 0, 1])
    packed = algebra.join([strided, other, heads])
    np.testing.assert_array_equal(algebra.owners(packed, heads), [0, 0, 1, 1, 2, 2, -1, -1, -1, -1, 0, 1, 2])
    np.testing.assert_array_equal(algebra.owners(other, heads), [-1] * 4)
    with pytest.raises(InternalError, match="twice"):
        algebra.owners(algebra.merge([heads, heads]), heads)
    assert algebra.repeats(algebra.merge([heads, width, heads]), heads)
    assert not algebra.repeats(packed, heads)


def random_layout(algebra: AxisAlgebra, rng: np.random.Generator, leaf: int, depth: int) -> tuple[int, np.ndarray]:
    """Returns a factor that may hold ``leaf`` at most once in a product, and its owners by index arithmetic."""
    if depth == 0 or rng.random() < 0.2:
        if rng.random() < 0.6:
            return leaf, np.arange(algebra.size(leaf))
        size = int(rng.integers(1, 4))
        return algebra.fresh(size), np.full(size, -1)
    parts = [random_layout(algebra, rng, leaf, depth - 1) for _ in range(rng.integers(1, 4))]
    if rng.random() < 0.5:
        return algebra.join([f for f, _ in parts]), np.concatenate([o for _, o in parts])
    seen = False
    factors, result = [], np.full(1, -1)
    for factor, owners in parts:
        if seen and (owners >= 0).any():
            continue
        seen = seen or bool((owners >= 0).any())
        factors.append(factor)
        index = np.indices((len(result), len(owners)))
        outer, inner = result[index[0]].reshape(-1), owners[index[1]].reshape(-1)
        result = np.where(inner >= 0, inner, outer)
    return algebra.merge(factors), result


@pytest.mark.parametrize("seed", range(60))
def test_owners_of_random_layouts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    algebra = AxisAlgebra()
    leaf = algebra.fresh(5)
    factor, owners = random_layout(algebra, rng, leaf, 3)
    np.testing.assert_array_equal(algebra.owners(factor, leaf), owners)


@pytest.mark.parametrize("seed", range(60))
def test_random_splits_agree_with_reshape(seed: int) -> None:
    """However an axis is split and split again, a leaf's index is what numpy finds by reshaping."""
    rng = np.random.default_rng(seed)
    algebra = AxisAlgebra()
    base = [int(s) for s in rng.choice([2, 3, 5, 7], 4)]
    total = math.prod(base)
    axis = algebra.fresh(total)
    for _ in range(3):
        bounds = sorted(rng.permutation(3)[: rng.integers(1, 4)] + 1)
        parts = [math.prod(base[a:b]) for a, b in zip([0, *bounds], [*bounds, 4], strict=True)]
        algebra.split(axis, parts)
    assert algebra.pinned(axis) is None
    leaves = algebra.leaves(axis)
    shape = [algebra.size(leaf) for leaf in leaves]
    assert math.prod(shape) == total
    if len(set(leaves)) == len(leaves):
        for i, leaf in enumerate(leaves):
            np.testing.assert_array_equal(algebra.owners(axis, leaf), np.indices(shape)[i].reshape(-1))


@pytest.mark.parametrize("seed", range(60))
def test_unified_layouts_own_alike(seed: int) -> None:
    """After two axes are equated every leaf is at the same positions of both, or both are pinned."""
    rng = np.random.default_rng(seed)
    algebra = AxisAlgebra()
    axes = []
    for _ in range(2):
        axis = algebra.fresh(60)
        for _ in range(2):
            if rng.random() < 0.5:
                algebra.split(axis, [[4, 15], [12, 5], [3, 20], [2, 2, 15], [60]][rng.integers(5)])
            else:
                algebra.cut(axis, [[20, 40], [20, 20, 20], [12, 48], [7, 53], [30, 30]][rng.integers(5)])
        axes.append(axis)
    agreed = algebra.unify(*axes)
    leaves = {leaf for axis in axes for leaf in algebra.leaves(axis)}
    if not agreed:
        assert all(algebra.pinned(leaf) for leaf in leaves)
        return
    for leaf in leaves:
        if algebra.pinned(leaf) is None and not any(algebra.repeats(a, leaf) for a in axes):
            np.testing.assert_array_equal(algebra.owners(axes[0], leaf), algebra.owners(axes[1], leaf))


def test_what_encloses_what(algebra: AxisAlgebra) -> None:
    axis = algebra.fresh(60)
    heads, middle, width = algebra.split(axis, [3, 4, 5])
    assert algebra.encloses(axis, heads, width) and algebra.encloses(axis, middle, width)
    assert not algebra.encloses(axis, width, heads)
    packed = algebra.join([axis, algebra.merge([width, heads]), algebra.fresh(7)])
    assert not algebra.encloses(packed, heads, width) and not algebra.encloses(packed, width, heads)
    assert algebra.encloses(packed, heads, middle)
    assert algebra.encloses(algebra.fresh(4), heads, width) and algebra.encloses(width, heads, width)


# Chains ---------------------------------------------------------------------------------------------------------------


def test_what_is_joined_with_more_again_and_again(algebra: AxisAlgebra) -> None:
    pieces = [algebra.fresh(2) for _ in range(20 * DEEPEST)]
    axis = pieces[0]
    for piece in pieces[1:]:
        axis = algebra.join([axis, piece])
    assert algebra.leaves(axis) == pieces
    np.testing.assert_array_equal(np.flatnonzero(algebra.owners(axis, pieces[7]) >= 0), [14, 15])
    algebra.pin(axis, "the reason")
    assert {algebra.pinned(p) for p in pieces} == {"the reason"}


def test_what_is_joined_with_itself_again_and_again(algebra: AxisAlgebra) -> None:
    axis = first = algebra.fresh(3)
    for _ in range(40):
        axis = algebra.join([axis, axis])
        assert len(algebra.leaves(axis)) <= MOST_PARTS
    assert algebra.size(axis) == 3 << 40
    assert all(algebra.pinned(leaf) for leaf in [first, *algebra.leaves(axis)])


def test_pieces_that_are_cut_again_and_again(algebra: AxisAlgebra) -> None:
    axis = rest = algebra.fresh(20 * MOST_CUTS)
    for _ in range(MOST_CUTS):
        _, rest = algebra.cut(rest, [1, algebra.size(rest) - 1])
    assert len(algebra.leaves(axis)) == MOST_CUTS + 1
    assert algebra.pinned(axis) is None
    for _ in range(5 * MOST_CUTS):
        one, rest = algebra.cut(rest, [1, algebra.size(rest) - 1])
        assert algebra.pinned(one)
    assert algebra.pinned(algebra.leaves(axis)[-1])
    assert algebra.pinned(algebra.leaves(axis)[0]) is None
