"""Fields of configurations that hold token ids: which they are, the ids that they name, and the same with new ids.

What a field holds is told by its name: ids, or lists of them; ids by the name of a language or a task; the ids that are
written at given places; sequences of ids that are never written, or to which something is added.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

ID = re.compile(
    r"(^|_)(token_(ids?|index|idx)|padding_idx|(pad|bos|eos|unk|mask|sep|cls)_index)$"
    r"|^(begin_)?suppress_tokens$|^force_words_ids$|^(lang|task)_to_id$|^forced_decoder_ids$|^bad_words_ids$|^sequence_bias$"
)
PLACED = "forced_decoder_ids"
"""A list of pairs: a place in the text, and the id that is written there."""
SEQUENCES = ("bad_words_ids", "sequence_bias")
"""Sequences of ids, the latter with a number each. One with a token that went can never be written, and goes."""


def named_ids(name: str, value: Any) -> Iterator[int]:
    """Yields the ids that a field names and that a model needs; none where it holds no ids."""
    if not ID.search(name) or name in SEQUENCES:
        return
    pairs = name == PLACED and isinstance(value, (list, tuple))
    yield from token_ids([pair[1:] if isinstance(pair, (list, tuple)) else pair for pair in value] if pairs else value)


def renumbered(name: str, value: Any, new: Mapping[int, int]) -> Any:
    """Returns what a field says of the tokens that are left; ``new`` has their ids, by the old ones."""
    if name == PLACED and isinstance(value, (list, tuple)):
        pairs = [tuple(p) if isinstance(p, (list, tuple)) else (None, p) for p in value]
        return [[place, *new_ids(rest, new)] for place, *rest in pairs if set(token_ids(rest)) <= new.keys()]
    if name in SEQUENCES and value:
        if isinstance(value, Mapping):
            return {tuple(new_ids(k, new)): v for k, v in value.items() if set(token_ids(k)) <= new.keys()} or None
        biased = name == SEQUENCES[1]
        left = [one for one in value if set(token_ids(one[0] if biased else one)) <= new.keys()]
        return [[new_ids(one[0], new), *one[1:]] if biased else new_ids(one, new) for one in left] or None
    return new_ids(value, new)


def new_ids(value: Any, new: Mapping[int, int]) -> Any:
    """Returns ids with new ones: of tokens that went None, and left out of lists; -1 and the like stay."""
    if isinstance(value, Mapping):
        return {key: new_ids(v, new) for key, v in value.items() if not _went(v, new)}
    if isinstance(value, (list, tuple)):
        return type(value)(new_ids(v, new) for v in value if not _went(v, new))
    return new.get(value) if type(value) is int and value >= 0 else value


def token_ids(value: Any) -> Iterator[int]:
    """Yields the ids in a field of them."""
    if isinstance(value, (list, tuple, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from token_ids(inner)
    elif type(value) is int:
        yield value


def _went(value: Any, new: Mapping[int, int]) -> bool:
    return type(value) is int and value >= 0 and value not in new
