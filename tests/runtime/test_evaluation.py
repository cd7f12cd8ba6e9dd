"""Evaluation as a function: static shapes, no mask, padding. The tasks are in tests/tools/test_eval_command.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
import words

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.runtime import metrics
from liar_opt.runtime.evaluation import evaluate
from liar_opt.runtime.evaluation_data import Table
from liar_opt.runtime.evaluation_feeds import Candidate, EvaluationOptions
from liar_opt.runtime.sessions import Session

WIDTH, VOCABULARY = 5, 40
IDS = "int64[{b}, {s}]"
MASKED = f"e ({IDS} input_ids, {IDS} attention_mask) => (float[{{b}}, {{s}}, 5] y) {{{{ y = Gather(table, input_ids) }}}}"
UNMASKED = "e (int64[{b}, {s}] input_ids) => (float[{b}, {s}, 5] y) {{ y = Gather(table, input_ids) }}"


def candidate(text: str, seed: int) -> Candidate:
    proto = graphs.parse(text, {"table": (VOCABULARY, WIDTH)}, seed=seed)
    return Candidate(str(seed), Session(proto.SerializeToString()), OnnxModel.from_proto(proto).inputs())


def embeddings(sentences: list[str], seed: int) -> np.ndarray:
    table = np.random.default_rng(seed).standard_normal((VOCABULARY, WIDTH)).astype(np.float32).astype(np.float64)
    known = {w: i for i, w in enumerate(dict.fromkeys(["[SEP]", "[CLS]", "[UNK]", "[PAD]", *words.WORDS]))}
    return np.stack([table[[words.CLS, *(known[w] for w in s.split()), words.SEP]].mean(0) for s in sentences])


def sentences(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words.WORDS, rng.integers(1, 9))) for _ in range(count)]


@pytest.mark.parametrize(("b", "s"), [("b", "s"), (4, "s"), ("b", 12), (4, 12)])
@pytest.mark.parametrize("left", [False, True])
def test_static_shapes_and_padding_change_nothing(tmp_path: Path, b: object, s: object, left: bool) -> None:
    folder = words.save_tokenizer(tmp_path / "tokenizer", left=left)
    given = sentences(11)
    models = [candidate(MASKED.format(b=b, s=s), seed) for seed in (1, 2)]
    options = EvaluationOptions(tokenizer=folder, batch_size=3, resamples=20)
    table = Table({"text": given}, np.arange(11), "a set", "the set")
    found, feeds = evaluate("embeddings", models, table, options, lambda stage, done, total: None)
    wanted = metrics.cosines(embeddings(given, 2), embeddings(given, 1)).mean()
    assert found["metrics"]["cosine"]["values"] == pytest.approx([1.0, wanted], abs=1e-5)
    assert len(feeds) == 2
    assert found["source"] == "a set, 11 samples"
    assert found["metrics"]["overlap@10"]["samples"] == 11


def test_without_a_mask_no_text_is_padded(tmp_path: Path) -> None:
    folder = words.save_tokenizer(tmp_path / "tokenizer")
    given = sentences(15)
    models = [candidate(UNMASKED.format(b="b", s="s"), seed) for seed in (1, 2)]
    table = Table({"text": given}, np.arange(15), "a set", "the set")
    seen: list[np.ndarray] = []
    models[0].session.run = watched(models[0].session.run, seen)  # type: ignore[method-assign]
    options = EvaluationOptions(tokenizer=folder, metrics=("cosine",), resamples=20)
    found, _ = evaluate("embeddings", models, table, options, lambda stage, done, total: None)
    wanted = metrics.cosines(embeddings(given, 2), embeddings(given, 1)).mean()
    assert found["metrics"]["cosine"]["values"] == pytest.approx([1.0, wanted], abs=1e-5)
    assert list(found["metrics"]) == ["cosine"]
    assert seen
    assert not any((ids == words.PAD).any() for ids in seen)


def watched(run: Callable[..., Any], seen: list[np.ndarray]) -> Callable[..., Any]:
    def watch(feed, *arguments, **options):  # type: ignore[no-untyped-def]
        seen.append(feed["input_ids"])
        return run(feed, *arguments, **options)

    return watch


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    folder = words.save_tokenizer(tmp_path / "tokenizer")
    steps: list[tuple[int, int]] = []
    models = [candidate(MASKED.format(b="b", s="s"), seed) for seed in (1, 2)]
    table = Table({"text": sentences(5)}, np.arange(5), "a set", "the set")
    options = EvaluationOptions(tokenizer=folder, batch_size=2, resamples=5)
    found, _ = evaluate("embeddings", models, table, options, lambda stage, done, total: steps.append((done, total)))
    assert steps[-1] == (10, 10)
    assert steps == sorted(steps)
    assert found["notes"] == ["overlap@4: the set has no more other samples"]
