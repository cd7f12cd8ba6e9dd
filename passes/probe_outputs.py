"""What a cut of some groups would do to the outputs of the model, which stays as it is.

The cut is not made: the consumers of the groups get repaired weights with zeros in the removed rows
(`frontend.engine.Patch`), which computes the same.
"""

import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.engine import AnyPatch, Patch
from liar_opt.frontend.graph_tensors import is_float
from liar_opt.passes.groups import ChannelGroup, kept_positions
from liar_opt.passes.measured import Measured
from liar_opt.passes.prune_groups import GroupVisitor
from liar_opt.passes.sweep import Sweep
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.compare import common_part, output_rows

PROBE_BATCHES = 2
"""Held-back batches on which outputs are compared, at most."""
ENOUGH_ROWS = 1024
"""Real rows in those batches from which on no other is taken: the rest of the model runs once for each group."""
PROBE_OUTPUTS = 4
"""Outputs that are compared, the first ones: a decoder has dozens of caches behind its logits."""
PROBE_ROWS = 256
"""Rows of each output and batch that are kept: those of a vocabulary are long."""


class ProbeOutputs:
    """Runs the rest of the model behind the live tensors, or the whole, on a few held-back batches.

    Args:
        sweep: over the model.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.data = sweep, sweep.data
        self.batches = probed_batches(sweep.data, sweep.held)
        sweep.everywhere.update(self.batches)  # whoever has measured a group probes it
        ends = [
            t for t in sweep.walk.model.graph.outputs if getattr(t, "type", "") == "tensor_type"
        ]  # no sequence, and no constant
        self.outputs = [t.name for t in ends if is_float(t.dtype)][:PROBE_OUTPUTS]

    @functools.cached_property
    def dense(self) -> list[dict[str, NDArray[np.float64]]]:
        """Rows of the dense model's outputs, for each probed batch; it runs when they are first asked for."""
        return self._ends(None, self.outputs)

    def difference(self, patches: Sequence[AnyPatch], behind: int | None = None) -> float | None:
        """Returns the relative squared difference of the first output that the patches change at all.

        Rows are compared about their own means. Of logits that is what their softmax sees: for a vocabulary it is nearly
        proportional to the divergence, for all layers alike, where the plain difference says too little of late layers (in
        SmolLM2 by a factor of four). What a model is for comes first among its outputs, caches come after. None where no
        output changes.

        Args:
            patches: the consumers and constants that are changed.
            behind: position of the last node of the group that they belong to, which lies behind the live tensors; None
                runs the model from its start.
        """
        nodes = self.sweep.walk.model.graph.nodes
        made = {t.name for n in nodes[behind or 0 :] for t in n.outputs}
        outputs = [n for n in self.outputs if n in made]
        ends = self._ends(None if behind is None else self.sweep.carry.at, outputs, together(patches))
        for name in outputs:
            pairs = [common_part(x[name], y[name]) for x, y in zip(ends, self.dense, strict=True)]
            lost = sum(squared_difference(x, y) for x, y in pairs)
            if lost > 0:
                return lost / (sum(float(np.square(y[name]).sum()) for y in self.dense) or 1.0)
        return None

    def behind(self, group: ChannelGroup) -> int:
        """Returns the position of the last node that reads a group's dimension, in the graph as it is now."""
        return max(self.sweep.position(r.node) for r in group.readings)

    def _ends(
        self, first: Any, outputs: list[str], patches: Sequence[AnyPatch] = ()
    ) -> list[dict[str, NDArray[np.float64]]]:
        """Runs the model from a node, or from its start, on the probed batches; returns the same rows each time."""
        if not outputs:
            return [{} for _ in self.batches]
        sweep = self.sweep
        start, stop = sweep.position(first), len(sweep.walk.model.graph.nodes)
        part = sweep.engine.part(sweep.walk, start, stop, outputs, sweep.carry.given, patches=patches, once=True)
        result = []
        for i in self.batches:
            values = part.run({**self.data.batches[i], **sweep.carry.values[i]}, arrays=outputs)
            result.append({n: some_rows(sweep.engine.array(v), self.data.row_masks[i]) for n, v in values.items()})
        return result


def squared_difference(found: NDArray[np.float64], dense: NDArray[np.float64]) -> float:
    """Returns what rows of an output [r, c] have lost."""
    return float(np.square(found - dense).sum())


def probed_batches(data: CalibrationData, held: Collection[int]) -> list[int]:
    """Returns the held-back batches that are enough to compare outputs on."""
    found, rows = [], 0
    for i in sorted(held)[:PROBE_BATCHES] or [0]:
        if rows < ENOUGH_ROWS:
            found.append(i)
            mask = data.row_masks[i]
            rows += next(iter(data.batches[i].values())).size if mask is None else int(mask.sum())
    return found


def repaired(
    visitor: GroupVisitor, group: ChannelGroup, measured: Sequence[Measured], blocks: NDArray[np.int64]
) -> list[Patch]:
    """Repairs the consumers of one group for a set of kept blocks."""
    patches: list[Patch] = []
    stacks: dict[int, NDArray[Any]] = {}
    for consumer, item in zip(group.consumers, measured, strict=True):
        kept = kept_positions(consumer.owners, blocks)
        if consumer.expert is not None:
            item = item.part(consumer.expert * group.size, group.size)
        found = visitor.repair(item, kept, np.setdiff1d(np.arange(consumer.width), kept), visitor.options.ridge)
        use = consumer.uses[0]
        if consumer.expert is not None:
            if id(use) not in stacks:
                stacks[id(use)] = np.zeros(use.weight.shape, use.weight.dtype)
                patches.append(Patch(consumer.uses, stacks[id(use)], np.zeros(found.bias.shape)))
            rows = np.moveaxis(stacks[id(use)][consumer.expert], use.weight_axis - 1, 0)
            rows[kept] = found.weight.reshape(rows[kept].shape).astype(rows.dtype)
            continue
        old = np.asarray(use.node.inputs[use.weight_position].values)
        flat = np.zeros((consumer.width, item.weight.shape[1]), old.dtype)
        flat[kept] = found.weight.astype(old.dtype)
        weight = use.laid_out(flat, old.shape)
        patches.append(Patch(consumer.uses, weight, found.bias))
    return patches


def together(patches: Sequence[AnyPatch]) -> list[AnyPatch]:
    """Returns patches of which those of one consumer, made for several of its groups, are one.

    Rows that any of them removes are zero, what they change of the others adds up: what they would be if one were repaired
    where the other was cut differs by a product of both changes.
    """
    result: list[AnyPatch] = []
    places: dict[int, int] = {}
    for patch in patches:
        if not isinstance(patch, Patch):
            result.append(patch)
            continue
        known = places.setdefault(id(patch.uses[0]), len(result))
        if known == len(result):
            result.append(patch)
            continue
        before, use = result[known], patch.uses[0]
        assert isinstance(before, Patch)
        dense = np.asarray(use.node.inputs[use.weight_position].values)
        first, second, rows = (use.matrix(value) for value in (before.weight, patch.weight, dense))
        both = np.where(first.any(axis=1, keepdims=True) & second.any(axis=1, keepdims=True), first + second - rows, 0)
        result[known] = Patch(patch.uses, use.laid_out(both.astype(dense.dtype), dense.shape), before.shift + patch.shift)
    return result


def some_rows(output: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[np.float64]:
    """Returns rows of an output, each about its own mean: a softmax does not see what all logits have in common."""
    if output.ndim == 0:
        return output.reshape(1, 1).astype(np.float64)
    rows = output_rows(output, mask)
    found = rows[np.unique(np.linspace(0, len(rows) - 1, PROBE_ROWS).round().astype(np.int64))].astype(np.float64)
    return found - found.mean(axis=1, keepdims=True) if found.shape[1] > 1 else found
