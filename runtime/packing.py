"""Packing: texts for causal models, in full windows.

The token lists of all texts are written behind each other, with one separator between two texts, and the stream is
cut every `window` tokens. So nothing is padded, every token is used once, and text meets text only over a separator.
A window may begin in the middle of a text: so will the windows that the model sees in use.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PACKED_TOKENS = 4096
"""Tokens of a packed batch at most: the logits of a decoder are some hundred times wider than its other activations."""
FOLDS = 10
"""Packed windows come in at least so many batches, where there are as many: one in ten is held back to choose the ridge."""


def pack(texts: Sequence[Sequence[int]], window: int, separator: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Writes texts behind each other and cuts the stream into windows.

    Args:
        texts: token ids of each text.
        window: tokens of a window.
        separator: written between two texts; None where each text begins or ends with a special token of its own.

    Returns:
        The full windows [n, window], and what is left behind the last of them, [fewer than window].
    """
    parts: list[NDArray[np.int64]] = []
    for text in filter(len, texts):
        if parts and separator is not None:
            parts.append(np.array([separator], dtype=np.int64))
        parts.append(np.asarray(text, dtype=np.int64))
    stream = np.concatenate([*parts, np.empty(0, dtype=np.int64)])
    full = len(stream) // window * window
    return stream[:full].reshape(-1, window), stream[full:]


def packed_rows(windows: int, window: int, most: int) -> int:
    """Returns windows a batch: few enough that some batches can be held back, and that the logits fit into memory.

    Args:
        windows: how many there are.
        window: tokens of each.
        most: windows a batch, at most.
    """
    return max(1, min(most, PACKED_TOKENS // window, windows // FOLDS))
