"""all-MiniLM-L6-v2 and the sentences that it is calibrated and measured on.

Calibrated on 512 sentences of NYT editorials, measured on 1,024 of film reviews, both drawn with the seed (see
`tools/demo_assets.py`).
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.tables import vocabulary
from liar_opt.passes.prune_job import prune
from liar_opt.runtime.calibration_data import CalibrationData, load_calibration
from liar_opt.runtime.sessions import Session
from liar_opt.tools.demo import tokenise
from liar_opt.tools.demo_assets import MINILM_OUTPUT, export_minilm, minilm_folder, split
from liar_opt.tools.dev.harness import measured

CALIBRATION, HELD_OUT = 512, 1024
HALVES: dict[str, dict[str, float]] = {
    "FFN 50 %": {"ffn": 0.5},
    "heads 50 %": {"heads": 0.5},
    "FFN 50 % + heads 50 %": {"ffn": 0.5, "heads": 0.5},
}
BOTH = "FFN 50 % + heads 50 %"


@dataclass
class Workplace:
    """Files, sentences and options of this run.

    Attributes:
        folder: where files are made.
        options: of the command.
        text: the calibration sentences as a file, one a line.
        sentences: the same.
        model: MiniLM, TorchScript exporter, eager attention.
    """

    folder: Path
    options: argparse.Namespace
    text: Path = field(init=False)
    sentences: list[str] = field(init=False)
    model: Path = field(init=False)

    def __post_init__(self) -> None:
        self.sentences = [s.text for s in split("nyt", CALIBRATION, self.options.seed).chosen]
        self.text = self.folder / "nyt.txt"
        self.text.write_text("".join(f"{s}\n" for s in self.sentences), encoding="utf-8")
        self.model = export_minilm(self.folder / "model.onnx")

    def prune(self, model: Path, **options: Any) -> Any:
        """Prunes in this process, on the calibration sentences."""
        given: dict[str, Any] = {
            "tokenizer": minilm_folder(),
            "seed": self.options.seed,
            "fresh": True,
            "provider": "cpu",
            "latency": False,
        }
        return prune(model, self.sentences, **(given | options))

    def batches(self, model: Path, sentences: Sequence[str] | None = None, batch_size: int = 32) -> CalibrationData:
        """The batches that liar-opt makes of sentences (those of the calibration), by the code that makes them there."""
        loaded = OnnxModel.load(model)
        given = self.sentences if sentences is None else list(sentences)
        return load_calibration(
            given,
            loaded.inputs(),
            tokenizer=minilm_folder(),
            samples=len(given),
            batch_size=batch_size,
            seed=self.options.seed,
            vocabulary=vocabulary(loaded),
        )

    def command_line(self, model: Path, halves: Mapping[str, float], text: Path | None = None) -> list[str]:
        """The arguments of `liar-opt` for one run, on the calibration sentences or those of another file."""
        chosen = [f"--{kind}={ratio}" for kind, ratio in halves.items()]
        data = [f"--calibration={text or self.text}", f"--tokenizer={minilm_folder()}", f"--seed={self.options.seed}"]
        results = [f"--output={self.folder / 'out.onnx'}", f"--report={self.folder / 'out.json'}", "--force", "--quiet"]
        return [str(model), *data, *chosen, "--provider=cpu", "--fresh", *results]

    def liar_opt(self, model: Path, halves: Mapping[str, float], *more: str, text: Path | None = None) -> dict[str, Any]:
        """Runs the command; returns what it used, and its report."""
        used = measured([sys.executable, "-m", "liar_opt", *self.command_line(model, halves, text), *more], self.folder)
        if used["code"]:
            raise SystemExit(f"liar-opt failed with exit code {used['code']} on '{model}'")
        return {**used, "report": json.loads((self.folder / "out.json").read_text(encoding="utf-8"))}


def embeddings(model: bytes, texts: Sequence[str]) -> NDArray[np.float64]:
    """Sentence embeddings of unit length: the mean over the real tokens, [n, d]."""
    session, result = Session(model), np.empty((len(texts), 0))
    for rows, feeds in tokenise(texts, minilm_folder()):
        hidden = session.run(feeds, [MINILM_OUTPUT], arrays=True)[MINILM_OUTPUT].astype(np.float64)
        mask = feeds["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)  # [b, s, d] -> [b, d]
        if not result.size:
            result = np.empty((len(texts), pooled.shape[1]))
        result[rows] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return result


class Held:
    """The held-out sentences and the dense model's embeddings of them."""

    def __init__(self, work: Workplace, sentences: int = HELD_OUT) -> None:
        self.texts = [s.text for s in split("reviews", sentences, work.options.seed).chosen]
        self.dense = embeddings(work.model.read_bytes(), self.texts)

    def cosine(self, pruned: bytes) -> dict[str, float]:
        """Mean and 5 % quantile of the cosine between a model's embeddings and the dense model's."""
        cosines = (self.dense * embeddings(pruned, self.texts)).sum(1)
        return {"mean": float(cosines.mean()), "p5": float(np.quantile(cosines, 0.05))}


def forward_seconds(session: Session, data: CalibrationData) -> float:
    """Seconds of one pass of a model over all batches."""
    began = time.perf_counter()
    for batch in data.batches:
        session.run(batch, arrays=True)
    return time.perf_counter() - began


def optimised(model: Path, path: Path) -> Path:
    """Writes what ONNX Runtime's transformers optimizer makes of a MiniLM."""
    from onnxruntime.transformers.optimizer import optimize_model

    with contextlib.redirect_stdout(sys.stderr):
        fused = optimize_model(str(model), model_type="bert", num_heads=12, hidden_size=384)
        fused.save_model_to_file(str(path))
    return path
