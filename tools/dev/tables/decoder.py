"""Measure liar-opt on a decoder with grouped-query attention: the perplexity of SmolLM2-135M, dense and pruned.

    python tools/dev/bench.py decoder                             # all tables; hours on 2 cores
    python tools/dev/bench.py decoder --only repair --ratios 0.3  # one table, one ratio

Needs what `bench.py smollm2` needs. Calibrated on the Brown corpus, measured on Wikipedia; both drawn with the seed. A cell
that is finished is kept in `--cells` (JSON) with what made it, and not measured again.

- repair: greedy selection; no repair, bias-only repair, LIAR.
- selection: LIAR; magnitude, activation-weighted, greedy.
- weighting: greedy and LIAR; by the residual stream, or every row alike.
- calibration: greedy and LIAR; text, or what the dense model writes by itself.
- allocation: greedy and LIAR; the same ratio for all layers, or shared out by error curves.
- ablation: the default (greedy, LIAR, curves), and what other repairs and weightings do to it.
- targets: greedy; what a layer is fitted to: its own output, that in the dense model, or the dense stream behind it; on
  text and on what the dense model writes by itself.
- methods: published ones, as far as they consist of parts that liar-opt has; not their authors' code.
- scores: scores that need no gradients with every repair of its own layer, the same ratio for all layers; not the swaps,
  which take minutes and find what the greedy selection finds.
- tokens: greedy and LIAR, the same ratio for all layers; by the number of tokens that it is calibrated on.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tokenizers import Tokenizer

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.passes.gradient_scores import GRADIENT_SCORES
from liar_opt.passes.prune_job import prune
from liar_opt.passes.repairs import AWARE, REPAIRS
from liar_opt.passes.scores import SCORES
from liar_opt.runtime.packing import pack
from liar_opt.runtime.self_calibration import SELF, write_calibration
from liar_opt.runtime.sessions import Session
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.dev.harness import Cells, commit, say
from liar_opt.tools.dev.subjects.smollm2 import TEXTS, Text, draw, ensure, ensure_tokenizer, perplexity

RATIOS = (0.1, 0.2, 0.3, 0.5)
EVALUATION_ROWS = 1024
"""Tokens of an evaluation batch: the logits of each are 200 kB."""
BASE: dict[str, Any] = {"score": "greedy", "repair": "liar", "weighting": "stream", "calibration": "brown"}
ALIKE = {"weighting": "none"}
TABLES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "repair": [("no repair", {"repair": "none"}), ("bias only", {"repair": "bias"}), ("LIAR", {"repair": "liar"})],
    "selection": [(s, {"score": s}) for s in ("magnitude", "activation-weighted", "greedy")],
    "weighting": [(w, {"weighting": w}) for w in ("stream", "none")],
    "calibration": [("text", {"calibration": "brown"}), (SELF, {"calibration": SELF})],
    "allocation": [("uniform", {}), ("curves", {"allocate": "curves"})],
    "ablation": [
        ("the default", {"allocate": "curves"}),
        *((f"repair {r}", {"allocate": "curves", "repair": r}) for r in ("dense", "residual")),
        ("weighting none", {"allocate": "curves", "weighting": "none"}),
    ],
    "targets": [
        (f"{target}, {source}", {"calibration": corpus, "repair": repair})
        for source, corpus in (("text", "brown"), (SELF, SELF))
        for target, repair in (("operator", "liar"), ("operator of the dense model", "dense"), ("block", "residual"))
    ],
    "methods": [
        ("FLAP", {"score": "wifv", "repair": "bias", "allocate": "flap", **ALIKE}),
        ("Wanda-sp", {"score": "activation-weighted", "repair": "none", **ALIKE}),
        ("mask tuning", {"score": "activation-weighted", "repair": "scaling", **ALIKE}),
        ("OBS (SlimGPT)", ALIKE),
        ("liar-opt", {"allocate": "curves"}),
        ("FLAP, with LIAR", {"score": "wifv", "allocate": "flap"}),
    ],
}

SCORES_TABLE = "scores"
TOKENS_TABLE = "tokens"
TOKENS = (2048, 4096, 8192, 16384, 32768)


def windows(corpus: Text, tokens: int, window: int, seed: int, tokenizer: Path) -> np.ndarray:
    """Packed windows [n, window] of a corpus, `tokens` in all."""
    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    texts = [found.ids for found in reader.encode_batch(draw(corpus, tokens, seed))]
    full, _ = pack(texts, window, reader.token_to_id("<|endoftext|>"))
    return full[: tokens // window]


def measure(proto: onnx.ModelProto, held: np.ndarray) -> float:
    """Perplexity of a model over windows [n, s]."""
    session = Session(proto.SerializeToString())
    return perplexity(lambda f: session.run(f, ["logits"], arrays=True)["logits"], batches_of(held))


def batches_of(held: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Feeds of windows [n, s]."""
    size = max(1, EVALUATION_ROWS // held.shape[1])
    return [feed(held[start : start + size]) for start in range(0, len(held), size)]


def feed(ids: np.ndarray) -> dict[str, np.ndarray]:
    """What model.onnx takes."""
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def cell(work: "Workplace", ratio: float, choice: Mapping[str, Any]) -> dict[str, Any]:
    """Prunes once and measures; `choice` is the calibration and options of `prune`."""
    given = dict(choice)
    ids = work.calibration(given.pop("calibration"))
    began = time.perf_counter()
    given.setdefault("allocate", "uniform")
    result = prune(
        work.model,
        feed(ids),
        batch_size=8,
        samples=len(ids),
        seed=work.options.seed,
        provider="cpu",
        latency=False,
        fresh=True,
        sparsity=ratio,
        **given,
    )
    pruned = time.perf_counter() - began
    found = measure(result.model, work.held)
    report = result.report
    kinds = [(g["kind"], g["before"], g["after"]) for g in report["groups"]]
    return {
        "perplexity": found,
        "tokens": work.held[:, 1:].size,
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
        self.options, self.cells = options, Cells(options.cells)

    @cached_property
    def tokenizer(self) -> Path:
        """The folder of the model's tokenizer."""
        return ensure_tokenizer(self.options.folder)

    @cached_property
    def held(self) -> np.ndarray:
        """Held-out windows [n, s]."""
        o = self.options
        return windows(o.held_out, o.evaluation_tokens, o.window, o.seed, self.tokenizer)

    @cached_property
    def model(self) -> Path:
        """The graph, exported where it is not there."""
        return ensure(self.options.folder)[0]

    def calibration(self, source: str) -> np.ndarray:
        """Calibration windows [n, s]: of a corpus, or ("self") of the dense model, which writes them once."""
        o = self.options
        if source != SELF:
            return windows(source, o.calibration_tokens, o.window, o.seed, self.tokenizer)  # type: ignore[arg-type]
        path = o.folder / f"self-{o.calibration_tokens}-{o.window}-{o.seed}.npy"
        if not path.is_file():
            began = time.perf_counter()
            model, _ = ensure(o.folder, past=True)
            data = write_calibration(
                lambda: Session(model.read_bytes()),
                OnnxModel.load(model).inputs(),
                tokenizer=self.tokenizer,
                samples=o.calibration_tokens // o.window,
                sequence_length=o.window,
                seed=o.seed,
            )
            np.save(path, np.concatenate([batch["input_ids"] for batch in data.batches]))
            say(f"{data.source}: {time.perf_counter() - began:.0f} s")
        return np.asarray(np.load(path))

    def cached(self, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
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
        found: dict[str, Any] = self.cells.made(name, lambda: {**make(), "commit": commit()})
        say(f"{name}: {found}")
        return found


def markdown(work: "Workplace", tables: Sequence[str], ratios: Sequence[float]) -> Iterator[str]:
    """Measures what is missing and writes the tables, a row as soon as it is there."""
    o = work.options
    dense = work.cached({"dense": True}, lambda: {"perplexity": measure(onnx.load(work.model), work.held)})
    yield (
        f"`python tools/dev/bench.py decoder --calibration-tokens {o.calibration_tokens} --evaluation-tokens "
        f"{o.evaluation_tokens} --window {o.window} --held-out {o.held_out} --seed {o.seed}`\n\n"
        f"Perplexity of SmolLM2-135M-Instruct (4-bit weights, dequantised) on {o.evaluation_tokens:,} tokens of "
        f"{o.held_out}, windows of {o.window}; calibrated on {o.calibration_tokens:,} tokens of Brown unless said "
        f"otherwise; seed {o.seed}. "
        f"Dense: {dense['perplexity']:.2f}.\n"
    )
    for name in tables:
        if name == SCORES_TABLE:
            for ratio in ratios:
                yield from scores(work, ratio)
            continue
        if name == TOKENS_TABLE:
            yield from by_tokens(work, ratios)
            continue
        choices = TABLES[name]
        heads = [label for label, _ in choices]
        yield f"\n### {name}\n\n| removed | {' | '.join(heads)} | commit |\n|---|{'---:|' * len(heads)}---|\n"
        for ratio in ratios:
            cells = []
            for _, choice in choices:
                whole = {**BASE, **choice}
                cells.append(work.cached({"ratio": ratio, **whole}, partial(cell, work, ratio, whole)))
            best = min(found["perplexity"] for found in cells)
            values = (f"**{v:.2f}**" if v == best else f"{v:.2f}" for v in (found["perplexity"] for found in cells))
            commits = dict.fromkeys(found["commit"] for found in cells)
            yield f"| {100 * ratio:.0f} % | {' | '.join(values)} | {', '.join(commits)} |\n"


def scores(work: "Workplace", ratio: float) -> Iterator[str]:
    """Every score with every repair at one ratio, a row as soon as it is there."""
    repairs = [r for r in REPAIRS if r not in AWARE]
    yield f"\n### {SCORES_TABLE}, {ratio:.0%}\n\n| score | {' | '.join(repairs)} |\n|---|{'---:|' * len(repairs)}\n"
    for score in (s for s in SCORES if s not in (*GRADIENT_SCORES, "swaps")):
        found = []
        for repair in repairs:
            whole = {**BASE, "score": score, "repair": repair}
            found.append(work.cached({"ratio": ratio, **whole}, partial(cell, work, ratio, whole))["perplexity"])
        values = (f"**{v:.1f}**" if v == min(found) else f"{v:.1f}" for v in found)
        yield f"| {score} | {' | '.join(values)} |\n"


def by_tokens(work: "Workplace", ratios: Sequence[float]) -> Iterator[str]:
    """Greedy and LIAR by the number of calibration tokens, a row as soon as it is there."""
    heads = " | ".join(f"{ratio:.0%} removed" for ratio in ratios)
    yield f"\n### {TOKENS_TABLE}\n\n| calibration tokens | {heads} |\n|---:|{'---:|' * len(ratios)}\n"
    for count in TOKENS:
        other = copy.copy(work)
        other.options = argparse.Namespace(**{**vars(work.options), "calibration_tokens": count})
        found = [other.cached({"ratio": r, **BASE}, partial(cell, other, r, BASE))["perplexity"] for r in ratios]
        yield f"| {count:,} | {' | '.join(f'{value:.1f}' for value in found)} |\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument(
        "--only", choices=(*TABLES, SCORES_TABLE, TOKENS_TABLE), action="append", help="this table alone (may be repeated)"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of the prunable parameters, to remove")
    add_setting(parser)


def add_setting(parser: argparse.ArgumentParser) -> None:
    """What texts, and where the model and finished cells are."""
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--evaluation-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=128, help="tokens of a window, for both")
    parser.add_argument("--held-out", choices=[text for text in TEXTS if text != "brown"], default="wikipedia")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "smollm2", help="where the model is, or is made")
    parser.add_argument("--cells", type=Path, default=cache_folder() / "smollm2-cells.json", help="finished cells")


def main(options: argparse.Namespace) -> int:
    """The command."""
    for text in markdown(Workplace(options), options.only or (*TABLES, SCORES_TABLE, TOKENS_TABLE), options.ratios):
        print(text, end="", flush=True)
    return 0
