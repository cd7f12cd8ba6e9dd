"""Killed at each point of writing and at random moments: the old or the new, whole, and the next run leaves nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from liar_opt.tools.dev.tables import kills
from liar_opt.tools.dev.tables.kills import Case, check, file_cases

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked, and killed by SIGKILL")
NAMES = [case.name for case in file_cases()]
REST = {"external data over one file", "one file over external data", "one file"}
"""What external data over external data, and a report, show as well."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.rest if n in REST else ()) for n in NAMES])
def test_files(name: str) -> None:
    case = next(c for c in file_cases() if c.name == name)
    outcome = check(case, moments=5)
    assert not outcome.problems
    assert outcome.points["old"] >= 5 and outcome.points["new"] >= 1
    assert outcome.points.total() + outcome.moments.total() == sum(
        outcome.points[k] + outcome.moments[k] for k in ("old", "new")
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("index", [0, 1])
def test_checkpoint_folders(index: int) -> None:
    outcome = check(list(kills.checkpoint_cases())[index], moments=5, every=5)
    assert not outcome.problems
    assert outcome.points["old"] and outcome.points["new"]


@pytest.mark.slow
def test_the_command() -> None:
    outcome = check(kills.command_case(), moments=5, every=9)
    assert not outcome.problems
    assert outcome.points["old"]


def test_the_check_can_fail() -> None:
    """A writer that truncates what was there, and one that leaves something behind."""

    def read(folder: Path) -> str:
        return {"old": "old", "new": "new"}[(folder / "a").read_text()]

    def truncates(folder: Path, new: bool) -> None:
        with (folder / "a").open("w") as stream:
            Path("/dev/null").open().close()
            stream.write("new" if new else "old")

    def leaves(folder: Path, new: bool) -> None:
        place = folder / f"a.{len(list(folder.iterdir()))}"
        place.write_text("new" if new else "old")
        place.replace(folder / "a")

    assert any("KeyError" in p for p in check(Case("truncates", truncates, read), 0).problems)
    assert any("behind the next run there is" in p for p in check(Case("leaves", leaves, read), 0).problems)
