"""Measure liar-opt on a decoder with grouped-query attention: the perplexity of SmolLM2-135M, dense and pruned.

    python tools/dev/benchmark_decoder.py                             # all tables; hours on 2 cores
    python tools/dev/benchmark_decoder.py --only repair --ratios 0.3  # one table, one ratio

Needs what `tools/dev/smollm2.py` needs. Calibrated on the Brown corpus, measured on Wikipedia; both drawn with the seed. A
cell that is finished is kept in `--cells` (JSON) with what made it, and not measured again.

- repair: greedy selection; no repair, bias-only repair, LIAR.
- selection: LIAR; magnitude, activation-weighted, greedy.
- weighting: greedy and LIAR; every row alike, or by the residual stream.
- calibration: greedy and LIAR; text, or what the dense model writes by itself.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tokenizers import Tokenizer

from liar_opt.passes.prune_model import prune
from liar_opt.runtime.packing import pack
from liar_opt.runtime.perplexity import Perplexity, perplexity
from liar_opt.runtime.sessions import Session
from liar_opt.tools.dev.smollm2 import Text, draw, ensure

RATIOS = (0.1, 0.2, 0.3, 0.5)
EVALUATION_ROWS = 1024
"""Tokens of an evaluation batch: the logits of each are 200 kB."""
BASE: dict[str, Any] = {"score": "greedy", "repair": "liar", "weighting": "stream", "calibration": "brown"}
TABLES: dict[str, list[dict[str, Any]]] = {
    "repair": [{"repair": r} for r in ("none", "bias", "liar")],
    "selection": [{"score": s} for s in ("magnitude", "activation-weighted", "greedy")],
    "weighting": [{"weighting": w} for w in ("none", "stream")],
    "calibration": [{"calibration": c} for c in ("brown", "self")],
}


def windows(corpus: Text, tokens: int, window: int, seed: int, tokenizer: Path) -> np.ndarray:
    """Packed windows [n, window] of a corpus, `tokens` in all."""
    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [found.ids for found in reader.encode_batch(draw(corpus, tokens, seed))]
    full, _ = pack(texts, window, reader.token_to_id("<|endoftext|>"))
    return full[: tokens // window]


def measure(proto: onnx.ModelProto, held: np.ndarray) -> Perplexity:
    """Perplexity of a model over windows [n, s]."""
    session = Session(proto.SerializeToString())
    size = max(1, EVALUATION_ROWS // held.shape[1])
    batches = [feed(held[start : start + size]) for start in range(0, len(held), size)]
    return perplexity(lambda f: session.run(f, ["logits"], arrays=True)["logits"], batches, [None] * len(batches))


def feed(ids: np.ndarray) -> dict[str, np.ndarray]:
    """What model.onnx takes."""
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def cell(work: "Workplace", ratio: float, choice: Mapping[str, Any]) -> dict[str, Any]:
    """Prunes once and measures; `choice` is the calibration and options of `prune`."""
    given = dict(choice)
    source = given.pop("calibration")
    began = time.perf_counter()
    ids = windows(source, work.options.calibration_tokens, work.options.window, work.options.seed, work.tokenizer)
    extra = given.pop("allocation", {"sparsity": ratio, "allocate": "uniform"})
    result = prune(
        work.model,
        feed(ids),
        batch_size=8,
        samples=len(ids),
        seed=work.options.seed,
        provider="cpu",
        latency=False,
        **given,
        **extra,
    )
    pruned = time.perf_counter() - began
    found = measure(result.model, work.held)
    report = result.report
    kinds = [(g["kind"], g["before"], g["after"]) for g in report["groups"]]
    return {
        "perplexity": found.value,
        "tokens": found.tokens,
        "calibration_tokens": int(ids.size),
        "parameters": report["after"]["parameters"] / report["before"]["parameters"],
        "widths": {
            k: f"{sum(a for q, _, a in kinds if q == k)} of {sum(b for q, b, _ in kinds if q == k)}" for k, _, _ in kinds
        },
        "prune_seconds": pruned,
        "seconds": time.perf_counter() - began,
    }


class Workplace:
    """The model, the held-out windows and the cells that are finished."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model, self.tokenizer = ensure(options.folder)
        self.held = windows(options.held_out, options.evaluation_tokens, options.window, options.seed, self.tokenizer)
        self.cells: dict[str, Any] = json.loads(options.cells.read_text("utf-8")) if options.cells.is_file() else {}

    def cached(self, key: Mapping[str, Any], make: Any) -> dict[str, Any]:
        """Looks a cell up by what makes it, or makes and keeps it."""
        o = self.options
        name = json.dumps(
            {
                **key,
                "window": o.window,
                "seed": o.seed,
                "fit": o.calibration_tokens,
                "held": [o.held_out, o.evaluation_tokens],
            },
            sort_keys=True,
        )
        if name not in self.cells:
            self.cells[name] = {**make(), "commit": commit()}
            self.options.cells.write_text(json.dumps(self.cells, indent=1), encoding="utf-8")
            say(f"{name}: {self.cells[name]}")
        found: dict[str, Any] = self.cells[name]
        return found


def commit() -> str:
    """Of this checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def say(text: str) -> None:
    """Progress, to stderr."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {text}", file=sys.stderr, flush=True)
