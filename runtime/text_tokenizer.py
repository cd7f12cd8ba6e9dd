"""Tokenizers: what calibration needs of one, whichever library reads it.

A tokenizer takes some 200 bytes for each character that it is given, also for those whose tokens are cut off afterwards. So
texts are cut at a blank before (:func:`first_tokens`), long ones are read piece by piece (:func:`all_tokens`), and only so
many characters are given at once.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.extras import require
from liar_opt.runtime.signatures import one_line

Text = str | tuple[str, str]
"""A text, or a pair that the tokenizer joins as its model was taught."""
CHARACTERS = 16
"""Characters for each token that is wanted of a text: several times what a token has in any language. Where they are not
enough, four times as many are taken."""
WORD = 256
"""Characters within which a blank is looked for to cut a text at."""
AT_ONCE = 1 << 17
"""Characters that are tokenised at once."""
PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>")
BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token of one byte, as sentencepiece writes it."""
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer.

    Attributes:
        encode: Texts and a longest length (None: they are not cut) to (token ids, type ids) a text.
        specials: Tokens that it adds to every text.
        size: Its vocabulary, added tokens included.
        pad: Id that pads, if it has one.
        pads_left: Pads come before the text.
        limit: Longest text that the model behind it takes, when stated.
        cut: Length at which its own file cuts texts, when stated.
        separator: Id of its end token, else of its begin token, if it has one.
        special: Ids of all special tokens.
    """

    encode: Callable[[Sequence[Text], int | None], list[tuple[list[int], list[int]]]]
    specials: int
    size: int
    pad: int | None
    pads_left: bool
    limit: int | None
    cut: int | None
    separator: int | None
    special: frozenset[int]


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a folder holds files of a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *TOKENIZER_FILES))


def load_tokenizer(where: str | Path) -> TextTokenizer:
    """Reads a tokenizer from its folder, or from its tokenizer.json.

    Raises:
        OptionError: There is none, or it cannot be read.
    """
    hint = "pass the folder that the tokenizer's save_pretrained wrote"
    if not isinstance(where, (str, Path)):
        raise OptionError(f"a tokenizer is the path of its folder, and {type(where).__name__} is none; {hint}.")
    path = Path(where)
    if not path.exists():
        raise OptionError(f"tokenizer '{where}' does not exist; {hint}.")
    folder, fast = path if path.is_dir() else path.parent, fast_file(path)
    try:
        if fast is not None:
            return _fast_tokenizer(fast, _json_object(folder / "tokenizer_config.json"))
        if has_tokenizer(folder):
            require(f"tokenizer '{where}' has no tokenizer.json; reading its other files", "transformers")
            return _slow_tokenizer(folder, hint)
    except OptionError:
        raise
    except Exception as err:  # `tokenizers` raises bare Exception
        raise OptionError(f"tokenizer '{where}' cannot be loaded ({one_line(err)}); {hint}.") from err
    raise OptionError(f"tokenizer folder '{where}' holds no tokenizer files (tokenizer.json, ...); {hint}.")


def fast_file(path: Path) -> Path | None:
    """Returns the tokenizer.json of a tokenizer's folder, or the file itself; None where there is none."""
    fast = path / "tokenizer.json" if path.is_dir() else path
    return fast if fast.is_file() else None


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _sane_limit(value: object) -> int | None:
    """A length in tokens; transformers writes 1e30 for "none"."""
    return int(value) if isinstance(value, int | float) and 0 < value < 1_000_000 else None


@contextlib.contextmanager
def _panics_told(file: Path) -> Iterator[None]:
    """Says which file it is that `tokenizers` gives up on: what it raises then is no Exception.

    Raises:
        OptionError: it does.
    """
    try:
        yield
    except BaseException as err:
        if type(err).__name__ != "PanicException":
            raise
        raise OptionError(
            f"tokenizer '{file}' is broken: the library tokenizers gives up on it ({one_line(err)}); fetch it again."
        ) from err


def _fast_tokenizer(file: Path, config: Mapping[str, Any]) -> TextTokenizer:
    from tokenizers import Tokenizer

    with _panics_told(file):
        tokenizer = Tokenizer.from_file(str(file))
    padding, truncation = tokenizer.padding or {}, tokenizer.truncation or {}
    mapped = _json_object(file.parent / "special_tokens_map.json")

    def named(role: str) -> int | None:
        name = config.get(role) or mapped.get(role)
        if isinstance(name, dict):
            name = name.get("content")
        found: int | None = tokenizer.token_to_id(name) if isinstance(name, str) else None
        return found

    pad = named("pad_token")
    if pad is None:
        pad = padding.get("pad_id")
    if pad is None:
        ids = (tokenizer.token_to_id(token) for token in PAD_TOKENS)
        pad = next((found for found in ids if found is not None), None)
    tokenizer.no_padding()
    with _panics_told(file):
        sample = tokenizer.encode("a")

    def encode(texts: Sequence[Text], longest: int | None) -> list[tuple[list[int], list[int]]]:
        if longest is None:
            tokenizer.no_truncation()
        else:
            tokenizer.enable_truncation(longest)
        with _panics_told(file):
            return [(found.ids, found.type_ids) for some in _portions(texts) for found in tokenizer.encode_batch(some)]

    return TextTokenizer(
        encode=encode,
        specials=tokenizer.num_special_tokens_to_add(False),
        size=tokenizer.get_vocab_size(with_added_tokens=True),
        pad=pad,
        pads_left=(config.get("padding_side") or str(padding.get("direction", "")).lower()) == "left",
        limit=_sane_limit(config.get("model_max_length")),
        cut=_sane_limit(truncation.get("max_length")),
        separator=next((i for i in map(named, ("eos_token", "bos_token")) if i is not None), None),
        special=frozenset(
            {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
            | {i for i, added in zip(sample.ids, sample.special_tokens_mask, strict=True) if added}
        ),
    )


def unknown_and_basic(where: str | Path) -> tuple[int | None, frozenset[int]]:
    """Returns the id of what a tokenizer has no token for, if it has one, and the ids of single bytes, if it has these."""
    file = fast_file(Path(where))
    if file is None:
        from transformers import AutoTokenizer

        slow: Any = AutoTokenizer.from_pretrained(str(where), local_files_only=True, trust_remote_code=False)
        return slow.unk_token_id, frozenset()
    raw = json.loads(file.read_text(encoding="utf-8"))
    model = raw["model"]
    if model.get("type") == "Unigram":
        words = {text: i for i, (text, _) in enumerate(model["vocab"])}
        unknown = model.get("unk_id")
    else:
        words = model["vocab"]
        unknown = words.get(model.get("unk_token"))
    by_bytes = "merges" in model and '"ByteLevel"' in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
    basic = {i for text, i in words.items() if (by_bytes and len(text) == 1) or BYTE.fullmatch(text)}
    return unknown, frozenset(basic)


def _slow_tokenizer(folder: Path, hint: str) -> TextTokenizer:
    """Reads a tokenizer of other files than tokenizer.json.

    Raises:
        OptionError: they do not make one.
    """
    from transformers import AutoTokenizer

    held = ", ".join(name for name in TOKENIZER_FILES if (folder / name).is_file())
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as err:  # of many classes, those of what it imports among them
        raise OptionError(
            f"tokenizer folder '{folder}' has no tokenizer.json, and of {held} alone transformers makes no tokenizer "
            f"({one_line(err).rstrip(':')}); {hint}."
        ) from err
    files = [name for name in getattr(tokenizer, "vocab_files_names", {}).values() if isinstance(name, str)]
    made_up = files and not any((folder / name).is_file() for name in files)
    if made_up or len(tokenizer) <= len(tokenizer.all_special_tokens):
        wanted = f" (none of {', '.join(files)})" if made_up else ""
        raise OptionError(f"tokenizer folder '{folder}' holds no vocabulary{wanted}; {hint}.")

    def encode(texts: Sequence[Text], longest: int | None) -> list[tuple[list[int], list[int]]]:
        cut = longest is not None
        encoded: list[tuple[list[int], list[int]]] = []
        for some in _portions(texts):
            found = tokenizer(some, truncation=cut, max_length=longest, padding=False, return_token_type_ids=True)
            encoded += zip(found["input_ids"], found["token_type_ids"], strict=True)
        return encoded

    return TextTokenizer(
        encode=encode,
        specials=tokenizer.num_special_tokens_to_add(),
        size=len(tokenizer),
        pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        pads_left=tokenizer.padding_side == "left",
        limit=_sane_limit(tokenizer.model_max_length),
        cut=None,
        separator=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id,
        special=frozenset(tokenizer.all_special_ids),
    )


def cut_text(text: str, most: int) -> str:
    """Returns the beginning of a text, at most so many characters: it ends where a blank follows, if there is one near."""
    if len(text) <= most:
        return text
    return text[: next((i for i in range(most, max(most - WORD, 0), -1) if text[i].isspace()), most)]


def first_tokens(tokenizer: TextTokenizer, texts: Sequence[str], longest: int) -> list[tuple[list[int], list[int]]]:
    """Tokenises the beginnings of texts: as many characters as ``longest`` tokens need.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        longest: tokens of a text at most, special ones included.

    Returns:
        (token ids, type ids) of each text, as if it had been tokenised whole and cut.
    """
    result: list[tuple[list[int], list[int]]] = [([], [])] * len(texts)
    waiting, most = list(range(len(texts))), CHARACTERS * longest
    while waiting:
        beginnings = [cut_text(texts[i], most) for i in waiting]
        short = []
        for i, beginning, found in zip(waiting, beginnings, tokenizer.encode(beginnings, longest), strict=True):
            result[i] = found
            if len(found[0]) < longest and len(beginning) < len(texts[i]):
                short.append(i)
        waiting, most = short, 4 * most
    return result


def all_tokens(tokenizer: TextTokenizer, texts: Sequence[str], most: int) -> list[NDArray[np.int32]]:
    """Tokenises texts for packing, long ones piece by piece until there are enough tokens.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.
        most: tokens of a text at most; special ones stand at its ends alone.

    Returns:
        The token ids of each text, int32.
    """
    result = [np.empty(0, np.int32)] * len(texts)
    short = [i for i, text in enumerate(texts) if len(text) <= AT_ONCE]
    taken = iter(short)
    for some in _portions([texts[i] for i in short]):
        for ids, _ in tokenizer.encode(some, None):
            result[next(taken)] = np.asarray(ids, np.int32)[:most]
    for i, text in enumerate(texts):
        if len(text) > AT_ONCE:
            result[i] = _piecewise(tokenizer, text, most)
    return result


def _piecewise(tokenizer: TextTokenizer, text: str, most: int) -> NDArray[np.int32]:
    parts: list[NDArray[np.int32]] = []
    place = count = 0
    while place < len(text) and count < most:
        piece = cut_text(text[place : place + AT_ONCE + 1], AT_ONCE)
        ((ids, _),) = tokenizer.encode([piece], None)
        first, last = place == 0, place + len(piece) >= len(text)
        start, stop = (0 if first else _specials(ids, tokenizer)), (0 if last else _specials(ids[::-1], tokenizer))
        parts.append(np.asarray(ids[start : len(ids) - stop], np.int32))
        place, count = place + len(piece), count + len(parts[-1])
    return np.concatenate(parts)[:most]


def _specials(ids: Sequence[int], tokenizer: TextTokenizer) -> int:
    """Returns how many special tokens were added at the beginning of a text."""
    found = 0
    while found < min(tokenizer.specials, len(ids)) and ids[found] in tokenizer.special:
        found += 1
    return found


def _portions(texts: Sequence[Any]) -> Iterator[list[Any]]:
    """Yields texts, or pairs of them, in order: as many as are tokenised at once."""
    some: list[Any] = []
    size = 0
    for text in texts:
        own = len(text) if isinstance(text, str) else sum(map(len, text))
        if some and size + own > AT_ONCE:
            yield some
            some, size = [], 0
        some.append(text)
        size += own
    if some:
        yield some
