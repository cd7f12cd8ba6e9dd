"""What `passes.try_choices` may choose among, and what the report says of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from liar_opt.passes.base import Finding
from liar_opt.passes.cut_vocabulary import words_alone
from liar_opt.passes.gradient_scores import GRADIENT_SCORES
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.registry import lookup
from liar_opt.passes.scores import SCORES
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.patterns import SOLVERS
from liar_opt.runtime.ranks import current

WORDS = ("score", "samples")
SLOW = ("swaps", "fista")
EXCLUDED = {
    "max_drop": "decides widths by pruning, by one score and one draw; give a sparsity or a target",
    "passes": "says the score itself; leave it out",
    "dry_run": "cuts nothing that could be compared; leave it out",
    "resume": "keeps one run, and choose makes several; leave it out",
    "tune": "would train each try; leave it out, and tune the result with a sparsity of 0",
    "blocks": "go first; leave them out first, and choose on the result",
    "experts": "go first; leave them out first, and choose on the result",
    "backend": "other than torch does not go with choose; leave it out",
}
"""What does not go with a choice, and why."""


@dataclass(frozen=True)
class Tried:
    """One try, as the report has it.

    Attributes:
        score: by which channels were taken; of a pattern alone its solver.
        draw: the number of the draw of the calibration samples, from 0.
        error: relative squared difference of the output on rows that no try was fitted to; None where it failed.
        seconds: that it took.
        why: it failed.
    """

    score: str
    draw: int
    error: float | None
    seconds: float
    why: str | None = None


@dataclass(frozen=True)
class ComparedTries(Finding):
    """What was chosen, as the report has it.

    Attributes:
        among: "score", "samples".
        chosen: the place of the best in ``tried``; 0 is what is done without the option.
        tried: in the order of the tries.
        samples: of each draw.
        judged: samples on which all were compared.
        budget: tries, and minutes where these are limited.
        stopped: "tries", "minutes", or "all" where nothing was left to try.
    """

    by: ClassVar[str] = "prune_chosen"
    among: list[str]
    chosen: int
    tried: list[Tried]
    samples: int
    judged: int
    budget: dict[str, float]
    stopped: str


def words_of(options: PruneOptions) -> tuple[str, ...]:
    """Returns what is chosen among, in the order of ``WORDS``.

    Raises:
        OptionError: it is not understood.
    """
    given = [word.strip() for word in (options.choose or "").split(",")]
    for word in given:
        lookup("choose", dict.fromkeys(WORDS), word)
    return tuple(word for word in WORDS if word in given)


def require_choice(options: PruneOptions, calibration: Any) -> None:
    """Checks what can be said before the model is opened.

    Raises:
        OptionError: it is not understood, or another option does not go with it.
    """
    if options.choose is None:
        for name in ("choose_tries", "choose_minutes"):
            if options.given(name):
                raise OptionError(f"{name.replace('_', '-')} is the budget of --choose; give score, samples, or both there")
        return
    words_of(options)
    if options.choose_tries < 2:
        raise OptionError(f"choose-tries {options.choose_tries} compares nothing; give 2 or more")
    if options.choose_minutes is not None and not 0 < options.choose_minutes < math.inf:
        raise OptionError(f"choose-minutes {options.choose_minutes:g} is no time to try in; give a number above zero")
    if calibration is None:
        raise OptionError("choose judges by calibration data; give some (--calibration texts.txt)")
    if words_alone(options):
        raise OptionError("choose tries cuts of widths or patterns, and words alone are none; give a sparsity beside them")
    if current().size > 1:
        raise OptionError("choose makes its tries in one process; run it without torchrun")
    for name, why in EXCLUDED.items():
        if options.given(name):
            raise OptionError(f"{name.replace('_', '-')} {why} (choose tries whole cuts)")


def draws_of(words: tuple[str, ...], tries: int) -> int:
    """Returns how many draws of the samples so many tries may look at; one part more is read, which judges."""
    return tries if words == ("samples",) else tries - tries // 2 if "samples" in words else 1


def scores_of(options: PruneOptions, alone: bool) -> Iterator[str]:
    """Yields the names to try beside that which was asked for; what needs labels or gradients is none, nor is chance.

    Those that take minutes come last.

    Args:
        options: of the run.
        alone: whether a pattern is all that is asked for, whose solvers these are.
    """
    asked, table = (options.pattern_solver, tuple(SOLVERS)) if alone else (options.score, tuple(SCORES))
    names = [name for name in table if name not in (asked, "random", *GRADIENT_SCORES)]
    yield from sorted(names, key=lambda name: name in SLOW)
