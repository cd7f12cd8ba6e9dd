"""What is written appears whole or not at all, and what killed runs left goes, nothing else."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from liar_opt.runtime import whole_file as module
from liar_opt.runtime.whole_file import (
    patient_file,
    replace_file,
    sweep,
    system_errors,
    temporary_file,
    whole_file,
    whole_folder,
    write_whole,
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="no such files, locks or signals there")


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_a_file_is_replaced_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    write_whole(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~module._umask()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_under_code_that_does_not_survive_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    with patient_file(tmp_path / "a.pt") as stream:
        torch.save(torch.ones(1000), stream)
    assert torch.load(tmp_path / "a.pt").sum() == 1000
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: opened(Path("/dev/full"), mode, buffering=0))
    with pytest.raises(OSError, match="No space left"), patient_file(tmp_path / "b.pt") as stream:
        torch.save(torch.ones(1000), stream)
    assert names(tmp_path) == ["a.pt"]


def test_an_error_of_the_system_that_a_library_tells(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, system_errors(tmp_path):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(ZeroDivisionError), system_errors(tmp_path):
        raise ZeroDivisionError


@posix
def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("precious")
    (tmp_path / "nowhere").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    for name, kind in (("link", "symbolic link"), ("nowhere", "symbolic link"), ("pipe", "pipe"), ("folder", "folder")):
        with pytest.raises(OSError, match=f"it is a {kind}"):
            write_whole(tmp_path / name, "new")
    for name in ("link", "pipe", "precious"):
        with pytest.raises(OSError, match="it is a "), whole_folder(tmp_path / name):
            pass
    assert names(tmp_path) == before
    assert (tmp_path / "precious").read_text() == "precious" and (tmp_path / "link").is_symlink()


@posix
def test_a_link_that_comes_while_the_file_is_written(tmp_path: Path) -> None:
    path, target = tmp_path / "a.txt", tmp_path / "target"
    target.write_text("precious")
    with pytest.raises(OSError, match="it is a symbolic link"), whole_file(path) as temporary:
        temporary.write_text("new")
        path.symlink_to(target)
    assert path.is_symlink() and target.read_text() == "precious"


# ---------------------------------------------------------------------------------------------------- what was left


@posix
def test_what_a_killed_run_left_goes(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from liar_opt.runtime.whole_file import whole_file, whole_folder\n"
        "with whole_file(Path(sys.argv[1]) / 'a.txt') as file, whole_folder(Path(sys.argv[1]) / 'b') as folder:\n"
        "    file.write_text('half')\n    (folder / 'c').write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 3
    write_whole(tmp_path / "other.txt", "new")  # of another name: it is the folder that counts
    assert names(tmp_path) == ["other.txt"]


@posix
def test_nothing_else_goes(tmp_path: Path) -> None:
    other = [".a.txt.abcdefgh.tmp", "a.txt.abcdefgh.liar-opt.tmp", ".a.txt.liar-opt.tmp", ".x.ABCDEFGH.liar-opt.tmp"]
    for name in other:
        (tmp_path / name).write_text("precious")
    (tmp_path / ".a.abcdefgh.liar-opt.tmp").symlink_to(other[0])
    os.mkfifo(tmp_path / ".b.abcdefgh.liar-opt.tmp")
    with temporary_file(tmp_path / "alive.txt") as alive:
        alive.write_text("half")
        before = names(tmp_path)
        sweep(tmp_path)  # in this process
        subprocess.run(
            [sys.executable, "-c", "import sys, pathlib\nfrom liar_opt.runtime.whole_file import sweep\n"
             "sweep(pathlib.Path(sys.argv[1]))", str(tmp_path)], check=True,
        )  # fmt: skip
        assert names(tmp_path) == before
        assert alive.name in before
    sweep(tmp_path / "none")


# ------------------------------------------------------------------------------------------------ a file and its data


def pair(folder: Path, number: int) -> None:
    """Writes a file with data beside it."""
    path, place = folder / "m", folder / f"d{number}"
    with temporary_file(path) as file, temporary_file(path) as data:
        file.write_text(f"of d{number}")
        data.write_text(f"data {number}")
        replace_file(
            file, path, (data, place), [p for p in folder.glob("d?") if p.name in path.read_text()] if number else ()
        )


def test_data_comes_before_its_file_and_the_old_goes_behind(tmp_path: Path) -> None:
    (tmp_path / "d9").write_text("precious")
    for number in range(3):
        pair(tmp_path, number)
        assert names(tmp_path) == ["d9", f"d{number}", "m"] or names(tmp_path) == [f"d{number}", "d9", "m"]
    assert (tmp_path / "m").read_text() == "of d2" and (tmp_path / "d2").read_text() == "data 2"


def test_a_file_that_cannot_be_moved_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path, 0)
    move = Path.replace

    def second_fails(self: Path, target: Path) -> Path:
        if target.name == "m":
            raise OSError(5, "Input/output error")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(OSError, match="Input/output"):
        pair(tmp_path, 1)
    assert names(tmp_path) == ["d0", "m"] and (tmp_path / "m").read_text() == "of d0"


@posix
@pytest.mark.parametrize(
    ("moved", "touched", "left"),
    [
        ("before", None, "old"),
        ("after", None, "new"),
        ("other", None, "both"),
        ("before", "new", "both"),
        ("after", "old", "both"),
    ],
)
def test_a_note_of_a_killed_run(moved: str, touched: str | None, left: str, tmp_path: Path) -> None:
    """The new data goes where the file is still the one before, the old where it is the new one; else both stay."""
    for name in ("old", "new", "before", "after", "other"):
        (tmp_path / name).write_text(name)
    note = {
        "file": "m",
        "before": module._identity(tmp_path / "before"),
        "after": module._identity(tmp_path / "after"),
        "new": {"new": module._identity(tmp_path / "new")},
        "old": {"old": module._identity(tmp_path / "old"), "../old": module._identity(tmp_path / "old")},
    }
    (tmp_path / moved).rename(tmp_path / "m")
    if touched is not None:
        (tmp_path / touched).write_text("somebody else's")
    (tmp_path / ".m.abcdefgh.liar-opt.pending").write_text(json.dumps(note))
    sweep(tmp_path)
    there = {p.name for p in tmp_path.iterdir()}
    assert there & {"old", "new"} == ({"old", "new"} if left == "both" else {left})
    assert "m" in there and not any(name.startswith(".") for name in there)


@posix
def test_a_note_that_was_not_finished(tmp_path: Path) -> None:
    (tmp_path / ".m.abcdefgh.liar-opt.pending").write_text('{"file": "m", "be')
    (tmp_path / "m").write_text("old")
    sweep(tmp_path)
    assert names(tmp_path) == ["m"]


# ----------------------------------------------------------------------------------------------------------- folders


@pytest.fixture(params=[True, False], ids=["at once", "in two steps"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)


@pytest.mark.usefixtures("exchange")
def test_a_folder_is_replaced_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for number in range(2):
        with whole_folder(path) as temporary:
            (temporary / f"file{number}").write_text("whole")
        assert names(tmp_path) == ["f", f"f/file{number}"]
    with pytest.raises(ZeroDivisionError), whole_folder(path) as temporary:
        (temporary / "file2").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["f", "f/file1"]


@pytest.mark.usefixtures("exchange")
def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with whole_folder(tmp_path / "f") as temporary:
        (temporary / "file").write_text("whole")
    assert names(tmp_path) == ["f", "f/file"]


@posix
def test_a_folder_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / ".f.abcdefgh.liar-opt.old"
    aside.mkdir()
    (aside / "file").write_text("old")
    sweep(tmp_path)
    assert names(tmp_path) == ["f", "f/file"]
    aside.mkdir()
    (aside / "file").write_text("older")
    sweep(tmp_path)  # it has a successor
    assert names(tmp_path) == ["f", "f/file"] and (tmp_path / "f" / "file").read_text() == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is a call of Linux")
def test_linux_exchanges_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not module._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert names(tmp_path) == ["a", "a/b", "b", "b/a"]
    with pytest.raises(OSError, match="No such file"):
        module._exchange(tmp_path / "a", tmp_path / "none")
