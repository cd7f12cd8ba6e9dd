"""ONNX files in and out, and the graph in the form that the passes work on.

:class:`OnnxModel` holds an onnx-graphsurgeon graph. Loading checks what can be known of a file (truncated, external
data missing, quantised); :meth:`OnnxModel.normalise` brings exporters' habits to one form: constants as initializers,
no Identity, weights stored the way they are multiplied, every node named. Weights shared by several nodes stay shared:
equal folds of equal constants give one constant.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from liar_opt.frontend.fold_weights import Left
from liar_opt.frontend.graph_tensors import (
    SKELETON_LIMIT,
    Narrow,
    constant_value,
    detached_tensors,
    is_float,
    small_tensor,
)
from liar_opt.frontend.hand_quantised import hand_quantised_node
from liar_opt.frontend.merged_decoder import MergedDecoder, names_read, unfold
from liar_opt.frontend.model import Original
from liar_opt.frontend.normal_form import normalise
from liar_opt.frontend.sound_model import inlined, require_sound, why_invalid
from liar_opt.frontend.sparse_weights import densified
from liar_opt.frontend.weight_files import (
    as_bytes,
    completed,
    element_type,
    lightened,
    numpy_type,
    read_model,
    write_model,
)
from liar_opt.frontend.widen_graph import bodies_of, narrow_values, nodes_within, widen
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.errors import LiarOptError, ModelError
from liar_opt.runtime.signatures import InputSpec

gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR

PRECISION = ("bfloat16", "float16", "float32", "float64")
"""Types of weights, the least precise first."""
QUANTISED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
QUANTISED_PREFIXES = (
    *("QLinear", "QGemm", "QAttention", "QMoE", "QOrdered", "GatherBlockQuantized"),
    *("MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MatMulBlockQuantized", "MatMulIntegerToFloat"),
)
CACHE_SHAPES = "liar_opt.cache_shapes"
"""Key of the metadata that says the new shapes of cache inputs and outputs: JSON, name -> shape."""


@dataclass(frozen=True, eq=False)
class OnnxOriginal(Original):
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

    def digest(self) -> str:
        """Returns the SHA-256 of the model with all its weights."""
        digest = hashlib.sha256(self.proto.SerializeToString(deterministic=True))
        for name, array in self.arrays.items():
            digest.update(name.encode())
            digest.update(as_bytes(array))
        return digest.hexdigest()

    def light(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """Returns the proto and the data, as ``OnnxModel.light`` does."""
        return self.proto, self.arrays

    def detached(self) -> tuple[bytes, dict[str, np.ndarray]]:
        """Returns what a ``Session`` takes: the proto as bytes, and the data."""
        return widen(self.proto).SerializeToString(), self.arrays

    def as_written(self) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """Returns the proto and the data, as ``OnnxModel.as_written`` does."""
        return self.proto if self.merged is None else self.merged.fold(self.proto, {}), self.arrays

    def as_given(self) -> onnx.ModelProto:
        """Returns a proto of its own, with all data in it."""
        return completed(*self.as_written())


@dataclass(eq=False)
class OnnxModel:
    """A graph with what graphsurgeon does not carry: metadata, and the model (unchanged) that it came from.

    Attributes:
        traced: whether it is a module, lowered, and no graph of ONNX.
    """

    traced: ClassVar[bool] = False
    graph: gs.Graph
    source: Path | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)
    stored: OnnxOriginal | None = None
    resized: dict[str, dict[int, int]] = field(default_factory=dict)
    store: ArrayStore | None = None
    computed: list[Left] = field(default_factory=list)

    # -- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, map_from: int | None = None) -> "OnnxModel":
        """Reads an ONNX file; weights stay in files of ``map_from`` bytes or more (`weight_files.MAP_FROM` if None).

        Raises:
            ModelError: the file is missing, not ONNX, truncated, broken (`sound_model`), quantised, or its external data
                cannot be found.
        """
        path = Path(path)
        return cls._imported(*read_graph(path, map_from), path)

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto) -> "OnnxModel":
        """Takes a model from memory, which stays as it is.

        Raises:
            ModelError: the graph is broken (`sound_model`), quantised, or an initializer holds fewer bytes than its shape
                needs.
        """
        try:
            parts = lightened(proto)
        except (DecodeError, ValueError, KeyError) as err:
            raise ModelError("the model in memory is no valid ONNX (what onnx.checker.check_model says)") from err
        return cls._imported(*parts, None)

    @classmethod
    def _imported(cls, proto: onnx.ModelProto, arrays: dict[str, np.ndarray], source: Path | None) -> "OnnxModel":
        name = f"'{source}'" if source else "the model"
        require_sound(proto, arrays, name)
        try:
            return cls._of_sound(proto, arrays, source, name)
        except LiarOptError:
            raise
        except Exception as err:  # of graphsurgeon, for what is no ONNX; all else is a fault of ours
            reason = why_invalid(proto)
            if reason is None:
                raise
            raise ModelError(f"{name} is no valid ONNX ({reason}); export it again") from err

    @classmethod
    def _of_sound(
        cls, proto: onnx.ModelProto, arrays: dict[str, np.ndarray], source: Path | None, name: str
    ) -> "OnnxModel":
        proto, dense = densified(proto)
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
        proto = inlined(proto, name)
        node = hand_quantised_node(proto.graph)
        if node is not None:
            raise ModelError(
                f"node '{node.name or node.output[0]}' ({node.op_type}) of {name} is quantised: its weight is stored in "
                "small integers behind a Cast; prune the float model and quantise the result"
            )
        notes = [] if dense is None else [dense]
        renamed = _renamed_twins(proto)
        if renamed:
            notes.append(f"nodes that had the name of another were renamed, since ONNX Runtime refuses them: {renamed}")
        named = {tensor.name for tensor in proto.graph.initializer}
        overridable = [i.name for i in proto.graph.input if i.name in named]
        if overridable:
            # Before IR version 4 every initializer had to be listed as an input; afterwards it means "a default".
            kept = [i for i in proto.graph.input if i.name not in named]
            del proto.graph.input[:]
            proto.graph.input.extend(kept)
            proto.ir_version = max(proto.ir_version, 4)
            notes.append(f"{len(overridable)} weights that were listed as graph inputs are constants now")
        parted = next((i.name for i in proto.graph.input if i.type.WhichOneof("value") not in (None, "tensor_type")), None)
        if parted is not None:
            raise ModelError(
                f"input '{parted}' of {name} is no tensor (a sequence, map or optional), and liar-opt feeds tensors alone; "
                "export the model with a tensor for each part"
            )
        texts = next((i.name for i in proto.graph.input if i.type.tensor_type.elem_type == onnx.TensorProto.STRING), None)
        if texts is not None:
            raise ModelError(
                f"input '{texts}' of {name} takes texts, and liar-opt feeds numbers alone; export the model without the "
                "part that makes numbers of texts"
            )
        flat = unfold(proto, arrays)
        if flat is None:
            model = OnnxOriginal(proto, arrays, source).model()
        else:
            model = OnnxOriginal(*flat[:2], source, merged=flat[2]).model()
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
        constants, casts = _as_stored([*self.constants(unread=True)], graph)
        tensors, arrays = detached_tensors(constants)
        # Readers may depend on the order of initializers (ONNX Runtime's fusions name theirs by it).
        tensors.sort(key=lambda t: self.order.get(t.name, len(self.order)))
        ends = [[exporter.export_value_info_proto(t, False) for t in ends] for ends in (graph.inputs, graph.outputs)]
        if self.stored is not None:
            # graphsurgeon loses the shape of an output that is listed again, without one, among the inner values.
            for values, known in zip(ends, (self.stored.proto.graph.input, self.stored.proto.graph.output), strict=True):
                as_it_was = {v.name: v for v in known}
                for value in values:
                    if value.name in as_it_was:
                        value.CopyFrom(as_it_was[value.name])
                    sizes = value.type.tensor_type.shape.dim
                    for axis, size in self.resized.get(value.name, {}).items() if sizes else ():
                        sizes[axis].dim_value = size
        # Shapes between input and output may have changed since they were noted; readers infer them.
        inner = onnx.helper.make_graph(
            [exporter.export_node(n) for n in casts] + self._exported_nodes(),
            graph.name,
            ends[0],
            ends[1],
            tensors,
            graph.doc_string,
        )
        proto = onnx.helper.make_model(inner, opset_imports=gs.exporters.onnx_exporter.update_import_domains(graph))
        proto.producer_name, proto.producer_version = graph.producer_name, graph.producer_version
        if graph.ir_version is not None:
            proto.ir_version = graph.ir_version
        for key, value in self.metadata.items():
            proto.metadata_props.add(key=key, value=value)
        if self.stored is not None:
            _keep_descriptions(self.stored.proto, proto)
        if self.resized:
            proto.metadata_props.add(key=CACHE_SHAPES, value=json.dumps(self.resized_shapes(proto), sort_keys=True))
        return proto, arrays

    def detached(self) -> tuple[bytes, dict[str, np.ndarray]]:
        """Returns what a ``Session`` takes: the light model as bytes, and the data."""
        proto, arrays = self.light()
        return widen(proto).SerializeToString(), arrays

    def loadable(self) -> Any:
        """Returns what an engine loads, of the graph as it is now."""
        return self.detached()

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

    def as_given(self) -> Any:
        """Returns the model as its user has it: an ONNX proto with all data in it."""
        return self.to_proto()

    def file_bytes(self) -> int:
        """Returns the size of the model's file, to a few bytes for each weight."""
        data, weights = self.detached()
        return len(data) + sum(w.nbytes for w in weights.values())

    def to_proto(self) -> onnx.ModelProto:
        """Returns the model as it is written, with all data in it."""
        return completed(*self.as_written())

    def resize(self, tensor: gs.Variable, axis: int, size: int) -> None:
        """Notes that an axis of a graph input or output has another size now."""
        self.resized.setdefault(tensor.name, {})[axis] = size
        if tensor.shape is not None and len(tensor.shape) > axis:
            tensor.shape = [size if i == axis else d for i, d in enumerate(tensor.shape)]

    def resized_shapes(self, proto: onnx.ModelProto) -> dict[str, list[int | str]]:
        """Returns the shapes, in ``proto``, of the inputs and outputs that were resized, where they are written."""
        resized = {*self.resized, *(self.merged.sizes(self.resized) if self.merged is not None else ())}
        return {
            value.name: [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]
            for value in [*proto.graph.input, *proto.graph.output]
            if value.name in resized and value.type.tensor_type.shape.dim
        }

    def structure(self) -> bytes:
        """Returns what is known of the model without the data of its weights."""
        return bytes(self.skeleton().SerializeToString())

    def skeleton(self) -> onnx.ModelProto:
        """Returns the graph without the data of its weights, which become inputs: enough to infer shapes."""
        exporter = gs.exporters.onnx_exporter.OnnxExporter
        graph = self.graph
        small, large = [], []
        for tensor in self.constants():
            if int(np.prod(tensor.shape, dtype=np.int64)) <= SKELETON_LIMIT:
                small.append(small_tensor(tensor))
            else:
                large.append(exporter.export_value_info_proto(tensor, False))
        ends = [[exporter.export_value_info_proto(t, False) for t in tensors] for tensors in (graph.inputs, graph.outputs)]
        nodes = self._exported_nodes()
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

    def _exported_nodes(self) -> list[onnx.NodeProto]:
        """Returns the nodes as protos; a branch holds its own initializers, and not those that it reads from outside."""
        result = [gs.exporters.onnx_exporter.OnnxExporter.export_node(node) for node in self.graph.nodes]
        for body in (body for node in nodes_within(result) for body in bodies_of(node)):
            own = [t for t in body.initializer if t.name in self.inside]
            del body.initializer[:]
            body.initializer.extend(own)
        return result

    @functools.cached_property
    def inside(self) -> frozenset[str]:
        """The initializers that lie in branches (of an If, Loop or Scan); what else a branch reads is outside."""
        graph = self.graph if self.stored is None else self.stored.proto.graph
        if isinstance(graph, gs.Graph):
            return frozenset()
        bodies = (body for node in nodes_within(graph.node) for body in bodies_of(node))
        outer = {t.name for t in graph.initializer}
        return frozenset(t.name for body in bodies for t in body.initializer if t.name not in outer)

    def least_precision(self) -> str:
        """Returns the least precise type of the weights, as they are stored."""
        weights = [c for c in self.constants() if is_float(c.dtype) and int(np.prod(c.shape)) > 1]
        names = {np.dtype(c.kind if isinstance(c, Narrow) else c.dtype).name for c in weights}
        return next((p for p in PRECISION if p in names), "float32")

    def constants(self, unread: bool = False) -> Iterator[gs.Constant]:
        """Yields every constant of the graph that a node uses, once, those that branches alone read included.

        Args:
            unread: whether those that are outputs, and that no node uses, are yielded, too.
        """
        seen: set[int] = set()
        for node in self.graph.nodes:
            for tensor in (*node.inputs, *(t for t in _read_inside(node) if t.name not in self.inside)):
                if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor
        for tensor in self.graph.outputs if unread else ():
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
        """Yields shape and dtype, as stored, of all constants, those included that nodes and branches hold."""
        within = [n for g in self.graph.subgraphs(recursive=True) for n in g.nodes]
        held = (t for n in within for t in n.inputs if isinstance(t, gs.Constant) and t.name in self.inside)
        for constant in itertools.chain(self.constants(unread=True), {id(t): t for t in held}.values()):
            narrow = isinstance(constant, Narrow) and constant.stored is not None
            yield constant.shape, np.dtype(constant.stored.dtype if narrow else constant.dtype)
        for node in (*self.graph.nodes, *within):
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

    # -- nodes of our own ---------------------------------------------------------------------------------------------

    def adopt(self, constant: gs.Constant) -> None:
        """Counts a new constant among the parameters, where these are known by their names."""

    def mapped(
        self, name: str, source: gs.Tensor, weight: np.ndarray, bias: np.ndarray, made: gs.Variable
    ) -> list[gs.Node]:
        """Returns the nodes that make ``made`` = source W + b.

        Args:
            name: a prefix of new names that nothing has.
            source: [.., n].
            weight: W, [n, m].
            bias: b, [m].
            made: what they make.
        """
        product = gs.Variable(f"{name}_product", weight.dtype)
        stored = gs.Constant(f"{name}_map", np.ascontiguousarray(weight)), gs.Constant(f"{name}_bias", bias)
        return [
            gs.Node("MatMul", f"{name}_map", {}, [source, stored[0]], [product]),
            gs.Node("Add", f"{name}_bias", {}, [product, stored[1]], [made]),
        ]

    def spread(self, name: str, source: gs.Tensor, bias: gs.Constant, made: gs.Variable) -> list[gs.Node]:
        """Returns the nodes that make ``made`` = b in each row of a tensor of the shape of ``source``; as `mapped`."""
        shape = gs.Variable(f"{name}_shape", np.dtype(np.int64))
        return [
            gs.Node("Shape", f"{name}_shape", {}, [source], [shape]),
            gs.Node("Expand", f"{name}_spread", {}, [bias, shape], [made]),
        ]

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
        """Brings the graph to the form that the analysis expects (`normal_form`); returns the number of nodes removed."""
        return normalise(self)


def _as_stored(constants: Sequence[gs.Constant], graph: gs.Graph) -> tuple[list[gs.Constant], list[gs.Node]]:
    """Returns the constants as they are written, and the Casts behind those that are stored in a narrower type."""
    if not any(isinstance(c, Narrow) for c in constants):
        return list(constants), []
    taken, labels = {t.name for t in constants} | set(graph.tensors()), {node.name for node in graph.nodes}
    result, casts = [], []
    for constant in constants:
        stored = constant.stored if isinstance(constant, Narrow) else None
        if stored is None:
            result.append(constant)
            continue
        others = (f"{constant.name}/{constant.kind.name}{k or ''}" for k in itertools.count())
        name = next(n for n in itertools.chain([constant.source], others) if n not in taken)
        taken.add(name)
        result.append(gs.Constant(name, stored))
        to = {"to": element_type(constant.dtype)}
        # Not wired to the graph: it stays as it is.
        label = constant.cast if constant.cast not in labels else f"{constant.cast}/{constant.name}"
        labels.add(label)
        casts.append(gs.Node("Cast", label, to, [gs.Variable(name)], [gs.Variable(constant.name)]))
    return result, casts


def _read_inside(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yields what the branches of a node read, and give out as it is."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from inner.inputs
                yield from _read_inside(inner)
            yield from value.outputs


def _keep_descriptions(source: onnx.ModelProto, target: onnx.ModelProto) -> None:
    """Copies to a model what graphsurgeon drops: domain, version, descriptions, those of nodes and weights included."""
    for name in ("domain", "model_version", "doc_string"):
        if source.HasField(name):
            setattr(target, name, getattr(source, name))
    target.training_info.extend(source.training_info)
    _describe(source.graph, target.graph)


def _describe(source: onnx.GraphProto, target: onnx.GraphProto) -> None:
    target.metadata_props.extend(source.metadata_props)
    made, named = {tuple(n.output): n for n in source.node}, {n.name: n for n in source.node if n.name}
    for node in target.node:
        # A node that got a bias behind it has another output now.
        found = (made.get(tuple(node.output)), named.get(node.name))
        old = next((n for n in found if n is not None and n.op_type == node.op_type), None)
        if old is None:
            continue
        if old.doc_string:
            node.doc_string = old.doc_string
        node.metadata_props.extend(old.metadata_props)
        for before, after in zip(bodies_of(old), bodies_of(node), strict=False):
            _describe(before, after)
    described = {t.name: t for t in source.initializer if t.doc_string or t.metadata_props}
    for tensor in target.initializer:
        if tensor.name in described:
            tensor.doc_string = described[tensor.name].doc_string
            del tensor.metadata_props[:]  # those that lie in the proto have theirs
            tensor.metadata_props.extend(described[tensor.name].metadata_props)


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


def _renamed_twins(proto: onnx.ModelProto) -> int:
    """Gives nodes that have the name of another in their graph or branch a name of their own; returns how many."""
    count = 0
    for graph in (proto.graph, *(body for node in nodes_within(proto.graph.node) for body in bodies_of(node))):
        taken = {node.name for node in graph.node}
        numbers: dict[str, Iterator[int]] = {}
        for node in graph.node:
            if not node.name:
                continue
            if node.name in numbers:
                names = (f"{node.name}_{k}" for k in numbers[node.name])
                node.name = next(name for name in names if name not in taken)
                taken.add(node.name)
                count += 1
            numbers.setdefault(node.name, itertools.count(2))
    return count
