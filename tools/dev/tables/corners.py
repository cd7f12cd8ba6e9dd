"""What pruning adds to quantising: all-MiniLM-L6-v2, dense and pruned, in float and quantised.

    python tools/dev/bench.py corners                       # some ten minutes on 2 cores
    python tools/dev/bench.py corners --scheme int8 --sparsity 0 --sparsity 0.5

Calibrated on 512 sentences of NYT editorials; quality is the mean cosine of sentence embeddings to those of the dense float
model over 1,024 held-out sentences of film reviews. Times are medians of runs in turns, each model in a process of its own.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from liar_opt.frontend.onnx_quantise import SCHEMES
from liar_opt.runtime.latency import Deployed, measure_latency
from liar_opt.tools.demo_assets import MINILM_INPUTS
from liar_opt.tools.dev.harness import BUSY_LOAD, Cells, Others, say, table, wait_for_quiet, work_folder
from liar_opt.tools.dev.subjects.minilm import HELD_OUT, Held, Workplace

SPARSITIES = (0.0, 0.2, 0.35, 0.5)
TOKENS = 64
SECONDS = 4.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the table."""
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="one of them alone; may be repeated")
    parser.add_argument("--sparsity", action="append", type=float, help="likewise")
    parser.add_argument("--sentences", type=int, default=HELD_OUT, help="held-out ones (default: %(default)s)")
    parser.add_argument("--no-times", action="store_true", help="bytes and quality alone")
    parser.add_argument("--json", type=Path, help="keep the figures; those that it has are not made again")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="wait for a quiet machine before timing")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Makes and prints the table."""
    cells = Cells(options.json)
    schemes = ("float", *(options.scheme or SCHEMES))
    sparsities = options.sparsity or SPARSITIES
    with work_folder(options.folder) as folder:
        work = Workplace(folder, options)
        held = Held(work, options.sentences)
        keys = [(scheme, sparsity) for scheme in schemes for sparsity in sparsities]
        found = {key: cells.made("{} {:g}".format(*key), lambda key=key: _made(work, held, *key)) for key in keys}  # type: ignore[misc]
        machine = "not timed"
        if not options.no_times:
            if os.getloadavg()[0] > BUSY_LOAD:
                say(f"warning: the load average is {os.getloadavg()[0]:.2f}; what is timed now is not to be quoted")
            wait_for_quiet(options.wait)
            others = Others()
            times = {batch: _times(work, keys, batch) for batch in (1, 8)}
            machine = others.sentence()
            for place, key in enumerate(keys):
                found[key] = {**found[key], "seconds": [times[batch][place] for batch in times]}
    rows = []
    for key in keys:
        cell = found[key]
        seconds = [f"{1000 * value:.2f}" for value in cell.get("seconds", ())] or ["", ""]
        rows.append([key[0], f"{100 * key[1]:.0f} %", f"{cell['bytes'] / 1e6:.1f}", *seconds, f"{cell['cosine']:.4f}"])
    head = ["weights", "removed", "MB", f"ms, 1 x {TOKENS}", f"ms, 8 x {TOKENS}", "held-out cosine"]
    print(f"{machine}.\n\n{table(head, rows)}")
    return 0


def _path(work: Workplace, scheme: str, sparsity: float) -> Path:
    return work.folder / f"{scheme}-{sparsity:g}.onnx"


def _file(work: Workplace, scheme: str, sparsity: float) -> Path:
    """Makes a model where it is not there."""
    path = _path(work, scheme, sparsity)
    if not path.is_file():
        given: dict[str, Any] = {} if scheme == "float" else {"quantize": scheme}
        work.prune(work.model, sparsity=sparsity, fresh=False, **given).save(path)
    return path


def _made(work: Workplace, held: Held, scheme: str, sparsity: float) -> dict[str, float]:
    """The bytes of a file, and how near its embeddings are to those of the dense float model."""
    path = _file(work, scheme, sparsity)
    result = {"bytes": path.stat().st_size, "cosine": held.cosine(path.read_bytes())["mean"]}
    say(f"{scheme}, {sparsity:.0%}: {result}")
    return result


def _times(work: Workplace, keys: list[tuple[str, float]], batch: int) -> list[float]:
    """Seconds of each model, in turns."""
    rng = np.random.default_rng(work.options.seed)
    shape = (batch, TOKENS)
    values = (rng.integers(1000, 2000, shape), np.ones(shape, np.int64), np.zeros(shape, np.int64))
    feeds = dict(zip(MINILM_INPUTS, values, strict=True))
    models = [Deployed(_file(work, *key).read_bytes()) for key in keys]
    return list(measure_latency(models, feeds, SECONDS, least=10, most=2000).seconds)
