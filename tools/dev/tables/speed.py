"""Ask for a speed, quiet and beside a busy loop, and time what came out from outside.

    python tools/dev/bench.py speed                      MiniLM and an encoder of base size
    python tools/dev/bench.py speed --models minilm --turns 1

Each run of `--target latency` measures its table anew (error curves are measured once). Its model and the dense one are
then timed by a program that knows nothing of liar-opt, each in processes of its own, in turns; so is the model that
`--sparsity` gives when it removes as much. Timings want an idle machine; the busy loop is this script's own.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from liar_opt import prune
from liar_opt.tools.dev.harness import Others, say, setting, table, wait_for_quiet
from liar_opt.tools.dev.subjects.minilm import CALIBRATION, Held, Workplace

TARGET = "latency=1.5x"
OUTSIDE = """
import statistics, sys, time
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
arrays = np.load(sys.argv[2])
feeds = {i.name: arrays[i.name] for i in session.get_inputs()}
for _ in range(3):
    session.run(None, feeds)
times, started = [], time.perf_counter()
while len(times) < 5 or (len(times) < int(sys.argv[3]) and time.perf_counter() - started < 5.0):
    began = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - began)
print(statistics.median(times))
"""
RUNS, PROCESSES = 30, 3
BASE_BATCH = 8
"""Sequences of a timed batch of the larger encoder: a run of 32 takes over a second on two cores."""


@contextlib.contextmanager
def busy(loops: bool) -> Iterator[None]:
    """Keeps one core busy meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if loops else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def outside(models: list[Path], feeds: Path) -> list[float]:
    """Returns the median seconds of each model over processes of its own, in turns."""
    found: list[list[float]] = [[] for _ in models]
    for _ in range(PROCESSES):
        for model, own in zip(models, found, strict=True):
            command = [sys.executable, "-c", OUTSIDE, str(model), str(feeds), str(RUNS)]
            own.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return [statistics.median(own) for own in found]


def base_size(folder: Path, seed: int) -> Path:
    """Exports a seeded BERT of base size (12 layers, hidden 768), with a small vocabulary."""
    import torch
    from transformers import BertConfig, BertModel

    class Positional(torch.nn.Module):
        """The exporter passes arguments by position, where a model of transformers wants names."""

        def __init__(self) -> None:
            super().__init__()
            self.model = BertModel(BertConfig(vocab_size=2000), add_pooling_layer=False)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return hidden

    torch.manual_seed(seed)
    module = Positional().eval()
    path = folder / "base.onnx"
    ids = torch.randint(0, 2000, (2, 9))
    axes = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
    with contextlib.redirect_stdout(sys.stderr):
        torch.onnx.export(
            module,
            (ids, torch.ones_like(ids)),
            str(path),
            dynamo=False,
            input_names=list(axes),
            output_names=["last_hidden_state"],
            dynamic_axes={**axes, "last_hidden_state": {0: "batch", 1: "sequence"}},
        )
    return path


def rows_of(name: str, work: Workplace, turns: int, beside: list[str]) -> list[list[str]]:
    """Prunes one model to the target, a few times beside each (quiet, or a busy loop)."""
    if name == "minilm":
        model, held = work.model, Held(work)
        given: dict[str, Any] = {"calibration": work.sentences, "tokenizer": _tokenizer()}
        batch: dict[str, Any] = dict(work.batches(work.model).batches[0])
    else:
        model, held = base_size(work.folder, work.options.seed), None
        rng = np.random.default_rng(work.options.seed)
        feeds = {
            "input_ids": rng.integers(0, 2000, (CALIBRATION // 8, 31)),
            "attention_mask": np.ones((CALIBRATION // 8, 31)),
        }
        feeds = {k: v.astype(np.int64) for k, v in feeds.items()}
        given = {"calibration": feeds, "batch_size": BASE_BATCH}
        batch = {k: v[:BASE_BATCH] for k, v in feeds.items()}
    np.savez(work.folder / "batch.npz", **batch)
    rows = []
    for loops in [each == "busy" for each in beside]:
        for turn in range(turns):
            shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"]) / "liar-opt" / "latency", ignore_errors=True)
            if not loops:
                wait_for_quiet(60)
            with busy(loops):
                common: dict[str, Any] = {**given, "seed": work.options.seed, "provider": "cpu"}
                result = prune(model, **common, target=TARGET)
                share = 1.0 - result.report["prunable"]["after"] / result.report["prunable"]["before"]
                ratio = prune(
                    model, **given, sparsity=round(share, 4), seed=work.options.seed, provider="cpu", latency=False
                )
                paths = [model]
                for label, found in (("target", result), ("ratio", ratio)):
                    paths.append(found.save(work.folder / f"{label}.onnx", force=True))
                dense, target, plain = outside(paths, work.folder / "batch.npz")
            said = result.report["target"]["dense"] / result.report["target"]["found"]
            speed = result.report["latency"]["speedup"]
            quality = [_quality(held, found) for found in (result, ratio)]
            row = [name, "busy loop" if loops else "quiet", str(turn + 1), f"{said:.2f}x", f"{speed:.2f}x"]
            row += [f"{1000 * dense:.1f} ms", f"**{dense / target:.2f}x**", f"{share:.1%}", quality[0]]
            row += [f"{dense / plain:.2f}x", quality[1]]
            say(" | ".join(row))
            rows.append(row)
    return rows


def _quality(held: Held | None, found: Any) -> str:
    """The embedding cosine on held-out reviews, or that of the output on held-back calibration batches."""
    if held is not None:
        return f"{held.cosine(found.model.SerializeToString())['mean']:.4f}"
    return f"{next(iter(found.report['verification']['outputs'].values()))['cosine']:.4f}"


def _tokenizer() -> Path:
    from liar_opt.tools.demo_assets import minilm_folder

    return minilm_folder()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--models", nargs="*", default=["minilm", "base"], choices=["minilm", "base"])
    parser.add_argument("--turns", type=int, default=3, help="runs of each model, beside each")
    parser.add_argument("--beside", nargs="*", default=["quiet", "busy"], choices=["quiet", "busy"])
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Run and print the table."""
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["XDG_CACHE_HOME"] = str(Path(temporary) / "cache")
        work, others, given = Workplace(Path(temporary), options), Others(), setting(options.seed)
        print(
            f"`python tools/dev/bench.py speed`\n\n`--target {TARGET}`; seed {given['seed']}; commit {given['commit']}, "
            f"{given['date']}; {given['cores']} cores, {given['processor']}; load average at the start {others.load:.2f}.\n"
        )
        rows = [row for name in options.models for row in rows_of(name, work, options.turns, options.beside)]
        head = ["model", "beside", "run", "target says", "report says", "dense, outside", "outside", "prunable removed"]
        print(table([*head, "cosine", "`--sparsity` of as much, outside", "its cosine"], rows))
    return 0
