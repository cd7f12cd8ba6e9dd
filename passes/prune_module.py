"""Prune a torch module: the same analysis, selection, repair and checks as for ONNX graphs, on the traced module.

:func:`prune_module` traces, finds the groups, measures in torch, cuts, and gives the module back with smaller weights
(:attr:`ModuleResult.module`), the traced graph (:attr:`ModuleResult.program`), and for transformers models a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature as inspect_signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from liar_opt.frontend.causal import is_causal
from liar_opt.frontend.fx_module import (
    BATCH,
    Executor,
    FxModel,
    FxWalk,
    analyse,
    example_from,
    lower,
    precision,
    to_torch,
    token_lengths,
    trace,
)
from liar_opt.frontend.fx_onnx import export_onnx, symbolic_axes
from liar_opt.frontend.fx_rewrite import cut_graph_module, cut_module, cut_program, planned_state
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.hf_checkpoint import (
    FieldChange,
    FieldPlace,
    Shapes,
    checkpoint_folder,
    completed,
    example_inputs,
    experts_by_lookup,
    express,
    inexpressible,
    is_stock,
    load_module,
    positions,
    ratio_widths,
    refused,
    required_arguments,
    restate,
    runs,
    save_checkpoint,
    without_cache,
)
from liar_opt.frontend.input_files import Inputs
from liar_opt.frontend.module_inputs import LABELS, named_batch, named_source, required_tensors
from liar_opt.frontend.onnx_segments import VARIANCE_FLOOR, Place, Tap, live_tensors, nodes_for, row_mask
from liar_opt.frontend.plain_module import evaluating, plain_module
from liar_opt.frontend.weight_files import lightened, write_model
from liar_opt.passes.allocate_widths import AllocateWidthsPass, Sayable
from liar_opt.passes.base import Change, Finding, Observer, Opened, Pass, PassResult, Pipeline, Progress, State, no_progress
from liar_opt.passes.find_groups import FindGroupsPass, find_groups, layout
from liar_opt.passes.gradient_scores import KNOWLEDGE, Labelled, Loss, mask_gradients, own_samples, require_labels
from liar_opt.passes.groups import ChannelGroup, Consumer, Refusal, parameters_left
from liar_opt.passes.measured import Measured
from liar_opt.passes.plan_memory import TensorSizes
from liar_opt.passes.prove_module import OpenedModule, ProveModuleGroupsPass
from liar_opt.passes.prune_groups import HELD_BACK, PruneGroupsPass, SegmentRun, Sweep
from liar_opt.passes.prune_model import (
    PACKINGS,
    TIMED_SAMPLES,
    CalibrationOptions,
    Inspection,
    PruneResult,
    _calibration_report,
    _group,
    _options,
    _pruned_group,
    _report_head,
    _sizes,
    check_output,
    inputs_of,
    prunable,
    prune,
    unrepaired,
)
from liar_opt.passes.registry import lookup
from liar_opt.passes.repairs import AWARE, RepairFunction
from liar_opt.passes.scores import ScoreFunction
from liar_opt.passes.verify_model import Verification, first_samples, mask_model
from liar_opt.runtime.calibration_data import first_rows, load_calibration
from liar_opt.runtime.compare import TOLERANCES, DifferenceMeter, holds_logits, require_close, require_repeatable
from liar_opt.runtime.errors import CheckError, InternalError, ModelError, OptionError
from liar_opt.runtime.latency import measure_latency
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.places import Places
from liar_opt.runtime.self_calibration import SELF
from liar_opt.runtime.sessions import PROVIDERS
from liar_opt.runtime.torch_backend import BatchMoments, RunningMoments, batch_moments, real_rows, stream_gain
from liar_opt.runtime.whole_file import whole_file

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

RIGID = "torch.nn.MultiheadAttention holds one width for its heads and for the stream: no checkpoint can say fewer heads"
BACKENDS = ("torch", "onnxruntime")
TIMED_SECONDS = 0.3
"""Seconds that timing may take beside a first run of each model, and one more where that takes longer."""


@dataclass(frozen=True)
class Poolers(Finding):
    """The poolers that may be cut where one field says their width and that of other layers."""

    by: ClassVar[str] = "find-groups"
    groups: tuple[ChannelGroup, ...]


@dataclass(frozen=True)
class FinalFields(Finding):
    """What the configuration of a checkpoint must say for the widths that were decided."""

    by: ClassVar[str] = "prune_module"
    changes: tuple[FieldChange, ...]


@dataclass(frozen=True, eq=False)
class Gradients(Finding):
    """The gradients of each group's blocks, by its name."""

    by: ClassVar[str] = "prune_module"
    by_group: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class CutModule(Finding):
    """The module with its smaller weights.

    Attributes:
        module: the module, or the traced graph where no attributes make its code fit.
        traced: why it is the traced graph; None where it is not.
    """

    by: ClassVar[str] = "verify-module"
    module: torch.nn.Module
    traced: str | None = None


@dataclass(frozen=True)
class FindModuleGroupsPass(FindGroupsPass):
    """Analyse the traced module and list its channel groups.

    Attributes:
        traced: whether the result may be the traced graph; else layers whose width is that of the stream stay whole.
    """

    traced: bool = True

    def apply(self, state: State, plan: None) -> PassResult:
        """Adds the analysis and the groups to the state."""
        assert isinstance(state.model, FxModel)
        state.walk = analyse(state.model)
        found = find_groups(state.walk)
        rigid = [] if self.traced else [g for g in found.groups if _rigid(state.walk, g)]
        state.groups = tuple(g for g in found.groups if g not in rigid)
        state.add(Poolers(tuple(g for g in found.poolers if self.traced or not _rigid(state.walk, g))))
        refusals = [Refusal(RIGID, (g.name,), g.size) for g in rigid]
        return PassResult(state, (), (*found.refusals, *refusals))


def _rigid(walk: FxWalk, group: ChannelGroup) -> bool:
    """Returns whether a group's weights belong to a layer of torch whose width is that of the stream."""
    import torch

    module = _module(walk)
    names = {u.constant.name for u in walk.constant_uses if id(u.constant) in group.constants}
    owners = [module.get_submodule(n.rpartition(".")[0]) for n in names if n in dict(module.named_parameters())]
    return any(isinstance(o, torch.nn.MultiheadAttention) for o in owners)


def parameter_count(module: torch.nn.Module) -> int:
    """Returns the number of elements of a module's parameters, each counted once."""
    return sum(p.numel() for p in module.parameters())


def _module(walk: FxWalk) -> torch.nn.Module:
    assert isinstance(walk.model, FxModel) and walk.model.module is not None
    return walk.model.module


class Said(NamedTuple):
    """How a configuration says widths: by which fields, and by group name which widths, where that is not any."""

    places: frozenset[FieldPlace]
    allowed: dict[str, tuple[int, ...]]
    reason: str | None = None


class Sayings(NamedTuple):
    """What a configuration can say, the groups of which it can say nothing, with reasons, and the poolers that go along."""

    sayable: Sayable
    unsaid: dict[str, str | None]
    poolers: tuple[ChannelGroup, ...]


@dataclass(frozen=True)
class ExpressWidthsPass(Pass[Sayings]):
    """Leave alone what the configuration of a transformers model has no field for, and find which widths it can say.

    Where one field says the width of a pooler and of other layers (SigLIP), the pooler is cut with them.

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
        module = _fx(state).module
        assert module is not None
        if not is_stock(module):
            raise OptionError(
                f"{type(module).__name__} is no model of transformers: it has no checkpoint; leave checkpoint out"
            )

    def plan(self, state: State) -> Sayings:
        """Returns what can be said of each kind: of every width by itself, else of several in proportion."""
        found: list[Said] = []
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
        module = _fx(state).module
        allowed = {name: widths for said in found for name, widths in said.allowed.items()}
        places = frozenset(p for said in found for p in said.places)
        sayable = Sayable(f"the configuration of {type(module).__name__}", allowed, frozenset(linked), places)
        return Sayings(sayable, unsaid, tuple(poolers))

    def apply(self, state: State, plan: Sayings) -> PassResult:
        """Drops those groups, and adds the poolers.

        Raises:
            OptionError: a kind of them was asked for.
            ModelError: no group is left.
        """
        module = _fx(state).module
        assert module is not None
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
        state.add(plan.sayable)
        return PassResult(state, (), tuple(refusals))


def _said(state: State, groups: Sequence[ChannelGroup]) -> Said | None:
    """Returns how the configuration says narrower groups of one kind; None where it has no fields for that.

    Tried at the largest widths below their own, and at the largest ones that stay in proportion (see `_proportional` of the
    allocation). Which numbers of heads its class takes is tried for each.
    """
    module: Any = _fx(state).module
    sizes = {g.size for g in groups}
    common = math.gcd(*sizes)
    steps = [{g.name: g.size - 1 for g in groups}]
    if groups[0].kind == "ffn" and len(sizes) > 1 and common > 1:
        steps.append({g.name: g.size - g.size // common for g in groups})
    fields = next((f for keep in steps if (f := _fields(state, groups, keep, valid=False)) is not None), None)
    refusal = None if fields is None else refused(module.config, fields)
    if fields is not None and refusal is None and (groups[0].kind == "ffn" or len(sizes) > 1):
        return Said(frozenset(c.place for c in fields), {})
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


def _fields(
    state: State,
    groups: Iterable[ChannelGroup],
    keep: Mapping[str, int],
    places: frozenset[FieldPlace] | None = None,
    valid: bool = True,
) -> tuple[FieldChange, ...] | None:
    """Returns what the configuration must say for the widths that ``groups`` will have; see `express`."""
    module = _fx(state).module
    assert module is not None
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


def _final_fields(state: State) -> tuple[FieldChange, ...]:
    """Returns what the configuration must say for the widths that were decided, before any of the work.

    Raises:
        OptionError: it cannot say them.
    """
    sayable = state.found(Sayable)
    fields = _fields(state, state.groups, state.keep, sayable.places)
    fields = _fields(state, state.groups, state.keep) if fields is None else fields
    if fields is None:
        module = _fx(state).module
        assert module is not None
        raise OptionError(inexpressible(module))
    return fields


@dataclass(frozen=True)
class PruneModulePass(PruneGroupsPass):
    """Cut every group of a traced module, measured in torch, and fold the repair into its consumers."""

    def requires(self, state: State) -> None:
        """Checks the options.

        Raises:
            OptionError: as for ONNX graphs, or a repair that asks for the dense model beside the cut one.
        """
        super().requires(state)
        if self.repair in AWARE:
            raise OptionError(f"repair '{self.repair}' works on ONNX files alone; export the module, or give repair 'liar'")

    def _run(self, state: State, sweep: Sweep) -> SegmentRun:
        return _TorchRun(self, state, *sweep)


@dataclass(frozen=True)
class PruneExportedPass(PruneModulePass):
    """The same, measured in ONNX Runtime on the module's export."""

    def _run(self, state: State, sweep: Sweep) -> SegmentRun:
        from liar_opt.passes.module_on_onnx import OnnxRun

        return OnnxRun(self, state, *sweep)


class _TorchRun(SegmentRun):
    """The loop's state; segments of the traced graph run in torch."""

    def __init__(
        self, options: PruneGroupsPass, state: State, wide: tuple[ChannelGroup, ...], segments: tuple[Any, ...]
    ) -> None:
        super().__init__(options, state, wide, segments)
        assert isinstance(state.model, FxModel)
        self.executor = Executor(state.model, device_of(state.model))
        self.gradients: NDArray[np.float64] | None = None

    def measure(self, taps: list[Tap], stop: int, first: Any) -> dict[Place, Moments]:
        """Runs from the segment before, as it was cut, to the activations, and adds their moments up in float64."""
        start = 0 if self.alive_at is None else self.position(self.alive_at)
        names = [] if first is None else live_tensors(self.walk, self.position(first), self.waiting)
        made = [n for n in names if n not in self.alive[0]]
        wanted = {*made, *(t.tensor for t in taps), *(t.numbers for t in taps if t.numbers)}
        wanted.update(term for t in taps if t.stream is not None for term in t.stream.terms)
        nodes = nodes_for(self.walk.model.graph.nodes, start, stop, wanted, self.alive[0])
        result = {t.place: Moments(t.width) for t in taps}
        sums = {t.place: RunningMoments(result[t.place], t.bounds) for t in taps}
        for index, feeds in enumerate(self.data.batches):
            inputs = {**feeds, **self.alive[index]}
            try:
                values = {**inputs, **self.executor.run(inputs, nodes, sorted(wanted))}
            except (RuntimeError, IndexError, ValueError) as err:
                raise self._fault(feeds, " ".join(str(err).split())[:300]) from err
            for tap in taps:
                with _finite(tap):
                    sums[tap.place].add(self._moments(tap, values, index), index in self.held)
            if first is not None:
                self.alive[index] = {n: values[n] for n in names}
            self.tick()
        for tap in taps:
            with _finite(tap):
                sums[tap.place].finish()
        if first is not None:
            self.alive_at = first
        self.executor.forget()
        return result

    def _fault(self, feeds: Mapping[str, Any], said: str) -> Exception:
        """Returns what to raise for a batch that a part fails on: the data's fault, where the original fails on it, too."""
        model = self.state.model
        assert isinstance(model, FxModel) and model.program is not None and model.module is not None
        try:
            Executor(lower(model.program, model.module), device_of(model)).run(feeds)
        except (RuntimeError, IndexError, ValueError):
            fed = ", ".join(f"'{name}' {list(np.shape(value))}" for name, value in feeds.items())
            made = "liar-opt made them up: give real ones (--calibration), or another length (--sequence-length)"
            fits = "is its sequence length or a token id beyond what the model was made for?"
            return ModelError(
                f"torch fails on the calibration data ({fed}): {said}; {made if self.data.synthetic else fits}"
            )
        return InternalError(f"torch fails on a part of the model: {said}")

    def prune(self, group: ChannelGroup, moments: dict[Place, Moments]) -> None:
        """Finds the gradients of the group, where there are any, and goes on as usual."""
        gradients = self.state.get(Gradients)
        self.gradients = None if gradients is None else gradients.by_group.get(group.name)
        super().prune(group, moments)

    def measured(self, consumer: Consumer, moments: dict[Place, Moments]) -> Measured:
        """Adds the gradients of the group."""
        return replace(super().measured(consumer, moments), gradients=self.gradients)

    def _moments(self, tap: Tap, values: Mapping[str, Any], index: int) -> BatchMoments:
        mask = self.data.row_masks[index]
        rows = None if mask is None or tap.layout == "all" else row_mask(mask, tap.layout, tap.repeat)
        x = real_rows(values[tap.tensor], tap.axis, rows)
        if tap.numbers:
            x = x[real_rows(values[tap.numbers].reshape(-1, 1), 1, rows)[:, 0] == tap.expert]
        gain = None
        if tap.stream is not None:
            terms = [real_rows(values[t], -1, rows) for t in tap.stream.terms]
            gain = stream_gain(x, terms, tap.stream.weight, tap.stream.offset, tap.stream.projection, VARIANCE_FLOOR)
        return batch_moments(x, tap.bounds, gain)


@contextlib.contextmanager
def _finite(tap: Tap) -> Iterator[None]:
    """Says which activation it was that is not finite."""
    try:
        yield
    except OptionError as err:
        raise ModelError(
            f"activation '{tap.tensor}' has NaN or Inf on the calibration data; check the module on that data "
            "(float16 may overflow)"
        ) from err


@dataclass(frozen=True)
class VerifyModulePass(Pass[None]):
    """Check the cut module against the original: both forms compute what the masked original computes.

    Attributes:
        batches: calibration batches on which the output difference is measured.
        checkpoint: whether the module's own code must fit.
    """

    name: ClassVar[str] = "verify-module"
    batches: int = 2
    checkpoint: bool = False

    def plan(self, state: State) -> None:
        """Plans nothing."""

    def apply(self, state: State, plan: None) -> PassResult:
        """Runs the checks; adds a ``Verification`` and the ``CutModule``.

        Where no attributes make the module's own code fit, the result is the traced graph.

        Raises:
            CheckError: the cut graph differs from the masked original.
            ModelError: a checkpoint was asked for, and the module's own code cannot be made to fit; or the module's outputs
                are not the same twice.
        """
        model, data = state.model, state.calibration
        assert isinstance(model, FxModel) and model.program is not None and model.module is not None and data is not None
        device = device_of(model)
        dtype = precision(model)
        original = lower(model.program, model.module)
        reference = lower(model.program, model.module)
        mask_model(analyse(reference), state.repairs)
        opened, fields = state.found(OpenedModule), state.get(FinalFields)
        example = opened.example
        cut = Executor(model, device)
        masked = Executor(reference, device)
        ours, theirs = _arrays(cut.run(example)), _arrays(masked.run(example))
        try:
            exact = require_close(ours, theirs, dtype, "cut against masked original")
        except CheckError:
            require_repeatable(theirs, _arrays(masked.run(example)))
            raise
        try:
            module, attributes = cut_module(model, example, TOLERANCES[dtype], () if fields is None else fields.changes)
            state.add(CutModule(module))
        except ModelError as err:
            if self.checkpoint:
                raise
            # What its code computes from other sizes no attribute can say; the graph is cut and has been checked.
            module, attributes = cut_graph_module(model).to(device), ()
            state.add(CutModule(module, str(err).partition("; write")[0]))
        held = [i for i in range(len(data.batches)) if i % HELD_BACK == HELD_BACK // 2] or [len(data.batches) - 1]
        dense, meter = Executor(original, device), DifferenceMeter()
        for done, i in enumerate(held[: self.batches]):
            x, y = _arrays(cut.run(data.batches[i])), _arrays(dense.run(data.batches[i]))
            for name, value in y.items():
                shown = opened.outputs.get(name, name)
                meter.add(shown, x[name], value, data.row_masks[i], holds_logits(shown, value.shape, vocabulary(model)))
            state.progress("verify", done + 1, len(held[: self.batches]))
        state.add(Verification(exact, dtype, meter.result(), attributes=list(attributes)))
        return PassResult(state)


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    import torch

    return {k: (v.float() if v.dtype == torch.bfloat16 else v).detach().cpu().numpy() for k, v in tensors.items()}


def device_of(model: FxModel) -> Any:
    """Returns the device of the module's parameters."""
    assert model.module is not None
    return next((p.device for p in model.module.parameters()), "cpu")


# -- the whole job ----------------------------------------------------------------------------------------------------


class ModuleResult(PruneResult):
    """A pruned module and what was done to it.

    Attributes:
        module: the module, smaller; called as before. Where no attributes make its own code fit the cut weights, the
            traced graph, with the arguments that were traced and no dropout; a note in the report says why.
        report: plain data, as for ONNX files; ``verification.attributes`` names the attributes that were changed.
        changes: what the passes did.
        refusals: what did not qualify, and why.
        groups: what could be pruned, in execution order.
        fields: what the configuration says of the new widths; None where it cannot.
        folder: where the checkpoint came from, if it did.
        inputs: what the run read; no result is written there.
    """

    def __init__(
        self,
        state: State,
        report: dict[str, Any],
        changes: tuple[Change, ...],
        refusals: tuple[Refusal, ...],
        inputs: Inputs | None = None,
    ):
        assert isinstance(state.model, FxModel)
        assert state.model.module is not None
        cut, fields, opened = state.get(CutModule), state.get(FinalFields), state.found(OpenedModule)
        self.module: torch.nn.Module = state.model.module if cut is None else cut.module
        self.report, self.changes, self.refusals = report, changes, refusals
        self.groups: tuple[ChannelGroup, ...] = state.groups
        self.fields: tuple[FieldChange, ...] | None = None if fields is None else fields.changes
        self.folder: Path | None = opened.folder
        given = inputs or Inputs()
        # of a name of the hub: the folder to which it was fetched
        self.inputs = given if self.folder is None else replace(given, models=(*given.models, self.folder))
        self._model, self._example = state.model, opened.example

    @functools.cached_property
    def graph_module(self) -> torch.fx.GraphModule:
        """The traced graph, cut: a ``torch.fx.GraphModule`` that is called like the module."""
        return cut_graph_module(self._model)

    @functools.cached_property
    def program(self) -> ExportedProgram:
        """The traced graph, cut: what ``torch.export.save`` writes."""
        return cut_program(self._model, self._example)

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The pruned module, exported to ONNX."""
        return export_onnx(self.module, self._example, symbolic_axes(self._model.signature))

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Writes the module, whole or not at all: ``.onnx`` and ``.pt2`` files, or a transformers checkpoint folder.

        Raises:
            OptionError: the path is that of a file or folder that the input consists of, exists (without ``force``), is no
                plain file or folder (links are not followed), is a folder that holds what liar-opt did not write, or cannot
                be written; or the configuration of the model cannot say its widths.
        """
        path = Path(path)
        if path.suffix not in (".onnx", ".pt2"):
            Places(self.inputs.files).folder(path, "output")
            return save_checkpoint(self.module, path, self.folder, self.fields, self._example, force=force)
        check_output(path, None, force, self.inputs)
        try:
            if path.suffix == ".onnx":
                write_model(*lightened(self.model), path, keep=[file for file, _ in self.inputs.files()])
            else:
                import torch

                with whole_file(path) as temporary, temporary.open("wb") as stream:
                    torch.export.save(self.program, stream)
        except OSError as err:
            raise OptionError(f"'{path}' cannot be written ({err.strerror or err}); nothing was left") from err
        return path


def prune_module(
    model: torch.nn.Module | str | Path,
    calibration: Any = None,
    *,
    example: Any = None,
    checkpoint: bool | None = None,
    uniform: bool | None = None,
    new_bias: bool | None = None,
    allow_pickle: bool = False,
    sparsity: float | None = None,
    ffn: float | None = None,
    heads: float | None = None,
    multiple_of: int = 8,
    score: str | ScoreFunction = "greedy",
    repair: str | RepairFunction = "liar",
    ridge: float | None = None,
    weighting: str = "stream",
    seed: int = 0,
    latency: bool = True,
    dry_run: bool = False,
    provider: str = "auto",
    progress: Progress = no_progress,
    observer: Observer | None = None,
    tokenizer: str | Path | None = None,
    text_column: str | None = None,
    samples: int = 512,
    batch_size: int = 32,
    sequence_length: int | None = None,
    mask_input: str | None = None,
    packing: str = "auto",
    backend: str = "torch",
    loss: Loss | None = None,
    labelled: Labelled | None = None,
    **others: Any,
) -> ModuleResult:
    """Makes a torch module smaller; :func:`liar_opt.prune` calls this for modules and for folders of checkpoints.

    Args:
        model: a module (it is not changed), a folder with a transformers checkpoint, or a hub name. Of what
            ``torch.compile``, DataParallel, DistributedDataParallel or AveragedModel hold, the module inside is pruned.
        calibration: as for ONNX files; dicts have the names of the module's arguments. Also a tensor of samples, or
            tensors in the order of the arguments: a tuple is one batch, a list, a DataLoader or a Dataset holds batches.
            One item more than ``forward`` takes is a label, and left out.
        example: a batch to trace the module with, a tensor, a tuple or a dict; made from the calibration data or the
            configuration if None.
        checkpoint: whether the result must be one that stock transformers loads; None is true for transformers models.
        uniform: one width for all layers; None is what a checkpoint needs.
        new_bias: whether layers without a bias may get one; None is what a checkpoint allows.
        allow_pickle: whether weights may be read from pickle files, which can run code.
        sparsity: see ``prune``; so for all others.
        ffn: see ``prune``.
        heads: see ``prune``.
        multiple_of: see ``prune``.
        score: see ``prune``.
        repair: see ``prune``.
        ridge: see ``prune``.
        weighting: see ``prune``.
        seed: see ``prune``.
        latency: see ``prune``.
        dry_run: see ``prune``.
        provider: where a checkpoint runs; a module stays where it is.
        progress: see ``prune``.
        observer: see ``prune``.
        tokenizer: see ``prune``; a checkpoint's own if None.
        text_column: see ``prune``.
        samples: see ``prune``.
        batch_size: see ``prune``.
        sequence_length: see ``prune``.
        mask_input: see ``prune``.
        packing: see ``prune``.
        backend: what measures: "torch", or "onnxruntime" on the module's export.
        loss: see ``prune``.
        labelled: see ``prune``.
        others: options of ``prune`` that work on ONNX files alone; they must have their defaults.

    Raises:
        ModelError: the module cannot be traced or has nothing to prune.
        OptionError: an option or the calibration data does not fit.
        CheckError: the result failed a check.
    """
    require_labels(score, loss, labelled, torch_module=True)
    start = time.perf_counter()
    _check_others(others)
    lookup("packing", dict.fromkeys(PACKINGS), packing)
    lookup("backend", dict.fromkeys(BACKENDS), backend)
    if (labelled is not None or score == KNOWLEDGE) and backend != "torch":
        raise OptionError(f"score '{score}' needs gradients; backend '{backend}' has none, give backend 'torch'")
    if isinstance(calibration, str) and calibration == SELF:
        raise OptionError("calibration 'self' works on ONNX files alone; prune the exported module, or give data")
    state, calibration = _load(model, calibration, example, allow_pickle, provider, batch_size)
    opened = state.found(OpenedModule)
    state.progress = progress
    checkpoint = opened.stock if checkpoint is None else checkpoint
    uniform = checkpoint if uniform is None else uniform
    new_bias = not checkpoint if new_bias is None else new_bias
    inputs = inputs_of({"model": model, "calibration": calibration, "tokenizer": tokenizer})
    tokenizer = opened.folder if tokenizer is None else tokenizer
    options = CalibrationOptions(
        calibration, tokenizer, text_column, samples, batch_size, sequence_length, mask_input, seed, packing
    )
    widths = AllocateWidthsPass(sparsity, ffn, heads, multiple_of=multiple_of, uniform=uniform)
    pruning = PruneExportedPass if backend == "onnxruntime" else PruneModulePass
    cut = pruning(score=score, repair=repair, ridge=ridge, seed=seed, weighting=weighting, new_bias=new_bias)
    asked = tuple(kind for kind, ratio in (("ffn", ffn), ("heads", heads)) if ratio)
    express_widths = [ExpressWidthsPass(asked)] if checkpoint else []
    passes: list[Pass[Any]] = [
        FindModuleGroupsPass(traced=not checkpoint),
        ProveModuleGroupsPass(cut),
        *express_widths,
        widths,
    ]
    analysis = Pipeline(passes=passes, observer=observer)(state)
    if checkpoint:
        state.add(FinalFields(_final_fields(state)))
    report = _report_head(state)
    report["options"] = _options([widths, cut], options, backend)
    report["seed"], report["device"] = seed, str(device_of(_fx(state)))
    report["refusals"] = [asdict(r) for r in analysis.refusals]
    if dry_run:
        report["groups"] = [{**_group(g), "after": state.keep[g.name]} for g in state.groups]
        report["prunable"] = prunable(state)
        return ModuleResult(state, report, (), analysis.refusals, inputs)
    began = time.perf_counter()
    fields = {k: v for k, v in vars(options).items() if k not in ("source", "packing")}
    fields["packing"] = is_causal(_fx(state)) if packing == "auto" else packing == "on"
    if calibration is None and sequence_length is None:  # inputs that are made up are no longer than there are positions
        module = _fx(state).module
        assert module is not None
        fields["positions"] = positions(module)
    state.calibration = load_calibration(options.source, state.model.inputs(), vocabulary=vocabulary(_fx(state)), **fields)
    state.seconds["load-calibration"] = time.perf_counter() - began
    report["calibration"] = _calibration_report(state.calibration)
    if score == KNOWLEDGE:
        labelled, loss = own_samples(state.calibration.batches, state.calibration.row_masks, seed)
    if loss is not None and labelled is not None:
        state.add(Gradients(_gradients(state, labelled, loss)))
    done = Pipeline(passes=[cut, VerifyModulePass(checkpoint=checkpoint)], observer=observer)(state)
    details = {c.where: c for c in done.changes}
    report["groups"] = [_pruned_group(g, details.get(g.name)) for g in state.groups]
    report["prunable"] = prunable(state)
    report["model"]["notes"] += unrepaired(report, cut.repair)
    report["after"] = {**_sizes(state.model), "parameters": parameter_count(state.found(CutModule).module)}
    traced = state.found(CutModule).traced
    if traced is not None:
        report["model"]["notes"].append(f"the result is the traced graph: {traced}")
    report["verification"] = state.found(Verification).to_json()
    if latency:
        began = time.perf_counter()
        report["latency"] = _latency(state)
        state.seconds["latency"] = time.perf_counter() - began
    report["seconds"] = {**state.seconds, "total": time.perf_counter() - start}
    return ModuleResult(state, report, done.changes, analysis.refusals, inputs)


def _gradients(state: State, labelled: Labelled, loss: Loss) -> dict[str, Any]:
    """Runs the labelled batches through the dense module; outputs have the names that the module gives them."""
    model = _fx(state)
    names = state.found(OpenedModule).outputs
    groups = [g for g in state.groups if state.keep.get(g.name, g.size) < g.size]

    @functools.wraps(loss)
    def named(outputs: Mapping[str, Any], labels: Any) -> Any:
        return loss({names.get(n, n): v for n, v in outputs.items()}, labels)

    return mask_gradients(Executor(model, device_of(model)), groups, labelled, named)


def _check_others(options: Mapping[str, Any]) -> None:
    """Checks that options that are for ONNX files alone were not given.

    Raises:
        OptionError: one was.
    """
    known = inspect_signature(prune).parameters
    for name, value in options.items():
        if name not in known:
            raise OptionError(f"option '{name}' is unknown")
        if value != known[name].default and (name, value) not in (("allocate", "uniform"), ("fresh", True)):
            raise OptionError(
                f"{name.replace('_', '-')} works on ONNX files alone; prune the exported module, or leave it out"
            )


def inspect_module(model: torch.nn.Module | str | Path, *, example: Any = None, allow_pickle: bool = False) -> Inspection:
    """Finds the channel groups of a module; :func:`liar_opt.inspect` calls this.

    Of a folder those are listed whose widths the checkpoint can say that ``prune`` makes of it; others are refused with a
    reason.

    Raises:
        ModelError: it cannot be loaded or traced.
        OptionError: nothing says what its inputs are.
    """
    state, _ = _load(model, None, example, allow_pickle)
    opened = state.found(OpenedModule)
    express_widths = [] if opened.folder is None else [ExpressWidthsPass(required=False)]
    result = Pipeline(passes=[FindModuleGroupsPass(traced=not opened.stock), *express_widths])(state)
    sayable = state.get(Sayable)
    for group in state.groups if sayable is not None else ():
        assert sayable is not None
        if group.name in sayable.allowed and (note := sayable.describe(group)) not in state.model.notes:
            state.model.notes.append(note)
    report = _report_head(state)
    report["groups"] = [_group(g) for g in state.groups]
    report["prunable_parameters"] = round(parameters_left(state.groups))
    report["refusals"] = [asdict(r) for r in result.refusals]
    return Inspection(state.model, state.groups, result.refusals, report)


def export_checkpoint(folder: Path, path: Path, *, allow_pickle: bool = False) -> None:
    """Writes a transformers checkpoint as ONNX, for what only reads ONNX.

    Raises:
        ModelError: it cannot be loaded, traced or exported.
        OptionError: nothing says what its inputs are.
    """
    state, _ = _load(folder, None, None, allow_pickle)
    model = _fx(state)
    assert model.module is not None
    write_model(
        *lightened(export_onnx(model.module, state.found(OpenedModule).example, symbolic_axes(model.signature))), path
    )


def _device(provider: str) -> str:
    """Returns the torch device that a provider means here.

    Raises:
        OptionError: unknown, or "cuda" where torch has no device.
    """
    import torch

    if provider not in PROVIDERS:
        raise OptionError(f"provider '{provider}' is unknown; choose one of {', '.join(PROVIDERS)}")
    if provider == "cuda" and not torch.cuda.is_available():
        raise OptionError("provider 'cuda' needs a CUDA device and a torch that was built for it; use provider 'cpu'")
    return "cuda" if provider != "cpu" and torch.cuda.is_available() else "cpu"


def _fx(state: State) -> FxModel:
    assert isinstance(state.model, FxModel)
    return state.model


def _load(
    model: torch.nn.Module | str | Path,
    calibration: Any,
    example: Any,
    allow_pickle: bool,
    provider: str = "cpu",
    batch_size: int = 32,
) -> tuple[State, Any]:
    """Takes a module from memory or from a checkpoint, traces it and lowers it; names the calibration data."""
    folder: Path | None = None
    notes: tuple[str, ...] = ()
    if isinstance(model, (str, Path)):
        folder = checkpoint_folder(model, allow_pickle)
        module = load_module(folder, allow_pickle).to(_device(provider))
    else:
        module, notes = plain_module(model)
    calibration = named_source(module, calibration, batch_size)
    example = example if example is None else named_batch(module, example, "example")
    with evaluating(module), without_cache(module):
        feeds, program = _traced(module, calibration, example)
        lowered = lower(program, module, folder)
        names = _output_names(module, feeds, lowered)
    lowered.notes += notes
    state = State(lowered)
    # What a traced graph's tensors take is not known: the plan of the memory has widths alone to go by.
    state.add(Opened(_sizes(lowered)), OpenedModule(feeds, names, folder, is_stock(module)), TensorSizes({}))
    return state, calibration


def _traced(
    module: torch.nn.Module, calibration: Any, example: Mapping[str, Any] | None
) -> tuple[dict[str, torch.Tensor], ExportedProgram]:
    """Returns a batch and the module traced with it: token lengths free, or else as they are given.

    They may have to fit what else the module reads: the patches of an image, the samples of sound.

    Raises:
        ModelError: ``torch.export`` refuses it both ways; this is what it said first.
    """
    refused = None
    with experts_by_lookup(module):
        feeds = _example(module, calibration, example)
        if runs(module, feeds):
            try:
                return feeds, trace(module, feeds)
            except ModelError as err:
                refused = err
        feeds = _example(module, calibration, example, free=False)
        if refused is not None and not token_lengths(feeds):
            raise refused
        try:
            return feeds, trace(module, feeds, free=False)
        except ModelError as err:
            raise (refused or err) from (refused or err).__cause__


def _example(
    module: torch.nn.Module, calibration: Any, example: Mapping[str, Any] | None, free: bool = True
) -> dict[str, torch.Tensor]:
    """Returns a batch to trace: what the user gave, the first batch of the calibration data, or what a config says.

    With ``free`` its token axes are cut to short lengths that no weight has.

    Raises:
        OptionError: nothing says what the module's inputs are.
    """
    device = next((p.device for p in module.parameters()), "cpu")
    taken = {int(s) for p in module.parameters() for s in p.shape}
    batch = example
    if batch is None and isinstance(calibration, Mapping):
        batch = calibration
    if batch is None and isinstance(calibration, Iterable) and not isinstance(calibration, (str, bytes, Path, Iterator)):
        first = next(iter(calibration), None)
        batch = first if isinstance(first, Mapping) else None
    if batch is None:
        batch = first_rows(calibration, BATCH)
    if batch is None:
        batch = example_inputs(module)
    if batch is None:
        raise OptionError(
            f"nothing says what the inputs of {type(module).__name__} are; give calibration data with an array for each of "
            f"{_arguments(module)} (tensors or a DataLoader, an .npz file, a folder of .npy files), or an example"
        )
    accepted = inspect_signature(module.forward).parameters
    named = {k: v for k, v in batch.items() if k in accepted and k not in LABELS}
    if not named and any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        named = {k: v for k, v in batch.items() if k not in LABELS}
    if not named:
        raise OptionError(
            f"none of {', '.join(map(repr, batch))} is an argument of {type(module).__name__}.forward, which takes "
            f"{', '.join(accepted)}"
        )
    required_tensors(module, named, "the example" if example is not None else "the calibration data")
    return example_from(named, taken, device, free)


def _arguments(module: torch.nn.Module) -> str:
    """Returns what the forward of a module needs, or, where all has defaults, takes: for a message."""
    needed = required_arguments(module)
    known = inspect_signature(module.forward).parameters.values()
    taken = [p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in LABELS]
    return ", ".join(needed or taken[:6]) or "its arguments"


def _output_names(module: torch.nn.Module, arguments: Mapping[str, Any], model: FxModel) -> dict[str, str]:
    """Maps tensors of the traced graph to the names of the module's outputs."""
    import torch

    with torch.no_grad():
        leaves, _ = torch.utils._pytree.tree_flatten_with_path(module(**arguments))
    names = [
        ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path) or "output"
        for path, value in leaves
        if isinstance(value, torch.Tensor)
    ]
    return dict(zip(model.results, names, strict=False))


def vocabulary(model: FxModel) -> int | None:
    """Returns how many token ids there are: rows of the shortest table that an input looks up, of the inputs the most."""
    inputs = {t.name for t in model.graph.inputs}
    rows: dict[str, int] = {}
    for node in model.graph.nodes:
        if node.op == "embedding" and is_constant(node.inputs[0]) and node.inputs[1].name in inputs:
            size, name = int(node.inputs[0].shape[0]), node.inputs[1].name
            rows[name] = min(size, rows.get(name, size))
    return max(rows.values(), default=None)


class _Runner:
    """A module behind the face of a session, for timing."""

    def __init__(self, module: torch.nn.Module, feeds: Mapping[str, Any], device: Any) -> None:
        self.inputs = list(feeds)
        self.module, self.arguments = module, {k: to_torch(v, device) for k, v in feeds.items()}

    def run(self, feeds: Mapping[str, Any]) -> None:
        import torch

        with torch.no_grad():
            self.module(**self.arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def _latency(state: State) -> dict[str, Any]:
    model, data = _fx(state), state.calibration
    assert data is not None and model.module is not None
    batch = first_samples(state, data.batches[0], TIMED_SAMPLES)
    feeds = {k: v for k, v in batch.items() if k in {s.name for s in model.signature}}
    runners = [_Runner(m, feeds, device_of(model)) for m in (model.module, state.found(CutModule).module)]
    measured = measure_latency(runners, feeds, budget=TIMED_SECONDS, least=1)
    return {
        "dense_seconds": measured.seconds[0],
        "pruned_seconds": measured.seconds[1],
        "speedup": measured.speedup,
        "runs": measured.runs,
        "batch": measured.batch,
    }
