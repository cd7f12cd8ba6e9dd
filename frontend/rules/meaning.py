"""What operators mean on axes and numbers, said once for ONNX and ATen."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes, Factor
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.records import BiasKind, ConsumerUse, Window
from liar_opt.frontend.rules.numbers import resolve_reshape
from liar_opt.frontend.symbols import Misfit

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


CONTRACTED = "contracted between two activations"
INSIDE: dict[str, Any] = {"bias": ("none", 0), "output_axis": -2}
"""Of products whose result is inside an operator: no bias can be put behind them, and no axis of the output is theirs."""


def at(node: gs.Node, what: str) -> str:
    """Returns a reason, with the node that it holds of."""
    return f"{what} (node '{node.name}')"


def runs(node: gs.Node) -> str:
    """Returns the reason why an operator needs the whole of an axis."""
    return at(node, f"{node.op} runs over it")


# -- element by element -----------------------------------------------------------------------------------------------


def pointwise(w: GraphWalk, node: gs.Node) -> None:
    """All that is read is broadcast together."""
    axes = w.broadcast(*(a for i in range(len(node.inputs)) if (a := w.input_axes(node, i)) is not None))
    for i in range(len(node.outputs)):
        w.output(node, axes, i)


def like_first(w: GraphWalk, node: gs.Node) -> None:
    """All outputs have the axes of the first input: one tensor and settings, or what nothing but its shape is taken of."""
    axes = w.input_axes(node, 0)
    for i in range(len(node.outputs)):
        w.output(node, axes, i)


def halves(w: GraphWalk, axis: Factor) -> Factor:
    """Returns the factor of both halves of an axis, which are multiplied with each other."""
    size = w.algebra.size(axis)
    first, second = w.algebra.cut(axis, [size // 2, size - size // 2])
    w.unify(first, second)
    return first


# -- what needs the whole axis ----------------------------------------------------------------------------------------


def along(w: GraphWalk, node: gs.Node, axes: Axes, whole: Sequence[Factor]) -> None:
    """Softmax, sums so far, sorting: the ``whole`` axes keep their extent, and the result has all ``axes``."""
    w.pin(whole, runs(node))
    for i in range(len(node.outputs)):
        w.output(node, axes, i)


def triangle(w: GraphWalk, node: gs.Node) -> None:
    """Of each matrix."""
    axes = w.axes_of(node)
    w.pin(axes[-2:], at(node, "a triangle of it is taken"))
    w.output(node, axes)


def determinant(w: GraphWalk, node: gs.Node) -> None:
    """Of each matrix."""
    axes = w.axes_of(node)
    w.pin(axes[-2:], runs(node))
    w.output(node, axes[:-2])


def pool(w: GraphWalk, node: gs.Node, axes: Axes, sizes: Sequence[int]) -> None:
    """Something slides over the last axes, or samples them, and leaves ``sizes`` of them; all before them go through."""
    first = len(axes) - len(sizes)
    w.pin(axes[first:], runs(node))
    for i in range(len(node.outputs)):
        w.output(node, (*axes[:first], *(w.fresh(s, runs(node) if s > 1 else None) for s in sizes)), i)


def reduce(w: GraphWalk, node: gs.Node, axes: Axes, gone: Collection[int], keep: bool) -> None:
    """The axes that are ``gone`` are summed over, or the like; they stay as ones where ``keep`` says so."""
    w.pin([axes[i] for i in gone], runs(node))
    result = tuple(w.fresh(1) if i in gone else f for i, f in enumerate(axes) if keep or i not in gone)
    for i in range(len(node.outputs)):
        w.output(node, result, i)


def best(w: GraphWalk, node: gs.Node, axes: Axes, axis: int, size: int) -> None:
    """``size`` elements of an axis that data says, and where they were."""
    w.pin([axes[axis]], runs(node))
    chosen = w.fresh(size, runs(node))
    for i in range(len(node.outputs)):
        w.output(node, (*axes[:axis], chosen, *axes[axis + 1 :]), i)


def normalise(w: GraphWalk, node: gs.Node, axes: Axes, first: int) -> None:
    """Over all axes from ``first`` on, with a scale and a shift of their extent; then mean and deviation."""
    w.pin(axes[first:], runs(node))
    for i in range(1, len(node.inputs)):
        extra = w.input_axes(node, i)
        if extra is not None:
            w.broadcast(axes[first:], extra)
    w.output(node, axes)
    for i in range(1, len(node.outputs)):
        w.output(node, (*axes[:first], *(w.fresh(1) for _ in axes[first:])), i)


def normalise_channels(w: GraphWalk, node: gs.Node, axes: Axes, each_sample: bool) -> None:
    """By channel, [b, c, ..]: scale, shift, and mean and variance where they are given; of ``each_sample`` where not."""
    if each_sample:
        w.pin(axes[2:], runs(node))
        w.channels.append(axes[1])
    for i in range(1, len(node.inputs)):
        vector = w.input_axes(node, i)
        if vector is not None:
            w.unify(axes[1], vector[0])
    w.output(node, axes)


# -- layout -----------------------------------------------------------------------------------------------------------


Place = tuple[str, int | str]
"""Where sizes are written: an attribute by name, or an input by position."""


def _written(w: GraphWalk, node: gs.Node, where: Place, sizes: Iterable[int], axes: Axes) -> None:
    """Records that numbers are the sizes of axes; a -1 of an attribute says so by itself."""
    for i, (size, factor) in enumerate(zip(sizes, axes, strict=True)):
        if where[0] == "input" or int(size) != -1:
            w.size_use(node, (*where, i), factor)


def reshape(w: GraphWalk, node: gs.Node, target: Sequence[int], where: Place, zeros: bool = True) -> None:
    """To a ``target`` of which one may be -1; a 0 is a size where ``zeros`` says so, else that of the axis."""
    axes = w.axes_of(node)
    sizes = resolve_reshape([int(d) for d in target], w.shape(axes), zeros)
    if sizes is None or 0 in sizes:
        if w.choosy:
            raise Misfit
        w.alone(w.shape(axes), [int(d) for d in target])
        w.give_up(node, f"{node.op} to a target that does not fit")
        return
    result = tuple(w.algebra.reshape(axes, sizes))
    _written(w, node, where, target, result)
    w.output(node, result)


def filled(w: GraphWalk, node: gs.Node, sizes: Sequence[int], where: Place) -> None:
    """Made of nothing but its sizes."""
    result = tuple(w.fresh(int(s)) for s in sizes)
    _written(w, node, where, sizes, result)
    w.output(node, result)


def split(w: GraphWalk, node: gs.Node, axes: Axes, axis: int, sizes: Iterable[int]) -> list[Factor]:
    """Cuts an axis into parts, an output each, and returns them."""
    pieces = w.algebra.cut(axes[axis], [int(s) for s in sizes])
    for i, piece in enumerate(pieces):
        w.output(node, (*axes[:axis], piece, *axes[axis + 1 :]), i)
    return pieces


class Part(NamedTuple):
    """A part of an axis: its factor, and where it was cut out, what is ``before`` it and all ``pieces`` in order."""

    factor: Factor
    before: tuple[Factor, ...] = ()
    pieces: tuple[Factor, ...] = ()


def part(w: GraphWalk, node: gs.Node, axis: Factor, bounds: slice) -> Part:
    """Cuts the part of an axis that python's ``bounds`` take."""
    size = w.algebra.size(axis)
    start, stop, step = bounds.indices(size)
    if (start, stop, step) == (0, size, 1):
        return Part(axis)
    if step != 1 or stop <= start:
        return Part(w.strided(axis, range(start, stop, step), at(node, "sliced with a step")))
    pieces = tuple(w.algebra.cut(axis, [n for n in (start, stop - start, size - stop) if n]))
    return Part(pieces[1], pieces[:1], pieces) if start else Part(pieces[0], (), pieces)


def expand(w: GraphWalk, node: gs.Node, axes: Axes, sizes: Sequence[int], where: Place) -> None:
    """Broadcasts to ``sizes``, aligned at the right, of which one that is no more than one says nothing."""
    rank = max(len(axes), len(sizes))
    result: list[Factor] = []
    for i in range(rank):
        place, element = i - (rank - len(axes)), i - (rank - len(sizes))
        size = sizes[element] if element >= 0 else 1
        factor = axes[place] if place >= 0 else w.fresh(size)
        if size > 1:
            if w.algebra.size(factor) == 1:
                factor = w.fresh(size)
            if w.algebra.size(factor) != size:
                w.equate(w.algebra.size(factor), size)
                w.give_up(node, f"{node.op} to a target that does not fit")
                return
            w.size_use(node, (*where, element), factor)
        result.append(factor)
    w.output(node, tuple(result))


def repeat(w: GraphWalk, node: gs.Node, axes: Axes, counts: Sequence[int], where: Place) -> None:
    """Repeats each axis as a whole; of more counts than axes the first make axes of their own."""
    result = [*(w.fresh(1) for _ in range(len(counts) - len(axes))), *axes]
    for element, count in enumerate(counts):
        place = element + len(result) - len(counts)
        if count != 1:
            outer = w.fresh(count)
            w.size_use(node, (*where, element), outer)
            result[place] = w.algebra.merge([outer, result[place]])
    w.output(node, tuple(result))


def pad(w: GraphWalk, node: gs.Node, axes: Axes, widths: Mapping[int, tuple[int, int]]) -> None:
    """``widths`` says what is added before and behind each axis; where it is anything the axis keeps its extent."""
    where, result = at(node, "padded"), list(axes)
    for axis, (before, behind) in widths.items():
        if before or behind:
            size = w.algebra.size(axes[axis]) + before + behind
            if not w.slid(node, [size]):
                return
            w.pin([axes[axis]], where)
            result[axis] = w.fresh(size, where)
    w.output(node, tuple(result))


def depth_to_space(w: GraphWalk, node: gs.Node, block: int, first: bool) -> None:
    """[.., c*n*n, h, w] -> [.., c, h*n, w*n]; the places of a block come ``first`` among the channels, or last."""
    *batch, channels, high, wide = w.axes_of(node)
    size = w.algebra.size(channels)
    if size % block**2:
        w.give_up(node, f"{node.op} of {size} channels into blocks of {block}")
        return
    rest = size // block**2
    parts = w.algebra.split(channels, [block, block, rest] if first else [rest, block, block])
    depth = parts.pop(2 if first else 0)
    w.pin(parts, at(node, "a place within a block"))
    w.output(node, (*batch, depth, w.algebra.merge([high, parts[0]]), w.algebra.merge([wide, parts[1]])))


def space_to_depth(w: GraphWalk, node: gs.Node, block: int, first: bool) -> None:
    """[.., c, h*n, w*n] -> [.., c*n*n, h, w], the other way round."""
    *batch, channels, high, wide = w.axes_of(node)
    sizes = w.shape([high, wide])
    if any(size % block for size in sizes):
        w.misfit(node, f"{node.op} of {sizes[0]} x {sizes[1]} places in blocks of {block}")
        return
    split = [w.algebra.split(f, [size // block, block]) for f, size in zip((high, wide), sizes, strict=True)]
    places = [parts[1] for parts in split]
    w.pin(places, at(node, "a place within a block"))
    packed = w.algebra.merge([*places, channels] if first else [channels, *places])
    w.output(node, (*batch, packed, *(p[0] for p in split)))


def columns_to_image(w: GraphWalk, node: gs.Node, image: Sequence[int], block: Sequence[int]) -> None:
    """[.., c*places, blocks] -> [.., c, image]: blocks are added up where they overlap."""
    *batch, packed, blocks = w.axes_of(node)
    where = at(node, f"added up by {node.op}")
    channels, *places = w.algebra.split(packed, [w.algebra.size(packed) // math.prod(block), *block])
    w.pin([*places, blocks], where)
    w.output(node, (*batch, channels, *(w.fresh(int(size), where) for size in image)))


# -- places that data says --------------------------------------------------------------------------------------------


def gather_along(w: GraphWalk, node: gs.Node, axis: int) -> None:
    """Elements along an axis, at places that input 1 says; its other axes are those of the data, or shorter."""
    axes, indices, where = w.axes_of(node), w.axes_of(node, 1), at(node, f"looked up by {node.op}")
    for i, (a, b) in enumerate(zip(axes, indices, strict=True)):
        _alike(w, a, b, where, i == axis)
    w.output(node, indices)


def scatter_along(w: GraphWalk, node: gs.Node, axis: int) -> None:
    """Elements are written along an axis to places that input 1 says; the other axes are those of the data, or shorter."""
    axes, where = w.axes_of(node), at(node, f"written to by {node.op}")
    for position in range(1, len(node.inputs)):
        for i, (a, b) in enumerate(zip(axes, w.axes_of(node, position), strict=True)):
            _alike(w, a, b, where, i == axis)
    w.output(node, axes)


def _alike(w: GraphWalk, a: Factor, b: Factor, where: str, pinned: bool) -> None:
    if pinned or w.algebra.size(a) != w.algebra.size(b):
        w.pin([a, b], where)
    else:
        w.unify(a, b)


def sample(w: GraphWalk, node: gs.Node) -> None:
    """X [b, c, ..] is read at the places of a grid [b, .., r]."""
    axes, grid = w.axes_of(node), w.axes_of(node, 1)
    w.unify(axes[0], grid[0])
    w.pin([*axes[2:], *grid[1:]], at(node, f"sampled by {node.op}"))
    w.output(node, (*axes[:2], *grid[1:-1]))


# -- contractions -----------------------------------------------------------------------------------------------------


def product(
    w: GraphWalk,
    node: gs.Node,
    left: Axes,
    right: Axes,
    places: tuple[int, int] = (0, 1),
    swapped: tuple[bool, bool] = (False, False),
    bias: tuple[BiasKind, int] = ("after", 0),
    scale: float = 1.0,
    bias_scale: float = 1.0,
    mixing: bool = True,
) -> Axes:
    """The matrix product of two inputs, as ``numpy.matmul`` defines it, and the bias that the operator reads.

    Args:
        w: the walk.
        node: the operator.
        left: the axes of the left input, as it is stored.
        right: those of the right one.
        places: the positions of the inputs.
        swapped: which of them are stored the other way round.
        bias: where the operator adds one.
        scale: what the product is multiplied by.
        bias_scale: what the bias is multiplied by.
        mixing: whether a product of two activations may be one of attention weights with what they mix.

    Returns:
        The axes of the result.
    """
    first, second = places
    left, right = _swap(left, swapped[0]), _swap(right, swapped[1])
    w.unify(left[-1], right[0] if len(right) == 1 else right[-2])
    mixes = False
    if w.constant(node, second) is not None and len(right) == 2:
        scales = {"scale": scale, "bias_scale": bias_scale}
        w.consumer(node, first, -2 if swapped[0] else -1, second, int(swapped[1]), bias=bias, **scales)
    elif w.constant(node, first) is not None and len(left) == 2 and len(right) > 1 and bias[0] == "after":
        w.consumer(node, second, -1 if swapped[1] else -2, first, int(not swapped[0]), scale=scale, output_axis=-2)
    elif places != (0, 1) or any(swapped) or not experts_product(w, node, left, right, scale):
        mixes = mixing
        if mixing:
            _contract(w, node, left[-1], places)
            w.mix(left, right)
        else:
            w.pin([left[-1]], at(node, CONTRACTED))
    batch = w.broadcast(left[:-2], right[:-2]) if left[:-2] or right[:-2] else ()
    if mixes:
        w.batched += batch
    result = (*batch, *left[-2:-1], *(right[-1:] if len(right) > 1 else ()))
    w.count(left[-1], *result)
    added = w.input_axes(node, bias[1]) if bias[0] == "input" else None
    return result if added is None else w.broadcast(result, added)


def _swap(axes: Axes, swap: bool) -> Axes:
    return (*axes[:-2], axes[-1], axes[-2]) if swap and len(axes) >= 2 else axes


def convolve(
    w: GraphWalk,
    node: gs.Node,
    groups: tuple[str, int],
    spatial: Sequence[int],
    window: Window | None = None,
    computed: bool = False,
    last: bool = False,
) -> Axes | None:
    """X [b, n, ..], or [b, .., n], W [m, n / groups, ..], bias [m].

    Args:
        w: the walk.
        node: the operator; its inputs are X, W and the bias.
        groups: the attribute that says how many groups there are, and how many.
        spatial: the sizes of the result.
        window: how it slides, where what lies under a kernel of more than one place can be measured.
        computed: whether the weight of a depthwise convolution may be no constant.
        last: whether channels are the last axis.

    Returns:
        The axes of the result; None where the window does not fit.
    """
    x, weight, bias = w.axes_of(node), w.axes_of(node, 1), w.input_axes(node, 2)
    name, count = groups
    channels, sides = (x[-1], x[1:-1]) if last else (x[1], x[2:])
    if count == 1:
        w.unify(channels, weight[1])
        w.channels += [channels, weight[0]]
        dense = all(k == 1 for k in w.shape(weight[2:]))
        if w.constant(node, 1) is None or not (dense or window):
            w.pin([channels], at(node, "input channels of a convolution that is no matrix product"))
        else:
            more: dict[str, Any] = {}
            if not dense:
                more = {"window": window, "width": w.algebra.merge([*weight[2:], weight[1]]), "channels": weight[1]}
            axis = -1 if last else 1 - len(x)
            w.consumer(node, 0, axis, 1, 1, bias=("input", 2), output_axis=axis, **more)
    elif count == w.algebra.size(channels) == w.algebra.size(weight[0]) and (computed or w.constant(node, 1) is not None):
        w.unify(channels, weight[0])  # depthwise: every channel by itself
        w.size_use(node, ("attribute", name, -1), channels)
    else:
        w.pin([channels, *weight], at(node, "grouped convolution"))
    if bias is not None:
        w.unify(weight[0], bias[0])
    slid = at(node, "slid over by a convolution")
    w.pin([*sides, *weight[2:]], slid)
    if not w.slid(node, spatial, w.shape(sides)):
        return None
    w.flops += 2 * math.prod([*w.shape((x[0], *weight)), *spatial])
    made = tuple(w.fresh(s, slid) for s in spatial)
    return (x[0], *made, weight[0]) if last else (x[0], weight[0], *made)


def convolve_transposed(w: GraphWalk, node: gs.Node, groups: int, spatial: Sequence[int]) -> None:
    """X [b, n, ..], W [n, m / groups, ..], bias [m]: [b, m, ..], of sizes ``spatial``.

    What it adds up where its outputs overlap is a matrix product [.., n] [n, m k] of its inputs, without a bias. W' is
    fitted to the addends (k of each output, at most), which bounds what the sums lose.
    """
    x, weight, bias = w.axes_of(node), w.axes_of(node, 1), w.input_axes(node, 2)
    slid = at(node, "slid over by a transposed convolution")
    w.unify(x[1], weight[0])
    w.pin([*x[2:], *weight[2:]], slid)
    if groups > 1 or w.constant(node, 1) is None:
        w.pin(weight, at(node, f"{'grouped ' if groups > 1 else ''}transposed convolution"))
    else:
        w.consumer(node, 0, 1, 1, 0, bias=("none", 0), output_axis=1 - len(x))
    made = weight[1] if groups == 1 else w.fresh(groups * w.algebra.size(weight[1]), at(node, "grouped convolution"))
    if bias is not None:
        w.unify(made, bias[0])
    w.flops += 2 * math.prod([*w.shape((x[0], *weight)), *w.shape(x[2:])])
    w.output(node, (x[0], made, *(w.fresh(s, slid) for s in spatial)))


def share_heads(w: GraphWalk, node: gs.Node, heads: Factor, groups: Factor) -> None:
    """Says that ``heads`` query heads, outermost by group, share ``groups`` key and value heads."""
    w.batched += [heads, groups]
    repeat = w.algebra.size(heads) // max(1, w.algebra.size(groups))
    if repeat <= 1:
        w.unify(heads, groups)
        return
    parts = w.algebra.split(heads, [w.algebra.size(groups), repeat])
    w.unify(parts[0], groups)
    w.pin(parts[1:], at(node, f"heads of one group inside {node.op}"))


def attend(w: GraphWalk, node: gs.Node, query: Factor, key: Factor, value: Factor) -> None:
    """Of the widths of a head those of query and key are contracted, and the values are mixed."""
    w.unify(query, key)
    w.pin([query, key], at(node, f"contracted inside {node.op}"))
    w.mixed.append(value)


def experts_product(w: GraphWalk, node: gs.Node, left: Axes, right: Axes, scale: float) -> bool:
    """Records the product of rows with the weights that were looked up for them, [rows, a, b]; says whether it is one."""
    found = [w.lookups.get(t.name) for t in node.inputs]
    side = 0 if found[0] is not None else 1
    lookup, tensor = found[side], node.inputs[1 - side]
    if lookup is None or found[1 - side] is not None or is_constant(tensor) or not len(left) == len(right) == 3:
        return False
    weight = lookup.node.inputs[0]
    if len(weight.shape) != 3:
        return False
    axes, width = (-2, left[-1]) if side == 0 else (-1, right[-2])
    use = ConsumerUse(
        node,
        tensor,
        axes % 3,
        weight,
        0,
        2 if side == 0 else 1,
        width,
        scale=scale,
        output_axis=-2 if side == 0 else -1,
        lookup=lookup,
    )
    w.consumers.append(use)
    return True


def spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """Returns the terms and the result of an Einsum equation, with a letter for each axis.

    An ellipsis gets letters of its own, aligned at the right; a result that is not written has the letters that occur
    once, in alphabetical order, behind the ellipsis.

    Args:
        equation: as Einsum and ``torch.einsum`` take it.
        ranks: of the operands.

    Returns:
        None where a letter is repeated within a term (a diagonal), or the ranks do not fit.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "..." * ("..." in left) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if len(terms) != len(ranks):
        return None
    extra = max((rank - len(t) + 3 for t, rank in zip(terms, ranks, strict=True) if "..." in t), default=0)
    names = "".join(chr(0x2460 + i) for i in range(max(extra, 0)))
    full = [t.replace("...", names[len(names) - max(rank - len(t) + 3, 0) :]) for t, rank in zip(terms, ranks, strict=True)]
    result = right.replace("...", names)
    if [len(t) for t in full] != list(ranks) or any(len(set(t)) != len(t) for t in [*full, result]):
        return None
    return full, result


def _contract(w: GraphWalk, node: gs.Node, width: Factor, places: tuple[int, int]) -> None:
    """A width is contracted between two activations; what looks for both of them takes the first two inputs."""
    if places != (0, 1):
        w.pin([width], at(node, CONTRACTED))
        return
    if any(map(w.taken_from_weights, node.inputs)) and w.algebra.pinned(width) is None:
        w.leave(node, "weights are looked up for each token, as those of experts: their width stays")
    w.product(node, width)


def einsum(w: GraphWalk, node: gs.Node) -> None:
    """Products and sums of two operands, as the equation says."""
    operands = [w.input_axes(node, i) or () for i in range(len(node.inputs))]
    spelled = spelled_out(str(node.attrs["equation"]), [len(a) for a in operands])
    if spelled is None:
        w.give_up(node, f"{node.op} '{node.attrs['equation']}'")
        return
    terms, right = spelled
    factors: dict[str, Factor] = {}
    for term, axes in zip(terms, operands, strict=True):
        for letter, factor in zip(term, axes, strict=True):
            if letter in factors and w.algebra.size(factors[letter]) != 1 and w.algebra.size(factor) != 1:
                w.unify(factors[letter], factor)
            elif letter not in factors or w.algebra.size(factors[letter]) == 1:
                factors[letter] = factor
    summed = [letter for letter in factors if letter not in right]
    if len(terms) == 2:
        w.count(*factors.values())
    linear = len(terms) == 2 and len(summed) == 1 and all(summed[0] in t for t in terms)
    weight = next((i for i in (1, 0) if linear and w.constant(node, i) is not None and len(terms[i]) == 2), None)
    column = "" if weight is None else terms[weight].replace(summed[0], "")
    if weight is not None and right.endswith(column) and column not in terms[1 - weight]:
        w.consumer(node, 1 - weight, terms[1 - weight].index(summed[0]), weight, terms[weight].index(summed[0]))
    else:
        if linear and weight is None:
            w.product(node, factors[summed[0]])
        else:
            w.pin([factors[s] for s in summed], f"summed over by {node.op} (node '{node.name}')")
        w.mixed += [f for letter, f in factors.items() if letter in right and sum(letter in t for t in terms) == 1]
        if not any(w.constant(node, i) is not None for i in range(len(terms))):
            w.batched += [f for letter, f in factors.items() if letter in right and sum(letter in t for t in terms) > 1]
    w.output(node, tuple(factors[letter] for letter in right))


def normalised_by_groups(w: GraphWalk, node: gs.Node, axes: Axes, channel: int, number: str) -> Factor | None:
    """Splits the channels into groups and pins what lies within one.

    Args:
        w: the walk.
        node: the operator; its inputs 1 and 2 have an entry for each channel (or, before opset 21, for each group).
        axes: of the tensor that is normalised.
        channel: the axis of the channels.
        number: the attribute that says how many groups there are.

    Returns:
        The factor that counts the groups; None where the channels cannot be split.
    """
    groups, size = int(node.attrs.get(number, 0)), w.algebra.size(axes[channel])
    vectors = [v for position in (1, 2) if (v := w.input_axes(node, position)) is not None]
    where = f"{node.op} runs over it (node '{node.name}')"
    w.pin([f for i, f in enumerate(axes) if i not in (0, channel)], where)
    if groups <= 0 or size % groups or any(w.shape(v) not in ([size], [groups]) for v in vectors):
        where = f"{node.op} of {size} channels in {groups} groups (node '{node.name}')"
        w.pin([axes[channel], *(f for v in vectors for f in v)], where)
        return None
    outer, inner = w.algebra.split(axes[channel], [groups, size // groups])
    w.pin([inner], where)
    w.channels.append(axes[channel])
    w.size_use(node, ("attribute", number, -1), outer)
    for (vector,) in vectors:
        w.unify(vector, axes[channel] if w.algebra.size(vector) == size else outer)
    return outer
