"""Evaluation: one or more ONNX models on one task, on the same samples, the first of them the reference.

A task (`evaluation_tasks`) turns an evaluation set into outcomes: for each metric and model a function of rows, so that the
metric can be taken on the whole set and on draws of it. Each difference to the first model has a paired bootstrap interval.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.bootstrap import LEVEL, paired_difference
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.evaluation_data import Table
from liar_opt.runtime.evaluation_feeds import Candidate, EvaluationOptions, Progress, Run
from liar_opt.runtime.evaluation_tasks import FAITHFULNESS, TASKS, Outcome
from liar_opt.runtime.signatures import Signature, names


def evaluate(
    task: str, candidates: Sequence[Candidate], table: Table, options: EvaluationOptions, progress: Progress
) -> tuple[dict[str, Any], list[dict[str, NDArray[Any]]]]:
    """Evaluates models on a set; all differences are to the first.

    Args:
        task: a name in :data:`TASKS`.
        candidates: the models.
        table: the evaluation set.
        options: see :class:`EvaluationOptions`.
        progress: called with (stage, done, total).

    Returns:
        Plain data ("metrics" by name, each with "samples", "unit", "values" of all models and "differences" of all but the
        first; "source", "notes"), and the first feed of every model.

    Raises:
        OptionError: models, task, set and options do not fit each other.
    """
    if task not in TASKS:
        raise OptionError(f"task '{task}' is unknown; choose one of {names(TASKS)}")
    for name in options.metrics:
        if name not in TASKS[task].metrics:
            raise OptionError(f"metric '{name}' does not fit task '{task}'; it has {names(TASKS[task].metrics)}")
        if name in FAITHFULNESS and len(candidates) < 2:
            raise OptionError(f"metric '{name}' compares models with the first; give two or more")
    for option, value in (
        ("samples", options.samples),
        ("batch-size", options.batch_size),
        ("resamples", options.resamples),
        ("neighbours", options.neighbours),
        ("sequence-length", options.sequence_length),
    ):
        if value is not None and value < 1:
            raise OptionError(f"--{option} is {value}; it must be at least 1")
    if options.windows and task != "perplexity":
        raise OptionError(f"--window is for task 'perplexity', not '{task}'")
    if task != "perplexity":  # its samples are windows of the whole text
        table = table.drawn(options.samples, options.seed)
    run = Run(candidates, table, options, progress)
    _check_alike(run)
    outcomes = TASKS[task].measure(run)
    for name in options.metrics:
        if not any(_is_kind(name, found) for found in outcomes):
            raise OptionError(f"metric '{name}' does not fit the labels of {table.where}; it has {names(outcomes)}")
    if options.metrics:
        outcomes = {n: o for n, o in outcomes.items() if any(_is_kind(m, n) for m in options.metrics)}
    return {
        "metrics": {name: _figures(outcome, options) for name, outcome in outcomes.items()},
        "source": table.source,
        "level": LEVEL,
        "resamples": options.resamples,
        "notes": list(dict.fromkeys(run.notes)),
    }, run.first_feeds


def _is_kind(metric: str, found: str) -> bool:
    """Whether a metric with its parameters ("overlap@10") is the one of that name."""
    return re.fullmatch(rf"{re.escape(metric)}([@,].*)?", found) is not None


def _figures(outcome: Outcome, options: EvaluationOptions) -> dict[str, Any]:
    everything = np.arange(outcome.samples)
    first, *others = outcome.of
    intervals = [paired_difference(first, other, outcome.samples, options.resamples, options.seed) for other in others]
    return {
        "samples": outcome.samples,
        "unit": outcome.unit,
        "values": [statistic(everything) for statistic in outcome.of],
        "differences": [vars(interval) for interval in intervals],
    }


def _check_alike(run: Run) -> None:
    """Checks that all models take the same feeds and mean the same classes.

    Raises:
        OptionError: they do not.
    """
    first, *others = run.candidates
    signature, *rest = run.signatures

    def interface(one: Signature) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        # symbolic axes may have any name, and the caches of a pruned model are narrower
        fixed = {n: tuple(d if isinstance(d, int) else None for d in s.shape) for n, s in one.inputs.items()}
        return {n: (str(s.dtype), fixed[n]) for n, s in one.inputs.items() if n not in one.past}

    for other, its in zip(others, rest, strict=True):
        if interface(its) != interface(signature):
            differing = {n for n, _ in interface(its).items() ^ interface(signature).items()}
            raise OptionError(
                f"models '{first.name}' and '{other.name}' have different inputs ({names(sorted(differing))}); compare "
                "models of one interface"
            )
        if None not in (first.class_names, other.class_names) and first.class_names != other.class_names:
            raise OptionError(
                f"models '{first.name}' and '{other.name}' have different label maps ({names(first.class_names or ())} and "
                f"{names(other.class_names or ())}); compare models with one"
            )
