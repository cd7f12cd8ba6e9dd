"""Where a vector of weights scales or shifts the channels of a tensor: gains of normalisations, biases, constants.

A :class:`Site` is a node whose output is  u = gain * n + bias  along one axis, n whatever else it computes. Another gain
and bias are then a linear map of u, channel by channel, and n need not be known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.graph_tensors import is_constant, is_float
from liar_opt.frontend.model import Model
from liar_opt.frontend.rules.operators import has
from liar_opt.frontend.rules.table import Trait

PLACES: dict[str, tuple[int | None, int | None, int]] = {
    "LayerNormalization": (1, 2, -1),
    "RMSNormalization": (1, None, -1),
    "SimplifiedLayerNormalization": (1, None, -1),
    "SkipLayerNormalization": (2, 3, -1),
    "SkipSimplifiedLayerNormalization": (2, None, -1),
    "BatchNormalization": (1, 2, 1),
    "InstanceNormalization": (1, 2, 1),
    "Gemm": (None, 2, -1),
    "Conv": (None, 2, 1),
    "layer_norm": (1, 2, -1),
    "rms_norm": (1, None, -1),
    "batch_norm": (1, 2, 1),
    "group_norm": (1, 2, 1),
    "instance_norm": (1, 2, 1),
    "linear": (None, 2, -1),
    "addmm": (None, 0, -1),
    "convolution": (None, 2, 1),
    "conv1d": (None, 2, 1),
    "conv2d": (None, 2, 1),
}
"""By operator: the inputs with the gain and with the bias (None: there is none), and the axis of channels."""


@dataclass(frozen=True, eq=False)
class Site:
    """A node that scales or shifts channels.

    Attributes:
        node: it.
        gain: the constant with the gains, [n] or with axes of length 1; None where there is none.
        bias: likewise.
        axis: of its output, that has the channels.
        factor: what the node multiplies the bias by.
    """

    node: gs.Node
    gain: gs.Constant | None
    bias: gs.Constant | None
    axis: int
    factor: float = 1.0

    @property
    def output(self) -> str:
        """The name of what it computes."""
        return str(self.node.outputs[0].name)

    @property
    def width(self) -> int:
        """The number of channels."""
        return int(np.prod((self.gain or self.bias).shape))  # type: ignore[union-attr]

    def write(self, alpha: NDArray[np.float64], beta: NDArray[np.float64]) -> None:
        """Gives the node another gain and bias, so that it computes alpha u + beta, [n] each, for what was u."""
        if self.gain is not None:
            _set(self.gain, alpha * np.asarray(self.gain.values, np.float64).reshape(-1))
        if self.bias is not None:
            _set(self.bias, alpha * np.asarray(self.bias.values, np.float64).reshape(-1) + beta / self.factor)


def sites_of(model: Model) -> Iterator[Site]:
    """Yields the sites of a graph, in execution order; those whose constants others read, too, are left out."""
    for node in model.graph.nodes:
        site = _fused(node) if node.op in PLACES else _pointwise(node)
        if site is None:
            continue
        mine = [c for c in (site.gain, site.bias) if c is not None]
        if mine and all(_alone(model, c) for c in mine) and len({int(np.prod(c.shape)) for c in mine}) == 1:
            yield site


def _fused(node: gs.Node) -> Site | None:
    gain, bias, axis = PLACES[node.op]
    if axis == -1 and node.op != "Gemm" and int(node.attrs.get("axis", -1)) != -1:
        return None
    if len(node.attrs.get("normalized_shape", ())) > 1:
        return None
    factor = float(node.attrs.get("beta", 1.0)) if node.op in ("Gemm", "addmm") else 1.0
    first, second = (None if i is None else _vector(node, i) for i in (gain, bias))
    return Site(node, first, second, axis, factor) if factor else None


def _pointwise(node: gs.Node) -> Site | None:
    """Returns the site of a sum with, or a product by, a constant vector."""
    adds, scales = has(node, Trait.ADDS) or node.op == "Add", node.op in ("Mul", "mul")
    if not (adds or scales) or len(node.inputs) != 2 or node.attrs.get("alpha", 1) != 1:
        return None
    for position in (0, 1):
        vector, other = _vector(node, position), node.inputs[1 - position]
        if vector is None or is_constant(other):
            continue
        shape = list(vector.shape)
        axis = next(i for i, n in enumerate(shape) if n > 1) - len(shape)
        return Site(node, vector, None, axis) if scales else Site(node, None, vector, axis)
    return None


def _vector(node: gs.Node, position: int) -> gs.Constant | None:
    """Returns the constant at an input, where it is one number for each of several channels."""
    tensor: Any = node.inputs[position] if len(node.inputs) > position else None
    if tensor is None or not is_constant(tensor) or not is_float(tensor.dtype):
        return None
    return tensor if sum(n > 1 for n in tensor.shape) == 1 else None


def _alone(model: Model, constant: gs.Constant) -> bool:
    """Returns whether one place reads a constant, which is a weight: of a module a parameter, and no buffer."""
    read = sum(t is constant for node in constant.outputs for t in node.inputs)
    given = any(t is constant for t in model.graph.outputs)
    trained = getattr(model, "trained", None)
    return read == 1 and not given and (trained is None or constant.name in trained or constant.name.endswith("_bias"))


def _set(constant: gs.Constant, value: NDArray[np.float64]) -> None:
    constant.values = value.reshape(constant.shape).astype(constant.dtype)
