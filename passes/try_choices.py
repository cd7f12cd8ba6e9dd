"""Which score and which draw of the calibration samples: tried within a budget, and judged on rows that no try has seen.

AdaPruner looks for the calibration data and the importance metric together, by Bayesian optimisation
over what one run of its pruner loses. Here the tries are few, each is the whole cut, and they go along one axis after the
other: first scores, on the first draw, then draws, with the best score. The first try is what is done without the option;
the widths that it decides are those of all. Where both are asked for, scores get half of the tries.

The samples are read once, as many as all draws and the judge need, and dealt out to them so that none is in two parts.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from liar_opt.passes.backend import Backend
from liar_opt.passes.base import WholeModel
from liar_opt.passes.choices import ComparedTries, Tried, draws_of, scores_of, words_of
from liar_opt.passes.finish_run import Done, finish_run
from liar_opt.passes.judge import output_error, shared_out
from liar_opt.passes.model_job import ModelJob
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.parts_job import without_experts
from liar_opt.passes.pattern_job import pattern_alone, patterned
from liar_opt.passes.result import PruneResult
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import CheckError, ModelError, OptionError
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.runtime.signatures import Signature

JUDGES = 10
"""One sample in so many judges where there are none beside those of one draw."""
WAY_OUT = "leave choose out"


@dataclass(frozen=True, eq=False)
class Trial:
    """One try: the entry of the report, and the run; None where it failed."""

    entry: Tried
    job: ModelJob | Backend | None = None
    done: Done | None = None

    @property
    def value(self) -> float:
        """What is compared."""
        return float("inf") if self.entry.error is None else self.entry.error


def prune_chosen(backend: Backend, watch: MemoryWatch) -> PruneResult:
    """Tries scores and draws, and returns the best.

    Raises:
        ModelError: the model cannot be read or has nothing to prune.
        OptionError: there are too few samples, or an option does not fit.
        CheckError: a result is not what it has to be.
    """
    options = backend.options
    search = _Search(backend, words_of(options), watch)
    entries, stopped = [search.best.entry], None
    for score, draw in search.others():
        stopped = search.ended(entries)
        if stopped is not None:
            break
        trial = search.tried(score, draw)
        entries.append(trial.entry)
        options.progress("choose", len(entries), options.choose_tries)
        search.best = trial if trial.value < search.best.value else search.best
    best, limit = search.best, options.choose_minutes
    assert best.job is not None and best.done is not None
    budget = {"tries": options.choose_tries, **({} if limit is None else {"minutes": limit})}
    stopped = stopped or ("tries" if len(entries) >= options.choose_tries else "all")
    sizes = search.draws[0].samples, search.judged.samples
    best.done[0].choice = ComparedTries(list(search.words), entries.index(best.entry), entries, *sizes, budget, stopped)
    if isinstance(best.job, ModelJob):
        return best.job.finish(best.done)
    return finish_run(best.job, best.done, watch)


class _Search:
    """The model as it came, the draws, what judges, and the best so far: at first what is made without the option.

    Args:
        backend: as it was opened.
        words: what is chosen among.
        watch: looks at the memory and the clock since the run began.
    """

    def __init__(self, backend: Backend, words: tuple[str, ...], watch: MemoryWatch) -> None:
        self.options, self.words, self.watch = backend.options, words, watch
        self.alone = pattern_alone(self.options)
        tries, samples = self.options.choose_tries, self.options.samples
        self.for_scores = 1 + tries // 2 if "samples" in words else tries
        most = draws_of(words, tries)
        wide = replace(self.options, samples=samples * (most + 1), batch_size=self.options.batch_size * (most + 1))
        self.whole = without_experts(replace(backend, options=wide))
        self.known = self.whole.state.found(WholeModel)
        self.notes = list(self.whole.state.model.notes)
        signature = Signature.read(self.whole.state.analysed().input_specs(), self.options.mask_input)
        self.judged, self.draws = _dealt(self.known.data, samples, most, signature, self.options.seed)
        self.decided: dict[str, Any] | None = None
        self.best = self._made(self._score(), 0)

    def _score(self) -> str:
        asked = self.options.pattern_solver if self.alone else self.options.score
        return asked if isinstance(asked, str) else getattr(asked, "__name__", "own")

    def others(self) -> Iterator[tuple[str, int]]:
        """Yields what else to try: scores, then draws, with the best of the scores."""
        if "score" in self.words:
            others = list(scores_of(self.options, self.alone))
            yield from ((name, 0) for name in others[: self.for_scores - 1])
        score = self.best.entry.score
        yield from ((score, draw) for draw in range(1, len(self.draws)))

    def ended(self, entries: list[Tried]) -> str | None:
        """Returns what of the budget is used up; None where nothing is."""
        minutes, longest = self.options.choose_minutes, max(entry.seconds for entry in entries)
        if minutes is not None and self.watch.elapsed + longest > 60.0 * minutes:
            return "minutes"
        return "tries" if len(entries) >= self.options.choose_tries else None

    def tried(self, score: str, draw: int) -> Trial:
        """Makes a try that may fail."""
        began = time.perf_counter()
        try:
            return self._made(score, draw)
        except (ModelError, CheckError) as err:
            return Trial(Tried(score, draw, None, time.perf_counter() - began, str(err)))

    def _made(self, score: str, draw: int) -> Trial:
        began = time.perf_counter()
        state = self.whole.anew(self.whole.state, self.notes)
        state.add(replace(self.known, data=self.draws[draw]))
        fresh = replace(self.whole, state=state, options=self._asking(score))
        job: ModelJob | Backend
        if self.alone:
            job, done = fresh, patterned(fresh)
        else:
            job = ModelJob(fresh, self.watch, self.decided)
            done = job.checked()
            self.decided = job.decided if self.decided is None else self.decided
        error = output_error(job.state, self.judged, WAY_OUT)
        return Trial(Tried(score, draw, error, time.perf_counter() - began), job, done)

    def _asking(self, score: str) -> PruneOptions:
        """Returns the options of one try; a score that is no name is the user's own."""
        if score == self._score():
            return self.options
        return replace(self.options, pattern_solver=score) if self.alone else replace(self.options, score=score)


def _dealt(
    data: CalibrationData, samples: int, most: int, signature: Signature, seed: int
) -> tuple[CalibrationData, list[CalibrationData]]:
    """Returns what judges, and the draws: as many as are asked for, or as there are samples for.

    Raises:
        OptionError: there are too few.
    """
    judges = min(samples, max(data.samples - most * samples, data.samples // JUDGES))
    left = data.samples - judges
    size, draws = min(samples, left), most
    if most > 1:
        size, draws = samples, min(most, left // samples)
    if draws < min(most, 2) or min(size, judges) < 1:
        raise OptionError(
            f"choose needs samples that are in no other draw: there are {data.samples} of the calibration data, and "
            f"{samples} are asked for; give more, or samples {max(data.samples // 3, 1)}"
        )
    judged, *parts = shared_out(data, [judges, *[size] * draws], signature, seed)
    if not all(part.batches for part in (judged, *parts)):
        raise OptionError("choose needs more batches of the model's fixed size; give more calibration data")
    return judged, parts
