"""Decide how many blocks of each group stay: uniform ratios, by kind or over all prunable parameters.

A ratio r keeps round(n (1 - r)) of a group's n blocks, rounded to a multiple for feed-forward widths (kernels like
multiples of 8). ``sparsity`` s asks for the one ratio, for all kinds, at which s of the prunable parameters go; what
rounding leaves over is settled group by group, the largest first.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from liar_opt.passes.base import Pass, PassResult, State
from liar_opt.passes.groups import ChannelGroup
from liar_opt.runtime.errors import ModelError, OptionError

DEFAULT_SPARSITY = 0.3


def kept_width(group: ChannelGroup, ratio: float, multiple_of: int) -> int:
    """Returns how many blocks of ``group`` stay at ``ratio``.

    Raises:
        OptionError: none would.
    """
    if ratio == 0.0:
        return group.size  # left alone, a multiple or not
    step = min(multiple_of, group.size) if group.kind == "ffn" else 1
    kept = step * math.floor(group.size * (1.0 - ratio) / step + 0.5)
    if kept < 1:
        most = 1.0 - step / group.size
        raise OptionError(
            f"ratio {ratio:g} would empty group '{group.name}' ({group.kind}, {group.size} wide, multiples of {step}); "
            f"the most is {math.floor(most * 1000) / 1000:g}"
        )
    return min(kept, group.size)


def removed_parameters(groups: tuple[ChannelGroup, ...], keep: dict[str, int]) -> float:
    """Returns how many parameters go when ``keep`` blocks of each group stay."""
    return sum(g.parameters * (1.0 - keep[g.name] / g.size) for g in groups)


@dataclass(frozen=True)
class AllocateWidthsPass(Pass[dict[str, int]]):
    """Uniform widths. Give ``sparsity``, or ratios by kind; a kind without a ratio is left alone then.

    Attributes:
        sparsity: fraction of all prunable parameters to remove, in [0, 1).
        ffn: fraction of each feed-forward width to remove, in [0, 1).
        heads: fraction of each layer's attention heads (or groups of heads) to remove, in [0, 1).
        multiple_of: kept feed-forward widths are multiples of this.
    """

    name: ClassVar[str] = "allocate-widths"
    sparsity: float | None = None
    ffn: float | None = None
    heads: float | None = None
    multiple_of: int = 8

    def requires(self, state: State) -> None:
        """Checks the options.

        Raises:
            OptionError: a ratio is outside [0, 1), both forms are given, or ``multiple_of`` is below one.
            ModelError: there is nothing to prune.
        """
        for option in ("sparsity", "ffn", "heads"):
            value = getattr(self, option)
            if value is not None and not 0.0 <= value < 1.0:
                raise OptionError(f"{option} {value:g} is outside [0, 1); it is the fraction to remove")
        if self.sparsity is not None and (self.ffn is not None or self.heads is not None):
            raise OptionError("sparsity and the ratios by kind (ffn, heads) exclude each other; give one form")
        if self.multiple_of < 1:
            raise OptionError(f"multiple-of {self.multiple_of} is below 1")
        if not state.groups:
            name = f"'{state.model.source}'" if state.model.source else "the model"
            raise ModelError(f"{name} has no prunable group; 'liar-opt inspect' says why for every dimension")
        for kind in ("ffn", "heads"):
            if getattr(self, kind) and not any(g.kind == kind for g in state.groups):
                raise ModelError(f"there is no prunable group of kind '{kind}'; 'liar-opt inspect' says why")

    def plan(self, state: State) -> dict[str, int]:
        """Returns the number of blocks that stay, by group name."""
        groups: tuple[ChannelGroup, ...] = state.groups
        if self.ffn is not None or self.heads is not None:
            ratios = {"ffn": self.ffn or 0.0, "heads": self.heads or 0.0}
            return {g.name: kept_width(g, ratios[g.kind], self.multiple_of) for g in groups}
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        return self._uniform(groups, sparsity)

    def _uniform(self, groups: tuple[ChannelGroup, ...], sparsity: float) -> dict[str, int]:
        keep = {g.name: kept_width(g, sparsity, self.multiple_of) for g in groups}
        goal = sparsity * sum(g.parameters for g in groups)
        # Rounding moves all layers at once; single steps bring the sum to the goal.
        for group in sorted(groups, key=lambda g: -g.parameters):
            step = min(self.multiple_of, group.size) if group.kind == "ffn" else 1
            for change in (-step, step):
                width = step * round((keep[group.name] + change) / step)
                trial = {**keep, group.name: width}
                fits = 1 <= width <= group.size
                if fits and abs(removed_parameters(groups, trial) - goal) < abs(removed_parameters(groups, keep) - goal):
                    keep = trial
        return keep

    def apply(self, state: State, plan: dict[str, int]) -> PassResult:
        """Notes the widths."""
        state.keep = plan
        return PassResult(state)
