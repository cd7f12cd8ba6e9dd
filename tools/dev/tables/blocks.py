"""Leave one and two blocks of all-MiniLM-L6-v2 out, by each repair, beside widths that take as many parameters.

    python tools/dev/bench.py blocks

"none" is plain dropping, "fold" ReplaceMe's rule (arXiv 2505.02819), "map" a linear map of its own (arXiv 2605.15491); all
three leave out the run whose repair leaves the least error at the output on held-back calibration batches.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liar_opt.tools.dev.harness import say, setting, table, work_folder
from liar_opt.tools.dev.subjects.minilm import HELD_OUT, Held, Workplace

LAYERS = 6
RUNS: dict[str, dict[str, Any]] = {
    f"{count} of {LAYERS} blocks, {repair}": {"blocks": count, "block_repair": repair}
    for count in (1, 2)
    for repair in ("none", "fold", "map")
} | {f"widths, {count} sixths": {"sparsity": count / LAYERS} for count in (1, 2)}


def measured(work: Workplace, held: Held, options: Mapping[str, Any]) -> dict[str, Any]:
    """Cuts; returns which block is the first that went, parameters, the time and the cosine."""
    result = work.prune(work.model, latency=True, **options)
    result.save(path := work.folder / "out.onnx", force=True)
    report = result.report
    blocks = report.get("blocks")
    return {
        "gone": 1 - report["after"]["parameters"] / report["before"]["parameters"],
        "speedup": report["latency"]["speedup"],
        "blocks": "" if blocks is None else ", ".join(str(blocks["first"] + 1 + i) for i in range(blocks["blocks"])),
        "tried": None if blocks is None else blocks["tried"],
        **held.cosine(path.read_bytes()),
    }


def blocks_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What goes against what is kept."""
    rows = [
        [name, c["blocks"], f"{-c['gone']:.1%}", f"{c['speedup']:.2f} x", f"{c['mean']:.4f}", f"{c['p5']:.4f}"]
        for name, c in found.items()
    ]
    text: str = table(["", "which", "parameters", "faster", "cosine, held-out", "its 5 % quantile"], rows)
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=RUNS)
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Run and print the table."""
    with work_folder(options.folder) as folder:
        work, given = Workplace(folder, options), setting(options.seed)
        held = Held(work, HELD_OUT)
        print(
            f"`python tools/dev/bench.py blocks`\n\nSeed {given['seed']}; commit {given['commit']}, {given['date']}; "
            f"calibrated on {len(work.sentences):,} sentences of NYT editorials, {HELD_OUT:,} of film reviews held out."
        )
        found = {}
        for name in options.runs:
            found[name] = measured(work, held, RUNS[name])
            say(f"{name}: {found[name]}")
        print(f"\n{blocks_table(found)}", flush=True)
    return 0
