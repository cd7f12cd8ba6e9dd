"""Weights that can have zeros in a pattern: those of linear layers, each once, with all that reads it.

Left alone, with the reason: what is read by anything but a product (an embedding, a table that is tied to a head), what
makes an output of the graph without another sublayer behind it (a head), what is no matrix (a convolution, stacks of
experts), and what is no float.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.graph_tensors import is_constant, is_float
from liar_opt.frontend.records import ConsumerUse
from liar_opt.frontend.rules.operators import has
from liar_opt.frontend.rules.table import Trait
from liar_opt.frontend.walk import GraphWalk

PASSED = Trait.UNARY | Trait.COPIES | Trait.KEEPS_ORDER | Trait.SHARES | Trait.DROPS
"""Operators behind a head that change no number's place, or have it compared with others."""


@dataclass(frozen=True, eq=False)
class PatternPlace:
    """One weight.

    Attributes:
        uses: the contractions of it, along one axis.
    """

    uses: tuple[ConsumerUse, ...]

    @property
    def constant(self) -> gs.Constant:
        """The weight as it is now."""
        use = self.uses[0]
        constant: gs.Constant = use.node.inputs[use.weight_position]
        return constant

    @property
    def name(self) -> str:
        """What the user knows it by."""
        return str(self.constant.name)

    @property
    def inputs(self) -> int:
        """Number of inputs, n."""
        return int(self.constant.shape[self.uses[0].weight_axis])

    @property
    def outputs(self) -> int:
        """Number of outputs, m."""
        return int(np.prod(self.constant.shape, dtype=np.int64)) // self.inputs


@dataclass(frozen=True)
class LeftDense:
    """A weight that keeps all its numbers, and why."""

    name: str
    reason: str
    nodes: tuple[str, ...]
    size: int


def find_places(walk: GraphWalk) -> tuple[tuple[PatternPlace, ...], tuple[LeftDense, ...]]:
    """Returns the weights that can have a pattern, in the order of their first use, and those that cannot."""
    by_weight: dict[int, list[ConsumerUse]] = {}
    order = {id(n): i for i, n in enumerate(walk.model.graph.nodes)}
    for use in sorted(walk.consumers, key=lambda u: order.get(id(u.node), -1)):
        if id(use.node) in order:
            by_weight.setdefault(id(use.holder.inputs[use.weight_position]), []).append(use)
    places, left = [], []
    for uses in by_weight.values():
        reason = _why_left(walk, uses)
        place = PatternPlace(tuple(uses))
        if reason is None:
            places.append(place)
        else:
            constant = uses[0].holder.inputs[uses[0].weight_position]
            size = int(np.prod(constant.shape, dtype=np.int64))
            left.append(LeftDense(str(constant.name), reason, tuple(dict.fromkeys(u.node.name for u in uses)), size))
    return tuple(places), tuple(left)


def _why_left(walk: GraphWalk, uses: Sequence[ConsumerUse]) -> str | None:
    """Returns why a weight keeps all its numbers; None where it need not."""
    constant = uses[0].holder.inputs[uses[0].weight_position]
    if any(use.lookup is not None for use in uses):
        return "weights of experts are looked up in one constant"
    if any(use.window is not None for use in uses):
        return "it slides as the kernel of a convolution"
    if not is_constant(constant) or len(constant.shape) != 2:
        return "it is no matrix"
    if not is_float(constant.dtype):
        return "it is quantised"
    if len({use.weight_axis for use in uses}) > 1:
        return "it is read along both axes"
    told = {(id(use.holder), use.weight_position) for use in uses}
    reads = [(n, i) for n in {id(n): n for n in constant.outputs}.values() for i, t in enumerate(n.inputs) if t is constant]
    beside = next((n for n, i in reads if (id(n), i) not in told), None)
    if beside is not None:
        return f"node '{beside.name}' ({beside.op}) reads it, too: it is tied to an embedding or the like"
    if any(t is constant for t in walk.model.graph.outputs):
        return "it is an output of the graph"
    if all(_is_head(walk, use.node) for use in uses):
        return "it is a head: it makes an output of the model"
    return None


def _is_head(walk: GraphWalk, node: gs.Node) -> bool:
    """Returns whether what a product makes is an output of the graph but for a bias and operators of one number each."""
    ends = {id(t) for t in walk.model.graph.outputs}
    pending, seen, reached = list(node.outputs), set(), False
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        reached |= id(tensor) in ends
        for reader in {id(n): n for n in tensor.outputs}.values():
            if reader.outputs and _counts(walk, reader):
                continue
            others = [t for t in reader.inputs if t is not tensor and not is_constant(t)]
            biased = has(reader, Trait.ADDS | Trait.ARITHMETIC) and not others
            if not biased and not has(reader, PASSED):
                return False
            pending += reader.outputs
    return reached


def _counts(walk: GraphWalk, node: gs.Node) -> bool:
    """Returns whether a node reads sizes alone."""
    return all(t.name in walk.values for t in node.outputs)
