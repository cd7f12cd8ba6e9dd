"""Two ideas that are not shipped: errors counted by the variance of logits, and a repair by a rotation.

    python tools/dev/bench.py currency --only repair --cells FILE          # MiniLM, few samples
    python tools/dev/bench.py currency --only classifier --cells FILE      # film reviews, two classes
    python tools/dev/bench.py currency --only smollm2 --cells FILE

- repair: what stays is turned, W' = W_K R with R orthogonal, the polar factor of W_K^T S_K: W (RCPU, arXiv 2510.07782),
  instead of fitted by least squares; and of both, at each consumer, whichever loses less on held-back rows. Cosine of the
  embeddings of held-out reviews.
- classifier, smollm2: what a group's error is worth at the output counts as the variance of the difference of logits under
  the dense model's own probabilities (arXiv 2603.24652: half of it is nearly the divergence) instead of its plain square.
  The divergence, and how often the largest logit is another, on texts that nothing was fitted to.
"""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from numpy.typing import NDArray

from liar_opt.passes import probe_outputs
from liar_opt.passes.measured import Measured
from liar_opt.passes.prune_job import prune
from liar_opt.passes.registry import repair_named
from liar_opt.runtime.moments import Statistics
from liar_opt.runtime.sessions import Session
from liar_opt.runtime.solve import choose_ridge, repair_weight
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.demo import tokenise
from liar_opt.tools.demo_assets import minilm_folder
from liar_opt.tools.dev.harness import Cells, commit, say, setting, table, work_folder
from liar_opt.tools.dev.subjects import sentiment, smollm2
from liar_opt.tools.dev.subjects.minilm import Held, Workplace
from liar_opt.tools.dev.tables.decoder import batches_of, windows

Array = NDArray[np.float64]
PARTS = ("repair", "classifier", "smollm2")
RATIOS = (0.2, 0.35, 0.5)
SAMPLES = (64, 128, 512)
HELD, CALIBRATION = 512, 256
WINDOW = 128
Logits = Callable[[bytes], Array]
"""Logits of held-out rows [r, c] that a model gives."""


# A repair by a rotation -----------------------------------------------------------------------------------------------


def rotated(own: Statistics, weight: Array, kept: NDArray[np.int64]) -> tuple[Array, Array]:
    """W' [u, m] = W_K R, and what the bias gets."""
    left = weight[kept]
    first, _, second = np.linalg.svd(left.T @ own.covariance[kept] @ weight)
    made = left @ first @ second
    return made, own.mean @ weight - own.mean[kept] @ made


def lost(own: Statistics, weight: Array, kept: NDArray[np.int64], made: Array, bias: Array) -> float:
    """The squared error of new weights on the rows of ``own``."""
    change = weight.copy()
    change[kept] -= made
    return float((change * (own.covariance @ change)).sum() + np.square(own.mean @ change - bias).sum())


def by_rotation(consumer: Measured, kept: NDArray[np.int64], removed: NDArray[np.int64]) -> tuple[Array, Array]:
    """The repair, as `prune` takes a function; what may change no bias gets none."""
    made, bias = rotated(consumer.statistics, np.asarray(consumer.weight, np.float64), kept)
    return made, bias if consumer.centred else 0.0 * bias


def by_either(consumer: Measured, kept: NDArray[np.int64], removed: NDArray[np.int64]) -> tuple[Array, Array]:
    """Least squares, or the rotation where that loses less on held-back rows."""
    least = repair_named("liar")(consumer, kept, removed, None)
    if consumer.folds is None:
        return least.weight, least.bias
    training, held_back = consumer.folds
    weight = np.asarray(consumer.weight, np.float64)
    choice = choose_ridge(training, held_back, weight, kept, removed)
    fit = repair_weight(training.covariance, training.mean, weight, kept, removed, choice)
    fitted = rotated(training, weight, kept), (fit.weight, fit.bias)
    turned, plain = (lost(held_back, weight, kept, *pair) for pair in fitted)
    return by_rotation(consumer, kept, removed) if turned < plain else (least.weight, least.bias)


REPAIRS: dict[str, Any] = {"least squares": "liar", "rotation": by_rotation, "either": by_either}


def repaired(work: Workplace, held: Held, samples: int, ratio: float, repair: Any) -> dict[str, Any]:
    """Prunes MiniLM on a few sentences; the cosine of held-out ones."""
    given: dict[str, Any] = {"tokenizer": minilm_folder(), "seed": work.options.seed, "provider": "cpu", "latency": False}
    result = prune(work.model, work.sentences[:samples], samples=samples, sparsity=ratio, repair=repair, **given)
    return {**held.cosine(result.model.SerializeToString()), "commit": commit()}


# Errors counted by the variance of logits -----------------------------------------------------------------------------


def by_variance(found: NDArray[Any], dense: NDArray[Any]) -> float:
    """The variance of the difference of logits [r, c] under the softmax of the dense ones, summed over rows."""
    found, dense = found.astype(np.float64), dense.astype(np.float64)
    shares = np.exp(dense - dense.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    change = found - dense
    return float((shares * np.square(change)).sum() - np.square((shares * change).sum(axis=1)).sum())


WAYS = {"square": probe_outputs.squared_difference, "variance": by_variance}


def counted(path: Path, given: Mapping[str, Any], logits: Logits, dense: Array, ratio: float, way: str) -> dict[str, Any]:
    """Prunes with errors counted one way; how far the logits of held-out texts are from the dense model's."""
    with mock.patch.object(probe_outputs, "squared_difference", WAYS[way]):
        result = prune(path, **given, sparsity=ratio, fresh=True, provider="cpu", latency=False)
    found = logits(result.model.SerializeToString())
    ours, theirs = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (found, dense))
    return {
        "divergence": float((np.exp(theirs) * (theirs - ours)).sum(1).mean()),
        "agree": float((found.argmax(1) == dense.argmax(1)).mean()),
        "kept": {g["name"]: g["after"] for g in result.report["groups"]},
        "commit": commit(),
    }


def of_texts(texts: Sequence[str], model: bytes) -> Array:
    """What a classifier says of texts."""
    session, rows = Session(model), np.zeros((len(texts), len(sentiment.LABELS)))
    for places, feeds in tokenise(texts, minilm_folder()):
        rows[places] = session.run(feeds, ["logits"], arrays=True)["logits"]
    return rows


def of_windows(held: NDArray[np.int64], model: bytes) -> Array:
    """What a language model says of the next token, of all tokens of windows [n, s]."""
    session = Session(model)
    made = [session.run(feeds, ["logits"], arrays=True)["logits"] for feeds in batches_of(held)]
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in made]).astype(np.float64)


def classifier(options: argparse.Namespace) -> tuple[Path, dict[str, Any], Logits]:
    """The model, what `prune` is given, and what is said of held-out texts."""
    bed = sentiment.ensure()
    parts = sentiment.write_parts(bed)
    texts = [s.sentence for s in parts["train"][:CALIBRATION]]
    given = {"calibration": texts, "samples": len(texts), "tokenizer": bed.model.parent, "seed": options.seed}
    return bed.model, given, functools.partial(of_texts, [s.sentence for s in parts["test"]])


def language_model(options: argparse.Namespace) -> tuple[Path, dict[str, Any], Logits]:
    """The same of SmolLM2."""
    path, tokenizer = smollm2.ensure(cache_folder() / "smollm2")
    ids = windows("brown", options.calibration_tokens, WINDOW, options.seed, tokenizer)
    data = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    given = {"calibration": data, "samples": len(ids), "batch_size": 8, "seed": options.seed}
    held = windows("wikipedia", options.evaluation_tokens, WINDOW, options.seed, tokenizer)
    return path, given, functools.partial(of_windows, held)


# The tables -----------------------------------------------------------------------------------------------------------


def repair_table(options: argparse.Namespace, cells: Cells) -> str:
    """MiniLM by samples and ratio."""
    rows = []
    with work_folder(None) as folder:
        work = Workplace(folder, options)
        held = Held(work, HELD)
        for samples in SAMPLES:
            for ratio in options.ratios:
                found = []
                for name, repair in REPAIRS.items():
                    make = functools.partial(repaired, work, held, samples, ratio, repair)
                    found.append(cells.made(f"{name} {samples} {ratio:g} {options.seed}", make))
                    say(f"{name}, {samples} samples, {ratio:g}: {found[-1]}")
                rows.append([f"{samples}", f"{100 * ratio:.0f} %", *(f"{cell['mean']:.4f}" for cell in found)])
    text: str = table(["samples", "removed", *REPAIRS], rows)
    return text


def counted_table(
    subject: Callable[[argparse.Namespace], tuple[Path, dict[str, Any], Logits]], options: argparse.Namespace, cells: Cells
) -> str:
    """One model by ratio."""
    rows = []
    path, given, logits = subject(options)
    dense = logits(onnx.load(path).SerializeToString())
    for ratio in options.ratios:
        for way in WAYS:
            key = f"{subject.__name__} {way} {ratio:g} {options.seed}"
            cell = cells.made(key, functools.partial(counted, path, given, logits, dense, ratio, way))
            say(f"{key}: {cell}")
            rows.append([f"{100 * ratio:.0f} %", way, f"{cell['divergence']:.4f}", f"{cell['agree']:.2%}"])
    text: str = table(["removed", "errors counted by", "divergence, held-out", "same largest logit"], rows)
    return text


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS[:2]))
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--calibration-tokens", type=int, default=4096, help="of SmolLM2")
    parser.add_argument("--evaluation-tokens", type=int, default=2048, help="of SmolLM2")
    parser.add_argument("--cells", type=Path, help="where figures are kept; default: nowhere")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Print the tables."""
    cells, given = Cells(options.cells), setting(options.seed)
    for part in options.only:
        if part == "repair":
            text = repair_table(options, cells)
        else:
            text = counted_table(classifier if part == "classifier" else language_model, options, cells)
        ratios = " ".join(f"{ratio:g}" for ratio in options.ratios)
        print(f"`python tools/dev/bench.py currency --only {part} --ratios {ratios} --seed {options.seed}`\n")
        print(f"Seed {options.seed}; commit {given['commit']}, {given['date']}.\n\n{text}\n", flush=True)
    return 0
