"""What a model must be before anything is made of it: a file from elsewhere may be broken, or made to do harm.

:func:`require_sound` looks at a light proto and touches no weight. Names are text and unique, tensors have the type, the
sizes and the data that they say, nothing is nested deeper than a file can be, no node waits for itself. :func:`inlined`
puts the bodies of functions in their place, after it has counted what that makes: forty functions that call the next one
twice are 2^39 nodes.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError

from liar_opt.frontend.merged_decoder import names_read
from liar_opt.frontend.weight_files import tensor_bytes, without_data
from liar_opt.frontend.widen_graph import bodies_of, nodes_within
from liar_opt.runtime.errors import ModelError

DEEPEST = 32
"""Levels of branches within branches: protobuf reads a hundred messages within each other, and each level takes three."""
DEEPEST_CALLS = 250
"""Functions that call each other, one within the other: the inliner of onnx goes down as deep on the stack."""
MOST_NODES = 1 << 20
"""Nodes that a model may have when its functions are inlined; those of the largest exports have some ten thousand."""
LARGEST = 1 << 62
"""Bytes of a tensor: what is larger cannot be counted in the integers of the programs that read it."""
AGAIN = "export the model again"
STANDARD = "ai.onnx"
OLDEST_OPSET = 7
"""Version of the standard operators from which on they broadcast."""

Places = Iterator[tuple[str, Sequence[onnx.NodeProto], onnx.GraphProto | None]]


def require_sound(proto: onnx.ModelProto, held: Iterable[str], name: str) -> None:
    """Checks a light proto.

    Args:
        proto: the model.
        held: names of the outer initializers whose data is held elsewhere, and was checked there.
        name: of the model, for messages.

    Raises:
        ModelError: it is broken; the message names the node or tensor.
    """
    _require_opset(proto, name)
    _require_shallow(proto, name)
    _require_text(proto, name)
    elsewhere = set(held)
    for where, nodes, graph in _places(proto):
        for tensor in _tensors(nodes, graph, elsewhere if graph is proto.graph else set()):
            _require_tensor(tensor, f"{where}{name}")
        _require_unique(nodes, graph, f"{where}{name}")
        waiting = cycle(nodes)
        if waiting is not None:
            raise ModelError(
                f"node {shown(waiting)} of {where}{name} needs its own result: the graph has a cycle, or gives two tensors "
                f"one name; {AGAIN}"
            )


def inlined(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Returns a model without functions.

    Raises:
        ModelError: they call themselves, are nested too deep, or stand for more nodes than any model has.
    """
    if not proto.functions:
        return proto
    counts = _nodes_of_functions(proto, name)
    whole = sum(counts.get(key, 1) for key in map(_key, nodes_within(proto.graph.node)))
    if whole > MOST_NODES:
        raise ModelError(
            f"the functions of {name} stand for {whole:,} nodes, more than the {MOST_NODES:,} that are read; {AGAIN} "
            "without functions"
        )
    try:
        result = onnx.inliner.inline_local_functions(proto)
    except (DecodeError, RuntimeError, ValueError, TypeError, onnx.checker.ValidationError) as err:
        raise ModelError(
            f"the functions of {name} cannot be put in place ({_line(err)}); {AGAIN} without functions"
        ) from err
    _require_shallow(result, name)
    return result


def why_invalid(proto: onnx.ModelProto) -> str | None:
    """Returns what the ONNX checker says against a light proto; None where it says nothing."""
    try:
        onnx.checker.check_model(without_data(proto))
    except Exception as err:  # it raises what it finds: ValidationError, and what protobuf raises
        return _line(err)
    return None


def shown(node: onnx.NodeProto) -> str:
    """Returns a node for a message: its name, or that of its result, and its operator."""
    name = node.name or next((o for o in node.output if o), "")
    domain = f"{node.domain}::" if node.domain not in ("", "ai.onnx") else ""
    return f"'{name}' ({domain}{node.op_type})"


def cycle(nodes: Sequence[onnx.NodeProto]) -> onnx.NodeProto | None:
    """Returns a node that needs its own result, by way of others or not; None where the nodes can be put in an order."""
    needs = _needs(nodes)
    if _ordered(needs):
        return None
    readers: dict[int, list[int]] = {}
    for i, before in enumerate(needs):
        for j in before:
            readers.setdefault(j, []).append(i)
    left = [len(before) for before in needs]
    ready = [i for i, count in enumerate(left) if not count]
    while ready:
        for i in readers.get(ready.pop(), ()):
            left[i] -= 1
            if not left[i]:
                ready.append(i)
    # What only waits for a cycle is none itself: go back from any until a node is met again.
    place = next((i for i, count in enumerate(left) if count), None)
    seen: set[int] = set()
    while place is not None and place not in seen:
        seen.add(place)
        place = next(j for j in needs[place] if left[j])
    return None if place is None else nodes[place]


def put_in_order(graph: onnx.GraphProto) -> None:
    """Puts the nodes of a graph without a cycle, and of its branches, behind those whose results they read.

    ONNX wants it, ONNX Runtime takes any order, and graphsurgeon goes on its stack as deep as they are out of order.
    """
    inside = [body for node in nodes_within(graph.node) for body in bodies_of(node)]
    for own in (*reversed(inside), graph):  # what is within another comes first: the nodes of that are copied
        needs = _needs(own.node)
        if _ordered(needs):
            continue
        order: dict[int, None] = {}
        for root in range(len(needs)):
            path = [root]
            while path:
                waiting = [j for j in sorted(needs[path[-1]]) if j not in order]
                path += waiting
                if not waiting:
                    order[path.pop()] = None
        copied = onnx.GraphProto()
        copied.node.extend(own.node[i] for i in order)
        del own.node[:]
        own.node.extend(copied.node)


def _needs(nodes: Sequence[onnx.NodeProto]) -> list[set[int]]:
    """Returns for each node the places of those whose results it reads."""
    made = {o: i for i, node in enumerate(nodes) for o in node.output if o}
    return [{made[n] for n in names_read(node) if n in made} for node in nodes]


def _ordered(needs: Sequence[set[int]]) -> bool:
    return all(j < i for i, before in enumerate(needs) for j in before)


# Where things are -----------------------------------------------------------------------------------------------------


def _places(proto: onnx.ModelProto) -> Places:
    """Yields the graph, the bodies in it, and those of functions: how they are called, their nodes, the graph."""
    yield "", proto.graph.node, proto.graph
    for node in nodes_within(proto.graph.node):
        for body in bodies_of(node):
            yield f"a branch of node {shown(node)} of ", body.node, body
    for function in proto.functions:
        yield f"function '{function.domain}::{function.name}' of ", function.node, None
        for node in nodes_within(function.node):
            for body in bodies_of(node):
                yield f"a branch of node {shown(node)} of ", body.node, body


def _tensors(
    nodes: Iterable[onnx.NodeProto], graph: onnx.GraphProto | None, elsewhere: set[str]
) -> Iterator[onnx.TensorProto]:
    if graph is not None:
        yield from (t for t in graph.initializer if t.name not in elsewhere)
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
    for attribute in (a for node in nodes for a in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def _require_opset(proto: onnx.ModelProto, name: str) -> None:
    """Checks that a repair can add a bias: older operators do not broadcast, and ONNX Runtime promises nothing of them."""
    known = [o.version for o in proto.opset_import if o.domain in ("", STANDARD)]
    if known and max(known) < OLDEST_OPSET:
        raise ModelError(
            f"{name} is of opset {max(known)}, and {OLDEST_OPSET} is the oldest that is read; {AGAIN}, or convert it "
            f"(onnx.version_converter.convert_version(model, {OLDEST_OPSET}))"
        )


def _require_shallow(proto: onnx.ModelProto, name: str) -> None:
    level: list[onnx.NodeProto] = [*proto.graph.node, *(n for f in proto.functions for n in f.node)]
    for _ in range(DEEPEST):
        level = [inner for node in level for body in bodies_of(node) for inner in body.node]
        if not level:
            return
    raise ModelError(f"{name} has branches within branches, more than {DEEPEST} deep; {AGAIN}")


# Text -----------------------------------------------------------------------------------------------------------------


def _require_text(proto: onnx.ModelProto, name: str) -> None:
    """Checks that names are UTF-8: protobuf gives bytes for those that are not."""
    for what, value in _texts(proto):
        if not isinstance(value, str):
            said = bytes(value).decode("utf-8", "backslashreplace")
            raise ModelError(f"{what} '{said}' of {name} is no UTF-8 text; {AGAIN}")


def _texts(proto: onnx.ModelProto) -> Iterator[tuple[str, Any]]:
    for field in ("producer_name", "producer_version", "domain", "doc_string"):
        yield field.replace("_", " "), getattr(proto, field)
    for opset in proto.opset_import:
        yield "domain", opset.domain
    for entry in proto.metadata_props:
        yield "metadata", entry.key
        yield "metadata", entry.value
    for function in proto.functions:
        yield from (("function", value) for value in (function.name, function.domain, *function.input, *function.output))
        yield from (("attribute", value) for value in function.attribute)
    for _, nodes, graph in _places(proto):
        if graph is not None:
            yield "graph", graph.name
            yield "description", graph.doc_string
            yield from (("tensor", t.name) for t in (*graph.initializer, *(s.values for s in graph.sparse_initializer)))
            for value in (*graph.input, *graph.output, *graph.value_info):
                yield "tensor", value.name
                yield from (("dimension", d.dim_param) for d in value.type.tensor_type.shape.dim)
        for node in nodes:
            yield "node", node.name
            yield "operator", node.op_type
            yield "domain", node.domain
            yield "description", node.doc_string
            yield from (("tensor", value) for value in (*node.input, *node.output))
            yield from (("attribute", attribute.name) for attribute in node.attribute)


# Tensors --------------------------------------------------------------------------------------------------------------


def _require_tensor(tensor: onnx.TensorProto, name: str) -> None:
    what = f"tensor '{tensor.name}' of {name}"
    sizes = list(tensor.dims)
    try:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        needed = 0 if tensor.data_type == onnx.TensorProto.STRING else tensor_bytes(tensor)
    except (KeyError, ValueError, TypeError) as err:
        raise ModelError(f"{what} has the element type {tensor.data_type}, which ONNX does not know; {AGAIN}") from err
    if any(size < 0 for size in sizes) or math.prod(sizes) > LARGEST or needed > LARGEST:
        raise ModelError(f"{what} has the shape {sizes}, which no tensor can have; {AGAIN}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ModelError(f"the data of {what} is in another file, where only that of outer initializers can be; {AGAIN}")
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != needed or tensor.data_type == onnx.TensorProto.STRING:
            raise ModelError(f"{what} has {len(tensor.raw_data)} bytes, its shape {sizes} needs {needed}; {AGAIN}")
        return
    held, wanted = len(getattr(tensor, field)), _numbers(tensor, field, needed)
    if held != wanted:
        raise ModelError(f"{what} has {held} numbers, its shape {sizes} needs {wanted}; {AGAIN}")


def _numbers(tensor: onnx.TensorProto, field: str, needed: int) -> int:
    """Returns how many numbers a typed field holds: complex ones are two, those narrower than a byte lie in bytes."""
    elements = math.prod(int(n) for n in tensor.dims)
    if field == "string_data":
        return elements
    if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
        return 2 * elements
    return min(elements, needed)


def _require_unique(nodes: Iterable[onnx.NodeProto], graph: onnx.GraphProto | None, name: str) -> None:
    """Checks that no tensor is made twice; a weight may also be listed as an input."""
    made = Counter(o for node in nodes for o in node.output if o)
    if graph is not None:
        weights = Counter((*(t.name for t in graph.initializer), *(t.values.name for t in graph.sparse_initializer)))
        inputs = Counter(value.name for value in graph.input)
        twice = next((n for counted in (weights, inputs) for n, count in counted.items() if count > 1), None)
        if twice is not None:
            raise ModelError(f"two weights or two inputs of {name} have the name '{twice}'; {AGAIN}")
        made.update({*weights, *inputs})
    twice = next((n for n, count in made.items() if count > 1), None)
    if twice is not None:
        raise ModelError(f"tensor '{twice}' of {name} is made twice; {AGAIN}")


def spell_standard_alike(proto: onnx.ModelProto) -> None:
    """Gives the operators of ONNX itself their domain by its usual name, which is empty; "ai.onnx" is another for it.

    With both, a program that tells them apart would take the versions of one for those of the other.
    """
    for thing in (proto, *proto.functions):
        spelled = [o for o in thing.opset_import if o.domain == STANDARD]
        for opset in spelled:
            opset.domain = ""
        if spelled and len({o.domain for o in thing.opset_import}) < len(thing.opset_import):
            kept = {o.domain: o.version for o in thing.opset_import}
            del thing.opset_import[:]
            thing.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in kept.items())
    for nodes in (proto.graph.node, *(f.node for f in proto.functions)):
        for node in nodes_within(nodes):
            if node.domain == STANDARD:
                node.domain = ""


# Functions ------------------------------------------------------------------------------------------------------------


def _key(thing: onnx.NodeProto | onnx.FunctionProto) -> tuple[str, str, str]:
    name = thing.op_type if isinstance(thing, onnx.NodeProto) else thing.name
    domain = "" if thing.domain == "ai.onnx" else thing.domain
    return domain, name, getattr(thing, "overload", "")


def _nodes_of_functions(proto: onnx.ModelProto, name: str) -> Mapping[tuple[str, str, str], int]:
    """Returns for how many nodes each function stands, those of the functions that it calls counted in their place."""
    functions = {_key(f): [_key(n) for n in nodes_within(f.node)] for f in proto.functions}
    counts: dict[tuple[str, str, str], int] = {}
    depths: dict[tuple[str, str, str], int] = {}
    for root in functions:
        path = dict.fromkeys([root])  # in order, and looked up fast
        while path:
            key = next(reversed(path))
            called = [c for c in functions[key] if c in functions]
            missing = next((c for c in called if c not in counts), None)
            if missing is None:
                counts[key] = sum(counts.get(c, 1) for c in functions[key])
                depths[key] = 1 + max((depths[c] for c in called), default=0)
                path.popitem()
                continue
            if missing in path:
                raise ModelError(f"function '{missing[0]}::{missing[1]}' of {name} calls itself; {AGAIN} without functions")
            path[missing] = None
    deepest = max(depths, key=lambda key: depths[key])
    if depths[deepest] > DEEPEST_CALLS:
        raise ModelError(
            f"function '{deepest[0]}::{deepest[1]}' of {name} calls others {depths[deepest]} deep, more than "
            f"{DEEPEST_CALLS}; {AGAIN} without functions"
        )
    return counts


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:300]
