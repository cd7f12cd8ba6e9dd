"""What pruning adds to quantising: all-MiniLM-L6-v2 or the sentiment classifier, dense and pruned, in float and quantised.

    python tools/dev/bench.py corners                       # some ten minutes on 2 cores
    python tools/dev/bench.py corners --scheme int8 --sparsity 0 --sparsity 0.5
    python tools/dev/bench.py corners --subject sentiment

MiniLM is calibrated on 512 sentences of NYT editorials; quality is the mean cosine of sentence embeddings to those of the
dense float model over 1,024 held-out sentences of film reviews. The classifier (`sentiment.py`) is calibrated on 512
sentences of its train part; quality is accuracy on its test part. Times are medians of runs in turns, each model in a
process of its own, and stand as how many times faster than the dense float model they are.
"""

import argparse
import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.frontend.onnx_quantise import SCHEMES
from liar_opt.frontend.onnx_rounding import Rounded
from liar_opt.passes.prune_job import prune
from liar_opt.runtime.latency import Deployed, measure_latency
from liar_opt.runtime.sessions import Session
from liar_opt.tools.demo_assets import MINILM_INPUTS
from liar_opt.tools.dev.harness import BUSY_LOAD, Cells, Others, say, table, wait_for_quiet, work_folder
from liar_opt.tools.dev.subjects import sentiment
from liar_opt.tools.dev.subjects.minilm import CALIBRATION, HELD_OUT, Held, Workplace

SPARSITIES = (0.0, 0.2, 0.35, 0.5)
TOKENS = 64
SECONDS = 4.0
"""For the runs of each model."""
OWN = ", ONNX Runtime's rounding"
ROUNDING = "liar_opt.passes.quantise_result.rounded_anew"
"""What rounds the quantiser's numbers anew, with error feedback."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the table."""
    parser.add_argument("--subject", choices=SUBJECTS, default="minilm", help="default: %(default)s")
    parser.add_argument("--scheme", action="append", choices=("float", *SCHEMES), help="one of them alone; may be repeated")
    parser.add_argument("--sparsity", action="append", type=float, help="likewise")
    parser.add_argument("--sentences", type=int, default=HELD_OUT, help="held-out ones of MiniLM (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=CALIBRATION, help="of calibration (default: %(default)s)")
    parser.add_argument("--own-rounding", action="store_true", help="numbers as ONNX Runtime's quantiser rounds them, too")
    parser.add_argument("--no-times", action="store_true", help="bytes and quality alone")
    parser.add_argument("--json", type=Path, help="keep the figures; those that it has are not made again")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="wait for a quiet machine before timing")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


class MiniLM:
    """The sentence encoder."""

    measure = "held-out cosine"

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.work, self.samples = Workplace(folder, options), options.samples
        self.held = Held(self.work, options.sentences)

    def prune(self, **given: Any) -> Any:
        """Prunes it."""
        return self.work.prune(self.work.model, fresh=False, samples=self.samples, **given)

    def quality(self, model: bytes) -> float:
        """How near embeddings are to those of the dense float model."""
        return self.held.cosine(model)["mean"]


class Classifier:
    """The classifier of film reviews."""

    measure = "accuracy"

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        del folder
        self.bed, self.seed = sentiment.ensure(), options.seed
        parts = sentiment.write_parts(self.bed)
        drawn = np.random.default_rng(options.seed).permutation(len(parts["train"]))[: options.samples]
        self.texts, self.test = [parts["train"][i].sentence for i in drawn], parts["test"]
        self.ids = sentiment.token_ids([s.sentence for s in self.test], self.bed.checkpoint)

    def prune(self, **given: Any) -> Any:
        """Prunes it."""
        common: dict[str, Any] = {"tokenizer": self.bed.checkpoint, "seed": self.seed, "provider": "cpu", "latency": False}
        return prune(self.bed.model, self.texts, **common, **given)

    def quality(self, model: bytes) -> float:
        """The share of the test part that it gets right."""
        session, right = Session(model), 0
        for rows in sentiment.batches(self.ids, None):
            found = session.run(sentiment.padded([self.ids[row] for row in rows]), ["logits"], arrays=True)["logits"]
            right += int((found.argmax(-1) == [self.test[row].label for row in rows]).sum())
        return right / len(self.test)


SUBJECTS: dict[str, Any] = {"minilm": MiniLM, "sentiment": Classifier}


def main(options: argparse.Namespace) -> int:
    """Makes and prints the table."""
    cells = Cells(options.json)
    schemes = [*(options.scheme or ("float", *SCHEMES))]
    schemes += [f"{scheme}{OWN}" for scheme in schemes if scheme != "float" and options.own_rounding]
    keys = [(scheme, s) for scheme in schemes for s in options.sparsity or SPARSITIES]
    with work_folder(options.folder) as folder:
        subject = SUBJECTS[options.subject](folder, options)
        found = {
            key: cells.made("{} {} {:g}".format(options.subject, *key), partial(_made, subject, folder, *key))
            for key in keys
        }
        machine = "not timed"
        if not options.no_times:
            if os.getloadavg()[0] > BUSY_LOAD:
                say(f"warning: the load average is {os.getloadavg()[0]:.2f}; what is timed now is not to be quoted")
            wait_for_quiet(options.wait)
            others, all_keys = Others(), [("float", 0.0), *keys]
            times = [_times(subject, folder, all_keys, options.seed, batch) for batch in (1, 8)]
            machine = others.sentence()
            for place, key in enumerate(keys, 1):
                found[key] = {**found[key], "faster": [own[0] / own[place] for own in times]}
    rows = []
    for key in keys:
        cell = found[key]
        faster = [f"{value:.2f}" for value in cell.get("faster", ())] or ["", ""]
        rows.append([key[0], f"{100 * key[1]:.0f} %", f"{cell['bytes'] / 1e6:.1f}", *faster, f"{cell['quality']:.4f}"])
    head = ["weights", "removed", "MB", f"x faster, 1 x {TOKENS}", f"x faster, 8 x {TOKENS}", subject.measure]
    told = f"{options.subject}, {options.samples} samples of calibration, seed {options.seed}"
    print(f"{told}; {machine}.\n\n{table(head, rows)}")
    return 0


def _file(subject: Any, folder: Path, scheme: str, sparsity: float) -> Path:
    """Makes a model where it is not there."""
    path = folder / f"{scheme}-{sparsity:g}.onnx"
    if not path.is_file():
        given: dict[str, Any] = {} if scheme == "float" else {"quantize": scheme.removesuffix(OWN)}
        with mock.patch(ROUNDING, _as_it_is) if scheme.endswith(OWN) else contextlib.nullcontext():
            subject.prune(sparsity=sparsity, **given).save(path)
    return path


def _as_it_is(whole: OnnxOriginal, small: OnnxOriginal, *_: Any) -> tuple[OnnxOriginal, Rounded]:
    """Leaves a quantised model as the quantiser has made it."""
    return small, Rounded()


def _made(subject: Any, folder: Path, scheme: str, sparsity: float) -> dict[str, float]:
    """The bytes of a file, and how good it is."""
    path = _file(subject, folder, scheme, sparsity)
    result = {"bytes": path.stat().st_size, "quality": subject.quality(path.read_bytes())}
    say(f"{scheme}, {sparsity:.0%}: {result}")
    return result


def _times(subject: Any, folder: Path, keys: list[tuple[str, float]], seed: int, batch: int) -> list[float]:
    """Seconds of each model, in turns."""
    rng = np.random.default_rng(seed)
    shape = (batch, TOKENS)
    values = (rng.integers(1000, 2000, shape), np.ones(shape, np.int64), np.zeros(shape, np.int64))
    feeds = dict(zip(MINILM_INPUTS, values, strict=True))
    models = [Deployed(_file(subject, folder, *key).read_bytes()) for key in keys]
    return list(measure_latency(models, feeds, SECONDS * len(models), least=10, most=2000).seconds)
