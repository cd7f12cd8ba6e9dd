"""Models and samples of an evaluation brought together: what is run, on which feeds, and what comes back.

Models run one after another on the same feeds. Texts are sorted by length before they are batched, so that little is
padded, and what comes back is in the order of the set again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.array_columns import Column
from liar_opt.runtime.bootstrap import RESAMPLES
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.evaluation_data import Table, text_columns, texts
from liar_opt.runtime.sessions import Session
from liar_opt.runtime.signatures import InputSpec, Signature, cast, is_float, names, one_line
from liar_opt.runtime.text_batches import pad_texts
from liar_opt.runtime.text_tokenizer import Text, TextTokenizer, load_tokenizer

Array = NDArray[Any]
Encoded = tuple[list[int], list[int]]
"""Token ids and type ids of a text."""
Progress = Callable[[str, int, int], None]

LONGEST = 512
"""Tokens of a text where neither graph nor tokenizer says less."""
NEIGHBOURS = 10
"""k of the retrieval overlap."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model to evaluate.

    Attributes:
        name: in messages and tables.
        session: it is loaded.
        inputs: of its graph.
        class_names: of its output, where it names them.
        vocabulary: rows of its embedding table, when known.
        positions: tokens that it has positions for, when known.
    """

    name: str
    session: Session
    inputs: Sequence[InputSpec]
    class_names: tuple[str, ...] | None = None
    vocabulary: int | None = None
    positions: int | None = None


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate.

    Attributes:
        metrics: Metrics to take; all that fit if empty.
        text_column: Column of the text; by default as in GLUE and WikiText.
        text_pair_column: Column of the second text of a pair.
        label_column: Column of the labels; 'label', 'labels' or 'score' by default.
        tokenizer: Folder of a Hugging Face tokenizer, for texts; the folder of the first model by default.
        samples: Samples at most, drawn with the seed; all by default.
        batch_size: Samples a batch.
        sequence_length: Tokens of a sample at most.
        mask_input: The input that is zero at padding; found by itself by default.
        output_name: The output to read; found by its rank by default.
        windows: Tokens of the windows of perplexity; by default those of both conventions, where there are as many.
        neighbours: k of the retrieval overlap.
        resamples: Draws of the bootstrap.
        seed: Of all that is drawn.
    """

    metrics: tuple[str, ...] = ()
    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    tokenizer: str | Path | None = None
    samples: int | None = None
    batch_size: int = 32
    sequence_length: int | None = None
    mask_input: str | None = None
    output_name: str | None = None
    windows: tuple[int, ...] = ()
    neighbours: int = NEIGHBOURS
    resamples: int = RESAMPLES
    seed: int = 0


@dataclass
class Run:
    """What the parts of one evaluation share."""

    candidates: Sequence[Candidate]
    table: Table
    options: EvaluationOptions
    progress: Progress
    notes: list[str] = field(default_factory=list)
    first_feeds: list[dict[str, Array]] = field(default_factory=list)

    @property
    def signatures(self) -> list[Signature]:
        """What the inputs of each model are for."""
        return [Signature.read(c.inputs, self.options.mask_input) for c in self.candidates]


# Feeds ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feed:
    """Rows of the set as a model gets them, and which tokens are real [b, s] (or samples [b]); fill is behind the rows."""

    rows: NDArray[np.int64]
    values: dict[str, Array]
    real: NDArray[np.bool_]


Feeds = Callable[[Signature], Iterator[Feed]]


def text_feeds(encoded: Sequence[Encoded], tokenizer: TextTokenizer, run: Run, most: int | None = None) -> Feeds:
    """Batches of like length; of one length where the graph has no mask input, as its attention would see the padding.

    Args:
        encoded: the texts, in the order of the set.
        tokenizer: that made them.
        run: the evaluation.
        most: texts a batch; the options' batch size if None.
    """
    lengths = np.array([len(ids) for ids, _ in encoded])
    ascending = np.argsort(lengths, kind="stable")

    def feeds(signature: Signature) -> Iterator[Feed]:
        static, size = signature.length(), signature.batch or most or run.options.batch_size
        equal = signature.mask is None and signature.batch is None and static is None
        cuts = np.flatnonzero(np.diff(lengths[ascending])) + 1 if equal else np.array([], np.int64)
        for part in np.split(ascending, cuts):
            for start in range(0, len(part), size):
                rows = part[start : start + size]
                filled = np.resize(rows, signature.batch) if signature.batch else rows
                length = static or int(lengths[rows].max())
                values, real = pad_texts([encoded[row] for row in filled.tolist()], length, tokenizer, signature)
                yield Feed(rows, values, real)

    return feeds


def _array_feeds(columns: Mapping[str, Column], run: Run) -> Feeds:
    def feeds(signature: Signature) -> Iterator[Feed]:
        size, chosen = signature.batch or run.options.batch_size, run.table.rows
        for start in range(0, len(chosen), size):
            rows = np.arange(start, min(start + size, len(chosen)))
            filled = np.resize(rows, signature.batch) if signature.batch else rows
            values = {
                name: cast(columns[name].take(chosen[filled]), spec, run.table.where)
                for name, spec in signature.inputs.items()
                if name in columns
            }
            real = signature.real_rows(values, additive=False)
            yield Feed(rows, signature.completed(values, real), real)

    return feeds


def feeds_of(run: Run) -> Feeds:
    """The set as feeds: arrays where it has them for the inputs, else texts.

    Raises:
        OptionError: it has neither.
    """
    arrays = {name: c for name, c in run.table.columns.items() if not isinstance(c, Sequence)}
    signature = run.signatures[0]
    if arrays and len(arrays) == len(run.table.columns):
        needed = [name for name in signature.inputs if name not in signature.made(arrays)]
        if len(needed) == 1 and needed[0] not in arrays:  # one input, whatever its array is called
            others = [name for name in arrays if name != run.options.label_column and not name.startswith("label")]
            arrays = {needed[0]: arrays[others[0]]} if len(others) == 1 else arrays
        missing = [name for name in needed if name not in arrays]
        if missing:
            raise OptionError(
                f"{run.table.where} lacks the inputs {names(missing)} of the model; it has {names(run.table.columns)}"
            )
        for name in needed:
            shape, wanted = arrays[name].shape, signature.inputs[name].shape
            fits = len(shape) == len(wanted) and all(
                not isinstance(dim, int) or dim == size for dim, size in list(zip(wanted, shape, strict=True))[1:]
            )
            if not fits:
                raise OptionError(
                    f"array '{name}' of {run.table.where} has the shape {list(shape)}, and the model needs {list(wanted)}"
                )
        return _array_feeds(arrays, run)
    first, second = text_columns(run.table, run.options.text_column, run.options.text_pair_column)
    firsts = texts(run.table, first)
    return encoded_feeds(firsts if second is None else [*zip(firsts, texts(run.table, second), strict=True)], run)


def encoded_feeds(given: Sequence[Text], run: Run) -> Feeds:
    """Texts as feeds.

    Raises:
        OptionError: the tokenizer does not fit the model, or finds no token.
    """
    tokenizer = tokenizer_of(run)
    found = tokenizer.encode(given, longest_text(tokenizer, run))
    empty = sum(not ids for ids, _ in found)
    if empty:
        raise OptionError(f"{empty} texts of {run.table.where} have no token; leave them out")
    check_vocabulary(max(max(ids) for ids, _ in found), run)
    return text_feeds(found, tokenizer, run)


def tokenizer_of(run: Run) -> TextTokenizer:
    """Returns the tokenizer of the evaluation.

    Raises:
        OptionError: there is none, or the model takes no tokens.
    """
    if run.options.tokenizer is None:
        raise OptionError(
            f"{run.table.where} holds texts, and there is no tokenizer beside the model; pass --tokenizer DIR"
        )
    if run.signatures[0].ids is None:
        raise OptionError(f"{run.table.where} holds texts, and the model has no token id input; give an .npz file instead")
    return load_tokenizer(run.options.tokenizer)


def longest_text(tokenizer: TextTokenizer, run: Run, most: int = LONGEST) -> int:
    """Returns the tokens at which texts are cut: what the user says, else the least of what is known and ``most``.

    Raises:
        OptionError: the user asks for more than model and tokenizer take, or for special tokens only.
    """
    limits = [tokenizer.limit, run.signatures[0].length(), *(c.positions for c in run.candidates)]
    limit = min((one for one in limits if one is not None), default=None)
    wanted = run.options.sequence_length
    if wanted is not None and limit is not None and wanted > limit:
        raise OptionError(f"--sequence-length is {wanted}, and model or tokenizer take {limit} tokens; give at most that")
    longest = wanted or min(most, limit or most)
    if longest <= tokenizer.specials:
        raise OptionError(f"--sequence-length is {longest}, and the tokenizer adds {tokenizer.specials} tokens; give more")
    return longest


def check_vocabulary(largest: int, run: Run) -> None:
    """Checks that every model knows the largest token id.

    Raises:
        OptionError: it is behind the embedding table.
    """
    for candidate in run.candidates:
        if candidate.vocabulary is not None and largest >= candidate.vocabulary:
            raise OptionError(
                f"tokenizer '{run.options.tokenizer}' gives the token id {largest}, and the embedding table of model "
                f"'{candidate.name}' has {candidate.vocabulary} rows; give the tokenizer that belongs to the model"
            )


# Running --------------------------------------------------------------------------------------------------------------


Choose = Callable[[Mapping[str, Array], str], list[str]]
"""Takes all outputs of a first feed and the model's name, and returns the names of the outputs to read."""
Reduce = Callable[[list[Array], Feed], Sequence[Any]]
"""Takes the outputs that were chosen and their feed, and returns one value for each row of the feed."""


def collect(run: Run, feeds: Feeds, samples: int, choose: Choose, reduce: Reduce) -> list[list[Any]]:
    """Runs every model on every feed.

    Returns:
        For each model the values of its rows, in the order of the set.

    Raises:
        OptionError: a model cannot run on the feeds, or gives NaN or Inf.
    """
    everything: list[list[Any]] = []
    total = samples * len(run.candidates)
    for candidate, signature in zip(run.candidates, run.signatures, strict=True):
        values: list[Any] = [None] * samples
        chosen: list[str] | None = None
        done = len(everything) * samples
        for feed in feeds(signature):
            outputs = _outputs(candidate, feed.values, chosen)
            if chosen is None:
                chosen = choose(outputs, candidate.name)
                if len(run.first_feeds) < len(run.candidates):
                    run.first_feeds.append(feed.values)
            for name in chosen:
                if not np.isfinite(outputs[name]).all():
                    raise OptionError(f"output '{name}' of model '{candidate.name}' has NaN or Inf in it")
            reduced = reduce([outputs[name][: len(feed.rows)] for name in chosen], feed)
            for row, value in zip(feed.rows.tolist(), reduced, strict=True):
                values[row] = value
            done += len(feed.rows)
            run.progress("evaluate", done, total)
        everything.append(values)
    return everything


def _outputs(candidate: Candidate, feed: Mapping[str, Array], chosen: Sequence[str] | None) -> dict[str, Array]:
    try:
        found = candidate.session.run(feed, chosen, arrays=True)
    except Exception as err:  # what ONNX Runtime raises in a run has no root of its own
        raise OptionError(
            f"model '{candidate.name}' cannot run on the evaluation set ({one_line(err)}); is it made for this task?"
        ) from err
    return {name: v.astype(np.float32) if is_float(v.dtype) else v for name, v in found.items()}


def of_rank(run: Run, rank: int, *preferred: str) -> Choose:
    """Chooses one output: the one that the user names, else the first of ``preferred`` or of that rank."""
    wanted = run.options.output_name

    def choose(outputs: Mapping[str, Array], model: str) -> list[str]:
        if wanted is not None and wanted not in outputs:
            raise OptionError(f"model '{model}' has no output '{wanted}'; it has {names(outputs)}")
        fitting = [name for name, value in outputs.items() if value.ndim == rank and is_float(value.dtype)]
        order = [wanted] if wanted is not None else [*(p for p in preferred if p in fitting), *fitting]
        if not order or order[0] not in fitting:
            shapes = ", ".join(f"'{name}' {list(value.shape)}" for name, value in outputs.items())
            raise OptionError(f"model '{model}' has no output of rank {rank} for this task; it has {shapes}")
        return order[:1]

    return choose
