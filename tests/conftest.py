"""What all tests share: a folder of zoo models to reuse, and the table of what was found in the zoo."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo", type=Path, help="keep the zoo's models in this folder and reuse those that are there")
    parser.addoption("--all", action="store_true", help="run every case of the zoos, which takes an hour and a half")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a zoo has more than one of each kind of, unless it is asked for."""
    if not config.getoption("--all"):
        left = [item for item in items if item.get_closest_marker("rest") is not None]
        items[:] = [item for item in items if item.get_closest_marker("rest") is None]
        config.hook.pytest_deselected(items=left)


def pytest_configure(config: pytest.Config) -> None:
    """Names the folder of the zoo's models, which all workers of xdist share: they inherit it from who starts them."""
    if hasattr(config, "workerinput"):
        return
    folder = config.getoption("--zoo")
    if folder is not None:
        import zoo

        os.environ["LIAR_ZOO"] = str(Path(folder).resolve() / zoo.fingerprint())
        return
    made = tempfile.mkdtemp(prefix="liar-zoo-")
    os.environ["LIAR_ZOO"] = made
    config.add_cleanup(lambda: shutil.rmtree(made, ignore_errors=True))


def pytest_collection_finish() -> None:
    """What was imported is there until the end: the collector need not look at it each time (exporters call it often)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_curves_of_earlier_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Curves and tables of latencies are kept in a folder of the test's own."""
    monkeypatch.setattr("liar_opt.runtime.kept_results.cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="session", autouse=True)
def one_thread_of_onnxruntime() -> Iterator[None]:
    """Sessions that do not say otherwise compute on one thread: those of two test workers would wait for each other."""
    import onnxruntime

    class SessionOptions(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", SessionOptions)
        yield


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """A kind of module is traced once by each worker."""
    import traces

    from liar_opt.passes import open_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_module, "trace", traces.Traces())
        yield


@pytest.fixture(autouse=True)
def a_short_look_at_the_clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a clock says of models this small is chance, however long they are timed; `clock` marks who asks for more."""
    if request.node.get_closest_marker("clock") is not None:
        return
    from liar_opt.runtime import latency

    in_turns = latency._in_turns

    def short(clocks: Any, budget: float, least: int, most: int, close: float, *more: Any) -> Any:
        return in_turns(clocks, budget / 10, least, most, 0.0, *more)

    monkeypatch.setattr(latency, "_in_turns", short)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch on one thread (two test workers share two cores), transformers without its chatter."""
    import torch

    from liar_opt.frontend.hf_checkpoint import quiet_loading

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what was found in the zoos."""
    _onnx_zoo(terminalreporter)
    _fx_zoo(terminalreporter)


def _fx_zoo(terminalreporter: Any) -> None:
    """Prints the architectures of the FX zoo: groups, both differences to the masked original, attributes changed."""
    rows = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            facts = dict(report.user_properties)
            if "fx" in facts and report.when == "call":
                rows.append((*facts["fx"], "" if outcome == "passed" else "FAILED"))
    if not rows:
        return
    terminalreporter.section("torch modules: pruned without repair == masked original")
    write = terminalreporter.write_line
    write(f"{'architecture':<14} {'groups':<16} {'traced graph':>12} {'module':>9}  attributes set in the module")
    for name, found, graph, module, attributes, failed in sorted(rows):
        groups = " ".join(f"{n} {kind}" for kind, n in sorted(found.items()))
        write(f"{name:<14} {groups:<16} {graph:>12.1e} {module:>9.1e}  {', '.join(attributes) or '-'} {failed}".rstrip())


def _onnx_zoo(terminalreporter: Any) -> None:
    """Prints architectures x exporters: groups found by kind, the largest difference to the masked original, refusals."""
    rows: dict[tuple[str, str], list[tuple[dict[str, int], list[str], float, str]]] = defaultdict(list)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            facts = dict(report.user_properties)
            if "zoo" in facts and report.when == "call":
                architecture, exporter, found, refused = facts["zoo"]
                rows[architecture, exporter].append((found, refused, facts.get("difference", float("nan")), outcome))
    if not rows:
        return
    write = terminalreporter.write_line
    terminalreporter.section("pruned without repair == masked original")
    write(
        f"{'architecture':<16} {'exporter':<12} {'graphs':>6} {'failed':>6} {'difference':>10}  groups (graphs), refusals"
    )
    for (architecture, exporter), entries in sorted(rows.items()):
        counts: dict[str, int] = defaultdict(int)
        for found, *_ in entries:
            counts[" ".join(f"{n} {kind}" for kind, n in sorted(found.items())) or "none"] += 1
        refusals = sorted({r for _, refused, _, _ in entries for r in refused})
        failed = sum(outcome == "failed" for *_, outcome in entries)
        worst = max(difference for _, _, difference, _ in entries)
        shown = ", ".join(f"{what} ({n})" for what, n in sorted(counts.items()))
        write(
            f"{architecture:<16} {exporter:<12} {len(entries):>6} {failed:>6} {worst:>10.1e}  {shown}"
            + ("; " + "; ".join(refusals) if refusals else "")
        )
