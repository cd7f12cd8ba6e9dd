"""ONNX files in and out, and the graph in the form that the passes work on.

:class:`OnnxModel` holds an onnx-graphsurgeon graph. Loading checks what can be known of a file (truncated, external
data missing, quantised); :meth:`OnnxModel.normalise` brings exporters' habits to one form: constants as initializers,
no Identity, weights stored the way they are multiplied, every node named. Weights shared by several nodes stay shared:
equal folds of equal constants give one constant.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from liar_opt.frontend.merged_decoder import MergedDecoder, names_read, side_by_side, unfold
from liar_opt.frontend.onnx_values import evaluate, tensor_attribute
from liar_opt.frontend.weight_files import (
    PLAIN,
    STUB_LIMIT,
    completed,
    element_type,
    lightened,
    numpy_type,
    read_model,
    stub,
    write_model,
)
from liar_opt.frontend.widen_graph import narrow_values, nodes_within, widen
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.errors import ModelError
from liar_opt.runtime.signatures import InputSpec

gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR

QUANTISED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
QUANTISED_PREFIXES = (
    *("QLinear", "QGemm", "QAttention", "QMoE", "QOrdered", "GatherBlockQuantized"),
    *("MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MatMulBlockQuantized", "MatMulIntegerToFloat"),
)
STANDARD = {"", "ai.onnx"}
FOLD_LIMIT = 1 << 20
"""Folding may not write more elements than this, unless the result is no larger than its largest input."""
CACHE_SHAPES = "liar_opt.cache_shapes"
"""Key of the metadata that says the new shapes of cache inputs and outputs: JSON, name -> shape."""
SKELETON_LIMIT = 1024
"""Constants up to this many elements keep their data in a skeleton: shape inference reads them."""
MOVERS = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze")
"""Operators that give a tensor another shape or type and leave its values alone."""
FUSION_NAME = re.compile(r"_token_\d+$|^gemm_(input|output)_shape$")


@dataclass(frozen=True, eq=False)
class Stored:
    """A model as it was given: its proto without the data of large initializers, and that data, mapped where it is long.

    Attributes:
        proto: the model; what has its data in ``arrays`` is a stub.
        arrays: the data by initializer; it is never written to.
        source: the file.
        store: where new weights go that need not be in memory; None keeps them.
        merged: what the graph was, if it was a merged decoder and is flat here.
    """

    proto: onnx.ModelProto
    arrays: dict[str, np.ndarray]
    source: Path | None = None
    store: ArrayStore | None = None
    merged: MergedDecoder | None = None

    def model(self) -> "OnnxModel":
        """Returns the model as a graph; each call makes a new one, weights are shared."""
        order = {tensor.name: i for i, tensor in enumerate(self.proto.graph.initializer)}
        metadata = {p.key: p.value for p in self.proto.metadata_props if p.key != CACHE_SHAPES}
        graph = gs.import_onnx(self.proto)
        for part in [graph, *graph.subgraphs(recursive=True)]:
            for tensor in part.tensors().values():
                if isinstance(tensor, gs.Constant) and tensor.name in self.arrays:
                    tensor.values, tensor.data_location = self.arrays[tensor.name], None
                elif tensor.dtype == onnx.TensorProto.BFLOAT16 and isinstance(tensor, gs.Constant):
                    tensor.values = narrow_values(tensor._values.tensor)
                elif tensor.dtype == onnx.TensorProto.BFLOAT16:
                    tensor.dtype = numpy_type(tensor.dtype)
        return OnnxModel(graph, self.source, metadata, [], order, self, store=self.store)

    def light(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """Returns the proto and the data, as ``OnnxModel.light`` does."""
        return self.proto, self.arrays

    def detached(self) -> tuple[bytes, dict[str, np.ndarray]]:
        """Returns what a ``Session`` takes: the proto as bytes, and the data."""
        return widen(self.proto).SerializeToString(), self.arrays

    def as_written(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """Returns the proto and the data, as ``OnnxModel.as_written`` does."""
        return self.proto if self.merged is None else self.merged.fold(self.proto, {}), self.arrays

    def complete(self) -> onnx.ModelProto:
        """Returns a proto of its own, with all data in it."""
        return completed(*self.as_written())


@dataclass(eq=False)
class OnnxModel:
    """A graph with what graphsurgeon does not carry: metadata, and the model (unchanged) that it came from."""

    graph: gs.Graph
    source: Path | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)
    stored: Stored | None = None
    resized: dict[str, dict[int, int]] = field(default_factory=dict)
    store: ArrayStore | None = None

    # -- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, map_from: int | None = None) -> "OnnxModel":
        """Reads an ONNX file; weights stay in files of ``map_from`` bytes or more (`weight_files.MAP_FROM` if None).

        Raises:
            ModelError: the file is missing, not ONNX, truncated, quantised, or its external data cannot be found.
        """
        path = Path(path)
        return cls._imported(*read_graph(path, map_from), path)

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto) -> "OnnxModel":
        """Takes a model from memory, which stays as it is.

        Raises:
            ModelError: the graph is quantised, or an initializer holds fewer bytes than its shape needs.
        """
        return cls._imported(*lightened(proto), None)

    @classmethod
    def _imported(cls, proto: onnx.ModelProto, arrays: dict[str, np.ndarray], source: Path | None) -> "OnnxModel":
        name = f"'{source}'" if source else "the model"
        node = quantised_node(proto)
        if node is not None:
            raise ModelError(
                f"node '{node.name or node.output[0]}' ({node.op_type}) of {name} is quantised; "
                "prune the float model and quantise the result"
            )
        loose = loose_end(proto.graph)
        if loose is not None:
            raise ModelError(
                f"'{loose}' is read in {name} and nothing gives it: the program that wrote the model broke it; give the "
                "model that it was made of"
            )
        if proto.functions:
            proto = onnx.inliner.inline_local_functions(proto)
        notes = []
        named = {tensor.name for tensor in proto.graph.initializer}
        overridable = [i.name for i in proto.graph.input if i.name in named]
        if overridable:
            # Before IR version 4 every initializer had to be listed as an input; afterwards it means "a default".
            kept = [i for i in proto.graph.input if i.name not in named]
            del proto.graph.input[:]
            proto.graph.input.extend(kept)
            proto.ir_version = max(proto.ir_version, 4)
            notes.append(f"{len(overridable)} weights that were listed as graph inputs are constants now")
        flat = unfold(proto, arrays)
        if flat is None:
            model = Stored(proto, arrays, source).model()
        else:
            model = Stored(*flat[:2], source, merged=flat[2]).model()
            notes.append(
                "a merged decoder: both of its branches are cut alike; FLOPs and latency are those of both, run one behind "
                "the other"
            )
        model.notes += notes
        return model

    def light(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """Returns the graph as an ONNX model whose large initializers are stubs, and their data by name."""
        graph = self.graph
        exporter = gs.exporters.onnx_exporter.OnnxExporter
        constants = [t for t in graph.tensors().values() if isinstance(t, gs.Constant)]
        sparse = [t for t in constants if isinstance(t._values, gs.ir.tensor.SparseValues)]
        tensors, arrays = detached_tensors(t for t in constants if not isinstance(t._values, gs.ir.tensor.SparseValues))
        # Readers may depend on the order of initializers (ONNX Runtime's fusions name theirs by it).
        tensors.sort(key=lambda t: self.order.get(t.name, len(self.order)))
        ends = [[exporter.export_value_info_proto(t, False) for t in ends] for ends in (graph.inputs, graph.outputs)]
        if self.stored is not None:
            # graphsurgeon loses the shape of an output that is listed again, without one, among the inner values.
            known = {v.name: v for v in [*self.stored.proto.graph.input, *self.stored.proto.graph.output]}
            for value in itertools.chain(*ends):
                if value.name in known:
                    value.CopyFrom(known[value.name])
                for axis, size in self.resized.get(value.name, {}).items():
                    value.type.tensor_type.shape.dim[axis].dim_value = size
        # Shapes between input and output may have changed since they were noted; readers infer them.
        inner = onnx.helper.make_graph(
            [exporter.export_node(n) for n in graph.nodes],
            graph.name,
            ends[0],
            ends[1],
            tensors,
            graph.doc_string,
            sparse_initializer=[exporter.export_sparse_tensor_proto(t) for t in sparse],
        )
        proto = onnx.helper.make_model(inner, opset_imports=gs.exporters.onnx_exporter.update_import_domains(graph))
        proto.producer_name, proto.producer_version = graph.producer_name, graph.producer_version
        if graph.ir_version is not None:
            proto.ir_version = graph.ir_version
        for key, value in self.metadata.items():
            proto.metadata_props.add(key=key, value=value)
        if self.resized:
            proto.metadata_props.add(key=CACHE_SHAPES, value=json.dumps(self.resized_shapes(proto), sort_keys=True))
        return proto, arrays

    def detached(self) -> tuple[bytes, dict[str, np.ndarray]]:
        """Returns what a ``Session`` takes: the light model as bytes, and the data."""
        proto, arrays = self.light()
        return widen(proto).SerializeToString(), arrays

    @property
    def merged(self) -> MergedDecoder | None:
        """What the graph is folded to when it is written, if it came from a merged decoder."""
        return None if self.stored is None else self.stored.merged

    def as_written(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """Returns the model as it is written, as ``light`` does: a merged decoder is one again."""
        proto, arrays = self.light()
        if self.merged is None:
            return proto, arrays
        proto = self.merged.fold(proto, self.resized)
        for entry in proto.metadata_props:
            if entry.key == CACHE_SHAPES:
                entry.value = json.dumps(self.resized_shapes(proto), sort_keys=True)
        return proto, arrays

    def to_proto(self) -> onnx.ModelProto:
        """Returns the model as it is written, with all data in it."""
        return completed(*self.as_written())

    def resize(self, tensor: gs.Variable, axis: int, size: int) -> None:
        """Notes that an axis of a graph input or output has another size now."""
        self.resized.setdefault(tensor.name, {})[axis] = size
        if tensor.shape is not None and len(tensor.shape) > axis:
            tensor.shape = [size if i == axis else d for i, d in enumerate(tensor.shape)]

    def resized_shapes(self, proto: onnx.ModelProto) -> dict[str, list[int | str]]:
        """Returns the shapes, in ``proto``, of the inputs and outputs that were resized."""
        resized = {*self.resized, *(self.merged.sizes(self.resized) if self.merged is not None else ())}
        return {
            value.name: [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]
            for value in [*proto.graph.input, *proto.graph.output]
            if value.name in resized
        }

    def skeleton(self) -> onnx.ModelProto:
        """Returns the graph without the data of its weights, which become inputs: enough to infer shapes."""
        exporter = gs.exporters.onnx_exporter.OnnxExporter
        graph = self.graph
        small, large = [], []
        for tensor in self.constants():
            if int(np.prod(tensor.shape, dtype=np.int64)) <= SKELETON_LIMIT:
                small.append(exporter.export_tensor_proto(tensor))
            else:
                large.append(exporter.export_value_info_proto(tensor, False))
        ends = [[exporter.export_value_info_proto(t, False) for t in tensors] for tensors in (graph.inputs, graph.outputs)]
        nodes = [exporter.export_node(n) for n in graph.nodes]
        proto = onnx.helper.make_graph(nodes, graph.name or "graph", [*ends[0], *large], ends[1], small)
        return onnx.helper.make_model(
            proto, opset_imports=list(graph.import_domains), ir_version=graph.ir_version or onnx.IR_VERSION
        )

    def save(self, path: str | Path) -> None:
        """Writes the model beside ``path`` first and moves it into place, one weight after the other.

        Raises:
            OSError: the file cannot be written (the temporary file is removed).
        """
        write_model(*self.as_written(), Path(path))

    # -- asking -----------------------------------------------------------------------------------------------------

    @property
    def opset(self) -> int:
        """The version of the standard operator set."""
        return int(self.graph.opset)

    def inputs(self) -> list[InputSpec]:
        """Returns the graph's inputs: name, dtype and shape, with symbolic dimensions as strings."""
        result = []
        for tensor in self.graph.inputs:
            shape = tuple(
                d if isinstance(d, int) and d >= 0 else (str(d) if d not in (None, "", -1) else None)
                for d in (tensor.shape or ())
            )
            result.append(InputSpec(tensor.name, np.dtype(tensor.dtype or np.float32), shape))
        return result

    def constants(self) -> Iterator[gs.Constant]:
        """Yields every constant that a node uses, once."""
        seen: set[int] = set()
        for node in self.graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor

    def parameters(self) -> int:
        """Returns the number of elements of floating-point constants."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape, dtype in self._arrays() if is_float(dtype))

    def weight_bytes(self) -> int:
        """Returns the bytes of all constants."""
        return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in self._arrays())

    def _arrays(self) -> Iterator[tuple[Sequence[int], np.dtype[Any]]]:
        """Yields shape and dtype of all constants, those included that are still held by nodes."""
        for constant in self.constants():
            yield constant.shape, np.dtype(constant.dtype)
        for node in self.graph.nodes:
            value = constant_value(node) if node.op == "Constant" else None
            if value is not None:
                yield value.shape, value.dtype

    def align(self, store: ArrayStore) -> None:
        """Moves weights to ``store`` that are in memory, or lie in their file where no number may begin.

        Of these every session would make a copy.
        """
        moved: dict[int, np.ndarray] = {}
        for constant in self.constants():
            values = constant._values
            if isinstance(values, np.ndarray) and (values.flags.writeable or not values.flags.aligned):
                if id(values) not in moved:
                    moved[id(values)] = store.put(values)
                constant.values = moved[id(values)]
        if self.stored is not None:
            for name, values in self.stored.arrays.items():
                if id(values) in moved or not values.flags.aligned:
                    self.stored.arrays[name] = moved[id(values)] if id(values) in moved else store.put(values)

    # -- normal form ------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Moves weights that are new to the store, if there is one."""
        for constant in self.constants() if self.store is not None else ():
            if isinstance(constant._values, np.ndarray):
                constant.values = self.settled(constant.values)

    def settled(self, value: np.ndarray) -> np.ndarray:
        """Returns an array as it is in the store; what is mapped already (read-only) stays where it is."""
        return self.store.put(value) if self.store is not None and value.flags.writeable else value

    def normalise(self) -> int:
        """Brings the graph to the form that the analysis expects; returns the number of nodes removed.

        Constant nodes become initializers, Identity and no-op Dropout and Cast go, what depends on constants alone is
        folded (so that a weight under a Transpose is stored transposed), an Einsum of a weight with several axes on a
        side becomes a MatMul between Reshapes, what is repeated for several readers (a mask by heads, for all layers) is
        repeated for each, initial states of zeros go, nodes and tensors get unique names, dead nodes go. Sharing is kept:
        the same fold of the same constant gives one constant.
        """
        graph = self.graph
        before = len(graph.nodes)
        names = _unique_names(graph)
        for constant in self.constants():
            # ONNX Runtime 1.31 gives what its fusions add such names, and fails on a saved graph that has them already.
            if FUSION_NAME.search(constant.name):
                constant.values = np.array(constant.values)  # the file's own tensor must keep its name
                constant.name = f"{constant.name}_"
        folded: dict[tuple[object, ...], list[gs.Constant]] = {}
        flat: dict[tuple[object, ...], tuple[gs.Constant, gs.Constant]] = {}
        outputs = {id(t) for t in graph.outputs}
        for node in list(graph.nodes):
            if node.op == "Constant" and node.domain in (None, *STANDARD) and len(node.outputs) == 1:
                value = constant_value(node)
                if value is not None and id(node.outputs[0]) not in outputs:
                    _replace(node.outputs[0], gs.Constant(node.outputs[0].name, value))
                    node.outputs.clear()
                continue
            if _is_identity(node) and id(node.outputs[0]) not in outputs:
                _replace(node.outputs[0], node.inputs[0])
                node.outputs.clear()
                node.inputs.clear()
                continue
            if node.op == "Einsum" and node.domain in (None, *STANDARD):
                graph.nodes.extend(_as_product(node, flat, names, self.settled))
            _fold(node, folded, outputs, names, self.settled)
        _drop_zero_states(graph)
        graph.cleanup(remove_unused_node_outputs=False)
        if self.merged is None:
            graph.toposort()
            _part_repeats(graph, names)
        else:
            graph.nodes = side_by_side(graph.nodes, self.merged.nodes_of_first(graph.nodes))
        return before - len(graph.nodes)


def read_graph(path: Path, map_from: int | None = None) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Reads an ONNX file: the proto, and the weights, which stay where they are in large files (`read_model`).

    Raises:
        ModelError: the file is missing, not ONNX, truncated, or its external data cannot be found.
    """
    if not path.is_file():
        raise ModelError(f"'{path}' is not a file; give the path of an ONNX model")
    try:
        proto, arrays = read_model(path, map_from)
    except (DecodeError, ValueError, OSError, RuntimeError) as err:
        raise ModelError(f"'{path}' cannot be read as ONNX (truncated or another format); export it again") from err
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(f"'{path}' holds no ONNX graph (truncated or another format); export it again")
    return proto, arrays


def quantised_node(proto: onnx.ModelProto) -> onnx.NodeProto | None:
    """Returns the first node that quantises, or reads what is quantised; it may be in a branch."""
    nodes = nodes_within(proto.graph.node)
    return next((n for n in nodes if n.op_type in QUANTISED or n.op_type.startswith(QUANTISED_PREFIXES)), None)


def loose_end(graph: onnx.GraphProto) -> str | None:
    """Returns the name of a tensor that the graph, or a branch in it, reads and nothing gives."""
    given = {t.name for t in (*graph.input, *graph.initializer)} | {t.values.name for t in graph.sparse_initializer}
    given |= {name for node in graph.node for name in node.output}
    read = itertools.chain(
        (name for node in graph.node for name in sorted(names_read(node))), (v.name for v in graph.output)
    )
    return next((name for name in read if name not in given), None)


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
            stubs.append(gs.exporters.onnx_exporter.OnnxExporter.export_tensor_proto(constant))
    return stubs, arrays


def is_float(dtype: object) -> bool:
    """Returns whether a dtype is floating point (bfloat16 included)."""
    kind = np.dtype(dtype)  # type: ignore[call-overload]
    return bool(np.issubdtype(kind, np.floating)) or kind.name == "bfloat16"


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


def _is_identity(node: gs.Node) -> bool:
    if node.domain not in (None, *STANDARD) or not node.outputs:
        return False
    if node.op == "Identity" or (node.op == "Concat" and len(node.inputs) == 1):
        return True
    if node.op == "Dropout":
        mask_used = len(node.outputs) > 1 and present(node.outputs[1]) and bool(node.outputs[1].outputs)
        training = node.inputs[2] if len(node.inputs) > 2 else None
        off = training is None or not present(training) or (is_constant(training) and not bool(np.any(training.values)))
        return off and not mask_used
    return False


def _replace(old: gs.Tensor, new: gs.Tensor) -> None:
    for consumer in list(old.outputs):
        for position, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[position] = new


def _is_looked_up(tensor: gs.Tensor) -> bool:
    """Returns whether rows of a tensor are looked up."""
    return any(n.op == "Gather" and n.inputs[0] is tensor and not is_constant(n.inputs[1]) for n in tensor.outputs)


def _shares_table(node: gs.Node) -> bool:
    """Returns whether a node makes, of embeddings, the weight of the head, or the other way round."""
    large = [t for t in node.inputs if is_constant(t) and int(np.prod(t.shape, dtype=np.int64)) > SKELETON_LIMIT]
    made = any(_is_looked_up(t) for t in node.outputs)
    return any(_is_looked_up(t) or (made and len(t.outputs) > 1) for t in large)


def _fold(
    node: gs.Node,
    folded: dict[tuple[object, ...], list[gs.Constant]],
    outputs: set[int],
    names: Iterator[str],
    keep: Callable[[np.ndarray], np.ndarray],
) -> None:
    if node.domain not in (None, *STANDARD) or not node.inputs or not node.outputs:
        return
    if not all(is_constant(t) or not present(t) for t in node.inputs):
        return
    if any(id(t) in outputs for t in node.outputs) or any(isinstance(v, gs.Graph) for v in node.attrs.values()):
        return
    if _shares_table(node):
        return  # folded, the table would be stored twice
    attributes = tuple(sorted((k, repr(v)) for k, v in node.attrs.items() if not hasattr(v, "values")))
    key: tuple[object, ...] = (node.op, attributes, tuple(id(t) for t in node.inputs))
    if any(hasattr(v, "values") for v in node.attrs.values()):
        key = (*key, node.name)
    results = folded.get(key)
    if results is None:
        inputs = [t.values if is_constant(t) else None for t in node.inputs]
        if node.op == "Shape" and not node.attrs:
            values: list[np.ndarray] | None = [np.asarray(node.inputs[0].shape, np.int64)]
        else:
            values = evaluate(node.op, inputs, node.attrs)
        largest = max((i.size for i in inputs if i is not None), default=0)
        if values is None or len(values) < len(node.outputs) or max(v.size for v in values) > max(FOLD_LIMIT, largest):
            return
        # The constants stay alive through the key's owner list, so that ids are not reused.
        results = [
            gs.Constant(t.name or next(names), keep(np.ascontiguousarray(v).reshape(v.shape)))
            for t, v in zip(node.outputs, values, strict=False)
        ]
        folded[key] = results
        folded[("alive", *key)] = [t for t in node.inputs if is_constant(t)]
    for old, new in zip(node.outputs, results, strict=True):
        _replace(old, new)
    node.outputs.clear()
    node.inputs.clear()


def _as_product(
    node: gs.Node,
    flat: dict[tuple[object, ...], tuple[gs.Constant, gs.Constant]],
    names: Iterator[str],
    keep: Callable[[np.ndarray], np.ndarray],
) -> list[gs.Node]:
    """Turns an Einsum of a weight that has several axes on a side into a MatMul; returns the nodes around it.

    The axes that are summed over are joined, and so are those that come out: "bsd,dhk->bshk" is a product with
    [d, h * k] whose result is split, "bshk,hkd->bsd" one with [h * k, d] whose input is joined. What has one axis on
    each side, or an axis in weight, input and result, stays.
    """
    equation = str(node.attrs["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    weight = next((i for i, t in enumerate(node.inputs) if is_constant(t)), None)
    if not arrow or "." in equation or len(terms) != 2 or weight is None:
        return []
    w, x = terms[weight], terms[1 - weight]
    rows = [c for c in x if c not in w]
    summed, columns = [c for c in w if c in x], [c for c in w if c not in x]
    plain = all(len(set(t)) == len(t) for t in (w, x, right)) and set(right) == {*rows, *columns}
    constant = node.inputs[weight]
    if not plain or not summed or not columns or len(summed) == len(columns) == 1 or len(constant.shape) != len(w):
        return []
    sizes = dict(zip(w, constant.shape, strict=True))
    order = [w.index(c) for c in [*summed, *columns]]
    key = (id(constant), *order, len(summed))
    if key not in flat:
        matrix = constant.values.transpose(order).reshape(-1, int(np.prod([sizes[c] for c in columns], dtype=np.int64)))
        # The weight itself is held, too, so that its id is not another's.
        flat[key] = (gs.Constant(f"{constant.name}_{next(names)}", keep(np.ascontiguousarray(matrix))), constant)
    nodes: list[gs.Node] = []

    def then(op: str, tensor: gs.Tensor, *inputs: gs.Tensor, **attributes: Any) -> gs.Tensor:
        result = gs.Variable(next(names), dtype=tensor.dtype)
        nodes.append(gs.Node(op, f"{node.name}/{op}_{len(nodes)}", attributes, [tensor, *inputs], [result]))
        return result

    def shape(*dims: int) -> gs.Constant:
        return gs.Constant(next(names), np.asarray([*[0] * len(rows), *dims], np.int64))

    tensor, result = node.inputs[1 - weight], node.outputs[0]
    turn = [x.index(c) for c in [*rows, *summed]]
    if turn != sorted(turn):
        tensor = then("Transpose", tensor, perm=turn)
    if len(summed) > 1:
        tensor = then("Reshape", tensor, shape(-1))
    node.op, node.attrs, node.inputs = "MatMul", {}, [tensor, flat[key][0]]
    back = [[*rows, *columns].index(c) for c in right]
    if len(columns) > 1 or back != sorted(back):
        inner = gs.Variable(next(names), dtype=result.dtype)
        node.outputs = [inner]
        if len(columns) > 1:
            inner = then("Reshape", inner, shape(*(sizes[c] for c in columns)))
        if back != sorted(back):
            inner = then("Transpose", inner, perm=back)
        nodes[-1].outputs = [result]
    return nodes


def _part_repeats(graph: gs.Graph, names: Iterator[str]) -> None:
    """Gives each reader of what is repeated, by Expand to sizes that are written, a repetition of its own, just before it.

    One for all layers would make them keep the same heads, and holds nothing of its own; one far before its reader would be
    measured with heads that went since. Nodes are in topological order.
    """
    repeats: dict[int, gs.Node] = {}
    for node in graph.nodes:
        source = node.inputs[0].inputs[0] if node.inputs and node.inputs[0].inputs else None
        written = node.op == "Expand" and is_constant(node.inputs[1]) and bool(np.any(node.inputs[1].values > 1))
        if written or (node.op in MOVERS and id(source) in repeats):
            repeats[id(node)] = node
    outputs = {id(t) for t in graph.outputs}
    place = {id(node): (i, 0) for i, node in enumerate(graph.nodes)}
    for node in reversed(repeats.values()):
        (result,) = node.outputs
        readers = {id(n): n for n in result.outputs}
        if id(result) in outputs or not readers or not readers.keys() <= place.keys():
            continue
        apart = sorted((n for n in readers.values() if n.op != "Shape"), key=lambda n: place[id(n)])[1:]
        for reader in apart:
            own = gs.Variable(next(names), result.dtype, result.shape)
            copy = gs.Node(node.op, f"{node.name}_{own.name}", dict(node.attrs), list(node.inputs), [own])
            for position, tensor in enumerate(reader.inputs):
                if tensor is result:
                    reader.inputs[position] = own
            graph.nodes.append(copy)
            place[id(copy)] = (place[id(reader)][0], place[id(reader)][1] - 1)
        first, depth = min(place[id(n)] for n in result.outputs)
        place[id(node)] = (first, depth - 1)
    if repeats:
        graph.nodes = sorted(graph.nodes, key=lambda n: place[id(n)])


def _drop_zero_states(graph: gs.Graph) -> None:
    """Takes initial states of zeros from recurrent operators, which begin with zeros where none is given.

    Exporters make one tensor of them for all layers, whose hidden units would have to stay the same ones then.
    """
    for node in graph.nodes:
        if node.op not in ("GRU", "LSTM", "RNN") or node.domain not in (None, *STANDARD):
            continue
        for position in (5, 6):
            if len(node.inputs) > position and _is_zeros(node.inputs[position]):
                node.inputs[position] = gs.Variable.empty()


def _is_zeros(tensor: gs.Tensor) -> bool:
    """Returns whether a tensor holds zeros alone: a constant, or what was made or repeated of some, and moved about."""
    while not is_constant(tensor) and tensor.inputs:
        node = tensor.inputs[0]
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            return value is None or not np.any(tensor_attribute(value))
        if node.op not in (*MOVERS, "Gather", "Slice", "Split"):
            return False
        tensor = node.inputs[0]
    return is_constant(tensor) and not np.any(tensor.values)


def _unique_names(graph: gs.Graph) -> Iterator[str]:
    """Names nodes that have none (or share one) and returns a source of unused tensor names."""
    taken: set[str] = set()
    for index, node in enumerate(graph.nodes):
        if not node.name or node.name in taken:
            base = node.name or f"{node.op}"
            node.name = next(
                n for n in (f"{base}_{index}", *(f"{base}_{index}_{k}" for k in range(1000))) if n not in taken
            )
        taken.add(node.name)
    tensors = set(graph.tensors())
    return (n for n in (f"liar_opt_{k}" for k in itertools.count()) if n not in tensors)
