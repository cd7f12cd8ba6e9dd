"""Spans: windows over long contexts, the best span of them, and questions without an answer."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import words

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.evaluation_data import Question
from liar_opt.runtime.question_answering import SPAN, Answers, SpanTokenizer, Window, best_answer, window_answers

CONTEXT = " ".join(words.WORDS[i % 17] for i in range(60))


@pytest.fixture
def spans(tmp_path: Path) -> SpanTokenizer:
    return SpanTokenizer(words.save_tokenizer(tmp_path / "tokenizer"), 16)


def test_windows_cover_the_context_and_overlap(spans: SpanTokenizer) -> None:
    windows = list(spans.windows(3, Question("the cat", CONTEXT, ())))
    assert {w.question for w in windows} == {3}
    assert all(len(w.ids) == len(w.types) == len(w.offsets) <= 16 for w in windows)
    seen: list[set[tuple[int, int]]] = []
    for window in windows:
        assert (window.offsets[:4] == -1).all()  # [CLS] the cat [SEP]
        assert (window.offsets[-1] == -1).all()
        inside = window.offsets[window.offsets[:, 0] >= 0]
        assert [CONTEXT[b:e] for b, e in inside.tolist()] == [CONTEXT[b:e] for b, e in sorted(inside.tolist())]
        seen.append({(b, e) for b, e in inside.tolist()})
    assert all(first & second for first, second in itertools.pairwise(seen))
    assert sorted(CONTEXT[b:e] for b, e in set.union(*seen)) == sorted(CONTEXT.split())


def test_a_question_that_fills_the_window(spans: SpanTokenizer) -> None:
    with pytest.raises(OptionError, match="question 5 of the evaluation set has 17 tokens, a window 16"):
        next(spans.windows(5, Question(" ".join(words.WORDS[:14]), CONTEXT, ())))


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"has no tokenizer\.json"):
        SpanTokenizer(tmp_path, 16)


def window(tokens: int, before: int = 2) -> Window:
    offsets = np.array([[-1, -1]] * before + [[2 * i, 2 * i + 1] for i in range(tokens)])
    return Window(0, [0] * len(offsets), [0] * len(offsets), offsets)


def logits(size: int, **high: float) -> np.ndarray:
    found = np.zeros(size)
    for place, value in high.items():
        found[int(place[1:])] = value
    return found


def test_the_best_span() -> None:
    found = window_answers(window(10), logits(12, _3=4, _8=3), logits(12, _5=2, _9=4))
    assert (found.begin, found.end, found.score) == (2, 15, 8.0)


def test_a_span_does_not_end_before_it_begins_nor_in_the_question() -> None:
    found = window_answers(window(10), logits(12, _8=5, _1=9), logits(12, _3=5, _0=9))
    assert found.begin <= found.end
    assert found.score == 5.0
    assert found.none == 9.0


def test_a_span_is_not_too_long() -> None:
    found = window_answers(window(50), logits(52, _2=5), logits(52, _40=5, _20=1))
    assert (found.begin, found.end) == (0, 2 * 18 + 1)
    assert 40 - 2 + 1 > SPAN


def test_windows_are_compared_and_none_is_an_answer() -> None:
    windows = [Answers(3.0, 0, 3, 5.0), Answers(4.0, 4, 7, 3.5)]
    assert best_answer(windows, "the cat sat", with_null=False) == "cat"
    assert best_answer(windows, "the cat sat", with_null=True) == "cat"  # the least of "none" is 3.5
    assert best_answer([Answers(3.0, 0, 3, 5.0)], "the cat sat", with_null=True) == ""
    assert best_answer([Answers(3.0, 0, 3, 5.0)], "the cat sat", with_null=False) == "the"
