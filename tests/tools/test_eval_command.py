"""``liar-opt eval`` on small seeded models: figures against what numpy makes of the same weights, and every bad input."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import words

from liar_opt.runtime import metrics
from liar_opt.tools import cli

WIDTH, WORDS = 5, 40
HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'
POOLED = """
    x = Gather(table, input_ids)
    f = Cast<to = 1>(attention_mask)
    m = Unsqueeze(f, last)
    xm = Mul(x, m)
    s = ReduceSum<keepdims = 0>(xm, one)
    n = ReduceSum<keepdims = 0>(m, one)
    p = Div(s, n)
"""
IDS = "int64[b, s] input_ids, int64[b, s] attention_mask"
CLASSIFIER = f"{HEAD}c ({IDS}) => (float[b, c] logits) {{ {POOLED} logits = MatMul(p, head) }}"
ENCODER = f"{HEAD}e ({IDS}) => (float[b, s, {WIDTH}] last_hidden_state) {{ last_hidden_state = Gather(table, input_ids) }}"
READ = "x = Gather(table, input_ids) logits = MatMul(x, head)"
DECODER = f"{HEAD}d (int64[b, s] input_ids) => (float[b, s, {WORDS}] logits) {{ {READ} }}"
READER = f"""{HEAD}q ({IDS}) => (float[b, s] start_logits, float[b, s] end_logits) {{
    x = Gather(table, input_ids)
    h = MatMul(x, head)
    start_logits = Gather<axis = 2>(h, i)
    end_logits = Gather<axis = 2>(h, j)
}}"""
IMAGES = f"""{HEAD}i (float[b, 2, 3, 3] pixel_values) => (float[b, c] logits) {{
    x = Flatten(pixel_values)
    logits = MatMul(x, head)
}}"""


def make(path: Path, text: str, seed: int = 0, **weights: np.ndarray[Any, Any]) -> Path:
    """Writes a graph given as ONNX text, with seeded weights."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, np.ndarray[Any, Any]] = {
        "table": rng.standard_normal((WORDS, WIDTH)).astype(np.float32),
        "last": np.array([-1]),
        "one": np.array([1]),
        "i": np.array(0),
        "j": np.array(1),
        **weights,
    }
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in drawn.items() if n in used)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def table(seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((WORDS, WIDTH)).astype(np.float32)


def head(classes: int, seed: int = 7, rows: int = WIDTH) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, classes)).astype(np.float32)


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words.WORDS, rng.integers(2, 12))) for _ in range(count)]


def tokens(text: str, pair: str | None = None) -> list[int]:
    known = {w: i for i, w in enumerate(dict.fromkeys(["[SEP]", "[CLS]", "[UNK]", "[PAD]", *words.WORDS]))}
    ids = [known.get(w, words.UNK) for w in text.split()]
    return [words.CLS, *ids, words.SEP, *([known.get(w, words.UNK) for w in pair.split()] + [words.SEP] if pair else [])]


def pooled(texts: list[str], seed: int = 0, pairs: list[str] | None = None) -> np.ndarray[Any, Any]:
    given = [tokens(t) for t in texts] if pairs is None else [tokens(*both) for both in zip(texts, pairs, strict=True)]
    return np.stack([table(seed)[ids].astype(np.float64).mean(0) for ids in given])


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return words.save_tokenizer(tmp_path / "tokenizer")


def run(*argv: object) -> int:
    return cli.main(["eval", *(str(a) for a in argv)])


def report(tmp_path: Path, *argv: object) -> dict[str, Any]:
    path = tmp_path / "r.json"
    assert run(*argv, "--report", path, "--quiet", "--no-latency") == 0
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def values(found: dict[str, Any]) -> dict[str, list[float]]:
    return {name: metric["values"] for name, metric in found["metrics"].items()}


Refuse = Callable[..., None]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refuse:
    """Runs the command and expects one line with the needles, exit code 2, and no file."""

    def check(*argv: object, needles: tuple[str, ...]) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert run(*argv, "--report", tmp_path / "never.json") == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert len(shown.err.splitlines()) == 1, shown.err
        for needle in needles:
            assert needle in shown.err, shown.err
        assert sorted(tmp_path.rglob("*")) == before

    return check


# -------------------------------------------------------------------------------------------------- classification


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two classifiers that differ, and a set whose labels are the first one's, four of them wrong."""
    dense = make(tmp_path / "dense.onnx", CLASSIFIER, head=head(2))
    pruned = make(tmp_path / "pruned.onnx", CLASSIFIER, head=head(2) + 0.5 * head(2, 3))
    texts = sentences(40)
    labels = (pooled(texts) @ head(2)).argmax(1)
    labels[:4] = 1 - labels[:4]
    rows = [{"sentence": t, "label": int(label), "idx": i} for i, (t, label) in enumerate(zip(texts, labels, strict=True))]
    return dense, pruned, jsonl(tmp_path / "set.jsonl", rows)


def test_classification(labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path) -> None:
    dense, pruned, data = labelled
    found = report(tmp_path, dense, pruned, "--task", "classification", "--data", data, "--tokenizer", tokenizer)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    wanted = np.array([row["label"] for row in rows])
    logits = [pooled([row["sentence"] for row in rows]) @ h for h in (head(2), head(2) + 0.5 * head(2, 3))]
    said = [z.argmax(1) for z in logits]
    assert values(found) == {
        "accuracy": pytest.approx([metrics.accuracy(s, wanted) for s in said]),
        "f1": pytest.approx([metrics.f1_binary(s, wanted) for s in said]),
        "f1-macro": pytest.approx([metrics.f1_macro(s, wanted, 2) for s in said]),
        "mcc": pytest.approx([metrics.matthews(s, wanted, 2) for s in said]),
        "agreement": [1.0, pytest.approx(np.mean(said[0] == said[1]))],
        "divergence": pytest.approx([0.0, metrics.divergences(*logits).mean()], abs=1e-6),
    }
    assert 0.5 < values(found)["agreement"][1] < 1.0 and values(found)["divergence"][1] > 0.01
    assert found["metrics"]["accuracy"]["values"][0] == 0.9
    assert found["metrics"]["accuracy"]["samples"] == 40
    (difference,) = found["metrics"]["accuracy"]["differences"]
    assert difference["low"] < difference["difference"] < difference["high"]
    assert found["level"] == 0.95
    assert found["resamples"] == 1000
    assert [m["name"] for m in found["models"]] == ["dense.onnx", "pruned.onnx"]
    assert found["models"][0]["parameters"] == WORDS * WIDTH + 2 * WIDTH
    assert found["models"][0]["bytes"] == dense.stat().st_size


def test_faithfulness_needs_no_labels(labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path) -> None:
    dense, pruned, data = labelled
    bare = jsonl(tmp_path / "bare.jsonl", [{"sentence": json.loads(t)["sentence"]} for t in data.read_text().splitlines()])
    asked = ("--task", "classification", "--tokenizer", tokenizer)
    found = report(tmp_path, dense, pruned, *asked, "--data", bare, "--metric", "divergence", "--metric", "agreement")
    full = report(tmp_path, dense, pruned, *asked, "--data", data)
    assert values(found) == {name: values(full)[name] for name in ("agreement", "divergence")}


def test_the_table(labelled: tuple[Path, Path, Path], tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, pruned, data = labelled
    assert run(dense, pruned, "--task", "classification", "--data", data, "--tokenizer", tokenizer, "--resamples", 50) == 0
    shown = capsys.readouterr().out
    for needle in (
        "accuracy",
        "0.9000",
        "95 % interval",
        " to ",
        "paired bootstrap, 95 %, 50 resamples of 40 samples, seed 0",
    ):
        assert needle in shown
    assert "latency: one batch, input_ids [" in shown
    assert shown.splitlines()[-1].startswith("evaluated: 2 models, classification, 40 samples; ")


def test_the_same_model_twice_has_no_difference(labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path) -> None:
    dense, _, data = labelled
    found = report(tmp_path, dense, dense, "--task", "classification", "--data", data, "--tokenizer", tokenizer)
    for metric in found["metrics"].values():
        assert metric["differences"] == [{"difference": 0.0, "low": 0.0, "high": 0.0}]


def test_seeded(labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path) -> None:
    dense, pruned, data = labelled
    common = (dense, pruned, "--task", "classification", "--data", data, "--tokenizer", tokenizer, "--samples", 15)
    first, again, other = (report(tmp_path, *common, "--seed", seed)["metrics"] for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert first["accuracy"]["samples"] == 15


def test_what_lies_beside_the_model_is_used(labelled: tuple[Path, Path, Path], tmp_path: Path) -> None:
    dense, _, data = labelled
    folder = words.save_tokenizer(tmp_path / "export")
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "BAD", "1": "GOOD"}}))
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(dense.read_bytes())
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    with (tmp_path / "set.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["review", "label"])
        writer.writerows((row["sentence"], "good" if row["label"] else "bad") for row in rows)
    found = report(tmp_path, folder, "--task", "classification", "--data", tmp_path / "set.csv", "--metric", "accuracy")
    assert values(found) == {"accuracy": [0.9]}


def test_a_checkpoint_is_exported(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = words.save_tokenizer(tmp_path / "checkpoint")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=WORDS, num_labels=3, **sizes, initializer_range=0.5)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    texts = sentences(24)
    with torch.no_grad():
        said = [int(model(torch.tensor([tokens(text)])).logits.argmax()) for text in texts]
    rows = [{"text": t, "label": n if i % 4 else (n + 1) % 3} for i, (t, n) in enumerate(zip(texts, said, strict=True))]
    data = jsonl(tmp_path / "set.jsonl", rows)
    found = report(tmp_path, folder, "--task", "classification", "--data", data, "--metric", "accuracy")
    assert values(found) == {"accuracy": [0.75]}
    assert found["models"][0]["name"] == "checkpoint"
    assert found["models"][0]["bytes"] == (folder / "model.safetensors").stat().st_size


def test_pairs_as_glue_has_them(tokenizer: Path, tmp_path: Path) -> None:
    model = make(tmp_path / "m.onnx", CLASSIFIER, head=head(3))
    first, second = sentences(30, 1), sentences(30, 2)
    labels = (pooled(first, pairs=second) @ head(3)).argmax(1)
    rows = [{"premise": p, "hypothesis": h, "label": int(n)} for p, h, n in zip(first, second, labels, strict=True)]
    data = jsonl(tmp_path / "set.jsonl", rows)
    found = report(tmp_path, model, "--task", "classification", "--data", data, "--tokenizer", tokenizer)
    assert values(found) == {"accuracy": [1.0], "f1-macro": [1.0], "mcc": [pytest.approx(1.0)]}


def test_a_saved_dataset_with_splits(labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dense, _, data = labelled
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["good", "bad"]),
            "idx": datasets.Value("int32"),
        }
    )
    turned = [{**row, "label": 1 - row["label"]} for row in rows]  # the set's order of the classes is another
    whole = datasets.Dataset.from_list(turned, features=features)
    hidden = datasets.Dataset.from_list([{**row, "label": -1} for row in rows], features=features)
    datasets.DatasetDict({"train": whole, "validation": whole, "test": hidden}).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "BAD", "1": "GOOD"}}))
    common = (dense, "--task", "classification", "--data", tmp_path / "set", "--tokenizer", tokenizer)
    found = report(tmp_path, *common)
    assert values(found)["accuracy"] == [0.9]
    assert found["data"] == "set (validation), 40 samples"


# ---------------------------------------------------------------------------------------- regression and embeddings


def test_regression(tokenizer: Path, tmp_path: Path) -> None:
    models = [make(tmp_path / f"{i}.onnx", CLASSIFIER, head=head(1, i)) for i in range(2)]
    texts = sentences(25)
    wanted = np.random.default_rng(5).uniform(0, 5, 25).round(1)
    data = jsonl(tmp_path / "set.jsonl", [{"text": t, "score": s} for t, s in zip(texts, wanted, strict=True)])
    found = report(tmp_path, *models, "--task", "regression", "--data", data, "--tokenizer", tokenizer)
    said = [(pooled(texts) @ head(1, i))[:, 0] for i in range(2)]
    assert values(found) == {
        "pearson": pytest.approx([metrics.pearson(s, wanted) for s in said], abs=1e-5),
        "spearman": pytest.approx([metrics.spearman(s, wanted) for s in said], abs=1e-5),
    }


def test_sts(tokenizer: Path, tmp_path: Path) -> None:
    model = make(tmp_path / "m.onnx", ENCODER)
    first, second = sentences(20, 1), sentences(20, 2)
    wanted = np.random.default_rng(5).uniform(0, 5, 20)
    rows = [{"sentence1": x, "sentence2": y, "label": n} for x, y, n in zip(first, second, wanted, strict=True)]
    found = report(tmp_path, model, "--task", "sts", "--data", jsonl(tmp_path / "s.jsonl", rows), "--tokenizer", tokenizer)
    scores = metrics.cosines(pooled(first), pooled(second))
    assert values(found)["pearson"] == pytest.approx([metrics.pearson(scores, wanted)], abs=1e-5)


def test_embeddings(tokenizer: Path, tmp_path: Path) -> None:
    mixed = table() + 0.5 * table(9)
    models = [make(tmp_path / "a.onnx", ENCODER), make(tmp_path / "b.onnx", ENCODER, table=mixed)]
    texts = sentences(30)
    (tmp_path / "set.txt").write_text("\n".join([*texts, "", "  "]))
    common = ("--task", "embeddings", "--data", tmp_path / "set.txt", "--tokenizer", tokenizer, "--neighbours", 4)
    found = report(tmp_path, *models, *common)
    other = np.stack([mixed[tokens(t)].astype(np.float64).mean(0) for t in texts])
    cosines = metrics.cosines(pooled(texts), other)
    shared = metrics.overlap(metrics.neighbours(other, 4), metrics.neighbours(pooled(texts), 4))
    assert values(found) == {
        "cosine": pytest.approx([1.0, cosines.mean()], abs=1e-5),
        "overlap@4": pytest.approx([1.0, shared.mean()]),
    }
    assert found["metrics"]["cosine"]["samples"] == 30
    assert 0.2 < shared.mean() < 0.95


# -------------------------------------------------------------------------------------------------------- language


def test_perplexity_by_both_conventions(tmp_path: Path) -> None:
    folder = words.plain_tokenizer(tmp_path / "tokenizer")
    heads = [head(WORDS, seed) for seed in (1, 2)]
    models = [make(tmp_path / f"{i}.onnx", DECODER, head=h) for i, h in enumerate(heads)]
    lines = sentences(700)
    (tmp_path / "set.txt").write_text("\n".join(lines))
    found = report(tmp_path, *models, "--task", "perplexity", "--data", tmp_path / "set.txt", "--tokenizer", folder)
    ids = np.concatenate([tokens(line)[1:-1] for line in lines])
    for window, name in ((2048, "perplexity, windows of 2,048 without overlap"), (128, "perplexity, windows of 128")):
        cut = ids[: len(ids) // window * window].reshape(-1, window)
        for h, value in zip(heads, found["metrics"][name]["values"], strict=True):
            scores = (table()[cut[:, :-1]] @ h).astype(np.float64)
            likely = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
            loss = -np.take_along_axis(likely, cut[:, 1:, None], -1).mean()
            assert value == pytest.approx(np.exp(loss), rel=1e-4)
        assert found["metrics"][name]["samples"] == len(cut)
        assert found["metrics"][name]["unit"] == "window"


def test_rows_of_wikitext_are_one_text(tmp_path: Path) -> None:
    folder = words.plain_tokenizer(tmp_path / "tokenizer")
    model = make(tmp_path / "m.onnx", DECODER, head=head(WORDS))
    lines = ["", "the cat sat on a mat", " ", "rain fell over london and nobody said one more word"]
    data = jsonl(tmp_path / "set.jsonl", [{"text": line} for line in lines])
    found = report(tmp_path, model, "--task", "perplexity", "--data", data, "--tokenizer", folder, "--window", 8)
    assert found["metrics"]["perplexity, windows of 8"]["samples"] == 2
    found = report(
        tmp_path, model, "--task", "perplexity", "--data", data, "--tokenizer", folder, "--window", 4, "--samples", 3
    )
    assert found["metrics"]["perplexity, windows of 4"]["samples"] == 3
    assert found["notes"] == ["perplexity, windows of 4: 3 of 4 windows drawn with seed 0"]


def test_questions(tokenizer: Path, tmp_path: Path) -> None:
    # start at "fell", end at "london": columns of a head that reads one-hot words
    one_hot = np.eye(WORDS, dtype=np.float32)
    known = {w: i for i, w in enumerate(dict.fromkeys(["[SEP]", "[CLS]", "[UNK]", "[PAD]", *words.WORDS]))}
    right, wrong = np.zeros((WORDS, 2), np.float32), np.zeros((WORDS, 2), np.float32)
    right[known["fell"], 0] = right[known["london"], 1] = 5
    wrong[known["fell"], 0] = wrong[known["over"], 1] = 5
    models = [make(tmp_path / f"{i}.onnx", READER, table=one_hot, head=h) for i, h in enumerate((right, wrong))]
    rows = [
        {"question": "the cat", "context": "the rain fell over london today", "answers": {"text": ["fell over london"]}},
        {"question": "the mat", "context": "nobody said fell over london", "answers": {"text": ["fell", "over  london!"]}},
    ]
    data = jsonl(tmp_path / "set.jsonl", rows)
    found = report(tmp_path, *models, "--task", "question-answering", "--data", data, "--tokenizer", tokenizer)
    assert values(found)["exact-match"] == [0.5, 0.0]
    assert values(found)["f1"] == pytest.approx([(1 + 0.8) / 2, (0.8 + 2 / 3) / 2])


# ---------------------------------------------------------------------------------------------------------- arrays


def images(tmp_path: Path, **more: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    pixels = np.random.default_rng(0).standard_normal((21, 2, 3, 3)).astype(np.float32)
    labels = (pixels.reshape(21, -1) @ head(4, rows=18)).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    return {"images": pixels, "labels": labels, **more}


def test_images(tmp_path: Path) -> None:
    model = make(tmp_path / "m.onnx", IMAGES, head=head(4, rows=18))
    arrays = images(tmp_path)
    np.savez(tmp_path / "set.npz", allow_pickle=False, **arrays)
    (tmp_path / "folder").mkdir()
    for name, array in arrays.items():
        np.save(tmp_path / "folder" / f"{name}.npy", array)
    for data in (tmp_path / "set.npz", tmp_path / "folder"):
        found = report(tmp_path, model, "--task", "image-classification", "--data", data, "--batch-size", 8)
        assert values(found) == {"top-1": [pytest.approx(20 / 21)]}
        assert found["metrics"]["top-1"]["unit"] == "image"


# ------------------------------------------------------------------------------------------------------- bad input


def test_metrics_that_do_not_fit(
    refuse: Refuse, labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path
) -> None:
    dense, _, data = labelled
    common = (dense, "--data", data, "--tokenizer", tokenizer)
    refuse(*common, "--task", "classification", "--metric", "pearson", needles=("'pearson' does not fit", "'accuracy'"))
    alone = ("'divergence' compares models with the first", "two or more")
    refuse(*common, "--task", "classification", "--metric", "divergence", needles=alone)
    refuse(*common, "--task", "translation", needles=("task 'translation' is unknown", "'sts'"))
    refuse(*common, "--task", "regression", needles=("gives 2 numbers a sample", "--task classification"))
    refuse(*common, "--task", "classification", "--window", 128, needles=("--window is for task 'perplexity'",))
    refuse(*common, "--task", "classification", "--samples", 0, needles=("--samples is 0", "at least 1"))
    three = make(tmp_path / "three.onnx", CLASSIFIER, head=head(3))
    common = (three, "--data", data, "--tokenizer", tokenizer)
    refuse(*common, "--task", "classification", "--metric", "f1", needles=("'f1' does not fit the labels", "'f1-macro'"))


def test_labels_that_do_not_fit(refuse: Refuse, labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path) -> None:
    dense, _, _ = labelled
    common = (dense, "--task", "classification", "--tokenizer", tokenizer, "--data")

    def rows(*labels: Any) -> Path:
        return jsonl(tmp_path / "labels.jsonl", [{"text": "the cat", "label": label} for label in labels])

    refuse(*common, rows(0, 3.8), needles=("3.8", "no classes", "--task regression"))
    refuse(*common, rows(0, 2), needles=("label 2", "2 classes"))
    refuse(*common, rows(-1, -1), needles=("hides the true one", "--split"))
    refuse(*common, rows("good", "bad"), needles=("'good'", "id2label"))
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "bad", "1": "fair"}}))
    refuse(*common, rows("good", "bad"), needles=("'good'", "'fair'"))
    common = (dense, "--task", "regression", "--tokenizer", tokenizer, "--data")
    refuse(*common, rows("good", 1), needles=("'good'", "no number"))
    refuse(*common, rows(1, 1), needles=("nothing correlates",))


def test_sets_that_do_not_fit(refuse: Refuse, labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path) -> None:
    dense, _, data = labelled
    common = (dense, "--task", "classification", "--tokenizer", tokenizer)
    refuse(*common, needles=("needs --data",))
    refuse(*common, "--data", tmp_path / "no.jsonl", needles=("no.jsonl' does not exist",))
    refuse(*common, "--data", data, "--label-column", "stars", needles=("no column 'stars'", "'sentence', 'label'"))
    refuse(*common, "--data", data, "--text-column", "body", needles=("no column 'body'",))
    refuse(*common, "--data", data, "--text-pair-column", "sentence", needles=("needs --text-column",))
    refuse(*common, "--data", data, "--split", "test", needles=("has no splits",))
    refuse(*common, "--data", dense, needles=("unknown suffix '.onnx'",))
    unlabelled = jsonl(tmp_path / "u.jsonl", [{"text": "the cat"}])
    refuse(*common, "--data", unlabelled, needles=("no column of labels", "--label-column"))
    refuse(*common, "--data", jsonl(tmp_path / "bad.jsonl", [{"text": 3, "label": 0}]), needles=("row 0", "int", "text"))
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    refuse(*common, "--data", tmp_path / "broken.jsonl", needles=("line 1 of evaluation data", "no JSON"))
    refuse(dense, "--task", "classification", "--data", data, needles=("no tokenizer", "--tokenizer DIR"))


@pytest.mark.parametrize(
    ("name", "text"), [("e.jsonl", ""), ("e.csv", "text,label\n"), ("e.txt", " \n\n"), ("e.jsonl", "\n")]
)
def test_an_empty_set(refuse: Refuse, labelled: tuple[Path, Path, Path], tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    refuse(labelled[0], "--task", "classification", "--data", tmp_path / name, needles=(f"{name}' is empty",))


def test_empty_arrays(refuse: Refuse, tmp_path: Path) -> None:
    model = make(tmp_path / "m.onnx", IMAGES, head=head(4, rows=18))
    np.savez(tmp_path / "e.npz", pixel_values=np.zeros((0, 2, 3, 3), np.float32), label=np.zeros(0, int))
    refuse(model, "--task", "image-classification", "--data", tmp_path / "e.npz", needles=("e.npz' is empty",))


def test_arrays_that_do_not_fit(refuse: Refuse, tmp_path: Path) -> None:
    model = make(tmp_path / "m.onnx", IMAGES, head=head(4, rows=18))
    common = (model, "--task", "image-classification", "--data")
    np.savez(tmp_path / "a.npz", allow_pickle=False, **images(tmp_path, depth=np.zeros(21)))
    refuse(*common, tmp_path / "a.npz", needles=("lacks the inputs 'pixel_values'",))
    np.savez(tmp_path / "a.npz", pixel_values=np.zeros((3, 2, 3, 4), np.float32), label=np.zeros(3, int))
    refuse(*common, tmp_path / "a.npz", needles=("has the shape [3, 2, 3, 4]", "needs"))
    np.savez(tmp_path / "a.npz", pixel_values=np.zeros((3, 2, 3, 3), np.float32), label=np.zeros(2, int))
    refuse(*common, tmp_path / "a.npz", needles=("different numbers of samples",))
    np.savez(tmp_path / "a.npz", pixel_values=np.full((3, 2, 3, 3), np.nan, np.float32), label=np.zeros(3, int))
    refuse(*common, tmp_path / "a.npz", needles=("NaN",))


def test_splits(
    refuse: Refuse,
    labelled: tuple[Path, Path, Path],
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "the cat", "label": 0}])
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "set"))
    capsys.readouterr()  # bars
    common = (labelled[0], "--task", "classification", "--tokenizer", tokenizer, "--data", tmp_path / "set")
    refuse(*common, "--split", "dev", needles=("no split 'dev'", "it has 'train'"))
    refuse(*common, needles=("none of the splits 'validation'", "--split"))


def test_models_that_differ(refuse: Refuse, labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path) -> None:
    dense, _, data = labelled
    common = ("--task", "classification", "--data", data, "--tokenizer", tokenizer)
    refuse(
        dense, make(tmp_path / "d.onnx", DECODER, head=head(WORDS)), *common, needles=("different inputs", "attention_mask")
    )
    three = make(tmp_path / "three.onnx", CLASSIFIER, head=head(3))
    refuse(dense, three, *common, needles=("different numbers of classes", "'three.onnx' 3"))
    for name, labels in (("x", ["bad", "good"]), ("y", ["good", "bad"])):
        make(tmp_path / name / "model.onnx", CLASSIFIER, head=head(2))
        (tmp_path / name / "config.json").write_text(json.dumps({"id2label": dict(enumerate(labels))}))
    refuse(tmp_path / "x", tmp_path / "y", *common, needles=("different label maps", "'good', 'bad'"))
    narrow = make(tmp_path / "n.onnx", ENCODER.replace(f"s, {WIDTH}", "s, 3"), table=table()[:, :3].copy())
    wide = make(tmp_path / "w.onnx", ENCODER)
    refuse(wide, narrow, "--task", "embeddings", *common[2:], needles=("different widths", "'n.onnx' 3"))


def test_models_that_cannot_be_used(
    refuse: Refuse, labelled: tuple[Path, Path, Path], tokenizer: Path, tmp_path: Path
) -> None:
    dense, _, data = labelled
    common = ("--task", "classification", "--data", data, "--tokenizer", tokenizer)
    refuse(tmp_path / "no.onnx", *common, needles=("no.onnx' is not a file",))
    refuse(data, *common, needles=("cannot be read as ONNX",))
    refuse(tokenizer, *common, needles=("has no model.onnx",))
    small = make(tmp_path / "small.onnx", CLASSIFIER, head=head(2), table=table()[:6].copy())
    refuse(small, *common, needles=("token id", "has 6 rows"))
    refuse(make(tmp_path / "e.onnx", ENCODER), *common, needles=("no output of rank 2", "last_hidden_state"))
    broken = make(tmp_path / "nan.onnx", CLASSIFIER, head=np.full((WIDTH, 2), np.nan, np.float32))
    refuse(broken, *common, needles=("'logits' of model 'nan.onnx' has NaN",))
    refuse(dense, *common, "--output-name", "scores", needles=("no output 'scores'", "'logits'"))
    (tmp_path / "config.json").write_text("[]")
    refuse(dense, *common, needles=("config.json', which names the classes",))


def test_perplexity_of_too_little(refuse: Refuse, tmp_path: Path) -> None:
    folder = words.plain_tokenizer(tmp_path / "tokenizer")
    model = make(tmp_path / "m.onnx", DECODER, head=head(WORDS))
    (tmp_path / "set.txt").write_text("the cat sat on a mat")
    common = (model, "--task", "perplexity", "--data", tmp_path / "set.txt", "--tokenizer", folder)
    refuse(*common, needles=("windows of 128: not taken, the text has 6 tokens", "smaller --window"))
    refuse(*common, "--window", 7, needles=("--window is 7", "6 tokens"))
    refuse(*common, "--window", 1, needles=("--window is 1", "at least 2"))


def test_places_of_the_report(
    labelled: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, _, data = labelled
    assert run(dense, "--task", "classification", "--data", data, "--report", data) == 2
    assert "reads or writes as well" in capsys.readouterr().err


def test_the_harness_is_not_installed(
    refuse: Refuse, labelled: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "lm_eval", raising=False)
    refuse(labelled[0], "--task", "lm-eval:hellaswag", needles=("pip install lm-eval",))
