"""Which sublayers some budget could let go whole, by the least that each of them loses.

What is lost in the output without a sublayer is measured by a run of the model for each, and nearly all of them are never
chosen. What its curve says of nothing kept is a lower bound (`measure_curves.NoteCurves.whole_of_group`); with bounds in
place of measurements the knapsack chooses all that it would choose with measurements, and more.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from liar_opt.passes.allocate_widths import candidates_together, meant
from liar_opt.passes.allocations import ALLOCATIONS
from liar_opt.passes.curves import GroupCurve
from liar_opt.passes.groups import GONE, KINDS, MAPPED, ChannelGroup

SHARES = (0.2, 0.35, 0.5, 0.7)
"""Of what all groups cost, that goes."""
DEARER = (1.0, 3.0)
"""How much dearer a parameter of an attention is than one of a feed-forward layer: by size as dear, by latency more."""
STEP = 8


def choosable(groups: Sequence[ChannelGroup], curves: Mapping[str, GroupCurve]) -> set[str]:
    """Returns the names of groups whose sublayer goes whole under one of several budgets.

    Args:
        groups: of the model.
        curves: by group name, with what is lost, or the least that is lost, where the sublayer goes.
    """
    own = [g for g in groups if g.kind in KINDS and g.name in curves]
    found: set[str] = set()
    for dearer in DEARER:

        def cost(group: ChannelGroup, widths: NDArray[np.int64], dearer: float = dearer) -> NDArray[np.float64]:
            unit = dearer if group.kind == "heads" else 1.0
            spent = group.parameters * np.maximum(widths, GONE) / group.size
            if group.sublayer is not None:
                spent = np.where(widths == MAPPED, group.sublayer.map_parameters, spent)
            return np.asarray(unit * spent, np.float64)

        candidates, meaning = candidates_together(own, (), STEP, curves, cost)
        whole = sum(float(m.costs[-1]) for m in candidates)
        for share in SHARES:
            keep = meant(ALLOCATIONS["curves"](candidates, (1.0 - share) * whole), meaning)
            found |= {name for name, blocks in keep.items() if blocks <= GONE and name in curves and curves[name].whole}
    return found
