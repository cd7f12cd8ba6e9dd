"""Feeds to batches: rows are drawn and checked, rows of one shape are batched together, and it is told which are real.

A static batch axis is filled up by repeating samples. A repeat is a valid input, and its rows are masked out. The order of
the rows is shuffled with the seed, so that a held-back part is not all of one class.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.array_columns import Column
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.signatures import InputSpec, Signature, cast, describe, is_float, names
from liar_opt.runtime.text_tokenizer import CHARACTERS

Array = NDArray[Any]
LONGEST = 512
"""Tokens of a text when neither the graph nor the tokenizer says less."""
DOUBTFUL = 0.5
"""Share of the samples that are of one token, or repeat another, above which nothing can be trusted."""
_SPARED = 4  # times as many characters are kept as tokens are likely to need: what has longer ones is no text


@dataclass(frozen=True)
class CalibrationJob:
    """What samples are wanted, and for which inputs.

    Attributes:
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
    """

    inputs: Sequence[InputSpec]
    tokenizer: str | Path | None = None
    text_column: str | None = None
    samples: int = 512
    batch_size: int = 32
    sequence_length: int | None = None
    mask_input: str | None = None
    seed: int = 0
    vocabulary: int | None = None
    positions: int | None = None
    packing: bool = False
    image_size: int | None = None
    rows: Mapping[str, int] | None = None

    @functools.cached_property
    def signature(self) -> Signature:
        """The inputs by their roles."""
        return Signature.read(self.inputs, self.mask_input)

    @functools.cached_property
    def rng(self) -> np.random.Generator:
        """All random choices of this job, one after the other."""
        return np.random.default_rng(self.seed)

    @property
    def characters(self) -> int:
        """Kept of a text at most: what the tokens of one sample need, or those of all samples where texts are packed."""
        longest = self.sequence_length or min(self.positions or LONGEST, LONGEST)
        return CHARACTERS * longest * (self.samples if self.packing else _SPARED)

    def drawn(self, count: int, total: int, what: str) -> str:
        """Says how many of how many were drawn, and how."""
        return f"{count} {what}" if count == total else f"{count} of {total} {what} drawn with seed {self.seed}"

    def pick(self, total: int) -> NDArray[np.int64]:
        """Rows to use of ``total``, ascending."""
        if total <= self.samples:
            return np.arange(total)
        return np.sort(self.rng.choice(total, self.samples, replace=False))


class Batched(NamedTuple):
    """Samples in batches.

    Attributes:
        batches: feeds by input.
        masks: real rows of each batch, [b, s] or [b].
        samples: distinct ones.
        source: one line for the report.
        warnings: one sentence each.
    """

    batches: list[dict[str, Array]]
    masks: list[NDArray[np.bool_]]
    samples: int
    source: str
    warnings: list[str]

    def doubted(self, signature: Signature, specials: int = 0) -> Batched:
        """Returns the same with a warning where nothing that is measured on it can be trusted.

        Args:
            signature: of the inputs.
            specials: tokens that are in every sample.
        """
        return self._replace(warnings=[*self.warnings, *_doubts(self.batches, self.masks, signature.shared, specials)])


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
    if samples == 1:
        yield "there is one sample: nothing is held back, and errors look smaller than they are; give more samples."
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


@dataclass(frozen=True)
class Feeds:
    """Feeds to draw rows from: each with the name it has in messages.

    Attributes:
        feeds: Label and columns by name.
        label: Where they come from.
        first_only: The source may not end: what there is was read from its start.
    """

    feeds: list[tuple[str, Mapping[str, Column]]]
    label: str
    first_only: bool = False


def batch_feeds(drawn: Feeds, job: CalibrationJob) -> Batched:
    """Checks the feeds, draws rows from all of them, and batches rows of one shape together.

    Raises:
        OptionError: They do not fit the graph's inputs, or have no samples.
    """
    signature = job.signature
    warnings: list[str] = []
    if job.sequence_length is not None:
        warnings.append("'sequence_length' has no effect on calibration data that is given as arrays.")
    if job.text_column is not None:
        warnings.append("'text_column' has no effect on calibration data that is given as arrays.")
    unknown = dict.fromkeys(name for _, feed in drawn.feeds for name in feed if name not in signature.inputs)
    counts = [check_feed(label, feed, signature) for label, feed in drawn.feeds]
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
    batches, masks = batch_rows([_stack(group, signature) for group in groups.values()], job)
    _check_masks(masks, signature, drawn, warnings)
    said = f"the first {len(rows)} rows" if drawn.first_only else job.drawn(len(rows), total, "rows")
    return Batched(batches, masks, len(rows), f"{drawn.label}, {said}", warnings).doubted(signature)


def check_feed(where: str, feed: Mapping[str, Column], signature: Signature) -> int:
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


def _take(column: Column, rows: NDArray[np.int64], spec: InputSpec, where: str, job: CalibrationJob) -> Array:
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


def batch_rows(
    groups: Sequence[Mapping[str, Array]], job: CalibrationJob
) -> tuple[list[dict[str, Array]], list[NDArray[np.bool_]]]:
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


def _check_masks(masks: Sequence[NDArray[np.bool_]], signature: Signature, drawn: Feeds, warnings: list[str]) -> None:
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
