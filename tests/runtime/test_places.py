"""No result is written where something is read or another result goes, whatever it is called there."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.places import InputFile, Places


@pytest.fixture
def read(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "read.bin").write_text("precious")
    return tmp_path / "in" / "read.bin"


def places(read: Path) -> Places:
    def inputs() -> Iterator[InputFile]:
        yield read, "the data"
        yield read.with_name("gone"), "a file that is not there"

    return Places(inputs)


def test_a_file_that_is_read(read: Path, tmp_path: Path) -> None:
    (tmp_path / "hard").hardlink_to(read)
    (tmp_path / "link").symlink_to(read)
    (tmp_path / "folder").symlink_to(read.parent)
    for place in (
        read,
        tmp_path / "hard",
        tmp_path / "link",
        tmp_path / "folder" / "read.bin",
        read.parent / ".." / "hard",
    ):
        with pytest.raises(
            OptionError, match=r"^report '.*' is the data, a file that this command reads or writes as well"
        ):
            places(read).file(place, "report")
    places(read).file(read.with_name("other"), "report")
    places(read).file(read.with_name("gone"), "report")


def test_a_copy_is_another_file(read: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").write_text("precious")
    places(read).file(tmp_path / "copy", "report")
    with pytest.raises(OptionError, match=r"exists; give --force"):
        places(read).file(tmp_path / "copy", "report", replace=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
def test_what_is_no_file(read: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    os.mkfifo("pipe")
    (tmp_path / "link").symlink_to("elsewhere")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        for name, kind in (
            ("pipe", "pipe"),
            ("socket", "socket"),
            ("in", "folder"),
            ("link", "symbolic link to '.*elsewhere'"),
        ):
            with pytest.raises(OptionError, match=f"report '{name}' is a {kind}; give the path of "):
                places(read).file(Path(name), "report")
        with pytest.raises(OptionError, match="is a device; give the path of a file"):
            places(read).file(Path(os.devnull), "report")
        for name in ("pipe", "socket", "link"):
            with pytest.raises(OptionError, match=r"; give the path of a folder"):
                places(read).folder(Path(name), "output")


def test_two_results_in_one_place(read: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(read.parent)
    taken = places(read)
    taken.file(read.with_name("a"), "output")
    for again in (read.with_name("a"), tmp_path / "other" / "a", read.parent / ".." / "in" / "a"):
        with pytest.raises(OptionError, match=r"report '.*' is the output, which this command reads or writes as well"):
            taken.file(again, "report")
    taken.file(read.with_name("b"), "report")


def test_folders(read: Path, tmp_path: Path) -> None:
    taken = places(read)
    for folder in (read.parent, tmp_path):
        with pytest.raises(OptionError, match=r"is the input, or holds it \('.*read.bin', the data\)"):
            taken.folder(folder, "output")
    taken.folder(tmp_path / "out", "output")
    for other in (tmp_path / "out", read.parent / ".." / "out"):
        with pytest.raises(OptionError, match=r"resume folder '.*' is the output"):
            taken.folder(other, "resume folder")
    (tmp_path / "out").mkdir()
    with pytest.raises(OptionError, match=r"report '.*r.json' is within the output"):
        taken.file(tmp_path / "out" / "r.json", "report")
    with pytest.raises(OptionError, match="is a file; give the path of a folder"):
        Places().folder(read, "output")


def test_a_link_within_the_input_folder(read: Path, tmp_path: Path) -> None:
    """As the cache of the hub has them: what is replaced would be the blob, or the folder of the link."""
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "weights"
    link.symlink_to(read)
    for folder in (tmp_path / "snapshot", read.parent):
        with pytest.raises(OptionError, match="or holds it"):
            places(link).folder(folder, "output")
    with pytest.raises(OptionError, match="is the data"):
        places(link).file(read, "output")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"cannot be written \((File name too long|embedded null)"):
        Places().file(tmp_path / name, "output")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for take in (Places().file, Places().folder):
        with pytest.raises(OptionError, match=r"folder '.*none' of output '.*' does not exist; make it first"):
            take(tmp_path / "none" / "x", "output")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_that_leads_to_itself(read: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for take in (places(read).file, places(read).folder):
        with pytest.raises(OptionError, match=r"is a symbolic link"):
            take(tmp_path / "loop", "output")


def test_a_name_that_leaves_no_room_beside_it(read: Path, tmp_path: Path) -> None:
    places(read).file(tmp_path / ("n" * 220), "output")
    for name in ("n" * 240, "é" * 120, "n" * 300):
        with pytest.raises(OptionError, match=r"cannot be written \(File name too long\); choose another path"):
            places(read).file(tmp_path / name, "output")
