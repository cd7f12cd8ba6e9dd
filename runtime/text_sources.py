"""Texts from files and from Python, drawn without replacement in one pass.

Files are read line by line (reservoir sampling, Vitter's algorithm R). Of a text no more is kept than the tokens that it
can give need, and of a long line no more is read at a time than a piece.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from liar_opt.runtime.calibration_batches import CalibrationJob
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.signatures import STATE_ROLES, describe, names, one_line
from liar_opt.runtime.text_tokenizer import cut_text

ACCEPTED = "a .txt, .jsonl, .csv or .npz file, a folder of .npy files, or a `datasets` folder or name"
TEXT_ROOM = 1 << 24
"""Characters of all texts that are kept in any case."""
LONGEST_ROW = 1 << 24
"""Characters of a line of a .csv file."""
PIECE = 1 << 16
"""Characters of a line that are read at once."""
_TEXT_COLUMNS = ("text", "sentence")
_COLUMN_PROBE = 20  # rows looked at to tell which columns hold text
_JSON_PART = re.compile(r'"|\\u[0-9a-fA-F]{4}|\\[^u]|[^"\\]+', re.DOTALL)


@dataclass(frozen=True)
class Texts:
    """Texts that were drawn, and a line that says where from."""

    texts: list[str]
    source: str


def require_tokenizer(job: CalibrationJob, where: str) -> None:
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


class KeptTexts:
    """Texts that were drawn: of each what its tokens need, and of all no more than there is room for.

    Args:
        job: says how many tokens are wanted.
    """

    def __init__(self, job: CalibrationJob) -> None:
        self.texts: list[str] = []
        self._most = job.characters
        self._room = max(TEXT_ROOM, self._most if job.packing else self._most * job.samples)
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


def draw_texts(texts: Iterator[str], where: str, label: str, job: CalibrationJob, *, ends: bool = True) -> Texts:
    """Draw without replacement in one pass; blank texts do not count."""
    kept = KeptTexts(job)
    seen = 0
    for text in (text.strip() for text in texts):
        if not text:
            continue
        seen += 1
        if len(kept.texts) < job.samples:
            kept.put(text)
            if not ends and len(kept.texts) == job.samples:
                return Texts(kept.texts, f"{label}, the first {seen} texts")
        elif (slot := int(job.rng.integers(seen))) < job.samples:
            kept.put(text, slot)
    if not kept.texts:
        raise OptionError(f"{where} is empty: it has no text that is not blank; give at least one.")
    return Texts(kept.texts, f"{label}, {job.drawn(len(kept.texts), seen, 'texts')}")


def checked_texts(items: Iterable[object]) -> Iterator[str]:
    """Yields the texts.

    Raises:
        OptionError: An item is none.
    """
    for number, item in enumerate(items):
        if not isinstance(item, str):
            kind = type(item).__name__
            raise OptionError(f"item {number} of the calibration data is of type '{kind}'; all must be texts.")
        yield item


def file_texts(path: Path, suffix: str, job: CalibrationJob, where: str = "") -> Iterator[str]:
    """Yields the texts of a .txt, .jsonl or .csv file, each as far as it may be needed; ``where`` names it in messages.

    Raises:
        OptionError: The file is not what its suffix says, or has no column of text.
        OSError: It cannot be read.
        UnicodeDecodeError: It is not UTF-8.
    """
    with path.open(encoding="utf-8-sig", newline="" if suffix == ".csv" else None) as stream:
        where = where or f"calibration file '{path}'"
        if suffix == ".txt":
            yield from _line_beginnings(stream, job.characters, where)
        elif suffix == ".jsonl":
            rows = jsonl_rows(_short_strings(stream, job.characters, where), where)
            yield from _column_texts(rows, where, job.text_column)
        else:
            yield from _column_texts(csv_rows(_bounded(stream, where), where), where, job.text_column)


def _pieces(stream: IO[str], where: str) -> Iterator[Iterator[str]]:
    """Yields the lines of a file, each as pieces; one that is not read to its end is skipped."""
    number = 0

    def line(piece: str) -> Iterator[str]:
        while piece:
            if "\0" in piece:
                raise OptionError(f"{where} holds binary data (line {number}); give {ACCEPTED}.")
            yield piece
            piece = "" if piece.endswith("\n") else stream.readline(PIECE)

    while piece := stream.readline(PIECE):
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
            if len(parts) * PIECE > LONGEST_ROW:
                raise OptionError(f"line {number} of {where} is longer than {LONGEST_ROW:,} characters; quote or cut it.")
        yield "".join(parts)


def _without_nul(lines: Iterable[str], where: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise OptionError(f"{where} holds binary data (line {number}); give {ACCEPTED}.")
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


def _column_texts(rows: Iterator[tuple[int, dict[str, Any]]], where: str, text_column: str | None) -> Iterator[str]:
    head = list(itertools.islice(rows, _COLUMN_PROBE))
    if not head:
        return
    columns = list(dict.fromkeys(name for _, row in head for name in row))
    strings = [name for name in columns if any(_is_text(row.get(name)) for _, row in head)]
    column = text_column_of(columns, strings, text_column, where)
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


def text_column_of(columns: Sequence[str], strings: Sequence[str], wanted: str | None, where: str) -> str:
    """Returns the column that holds the text: the one that is wanted, the only one (of texts), or one with a usual name.

    Args:
        columns: all.
        strings: those that hold texts.
        wanted: the user's choice.
        where: for the message.

    Raises:
        OptionError: It is not there, or it cannot be told.
    """
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
