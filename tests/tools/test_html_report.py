"""Pages: well-formed, self-contained, complete, escaped; and, where there is a browser, no wider than a phone."""

import copy
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import graphs
import onnx
import pytest

from liar_opt.tools import cli
from liar_opt.tools.html_elements import Markup, element
from liar_opt.tools.html_report import MARK, render
from liar_opt.tools.svg_charts import Scale, round_ticks, whole_number

NASTY = "</title><script>alert(1)</script>&\"'"
VOID = {"meta", "br"}


def group(layer: int, kind: str, before: int, after: int) -> dict[str, Any]:
    name = f"/layer.{layer}/{kind}/MatMul"
    errors = {"error_none": 0.4 / (layer + 1), "error_bias": 0.2 / (layer + 1), "error_repair": 0.1 / (layer + 1)}
    repair = {"node": name, "ridge": 1e-3, "ridge_raised": False, "repair": "liar", **errors}
    return {
        "name": name,
        "kind": kind,
        "before": before,
        "after": after,
        "block_width": 1,
        "parameters": 100 * before,
        "consumers": [name],
        "repairs": [repair],
    }


GROUPS = [group(0, "heads", 12, 6), group(0, "ffn", 48, 24), group(1, "heads", 12, 12), group(1, "ffn", 48, 8)]
REPORT: dict[str, Any] = {
    "schema": 1,
    "liar_opt": "0.1.0",
    "versions": {"python": "3.11"},
    "model": {"path": "/somewhere/model.onnx", "notes": ["a note"]},
    "before": {"parameters": 20000, "bytes": 80000, "flops": 9_600_000, "file_bytes": 81000},
    "after": {"parameters": 15000, "bytes": 60000, "flops": 5_100_000, "file_bytes": 61000},
    "device": "cpu",
    "seed": 0,
    "refusals": [
        {"reason": "Softmax runs over it", "nodes": ["n1", "n2", "n3", "n4", "n5"], "size": 384},
        {"reason": "operator Odd has no rule", "nodes": ["/odd"], "size": 0},
    ],
    "calibration": {"source": "texts.txt, 512 texts", "synthetic": False, "warnings": ["texts were cut"]},
    "groups": GROUPS,
    "prunable": {"before": sum(g["parameters"] for g in GROUPS), "after": sum(g["parameters"] // 2 for g in GROUPS)},
    "curves": {
        g["name"]: {
            "kind": g["kind"],
            "size": g["before"],
            "points": [[0, 0.3], [g["before"] // 2, 0.02], [g["before"], 0.0]],
        }
        for g in GROUPS
    },
    "verification": {
        "exact_difference": 3.2e-7,
        "exact_dtype": "float32",
        "outputs": {"last_hidden_state": {"relative_rms": 0.3821, "cosine": 0.9351, "rows": 2246}},
    },
    "latency": {"dense_seconds": 0.095, "pruned_seconds": 0.052, "speedup": 1.83, "runs": 12, "batch": "ids [32, 14]"},
    "evaluation": {"name": "embedding cosine", "cosine": 0.9277, "lowest": 0.6, "sentences": 1024},
    "seconds": {"prune": 3.2, "total": 4.0},
}
EVALUATION: dict[str, Any] = {
    "schema": 1,
    "command": "eval",
    "task": "classification",
    "data": "set (validation), 872 samples",
    "device": "cpu",
    "seed": 0,
    "level": 0.95,
    "resamples": 1000,
    "notes": ["something to know"],
    "models": [
        {"name": name, "path": name, "parameters": size, "bytes": 4 * size, "latency_seconds": size / 1e9}
        for name, size in (("dense.onnx", 22_000_000), ("pruned.onnx", 15_000_000), ("quarter.onnx", 5_000_000))
    ],
    "metrics": {
        "accuracy": {
            "samples": 872,
            "unit": "sample",
            "values": [0.912, 0.905, 0.871],
            "differences": [
                {"difference": -0.007, "low": -0.015, "high": 0.002},
                {"difference": -0.041, "low": -0.057, "high": -0.026},
            ],
        }
    },
    "latency": {"runs": 11, "batch": "ids [32, 14]"},
}


class Page(HTMLParser):
    """Checks that elements close in order, and collects text, attributes and the rows of tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f"{data}\n"


def everything() -> list[Any]:
    dry = {k: v for k, v in REPORT.items() if k not in ("after", "verification", "latency", "evaluation", "curves")}
    dry["groups"] = [{k: v for k, v in g.items() if k != "repairs"} for g in GROUPS]
    bare = {k: v for k, v in REPORT.items() if k not in ("latency", "evaluation", "curves")} | {"refusals": []}
    alone = copy.deepcopy(EVALUATION)
    alone["models"] = alone["models"][:1]
    alone["metrics"]["accuracy"] |= {"values": [0.9], "differences": []}
    del alone["models"][0]["latency_seconds"], alone["latency"]
    return [REPORT, dry, bare, EVALUATION, alone]


@pytest.mark.parametrize("report", everything(), ids=["pruned", "dry run", "without options", "evaluation", "one model"])
def test_a_page_is_well_formed_and_loads_nothing(report: dict[str, Any]) -> None:
    written = render(json.loads(json.dumps(report)))
    assert written.startswith(MARK)
    page = Page(written)
    assert "script" not in page.tags
    assert not {"src", "href", "xlink:href", "srcset"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert not re.search(r"(https?:)?//[\w.]", written)
    assert not re.search(r"url\(|@import", written)
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in written
    assert "nan" not in re.sub(r"[A-Za-z]{3}nan|nan[a-z]", "", " ".join(value for _, value in page.attributes)).lower()


def test_every_group_and_refusal_is_there() -> None:
    text = Page(render(REPORT)).text
    for g in GROUPS:
        assert g["name"] in text
    for refusal in REPORT["refusals"]:
        assert refusal["reason"] in text
        for node in refusal["nodes"]:
            assert node in text
    for needle in (
        "a note",
        "texts were cut",
        "heads: 18 of 24 kept in 2 groups",
        "ffn: 32 of 96 kept",
        "embedding cosine",
    ):
        assert needle in text
    assert "25.0 % of the parameters removed" in text


def test_charts_show_every_group() -> None:
    written = render(REPORT)
    for g in GROUPS:
        assert f"<title>{g['name']}: {100 * g['after'] / g['before']:.1f} % kept</title>" in written
        assert f"<title>{g['name']}, repair: {100 * g['repairs'][0]['error_repair']:.2f} %</title>" in written
    assert written.count("<polyline") == len(GROUPS)


def test_an_evaluation_shows_every_model_and_interval() -> None:
    written = render(EVALUATION)
    text = Page(written).text
    for model in EVALUATION["models"]:
        assert model["name"] in text
    for needle in ("set (validation), 872 samples", "something to know", "-0.0570 to -0.0260", "paired bootstrap"):
        assert needle in text
    assert "<title>quarter.onnx: -0.0410 (-0.0570 to -0.0260)</title>" in written


@pytest.mark.parametrize("report", [REPORT, EVALUATION])
def test_names_are_text_whatever_they_say(report: dict[str, Any]) -> None:
    def nasty(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: nasty(v) if k not in ("command", "exact_dtype", "kind") else v for k, v in value.items()}
        if isinstance(value, list):
            return [nasty(v) for v in value]
        return value + NASTY if isinstance(value, str) else value

    page = Page(render(nasty(report)))
    assert "script" not in page.tags
    assert "<script>alert(1)</script>" in page.text


def test_elements() -> None:
    shown = element("p", "a < b", Markup("<b>c</b>"), None, class_="x", data_note='"', hidden=None, width=1.50)
    assert shown == '<p class="x" data-note="&quot;" width="1.5">a &lt; b<b>c</b></p>'
    assert element("circle", cx=1) == '<circle cx="1"/>'


def test_scales() -> None:
    assert Scale(0, 10, 0, 100)(2.5) == 25
    assert Scale(0.01, 100, 0, 100, log=True)(1) == 50
    assert Scale(3, 3, 0, 100)(3) == 50
    assert round_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert round_ticks(-7, 12) == pytest.approx([-5, 0, 5, 10])
    assert Scale(2e-4, 3.0, 0, 1, log=True).ticks() == pytest.approx([1e-3, 1e-2, 1e-1, 1])
    assert all(math.isfinite(t) for t in Scale(1, 1, 0, 1).ticks())
    assert [whole_number(v) for v in (0.0, 0.5, 1.0, 1.5, 12.0)] == ["", "", "1", "", "12"]


def test_a_group_that_lost_nothing_is_no_mark() -> None:
    report = copy.deepcopy(REPORT)
    for g in report["groups"]:
        for repair in g["repairs"]:
            repair.update(error_none=0.0, error_bias=0.0, error_repair=0.0)
    report["curves"] = {
        name: {**curve, "points": [[0, 0.0], [curve["size"], 0.0]]} for name, curve in report["curves"].items()
    }
    assert "nothing was lost" in Page(render(report)).text


# ---------------------------------------------------------------------------------------------------- the command


FFN = """
ffn (float[b, s, 6] x) => (float[b, s, 6] y) {
    h = MatMul(x, up)
    a = Relu(h)
    y = MatMul(a, down)
}"""


def make(path: Path) -> Path:
    onnx.save(graphs.parse(FFN, {"up": (6, 40), "down": (40, 6)}), path)
    return path


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, page = make(tmp_path / "model.onnx"), tmp_path / "page.html"
    common = [str(model), "--ffn", "0.5", "--samples", "8", "--no-latency", "--quiet", "--html", str(page)]
    assert cli.main(common) == 0
    first = page.read_text(encoding="utf-8")
    assert "ffn: 24 of 40 kept in 1 group\n" in Page(first).text
    assert cli.main([*common, "--dry-run"]) == 0  # an earlier page is replaced
    assert page.read_text(encoding="utf-8") != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.liar.onnx", "model.onnx", "page.html"]


def test_inspect_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["inspect", str(make(tmp_path / "model.onnx")), "--html", str(page)]) == 0
    text = Page(page.read_text(encoding="utf-8")).text
    assert "100.0 % of 480 parameters could be narrower" in text
    assert "Nothing was refused" not in text  # the width of the inputs is pinned


@pytest.mark.parametrize(
    ("place", "needle"), [("model.onnx", "reads or writes"), (".", "is a folder"), ("n.txt", "no report")]
)
def test_places(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, needle: str) -> None:
    model = make(tmp_path / "model.onnx")
    (tmp_path / "n.txt").write_text("precious")
    assert cli.main([str(model), "--html", str(tmp_path / place)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert needle in line
    assert "HTML report" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "n.txt"]


def test_both_reports_need_places_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, both = make(tmp_path / "model.onnx"), str(tmp_path / "both")
    assert cli.main([str(model), "--report", both, "--html", both]) == 2
    assert "reads or writes as well" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("report", [REPORT, EVALUATION], ids=["pruned", "evaluation"])
def test_no_wider_than_a_phone(tmp_path: Path, report: dict[str, Any]) -> None:
    # The page itself is in a frame of 375 pixels, whose script says how wide its content is: the page has no script.
    written = render(report)
    (tmp_path / "page.html").write_text(written.replace("default-src 'none'", "default-src 'self' 'unsafe-inline'"))
    probe = (
        '<iframe id="f" src="page.html" style="border:0;width:375px;height:800px"></iframe><p id="p"></p><script>'
        "f.onload = () => { const d = f.contentDocument.documentElement;"
        "p.textContent = `width ${d.scrollWidth} of ${d.clientWidth}, height ${d.scrollHeight}`; }</script>"
    )
    (tmp_path / "probe.html").write_text(probe)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [
        str(BROWSER),
        *flags.split(),
        "--disable-component-update",
        "--disable-sync",
        "--allow-file-access-from-files",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r"width (\d+) of (\d+), height (\d+)", done.stdout)
    assert found is not None, done.stdout[-500:]
    width, window, height = map(int, found.groups())
    assert width == window <= 375
    assert height > 1000
