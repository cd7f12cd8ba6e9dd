"""A sentiment classifier and its data, from package registries alone: all-MiniLM-L6-v2 fine-tuned on film reviews.

    python tools/dev/bench.py sentiment                 # some minutes on 2 cores; the accuracy on all three parts

Sentences are the snippets of film reviews of `tools/demo_assets.py`, one of a review each, with the mean rating of twenty
people on [-4, 4]. Those between -0.5 and 0.5 are left out; the others are positive (1) or negative (0). Which part a
sentence belongs to follows from the SHA-256 of its text: 70 % train, 10 % dev, 20 % test, whatever file they come from.
Each of five folds (`--fold`) has a test part of its own; together these are all sentences, and every fold has its model.

The model is a stock BertForSequenceClassification (the pooler takes the first token). AdamW, a rate that rises over the
first tenth and falls to zero, seeded; the epoch that is best on dev is kept. In the folder, the cache's unless told
otherwise:

- train.jsonl, dev.jsonl, test.jsonl: `sentence`, `label`, `rating`;
- checkpoint/: what transformers reads; onnx/: model.onnx (input_ids, attention_mask, token_type_ids [b, s] -> logits
  [b, 2]; TorchScript exporter, attention written out) with config.json and tokenizer.json beside it.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.demo_assets import (
    MINILM_INPUTS,
    Sentence,
    _quiet,
    export_bert,
    minilm_folder,
    moved_into_place,
    sentences,
)
from liar_opt.tools.dev.harness import say

NEUTRAL = 0.5
"""Mean ratings nearer to zero than this are neither positive nor negative."""
PARTS = {"train": 70, "dev": 10, "test": 20}
FOLDS = 5
LABELS = ("negative", "positive")
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
LONGEST = 128
BATCH = 32
EPOCHS = 4
RATE = 1e-4
WARM_UP = 0.1
WEIGHT_DECAY = 0.01
KEPT_STEPS = 50
"""After so many, and after an epoch, the state of the training is kept."""


class Sample(NamedTuple):
    """A sentence with its class."""

    sentence: str
    label: int
    rating: float


class Testbed(NamedTuple):
    """Where the files are."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The folder that transformers reads."""
        return self.folder / "checkpoint"

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / "onnx" / "model.onnx"

    def part(self, name: str) -> Path:
        """The sentences of "train", "dev" or "test"."""
        return self.folder / f"{name}.jsonl"


# The data --------------------------------------------------------------------------------------------------------------


def part_of(text: str, fold: int = 0) -> str:
    """The part that a sentence belongs to in a fold, by its text alone; it is of the test part in one of `FOLDS`."""
    place = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
    place = (place + fold * PARTS["test"]) % sum(PARTS.values())
    for name, share in PARTS.items():
        if place < share:
            return name
        place -= share
    raise AssertionError("the shares cover every place")


def labelled(everything: Sequence[Sentence], fold: int = 0) -> dict[str, list[Sample]]:
    """The sentences that are positive or negative, by part, in their order."""
    parts: dict[str, list[Sample]] = {name: [] for name in PARTS}
    for rating, text in everything:
        if abs(rating) >= NEUTRAL:
            parts[part_of(text, fold)].append(Sample(text, int(rating > 0), rating))
    return parts


def write_parts(bed: Testbed, fold: int = 0) -> dict[str, list[Sample]]:
    """Writes the parts that are not there yet, and returns all."""
    parts = labelled(sentences("reviews"), fold)
    for name, samples in parts.items():
        if not bed.part(name).is_file():
            lines = (json.dumps(sample._asdict(), ensure_ascii=False) for sample in samples)
            with moved_into_place(bed.part(name)) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return parts


# Training --------------------------------------------------------------------------------------------------------------


def batches(ids: Sequence[Sequence[int]], rng: np.random.Generator | None) -> Iterator[NDArray[np.int64]]:
    """Rows of batches of like length: in random order with a generator, else shortest first."""
    lengths = np.array([len(row) for row in ids])
    noise = np.zeros(len(ids)) if rng is None else rng.random(len(ids)) * 8  # else the same ones meet in every epoch
    order = np.argsort(lengths + noise, kind="stable")
    groups = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    for index in range(len(groups)) if rng is None else rng.permutation(len(groups)):
        yield groups[index]


def padded(ids: Sequence[Sequence[int]]) -> dict[str, NDArray[np.int64]]:
    """The inputs of BERT, int64 [b, s]; 0 is [PAD]."""
    found = np.zeros((len(ids), max(map(len, ids))), np.int64)
    mask = np.zeros_like(found)
    for row, given in enumerate(ids):
        found[row, : len(given)] = given
        mask[row, : len(given)] = 1
    return dict(zip(MINILM_INPUTS, (found, mask, np.zeros_like(found)), strict=True))


def token_ids(texts: Sequence[str], folder: Path) -> list[list[int]]:
    """Token ids with [CLS] and [SEP], truncated."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    return [found.ids for found in tokenizer.encode_batch(list(texts))]


def accuracy(model: Any, ids: Sequence[Sequence[int]], labels: Sequence[int]) -> float:
    """Share of right classes of a torch classifier; leaves it in evaluation mode."""
    return float(right(model, ids, labels).mean())


def right(model: Any, ids: Sequence[Sequence[int]], labels: Sequence[int]) -> NDArray[np.bool_]:
    """Which sentences get their class of a torch classifier, [n]; leaves it in evaluation mode."""
    import torch

    model.eval()
    found, truth = np.empty(len(labels), np.bool_), np.array(labels)
    with torch.no_grad():
        for rows in batches(ids, None):
            feeds = {name: torch.from_numpy(value) for name, value in padded([ids[row] for row in rows]).items()}
            found[rows] = model(**feeds).logits.argmax(-1).numpy() == truth[rows]
    return found


def train(parts: dict[str, list[Sample]], epochs: int, seed: int, kept: Path) -> Any:
    """Fine-tunes MiniLM and returns the torch model of the epoch that is best on dev.

    Args:
        parts: the sentences.
        epochs: how often each is seen.
        seed: of the classifier's head, the order and the dropout.
        kept: where the state of the training is kept, so that it goes on after an interruption.
    """
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    source = minilm_folder()
    with _quiet():
        model = BertForSequenceClassification.from_pretrained(
            source, num_labels=2, id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)}
        ).float()
    ids = {name: token_ids([s.sentence for s in samples], source) for name, samples in parts.items()}
    labels = {name: [s.label for s in samples] for name, samples in parts.items()}
    orders = [list(batches(ids["train"], np.random.default_rng([seed, epoch]))) for epoch in range(epochs)]
    total = sum(map(len, orders))
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}], lr=RATE
    )
    state: dict[str, Any] = {"step": 0, "loss": 0.0, "accuracy": -1.0, "best": {}}
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        torch.set_rng_state(state.pop("random"))

    def keep() -> None:
        with moved_into_place(kept) as temporary:
            running = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
            torch.save({**state, **running}, temporary)

    steps = (rows for order in orders for rows in order)
    model.train()
    for step, rows in enumerate(steps):
        if step < state["step"]:
            continue
        for settings in optimizer.param_groups:
            settings["lr"] = RATE * min((step + 1) / (WARM_UP * total), (total - step) / ((1 - WARM_UP) * total))
        feeds = {n: torch.from_numpy(value) for n, value in padded([ids["train"][row] for row in rows]).items()}
        loss = model(**feeds, labels=torch.tensor([labels["train"][row] for row in rows])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        state["step"], state["loss"] = step + 1, state["loss"] + float(loss.detach())
        epoch_ends = (step + 1) % len(orders[0]) == 0
        if epoch_ends:
            found = accuracy(model, ids["dev"], labels["dev"])
            say(f"epoch {(step + 1) // len(orders[0])}: loss {state['loss'] / len(orders[0]):.4f}, dev {found:.4f}")
            if found > state["accuracy"]:
                state |= {"accuracy": found, "best": {name: value.clone() for name, value in model.state_dict().items()}}
            state["loss"] = 0.0
            model.train()
        if epoch_ends or (step + 1) % KEPT_STEPS == 0:
            keep()
    model.load_state_dict(state["best"])
    return model.eval()


# Files -----------------------------------------------------------------------------------------------------------------


def save(model: Any, bed: Testbed) -> None:
    """Writes the checkpoint, then the ONNX file, which stands for the whole being there."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    with _quiet():
        model.save_pretrained(bed.checkpoint)
        AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(bed.checkpoint)
    # What this tokenizer says of padding and truncation is sentence-transformers'; the data says its own.
    shutil.copyfile(minilm_folder() / "tokenizer.json", bed.checkpoint / "tokenizer.json")
    bed.model.parent.mkdir(exist_ok=True)
    for name in FILES:
        shutil.copyfile(bed.checkpoint / name, bed.model.parent / name)
    with _quiet():
        plain = BertForSequenceClassification.from_pretrained(bed.checkpoint, attn_implementation="eager")
    with moved_into_place(bed.model) as temporary:
        export_bert(plain, "logits", temporary)


def ensure(folder: Path | None = None, *, epochs: int = EPOCHS, seed: int = 0, fold: int = 0) -> Testbed:
    """Makes what is not there yet and says where it all is (default: in the cache, one folder for each fold)."""
    name = f"sentiment-{fold}" if fold else "sentiment"
    bed = Testbed(cache_folder() / name if folder is None else folder)
    bed.folder.mkdir(parents=True, exist_ok=True)
    parts = write_parts(bed, fold)
    if not bed.model.is_file():
        kept = bed.folder / "training.pt"
        save(train(parts, epochs, seed, kept), bed)
        kept.unlink(missing_ok=True)
    return bed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--folder", type=Path, help="where the files are, or are made (default: the cache)")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fold", type=int, choices=range(FOLDS), default=0, help="which sentences are held out")


def main(options: argparse.Namespace) -> int:
    """The command."""
    from transformers import BertForSequenceClassification

    bed = ensure(options.folder, epochs=options.epochs, seed=options.seed, fold=options.fold)
    print(bed.folder)
    with _quiet():
        model = BertForSequenceClassification.from_pretrained(bed.checkpoint)
    for name, samples in labelled(sentences("reviews"), options.fold).items():
        found = accuracy(model, token_ids([s.sentence for s in samples], bed.checkpoint), [s.label for s in samples])
        print(f"{name}: {len(samples):,} sentences, {sum(s.label for s in samples):,} positive, accuracy {found:.4f}")
    return 0
