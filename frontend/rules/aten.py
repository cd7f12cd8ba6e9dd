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
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes, Factor
from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.rules.meaning import einstein, experts_product, normalised_by_groups
from liar_opt.frontend.rules.numbers import resolve_reshape

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk

_FOREVER = 1 << 62
"""Slices end at about this number where they go to the end."""


def _axes(w: GraphWalk, node: gs.Node, position: int = 0) -> Axes:
    axes = w.input_axes(node, position)
    assert axes is not None
    return axes


def _dims(node: gs.Node, name: str, rank: int) -> list[int]:
    """Returns the axes named by an attribute (all of them where it is None or empty), none of them negative."""
    value = node.attrs.get(name)
    chosen = [value] if isinstance(value, int) else list(value or range(rank))
    return [int(d) % max(rank, 1) for d in chosen]


def _where(node: gs.Node, what: str) -> str:
    return f"{what} (node '{node.name}')"


# -- pointwise --------------------------------------------------------------------------------------------------------


def pointwise(w: GraphWalk, node: gs.Node) -> None:
    operands = [a for i in range(len(node.inputs)) if (a := w.input_axes(node, i)) is not None]
    axes = w.broadcast(*operands)
    for i in range(len(node.outputs)):
        w.output(node, axes, i)


def like_first(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, w.input_axes(node, 0))


def extremum(w: GraphWalk, node: gs.Node) -> None:
    """Of two tensors, along an axis, or of everything."""
    if "dim" in node.attrs:
        reduce(w, node)
    elif len(node.inputs) > 1:
        pointwise(w, node)
    else:
        w.pin(w.input_axes(node, 0), _where(node, f"{node.op} runs over it"))
        w.output(node, ())


# -- contractions -----------------------------------------------------------------------------------------------------


def linear(w: GraphWalk, node: gs.Node) -> None:
    x, weight = _axes(w, node, 0), _axes(w, node, 1)
    w.unify(x[-1], weight[-1])
    if w.constant(node, 1) is not None and len(weight) == 2:
        w.consumer(node, 0, -1, 1, 1, bias=("input", 2))
    else:
        w.pin([x[-1]], _where(node, "contracted between two activations"))
    bias = w.input_axes(node, 2)
    if bias is not None:
        w.broadcast(weight[:-1], bias)
    w.count(*x, *weight[:-1])
    w.output(node, (*x[:-1], *weight[:-1]))


def _product(w: GraphWalk, node: gs.Node, left: int, right: int, bias: tuple[Any, int] = ("after", 0)) -> Axes:
    """The product of two inputs as ``torch.matmul`` defines it."""
    a, b = _axes(w, node, left), _axes(w, node, right)
    inner = b[0] if len(b) == 1 else b[-2]
    w.unify(a[-1], inner)
    scale = float(node.attrs.get("alpha", 1.0))
    scales = {"scale": scale, "bias_scale": float(node.attrs.get("beta", 1.0))}
    if w.constant(node, right) is not None and len(b) == 2:
        w.consumer(node, left, -1, right, 0, bias=bias, **scales)
    elif w.constant(node, left) is not None and len(a) == 2 and len(b) > 1 and bias[0] == "after":
        w.consumer(node, right, -2, left, 1, output_axis=-2, scale=scale)
    elif (left, right) == (0, 1) and experts_product(w, node, a, b, scale):
        pass
    else:
        w.pin([a[-1]], _where(node, "contracted between two activations"))
        w.mix(a, b)
    batch = w.broadcast(a[:-2], b[:-2]) if a[:-2] or b[:-2] else ()
    if not any(w.constant(node, i) is not None for i in (left, right)):
        w.batched += batch
    result = (*batch, *(a[-2:-1] if len(a) > 1 else ()), *(b[-1:] if len(b) > 1 else ()))
    w.count(a[-1], *result)
    return result


def matmul(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, _product(w, node, 0, 1))


def addmm(w: GraphWalk, node: gs.Node) -> None:
    axes = _product(w, node, 1, 2, ("input", 0))
    w.output(node, w.broadcast(axes, _axes(w, node, 0)))


def einsum(w: GraphWalk, node: gs.Node) -> None:
    einstein(w, node, lambda width: w.pin([width], _where(node, "contracted between two activations")))


def convolution(w: GraphWalk, node: gs.Node) -> None:
    x, weight, bias = _axes(w, node, 0), _axes(w, node, 1), w.input_axes(node, 2)
    kernel, spatial = w.shape(weight)[2:], w.inferred[node.outputs[0].name][2:]
    if len(x) != len(weight) or node.attrs.get("transposed", False):
        w.give_up(node, "convolution without a batch, or transposed")
        return
    groups = int(node.attrs.get("groups", 1))
    if groups == 1:
        w.unify(x[1], weight[1])
        w.channels += [x[1], weight[0]]
        if w.constant(node, 1) is None or any(k != 1 for k in kernel):
            w.pin([x[1]], _where(node, "input channels of a convolution that is no matrix product"))
        else:
            w.consumer(node, 0, 1, 1, 1, bias=("input", 2), output_axis=1 - len(x))
    elif groups == w.algebra.size(x[1]) == w.algebra.size(weight[0]):
        w.unify(x[1], weight[0])  # depthwise: every channel by itself
        w.size_use(node, ("attribute", "groups", -1), x[1])
    else:
        w.pin([x[1], *weight], _where(node, "grouped convolution"))
    if bias is not None:
        w.unify(weight[0], bias[0])
    slid = _where(node, "slid over by a convolution")
    w.pin(x[2:], slid)
    w.flops += 2 * math.prod([*w.shape((x[0], *weight)), *spatial])
    w.output(node, (x[0], weight[0], *(w.fresh(s, slid) for s in spatial)))


def attention(w: GraphWalk, node: gs.Node) -> None:
    """Queries [.., h, s, e], keys [.., k, t, e], values [.., k, t, v]; h is a multiple of k with ``enable_gqa``."""
    query, key, value, mask = _axes(w, node, 0), _axes(w, node, 1), _axes(w, node, 2), w.input_axes(node, 3)
    where = _where(node, f"inside {node.op}")
    w.unify(key[-2], value[-2])
    w.unify(query[-1], key[-1])
    w.pin([query[-1], query[-2], key[-2]], where)
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
            w.pin(parts[1:], _where(node, f"heads of one group inside {node.op}"))
        else:
            heads = w.broadcast(heads, (groups,))
    w.batched += [*batch, *heads]
    if mask is not None:
        w.pin(mask[-2:], where)
        w.broadcast((*batch, *heads), mask[:-2])
    w.count(*query, key[-2])
    w.count(*query[:-1], key[-2], value[-1])
    w.output(node, (*batch, *heads, query[-2], value[-1]))


# -- layout -----------------------------------------------------------------------------------------------------------


def _sized(w: GraphWalk, node: gs.Node, name: str, factors: Sequence[Factor]) -> None:
    """Records that the elements of an attribute are the sizes of ``factors``; -1 says so by itself."""
    for i, (number, factor) in enumerate(zip(node.attrs[name], factors, strict=True)):
        if int(number) != -1:
            w.size_use(node, ("attribute", name, i), factor)


def view(w: GraphWalk, node: gs.Node) -> None:
    name = "shape" if "shape" in node.attrs else "size"
    axes = _axes(w, node)
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
    axes = _axes(w, node)
    rank = max(len(axes), 1)
    start, end = int(node.attrs["start_dim"]) % rank, int(node.attrs["end_dim"]) % rank
    w.output(node, (*axes[:start], w.algebra.merge(axes[start : end + 1]), *axes[end + 1 :]))


def unflatten(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % len(axes)
    sizes = resolve_reshape([int(s) for s in node.attrs["sizes"]], [w.algebra.size(axes[dim])], True)
    if sizes is None:
        w.give_up(node, "unflatten that does not fit")
        return
    parts = w.algebra.split(axes[dim], sizes)
    _sized(w, node, "sizes", parts)
    w.output(node, (*axes[:dim], *parts, *axes[dim + 1 :]))


def permute(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    w.output(node, tuple(axes[d] for d in _dims(node, "dims", len(axes))))


def transpose(w: GraphWalk, node: gs.Node) -> None:
    axes = list(_axes(w, node))
    if "dim0" in node.attrs:
        a, b = int(node.attrs["dim0"]) % len(axes), int(node.attrs["dim1"]) % len(axes)
        axes[a], axes[b] = axes[b], axes[a]
    elif node.op == "mT":
        axes[-2:] = axes[-2:][::-1]
    else:
        axes = axes[::-1]
    w.output(node, tuple(axes))


def squeeze(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    chosen = set(_dims(node, "dim", len(axes)))
    w.output(node, tuple(f for i, f in enumerate(axes) if i not in chosen or w.algebra.size(f) != 1))


def unsqueeze(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % (len(axes) + 1)
    w.output(node, (*axes[:dim], w.fresh(1), *axes[dim:]))


def cat(w: GraphWalk, node: gs.Node) -> None:
    given = [_axes(w, node, i) for i in range(len(node.inputs))]
    # torch lets a vector without elements stand for a tensor of any rank.
    operands = [a for a in given if [w.algebra.size(f) for f in a] != [0]] or given[:1]
    w.output(node, w.concatenate(operands, int(node.attrs["dim"]) % len(operands[0])))


def as_complex(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    w.pin(axes[-1:], _where(node, "real and imaginary part"))
    w.output(node, axes[:-1])


def as_real(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, (*_axes(w, node), w.fresh(2, _where(node, "real and imaginary part"))))


def stack(w: GraphWalk, node: gs.Node) -> None:
    axes = w.broadcast(*(_axes(w, node, i) for i in range(len(node.inputs))))
    dim = int(node.attrs["dim"]) % (len(axes) + 1)
    w.output(node, (*axes[:dim], w.fresh(len(node.inputs), _where(node, "stacked")), *axes[dim:]))


def _pieces(w: GraphWalk, node: gs.Node, axes: Axes, dim: int, sizes: Sequence[int]) -> list[Factor]:
    pieces = w.algebra.cut(axes[dim], [int(s) for s in sizes])
    for i, piece in enumerate(pieces):
        w.output(node, (*axes[:dim], piece, *axes[dim + 1 :]), i)
    return pieces


def split(w: GraphWalk, node: gs.Node) -> None:
    """By a list of sizes, by one size, or by a count; by size and by count the parts must stay equal."""
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % len(axes)
    sizes = [w.inferred[t.name][dim] if present(t) else 0 for t in node.outputs]
    pieces = _pieces(w, node, axes, dim, sizes)
    if "split_sizes" in node.attrs:
        _sized(w, node, "split_sizes", pieces)
        return
    for piece, size in zip(pieces, sizes, strict=True):
        if size != sizes[0]:
            w.pin(pieces, _where(node, "split into unequal parts"))
            break
        w.unify(pieces[0], piece)
    name = next((k for k in ("split_size", "size") if k in node.attrs), None)
    if name is not None:
        w.size_use(node, ("attribute", name, -1), pieces[0])


def unbind(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % len(axes)
    w.pin([axes[dim]], _where(node, "taken apart by unbind"))
    for i in range(len(node.outputs)):
        w.output(node, (*axes[:dim], *axes[dim + 1 :]), i)


def select(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % len(axes)
    w.pin([axes[dim]], _where(node, "one index is selected"))
    w.output(node, (*axes[:dim], *axes[dim + 1 :]))


def _part(w: GraphWalk, node: gs.Node, axes: Axes, dim: int) -> Factor:
    """Returns the factor of the part of an axis that a node takes or writes, by ``start``, ``end`` and ``step``."""
    factor, given = axes[dim], node.attrs
    size = w.algebra.size(factor)
    first = int(given.get("start") or 0)
    narrow = node.op == "narrow"
    last = first + int(given["length"]) if narrow else int(_FOREVER if given.get("end") is None else given["end"])
    start, stop, step = slice(first, last, int(given.get("step", 1))).indices(size)
    if (start, stop, step) == (0, size, 1):
        if last == size and not isinstance(given.get("end"), bool):
            w.size_use(node, ("attribute", "length" if narrow else "end", -1), factor)
        return factor
    if step != 1 or stop <= start:
        return w.strided(factor, range(start, stop, step), _where(node, "sliced with a step"))
    pieces = w.algebra.cut(factor, [s for s in (start, stop - start, size - stop) if s])
    before, piece = (pieces[:1], pieces[1]) if start else ([], pieces[0])
    if start:
        w.size_use(node, ("attribute", "start", -1), *before, watched=tuple(pieces) if first < 0 else ())
    if narrow:
        w.size_use(node, ("attribute", "length", -1), piece)
    elif stop < size:
        w.size_use(node, ("attribute", "end", -1), *before, piece, watched=tuple(pieces) if last < 0 else ())
    elif last == size:
        w.size_use(node, ("attribute", "end", -1), *before, piece)
    return piece


def sliced(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % len(axes)
    w.output(node, (*axes[:dim], _part(w, node, axes, dim), *axes[dim + 1 :]))


def slice_scatter(w: GraphWalk, node: gs.Node) -> None:
    """A part of a tensor is written over, as in x[..., :n] = y."""
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % len(axes)
    written = (*axes[:dim], _part(w, node, axes, dim), *axes[dim + 1 :])
    for factor, other in zip(written, _axes(w, node, 1), strict=True):
        w.unify(factor, other)
    w.output(node, axes)


def select_scatter(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % len(axes)
    w.pin([axes[dim]], _where(node, "one index is written over"))
    for factor, other in zip((*axes[:dim], *axes[dim + 1 :]), _axes(w, node, 1), strict=True):
        w.unify(factor, other)
    w.output(node, axes)


def expand(w: GraphWalk, node: gs.Node) -> None:
    axes, sizes = _axes(w, node), [int(s) for s in node.attrs["size"]]
    result: list[Factor] = []
    for i, size in enumerate(sizes):
        place = i - (len(sizes) - len(axes))
        factor = axes[place] if place >= 0 else None
        if factor is None or (w.algebra.size(factor) == 1 and size not in (1, -1)):
            factor = w.fresh(size)
        result.append(factor)
    _sized(w, node, "size", result)
    w.output(node, tuple(result))


def repeat(w: GraphWalk, node: gs.Node) -> None:
    axes = list(_axes(w, node))
    name = "repeats" if "repeats" in node.attrs else "dims"
    counts = [int(c) for c in node.attrs[name]]
    counts = [1] * (len(axes) - len(counts)) + counts
    axes = [*(w.fresh(1) for _ in range(len(counts) - len(axes))), *axes]
    offset = len(counts) - len(node.attrs[name])
    for i, count in enumerate(counts):
        if count != 1:
            outer = w.fresh(count)
            w.size_use(node, ("attribute", name, i - offset), outer)
            axes[i] = w.algebra.merge([outer, axes[i]])
    w.output(node, tuple(axes))


def repeat_interleave(w: GraphWalk, node: gs.Node) -> None:
    axes, dim, count = list(_axes(w, node)), node.attrs.get("dim"), node.attrs.get("repeats")
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
    axes, pads = list(_axes(w, node)), [int(p) for p in node.attrs["pad" if "pad" in node.attrs else "padding"]]
    where = _where(node, "padded")
    for i in range(len(pads) // 2):
        extra = pads[2 * i] + pads[2 * i + 1]
        if pads[2 * i] or pads[2 * i + 1]:
            place = len(axes) - 1 - i
            w.pin([axes[place]], where)
            axes[place] = w.fresh(w.algebra.size(axes[place]) + extra, where)
    w.output(node, tuple(axes))


def moved_along(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    w.pin([axes[d] for d in _dims(node, "dims", len(axes))], _where(node, f"{node.op} runs along it"))
    w.output(node, axes)


# -- lookups ----------------------------------------------------------------------------------------------------------


def embedding(w: GraphWalk, node: gs.Node) -> None:
    weight, indices = _axes(w, node, 0), _axes(w, node, 1)
    w.pin(weight[:1], _where(node, "looked up by embedding"))
    w.output(node, (*indices, *weight[1:]))


def index(w: GraphWalk, node: gs.Node) -> None:
    """x[i, :, j]: indexed axes are replaced by those of the indices, in place where they are neighbours, else in front."""
    axes = _axes(w, node)
    given = [i for i in range(1, len(node.inputs)) if present(node.inputs[i])]
    indices = [_axes(w, node, i) for i in given]
    if any(_is_mask(node.inputs[i]) for i in given):
        w.give_up(node, "indexed by a mask")
        return
    looked = [i - 1 for i in given]
    if looked == [0] and len(indices[0]) == 1 and len(axes) > 1 and w.constant(node, 0) is not None:
        w.look_up(node, axes[0])
    w.pin([axes[i] for i in looked], _where(node, "looked up by index"))
    found = w.broadcast(*indices)
    together = looked == list(range(looked[0], looked[0] + len(looked)))
    front = looked[0] if together else 0
    rest = [f for i, f in enumerate(axes) if i not in looked]
    w.output(node, (*rest[:front], *found, *rest[front:]))


def _is_mask(tensor: gs.Tensor) -> bool:
    return str(tensor.dtype) == "bool"


def gather(w: GraphWalk, node: gs.Node) -> None:
    axes, indices = _axes(w, node, 0), _axes(w, node, 1)
    dim = int(node.attrs["dim"]) % len(axes)
    where = _where(node, "looked up by gather")
    w.pin([axes[dim], indices[dim]], where)
    for i, (a, b) in enumerate(zip(axes, indices, strict=True)):
        if i == dim:
            continue
        if w.algebra.size(a) == w.algebra.size(b):
            w.unify(a, b)
        else:
            w.pin([a, b], where)
    w.output(node, indices)


def scatter(w: GraphWalk, node: gs.Node) -> None:
    """Elements are written to places along an axis that data says; the others must be as long as those of the places."""
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % max(len(axes), 1)
    where = _where(node, f"written to by {node.op}")
    for position in range(1, len(node.inputs)):
        for i, (a, b) in enumerate(zip(axes, _axes(w, node, position), strict=True)):
            if i != dim and w.algebra.size(a) == w.algebra.size(b):
                w.unify(a, b)
            else:
                w.pin([a, b], where)
    w.output(node, axes)


def index_select(w: GraphWalk, node: gs.Node) -> None:
    axes, indices = _axes(w, node, 0), _axes(w, node, 1)
    dim = int(node.attrs["dim"]) % len(axes)
    w.pin([axes[dim]], _where(node, "looked up by index_select"))
    w.output(node, (*axes[:dim], *indices, *axes[dim + 1 :]))


# -- made from sizes --------------------------------------------------------------------------------------------------


def filled(w: GraphWalk, node: gs.Node) -> None:
    result = tuple(w.fresh(int(s)) for s in node.attrs["size"])
    _sized(w, node, "size", result)
    w.output(node, result)


def counted(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, tuple(w.fresh(s, _where(node, "counted through")) for s in w.inferred[node.outputs[0].name]))


def triangle(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    w.pin(axes[-2:], _where(node, "a triangle of it is taken"))
    w.output(node, axes)


# -- what needs the whole axis ----------------------------------------------------------------------------------------


def along_axis(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % max(len(axes), 1)
    where = _where(node, f"{node.op} runs over it")
    w.pin(axes[dim : dim + 1], where)
    for i in range(len(node.outputs)):
        w.output(node, axes, i)


def glu(w: GraphWalk, node: gs.Node) -> None:
    """The first half of an axis times the sigmoid of the second."""
    axes = list(_axes(w, node))
    dim = int(node.attrs.get("dim", -1)) % len(axes)
    half = w.algebra.size(axes[dim]) // 2
    values, gates = w.algebra.cut(axes[dim], [half, half])
    w.unify(values, gates)
    axes[dim] = values
    w.output(node, tuple(axes))


def shorter_axis(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    dim = int(node.attrs["dim"]) % len(axes)
    where = _where(node, f"{node.op} runs over it")
    w.pin([axes[dim]], where)
    for i, tensor in enumerate(node.outputs):
        if present(tensor):
            size = w.inferred[tensor.name][dim]
            w.output(node, (*axes[:dim], w.fresh(size, where), *axes[dim + 1 :]), i)


def reduce(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    gone = set(_dims(node, "dim", len(axes)))
    w.pin([axes[d] for d in gone if d < len(axes)], _where(node, f"{node.op} runs over it"))
    keep = bool(node.attrs.get("keepdim", False))
    result = tuple(w.fresh(1) if i in gone else f for i, f in enumerate(axes) if keep or i not in gone)
    for i in range(len(node.outputs)):
        w.output(node, result, i)


def layer_norm(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    first = len(axes) - len(node.attrs["normalized_shape"])
    w.pin(axes[first:], _where(node, f"{node.op} runs over it"))
    for i in range(1, len(node.inputs)):
        extra = w.input_axes(node, i)
        if extra is not None:
            w.broadcast(axes[first:], extra)
    w.output(node, axes)
    for i in range(1, len(node.outputs)):
        w.output(node, (*axes[:first], *(w.fresh(1) for _ in axes[first:])), i)


def channel_norm(w: GraphWalk, node: gs.Node) -> None:
    """Scale, shift, mean and variance of every channel; the mean and variance of a batch or a sample where not given."""
    axes = _axes(w, node)
    if node.attrs.get("training", False):
        w.give_up(node, f"{node.op} in training mode")
        return
    if node.op == "instance_norm":
        w.pin(axes[2:], _where(node, f"{node.op} runs over it"))
        w.channels.append(axes[1])
    for i in range(1, len(node.inputs)):
        vector = w.input_axes(node, i)
        if vector is not None:
            w.unify(axes[1], vector[0])
    w.output(node, axes)
    for i in range(1, len(node.outputs)):  # what training saves
        w.output(node, tuple(w.fresh(s) for s in w.inferred[node.outputs[i].name]), i)


def group_norm(w: GraphWalk, node: gs.Node) -> None:
    """Of channels whole groups may go; the native form says the sizes again, and gives mean and deviation of each group."""
    axes = _axes(w, node)
    groups = normalised_by_groups(w, node, axes, 1, "num_groups" if node.op == "group_norm" else "group")
    w.output(node, axes)
    if node.op == "native_group_norm":
        w.size_use(node, ("attribute", "C", -1), axes[1])
        for i in (1, 2):
            w.output(node, (axes[0], w.fresh(int(node.attrs["group"])) if groups is None else groups), i)


RESAMPLED = ("linear1d", "bilinear2d", "bicubic2d", "nearest1d", "nearest2d", "_nearest_exact1d", "_nearest_exact2d")


def pool(w: GraphWalk, node: gs.Node) -> None:
    """Indices of what was the largest count through the places of one channel, so that channels may go."""
    axes = _axes(w, node)
    spatial = int(next(c for c in node.op[::-1] if c.isdigit()))
    where = _where(node, f"{node.op} runs over it")
    w.pin(axes[-spatial:], where)
    sizes = w.inferred[node.outputs[0].name][-spatial:]
    for i in range(len(node.outputs)):
        w.output(node, (*axes[:-spatial], *(w.fresh(s, where) for s in sizes)), i)


# -- channels and places ----------------------------------------------------------------------------------------------


def pixel_shuffle(w: GraphWalk, node: gs.Node) -> None:
    """[.., c*n*n, h, w] <-> [.., c, h*n, w*n]: channels outermost, then the row and the column within a block."""
    *batch, channels, high, wide = _axes(w, node)
    where = _where(node, "a place within a block")
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
    axes, count = _axes(w, node), int(node.attrs["groups"])
    groups, rest = w.algebra.split(axes[1], [count, w.algebra.size(axes[1]) // count])
    w.pin([groups], _where(node, "dealt out by channel_shuffle"))
    w.output(node, (axes[0], w.algebra.merge([rest, groups]), *axes[2:]))


def columns(w: GraphWalk, node: gs.Node) -> None:
    """[.., c, h, w] <-> [.., c*places, blocks], as ``unfold`` and ``fold`` say."""
    axes, where = _axes(w, node), _where(node, f"slid over by {node.op}")
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


def grid_sampler(w: GraphWalk, node: gs.Node) -> None:
    """X [b, c, ..] is read at the places of a grid [b, .., r]."""
    axes, grid = _axes(w, node), _axes(w, node, 1)
    w.unify(axes[0], grid[0])
    w.pin([*axes[2:], *grid[1:]], _where(node, f"sampled by {node.op}"))
    w.output(node, (*axes[:2], *grid[1:-1]))


def diagonal(w: GraphWalk, node: gs.Node) -> None:
    axes = _axes(w, node)
    where = _where(node, "paired by diagonal")
    paired = {int(node.attrs.get(name, i)) % len(axes) for i, name in enumerate(("dim1", "dim2"))}
    w.pin([axes[d] for d in paired], where)
    rest = [f for i, f in enumerate(axes) if i not in paired]
    w.output(node, (*rest, w.fresh(w.inferred[node.outputs[0].name][-1], where)))
