"""Which passes a run goes through, by its options or by a text that names them (`passes.pass_list`)."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from liar_opt.passes.allocate_widths import AllocateWidthsPass
from liar_opt.passes.allocations import MEASURED
from liar_opt.passes.base import Pass
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.limit_drop import LimitDropPass
from liar_opt.passes.measure_curves import MeasureCurvesPass
from liar_opt.passes.meet_target import MeetTargetPass
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.options import OPTIONS, PruneOptions
from liar_opt.passes.pass_list import parse_passes
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.quantise_result import scheme_of
from liar_opt.passes.refit_vectors import RefitVectorsPass
from liar_opt.passes.runtimes import RUNTIMES
from liar_opt.passes.search_widths import SearchWidthsPass
from liar_opt.passes.verify_model import VerifyModelPass
from liar_opt.runtime.errors import OptionError

PASSES: tuple[type[Pass[Any]], ...] = (
    NormaliseGraphPass,
    FindGroupsPass,
    MeasureCurvesPass,
    AllocateWidthsPass,
    MeetTargetPass,
    LimitDropPass,
    SearchWidthsPass,
    PruneGroupsPass,
    VerifyModelPass,
)
"""Every pass, in the order of the pipeline; measure-curves runs where the allocation asks for it, meet-target or
limit-drop instead of allocate-widths where there is a target or a limit (limit-drop prunes by itself), search-widths where
it is asked for."""
DECIDING = (AllocateWidthsPass, MeetTargetPass, LimitDropPass)
"""Passes that decide the widths: one of them runs."""


@dataclass(frozen=True)
class Chosen:
    """The passes of one run behind the analysis; None for one that does not run.

    Attributes:
        widths: decides the widths.
        cut: prunes.
        curves: measures error curves.
        search: exchanges widths.
        verify: checks the result.
        gradients: notes what some scores need.
        stating: finds what a checkpoint must say of the widths.
        refit: fits biases and gains to the dense model once more.
        tune: trains a small subset of what was cut.
        fit: makes a module of a cut graph.
    """

    widths: AllocateWidthsPass | MeetTargetPass | LimitDropPass
    cut: PruneGroupsPass
    curves: MeasureCurvesPass | None = None
    search: SearchWidthsPass | None = None
    verify: VerifyModelPass = field(default_factory=VerifyModelPass)
    gradients: Pass[Any] | None = None
    stating: Pass[Any] | None = None
    refit: Pass[Any] | None = None
    tune: Pass[Any] | None = None
    fit: Pass[Any] | None = None

    @property
    def whole(self) -> bool:
        """Whether sublayers may go whole."""
        return self.curves is not None and self.curves.worth and self.curves.whole != "off"

    @property
    def limited(self) -> bool:
        """Whether the widths are decided by pruning."""
        return isinstance(self.widths, LimitDropPass)

    @property
    def _gradients_first(self) -> bool:
        """Whether the widths are decided by a score that needs gradients; else those of what is cut are enough."""
        return self.limited or (self.curves is not None and self.curves.score == self.cut.score)

    @property
    def deciding(self) -> list[Pass[Any]]:
        """Those that decide the widths, in order."""
        gradients = self.gradients if self._gradients_first else None
        steps = (gradients, self.curves, self.widths, self.search, self.stating)
        return [step for step in steps if step is not None]

    @property
    def cutting(self) -> list[Pass[Any]]:
        """Those that cut to them."""
        gradients, cut = None if self._gradients_first else self.gradients, None if self.limited else self.cut
        return [step for step in (gradients, cut) if step is not None]

    @property
    def training(self) -> list[Pass[Any]]:
        """Those that change weights once more, by what the dense model gives."""
        return [step for step in (self.refit, self.tune) if step is not None]

    @property
    def checking(self) -> list[Pass[Any]]:
        """Those that come behind."""
        return [self.verify, *self.training, *([] if self.fit is None else [self.fit])]


def passes_of_options(options: PruneOptions, calibrated: bool) -> Chosen:
    """Returns the passes that options mean.

    Args:
        options: of the run.
        calibrated: whether there is calibration data, not made-up inputs.

    Raises:
        OptionError: they exclude each other.
    """
    ratios = {name: getattr(options, name) for name in ("sparsity", "ffn", "heads", "values", "query_key", "recurrent")}
    by_kind, allocate = options.ffn is not None or options.heads is not None, options.allocate
    if allocate is None:  # the best for mixed kinds at every sparsity tried; it means nothing on random inputs
        alone = options.sparsity is None and any(
            ratios[kind] not in (None, "auto") for kind in ("values", "query_key", "recurrent")
        )
        allocate = "uniform" if by_kind or alone or options.uniform or not calibrated else "curves"
    sharing: Literal["auto"] | None = "auto" if options.query_key == "auto" else None
    asked = [name for name, ratio in ratios.items() if ratio is not None and ratio != "auto"]
    forms = (options.target, options.max_drop, "ratios" if asked else None)
    if sum(form is not None for form in forms) > 1:
        raise OptionError(
            "a target, max-drop and ratios (sparsity, ffn, heads, values, query-key, recurrent) exclude each other; give "
            "one form"
        )
    if options.search is not None and (options.target is not None or options.max_drop is not None):
        raise OptionError("a search starts from a sparsity or from ratios; leave the target or max-drop out")
    if options.metric is not None and options.max_drop is None:
        raise OptionError("a metric needs max-drop, the largest loss that is allowed")
    named = {name: getattr(options, name) for name in ("score", "repair", "ridge", "seed", "weighting", "value_cut")}
    cut = PruneGroupsPass(**named, new_bias=options.new_bias is not False)
    step = options.multiple_of
    widths: AllocateWidthsPass | MeetTargetPass | LimitDropPass
    if options.target is not None:
        widths = _counting(MeetTargetPass(options.target, step, allocate, sharing), options)
    elif options.max_drop is not None:
        widths = LimitDropPass(options.max_drop, options.metric, step, allocate, sharing, cut)
    else:
        widths = AllocateWidthsPass(**ratios, multiple_of=step, allocate=allocate, uniform=bool(options.uniform))
    searching = None
    if options.search is not None:
        searching = SearchWidthsPass(options.search, by_kind, step, options.repair, options.weighting, options.seed)
    row = RUNTIMES.get(options.runtime or "")
    loads = row is None or row.whole_layers
    whole = options.whole_layers if _by_curves(widths) and searching is None and not options.uniform and loads else "off"
    if options.whole_layers == "on" and whole == "off":
        if not calibrated and allocate == "uniform" and not (by_kind or options.allocate or options.uniform or searching):
            raise OptionError(
                "whole-layers goes by error curves, which made-up inputs say nothing of; give --calibration, or leave "
                "it out"
            )
        why = "a search and --uniform have widths alone" if options.search or options.uniform else "curves say which go"
        raise OptionError(
            f"whole-layers needs a sparsity, a target or max-drop shared out by curves ({why}); give one, or leave it out"
        )
    measure = MeasureCurvesPass(score=options.score, seed=options.seed, whole=whole)
    return Chosen(widths, cut, _curves(widths, searching, measure), searching, refit=_refit(options))


def _refit(options: PruneOptions) -> RefitVectorsPass | None:
    return RefitVectorsPass() if options.refit else None


def _by_curves(widths: AllocateWidthsPass | MeetTargetPass | LimitDropPass) -> bool:
    """Returns whether one budget is shared out over all kinds by error curves."""
    shared = not isinstance(widths, AllocateWidthsPass) or not widths.by_kind
    return shared and widths.allocate == "curves"


def passes_of_text(text: str, options: PruneOptions) -> Chosen:
    """Returns the passes that a text names; curves are measured where one of them needs them, and the result is checked.

    Args:
        text: see `passes.pass_list`.
        options: the others of the run.

    Raises:
        OptionError: the text is not understood, an option of a pass is given beside it, no pass decides the widths or more
            than one does, or nothing would be cut.
    """
    own = {f.name for step in PASSES if step is not VerifyModelPass for f in fields(step)} - {"seed", "quantize"}
    for name in sorted(own & OPTIONS.keys()):
        if options.given(name):
            raise OptionError(f"passes: '{name}' is given beside the passes; write it into the braces of its pass")
    named: dict[type, Any] = {type(step): step for step in parse_passes(text, PASSES, {"seed": options.seed})}
    deciding = [named[step] for step in DECIDING if step in named]
    if len(deciding) != 1:
        choice = ", ".join(step.name for step in DECIDING)
        raise OptionError(f"passes: {len(deciding)} of them decide the widths; name one of {choice}")
    cut, search, widths = named.get(PruneGroupsPass), named.get(SearchWidthsPass), deciding[0]
    if isinstance(widths, MeetTargetPass):
        widths = _counting(widths, options)
    if isinstance(widths, LimitDropPass):
        if search is not None:
            raise OptionError("passes: 'search-widths' starts from decided widths; leave it or 'limit-drop' out")
        widths = replace(widths, cut=cut or PruneGroupsPass(seed=options.seed))
    elif cut is None and not options.dry_run:
        raise OptionError("passes: nothing would be cut; add 'prune-groups', or ask for a dry run")
    curves = named.get(MeasureCurvesPass) or _curves(widths, search, MeasureCurvesPass(seed=options.seed))
    return Chosen(
        widths,
        cut or PruneGroupsPass(),
        curves,
        search,
        named.get(VerifyModelPass, VerifyModelPass()),
        refit=_refit(options),
    )


def _counting(widths: MeetTargetPass, options: PruneOptions) -> MeetTargetPass:
    """Returns a target whose size is that of the quantised file, where the result is to be quantised."""
    scheme = scheme_of(options)
    return widths if scheme is None else replace(widths, quantize=scheme.name, block=scheme.block)


def _curves(
    widths: AllocateWidthsPass | MeetTargetPass | LimitDropPass, search: SearchWidthsPass | None, curves: MeasureCurvesPass
) -> MeasureCurvesPass | None:
    """Returns ``curves`` where another pass reads them."""
    if widths.query_key == "auto":
        curves = replace(curves, queries=True)
    if isinstance(widths, LimitDropPass) or search is not None or widths.allocate == "curves":
        return curves
    return replace(curves, worth=False) if widths.allocate in MEASURED else None  # these compare scores, not errors
