"""Every file that the input of a run consists of: none of them may be the place of a result (`runtime.places`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liar_opt.frontend.genai_config import NAME as GENAI_CONFIG
from liar_opt.frontend.weight_files import external_files
from liar_opt.runtime.places import InputFile

TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("*.model", "*.tiktoken", "config.json"),
)
"""What of a folder belongs to a tokenizer; other files may lie there."""
REPORTS = {"report": b'{\n "schema"', "html": b"<!DOCTYPE html><!-- liar-opt report -->"}
"""How a report begins that liar-opt has written, by the option that writes it."""


@dataclass(frozen=True)
class Inputs:
    """What a run was given, as it was given: paths, or anything else, which consists of no files.

    Attributes:
        models: ONNX files and folders of checkpoints.
        calibration: a file, or a folder of arrays or of a saved dataset.
        tokenizers: folders, or their tokenizer.json.
        more: what else is read: a file, a folder of data, or a list of such paths.
    """

    models: tuple[Any, ...] = ()
    calibration: Any = None
    tokenizers: tuple[Any, ...] = ()
    more: tuple[Any, ...] = ()

    def files(self) -> Iterator[InputFile]:
        """Yields every file that is there, and what a message calls it."""
        for model in filter(None, map(_path, self.models)):
            yield from _model(model)
        calibration = _path(self.calibration)
        if calibration is not None:
            yield from _data(calibration)
        for tokenizer in filter(None, map(_path, self.tokenizers)):
            yield from _tokenizer(tokenizer)
        for given in self.more:
            for path in filter(None, map(_path, given if isinstance(given, (list, tuple)) else (given,))):
                yield from [(path, "a file that an option names")] if path.is_file() else _data(path)


def began_by(path: Path, begin: bytes) -> bool:
    """Returns whether a file begins so, white space left out."""
    with path.open("rb") as stream:
        return stream.read(64).lstrip().startswith(begin)


def _path(given: Any) -> Path | None:
    """Returns the path if something is there; names of models and datasets are strings too."""
    if not isinstance(given, (str, Path)):
        return None
    try:
        return Path(given) if Path(given).exists() else None
    except (OSError, ValueError):  # too long for a file name, or a NUL in it
        return None


def _model(path: Path) -> Iterator[InputFile]:
    if path.is_dir():
        for file in _within(path):
            if file.suffix != ".onnx":  # an export, which is not what is read
                yield file, f"part of '{path}'"
        return
    yield path, "the input"
    for file in external_files(path):
        yield file, f"external data of '{path}'"
    beside = path.with_name(GENAI_CONFIG)
    if beside.is_file():
        yield beside, f"the configuration beside '{path}'"


def _data(path: Path) -> Iterator[InputFile]:
    if path.is_file():
        yield path, "the data"
        return
    saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    for file in _within(path) if saved else path.glob("*.npy"):
        yield file, f"part of the data in '{path}'"


def _tokenizer(path: Path) -> Iterator[InputFile]:
    folder = path if path.is_dir() else path.parent
    for file in {file for pattern in TOKENIZER for file in folder.glob(pattern)}:
        if file.is_file() and not _is_report(file):
            yield file, f"part of the tokenizer in '{folder}'"
    if path.is_file():
        yield path, "the tokenizer"


def _within(folder: Path) -> Iterator[Path]:
    """Yields the files of a folder and those below, but reports of earlier runs."""
    return (file for file in folder.rglob("*") if file.is_file() and not _is_report(file))


def _is_report(file: Path) -> bool:
    return file.suffix in (".json", ".html") and any(began_by(file, begin) for begin in REPORTS.values())
