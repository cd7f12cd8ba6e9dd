"""Calibration data: from what the user has at hand to batches that the graph accepts.

Texts, arrays, saved or hub datasets and Python feeds all end as ``CalibrationData``: feeds ready for the runtime, and
for each feed a row mask that tells the real rows from padding. Three rules hold for every source:

- Padding is kept out of the moments (`text_batches`).
- A static batch axis is filled up by repeating samples, whose rows are masked out (`calibration_batches`).
- Batch (or row) order is shuffled with the seed, so that a held-back part is not all short texts or one class.

Only the rows that were drawn are read and checked (`array_columns`, `text_sources`). Inputs that neither texts nor feeds
fill, such as an empty key-value cache, are made (`signatures`), and all of them where there is no source
(`synthetic_inputs`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.array_columns import Column, InMemory, npy_column, npz_columns
from liar_opt.runtime.calibration_batches import CalibrationJob, Feeds, batch_feeds, check_feed
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.extras import require
from liar_opt.runtime.signatures import InputSpec, names, one_line
from liar_opt.runtime.synthetic_inputs import synthesise
from liar_opt.runtime.text_batches import batch_texts
from liar_opt.runtime.text_sources import (
    ACCEPTED,
    KeptTexts,
    Texts,
    checked_texts,
    draw_texts,
    file_texts,
    require_tokenizer,
    text_column_of,
)
from liar_opt.runtime.text_tokenizer import has_tokenizer, load_tokenizer

Array = NDArray[Any]
Source = str | Path | Mapping[str, Any] | Iterable[str] | Iterable[Mapping[str, Any]] | None
_TEXTS = (".txt", ".jsonl", ".csv")
_SUFFIXES = (*_TEXTS, ".npz", ".npy")


@dataclass(frozen=True)
class CalibrationData:
    """Feeds for the graph, and which of their rows count.

    Attributes:
        batches: One dict of arrays by input name for each run of the graph.
        row_masks: For each batch None (every row counts) or bool, True = a real row to be measured: [b, s] where the
            graph has token inputs, [b] where only the batch axis is known. None for all batches or for none.
        samples: Distinct samples in the batches (repeats that fill a static batch are not counted).
        tokens: Real rows: tokens of a text model, samples where only the batch axis is known.
        source: One line for the report.
        warnings: What the user should know, one sentence each.
        synthetic: The data is random, not the user's.
    """

    batches: tuple[dict[str, Array], ...]
    row_masks: tuple[NDArray[np.bool_] | None, ...]
    samples: int
    tokens: int
    source: str
    warnings: tuple[str, ...]
    synthetic: bool

    def in_batches_of(self, samples: int) -> CalibrationData:
        """The same samples in the same order, at most so many a batch.

        Batches that cannot be told apart into samples stay: all arrays with axes must have as many of them.
        """
        batches: list[dict[str, Array]] = []
        masks: list[NDArray[np.bool_] | None] = []
        for batch, mask in zip(self.batches, self.row_masks, strict=True):
            leading = {len(value) for value in batch.values() if value.ndim}
            count = max(leading, default=1)
            step = samples if len(leading) == 1 else count
            for rows in (slice(start, start + step) for start in range(0, count, step)):
                batches.append({k: v[rows] if v.ndim and step < count else v for k, v in batch.items()})
                masks.append(None if mask is None else mask[rows])
        return replace(self, batches=tuple(batches), row_masks=tuple(masks))


def load_calibration(source: Source, inputs: Sequence[InputSpec], **options: Any) -> CalibrationData:
    """Turns any accepted source into batches for the graph.

    Args:
        source: None (seeded synthetic inputs); a path to .txt, .jsonl, .csv, .npz, a folder of .npy, or a saved
            `datasets` folder; a hub name ``name[:config][:split]``; or in Python texts, a dict of arrays, or an
            iterable (a DataLoader, say) of texts or of dicts of arrays or tensors with a leading batch axis.
        inputs: The graph's inputs, in graph order.
        options: By keyword, all other fields of :class:`CalibrationJob`.

    Returns:
        The batches, their row masks and what there is to say about them.

    Raises:
        OptionError: The source or an option does not fit; one sentence that says what was found and the way out.
    """
    job = CalibrationJob(inputs, **options)
    check_options(**{n: getattr(job, n) for n in ("samples", "batch_size", "sequence_length", "positions")})
    if source is None:
        made = synthesise(job)
    else:
        drawn = _draw_from_path(source, job) if isinstance(source, str | Path) else _draw_from_python(source, job)
        made = batch_texts(drawn, job) if isinstance(drawn, Texts) else batch_feeds(drawn, job)
    if not any(value.size for batch in made.batches for value in batch.values()):
        raise OptionError("the samples of the calibration data have no length: all arrays are empty; give longer ones.")
    full = all(mask.all() for mask in made.masks)
    return CalibrationData(
        batches=tuple(made.batches),
        row_masks=tuple(None if full else mask for mask in made.masks),
        samples=made.samples,
        tokens=sum(int(mask.sum()) for mask in made.masks),
        source=made.source,
        warnings=tuple(made.warnings),
        synthetic=source is None,
    )


def check_options(*, samples: int, batch_size: int, sequence_length: int | None, positions: int | None) -> None:
    """Checks what can be checked without the data.

    Raises:
        OptionError: A count below 1, or more tokens than the model has positions for.
    """
    for option, value in (("samples", samples), ("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise OptionError(f"'{option}' is {value}; it must be at least 1.")
    if sequence_length is not None and positions is not None and sequence_length > positions:
        raise OptionError(
            f"'sequence_length' is {sequence_length}, and the model has positions for {positions} tokens; give less."
        )


def require_readable(source: Any, tokenizer: str | Path | None) -> None:
    """Checks, before the model is read, that calibration data is there, and that a tokenizer can be loaded.

    Raises:
        OptionError: they are not, or it cannot.
    """
    if isinstance(source, (str, Path)):
        _is_here(source)
    if tokenizer is not None:
        load_tokenizer(tokenizer)


def require_own_tokenizer(source: Any, folder: Path) -> None:
    """Checks that the tokenizer beside a model can be loaded where calibration data is a file of texts.

    Raises:
        OptionError: there is none, or it cannot.
    """
    if not isinstance(source, (str, Path)) or Path(source).suffix.lower() not in _TEXTS:
        return
    if not has_tokenizer(folder):
        raise OptionError(
            f"calibration file '{source}' holds texts, and '{folder}' has no tokenizer; pass --tokenizer DIR, or give an "
            ".npz file with one array for each input."
        )
    load_tokenizer(folder)


def _is_here(source: str | Path) -> bool:
    """Returns whether a source is a file, or a folder; what else it may be is the name of a dataset.

    Raises:
        OptionError: it is none of these, or a file of no kind that is read.
    """
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long for a file name, or a NUL in it
        is_folder = is_file = False
    if not is_folder and not is_file:
        if isinstance(source, str) and may_be_hub_name(source):
            return False
        raise OptionError(f"calibration file '{source}' does not exist; give {ACCEPTED}.")
    suffix = path.suffix.lower()
    if is_file and suffix not in _SUFFIXES:
        raise OptionError(f"calibration file '{path}' has the unknown suffix '{suffix}'; give {ACCEPTED}.")
    if is_file and path.stat().st_size == 0:
        raise OptionError(f"calibration file '{path}' is empty; give one with samples in it.")
    return True


def _draw_from_path(source: str | Path, job: CalibrationJob) -> Texts | Feeds:
    path = Path(source)
    if not _is_here(source):
        return _draw_from_hub(str(source), job)
    if path.is_dir():
        return _draw_from_folder(path, job)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return Feeds([(f"calibration file '{path}'", npz_columns(path))], path.name)
    if suffix == ".npy":
        if len(job.signature.inputs) > 1:
            raise OptionError(
                f"calibration file '{path}' is one array, and the model has the inputs {names(job.signature.inputs)};"
                " give an .npz file, or a folder, with one array for each."
            )
        return Feeds([(f"calibration file '{path}'", {next(iter(job.signature.inputs)): npy_column(path)})], path.name)
    require_tokenizer(job, f"calibration file '{path}'")
    try:
        return draw_texts(file_texts(path, suffix, job), f"calibration file '{path}'", path.name, job)
    except UnicodeDecodeError as err:
        raise OptionError(f"calibration file '{path}' is not UTF-8 text; save it as such or give {ACCEPTED}.") from err
    except OSError as err:
        raise OptionError(f"calibration file '{path}' cannot be read ({one_line(err)}); give {ACCEPTED}.") from err


def _draw_from_folder(folder: Path, job: CalibrationJob) -> Texts | Feeds:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        require(f"dataset folder '{folder}'", "datasets")
        import datasets  # type: ignore[import-untyped, unused-ignore]

        try:
            dataset = datasets.load_from_disk(str(folder))
        except Exception as err:  # the library raises errors of its many formats
            raise OptionError(
                f"dataset folder '{folder}' cannot be loaded ({one_line(err)}); write it again with save_to_disk."
            ) from err
        return _draw_from_dataset(dataset, f"dataset folder '{folder}'", folder.name, job)
    files = sorted(folder.glob("*.npy"))
    if not files:
        raise OptionError(
            f"calibration folder '{folder}' holds neither .npy files nor a saved dataset; put an .npy file for each of "
            f"the inputs {names(job.signature.inputs)} into it."
        )
    columns = {file.name[: -len(".npy")]: file for file in files}
    known = {name: npy_column(file) for name, file in columns.items()}
    return Feeds([(f"calibration folder '{folder}'", known)], folder.name)


def first_rows(source: Any, rows: int) -> dict[str, Array] | None:
    """Returns the first rows of a file or folder of arrays, by name; None where ``source`` is neither.

    Raises:
        OptionError: an array cannot be read.
    """
    if not isinstance(source, (str, Path)):
        return None
    path, columns = Path(source), {}
    try:
        if path.suffix.lower() == ".npz" and path.is_file():
            columns = npz_columns(path)
        elif path.is_dir():
            columns = {file.name[: -len(".npy")]: npy_column(file) for file in sorted(path.glob("*.npy"))}
    except OSError:
        return None
    found = {k: c.take(np.arange(min(rows, c.shape[0]) if c.shape else 1)) for k, c in columns.items()}
    return found or None


def may_be_hub_name(name: str) -> bool:
    """Returns whether a name could be that of a dataset, ``name[:config][:split]``, and is not a misspelt file."""
    if len(name) > 200 or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.+-]+){0,2}", name):
        return False
    # without an owner a suffix means a file name
    return not re.search(r"\.[A-Za-z]{2,7}$", name) if "/" not in name else not name.lower().endswith(_SUFFIXES)


def _draw_from_hub(name: str, job: CalibrationJob) -> Texts | Feeds:
    require(f"calibration '{name}' is no file here, and a named dataset", "datasets")
    import datasets  # type: ignore[import-untyped, unused-ignore]

    path, *parts = name.split(":")
    split = parts.pop() if parts and (len(parts) == 2 or re.match(r"(train|valid|dev|test)", parts[-1])) else None
    try:
        load: Any = datasets.load_dataset  # its overloads have no split that may be None
        dataset = load(path, *parts, split=split)
    except Exception as err:  # network, permission, unknown name, config or split: the library has a class for each
        raise OptionError(
            f"calibration '{name}' is no file here, and no dataset of that name could be loaded ({one_line(err)}); "
            "check the spelling (name[:config][:split]) and the network, or give a file."
        ) from err
    return _draw_from_dataset(dataset, f"dataset '{name}'", f"dataset {name}", job)


def _draw_from_dataset(dataset: Any, where: str, label: str, job: CalibrationJob) -> Texts | Feeds:
    """Texts of a column, or feeds when the dataset has a column for every input."""
    if isinstance(dataset, Mapping):
        if not dataset:
            raise OptionError(f"{where} has no split; give one with samples in it.")
        split = "train" if "train" in dataset else next(iter(dataset))
        dataset, label = dataset[split], f"{label} ({split})"
    columns = list(dataset.column_names or ())
    total = len(dataset)
    if total == 0:
        raise OptionError(f"{where} is empty; give one with samples in it.")
    rows = job.pick(total)
    inputs = job.signature.inputs
    if job.text_column is None and set(inputs) <= set(columns):
        picked = dataset.select_columns(list(inputs)).with_format(None).select(rows)
        feeds = [{name: InMemory(np.asarray(row[name])[None]) for name in inputs} for row in picked]
        return Feeds(
            [(f"row {row} of {where}", feed) for row, feed in zip(rows.tolist(), feeds, strict=True)],
            f"{label}, {job.drawn(len(rows), total, 'rows')}" if len(rows) < total else label,
        )
    require_tokenizer(job, where)
    strings = [name for name in columns if getattr(dataset.features[name], "dtype", "") in ("string", "large_string")]
    column = text_column_of(columns, strings, job.text_column, where)
    if column not in strings:
        raise OptionError(f"column '{column}' of {where} does not hold text; its text columns are {names(strings)}.")
    kept = KeptTexts(job)
    for row in dataset.select_columns([column]).select(rows):
        if row[column] and (text := row[column].strip()):
            kept.put(text)
    if not kept.texts:
        raise OptionError(f"column '{column}' of {where} holds only blank texts; name another text column.")
    return Texts(kept.texts, f"{label}, {job.drawn(len(kept.texts), total, 'texts')}")


def _draw_from_python(source: object, job: CalibrationJob) -> Texts | Feeds:
    if hasattr(source, "column_names") and hasattr(source, "__len__"):
        return _draw_from_dataset(source, "the dataset", "a dataset", job)
    if isinstance(source, Mapping):
        if any(hasattr(split, "column_names") for split in source.values()):
            return _draw_from_dataset(source, "the dataset", "a dataset", job)
        source = [source]
    if not isinstance(source, Iterable) or isinstance(source, bytes | np.ndarray):
        raise OptionError(
            f"calibration data of type '{type(source).__name__}' is not accepted; give a path, texts or feeds."
        )
    ends = isinstance(source, list | tuple)
    iterator = iter(source)
    first = next(iterator, None)
    if first is None:
        raise OptionError("the calibration data is empty; give at least one sample.")
    items = itertools.chain([first], iterator)
    if isinstance(first, str):
        require_tokenizer(job, "the calibration data")
        return draw_texts(checked_texts(items), "the calibration data", "texts from Python", job, ends=ends)
    feeds: list[tuple[str, Mapping[str, Column]]] = []
    seen = 0
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise OptionError(
                f"item {number} of the calibration data is of type '{type(item).__name__}'; give texts, or dicts of "
                f"arrays named {names(job.signature.inputs)}."
            )
        # what the graph does not take (labels, strings) is not converted, only named
        feed = {
            str(key): InMemory(_to_numpy(value) if key in job.signature.inputs else np.empty(0))
            for key, value in item.items()
        }
        feeds.append((f"item {number} of the calibration data", feed))
        seen += check_feed(*feeds[-1], job.signature)
        if not ends and seen >= job.samples:
            break
    return Feeds(feeds, "feeds from Python", first_only=not ends)


def _to_numpy(value: Any) -> Array:
    """An array from an array, a tensor of any library with the protocol, or nested lists."""
    if hasattr(value, "detach"):  # torch, told without importing it
        value = value.detach().cpu()
        try:
            return np.asarray(value.numpy())
        except TypeError:  # bfloat16
            return np.asarray(value.float().numpy())
    try:
        return np.asarray(value)
    except ValueError:  # ragged lists: named by the check of its dtype
        return np.empty(1, dtype=object)
