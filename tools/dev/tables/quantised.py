"""Pruning what is quantised already beside pruning the float model and quantising that.

    python tools/dev/bench.py quantised                                  # MiniLM, some ten minutes on 2 cores
    python tools/dev/bench.py quantised --subject smollm2 --scheme int4  # SmolLM2, whose weights are in blocks of 4 bits

Each scheme is made by ONNX Runtime's quantiser from the float model (`frontend/onnx_quantise.py`). MiniLM is calibrated on
512 sentences of NYT editorials, and measured by the mean cosine of sentence embeddings to those of the dense float model
over 1,024 sentences of film reviews; SmolLM2 on packed windows of Brown, and measured by the perplexity of Wikipedia.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from liar_opt.frontend.onnx_model import OnnxModel, OnnxOriginal
from liar_opt.frontend.onnx_quantise import BLOCKS, SCHEMES, STATIC, Scheme, quantised
from liar_opt.frontend.weight_files import completed, write_model
from liar_opt.passes.prune_job import prune
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.dev.harness import Cells, say, table, work_folder
from liar_opt.tools.dev.subjects.minilm import HELD_OUT, Held, Workplace
from liar_opt.tools.dev.subjects.smollm2 import ensure
from liar_opt.tools.dev.tables.decoder import feed, measure, windows

SUBJECTS = ("minilm", "smollm2")
ROWS = ("dense, float", "dense, quantised", "float pruned, then quantised", "quantised pruned")
WINDOW = 256


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the table."""
    parser.add_argument("--subject", choices=SUBJECTS, default="minilm")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="one of them alone; may be repeated")
    parser.add_argument("--sparsity", type=float, default=0.2, help="default: %(default)s")
    parser.add_argument("--allocate", help="how it is shared out; default: that of liar-opt")
    parser.add_argument("--sentences", type=int, default=HELD_OUT, help="held-out ones of MiniLM (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="calibration tokens of SmolLM2 (default: %(default)s)")
    parser.add_argument("--held", type=int, default=32768, help="held-out tokens of SmolLM2 (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="keep the figures; those that it has are not made again")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


class MiniLM:
    """The sentence encoder."""

    measure = "held-out cosine"

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.work, self.given = Workplace(folder, options), _allocation(options)
        self.held = Held(self.work, options.sentences)
        self.model = self.work.model

    def batches(self) -> Sequence[Mapping[str, Any]]:
        """What ranges of activations are taken from."""
        return self.work.batches(self.model).batches

    def prune(self, model: Path, sparsity: float, **more: Any) -> Any:
        """Prunes one file."""
        return self.work.prune(model, sparsity=sparsity, **self.given, **more)

    def quality(self, model: onnx.ModelProto) -> float:
        """How near embeddings are to those of the dense float model."""
        return self.held.cosine(model.SerializeToString())["mean"]


class SmolLM2:
    """The decoder."""

    measure = "perplexity"

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        del folder
        self.model, tokenizer = ensure(cache_folder() / "smollm2")
        self.given, self.seed = _allocation(options), options.seed
        self.ids = windows("brown", options.tokens, WINDOW, options.seed, tokenizer)
        self.held = windows("wikipedia", options.held, WINDOW, options.seed, tokenizer)

    def batches(self) -> Sequence[Mapping[str, Any]]:
        """What ranges of activations are taken from."""
        return [feed(self.ids[start : start + 8]) for start in range(0, len(self.ids), 8)]

    def prune(self, model: Path, sparsity: float, **more: Any) -> Any:
        """Prunes one file."""
        given = {"batch_size": 8, "samples": len(self.ids), "seed": self.seed, "provider": "cpu", "latency": False}
        return prune(model, feed(self.ids), sparsity=sparsity, fresh=True, **given, **self.given, **more)

    def quality(self, model: onnx.ModelProto) -> float:
        """The perplexity of held-out text."""
        return measure(model, self.held)


def _allocation(options: argparse.Namespace) -> dict[str, Any]:
    return {} if options.allocate is None else {"allocate": options.allocate}


def main(options: argparse.Namespace) -> int:
    """Makes and prints the table."""
    cells = Cells(options.json)
    schemes = options.scheme or ([BLOCKS] if options.subject == "smollm2" else ["int8", STATIC])
    with work_folder(options.folder) as folder:
        subject = (MiniLM if options.subject == "minilm" else SmolLM2)(folder, options)
        rows = []
        for scheme in schemes:
            for row in ROWS:
                key = f"{options.subject} {scheme} {row}"
                made = cells.made(key, partial(_made, subject, folder, scheme, row, options))
                kept = made.get("kept_scheme") or {}
                told = f"{kept['difference']:.1e} / {kept['allowed']:.1e}" if kept else ""
                rows.append([scheme, row, f"{made['bytes'] / 1e6:.1f}", f"{made['quality']:.4f}", told])
    head = ["scheme", "model", "MB", subject.measure, "from the masked / allowed"]
    print(f"{options.subject}, {options.sparsity:.0%} removed, seed {options.seed}\n\n{table(head, rows)}")
    return 0


def _made(subject: Any, folder: Path, scheme: str, row: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model: its bytes, how good it is, and what its report says of the scheme."""
    how, report = Scheme(scheme), {}
    if row == ROWS[0]:
        proto = onnx.load(subject.model)
    elif row == ROWS[1]:
        proto = completed(*_dense(subject, how).as_written())
    elif row == ROWS[2]:
        more = {"multiple_of": how.block} if scheme == BLOCKS else {}
        pruned = subject.prune(subject.model, options.sparsity, **more).pruned
        proto = quantised(OnnxOriginal(*pruned.as_written()), how, _ranges(subject, scheme))[0].as_given()
    else:
        path = folder / f"{options.subject}.{scheme}.onnx"
        write_model(*_dense(subject, how).as_written(), path)
        result = subject.prune(path, options.sparsity)
        proto, report = result.model, result.report["kept_scheme"]
    found = {"bytes": proto.ByteSize(), "quality": subject.quality(proto), "kept_scheme": report}
    say(f"{scheme}, {row}: {found['bytes']:,} bytes, {subject.measure} {found['quality']:.4f}")
    return found


def _dense(subject: Any, how: Scheme) -> OnnxOriginal:
    """The dense model, quantised."""
    loaded = OnnxModel.load(subject.model)
    return quantised(OnnxOriginal(*loaded.as_written()), how, _ranges(subject, how.name))[0]


def _ranges(subject: Any, scheme: str) -> Sequence[Mapping[str, np.ndarray]]:
    return subject.batches() if scheme == STATIC else ()
