"""Ask all-MiniLM-L6-v2 for a size, for FLOPs, for a speed, for a largest loss, and look at what came out.

    python tools/dev/bench.py targets

Model and calibration sentences are those of `bench.py minilm`. What a target asks for is counted, or timed, on the
finished model: file size on the disk, operations of the first calibration batch, and the median of runs of both models in
turns on that batch, for much longer than liar-opt itself takes its time. Timings want an idle machine.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from liar_opt.runtime.latency import Deployed, measure_latency
from liar_opt.tools.dev.harness import Others, say, setting, table, work_folder
from liar_opt.tools.dev.subjects.minilm import Held, Workplace

TARGETS = ("size=80MB", "size=75MB", "flops=0.75x", "flops=0.5x", "latency=1.5x", "latency=2x")
DROPS = ("5%", "10%", "20%")
LATENCY_SECONDS = 8.0
ALLOWED = {"size": 0.01, "flops": 0.01, "latency": 0.05}
"""Largest deviation that is not pointed out, relative."""


def met(work: Workplace, held: Held, target: str) -> dict[str, Any]:
    """Prunes to one target; returns what was asked, what came out, in the unit of the target, and the cosine."""
    began = time.perf_counter()
    result = work.prune(work.model, target=target)
    seconds = time.perf_counter() - began
    model, report = result.model.SerializeToString(), result.report
    kind = report["target"]["kind"]
    if kind == "size":
        path = work.folder / "out.onnx"
        result.save(path, force=True)
        asked, found = report["target"]["wanted"], float(path.stat().st_size)
    elif kind == "flops":
        asked, found = report["target"]["wanted"], float(report["after"]["flops"])
    else:  # both models in turns, in this run: their ratio is what was asked for
        models = [Deployed(work.model), Deployed(model)]
        batch = work.batches(work.model).batches[0]
        asked = report["target"]["dense"] / report["target"]["wanted"]
        found = measure_latency(models, batch, LATENCY_SECONDS, most=100_000).speedup
    return {"kind": kind, "asked": asked, "found": found, "seconds": seconds, "cosine": held.cosine(model)["mean"]}


UNITS: dict[str, Callable[[float], str]] = {
    "size": lambda v: f"{v / 1e6:.2f} MB",
    "flops": lambda v: f"{v / 1e9:.3f} G",
    "latency": lambda v: f"{v:.3f}x",
}


def targets_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What was asked for beside what came out."""
    rows = []
    for target, cell in found.items():
        miss = cell["found"] / cell["asked"] - 1.0
        within = abs(miss) <= ALLOWED[cell["kind"]]
        show = UNITS[cell["kind"]]
        verdict = f"{miss:+.2%}" if within else f"**{miss:+.2%}**, over {ALLOWED[cell['kind']]:.0%}"
        rows.append([target, show(cell["asked"]), show(cell["found"]), verdict, *_end(cell)])
    text: str = table(["target", "asked", "came out", "off by", "cosine, held-out", "seconds"], rows)
    return text


def limited(work: Workplace, held: Held, drop: str) -> dict[str, Any]:
    """Prunes as far as a loss allows."""
    began = time.perf_counter()
    report = (result := work.prune(work.model, max_drop=drop)).report
    seconds = time.perf_counter() - began
    cosine = held.cosine(result.model.SerializeToString())["mean"]
    gone = 1.0 - report["after"]["parameters"] / report["before"]["parameters"]
    return {**report["target"], "gone": gone, "seconds": seconds, "cosine": cosine}


def drops_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """How much went under a limit of the loss."""
    rows = [
        [d, f"{c['found']:.2%}", f"{c['sparsity']:.1%}", f"{c['gone']:.1%}", str(len(c["tried"])), *_end(c)]
        for d, c in found.items()
    ]
    head = ["largest loss", "came out", "of the prunable removed", "of all parameters", "models tried"]
    text: str = table([*head, "cosine, held-out", "seconds"], rows)
    return text


def _end(cell: Mapping[str, Any]) -> list[str]:
    return [f"{cell['cosine']:.4f}", f"{cell['seconds']:.0f}"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--targets", nargs="*", default=TARGETS, help="as of liar-opt --target")
    parser.add_argument("--drops", nargs="*", default=DROPS, help="as of liar-opt --max-drop")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Run and print the tables."""
    with work_folder(options.folder) as folder:
        work = Workplace(folder, options)
        held, others, given = Held(work), Others(), setting(options.seed)
        print(
            f"`python tools/dev/bench.py targets`\n\nSeed {given['seed']}; commit {given['commit']}, {given['date']}; "
            f"{given['cores']} cores, {given['processor']}."
        )
        for names, run, show in ((options.targets, met, targets_table), (options.drops, limited, drops_table)):
            found = {}
            for name in names:
                found[name] = run(work, held, name)
                say(f"{name}: {found[name]}")
            if found:
                print(f"\n{show(found)}", flush=True)
        print(f"\n{others.sentence()}.")
    return 0
