"""What is known of an ONNX file without running it, quantised or not: its inputs, its size, its vocabulary."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from liar_opt.frontend.causal import positions
from liar_opt.frontend.hand_quantised import hand_quantised_node
from liar_opt.frontend.onnx_model import OnnxModel, read_graph
from liar_opt.frontend.quantised_in import quantised_node
from liar_opt.frontend.sparse_weights import densified
from liar_opt.frontend.tables import vocabulary
from liar_opt.runtime.signatures import InputSpec


@dataclass(frozen=True)
class Interface:
    """An ONNX file.

    Attributes:
        inputs: of the graph.
        parameters: elements of its weights: initializers of floats, or of integers in more than one dimension.
        weight_bytes: bytes of its initializers.
        vocabulary: rows of the table that token ids look up, where that is seen.
        positions: tokens that it has positions for, where that is seen.
    """

    inputs: tuple[InputSpec, ...]
    parameters: int
    weight_bytes: int
    vocabulary: int | None
    positions: int | None


def read_interface(path: Path) -> Interface:
    """Reads an ONNX file.

    Raises:
        ModelError: it cannot be read as ONNX.
    """
    proto, _ = densified(read_graph(path)[0])
    weights = {t.name: t for t in proto.graph.initializer}
    inputs = tuple(_spec(value) for value in proto.graph.input if value.name not in weights)
    parameters = sum(_elements(t) for t in weights.values() if _is_weight(t))
    size = sum(
        _elements(t) * _dtype(t.data_type).itemsize for t in weights.values() if t.data_type != onnx.TensorProto.STRING
    )
    quantised = quantised_node(proto) is not None or hand_quantised_node(proto.graph) is not None
    model = None if quantised else OnnxModel.load(path)
    words = None if model is None else vocabulary(model)
    return Interface(inputs, parameters, size, words, None if model is None else positions(model))


def _spec(value: onnx.ValueInfoProto) -> InputSpec:
    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in kind.shape.dim)
    return InputSpec(value.name, _dtype(kind.elem_type), shape)


def _dtype(element_type: int) -> np.dtype:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element_type))


def _elements(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def _is_weight(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type == onnx.TensorProto.STRING:
        return False
    return _dtype(tensor.data_type).kind not in "iub" or len(tensor.dims) > 1
