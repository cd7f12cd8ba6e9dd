"""Time the command in one process and in several, with one thread each: strong scaling on all-MiniLM-L6-v2.

    python tools/dev/bench.py processes --processes 1 2 --samples 1024 --repeats 3

Runs are taken in turns. Each process is one thread (one process is kept to one core: ONNX Runtime takes all).
Printed are the medians of the whole command and of what the report says of its stages, and the seconds that ranks waited.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from liar_opt.tools import demo_assets
from liar_opt.tools.dev.harness import Others, measured, say, setting, table, wait_for_quiet, work_folder

STAGES = ("prove-groups", "measure-curves", "prune-groups", "verify-model", "total")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="how many (default: 1 2)")
    parser.add_argument("--samples", type=int, default=1024, metavar="N", help="sentences (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where files are made")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="for a quiet machine, at most")


def main(options: argparse.Namespace) -> int:
    """Prints the table."""
    with work_folder(options.work) as folder:
        model, texts = folder / "minilm.onnx", folder / "texts.txt"
        if not model.is_file():
            demo_assets.export_minilm(model)
        chosen = demo_assets.split("nyt", options.samples, options.seed).chosen
        texts.write_text("\n".join(" ".join(s.text.split()) for s in chosen) + "\n", encoding="utf-8")
        wait_for_quiet(options.wait)
        others, found = Others(), dict[int, list[dict[str, Any]]]()
        for turn in range(options.repeats):
            for count in options.processes:
                say(f"{count} processes, run {turn + 1} of {options.repeats}")
                found.setdefault(count, []).append(_timed(count, model, texts, options, folder))
        about = setting(options.seed)
        print(
            f"Seed {options.seed}; commit {about['commit']}, {about['date']}; {about['cores']} cores, {about['processor']}."
        )
        print(f"{others.sentence()}.\n")
    head = ["processes", "command", *STAGES, "waited (each)"]
    rows = []
    for count, runs in found.items():
        stages = [f"{statistics.median(r['seconds'].get(s, 0.0) for r in runs):.1f} s" for s in STAGES]
        waited = [statistics.median(w) for w in zip(*(r["waited"] for r in runs), strict=True)]
        wall = statistics.median(r["wall"] for r in runs)
        rows.append([str(count), f"{wall:.1f} s", *stages, ", ".join(f"{w:.1f} s" for w in waited) or "-"])
    print(table(head, rows))
    return 0


def _timed(count: int, model: Path, texts: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs the command once; returns what it took, and what its report says.

    Raises:
        SystemExit: it failed.
    """
    report = folder / "report.json"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    alone = ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable]
    command = [*(start if count > 1 else alone), "-m", "liar_opt", str(model), "--calibration", str(texts)]
    command += ["--tokenizer", str(demo_assets.minilm_folder()), "--samples", str(options.samples), "--sparsity", "0.35"]
    command += ["--fresh", "--force", "--quiet", "--no-latency", "-o", str(folder / "out.onnx"), "--report", str(report)]
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    try:
        used = measured(command, folder)
    except subprocess.CalledProcessError as err:
        raise SystemExit(f"{count} processes: the command failed") from err
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        os.environ |= {} if before is None else {"OMP_NUM_THREADS": before}
    if used["code"]:
        raise SystemExit(f"{count} processes: the command ended with {used['code']}")
    told = json.loads(report.read_text(encoding="utf-8"))
    waited = [p["waited"] for p in told.get("processes", ())]
    return {"wall": used["wall"], "seconds": told["seconds"], "waited": waited}
