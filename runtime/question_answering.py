"""Answers in a text: windows over a question and its context, and the best span of them (Devlin et al. 2018, section 4.2).

A context that is longer than the model takes is read in windows that overlap by :data:`STRIDE` tokens. A span goes from
a token i to a token j >= i of the context, is at most :data:`SPAN` tokens long, and scores start[i] + end[j]; the best
span of all windows is the answer. Where a set has questions without an answer, "none" scores start[0] + end[0] (the least
of all windows), and is the answer if no span scores more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.evaluation_data import Question
from liar_opt.runtime.signatures import one_line

Array = NDArray[Any]
ANSWER_TOKENS = 384
"""Tokens of a window at most."""
STRIDE = 128
SPAN = 30
BEST = 20
"""Starts and ends that are tried, the best first."""


@dataclass(frozen=True)
class Window:
    """A question and a piece of its context.

    Attributes:
        question: its place in the set.
        ids: token ids.
        types: type ids.
        offsets: begin and end of each token in the context, [s, 2]; -1 where it is not of the context.
    """

    question: int
    ids: list[int]
    types: list[int]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """The best span of a window, as characters of the context, and what "none" scores."""

    score: float
    begin: int
    end: int
    none: float


class SpanTokenizer:
    """A tokenizer that says which characters a token stands for.

    Args:
        folder: with a tokenizer.json in it, or with files from which transformers makes one.
        longest: tokens of a window.

    Raises:
        OptionError: there is no such tokenizer.
    """

    def __init__(self, folder: str | Path, longest: int) -> None:
        from tokenizers import Tokenizer

        path = Path(folder)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise OptionError(
                f"tokenizer '{folder}' has no tokenizer.json, which says where the tokens are; save a fast one"
            )
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._longest = longest

    def windows(self, place: int, question: Question) -> Iterator[Window]:
        """Yields the windows of a question.

        Raises:
            OptionError: the question leaves no room for its context.
        """
        alone = len(self._tokenizer.encode(question.question, "").ids)
        room = self._longest - alone
        if room < 2:
            raise OptionError(
                f"question {place} of the evaluation set has {alone} tokens, a window {self._longest}; give a larger "
                "--sequence-length or leave it out"
            )
        try:
            self._tokenizer.enable_truncation(self._longest, stride=min(STRIDE, room // 2), strategy="only_second")
            first = self._tokenizer.encode(question.question, question.context)
        except Exception as err:  # `tokenizers` raises bare Exception
            raise OptionError(f"question {place} of the evaluation set cannot be tokenised ({one_line(err)})") from err
        finally:
            self._tokenizer.no_truncation()
        for piece in [first, *first.overflowing]:
            inside = np.array([s == 1 for s in piece.sequence_ids])
            offsets = np.where(inside[:, None], np.array(piece.offsets, np.int64), -1)
            yield Window(place, piece.ids, piece.type_ids, offsets)


def window_answers(window: Window, start: Array, end: Array) -> Answers:
    """Returns the best span of a window; start and end are the logits of its tokens, [s]."""
    inside = window.offsets[:, 0] >= 0
    begins, ends = (np.where(inside, logits, -np.inf) for logits in (start, end))
    i, j = (np.argsort(-logits, kind="stable")[:BEST] for logits in (begins, ends))
    scores = begins[i][:, None] + ends[j][None, :]
    length = j[None, :] - i[:, None] + 1
    scores = np.where((length >= 1) & (length <= SPAN), scores, -np.inf)
    row, column = np.unravel_index(int(scores.argmax()), scores.shape)
    span = int(window.offsets[i[row], 0]), int(window.offsets[j[column], 1])
    return Answers(float(scores[row, column]), *span, float(start[0] + end[0]))


def best_answer(windows: Sequence[Answers], context: str, with_null: bool) -> str:
    """Returns the answer to a question from those of its windows; the empty string means none."""
    best = max(windows, key=lambda a: a.score)
    if not np.isfinite(best.score) or (with_null and min(a.none for a in windows) > best.score):
        return ""
    return context[best.begin : best.end]
