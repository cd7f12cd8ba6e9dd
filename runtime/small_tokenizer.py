"""A tokenizer of fewer words: the same text becomes the same tokens, as far as these are left, with new ids.

Of V tokens K stay, in their order; the new id of one is its place among them. Why texts of tokens that stay are read as
before, by kind of model:

- WordPiece takes the longest piece that there is, Unigram the likeliest pieces: what was chosen among more is chosen again;
  what Unigram does not know costs a little more than its least likely piece, which therefore stays;
- BPE joins pairs by their rank: what a token was joined of must stay as well (:func:`needed`), and its joins with it; of
  the pairs that are left the one that came first still comes first.

Words that are not left fall apart into smaller pieces, for which single characters that the texts have stay, too.
"""

from __future__ import annotations

import fnmatch
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import CheckError, OptionError
from liar_opt.runtime.places import Places
from liar_opt.runtime.text_tokenizer import fast_file
from liar_opt.runtime.whole_file import whole_folder

WRITTEN = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "chat_template*", "sentence_bert_config.json"),
)
COPIED = ("special_tokens_map.json", "chat_template*", "sentence_bert_config.json")
ROLES = ("sep", "cls")


class SmallTokenizer:
    """A tokenizer.json of which some tokens stay.

    Args:
        where: the tokenizer's folder, or its tokenizer.json.

    Raises:
        OptionError: there is no tokenizer.json, or its model is of no kind that is known.
    """

    def __init__(self, where: str | Path) -> None:
        file = fast_file(Path(where))
        if file is None:
            raise OptionError(
                f"a smaller tokenizer is made of a tokenizer.json, and '{where}' has none; save_pretrained of a "
                "fast tokenizer writes one"
            )
        self.file, self.raw = file, json.loads(file.read_text(encoding="utf-8"))
        self.model: dict[str, Any] = self.raw["model"]
        self.kind: str = self.model.get("type") or ("BPE" if "merges" in self.model else "WordPiece")
        if self.kind not in ("WordPiece", "WordLevel", "Unigram", "BPE"):
            raise OptionError(f"a tokenizer of kind {self.kind} cannot be made smaller; leave small-tokenizer out")
        pairs: Iterable[tuple[str, int]] = (
            ((text, i) for i, (text, _) in enumerate(self.model["vocab"]))
            if self.kind == "Unigram"
            else self.model["vocab"].items()
        )
        self.ids: dict[str, int] = dict(pairs)
        self.texts = {i: text for text, i in self.ids.items()}

    def needed(self, ids: Iterable[int]) -> set[int]:
        """Returns the ids with those of the pieces that they are joined of, of single characters, and of what texts get."""
        found, known = {*map(int, ids), *_processor_ids(self.raw.get("post_processor"))}, self.ids
        if self.kind == "Unigram" and self.model["vocab"]:
            found.add(min(range(len(self.model["vocab"])), key=lambda i: float(self.model["vocab"][i][1])))
        tokens = [self.texts[i] for i in sorted(found) if i in self.texts]
        if self.kind == "BPE":
            pieces = {piece for token in tokens for piece in self._pieces(token)}
        elif self.kind == "WordLevel":
            return found
        else:
            mark = self.model.get("continuing_subword_prefix") or ""
            characters = {c for token in tokens for c in token.removeprefix(mark)}
            pieces = {*characters, *(f"{mark}{c}" for c in characters)}
        return found | {known[piece] for piece in pieces if piece in known}

    def _pieces(self, token: str) -> Iterator[str]:
        """Yields what a token of BPE is joined of, step by step."""
        prefix = self.model.get("continuing_subword_prefix") or ""
        suffix = self.model.get("end_of_word_suffix") or ""
        end = suffix if suffix and token.endswith(suffix) else ""
        begin = prefix if prefix and token.startswith(prefix) else ""
        characters = token[len(begin) : len(token) - len(end)]
        parts = [(prefix if i or begin else "") + c for i, c in enumerate(characters)]
        if parts and end:
            parts[-1] += end
        yield from parts
        ranks = self._ranks
        while len(parts) > 1:
            ranked = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]
            if not ranked:
                return
            i = min(ranked)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1][len(prefix) :]]
            yield parts[i]

    @property
    def _ranks(self) -> dict[tuple[str, str], int]:
        if not hasattr(self, "_by_pair"):
            self._by_pair = {pair: i for i, pair in enumerate(self._merges())}
        return self._by_pair

    def _merges(self) -> list[tuple[str, str]]:
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in self.model["merges"])
        return [(a, b) for a, b in pairs]

    def cut(self, kept: NDArray[np.int64]) -> dict[str, Any]:
        """Returns the tokenizer.json of the tokens that are kept, ids ascending [K].

        Raises:
            OptionError: it adds a token to texts that is not among them.
        """
        new = {int(old): place for place, old in enumerate(kept)}
        lost = next((i for i in _processor_ids(self.raw.get("post_processor")) if i not in new), None)
        if lost is not None:
            raise OptionError(
                f"tokenizer '{self.file}' adds the token id {lost} to texts, and the model's table has no row for it: "
                "they do not belong together"
            )
        raw: dict[str, Any] = json.loads(json.dumps(self.raw))
        model = raw["model"]
        if self.kind == "Unigram":
            model["vocab"] = [pair for i, pair in enumerate(model["vocab"]) if i in new]
            model["unk_id"] = new.get(model.get("unk_id"))
        else:
            model["vocab"] = {text: new[i] for text, i in sorted(self.ids.items(), key=lambda p: p[1]) if i in new}
        if self.kind == "BPE":
            words, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""
            left = zip(model["merges"], self._merges(), strict=True)
            model["merges"] = [m for m, (a, b) in left if a in words and b in words and a + b[len(prefix) :] in words]
        raw["added_tokens"] = [{**t, "id": new[t["id"]]} for t in raw.get("added_tokens") or () if t["id"] in new]
        _renumber_processor(raw.get("post_processor"), new)
        if raw.get("padding"):
            raw["padding"]["pad_id"] = new.get(raw["padding"]["pad_id"], 0)
        return raw

    def write(self, kept: NDArray[np.int64], folder: Path) -> None:
        """Writes the files of a tokenizer, those that are beside its tokenizer.json, too.

        Raises:
            OSError: they cannot be written.
        """
        source, raw = self.file.parent, self.cut(kept)
        new = {int(old): place for place, old in enumerate(kept)}
        _write(folder / "tokenizer.json", raw)
        for pattern in COPIED:
            for file in source.glob(pattern):
                if file.is_file() and not (folder / file.name).exists():
                    shutil.copy(file, folder / file.name)
        config = _read(source / "tokenizer_config.json")
        if config is not None:
            decoder = config.get("added_tokens_decoder")
            if decoder is not None:
                known = {int(i): token for i, token in decoder.items()}
                config["added_tokens_decoder"] = {str(new[i]): known[i] for i in sorted(known) if i in new}
            _write(folder / "tokenizer_config.json", config)
        added = _read(source / "added_tokens.json")
        if added is not None:
            _write(folder / "added_tokens.json", {text: new[i] for text, i in added.items() if i in new})
        words = raw["model"]["vocab"]
        if (source / "vocab.txt").is_file() and self.kind in ("WordPiece", "WordLevel"):
            listed = "".join(f"{text}\n" for text in words)
            (folder / "vocab.txt").write_text(listed, encoding="utf-8")
        if (source / "vocab.json").is_file() and self.kind == "BPE":
            _write(folder / "vocab.json", words)
            merges = (m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"])
            (folder / "merges.txt").write_text("".join(f"{m}\n" for m in ("#version: 0.2", *merges)), encoding="utf-8")

    def check(self, kept: NDArray[np.int64], texts: Sequence[str]) -> int:
        """Reads texts with both tokenizers; returns how many of them have no token that went.

        Raises:
            CheckError: one of these is read otherwise.
        """
        from tokenizers import Tokenizer

        old, new = Tokenizer.from_file(str(self.file)), Tokenizer.from_str(json.dumps(self.cut(kept)))
        for tokenizer in (old, new):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        whole = 0
        for text, a, b in zip(texts, old.encode_batch(list(texts)), new.encode_batch(list(texts)), strict=True):
            ids = np.asarray(a.ids, np.int64)
            if not np.isin(ids, kept).all():
                continue
            whole += 1
            if not np.array_equal(np.searchsorted(kept, ids), b.ids):
                raise CheckError(f"the smaller tokenizer reads '{text[:40]}' otherwise; leave small-tokenizer out")
        return whole


def write_beside(tokenizer: SmallTokenizer, kept: NDArray[np.int64], output: Path, force: bool) -> Path:
    """Writes a smaller tokenizer into a folder of its own beside a model, whole or not at all.

    Raises:
        OptionError: the folder exists (without ``force``), holds what is no part of a tokenizer, or cannot be written.
    """
    folder = folder_beside(output, tokenizer.file, force)
    try:
        with whole_folder(folder) as temporary:
            tokenizer.write(kept, temporary)
    except OSError as err:
        raise OptionError(f"'{folder}' cannot be written ({err.strerror or err}); nothing was written") from err
    return folder


def folder_beside(output: Path, source: Path, force: bool) -> Path:
    """Returns where the smaller tokenizer of a model goes, which is made of the one in ``source``.

    Raises:
        OptionError: it may not be written there.
    """
    folder = output.with_suffix(".tokenizer")
    Places(lambda: ()).folder(folder, "tokenizer folder")
    if folder.exists() and any(folder.samefile(place) for place in (source, source.parent) if place.exists()):
        raise OptionError(f"tokenizer folder '{folder}' is the input; choose another output, inputs are never written to")
    there = sorted(f.name for f in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in WRITTEN)]
    if foreign:
        raise OptionError(f"tokenizer folder '{folder}' holds '{foreign[0]}', which would be lost; choose another output")
    if there and not force:
        raise OptionError(f"tokenizer folder '{folder}' exists; give --force to replace it or choose another output")
    return folder


def _processor_ids(processor: Any) -> Iterator[int]:
    """Yields the ids that a post-processor adds to texts, or to pairs of them."""
    if not processor:
        return
    for inner in processor.get("processors") or ():
        yield from _processor_ids(inner)
    for token in (processor.get("special_tokens") or {}).values():
        yield from token["ids"]
    yield from (processor[role][1] for role in ROLES if isinstance(processor.get(role), list))


def _renumber_processor(processor: Any, new: dict[int, int]) -> None:
    if not processor:
        return
    for inner in processor.get("processors") or ():
        _renumber_processor(inner, new)
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new[i] for i in token["ids"]]
    for role in ROLES:
        if isinstance(processor.get(role), list):
            processor[role] = [processor[role][0], new[processor[role][1]]]


def _read(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
