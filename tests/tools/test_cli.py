"""The command: what it prints, what it writes, and how it refuses. Refusals: one line, the right code, no file left."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zoo

from liar_opt import __main__ as start
from liar_opt.frontend import weight_files
from liar_opt.runtime import compare
from liar_opt.tools import cli, cli_options

WIDTH, HIDDEN, WORDS = 6, 40, 23
TEXT = f"""
<ir_version: 8, opset_import: ["" : 17]>
ffn (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask) => (float[batch, sequence, {WIDTH}] y) {{
    x = Gather(table, input_ids)
    h = MatMul(x, up)
    a = Relu(h)
    d = MatMul(a, down)
    y = Add(x, d)
}}
"""


FLOATS = f"""
<ir_version: 8, opset_import: ["" : 17]>
ffn (float[batch, sequence, {WIDTH}] x) => (float[batch, sequence, {WIDTH}] y) {{
    h = MatMul(x, up)
    a = Relu(h)
    y = MatMul(a, down)
}}
"""


def make(path: Path, text: str = TEXT, **weights: np.ndarray[Any, Any]) -> Path:
    """Writes a graph given as ONNX text, with seeded weights."""
    rng = np.random.default_rng(0)
    shapes = {"table": (WORDS, WIDTH), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items() if name in text}
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in {**drawn, **weights}.items())
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path / "model.onnx")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures latency for no longer than it takes."""
    from liar_opt.passes import onnx_backend
    from liar_opt.runtime.latency import measure_latency

    monkeypatch.setattr(onnx_backend, "measure_latency", lambda s, f, **_: measure_latency(s, f, budget=0.0, least=1))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


Refuse = Callable[..., None]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refuse:
    """Runs the command and expects one line with the needles, the code, and every file as it was."""

    def check(*argv: object, needles: tuple[str, ...], code: int = 2, warned: bool = False) -> None:
        before = listing(tmp_path)
        assert run(*argv) == code
        shown = capsys.readouterr()
        assert shown.out == ""
        lines = [line for line in shown.err.splitlines() if not (warned and line.startswith("liar-opt: warning: "))]
        assert len(lines) == 1, shown.err
        assert lines[0].startswith("liar-opt: ")
        for needle in needles:
            assert needle in lines[0]
        assert listing(tmp_path) == before

    return check


# ----------------------------------------------------------------------------------------------------- the main job


def test_prune(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    assert run(model, "--ffn", 0.5, "--samples", 16) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    output = model.with_name("model.liar.onnx")
    assert lines[-1].startswith("pruned: ")
    assert lines[-1].endswith(str(output))
    for needle in ("parameters", "bytes on disk", "FLOPs", "latency", "cosine of 'y'", "relative RMS", "exactness"):
        assert needle in shown.out
    assert "input_ids [8, 64]" in shown.out  # the batch that was timed
    assert "liar-opt: warning: no --calibration" in shown.err
    assert model.read_bytes() == before
    pruned = {t.name: tuple(t.dims) for t in onnx.load(output).graph.initializer}
    assert (WIDTH, 24) in pruned.values()  # half of 40 is 20, rounded to a multiple of 8
    assert sorted(p.name for p in model.parent.iterdir()) == ["model.liar.onnx", "model.onnx"]


@pytest.mark.parametrize("command", [[], ["prune"]])
def test_the_command_may_be_spelt_out(model: Path, tmp_path: Path, command: list[str]) -> None:
    assert run(*command, model, "-o", tmp_path / "out.onnx", "--quiet", "--samples", 8) == 0
    assert (tmp_path / "out.onnx").is_file()


def test_quiet_leaves_the_last_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--quiet", "--samples", 8) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_report(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "r.json"
    assert run(model, "--samples", 8, "--seed", 3, "--report", report) == 0
    first = json.loads(report.read_text())
    assert first["schema"] == 1
    assert first["seed"] == 3
    assert first["options"]["calibration"]["samples"] == 8
    assert first["output"]["path"] == str(tmp_path / "model.liar.onnx")
    assert first["after"]["file_bytes"] == (tmp_path / "model.liar.onnx").stat().st_size
    assert first["groups"][0]["after"] < first["groups"][0]["before"] == HIDDEN
    assert run(model, "--samples", 4, "--report", report, "--force", "--no-latency") == 0
    second = json.loads(report.read_text())  # replaced, not appended to
    assert second["options"]["calibration"]["samples"] == 4
    assert "latency" not in second


def test_an_earlier_report_is_replaced_without_force(model: Path, tmp_path: Path) -> None:
    for name in ("one.onnx", "two.onnx"):
        assert run(model, "--samples", 4, "-o", tmp_path / name, "--report", tmp_path / "r.json", "--quiet") == 0
    assert json.loads((tmp_path / "r.json").read_text())["output"]["path"].endswith("two.onnx")


def test_dry_run(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--dry-run", "--ffn", 0.5, "--report", tmp_path / "r.json") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    row = next(line for line in shown.out.splitlines() if " ffn " in line).split()
    assert row[1:] == ["ffn", "40", "24", "60.0", "%"]
    assert shown.out.splitlines()[-1].startswith("dry run: ")
    assert not (tmp_path / "model.liar.onnx").exists()
    assert json.loads((tmp_path / "r.json").read_text())["groups"][0]["after"] == 24


@pytest.mark.parametrize("argv", [["--dry-run"], ["--samples", "4"]])
def test_ratios_that_round_to_nothing_are_refused(refuse: Refuse, model: Path, argv: list[str]) -> None:
    refuse(model, "--ffn", 0.05, *argv, needles=("the ratios round to nothing", "--multiple-of"))


def test_sequences_beyond_the_model(refuse: Refuse, tmp_path: Path) -> None:
    text = TEXT.replace("[batch, sequence]", "[2, sequence]").replace("x = Gather", "e = Gather")
    text = text.replace("h = MatMul", "x = Add(e, places)\n    h = MatMul").replace(
        "[batch, sequence, 6]", "[2, sequence, 6]"
    )
    path = make(tmp_path / "model.onnx", text, places=np.ones((2, 13, WIDTH), np.float32))
    refuse(path, "--samples", 4, needles=("fails on the calibration data", "sequence length"), warned=True)


def test_explain(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--explain", "--samples", 8) == 0
    out = capsys.readouterr().out
    for needle in ("error: none", "error: bias", "error: repair", "not pruned, because"):
        assert needle in out


def test_time_and_print_between(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--time-passes", "--print-between", "--samples", 8) == 0
    shown = capsys.readouterr()
    for name in ("normalise-graph", "find-groups", "allocate-widths", "prune-groups", "verify-model"):
        assert f"// after {name}:" in shown.err
        assert name in shown.out


def test_same_seed_same_file(model: Path, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        assert run(model, "--samples", 8, "--seed", 5, "-o", tmp_path / name, "--quiet") == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_transformer_with_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = zoo.ready(next(c for c in zoo.every_case() if c.name == "bert-torchscript-eager-dynamic"))
    texts = tmp_path / "texts.txt"
    words = "one two three four five one two".split()
    texts.write_text("\n".join(" ".join(w for j, w in enumerate(words) if i >> j & 1) for i in range(64, 128)))
    argv = [built.path, "-o", tmp_path / "out.onnx", "--calibration", texts, "--tokenizer", tokenizer(tmp_path / "t")]
    assert run(*argv, "--ffn", 0.5, "--heads", 0.4, "--explain") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "texts.txt" in shown.out
    kinds = [line.split()[1] for line in shown.out.splitlines() if line.startswith("/") and " % " in line]
    assert sorted(kinds) == ["ffn", "ffn", "heads", "heads"]


# ---------------------------------------------------------------------------------------------------------- inspect


def test_inspect(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", model, "--report", tmp_path / "r.json") == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if " ffn " in line).split()
    assert row[1:5] == ["ffn", "40", "1", "480"]  # kind, count, block width, parameters
    assert "not pruned, because" in out
    assert out.splitlines()[-1].startswith("1 groups hold 77.7 % of 618 parameters; ")
    assert json.loads((tmp_path / "r.json").read_text())["prunable_parameters"] == 480


def test_inspect_without_groups_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", make(tmp_path / "model.onnx", NOTHING), "--explain") == 0
    out = capsys.readouterr().out
    assert "not pruned, because" in out
    assert out.splitlines()[-1].startswith("no prunable group: ")


def test_a_file_called_like_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "inspect")
    monkeypatch.chdir(tmp_path)
    assert run("./inspect", "--samples", 8) == 0
    assert run("inspect", "inspect") == 0
    assert (tmp_path / "inspect.liar.onnx").is_file()


# ----------------------------------------------------------------------------------------------- options that print


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    for group in ("model:", "pruning:", "calibration:", "checks:", "output:"):
        assert f"\n{group}" in out
    assert "(default: 512)" in out
    assert "None" not in out
    assert "``" not in out


@pytest.mark.parametrize("command", ["inspect", "demo", "prune"])
def test_help_of_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "usage: liar-opt" in capsys.readouterr().out


def test_every_option_of_prune_has_help() -> None:
    for command in cli_options.COMMANDS:
        for action in cli_options.parser_of(command)._actions:
            assert action.help, action.option_strings


def test_version_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    import liar_opt

    assert run("--version") == 0
    assert capsys.readouterr().out == f"liar-opt {liar_opt.__version__}\n"
    assert run("--list-passes") == 0
    names = [line.split("{")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [
        "normalise-graph",
        "find-groups",
        "measure-curves",
        "allocate-widths",
        "meet-target",
        "limit-drop",
        "search-widths",
        "prune-groups",
        "verify-model",
    ]


def test_help_does_not_import_what_is_slow() -> None:
    code = (
        "import sys; from liar_opt.tools.cli import main; main(['--help']);"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no shell that closes streams")
def test_streams_that_are_closed(model: Path, tmp_path: Path) -> None:
    """The result, which is opened later, must not get the number of one of them."""
    output = tmp_path / "out.onnx"
    command = f"'{sys.executable}' -m liar_opt '{model}' -o '{output}' --samples 4 --no-latency <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command]).returncode == 0
    onnx.checker.check_model(onnx.load(output))
    assert subprocess.run(["sh", "-c", command]).returncode == 2  # it exists


@pytest.mark.skipif(sys.platform == "win32", reason="names are no bytes there")
def test_names_that_a_terminal_or_onnx_cannot_take(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out\N{EURO SIGN}.onnx"
    command = [sys.executable, "-m", "liar_opt", str(model), "-o", str(output), "--samples", "4", "--no-latency"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = subprocess.run(command, capture_output=True, text=True, env=ascii_only)
    assert found.returncode == 0, found.stderr
    assert found.stdout.endswith("out\\u20ac.onnx\n") and output.is_file()
    no_text = model.with_name("model\udcff.onnx")
    shutil.copy(model, no_text)
    refuse(no_text, needles=("is no UTF-8 text", "rename it"))


def test_the_installed_script(model: Path) -> None:
    script = Path(sys.executable).parent / "liar-opt"
    if not script.is_file():
        pytest.skip("liar-opt is not installed in this environment")
    done = subprocess.run([script, model, "--samples", "8", "--no-latency"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("model.liar.onnx")
    assert subprocess.run([sys.executable, "-m", "liar_opt", "nothing.onnx"], capture_output=True).returncode == 2


# ------------------------------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        ([], "required: model.onnx"),
        (["model.onnx", "--nonsense"], "--nonsense"),
        (["model.onnx", "--ffn"], "--ffn"),
        (["model.onnx", "--ffn", "half"], "'half'"),
        (["model.onnx", "--score", "best"], "'best'"),
        (["model.onnx", "--provider", "tpu"], "'tpu'"),
        (["model.onnx", "--seed", "-1"], "-1 is negative"),
        (["model.onnx", "--sampl", "3"], "--sampl"),  # no abbreviations: a new option would change their meaning
        (["--quiet", "inspect", "model.onnx"], "the command comes first: liar-opt inspect"),
        (["inspect"], "required: model.onnx"),
        (["demo", "--folder"], "--folder"),
    ],
)
def test_wrong_usage(refuse: Refuse, argv: list[str], needle: str) -> None:
    refuse(*argv, needles=(needle,))


@pytest.mark.parametrize("ratio", ["1", "1.5", "-0.1", "nan"])
@pytest.mark.parametrize("option", ["--sparsity", "--ffn", "--heads"])
def test_a_ratio_outside_its_range(refuse: Refuse, model: Path, option: str, ratio: str) -> None:
    refuse(model, f"{option}={ratio}", needles=(option[2:], "outside [0, 1)"))


def test_a_ratio_that_would_empty_a_group(refuse: Refuse, model: Path) -> None:
    refuse(model, "--ffn", 0.99, needles=("0.99 would empty group", "the most is 0.8"))


@pytest.mark.parametrize(
    ("option", "value", "shown"),
    [("--target", "params=0.8x", "target params=0.8x: "), ("--max-drop", "20%", "max-drop 20%: ")],
)
def test_goals(
    option: str, value: str, shown: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    options = ("--multiple-of", 1, "--samples", 64, "--no-latency", "--report", report)
    assert run(model, option, value, *options) == 0
    assert shown in capsys.readouterr().out
    target = json.loads(report.read_text())["target"]
    assert 0 < target["found"] <= target["wanted"] * 1.02


def test_goals_that_are_none(refuse: Refuse, model: Path) -> None:
    refuse(model, "--target", "fast", needles=("target 'fast' is not understood", "latency="))
    refuse(model, "--target", "size=0.5x", "--ffn", 0.5, needles=("exclude each other",))
    refuse(model, "--target", "params=0.01x", needles=("cannot be reached", "the best is"))
    refuse(model, "--max-drop", "none", needles=("max-drop 'none'", "1%"))


def test_both_forms_of_ratios(refuse: Refuse, model: Path) -> None:
    refuse(model, "--ffn", 0.5, "--sparsity", 0.5, needles=("exclude each other",))


def test_a_kind_that_is_not_there(refuse: Refuse, model: Path) -> None:
    refuse(model, "--heads", 0.5, needles=("no prunable group of kind 'heads'", "liar-opt inspect"))


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["--ridge=-1"], "ridge -1 is negative"),
        (["--samples", "0"], "'samples' is 0"),
        (["--batch-size", "0"], "'batch_size' is 0"),
        (["--multiple-of", "0"], "multiple-of 0"),
        (["--mask-input", "nobody"], "'nobody'"),
    ],
)
def test_options_out_of_range(refuse: Refuse, model: Path, argv: list[str], needle: str) -> None:
    refuse(model, *argv, needles=(needle,), warned=True)


# ------------------------------------------------------------------------------------------------------- bad models

NOTHING = """
<ir_version: 8, opset_import: ["" : 17]>
nothing (float[batch, 6] x) => (float[batch, 40] y) {
    y = MatMul(x, up)
}
"""
QDQ = """
<ir_version: 8, opset_import: ["" : 17]>
quantised (float[batch, 6] x) => (float[batch, 6] y)
<float scale = {0.1}, float other = {0.2}, uint8 zero = {128}> {
    q = QuantizeLinear(x, scale, zero)
    [d] d = DequantizeLinear(q, other, zero)
    y = Relu(d)
}
"""
QOPERATOR = """
<ir_version: 8, opset_import: ["" : 17]>
quantised (uint8[batch, 6] x) => (uint8[batch, 40] y)
<float scale = {0.1}, uint8 zero = {128}> {
    [product] y = QLinearMatMul(x, scale, zero, weight, scale, zero, scale, zero)
}
"""


@pytest.mark.parametrize("command", [[], ["inspect"]])
class TestBadModels:
    def test_missing(self, refuse: Refuse, tmp_path: Path, command: list[str]) -> None:
        refuse(*command, tmp_path / "folder" / "model.onnx", needles=("model.onnx' is not a file",))

    def test_a_folder(self, refuse: Refuse, tmp_path: Path, command: list[str]) -> None:
        refuse(*command, tmp_path, needles=("has no config.json",))

    @pytest.mark.parametrize("content", [b"", b"hello, world", b"\x80\x04pickle" * 99, b"PK\x03\x04" + bytes(99)])
    def test_not_onnx(self, refuse: Refuse, tmp_path: Path, command: list[str], content: bytes) -> None:
        (tmp_path / "model.onnx").write_bytes(content)
        refuse(*command, tmp_path / "model.onnx", needles=("model.onnx'", "export it again"))

    @pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
    def test_truncated(self, refuse: Refuse, model: Path, command: list[str], share: float) -> None:
        content = model.read_bytes()
        model.write_bytes(content[: int(len(content) * share)])
        refuse(*command, model, needles=("model.onnx'", "truncated"))

    def test_external_data_missing(self, refuse: Refuse, model: Path, command: list[str]) -> None:
        onnx.save(onnx.load(model), model, save_as_external_data=True, location="weights.bin", size_threshold=0)
        (model.parent / "weights.bin").unlink()
        refuse(*command, model, needles=("'weights.bin'", "is missing"))

    def test_external_data_truncated(self, refuse: Refuse, model: Path, command: list[str]) -> None:
        onnx.save(onnx.load(model), model, save_as_external_data=True, location="weights.bin", size_threshold=0)
        data = model.parent / "weights.bin"
        data.write_bytes(data.read_bytes()[:-5])
        refuse(*command, model, needles=("weights.bin", "truncated"))

    def test_qdq(self, refuse: Refuse, tmp_path: Path, command: list[str]) -> None:
        refuse(*command, make(tmp_path / "q.onnx", QDQ), needles=("'d' (DequantizeLinear)", "prune the float model"))

    def test_qoperator(self, refuse: Refuse, tmp_path: Path, command: list[str]) -> None:
        path = make(tmp_path / "q.onnx", QOPERATOR, weight=np.ones((6, 40), np.uint8))
        refuse(*command, path, needles=("'product' (QLinearMatMul)", "prune the float model"))


def test_no_prunable_group(refuse: Refuse, tmp_path: Path) -> None:
    refuse(make(tmp_path / "m.onnx", NOTHING), needles=("m.onnx'", "no prunable group", "'liar-opt inspect' says why"))


# ---------------------------------------------------------------------------------------------- bad calibration data


def feeds(count: int = 16, **changed: Any) -> dict[str, np.ndarray[Any, Any]]:
    ids = np.random.default_rng(0).integers(0, WORDS, (count, 7))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **changed}


def tokenizer(folder: Path, words: int = WORDS) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["[UNK]", "[PAD]", "one", "two", "three", "four", "five"]
    vocabulary = {word: index for index, word in enumerate([*names, *(f"w{i}" for i in range(words - len(names)))])}
    made = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment, unused-ignore]
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "unk_token": "[UNK]"}))
    return folder


def test_feeds_that_fit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", **feeds())  # type: ignore[arg-type, unused-ignore]
    assert run(model, "--calibration", tmp_path / "data.npz") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changed", "needles"),
    [
        ({"input_ids": np.zeros((16, 7), np.float32)}, ("'input_ids'", "float32")),
        ({"input_ids": np.zeros((16, 7, 2), np.int64)}, ("'input_ids'", "7, 2")),
        ({"attention_mask": np.ones((15, 7), np.int64)}, ("15", "16")),
        ({"input_ids": np.full((16, 7), WORDS)}, ("'input_ids'", str(WORDS))),
    ],
    ids=["dtype", "rank", "lengths", "token ids"],
)
def test_feeds_that_do_not_fit(
    refuse: Refuse, model: Path, tmp_path: Path, changed: dict[str, Any], needles: tuple[str, ...]
) -> None:
    np.savez(tmp_path / "data.npz", **feeds(**changed))  # type: ignore[arg-type, unused-ignore]
    refuse(model, "--calibration", tmp_path / "data.npz", needles=("data.npz", *needles))


def test_feeds_with_other_names(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", ids=feeds()["input_ids"])
    refuse(model, "--calibration", tmp_path / "data.npz", needles=("'input_ids'", "'ids'"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_feeds_with_nan(refuse: Refuse, tmp_path: Path, value: float) -> None:
    path = make(tmp_path / "model.onnx", FLOATS)
    data = np.ones((16, 7, WIDTH), np.float32)
    data[11, 3, 2] = value
    np.savez(tmp_path / "data.npz", x=data)
    refuse(path, "--calibration", tmp_path / "data.npz", needles=("data.npz", "'x'"))


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl", "data.csv", "data.npz", "data.npy"])
def test_an_empty_file(refuse: Refuse, model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    argv = ["--calibration", tmp_path / name, "--tokenizer", tokenizer(tmp_path / "t")]
    refuse(model, *argv, needles=(name, "is empty"))


def test_a_missing_file(refuse: Refuse, model: Path) -> None:
    refuse(model, "--calibration", "nothing.txt", needles=("'nothing.txt' does not exist",))


def test_texts_without_a_tokenizer(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("one two\n")
    refuse(model, "--calibration", tmp_path / "data.txt", needles=("data.txt", "tokenizer"))


def test_a_tokenizer_that_disagrees(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("one two w90\n" * 20)
    argv = ["--calibration", tmp_path / "data.txt", "--tokenizer", tokenizer(tmp_path / "t", 200)]
    refuse(model, *argv, needles=("tokenizer", str(WORDS)))


# ------------------------------------------------------------------------------------------------- places of results


def test_the_output_is_the_input(refuse: Refuse, model: Path) -> None:
    refuse(model, "-o", model, "--force", needles=("is the input",))


def test_the_output_is_the_input_by_another_name(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to(model)
    refuse(model, "-o", tmp_path / "link.onnx", "--force", needles=("is the input",))


def test_the_output_is_the_list_of_words(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("1\n2\n")
    refuse(model, "--vocabulary", words, "-o", words, "--force", needles=("words.txt'", "a file that an option names"))


def test_the_output_is_the_calibration_data(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **feeds())  # type: ignore[arg-type, unused-ignore]
    argv = ["--calibration", tmp_path / "data.npz", "-o", tmp_path / "data.npz", "--force"]
    refuse(model, *argv, needles=("data.npz'", "reads or writes as well"))


def test_the_output_exists(refuse: Refuse, model: Path) -> None:
    output = model.with_name("model.liar.onnx")
    output.write_text("precious")
    refuse(model, needles=("exists", "--force"))
    assert run(model, "--samples", 4, "--force", "--quiet") == 0
    onnx.load(output)


def test_the_output_is_a_folder(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    refuse(model, "-o", tmp_path, needles=("is a folder",))
    refuse(model, "-o", f"{tmp_path}/new/", needles=("new/' is a folder; give the path of a file", "new/model.liar.onnx'"))


def test_the_folder_does_not_exist(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    refuse(model, "-o", tmp_path / "no" / "out.onnx", needles=("does not exist", "make it first"))
    refuse(model, "--report", tmp_path / "no" / "r.json", needles=("does not exist", "make it first"))


def test_the_folder_cannot_be_written(refuse: Refuse, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    refuse(model, needles=("model.liar.onnx' cannot be written (Permission denied)", "choose another path"))


def test_a_name_that_is_too_long(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    refuse(model, "-o", tmp_path / ("x" * 300), needles=("cannot be written", "too long"))


@pytest.mark.parametrize("command", [[], ["inspect"]])
def test_places_of_the_report(refuse: Refuse, model: Path, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    refuse(*command, model, "--report", model, "--force", needles=("reads or writes as well",))
    refuse(*command, model, "--report", tmp_path, needles=("is a folder",))
    refuse(*command, model, "--report", tmp_path / "notes.txt", needles=("is no report", "--force"))


def test_the_report_is_the_output(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    refuse(model, "-o", tmp_path / "x", "--report", tmp_path / "x", needles=("report", "reads or writes as well"))


OPTIONS = ("-o", "--report", "--html")


@pytest.fixture
def everything(tmp_path: Path) -> tuple[list[object], list[Path]]:
    """A command that reads files of each kind, and those files."""
    model = make(tmp_path / "model.onnx")
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "genai_config.json").write_text('{"model": {}}')
    (tmp_path / "texts.txt").write_text("one two three\n" * 20)
    folder = tokenizer(tmp_path / "tokenizer")
    read = [model, *(tmp_path / name for name in ("weights.bin", "genai_config.json", "texts.txt")), *folder.iterdir()]
    return [model, "--calibration", tmp_path / "texts.txt", "--tokenizer", folder, "--force"], read


@pytest.mark.parametrize("option", OPTIONS)
def test_no_result_is_written_over_the_input(
    refuse: Refuse, everything: tuple[list[object], list[Path]], tmp_path: Path, option: str
) -> None:
    command, read = everything
    (tmp_path / "links").mkdir()
    for i, file in enumerate(read):
        (tmp_path / "links" / f"{i}").hardlink_to(file)
        for place in (file, tmp_path / "links" / f"{i}"):
            refuse(*command, option, place, needles=(f"'{place}' is ", "reads or writes as well"))
    for other in {"--html", "--report"} - {option}:
        refuse(*command, option, tmp_path / "one", other, tmp_path / "one", needles=("reads or writes as well",))
    assert run(*command, option, tmp_path / "new.x", "--no-latency", "--quiet") == 0  # the command itself is sound


@pytest.mark.parametrize("option", ["--report", "--html"])
def test_inspect_does_not_write_over_the_input(
    refuse: Refuse, everything: tuple[list[object], list[Path]], tmp_path: Path, option: str
) -> None:
    for file in everything[1][:3]:
        refuse("inspect", everything[0][0], "--force", option, file, needles=("reads or writes as well",))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    refuse("inspect", checkpoint, "--force", option, checkpoint / "config.json", needles=("reads or writes as well",))


def test_the_result_in_memory_is_not_written_over_the_input(everything: tuple[list[object], list[Path]]) -> None:
    import liar_opt

    command, read = everything
    before = [file.read_bytes() for file in read]
    result = liar_opt.prune(str(command[0]), str(command[2]), tokenizer=str(command[4]), samples=8, latency=False)
    for file in read:
        with pytest.raises(liar_opt.OptionError, match="reads or writes as well"):
            result.save(file, force=True)
    assert [file.read_bytes() for file in read] == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
@pytest.mark.parametrize("command", [(), ("inspect",)])
def test_what_is_no_file_is_not_replaced(refuse: Refuse, model: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("precious")
    os.mkfifo(tmp_path / "pipe")
    options = OPTIONS[1:] if command else OPTIONS
    for option in options:
        refuse(*command, model, "--force", option, tmp_path / "pipe", needles=("pipe' is a pipe; give the path of a file",))
        refuse(*command, model, "--force", option, tmp_path / "link", needles=("is a symbolic link to", "precious'"))
        refuse(*command, model, "--force", option, os.devnull, needles=("is a device; give the path of a file",))
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink() and not Path(os.devnull).is_file()


def test_a_resume_folder_that_is_another_result(refuse: Refuse, model: Path, tmp_path: Path) -> None:
    refuse(
        model, "-o", tmp_path / "x", "--resume", tmp_path / "r", "--report", tmp_path / "r", needles=("within the resume",)
    )
    refuse(model, "--resume", tmp_path, needles=("is the input, or holds it",))
    refuse(model, "-o", tmp_path / "x", "--resume", tmp_path / "x", needles=("x' is the output, which this command",))
    (tmp_path / "r").mkdir()
    refuse(
        model, "-o", tmp_path / "r" / "x", "--resume", tmp_path / "r", needles=("the output", "is within the resume folder")
    )


def full(*_: Any, **__: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_disk_fills_up(refuse: Refuse, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = weight_files._write

    def half(stream: Any, data: bytes) -> int:
        write(stream, data[: len(data) // 2])
        return full()

    monkeypatch.setattr(weight_files, "_write", half)
    refuse(model, "--samples", 4, needles=("model.liar.onnx' cannot be written (No space left",), warned=True)


def test_the_disk_fills_up_at_the_report(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Path, "write_text", full)
    assert run(model, "--samples", 4, "--report", tmp_path / "r.json", "--quiet") == 2
    shown = capsys.readouterr()
    message = shown.err.splitlines()[-1]
    assert shown.out == ""
    assert "r.json' cannot be written (No space left" in message
    assert "model.liar.onnx' was written" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.liar.onnx", "model.onnx"]


# ------------------------------------------------------------------------------------------- checks, bugs, interrupts


def test_a_failed_check(refuse: Refuse, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in (compare.TOLERANCES, compare.LOOSEST):
        monkeypatch.setitem(allowed, "float32", -1.0)
    refuse(model, "--samples", 4, needles=("output 'y' differs", "nothing was written"), code=1, warned=True)


def test_a_bug_shows_its_traceback(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from liar_opt.passes.allocate_widths import AllocateWidthsPass

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("the bug")

    monkeypatch.setattr(AllocateWidthsPass, "plan", broken)
    assert run(model) == 3
    shown = capsys.readouterr()
    assert "Traceback" in shown.err
    assert "ZeroDivisionError: the bug" in shown.err
    assert "pass allocate-widths failed" in shown.err
    assert shown.err.splitlines()[-1].startswith("liar-opt: this is a bug")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]


@pytest.mark.parametrize("stage", ["calibrate", "verify"])
def test_interrupted_in_the_middle(refuse: Refuse, model: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def interrupt(self: Any, name: str, done: int, total: int) -> None:
        if name == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli._PlainProgress, "__call__", interrupt)
    refuse(model, "--samples", 8, needles=("interrupted; nothing was written",), code=130, warned=True)


def test_interrupted_and_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: Any, name: str, done: int, total: int) -> None:
        if name == "verify":
            raise KeyboardInterrupt

    monkeypatch.setattr(cli._PlainProgress, "__call__", interrupt)
    assert run(model, "--samples", 8, "--resume") == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.liar.onnx.resume", "model.onnx"]
    monkeypatch.undo()
    assert run(model, "--samples", 8, "--resume", "--ffn", 0.25) == 2
    assert "model.liar.onnx.resume' is of another run: 'allocate-widths ffn' was not given" in capsys.readouterr().err
    assert run(model, "--samples", 8, "--resume", "--report", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["resumed"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.liar.onnx", "model.onnx", "r.json"]


def test_memory_that_is_none(refuse: Refuse, model: Path) -> None:
    refuse(model, "--memory", "much", needles=("memory 'much' is no size", "2GB"))
    refuse(model, "--memory", "10KB", "--samples", 4, needles=("memory 10KB is too small", "give at least"), warned=True)


def test_interrupted_while_writing(refuse: Refuse, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = weight_files._write

    def half(stream: Any, data: bytes) -> None:
        write(stream, data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(weight_files, "_write", half)
    refuse(model, "--samples", 4, needles=("interrupted; nothing was written",), code=130, warned=True)


def test_interrupted_while_it_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupt:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "liar_opt.tools.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "liar_opt.tools.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    assert start.main() == 130
    assert capsys.readouterr().err == "liar-opt: interrupted; nothing was written\n"


def test_the_package_loads_nothing_by_itself() -> None:
    program = "import sys, liar_opt; print('numpy' in sys.modules, liar_opt.OptionError.__name__, 'prune' in dir(liar_opt))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "OptionError", "True"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process there")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c(model: Path, name: str) -> None:
    number = getattr(signal, name)
    command = [sys.executable, "-m", "liar_opt", str(model), "--samples", "40000", "--no-latency"]
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    restore = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore) as child:
        assert child.stderr is not None
        assert child.stderr.readline().startswith("liar-opt: warning: ")  # the model is read, the work begins
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert out == ""
    *steps, last = err.splitlines()
    assert last == "liar-opt: interrupted; nothing was written"
    assert all(" of " in step for step in steps)  # what was done until the signal came, on a busy machine
    assert sorted(p.name for p in model.parent.iterdir()) == ["model.onnx"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
def test_a_request_to_end_while_writing(refuse: Refuse, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written so far goes, and whoever calls has the signal as it was."""
    write = weight_files._write

    def half(stream: Any, data: bytes) -> None:
        write(stream, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(weight_files, "_write", half)
    refuse(model, "--samples", 4, needles=("interrupted; nothing was written",), code=130, warned=True)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGHUP there")
def test_what_is_ignored_already_stays_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(weight_files, "as_bytes", _after_a_hangup(weight_files.as_bytes))
        assert run(model, "--samples", 4, "--quiet", "--no-latency") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def _after_a_hangup(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return function(*arguments)

    return called


def test_what_a_killed_run_left_goes(model: Path, tmp_path: Path) -> None:
    left = tmp_path / ".model.liar.onnx.abcdefgh.liar-opt.tmp"
    left.write_text("half")
    assert run(model, "--samples", 4, "--quiet", "--dry-run") == 0
    assert left.exists() or sys.platform == "win32"
    assert run(model, "--samples", 4, "--quiet", "--no-latency") == 0
    assert not left.exists() or sys.platform == "win32"


def test_a_reader_that_has_seen_enough(model: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "liar_opt", "inspect", str(model)], stdout=gone, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 0
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------------------- demo


def test_demo_without_its_package(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse("demo", "--folder", tmp_path / "demo", needles=("pip install 'liar-opt[demo]'",))
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.network
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from liar_opt.runtime.errors import OptionError
    from liar_opt.tools import demo_assets

    try:
        demo_assets.minilm_folder(), demo_assets.archive()
    except OptionError as err:
        pytest.skip(str(err))
    assert run("demo", "--folder", tmp_path, "--samples", 512, "--report", tmp_path / "r.json") == 0
    assert "embedding cosine, 1,024 held-out reviews" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["evaluation"]["cosine"] > 0.92


def test_an_onnx_file_becomes_no_traced_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(tmp_path / "model.onnx"), "-o", str(tmp_path / "out.pt2")]) == 2
    told = capsys.readouterr().err
    assert "becomes ONNX, and" in told and "ends in .onnx" in told and len(told.splitlines()) == 1
