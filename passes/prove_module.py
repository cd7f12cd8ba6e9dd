"""Prove every group of a traced module before anything is measured, as :mod:`liar_opt.passes.prove_groups` does for ONNX.

The cut is rehearsed on a copy of the traced graph: a block of every group goes, what stays gets other weights and a bias.
The copy must compute what the original computes when the removed rows of every consumer are zero, at the sizes of the
example and, where the trace has left sizes open, at smaller ones. Groups at fault are found by bisection and left alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from liar_opt.frontend.fx_module import Executor, FxModel, analyse, precision
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.passes.base import Pass, PassResult, State
from liar_opt.passes.find_groups import find_groups
from liar_opt.passes.open_module import OpenedModule
from liar_opt.passes.prove_groups import (
    AskedBlocks,
    Failure,
    RaisedAt,
    groups_at_fault,
    leave_alone,
    refusals_of,
    rehearsal_of,
    sizes_of,
)
from liar_opt.passes.prune_groups import Cut, PruneGroupsPass
from liar_opt.passes.verify_model import mask_model, nudged, project_queries
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.compare import REPEATED, allowed_difference, relative_difference


@dataclass(frozen=True)
class ProveModuleGroupsPass(Pass[Mapping[str, int]]):
    """Rehearse the cut of every group of a traced module, and leave those alone whose cut is wrong.

    Attributes:
        cut: how groups are cut.
        kinds: of the groups that are cut when asked for alone, those that were asked for.
    """

    name: ClassVar[str] = "prove-module-groups"
    cut: PruneGroupsPass = field(default_factory=PruneGroupsPass)
    kinds: tuple[str, ...] = ()

    def plan(self, state: State) -> Mapping[str, int]:
        """Returns how many blocks of each group are to stay in the rehearsal."""
        asked = (g for g in (*state.queries, *state.values) if g.kind in self.kinds)
        return {g.name: g.size - 1 for g in (*state.groups, *asked) if g.size > 1}

    def apply(self, state: State, plan: Mapping[str, int]) -> PassResult:
        """Proves the groups; those at fault are no groups any more."""
        feeds = probe_sizes(state)
        faults = groups_at_fault(plan, lambda keep: failure(state, self.cut, keep, feeds))
        leave_alone(state, faults)
        return PassResult(state, (), refusals_of(faults))


def probe_sizes(state: State) -> list[dict[str, Any]]:
    """Returns the example, and where the trace has left sizes open a part of it that is one shorter along each of them."""
    assert isinstance(state.model, FxModel)
    example = state.found(OpenedModule).example
    smaller = dict(example)
    for spec in state.model.signature:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and spec.name in example and example[spec.name].shape[axis] > 1:
                value = smaller[spec.name]
                smaller[spec.name] = value.narrow(axis, 0, value.shape[axis] - 1)
    same = all(smaller[name].shape == value.shape for name, value in example.items())
    return [example] if same else [example, smaller]


def failure(state: State, cut: PruneGroupsPass, keep: Mapping[str, int], probes: list[dict[str, Any]]) -> Failure | None:
    """Returns what is wrong with the cut of some groups together, or None.

    Args:
        state: the analysed module.
        cut: how groups are cut; score and repair are those of a rehearsal.
        keep: how many blocks of each group stay.
        probes: inputs to compare on; where the masked original does not take them, they say nothing.
    """
    source = state.model
    assert isinstance(source, FxModel)
    device, reference, again = source.device, source.original.model(), source.original.model()
    rehearse = rehearsal_of(cut)
    try:
        walk = analyse(again)
        arrays = {name: _array(value) for name, value in probes[0].items()}
        data = CalibrationData((arrays,), (None,), 0, 0, "probe", (), True)
        copied = State(again, data, state.device, memory=state.memory, walk=walk)
        groups = find_groups(walk)
        copied.groups = tuple(g for g in (*groups.groups, *groups.values, *groups.queries) if g.name in keep)
        copied.keep = dict(keep)
        copied.add(AskedBlocks({}))
        rehearse.apply(copied, rehearse.plan(copied))
        project_queries(reference, copied.found(Cut).query_forms)
        mask_model(analyse(reference), copied.repairs)
    except RaisedAt as err:
        return Failure(str(err), err.group)
    except (MemoryError, OSError):
        raise
    except Exception as err:
        return Failure(_line(err))
    dtype = precision(source)
    ours, theirs = Executor(again, device), Executor(reference, device)
    for feeds in probes:
        try:
            expected = theirs.run(feeds)
        except Exception:  # sizes that do not fit each other
            continue
        try:
            found = ours.run(feeds)
        except Exception as err:
            return Failure(f"the cut graph fails ({_line(err)})")
        for name, value in expected.items():
            apart = relative_difference(_array(found[name]), _array(value))
            if apart <= allowed_difference(dtype, 0.0) or not _blamed(reference, theirs, feeds, name, apart, dtype):
                continue
            return Failure(f"output '{name}' differs by {apart:.1e} at {sizes_of(feeds)}")
    return None


def _blamed(reference: FxModel, masked: Executor, feeds: Mapping[str, Any], name: str, apart: float, dtype: str) -> bool:
    """Returns whether a difference is the cut's: the original may draw random numbers, or magnify rounding by itself."""
    value, again = (_array(masked.run(feeds)[name]) for _ in range(2))
    if relative_difference(again, value) > REPEATED:
        return False
    nodes = [(node, i) for node in reference.graph.nodes for i, t in enumerate(node.inputs) if is_constant(t)]
    rng = np.random.default_rng(0)
    before = {id(node.inputs[i]): (node.inputs[i], node.inputs[i].values) for node, i in nodes}
    for constant, values in before.values():
        constant.values = nudged(values, rng)
    moved = _array(masked.run(feeds)[name])
    for constant, values in before.values():
        constant.values = values
    return not apart <= allowed_difference(dtype, relative_difference(moved, value))


def _line(err: Exception) -> str:
    return f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"


def _array(tensor: Any) -> np.ndarray:
    plain = tensor.detach().cpu()
    return np.asarray((plain.float() if str(plain.dtype) == "torch.bfloat16" else plain).numpy())
