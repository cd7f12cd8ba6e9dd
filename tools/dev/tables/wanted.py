"""What it costs to have widths fit what will run the result: all-MiniLM-L6-v2 with `--for` each runtime.

    python tools/dev/bench.py wanted                        # a quarter of an hour on 2 cores
    python tools/dev/bench.py wanted --runtimes openvino vllm --sparsity 0.5

Calibrated on 512 sentences of NYT editorials; quality is the mean cosine of sentence embeddings to those of the dense model
over 1,024 held-out sentences of film reviews. Runtimes that read ONNX get the ONNX file, each layer with widths of its own;
those that read checkpoints alone get one with stock widths, which are one of a kind for all layers, and of which a stock
BERT cannot say fewer heads: what it can lose is less. Whether widths obey is read from the weights of the result.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from liar_opt.passes.runtimes import RUNTIMES
from liar_opt.tools.demo_assets import MINILM_OUTPUT, export_bert, minilm_folder
from liar_opt.tools.dev.harness import Cells, say, table, work_folder
from liar_opt.tools.dev.subjects.minilm import HELD_OUT, Held, Workplace

PLAIN = "none"
HEAD_WIDTH = 32


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the table."""
    parser.add_argument("--runtimes", nargs="+", choices=(PLAIN, *RUNTIMES), default=(PLAIN, *RUNTIMES))
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.2, 0.35), help="of the prunable parameters")
    parser.add_argument("--sentences", type=int, default=HELD_OUT, help="held-out ones (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="keep the figures; those that it has are not made again")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def pruned(work: Workplace, runtime: str, door: str, sparsity: float) -> tuple[bytes, dict[str, Any]]:
    """Returns a result as ONNX, and its report."""
    wanted: dict[str, Any] = {} if runtime == PLAIN else {"runtime": runtime}
    result = work.prune(work.model if door == "onnx" else minilm_folder(), sparsity=sparsity, fresh=False, **wanted)
    if door == "onnx":
        return result.model.SerializeToString(), result.report
    path = work.folder / "checkpoint.onnx"
    export_bert(result.module, MINILM_OUTPUT, path)
    return path.read_bytes(), result.report


def widths_of(model: bytes) -> dict[str, list[int]]:
    """Feed-forward widths and numbers of heads of a BERT, by layer, from the biases of its products."""
    shapes = {t.name: list(t.dims) for t in onnx.load_from_string(model).graph.initializer}
    found: dict[str, list[int]] = {"ffn": [], "heads": []}
    for layer in range(6):
        own = [(name, dims) for name, dims in shapes.items() if f"layer.{layer}." in name and name.endswith(".bias")]
        found["ffn"] += [dims[0] for name, dims in own if "intermediate" in name]
        found["heads"] += [dims[0] // HEAD_WIDTH for name, dims in own if "self.value" in name]
    return found


def row(work: Workplace, held: Held, runtime: str, door: str, sparsity: float) -> dict[str, Any]:
    """Prunes and measures once."""
    model, report = pruned(work, runtime, door, sparsity)
    widths, counts = widths_of(model), [report[when]["parameters"] for when in ("before", "after")]
    wanted = RUNTIMES.get(runtime)
    step = 1 if wanted is None else int(np.lcm(wanted.ffn, wanted.block if wanted.always else 1))
    obey = all(width % step == 0 for width in widths["ffn"])
    obey &= wanted is None or not wanted.equal_heads or len(set(widths["heads"])) == 1
    obey &= len(widths["ffn"]) == len(widths["heads"]) == 6
    result = {**widths, "obey": bool(obey), "removed": 1.0 - counts[1] / counts[0]}
    result["quality"] = held.cosine(model)["mean"]
    say(f"{runtime}, {door}, {sparsity:.0%}: {result}")
    return result


def main(options: argparse.Namespace) -> int:
    """Makes and prints the table."""
    cells, rows = Cells(options.json), []
    with work_folder(options.folder) as folder:
        work = Workplace(folder, options)
        held = Held(work, options.sentences)
        for sparsity in options.sparsity:
            for runtime in options.runtimes:
                reads = ("onnx", "checkpoint") if runtime == PLAIN else RUNTIMES[runtime].reads[:1]
                for door in reads:
                    key = f"{runtime} {door} {sparsity:g}"
                    cell = cells.made(key, partial(row, work, held, runtime, door, sparsity))
                    spans = [f"{min(cell[kind])} to {max(cell[kind])}" for kind in ("ffn", "heads")]
                    told = [f"{sparsity:.0%}", runtime, door, *spans, "yes" if cell["obey"] else "no"]
                    rows.append([*told, f"{cell['removed']:.1%}", f"{cell['quality']:.4f}"])
    head = ["asked for", "`--for`", "file", "feed-forward widths", "heads", "obey", "of all parameters", "held-out cosine"]
    print(f"`python tools/dev/bench.py wanted`, seed {options.seed}\n\n{table(head, rows)}", end="")
    return 0
