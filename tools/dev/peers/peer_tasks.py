"""The models that `bench.py peers` prunes: their files, their calibration data, and what is measured of the result.

Every task has the dense ONNX file, the transformers checkpoint that it came from, and the calibration data as liar-opt
reads it and as the drivers of the peers do (`peer_files.py`): the same samples.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.tables import vocabulary
from liar_opt.runtime.calibration_data import load_calibration
from liar_opt.runtime.latency import Deployed, measure_latency
from liar_opt.runtime.metrics import accuracy, divergences
from liar_opt.runtime.sessions import Session
from liar_opt.tools.demo_assets import export_minilm, minilm_folder, sentences, split
from liar_opt.tools.dev.harness import store_batches
from liar_opt.tools.dev.subjects import sentiment
from liar_opt.tools.dev.subjects.minilm import CALIBRATION, HELD_OUT, embeddings, optimised
from liar_opt.tools.dev.tables.decoder import feed, measure, windows

TOKENS, WINDOW, ROWS = 8192, 128, 8
"""Of the decoder: calibration and evaluation tokens, tokens of a window, windows of a batch."""
LATENCY_SECONDS = 4.0


class Task:
    """One model.

    Attributes:
        name: on the command line.
        title: above the table.
        text: what is measured, on what, in a sentence.
        metric: the column's name.
        higher: whether more is better.
        digits: of the score.
        model: the dense ONNX file.
        checkpoint: the transformers checkpoint.
        prunable: parameters of FFN and heads.
        batch: batch and tokens of the latency.
    """

    name, title, text, metric = "", "", "", "score"
    higher, digits, batch = True, 4, (8, 128)
    model: Path
    checkpoint: Path
    prunable: int

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        self.prepare()

    def prepare(self) -> None:
        """Makes the files."""
        raise NotImplementedError

    def score(self, pruned: Path) -> float:
        """Of a pruned (or the dense) model."""
        raise NotImplementedError

    def beside(self, pruned: Path) -> dict[str, float]:
        """What else is measured of a model, by name: nothing."""
        return {}

    def right(self, pruned: Path) -> NDArray[np.bool_] | None:
        """Which held-out samples a model is right about, [n]; None where the score is no share of samples."""
        return None

    def our_data(self) -> list[str]:
        """The arguments with which liar-opt reads the calibration data."""
        raise NotImplementedError

    def shares(self, ratio: float) -> tuple[float, float]:
        """The fractions of heads and of the FFN to ask a tool for that takes the same of every layer.

        Whole heads, as many as the ratio has; the rest of its parameters from the FFN.
        """
        c = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        d, q, h = c["hidden_size"], c["num_attention_heads"], c["intermediate_size"]
        head, unit, heads = (4 * d + 3) * d // q, 2 * d + 1, int(ratio * q)
        return heads / q + 1e-6, (ratio * (q * head + h * unit) - heads * head) / (h * unit)

    @property
    def calibration(self) -> Path:
        """The calibration data as the drivers read it."""
        return self.folder / f"{self.name}-calibration.npz"

    def graph(self, kind: str) -> Path:
        """The dense graph: "plain", or what ONNX Runtime's transformers optimizer makes of it."""
        path = self.folder / f"{self.name}-optimised.onnx"
        if kind == "plain":
            return self.model
        return path if path.is_file() else optimised(self.model, path)

    def removed(self, pruned: Path, graph: str = "plain") -> float:
        """The fraction of the prunable parameters that is gone; what has the vocabulary as an axis does not count."""
        return (weights(self.graph(graph)) - weights(pruned)) / self.prunable

    def latency(self, pruned: Path) -> tuple[float, float]:
        """Median seconds of a run of the dense and of the pruned model, in turns, two threads."""
        models = [Deployed(path, threads=2) for path in (self.model, pruned)]
        rng = np.random.default_rng(self.options.seed)
        feeds = {
            name: np.ones(self.batch, np.int64)
            for name in (i.name for i in onnx.load(self.model, load_external_data=False).graph.input)
        }
        feeds["input_ids"] = rng.integers(1000, 2000, self.batch)
        found = measure_latency(models, feeds, LATENCY_SECONDS, least=10, most=500)
        return found.seconds[0], found.seconds[-1]


def weights(path: Path) -> int:
    """Numbers in the floating-point initializers and constants of a file, those along a vocabulary left out."""
    graph = onnx.load(path).graph
    tensors = [
        *graph.initializer,
        *(a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"),
    ]
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return sum(math.prod(t.dims) for t in tensors if t.data_type in floats and max(t.dims, default=0) < 30_000)


def encoder_parameters(config: Mapping[str, Any]) -> int:
    """Prunable parameters of a BERT: FFN and heads with their biases, but those of the residual stream."""
    d, h = config["hidden_size"], config["intermediate_size"]
    return int(config["num_hidden_layers"] * (4 * d * d + 3 * d + 2 * d * h + h))


class Encoder(Task):
    """What the two BERTs share: texts."""

    texts: list[str]

    def text_file(self) -> Path:
        """The calibration texts, one a line."""
        return self.folder / f"{self.name}.txt"

    def our_data(self) -> list[str]:
        """Texts and tokenizer."""
        return [f"--calibration={self.text_file()}", f"--tokenizer={self.checkpoint}"]

    def store_texts(self, label: Callable[[dict[str, Any]], NDArray[np.int64]] | None = None) -> None:
        """Writes the texts, and the batches that liar-opt makes of them, for the drivers."""
        self.text_file().write_text("".join(f"{text}\n" for text in self.texts), encoding="utf-8")
        loaded = OnnxModel.load(self.model)
        data = load_calibration(
            self.texts, loaded.inputs(), tokenizer=self.checkpoint, seed=self.options.seed, vocabulary=vocabulary(loaded)
        )
        store_batches(
            self.calibration, [{**batch, **({"labels": label(batch)} if label else {})} for batch in data.batches]
        )
        self.prunable = encoder_parameters(json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8")))


class Classifier(Encoder):
    """Sentiment of film reviews, see `sentiment.py`."""

    name, title, metric = "classifier", "A sentiment classifier", "accuracy"
    text = (
        f"Accuracy of MiniLM fine-tuned on film reviews (`sentiment.py`) on its test part; calibrated on {CALIBRATION} "
        "sentences of its train part. Tools that need a loss get these sentences' labels."
    )

    def prepare(self) -> None:
        """Trains the classifier where it is not there yet."""
        bed = sentiment.ensure(self.options.classifier, fold=self.options.fold)
        self.checkpoint, self.model = bed.checkpoint, bed.model
        parts = sentiment.labelled(sentences("reviews"), self.options.fold)
        drawn = np.random.default_rng(self.options.seed).permutation(len(parts["train"]))[:CALIBRATION]
        chosen = [parts["train"][row] for row in drawn]
        self.test, self.texts = parts["test"], [sample.sentence for sample in chosen]
        tokens = map(tuple, sentiment.token_ids(self.texts, self.checkpoint))
        known = dict(zip(tokens, (sample.label for sample in chosen), strict=True))

        def label(batch: dict[str, Any]) -> NDArray[np.int64]:
            pairs = zip(batch["input_ids"], batch["attention_mask"].astype(bool), strict=True)
            return np.array([known[tuple(map(int, ids[mask]))] for ids, mask in pairs], np.int64)

        self.store_texts(label)

    def score(self, pruned: Path) -> float:
        """Share of right classes."""
        return float(self.right(pruned).mean())

    def right(self, pruned: Path) -> NDArray[np.bool_]:
        """Which sentences of the test part get their class."""
        return np.asarray(self.logits(pruned).argmax(1) == [sample.label for sample in self.test])

    def beside(self, pruned: Path) -> dict[str, float]:
        """Agreement with the dense model, and the divergence of the probabilities from its."""
        dense, found = self.logits(self.model), self.logits(pruned)
        return {
            "agreement": accuracy(found.argmax(1), dense.argmax(1)),
            "divergence": float(divergences(dense, found).mean()),
        }

    @functools.lru_cache(maxsize=3)  # noqa: B019 - there is one task
    def logits(self, path: Path) -> NDArray[np.float32]:
        """Of the test part, [n, 2]."""
        session, ids = Session(path.read_bytes()), sentiment.token_ids([s.sentence for s in self.test], self.checkpoint)
        found = np.empty((len(ids), len(sentiment.LABELS)), np.float32)
        for rows in sentiment.batches(ids, None):
            feeds = sentiment.padded([ids[row] for row in rows])
            found[rows] = session.run(feeds, ["logits"], arrays=True)["logits"]
        return found


class MiniLM(Encoder):
    """Sentence embeddings."""

    name, title, metric = "minilm", "all-MiniLM-L6-v2: sentence embeddings", "cosine"
    text = (
        f"Mean cosine between the sentence embeddings of the dense and the pruned model over {HELD_OUT:,} held-out "
        f"film-review sentences; calibrated on {CALIBRATION} sentences of NYT editorials."
    )

    def prepare(self) -> None:
        """Exports MiniLM."""
        self.checkpoint, self.model = minilm_folder(), self.folder / "minilm.onnx"
        if not self.model.is_file():
            export_minilm(self.model)
        self.texts = [sentence.text for sentence in split("nyt", CALIBRATION, self.options.seed).chosen]
        self.store_texts()

    @functools.cached_property
    def _held(self) -> tuple[list[str], NDArray[np.float64]]:
        texts = [sentence.text for sentence in split("reviews", HELD_OUT, self.options.seed).chosen]
        return texts, embeddings(self.model.read_bytes(), texts)

    def score(self, pruned: Path) -> float:
        """Mean cosine to the dense model's embeddings."""
        texts, dense = self._held
        return float((dense * embeddings(pruned.read_bytes(), texts)).sum(1).mean())


class SmolLM2(Task):
    """A decoder with grouped-query attention."""

    name, title, metric = "smollm2", "SmolLM2-135M-Instruct: a decoder", "perplexity"
    higher, digits, batch = False, 2, (1, 128)
    text = (
        f"Perplexity on {TOKENS:,} tokens of Wikipedia, windows of {WINDOW}; calibrated on {TOKENS:,} tokens of Brown. "
        "The weights are dequantised from 4 bits."
    )

    def prepare(self) -> None:
        """Exports SmolLM2, and writes a checkpoint that transformers 4 reads as well."""
        from liar_opt.tools.dev.subjects.smollm2 import ensure

        self.model, tokenizer = ensure(self.folder / "smollm2")
        self.checkpoint = self.folder / "smollm2" / "checkpoint"
        if not (self.checkpoint / "config.json").is_file():
            write_checkpoint(self.checkpoint)
        seed = self.options.seed
        self._held = windows("wikipedia", TOKENS, WINDOW, seed, tokenizer)
        ids = windows("brown", TOKENS, WINDOW, seed, tokenizer)
        store_batches(self.calibration, [feed(ids[start : start + ROWS]) for start in range(0, len(ids), ROWS)])
        np.savez(self._arrays, **feed(ids))  # type: ignore[arg-type]
        c = json.loads((self.checkpoint / "config.json").read_text(encoding="utf-8"))
        d, shared = c["hidden_size"], c["num_key_value_heads"] * (c["hidden_size"] // c["num_attention_heads"])
        self.prunable = c["num_hidden_layers"] * (2 * d * d + 2 * d * shared + 3 * d * c["intermediate_size"])

    @property
    def _arrays(self) -> Path:
        return self.folder / f"{self.name}-windows.npz"

    def our_data(self) -> list[str]:
        """Windows of tokens."""
        return [f"--calibration={self._arrays}", f"--batch-size={ROWS}"]

    def score(self, pruned: Path) -> float:
        """Perplexity."""
        return measure(onnx.load(pruned), self._held)


def write_checkpoint(folder: Path) -> None:
    """Writes SmolLM2 as safetensors, its configuration as transformers 4 spells it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from liar_opt.tools.dev.subjects.smollm2 import load_model

    read = load_model()
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    rope = written.pop("rope_parameters", {})
    written = {"rope_theta": rope.get("rope_theta", 10000.0), "torch_dtype": "float32", **written}
    path.write_text(json.dumps(written, indent=1), encoding="utf-8")


TASKS: dict[str, Callable[[argparse.Namespace], Task]] = {
    "classifier": Classifier,
    "minilm": MiniLM,
    "smollm2": SmolLM2,
}
