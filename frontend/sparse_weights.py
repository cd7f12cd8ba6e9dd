"""Sparse initializers, and Constant nodes that hold a sparse tensor, as the dense weights that they stand for.

A ``SparseTensorProto`` holds the values that are not zero, and where they are: as places in the flattened tensor [n], or as
one index for each axis [n, rank] (IR.md, "Static tensor shapes" and onnx.proto). ONNX Runtime makes them dense when it
loads a model, and so does everything here: cut and repaired, a weight is not sparse any more.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from liar_opt.frontend.weight_files import EXTERNAL_LIMIT, numpy_type, tensor_bytes
from liar_opt.frontend.widen_graph import bodies_of, nodes_within
from liar_opt.runtime.errors import ModelError
from liar_opt.runtime.memory import show_size

INDEX = 8
"""Bytes of the place of one number: the standard wants int64."""
DENSE_LIMIT = 1 << 30
"""Bytes that the sparse tensors of a model may take as dense ones, all together."""


def densified(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, str | None]:
    """Returns a model whose sparse tensors are dense, and a note that says so; the model itself where it has none.

    Raises:
        ModelError: an index is outside its tensor, values and indices do not belong together, or the dense tensors would
            take more than ``DENSE_LIMIT``.
    """
    if not any(True for _ in _sparse(proto)):
        return proto, None
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    found = list(_sparse(result))
    sizes = [_dense_bytes(tensor) for tensor in found]
    if sum(sizes) > DENSE_LIMIT:
        largest = found[int(np.argmax(sizes))]
        raise ModelError(
            f"sparse initializer '{largest.values.name}' and its like take {show_size(sum(sizes))} as dense weights, and "
            f"at most {show_size(DENSE_LIMIT)} are read; give the model with dense weights, in a file of their own"
        )
    stored = sum(tensor_bytes(t.values) + tensor_bytes(t.indices) for t in found)
    for graph in [result.graph, *(body for node in nodes_within(result.graph.node) for body in bodies_of(node))]:
        graph.initializer.extend(_dense(tensor) for tensor in graph.sparse_initializer)
        graph.ClearField("sparse_initializer")
    for node in nodes_within(result.graph.node):
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                tensor = _dense(attribute.sparse_tensor)
                attribute.Clear()
                attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                attribute.t.CopyFrom(tensor)
    return result, (
        f"sparse weights ({len(found)}) are read and written dense, as ONNX Runtime makes them: {show_size(sum(sizes))} "
        f"before the cut, where they were {show_size(stored)}"
    )


def sparsified(
    light: onnx.ModelProto, arrays: Mapping[str, NDArray[Any]]
) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]], list[str]]:
    """Returns a model whose large weights are sparse initializers where these take fewer bytes, and their names.

    A number that stays takes its place beside it: 12 bytes in float32, so that two thirds of a weight must be zero, and
    10 in float16, four fifths.

    Args:
        light: the model; what has its data in ``arrays`` is a stub.
        arrays: the data by name.
    """
    given = {value.name for value in (*light.graph.input, *light.graph.output)}
    chosen = {}
    for tensor in light.graph.initializer:
        value = arrays.get(tensor.name)
        if value is None or tensor.name in given or value.ndim < 1:
            continue
        places = np.flatnonzero(value)
        if places.size * (INDEX + value.itemsize) < value.nbytes:
            chosen[tensor.name] = places
    stored = sum(places.size * (INDEX + arrays[name].itemsize) for name, places in chosen.items())
    if not chosen or stored > EXTERNAL_LIMIT:  # they lie inside the model
        return light, dict(arrays), []
    result = onnx.ModelProto()
    result.CopyFrom(light)
    del result.graph.initializer[:]
    for tensor in light.graph.initializer:
        if tensor.name not in chosen:
            result.graph.initializer.append(tensor)
            continue
        value, places = arrays[tensor.name], chosen[tensor.name]
        flat = np.ascontiguousarray(value).reshape(-1)[places]
        values = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=flat.shape, raw_data=flat.tobytes())
        indices = onnx.numpy_helper.from_array(places.astype(np.int64))
        result.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, list(value.shape)))
    return result, {name: value for name, value in arrays.items() if name not in chosen}, list(chosen)


def _sparse(proto: onnx.ModelProto) -> Iterator[onnx.SparseTensorProto]:
    yield from proto.graph.sparse_initializer
    for node in nodes_within(proto.graph.node):
        for body in bodies_of(node):
            yield from body.sparse_initializer
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                yield attribute.sparse_tensor


def _dense_bytes(tensor: onnx.SparseTensorProto) -> int:
    elements = 1
    for size in tensor.dims:
        elements *= max(int(size), 0)  # beyond what int64 holds, perhaps
    return elements * numpy_type(tensor.values.data_type).itemsize


def _dense(tensor: onnx.SparseTensorProto) -> onnx.TensorProto:
    name, shape = tensor.values.name, tuple(tensor.dims)
    external = onnx.TensorProto.EXTERNAL in (tensor.values.data_location, tensor.indices.data_location)
    try:
        values, indices = (onnx.numpy_helper.to_array(t) for t in (tensor.values, tensor.indices))
        if indices.ndim == 2:
            if indices.shape[1] != len(shape):
                raise ValueError("an index has another number of axes")
            if len(indices) and (indices.min() < 0 or np.any(indices.max(axis=0) >= shape)):
                raise ValueError("an index is outside")
            indices = np.ravel_multi_index(tuple(indices.T), shape) if len(indices) else np.zeros(0, np.int64)
        if indices.shape != values.shape or values.ndim != 1:
            raise ValueError("there are not as many indices as values")
        dense = np.zeros(int(np.prod(shape, dtype=np.int64)), values.dtype)
        if len(indices) and not (0 <= indices.min() and indices.max() < dense.size):
            raise ValueError("an index is outside")
    except (ValueError, TypeError, IndexError) as err:
        why = "its data is in another file" if external else str(err)
        raise ModelError(
            f"sparse initializer '{name}' {list(shape)} cannot be read: {why}; export the model again"
        ) from err
    dense[indices] = values
    return onnx.numpy_helper.from_array(dense.reshape(shape), name)
