"""Whether `--choose` wins: all-MiniLM-L6-v2 by the default and by what was chosen among scores and draws of the samples.

    python tools/dev/bench.py choose                     # two ratios, four seeds; an hour on one core
    python tools/dev/bench.py choose --ratios 0.5 --seeds 2

The default is the first try: the same widths, the same number of samples. Calibrated on sentences of NYT editorials, of
which each draw and the judge have as many, mean cosine of the embeddings over film reviews that neither has seen. The third
way has no choice, and is fitted to all samples that the others read. A cell that is finished is kept in `--cells`.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from liar_opt.passes.choices import draws_of
from liar_opt.tools.demo_assets import split
from liar_opt.tools.dev.harness import Cells, commit, say, table, work_folder
from liar_opt.tools.dev.subjects.minilm import Held, Workplace

AT_ONCE = 1e-6
"""Minutes after which no try follows the first."""
WAYS: dict[str, dict[str, Any]] = {"default": {"choose_minutes": AT_ONCE}, "chosen": {}, "all": {"choose": None}}
NAMES = ("the default", "chosen", "fitted to all samples")


def cell(work: Workplace, held: Held, ratio: float, options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Prunes once, and measures on the held-out sentences."""
    count = (options.tries + 1) * options.samples
    work.sentences = [s.text for s in split("nyt", count, work.options.seed).chosen]
    given = {"samples": options.samples, "choose": options.choose, "choose_tries": options.tries, **more}
    if given["choose"] is None:
        read = draws_of(tuple(options.choose.split(",")), options.tries) + 1
        given = {"samples": read * options.samples}
    result = work.prune(work.model, sparsity=ratio, fresh=False, **given)
    found = result.report.get("choice") or {"tried": [{"score": "greedy", "draw": 0, "error": 1.0}], "chosen": 0}
    best = found["tried"][found["chosen"]]
    return {
        "cosine": held.cosine(result.model.SerializeToString())["mean"],
        "score": best["score"],
        "draw": best["draw"],
        "gain": 1.0 - best["error"] / found["tried"][0]["error"],
        "tries": len(found["tried"]),
        "seconds": result.report["seconds"]["total"],
        "commit": commit(),
    }


def markdown(options: argparse.Namespace) -> str:
    """The table: each seed with both, and what is gained with its standard error."""
    cells, rows, totals = Cells(options.cells), [], []
    with work_folder(None) as folder:
        for ratio in options.ratios:
            gains = []
            for seed in range(options.seeds):
                own = argparse.Namespace(**{**vars(copy.copy(options)), "seed": seed})
                work = Workplace(folder, own)
                held = Held(work, options.held)
                found = []
                for name, more in WAYS.items():
                    key = f"{name} {ratio} {seed} {options.choose} {options.tries} {options.samples} {options.held}"
                    found.append(cells.made(key, partial(cell, work, held, ratio, own, **more)))
                    say(f"{key}: {found[-1]}")
                default, chosen = found[:2]
                gains.append(chosen["cosine"] - default["cosine"])
                taken = f"{chosen['score']}, draw {chosen['draw']}"
                values = [f"{one['cosine']:.4f}" for one in found]
                judged = f"{100 * chosen['gain']:.1f} %"
                seconds = ", ".join(f"{one['seconds']:.0f}" for one in found)
                rows.append([f"{ratio:.0%}", f"{seed}", *values, f"{gains[-1]:+.4f}", taken, judged, seconds])
            error = float(np.std(gains, ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else float("nan")
            won = sum(gain > 0 for gain in gains)
            totals.append(f"{ratio:.0%}: {np.mean(gains):+.4f} +- {error:.4f}, ahead in {won} of {len(gains)}")
    head = (
        f"`--choose {options.choose} --choose-tries {options.tries} --samples {options.samples}`, cosine over "
        f"{options.held:,} film reviews; commits {', '.join(dict.fromkeys(one['commit'] for one in cells.found.values()))}."
    )
    titles = ["removed", "seed", *NAMES, "gained", "taken", "less error where it was judged", "seconds"]
    return f"{head}\n\n{table(titles, rows)}\n\nGained, mean and standard error over seeds: {'; '.join(totals)}."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--choose", default="score,samples", help="what is chosen among")
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=(0.35, 0.5), help="of the prunable parameters, to remove"
    )
    parser.add_argument("--tries", type=int, default=6)
    parser.add_argument("--samples", type=int, default=128, help="of each draw")
    parser.add_argument("--held", type=int, default=1024, help="sentences that are measured on")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--cells", type=Path, help="a JSON file that keeps the cells")


def main(options: argparse.Namespace) -> int:
    """The command."""
    print(markdown(options))
    return 0
