"""Merged decoders: one If whose branches are a decoder without and with its cache, laid out flat and folded back.

Encoder-decoders are shipped as a graph whose outputs are those of one If. Its condition is an input of the graph
(``use_cache_branch``); one branch computes all keys and values (the first), the other takes them from inputs; both read the
same weights, which lie outside. :func:`unfold` lays both branches side by side in one flat graph, where each weight has
the uses of both, and doubles the outputs. What one branch hands to the other through the program that runs the model (keys
and values of the encoder, which the second branch reads and does not extend) is a wire in the flat graph, so that nobody
has to feed it. :meth:`MergedDecoder.fold` gives the nodes of each branch back to it, and leaves outside what both need.

Before:  y = If(c) {first: t = f(W, x), second: e = g(W, x, past)}.    After:  y = f(W, x)   second/y = g(W, x, y').
"""

import bisect
import heapq
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.weight_files import PLAIN, STUB_LIMIT, numpy_type, stub, tensor_bytes
from liar_opt.frontend.widen_graph import bodies_of
from liar_opt.runtime.signatures import name_from_layer

BODIES = ("else_branch", "then_branch")
FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
Sizes = Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class Branch:
    """A branch of the merged model.

    Attributes:
        attribute: the attribute of the If that holds it.
        tensors: names in the branch, by those in the flat graph.
        nodes: the same of nodes.
        outputs: tensors of the flat graph, for each output of the If; None where the branch has an empty constant.
        empty: that constant, by the number of the output.
    """

    attribute: str
    tensors: dict[str, str]
    nodes: dict[str, str]
    outputs: tuple[str | None, ...]
    empty: dict[int, onnx.TensorProto]


@dataclass(frozen=True, eq=False)
class MergedDecoder:
    """What a flat graph lacks of the merged model that it was made of.

    Attributes:
        shell: the merged model without weights, the If its only node, whose branches have no nodes.
        first: the branch whose outputs have the names of the model's.
        second: the other one.
        wires: for inputs that the second branch alone reads, the output of the first one that stands for it.
        outside: initializers that were outside the If.
    """

    shell: onnx.ModelProto
    first: Branch
    second: Branch
    wires: dict[str, str]
    outside: frozenset[str]

    @property
    def condition(self) -> str:
        """The input that chooses the branch."""
        return str(self.shell.graph.node[0].input[0])

    @property
    def twins(self) -> list[tuple[str, str]]:
        """Outputs of the flat graph that are one of the model's: of the first branch and of the second."""
        pairs = zip(self.first.outputs, self.second.outputs, strict=True)
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def caches(self) -> dict[str, tuple[int | str, ...]]:
        """Returns the shapes of the inputs that are wires, by the output that stands for them."""
        shapes = {value.name: tuple(d.dim_value or d.dim_param for d in _dims(value)) for value in self.shell.graph.input}
        return {output: shapes[name] for name, output in self.wires.items()}

    def feeds(self, branch: Branch, flat: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the inputs that the merged model has and the flat graph has not, for a run of one branch.

        Args:
            branch: the one to run.
            flat: the flat graph's outputs, of which the second branch reads what the first one leaves.
        """
        result: dict[str, Any] = {name: flat[wire] for name, wire in self.wires.items()}
        (condition,) = (v for v in self.shell.graph.input if v.name == self.condition)
        result[self.condition] = np.full([1] * len(_dims(condition)), branch.attribute == "then_branch")
        return result

    def sizes(self, resized: Sizes) -> dict[str, dict[int, int]]:
        """Returns the new sizes of the merged model's inputs and outputs, by name and axis, from those of the flat one."""
        result = {name: dict(axes) for name, axes in resized.items() if name in _names(self.shell.graph.input)}
        result |= {name: dict(resized[wire]) for name, wire in self.wires.items() if wire in resized}
        for name, *flat in zip(self.shell.graph.node[0].output, self.first.outputs, self.second.outputs, strict=True):
            found = next((resized[f] for f in flat if f is not None and f in resized), None)
            if found is not None:
                result[name] = dict(found)
        return result

    def nodes_of_first(self, nodes: Sequence[gs.Node]) -> set[int]:
        """Returns the ids of the nodes of the flat graph that the first branch needs."""
        made = {id(t): n for n in nodes for t in n.outputs}
        found: set[int] = set()
        waiting = [n for n in nodes if any(t.name in self.first.outputs for t in n.outputs)]
        while waiting:
            node = waiting.pop()
            if id(node) not in found:
                found.add(id(node))
                waiting += [made[i] for i in _sources(node) if i in made]
        return found

    def fold(self, flat: onnx.ModelProto, resized: Sizes) -> onnx.ModelProto:
        """Returns the merged model of a flat graph.

        Args:
            flat: the flat graph, its large initializers stubs or not.
            resized: sizes of inputs and outputs of the flat graph that have changed, by name and axis.
        """
        result = onnx.ModelProto()
        result.CopyFrom(flat)
        graph, nodes = result.graph, list(flat.graph.node)
        graph.CopyFrom(self.shell.graph)
        graph.sparse_initializer.extend(flat.graph.sparse_initializer)
        choice = graph.node.pop()
        wired = {wire: name for name, wire in self.wires.items()}
        of_first = _behind(nodes, self.first.outputs, ())
        of_second = _behind(nodes, self.second.outputs, wired)
        both = of_first & of_second
        graph.node.extend(nodes[i] for i in sorted(both))
        kept = [*flat.graph.initializer]
        for branch, own, wires in ((self.first, of_first - both, {}), (self.second, of_second - both, wired)):
            inside = [nodes[i] for i in sorted(own)]
            elsewhere = {name for i in (of_first | of_second) - own for name in names_read(nodes[i])}
            read = {name for node in inside for name in names_read(node)} - elsewhere
            local = [t for t in kept if t.name in read and self._inside(t)]
            kept = [t for t in kept if not any(t is other for other in local)]
            outer = {*_names(graph.input), *_names(kept), *(o for n in graph.node for o in n.output)}
            body = next(a.g for a in choice.attribute if a.name == branch.attribute)
            _fill(body, branch, inside, local, wires, outer)
        graph.initializer.extend(kept)
        graph.node.append(choice)
        self._resize(graph, self.sizes(resized))
        return result

    def _inside(self, tensor: onnx.TensorProto) -> bool:
        """Whether an initializer that one branch alone reads lies in it: it did, or it is new, and it is small."""
        return tensor.name not in self.outside and tensor.data_location != onnx.TensorProto.EXTERNAL

    def _resize(self, graph: onnx.GraphProto, sizes: Sizes) -> None:
        for value in (*graph.input, *graph.output):
            _set_sizes(value, sizes.get(value.name, {}))
        choice = graph.node[-1]
        for attribute in choice.attribute:
            branch = self.first if attribute.name == self.first.attribute else self.second
            for number, (name, value) in enumerate(zip(choice.output, attribute.g.output, strict=True)):
                _set_sizes(value, sizes.get(name, {}))
                if number in branch.empty:
                    tensor = onnx.TensorProto()
                    tensor.CopyFrom(branch.empty[number])
                    for axis, size in sizes.get(name, {}).items():
                        tensor.dims[axis] = size if tensor.dims[axis] else 0
                    made = onnx.helper.make_node("Constant", [], [value.name], name=f"Constant_{value.name}", value=tensor)
                    attribute.g.node.append(made)


def _fill(
    body: onnx.GraphProto,
    branch: Branch,
    nodes: Sequence[onnx.NodeProto],
    local: Sequence[onnx.TensorProto],
    wires: Mapping[str, str],
    outer: Collection[str],
) -> None:
    """Puts nodes and small constants into the body of a branch, under the names that they had there."""
    defined = [*(t.name for t in local), *(o for n in nodes for o in n.output if o)]
    # Those that were not there before (a new bias) keep the name that they have, which is nobody else's.
    new = {*outer, *(name for name in defined if name not in branch.tensors)}
    names = {name: branch.tensors[name] for name in defined if branch.tensors.get(name, name) not in new}
    outputs = zip(branch.outputs, body.output, strict=True)
    names |= {**wires, **{flat: value.name for flat, value in outputs if flat is not None}}
    for node in nodes:
        body.node.append(renamed(node, names))
        body.node[-1].name = branch.nodes.get(node.name, node.name)
    for tensor in local:
        body.initializer.append(tensor)
        body.initializer[-1].name = names.get(tensor.name, tensor.name)


def _behind(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str | None], stops: Collection[str]) -> set[int]:
    """Returns the positions of the nodes that outputs need, where nothing behind ``stops`` is."""
    made = {o: i for i, n in enumerate(nodes) for o in n.output if o}
    found: set[int] = set()
    waiting = [made[o] for o in outputs if o in made]
    while waiting:
        position = waiting.pop()
        if position not in found:
            found.add(position)
            waiting += [made[name] for name in names_read(nodes[position]) if name in made and name not in stops]
    return found


def unfold(
    proto: onnx.ModelProto, arrays: Mapping[str, NDArray[Any]]
) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]], MergedDecoder] | None:
    """Lays the two branches of a merged decoder side by side; None where a model is none.

    Args:
        proto: a model whose large initializers may be stubs; it is not changed.
        arrays: the data of the stubs.

    Returns:
        The flat model, the data of its stubs (large constants of the branches, equal ones once, are there too), and what
        is needed to fold it.
    """
    proto = casts_inside(proto)
    graph = proto.graph
    choice = _choice(graph)
    if choice is None:
        return None
    bodies = {a.name: a.g for a in choice.attribute}
    captured = {name: _captured(body) for name, body in bodies.items()}
    caches = {v.name for v in graph.input if _is_float(v) and len(_dims(v)) > 2}
    # The one that reads more caches is that which takes what the other makes.
    first, second = sorted(BODIES, key=lambda name: len(caches & captured[name]))
    handed = caches & captured[second] - captured[first]
    matrices = {t.name for t in graph.initializer if len(t.dims) > 1 and t.data_type in _float_types()}
    inside = _large(bodies[first]).keys() & _large(bodies[second]).keys()
    if not handed or not (inside or matrices & captured[first] & captured[second]):
        return None
    flat = _Flat(graph, choice)
    passed = _wires(graph, choice, (bodies[first], bodies[second]), handed)
    branches = [flat.add(first, bodies[first], "", {})]
    wires = {name: str(branches[0].outputs[i]) for name, i in passed.items()}
    branches.append(flat.add(second, bodies[second], f"{bodies[second].name or second}/", wires))
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for field in ("node", "input", "output", "value_info"):
        result.graph.ClearField(field)
    result.graph.node.extend(flat.nodes)
    result.graph.input.extend(v for v in graph.input if v.name not in wires and v.name != choice.input[0])
    result.graph.output.extend(flat.outputs)
    result.graph.initializer.extend(flat.small)
    data = dict(arrays)
    for name, tensor in flat.large.values():
        result.graph.initializer.append(stub(name, tensor.data_type, tensor.dims))
        data[name] = np.frombuffer(_raw(tensor), numpy_type(tensor.data_type)).reshape(tuple(tensor.dims))
    outside = frozenset(_names(graph.initializer))
    return result, data, MergedDecoder(_shell(proto, choice), branches[0], branches[1], wires, outside)


def casts_inside(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with the Casts around its If inside the branches; the model itself where there is nothing to move.

    Converters to float16 that keep the types of inputs and outputs put one behind each float input and one before each
    float output. A branch that gives an empty constant there gives one of the other type.
    """
    kinds = Counter(n.op_type for n in proto.graph.node)
    if kinds["If"] != 1 or not kinds["Cast"]:
        return proto
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    choice = next(n for n in graph.node if n.op_type == "If")
    bodies = [a.g for a in choice.attribute if a.name in BODIES]
    readers = Counter(name for n in graph.node if n is not choice for name in names_read(n))
    inputs, ends = {*_names(graph.input)}, {v.name: v for v in graph.output}
    for cast in [n for n in graph.node if n.op_type == "Cast"]:
        source, made = cast.input[0], cast.output[0]
        if source in inputs and not readers[made] and made not in ends:
            for body in bodies:
                if made in _captured(body):
                    body.node.insert(0, cast)
            graph.node.remove(cast)
        elif source in choice.output and readers[source] == 1 and source not in ends and made in ends:
            number = list(choice.output).index(source)
            choice.output[number] = made
            for body in bodies:
                _cast_output(body, number, cast, ends[made])
            graph.node.remove(cast)
    return result


def _cast_output(body: onnx.GraphProto, number: int, cast: onnx.NodeProto, end: onnx.ValueInfoProto) -> None:
    """Casts an output of a branch as ``cast`` does outside it, to the type of ``end``."""
    value, kind = body.output[number], end.type.tensor_type.elem_type
    empty = _empty(body, value.name)
    if empty is not None:
        empty.CopyFrom(onnx.helper.make_tensor(empty.name, kind, empty.dims, []))
    else:
        made = onnx.NodeProto()
        made.CopyFrom(cast)
        taken = {*_names(body.input), *_names(body.initializer), *(o for n in body.node for o in n.output)}
        made.input[0], made.output[0] = value.name, _free(f"{value.name}_cast", "", taken)
        place = next((i for i, n in enumerate(body.node) if value.name in n.output), -1) + 1
        body.node.insert(place, made)  # what the other branch reads of this one is not to wait for its end
        value.name = made.output[0]
    value.type.tensor_type.elem_type = kind


class _Flat:
    """What a flat graph is made of: the nodes beside the If, then those of one branch after the other.

    Attributes:
        nodes: in order.
        outputs: of the branches, each in the order of the merged model's.
        small: constants of the branches that stay in the proto.
        large: their other constants, by what they hold: the name, and where the data is.
    """

    def __init__(self, graph: onnx.GraphProto, choice: onnx.NodeProto) -> None:
        self.ends, self.choice = {v.name: v for v in graph.output}, choice
        self.nodes = [n for n in graph.node if n is not choice]
        self.outputs: list[onnx.ValueInfoProto] = []
        self.small: list[onnx.TensorProto] = []
        self.large: dict[Any, tuple[str, onnx.TensorProto]] = {}
        # The outputs of the If are free: they are those of the first branch.
        self.tensors = {*_names(graph.input), *_names(graph.initializer), *(o for n in self.nodes for o in n.output)}
        self.labels = set(_names(self.nodes))

    def add(self, attribute: str, body: onnx.GraphProto, prefix: str, wires: Mapping[str, str]) -> Branch:
        """Adds a branch.

        Args:
            attribute: of the If.
            body: the branch.
            prefix: put before names that are taken.
            wires: what it reads in place of inputs of the graph.
        """
        empty = {i: t for i, v in enumerate(body.output) if (t := _empty(body, v.name)) is not None}
        outputs = [None if i in empty else _free(o, prefix, self.tensors) for i, o in enumerate(self.choice.output)]
        names = {v.name: flat for v, flat in zip(body.output, outputs, strict=True) if flat is not None}
        shared: dict[str, str] = {}
        for key, tensor in _large(body).items():
            if key not in self.large:
                self.large[key] = _free(tensor.name, prefix, self.tensors), tensor
            shared[tensor.name] = self.large[key][0]
        made = [n for n in body.node if not any(body.output[i].name in n.output for i in empty)]
        small = [t for t in body.initializer if t.name not in shared]
        for name in [*_names(small), *(o for n in made for o in n.output if o)]:
            if name not in names:
                names[name] = _free(name, prefix, self.tensors)
        labels: dict[str, str] = {}
        for node in made:
            self.nodes.append(renamed(node, {**names, **shared, **wires}))
            if node.name:
                self.nodes[-1].name = _free(node.name, prefix, self.labels)
                labels[self.nodes[-1].name] = node.name
        for tensor in small:
            self.small.append(onnx.TensorProto())
            self.small[-1].CopyFrom(tensor)
            self.small[-1].name = names[tensor.name]
        ends = dict(zip(self.choice.output, zip(outputs, body.output, strict=True), strict=True))
        for name, end in self.ends.items():
            flat, value = ends[name]
            if flat is not None:
                self.outputs.append(onnx.ValueInfoProto())
                self.outputs[-1].CopyFrom(value if value.type.tensor_type.HasField("shape") else end)
                self.outputs[-1].name = flat
        return Branch(attribute, {flat: name for name, flat in names.items()}, labels, tuple(outputs), empty)


def _choice(graph: onnx.GraphProto) -> onnx.NodeProto | None:
    """Returns the If whose outputs are those of the graph, where an input that nobody else reads chooses; or None."""
    found = [n for n in graph.node if n.op_type == "If" and n.domain in ("", "ai.onnx")]
    booleans = {v.name for v in graph.input if v.type.tensor_type.elem_type == onnx.TensorProto.BOOL}
    if len(found) != 1 or found[0].input[0] not in booleans or sorted(found[0].output) != sorted(_names(graph.output)):
        return None
    choice = found[0]
    bodies = [a.g for a in choice.attribute]
    read = {name for n in graph.node if n is not choice for name in names_read(n)}
    read |= {name for body in bodies for name in _captured(body)}
    whole = all(not body.input and not body.sparse_initializer and _makes_outputs(body) for body in bodies)
    return choice if whole and not read.intersection([choice.input[0], *choice.output]) else None


def _makes_outputs(body: onnx.GraphProto) -> bool:
    """Whether each output of a branch is made in it, and is one output alone."""
    names = _names(body.output)
    made = {*(o for n in body.node for o in n.output), *_names(body.initializer)}
    return len({*names}) == len(names) and made.issuperset(names)


def _wires(
    graph: onnx.GraphProto,
    choice: onnx.NodeProto,
    bodies: tuple[onnx.GraphProto, onnx.GraphProto],
    inputs: Collection[str],
) -> dict[str, int]:
    """Returns which output of the first branch comes back as which input of the second.

    They have one name from the number of the layer on, and the second branch does not extend it: it gives an empty
    constant in its place, or the input itself.
    """
    first, second = bodies
    copies = {n.output[0]: n.input[0] for n in second.node if n.op_type == "Identity"}
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    result = {}
    for name in (name for name in kinds if name in inputs):
        found = [
            i
            for i, (output, value) in enumerate(zip(choice.output, second.output, strict=True))
            if name_from_layer(output) == name_from_layer(name)
            and kinds[output] == kinds[name]
            and _empty(first, first.output[i].name) is None
            and (_empty(second, value.name) is not None or copies.get(value.name) == name)
        ]
        if len(found) == 1:
            result[name] = found[0]
    return result


def _empty(body: onnx.GraphProto, name: str) -> onnx.TensorProto | None:
    """Returns the constant without elements that an output of a branch is, or None."""
    constants: dict[str, onnx.TensorProto | None] = {t.name: t for t in body.initializer}
    for node in body.node:
        if node.op_type == "Constant":
            constants |= dict.fromkeys(node.output, next((a.t for a in node.attribute if a.name == "value"), None))
    tensor = constants.get(name)
    return tensor if tensor is not None and 0 in tensor.dims else None


def _large(body: onnx.GraphProto) -> dict[Any, onnx.TensorProto]:
    """Returns the initializers of a branch that a light model has as stubs, by what they hold."""
    found = [t for t in body.initializer if t.data_type in PLAIN and tensor_bytes(t) > STUB_LIMIT]
    outputs = {*_names(body.output)}
    return {(t.data_type, *t.dims, _raw(t)): t for t in found if t.name not in outputs}


def _raw(tensor: onnx.TensorProto) -> bytes:
    return tensor.raw_data if tensor.HasField("raw_data") else onnx.numpy_helper.to_array(tensor).tobytes()


def _shell(proto: onnx.ModelProto, choice: onnx.NodeProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    for field in ("node", "initializer", "sparse_initializer", "value_info"):
        result.graph.ClearField(field)
    result.graph.node.append(choice)
    for attribute in result.graph.node[0].attribute:
        for field in ("node", "initializer", "value_info"):
            attribute.g.ClearField(field)
    return result


def _free(name: str, prefix: str, taken: set[str]) -> str:
    """Returns a name that is not taken, and takes it: the name itself, or with the prefix."""
    found = name
    while found in taken:
        found = f"{prefix or '_'}{found}"
    taken.add(found)
    return found


def renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """Returns a node that reads and writes tensors under other names, in its own branches too."""
    result = onnx.NodeProto()
    result.CopyFrom(node)
    result.input[:] = [names.get(name, name) for name in node.input]
    result.output[:] = [names.get(name, name) for name in node.output]
    for graph in bodies_of(result):
        own = {*_names(graph.input), *_names(graph.initializer), *(o for n in graph.node for o in n.output)}
        outer = {k: v for k, v in names.items() if k not in own}
        inside = [renamed(n, outer) for n in graph.node]
        graph.ClearField("node")
        graph.node.extend(inside)
        for value in graph.output:
            value.name = outer.get(value.name, value.name)
    return result


def names_read(node: onnx.NodeProto) -> set[str]:
    """Returns the tensors that a node reads, those that its branches capture included."""
    return {name for name in node.input if name}.union(*(_captured(graph) for graph in bodies_of(node)))


def _captured(graph: onnx.GraphProto) -> set[str]:
    read = set(_names(graph.output)).union(*(names_read(n) for n in graph.node))
    constants = *_names(graph.initializer), *(t.values.name for t in graph.sparse_initializer)
    return read - {*_names(graph.input), *constants, *(o for n in graph.node for o in n.output)}


def _names(values: Iterable[Any]) -> list[str]:
    return [value.name for value in values]


def _dims(value: onnx.ValueInfoProto) -> Any:
    return value.type.tensor_type.shape.dim


def _float_types() -> set[int]:
    return {onnx.TensorProto.DataType.Value(name) for name in FLOATS}


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in _float_types()


def _set_sizes(value: onnx.ValueInfoProto, sizes: Mapping[int, int]) -> None:
    for axis, size in sizes.items():
        if axis < len(_dims(value)):
            _dims(value)[axis].dim_value = size


def side_by_side(nodes: Sequence[gs.Node], of_first: Collection[int]) -> list[gs.Node]:
    """Returns the nodes of a flat graph in an order in which the two uses of a weight are next to each other.

    Only so can the graph be cut into segments between two layers. Within each branch the order stays.

    Args:
        nodes: in an order in which each branch can run.
        of_first: the ids of those that the first branch needs.
    """
    made = {id(t): n for n in nodes for t in n.outputs}
    uses: dict[tuple[int, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for place, node in enumerate(nodes):
        for position, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and sum(size > 1 for size in tensor.shape) > 1:
                uses[id(tensor), position][id(node) not in of_first].append(place)
    pairs = sorted(pair for both in uses.values() for pair in zip(*both, strict=False))
    pairs = _rising(pairs)
    stages = [[pair[second] for pair in pairs] for second in (False, True)]

    def rank(place: int) -> tuple[int, bool, int]:
        """The number of the next pair in the node's own branch, the branch, and where the node was."""
        second = id(nodes[place]) not in of_first
        return bisect.bisect_left(stages[second], place), second, place

    places = {id(n): i for i, n in enumerate(nodes)}
    readers: dict[int, list[int]] = defaultdict(list)
    missing: Counter[int] = Counter()
    for place, node in enumerate(nodes):
        for source in {places[id(made[i])] for i in _sources(node) if i in made}:
            readers[source].append(place)
            missing[place] += 1
    ready = [rank(place) for place in range(len(nodes)) if not missing[place]]
    heapq.heapify(ready)
    result = []
    while ready:
        place = heapq.heappop(ready)[2]
        result.append(nodes[place])
        for reader in readers[place]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, rank(reader))
    return result


def _sources(node: gs.Node) -> set[int]:
    """Returns the ids of the tensors that a node reads, those that its branches capture included."""
    inside = [t for g in node.subgraphs(recursive=True) for n in g.nodes for t in n.inputs]
    inside += [t for g in node.subgraphs(recursive=True) for t in g.outputs]
    return {id(t) for t in (*node.inputs, *inside)}


def _rising(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns a longest part of sorted pairs whose second numbers rise, too."""
    ends: list[int] = []
    last: list[int] = []  # of the pair that a run of each length ends with
    before: list[int | None] = []
    for number, (_, second) in enumerate(pairs):
        place = bisect.bisect_left(ends, second)
        before.append(last[place - 1] if place else None)
        ends[place:] = [second, *ends[place + 1 :]]
        last[place:] = [number, *last[place + 1 :]]
    result: list[tuple[int, int]] = []
    link = last[-1] if last else None
    while link is not None:
        result.append(pairs[link])
        link = before[link]
    return result[::-1]
