"""What the benchmark of Whisper takes for granted: the word error rate, and greedy decoding."""

from collections.abc import Sequence

import pytest

from liar_opt.tools.dev.subjects.whisper_tiny import END, PROMPT, word_errors, words, write


def test_words_have_no_case_no_punctuation_and_no_single_digits() -> None:
    assert words("Press 1, or 42: the add-on isn't THERE.") == "press one or 42 the add on isn't there".split()


@pytest.mark.parametrize(
    ("heard", "errors"),
    [
        ("press the pound key", 0),
        ("press the round key", 1),  # substitution
        ("press pound key", 1),  # deletion
        ("press the the pound key", 1),  # insertion
        ("the round key now", 3),  # one of each
        ("", 4),
    ],
)
def test_word_errors_are_substitutions_deletions_and_insertions(heard: str, errors: int) -> None:
    assert word_errors("press the pound key".split(), heard.split()) == errors


@pytest.mark.parametrize("draft", [(), (5, 10, 20), (4, 8, 16, 32, 64), (4, 9, END, 7), (1, 2, 3, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize(("limit", "expected"), [(9, [4, 8, 16, 32]), (3, [4, 8, 16])])
def test_writing_is_greedy_decoding_whatever_the_draft(draft: Sequence[int], limit: int, expected: list[int]) -> None:
    def choose(ids: Sequence[int]) -> list[int]:  # the sentence 4, 8, 16, 32; nonsense after a wrong token
        before = [list(ids[len(PROMPT) : end]) for end in range(1, len(ids) + 1)]
        sentence = [4, 8, 16, 32, END]
        return [sentence[len(b)] if b == sentence[:4][: len(b)] and len(b) < 5 else sum(b) for b in before]

    assert write(choose, limit, draft) == expected
