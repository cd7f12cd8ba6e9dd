"""Smaller tokenizers read texts of tokens that stay as the whole one does, of every kind, with new ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liar_opt.runtime.errors import CheckError, OptionError
from liar_opt.runtime.small_tokenizer import SmallTokenizer, folder_beside, write_beside
from liar_opt.runtime.text_tokenizer import load_tokenizer, unknown_and_basic

CORPUS = [
    "the quick brown fox jumps over the lazy dog while nobody watches",
    "there was an old fisherman who had gone eighty-four days without taking a fish",
    "a pruned model computes what the masked original computes, to rounding",
    "cafés and naïve façades; the unbelievable unbelievers believed in beliefs!",
    "rain fell over london and the cat sat on a mat, watching the quickest foxes",
]
TEXTS = [CORPUS[0], CORPUS[4]]
KINDS = ("WordPiece", "WordPiece, BertProcessing", "WordLevel", "Unigram", "BPE", "BPE, bytes", "BPE, ends of words")


def make(kind: str, folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    model, _, variant = kind.partition(", ")
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    common: dict[str, Any] = {"vocab_size": 200, "special_tokens": specials, "show_progress": False}
    tokenizer: Any
    trainer: Any
    if model == "WordPiece":
        tokenizer, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer(**common)
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    elif model == "WordLevel":
        tokenizer, trainer = Tokenizer(models.WordLevel(unk_token="[UNK]")), trainers.WordLevelTrainer(**common)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    elif model == "Unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="[UNK]", **common)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif variant == "bytes":
        common |= {"vocab_size": 400, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**common)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    else:
        ends: dict[str, Any] = {"end_of_word_suffix": "</w>"} if variant else {}
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", **ends))
        trainer = trainers.BpeTrainer(**common, **ends)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    if variant == "BertProcessing":
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokenizer.add_tokens(["<extra>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    decoder = {
        str(i): {"content": t.content, "special": t.special} for i, t in tokenizer.get_added_tokens_decoder().items()
    }
    config = {"pad_token": "[PAD]", "unk_token": "[UNK]", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def kept_of(folder: Path) -> np.ndarray:
    """Ids that a smaller tokenizer keeps for `TEXTS`."""
    tokenizer = load_tokenizer(folder)
    used = {i for ids, _ in tokenizer.encode(TEXTS, None) for i in ids}
    unknown, basic = unknown_and_basic(folder)
    always = tokenizer.special | basic | ({unknown} if unknown is not None else set())
    return np.asarray(sorted(SmallTokenizer(folder).needed(used | always)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_is_read_as_before(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path / "whole")
    small, kept = SmallTokenizer(folder), kept_of(folder)
    assert small.check(kept, TEXTS) == len(TEXTS)
    where = write_beside(small, kept, tmp_path / "out.onnx", force=False)
    old, new = load_tokenizer(folder), load_tokenizer(where)
    assert new.size == len(kept) < old.size
    assert (new.pad, new.special) == (0, frozenset(np.searchsorted(kept, sorted(old.special)).tolist()))
    unknown = unknown_and_basic(folder)[0]
    assert unknown_and_basic(where)[0] == (None if unknown is None else np.searchsorted(kept, unknown))
    for (ids, _), (ours, _) in zip(old.encode(TEXTS, None), new.encode(TEXTS, None), strict=True):
        assert kept[ours].tolist() == ids
    others = new.encode(CORPUS, None)  # others can be read all the same
    assert all(max(ids) < len(kept) for ids, _ in others)
    if kind == "BPE, bytes":  # every byte is there
        from tokenizers import Tokenizer

        plain = Tokenizer.from_file(str(where / "tokenizer.json"))
        assert [plain.decode(ids).strip() for ids, _ in others] == CORPUS


def test_transformers_reads_it(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = make("BPE, bytes", tmp_path / "whole")
    kept = kept_of(folder)
    where = write_beside(SmallTokenizer(folder), kept, tmp_path / "out.onnx", force=False)
    old, new = (PreTrainedTokenizerFast.from_pretrained(f) for f in (folder, where))
    assert len(new) == len(kept) and new.pad_token_id == 0
    assert kept[new(TEXTS[0])["input_ids"]].tolist() == old(TEXTS[0])["input_ids"]


def test_a_join_that_is_missing_is_noticed(tmp_path: Path) -> None:
    folder = make("BPE", tmp_path)
    small, kept = SmallTokenizer(folder), kept_of(folder)
    used = {i for ids, _ in load_tokenizer(folder).encode(TEXTS, None) for i in ids}
    bare = np.asarray(sorted(used | {0, 1, 2, 3, 4}))
    assert len(bare) < len(kept)
    with pytest.raises(CheckError, match="otherwise"):
        small.check(bare, TEXTS)


def test_where_it_goes(tmp_path: Path) -> None:
    folder, output = make("WordLevel", tmp_path / "whole"), tmp_path / "out.onnx"
    kept = kept_of(folder)
    write_beside(SmallTokenizer(folder), kept, output, force=False)
    with pytest.raises(OptionError, match="exists; give --force"):
        folder_beside(output, folder, force=False)
    write_beside(SmallTokenizer(folder), kept, output, force=True)
    (tmp_path / "out.tokenizer" / "mine.txt").write_text("x")
    with pytest.raises(OptionError, match=r"holds 'mine.txt'"):
        folder_beside(output, folder, force=True)
    with pytest.raises(OptionError, match="is the input"):
        folder_beside(output, tmp_path / "out.tokenizer" / "tokenizer.json", force=True)
    with pytest.raises(OptionError, match="has none"):
        SmallTokenizer(tmp_path)


def test_what_is_unknown_costs_what_it_did(tmp_path: Path) -> None:
    """Unigram: more than the least likely piece. Without that one, 'a', something unknown, 'cdef' would be likelier."""
    from tokenizers import Tokenizer, models, processors

    pieces = [("<unk>", 0.0), ("a", -1.0), ("cdef", -1.0), ("abc", -14.0), ("def", -14.0), ("rare", -20.0), ("<s>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment, unused-ignore]
        single="$A", pair="$A <s> $B", special_tokens=[("<s>", 6)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    small, used = SmallTokenizer(tmp_path), [0, 2, 3, 4]
    kept = np.asarray(sorted(small.needed(used)))
    assert kept.tolist() == [0, 1, 2, 3, 4, 5, 6]  # what it adds to pairs stays, too
    assert small.check(kept, ["abcdef", "cdef"]) == 2
    with pytest.raises(CheckError, match="reads 'abcdef' otherwise"):
        small.check(np.asarray([0, 1, 2, 3, 4, 6]), ["abcdef", "cdef"])
    with pytest.raises(OptionError, match="adds the token id 6 to texts, and the model's table has no row for it"):
        small.cut(kept[:6])
