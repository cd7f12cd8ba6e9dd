"""Texts to batches: tokenised, sorted by length so that little is padded, or packed into full windows for causal models.

A graph without a mask input gets batches of one length each, since its attention would see the padding. The order of the
batches is shuffled with the seed, so that a held-back part is not all short texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.calibration_batches import LONGEST, Batched, CalibrationJob
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.packing import pack, packed_rows
from liar_opt.runtime.signatures import Signature
from liar_opt.runtime.text_sources import Texts
from liar_opt.runtime.text_tokenizer import TextTokenizer, all_tokens, first_tokens, load_tokenizer

Array = NDArray[Any]
Tokens = Sequence[int] | NDArray[np.int32]


def _longest_text(tokenizer: TextTokenizer, static: int | None, job: CalibrationJob) -> int:
    """Tokens at which texts are cut: what the user says, else the least of what graph and tokenizer say and 512.

    Raises:
        OptionError: The user asks for more than the graph or the tokenizer takes, or for nothing but special tokens.
    """
    longest = job.sequence_length or min(tokenizer.cut or LONGEST, LONGEST)
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


def batch_texts(drawn: Texts, job: CalibrationJob) -> Batched:
    """Tokenises, sorts by length, pads, and shuffles the order of the batches.

    Raises:
        OptionError: The tokenizer finds no token, or does not fit the model or the options.
    """
    signature = job.signature
    warnings: list[str] = []
    assert job.tokenizer is not None  # require_tokenizer
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
    made = Batched(batches, masks, len(encoded), f"{drawn.source}, {said}", warnings)
    if job.packing:  # a causal model's real tokens never see the padding behind them
        return made.doubted(signature)
    made = made.doubted(signature, tokenizer.specials)
    return made._replace(warnings=[*made.warnings, *_mask_warnings(signature, masks)])


def _packed(
    encoded: Sequence[tuple[Tokens, list[int]]],
    window: int,
    tokenizer: TextTokenizer,
    job: CalibrationJob,
    warnings: list[str],
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


def _check_vocabulary(largest: int, tokenizer: TextTokenizer, job: CalibrationJob, warnings: list[str]) -> None:
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
