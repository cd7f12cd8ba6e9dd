"""What comes behind every cut that was checked, whatever was cut: sizes, its scheme, times, quantising, the result."""

from collections.abc import Mapping, Sequence
from typing import Any

from liar_opt.passes.backend import TIMED_SAMPLES, Backend
from liar_opt.passes.base import Change, State
from liar_opt.passes.fit_runtime import time_narrower
from liar_opt.passes.groups import Refusal
from liar_opt.passes.open_model import model_sizes
from liar_opt.passes.pattern_weights import Patterned, timed_alone
from liar_opt.passes.report import Report, SizesEntry
from liar_opt.passes.result import PruneResult
from liar_opt.passes.sweep import first_samples
from liar_opt.runtime.memory import MemoryWatch

Done = tuple[Report, tuple[Change, ...], Sequence[Refusal]]
"""What a cut came to: the report so far, what was changed, and what was left alone."""


def timed_batch(state: State, aimed: bool = False) -> dict[str, Any]:
    """Returns what is timed, and whose operations are counted: some samples of a batch; where a time is the target, all."""
    assert state.calibration is not None
    batch = state.calibration.batches[0]
    return batch if aimed else first_samples(state, batch, TIMED_SAMPLES)


def finish_run(
    backend: Backend, done: Done, watch: MemoryWatch, batch: Mapping[str, Any] | None = None, aimed: bool = False
) -> PruneResult:
    """Times and quantises what was cut and checked, and returns it; of a dry run the original.

    Args:
        backend: its state is behind the checks.
        done: what was done so far.
        watch: since the run began.
        batch: what is timed, and whose operations are counted where those of the original were; None: see `timed_batch`.
        aimed: whether a time was the target: it is measured longer then.
    """
    state, options, (report, changes, refusals) = backend.state, backend.options, done
    if not options.dry_run:
        batch = timed_batch(state, aimed) if batch is None else batch
        operations = None if report.before.flops is None else backend.operations(state, batch)
        report.after = SizesEntry(**model_sizes(state.model), flops=operations)
        backend.complete(report, state)
        backend.keep_scheme(report, state)
        if options.latency:
            backend.note_times(report, state, batch, aimed)
        if report.latency is not None and report.kept_scheme is None:
            time_narrower(state, report.latency.speedup, report.latency.spread or 0.0)
        alone = state.get(Patterned)
        if alone is not None and report.patterned is None:
            times = report.latency
            speed = None if times is None else (times.speedup, times.spread or 0.0)
            report.patterned = timed_alone(alone, speed, backend.device)
        backend.quantise(report, state, batch)
        report.ended(state, watch)
    return backend.result(state, report, changes, tuple(refusals))
