"""What perplexity is made of: exp of the mean negative log likelihood of each token given those before it in its window."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


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
