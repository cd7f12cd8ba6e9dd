"""A graph that was read as floats (`quantised_in`), written in the scheme that it had.

Weights go on the grids that they had as far as these say them (`quantised_grids`), activations are quantised where they
were and by the same numbers, and nodes compute on whole numbers again. What was not cut is the same to the last byte.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

from liar_opt.frontend.quantised_grids import Grid, laid_out
from liar_opt.frontend.quantised_in import (
    FUSED,
    MICROSOFT,
    MOVED,
    NBITS,
    TABLE,
    Form,
    Fused,
    Reading,
    Weight,
    alive,
    packed,
    read_within,
    rename_within,
)
from liar_opt.frontend.weight_files import PLAIN, STUB_LIMIT, element_type, stub
from liar_opt.frontend.widen_graph import bodies_of

Array = NDArray[Any]
ATTENTION = {"num_heads", "unidirectional", "mask_filter_value", "scale", "do_rotary", "past_present_share_buffer"}
"""Attributes of an Attention that its form on whole numbers has."""
INTEGER = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}


class Fit(NamedTuple):
    """The grid that a weight is written on, with the axes that it is stored with.

    Attributes:
        grid: it.
        kept: how many of its units kept theirs.
        units: how many there are.
    """

    grid: Grid
    kept: int
    units: int


@dataclass(eq=False)
class Written:
    """A graph in its scheme.

    Attributes:
        proto: it; large initializers are stubs.
        arrays: their data.
        values: the weights as they are written, by the constants of the float graph.
        fits: their grids, likewise.
        unchanged: weights that are the same to the last byte.
        weights: all of them.
        kept: grids (one a weight, a channel or a block) that stayed, and all grids there are.
        grids: all of them.
        steps: how far a weight that is new on its grid is from what it was repaired to, at the most, in steps.
        floats: nodes that had computed on whole numbers, and do on floats now.
    """

    proto: onnx.ModelProto
    arrays: dict[str, Array]
    values: dict[str, Array] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    unchanged: int = 0
    weights: int = 0
    kept: int = 0
    grids: int = 0
    steps: float = 0.0
    floats: list[str] = field(default_factory=list)


def written_back(
    proto: onnx.ModelProto,
    arrays: Mapping[str, Array],
    gridded: Mapping[str, tuple[str, tuple[int, ...]]],
    reading: Reading,
    weights: bool = True,
    fits: Mapping[str, Fit] | None = None,
) -> Written:
    """Returns a float graph in the scheme of the graph that it was read from.

    Args:
        proto: the graph; what has its data in ``arrays`` is a stub.
        arrays: that data.
        gridded: of constants that stand for whole numbers, the weight (of ``reading``) and the axes that they have there.
        reading: what the graph was.
        weights: whether weights become whole numbers; if not, activations alone are quantised.
        fits: grids of weights, by their constants, that are known; others are found.
    """
    writer = _Writer(proto, arrays, gridded, reading, weights, fits or {})
    writer.run()
    return writer.finished()


@dataclass(frozen=True, eq=False)
class _Stored:
    """A weight as it is written, and the names of its initializers."""

    grid: Grid
    numbers: str
    scale: str
    zero: str
    weight: Weight
    axes: tuple[int, ...]

    @property
    def as_it_lies(self) -> bool:
        """Whether the file has its axes in the order of the graph."""
        return self.axes == tuple(range(len(self.axes)))


class _Writer:
    """Writes the nodes of a float graph one after the other; the arguments are those of `written_back`."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        arrays: Mapping[str, Array],
        gridded: Mapping[str, tuple[str, tuple[int, ...]]],
        reading: Reading,
        weights: bool,
        fits: Mapping[str, Fit],
    ) -> None:
        self.source, self.arrays, self.gridded, self.reading, self.whole = proto, arrays, gridded, reading, weights
        self.fits = fits
        self.given = {t.name: t for t in proto.graph.initializer}
        self.outputs = {v.name for v in proto.graph.output}
        self.pairs = {pair.tensor: pair for pair in reading.pairs}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.data: dict[str, Array] = {}
        self.stored: dict[str, _Stored] = {}
        self.written: set[str] = set()
        self.renamed: dict[str, str] = {}
        self.dynamic: dict[str, tuple[str, str, str]] = {}
        self.products: dict[tuple[str, str, str], str] = {}
        self.moved: dict[str, tuple[str, str, str]] = {}
        self.folded: set[str] = set()
        self.result = Written(proto, {})
        self.by_name = {node.name: node for node in proto.graph.node}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.graph.node:
            for name in {*node.input, *(n for body in bodies_of(node) for n in read_within(body))}:
                self.readers.setdefault(name, []).append(node)
        self.taken = {n for node in proto.graph.node for n in (*node.input, *node.output)} | set(self.given)
        self.taken |= {v.name for v in (*proto.graph.input, *proto.graph.output)}
        self.labels = set(self.by_name)

    def run(self) -> None:
        """Writes all nodes."""
        for value in self.source.graph.input:
            self._quantised(value.name)
        for node in self.source.graph.node:
            if node.name in self.folded:
                continue
            form, folded = self.reading.forms.get(node.name), set(self.folded)
            if form is None or not self._as_it_was(node, form):
                if form is not None and form.op not in (*FUSED, MOVED) and self.whole:
                    self.result.floats.append(node.name)
                self._as_floats(node)
            for name in (*node.output, *(n for other in self.folded - folded for n in self.by_name[other].output)):
                self._quantised(name)

    def finished(self) -> Written:
        """Returns what was written."""
        proto, result = onnx.ModelProto(), self.result
        proto.CopyFrom(self.source)
        graph = proto.graph
        nodes = _Fusing(self).fused() if self.whole else self.nodes
        nodes = alive(nodes, self.outputs)
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        read = {n for node in nodes for n in (*node.input, *(k for b in bodies_of(node) for k in read_within(b)))}
        read |= self.outputs
        for name, tensor in {**self.given, **self.initializers}.items():
            if name not in read:
                continue
            graph.initializer.append(tensor)
            array = self.data.get(name, self.arrays.get(name) if name not in self.initializers else None)
            if array is not None:
                result.arrays[name] = array
        known = {entry.domain for entry in proto.opset_import}
        proto.opset_import.extend(e for e in self.reading.proto.opset_import if e.domain not in known)
        used = {node.domain for node in nodes}
        if MICROSOFT in used and MICROSOFT not in {e.domain for e in proto.opset_import}:
            proto.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        proto.ir_version = max(proto.ir_version, self.reading.proto.ir_version)
        result.proto = proto
        return result

    # -- nodes ----------------------------------------------------------------------------------------------------------

    def emit(
        self, op: str, inputs: list[str], outputs: list[str], name: str, attributes: Any = (), domain: str = ""
    ) -> onnx.NodeProto:
        """Adds a node; absent inputs at the end are left out."""
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        made = onnx.helper.make_node(op, inputs, outputs, name, domain=domain or None)
        made.attribute.extend(attributes)
        self.nodes.append(made)
        return made

    def fresh(self, *names: str) -> str:
        """Returns the first of some names that no tensor has, or one that is made of the last."""
        tried = itertools.chain(names, (f"{names[-1]}_{k}" for k in itertools.count(2)))
        name = next(n for n in tried if n and n not in self.taken)
        self.taken.add(name)
        return name

    def label(self, name: str) -> str:
        """Returns a name for a node."""
        tried = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(2)))
        label = next(n for n in tried if n not in self.labels)
        self.labels.add(label)
        return label

    def seen(self, node: onnx.NodeProto, place: int) -> str:
        """Returns what a node reads at an input: what is made of whole numbers, where it did."""
        name = str(node.input[place])
        pair = self.pairs.get(name)
        if pair is None or (node.name, place) in pair.raw:
            return self.renamed.get(name, name)
        return pair.output or name

    def _as_floats(self, node: onnx.NodeProto) -> None:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        for place, name in enumerate(node.input):
            if name in self.gridded:
                self._dequantised(name)
            made.input[place] = self._through(name) if self._comes(node, place) else self.seen(node, place)
        for body in bodies_of(made):
            for name in read_within(body) & set(self.gridded):
                self._dequantised(name)
            within = {
                n: self.renamed.get(n, n) if (node.name, -1) in p.raw else p.output or n for n, p in self.pairs.items()
            }
            rename_within(body, within)
        for place, name in enumerate(node.output):
            made.output[place] = self._raw_name(name)
        self.nodes.append(made)

    def _raw_name(self, name: str) -> str:
        """Returns what a tensor is called before it is quantised."""
        pair = self.pairs.get(name)
        if pair is None or name not in self.outputs or pair.output:
            return name
        if name not in self.renamed:
            self.renamed[name] = self.fresh(pair.before, f"{name}_raw")
        return self.renamed[name]

    def _comes(self, node: onnx.NodeProto, place: int) -> bool:
        """Returns whether, in a graph of float weights, a node reads at an input what was quantised as it came."""
        form, name = self.reading.forms.get(node.name), node.input[place]
        if self.whole or form is None or place > 1 or name in self.gridded:
            return False
        if form.op == "DynamicQuantizeMatMul":
            return place == 0
        return form.op in (*INTEGER, "MatMulIntegerToFloat", "QAttention") and name in self.reading.dynamic

    def _through(self, name: str) -> str:
        """Returns a tensor that is quantised as it comes, and made floats of."""
        numbers, scale, zero = self._as_it_comes(name)
        output = f"{numbers}/floats"
        if output not in self.written:
            self.written.add(output)
            self.emit("DequantizeLinear", [numbers, scale, zero], [output], self.label(f"{numbers}_floats"))
        return output

    def _quantised(self, name: str) -> None:
        """Adds the two nodes behind a tensor that is quantised."""
        pair = self.pairs.get(name)
        if pair is None or name in self.written:
            return
        self.written.add(name)
        for part in (pair.scale, pair.zero):
            self._as_given(part)
        params = [n for n in (pair.scale, pair.zero) if n]
        output = pair.output or name
        self.taken |= {pair.numbers, output}
        self.emit(
            "QuantizeLinear",
            [self.renamed.get(name, name), *params],
            [pair.numbers],
            self.label(pair.nodes[0]),
            pair.attributes,
            pair.domain,
        )
        self.emit("DequantizeLinear", [pair.numbers, *params], [output], self.label(pair.nodes[1]), domain=pair.domain)

    def _as_given(self, name: str) -> None:
        """Takes over an initializer of the graph as it came."""
        if name and name not in self.initializers:
            self.initializers[name] = self.reading.tensors[name]
            self.taken.add(name)
            if name in self.reading.arrays:
                self.data[name] = self.reading.arrays[name]

    # -- weights --------------------------------------------------------------------------------------------------------

    def value(self, name: str) -> Array:
        """Returns a constant of the float graph."""
        if name in self.arrays:
            return self.arrays[name]
        return np.asarray(onnx.numpy_helper.to_array(self.given[name]))

    def store(self, name: str) -> _Stored:
        """Returns a weight as it is written; its initializers are there then."""
        if name in self.stored:
            return self.stored[name]
        known, axes = self.gridded[name]
        weight = self.reading.weights[known]
        as_stored = laid_out(self.value(name).transpose(np.argsort(axes)))
        fit = self.fits.get(name) or self._fit(weight, as_stored)
        result, (grid, kept, grids) = self.result, fit
        result.fits[name] = fit
        result.weights += 1
        result.kept, result.grids = result.kept + kept, result.grids + grids
        result.unchanged += grid is weight.grid
        if grid is not weight.grid:
            result.steps = max(result.steps, grid.steps(as_stored))
        result.values[name] = laid_out(grid.values.transpose(axes))
        names = self._initializers(name, grid, weight)
        self.stored[name] = _Stored(grid, *names, weight, axes)
        return self.stored[name]

    def _fit(self, weight: Weight, values: Array) -> Fit:
        """Returns the grid of a weight."""
        scale = self._scale_of_bias(weight, values)
        if scale is None:
            return Fit(*weight.grid.refitted(values))
        grid = weight.grid.at_scale(values, scale)
        same = np.array_equal(grid.numbers, weight.grid.numbers) and np.array_equal(grid.scale, weight.grid.scale)
        return Fit(weight.grid if same else grid, 0, 0)

    def _scale_of_bias(self, weight: Weight, values: Array) -> Array | None:
        """Returns the product of the scales of what is multiplied, of a bias that is stored so."""
        node = self.by_name.get(weight.bias_of)
        if node is None:
            return None
        pair, second = self.pairs.get(node.input[0]), node.input[1]
        if pair is None or second not in self.gridded:
            return None
        other = self.store(second).grid.scale
        first = np.asarray(onnx.numpy_helper.to_array(self.reading.tensors[pair.scale])).reshape(())
        alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
        product = np.asarray(first * other * np.float32(alpha), np.float32)
        before = weight.grid.scale
        if product.shape == before.shape and np.allclose(product, before, rtol=1e-6):
            return before  # rounded in another order
        return product if product.size in (1, values.size) else None

    def _initializers(self, name: str, grid: Grid, weight: Weight) -> tuple[str, str, str]:
        """Adds the initializers of a weight; returns their names."""
        same = grid is weight.grid and all(n in self.reading.tensors for n in (weight.numbers, weight.scale) if n)
        old = (weight.numbers, weight.scale, weight.zero)
        if same and all(n not in self.initializers or self._is_given(n) for n in old if n):
            for part in old:
                self._as_given(part)
            return old
        kinds = [self.reading.tensors.get(n) for n in old]
        if not weight.zero and grid.zero is not None and grid.zero.any() and not grid.symmetric:
            old, kinds[2] = (*old[:2], self.fresh(f"{name}_zero_point")), kinds[0]  # there was none: all were 0
            self.taken.discard(old[2])
        numbers, scale, zero = self._laid_out(grid, weight)
        result = []
        for part, kind, values in zip(old, kinds, (numbers, scale, zero), strict=True):
            if not part:
                result.append("")
                continue
            end = {0: "quantized", 1: "scale", 2: "zero_point"}[len(result)]
            label = part if part not in self.taken else self.fresh(f"{name}_{end}")
            self.taken.add(label)
            shaped = values.reshape(kind.dims) if kind is not None and values.size == int(np.prod(kind.dims)) else values
            self._add(label, shaped, None if kind is None else kind.data_type)
            result.append(label)
        return result[0], result[1], result[2]

    def _is_given(self, name: str) -> bool:
        return self.initializers[name] is self.reading.tensors.get(name)

    def _laid_out(self, grid: Grid, weight: Weight) -> tuple[Array, Array, Array]:
        """Returns numbers, scales and zero points as the file has them."""
        zero = np.zeros(grid.scale.shape, grid.numbers.dtype) if grid.zero is None else grid.zero
        numbers, scale = grid.numbers, grid.scale
        if weight.packing == NBITS:
            short = -numbers.shape[1] % grid.block
            middle = 1 << (weight.bits - 1)
            full = np.pad(numbers, ((0, 0), (0, short)), constant_values=middle)
            blobs = packed(full, weight.bits).reshape(len(full), -1, grid.block * weight.bits // 8)
            zero = packed(zero, weight.bits) if zero.dtype == np.uint8 else zero
            flat = weight.scale in self.reading.tensors and len(self.reading.tensors[weight.scale].dims) == 1
            return (blobs, scale.reshape(-1), zero.reshape(-1)) if flat else (blobs, scale, zero)
        if weight.packing == TABLE:
            return packed(numbers, weight.bits), scale, packed(zero, weight.bits)
        return numbers, scale, zero

    def _add(self, name: str, values: Array, kind: int | None) -> None:
        """Adds an initializer, of an element type if one is said."""
        types = {int(onnx.TensorProto.INT4): ml_dtypes.int4, int(onnx.TensorProto.UINT4): ml_dtypes.uint4}
        values, small = laid_out(values), None if kind is None else types.get(kind)
        if small is not None:
            self.initializers[name] = onnx.numpy_helper.from_array(values.astype(small), name)
        elif values.nbytes > STUB_LIMIT and element_type(values.dtype) in PLAIN:
            self.initializers[name] = stub(name, element_type(values.dtype), values.shape)
            self.data[name] = values
        else:
            self.initializers[name] = onnx.numpy_helper.from_array(values, name)

    def _dequantised(self, name: str) -> None:
        """Has a weight made floats of, where it is read, under the name that it has in the float graph."""
        if name in self.written or not self.whole:
            return
        weight = self.reading.weights[self.gridded[name][0]]
        if weight.packing != "plain":
            return  # no standard node makes floats of it: it stays as it is
        self.written.add(name)
        stored, grid = self.store(name), self.store(name).grid
        attributes = []
        if grid.axis is not None:
            attributes = [onnx.helper.make_attribute("axis", grid.axis if weight.axis is None else weight.axis)]
            attributes += [onnx.helper.make_attribute("block_size", grid.block)] if grid.block else []
        scale = stored.scale
        if not scale:
            scale = self.fresh(f"{stored.numbers}_scale")
            self._add(scale, grid.scale, None)
        output = name if stored.as_it_lies else self.fresh(f"{name}_stored")
        self.given.pop(name, None)
        inputs = [stored.numbers, scale, stored.zero]
        label = self.label(weight.node or f"{name}_dequantise")
        self.emit("DequantizeLinear", inputs, [output], label, attributes, weight.domain)
        if not stored.as_it_lies:
            turn = [onnx.helper.make_attribute("perm", list(stored.axes))]
            self.emit("Transpose", [output], [name], self.label(f"{name}_transpose"), turn)

    # -- nodes on whole numbers -----------------------------------------------------------------------------------------

    def _as_it_was(self, node: onnx.NodeProto, form: Form) -> bool:
        """Writes a node as it was, where that is possible."""
        rules = {
            "MatMulInteger": self._integer,
            "ConvInteger": self._integer,
            "DynamicQuantizeMatMul": self._dynamic_product,
            "MatMulIntegerToFloat": self._product_to_float,
            "QAttention": self._attention,
            "MatMulNBits": self._blocks,
            "GatherBlockQuantized": self._table,
            "Gather": self._gather,
            MOVED: self._moved,
        }
        return self.whole and form.op in rules and rules[form.op](node, form)

    def _as_it_comes(self, tensor: str) -> tuple[str, str, str]:
        """Returns whole numbers, scale and zero point of a tensor that is quantised as it comes."""
        if tensor not in self.dynamic:
            known = self.reading.dynamic.get(tensor)
            names = known or tuple(f"{tensor}_{end}" for end in ("dynamic", "quantized", "scale", "zero_point"))
            if known is None:
                names = (names[0], *(self.fresh(n) for n in names[1:]))
            pair = self.pairs.get(tensor)
            source = self.renamed.get(tensor, tensor) if pair is None else pair.output or tensor
            self.emit("DynamicQuantizeLinear", [source], list(names[1:]), self.label(names[0]))
            self.dynamic[tensor] = (names[1], names[2], names[3])
        return self.dynamic[tensor]

    def _numbers(self, tensor: str) -> tuple[str, str, str] | None:
        """Returns whole numbers, scale and zero point of a tensor, however it is quantised; None where it is not."""
        if tensor in self.reading.dynamic:
            return self._as_it_comes(tensor)
        pair = self.pairs.get(tensor)
        return self.moved.get(tensor) if pair is None else (pair.numbers, pair.scale, pair.zero)

    def _plain(self, name: str) -> _Stored | None:
        """Returns a weight whose numbers lie one by one, in the order of the graph; None where it is none."""
        if name not in self.gridded:
            return None
        stored = self.store(name)
        return stored if stored.as_it_lies and stored.weight.packing == "plain" and not stored.grid.block else None

    def _integer(self, node: onnx.NodeProto, form: Form) -> bool:
        second = self._plain(node.input[1])
        if node.op_type != INTEGER[form.op] or (second is None and node.input[1] not in self.reading.dynamic):
            return False
        if len(node.input) > 2 and node.input[2]:  # it has a bias now, which stands behind it
            return False
        if form.op == "ConvInteger" and (second is None or second.grid.axis is not None):
            return False
        first = self._numbers(node.input[0])
        if first is None:
            return False
        numbers, scale, zero = first
        if second is not None:
            other, its, its_zero = second.numbers, second.scale, second.zero
        else:
            other, its, its_zero = self._as_it_comes(node.input[1])
        cast, casted, scales, product, last = form.parts
        result = self.fresh(f"{casted}_integers")
        casted, kind = self.fresh(casted, f"{node.output[0]}_cast"), onnx.TensorProto.FLOAT
        inputs = [numbers, other, zero, its_zero] if its_zero else [numbers, other, zero]
        self.emit(form.op, inputs, [result], node.name, node.attribute, form.domain)
        self.emit("Cast", [result], [casted], self.label(cast), [onnx.helper.make_attribute("to", kind)])
        if (product, scale, its) not in self.products:
            self.products[product, scale, its] = self.fresh(product)
            self.emit("Mul", [scale, its], [self.products[product, scale, its]], self.label(scales))
        self.emit("Mul", [casted, self.products[product, scale, its]], [self._raw_name(node.output[0])], self.label(last))
        return True

    def _dynamic_product(self, node: onnx.NodeProto, form: Form) -> bool:
        weight = self._plain(node.input[1])
        if node.op_type != "MatMul" or weight is None:
            return False
        bias, output = self._bias_behind(node, form)
        inputs = [self.seen(node, 0), weight.numbers, weight.scale, weight.zero, bias]
        self.emit(form.op, inputs, [self._raw_name(output)], node.name, form.attributes, form.domain)
        return True

    def _product_to_float(self, node: onnx.NodeProto, form: Form) -> bool:
        first, weight = self._numbers(node.input[0]), self._plain(node.input[1])
        second = self._numbers(node.input[1]) if weight is None else (weight.numbers, weight.scale, weight.zero)
        if node.op_type != "MatMul" or first is None or second is None:
            return False
        bias, output = self._bias_behind(node, form)
        inputs = [first[0], second[0], first[1], second[1], first[2], second[2], bias]
        self.emit(form.op, inputs, [self._raw_name(output)], node.name, form.attributes, form.domain)
        return True

    def _bias_behind(self, node: onnx.NodeProto, form: Form) -> tuple[str, str]:
        """Returns the constant that is added behind a product, which had it as an input, and what the sum is called."""
        (output,) = node.output
        readers = self.readers.get(output, [])
        if form.bias and output not in self.outputs and len(readers) == 1 and readers[0].op_type == "Add":
            other = next((n for n in readers[0].input if n != output), "")
            if other in self.given and other not in self.gridded and len(self.given[other].dims) == 1:
                self.folded.add(readers[0].name)
                return other, readers[0].output[0]
        return "", output

    def _attention(self, node: onnx.NodeProto, form: Form) -> bool:
        weight = self._plain(node.input[1])
        first = self._numbers(node.input[0])
        known = {a.name for a in node.attribute} <= ATTENTION
        inputs = [*node.input, *[""] * 7]
        if node.op_type != "Attention" or not known or weight is None or first is None or any(inputs[5:]):
            return False
        names = [first[0], weight.numbers, inputs[2], first[1], weight.scale, inputs[3], first[2], weight.zero, inputs[4]]
        self.emit("QAttention", names, [*map(self._raw_name, node.output)], node.name, node.attribute, form.domain)
        return True

    def _blocks(self, node: onnx.NodeProto, form: Form) -> bool:
        name = node.input[1] if len(node.input) > 1 else ""
        if node.op_type != "MatMul" or name not in self.gridded:
            return False
        stored = self.store(name)
        if stored.axes != (1, 0) or stored.weight.packing != NBITS:
            return False
        bias, output = self._bias_behind(node, form)
        columns, size = stored.grid.numbers.shape
        sizes = {"K": size, "N": columns}
        attributes = [a for a in form.attributes if a.name not in sizes]
        attributes += [onnx.helper.make_attribute(k, n) for k, n in sizes.items()]
        inputs = [self.seen(node, 0), stored.numbers, stored.scale, stored.zero, "", bias]
        self.emit(form.op, inputs, [self._raw_name(output)], node.name, attributes, form.domain)
        return True

    def _table(self, node: onnx.NodeProto, form: Form) -> bool:
        if node.op_type != "Gather" or node.input[0] not in self.gridded:
            return False
        stored = self.store(node.input[0])
        if not stored.as_it_lies:
            return False
        inputs = [stored.numbers, self.seen(node, 1), stored.scale, stored.zero]
        self.emit(form.op, inputs, [self._raw_name(node.output[0])], node.name, form.attributes, form.domain)
        return True

    def _gather(self, node: onnx.NodeProto, form: Form) -> bool:
        stored = self._plain(node.input[0])
        if node.op_type != "Gather" or stored is None or stored.grid.axis is not None:
            return False
        output, name = form.parts
        whole = self.fresh(output, f"{output}_numbers")
        self.emit("Gather", [stored.numbers, self.seen(node, 1)], [whole], node.name, node.attribute)
        self.moved[node.output[0]] = (whole, stored.scale, stored.zero)
        inputs = [whole, stored.scale, stored.zero]
        self.emit("DequantizeLinear", inputs, [self._raw_name(node.output[0])], self.label(name))
        return True

    def _moved(self, node: onnx.NodeProto, form: Form) -> bool:
        """Writes a node that moves whole numbers, and what makes floats of them behind it."""
        del form
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        found = [self._numbers(name) for name in sources]
        known = [names for names in found if names is not None]
        raw = any((node.name, place) in self.pairs[n].raw for place, n in enumerate(sources) if n in self.pairs)
        if len(known) < len(found) or raw or any(bodies_of(node)):
            return False
        inputs = [*(names[0] for names in known), *(self.seen(node, k) for k in range(len(known), len(node.input)))]
        outputs = [self.fresh(f"{name}_numbers") if name else "" for name in node.output]
        self.emit(node.op_type, inputs, outputs, node.name, node.attribute, node.domain)
        for name, whole in zip(node.output, outputs, strict=True):
            self.moved[name] = (whole, *known[0][1:])
            label = self.label(f"{name}_dequantise")
            self.emit("DequantizeLinear", [whole, *known[0][1:]], [self._raw_name(name)], label)
        return True

    def whole_bias(self, name: str, node: onnx.NodeProto, scales: list[str]) -> str:
        """Returns a float bias in whole numbers of 32 bits, at the product of two scales."""
        values = [self._constant(scale) for scale in scales]
        alpha = next((a.f for a in node.attribute if a.name == "alpha"), 1.0)
        product = np.asarray(values[0].reshape(()) * values[1] * alpha, np.float64)
        numbers = np.clip(np.rint(self.value(name).reshape(-1) / product), -(2**31), 2**31 - 1).astype(np.int32)
        made = self.fresh(f"{name}_quantized")
        self._add(made, numbers, None)
        return made

    def _constant(self, name: str) -> Array:
        if name in self.data:
            return self.data[name]
        return np.asarray(onnx.numpy_helper.to_array(self.initializers[name]))


class _Fusing:
    """Puts nodes between DequantizeLinear and QuantizeLinear into the one that they were.

    Args:
        writer: what has written the nodes.
    """

    def __init__(self, writer: _Writer) -> None:
        self.writer = writer
        self.makers = {out: node for node in writer.nodes for out in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in writer.nodes:
            for name in {*node.input, *(n for body in bodies_of(node) for n in read_within(body))}:
                self.readers.setdefault(name, []).append(node)

    def fused(self) -> list[onnx.NodeProto]:
        """Returns the nodes, each as it was."""
        gone, result = set(), []
        for node in self.writer.nodes:
            if node.name in gone:
                continue
            form = self.writer.reading.forms.get(node.name)
            made = self._fused(node, form) if form is not None and form.op in FUSED else None
            if made is None:
                if form is not None and form.op in FUSED:
                    self.writer.result.floats.append(node.name)
                result.append(node)
                continue
            gone.add(self.readers[node.output[0]][0].name)
            result.append(made)
        return result

    def _fused(self, node: onnx.NodeProto, form: Form) -> onnx.NodeProto | None:
        """Returns a node on whole numbers; None where something around it is in floats."""
        rule = FUSED[form.op]
        readers = self.readers.get(node.output[0], [])
        last = readers[0] if len(readers) == 1 else None
        if (
            node.op_type != rule.op
            or last is None
            or last.op_type != "QuantizeLinear"
            or node.output[0] in self.writer.outputs
        ):
            return None
        operands = self._operands(node, rule)
        if operands is None:
            return None
        inputs: list[str] = []
        scales: list[str] = []
        for kind, name in operands:
            maker = self.makers.get(name)
            if kind == "y":
                inputs += [last.input[1], [*last.input, ""][2]]
            elif kind == "f":
                inputs.append(name)
            elif kind == "b":
                inputs.append(self._bias(node, name, scales))
            elif (
                maker is None or maker.op_type != "DequantizeLinear" or any(a.name == "block_size" for a in maker.attribute)
            ):
                return None
            else:
                inputs += [*maker.input, ""][:3]
                scales.append(maker.input[1])
        if form.op == "QGemm" and not form.bias and len(node.input) < 3:
            inputs[6:6] = [] if len(inputs) > 8 else [""]
        while inputs and not inputs[-1]:
            inputs.pop()
        made = onnx.helper.make_node(form.op, inputs, [last.output[0]], node.name, domain=form.domain or None)
        own = {a.name for a in node.attribute}
        made.attribute.extend(a for a in node.attribute if a.name != "beta")
        made.attribute.extend(a for a in form.attributes if a.name not in own)
        return made

    def _bias(self, node: onnx.NodeProto, name: str, scales: list[str]) -> str:
        maker = self.makers.get(name)
        if not name:
            return ""
        return maker.input[0] if maker is not None else self.writer.whole_bias(name, node, scales)

    def _operands(self, node: onnx.NodeProto, rule: Fused) -> list[tuple[str, str]] | None:
        """Returns the operands of a node, in the order of its inputs on whole numbers."""
        given: Iterator[str] = iter(node.input)
        result = []
        for kind in rule.operands:
            if kind == "*":
                result += [("q", name) for name in given]
            elif kind == "y":
                result.append(("y", ""))
            elif kind == "b":
                result.append(("b", next(given, "")))
            else:
                name = next(given, None)
                if name is None:
                    return None
                result.append((kind, name))
        return result
