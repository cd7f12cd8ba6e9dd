"""The vocabulary in a run: chosen by texts, ids or coverage, cut alone or with widths, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import words
import zoo
import zoo_decoders
import zoo_genai
import zoo_merged
from oracle import run

import liar_opt
from liar_opt.runtime.compare import relative_difference
from liar_opt.runtime.errors import LiarOptError, ModelError, OptionError
from liar_opt.runtime.text_tokenizer import load_tokenizer
from liar_opt.runtime.word_counts import most_frequent
from liar_opt.tools.cli import main
from liar_opt.tools.report import footnotes

V = zoo.VOCABULARY
TEXTS = ["the cat sat on a mat", "the cat sat", "rain fell"]
IDS = [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return words.save_tokenizer(tmp_path / "tokenizer")


def masked_model() -> Path:
    return zoo.ready(zoo.words_case("torchscript")).path


def cut(model: Path, **options: Any) -> liar_opt.PruneResult:
    return liar_opt.prune(model, **{"latency": False, "provider": "cpu", **options})


def test_texts(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    result = cut(masked_model(), vocabulary=tmp_path / "texts.txt", tokenizer=tokenizer)
    entry = result.report["vocabulary"]
    assert (entry["kept"], entry["words"], entry["tokens"], entry["share"]) == (4 + 8, V, 11, 1.0)
    assert (entry["unknown"], entry["named"]) == (words.UNK, "the unknown token")
    assert result.report["after"]["parameters"] < result.report["before"]["parameters"]
    assert result.report["groups"] == [] and "calibration" not in result.report
    feeds = zoo.feeds_of(zoo.words_case("torchscript"))
    (ours,) = run(result.model, feeds)
    kept = np.flatnonzero(np.isfinite(ours[0, 0]))
    assert len(kept) == 12 and np.isneginf(np.delete(ours, kept, axis=2)).all()
    known = np.where(np.isin(feeds["input_ids"], kept), feeds["input_ids"], words.UNK)
    (theirs,) = run(onnx.load(masked_model()), {**feeds, "input_ids": known})
    assert relative_difference(ours[..., kept], theirs[..., kept]) <= 1e-5
    assert cut(masked_model(), vocabulary=TEXTS, tokenizer=tokenizer).report["vocabulary"]["kept"] == 12


@pytest.mark.parametrize("kind", ["list", "array", "json", "npy", "txt"])
def test_ids(kind: str, tmp_path: Path) -> None:
    source: Any = {"list": IDS, "array": np.asarray(IDS, np.uint8)}.get(kind, tmp_path / f"ids.{kind}")
    if kind == "json":
        source.write_text(json.dumps(IDS))
    elif kind == "npy":
        np.save(source, np.asarray(IDS))
    elif kind == "txt":
        source.write_text("\n".join(map(str, IDS)))
    entry = cut(masked_model(), vocabulary=source).report["vocabulary"]
    assert (entry["kept"], entry["unknown"]) == (len(IDS), 0) and "share" in entry and entry["share"] is None


def test_coverage(tokenizer: Path) -> None:
    """The most frequent words; without a vocabulary those of the calibration data."""
    counts = np.asarray([0, 5, 1, 3, 1])
    assert most_frequent(counts, 0.8).tolist() == [1, 3] and most_frequent(counts, 1.0).tolist() == [1, 2, 3, 4]
    entry = cut(masked_model(), calibration=TEXTS, vocabulary_coverage=0.5, tokenizer=tokenizer).report["vocabulary"]
    assert 0.5 <= entry["share"] < 0.8 and entry["kept"] == 4 + 3
    ids = {"input_ids": np.asarray([[4, 5, 4], [4, 6, 5]]), "attention_mask": np.ones((2, 3), np.int64)}
    ids["token_type_ids"] = np.zeros((2, 3), np.int64)
    entry = cut(masked_model(), calibration=[ids], vocabulary_coverage=0.8).report["vocabulary"]
    assert (entry["kept"], entry["tokens"], entry["unknown"]) == (2, 6, 4)
    # names of arrays are no texts
    entry = cut(masked_model(), calibration=ids, vocabulary_coverage=0.8, tokenizer=tokenizer).report["vocabulary"]
    assert (entry["kept"], entry["tokens"]) == (4 + 2, 6)


def test_with_widths(tokenizer: Path) -> None:
    """Both are cut; a size that is asked for is that of the file without the words."""
    model = masked_model()
    data: dict[str, Any] = {"calibration": TEXTS * 20, "tokenizer": tokenizer, "vocabulary": TEXTS, "batch_size": 8}
    plain = cut(model, **{**data, "vocabulary": None}, sparsity=0.3)
    result = cut(model, **data, sparsity=0.3)
    entry, report = result.report["vocabulary"], result.report
    assert entry["kept"] == 12 and entry["exact_difference"] <= 1e-4
    assert report["before"] == plain.report["before"] and report["groups"] == plain.report["groups"]
    gone = plain.report["after"]["bytes"] - report["after"]["bytes"]
    assert gone == entry["bytes_before"] - entry["bytes_after"] > 0
    kept = {"input_ids": np.asarray([[1, 4, 5, 0]]), "attention_mask": np.ones((1, 4), np.int64)}
    kept["token_type_ids"] = np.zeros((1, 4), np.int64)
    (ours,), (theirs,) = run(result.model, kept), run(plain.model, kept)
    left = np.isfinite(ours[0, 0])
    assert left.sum() == 12 and relative_difference(ours[..., left], theirs[..., left]) <= 1e-5
    met = cut(model, **data, target="size=0.7x")
    found, wanted = (met.report["target"][key] for key in ("found", "wanted"))
    assert abs(found / wanted - 1) < 0.01 and abs(met.model.ByteSize() / found - 1) < 0.01
    planned = cut(model, **data, sparsity=0.3, dry_run=True).report["model"]["notes"]
    assert "12 of 101 words would be left, by texts from Python" in planned
    with pytest.raises(OptionError, match="without the words that go"):
        cut(model, **data, target="size=0.99x")


def test_a_cache(tokenizer: Path) -> None:
    built = zoo_decoders.ready(zoo_decoders.Case("gpt2", "torchscript", True))
    result = cut(built.path, vocabulary=TEXTS, tokenizer=tokenizer)
    outputs = run(result.model, built.feeds)
    assert [o.name for o in result.model.graph.output] == [o.name for o in onnx.load(built.path).graph.output]
    assert np.isfinite(outputs[0][0, 0]).sum() == 12 and all(np.isfinite(o).all() for o in outputs[1:])


def test_a_table_of_two_inputs(tokenizer: Path) -> None:
    """An encoder and a decoder that share their embeddings: words that went are read as unknown in both."""
    built = zoo_decoders.ready(zoo_decoders.Case("bart", "torchscript"))
    result = cut(built.path, vocabulary=IDS, tokenizer=tokenizer)
    assert result.report["vocabulary"]["exact_difference"] <= 1e-5
    kept = np.flatnonzero(np.isfinite(run(result.model, built.feeds)[0][0, 0]))
    known = {
        name: np.where(np.isin(value, kept), value, words.UNK) if name.endswith("input_ids") else value
        for name, value in built.feeds.items()
    }
    ours, theirs = run(result.model, built.feeds)[0], run(onnx.load(built.path), known)[0]
    assert relative_difference(ours[..., kept], theirs[..., kept]) <= 1e-5


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_a_smaller_tokenizer(exporter: str, tokenizer: Path, tmp_path: Path) -> None:
    """The graph has no table: it takes the ids of the tokenizer beside it, and gives as many logits."""
    model = zoo.ready(zoo.words_case(exporter)).path
    result = cut(model, vocabulary=TEXTS, tokenizer=tokenizer, small_tokenizer=True)
    path = result.save(tmp_path / "out.onnx")
    old, new = load_tokenizer(tokenizer), load_tokenizer(path.with_suffix(".tokenizer"))
    assert new.size == 12 and (new.pad, old.pad) == (3, words.PAD)
    for text in TEXTS:
        ((before, types),), ((after, _),) = old.encode([text], None), new.encode([text], None)
        more = {"attention_mask": np.ones((1, len(types)), np.int64), "token_type_ids": np.asarray([types])}
        (theirs,) = run(onnx.load(model), {"input_ids": np.asarray([before]), **more})
        (ours,) = run(onnx.load(path), {"input_ids": np.asarray([after]), **more})
        kept = [old_id for old_id in range(V) if result.words is not None and old_id in result.words.kept]
        assert ours.shape[-1] == 12 and relative_difference(ours, theirs[..., kept]) <= 1e-5
    assert onnx.load(path).graph.output[0].type.tensor_type.shape.dim[-1].dim_value == 12
    with pytest.raises(OptionError, match="give --tokenizer"):
        cut(model, vocabulary=IDS, small_tokenizer=True)


def test_what_ids_are_compared_with(tokenizer: Path) -> None:
    """Positions that are counted behind padding find it by its new id."""
    case = next(c for c in zoo.every_case() if c.name == "roberta-torchscript-eager-dynamic")
    specials = {"[PAD]": zoo.PADDING, "[CLS]": 2, "[SEP]": 3, "[UNK]": 4}
    raw = json.loads((tokenizer / "tokenizer.json").read_text())
    raw["model"]["vocab"] = specials | {f"w{i}": i for i in range(5, V)}
    (tokenizer / "tokenizer.json").write_text(json.dumps({**raw, "post_processor": None}))
    path = zoo.ready(case).path
    result = cut(path, vocabulary=range(40, 60), tokenizer=tokenizer, small_tokenizer=True)
    assert result.words is not None and result.words.kept[0] == zoo.PADDING  # which has the id 0 now
    feeds = {"input_ids": np.asarray([[40, 41, zoo.PADDING, 42]]), "attention_mask": np.asarray([[1, 1, 0, 1]])}
    (theirs,) = run(onnx.load(path), feeds)
    (ours,) = run(result.model, result.words.numbered(feeds))
    assert relative_difference(ours, theirs) <= 1e-5


def test_fused_operators() -> None:
    """What ONNX Runtime GenAI runs: the widths of its caches are known by the analysis alone."""
    result = cut(zoo_genai.decoder(zoo_genai.Shape()), vocabulary=range(40))
    assert result.report["vocabulary"]["exact_difference"] <= 1e-4 and result.report["vocabulary"]["kept"] == 40


def test_a_model_that_does_not_run() -> None:
    model = zoo_genai.decoder(zoo_genai.Shape(operator="MultiHeadAttention", rotary="node", packed=False))
    with pytest.raises(ModelError, match="ONNX Runtime cannot load the model"):
        cut(model, vocabulary=range(40))


def test_a_merged_decoder() -> None:
    """Both branches have the words that are left, and each its own table."""
    result = cut(zoo_merged.ready("gpt2"), vocabulary=IDS)
    assert result.report["vocabulary"]["exact_difference"] <= 1e-4
    assert [n.op_type for n in result.model.graph.node] == ["If"]
    assert result.model.ByteSize() < onnx.load(zoo_merged.ready("gpt2")).ByteSize()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"vocabulary": TEXTS, "tokenizer": None}, "needs the tokenizer"),
    "an id outside": ({"vocabulary": [1, V]}, f"token id {V}; the model's table has {V} rows"),
    "a negative id": ({"vocabulary": [-1, 2]}, "token id -1"),
    "no texts": ({"vocabulary": ["", " "]}, "leaves no word"),
    "no ids": ({"vocabulary": np.empty(0, np.int64)}, "leaves no word"),
    "fractions": ({"vocabulary": np.asarray([0.5])}, "holds no integers"),
    "all words": ({"vocabulary": list(range(V))}, "has all 101 words"),
    "no such file": ({"vocabulary": "nothing.txt"}, "cannot be read"),
    "coverage of ids": ({"vocabulary": IDS, "vocabulary_coverage": 0.9}, "leave it out beside a list of ids"),
    "too much": ({"vocabulary": TEXTS, "vocabulary_coverage": 1.5}, "above 0, and at most 1"),
    "data that ends": ({"vocabulary_coverage": 0.9, "calibration": iter(TEXTS)}, "give it as a list"),
    "coverage of nothing": ({"vocabulary_coverage": 0.9}, "needs texts to count words in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tokenizer: Path) -> None:
    options, reason = REFUSED[case]
    with pytest.raises(OptionError, match=reason) as caught:
        cut(masked_model(), **{"tokenizer": tokenizer, **options})
    assert "\n" not in str(caught.value)


def test_files_that_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    for name, content, reason in (
        ("latin.txt", "caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("binary.txt", b"\0\1\2", "holds binary data"),
        ("broken.json", b"[1, ", "cannot be read"),
        ("object.json", b'{"a": 1}', "holds no integers"),
        ("deep.json", b"[" * 100_000, "cannot be read"),
        ("empty.npy", b"", "cannot be read"),
        ("archive.npy", b"PK\3\4" * 9, "cannot be read"),
        ("rows.jsonl", b"[]", "is a JSON list"),
        ("words.docx", b"PK", "^vocabulary file '.*words.docx' has the unknown suffix"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LiarOptError, match=reason):
            cut(masked_model(), vocabulary=tmp_path / name, tokenizer=tokenizer)


def test_a_tokenizer_of_another_model(tokenizer: Path) -> None:
    raw = json.loads((tokenizer / "tokenizer.json").read_text())
    raw["model"]["vocab"]["the"] = 400
    (tokenizer / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(OptionError, match=r"token id 400 for 'the cat sat on a mat'.* do not belong together"):
        cut(masked_model(), vocabulary=TEXTS, tokenizer=tokenizer)


def test_no_vocabulary(tokenizer: Path) -> None:
    case = next(c for c in zoo.every_case() if c.name == "vit-torchscript-eager-dynamic")
    with pytest.raises(ModelError, match="no input of it looks a table up"):
        cut(zoo.ready(case).path, vocabulary=IDS, tokenizer=tokenizer)


def test_the_command(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    given = [str(masked_model()), "--vocabulary", str(tmp_path / "texts.txt"), "--tokenizer", str(tokenizer)]
    output, report = tmp_path / "out.onnx", tmp_path / "r.json"
    more = ["-o", str(output), "--report", str(report), "--html", str(tmp_path / "r.html")]
    assert main([*given, *more]) == 0
    captured = capsys.readouterr()
    assert "12 of 101 words are left, 100.00 % of the 11 tokens" in captured.out and "words" in captured.out
    assert "random inputs" not in captured.err
    assert "12 of 101 words" in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert next(footnotes({**json.loads(report.read_text()), "latency": None})).startswith("vocabulary: 12 of 101")
    assert output.stat().st_size < masked_model().stat().st_size
    assert main([*given, "--dry-run"]) == 0 and "dry run: about 15.5 %" in capsys.readouterr().out
    assert main([str(output), *given[1:]]) == 2
    assert "computed inside" in capsys.readouterr().err
    assert main([*given, "-o", str(tmp_path / "texts.txt"), "--force"]) == 2  # what it reads
