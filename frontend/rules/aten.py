"""The ATen operator table of the axis algebra.

The rules say the same things as those of ONNX, of the operators that ``torch.export``
writes: which factors are equal, how axes are split, merged, cut and joined, which are pinned; where constants, linear
contractions and sizes are. Tensors are a node's inputs in the order of the operator's schema, all other arguments are its
attributes. A size that the program computes from its inputs (``Sym``) is recorded like any other: it is scaled if it has
to change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes, Factor
from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.records import BiasKind, Window
from liar_opt.frontend.rules import meaning
from liar_opt.frontend.rules.meaning import INSIDE, at
from liar_opt.frontend.rules.numbers import resolve_reshape, slice_bounds

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def _dims(node: gs.Node, name: str, rank: int) -> list[int]:
    """Returns the axes named by an attribute (all of them where it is None or empty), none of them negative."""
    value = node.attrs.get(name)
    chosen = [value] if isinstance(value, int) else list(value or range(rank))
    return [int(d) % max(rank, 1) for d in chosen]


# -- pointwise --------------------------------------------------------------------------------------------------------


def like_first(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, w.input_axes(node, 0))


def prelu(w: GraphWalk, node: gs.Node) -> None:
    """The slope is one number, or one for each channel, which is the second axis."""
    axes, (slope,) = w.axes_of(node), w.axes_of(node, 1)
    if w.algebra.size(slope) != 1:
        w.unify(axes[1 if len(axes) > 1 else 0], slope)
    w.output(node, axes)


def extremum(w: GraphWalk, node: gs.Node) -> None:
    """Of two tensors, along an axis, or of everything."""
    if "dim" in node.attrs:
        reduce(w, node)
    elif len(node.inputs) > 1:
        meaning.pointwise(w, node)
    else:
        w.pin(w.input_axes(node, 0), at(node, f"{node.op} runs over it"))
        w.output(node, ())


# -- contractions -----------------------------------------------------------------------------------------------------


def linear(w: GraphWalk, node: gs.Node) -> None:
    x, weight = w.axes_of(node, 0), w.axes_of(node, 1)
    w.unify(x[-1], weight[-1])
    if w.constant(node, 1) is not None and len(weight) == 2:
        w.consumer(node, 0, -1, 1, 1, bias=("input", 2))
    else:
        w.pin([x[-1]], at(node, "contracted between two activations"))
    bias = w.input_axes(node, 2)
    if bias is not None:
        w.broadcast(weight[:-1], bias)
    w.count(*x, *weight[:-1])
    w.output(node, (*x[:-1], *weight[:-1]))


def _product(w: GraphWalk, node: gs.Node, left: int, right: int, bias: tuple[BiasKind, int] = ("after", 0)) -> Axes:
    scale, bias_scale = (float(node.attrs.get(name, 1.0)) for name in ("alpha", "beta"))
    a, b = w.axes_of(node, left), w.axes_of(node, right)
    return meaning.product(w, node, a, b, (left, right), bias=bias, scale=scale, bias_scale=bias_scale)


def matmul(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, _product(w, node, 0, 1))


def addmm(w: GraphWalk, node: gs.Node) -> None:
    axes = _product(w, node, 1, 2, ("input", 0))
    w.output(node, w.broadcast(axes, w.axes_of(node, 0)))


def convolution(w: GraphWalk, node: gs.Node) -> None:
    x, weight = w.axes_of(node), w.axes_of(node, 1)
    if len(x) != len(weight) or node.attrs.get("transposed", False):
        w.give_up(node, "convolution without a batch, or transposed")
        return
    groups, window = ("groups", int(node.attrs.get("groups", 1))), _window(node, w.shape(weight[2:]))
    result = meaning.convolve(w, node, groups, w.inferred[node.outputs[0].name][2:], window, computed=True)
    if result is not None:
        w.output(node, result)


def _window(node: gs.Node, kernel: Sequence[int]) -> Window:
    """Returns how a convolution slides; what "same" padding cannot share out evenly comes behind."""

    def each(name: str) -> tuple[int, ...]:
        value = [int(v) for v in node.attrs[name]]
        return tuple(value * len(kernel) if len(value) == 1 else value)

    dilations, padding = each("dilation"), node.attrs["padding"]
    if padding == "same":
        spread = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = (*(s // 2 for s in spread), *(s - s // 2 for s in spread))
    else:
        pads = (0,) * 2 * len(kernel) if padding == "valid" else each("padding") * 2
    return Window(tuple(kernel), each("stride"), dilations, pads)


def attention(w: GraphWalk, node: gs.Node) -> None:
    """Queries [.., h, s, e], keys [.., k, t, e], values [.., k, t, v]; h is a multiple of k with ``enable_gqa``."""
    query, key, value, mask = w.axes_of(node, 0), w.axes_of(node, 1), w.axes_of(node, 2), w.input_axes(node, 3)
    where = at(node, f"inside {node.op}")
    w.unify(key[-2], value[-2])
    w.unify(query[-1], key[-1])
    w.product(node, query[-1])
    w.pin([query[-2], key[-2]], where)
    w.mixed.append(value[-1])
    batch = w.broadcast(query[:-3], key[:-3], value[:-3])
    heads: Axes = ()
    if len(query) > 2:
        heads, groups = query[-3:-2], key[-3]
        w.unify(groups, value[-3])
        sizes = w.algebra.size(heads[0]), w.algebra.size(groups)
        if sizes[0] != sizes[1] and sizes[1] > 1 and sizes[0] % sizes[1] == 0:
            parts = w.algebra.split(heads[0], [sizes[1], sizes[0] // sizes[1]])
            w.unify(parts[0], groups)
            w.pin(parts[1:], at(node, f"heads of one group inside {node.op}"))
        else:
            heads = w.broadcast(heads, (groups,))
    w.batched += [*batch, *heads]
    if mask is not None:
        w.pin(mask[-2:], where)
        w.broadcast((*batch, *heads), mask[:-2])
    w.count(*query, key[-2])
    w.count(*query[:-1], key[-2], value[-1])
    w.output(node, (*batch, *heads, query[-2], value[-1]))


def recurrent(w: GraphWalk, node: gs.Node) -> None:
    """X [s, b, n] (or the batch first), states [1, b, h], W [gates*h, n], R [gates*h, h], two biases [gates*h].

    Of one layer in one direction; what lies between layers, and what goes backward, is no tensor of the graph.
    """
    count, settings = 2 if node.op == "lstm" else 1, node.attrs
    x, weight, recurrence = (w.input_axes(node, i) for i in (0, 1 + count, 2 + count))
    assert x is not None and weight is not None and recurrence is not None
    hidden, several = recurrence[-1], int(settings.get("num_layers", 1)) > 1 or settings.get("bidirectional", False)
    size = w.algebra.size(hidden)
    states = [w.axes_of(node, 1 + i) for i in range(count)]
    if several or len(x) != 3 or any(w.algebra.size(state[-1]) != size for state in states):
        w.give_up(node, f"{node.op} of several layers or directions, whose states in between no tensor holds")
        return
    length, batch = (x[1], x[0]) if settings.get("batch_first", False) else (x[0], x[1])
    w.pin([length], at(node, f"gone over by {node.op}"))
    w.unify(x[2], weight[1])
    for position in range(1 + count, len(node.inputs)):
        axes = w.axes_of(node, position)
        gates, units = w.algebra.split(axes[0], [w.algebra.size(axes[0]) // size, size])
        w.pin([gates], at(node, f"the gates of {node.op}"))
        w.unify(units, hidden)
    for position, state in enumerate(states, 1):
        w.pin(state[:1], at(node, f"a state of {node.op}"))
        w.unify(state[1], batch)
        w.unify(state[2], hidden)
        w.output(node, (state[0], batch, hidden), position)
    w.output(node, (*x[:2], hidden))
    w.count(batch, length, *weight)
    w.count(batch, length, *recurrence)
    w.consumer(node, 0, 2, 1 + count, 1, **INSIDE)
    w.consumer(node, 0, 2, 2 + count, 1, reads=node.outputs[0], **INSIDE)


# -- layout -----------------------------------------------------------------------------------------------------------


def _sized(w: GraphWalk, node: gs.Node, name: str, factors: Sequence[Factor]) -> None:
    """Records that the elements of an attribute are the sizes of ``factors``; -1 says so by itself."""
    for i, (number, factor) in enumerate(zip(node.attrs[name], factors, strict=True)):
        if int(number) != -1:
            w.size_use(node, ("attribute", name, i), factor)


def view(w: GraphWalk, node: gs.Node) -> None:
    name = "shape" if "shape" in node.attrs else "size"
    axes = w.axes_of(node)
    if name not in node.attrs:
        w.give_up(node, "view as another type")
        return
    sizes = resolve_reshape([int(s) for s in node.attrs[name]], w.shape(axes), True)
    if sizes is None or 0 in sizes:
        w.give_up(node, "view that does not fit")
        return
    result = tuple(w.algebra.reshape(axes, sizes))
    _sized(w, node, name, result)
    w.output(node, result)


def flatten(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    rank = max(len(axes), 1)
    start, end = int(node.attrs["start_dim"]) % rank, int(node.attrs["end_dim"]) % rank
    w.output(node, (*axes[:start], w.algebra.merge(axes[start : end + 1]), *axes[end + 1 :]))


def unflatten(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % len(axes)
    sizes = resolve_reshape([int(s) for s in node.attrs["sizes"]], [w.algebra.size(axes[dim])], True)
    if sizes is None:
        w.give_up(node, "unflatten that does not fit")
        return
    parts = w.algebra.split(axes[dim], sizes)
    _sized(w, node, "sizes", parts)
    w.output(node, (*axes[:dim], *parts, *axes[dim + 1 :]))


def permute(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    w.output(node, tuple(axes[d] for d in _dims(node, "dims", len(axes))))


def transpose(w: GraphWalk, node: gs.Node) -> None:
    axes = list(w.axes_of(node))
    if "dim0" in node.attrs:
        a, b = int(node.attrs["dim0"]) % len(axes), int(node.attrs["dim1"]) % len(axes)
        axes[a], axes[b] = axes[b], axes[a]
    elif node.op == "mT":
        axes[-2:] = axes[-2:][::-1]
    else:
        axes = axes[::-1]
    w.output(node, tuple(axes))


def squeeze(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    chosen = set(_dims(node, "dim", len(axes)))
    w.output(node, tuple(f for i, f in enumerate(axes) if i not in chosen or w.algebra.size(f) != 1))


def unsqueeze(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % (len(axes) + 1)
    w.output(node, (*axes[:dim], w.fresh(1), *axes[dim:]))


def cat(w: GraphWalk, node: gs.Node) -> None:
    given = [w.axes_of(node, i) for i in range(len(node.inputs))]
    # torch lets a vector without elements stand for a tensor of any rank.
    operands = [a for a in given if [w.algebra.size(f) for f in a] != [0]] or given[:1]
    w.output(node, w.concatenate(operands, int(node.attrs["dim"]) % len(operands[0])))


def as_complex(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    w.pin(axes[-1:], at(node, "real and imaginary part"))
    w.output(node, axes[:-1])


def as_real(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, (*w.axes_of(node), w.fresh(2, at(node, "real and imaginary part"))))


def stack(w: GraphWalk, node: gs.Node) -> None:
    axes = w.broadcast(*(w.axes_of(node, i) for i in range(len(node.inputs))))
    dim = int(node.attrs["dim"]) % (len(axes) + 1)
    w.output(node, (*axes[:dim], w.fresh(len(node.inputs), at(node, "stacked")), *axes[dim:]))


def split(w: GraphWalk, node: gs.Node) -> None:
    """By a list of sizes, by one size, or by a count; by size and by count the parts must stay equal."""
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % len(axes)
    sizes = [w.inferred[t.name][dim] if present(t) else 0 for t in node.outputs]
    pieces = meaning.split(w, node, axes, dim, sizes)
    if "split_sizes" in node.attrs:
        _sized(w, node, "split_sizes", pieces)
        return
    for piece, size in zip(pieces, sizes, strict=True):
        if size != sizes[0]:
            w.pin(pieces, at(node, "split into unequal parts"))
            break
        w.unify(pieces[0], piece)
    name = next((k for k in ("split_size", "size") if k in node.attrs), None)
    if name is not None:
        w.size_use(node, ("attribute", name, -1), pieces[0])


def unbind(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % len(axes)
    w.pin([axes[dim]], at(node, "taken apart by unbind"))
    for i in range(len(node.outputs)):
        w.output(node, (*axes[:dim], *axes[dim + 1 :]), i)


def select(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % len(axes)
    w.pin([axes[dim]], at(node, "one index is selected"))
    w.output(node, (*axes[:dim], *axes[dim + 1 :]))


def _part(w: GraphWalk, node: gs.Node, axes: Axes, dim: int) -> Factor:
    """Returns the factor of the part of an axis that a node takes or writes, by ``start``, ``end`` and ``step``."""
    factor, given = axes[dim], node.attrs
    size, narrow, bounds = w.algebra.size(factor), node.op == "narrow", slice_bounds(given)
    first, last = bounds.start, bounds.stop
    piece, before, pieces = meaning.part(w, node, factor, bounds)
    if piece == factor:
        if last == size and not isinstance(given.get("end"), bool):
            w.size_use(node, ("attribute", "length" if narrow else "end", -1), factor)
        return factor
    if before:
        w.size_use(node, ("attribute", "start", -1), *before, watched=pieces if first < 0 else ())
    if narrow and pieces:
        w.size_use(node, ("attribute", "length", -1), piece)
    elif len(pieces) > len(before) + 1:
        w.size_use(node, ("attribute", "end", -1), *before, piece, watched=pieces if last < 0 else ())
    elif pieces and last == size:
        w.size_use(node, ("attribute", "end", -1), *before, piece)
    return piece


def sliced(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % len(axes)
    w.output(node, (*axes[:dim], _part(w, node, axes, dim), *axes[dim + 1 :]))


def slice_scatter(w: GraphWalk, node: gs.Node) -> None:
    """A part of a tensor is written over, as in x[..., :n] = y."""
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % len(axes)
    written = (*axes[:dim], _part(w, node, axes, dim), *axes[dim + 1 :])
    for factor, other in zip(written, w.axes_of(node, 1), strict=True):
        w.unify(factor, other)
    w.output(node, axes)


def select_scatter(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % len(axes)
    w.pin([axes[dim]], at(node, "one index is written over"))
    for factor, other in zip((*axes[:dim], *axes[dim + 1 :]), w.axes_of(node, 1), strict=True):
        w.unify(factor, other)
    w.output(node, axes)


def expand(w: GraphWalk, node: gs.Node) -> None:
    meaning.expand(w, node, w.axes_of(node), [int(s) for s in node.attrs["size"]], ("attribute", "size"))


def repeat(w: GraphWalk, node: gs.Node) -> None:
    name = "repeats" if "repeats" in node.attrs else "dims"
    meaning.repeat(w, node, w.axes_of(node), [int(c) for c in node.attrs[name]], ("attribute", name))


def repeat_interleave(w: GraphWalk, node: gs.Node) -> None:
    axes, dim, count = list(w.axes_of(node)), node.attrs.get("dim"), node.attrs.get("repeats")
    if dim is None or not isinstance(count, int):
        w.give_up(node, "repeat_interleave by counts that are not known")
        return
    inner = w.fresh(int(count))
    w.size_use(node, ("attribute", "repeats", -1), inner)
    axes[int(dim) % len(axes)] = w.algebra.merge([axes[int(dim) % len(axes)], inner])
    if node.attrs.get("output_size") is not None:
        w.size_use(node, ("attribute", "output_size", -1), axes[int(dim) % len(axes)])
    w.output(node, tuple(axes))


def pad(w: GraphWalk, node: gs.Node) -> None:
    axes, pads = w.axes_of(node), [int(p) for p in node.attrs["pad" if "pad" in node.attrs else "padding"]]
    meaning.pad(w, node, axes, {len(axes) - 1 - i: (pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2)})


def moved_along(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    w.pin([axes[d] for d in _dims(node, "dims", len(axes))], at(node, f"{node.op} runs along it"))
    w.output(node, axes)


# -- lookups ----------------------------------------------------------------------------------------------------------


def embedding(w: GraphWalk, node: gs.Node) -> None:
    weight, indices = w.axes_of(node, 0), w.axes_of(node, 1)
    w.pin(weight[:1], at(node, "looked up by embedding"))
    w.output(node, (*indices, *weight[1:]))


def index(w: GraphWalk, node: gs.Node) -> None:
    """x[i, :, j]: indexed axes are replaced by those of the indices, in place where they are neighbours, else in front."""
    axes = w.axes_of(node)
    given = [i for i in range(1, len(node.inputs)) if present(node.inputs[i])]
    indices = [w.axes_of(node, i) for i in given]
    if any(_is_mask(node.inputs[i]) for i in given):
        w.give_up(node, "indexed by a mask")
        return
    looked = [i - 1 for i in given]
    if looked == [0] and len(indices[0]) == 1 and len(axes) > 1 and w.constant(node, 0) is not None:
        w.look_up(node, axes[0])
    w.pin([axes[i] for i in looked], at(node, "looked up by index"))
    found = w.broadcast(*indices)
    together = looked == list(range(looked[0], looked[0] + len(looked)))
    front = looked[0] if together else 0
    rest = [f for i, f in enumerate(axes) if i not in looked]
    w.output(node, (*rest[:front], *found, *rest[front:]))


def _is_mask(tensor: gs.Tensor) -> bool:
    return str(tensor.dtype) == "bool"


def gather(w: GraphWalk, node: gs.Node) -> None:
    meaning.gather_along(w, node, int(node.attrs["dim"]) % len(w.axes_of(node)))


def scatter(w: GraphWalk, node: gs.Node) -> None:
    meaning.scatter_along(w, node, int(node.attrs["dim"]) % max(len(w.axes_of(node)), 1))


def index_select(w: GraphWalk, node: gs.Node) -> None:
    axes, indices = w.axes_of(node, 0), w.axes_of(node, 1)
    dim = int(node.attrs["dim"]) % len(axes)
    w.pin([axes[dim]], at(node, "looked up by index_select"))
    w.output(node, (*axes[:dim], *indices, *axes[dim + 1 :]))


# -- made from sizes --------------------------------------------------------------------------------------------------


def filled(w: GraphWalk, node: gs.Node) -> None:
    result = tuple(w.fresh(int(s)) for s in node.attrs["size"])
    _sized(w, node, "size", result)
    w.output(node, result)


def counted(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, tuple(w.fresh(s, at(node, "counted through")) for s in w.inferred[node.outputs[0].name]))


def triangle(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    w.pin(axes[-2:], at(node, "a triangle of it is taken"))
    w.output(node, axes)


# -- what needs the whole axis ----------------------------------------------------------------------------------------


def along_axis(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % max(len(axes), 1)
    meaning.along(w, node, axes, axes[dim : dim + 1])


def glu(w: GraphWalk, node: gs.Node) -> None:
    """The first half of an axis times the sigmoid of the second."""
    axes = list(w.axes_of(node))
    dim = int(node.attrs.get("dim", -1)) % len(axes)
    axes[dim] = meaning.halves(w, axes[dim])
    w.output(node, tuple(axes))


def shorter_axis(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    dim = int(node.attrs["dim"]) % len(axes)
    meaning.best(w, node, axes, dim, next(w.inferred[t.name][dim] for t in node.outputs if present(t)))


def reduce(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    meaning.reduce(w, node, axes, set(_dims(node, "dim", len(axes))), bool(node.attrs.get("keepdim", False)))


def layer_norm(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    meaning.normalise(w, node, axes, len(axes) - len(node.attrs["normalized_shape"]))


def channel_norm(w: GraphWalk, node: gs.Node) -> None:
    """Scale, shift, mean and variance of every channel; the mean and variance of a batch or a sample where not given."""
    axes = w.axes_of(node)
    if node.attrs.get("training", False):
        w.give_up(node, f"{node.op} in training mode")
        return
    meaning.normalise_channels(w, node, axes, node.op == "instance_norm")
    for i in range(1, len(node.outputs)):  # what training saves
        w.output(node, tuple(w.fresh(s) for s in w.inferred[node.outputs[i].name]), i)


def group_norm(w: GraphWalk, node: gs.Node) -> None:
    """Of channels whole groups may go; the native form says the sizes again, and gives mean and deviation of each group."""
    axes = w.axes_of(node)
    groups = meaning.normalised_by_groups(w, node, axes, 1, "num_groups" if node.op == "group_norm" else "group")
    w.output(node, axes)
    if node.op == "native_group_norm":
        w.size_use(node, ("attribute", "C", -1), axes[1])
        for i in (1, 2):
            w.output(node, (axes[0], w.fresh(int(node.attrs["group"])) if groups is None else groups), i)


RESAMPLED = ("linear1d", "bilinear2d", "bicubic2d", "nearest1d", "nearest2d", "_nearest_exact1d", "_nearest_exact2d")


def pool(w: GraphWalk, node: gs.Node) -> None:
    """Indices of what was the largest count through the places of one channel, so that channels may go."""
    axes = w.axes_of(node)
    spatial = int(next(c for c in node.op[::-1] if c.isdigit()))
    where = at(node, f"{node.op} runs over it")
    w.pin(axes[-spatial:], where)
    sizes = w.inferred[node.outputs[0].name][-spatial:]
    for i in range(len(node.outputs)):
        w.output(node, (*axes[:-spatial], *(w.fresh(s, where) for s in sizes)), i)


# -- channels and places ----------------------------------------------------------------------------------------------


def pixel_shuffle(w: GraphWalk, node: gs.Node) -> None:
    """[.., c*n*n, h, w] <-> [.., c, h*n, w*n]: channels outermost, then the row and the column within a block."""
    *batch, channels, high, wide = w.axes_of(node)
    where = at(node, "a place within a block")
    if node.op == "pixel_shuffle":
        n = int(node.attrs["upscale_factor"])
        depth, row, column = w.algebra.split(channels, [w.algebra.size(channels) // n**2, n, n])
        w.pin([row, column], where)
        w.output(node, (*batch, depth, w.algebra.merge([high, row]), w.algebra.merge([wide, column])))
        return
    n = int(node.attrs["downscale_factor"])
    (high, row), (wide, column) = (w.algebra.split(f, [w.algebra.size(f) // n, n]) for f in (high, wide))
    w.pin([row, column], where)
    w.output(node, (*batch, w.algebra.merge([channels, row, column]), high, wide))


def channel_shuffle(w: GraphWalk, node: gs.Node) -> None:
    """[b, groups*n, ..] -> [b, n*groups, ..]: one channel of every group goes with the others of its number."""
    axes, count = w.axes_of(node), int(node.attrs["groups"])
    groups, rest = w.algebra.split(axes[1], [count, w.algebra.size(axes[1]) // count])
    w.pin([groups], at(node, "dealt out by channel_shuffle"))
    w.output(node, (axes[0], w.algebra.merge([rest, groups]), *axes[2:]))


def columns(w: GraphWalk, node: gs.Node) -> None:
    """[.., c, h, w] <-> [.., c*places, blocks], as ``unfold`` and ``fold`` say."""
    axes, where = w.axes_of(node), at(node, f"slid over by {node.op}")
    kernel, sizes = [int(k) for k in node.attrs["kernel_size"]], w.inferred[node.outputs[0].name]
    if node.op == "im2col":
        *batch, channels = axes[:-2]
        w.pin(axes[-2:], where)
        places = [w.fresh(k, where) for k in kernel]
        w.output(node, (*batch, w.algebra.merge([channels, *places]), w.fresh(sizes[-1], where)))
        return
    *batch, packed, blocks = axes
    channels, *places = w.algebra.split(packed, [w.algebra.size(packed) // math.prod(kernel), *kernel])
    w.pin([blocks, *places], where)
    w.output(node, (*batch, channels, *(w.fresh(s, where) for s in sizes[-2:])))


def diagonal(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    where = at(node, "paired by diagonal")
    paired = {int(node.attrs.get(name, i)) % len(axes) for i, name in enumerate(("dim1", "dim2"))}
    w.pin([axes[d] for d in paired], where)
    rest = [f for i, f in enumerate(axes) if i not in paired]
    w.output(node, (*rest, w.fresh(w.inferred[node.outputs[0].name][-1], where)))
