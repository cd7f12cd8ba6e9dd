"""What a row of the operator table says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

import onnx_graphsurgeon as gs

from liar_opt.frontend.rules.numbers import Evaluator
from liar_opt.runtime.errors import InternalError

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk

Rule = Callable[["GraphWalk", gs.Node], None]
MICROSOFT = "com.microsoft"
ATEN = "aten"


class Trait(Flag):
    """What is asked of an operator by name."""

    KEEPS_ORDER = auto()  # gives the elements of its first input in order, in another shape or type
    COPIES = auto()  # gives its first input as it is, or in another type
    TURNS = auto()  # permutes axes
    REPEATS = auto()  # repeats elements
    JOINS = auto()  # concatenates
    SPLITS = auto()  # cuts an axis into parts
    SLICES = auto()  # takes a part of an axis
    LOOKS_UP = auto()  # takes the rows that numbers say
    UNARY = auto()  # computes element by element, of one tensor
    BROADCASTS = auto()  # computes element by element, of several
    ARITHMETIC = auto()  # the four operations
    EXTREMES = auto()  # the larger or the smaller
    COMPARES = auto()  # whether one is less or greater
    ADDS = auto()  # the sum of two
    SUMS = auto()  # a sum, or a difference
    SCALES = auto()  # a product, or a quotient
    CHOOSES = auto()  # takes each element of one or of another
    SHARES = auto()  # a softmax along an axis
    MIXES = auto()  # attention of queries, keys and values: inputs 0, 1 and 2
    LINEAR = auto()  # a contraction and nothing else
    SLIDES = auto()  # a convolution with the weight at input 1
    RECURS = auto()  # goes over a sequence with a state
    RANDOM = auto()  # draws numbers
    DROPS = auto()  # gives its input as it is, but in training
    HANDS_ON = auto()  # may stand in a residual stream, which it hands on
    SKIPS = auto()  # adds its first two inputs, and its bias, before it normalises
    CAUSAL = auto()  # no token sees those behind it
    UNPACKS = auto()  # takes small integers out of a large one
    INDEXES = auto()  # stands between token ids and the table that they look up
    SHAPES = auto()  # gives the sizes of a tensor
    POINTS = auto()  # says at which places the largest are, or the smallest


NONE = Trait(0)


@dataclass(frozen=True, eq=False)
class Op:
    """One operator.

    Attributes:
        name: within its domain.
        rule: what it means on axes; None pins all that it touches.
        traits: what is asked of it by name.
        since: the version of the operator set from which on the row holds.
        evaluate: what it computes of known numbers.
        fold: what it computes of weights, where that is not done of numbers.
        bias_inputs: where it adds a constant vector to what it reads.
        contracts: where a weight is that it contracts.
        summand: where it has what it adds to a contraction.
        cosines: where it has a table of cosines, [positions, ..].
        untested: why no test has a graph with it.
    """

    name: str
    rule: Rule | None = None
    traits: Trait = NONE
    since: int = 0
    evaluate: Evaluator | None = None
    fold: Evaluator | None = None
    bias_inputs: tuple[int, ...] = ()
    contracts: tuple[int, ...] = ()
    summand: int | None = None
    cosines: int | None = None
    untested: str = ""


def each(names: str, rule: Rule | None = None, traits: Trait = NONE, **columns: Any) -> list[Op]:
    """Returns rows that differ in the name alone; ``names`` are separated by spaces."""
    return [Op(name, rule, traits, **columns) for name in names.split()]


def table_of(rows: Mapping[str, Iterable[Op]]) -> dict[tuple[str, str], list[Op]]:
    """Returns the rows of each (domain, name), the newest last.

    Raises:
        InternalError: an operator has two rows for one version.
    """
    table: dict[tuple[str, str], list[Op]] = {}
    for domain, ops in rows.items():
        for op in ops:
            same = table.setdefault((domain, op.name), [])
            if any(other.since == op.since for other in same):
                raise InternalError(f"operator {domain}::{op.name} has two rows for version {op.since}")
            same.append(op)
            same.sort(key=lambda one: one.since)
    return table
