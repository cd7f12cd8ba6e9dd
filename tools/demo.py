"""The demo's measure: how far the sentence embeddings of a pruned all-MiniLM-L6-v2 turn from those of the dense model.

An embedding is the mean of ``last_hidden_state`` over the real tokens, as sentence-transformers takes it. Calibration
and evaluation sentences come from different sources (editorials, film reviews), so nothing is measured on what was fitted.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.sessions import Session
from liar_opt.tools.demo_assets import MINILM_INPUTS, MINILM_OUTPUT

LONGEST = 256
BATCH = 32


def tokenise(texts: Sequence[str], folder: Path) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]]:
    """Yields batches of like length: the positions of the texts, and the feeds, [b, s] each."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    encoded = [e.ids for e in tokenizer.encode_batch(list(texts))]
    order = np.argsort([len(ids) for ids in encoded], kind="stable")
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        ids = np.zeros((len(rows), max(len(encoded[row]) for row in rows)), np.int64)  # 0 is [PAD] of BERT
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(encoded[row])] = encoded[row]
            mask[index, : len(encoded[row])] = 1
        yield rows.astype(np.int64), dict(zip(MINILM_INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))


def embedding_cosines(
    dense: Path,
    pruned: Path,
    texts: Sequence[str],
    tokenizer: Path,
    device: Literal["cpu", "cuda"] = "cpu",
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> NDArray[np.float64]:
    """Returns the cosine between the two models' embeddings of each text, [n]."""
    sessions = [Session(path.read_bytes(), device) for path in (dense, pruned)]
    cosines = np.empty(len(texts))
    batches = -(-len(texts) // BATCH)
    for done, (rows, feeds) in enumerate(tokenise(texts, tokenizer)):
        x, y = (_pool(s.run(feeds, [MINILM_OUTPUT], arrays=True)[MINILM_OUTPUT], feeds) for s in sessions)
        cosines[rows] = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
        progress("evaluate", done + 1, batches)
    return cosines


def _pool(hidden: NDArray[Any], feeds: dict[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    mask = feeds["attention_mask"][..., None]
    pooled: NDArray[np.float64] = (hidden.astype(np.float64) * mask).sum(1) / mask.sum(1)  # [b, s, d] -> [b, d]
    return pooled
