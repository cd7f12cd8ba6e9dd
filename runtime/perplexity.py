"""Perplexity of a decoder: exp of the mean negative log likelihood of each token given those before it in its window.

    ppl = exp( -1/N sum_w sum_t log p(x_t | x_<t) )        t from the second token of a window on

Windows are independent: the first token of each is given, not predicted, so windows of s tokens count s - 1 predictions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import OptionError

Array = NDArray[Any]


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes:
        value: exp(nats).
        nats: mean negative log likelihood of a predicted token.
        tokens: predicted tokens.
    """

    value: float
    nats: float
    tokens: int


def perplexity(
    logits: Callable[[Mapping[str, Array]], Array],
    batches: Iterable[Mapping[str, Array]],
    masks: Iterable[NDArray[np.bool_] | None],
    ids: str = "input_ids",
) -> Perplexity:
    """Measures the perplexity of a model.

    Args:
        logits: runs the model on one feed and returns [b, s, vocabulary].
        batches: feeds, as ``CalibrationData`` has them.
        masks: for each feed its real tokens [b, s], or None where all are.
        ids: the input that holds the tokens [b, s].

    Raises:
        OptionError: no window has two tokens, or the model gives NaN or Inf.
    """
    total, count = 0.0, 0
    for feed, mask in zip(batches, masks, strict=True):
        tokens = np.asarray(feed[ids])[:, 1:]
        losses = negative_log_likelihood(logits(feed)[:, :-1], tokens)
        counted = np.ones(tokens.shape, np.bool_) if mask is None else mask[:, 1:] & mask[:, :-1]
        total += float(losses[counted].sum())
        count += int(counted.sum())
    if count == 0:
        raise OptionError("perplexity needs windows of at least two tokens; give a longer text or sequence length")
    if not np.isfinite(total):
        raise OptionError("the model gives NaN or Inf on the text; its perplexity is not a number")
    return Perplexity(float(np.exp(total / count)), total / count, count)


def negative_log_likelihood(logits: Array, tokens: Array) -> NDArray[np.float64]:
    """Returns -log softmax(logits)[token], [b, s], for logits [b, s, v] and tokens [b, s].

    A row of logits at a time is taken to float64: all of them would be gigabytes.
    """
    losses = np.empty(tokens.shape)
    for row, (scores, wanted) in enumerate(zip(logits, tokens, strict=True)):
        scores = np.asarray(scores, dtype=np.float32)
        highest = scores.max(-1, keepdims=True)
        sums = np.exp(scores - highest).sum(-1, dtype=np.float64)
        losses[row] = np.log(sums) + highest[:, 0] - np.take_along_axis(scores, wanted[:, None], -1)[:, 0]
    return losses
