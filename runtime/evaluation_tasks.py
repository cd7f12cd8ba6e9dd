"""The tasks of an evaluation: from an evaluation set to outcomes.

Perplexity has two conventions that differ by a factor of two, and a number is worth nothing without its own: windows of
2,048 tokens without overlap (SliceGPT, GRAIL) and windows of 128 (LLM-Pruner, FLAP). In both the rows of the set are joined
by a blank line, tokenised as one text, and cut; what is left behind the last full window is not used. They are metrics
with names of their own and are never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime import metrics
from liar_opt.runtime.bootstrap import Statistic, mean_of
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.evaluation_data import class_labels, label_column, number_labels, questions, text_columns, texts
from liar_opt.runtime.evaluation_feeds import (
    Array,
    Feed,
    Run,
    check_vocabulary,
    collect,
    encoded_feeds,
    feeds_of,
    longest_text,
    of_rank,
    text_feeds,
    tokenizer_of,
)
from liar_opt.runtime.packing import pack, packed_rows
from liar_opt.runtime.perplexity import negative_log_likelihood
from liar_opt.runtime.question_answering import ANSWER_TOKENS, SpanTokenizer, best_answer, window_answers
from liar_opt.runtime.signatures import is_float, names

LONG_WINDOW, SHORT_WINDOW = 2048, 128
LABELLED = ("validation", "validation_matched", "dev", "test")
UNLABELLED = ("test", "validation", "validation_matched", "dev", "train")
"""Splits to take where none is named: GLUE hides the labels of its test sets, perplexity is reported on them."""
FAITHFULNESS = ("agreement", "divergence")
"""Metrics of a classifier beside the first model, which need no labels."""


@dataclass(frozen=True)
class Outcome:
    """One metric of all models.

    Attributes:
        samples: What is resampled.
        unit: What a sample is.
        of: For each model the metric as a function of rows.
    """

    samples: int
    unit: str
    of: list[Statistic]


def _samplewise(values: Sequence[Sequence[float] | Array], unit: str) -> Outcome:
    """A metric that is a mean over samples."""
    return Outcome(len(values[0]), unit, [mean_of(np.asarray(v, np.float64)) for v in values])


def _against(labels: Array, said: Sequence[Array], metric: Callable[[Array, Array], float]) -> Outcome:
    """A metric that compares what each model says with the labels."""

    def statistic(values: Array) -> Statistic:
        return lambda rows: metric(values[rows], labels[rows])

    return Outcome(len(labels), "sample", [statistic(values) for values in said])


# Labels ---------------------------------------------------------------------------------------------------------------


def _classification(run: Run) -> dict[str, Outcome]:
    """Accuracy, F1 and MCC of the highest logit, and how far the logits are from those of the first model."""
    logits, labels = _class_logits(run)
    if labels is None:
        return _faithfulness(logits)
    predicted, classes = [z.argmax(1) for z in logits], logits[0].shape[1]
    found = {"accuracy": _against(labels, predicted, metrics.accuracy)}
    if classes == 2:
        found["f1"] = _against(labels, predicted, metrics.f1_binary)
    found["f1-macro"] = _against(labels, predicted, lambda said, wanted: metrics.f1_macro(said, wanted, classes))
    found["mcc"] = _against(labels, predicted, lambda said, wanted: metrics.matthews(said, wanted, classes))
    return found | _faithfulness(logits)


def _image_classification(run: Run) -> dict[str, Outcome]:
    """The share of images whose highest logit is that of their label, and how far the logits are from the first model's."""
    logits, labels = _class_logits(run)
    if labels is None:
        return _faithfulness(logits, "image")
    right = [z.argmax(1) == labels for z in logits]
    return {"top-1": _samplewise(right, "image")} | _faithfulness(logits, "image")


def _faithfulness(logits: Sequence[Array], unit: str = "sample") -> dict[str, Outcome]:
    """What pruning does to a model, whatever the labels: its classes, and its probabilities, beside the first model's.

    Labels are few and many models that differ are as often right; the divergence of their outputs tells them apart.
    """
    if len(logits) == 1:
        return {}
    first = logits[0]
    classes = first.argmax(1)
    return {
        "agreement": _samplewise([z.argmax(1) == classes for z in logits], unit),
        "divergence": _samplewise([metrics.divergences(first, z) for z in logits], unit),
    }


def _class_logits(run: Run) -> tuple[list[Array], NDArray[np.int64] | None]:
    """The logits of each model, [n, classes], and the labels; None where no metric that was asked for needs them."""
    column, labels = "", None
    if not run.options.metrics or not set(run.options.metrics) <= set(FAITHFULNESS):
        column = label_column(run.table, run.options.label_column)
        class_names = next((c.class_names for c in run.candidates if c.class_names is not None), None)
        labels = class_labels(run.table, column, class_names)
    classes: dict[str, int] = {}
    choose_logits = of_rank(run, 2, "logits")

    def choose(outputs: Mapping[str, Array], model: str) -> list[str]:
        chosen = choose_logits(outputs, model)
        classes[model] = outputs[chosen[0]].shape[1]
        if classes[model] == 1:
            raise OptionError(f"model '{model}' gives one number a sample, which is no class; use --task regression")
        if len(set(classes.values())) > 1:
            found = ", ".join(f"'{name}' {count}" for name, count in classes.items())
            raise OptionError(f"the models have different numbers of classes ({found}); compare models with one label map")
        if labels is not None and labels.max() >= classes[model]:
            raise OptionError(
                f"column '{column}' of {run.table.where} has the label {labels.max()}, and model '{model}' has "
                f"{classes[model]} classes (from 0 on); give labels of its own"
            )
        return chosen

    count = len(run.table.rows)
    return [np.stack(z) for z in collect(run, feeds_of(run), count, choose, lambda outputs, _: list(outputs[0]))], labels


def _regression(run: Run) -> dict[str, Outcome]:
    """Correlation of the one number that a model gives with the label."""
    wanted = number_labels(run.table, label_column(run.table, run.options.label_column))

    def choose(outputs: Mapping[str, Array], model: str) -> list[str]:
        try:
            chosen = of_rank(run, 2, "logits")(outputs, model)
        except OptionError:  # [b] instead of [b, 1]
            chosen = of_rank(run, 1)(outputs, model)
        if outputs[chosen[0]].shape[1:] not in ((), (1,)):
            many = outputs[chosen[0]].shape[1]
            raise OptionError(
                f"model '{model}' gives {many} numbers a sample, not one: use --task classification, or --task sts for "
                "embeddings"
            )
        return chosen

    scores = collect(run, feeds_of(run), len(wanted), choose, lambda outputs, _: outputs[0].reshape(-1).tolist())
    return _correlations([np.asarray(s, np.float64) for s in scores], wanted)


def _correlations(scores: Sequence[NDArray[np.float64]], wanted: NDArray[np.float64]) -> dict[str, Outcome]:
    return {
        n: _against(wanted, scores, metric) for n, metric in (("pearson", metrics.pearson), ("spearman", metrics.spearman))
    }


# Embeddings -----------------------------------------------------------------------------------------------------------


def _sts(run: Run) -> dict[str, Outcome]:
    """Correlation of the cosine of two texts' embeddings with the label."""
    wanted = number_labels(run.table, label_column(run.table, run.options.label_column))
    first, second = text_columns(run.table, run.options.text_column, run.options.text_pair_column)
    if second is None:
        raise OptionError(f"task 'sts' compares two texts; name the second column of {run.table.where}: --text-pair-column")
    left, right = texts(run.table, first), texts(run.table, second)
    places = {text: index for index, text in enumerate(dict.fromkeys(left + right))}  # sets repeat their texts
    vectors = _embeddings(run, encoded_feeds(list(places), run), len(places))
    scores = [metrics.cosines(v[[places[t] for t in left]], v[[places[t] for t in right]]) for v in vectors]
    return _correlations(scores, wanted)


def _embed(run: Run) -> dict[str, Outcome]:
    """How far the embeddings turn from those of the first model, and how many of the nearest neighbours stay."""
    count = len(run.table.rows)
    reference, *others = vectors = _embeddings(run, feeds_of(run), count)
    if any(v.shape[1] != reference.shape[1] for v in others):
        widths = ", ".join(f"'{c.name}' {v.shape[1]}" for c, v in zip(run.candidates, vectors, strict=True))
        raise OptionError(f"the models give embeddings of different widths ({widths}); their cosine means nothing")
    found = {"cosine": _samplewise([metrics.cosines(v, reference) for v in vectors], "sample")}
    k = min(run.options.neighbours, count - 1)
    if k >= 1:
        if k < run.options.neighbours:
            run.notes.append(f"overlap@{k}: the set has no more other samples")
        near = [metrics.neighbours(v, k) for v in vectors]
        found[f"overlap@{k}"] = _samplewise([metrics.overlap(n, near[0]) for n in near], "query")
    return found


def _embeddings(run: Run, feeds: Any, count: int) -> list[NDArray[np.float64]]:
    """The mean of the last hidden state over the real tokens, or what the model has pooled itself; [n, d] a model."""
    pooled = of_rank(run, 2, "sentence_embedding", "text_embeds", "image_embeds", "embeddings")
    hidden = of_rank(run, 3, "last_hidden_state")

    def choose(outputs: Mapping[str, Array], model: str) -> list[str]:
        asked = run.options.output_name
        deep = any(v.ndim == 3 and is_float(v.dtype) for v in outputs.values())
        if asked is not None and asked in outputs:
            deep = outputs[asked].ndim == 3
        return (hidden if deep else pooled)(outputs, model)

    def reduce(outputs: list[Array], feed: Feed) -> Sequence[Any]:
        values = outputs[0].astype(np.float64)
        if values.ndim == 2:
            return list(values)
        real = feed.real[: len(values)]
        mask = real[..., None] if real.shape == values.shape[:2] else np.ones((*values.shape[:2], 1))
        return list((values * mask).sum(1) / np.maximum(mask.sum(1), 1))  # [b, s, d] -> [b, d]

    return [np.stack(v) for v in collect(run, feeds, count, choose, reduce)]


# Language -------------------------------------------------------------------------------------------------------------


def window_name(window: int) -> str:
    """Returns the name of the perplexity on windows of so many tokens: that of its convention."""
    return f"perplexity, windows of {window:,}" + (" without overlap" if window == LONG_WINDOW else "")


def _perplexity(run: Run) -> dict[str, Outcome]:
    """Perplexity of the whole set as one text, by the convention of each window."""
    column, pair = text_columns(run.table, run.options.text_column, run.options.text_pair_column)
    if pair is not None:
        raise OptionError(
            f"task 'perplexity' reads one text: name its column of {run.table.where} with --text-column alone"
        )
    tokenizer = tokenizer_of(run)
    text = run.table.separator.join(texts(run.table, column))
    (ids, _), *_ = tokenizer.encode([text], None)
    if not ids:
        raise OptionError(f"tokenizer '{run.options.tokenizer}' finds no token in {run.table.where}; is it the model's?")
    check_vocabulary(max(ids), run)
    longest = longest_text(tokenizer, run, LONG_WINDOW)
    found = {}
    for window in run.options.windows or (LONG_WINDOW, SHORT_WINDOW):
        limit = f"the text has {len(ids):,} tokens" if window > len(ids) else f"the model takes {longest:,} tokens"
        if window < 2 or window > min(len(ids), longest):
            if run.options.windows:
                raise OptionError(f"--window is {window}, and {limit}; give at least 2 and at most that")
            run.notes.append(f"{window_name(window)}: not taken, {limit}")
            continue
        found[window_name(window)] = _windows(run, ids, window)
    if not found:
        raise OptionError(f"{'; '.join(run.notes)}; give a smaller --window or more text")
    return found


def _windows(run: Run, ids: Sequence[int], window: int) -> Outcome:
    tokenizer = tokenizer_of(run)
    windows, _ = pack([ids], window, None)
    samples = run.options.samples
    if samples is not None and samples < len(windows):
        told = f"{samples:,} of {len(windows):,} windows drawn with seed {run.options.seed}"
        run.notes.append(f"{window_name(window)}: {told}")
        rng = np.random.default_rng(run.options.seed)
        windows = windows[np.sort(rng.choice(len(windows), samples, replace=False))]
    feeds = text_feeds(
        [(w.tolist(), [0] * window) for w in windows],
        tokenizer,
        run,
        packed_rows(len(windows), window, run.options.batch_size),
    )

    def reduce(outputs: list[Array], feed: Feed) -> Sequence[Any]:
        losses = negative_log_likelihood(outputs[0][:, :-1], windows[feed.rows][:, 1:])
        return list(losses.mean(1))

    losses = collect(run, feeds, len(windows), of_rank(run, 3, "logits"), reduce)
    return Outcome(len(windows), "window", [_exponential(mean_of(np.asarray(loss))) for loss in losses])


def _exponential(of: Statistic) -> Statistic:
    return lambda rows: float(np.exp(of(rows)))


def _question_answering(run: Run) -> dict[str, Outcome]:
    """Exact match and F1 of the best span, as the SQuAD scripts take them."""
    asked = questions(run.table)
    tokenizer = tokenizer_of(run)
    spans = SpanTokenizer(run.options.tokenizer or "", longest_text(tokenizer, run, ANSWER_TOKENS))
    windows = [window for index, question in enumerate(asked) for window in spans.windows(index, question)]
    check_vocabulary(max(max(w.ids) for w in windows), run)
    with_null = any(not q.answers for q in asked)

    def choose(outputs: Mapping[str, Array], model: str) -> list[str]:
        if {"start_logits", "end_logits"} <= set(outputs):
            return ["start_logits", "end_logits"]
        fitting = [name for name, v in outputs.items() if v.ndim == 2 and is_float(v.dtype)]
        if len(fitting) != 2:
            raise OptionError(f"model '{model}' has no outputs 'start_logits' and 'end_logits'; it has {names(outputs)}")
        return fitting

    def reduce(outputs: list[Array], feed: Feed) -> Sequence[Any]:
        rows = zip(feed.rows.tolist(), *outputs, feed.real[: len(feed.rows)], strict=True)
        return [window_answers(windows[row], start[real], end[real]) for row, start, end, real in rows]

    feeds = text_feeds([(w.ids, w.types) for w in windows], tokenizer, run)
    matches, f1 = [], []
    for found in collect(run, feeds, len(windows), choose, reduce):
        of_question: list[list[Any]] = [[] for _ in asked]
        for window, answers in zip(windows, found, strict=True):
            of_question[window.question].append(answers)
        said = [best_answer(a, q.context, with_null) for a, q in zip(of_question, asked, strict=True)]
        matches.append([metrics.exact_match(s, q.answers) for s, q in zip(said, asked, strict=True)])
        f1.append([metrics.answer_f1(s, q.answers) for s, q in zip(said, asked, strict=True)])
    return {"exact-match": _samplewise(matches, "question"), "f1": _samplewise(f1, "question")}


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        measure: what it does.
        metrics: names of what it may measure; "overlap" and "perplexity" have their k or window behind.
        splits: of a dataset, to take where none is named.
    """

    measure: Callable[[Run], dict[str, Outcome]]
    metrics: tuple[str, ...]
    splits: tuple[str, ...] = LABELLED


TASKS = {
    "classification": Task(_classification, ("accuracy", "f1", "f1-macro", "mcc", *FAITHFULNESS)),
    "regression": Task(_regression, ("pearson", "spearman")),
    "sts": Task(_sts, ("pearson", "spearman")),
    "embeddings": Task(_embed, ("cosine", "overlap"), UNLABELLED),
    "perplexity": Task(_perplexity, ("perplexity",), UNLABELLED),
    "question-answering": Task(_question_answering, ("exact-match", "f1")),
    "image-classification": Task(_image_classification, ("top-1", *FAITHFULNESS)),
}
