"""Calibration data: from what the user has at hand to batches that the graph accepts.

Texts, arrays, saved or hub datasets and Python feeds all end as ``CalibrationData``: feeds ready for the runtime, and
for each feed a row mask that tells the real rows from padding. Three rules hold for every source:

- Padding is kept out of the moments. Texts are sorted by length before they are batched, so that little is padded;
  a graph without a mask input gets batches of one length each, since its attention would see the padding.
- A static batch axis is filled up by repeating samples. A repeat is a valid input, and its rows are masked out.
- Batch (or row) order is shuffled with the seed, so that a held-back part is not all short texts or one class.

For causal models texts are packed instead (`packing`): written behind each other and cut into full windows. Inputs
that neither texts nor feeds fill, such as an empty key-value cache, are made here.

Only the rows that were drawn are read and checked: ``.npy`` files and stored ``.npz`` members are memory-mapped,
compressed members are read block by block, text files line by line (reservoir sampling, Vitter's algorithm R). Of a text no
more is kept than the tokens that it can give need, and of a long line no more is read at a time than a piece.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.packing import pack, packed_rows
from liar_opt.runtime.signatures import STATE_ROLES, InputSpec, Signature, cast, describe, is_float, names, one_line
from liar_opt.runtime.text_tokenizer import CHARACTERS, TextTokenizer, all_tokens, cut_text, first_tokens, load_tokenizer

Array = NDArray[Any]
Source = str | Path | Mapping[str, Any] | Iterable[str] | Iterable[Mapping[str, Any]] | None
Tokens = Sequence[int] | NDArray[np.int32]
T = TypeVar("T")

_TEXT_SUFFIXES = (".txt", ".jsonl", ".csv")
_SUFFIXES = (*_TEXT_SUFFIXES, ".npz", ".npy")
_ACCEPTED = "a .txt, .jsonl, .csv or .npz file, a folder of .npy files, or a `datasets` folder or name"
_TEXT_COLUMNS = ("text", "sentence")
_LONGEST = 512  # tokens of a text when neither the graph nor the tokenizer says less
_SYNTHETIC_SEQUENCE = 64  # noise needs no more, and position tables are rarely shorter
_SYNTHETIC_VOCABULARY = 64  # below the embedding table of every model that we know
_SYNTHETIC_BYTES = 1 << 33  # of one input: more comes of a graph with absurd sizes
_COLUMN_PROBE = 20  # rows looked at to tell which columns hold text
_BLOCK_BYTES = 1 << 22  # read at once from a compressed array
_PIECE = 1 << 16  # characters of a line that are read at once
_SPARED = 4  # times as many characters are kept as tokens are likely to need: what has longer ones is no text
DOUBTFUL = 0.5  # share of the samples that are of one token, or repeat another, above which nothing can be trusted
_TEXT_ROOM = 1 << 24  # characters of all texts that are kept in any case
_LONGEST_ROW = 1 << 24  # characters of a line of a .csv file
_JSON_PART = re.compile(r'"|\\u[0-9a-fA-F]{4}|\\[^u]|[^"\\]+', re.DOTALL)


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


IMAGE_SIZES = (224, 384, 256, 336, 448, 512, 518, 640, 192, 128, 96, 64, 32)
"""Heights and widths that image models are made for, the commonest first."""


def load_calibration(
    source: Source,
    inputs: Sequence[InputSpec],
    *,
    tokenizer: str | Path | None = None,
    text_column: str | None = None,
    samples: int = 512,
    batch_size: int = 32,
    sequence_length: int | None = None,
    mask_input: str | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
    positions: int | None = None,
    packing: bool = False,
    image_size: int | None = None,
    rows: Mapping[str, int] | None = None,
) -> CalibrationData:
    """Turn any accepted source into batches for the graph.

    Args:
        source: None (seeded synthetic inputs); a path to .txt, .jsonl, .csv, .npz, a folder of .npy, or a saved
            `datasets` folder; a hub name ``name[:config][:split]``; or in Python texts, a dict of arrays, or an
            iterable (a DataLoader, say) of texts or of dicts of arrays or tensors with a leading batch axis.
        inputs: The graph's inputs, in graph order.
        tokenizer: Folder with a Hugging Face tokenizer, or its tokenizer.json; needed for texts.
        text_column: Column that holds the text; default: the only text column, or ``text``, or ``sentence``.
        samples: At most this many samples; more are drawn at random without replacement (an iterable that is not a
            list is read from its start, since it may never end). With packing, so many texts and so many windows.
        batch_size: Samples a batch, where the graph's batch axis is not static. With packing, fewer where there would be
            more than 4,096 tokens in a batch or fewer than ten batches.
        sequence_length: Cut texts to this many tokens; length of synthetic inputs. Feeds of arrays stay as they are.
        mask_input: Name of the input that marks real tokens; default: found by name.
        seed: Seed of every random choice.
        vocabulary: Rows of the embedding table, when known: token ids must be smaller.
        positions: Tokens that the model has positions for, when known.
        packing: Write texts behind each other and cut them into windows: for causal models.
        image_size: Height and width of synthetic images, where the graph leaves them open; 224 if not given.
        rows: Rows of the table that an input looks up, when known: what synthetic inputs of no known role are drawn below.

    Returns:
        The batches, their row masks and what there is to say about them.

    Raises:
        OptionError: The source or an option does not fit; one sentence that says what was found and the way out.
    """
    check_options(samples=samples, batch_size=batch_size, sequence_length=sequence_length, positions=positions)
    job = _Job(
        signature=Signature.read(inputs, mask_input),
        tokenizer=tokenizer,
        text_column=text_column,
        samples=samples,
        batch_size=batch_size,
        sequence_length=sequence_length,
        seed=seed,
        vocabulary=vocabulary,
        positions=positions,
        packing=packing,
        image_size=image_size or IMAGE_SIZES[0],
        rows=rows or {},
        rng=np.random.default_rng(seed),
    )
    if source is None:
        return _synthesise(job)
    drawn = _draw_from_path(source, job) if isinstance(source, str | Path) else _draw_from_python(source, job)
    return _batch_texts(drawn, job) if isinstance(drawn, _Texts) else _batch_feeds(drawn, job)


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


# The options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """The options of one call, checked."""

    signature: Signature
    tokenizer: str | Path | None
    text_column: str | None
    samples: int
    batch_size: int
    sequence_length: int | None
    seed: int
    vocabulary: int | None
    positions: int | None
    packing: bool
    image_size: int
    rows: Mapping[str, int]
    rng: np.random.Generator

    @property
    def characters(self) -> int:
        """Kept of a text at most: what the tokens of one sample need, or those of all samples where texts are packed."""
        longest = self.sequence_length or min(self.positions or _LONGEST, _LONGEST)
        return CHARACTERS * longest * (self.samples if self.packing else _SPARED)

    def drawn(self, count: int, total: int, what: str) -> str:
        return f"{count} {what}" if count == total else f"{count} of {total} {what} drawn with seed {self.seed}"

    def pick(self, total: int) -> NDArray[np.int64]:
        """Rows to use of ``total``, ascending."""
        if total <= self.samples:
            return np.arange(total)
        return np.sort(self.rng.choice(total, self.samples, replace=False))


def _finish(
    batches: list[dict[str, Array]],
    masks: list[NDArray[np.bool_]],
    samples: int,
    source: str,
    warnings: list[str],
    shared: frozenset[str],
    specials: int = 0,
) -> CalibrationData:
    tokens = sum(int(mask.sum()) for mask in masks)
    warnings = [*warnings, *_doubts(batches, masks, shared, specials)]
    full = all(mask.all() for mask in masks)
    return CalibrationData(
        batches=tuple(batches),
        row_masks=tuple(None if full else mask for mask in masks),
        samples=samples,
        tokens=tokens,
        source=source,
        warnings=tuple(warnings),
        synthetic=False,
    )


def _doubts(
    batches: Sequence[Mapping[str, Array]], masks: Sequence[NDArray[np.bool_]], shared: frozenset[str], specials: int
) -> Iterator[str]:
    """Yields why nothing that is measured on the samples can be trusted.

    Args:
        batches: feeds by input.
        masks: real rows of each batch, [b, s] or [b]; a sample without any fills a batch up.
        shared: inputs without a batch axis.
        specials: tokens that are in every sample.
    """
    seen: set[bytes] = set()
    samples = short = 0
    for batch, mask in zip(batches, masks, strict=True):
        for row in np.flatnonzero(mask.reshape(len(mask), -1).any(axis=1)):
            samples += 1
            short += mask.ndim == 2 and int(mask[row].sum()) <= specials + 1
            sample = hashlib.blake2b(digest_size=16)
            for name, whole in batch.items():
                if name in shared or whole.shape[:1] != mask.shape[:1]:
                    continue
                value = whole[row]
                real = value[mask[row]] if mask.ndim == 2 and value.shape[:1] == mask.shape[1:] else value
                sample.update(f"{name} {real.shape}".encode())
                sample.update(np.ascontiguousarray(real).tobytes())
            seen.add(sample.digest())
    if samples > 1 and samples - len(seen) > DOUBTFUL * samples:
        yield (
            f"only {len(seen)} of {samples} samples differ: what is held back was fitted as well, and errors look smaller "
            "than they are; give distinct samples."
        )
    if short > DOUBTFUL * samples:
        yield (
            f"{short} of {samples} samples are one token long: attention has nothing to choose from there, and what it "
            "does elsewhere is not seen; give longer samples."
        )


# Sources --------------------------------------------------------------------------------------------------------------


class Column(Protocol):
    """An array of which rows can be taken without reading the rest."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array; rows are along the first axis."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements."""
        ...

    def take(self, rows: NDArray[np.int64]) -> Array:
        """Returns rows as an array in memory."""
        ...


@dataclass(frozen=True)
class _Texts:
    """Texts that were drawn, and a line that says where from."""

    texts: list[str]
    source: str


@dataclass(frozen=True)
class _Feeds:
    """Feeds to draw rows from: each with the name it has in messages.

    Attributes:
        feeds: Label and columns by name.
        label: Where they come from.
        first_only: The source may not end: what there is was read from its start.
    """

    feeds: list[tuple[str, Mapping[str, Column]]]
    label: str
    first_only: bool = False


def _draw_from_path(source: str | Path, job: _Job) -> _Texts | _Feeds:
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long for a file name, or a NUL in it
        is_folder = is_file = False
    if not is_folder and not is_file:
        if isinstance(source, str) and may_be_hub_name(source):
            return _draw_from_hub(source, job)
        raise OptionError(f"calibration file '{source}' does not exist; give {_ACCEPTED}.")
    if is_folder:
        return _draw_from_folder(path, job)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise OptionError(f"calibration file '{path}' has the unknown suffix '{suffix}'; give {_ACCEPTED}.")
    if path.stat().st_size == 0:
        raise OptionError(f"calibration file '{path}' is empty; give one with samples in it.")
    if suffix == ".npz":
        return _Feeds([(f"calibration file '{path}'", npz_columns(path))], path.name)
    if suffix == ".npy":
        if len(job.signature.inputs) > 1:
            raise OptionError(
                f"calibration file '{path}' is one array, and the model has the inputs {names(job.signature.inputs)};"
                " give an .npz file, or a folder, with one array for each."
            )
        return _Feeds([(f"calibration file '{path}'", {next(iter(job.signature.inputs)): npy_column(path)})], path.name)
    _require_tokenizer(job, f"calibration file '{path}'")
    try:
        return _draw_texts(_file_texts(path, suffix, job), f"calibration file '{path}'", path.name, job)
    except UnicodeDecodeError as err:
        raise OptionError(f"calibration file '{path}' is not UTF-8 text; save it as such or give {_ACCEPTED}.") from err
    except OSError as err:
        raise OptionError(f"calibration file '{path}' cannot be read ({one_line(err)}); give {_ACCEPTED}.") from err


def _draw_from_folder(folder: Path, job: _Job) -> _Texts | _Feeds:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
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
    return _Feeds([(f"calibration folder '{folder}'", known)], folder.name)


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


def _draw_from_hub(name: str, job: _Job) -> _Texts | _Feeds:
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


def _draw_from_dataset(dataset: Any, where: str, label: str, job: _Job) -> _Texts | _Feeds:
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
        return _Feeds(
            [(f"row {row} of {where}", feed) for row, feed in zip(rows.tolist(), feeds, strict=True)],
            f"{label}, {job.drawn(len(rows), total, 'rows')}" if len(rows) < total else label,
        )
    _require_tokenizer(job, where)
    strings = [name for name in columns if getattr(dataset.features[name], "dtype", "") in ("string", "large_string")]
    column = _text_column(columns, strings, job.text_column, where)
    if column not in strings:
        raise OptionError(f"column '{column}' of {where} does not hold text; its text columns are {names(strings)}.")
    kept = _Kept(job)
    for row in dataset.select_columns([column]).select(rows):
        if row[column] and (text := row[column].strip()):
            kept.put(text)
    if not kept.texts:
        raise OptionError(f"column '{column}' of {where} holds only blank texts; name another text column.")
    return _Texts(kept.texts, f"{label}, {job.drawn(len(kept.texts), total, 'texts')}")


def _draw_from_python(source: object, job: _Job) -> _Texts | _Feeds:
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
        _require_tokenizer(job, "the calibration data")
        return _draw_texts(_checked_texts(items), "the calibration data", "texts from Python", job, ends=ends)
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
        seen += _check_feed(*feeds[-1], job.signature)
        if not ends and seen >= job.samples:
            break
    return _Feeds(feeds, "feeds from Python", first_only=not ends)


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


# Texts ----------------------------------------------------------------------------------------------------------------


def _require_tokenizer(job: _Job, where: str) -> None:
    """Refuse texts that cannot be used before they are read.

    Raises:
        OptionError: An input that no tokenizer fills, or no tokenizer.
    """
    signature = job.signature
    taken: set[str] = set()
    for spec in signature.inputs.values():
        role = signature.roles.get(spec.name, "")
        if role in STATE_ROLES:
            continue
        usable = role == "mask" or spec.dtype.kind in "iu"
        alone = spec.name == signature.mask if role == "mask" else role not in taken
        shared = spec.name in signature.shared and role != "position"
        if not role or len(spec.shape) != 2 or not usable or not alone or shared:
            raise OptionError(
                f"model input {describe(spec)} cannot be filled from the texts of {where}; give an .npz file with one "
                f"array for each of {names(signature.inputs)} instead."
            )
        taken.add(role)
    if signature.ids is None:
        raise OptionError(f"the model has no token id input, and {where} holds texts; give an .npz file instead.")
    if job.tokenizer is None:
        raise OptionError(f"{where} holds texts, and no tokenizer was given; pass --tokenizer DIR.")


class _Kept:
    """Texts that were drawn: of each what its tokens need, and of all no more than there is room for.

    Args:
        job: says how many tokens are wanted.
    """

    def __init__(self, job: _Job) -> None:
        self.texts: list[str] = []
        self._most = job.characters
        self._room = max(_TEXT_ROOM, self._most if job.packing else self._most * job.samples)
        self._size = 0

    def put(self, text: str, slot: int | None = None) -> None:
        """Keeps a text, in the place of another one where ``slot`` says which."""
        text = cut_text(text, self._most)
        if slot is None:
            self.texts.append(text)
        else:
            self._size -= len(self.texts[slot])
            self.texts[slot] = text
        self._size += len(text)
        if self._size > self._room:  # of packed texts some give all tokens that are wanted
            self._most = self._room // (2 * len(self.texts))
            self.texts = [cut_text(own, self._most) for own in self.texts]
            self._size = sum(map(len, self.texts))


def _draw_texts(texts: Iterator[str], where: str, label: str, job: _Job, *, ends: bool = True) -> _Texts:
    """Draw without replacement in one pass; blank texts do not count."""
    kept = _Kept(job)
    seen = 0
    for text in (text.strip() for text in texts):
        if not text:
            continue
        seen += 1
        if len(kept.texts) < job.samples:
            kept.put(text)
            if not ends and len(kept.texts) == job.samples:
                return _Texts(kept.texts, f"{label}, the first {seen} texts")
        elif (slot := int(job.rng.integers(seen))) < job.samples:
            kept.put(text, slot)
    if not kept.texts:
        raise OptionError(f"{where} is empty: it has no text that is not blank; give at least one.")
    return _Texts(kept.texts, f"{label}, {job.drawn(len(kept.texts), seen, 'texts')}")


def _checked_texts(items: Iterable[object]) -> Iterator[str]:
    for number, item in enumerate(items):
        if not isinstance(item, str):
            kind = type(item).__name__
            raise OptionError(f"item {number} of the calibration data is of type '{kind}'; all must be texts.")
        yield item


def _file_texts(path: Path, suffix: str, job: _Job) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as stream:
        where = f"calibration file '{path}'"
        if suffix == ".txt":
            yield from _line_beginnings(stream, job.characters, where)
        elif suffix == ".jsonl":
            yield from _column_texts(
                jsonl_rows(_short_strings(stream, job.characters, where), where), path, job.text_column
            )
        else:
            yield from _column_texts(csv_rows(_bounded(stream, where), where), path, job.text_column)


def _pieces(stream: IO[str], where: str) -> Iterator[Iterator[str]]:
    """Yields the lines of a file, each as pieces; one that is not read to its end is skipped."""
    number = 0

    def line(piece: str) -> Iterator[str]:
        while piece:
            if "\0" in piece:
                raise OptionError(f"{where} holds binary data (line {number}); give {_ACCEPTED}.")
            yield piece
            piece = "" if piece.endswith("\n") else stream.readline(_PIECE)

    while piece := stream.readline(_PIECE):
        number += 1
        rest = line(piece)
        yield rest
        for _ in rest:
            pass


def _line_beginnings(stream: IO[str], most: int, where: str) -> Iterator[str]:
    """Yields lines without the blanks before them, of each what ``cut_text`` needs to keep so many characters."""
    for line in _pieces(stream, where):
        parts: list[str] = []
        size = 0
        for piece in line:
            piece = piece if parts else piece.lstrip()
            if piece and size <= most:
                parts.append(piece)
                size += len(piece)
        yield "".join(parts)


def _short_strings(stream: IO[str], most: int, where: str) -> Iterator[str]:
    """Yields lines of JSON; in long ones, strings of more characters than ``cut_text`` needs end before."""
    for line in _pieces(stream, where):
        first = next(line)
        second = next(line, None)
        if second is None:
            yield first
            continue
        parts: list[str] = []
        held, inside, size = "", False, 0
        for piece in itertools.chain([first, second], line):
            text, place = held + piece, 0
            while found := _JSON_PART.match(text, place):
                part, place = found[0], found.end()
                if part == '"':
                    inside, size = not inside, 0
                elif inside:
                    part = "" if size > most else part if part[0] == "\\" else part[: most + 1 - size]
                    size += len(part)
                parts.append(part)
            held = text[place:]  # an escape that goes on, or none that JSON knows
            if len(held) > len("\\u0000"):
                parts.append(held)
                held = ""
        yield "".join([*parts, held])


def _bounded(stream: IO[str], where: str) -> Iterator[str]:
    """Yields lines.

    Raises:
        OptionError: one has no end in sight.
    """
    for number, line in enumerate(_pieces(stream, where), 1):
        parts: list[str] = []
        for piece in line:
            parts.append(piece)
            if len(parts) * _PIECE > _LONGEST_ROW:
                raise OptionError(f"line {number} of {where} is longer than {_LONGEST_ROW:,} characters; quote or cut it.")
        yield "".join(parts)


def _without_nul(lines: Iterable[str], where: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise OptionError(f"{where} holds binary data (line {number}); give {_ACCEPTED}.")
        yield line


def jsonl_rows(lines: Iterable[str], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a .jsonl file, each with the number of its line.

    Raises:
        OptionError: A line is no JSON object.
    """
    for number, line in enumerate(_without_nul(lines, where), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise OptionError(f"line {number} of {where} is no JSON ({one_line(err)}); each must be an object.") from err
        if not isinstance(row, dict):
            raise OptionError(f"line {number} of {where} is a JSON {type(row).__name__}; each must be an object.")
        yield number, row


def csv_rows(lines: Iterable[str], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a .csv file, each with the number of its last line.

    Raises:
        OptionError: It is no CSV.
    """
    reader = csv.DictReader(_without_nul(lines, where))
    try:
        for row in reader:
            yield reader.line_num, {name: value for name, value in row.items() if isinstance(name, str)}
    except csv.Error as err:
        raise OptionError(f"line {reader.line_num + 1} of {where} is no CSV ({one_line(err)}); quote or cut it.") from err


def _column_texts(rows: Iterator[tuple[int, dict[str, Any]]], path: Path, text_column: str | None) -> Iterator[str]:
    where = f"calibration file '{path}'"
    head = list(itertools.islice(rows, _COLUMN_PROBE))
    if not head:
        return
    columns = list(dict.fromkeys(name for _, row in head for name in row))
    strings = [name for name in columns if any(_is_text(row.get(name)) for _, row in head)]
    column = _text_column(columns, strings, text_column, where)
    for number, row in itertools.chain(head, rows):
        text = row.get(column)
        if column not in row:
            raise OptionError(f"line {number} of {where} lacks the column '{column}'; it has {names(row)}.")
        if text is None:
            continue
        if not isinstance(text, str):
            raise OptionError(
                f"line {number} of {where} has a {type(text).__name__} in column '{column}'; it must be text, or name "
                "another column with the text column option."
            )
        yield text


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return bool(value.strip())
    return False


def _text_column(columns: Sequence[str], strings: Sequence[str], wanted: str | None, where: str) -> str:
    if wanted is not None:
        if wanted not in columns:
            raise OptionError(f"{where} has no column '{wanted}'; its columns are {names(columns)}.")
        return wanted
    if len(columns) == 1:
        return columns[0]
    if len(strings) == 1:
        return strings[0]
    for name in _TEXT_COLUMNS:
        if name in columns:
            return name
    raise OptionError(f"{where} does not say which column is text; name one of {names(columns)} as the text column.")


def _longest_text(tokenizer: TextTokenizer, static: int | None, job: _Job) -> int:
    """Tokens at which texts are cut: what the user says, else the least of what graph and tokenizer say and 512.

    Raises:
        OptionError: The user asks for more than the graph or the tokenizer takes, or for nothing but special tokens.
    """
    longest = job.sequence_length or min(tokenizer.cut or _LONGEST, _LONGEST)
    for limit, owner in ((tokenizer.limit, "the tokenizer"), (static, "the model"), (job.positions, "the model")):
        if limit is not None and longest > limit:
            if job.sequence_length is not None:
                raise OptionError(
                    f"'sequence_length' is {job.sequence_length}, and {owner} takes {limit} tokens; give at most that."
                )
            longest = limit
    if longest <= tokenizer.specials:
        raise OptionError(
            f"texts would be cut to {longest} tokens, and the tokenizer adds {tokenizer.specials} special ones; "
            f"a 'sequence_length' of at least {tokenizer.specials + 1} is needed."
        )
    return longest


def _batch_texts(drawn: _Texts, job: _Job) -> CalibrationData:
    """Tokenise, sort by length, pad, and shuffle the order of the batches."""
    signature = job.signature
    warnings: list[str] = []
    assert job.tokenizer is not None  # _require_tokenizer
    tokenizer = load_tokenizer(job.tokenizer)
    static = signature.length()
    longest = _longest_text(tokenizer, static, job)
    # lone surrogates (JSON allows them) are not text for a tokenizer
    texts = [text.encode("utf-8", "replace").decode() for text in drawn.texts]
    if job.packing:
        tokens = all_tokens(tokenizer, texts, job.samples * longest)
        encoded: list[tuple[Tokens, list[int]]] = [(ids, []) for ids in tokens if len(ids)]
    else:
        encoded = [pair for pair in first_tokens(tokenizer, texts, longest) if pair[0]]
    if not encoded:
        raise OptionError(f"tokenizer '{job.tokenizer}' finds no token in the texts; is it the model's?")
    if len(encoded) < len(texts):
        warnings.append(f"{len(texts) - len(encoded)} texts have no token and were left out.")
    _check_vocabulary(max(int(np.max(ids)) for ids, _ in encoded), tokenizer, job, warnings)
    said = f"at most {longest} tokens each"
    size = signature.batch or job.batch_size
    if job.packing:
        encoded, said = _packed(encoded, longest, tokenizer, job, warnings)
        size = signature.batch or packed_rows(len(encoded), longest, job.batch_size)

    lengths = np.array([len(ids) for ids, _ in encoded])
    ascending = np.argsort(lengths, kind="stable")
    # without a mask input the attention sees padding: one length a batch where the graph leaves that free
    equal = (signature.mask is None or job.packing) and signature.batch is None and static is None
    cuts = np.flatnonzero(np.diff(lengths[ascending])) + 1 if equal else np.array([], dtype=np.int64)
    parts = np.split(ascending, cuts)
    chunks = [part[start : start + size] for part in parts for start in range(0, len(part), size)]
    batches: list[dict[str, Array]] = []
    masks: list[NDArray[np.bool_]] = []
    for index in job.rng.permutation(len(chunks)):
        chunk = chunks[index]
        rows = np.resize(chunk, signature.batch) if signature.batch else chunk
        batch, real = pad_texts([encoded[row] for row in rows], static or int(lengths[chunk].max()), tokenizer, signature)
        batches.append(batch)
        masks.append(real & (np.arange(len(rows)) < len(chunk))[:, None])
    specials = 0 if job.packing else tokenizer.specials
    source = f"{drawn.source}, {said}"
    data = _finish(batches, masks, len(encoded), source, warnings, signature.shared, specials)
    # a causal model's real tokens never see the padding behind them
    return data if job.packing else replace(data, warnings=data.warnings + tuple(_mask_warnings(signature, masks)))


def _packed(
    encoded: Sequence[tuple[Tokens, list[int]]], window: int, tokenizer: TextTokenizer, job: _Job, warnings: list[str]
) -> tuple[list[tuple[Tokens, list[int]]], str]:
    """Windows in place of texts, `samples` of them at most, and what the report says of them."""
    separator = None if tokenizer.specials else tokenizer.separator
    if separator is None and not tokenizer.specials and len(encoded) > 1:
        warnings.append(f"tokenizer '{job.tokenizer}' names no end token: texts are joined without one.")
    full, tail = pack([encoded[index][0] for index in job.rng.permutation(len(encoded))], window, separator)
    windows = [*full, tail] if len(tail) else [*full]
    rows = job.pick(len(windows))
    drawn = job.drawn(len(rows), len(windows), "windows")
    return [(windows[row].tolist(), [0] * len(windows[row])) for row in rows], f"packed into {drawn} of {window} tokens"


def _mask_warnings(signature: Signature, masks: Sequence[NDArray[np.bool_]]) -> Iterator[str]:
    if all(mask.all() for mask in masks):
        return
    if signature.mask is None:
        yield (
            "the model has no mask input: its attention sees the padding that its static shape asks; name it with "
            "--mask-input if there is one."
        )
    elif signature.inputs[signature.mask].dtype.kind not in "biu":
        yield f"mask input '{signature.mask}' is a float: it is filled with 1 for a real token and 0 for padding."
    elif "pad" in signature.mask.lower():
        yield f"mask input '{signature.mask}' is filled with 1 for a real token and 0 for padding; is that its meaning?"


def _check_vocabulary(largest: int, tokenizer: TextTokenizer, job: _Job, warnings: list[str]) -> None:
    if job.vocabulary is None:
        return
    if largest >= job.vocabulary:
        raise OptionError(
            f"tokenizer '{job.tokenizer}' gives the token id {largest}, and the model's embedding table has "
            f"{job.vocabulary} rows; give the tokenizer that belongs to the model."
        )
    if tokenizer.size > job.vocabulary:
        warnings.append(
            f"tokenizer '{job.tokenizer}' knows {tokenizer.size} tokens, and the model's embedding table has "
            f"{job.vocabulary} rows; is it the model's tokenizer?"
        )


def pad_texts(
    encoded: Sequence[tuple[Tokens, list[int]]], length: int, tokenizer: TextTokenizer, signature: Signature
) -> tuple[dict[str, Array], NDArray[np.bool_]]:
    """Feed of one batch, and its real tokens [b, s]."""
    shape = (len(encoded), length)
    ids = np.full(shape, tokenizer.pad or 0, dtype=np.int64)
    types = np.zeros(shape, dtype=np.int64)
    real = np.zeros(shape, dtype=np.bool_)
    for row, (tokens, kinds) in enumerate(encoded):
        place = slice(length - len(tokens), length) if tokenizer.pads_left else slice(0, len(tokens))
        ids[row, place], types[row, place], real[row, place] = tokens, kinds, True
    return signature.feed(ids, real, types, pad=tokenizer.pad or 0), real


# Arrays ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InMemory:
    """An array in memory, or memory-mapped, as a :class:`Column`."""

    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements."""
        return self.values.dtype

    def take(self, rows: NDArray[np.int64]) -> Array:
        """Returns rows as an array in memory."""
        return np.asarray(self.values[rows] if self.values.ndim else self.values)


@dataclass(frozen=True)
class _Compressed:
    """A compressed member of an .npz file in C order: read block by block, of which the wanted rows are kept."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def take(self, rows: NDArray[np.int64]) -> Array:
        kept = np.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        width = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        block = max(1, _BLOCK_BYTES // max(1, width))
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                _read_npy_header(stream)
                for start in range(0, int(wanted[-1]) + 1 if len(wanted) else 0, block):
                    count = min(block, self.shape[0] - start)
                    data = stream.read(count * width)
                    values = np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])
                    low, high = np.searchsorted(wanted, [start, start + count])
                    kept[order[low:high]] = values[wanted[low:high] - start]
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as err:
            raise _unreadable(self.path, err) from err
        return kept


def _unreadable(path: Path, err: BaseException) -> OptionError:
    return OptionError(f"calibration file '{path}' cannot be read ({one_line(err)}); write it again with numpy.")


def _pickled(path: Path, name: str) -> OptionError:
    return OptionError(f"array '{name}' of calibration file '{path}' holds Python objects; save an array of numbers.")


def npy_column(path: Path) -> InMemory:
    """Returns an .npy file as a column, memory-mapped.

    Raises:
        OptionError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            shape, _, dtype = _read_npy_header(stream)
        if dtype.hasobject:
            raise _pickled(path, path.stem)
        # an array without elements cannot be mapped
        return InMemory(np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False))
    except (OSError, EOFError, ValueError) as err:
        raise _unreadable(path, err) from err


def npz_columns(path: Path) -> dict[str, Column]:
    """Columns of an .npz file by name, with nothing read but the headers (and what is small)."""
    columns: dict[str, Column] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    shape, fortran, dtype = _read_npy_header(stream)
                    header = stream.tell()
                if dtype.hasobject:
                    raise _pickled(path, name)
                if member.file_size <= _BLOCK_BYTES or not shape or (fortran and member.compress_type):
                    with archive.open(member) as stream:
                        columns[name] = InMemory(np.lib.format.read_array(stream, allow_pickle=False))
                elif member.compress_type:
                    columns[name] = _Compressed(path, member.filename, shape, dtype)
                else:
                    offset = _data_offset(path, member) + header
                    columns[name] = InMemory(np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C"))
    except (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as err:
        raise _unreadable(path, err) from err
    return columns


def _read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


def _data_offset(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes start: after its local header, whose name and extra field have lengths of their own."""
    with path.open("rb") as stream:
        stream.seek(member.header_offset)
        local = stream.read(30)
    return member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")


def _batch_feeds(drawn: _Feeds, job: _Job) -> CalibrationData:
    """Check the feeds, draw rows from all of them, and batch rows of one shape together."""
    signature = job.signature
    warnings: list[str] = []
    if job.sequence_length is not None:
        warnings.append("'sequence_length' has no effect on calibration data that is given as arrays.")
    unknown = dict.fromkeys(name for _, feed in drawn.feeds for name in feed if name not in signature.inputs)
    counts = [_check_feed(label, feed, signature) for label, feed in drawn.feeds]
    if unknown:
        warnings.append(f"arrays that are no inputs of the model were ignored: {names(unknown)}.")
    total = sum(counts)
    if total == 0:
        raise OptionError(f"{drawn.feeds[0][0]} is empty: its arrays have no samples; give at least one.")
    rows = np.arange(min(total, job.samples)) if drawn.first_only else job.pick(total)

    groups: dict[tuple[object, ...], list[dict[str, Array]]] = {}
    start = 0
    for (label, feed), count in zip(drawn.feeds, counts, strict=True):
        inside = rows[(rows >= start) & (rows < start + count)] - start
        start += count
        if not len(inside):
            continue
        made = signature.made(feed)
        given = {name: spec for name, spec in signature.inputs.items() if name not in made}
        taken = {name: _take(feed[name], inside, spec, label, job) for name, spec in given.items()}
        _check_symbols(taken, signature, label)
        key = tuple(value.tobytes() if name in signature.shared else value.shape[1:] for name, value in taken.items())
        groups.setdefault(key, []).append(taken)
    batches, masks = _batch_rows([_stack(group, signature) for group in groups.values()], job)
    _check_masks(masks, signature, drawn, warnings)
    said = f"the first {len(rows)} rows" if drawn.first_only else job.drawn(len(rows), total, "rows")
    return _finish(batches, masks, len(rows), f"{drawn.label}, {said}", warnings, signature.shared)


def _check_feed(where: str, feed: Mapping[str, Column], signature: Signature) -> int:
    """Check names, ranks and shapes, without reading the arrays.

    Returns:
        The number of samples.

    Raises:
        OptionError: They do not fit the graph's inputs.
    """
    made = signature.made(feed)
    missing = [name for name in signature.inputs if name not in feed and name not in made]
    if missing:
        unknown = [name for name in feed if name not in signature.inputs]
        raise OptionError(
            f"{where} lacks the inputs {names(missing)} (unknown in it: {names(unknown)}); it needs an array for "
            f"each of {names(signature.inputs)}."
        )
    counts: dict[str, int] = {}
    for name, spec in signature.inputs.items():
        if name in made:
            continue
        shape = feed[name].shape
        need = f"model input {describe(spec)} needs"
        if feed[name].dtype.kind in "OUSM":
            raise OptionError(f"array '{name}' of {where} is of type '{feed[name].dtype}'; {need} numbers of one shape.")
        if len(shape) != len(spec.shape):
            raise OptionError(f"array '{name}' of {where} has the shape {list(shape)}; {need} rank {len(spec.shape)}.")
        skip = 0 if name in signature.shared else 1
        if any(isinstance(dim, int) and dim != size for dim, size in list(zip(spec.shape, shape, strict=True))[skip:]):
            raise OptionError(f"array '{name}' of {where} has the shape {list(shape)}; {need} its static sizes.")
        if name not in signature.shared:
            counts[name] = shape[0]
    if len(set(counts.values())) > 1:
        found = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise OptionError(f"the arrays of {where} have different numbers of samples ({found}); they must be equal.")
    return next(iter(counts.values()))


def _take(column: Column, rows: NDArray[np.int64], spec: InputSpec, where: str, job: _Job) -> Array:
    signature = job.signature
    whole = spec.name in signature.shared
    values = column.take(np.arange(column.shape[0]) if whole and column.shape else rows)
    values = cast(values, spec, where)
    if signature.roles.get(spec.name) == "ids" and values.size:
        low, high = int(values.min()), int(values.max())
        if low < 0 or (job.vocabulary is not None and high >= job.vocabulary):
            bound = "not below 0" if job.vocabulary is None else f"in [0, {job.vocabulary})"
            raise OptionError(
                f"array '{spec.name}' of {where} has the token id {low if low < 0 else high}; it must be {bound}."
            )
    return values


def _check_symbols(taken: Mapping[str, Array], signature: Signature, where: str) -> None:
    """Axes with one symbol must have one size."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, value in taken.items():
        for dim, size in list(zip(signature.inputs[name].shape, value.shape, strict=True))[1:]:
            if not isinstance(dim, str) or not dim:
                continue
            before = sizes.setdefault(dim, (size, name))
            if before[0] != size:
                raise OptionError(
                    f"arrays '{before[1]}' and '{name}' of {where} have the sizes {before[0]} and {size} on the axis "
                    f"'{dim}' that they share; they must be the same."
                )


def _stack(group: Sequence[Mapping[str, Array]], signature: Signature) -> dict[str, Array]:
    return {
        name: first if name in signature.shared or len(group) == 1 else np.concatenate([feed[name] for feed in group])
        for name, first in group[0].items()
    }


def _batch_rows(groups: Sequence[Mapping[str, Array]], job: _Job) -> tuple[list[dict[str, Array]], list[NDArray[np.bool_]]]:
    """Cut groups of rows into batches in seeded order; fill a static batch with repeats that are masked out."""
    signature = job.signature
    size = signature.batch or job.batch_size
    # a mask that is added to the scores is 0 where the token is real; batches without padding do not show it
    mask = signature.mask
    additive = mask is not None and any(is_float(g[mask].dtype) and bool((g[mask] < 0).any()) for g in groups)
    batches: list[dict[str, Array]] = []
    masks: list[NDArray[np.bool_]] = []
    for group in groups:
        count = next(len(value) for name, value in group.items() if name not in signature.shared)
        order = job.rng.permutation(count)
        for start in range(0, count, size):
            chunk = order[start : start + size]
            rows = np.resize(chunk, signature.batch) if signature.batch else chunk
            batch = {name: value if name in signature.shared else value[rows] for name, value in group.items()}
            real = signature.real_rows(batch, additive)
            fresh = np.arange(len(rows)) < len(chunk)
            batches.append(signature.completed(batch, real))
            masks.append(real & fresh.reshape(-1, *(1,) * (real.ndim - 1)))
    shuffled = job.rng.permutation(len(batches))
    return [batches[index] for index in shuffled], [masks[index] for index in shuffled]


def _check_masks(masks: Sequence[NDArray[np.bool_]], signature: Signature, drawn: _Feeds, warnings: list[str]) -> None:
    if signature.mask is None:
        return
    if not any(mask.any() for mask in masks):
        raise OptionError(
            f"mask input '{signature.mask}' of {drawn.feeds[0][0]} marks no real token; it needs 1 for real tokens and "
            "0 for padding, or name another input with --mask-input."
        )
    rank = len(signature.inputs[signature.mask].shape)
    if rank != 2:
        warnings.append(
            f"mask input '{signature.mask}' has rank {rank}, not 2: padding cannot be told from it and is measured too."
        )
    elif signature.batch is None and not all(mask.any(axis=-1).all() for mask in masks):
        warnings.append(f"some samples have no real token by mask input '{signature.mask}' (1 = real, 0 = padding).")


# Synthetic inputs -----------------------------------------------------------------------------------------------------


def _synthesise(job: _Job) -> CalibrationData:
    """Inputs of the right shapes and ranges, and nothing more: what is fitted to them is fitted to noise."""
    signature = job.signature
    sizes: dict[str, int] = {}
    group: dict[str, Array] = {}
    made = signature.made(name for name in signature.inputs if signature.roles.get(name) not in STATE_ROLES)
    for spec in (spec for name, spec in signature.inputs.items() if name not in made):
        shape = _synthetic_shape(spec, job, sizes)
        need = math.prod(shape) * spec.dtype.itemsize
        if need > _SYNTHETIC_BYTES:
            raise OptionError(
                f"{job.samples} made-up samples of model input {describe(spec)} would take {need:,} bytes; give fewer "
                "samples, or real ones (--calibration)."
            )
        group[spec.name] = _synthetic_values(spec, shape, job)
    for spec in signature.inputs.values():
        if _counts(spec, signature) and (length := _open_length(group, signature)) is not None:
            group[spec.name] = np.full(group[spec.name].shape, length, dtype=spec.dtype)
    batches, masks = _batch_rows([group], job)
    warnings = [
        "no calibration data was given: the repair is fitted to random inputs, so accuracy will be lower than with a "
        "few hundred real samples; pass --calibration."
    ]
    if signature.ids and job.vocabulary is None:
        warnings.append(
            f"the vocabulary is not known: ids for input '{signature.ids}' are drawn below {_SYNTHETIC_VOCABULARY}."
        )
    said = f"synthetic inputs, {job.samples} drawn with seed {job.seed}"
    data = _finish(batches, masks, job.samples, said, warnings, signature.shared)
    return replace(data, synthetic=True)


def _counts(spec: InputSpec, signature: Signature) -> bool:
    """Whether an input says how long each sample is: [b], of no other role, and called so."""
    named = re.search(r"(^|[_.])len(gth)?s?$", spec.name.lower()) is not None
    return named and len(spec.shape) == 1 and spec.dtype.kind in "iu" and spec.name not in signature.roles


def _open_length(group: Mapping[str, Array], signature: Signature) -> int | None:
    """The size of the first axis behind the batch that the graph leaves open."""
    for name, values in group.items():
        for dim, size in zip(signature.inputs[name].shape[1:], values.shape[1:], strict=True):
            if not isinstance(dim, int):
                return int(size)
    return None


def _synthetic_shape(spec: InputSpec, job: _Job, sizes: dict[str, int]) -> tuple[int, ...]:
    shared = spec.name in job.signature.shared
    shape: list[int] = []
    for axis, dim in enumerate(spec.shape):
        if axis == 0 and not shared:
            shape.append(job.samples)
        elif isinstance(dim, int):
            shape.append(dim)
        else:
            free = _synthetic_size(spec, axis, job)
            shape.append(sizes.setdefault(dim, free) if dim else free)
    return tuple(shape)


def _synthetic_size(spec: InputSpec, axis: int, job: _Job) -> int:
    if is_float(spec.dtype) and len(spec.shape) == 4:
        return 3 if axis == 1 else job.image_size
    if job.sequence_length is not None:
        return job.sequence_length
    if is_float(spec.dtype) and len(spec.shape) == 2 and spec.name not in job.signature.roles:
        return 16000  # a second of sound
    static = [s.shape[1] for s in job.signature.inputs.values() if len(s.shape) == 2 and s.name in job.signature.roles]
    limit = job.positions or _SYNTHETIC_SEQUENCE
    return next((dim for dim in static if isinstance(dim, int)), min(limit, _SYNTHETIC_SEQUENCE))


def _synthetic_values(spec: InputSpec, shape: tuple[int, ...], job: _Job) -> Array:
    role = job.signature.roles.get(spec.name)
    if role == "mask":
        return np.ones(shape, dtype=spec.dtype)
    if role == "position":
        return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(spec.dtype)
    if role == "ids":
        return job.rng.integers(job.vocabulary or _SYNTHETIC_VOCABULARY, size=shape).astype(spec.dtype)
    if role is None and spec.name in job.rows and not is_float(spec.dtype):
        return job.rng.integers(job.rows[spec.name], size=shape).astype(spec.dtype)
    if role is None and is_float(spec.dtype):
        return np.asarray(job.rng.standard_normal(shape, dtype=np.float32), dtype=np.float32).astype(spec.dtype)
    return np.zeros(shape, dtype=spec.dtype)
