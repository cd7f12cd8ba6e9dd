"""Decide how many blocks of each group stay: by ratios of each kind, or of all prunable parameters.

Uniform: a ratio r keeps round(n (1 - r)) of a group's n blocks, rounded to a multiple for feed-forward widths (kernels
like multiples of 8). ``sparsity`` s asks for the one ratio, for all kinds, at which s of the prunable parameters go; what
rounding leaves over is settled group by group, the largest first.

The other allocations (`passes.allocations`) share the same number of parameters out unevenly: a ratio is then that of its
kind as a whole, ``sparsity`` that of all kinds together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from liar_opt.passes.allocations import ALLOCATIONS, MEASURED, Candidates
from liar_opt.passes.base import Finding, Pass, PassResult, State
from liar_opt.passes.curves import Curves, GroupCurve
from liar_opt.passes.find_groups import WholeQueries
from liar_opt.passes.groups import GONE, KINDS, MAPPED, RECURRENT, VALUES, ChannelGroup, parameters_left, stood_in
from liar_opt.passes.registry import lookup
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.ranks import current

DEFAULT_SPARSITY = 0.3
ROUNDS = 6
MOST_CHOICES = 512
"""Joint candidates of the groups of one sublayer, at the most."""
NAMED = 3
"""Groups that a note names; of others it says how many they are."""
CLOSE = 2e-3
"""How near to the sparsity that was asked for is near enough, where groups share weights."""
Cost = Callable[[ChannelGroup, NDArray[np.int64]], NDArray[np.float64]]
"""(group, widths) -> what it costs at each, in the target's currency."""
Meaning = dict[str, list[dict[str, int]]]
"""Joint candidates: name -> list; entry i-1 is the {group: kept blocks} that candidate i stands for."""


@dataclass(frozen=True)
class Expressible(Finding):
    """What the configuration of a checkpoint can say of the widths of its groups.

    Attributes:
        owner: what says it, for messages.
        allowed: by group name the numbers of blocks below all of them that it can say; groups not named may keep any.
        linked: names of the feed-forward groups of which one field says several widths, which stay in proportion.
        places: the fields that say widths.
        entries: by group name the entries of lists that say its width alone, or that of its stage, where there are.
        reasons: by group name why others are not allowed, where that was said.
    """

    by: ClassVar[str] = "express-widths"
    owner: str
    allowed: Mapping[str, tuple[int, ...]]
    linked: frozenset[str]
    places: frozenset[Any] = frozenset()
    entries: Mapping[str, frozenset[Any]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)

    def describe(self, group: ChannelGroup) -> str:
        """Returns a sentence about what a group may keep."""
        numbers = ", ".join(map(str, self.allowed[group.name])) or "none"
        unit = "heads" if group.kind == "heads" else "channels"
        unit = f"groups of {group.queries} heads" if group.kind == "heads" and group.queries > 1 else unit
        why = f" ({self.reasons[group.name]})" if group.name in self.reasons else ""
        return f"of {group.size} {unit} {self.owner} can say {numbers}, no other number below{why}"


def kept_width(
    group: ChannelGroup, ratio: float, multiple_of: int, allowed: Sequence[int] | None = None, more: bool = False
) -> int:
    """Returns how many blocks of ``group`` stay at ``ratio``.

    Args:
        group: the group.
        ratio: the fraction to remove.
        multiple_of: kept feed-forward widths are multiples of this.
        allowed: the numbers below the group's size that may stay, if not any may: the nearest is taken.
        more: of two that are as near the larger one is taken, else the smaller one.

    Raises:
        OptionError: none would.
    """
    if ratio == 0.0:
        return group.size  # left alone, a multiple or not
    if allowed is not None:
        exact = group.size * (1.0 - ratio)
        return min((*allowed, group.size), key=lambda n: (abs(n - exact), -n if more else n))
    step = step_of(group, multiple_of)
    if step == group.size and step > 1:
        return group.size  # no multiple is smaller
    kept = step * math.floor(group.size * (1.0 - ratio) / step + 0.5)
    if kept < 1:
        most = 1.0 - step / group.size
        raise OptionError(
            f"ratio {ratio:g} would empty group '{group.name}' ({group.kind}, {group.size} wide, multiples of {step}); "
            f"the most is {math.floor(most * 1000) / 1000:g}"
        )
    return min(kept, group.size)


def _inspecting(state: State) -> str:
    """Returns what lists the refusals: the command reads files, not modules and graphs that Python holds."""
    return "liar_opt.inspect(model)" if state.model.source is None else "'liar-opt inspect'"


def require_allocatable(state: State, allocate: str, multiple_of: int, others: bool = False) -> None:
    """Checks what every pass that finds widths by an allocation needs.

    Args:
        state: the analysed model.
        allocate: name of the allocation.
        multiple_of: kept feed-forward widths are multiples of this.
        others: whether there are widths to cut beside the groups.

    Raises:
        OptionError: the allocation is unknown, or ``multiple_of`` is below one, or leaves every group whole.
        ModelError: there is nothing to prune.
    """
    lookup("allocation", ALLOCATIONS, allocate)
    if multiple_of < 1:
        raise OptionError(f"multiple-of {multiple_of} is below 1")
    if allocate in MEASURED and allocate != "curves" and any(g.together for g in state.groups):
        raise OptionError(
            f"the runtime wants as many heads in each layer; allocation '{allocate}' gives each its own, leave it out"
        )
    if not state.groups and not others:
        name = f"'{state.model.source}'" if state.model.source else "the model"
        raise ModelError(f"{name} has no prunable group; {_inspecting(state)} says why for every dimension")
    if state.groups and not others and all(g.size == 1 for g in state.groups):
        raise OptionError(
            "each group is one block, a single head say, and one stays at the least: nothing of them can go; "
            "'liar-opt inspect' lists what else there is"
        )
    if state.groups and not others and all(step_of(g, multiple_of) == g.size for g in state.groups):
        widest, step = max(g.size for g in state.groups), max(g.step for g in state.groups)
        more = f", with the multiples of {step} that what runs the result wants," if step > 1 else ""
        way = "leave it out" if more else f"give a smaller one, such as --multiple-of {max(1, widest // 4)}"
        raise OptionError(
            f"multiple-of {multiple_of}{more} leaves every group whole: the widest has {widest} channels; {way}"
        )
    whole = [g.name for g in state.groups if g.kind == "ffn" and min(multiple_of, g.size) == g.size]
    if whole:
        named = ", ".join(f"'{name}'" for name in whole[:NAMED])
        more = f" and {len(whole) - NAMED} more" if len(whole) > NAMED else ""
        note = (
            f"{named}{more}: no wider than the multiple of {multiple_of} that kept widths are, so nothing of that goes; a "
            "smaller --multiple-of cuts it"
        )
        if note not in state.model.notes:
            state.model.notes.append(note)


def require_sharing(query_key: object, allocate: str, by_kind: bool = False) -> None:
    """Checks that queries and keys, where they are to share, have something to share in.

    Args:
        query_key: "auto" where they are.
        allocate: name of the allocation.
        by_kind: whether every kind has a ratio of its own.

    Raises:
        OptionError: they have not.
    """
    if query_key == "auto" and (by_kind or allocate != "curves"):
        raise OptionError(
            "query-key auto shares in a sparsity, a target or max-drop by curves; give one of these, or query-key a ratio"
        )


def require_queries(state: State) -> None:
    """Checks that queries and keys can be cut.

    Raises:
        ModelError: they cannot.
    """
    if not state.queries:
        raise ModelError(f"the width of queries and keys cannot be cut: {why_whole(state)}; leave query-key out")


def why_whole(state: State) -> str:
    """Returns why no width of queries and keys can be cut."""
    whole = state.found(WholeQueries).refusals
    fused = "the graph has no product of queries and keys, and fused attention operators keep their widths"
    return whole[0].reason if whole else fused


def removed_parameters(groups: tuple[ChannelGroup, ...], keep: dict[str, int]) -> float:
    """Returns how many parameters go when ``keep`` blocks of each group stay."""
    return sum(g.parameters * (1.0 - max(keep[g.name], 0) / g.size) for g in groups) - stood_in(groups, keep)


def _in_all(groups: tuple[ChannelGroup, ...], sparsity: float, choose: Callable[[float], dict[str, int]]) -> dict[str, int]:
    """Chooses widths such that a share of all parameters goes, where a weight shrinks with more than one group, or axis.

    Allocations add up what each group holds by itself. Where weights are shared that is too much, and they are asked
    for less, a few times.
    """
    whole, asked = parameters_left(groups), sparsity
    keep = choose(asked)
    gone = whole - parameters_left(groups, keep)
    if math.isclose(gone, removed_parameters(groups, keep), rel_tol=1e-6):
        return keep
    for _ in range(ROUNDS):
        miss = sparsity - (1.0 - parameters_left(groups, keep) / whole)
        if abs(miss) <= CLOSE:
            break
        asked = min(max(asked + miss, 0.0), sparsity)
        keep = choose(asked)
    return keep


def step_of(group: ChannelGroup, multiple_of: int) -> int:
    """Returns the multiple that kept widths of ``group`` are of, in blocks; all of them where no multiple is smaller."""
    return group.size if group.fixed else min(math.lcm(multiple_of if group.kind == "ffn" else 1, group.step), group.size)


def _widths(size: int, step: int) -> NDArray[np.int64]:
    """Returns the multiples of a step below a size, and the size, ascending."""
    return np.append(np.arange(step, size, step), size).astype(np.int64)


def candidates_of(
    groups: Sequence[ChannelGroup],
    multiple_of: int,
    curves: Mapping[str, GroupCurve],
    cost: Cost | None = None,
) -> list[Candidates]:
    """Returns what each group may become.

    Args:
        groups: the groups.
        multiple_of: kept feed-forward widths are multiples of this.
        curves: what was measured, by group name; may be empty.
        cost: what a group costs at each width; its parameters if None.
    """
    candidates = []
    for group in groups:
        step = step_of(group, multiple_of)
        widths = _widths(group.size, step)
        curve = curves.get(group.name)
        candidates.append(
            Candidates(
                group.name,
                widths,
                group.parameters * widths / group.size if cost is None else cost(group, widths),
                np.zeros(widths.size) if curve is None else curve.errors[widths],
                np.zeros(0) if curve is None else curve.values,
                None if curve is None else curve.deviation,
            )
        )
    return candidates


def note_widths(state: State, keep: dict[str, int]) -> None:
    """Notes how many blocks of each group stay; values, queries and keys are groups where they are named."""
    known = {g.name for g in state.groups}
    others = (g for g in (*state.queries, *state.values) if g.name in keep and g.name not in known)
    state.groups = (*state.groups, *others)
    state.keep = keep


def joined(
    candidates: Sequence[Candidates],
    groups: Sequence[ChannelGroup],
    queries: Sequence[ChannelGroup],
    multiple_of: int,
    curves: Mapping[str, GroupCurve],
    cost: Cost | None = None,
) -> tuple[list[Candidates], Meaning]:
    """Joins the candidates of the heads of a layer and of the width of its queries and keys: they are of the same weights.

    With h heads of n and r channels of d there cost P h/n - Q h/n (1 - r/d), P the parameters of all and Q those of queries
    and keys, or what ``cost`` says of both; errors add up. Of all pairs those stay that no other beats in
    both.

    Args:
        candidates: of the groups.
        groups: the groups.
        queries: widths of queries and keys; those without a curve, or whose heads are none of the groups, stay as they are.
        multiple_of: kept channels are multiples of this.
        curves: what was measured, by group name.
        cost: what a group costs at each width, up to a constant; its parameters if None.

    Returns:
        The candidates, whose widths are numbers from 1 on where they are pairs, and the kept blocks that these stand for.
    """
    result, meaning = list(candidates), Meaning()
    for query in queries:
        place = next((i for i, g in enumerate(groups) if g.kind == "heads" and query.constants <= g.constants), None)
        if place is None or query.name not in curves or groups[place].name in meaning:
            continue
        heads, choice = groups[place], candidates[place]
        step = min(math.lcm(multiple_of, query.step), query.size)
        channels = _widths(query.size, step)
        spent = query.parameters * channels / query.size if cost is None else cost(query, channels)
        gone = spent[-1] - spent
        costs = (choice.costs[:, None] - (choice.widths / heads.size)[:, None] * gone).reshape(-1)
        errors = (choice.errors[:, None] + curves[query.name].errors[channels]).reshape(-1)
        pairs = [{heads.name: int(h), query.name: int(r)} for h in choice.widths for r in channels]
        best, chosen = np.inf, []
        for index in np.lexsort((errors, costs)):
            if errors[index] < best:
                best = errors[index]
                chosen.append(int(index))
        meaning[heads.name] = [pairs[i] for i in chosen]
        numbers = np.arange(1, len(chosen) + 1)
        result[place] = Candidates(heads.name, numbers, costs[chosen], errors[chosen], choice.values, choice.deviation)
    return result, meaning


def alike(
    groups: Sequence[ChannelGroup],
    multiple_of: int,
    curves: Mapping[str, GroupCurve],
    expressible: Expressible | None,
    cost: Cost | None = None,
) -> tuple[list[Candidates], Meaning]:
    """Joins the candidates of groups that keep one width: costs and errors add up.

    So a configuration with one number of heads and one feed-forward width for all layers has one set of candidates of each.

    Args:
        groups: the groups.
        multiple_of: kept feed-forward widths are multiples of this.
        curves: what was measured, by group name; may be empty.
        expressible: what a configuration can say of their widths, if there is one.
        cost: what a group costs at each width, up to a constant; its parameters if None.

    Returns:
        The candidates, whose widths are numbers from 1 on, and the kept blocks that these stand for.
    """
    candidates, meaning = [], Meaning()
    for members in _classes(groups, expressible):
        first = members[0]
        allowed = {} if expressible is None else expressible.allowed
        said = {g.name: (*allowed[g.name], g.size) for g in members if g.name in allowed}
        if len(said) == len(members):
            choices = [dict(zip(said, widths, strict=True)) for widths in zip(*said.values(), strict=True)]
        else:
            shares = [(g.name, g.size // first.size) for g in members]
            choices = [{n: int(w) * times for n, times in shares} for w in _widths(first.size, step_of(first, multiple_of))]
        costs, errors = np.zeros(len(choices)), np.zeros(len(choices))
        for group in members:
            widths = np.asarray([keep[group.name] for keep in choices], np.int64)
            costs += group.parameters * widths / group.size if cost is None else cost(group, widths)
            errors += curves[group.name].errors[widths] if group.name in curves else 0.0
        meaning[first.name] = choices
        candidates.append(Candidates(first.name, np.arange(1, len(choices) + 1), costs, errors, np.zeros(0)))
    return candidates, meaning


def _classes(groups: Sequence[ChannelGroup], expressible: Expressible | None) -> list[list[ChannelGroup]]:
    """Returns the groups that keep one width, or widths in proportion (see `_proportional`), the narrowest first."""
    result: dict[tuple[Any, ...], list[ChannelGroup]] = {}
    for group in sorted(groups, key=lambda g: g.size):
        allowed = None if expressible is None else expressible.allowed.get(group.name)
        linked = group.kind == "ffn" and (expressible is None or group.name in expressible.linked)
        base: Any = group.size
        if linked and allowed is not None:
            base = str(len(allowed))  # of one field: they go through their widths together
        elif linked:
            sizes = (key[2] for key in result if key[:2] == (group.kind, True) and isinstance(key[2], int))
            base = next((size for size in sizes if group.size % size == 0), group.size)
        entries = None if expressible is None else expressible.entries.get(group.name)
        result.setdefault((group.kind, linked, base, None if linked else allowed, entries), []).append(group)
    return list(result.values())


def candidates_together(
    groups: Sequence[ChannelGroup],
    queries: Sequence[ChannelGroup],
    multiple_of: int,
    curves: Mapping[str, GroupCurve],
    cost: Cost | None = None,
    uniform: bool = False,
    expressible: Expressible | None = None,
) -> tuple[list[Candidates], Meaning]:
    """Returns the candidates of `joined` groups, or of groups that are `alike` where ``uniform``; arguments are theirs.

    Groups that must keep one width for what runs the result are `alike` in either case.
    """
    if uniform:
        return alike(groups, multiple_of, curves, expressible, cost)
    tied, free = ([g for g in groups if g.together == whether] for whether in (True, False))
    same, meaning = alike(tied, multiple_of, curves, expressible, cost)
    found = joined(candidates_of(free, multiple_of, curves, cost), free, queries, multiple_of, curves, cost)
    others, joint = with_whole(*found, free, curves, cost)
    return [*same, *others], meaning | joint


def with_whole(
    candidates: Sequence[Candidates],
    meaning: Meaning,
    groups: Sequence[ChannelGroup],
    curves: Mapping[str, GroupCurve],
    cost: Cost | None = None,
) -> tuple[list[Candidates], Meaning]:
    """Adds, where it was measured what is lost when a whole sublayer goes, that as a further candidate.

    Groups of one sublayer have joint candidates then. Of all those stay that no other beats in both cost and error.

    Args:
        candidates: of the groups, in their order.
        meaning: what the numbers of joint ones stand for.
        groups: the groups.
        curves: what was measured, by group name.
        cost: what a group costs at each width, up to a constant; its parameters if None.
    """
    result: dict[str, Candidates] = {m.name: m for m in candidates}
    known, meaning = {g.name: g for g in groups}, Meaning(meaning)
    for group in groups:
        curve, sublayer = curves.get(group.name), group.sublayer
        if sublayer is None or curve is None or not curve.whole or not set(sublayer.members) <= result.keys():
            continue
        members = [known[name] for name in sublayer.members]
        own = [result[g.name] for g in members]
        choices = _pareto(own[0].costs, own[0].errors, [meant({own[0].name: int(w)}, meaning) for w in own[0].widths])
        for other in own[1:]:
            more = [meant({other.name: int(w)}, meaning) for w in other.widths]
            choices = _pareto(
                (choices[0][:, None] + other.costs).reshape(-1),
                (choices[1][:, None] + other.errors).reshape(-1),
                [a | b for a in choices[2] for b in more],
            )
        gone = [{g.name: GONE for g in members} | {group.name: form} for form in curve.whole]
        if cost is None:
            spent = [sublayer.left + (sublayer.map_parameters if form == MAPPED else 0) for form in curve.whole]
        else:
            spent = [sum(float(cost(g, np.asarray([keep[g.name]]))[0]) for g in members) for keep in gone]
            shift = max(0.0, -min(spent))  # costs are known up to a constant, and none is below zero
            spent, choices = [s + shift for s in spent], (choices[0] + shift, *choices[1:])
        costs, errors, kept = _pareto(
            np.append(choices[0], spent), np.append(choices[1], list(curve.whole.values())), [*choices[2], *gone]
        )
        for member in members:
            del result[member.name]
            meaning.pop(member.name, None)
        meaning[group.name] = kept
        numbers = np.arange(1, len(kept) + 1)
        result[group.name] = Candidates(group.name, numbers, costs, errors, own[0].values, own[0].deviation)
    return [result[g.name] for g in groups if g.name in result], meaning


def _pareto(
    costs: NDArray[np.float64], errors: NDArray[np.float64], kept: Sequence[dict[str, int]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[dict[str, int]]]:
    """Returns the choices that no other beats in both, by ascending cost; of many the evenly spread ones."""
    best, chosen = np.inf, []
    for index in np.lexsort((errors, costs)):
        if errors[index] < best or not errors[index]:
            best = errors[index]
            chosen.append(int(index))
    places = np.unique(np.linspace(0, len(chosen) - 1, MOST_CHOICES).round().astype(np.int64))
    chosen = [chosen[p] for p in places] if len(chosen) > MOST_CHOICES else chosen
    return costs[chosen], errors[chosen], [kept[i] for i in chosen]


def meant(chosen: Mapping[str, int], meaning: Meaning) -> dict[str, int]:
    """Returns the kept blocks that widths of joined candidates stand for, by group name."""
    keep: dict[str, int] = {}
    for name, width in chosen.items():
        keep |= meaning[name][width - 1] if name in meaning else {name: width}
    return keep


def _proportional(groups: Sequence[ChannelGroup], keep: dict[str, int], expressible: Expressible | None) -> dict[str, int]:
    """Returns widths of which one is as many times another as before: a configuration may say both by one field.

    So it says the width of experts that all tokens share: as that of the others, and how many they are. Where it is known
    which widths one field says, the others are left as they are.
    """
    ffn = [g for g in groups if g.kind == "ffn" and (expressible is None or g.name in expressible.linked)]
    kept = {g.size: keep[g.name] for g in ffn}
    for size in sorted(kept):
        base = next((b for b in sorted(kept) if b < size and size % b == 0), size)
        kept[size] = kept[base] * (size // base)
    return keep | {g.name: kept[g.size] for g in ffn}


@dataclass(frozen=True)
class AllocateWidthsPass(Pass[dict[str, int]]):
    """Decide the widths. Give ``sparsity``, or ratios by kind; a kind without a ratio is left alone then.

    Attributes:
        sparsity: fraction of all prunable parameters to remove, in [0, 1).
        ffn: fraction of the feed-forward width, and of channels between convolutions, to remove, in [0, 1).
        heads: fraction of the attention heads (or groups of heads) to remove, in [0, 1).
        values: fraction of the width of values within each head to remove, in [0, 1), beside any of the others. No part
            of ``sparsity``: heads hold the same weights, and values narrower than keys are what fused attention kernels and
            caches of one head size cannot hold.
        query_key: fraction of the width of queries and keys within each head to remove, likewise; the basis of both is
            changed first, so that their products change least. "auto" lets them share in ``sparsity``, by error curves.
        recurrent: fraction of the units of RNN, GRU and LSTM, and of the channels that they read, to remove, in [0, 1),
            beside any of the others: what one unit loses comes back in every step.
        multiple_of: kept feed-forward widths are multiples of this.
        allocate: how the ratio is shared out over the layers; a name in ``allocations.ALLOCATIONS``.
        uniform: groups of one kind and width keep the same width, as one configuration for all layers says it.
    """

    name: ClassVar[str] = "allocate-widths"
    sparsity: float | None = None
    ffn: float | None = None
    heads: float | None = None
    values: float | None = None
    query_key: float | Literal["auto"] | None = None
    recurrent: float | None = None
    multiple_of: int = 8
    allocate: str = "uniform"
    uniform: bool = False

    def requires(self, state: State) -> None:
        """Checks the options.

        Raises:
            OptionError: a ratio is outside [0, 1), both forms are given, ``multiple_of`` is below one, or the allocation is
                unknown.
            ModelError: there is nothing to prune.
        """
        for option in ("sparsity", "ffn", "heads", "values", "query_key", "recurrent"):
            value = getattr(self, option)
            if value is not None and value != "auto" and not 0.0 <= value < 1.0:
                raise OptionError(f"{option.replace('_', '-')} {value:g} is outside [0, 1); it is the fraction to remove")
        if self.sparsity is not None and (self.ffn is not None or self.heads is not None):
            raise OptionError("sparsity and the ratios by kind (ffn, heads) exclude each other; give one form")
        if self.uniform and self.allocate in MEASURED and self.allocate != "curves":
            raise OptionError(f"uniform widths and allocation '{self.allocate}' exclude each other; give one of them")
        others = bool((self.values or self.recurrent) and state.values) or bool(self.query_key and state.queries)
        require_allocatable(state, self.allocate, self.multiple_of, others)
        require_sharing(self.query_key, self.allocate, self.by_kind)
        for kind in (*KINDS, VALUES, RECURRENT):
            if getattr(self, kind) and not any(g.kind == kind for g in (*state.groups, *state.values)):
                raise ModelError(f"there is no prunable group of kind '{kind}'; {_inspecting(state)} says why")
        if self.query_key and self.query_key != "auto":
            require_queries(state)

    @property
    def by_kind(self) -> bool:
        """Whether kinds have ratios of their own."""
        ratios = (self.ffn, self.heads, self.values, self.recurrent, None if self.query_key == "auto" else self.query_key)
        return self.sparsity is None and any(r is not None for r in ratios)

    def plan(self, state: State) -> dict[str, int]:
        """Returns the number of blocks that stay, by group name; of values, queries and keys those of each head."""
        groups: tuple[ChannelGroup, ...] = state.groups
        alone = {VALUES: self.values, RECURRENT: self.recurrent}
        values = {g.name: kept_width(g, ratio, 1) for g in state.values if (ratio := alone[g.kind])}
        if isinstance(self.query_key, float | int):
            values |= {g.name: kept_width(g, self.query_key, 1) for g in state.queries} if self.query_key else {}
        sparsity = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        expressible = state.get(Expressible)
        if self.allocate in MEASURED:
            sharing = state.queries if self.query_key == "auto" else ()
            curves = state.found(Curves).by_group
            if self.by_kind or sharing:
                keep = self._shared_out(groups, sharing, curves, sparsity, expressible)
            else:
                keep = _in_all(groups, sparsity, lambda s: self._shared_out(groups, (), curves, s, expressible))
            if expressible is not None:
                self._require_less(groups, keep, expressible)
            return keep | values
        if self.by_kind:
            ratios = {g.name: self._ratio(g) for g in groups}
            keep = self._at(groups, ratios, expressible, more=False)
        else:
            keep = _in_all(groups, sparsity, lambda s: self._uniform(groups, s, expressible))
        if expressible is not None:
            self._require_less(groups, keep, expressible)
        return keep | values

    def _ratio(self, group: ChannelGroup) -> float:
        """Returns the ratio that was asked for of a group."""
        if self.by_kind:
            return {"ffn": self.ffn, "heads": self.heads}[group.kind] or 0.0
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def _at(
        self, groups: Sequence[ChannelGroup], ratios: Mapping[str, float], expressible: Expressible | None, more: bool
    ) -> dict[str, int]:
        """Returns the widths at ratios by group name."""
        allowed = {} if expressible is None else expressible.allowed
        keep = {g.name: kept_width(g, ratios[g.name], self.multiple_of, allowed.get(g.name), more) for g in groups}
        return _proportional(groups, keep, expressible) if self.uniform else keep

    def _require_less(self, groups: Sequence[ChannelGroup], keep: Mapping[str, int], expressible: Expressible) -> None:
        """Checks that what a configuration can say is not all that there is.

        Raises:
            OptionError: the ratios would narrow groups, and the nearest widths that can be said are those of today.
        """
        if any(keep[g.name] < g.size for g in groups):
            return
        held = [g for g in groups if g.name in expressible.allowed]
        held = [g for g in held if kept_width(g, self._ratio(g), self.multiple_of) < g.size]
        if held:
            said = "; ".join(dict.fromkeys(expressible.describe(g) for g in held))
            raise OptionError(
                f"nothing would go: {said}; give a larger ratio, or write ONNX with --format onnx (in Python: "
                "checkpoint=False), which may have any"
            )

    def _shared_out(
        self,
        groups: tuple[ChannelGroup, ...],
        queries: tuple[ChannelGroup, ...],
        curves: Mapping[str, GroupCurve],
        sparsity: float,
        expressible: Expressible | None,
    ) -> dict[str, int]:
        keep = {g.name: g.size for g in groups}
        if not self.by_kind:
            parts = [(sparsity, groups)]
        else:
            ratios = {"ffn": self.ffn or 0.0, "heads": self.heads or 0.0}
            parts = [(ratio, tuple(g for g in groups if g.kind == kind)) for kind, ratio in ratios.items()]
        for ratio, members in parts:
            candidates, meaning = candidates_together(
                members, queries, self.multiple_of, curves, uniform=self.uniform, expressible=expressible
            )
            if not ratio or not candidates:
                continue
            everything, least = sum(m.costs[-1] for m in candidates), sum(m.costs[0] for m in candidates)
            if (1.0 - ratio) * everything < least - 0.5 * max(m.costs[0] for m in candidates):
                if all(m.widths.size == 1 for m in candidates):
                    raise OptionError(
                        f"nothing can be removed for ratio {ratio:g}: groups are of one block, or no wider than multiple-of"
                        f" {self.multiple_of}; give a smaller multiple-of"
                    )
                most = math.floor((1.0 - least / everything) * 1000) / 1000
                fit = " and the multiples that the runtime wants" if any(g.step > 1 for g in members) else ""
                raise OptionError(
                    f"ratio {ratio:g} would empty a group; the most is {most:g} with multiple-of {self.multiple_of}{fit}"
                )
            chosen = ALLOCATIONS[self.allocate](candidates, (1.0 - ratio) * everything)
            keep |= meant(chosen, meaning)
        return keep

    def _uniform(
        self, groups: tuple[ChannelGroup, ...], sparsity: float, expressible: Expressible | None
    ) -> dict[str, int]:
        keep = self._at(groups, {g.name: sparsity for g in groups}, expressible, more=True)
        goal = sparsity * sum(g.parameters for g in groups)
        if expressible is not None and expressible.allowed:
            # What the nearest width leaves over, or takes too much, is made up for by groups that may have any.
            held = tuple(g for g in groups if g.name in expressible.allowed)
            free = tuple(g for g in groups if g.name not in expressible.allowed)
            if free:
                rest = (goal - removed_parameters(held, keep)) / sum(g.parameters for g in free)
                most = {g.name: 1.0 - step_of(g, self.multiple_of) / g.size for g in free}
                ratios = {g.name: sparsity for g in held} | {name: min(max(rest, 0.0), m) for name, m in most.items()}
                keep = self._at(groups, ratios, expressible, more=True)
        if self.uniform:
            return keep
        # Rounding moves all layers at once; single steps bring the sum to the goal.
        for group in sorted((g for g in groups if not g.together), key=lambda g: -g.parameters):
            step = step_of(group, self.multiple_of)
            for change in (-step, step):
                width = step * round((keep[group.name] + change) / step)
                trial = {**keep, group.name: width}
                fits = 1 <= width <= group.size
                if fits and abs(removed_parameters(groups, trial) - goal) < abs(removed_parameters(groups, keep) - goal):
                    keep = trial
        return keep

    def apply(self, state: State, plan: dict[str, int]) -> PassResult:
        """Notes the widths; groups of values, queries and keys join the others where they are to be cut.

        Raises:
            OptionError: something was asked for, and no group would lose anything.
        """
        plan, expressible = current().agreed(plan), state.get(Expressible)
        for group in state.groups if expressible is not None and self.allocate not in MEASURED else ():
            assert expressible is not None
            if group.name not in expressible.allowed or not self._ratio(group):
                continue
            alone, kept = kept_width(group, self._ratio(group), self.multiple_of), plan[group.name]
            note = f"{group.kind}: {kept} stay, where the ratio alone leaves {alone}: {expressible.describe(group)}"
            if kept != alone and note not in state.model.notes:
                state.model.notes.append(note)
        sizes = {g.name: g.size for g in (*state.groups, *state.values, *state.queries)}
        ratios = [
            self.sparsity,
            self.ffn,
            self.heads,
            self.values,
            self.recurrent,
            None if self.query_key == "auto" else self.query_key,
        ]
        given = [ratio for ratio in ratios if ratio is not None] or [DEFAULT_SPARSITY]
        if any(given) and all(keep == sizes[name] for name, keep in plan.items()):
            raise OptionError(
                "the ratios round to nothing, every group keeps its width; give larger ratios or a smaller --multiple-of"
            )
        note_widths(state, plan)
        return PassResult(state)
