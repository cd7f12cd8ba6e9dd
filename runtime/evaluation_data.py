"""Evaluation sets: labelled rows from files, saved datasets and the hub, in the columns that published sets use.

Unlike calibration data, rows keep their order, their labels and their partners, so that every model sees the same samples.
Defaults are the conventions of GLUE (1804.07461; ``sentence``, ``sentence1`` and ``sentence2``, ``premise`` and
``hypothesis``, ..., ``label``), SQuAD (``question``, ``context``, ``answers``) and WikiText (``text``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.array_columns import Column, npy_column, npz_columns
from liar_opt.runtime.calibration_data import may_be_hub_name
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.extras import require
from liar_opt.runtime.signatures import names, one_line
from liar_opt.runtime.text_sources import ACCEPTED, csv_rows, jsonl_rows

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", "text_pair"),
)
TEXTS = ("text", "sentence", "review", "content")
LABELS = ("label", "labels", "score", "similarity_score")


@dataclass(frozen=True)
class Table:
    """An evaluation set.

    Attributes:
        columns: by name: a list of values, or arrays of which rows can be taken without reading the rest.
        rows: places of the rows that are used, ascending.
        source: one line for the report.
        where: the set as messages name it.
        class_names: names of the classes of a label column, where the set has them.
        separator: stands between the rows where they are one text.
    """

    columns: Mapping[str, Sequence[Any] | Column]
    rows: NDArray[np.int64]
    source: str
    where: str
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    separator: str = "\n\n"

    def values(self, name: str) -> list[Any]:
        """Returns a column of the rows that are used.

        Raises:
            OptionError: there is no such column.
        """
        if name not in self.columns:
            raise OptionError(f"{self.where} has no column '{name}'; its columns are {names(self.columns)}")
        column = self.columns[name]
        return [column[r] for r in self.rows] if isinstance(column, Sequence) else column.take(self.rows).tolist()

    def drawn(self, samples: int | None, seed: int) -> Table:
        """Returns the set with ``samples`` of its rows at most, drawn without replacement."""
        total = len(self.rows)
        if samples is None or samples >= total:
            return replace(self, source=f"{self.source}, {total:,} samples")
        picked = np.sort(np.random.default_rng(seed).choice(total, samples, replace=False))
        source = f"{self.source}, {samples:,} of {total:,} samples drawn with seed {seed}"
        return replace(self, rows=self.rows[picked], source=source)


# Reading --------------------------------------------------------------------------------------------------------------


def read_table(data: str | Path, split: str | None, preferred: Sequence[str], whole: bool = False) -> Table:
    """Reads an evaluation set.

    Args:
        data: a file, a folder or the name of a dataset, ``name[:config][:split]``.
        split: of a dataset.
        preferred: splits to take where none is named, the best first.
        whole: the set is one text, so blank lines of a .txt file are part of it; else they are no samples.

    Raises:
        OptionError: there is no such set or split, it cannot be read, or it is empty.
    """
    path = Path(data)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long for a file name, or a NUL in it
        is_folder = is_file = False
    if is_folder and ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        table = _saved(path, split, preferred)
    elif is_folder or is_file:
        if split is not None:
            raise OptionError(f"evaluation data '{path}' has no splits; give --split with a dataset only")
        table = _folder(path) if is_folder else _file(path, whole)
    elif may_be_hub_name(str(data)):
        table = _hub(str(data), split, preferred)
    else:
        raise OptionError(f"evaluation data '{data}' does not exist; give {ACCEPTED}")
    if not len(table.rows):
        raise OptionError(f"{table.where} is empty; give one with samples in it")
    return table


def _file(path: Path, whole: bool) -> Table:
    where, suffix = f"evaluation data '{path}'", path.suffix.lower()
    try:
        if suffix == ".npz":
            return _arrays(npz_columns(path), path.name, where)
        if suffix == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            filled = [line for line in lines if line.strip()]
            return replace(_table({"text": lines if whole and filled else filled}, path.name, where), separator="\n")
        if suffix in (".jsonl", ".csv"):
            with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as stream:
                rows = list(jsonl_rows(stream, where) if suffix == ".jsonl" else _full_rows(stream, where))
            return _table(_by_column(rows, where), path.name, where)
    except UnicodeDecodeError as err:
        raise OptionError(f"{where} is not UTF-8 text; save it as such or give {ACCEPTED}") from err
    except OSError as err:
        raise OptionError(f"{where} cannot be read ({one_line(err)}); give {ACCEPTED}") from err
    raise OptionError(f"{where} has the unknown suffix '{suffix}'; give {ACCEPTED}")


def _full_rows(stream: Iterable[str], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of a .csv file, without the columns that a short row lacks."""
    for number, row in csv_rows(stream, where):
        yield number, {name: value for name, value in row.items() if value is not None}


def _by_column(rows: Sequence[tuple[int, Mapping[str, Any]]], where: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in (rows[0][1] if rows else {})}
    for number, row in rows:
        missing = [name for name in columns if name not in row]
        if missing:
            raise OptionError(f"line {number} of {where} lacks the columns {names(missing)}; it has {names(row)}")
        for name, values in columns.items():
            values.append(row[name])
    return columns


def _folder(path: Path) -> Table:
    where = f"evaluation folder '{path}'"
    files = {file.name.removesuffix(".npy"): file for file in sorted(path.glob("*.npy"))}
    if not files:
        raise OptionError(f"{where} holds neither .npy files nor a saved dataset; give {ACCEPTED}")
    return _arrays({name: npy_column(file) for name, file in files.items()}, path.name, where)


def _arrays(columns: Mapping[str, Column], label: str, where: str) -> Table:
    counts = {name: column.shape[0] if column.shape else 0 for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"'{name}' {count}" for name, count in counts.items())
        raise OptionError(f"the arrays of {where} have different numbers of samples ({found}); they must be equal")
    return Table(columns, np.arange(next(iter(counts.values()), 0)), label, where)


def _table(columns: Mapping[str, Sequence[Any]], label: str, where: str) -> Table:
    return Table(columns, np.arange(len(next(iter(columns.values()), ()))), label, where)


def _saved(folder: Path, split: str | None, preferred: Sequence[str]) -> Table:
    where = f"dataset folder '{folder}'"
    require(where, "datasets")
    import datasets  # type: ignore[import-untyped, unused-ignore]

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as err:  # the library raises errors of its many formats
        raise OptionError(f"{where} cannot be loaded ({one_line(err)}); write it again with save_to_disk") from err
    return _dataset(dataset, split, preferred, folder.name, where)


def _hub(name: str, split: str | None, preferred: Sequence[str]) -> Table:
    require(f"'{name}' is no file here, and a named dataset", "datasets")
    import datasets  # type: ignore[import-untyped, unused-ignore]

    path, *parts = name.split(":")
    if parts and (len(parts) == 2 or re.match(r"(train|valid|dev|test)", parts[-1])):
        inside = parts.pop()
        if split not in (None, inside):
            raise OptionError(f"'{name}' names the split '{inside}' and --split names '{split}'; give one of them")
        split = inside
    try:
        dataset = datasets.load_dataset(path, parts[0] if parts else None)
    except Exception as err:  # network, permission, unknown name or config: the library has a class for each
        raise OptionError(
            f"'{name}' is no file here, and no dataset of that name could be loaded ({one_line(err)}); check the spelling "
            "(name[:config][:split]) and the network, or give a file"
        ) from err
    return _dataset(dataset, split, preferred, name, f"dataset '{name}'")


def _dataset(dataset: Any, split: str | None, preferred: Sequence[str], label: str, where: str) -> Table:
    if isinstance(dataset, Mapping):
        wanted = [split] if split is not None else [name for name in preferred if name in dataset]
        if not wanted or wanted[0] not in dataset:
            said = f"no split '{split}'" if split is not None else f"none of the splits {names(preferred)}"
            raise OptionError(f"{where} has {said}; it has {names(dataset)}: choose with --split")
        dataset, label = dataset[wanted[0]], f"{label} ({wanted[0]})"
    elif split is not None and str(getattr(dataset, "split", None)) != split:
        raise OptionError(f"{where} is one split ('{dataset.split}'), not '{split}'; leave --split away or give another")
    dataset = dataset.with_format(None)
    class_names = {
        name: tuple(feature.names) for name, feature in dataset.features.items() if getattr(feature, "names", None)
    }
    columns = {name: _DatasetColumn(dataset, name) for name in dataset.column_names}
    return Table(columns, np.arange(len(dataset)), label, where, class_names)


class _DatasetColumn(Sequence[Any]):
    """A column of a dataset: it is read when it is asked for, the others are not."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset, name
        self._values: list[Any] | None = None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: Any) -> Any:
        if self._values is None:
            self._values = list(self._dataset[self._name])
        return self._values[row]


# Columns --------------------------------------------------------------------------------------------------------------


def text_columns(table: Table, text: str | None, pair: str | None) -> tuple[str, str | None]:
    """Returns the columns of the text and of its partner, if it has one: what the user says, else what is published.

    Raises:
        OptionError: a column is not there, or none is known to be the text.
    """
    for column in filter(None, (text, pair)):
        if column not in table.columns:
            raise OptionError(f"{table.where} has no column '{column}'; its columns are {names(table.columns)}")
    if text is not None:
        return text, pair
    if pair is not None:
        raise OptionError("--text-pair-column needs --text-column, the column of the first text")
    for first, second in TEXT_PAIRS:
        if first in table.columns and second in table.columns:
            return first, second
    for name in TEXTS:
        if name in table.columns:
            return name, None
    labels = {*LABELS, "idx", "id"}
    others = [name for name in table.columns if name not in labels]
    if len(others) == 1:
        return others[0], None
    raise OptionError(
        f"{table.where} does not say which column is text; name one of {names(table.columns)} with --text-column"
    )


def texts(table: Table, column: str) -> list[str]:
    """Returns a column of texts.

    Raises:
        OptionError: a value is no text.
    """
    values = table.values(column)
    for row, value in zip(table.rows.tolist(), values, strict=True):
        if not isinstance(value, str):
            raise OptionError(
                f"row {row} of {table.where} has a {type(value).__name__} in column '{column}'; it must be text, or name "
                "another column with --text-column"
            )
    # lone surrogates (JSON allows them) are not text for a tokenizer
    return [value.encode("utf-8", "replace").decode() for value in values]


def label_column(table: Table, wanted: str | None) -> str:
    """Returns the column of the labels.

    Raises:
        OptionError: it is not there.
    """
    if wanted is not None and wanted not in table.columns:
        raise OptionError(f"{table.where} has no column '{wanted}'; its columns are {names(table.columns)}")
    found = wanted or next((name for name in LABELS if name in table.columns), None)
    if found is None:
        raise OptionError(
            f"{table.where} has no column of labels ({names(LABELS)}); name one of {names(table.columns)}: --label-column"
        )
    return found


def class_labels(table: Table, column: str, model_names: Sequence[str] | None) -> NDArray[np.int64]:
    """Returns the labels as the numbers that the model gives the classes.

    Names are compared where both sides have them, so that a set with another order of the same classes is read right.

    Raises:
        OptionError: the labels are no classes, are hidden, or have names that the model does not know.
    """
    values = table.values(column)
    where = f"column '{column}' of {table.where}"
    numbers = [_number(value) for value in values]
    known = {_plain(name): index for index, name in enumerate(model_names or ())}
    if any(number is None for number in numbers):
        if not known:
            raise OptionError(
                f"{where} holds '{next(v for v, n in zip(values, numbers, strict=True) if n is None)}', and the model "
                "names no classes; give numbers, or put the config.json with 'id2label' beside the model"
            )
        strange = next((v for v in values if _plain(v) not in known), None)
        if strange is not None:
            raise OptionError(
                f"{where} holds the label '{strange}', and the model's classes are {names(model_names or ())}"
            )
        return np.array([known[_plain(v)] for v in values], np.int64)
    labels = np.array(numbers, np.float64)
    if (labels != np.rint(labels)).any():
        example = labels[labels != np.rint(labels)][0]
        raise OptionError(f"{where} holds numbers such as {example:g}, which are no classes; use --task regression")
    if (labels < 0).any():
        raise OptionError(
            f"{where} holds the label {labels.min():g}, which hides the true one in published test sets; choose another "
            "--split, validation for instance"
        )
    order = [_plain(name) for name in table.class_names.get(column, ())]
    if known and order and set(order) == set(known):
        return np.array([known[order[int(label)]] for label in labels], np.int64)
    return labels.astype(np.int64)


def number_labels(table: Table, column: str) -> NDArray[np.float64]:
    """Returns the labels as numbers.

    Raises:
        OptionError: they are no numbers, or all alike.
    """
    values = table.values(column)
    where = f"column '{column}' of {table.where}"
    numbers = [_number(value) for value in values]
    if any(number is None for number in numbers):
        example = next(v for v, n in zip(values, numbers, strict=True) if n is None)
        raise OptionError(f"{where} holds '{example}', which is no number; choose another --task or column")
    labels = np.array(numbers, np.float64)
    if np.unique(labels).size < 2:
        raise OptionError(f"{where} holds {labels[0]:g} only: nothing correlates with it; choose other samples")
    return labels


def _number(value: object) -> float | None:
    if isinstance(value, bool | int | float | np.number):
        return float(value) if np.isfinite(value) else None
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return number if number is not None and np.isfinite(number) else None


def _plain(name: object) -> str:
    return re.sub(r"[\W_]+", "", str(name).lower())


# Questions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question, the text that holds its answer, and the gold answers (none where the text has no answer)."""

    question: str
    context: str
    answers: tuple[str, ...]


def questions(table: Table) -> list[Question]:
    """Returns the questions of a set in the columns of SQuAD; answers may be plain texts or lists of them as well.

    Raises:
        OptionError: a column is not there, or holds something else.
    """
    asked, contexts = texts(table, "question"), texts(table, "context")
    answers = [_answers(value, row, table) for row, value in zip(table.rows, table.values("answers"), strict=True)]
    return [Question(*fields) for fields in zip((q.strip() for q in asked), contexts, answers, strict=True)]


def _answers(value: object, row: int, table: Table) -> tuple[str, ...]:
    if isinstance(value, Mapping):
        value = value.get("text")
    if isinstance(value, str):
        value = [value] if value else []
    if not isinstance(value, Sequence) or not all(isinstance(text, str) for text in value):
        raise OptionError(
            f"row {row} of {table.where} has no texts in column 'answers'; it must be as in SQuAD: {{'text': [...]}}"
        )
    return tuple(value)
