"""Measure patterns of zeros: the perplexity of SmolLM2-135M with each solver, and MiniLM at MLPruning's three levels.

    python tools/dev/bench.py pattern                                  # all tables; an hour or more on 2 cores
    python tools/dev/bench.py pattern --only decoder --patterns 2:4

Needs what `bench.py smollm2` and `bench.py minilm` need. Calibrated on the Brown corpus, measured on Wikipedia; both drawn
with the seed. A cell that is finished is kept in `--cells` (JSON) with what made it, and not measured again.

- decoder: the weights of all linear layers but the tied head; no width is cut.
- encoder: the same of all-MiniLM-L6-v2, by the cosine of its embeddings; no width is cut.
- minilm: heads 30 %, feed-forward widths 30 %, blocks of 8 x 8 50 % (MLPruning's three levels); cosine of the embeddings
  to the dense model's on held-out sentences, and bytes: dense, with sparse initializers where these are smaller, zipped.
"""

import argparse
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from liar_opt.passes.prune_job import prune
from liar_opt.runtime.patterns import SOLVERS
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.dev.harness import commit, say, work_folder
from liar_opt.tools.dev.subjects.minilm import Held
from liar_opt.tools.dev.subjects.minilm import Workplace as minilm_work
from liar_opt.tools.dev.subjects.smollm2 import TEXTS
from liar_opt.tools.dev.tables.decoder import Workplace, feed, measure

TABLES = ("decoder", "encoder", "minilm")
PATTERNS = ("2:4", "0.5")
LEVELS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("heads 30 %", {"heads": 0.3}),
    ("and feed-forward 30 %", {"heads": 0.3, "ffn": 0.3}),
    ("and blocks 8 x 8 50 %", {"heads": 0.3, "ffn": 0.3, "pattern": "blocks=8x8:0.5"}),
)


def decoder(work: Workplace) -> Iterator[str]:
    """Perplexity by pattern and solver, a row as soon as it is there."""
    o = work.options
    dense = work.cached({"dense": True}, lambda: {"perplexity": measure(onnx.load(work.model), work.held)})
    yield (
        f"\n### decoder\n\nPerplexity of SmolLM2-135M-Instruct (4-bit weights, dequantised) on {o.evaluation_tokens:,} "
        f"tokens of {o.held_out}, windows of {o.window}; calibrated on {o.calibration_tokens:,} of Brown; seed {o.seed}. "
        f"Dense: {dense['perplexity']:.2f}.\n\n"
        f"| solver | {' | '.join(o.patterns)} |\n|---|{'---:|' * len(o.patterns)}\n"
    )
    for solver in o.solvers:
        found = []
        for pattern in o.patterns:
            key = {"pattern": pattern, "solver": solver, "weighting": o.weighting}
            found.append(work.cached(key, partial(cell, work, pattern, solver))["perplexity"])
        yield f"| {solver} | {' | '.join(f'{value:.2f}' for value in found)} |\n"


def cell(work: Workplace, pattern: str, solver: str) -> dict[str, Any]:
    """Makes a pattern once and measures."""
    ids, o = work.calibration("brown"), work.options
    began = time.perf_counter()
    result = prune(
        work.model,
        feed(ids),
        batch_size=4,
        samples=len(ids),
        seed=o.seed,
        provider="cpu",
        latency=False,
        weighting=o.weighting,
        pattern=pattern,
        pattern_solver=solver,
    )
    made, done = time.perf_counter() - began, result.report["patterned"]
    by = [weight["by"] for weight in done["weights"]]
    return {
        "perplexity": measure(result.model, work.held),
        "zeros": done["zeros"],
        "error": float(np.mean([weight["error"] for weight in done["weights"]])),
        "by": {name: by.count(name) for name in dict.fromkeys(by)},
        "prune_seconds": made,
        "seconds": time.perf_counter() - began,
    }


def encoder(work: Workplace) -> Iterator[str]:
    """Cosine of MiniLM by pattern and solver, a row as soon as it is there."""
    o = work.options
    yield (
        "\n### encoder\n\nall-MiniLM-L6-v2, calibrated on 512 sentences of editorials; cosine of the embeddings to the "
        f"dense model's on 1,024 sentences of film reviews, and seconds of the run; seed {o.seed}.\n\n"
        f"| solver | {' | '.join(o.patterns)} | seconds |\n|---|{'---:|' * len(o.patterns)}---:|\n"
    )
    with work_folder(None) as folder:
        place = minilm_work(folder, o)
        held = Held(place)
        for solver in o.solvers:
            found = []
            for pattern in o.patterns:
                key = f"encoder {pattern} {solver} {o.seed}"
                found.append(work.cells.made(key, partial(encoder_cell, place, held, pattern, solver)))
                say(f"{key}: {found[-1]}")
            values = [f"{one['cosine']:.4f}" for one in found]
            seconds = ", ".join(f"{one['seconds']:.0f}" for one in found)
            yield f"| {solver} | {' | '.join(values)} | {seconds} |\n"


def encoder_cell(place: Any, held: Held, pattern: str, solver: str) -> dict[str, Any]:
    """Makes a pattern in MiniLM once and measures."""
    result = place.prune(place.model, pattern=pattern, pattern_solver=solver)
    by = [weight["by"] for weight in result.report["patterned"]["weights"]]
    return {
        "cosine": held.cosine(result.model.SerializeToString())["mean"],
        "seconds": result.report["seconds"]["total"],
        "by": {name: by.count(name) for name in dict.fromkeys(by)},
        "commit": commit(),
    }


def minilm(work: Workplace) -> Iterator[str]:
    """MLPruning's three levels, a row as soon as it is there."""
    yield (
        "\n### minilm\n\nall-MiniLM-L6-v2, calibrated on 512 sentences of editorials; cosine of the embeddings to the "
        "dense model's on 1,024 sentences of film reviews; zeros: share of all parameters that are left.\n\n"
        "| | solver | parameters | zeros | cosine | file | sparse | zipped |\n|---|---|---:|---:|---:|---:|---:|---:|\n"
    )
    with work_folder(None) as folder:
        place = minilm_work(folder, work.options)
        held = Held(place)
        for label, level in LEVELS:
            for solver in work.options.solvers if "pattern" in level else [None]:
                options = {**level, **({} if solver is None else {"pattern_solver": solver})}
                key = f"minilm {sorted(options.items())} {work.options.seed}"
                found = work.cells.made(key, partial(minilm_cell, place, held, options))
                say(f"{key}: {found}")
                share = f"{100 * found['zeros']:.1f} %"
                row = [label, solver or "", f"{found['parameters']:,}", share, f"{found['cosine']:.4f}"]
                row += [f"{found[name] / 1e6:.1f} MB" for name in ("dense", "sparse", "zipped")]
                yield f"| {' | '.join(row)} |\n"


def minilm_cell(place: Any, held: Held, options: dict[str, Any]) -> dict[str, Any]:
    """Prunes MiniLM once, and measures what is left."""
    result = place.prune(place.model, **options)
    dense, sparse, packed = (place.folder / name for name in ("dense.onnx", "sparse.onnx", "dense.zip"))
    result.save(dense, force=True)
    result.sparse_storage = True
    result.save(sparse, force=True)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(dense)
    done = result.report.get("patterned") or {"share": 0.0}
    return {
        "parameters": result.report["after"]["parameters"],
        "zeros": done["share"],
        "cosine": held.cosine(sparse.read_bytes())["mean"],
        "dense": dense.stat().st_size,
        "sparse": sparse.stat().st_size,
        "zipped": packed.stat().st_size,
        "commit": commit(),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--only", choices=TABLES, action="append", help="this table alone")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="of the decoder")
    parser.add_argument("--solvers", nargs="+", choices=tuple(SOLVERS), default=tuple(SOLVERS))
    parser.add_argument("--weighting", choices=("stream", "none"), default="stream", help="of the calibration rows")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--evaluation-tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=128, help="tokens of a window, for both")
    parser.add_argument("--held-out", choices=[text for text in TEXTS if text != "brown"], default="wikipedia")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "smollm2", help="where the model is, or is made")
    parser.add_argument("--cells", type=Path, default=cache_folder() / "pattern-cells.json", help="finished cells")


def main(options: argparse.Namespace) -> int:
    """The command."""
    work = Workplace(options)
    for name in options.only or TABLES:
        for text in {"decoder": decoder, "encoder": encoder, "minilm": minilm}[name](work):
            print(text, end="", flush=True)
    return 0
