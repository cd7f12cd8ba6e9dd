"""The report of a run: what was asked for, found and done; plain data in the end (:meth:`Report.to_json`)."""

import importlib.metadata
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from liar_opt.frontend.experts import ExpertLayer
from liar_opt.passes.allocate_widths import NAMED
from liar_opt.passes.base import Change, Opened, Pass, State, WholeModel
from liar_opt.passes.choose_blocks import ComparedBlocks, LeftOut
from liar_opt.passes.curves import Curves
from liar_opt.passes.cut_experts import CutExperts, experts_of
from liar_opt.passes.cut_vocabulary import CutWords
from liar_opt.passes.fit_runtime import Fitted, measured_fit
from liar_opt.passes.groups import FORMS, KINDS, ChannelGroup, Refusal, parameters_left
from liar_opt.passes.keep_scheme import KeptScheme
from liar_opt.passes.limit_drop import LimitedDrop
from liar_opt.passes.measure_curves import curve_report
from liar_opt.passes.meet_target import MetTarget
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.pattern_weights import Patterned
from liar_opt.passes.quantise_result import Quantised
from liar_opt.passes.refit_vectors import Refitted
from liar_opt.passes.repairs import RepairFunction
from liar_opt.passes.search_widths import Searched
from liar_opt.passes.tune_module import Tuned
from liar_opt.passes.verify_model import Verification
from liar_opt.runtime.arrays import solver
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.latency import Latency
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.runtime.ranks import Ranks

SCHEMA = 1
PACKAGES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnx-graphsurgeon",
)


@dataclass
class ModelEntry:
    """The model that was given; ``notes`` are sentences on what is worth knowing of this run."""

    path: str | None
    sha256: str | None
    opset: int
    notes: list[str]


@dataclass
class SizesEntry:
    """What a model comes to: elements, bytes of weights, nodes, and operations on what is timed, where they are counted."""

    parameters: int
    bytes: int
    nodes: int
    flops: int | None = None


@dataclass
class CalibrationEntry:
    """The calibration data; ``gap`` is the share of the repair's error that endlessly more samples would take off."""

    source: str
    samples: int
    tokens: int
    batches: int
    synthetic: bool
    warnings: list[str]
    gap: float | None = None


@dataclass
class LatencyEntry:
    """Both models, timed in turns."""

    dense_seconds: float
    pruned_seconds: float
    speedup: float
    runs: int
    batch: str
    spread: float | None
    apart: bool


@dataclass
class MemoryEntry:
    """Bytes: what might be used, what was planned, what the process took, and what waited on disk."""

    limit: int
    estimated_peak: int
    anonymous_peak: int | None
    resident_peak: int | None
    on_disk: int


@dataclass
class ProcessEntry:
    """One process of several: where it ran, its batches, seconds till all was cut and of them those waited for others."""

    rank: int
    host: str
    batches: int
    seconds: float
    waited: float
    anonymous_peak: int | None
    resident_peak: int | None


@dataclass(kw_only=True)
class Report:
    """What is known of a run; what is None by default has not been found out, and is left out of the JSON.

    Attributes:
        schema: the version of its form.
        liar_opt: the version of this package.
        versions: those of Python and of the packages that compute.
        model: what was given.
        before: its sizes.
        options: of the passes, by their names, and how the calibration data was read.
        seed: for all that was drawn.
        device: what measured.
        groups: what can be cut, in execution order; of a run with widths, kept blocks and the errors of each consumer.
        values: the widths within heads, and experts, which are cut when asked for alone.
        prunable: parameters of all that may be cut, before and after.
        prunable_parameters: the same, of an inspection.
        refusals: what was left alone, and why.
        experts: which experts are left, where some went.
        vocabulary: which words are left, where some went.
        blocks: which blocks were left out.
        blocks_compared: how many of them were tried, and what each number came to.
        calibration: the data.
        curves: the error of the output at each width, by group.
        target: how a target was met, or how much a limit allowed.
        search: what the search came to.
        fitted: what was asked for the sake of what runs the result, and whether it is faster here.
        resumed: segments that an earlier run had finished.
        after: the sizes of the result.
        cache_shapes: inputs and outputs that became narrower.
        verification: what the checks found.
        refit: what fitting biases and gains once more came to.
        tune: what training a small subset came to.
        latency: how long both models take.
        quantised: what quantising the result came to, with all four corners.
        patterned: the zeros in weights that kept their shape, and whether they make it faster here.
        solver: where it was solved, and in which precision.
        kept_scheme: of a model that came quantised: its scheme, and how it was kept.
        memory: what the run took.
        seconds: by pass.
        processes: those of a run of several.
    """

    schema: int = field(default=SCHEMA)
    liar_opt: str | None
    versions: dict[str, str]
    model: ModelEntry
    before: SizesEntry
    options: dict[str, Any] | None = None
    seed: int | None = None
    device: str | None = None
    groups: list[dict[str, Any]] | None = None
    values: list[dict[str, Any]] | None = None
    prunable: dict[str, int] | None = None
    prunable_parameters: int | None = None
    refusals: list[dict[str, Any]] | None = None
    experts: CutExperts | None = None
    vocabulary: CutWords | None = None
    blocks: LeftOut | None = None
    blocks_compared: ComparedBlocks | None = None
    calibration: CalibrationEntry | None = None
    curves: dict[str, Any] | None = None
    target: MetTarget | LimitedDrop | None = None
    search: Searched | None = None
    fitted: Fitted | None = None
    resumed: int | None = None
    after: SizesEntry | None = None
    cache_shapes: dict[str, Any] | None = None
    verification: Verification | None = None
    refit: Refitted | None = None
    tune: Tuned | None = None
    latency: LatencyEntry | None = None
    quantised: Quantised | None = None
    patterned: Patterned | None = None
    solver: dict[str, Any] | None = None
    kept_scheme: KeptScheme | None = None
    memory: MemoryEntry | None = None
    seconds: dict[str, float] | None = None
    processes: list[dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns plain data, ready for JSON."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        always = {f.name for f in fields(self) if f.default is MISSING}
        return {name: _plain(value) for name, value in known.items() if name in always or value is not None}

    def note(self, *notes: str) -> None:
        """Adds sentences on what is worth knowing, each once."""
        self.model.notes += [note for note in notes if note not in self.model.notes]

    def refuse(self, refusals: Sequence[Refusal]) -> None:
        """Says what was left alone."""
        self.refusals = [asdict(r) for r in refusals]

    def asked(self, passes: Sequence[Pass[Any]], options: PruneOptions, calibration: Any, where: str, device: str) -> None:
        """Says what was asked for.

        Args:
            passes: those whose options are told.
            options: of the run.
            calibration: what was given as calibration data.
            where: the provider, or what measures a module.
            device: what measures.
        """
        plain = isinstance(calibration, (str, Path)) or calibration is None
        data = {k: str(v) if isinstance(v, Path) else v for k, v in options.data().items()}
        self.options = {p.name: {k: _option(v) for k, v in vars(p).items()} for p in passes}
        self.options["calibration"] = {**data, "source": str(calibration) if plain else type(calibration).__name__}
        self.options["provider"] = where
        self.seed, self.device = options.seed, device

    def calibrated(self, data: CalibrationData) -> None:
        """Says what the calibration data is."""
        self.calibration = CalibrationEntry(
            data.source, data.samples, data.tokens, len(data.batches), data.synthetic, list(data.warnings)
        )

    def inspected(self, state: State) -> None:
        """Says what can be cut."""
        self.groups = [group_entry(g) for g in state.groups]
        experts = experts_of(state).layers
        self.values = [group_entry(g) for g in (*state.values, *state.queries)] + list(map(experts_entry, experts))
        self.prunable_parameters = round(parameters_left(state.groups))

    def decided(self, state: State) -> None:
        """Says how the widths were decided."""
        self.note(*state.model.notes)
        curves = state.get(Curves)
        if curves is not None:
            self.curves = curve_report(state.groups, curves.by_group)
            if curves.kept:
                self.note("the error curves are those of an earlier run on the same data; --fresh measures them again")
        self.target, self.search = state.get(MetTarget) or state.get(LimitedDrop), state.get(Searched)

    def planned(self, state: State) -> None:
        """Says the widths, which are not cut."""
        self.groups = [planned_entry(g, state.keep[g.name]) for g in state.groups]
        self.fitted = state.get(Fitted)
        self.prunable = prunable(state)

    def cut(self, state: State, changes: Sequence[Change], repair: str | RepairFunction) -> None:
        """Says what was cut, and what that did to the outputs.

        Args:
            state: behind the checks.
            changes: what the passes did.
            repair: that was asked for.
        """
        details = {c.where: c for c in changes}
        self.groups = [cut_entry(g, details.get(g.name)) for g in state.groups]
        self.prunable = prunable(state)
        self.note(*unrepaired(vars(self), repair))
        gaps = [c["calibration_gap"] for g in self.groups for c in g.get("repairs", ())]
        known = [gap for gap in gaps if gap is not None]
        assert self.calibration is not None
        self.calibration.gap = sum(known) / len(known) if known else None
        self.verification, self.tune = state.found(Verification), state.get(Tuned)
        self.refit = state.get(Refitted)

    def kept(self, found: KeptScheme) -> None:
        """Says how the scheme was kept; sizes and outputs are those of what is written."""
        assert self.after is not None
        self.kept_scheme = found
        if found.refused is None:
            self.after.bytes = found.bytes_after
            assert self.verification is not None
            self.verification = replace(self.verification, outputs=found.outputs)

    def timed(self, times: Latency) -> None:
        """Says how long both models take."""
        self.latency = LatencyEntry(
            dense_seconds=times.seconds[0],
            pruned_seconds=times.seconds[1],
            speedup=times.speedup,
            runs=times.runs,
            batch=times.batch,
            spread=times.spread if math.isfinite(times.spread) else None,
            apart=times.apart,
        )

    def shared_out(self, ranks: Ranks, state: State, watch: MemoryWatch) -> None:
        """Says what each process did, where there are several; called in all of them."""
        if ranks.size == 1:
            return
        assert state.calibration is not None
        batches = len(ranks.own(len(state.calibration.batches)))
        peaks = watch.anonymous, watch.resident
        own = ProcessEntry(ranks.rank, platform.node(), batches, watch.elapsed, ranks.waited, *peaks)
        self.processes = [asdict(entry) for entry in ranks.gathered(own)]

    def ended(self, state: State, watch: MemoryWatch) -> None:
        """Says what the run took."""
        self.solver = solver().described()
        times, memory = self.latency, state.memory
        speedup = None if times is None else times.speedup
        self.fitted = measured_fit(state, self.device or "", speedup, 0.0 if times is None else times.spread or 0.0)
        self.memory = MemoryEntry(memory.limit, memory.estimated, watch.anonymous, watch.resident, memory.store.bytes)
        self.seconds = {**state.seconds, "total": watch.elapsed}


def report_of(state: State) -> Report:
    """Returns the report of a model that was opened."""
    source, opened = state.model.source, state.found(Opened)
    return Report(
        liar_opt=_version("liar-opt"),
        versions=versions_of(),
        model=ModelEntry(
            path=str(source) if source else None,
            sha256=opened.digest.result() if opened.digest is not None else None,
            opset=state.model.opset,
            notes=list(state.model.notes),
        ),
        before=SizesEntry(**opened.sizes),
        blocks=state.get(LeftOut),
        experts=state.get(CutExperts),
    )


def versions_of() -> dict[str, str]:
    """Returns the versions of Python and of the packages that compute."""
    versions = {package: version for package in PACKAGES if (version := _version(package)) is not None}
    return {"python": platform.python_version(), **versions}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, Verification):
        return value.to_json()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _option(option: Any) -> Any:
    """A user's function is reported by its name, a pass by its options."""
    if isinstance(option, Pass):
        return {k: _option(v) for k, v in vars(option).items()}
    return getattr(option, "__name__", type(option).__name__) if callable(option) else option


def prunable(state: State) -> dict[str, int]:
    """Returns the parameters of all that may be cut together, before and after.

    Values, queries and keys hold weights of their layer's heads, and are cut within those that are left.
    """
    counted, whole = [g for g in state.groups if g.kind in KINDS], state.get(WholeModel)
    before, after = parameters_left(counted), parameters_left(counted, state.keep)
    for group in (g for g in state.groups if g.kind not in KINDS):
        heads = next((g for g in counted if g.kind == "heads" and group.constants <= g.constants), None)
        left = 1.0 if heads is None else max(state.keep.get(heads.name, heads.size), 0) / heads.size
        before += group.parameters if heads is None else 0
        after += group.parameters if heads is None else 0
        after -= left * group.parameters * (1.0 - state.keep.get(group.name, group.size) / group.size)
    if whole is not None:
        return {"before": whole.prunable, "after": round(after) + whole.added}
    return {"before": round(before), "after": round(after)}


def unrepaired(report: Mapping[str, Any], repair: str | RepairFunction) -> Iterator[str]:
    """Yields a note about weights whose repair was not written, if there are some."""
    told = {node for refusal in report["refusals"] for node in refusal["nodes"]}
    repairs = [c for g in report["groups"] for c in g.get("repairs", ())]
    alone = [c["node"] for c in repairs if c["repair"] == "none" and c["node"] not in told]
    if alone and repair != "none":
        named = ", ".join(f"'{node}'" for node in alone[:NAMED])
        named += f" and {len(alone) - NAMED} more" if len(alone) > NAMED else ""
        yield (
            f"{len(alone)} of {len(repairs)} repairs would be worse than none on held-back rows and were not written "
            f"({named}): the calibration data says too little; give more samples"
        )


def group_entry(group: ChannelGroup) -> dict[str, Any]:
    """Returns what a report says of a group that is not cut."""
    return {
        "name": group.name,
        "kind": group.kind,
        "before": group.size,
        "block_width": group.block_width,
        "queries_per_block": group.queries,
        "index_sets": group.sets,
        "parameters": group.parameters,
        "consumers": list(dict.fromkeys(r.node.name for r in group.readings)),
    }


def experts_entry(layer: ExpertLayer) -> dict[str, Any]:
    """Returns what a report says of experts that are not cut."""
    return {
        "name": f"{layer.name} (experts)",
        "kind": "experts",
        "before": layer.size,
        "block_width": 1,
        "queries_per_block": 1,
        "index_sets": layer.groups,
        "parameters": layer.parameters,
        "consumers": [layer.name],
        "chosen": layer.top_k,
    }


def cut_entry(group: ChannelGroup, change: Change | None) -> dict[str, Any]:
    """Returns what a report says of a group that was cut, or that kept its width (without a change)."""
    result = group_entry(group)
    if change is None:
        return {**result, "after": group.size}
    whole = {"stand_in": change.details["stand_in"]} if "stand_in" in change.details else {}
    return {
        **result,
        "after": change.after,
        **whole,
        "kept": change.details["kept"],
        "repairs": change.details["consumers"],
    }


def planned_entry(group: ChannelGroup, keep: int) -> dict[str, Any]:
    """Returns what a report says of a group that would be cut."""
    whole = {"stand_in": FORMS[keep]} if keep in FORMS else {}
    return {**group_entry(group), "after": max(keep, 0), **whole}
