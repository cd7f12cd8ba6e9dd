"""Compare every score with every repair, the allocations, and what each part of the default adds, on all-MiniLM-L6-v2.

    python tools/dev/bench.py beyond --cells cells.json --markdown beyond.md

Model, sentences and measure are those of `bench.py minilm`: calibrated on 512 sentences of NYT editorials, mean cosine
between the sentence embeddings of the dense and the pruned model over 1,024 sentences of film reviews. Nothing is chosen on
the film reviews: `--choosing` measures on other sentences (256 of the same editorials, 256 of product reviews), which is
what defaults were chosen on.

A cell prunes once, with the passes that `prune()` runs; error curves are measured once a score. `--cells` keeps the cells,
so that a run that was stopped goes on. Delete it when the code changes.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.passes.allocate_widths import AllocateWidthsPass
from liar_opt.passes.allocations import MEASURED
from liar_opt.passes.base import Pipeline
from liar_opt.passes.curves import Curves
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.gradient_scores import GRADIENT_SCORES, LABELLED_SCORES
from liar_opt.passes.measure_curves import MeasureCurvesPass
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.prune_job import prune
from liar_opt.passes.repairs import AWARE, REPAIRS
from liar_opt.passes.scores import SCORES
from liar_opt.runtime.calibration_data import load_calibration
from liar_opt.tools.demo_assets import minilm_folder, sentences, split
from liar_opt.tools.dev.harness import Cells, ahead_of, say, setting, table, work_folder
from liar_opt.tools.dev.subjects import sentiment
from liar_opt.tools.dev.subjects.minilm import CALIBRATION, Held, Workplace, embeddings

Options = dict[str, Any]
Array = NDArray[np.float64]
Kept = TypeVar("Kept", float, list[int])
HALF: Options = {"ffn": 0.5, "heads": 0.5}
RATIOS = (0.2, 0.35, 0.5)
SAMPLES = (16, 64, 256, 512, 1024, 3072)
"""Calibration sentences, for the ridge: from a quarter of a token for each channel to fifty."""
CHOSEN, POOL = 128, 2048
"""Sentences that are chosen, of so many."""
TARGET_SAMPLES = (21, 331)
"""Calibration sentences of some 512 and 8,192 tokens."""
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
ALLOCATIONS = ("uniform", "global", "flap", "curves")
ALIKE: Options = {"weighting": "none"}
METHODS: dict[str, Options] = {
    "FLAP: wifv, bias, standardised threshold": {"score": "wifv", "repair": "bias", "allocate": "flap", **ALIKE},
    "Wanda-sp: activation-weighted, no repair, uniform": {"score": "activation-weighted", "repair": "none", **ALIKE},
    "mask tuning: activation-weighted, scaling, uniform": {"score": "activation-weighted", "repair": "scaling", **ALIKE},
    "OBS (SlimGPT): greedy, liar, uniform": ALIKE,
    "OSSCAR: swaps, liar, uniform": {"score": "swaps", **ALIKE},
    "liar-opt: greedy, liar, curves": {"allocate": "curves"},
    "the same, query-key auto": {"allocate": "curves", "query_key": "auto"},
}
"""Published methods as far as they consist of parts that liar-opt has; not their authors' code."""
CHANGES: dict[str, Options] = {
    "the default": {},
    "without curves: uniform": {"allocate": "uniform"},
    "without greedy: activation-weighted": {"score": "activation-weighted"},
    "without repair": {"repair": "none"},
    "with swaps": {"score": "swaps"},
    "with query-key auto": {"query_key": "auto"},
    "without weighting: every row alike": ALIKE,
    "with repair dense": {"repair": "dense"},
    "with repair residual": {"repair": "residual"},
}
"""One at a time, from the default."""


class Bench:
    """Makes cells, or takes them from the file."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.cells = Cells(options.cells, indent=0)
        self.work = Workplace(folder, options)
        self.held, self.data = Held(self.work), self.work.batches(self.work.model)
        self.curves: dict[str, Curves] = {}
        self.name = "choosing" if options.choosing else "reviews"
        self.sentences: list[int] = options.sentences
        if options.choosing:
            texts = split("nyt", CALIBRATION, options.seed).rest[:256] + split("amazon", 256, options.seed).chosen
            self.held.texts = [s.text for s in texts]
            self.held.dense = embeddings(self.work.model.read_bytes(), self.held.texts)

    def cell(self, **options: Any) -> float:
        """Mean cosine of one way to prune."""
        names = [self.name, dict(sorted(options.items()))]
        return self.kept(names, partial(self.cosine, **options))

    def cosine(self, **options: Any) -> float:
        """The same, whatever is in the file."""
        return float(self.held.cosine(self.pruned(**options).SerializeToString())["mean"])

    def kept(self, names: list[Any], make: Callable[[], Kept]) -> Kept:
        """A figure, or one a sample, by what it is of: from the file, or made."""
        key = json.dumps([names[0], self.work.options.seed, *names[1:]])
        found: Kept = self.cells.made(key, make)
        say(f"{key}: {np.mean(found):.4f}")
        return found

    def pruned(
        self,
        *,
        allocate: str = "uniform",
        score: str = "greedy",
        samples: int = CALIBRATION,
        texts: Sequence[str] = (),
        **options: Any,
    ) -> Any:
        """Prunes as `prune()` does, without its checks and its timing."""
        ratios = {k: options.pop(k) for k in ("sparsity", "ffn", "heads", "values", "query_key") if k in options}
        state = load_state(self.work.model)
        state.calibration = self.data
        if texts or samples != CALIBRATION:
            # The first of a larger choice are those of a smaller one.
            texts = texts or [s.text for s in split("nyt", samples, self.work.options.seed).chosen]
            size = min(max(len(texts) // 16, 1), 32)  # as many batches, so that a tenth of the sentences is held back
            fields: Options = {"tokenizer": minilm_folder(), "batch_size": size, "samples": len(texts)}
            state.calibration = load_calibration(list(texts), state.model.inputs(), **fields)
        Pipeline(passes=[NormaliseGraphPass(), FindGroupsPass()])(state)
        seed = self.work.options.seed
        if allocate in MEASURED:
            if score not in self.curves:
                MeasureCurvesPass(score=score, seed=seed, queries=True)(state)
                self.curves[score] = state.found(Curves)
            state.add(self.curves[score])
        AllocateWidthsPass(**ratios, allocate=allocate)(state)
        PruneGroupsPass(score=score, seed=seed, **options)(state)
        return onnx_graph(state.model).to_proto()


def marked(values: Sequence[float], best: float) -> list[str]:
    """Four digits, the best in bold."""
    return [f"**{v:.4f}**" if v == best else f"{v:.4f}" for v in values]


def scores(bench: Bench) -> str:
    """Every score with every repair of its own layer, FFN 50 % and heads 50 % of every layer."""
    repairs = [r for r in REPAIRS if r not in AWARE]
    cells = {s: [bench.cell(score=s, repair=r, **HALF) for r in repairs] for s in SCORES if s not in GRADIENT_SCORES}
    rows = [[s, *marked(values, max(values))] for s, values in cells.items()]
    head = "FFN 50 % and heads 50 % of every layer; in bold the best repair of each score."
    return f"{head}\n\n{table(['score', *repairs], rows)}"


def allocations(bench: Bench) -> str:
    """The same sparsity, shared out in different ways."""
    cases: dict[str, Options] = {f"all kinds {r:.0%}": {"sparsity": r} for r in RATIOS}
    cases |= {"heads 50%": {"heads": 0.5}, "FFN 50%": {"ffn": 0.5}}
    columns = {n: [bench.cell(allocate=n, repair="liar", **case) for case in cases.values()] for n in ALLOCATIONS}
    rows = [
        [case, *marked(values, max(values))]
        for case, values in zip(cases, zip(*columns.values(), strict=True), strict=True)
    ]
    return f"Score greedy, repair liar.\n\n{table(['removed', *ALLOCATIONS], rows)}"


def methods(bench: Bench) -> str:
    """Published methods at the same number of parameters and the same calibration."""
    values = {n: [bench.cell(**{"repair": "liar", "sparsity": r, **o}) for r in RATIOS] for n, o in METHODS.items()}
    best = [max(column) for column in zip(*values.values(), strict=True)]
    rows = [[n, *(marked([v], b)[0] for v, b in zip(row, best, strict=True))] for n, row in values.items()]
    head = "The same share of all prunable parameters, the same calibration sentences."
    return f"{head}\n\n{table(['method', *(f'{r:.0%}' for r in RATIOS)], rows)}"


def ablation(bench: Bench) -> str:
    """What each part adds, one at a time."""
    known = {n: o for n, o in CHANGES.items() if o.get("repair", "liar") in REPAIRS}
    base = {"repair": "liar", "allocate": "curves"}
    values = {n: [bench.cell(**{**base, "sparsity": r, **o}) for r in RATIOS] for n, o in known.items()}
    default = values["the default"]
    rows = [
        [n, *(f"{v:.4f}" + ("" if row is default else f" ({v - d:+.4f})") for v, d in zip(row, default, strict=True))]
        for n, row in values.items()
    ]
    head = "The same share of all prunable parameters; in brackets the difference to the default."
    return f"{head}\n\n{table(['configuration', *(f'{r:.0%}' for r in RATIOS)], rows)}"


def widths(bench: Bench) -> str:
    """Values by channels and by a subspace, queries with keys, and whole heads, each cut by itself."""
    ways: dict[str, Callable[[float], Options]] = {
        "values by channels": lambda r: {"values": r, "value_cut": "select"},
        "values by a subspace": lambda r: {"values": r},
        "queries and keys by a form": lambda r: {"query_key": r},
        "both, by subspaces": lambda r: {"values": r, "query_key": r},
        "whole heads": lambda r: {"heads": r},
    }
    rows = [[n, *(f"{bench.cell(repair='liar', **way(r)):.4f}" for r in (0.25, 0.5))] for n, way in ways.items()]
    head = "Repair liar. Both together hold as many parameters as whole heads at the same share, each alone half of them."
    return f"{head}\n\n{table(['what goes', '25 %', '50 %'], rows)}"


def ridge(bench: Bench) -> str:
    """The ridge that is chosen against fixed ones and no repair, from few calibration sentences to many."""
    ways: dict[str, Options] = {"no repair": {"repair": "none"}, "chosen": {"repair": "liar"}}
    ways |= {f"{r:g}": {"repair": "liar", "ridge": r} for r in RIDGES}
    rows = []
    for samples in bench.sentences:
        values = [bench.cell(ffn=0.5, samples=samples, **way) for way in ways.values()]
        rows.append([f"{samples}", *marked(values, max(values))])
    return f"FFN 50 %; score greedy; in bold the best.\n\n{table(['calibration sentences', *ways], rows)}"


def choices(embedded: Array) -> Iterator[tuple[str, Any]]:
    """Ways to choose `CHOSEN` of a pool of sentences, by their embeddings [p, d] of length one: name and indices."""
    for seed in range(3):
        yield f"random, seed {seed}", np.random.default_rng(seed).permutation(len(embedded))[:CHOSEN]
    near = embedded @ embedded.T
    centres = [0]
    for _ in range(CHOSEN - 1):  # the one that is farthest from those before it
        centres.append(int(near[:, centres].max(axis=1).argmin()))
    yield "k-centre", np.asarray(centres)
    herd: list[int] = []
    for _ in range(CHOSEN):  # their mean, in the space of squared products, stays near that of the pool
        score = (near**2).mean(axis=1) - (near[:, herd] ** 2).sum(axis=1) / (len(herd) + 1)
        score[herd] = -np.inf
        herd.append(int(score.argmax()))
    yield "herding", np.asarray(herd)
    centred = embedded - embedded.mean(axis=0)
    covariance = np.cov(centred.T) + 1e-2 * np.var(centred) * np.eye(centred.shape[1])
    leverage = np.einsum("ij,ij->i", centred @ np.linalg.inv(covariance), centred)
    yield "largest leverage", np.argsort(-leverage)[:CHOSEN]


def samples(bench: Bench) -> str:
    """Whether choosing calibration sentences from a pool helps."""
    pool = [s.text for s in split("nyt", CALIBRATION, bench.work.options.seed).rest[256 : 256 + POOL]]
    embedded = embeddings(bench.work.model.read_bytes(), pool)
    lengths = np.asarray([len(text.split()) for text in pool])
    rows = []
    for name, chosen in [*choices(embedded), ("longest", np.argsort(-lengths, kind="stable")[:CHOSEN])]:
        texts = [pool[i] for i in np.sort(chosen)]
        value = bench.kept(["samples", bench.name, name], partial(bench.cosine, repair="liar", texts=texts, **HALF))
        rows.append([name, f"{int(lengths[chosen].sum()):,}", f"{value:.4f}"])
    head = f"{CHOSEN} calibration sentences of a pool of {POOL:,}; FFN 50 % and heads 50 % of every layer."
    return f"{head}\n\n{table(['chosen', 'words', 'cosine'], rows)}"


def targets(bench: Bench) -> str:
    """What a layer's weights are fitted to: its own output, the dense model's, or the dense stream behind it."""
    ways = {
        "the operator's own output": "liar",
        "the operator's output in the dense model": "dense",
        "the stream behind it in the dense model": "residual",
    }
    rows = []
    for count in TARGET_SAMPLES:
        texts = [s.text for s in split("nyt", count, bench.work.options.seed).chosen]
        tokens = bench.work.batches(bench.work.model, texts).tokens
        for ratio in RATIOS[1:]:
            values = [bench.cell(sparsity=ratio, samples=count, repair=repair) for repair in ways.values()]
            rows.append([f"{tokens:,}", f"{ratio:.0%}", *marked(values, max(values))])
    head = (
        "The same ratio in all layers, score greedy. Columns are `--repair liar`, `dense` and `residual`; behind the "
        "second matrix of a\nfeed-forward layer the stream is the output of the block."
    )
    return f"{head}\n\n{table(['calibration tokens', 'removed', *ways], rows)}"


def gradient_scores(bench: Bench) -> str:
    """Scores that need gradients, with every repair of its own layer, on sentiment classifiers as torch modules.

    The shares right are over the test parts of all folds together, and of every draw of the calibration sentences.
    """
    asked = bench.work.options
    folds = {fold: Fold(fold, asked.seed) for fold in range(asked.folds)}
    repairs = [r for r in REPAIRS if r not in AWARE]
    others = [r for r in repairs if r != "liar"]
    lines, ahead = [], []
    for score in asked.gradients:
        right = {}
        for repair in repairs:
            parts = []
            for fold, one in folds.items():
                key = ["classifier", score, repair]
                made = [
                    bench.kept([*key, draw, fold], partial(one.right_after, score, repair, draw))
                    for draw in range(asked.draws)
                ]
                parts.append(np.mean(np.array(made, np.float64), axis=0))
            right[repair] = np.concatenate(parts)
        values = [float(right[repair].mean()) for repair in repairs]
        lines.append([score, *marked(values, max(values))])
        ahead.append([score, *(ahead_of(right[repair], right["liar"]) for repair in others)])
    dense = np.concatenate([one.right(one.model()) for one in folds.values()])
    head = (
        "Accuracy of the classifier of `sentiment.py`, a torch module, on its test part; labels and calibration from "
        f"{CALIBRATION} sentences of its train part; FFN 50 % and heads 50 % of every layer. Dense: {dense.mean():.4f}."
        + (
            f" Over {asked.folds} folds: {dense.size:,} held-out sentences, each of a model that had not seen it."
            if asked.folds > 1
            else ""
        )
        + (f" Means over {asked.draws} draws of the 512 sentences." if asked.draws > 1 else "")
    )
    over = [f"LIAR over {repair}, points" for repair in others]
    return f"{head}\n\n{table(['score', *repairs], lines)}\n{table(['score', *over], ahead)}"


class Fold:
    """A classifier with the sentences that it was trained without."""

    def __init__(self, fold: int, seed: int) -> None:
        self.bed, self.seed = sentiment.ensure(fold=fold), seed
        self.parts = sentiment.labelled(sentences("reviews"), fold)
        self.test_ids = sentiment.token_ids([s.sentence for s in self.parts["test"]], self.bed.checkpoint)

    def model(self) -> Any:
        """The dense torch module."""
        from transformers import BertForSequenceClassification

        return BertForSequenceClassification.from_pretrained(self.bed.checkpoint).eval()

    def right(self, model: Any) -> NDArray[np.bool_]:
        """Which sentences of the test part get their class, [n]."""
        return sentiment.right(model, self.test_ids, [s.label for s in self.parts["test"]])

    @cache  # noqa: B019 - few folds, kept to the end
    def drawn(self, draw: int) -> tuple[list[Any], list[Any]]:
        """Calibration batches, and the labels of each."""
        import torch

        places = np.arange(CALIBRATION)
        if draw:
            places = np.random.default_rng(draw).permutation(len(self.parts["train"]))[:CALIBRATION]
        train = [self.parts["train"][place] for place in places]
        ids = sentiment.token_ids([s.sentence for s in train], self.bed.checkpoint)
        rows = list(sentiment.batches(ids, None))
        feeds = [sentiment.padded([ids[row] for row in own]) for own in rows]
        return feeds, [torch.tensor([train[row].label for row in own]) for own in rows]

    def right_after(self, score: str, repair: str, draw: int) -> list[int]:
        """Which test sentences the pruned model is right about, zeros and ones."""
        import torch

        def loss(outputs: Mapping[str, torch.Tensor], labels: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(next(iter(outputs.values())), labels, reduction="sum")

        feeds, truth = self.drawn(draw)
        tensors = [{name: torch.from_numpy(value) for name, value in own.items()} for own in feeds]
        given: Options = {"checkpoint": False, **HALF}  # BERT cannot say another number of heads
        if score in LABELLED_SCORES:
            given |= {"loss": loss, "labelled": list(zip(tensors, truth, strict=True))}
        result: Any = prune(self.model(), feeds, score=score, repair=repair, seed=self.seed, latency=False, **given)
        return [int(right) for right in self.right(result.module)]


SECTIONS = {
    "methods": methods,
    "ablation": ablation,
    "allocations": allocations,
    "widths": widths,
    "scores": scores,
    "gradient-scores": gradient_scores,
    "ridge": ridge,
    "samples": samples,
    "targets": targets,
}


def markdown(texts: Mapping[str, str], given: Mapping[str, Any], choosing: bool) -> str:
    """The tables under their commands."""
    where = "512 sentences that defaults were chosen on" if choosing else "1,024 held-out film-review sentences"
    head = (
        f"Mean cosine between the sentence embeddings of the dense and the pruned all-MiniLM-L6-v2 over {where};\n"
        f"calibrated on {CALIBRATION} sentences of NYT editorials. Seed {given['seed']}; commit {given['commit']}.\n"
    )
    more = " --choosing" if choosing else ""
    return head + "".join(
        f"\n### {name.capitalize()}\n\n`python tools/dev/bench.py beyond --only {name}{more}`\n\n{text}"
        for name, text in texts.items()
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--only", choices=tuple(SECTIONS), action="append", help="leave out the others; may be repeated")
    parser.add_argument("--choosing", action="store_true", help="measure on the sentences that choices are made on")
    parser.add_argument("--cells", type=Path, help="a JSON file that keeps the cells")
    parser.add_argument(
        "--sentences", type=int, nargs="+", default=SAMPLES, help="numbers of calibration sentences (ridge)"
    )
    parser.add_argument("--markdown", type=Path, help="write the tables")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    measured = (*GRADIENT_SCORES, "greedy")
    parser.add_argument(
        "--gradients", choices=measured, nargs="+", default=measured, help="these scores alone (gradient-scores)"
    )
    parser.add_argument(
        "--draws", type=int, default=1, help="of the calibration sentences, whose mean is taken (gradient-scores)"
    )
    parser.add_argument(
        "--folds",
        type=int,
        choices=range(1, sentiment.FOLDS + 1),
        default=1,
        help="of the classifier's sentences, each with a model trained without them (gradient-scores)",
    )


def main(options: argparse.Namespace) -> int:
    """Run the sections and print their tables."""
    with work_folder(options.folder) as folder:
        bench, texts = Bench(options, folder), {}
        for name, section in SECTIONS.items():
            if not options.only or name in options.only:
                texts[name] = section(bench)
                written = markdown(texts, setting(options.seed), options.choosing)
                if options.markdown:
                    options.markdown.write_text(written, encoding="utf-8")
    print(written)
    return 0
