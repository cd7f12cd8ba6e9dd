"""What operators mean on axes and numbers, said once for ONNX and ATen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.axes import Axes, Factor
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.records import ConsumerUse

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


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


def einstein(w: GraphWalk, node: gs.Node, contract: Callable[[Factor], None]) -> None:
    """The rule of an Einsum; ``contract`` is told of a width that is contracted between two activations."""
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
            contract(factors[summed[0]])
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
