"""Evaluation sets: splits, columns and labels as published sets have them. No network: the hub is a stub."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.evaluation_data import (
    Table,
    class_labels,
    label_column,
    number_labels,
    questions,
    read_table,
    text_columns,
    texts,
)

GLUE = {
    "cola": (["sentence", "label", "idx"], ("sentence", None)),
    "mrpc": (["sentence1", "sentence2", "label", "idx"], ("sentence1", "sentence2")),
    "qqp": (["question1", "question2", "label", "idx"], ("question1", "question2")),
    "mnli": (["premise", "hypothesis", "label", "idx"], ("premise", "hypothesis")),
    "qnli": (["question", "sentence", "label", "idx"], ("question", "sentence")),
    "wikitext": (["text"], ("text", None)),
}


def table(**columns: list[Any]) -> Table:
    return Table(columns, np.arange(len(next(iter(columns.values())))), "a set", "the set")


def refuse(needle: str, call: Any, *arguments: Any) -> None:
    with pytest.raises(OptionError) as caught:
        call(*arguments)
    assert needle in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GLUE)
def test_columns_of_published_sets(name: str) -> None:
    columns, wanted = GLUE[name]
    assert text_columns(table(**{c: ["x"] for c in columns}), None, None) == wanted


def test_columns_that_are_named() -> None:
    two = table(title=["x"], body=["y"], label=[0])
    assert text_columns(two, "body", None) == ("body", None)
    assert text_columns(two, "body", "title") == ("body", "title")
    assert text_columns(table(anything=["x"], label=[0]), None, None) == ("anything", None)
    refuse("does not say which column is text", text_columns, two, None, None)
    refuse("no column 'head'", text_columns, two, "head", None)


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, str | None]] = []
    rows = {"sentence": ["a", "b"], "label": [1, 0]}
    splits = {name: datasets.Dataset.from_dict(rows) for name in ("train", "validation_matched", "test")}

    def load(path: str, name: str | None) -> Any:
        asked.append((path, name))
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_table("glue:mnli", None, ("validation", "validation_matched", "test"))
    assert found.source == "glue:mnli (validation_matched)"
    assert texts(found, "sentence") == ["a", "b"]
    assert read_table("glue:mnli:test", None, ()).source == "glue:mnli:test (test)"
    assert read_table("owner/set", "train", ()).source == "owner/set (train)"
    assert asked == [("glue", "mnli"), ("glue", "mnli"), ("owner/set", None)]
    refuse("give one of them", read_table, "glue:mnli:test", "train", ())
    refuse("no split 'dev'; it has 'train', 'validation_matched', 'test'", read_table, "glue:mnli", "dev", ())


def test_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(path: str, name: str | None) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    refuse("no dataset of that name could be loaded (no route)", read_table, "glue:sst2", None, ())


def test_rows_that_lack_a_column(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    refuse("line 2 of evaluation data", read_table, tmp_path / "s.jsonl", None, ())
    (tmp_path / "s.csv").write_text("text,label\na,1\nb\n")
    refuse("lacks the columns 'label'", read_table, tmp_path / "s.csv", None, ())


def test_lines_of_one_text(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("one\n\n two\n")
    assert texts(read_table(tmp_path / "s.txt", None, ()), "text") == ["one", " two"]
    whole = read_table(tmp_path / "s.txt", None, (), whole=True)
    assert whole.separator.join(texts(whole, "text")) == "one\n\n two"


def test_samples_are_drawn_with_the_seed() -> None:
    whole = table(text=[str(i) for i in range(50)])
    first, again, other = (texts(whole.drawn(7, seed), "text") for seed in (1, 1, 2))
    assert first == again != other
    assert first == sorted(first, key=int)
    assert len(set(first)) == 7
    assert texts(whole.drawn(99, 0), "text") == texts(whole, "text")


def test_classes_by_number_and_by_name() -> None:
    assert class_labels(table(label=[1, 0, True]), "label", None).tolist() == [1, 0, 1]
    assert class_labels(table(label=["1", "0.0"]), "label", None).tolist() == [1, 0]
    named = table(label=["Not Entailment", "entailment"])
    assert class_labels(named, "label", ("entailment", "not_entailment")).tolist() == [1, 0]
    ordered = Table({"label": [0, 2]}, np.arange(2), "a set", "the set", {"label": ("yes", "maybe", "no")})
    assert class_labels(ordered, "label", ("no", "maybe", "yes")).tolist() == [2, 0]
    assert class_labels(ordered, "label", ("other", "names", "here")).tolist() == [0, 2]
    assert class_labels(ordered, "label", None).tolist() == [0, 2]


def test_labels_that_do_not_fit() -> None:
    refuse("3.5, which are no classes", class_labels, table(label=[1, 3.5]), "label", None)
    refuse("hides the true one", class_labels, table(label=[-1, -1]), "label", None)
    refuse("'odd'", class_labels, table(label=["yes", "odd"]), "label", ("yes", "no"))
    refuse("'None'", class_labels, table(label=[1, None]), "label", None)
    refuse("'nan', which is no number", number_labels, table(label=[1.0, float("nan")]), "label")
    refuse("nothing correlates", number_labels, table(label=[2, 2]), "label")
    refuse("no column of labels", label_column, table(text=["x"]), None)
    assert label_column(table(text=["x"], stars=[1]), "stars") == "stars"


def test_questions() -> None:
    answers: list[Any] = [{"text": ["a", "b"], "answer_start": [0, 1]}, {"text": [], "answer_start": []}, "c", ["d"], ""]
    found = questions(table(question=[" q"] * 5, context=["x"] * 5, answers=answers))
    assert [q.answers for q in found] == [("a", "b"), (), ("c",), ("d",), ()]
    assert found[0].question == "q"
    refuse("no texts in column 'answers'", questions, table(question=["q"], context=["x"], answers=[{"text": [3]}]))
    refuse("no column 'context'", questions, table(question=["q"], answers=["a"]))


def test_json_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": "\ud800 lone"}) + "\n")
    assert texts(read_table(tmp_path / "s.jsonl", None, ()), "text") == ["? lone"]
