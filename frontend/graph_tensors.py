"""Tensors of a graph: what they are, constants that are stored in a narrower type, and what a session takes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from liar_opt.frontend.rules.numbers import tensor_attribute
from liar_opt.frontend.weight_files import (
    PLAIN,
    STUB_LIMIT,
    element_type,
    stub,
)

STANDARD = (None, "", "ai.onnx")
"""Names of the domain of standard operators."""
SKELETON_LIMIT = 1024
"""Constants up to this many elements keep their data in a skeleton: shape inference reads them."""
NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
"""Types in which weights are stored that a graph computes with in a wider one."""


class Narrow(gs.Constant):  # type: ignore[misc]
    """A weight in float32 that its file holds in a narrower type, behind a Cast.

    It is cut and repaired as what the graph computes with, and written as it was: rounded, with its Cast.

    Attributes:
        kind: the type in the file.
        source: the name that it has there.
        cast: the name of the Cast.
        keep: puts what is written where new weights go.
    """

    def __init__(
        self,
        name: str,
        values: np.ndarray,
        kind: np.dtype[Any],
        source: str,
        cast: str,
        keep: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        super().__init__(name, values)
        self.kind, self.source, self.cast, self.keep = kind, source, cast, keep
        self._rounded: tuple[np.ndarray, np.ndarray | None] | None = None

    @property
    def stored(self) -> np.ndarray | None:
        """The values as they are written; None where some are too large for the type, and stay in float32."""
        values = self.values
        if self._rounded is None or self._rounded[0] is not values:
            with np.errstate(over="ignore"):
                rounded: np.ndarray = values.astype(self.kind)
            fits = bool(np.array_equal(np.isfinite(values), np.isfinite(rounded)))
            self._rounded = values, self.keep(rounded) if fits else None
        return self._rounded[1]


class Gridded(gs.Constant):  # type: ignore[misc]
    """A weight that its file holds in whole numbers: cut and repaired as the numbers that they stand for.

    Attributes:
        weight: its name among those of the file (`quantised_in.Reading`).
        axes: for each axis of the values the one that it is in the file.
    """

    def __init__(self, name: str, values: np.ndarray, weight: str, axes: tuple[int, ...]) -> None:
        super().__init__(name, values)
        self.weight, self.axes = weight, axes

    def transposed(self, name: str, values: np.ndarray, perm: Iterable[int]) -> Gridded:
        """Returns what a Transpose makes of it."""
        return Gridded(name, values, self.weight, tuple(self.axes[i] for i in perm))


def like(old: gs.Constant, name: str, values: np.ndarray) -> gs.Constant:
    """Returns a constant that is written as ``old`` is, with other values."""
    if isinstance(old, Gridded) and values.dtype == old.dtype and values.ndim == len(old.axes):
        return Gridded(name, values, old.weight, old.axes)
    if isinstance(old, Narrow) and values.dtype == old.dtype:
        return Narrow(name, values, old.kind, old.source, old.cast, old.keep)
    return gs.Constant(name, values)


def detached_tensors(constants: Iterable[gs.Constant]) -> tuple[list[onnx.TensorProto], dict[str, np.ndarray]]:
    """Returns initializers without the data of the large ones, and that data by name.

    A session takes such data as it lies in memory (``Session(weights=...)``): nothing is serialised or copied.
    """
    stubs, arrays = [], {}
    for constant in constants:
        values = constant._values
        # What is no array is small, or of a type that numpy lacks.
        if isinstance(values, np.ndarray) and values.nbytes > STUB_LIMIT and element_type(values.dtype) in PLAIN:
            arrays[constant.name] = values
            stubs.append(stub(constant.name, element_type(values.dtype), values.shape))
        else:
            stubs.append(small_tensor(constant))
    return stubs, arrays


def small_tensor(constant: gs.Constant) -> onnx.TensorProto:
    """Returns a constant as an initializer with its data."""
    if constant.dtype == np.dtype(object):  # texts, such as the names of classes: graphsurgeon writes numbers alone
        return onnx.numpy_helper.from_array(constant.values, constant.name)
    tensor: onnx.TensorProto = gs.exporters.onnx_exporter.OnnxExporter.export_tensor_proto(constant)
    return tensor


def is_float(dtype: object) -> bool:
    """Returns whether a dtype is floating point (bfloat16 included)."""
    kind = np.dtype(dtype)  # type: ignore[call-overload]
    return bool(np.issubdtype(kind, np.floating)) or kind.name == "bfloat16"


def nudged(value: Any, rng: np.random.Generator) -> Any:
    """Returns a weight moved by its rounding error, up or down at random; what is no weight stays."""
    if not is_float(value.dtype) or value.size < 2:
        return value
    step = np.spacing(np.abs(value)).astype(value.dtype)
    return value + step * rng.choice(np.asarray([-1, 1], value.dtype), value.shape)


def is_constant(tensor: object) -> bool:
    """Returns whether a tensor is an initializer."""
    return isinstance(tensor, gs.Constant)


def present(tensor: object) -> bool:
    """Returns whether an optional input or output is there (an omitted one has no name)."""
    return isinstance(tensor, gs.Constant) or (isinstance(tensor, gs.Variable) and bool(tensor.name))


def constant_value(node: gs.Node) -> np.ndarray | None:
    """Returns what a Constant node holds; None where that is no array of numbers."""
    attributes = node.attrs
    if "value" in attributes:
        return tensor_attribute(attributes["value"])
    for key, dtype in (
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_float", np.float32),
        ("value_floats", np.float32),
    ):
        if key in attributes:
            return np.asarray(attributes[key], dtype)
    return None
