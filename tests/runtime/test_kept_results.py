"""What two runs at once do about one result, and what a killed one leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liar_opt.runtime import kept_results, one_at_a_time
from liar_opt.runtime.kept_results import file_of, load_result, store_result
from liar_opt.runtime.one_at_a_time import Held

HOLD = """
import sys, time
from pathlib import Path
from liar_opt.runtime.one_at_a_time import one_at_a_time
place = Path(sys.argv[1])
with one_at_a_time(place, lambda: None):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    place.write_text("measured")
"""


def holder(place: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that makes a result, which has begun."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_what_differs_has_another_name() -> None:
    names = {file_of("curves", given, ".npz") for given in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 3})}
    assert len(names) == 2 and all(name.parent.name == "curves" and name.suffix == ".npz" for name in names)


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert load_result(tmp_path / "none", lambda stream: stream.read()) is None
    store_result(tmp_path / "a" / "b.txt", lambda stream: stream.write(b"text"))
    assert load_result(tmp_path / "a" / "b.txt", lambda stream: stream.read()) == b"text"
    assert load_result(tmp_path / "a" / "b.txt", lambda stream: int(stream.read())) is None
    store_result(tmp_path / "a" / "b.txt" / "c.txt", lambda stream: stream.write(b"text"))  # cannot be written


def test_the_code_of_folders_in_folders_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept_results, "__file__", str(tmp_path / "runtime" / "kept_results.py"))
    rules = tmp_path / "frontend" / "rules" / "meaning.py"
    rules.parent.mkdir(parents=True)
    found = set()
    for text in ("a = 1", "a = 2"):
        rules.write_text(text)
        found.add(kept_results.code_digest.__wrapped__())
    assert len(found) == 2


def test_the_second_waits_and_finds_the_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(one_at_a_time, "ASKED_EVERY", 0.1)
    place, said = tmp_path / "result", []
    first = holder(place, 0.5)
    with one_at_a_time.one_at_a_time(place, lambda: said.append("waits")):
        assert place.read_text() == "measured" and said
    assert first.wait() == 0
    assert list(tmp_path.iterdir()) == [place]


def test_a_killed_run_keeps_nobody_out(tmp_path: Path) -> None:
    first = holder(tmp_path / "result", 60)
    with pytest.raises(BlockingIOError, match="is held by another process"):
        Held(tmp_path / "result.lock")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["result.lock"]
    began = time.perf_counter()
    with one_at_a_time.one_at_a_time(tmp_path / "result", lambda: None):
        pass
    assert time.perf_counter() - began < 5 and list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_nobody_is_kept_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        with one_at_a_time.one_at_a_time(tmp_path / "file" / "result", lambda: None):
            pass
