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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from liar_opt.frontend.graph_tensors import (
    SKELETON_LIMIT,
    Gridded,
    Narrow,
    detached_tensors,
    small_tensor,
)
from liar_opt.frontend.hand_quantised import hand_quantised_node
from liar_opt.frontend.merged_decoder import MergedDecoder, names_read, unfold
from liar_opt.frontend.model import Model, Original
from liar_opt.frontend.normal_form import normalise
from liar_opt.frontend.quantised_in import NBITS, Reading, quantised_node, read_quantised
from liar_opt.frontend.quantised_out import Fit, Written, written_back
from liar_opt.frontend.sound_model import inlined, put_in_order, require_sound, spell_standard_alike, why_invalid
from liar_opt.frontend.sparse_weights import densified
from liar_opt.frontend.ties import Taken
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
        reading: what it was, if it was quantised and is read as floats here.
    """

    proto: onnx.ModelProto
    arrays: dict[str, np.ndarray]
    source: Path | None = None
    store: ArrayStore | None = None
    merged: MergedDecoder | None = None
    reading: Reading | None = None

    def model(self) -> "OnnxModel":
        """Returns the model as a graph; each call makes a new one, weights are shared."""
        order = {tensor.name: i for i, tensor in enumerate(self.proto.graph.initializer)}
        metadata = {p.key: p.value for p in self.proto.metadata_props if p.key != CACHE_SHAPES}
        graph = gs.import_onnx(self.proto)
        if self.reading is not None:
            _on_grids(graph, self.reading)
        for part in [graph, *graph.subgraphs(recursive=True)]:
            for tensor in part.tensors().values():
                if isinstance(tensor, gs.Constant) and tensor.name in self.arrays:
                    tensor.values, tensor.data_location = self.arrays[tensor.name], None
                elif tensor.dtype == onnx.TensorProto.BFLOAT16 and isinstance(tensor, gs.Constant):
                    tensor.values = narrow_values(tensor._values.tensor)
                elif tensor.dtype == onnx.TensorProto.BFLOAT16:
                    tensor.dtype = numpy_type(tensor.dtype)
        return OnnxModel(graph, self.source, [], store=self.store, metadata=metadata, order=order, stored=self)

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
        if self.reading is not None:
            return self.reading.proto, dict(self.reading.arrays)
        return self.proto if self.merged is None else self.merged.fold(self.proto, {}), self.arrays

    def as_run(self) -> tuple[bytes, Mapping[str, np.ndarray]]:
        """Returns what a ``Session`` takes of the model as whoever uses it runs it: quantised, if it is."""
        return self.detached() if self.reading is None else _session_parts(*self.as_written())

    def as_given(self) -> onnx.ModelProto:
        """Returns a proto of its own, with all data in it."""
        return completed(*self.as_written())


def onnx_graph(model: Model) -> "OnnxModel":
    """Returns a model that is known to be a graph of ONNX."""
    assert isinstance(model, OnnxModel)
    return model


@dataclass(eq=False)
class OnnxModel(Model):
    """A graph of ONNX, with what graphsurgeon does not carry.

    Attributes:
        metadata: of the model.
        order: of the initializers, by name.
        stored: the model, unchanged, that it came from.
    """

    metadata: dict[str, str] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    stored: OnnxOriginal | None = None

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
        spell_standard_alike(proto)
        proto, dense = densified(proto)
        loose = loose_end(proto.graph)
        if loose is not None:
            raise ModelError(
                f"'{loose}' is read in {name} and nothing gives it: the program that wrote the model broke it; give the "
                "model that it was made of"
            )
        proto = inlined(proto, name)
        put_in_order(proto.graph)
        node = hand_quantised_node(proto.graph)
        if node is not None:
            raise ModelError(
                f"node '{node.name or node.output[0]}' ({node.op_type}) of {name} is quantised: its weight is stored in "
                "small integers behind a Cast; prune the float model and quantise the result"
            )
        notes, reading = [] if dense is None else [dense], None
        named = {tensor.name for tensor in proto.graph.initializer}
        overridable = [i.name for i in proto.graph.input if i.name in named]
        if overridable:
            # Before IR version 4 every initializer had to be listed as an input; afterwards it means "a default".
            kept = [i for i in proto.graph.input if i.name not in named]
            del proto.graph.input[:]
            proto.graph.input.extend(kept)
            proto.ir_version = max(proto.ir_version, 4)
            notes.append(f"{len(overridable)} weights that were listed as graph inputs are constants now")
        if quantised_node(proto) is not None:
            proto, arrays, reading = read_quantised(proto, arrays, name)
            notes.append(f"quantised ({reading.sentence()}): pruned as the numbers that it stands for, written as it was")
        renamed = _renamed_twins(proto)
        if renamed:
            notes.append(f"nodes that had the name of another were renamed, since ONNX Runtime refuses them: {renamed}")
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
            model = OnnxOriginal(proto, arrays, source, reading=reading).model()
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
        """Returns the model as it is written, as ``light`` does: a merged decoder is one again, or it is quantised."""
        if self.reading is not None:
            written = self.written()
            return written.proto, written.arrays
        proto, arrays = self.light()
        if self.merged is None:
            return proto, arrays
        proto = self.merged.fold(proto, self.resized)
        for entry in proto.metadata_props:
            if entry.key == CACHE_SHAPES:
                entry.value = json.dumps(self.resized_shapes(proto), sort_keys=True)
        return proto, arrays

    @property
    def reading(self) -> Reading | None:
        """What the graph was, if it was quantised and is read as floats."""
        return None if self.stored is None else self.stored.reading

    def gridded(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns the constants that stand for whole numbers: the weight (of ``reading``), and the axes that they have."""
        return {c.name: (c.weight, c.axes) for c in self.constants(unread=True) if isinstance(c, Gridded)}

    def written(self, weights: bool = True, fits: Mapping[str, Fit] | None = None) -> Written:
        """Returns the graph in the scheme that it was read from; see `quantised_out.written_back`."""
        assert self.reading is not None
        return written_back(*self.light(), self.gridded(), self.reading, weights, fits)

    def as_run(self) -> tuple[bytes, Mapping[str, np.ndarray]]:
        """Returns what a ``Session`` takes of the model as whoever uses it runs it: quantised, if it is."""
        return self.detached() if self.reading is None else _session_parts(*self.as_written())

    def as_given(self) -> Any:
        """Returns the model as its user has it: an ONNX proto with all data in it."""
        return self.to_proto()

    def file_bytes(self) -> int:
        """Returns the size of the model's file, to a few bytes for each weight."""
        data, weights = self.as_run()
        return len(data) + sum(w.nbytes for w in weights.values())

    def to_proto(self) -> onnx.ModelProto:
        """Returns the model as it is written, with all data in it."""
        return completed(*self.as_written())

    def pick(self, table: gs.Tensor, taken: Taken, names: Iterator[str]) -> list[gs.Node]:
        """Returns nodes that take some indices of a table, and are not in the graph yet; ``names`` are for what is new."""

        def node(op: str, source: gs.Tensor, *more: Any, **attributes: Any) -> gs.Node:
            made = gs.Variable(next(names), source.dtype)
            constants = [gs.Constant(next(names), np.asarray(value, np.int64)) for value in more]
            return gs.Node(op, f"{op}_{made.name}", attributes, [source, *constants], [made])

        axis, rank = taken.axis, taken.rank
        if not taken.apart:
            return [node("Gather", table, taken.kept, axis=axis)]
        # What else is in the axis may be of any size, as may the others: it is laid out last, where a -1 says so.
        last, same = [*(i for i in range(rank) if i != axis), axis], [0] * (rank - 1)
        turned = node("Transpose", table, perm=last)
        parted = node("Reshape", turned.outputs[0], [*same, -1, taken.size])
        picked = node("Gather", parted.outputs[0], taken.kept, axis=rank)
        joined = node("Reshape", picked.outputs[0], [*same, -1])
        back = node("Transpose", joined.outputs[0], perm=[last.index(i) for i in range(rank)])
        return [turned, parted, picked, joined, back]

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
        """Does nothing: all constants of a graph count."""

    def mapped(
        self, name: str, source: gs.Tensor, weight: np.ndarray, bias: np.ndarray, made: gs.Variable
    ) -> list[gs.Node]:
        """Returns a MatMul and an Add."""
        product = gs.Variable(f"{name}_product", weight.dtype)
        stored = gs.Constant(f"{name}_map", np.ascontiguousarray(weight)), gs.Constant(f"{name}_bias", bias)
        return [
            gs.Node("MatMul", f"{name}_map", {}, [source, stored[0]], [product]),
            gs.Node("Add", f"{name}_bias", {}, [product, stored[1]], [made]),
        ]

    def spread(self, name: str, source: gs.Tensor, bias: gs.Constant, made: gs.Variable) -> list[gs.Node]:
        """Returns an Expand to the shape of ``source``."""
        shape = gs.Variable(f"{name}_shape", np.dtype(np.int64))
        return [
            gs.Node("Shape", f"{name}_shape", {}, [source], [shape]),
            gs.Node("Expand", f"{name}_spread", {}, [bias, shape], [made]),
        ]

    # -- normal form ------------------------------------------------------------------------------------------------

    def normalise(self) -> int:
        """Brings the graph to the form that the analysis expects (`normal_form`); returns the number of nodes removed."""
        return normalise(self)


def _session_parts(proto: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> tuple[bytes, Mapping[str, np.ndarray]]:
    return proto.SerializeToString(), arrays


def _on_grids(graph: gs.Graph, reading: Reading) -> None:
    """Has the constants that stand for whole numbers know it."""
    known: dict[int, Gridded] = {}
    for node in graph.nodes:
        for place, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and tensor.name in reading.weights:
                if id(tensor) not in known:
                    values = tensor._values
                    own = Gridded(tensor.name, np.zeros(0, np.float32), tensor.name, ())
                    own._values, own.data_location = values, tensor.data_location
                    packed = reading.weights[tensor.name].packing == NBITS
                    rank = len(tensor.shape)
                    own.axes = tuple(range(rank))[::-1] if packed else tuple(range(rank))
                    known[id(tensor)] = own
                node.inputs[place] = known[id(tensor)]


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
        path.name.encode()
    except UnicodeEncodeError as err:
        raise ModelError(f"the name of '{path}' is no UTF-8 text, and ONNX can name no other file; rename it") from err
    try:
        proto, arrays = read_model(path, map_from)
    except OSError as err:
        raise ModelError(f"'{path}' cannot be read ({err.strerror or err}); nothing was written") from err
    except (DecodeError, ValueError, RuntimeError) as err:
        raise ModelError(f"'{path}' cannot be read as ONNX (truncated or another format); export it again") from err
    if not proto.graph.node or not proto.opset_import:
        raise ModelError(f"'{path}' holds no ONNX graph (truncated or another format); export it again")
    return proto, arrays


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
