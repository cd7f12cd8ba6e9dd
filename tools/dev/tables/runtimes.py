"""What loads a result, whether it computes the same there, and whether it is faster: all-MiniLM-L6-v2, each file elsewhere.

    pip install openvino executorch             # into an environment of its own, beside liar-opt
    npm install onnxruntime-node onnxruntime-web
    NODE_PATH=node_modules python tools/dev/bench.py runtimes

Half of every feed-forward width goes, of ONNX, of a traced graph (.pt2) and of a checkpoint, calibrated on 512 sentences of
NYT editorials. The difference is the largest one to ONNX Runtime on the same file, to torch on the same traced graph, or to
transformers on the same checkpoint, relative to the largest magnitude of the output. Times are medians on one thread, dense
and pruned after each other in the same runtime. What is not installed is said.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from liar_opt.frontend.fx_module import trace
from liar_opt.frontend.hf_checkpoint import load_module, without_cache
from liar_opt.runtime.compare import relative_difference
from liar_opt.tools.demo_assets import MINILM_INPUTS, minilm_folder
from liar_opt.tools.dev.harness import Others, say, table, wait_for_quiet, work_folder
from liar_opt.tools.dev.runners import RUNNERS, Ran, Runner
from liar_opt.tools.dev.subjects.minilm import Workplace

BATCH, TOKENS = 1, 64
EQUAL = 1e-4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the table."""
    parser.add_argument("--only", nargs="+", choices=RUNNERS, help="some of them alone")
    parser.add_argument("--ffn", type=float, default=0.5, help="of every feed-forward width (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each; 0: none (default: %(default)s)")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="wait for a quiet machine before each")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Makes and prints the table."""
    rows, others, differs = [], Others(), False
    with work_folder(options.folder) as folder:
        work = Workplace(folder, options)
        files = {kind: _files(work, kind, options.ffn) for kind in {r.reads for r in RUNNERS.values()}}
        expected = {kind: [_expected(path, kind, options.seed) for path in pair] for kind, pair in files.items()}
        for name in options.only or RUNNERS:
            runner = RUNNERS[name]
            wait_for_quiet(options.wait)
            feeds = _feeds(options.seed, runner.reads)
            row, same = _row(runner, files[runner.reads], expected[runner.reads], feeds, options.repeats)
            differs |= not same
            rows.append([name, runner.reads or "checkpoint", *row])
            say(" | ".join(rows[-1]))
    head = ["runtime", "file", "loads", "difference", "ms dense", "ms pruned", "faster"]
    print(f"{others.sentence()}.\n\n{table(head, rows)}")
    return int(differs)


def _feeds(seed: int, kind: str) -> dict[str, np.ndarray]:
    """One sentence; a traced graph takes what it was traced with, which are the two inputs that a text becomes."""
    rng, shape = np.random.default_rng(seed), (BATCH, TOKENS)
    values = (rng.integers(1000, 2000, shape), np.ones(shape, np.int64), np.zeros(shape, np.int64))
    return dict(zip(MINILM_INPUTS[:2] if kind == ".pt2" else MINILM_INPUTS, values, strict=False))


def _files(work: Workplace, kind: str, ffn: float) -> tuple[Path, Path]:
    """Makes the dense and the pruned file of a kind."""
    pruned = work.folder / f"pruned{kind}"
    if kind == ".onnx":
        if not pruned.exists():
            work.prune(work.model, ffn=ffn).save(pruned)
        return work.model, pruned
    if not pruned.exists():
        work.prune(minilm_folder(), ffn=ffn, checkpoint=not kind).save(pruned)
    if not kind:
        return minilm_folder(), pruned
    dense = work.folder / "dense.pt2"
    if not dense.exists():
        module, _ = load_module(minilm_folder(), allow_pickle=False)
        given = {name: torch.from_numpy(value) for name, value in _feeds(work.options.seed, kind).items()}
        with without_cache(module):
            torch.export.save(trace(module, given), dense)
    return dense, pruned


def _expected(path: Path, kind: str, seed: int) -> Ran:
    """What ONNX Runtime computes of a graph, torch of a traced graph or a checkpoint."""
    name = {".onnx": "onnxruntime", ".pt2": "torch.export", "": "transformers"}[kind]
    return RUNNERS[name].run(path, _feeds(seed, kind), 0)


def _row(
    runner: Runner, files: tuple[Path, Path], expected: list[Ran], feeds: Mapping[str, Any], repeats: int
) -> tuple[list[str], bool]:
    """Cells of one runtime, and whether what it computes is the same."""
    if runner.missing is not None:
        return [f"{runner.missing} is not installed", "", "", "", ""], True
    try:
        ran = [runner.run(path, feeds, repeats) for path in files]
    except Exception as err:  # what a runtime raises has many classes
        return [f"no: {' '.join(str(err).split())[:80]}", "", "", "", ""], False
    worst = max(relative_difference(r.outputs[0], e.outputs[0]) for r, e in zip(ran, expected, strict=True))
    times = [f"{1000 * r.seconds:.2f}" for r in ran] if repeats else ["", ""]
    speed = f"{ran[0].seconds / ran[1].seconds:.2f} x" if repeats else ""
    return ["yes", f"{worst:.0e}", *times, speed], bool(worst <= EQUAL)
