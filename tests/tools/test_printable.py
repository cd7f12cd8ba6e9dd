"""Nothing that a name holds reaches the terminal as a command to it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from liar_opt.tools import cli
from liar_opt.tools.printable import printable, printable_json

EVIL = {
    "\x1b]0;owned\x07": r"\x1b]0;owned\x07",
    "\x1b[2J": r"\x1b[2J",
    "\x9b2J": r"\x9b2J",
    "a\rb": r"a\x0db",
    "\u202egnp.exe": r"\u202egnp.exe",
    "\u2066\u200b\u200d\ufeff": r"\u2066\u200b\u200d\ufeff",
    "\u2028": r"\u2028",
    "\udc9b": r"\udc9b",
    "\U000e0041": r"\U000e0041",
    "\x7f\x00": r"\x7f\x00",
}
PLAIN = "encoder/layer.0/Größe 重み: 3\u00a0%"


@pytest.mark.parametrize("text", EVIL)
def test_what_a_terminal_would_obey(text: str) -> None:
    assert printable(f"{PLAIN}{text}.") == f"{PLAIN}{EVIL[text]}."
    assert printable("a\nb") == r"a\x0ab"
    assert printable(f"a\n\t{text}", keep="\n") == rf"a{chr(10)}\x09{EVIL[text]}"


def test_json_says_the_same() -> None:
    thing = {text: [text, PLAIN, {"deep": text}] for text in EVIL}
    written = printable_json(json.dumps(thing, ensure_ascii=False, indent=1))
    assert json.loads(written) == thing
    assert PLAIN in written
    assert not any(text in written for text in EVIL)
    written.encode("utf-8")


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A model whose nodes, tensors and file have such names, and whose products are partly left alone."""
    rng = np.random.default_rng(0)
    mark = "".join(text for text in EVIL if "\udc9b" not in text and "\x00" not in text)
    weights = {"up": (6, 40), "down": (40, 6), "odd": (6, 10)}
    nodes = [
        helper.make_node("MatMul", ["x", "up"], [f"h{mark}"], name=f"up{mark}"),
        helper.make_node("Relu", [f"h{mark}"], ["a"], name=f"act{mark}"),
        helper.make_node("MatMul", ["a", "down"], ["d"], name=f"down{mark}"),
        helper.make_node("MatMul", ["d", "odd"], ["o"], name=f"odd{mark}"),
        helper.make_node("Softmax", ["o"], ["p"], name=f"soft{mark}"),
        helper.make_node("MatMul", ["p", "back"], [f"y{mark}"], name=f"back{mark}"),
    ]
    ends = [helper.make_tensor_value_info(n, 1, ["b", "s", 6]) for n in ("x", f"y{mark}")]
    tensors = [
        numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n)
        for n, s in {**weights, "back": (10, 6)}.items()
    ]
    graph = helper.make_graph(nodes, f"g{mark}", ends[:1], ends[1:], tensors)
    path = tmp_path / "m\x1b[2J\u202e.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def is_harmless(text: str) -> bool:
    return not any(text_ in text for text_ in EVIL) and all(c == "\n" or c.isprintable() for c in text)


@pytest.mark.parametrize(
    "argv",
    [
        ["inspect", "MODEL"],
        ["inspect", "MODEL", "--explain"],
        ["MODEL", "--ffn", "0.5", "--explain", "--print-between", "--time-passes", "--no-latency"],
        ["MODEL", "--ffn", "0.5", "--dry-run"],
        ["MODEL", "--heads", "0.5"],  # refused
        ["MODEL", "--ffn", "0.5", "--mask-input", "\x1b[2J"],
        ["MODEL", "--ffn", "0.5", "--calibration", "\x1b[2J.npz"],
        ["MODEL", "--ffn", "0.5", "--score", "\x1b[2J"],
        ["MODEL", "\x1b[2J"],  # argparse
        ["missing\x1b[2J\udc9b.onnx"],
        ["eval", "MODEL", "--task", "\x1b[2J", "--data", "x\x1b[2J"],
        ["eval", "missing\x1b[2J.onnx", "--task", "perplexity", "--data", "x\x1b[2J.txt"],
    ],
)
def test_names_in_all_that_is_printed(evil: Path, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    cli.main([str(evil) if a == "MODEL" else a for a in argv])
    out, err = capsys.readouterr()
    assert out + err
    assert is_harmless(out)
    assert is_harmless(err)


def test_the_report_keeps_names(evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, page = tmp_path / "r.json", tmp_path / "r.html"
    argv = [str(evil), "--ffn", "0.5", "--no-latency", "--report", str(report), "--html", str(page)]
    assert cli.main([*argv, "-o", str(tmp_path / "o.onnx")]) == 0, capsys.readouterr().err
    groups = json.loads(report.read_text(encoding="utf-8"))["groups"]
    assert groups[0]["name"].startswith("down\x1b]0;owned\x07\x1b[2J\x9b2J")
    assert is_harmless(report.read_text(encoding="utf-8"))
    assert is_harmless(page.read_text(encoding="utf-8"))


def test_a_bug_shows_names_as_harmless(
    evil: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("\x1b[2J")

    monkeypatch.setattr("liar_opt.passes.find_groups.find_groups", fail)
    assert cli.main(["inspect", str(evil)]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert is_harmless(err)


def test_tables_of_such_names_are_aligned(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(evil)]) == 0
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("group"))
    column = lines[head].index("kind")
    assert [line[column:].split()[0] for line in lines[head + 2 : head + 3]] == ["ffn"]
