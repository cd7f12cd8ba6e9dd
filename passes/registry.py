"""Scores and repairs by name, or by a user's own function."""

from collections.abc import Mapping
from typing import TypeVar

from liar_opt.passes.repairs import REPAIRS, Repair, RepairFunction, repair_of_function
from liar_opt.passes.scores import SCORES, Score, ScoreFunction, score_of_function
from liar_opt.runtime.errors import OptionError

Entry = TypeVar("Entry")


def lookup(kind: str, table: Mapping[str, Entry], name: str) -> Entry:
    """Returns an entry by name.

    Raises:
        OptionError: there is none of that name; the names are listed.
    """
    if name not in table:
        raise OptionError(f"{kind} '{name}' is unknown; choose one of {', '.join(table)}")
    return table[name]


def score_named(score: str | ScoreFunction) -> Score:
    """Returns a score by name, or made of a user's function.

    Raises:
        OptionError: there is none of that name.
    """
    return score_of_function(score) if callable(score) else lookup("score", SCORES, score)


def repair_named(repair: str | RepairFunction) -> Repair:
    """Returns a repair by name, or made of a user's function.

    Raises:
        OptionError: there is none of that name.
    """
    return repair_of_function(repair) if callable(repair) else lookup("repair", REPAIRS, repair)
