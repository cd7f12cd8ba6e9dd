"""How many transformer blocks go, where they share a goal with widths: whatever leaves the least error at the output.

Without blocks, with one, with two, ...: those go whose repair loses least (`passes.choose_blocks`), the widths of what is
left meet the rest of the goal, and the result is judged as a whole, by the relative squared difference of the output on
batches that nothing was fitted to. It ends when that grows, or where blocks alone take what the goal asks for. Where the
goal is a largest loss, which all keep, the fewest parameters decide.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from liar_opt.passes.allocate_widths import DEFAULT_SPARSITY
from liar_opt.passes.backend import Backend
from liar_opt.passes.base import WholeModel
from liar_opt.passes.choose_blocks import ComparedBlocks, LeftOut, TriedBlocks, candidate_runs
from liar_opt.passes.cut_vocabulary import WIDTHS
from liar_opt.passes.finish_run import Done
from liar_opt.passes.judge import held_out, output_error
from liar_opt.passes.limit_drop import CannotKeepError
from liar_opt.passes.meet_target import MetAlreadyError, UnreachableError, parse_target
from liar_opt.passes.model_job import ModelJob
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.parts_job import without_experts, without_parts
from liar_opt.passes.result import PruneResult
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.memory import MemoryWatch

GOALS = ("sparsity", "target", "max_drop")
"""Options that blocks and widths can share."""
ENOUGH = "the blocks alone take what the goal asks for"


@dataclass(frozen=True, eq=False)
class Trial:
    """One number of blocks: the run that met the goal with them, what it came to, and the entry of the report."""

    entry: TriedBlocks
    job: ModelJob | None = None
    done: Done | None = None

    def value(self, limited: bool) -> float:
        """Returns what is compared; infinity where the goal was not met."""
        found = self.entry.parameters if limited else self.entry.error
        return float("inf") if found is None else float(found)


def prune_auto(backend: Backend, watch: MemoryWatch) -> PruneResult:
    """Tries 0, 1, 2, ... blocks in one goal with widths, and returns the best.

    Raises:
        ModelError: no blocks are found, or none can go.
        OptionError: the goal cannot be shared, or met.
        CheckError: a result is not what it has to be.
    """
    asked = _shared(backend.options)
    whole = without_experts(replace(backend, options=asked))
    most = max(run.stack.blocks for run in candidate_runs(whole.state, 1)) - 1
    limited = whole.choose().limited
    timed = asked.target is not None and parse_target(asked.target).kind == "latency"
    judged = None if limited else held_out(whole.state, "blocks auto", divide=not timed)
    best: Trial | None = None
    tried: list[TriedBlocks] = []
    for trial in _trials(whole, most, judged, watch):
        tried.append(trial.entry)
        asked.progress("blocks auto", len(tried), most + 1)
        if best is not None and trial.value(limited) >= best.value(limited):
            break
        best = trial if trial.job is not None else best
    if best is None or best.job is None or best.done is None:
        raise OptionError(f"{tried[0].why}; with blocks: {tried[-1].why}" if len(tried) > 1 else f"{tried[0].why}")
    compared = ComparedBlocks(best.entry.blocks, "parameters" if limited else "error", tried)
    job, done = best.job, best.done
    if asked.dry_run:
        job.backend.options = replace(job.options, dry_run=True)
        report, _, refusals = done
        report.planned(job.state)
        done = report, (), refusals
    done[0].blocks_compared = compared
    result = job.finish(done)
    result.changes = (*job.state.found(WholeModel).changes, *result.changes)
    return result


def _shared(options: PruneOptions) -> PruneOptions:
    """Returns the options, with a goal.

    Raises:
        OptionError: what is asked for cannot be shared out.
    """
    others = [name for name in WIDTHS if name not in GOALS and options.given(name) and name != "search"]
    if others:
        raise OptionError(
            f"blocks auto shares a sparsity, a target or max-drop with widths, and {others[0].replace('_', '-')} is none; "
            "give one of these, or a number of blocks"
        )
    return options if any(options.given(name) for name in GOALS) else replace(options, sparsity=DEFAULT_SPARSITY)


def _trials(whole: Backend, most: int, judged: CalibrationData | None, watch: MemoryWatch) -> Iterator[Trial]:
    """Yields a trial of 0, 1, 2, ... blocks, until the goal asks for no more."""
    notes = list(whole.state.model.notes)
    for count in range(most + 1):
        began = time.perf_counter()
        fresh = replace(whole, state=whole.anew(whole.state, notes))
        first: int | None = None
        try:
            left = without_parts(fresh, count)
            gone = left.state.get(LeftOut)
            first = None if gone is None else gone.first
            if not any(left.options.given(name) for name in GOALS):
                yield _failed(count, first, began, ENOUGH)
                return
            options = replace(left.options, dry_run=False)
            state = left.anew(left.state, left.state.model.notes)
            job = ModelJob(replace(left, state=state, options=options), watch)
            done = job.checked()
        except UnreachableError as err:
            yield _failed(count, first, began, str(err))
            continue
        except (MetAlreadyError, CannotKeepError) as err:
            alone = bool(count) and isinstance(err, MetAlreadyError)
            yield _failed(count, first, began, ENOUGH if alone else str(err))
            return
        except ModelError as err:
            if count < 2:
                raise
            yield _failed(count, first, began, str(err))
            return
        error = None if judged is None else output_error(job.state, judged, "give a number of blocks")
        entry = TriedBlocks(count, first, error, job.state.model.parameters(), time.perf_counter() - began)
        yield Trial(entry, job, done)


def _failed(count: int, first: int | None, began: float, why: str) -> Trial:
    return Trial(TriedBlocks(count, first, None, None, time.perf_counter() - began, why))
