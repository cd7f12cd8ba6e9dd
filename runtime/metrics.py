"""Metrics of an evaluation: arrays in, one number out.

Conventions, where others differ:

- F1 of a class without a single hit, MCC of a confusion matrix with an empty margin, and a correlation with scores that
  are all alike are 0, not undefined: a model that says always the same has earned nothing.
- Spearman's ranks are averaged over ties. Pearson of the ranks is Spearman, ties or not.
- Answers are compared as the SQuAD scripts do (Rajpurkar et al. 2016, 1606.05250): lower case, no punctuation, no
  articles, single blanks; of several gold answers the best counts.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

Array = NDArray[Any]


def accuracy(predicted: Array, wanted: Array) -> float:
    """Returns the share of samples that are right."""
    return float(np.mean(predicted == wanted))


def confusion(predicted: Array, wanted: Array, classes: int) -> NDArray[np.int64]:
    """Returns how often class i (row) was called j (column), [classes, classes]."""
    flat = np.bincount(np.asarray(wanted) * classes + np.asarray(predicted), minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.int64)


def f1_scores(table: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns F1 of each class of a confusion matrix, [classes]."""
    hits, margins = np.diag(table), table.sum(0) + table.sum(1)
    scores: NDArray[np.float64] = 2 * hits / np.maximum(margins, 1)
    return scores


def f1_binary(predicted: Array, wanted: Array, positive: int = 1) -> float:
    """Returns F1 of the positive one of two classes."""
    return float(f1_scores(confusion(predicted, wanted, 2))[positive])


def f1_macro(predicted: Array, wanted: Array, classes: int) -> float:
    """Returns the mean F1 of the classes that are labels or predictions of at least one sample."""
    table = confusion(predicted, wanted, classes)
    return float(f1_scores(table)[(table.sum(0) + table.sum(1)) > 0].mean())


def matthews(predicted: Array, wanted: Array, classes: int) -> float:
    """Returns Matthews' correlation coefficient, for any number of classes (Gorodkin 2004)."""
    table = confusion(predicted, wanted, classes).astype(np.float64)
    total, hits, said, true = table.sum(), np.trace(table), table.sum(0), table.sum(1)
    scale = np.sqrt((total**2 - said @ said) * (total**2 - true @ true))
    return float((hits * total - said @ true) / scale) if scale > 0 else 0.0


def pearson(scores: Array, wanted: Array) -> float:
    """Returns the correlation."""
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (scores, wanted))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else 0.0


def spearman(scores: Array, wanted: Array) -> float:
    """Returns the correlation of the ranks."""
    from scipy.stats import rankdata

    return pearson(rankdata(scores), rankdata(wanted))


def cosines(x: Array, y: Array) -> NDArray[np.float64]:
    """Returns the cosine of each row of x with that of y, [n]; 0 where one of the two is zero."""
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    products = np.einsum("nd,nd->n", np.asarray(x, np.float64), np.asarray(y, np.float64))
    found: NDArray[np.float64] = np.divide(products, norms, out=np.zeros(len(norms)), where=norms > 0)
    return found


def divergences(wanted: Array, found: Array) -> NDArray[np.float64]:
    """Returns the Kullback-Leibler divergence of the softmax of each row from that of the wanted one, [n], in nats.

    Args:
        wanted: logits, [n, classes].
        found: logits, [n, classes].
    """
    p, q = (z - logsumexp(z, axis=1, keepdims=True) for z in (wanted.astype(np.float64), found.astype(np.float64)))
    told: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=1)
    return np.maximum(told, 0.0)


def neighbours(vectors: Array, k: int) -> NDArray[np.int64]:
    """Returns the k nearest others of each row by cosine, [n, k], in no order."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    found = np.empty((len(unit), k), np.int64)
    for start in range(0, len(unit), 1024):  # a block of rows at a time: all pairs may be gigabytes
        near = unit[start : start + 1024] @ unit.T
        near[np.arange(len(near)), np.arange(start, start + len(near))] = -np.inf
        found[start : start + 1024] = np.argpartition(-near, k - 1, axis=1)[:, :k]
    return found


def overlap(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the share of each row's neighbours that are in the other's row, [n]; both [n, k]."""
    shares: NDArray[np.float64] = (found[:, :, None] == wanted[:, None, :]).any(2).mean(1)
    return shares


def normal_answer(text: str) -> str:
    """Returns an answer as the SQuAD scripts compare it."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, gold: Sequence[str]) -> float:
    """Returns 1 where the answer is one of the gold answers; none at all is answered by the empty string."""
    return float(any(normal_answer(answer) == normal_answer(g) for g in gold or ("",)))


def answer_f1(answer: str, gold: Sequence[str]) -> float:
    """Returns F1 of the words of the answer with those of the nearest gold answer."""
    return max(_words_f1(normal_answer(answer).split(), normal_answer(g).split()) for g in gold or ("",))


def _words_f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))
