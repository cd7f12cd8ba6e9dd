"""Cut the vocabulary of all-MiniLM-L6-v2 to that of film reviews, alone and with widths, and look at reviews held out.

    python tools/dev/bench.py vocabulary

The vocabulary is that of all review sentences but 1,000, on which embeddings are compared with those of the dense model.
Widths are calibrated on editorials, as everywhere.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from liar_opt.runtime.text_tokenizer import load_tokenizer
from liar_opt.tools.demo_assets import minilm_folder, split
from liar_opt.tools.dev.harness import say, setting, table, work_folder
from liar_opt.tools.dev.subjects.minilm import Held, Workplace

SENTENCES = 1000
"""Held out."""
RUNS: dict[str, dict[str, Any]] = {
    "all words, 30 %": {"sparsity": 0.3},
    "words of the corpus": {"vocabulary": True},
    "99.9 % of its tokens": {"vocabulary": True, "vocabulary_coverage": 0.999},
    "99 % of its tokens": {"vocabulary": True, "vocabulary_coverage": 0.99},
    "words of the corpus, 30 %": {"vocabulary": True, "sparsity": 0.3},
    "99.9 % of its tokens, 30 %": {"vocabulary": True, "vocabulary_coverage": 0.999, "sparsity": 0.3},
}


def measured(work: Workplace, held: Held, corpus: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Cuts; returns the file's size, words, shares of tokens and sentences that are kept, and the cosine."""
    given = {name: corpus if value is True else value for name, value in options.items()}
    result = work.prune(work.model, **given)
    result.save(path := work.folder / "out.onnx", force=True)
    cell = {"bytes": path.stat().st_size, **held.cosine(path.read_bytes()), **(result.report.get("vocabulary") or {})}
    if "kept" in cell:
        tokenizer = load_tokenizer(minilm_folder())
        numbers = next(w for w in tables_of(path) if w.size == cell["words"])
        left = numbers != numbers[cell["unknown"]]
        left[cell["unknown"]] = True
        known = [left[ids] for ids, _ in tokenizer.encode(held.texts, None)]
        specials = tokenizer.specials * len(known)
        tokens = sum(map(len, known)) - specials
        cell["held"] = (sum(int(k.sum()) for k in known) - specials) / tokens
        cell["whole"] = float(np.mean([k.all() for k in known]))
    return cell


def tables_of(path: Path) -> list[Any]:
    """Returns the integer tables of a graph that ids pass through."""
    import onnx

    tensors = onnx.load(path).graph.initializer
    return [onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT32 and len(t.dims) == 1]


def vocabulary_table(dense: int, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Size against what is kept."""
    rows = [["dense", f"{dense / 1e6:.2f} MB", "", "30,522", "", "", "", "1.0000", "1.0000"]]
    for name, cell in found.items():
        shares = [f"{cell[key]:.2%}" if key in cell else "" for key in ("share", "held", "whole")]
        size = [f"{cell['bytes'] / 1e6:.2f} MB", f"{cell['bytes'] / dense - 1:+.1%}", f"{cell.get('kept', 30522):,}"]
        rows.append([name, *size, *shares, f"{cell['mean']:.4f}", f"{cell['p5']:.4f}"])
    head = ["", "file", "", "words", "tokens of the corpus", "tokens held out", "sentences held out, whole"]
    text: str = table([*head, "cosine, held-out", "its 5 % quantile"], rows)
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
        held, corpus = Held(work, SENTENCES), folder / "reviews.txt"
        sentences = [s.text for s in split("reviews", SENTENCES, options.seed).rest]
        corpus.write_text("".join(f"{s}\n" for s in sentences), encoding="utf-8")
        print(
            f"`python tools/dev/bench.py vocabulary`\n\nSeed {given['seed']}; commit {given['commit']}, {given['date']}; "
            f"the corpus has {len(sentences):,} sentences, {SENTENCES:,} others are held out."
        )
        found = {}
        for name in options.runs:
            found[name] = measured(work, held, corpus, RUNS[name])
            say(f"{name}: {found[name]}")
        print(f"\n{vocabulary_table(work.model.stat().st_size, found)}", flush=True)
    return 0
