"""The commands that stand above the figures of the documents are commands that there are."""

import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from liar_opt.tools.dev import bench
from liar_opt.tools.dev.harness import HERE, Cells, parser_of
from liar_opt.tools.dev.tables.testbed_tables import Line, standalone, trends

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPT = re.compile(r"tools/dev/[\w./-]+(?<![.,])")
COMMAND = re.compile(r"\btools/dev/bench\.py ([^`]*)`")
NAMED = sorted({" ".join(c.split()) for path in DOCUMENTS for c in COMMAND.findall(path.read_text(encoding="utf-8"))})


def test_the_documents_name_what_there_is() -> None:
    files = {name for path in DOCUMENTS for name in SCRIPT.findall(path.read_text(encoding="utf-8"))}
    assert len(NAMED) > 20
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("command", NAMED)
def test_a_command_of_the_documents_is_understood(command: str) -> None:
    table, *options = shlex.split(command)
    (module,) = (name for name in bench.TABLES if name.rpartition(".")[2].replace("_", "-") == table)
    parser_of(module).parse_args(options)


@pytest.mark.parametrize("module", bench.TABLES)
def test_each_table_says_how_it_is_called(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = module.rpartition(".")[2].replace("_", "-")
    with pytest.raises(SystemExit) as ended:
        bench.main([name, "--help"])
    assert ended.value.code == 0
    assert f"python tools/dev/bench.py {name}" in capsys.readouterr().out
    assert callable(sys.modules[f"liar_opt.tools.dev.{module}"].main)


def test_every_module_of_tables_is_a_table_or_a_part_of_one() -> None:
    assert {p.stem for p in (HERE / "tables").glob("*.py")} - {m.rpartition(".")[2] for m in bench.TABLES} == {
        "testbed_tables"
    }


def test_cells_are_made_once(tmp_path: Path) -> None:
    path, made = tmp_path / "cells.json", []

    def make() -> float:
        made.append(1)
        return 0.5

    assert [Cells(path).made("a", make), Cells(path).made("a", make), Cells(None).made("a", make)] == [0.5] * 3
    assert len(made) == 2 and path.read_text() == '{\n "a": 0.5\n}'


def test_a_chart_of_its_own() -> None:
    drawn = trends([Line("a < b", [(3.0, 1.0), (2.0, 0.9)], 0), Line("c", [(3.0, 1.0), (2.0, 0.5)], 1)], "t", "x", "y")
    root = ElementTree.fromstring(standalone(drawn))
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert root.tag == f"{{{space['svg']}}}svg"
    assert len(root.findall(".//svg:polyline", space)) == 2
    assert "a < b" in [text.text for text in root.iterfind(".//svg:text", space)]
    assert len(root.findall(".//svg:g/svg:circle", space)) == 4
