"""How many bytes a graph's tensors take while it runs: the sizes of all, and the most that is live at a time."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import present
from liar_opt.frontend.onnx_segments import names_read
from liar_opt.frontend.walk import GraphWalk

BYTES = 4
"""Of an element whose type the graph does not say."""


def tensor_sizes(walk: GraphWalk) -> dict[str, int]:
    """Returns the bytes of every tensor that is no constant, at the sizes that were walked with, where they are known."""
    types = {t.name: t.dtype for n in walk.model.graph.nodes for t in n.outputs}
    result = {}
    for name, axes in walk.axes.items():
        if axes is not None:
            dtype = types.get(name)
            elements = int(np.prod(walk.shape(axes), dtype=np.int64))
            result[name] = elements * (BYTES if dtype is None else np.dtype(dtype).itemsize)
    return result


def live_bytes(nodes: Sequence[gs.Node], sizes: Mapping[str, int], kept: Collection[str] = ()) -> int:
    """Returns the most bytes that are live while nodes run in order: made by one of them and still to be read, or kept.

    Args:
        nodes: in the order in which they run.
        sizes: bytes of each tensor; one that is not named counts nothing.
        kept: tensors that live on behind their last reader.
    """
    last = {name: i for i, node in enumerate(nodes) for name in names_read(node)}
    alive: dict[str, int] = {}
    most = total = 0
    for i, node in enumerate(nodes):
        for tensor in node.outputs:
            if present(tensor):
                alive[tensor.name] = sizes.get(tensor.name, 0)
                total += alive[tensor.name]
        most = max(most, total)
        for name in {*names_read(node), *(t.name for t in node.outputs)}:
            if name in alive and name not in kept and last.get(name, i) <= i:
                total -= alive.pop(name)
    return most
