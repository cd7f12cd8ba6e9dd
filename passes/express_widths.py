"""Which widths the configuration of a transformers model can say, and what it must say for those that were decided."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from liar_opt.frontend.fx_module import FxWalk
from liar_opt.frontend.fx_rewrite import planned_state
from liar_opt.frontend.hf_checkpoint import (
    FieldChange,
    FieldPlace,
    Shapes,
    by_entry,
    completed,
    express,
    inexpressible,
    is_stock,
    of_list,
    ratio_widths,
    refused,
    reshaped,
    restate,
    says,
)
from liar_opt.passes.allocate_widths import Expressible
from liar_opt.passes.base import Finding, Pass, PassResult, State
from liar_opt.passes.find_groups import layout
from liar_opt.passes.find_module_groups import Poolers
from liar_opt.passes.groups import ChannelGroup, Refusal
from liar_opt.passes.open_module import module_of
from liar_opt.runtime.errors import ModelError, OptionError


@dataclass(frozen=True)
class FinalFields(Finding):
    """What the configuration of a checkpoint must say for the widths that were decided."""

    by: ClassVar[str] = "state-fields"
    changes: tuple[FieldChange, ...]


class Said(NamedTuple):
    """How a configuration says widths: by which fields, and by group name which widths, where that is not any."""

    places: frozenset[FieldPlace]
    allowed: dict[str, tuple[int, ...]]
    reason: str | None = None


NARROWER = (0.5, 0.75)
"""Shares of a width that are tried beside the largest one below it."""


class Sayings(NamedTuple):
    """What a configuration can say, the groups of which it can say nothing, why, and the poolers that share a field."""

    expressible: Expressible
    unsaid: dict[str, str | None]
    poolers: tuple[ChannelGroup, ...]


@dataclass(frozen=True)
class ExpressWidthsPass(Pass[Sayings]):
    """Leave alone what the configuration of a transformers model has no field for, and find which widths it can say.

    Where one field says the width of a pooler and of other layers (SigLIP), the pooler is cut with them. Where a field is a
    list with an entry for each layer or stage (Gemma 3n, PVT), each entry says the width of its own groups alone.

    Attributes:
        asked: kinds that were asked for by name; that there is no field for them is an error then.
        required: whether it is an error that it can say no width at all.
    """

    name: ClassVar[str] = "express-widths"
    asked: tuple[str, ...] = ()
    required: bool = True

    def requires(self, state: State) -> None:
        """Checks that there is a configuration.

        Raises:
            OptionError: the module is no model of transformers.
        """
        module = module_of(state)
        if not is_stock(module):
            raise OptionError(
                f"{type(module).__name__} is no model of transformers: it has no checkpoint; leave checkpoint out"
            )

    def plan(self, state: State) -> Sayings:
        """Returns what can be said of each kind: of every width by itself, else of several in proportion."""
        found: list[Said] = []
        entries: dict[str, frozenset[FieldPlace]] = {}
        linked: set[str] = set()
        unsaid: dict[str, str | None] = {}
        poolers: list[ChannelGroup] = []
        for kind in sorted({g.kind for g in state.groups}):
            groups = [g for g in state.groups if g.kind == kind]
            rest: list[ChannelGroup] = []
            for width in sorted({g.size for g in groups}):
                own = [g for g in groups if g.size == width]
                said = _said(state, own)
                if said is None:
                    rest += own
                elif said.reason is not None:
                    unsaid |= dict.fromkeys((g.name for g in own), said.reason)
                elif (parts := _by_entry(state, own, said)) is not None:
                    found += [one for _, one in parts]
                    entries |= {g.name: one.places for members, one in parts for g in members}
                else:
                    found.append(said)
            if not rest:
                continue
            alike = [replace(p, kind=kind) for p in state.found(Poolers).groups if p.size in {g.size for g in rest}]
            choices = [rest, groups] if kind == "heads" else [rest, groups, [*rest, *alike], [*groups, *alike]]
            for members in choices:
                said = _said(state, members) if members != rest or len({g.size for g in rest}) > 1 else None
                if said is not None and said.reason is None:
                    found.append(said)
                    linked |= {g.name for g in members}
                    poolers += [p for p in members if p in alike]
                    break
            else:
                unsaid |= dict.fromkeys((g.name for g in rest), None)
        module = module_of(state)
        allowed = {name: widths for said in found for name, widths in said.allowed.items()}
        places = frozenset(p for said in found for p in said.places)
        owner = f"the configuration of {type(module).__name__}"
        expressible = Expressible(owner, allowed, frozenset(linked), places, entries)
        return Sayings(expressible, unsaid, tuple(poolers))

    def apply(self, state: State, plan: Sayings) -> PassResult:
        """Drops those groups, and adds the poolers.

        Raises:
            OptionError: a kind of them was asked for.
            ModelError: no group is left.
        """
        module = module_of(state)
        refusals = []
        dropped = [g for g in state.groups if g.name in plan.unsaid]
        left = tuple(g for g in state.groups if g.name not in plan.unsaid)
        for kind in sorted({g.kind for g in dropped}):
            own = [g for g in dropped if g.kind == kind]
            because = next((r for g in own if (r := plan.unsaid[g.name]) is not None), None)
            reason = inexpressible(module, (kind,), because=because)
            if kind in self.asked and not any(g.kind == kind for g in left):
                raise OptionError(reason)
            refusals.append(Refusal(reason, tuple(g.name for g in own)))
            widths = ", ".join(str(w) for w in sorted({g.size for g in own}))
            of = f" of width {widths}" if any(g.kind == kind for g in left) else ""
            state.model.notes.append(f"{kind}{of} are left alone: {reason}")
        if state.groups and not left and self.required:
            raise ModelError(inexpressible(module, {g.kind for g in dropped}, rest=False))
        if plan.poolers:
            named = ", ".join(f"'{g.name}'" for g in plan.poolers)
            state.model.notes.append(
                f"the pooler {named} is cut as well: one field says its width and that of other layers"
            )
        state.groups = tuple(sorted((*left, *plan.poolers), key=lambda g: (g.end, g.start)))
        state.add(plan.expressible)
        return PassResult(state, (), tuple(refusals))


def _said(state: State, groups: Sequence[ChannelGroup]) -> Said | None:
    """Returns how the configuration says narrower groups of one kind; None where it has no fields for that.

    Tried at the largest widths below their own, and at the largest ones that stay in proportion (see `_proportional` of the
    allocation). Which numbers of heads its class takes is tried for each.
    """
    module: Any = module_of(state)
    sizes = {g.size for g in groups}
    common = math.gcd(*sizes)
    steps = [{g.name: g.size - 1 for g in groups}]
    if groups[0].kind == "ffn" and len(sizes) > 1 and common > 1:
        steps.append({g.name: g.size - g.size // common for g in groups})
    fields = next((f for keep in steps if (f := _fields(state, groups, keep, valid=False)) is not None), None)
    refusal = None if fields is None else refused(module.config, fields)
    if fields is not None and refusal is None and (groups[0].kind == "ffn" or len(sizes) > 1):
        every = frozenset(c.place for c in fields)
        return Said(every, {}) if _also_narrower(state, groups, common, every) else None
    if groups[0].kind == "heads" and (fields is None or len(sizes) > 1):
        return None
    least = min(sizes)
    narrower = range(1, least) if groups[0].kind == "heads" else ratio_widths(module.config, least)
    places = None if fields is None else frozenset(c.place for c in fields)
    said: list[int] = []
    for width in narrower:
        keep = {g.name: g.size * width // least for g in groups}
        planned = _planned(state, groups, keep)
        options = None
        if places is not None:
            options = restate(module, places, planned.sizes, planned.head_widths, planned.ratios)
        if options is None:
            options = _fields(state, groups, keep, places)
        elif refused(module.config, options) is not None:
            options = completed(module, options, planned.shapes, planned.sizes, planned.head_widths)
        if options is not None:
            said.append(width)
            places = frozenset(c.place for c in options)
    if not said:
        return None if fields is None or places is None else Said(places, {}, refusal)
    assert places is not None
    anything = len(said) == least - 1
    return Said(places, {} if anything else {g.name: tuple(g.size * w // least for w in said) for g in groups})


def _also_narrower(state: State, groups: Sequence[ChannelGroup], common: int, places: frozenset[FieldPlace]) -> bool:
    """Returns whether fields that say the largest width below say a much narrower one, too.

    What a class rounds (MobileViT's expanded widths are multiples of 8) may be one less by chance.
    """
    for share in NARROWER:
        keep = {g.name: max(1, g.size // common * int(common * share)) for g in groups}
        if common == 1 or any(keep[g.name] >= g.size for g in groups):
            keep = {g.name: max(1, int(g.size * share)) for g in groups}
        if _fields(state, groups, keep, places, valid=False) is not None:
            return True
    return False


def _by_entry(state: State, groups: Sequence[ChannelGroup], said: Said) -> list[tuple[Sequence[ChannelGroup], Said]] | None:
    """Returns groups by the entry of lists that says their width, and how it does; None where it is no such list.

    Which groups an entry is of is seen from the tensors that are made with another number in it.
    """
    module: Any = module_of(state)
    if not all(of_list(module.config, place) for place in said.places):
        return None
    narrow = {g.name: said.allowed[g.name][-1] if g.name in said.allowed else g.size - 1 for g in groups}
    changes = by_entry(_fields(state, groups, narrow, said.places) or ())
    if len(changes) < 2 or None in changes:
        return None
    before = _planned(state, (), {}).shapes
    own: dict[str, set[str]] = {}
    for group in groups:
        shapes = _planned(state, [group], narrow).shapes
        own[group.name] = {n for n, shape in shapes.items() if shape != before[n]}
    moved = [reshaped(module, c) for c in changes.values()]
    classes = [[g for g in groups if own[g.name] <= names] for names in moved]
    if sorted(g.name for c in classes for g in c) != sorted(own) or not all(classes):
        return None
    parts: list[tuple[Sequence[ChannelGroup], Said]] = [
        (members, one) for members in classes if (one := _said(state, members)) is not None and one.reason is None
    ]
    return parts if len(parts) == len(classes) else None


def _fields(
    state: State,
    groups: Iterable[ChannelGroup],
    keep: Mapping[str, int],
    places: frozenset[FieldPlace] | None = None,
    valid: bool = True,
) -> tuple[FieldChange, ...] | None:
    """Returns what the configuration must say for the widths that ``groups`` will have; see `express`."""
    module = module_of(state)
    shapes, sizes, ratios, heads = _planned(state, list(groups), keep)
    return express(module, shapes, sizes, heads, ratios=ratios, places=places, valid=valid)


class Planned(NamedTuple):
    """The shapes that all tensors will have, the sizes that change, those of feed-forward layers, and widths of heads."""

    shapes: Shapes
    sizes: set[tuple[int, int]]
    ratios: set[tuple[int, int]]
    head_widths: set[int]


def _planned(state: State, groups: Sequence[ChannelGroup], keep: Mapping[str, int]) -> Planned:
    walk = state.walk
    assert isinstance(walk, FxWalk)
    shapes, sizes = planned_state(walk, {g.factor: keep[g.name] for g in groups})
    ratios = {(g.size, keep[g.name]) for g in groups if g.kind == "ffn" and keep[g.name] < g.size}
    heads = [g for g in groups if g.kind == "heads"]
    leaves = [layout(walk.algebra, g.consumers[0].uses[0].width, g.factor) for g in heads]
    return Planned(shapes, sizes, ratios, {walk.algebra.size(parts[-1]) for parts in leaves})


@dataclass(frozen=True)
class StateFieldsPass(Pass[tuple[FieldChange, ...]]):
    """Find what the configuration must say for the widths that were decided, before any of the work."""

    name: ClassVar[str] = "state-fields"

    def plan(self, state: State) -> tuple[FieldChange, ...]:
        """Returns the fields.

        Raises:
            OptionError: it cannot say the widths.
        """
        expressible, module = state.found(Expressible), module_of(state)
        classes: dict[frozenset[FieldPlace], list[ChannelGroup]] = {}
        others = expressible.places.difference(*expressible.entries.values())
        for group in state.groups:
            classes.setdefault(expressible.entries.get(group.name, others), []).append(group)
        parts = [_fields(state, members, state.keep, places) for places, members in classes.items()]
        fields = tuple(change for part in parts for change in part or ())
        shapes = _planned(state, state.groups, state.keep).shapes
        if None not in parts and (len(parts) == 1 or says(module, fields, shapes)):
            return fields
        every = _fields(state, state.groups, state.keep)
        if every is None:
            raise OptionError(inexpressible(module))
        return every

    def apply(self, state: State, plan: tuple[FieldChange, ...]) -> PassResult:
        """Adds them."""
        state.add(FinalFields(plan))
        return PassResult(state)
