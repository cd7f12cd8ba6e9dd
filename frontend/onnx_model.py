"""ONNX files in and out, and the graph in the form that the passes work on.

:class:`OnnxModel` holds an onnx-graphsurgeon graph. Loading checks what can be known of a file (truncated, external
data missing, quantised); :meth:`OnnxModel.normalise` brings exporters' habits to one form: constants as initializers,
no Identity, weights stored the way they are multiplied, every node named. Weights shared by several nodes stay shared:
equal folds of equal constants give one constant.
"""

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from liar_opt.frontend.fold_weights import Left, fold_weights
from liar_opt.frontend.hand_quantised import hand_quantised_node
from liar_opt.frontend.merged_decoder import MergedDecoder, names_read, side_by_side, unfold
from liar_opt.frontend.onnx_values import evaluate, result_elements, tensor_attribute
from liar_opt.frontend.sound_model import inlined, require_sound, why_invalid
from liar_opt.frontend.sparse_weights import densified
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
from liar_opt.frontend.widen_graph import bodies_of, narrow_values, nodes_within, widen
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.errors import LiarOptError, ModelError
from liar_opt.runtime.signatures import InputSpec

gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR

QUANTISED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
QUANTISED_PREFIXES = (
    *("QLinear", "QGemm", "QAttention", "QMoE", "QOrdered", "GatherBlockQuantized"),
    *("MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "MatMulBlockQuantized", "MatMulIntegerToFloat"),
)
STANDARD = {"", "ai.onnx"}
MOST_ELEMENTS = 1 << 31
"""A constant that constants make may not have more elements: ONNX Runtime makes it as well, while it loads the model."""
CACHE_SHAPES = "liar_opt.cache_shapes"
"""Key of the metadata that says the new shapes of cache inputs and outputs: JSON, name -> shape."""
SKELETON_LIMIT = 1024
"""Constants up to this many elements keep their data in a skeleton: shape inference reads them."""
MOVERS = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze")
"""Operators that give a tensor another shape or type and leave its values alone."""
NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
"""Types in which weights are stored that a graph computes with in a wider one."""
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
        constants, casts = _as_stored([*self.constants(unread=True)], graph)
        tensors, arrays = detached_tensors(constants)
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

    # -- normal form ------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Moves weights that are new to the store, if there is one."""
        for constant in self.constants() if self.store is not None else ():
            if isinstance(constant._values, np.ndarray):
                constant.values = self.settled(constant.values)

    def settled(self, value: np.ndarray) -> np.ndarray:
        """Returns an array as it is in the store; what is mapped already (read-only) stays where it is."""
        return self.store.put(value) if self.store is not None and value.flags.writeable else value

    def _narrowed(self, node: gs.Node, name: str, values: np.ndarray, kind: np.dtype[Any]) -> gs.Constant:
        return Narrow(name, values, np.dtype(kind), f"{name}/{np.dtype(kind).name}", node.name, self.settled)

    def normalise(self) -> int:
        """Brings the graph to the form that the analysis expects; returns the number of nodes removed.

        Constant nodes become initializers, Identity and no-op Dropout and Cast go, what depends on constants alone is
        folded (so that a weight under a Transpose is stored transposed; see ``fold_weights`` for those that are computed),
        an Einsum of a weight with several axes on a side becomes a MatMul between Reshapes, what is repeated for several
        readers (a mask by heads, for all layers) is repeated for each, initial states of zeros go, nodes and
        tensors get unique names, dead nodes go. Sharing is kept: the same fold of the same constant gives one constant.
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
        for node in graph.nodes:
            if node.op == "Constant" and node.domain in (None, *STANDARD) and len(node.outputs) == 1:
                value = constant_value(node)
                if value is not None and id(node.outputs[0]) not in outputs:
                    _replace(node.outputs[0], gs.Constant(node.outputs[0].name, value))
                    node.outputs.clear()
        self.computed, untouched = fold_weights(graph, _shares_table, self._narrowed, self.settled)
        for node in list(graph.nodes):
            if node.op == "Constant":
                continue
            if _is_identity(node) and id(node.outputs[0]) not in outputs:
                _replace(node.outputs[0], node.inputs[0])
                node.outputs.clear()
                node.inputs.clear()
                continue
            if node.op == "Einsum" and node.domain in (None, *STANDARD):
                graph.nodes.extend(_as_product(node, flat, names, self.settled))
            if id(node) not in untouched:
                _fold(node, folded, outputs, names, self.settled)
        _drop_zero_states(graph)
        graph.cleanup(remove_unused_node_outputs=False)
        if self.merged is None:
            graph.toposort()
            _part_repeats(graph, names)
        else:
            graph.nodes = side_by_side(graph.nodes, self.merged.nodes_of_first(graph.nodes))
        return before - len(graph.nodes)


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


def like(old: gs.Constant, name: str, values: np.ndarray) -> gs.Constant:
    """Returns a constant that is written as ``old`` is, with other values."""
    if isinstance(old, Narrow) and values.dtype == old.dtype:
        return Narrow(name, values, old.kind, old.source, old.cast, old.keep)
    return gs.Constant(name, values)


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
    large = [t for t in node.inputs if is_constant(t) and sum(int(n) > 1 for n in t.shape) > 1]
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
    if _shares_table(node) or _shares_narrow(node):
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
            made = result_elements(node.op, inputs, node.attrs)
            if made > MOST_ELEMENTS:
                raise ModelError(
                    f"node '{node.name}' ({node.op}) makes a constant of {made:,} elements, more than a machine holds; "
                    "export the model again"
                )
            values = evaluate(node.op, inputs, node.attrs)
        if values is None or len(values) < len(node.outputs):
            return
        # The constants stay alive through the key's owner list, so that ids are not reused.
        results = [
            _result(node, t.name or next(names), keep(np.ascontiguousarray(v).reshape(v.shape)), keep)
            for t, v in zip(node.outputs, values, strict=False)
        ]
        folded[key] = results
        folded[("alive", *key)] = [t for t in node.inputs if is_constant(t)]
    for old, new in zip(node.outputs, results, strict=True):
        _replace(old, new)
    node.outputs.clear()
    node.inputs.clear()


def _result(node: gs.Node, name: str, value: np.ndarray, keep: Callable[[np.ndarray], np.ndarray]) -> gs.Constant:
    """Returns what a node gives, folded; a weight that it widens, or moves after that, is still stored as it was."""
    old = node.inputs[0]
    if node.op == "Cast" and old.dtype in NARROW and value.dtype in (np.float32, np.float64):
        return Narrow(name, value, np.dtype(old.dtype), old.name, node.name, keep)
    carried = node.op in (*MOVERS, "Gather", "Slice", "Split")
    return like(old, name, value) if carried else gs.Constant(name, value)


def _shares_narrow(node: gs.Node) -> bool:
    """Returns whether a node widens a large weight that others read as it is."""
    old = node.inputs[0]
    large = node.op == "Cast" and old.dtype in NARROW and int(np.prod(old.shape, dtype=np.int64)) > SKELETON_LIMIT
    return large and any(reader.op not in MOVERS for reader in old.outputs)


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
        flat[key] = (like(constant, f"{constant.name}_{next(names)}", keep(np.ascontiguousarray(matrix))), constant)
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
