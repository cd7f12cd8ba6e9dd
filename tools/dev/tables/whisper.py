"""Measure liar-opt on speech: the word error rate of Whisper tiny.en, dense and pruned.

    python tools/dev/bench.py whisper                # the table; some minutes on 2 cores
    python tools/dev/bench.py whisper --ratios 0.2   # one row

Model, sounds and texts are those of `whisper_tiny.py`. Encoder and decoder are exported apart, and pruned one after the
other by the same fraction: the encoder on the spectra of some sounds (1,500 positions each), the decoder on what the pruned
encoder makes of more sounds, with the texts that were read. The sounds that are measured are others, of the same speaker. A
cell that is finished is kept in `--cells` (JSON), and not measured again.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from liar_opt.passes.prune_job import prune
from liar_opt.passes.result import PruneResult
from liar_opt.runtime.sessions import Session
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.dev.harness import Cells, say, setting, table
from liar_opt.tools.dev.subjects.whisper_tiny import (
    PROMPT,
    RATE,
    Sound,
    load_model,
    load_tokenizer,
    sounds,
    word_errors,
    words,
    write,
)

RATIOS = (0.2, 0.5)
WAYS = {
    "activation-weighted, no repair": {"score": "activation-weighted", "repair": "none"},
    "greedy, no repair": {"score": "greedy", "repair": "none"},
    "greedy, LIAR": {"score": "greedy", "repair": "liar"},
}
LONGEST = 40
"""Tokens of a text. All of its sound lies in the 30 seconds that Whisper takes at once."""
TOKENS = 2 * LONGEST
"""Tokens that are written at most: a model that has lost the end of a sentence goes on for ever."""


class Spoken(NamedTuple):
    """A sound as the model takes it."""

    sound: Sound
    spectrum: np.ndarray
    """[1, mels, frames]"""
    ids: tuple[int, ...]
    """The tokens of its text."""


# The model -------------------------------------------------------------------------------------------------------------


def ensure(folder: Path) -> tuple[Path, Path]:
    """Encoder and decoder as ONNX files; exported if they are not there."""
    encoder, decoder = folder / "encoder.onnx", folder / "decoder.onnx"
    if not (encoder.is_file() and decoder.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        _export(encoder, decoder)
    return encoder, decoder


def _export(encoder: Path, decoder: Path) -> None:
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = model.model.encoder

        def forward(self, input_features: torch.Tensor) -> Any:
            return self.encoder(input_features).last_hidden_state

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.head = model.model.decoder, model.proj_out

        def forward(self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
            found = self.decoder(input_ids=input_ids, encoder_hidden_states=encoder_hidden_states, use_cache=False)
            return self.head(found.last_hidden_state)

    model, free = load_model(), torch.export.Dim.DYNAMIC
    spectra, ids, hidden = torch.zeros(2, 80, 3000), torch.ones(2, 7, dtype=torch.int64), torch.zeros(2, 1500, 384)
    exports: list[tuple[Path, torch.nn.Module, dict[str, Any], dict[str, Any], str]] = [
        (encoder, Encoder(), {"input_features": spectra}, {"input_features": {0: free}}, "hidden"),
        (
            decoder,
            Decoder(),
            {"input_ids": ids, "encoder_hidden_states": hidden},
            {"input_ids": {0: free, 1: free}, "encoder_hidden_states": {0: free}},
            "logits",
        ),
    ]
    for path, module, given, shapes, output in exports:
        with torch.no_grad():
            torch.onnx.export(
                module.eval(),
                tuple(given.values()),
                path,
                dynamo=True,
                input_names=list(given),
                output_names=[output],
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )


def encode(encoder: Session, spoken: Spoken) -> np.ndarray:
    """What the encoder makes of a sound, [1, positions, d]."""
    return np.asarray(encoder.run({"input_features": spoken.spectrum}, ["hidden"], arrays=True)["hidden"])


# Measuring -------------------------------------------------------------------------------------------------------------


class Workplace:
    """The model, the sounds and the cells that are finished."""

    def __init__(self, options: argparse.Namespace) -> None:
        from transformers import WhisperFeatureExtractor

        self.options = options
        self.encoder, self.decoder = ensure(options.folder)
        self.tokenizer: Any = load_tokenizer()
        self.features: Any = WhisperFeatureExtractor(feature_size=80)
        tokens = ((s, tuple(self.tokenizer.encode(f" {s.text}", add_special_tokens=False).ids)) for s in sounds())
        short = [(sound, ids) for sound, ids in tokens if len(ids) <= LONGEST]
        order = np.random.default_rng(options.seed).permutation(len(short)).tolist()
        fit, held = order[: len(order) // 2], order[len(order) // 2 :]
        self.fit = [self.spoken(*short[i]) for i in fit[: options.calibration_sounds]]
        self.held = [self.spoken(*short[i]) for i in held[: options.evaluation_sounds]]
        self.cells = Cells(options.cells)

    def spoken(self, sound: Sound, ids: tuple[int, ...]) -> Spoken:
        """A sound with its spectrum."""
        return Spoken(sound, self.features(sound.samples, sampling_rate=RATE, return_tensors="np").input_features, ids)

    def cell(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Prunes encoder and decoder, and measures; dense where no options of `prune` are given."""
        began = time.perf_counter()
        if not options:
            return {**self.measure(onnx.load(self.encoder), onnx.load(self.decoder)), "left": 1.0}
        spectra = [{"input_features": s.spectrum} for s in self.fit[: self.options.encoder_sounds]]
        encoder = self.pruned(self.encoder, spectra, options)
        session = Session(encoder.model.SerializeToString())
        read = [{"input_ids": np.array([[*PROMPT, *s.ids]]), "encoder_hidden_states": encode(session, s)} for s in self.fit]
        decoder = self.pruned(self.decoder, read, options)
        pruned = time.perf_counter() - began
        before, after = (
            sum(part.report[when]["parameters"] for part in (encoder, decoder)) for when in ("before", "after")
        )
        return {**self.measure(encoder.model, decoder.model), "left": after / before, "prune_seconds": pruned}

    def pruned(self, path: Path, batches: list[dict[str, np.ndarray]], options: Mapping[str, Any]) -> PruneResult:
        """Prunes one half."""
        given: dict[str, Any] = {"batch_size": 4, "provider": "cpu", "latency": False, "fresh": True, **options}
        return prune(path, batches, seed=self.options.seed, **given)

    def measure(self, encoder: onnx.ModelProto, decoder: onnx.ModelProto) -> dict[str, Any]:
        """Word errors over the sounds that were held back."""
        began = time.perf_counter()
        first, second = Session(encoder.SerializeToString()), Session(decoder.SerializeToString())
        heard = []
        for spoken in self.held:
            hidden = encode(first, spoken)

            def choose(ids: Sequence[int], hidden: np.ndarray = hidden) -> list[int]:
                feeds = {"input_ids": np.array([ids]), "encoder_hidden_states": hidden}
                return second.run(feeds, ["logits"], arrays=True)["logits"][0].argmax(-1).tolist()  # type: ignore[no-any-return]

            heard.append(str(self.tokenizer.decode(write(choose, TOKENS, spoken.ids), skip_special_tokens=True)))
        pairs = [(words(spoken.sound.text), words(text)) for spoken, text in zip(self.held, heard, strict=True)]
        return {
            "errors": sum(word_errors(*pair) for pair in pairs),
            "words": sum(len(said) for said, _ in pairs),
            "heard": dict(zip((s.sound.name for s in self.held), heard, strict=True)),
            "measure_seconds": time.perf_counter() - began,
        }

    def cached(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Looks a cell up by what makes it, or makes and keeps it."""
        o = self.options
        drawn = {"seed": o.seed, "fit": [o.encoder_sounds, len(self.fit)], "held": len(self.held)}
        name = json.dumps({**options, **drawn}, sort_keys=True)
        found = self.cells.made(name, lambda: {**self.cell(options), "commit": setting(o.seed)["commit"]})
        say(f"{name}: { {key: value for key, value in found.items() if key != 'heard'} }")
        return dict(found)


def markdown(work: Workplace, ratios: Sequence[float]) -> Iterator[str]:
    """Measures what is missing and writes the table."""
    o = work.options
    dense = work.cached({})
    asked = {ratio: {"sparsity": ratio, "allocate": o.allocate} for ratio in ratios}
    found = {ratio: [work.cached({**given, **way}) for way in WAYS.values()] for ratio, given in asked.items()}
    commits = dict.fromkeys(c["commit"] for c in (dense, *(c for row in found.values() for c in row)))
    yield (
        f"`python tools/dev/bench.py whisper --encoder-sounds {o.encoder_sounds} --calibration-sounds "
        f"{o.calibration_sounds} --evaluation-sounds {o.evaluation_sounds} --allocate {o.allocate} --seed {o.seed}`\n\n"
        f"Word error rate of Whisper tiny.en on {len(work.held)} prompts of Asterisk ({dense['words']} words, 8 kHz, "
        f"greedy decoding), calibrated on {len(work.fit)} others: the encoder on {min(o.encoder_sounds, len(work.fit))} of "
        f"them, the decoder on all ({sum(len(s.ids) for s in work.fit)} tokens of text); seed {o.seed}; commit "
        f"{', '.join(commits)}.\n\n"
    )
    rows = [["dense", percent(1.0), *[percent(dense["errors"] / dense["words"])] * len(WAYS)]]
    for ratio, cells in found.items():
        rates = (percent(cell["errors"] / cell["words"]) for cell in cells)
        rows.append([percent(ratio), percent(cells[0]["left"]), *rates])
    yield table(["removed of the prunable", "parameters left", *WAYS], rows)


def percent(value: float) -> str:
    """A fraction, as the tables write it."""
    return f"{100 * value:.1f} %"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of the prunable parameters, to remove")
    parser.add_argument("--calibration-sounds", type=int, default=48, help="of one half of the sounds")
    parser.add_argument("--encoder-sounds", type=int, default=16, help="of the calibration sounds, for the encoder")
    parser.add_argument("--evaluation-sounds", type=int, default=60, help="of the other half")
    parser.add_argument("--allocate", default="uniform", help="how the ratio is shared out over the layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=cache_folder() / "whisper", help="where the model is, or is made")
    parser.add_argument("--cells", type=Path, default=cache_folder() / "whisper-cells.json", help="finished cells")


def main(options: argparse.Namespace) -> int:
    """The command."""
    for text in markdown(Workplace(options), options.ratios):
        print(text, end="", flush=True)
    return 0
