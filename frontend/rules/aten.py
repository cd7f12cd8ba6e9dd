"""Rules of ATen operators, those that ``torch.export`` writes.

They read the arguments and call the same meanings as the rules of ONNX. Tensors are a node's inputs in the order of the
operator's schema, all other arguments are its attributes. A size that the program computes from its inputs (``Sym``) is
recorded like any other: it is scaled if it has to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes, Factor
from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.records import Window
from liar_opt.frontend.rules import meaning
from liar_opt.frontend.rules.meaning import at, runs
from liar_opt.frontend.rules.numbers import slice_bounds

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def _dims(node: gs.Node, name: str, rank: int) -> list[int]:
    """Returns the axes named by an attribute (all of them where it is None or empty), none of them negative."""
    value = node.attrs.get(name)
    chosen = [value] if isinstance(value, int) else list(value or range(rank))
    return [int(d) % max(rank, 1) for d in chosen]


def _axis(w: GraphWalk, node: gs.Node) -> tuple[Axes, int]:
    """Returns the axes of the first input and which of them ``dim`` says (the first where nothing does), not negative."""
    axes = w.axes_of(node)
    return axes, int(node.attrs.get("dim", 0)) % max(len(axes), 1)


# -- pointwise --------------------------------------------------------------------------------------------------------


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
        w.pin(w.input_axes(node, 0), runs(node))
        w.output(node, ())


# -- contractions -----------------------------------------------------------------------------------------------------


def linear(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, _product(w, node, 0, 1, bias=("input", 2), swapped=(False, True), mixing=False))


def matmul(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, _product(w, node, 0, 1))


def addmm(w: GraphWalk, node: gs.Node) -> None:
    scale, bias_scale = (float(node.attrs.get(name, 1.0)) for name in ("alpha", "beta"))
    w.output(node, _product(w, node, 1, 2, bias=("input", 0), scale=scale, bias_scale=bias_scale))


def _product(w: GraphWalk, node: gs.Node, left: int, right: int, **more: Any) -> Axes:
    return meaning.product(w, node, w.axes_of(node, left), w.axes_of(node, right), (left, right), **more)


def convolution(w: GraphWalk, node: gs.Node) -> None:
    """With a batch axis; transposed by its name, or where it says so."""
    weight, groups, spatial = w.axes_of(node, 1), int(node.attrs.get("groups", 1)), w.inferred[node.outputs[0].name][2:]
    if len(w.axes_of(node)) != len(weight):
        w.give_up(node, "convolution without a batch")
        return
    if node.attrs.get("transposed", "transpose" in node.op):
        meaning.convolve_transposed(w, node, groups, spatial)
        return
    window = _window(node, w.shape(weight[2:]))
    result = meaning.convolve(w, node, ("groups", groups), spatial, window, computed=True)
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
    w.unify(query[-1], key[-1])
    w.unify(key[-2], value[-2])
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
            meaning.share_heads(w, node, heads[0], groups)
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
    w.consumer(node, 0, 2, 1 + count, 1, **meaning.INSIDE)
    w.consumer(node, 0, 2, 2 + count, 1, reads=node.outputs[0], **meaning.INSIDE)


# -- layout -----------------------------------------------------------------------------------------------------------


def view(w: GraphWalk, node: gs.Node) -> None:
    name = "shape" if "shape" in node.attrs else "size"
    if name not in node.attrs:
        w.give_up(node, "view as another type")
        return
    meaning.reshape(w, node, node.attrs[name], ("attribute", name))


def permute(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    w.output(node, tuple(axes[d] for d in _dims(node, "dims", len(axes))))


def transpose(w: GraphWalk, node: gs.Node) -> None:
    axes = list(w.axes_of(node))
    a, b = (int(node.attrs.get(name, i)) for i, name in enumerate(("dim0", "dim1")))
    if len(axes) > 1:
        axes[a], axes[b] = axes[b], axes[a]
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
    along = int(node.attrs.get("dim", 0 if len(operands[0]) == 1 else 1))  # hstack has none
    w.output(node, w.concatenate(operands, along % len(operands[0])))


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
    axes, dim = _axis(w, node)
    sizes = [w.inferred[t.name][dim] if present(t) else 0 for t in node.outputs]
    pieces = meaning.split(w, node, axes, dim, sizes)
    if "split_sizes" in node.attrs:
        for i, piece in enumerate(pieces):
            w.size_use(node, ("attribute", "split_sizes", i), piece)
        return
    for piece, size in zip(pieces, sizes, strict=True):
        if size != sizes[0]:
            w.pin(pieces, at(node, "split into unequal parts"))
            break
        w.unify(pieces[0], piece)
    name = next((k for k in ("split_size", "size") if k in node.attrs), None)
    if name is not None:
        w.size_use(node, ("attribute", name, -1), pieces[0])


def taken_apart(w: GraphWalk, node: gs.Node) -> None:
    """One index of an axis, or each as an output of its own."""
    axes, dim = _axis(w, node)
    w.pin([axes[dim]], at(node, f"taken apart by {node.op}"))
    for i in range(len(node.outputs)):
        w.output(node, (*axes[:dim], *axes[dim + 1 :]), i)


def _part(w: GraphWalk, node: gs.Node, axes: Axes, dim: int) -> Factor:
    """Returns the factor of the part of an axis that a node takes or writes, by ``start``, ``end`` and ``step``."""
    factor, given = axes[dim], node.attrs
    size, bounds = w.algebra.size(factor), slice_bounds(given)
    first, last = bounds.start, bounds.stop
    piece, before, pieces = meaning.part(w, node, factor, bounds)
    if piece == factor:
        if last == size and not isinstance(given.get("end"), bool):
            w.size_use(node, ("attribute", "end", -1), factor)
        return factor
    if before:
        w.size_use(node, ("attribute", "start", -1), *before, watched=pieces if first < 0 else ())
    if len(pieces) > len(before) + 1:
        w.size_use(node, ("attribute", "end", -1), *before, piece, watched=pieces if last < 0 else ())
    elif pieces and last == size:
        w.size_use(node, ("attribute", "end", -1), *before, piece)
    return piece


def sliced(w: GraphWalk, node: gs.Node) -> None:
    axes, dim = _axis(w, node)
    w.output(node, (*axes[:dim], _part(w, node, axes, dim), *axes[dim + 1 :]))


def slice_scatter(w: GraphWalk, node: gs.Node) -> None:
    """A part of a tensor is written over, as in x[..., :n] = y."""
    axes, dim = _axis(w, node)
    w.broadcast((*axes[:dim], _part(w, node, axes, dim), *axes[dim + 1 :]), w.axes_of(node, 1))
    w.output(node, axes)


def select_scatter(w: GraphWalk, node: gs.Node) -> None:
    axes, dim = _axis(w, node)
    w.pin([axes[dim]], at(node, "one index is written over"))
    w.broadcast((*axes[:dim], *axes[dim + 1 :]), w.axes_of(node, 1))
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


def looked_up(w: GraphWalk, node: gs.Node) -> None:
    """Rows of a table, or what lies along another axis."""
    axes, dim = _axis(w, node)
    w.pin([axes[dim]], at(node, f"looked up by {node.op}"))
    w.output(node, (*axes[:dim], *w.axes_of(node, 1), *axes[dim + 1 :]))


def index(w: GraphWalk, node: gs.Node) -> None:
    """x[i, :, j]: indexed axes are replaced by those of the indices, in place where they are neighbours, else in front."""
    axes, looked = w.axes_of(node), _looked(w, node, len(node.inputs))
    if looked is None:
        return
    if looked == [0] and len(w.axes_of(node, 1)) == 1 and len(axes) > 1 and w.constant(node, 0) is not None:
        w.look_up(node, axes[0])
    w.output(node, _indexed(w, axes, looked, [w.axes_of(node, i + 1) for i in looked]))


def index_put(w: GraphWalk, node: gs.Node) -> None:
    """x[i, :, j] = values, which are broadcast to what is written over."""
    axes, looked = w.axes_of(node), _looked(w, node, len(node.inputs) - 1)
    if looked is None:
        return
    indices = [w.axes_of(node, i + 1) for i in looked]
    for one in indices:
        w.pin(one, at(node, f"looked up by {node.op}"))
    w.broadcast(_indexed(w, axes, looked, indices), w.axes_of(node, len(node.inputs) - 1))
    w.output(node, axes)


def _looked(w: GraphWalk, node: gs.Node, end: int) -> list[int] | None:
    """Returns which axes the inputs from 1 to ``end`` index, pinned; None for a mask, of which nobody knows how many."""
    given = [i for i in range(1, end) if present(node.inputs[i])]
    if any(str(node.inputs[i].dtype) == "bool" for i in given):
        w.give_up(node, "indexed by a mask")
        return None
    axes = w.axes_of(node)
    w.pin([axes[i - 1] for i in given], at(node, f"looked up by {node.op}"))
    return [i - 1 for i in given]


def _indexed(w: GraphWalk, axes: Axes, looked: Sequence[int], indices: Sequence[Axes]) -> Axes:
    found = w.broadcast(*indices)
    together = list(looked) == list(range(looked[0], looked[0] + len(looked)))
    front = looked[0] if together else 0
    rest = [f for i, f in enumerate(axes) if i not in looked]
    return (*rest[:front], *found, *rest[front:])


def gather(w: GraphWalk, node: gs.Node) -> None:
    meaning.gather_along(w, node, _axis(w, node)[1])


def index_along(w: GraphWalk, node: gs.Node) -> None:
    """At indices [n] of an axis something is written, or added: a number, or a tensor that has n of it."""
    axes, dim = _axis(w, node)
    where = at(node, f"written to by {node.op}")
    source = w.input_axes(node, 2) or axes
    w.pin([axes[dim], *w.axes_of(node, 1), *source[dim : dim + 1]], where)
    for i, factor in enumerate(source):
        if i != dim:
            w.unify(axes[i], factor)
    w.output(node, axes)


def scatter(w: GraphWalk, node: gs.Node) -> None:
    meaning.scatter_along(w, node, _axis(w, node)[1])


# -- made from sizes --------------------------------------------------------------------------------------------------


def filled(w: GraphWalk, node: gs.Node) -> None:
    meaning.filled(w, node, node.attrs["size"], ("attribute", "size"))


def counted(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, tuple(w.fresh(s, at(node, "counted through")) for s in w.inferred[node.outputs[0].name]))


# -- what needs the whole axis ----------------------------------------------------------------------------------------


def along_axis(w: GraphWalk, node: gs.Node) -> None:
    axes, dim = _axis(w, node)
    meaning.along(w, node, axes, axes[dim : dim + 1])


def glu(w: GraphWalk, node: gs.Node) -> None:
    """The first half of an axis times the sigmoid of the second."""
    axes, dim = _axis(w, node)
    w.output(node, (*axes[:dim], meaning.halves(w, axes[dim]), *axes[dim + 1 :]))


def shorter_axis(w: GraphWalk, node: gs.Node) -> None:
    axes, dim = _axis(w, node)
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


def pool(w: GraphWalk, node: gs.Node) -> None:
    """Indices of what was the largest count through the places of one channel, so that channels may go."""
    spatial = int(next(c for c in node.op[::-1] if c.isdigit()))
    meaning.pool(w, node, w.axes_of(node), w.inferred[node.outputs[0].name][-spatial:])


def unfold(w: GraphWalk, node: gs.Node) -> None:
    """Windows over one axis: it counts them, and what lies in one comes last."""
    axes, sizes = w.axes_of(node), w.inferred[node.outputs[0].name]
    dim = int(node.attrs["dimension"]) % len(axes)
    w.pin([axes[dim]], runs(node))
    w.output(node, (*axes[:dim], w.fresh(sizes[dim], runs(node)), *axes[dim + 1 :], w.fresh(sizes[-1], runs(node))))


# -- channels and places ----------------------------------------------------------------------------------------------


def pixel_shuffle(w: GraphWalk, node: gs.Node) -> None:
    meaning.depth_to_space(w, node, int(node.attrs["upscale_factor"]), first=False)


def pixel_unshuffle(w: GraphWalk, node: gs.Node) -> None:
    meaning.space_to_depth(w, node, int(node.attrs["downscale_factor"]), first=False)


def channel_shuffle(w: GraphWalk, node: gs.Node) -> None:
    """[b, groups*n, ..] -> [b, n*groups, ..]: one channel of every group goes with the others of its number."""
    axes, count = w.axes_of(node), int(node.attrs["groups"])
    groups, rest = w.algebra.split(axes[1], [count, w.algebra.size(axes[1]) // count])
    w.pin([groups], at(node, "dealt out by channel_shuffle"))
    w.output(node, (axes[0], w.algebra.merge([rest, groups]), *axes[2:]))


def image_to_columns(w: GraphWalk, node: gs.Node) -> None:
    """[.., c, h, w] -> [.., c*places, blocks], as ``unfold`` of ``torch.nn`` says."""
    *batch, channels, high, wide = w.axes_of(node)
    w.pin([high, wide], runs(node))
    places = [w.fresh(int(k), runs(node)) for k in node.attrs["kernel_size"]]
    blocks = w.fresh(w.inferred[node.outputs[0].name][-1], runs(node))
    w.output(node, (*batch, w.algebra.merge([channels, *places]), blocks))


def columns_to_image(w: GraphWalk, node: gs.Node) -> None:
    meaning.columns_to_image(w, node, node.attrs["output_size"], [int(k) for k in node.attrs["kernel_size"]])


def diagonal(w: GraphWalk, node: gs.Node) -> None:
    axes = w.axes_of(node)
    where = at(node, "paired by diagonal")
    paired = {int(node.attrs.get(name, i)) % len(axes) for i, name in enumerate(("dim1", "dim2"))}
    w.pin([axes[d] for d in paired], where)
    rest = [f for i, f in enumerate(axes) if i not in paired]
    w.output(node, (*rest, w.fresh(w.inferred[node.outputs[0].name][-1], where)))
