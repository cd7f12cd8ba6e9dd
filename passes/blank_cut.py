"""What a model would cost at given widths: a copy is cut, without measuring or repairing anything.

Which blocks go does not matter to parameters, bytes, operations and time, only how many: the first ones stay.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.either_model import analysis_of, flops_of
from liar_opt.frontend.model import Model, Original
from liar_opt.frontend.onnx_model import OnnxOriginal, onnx_graph
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.passes.find_groups import find_groups
from liar_opt.passes.groups import GONE, MAPPED
from liar_opt.runtime.errors import InternalError
from liar_opt.runtime.latency import Deployed, Runs
from liar_opt.runtime.sessions import operator_libraries

Feeds = Mapping[str, NDArray[Any]]


def blank_cut(dense: Original, keep: Mapping[str, int]) -> tuple[Model, dict[str, dict[int, Any]]]:
    """Returns a copy of the model with so many blocks left in each group, and what is left of inputs that shrank.

    Sublayers of which nothing is kept (`groups.FORMS`) go whole.

    Args:
        dense: the original.
        keep: number of blocks by group name; groups that are not named stay whole.
    """
    model = dense.model()
    model.normalise()
    analysis = analysis_of(model)
    found = find_groups(analysis)
    groups = {g.name: g for g in (*found.groups, *found.queries, *found.poolers)}
    unknown = [name for name in keep if name not in groups]
    if unknown:
        raise InternalError(f"group '{unknown[0]}' was not found again")
    rewriter = Rewriter(analysis)
    for name, group in groups.items():
        if keep.get(name, group.size) <= GONE:
            continue
        if keep.get(name, group.size) < group.size:
            blocks = np.arange(group.sets)[:, None] * group.size + np.arange(keep[name])
            rewriter.cut(group.cut(blocks.reshape(-1).tolist()))
    for name, group in groups.items():  # behind the cuts: those of queries and keys are of nodes that go
        sublayer = group.sublayer
        if keep.get(name, group.size) <= GONE and sublayer is not None and name == sublayer.members[0]:
            matrix = np.zeros((sublayer.rows, sublayer.columns)) if keep[name] == MAPPED else None
            rewriter.replace(sublayer.stand_in(matrix, np.zeros(sublayer.columns)))
    model.graph.cleanup(remove_unused_node_outputs=False).toposort()
    return model, rewriter.ends()


def deployed(model: Model | OnnxOriginal, device: str) -> Deployed | Runs:
    """Returns a model as it is timed: in a process of its own; a module in this one."""
    if isinstance(model, Model) and model.traced:
        from liar_opt.frontend.fx_engine import TimedModule
        from liar_opt.frontend.fx_module import FxModel

        assert isinstance(model, FxModel)
        return TimedModule.of(model)
    data, weights = (onnx_graph(model) if isinstance(model, Model) else model).as_run()
    return Deployed(data, weights, device, operator_libraries())


def clock_of(model: Model, device: str) -> dict[str, Any]:
    """Returns what times besides the model and the machine depend on: the runtime, and where it runs."""
    if not model.traced:
        import onnxruntime

        return {"runtime": [onnxruntime.__version__, device], "clock": "a process each"}
    import torch

    return {"runtime": torch.get_num_threads(), "clock": "in turns"}  # the graph's structure names torch and the device


def in_one_form(models: Sequence[Any]) -> list[Any]:
    """Returns modules as traced graphs where one of them is: without their own code both are faster."""
    if all(getattr(model, "own_code", True) for model in models):
        return list(models)
    return [model.as_graph() for model in models]


def operations(model: Model, feeds: Feeds) -> int:
    """Returns the floating-point operations of all contractions; 0 where they cannot be counted."""
    return flops_of(model, feeds) or 0
