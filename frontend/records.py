"""What a walk records for a later rewrite: uses of constants, contractions, sizes, numbers, products, caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.axes import Axes, Factor
from liar_opt.frontend.rules.numbers import Array

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, eq=False)
class ConstantUse:
    """One use of a constant: input ``position`` of ``node``; ``axes`` are the factors of the constant's axes."""

    node: gs.Node
    position: int
    constant: gs.Constant
    axes: Axes


@dataclass(frozen=True, eq=False)
class Lookup:
    """Weights of experts in one constant, [experts, ..], of which each row of the data takes one.

    ``node`` looks them up, in its first input, by ``numbers``: the expert of each row. ``root`` is the tensor that the
    numbers were laid out from; lookups by the same root take the same expert for the same row. ``stack`` counts them.
    """

    node: gs.Node
    numbers: gs.Tensor
    root: gs.Tensor
    stack: Factor


BiasKind = Literal["after", "input", "none"]


@dataclass(frozen=True)
class Window:
    """How a convolution slides over its input: what lies under the kernel at one place is a row of its product.

    Attributes:
        kernel: sizes, one for each axis that is slid over; so are the others.
        strides: steps.
        dilations: steps within the kernel.
        pads: zeros before each axis, then behind each.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def size(self) -> int:
        """Places under the kernel."""
        return math.prod(self.kernel)


@dataclass(frozen=True, eq=False)
class ConsumerUse:
    """A linear contraction y = x W (+ b).

    ``weight``, at input ``weight_position`` of ``node``, is contracted over its axis ``weight_axis`` with axis
    ``activation_axis`` of ``activation``; ``width`` is the contracted factor.

    ``bias`` says where b' belongs: ``("input", k)`` the node's own input k (scaled by ``bias_scale``),
    ``("after", 0)`` an addition behind the node, or ``("none", 0)`` nowhere. ``scale`` is what the node multiplies the
    product by (alpha).

    With a ``lookup`` each row has the weight of its own expert, and ``weight`` is that of all, contracted over
    ``weight_axis`` behind its first: an input of the node that looks it up.

    With a ``window`` the node is a convolution, and x what lies under its kernel: ``width`` is that of the kernel times the
    channels, ``channels`` the latter, and W [places, channels, outputs] as a matrix.
    """

    node: gs.Node
    activation: gs.Variable
    activation_axis: int
    weight: gs.Constant
    weight_position: int
    weight_axis: int
    width: Factor
    bias: tuple[BiasKind, int] = ("after", 0)
    scale: float = 1.0
    bias_scale: float = 1.0
    output_axis: int = -1
    lookup: Lookup | None = None
    window: Window | None = None
    channels: Factor | None = None

    def matrix(self, value: NDArray[Any]) -> NDArray[Any]:
        """Returns W, [n, m], of a value of the weight."""
        if self.window is None:
            rows = np.moveaxis(value, self.weight_axis, 0)
            return rows.reshape(len(rows), -1)
        rows = value.transpose(*range(2, value.ndim), 1, 0)
        return rows.reshape(-1, rows.shape[-1])

    def laid_out(self, matrix: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
        """Returns the value of the weight, of ``shape``, whose W is ``matrix``."""
        if self.window is None:
            rest = [n for i, n in enumerate(shape) if i != self.weight_axis]
            return np.ascontiguousarray(np.moveaxis(matrix.reshape(-1, *rest), 0, self.weight_axis))
        rows = matrix.reshape(*self.window.kernel, -1, shape[0])
        return np.ascontiguousarray(rows.transpose(rows.ndim - 1, rows.ndim - 2, *range(rows.ndim - 2)))

    def cut_axis(self, rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Returns the positions of the weight's axis, of ``size``, that rows of W are of."""
        return rows if self.window is None else np.unique(rows % size)

    @property
    def column_axes(self) -> tuple[int, ...]:
        """The axes of the weight that the columns of W are of."""
        return (0,) if self.window else tuple(i for i in range(len(self.weight.shape)) if i != self.weight_axis)

    @property
    def contracted(self) -> Factor:
        """The axis of the weight that is contracted; without the places under a kernel, which all stay."""
        return self.width if self.channels is None else self.channels

    @property
    def holder(self) -> gs.Node:
        """The node that has the weight among its inputs."""
        return self.node if self.lookup is None else self.lookup.node


@dataclass(frozen=True, eq=False)
class SizeUse:
    """A number that must equal the summed sizes of ``factors``.

    ``value`` is what it was, ``dynamic`` whether that depends on the sizes of the graph's inputs.

    A number that counts from the end of an axis depends on what is ``watched`` too.

    ``where`` is ``("input", position, element)`` for an element of a shape tensor, ``("attribute", name, element)`` for
    an attribute (``element`` -1 for a scalar), ``("split", "", element)`` for a part of a Split that says no sizes.
    """

    node: gs.Node
    where: tuple[str, int | str, int]
    factors: tuple[Factor, ...]
    value: int
    dynamic: bool = False
    watched: tuple[Factor, ...] = ()


@dataclass(frozen=True, eq=False)
class ValueUse:
    """Input ``position`` of ``node`` is a number computed from shapes that enters the data.

    ``value`` is what it was, ``dynamic`` whether that depends on the sizes of the graph's inputs.
    """

    node: gs.Node
    position: int
    value: Array
    dynamic: bool = False


@dataclass(frozen=True, eq=False)
class ProductUse:
    """A product of the two activations that ``node`` reads, contracted over ``width``."""

    node: gs.Node
    width: Factor


@dataclass(frozen=True, eq=False)
class StandIn:
    """What stands in for a tensor: T := X A + b, or b alone. Both arrays are in the type of the tensors.

    Attributes:
        target: the name of T, [.., m]; one of the tensors that a node makes, and the only one of it that is read.
        source: the name of X, [.., n], which is made before T and has its rows. Without A it is as large as T, which has
            its shape where a reader does not spread b by itself.
        matrix: A, [n, m]; None for b alone.
        bias: b, [m].
    """

    target: str
    source: str
    matrix: NDArray[Any] | None
    bias: NDArray[Any]

    @property
    def parameters(self) -> int:
        """Elements of A and b."""
        return self.bias.size + (0 if self.matrix is None else self.matrix.size)


@dataclass(frozen=True)
class Cache:
    """Past keys or values: graph input ``past`` comes back as graph output ``present``, longer along ``axis``.

    Its other inner axes, its heads, may lose indices, with both shapes.
    """

    past: str
    present: str
    axis: int
