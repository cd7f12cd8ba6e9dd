"""Which words a text needs: how often each token id is in texts or arrays of ids, and lists of ids in files."""

from __future__ import annotations

import itertools
import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.calibration_batches import CalibrationJob
from liar_opt.runtime.calibration_data import load_calibration
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.signatures import InputSpec, one_line
from liar_opt.runtime.text_sources import file_texts
from liar_opt.runtime.text_tokenizer import TextTokenizer, all_tokens

TEXT_FILES = (".txt", ".jsonl", ".csv")
AT_ONCE = 1024
"""Texts that are tokenised at once."""
BEGINNING = 1 << 16
"""Characters of a text file by which it is told whether it holds numbers alone."""
NO_END = 1 << 30
_NUMBERS = re.compile(r"[\s,\d]*\d[\s,\d]*")


def listed_ids(source: Any, size: int) -> NDArray[np.int64] | None:
    """Returns the ids that a list, an array, or a .json, .npy or .txt file of integers holds; None where it is no such.

    Args:
        source: what may be one.
        size: rows of the table.

    Raises:
        OptionError: the file cannot be read, holds something else, or an id is outside of the table.
    """
    where = "the vocabulary"
    if isinstance(source, (str, Path)):
        path = Path(source)
        where = f"vocabulary '{path}'"
        suffix = path.suffix.lower()
        if suffix not in (".json", ".npy", ".txt"):
            return None
        try:
            if suffix == ".npy":
                found: Any = np.load(path, allow_pickle=False)
            else:
                with path.open(encoding="utf-8-sig") as stream:
                    text = stream.read(BEGINNING)
                    if suffix == ".txt" and not _NUMBERS.fullmatch(text):
                        return None
                    text += stream.read()
                found = json.loads(text) if suffix == ".json" else [int(n) for n in text.replace(",", " ").split()]
        except UnicodeDecodeError as err:
            raise OptionError(f"{where} is not UTF-8 text; save it as such") from err
        except (OSError, ValueError, EOFError, RecursionError, zipfile.BadZipFile) as err:
            raise OptionError(f"{where} cannot be read ({one_line(err)}); give texts, or a list of token ids") from err
    else:
        items = source.tolist() if isinstance(source, np.ndarray) else source
        if not isinstance(items, (list, tuple, set, frozenset, range)) or any(isinstance(i, str) for i in items):
            return None
        found = source if isinstance(source, np.ndarray) else list(items)
    try:
        ids = np.asarray(found)
    except ValueError as err:  # lists of several lengths
        raise OptionError(f"{where} holds no plain list of token ids") from err
    if ids.size and ids.dtype.kind not in "iu":
        if not isinstance(source, (str, Path, np.ndarray)):
            return None  # feeds
        raise OptionError(f"{where} holds no integers; give a list of token ids")
    ids = np.unique(ids.reshape(-1).astype(np.int64))
    outside = ids[(ids < 0) | (ids >= size)]
    if outside.size:
        raise OptionError(f"{where} has the token id {outside[0]}; the model's table has {size:,} rows, from 0 on")
    return ids


def count_words(
    source: Any, inputs: Sequence[InputSpec], ids: Sequence[str], size: int, reader: TextTokenizer | None, **options: Any
) -> NDArray[np.int64]:
    """Counts the token ids of texts, all of them, or of arrays.

    Args:
        source: what calibration data may be.
        inputs: of the graph.
        ids: those of them that take token ids.
        size: rows of the table.
        reader: the tokenizer that reads texts.
        options: ``text_column``, ``tokenizer`` (its folder) and ``mask_input``, as calibration data has them.

    Returns:
        How often each is there, int64 [size].

    Raises:
        OptionError: they cannot be read, or an id is outside of the table.
    """
    counts = np.zeros(size, np.int64)
    texts = texts_of(source, options.get("text_column"))
    if texts is None:
        data = load_calibration(source, inputs, vocabulary=size, samples=NO_END, **options)
        for batch, mask in zip(data.batches, data.row_masks, strict=True):
            for value in (batch[name] for name in ids if name in batch):
                real = value if mask is None or mask.shape != value.shape else value[mask]
                counts += np.bincount(real.reshape(-1), minlength=size)
        return counts
    if reader is None:
        raise OptionError("a vocabulary of texts needs the tokenizer of the model; give --tokenizer DIR")
    while some := list(itertools.islice(texts, AT_ONCE)):
        for row, text in zip(all_tokens(reader, some, NO_END), some, strict=True):
            if row.size and (row.min() < 0 or row.max() >= size):
                raise OptionError(
                    f"the tokenizer gives the token id {row.max()} for '{text[:40]}', and the model's table has {size:,} "
                    "rows: they do not belong together"
                )
            counts += np.bincount(row, minlength=size)
    return counts


def most_frequent(counts: NDArray[np.int64], coverage: float) -> NDArray[np.int64]:
    """Returns the fewest ids that cover a share of all tokens, ascending."""
    order = np.argsort(-counts, kind="stable")
    sums = np.cumsum(counts[order])
    enough = int(np.searchsorted(sums, coverage * sums[-1] * (1 - 1e-12))) + 1
    return np.sort(order[: min(enough, int((counts > 0).sum()))])


def texts_of(source: Any, text_column: str | None) -> Iterator[str] | None:
    """Yields all texts of a file or of a list; None where it is something else."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        suffix = path.suffix.lower()
        return _file_texts(path, suffix, text_column) if suffix in TEXT_FILES and path.is_file() else None
    if isinstance(source, Iterable) and not isinstance(source, Mapping) and not hasattr(source, "column_names"):
        items = list(source)
        return iter(items) if items and all(isinstance(item, str) for item in items) else None
    return None


def _file_texts(path: Path, suffix: str, text_column: str | None) -> Iterator[str]:
    whole = CalibrationJob((), text_column=text_column, packing=True, samples=NO_END)  # nothing is cut off
    where = f"vocabulary '{path}'"
    try:
        yield from (text for text in map(str.strip, file_texts(path, suffix, whole, where)) if text)
    except UnicodeDecodeError as err:
        raise OptionError(f"{where} is not UTF-8 text; save it as such") from err
    except OSError as err:
        raise OptionError(f"{where} cannot be read ({one_line(err)})") from err
