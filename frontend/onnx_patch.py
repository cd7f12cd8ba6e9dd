"""Give a consumer of an extracted segment another weight and a shift of its output, without touching the graph.

    y = Op(x, W)   ->   y' = Op(x, W');  y = Add(y', shift)

Removed rows of W' are zero, so that the segment computes what the cut model would: what one group's cut does to the outputs
is measured so, before anything is cut.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper

from liar_opt.frontend.graph_tensors import detached_tensors
from liar_opt.frontend.onnx_segments import Extracted
from liar_opt.frontend.records import ConsumerUse

PREFIX = "liar_opt_patch"


def patch_constant(
    segment: Extracted, places: Sequence[tuple[gs.Node, int]], value: NDArray[Any]
) -> list[tuple[int, onnx.NodeProto]]:
    """Replaces the constant at every place (node, input position), in place.

    Returns:
        The segment's own nodes, with their positions.
    """
    graph = segment.model.graph
    name = f"{PREFIX}/{len(graph.initializer)}/{places[0][0].name}/{places[0][1]}/value"
    tensors, data = detached_tensors([gs.Constant(name, np.ascontiguousarray(value))])
    graph.initializer.extend(tensors)
    segment.weights.update(data)
    nodes = {tuple(n.output): (i, n) for i, n in enumerate(graph.node)}
    found = []
    for node, position in places:
        index, own = nodes[tuple(t.name for t in node.outputs)]
        replaced, own.input[position] = own.input[position], name
        read = any(replaced in n.input for n in graph.node) or any(value.name == replaced for value in graph.output)
        if not read:  # ONNX Runtime wants no data that nobody reads
            segment.weights.pop(replaced, None)
            graph.initializer.remove(next(t for t in graph.initializer if t.name == replaced))
        found.append((index, own))
    return found


def patch_consumer(
    segment: Extracted, uses: Sequence[ConsumerUse], weight: NDArray[Any], shift: NDArray[np.float64]
) -> None:
    """Replaces the weight of every use of a consumer, in place.

    Args:
        segment: has the nodes of the uses, but for those that its outputs do not need.
        uses: of one weight.
        weight: the new weight, in the shape of the old one.
        shift: what is added to y = x W, [m]; the node's own scale is applied.
    """
    graph = segment.model.graph
    made = {o for n in graph.node for o in n.output}
    uses = [use for use in uses if use.node.outputs[0].name in made]
    if not uses:
        return
    places = patch_constant(segment, [(use.holder, use.weight_position) for use in uses], weight)
    name = f"{PREFIX}/{len(graph.initializer)}/{uses[0].node.name}"
    for use, (index, node) in zip(uses, places, strict=True):
        if not np.any(shift):
            continue
        output = node.output[0]
        node.output[0] = f"{name}/{index}/unshifted"
        free = [use.weight.shape[axis] for axis in use.column_axes]
        shape = [*free, *[1] * (-1 - use.output_axis)] if len(free) == 1 else free
        value = (shift * use.scale).reshape(shape).astype(weight.dtype)
        graph.initializer.append(onnx.numpy_helper.from_array(value, f"{name}/{index}/shift"))
        add = helper.make_node("Add", [node.output[0], f"{name}/{index}/shift"], [output])
        graph.node.insert(list(graph.node).index(node) + 1, add)
