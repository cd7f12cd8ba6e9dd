"""Leave only the words in a model that its texts use: rows of embeddings, columns of heads (`frontend.vocabulary`).

Which ones is chosen before the work (:func:`choose_words`), since that may be wrong; they are cut when widths are. For
texts of words that stay the result computes what it did: that is checked on every run.
"""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.model import Model
from liar_opt.frontend.onnx_model import OnnxOriginal, onnx_graph
from liar_opt.frontend.vocabulary import Words, cut_words, find_words, hide_logits, require_no_other_lookup
from liar_opt.passes.base import Change, DenseModel, Finding, Pass, PassResult, State
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.sweep import first_samples
from liar_opt.passes.verify_model import require_runs
from liar_opt.runtime.compare import require_close
from liar_opt.runtime.errors import CheckError, OptionError
from liar_opt.runtime.self_calibration import SELF
from liar_opt.runtime.small_tokenizer import SmallTokenizer
from liar_opt.runtime.text_tokenizer import TextTokenizer, load_tokenizer, unknown_and_basic
from liar_opt.runtime.word_counts import count_words, listed_ids, most_frequent, texts_of

CHECKED_TEXTS = 1024
"""Texts that a smaller tokenizer is checked on."""
SAMPLES = 4
"""On which the cut is compared with the original."""
WIDTHS = ("sparsity", "ffn", "heads", "values", "query_key", "recurrent", "target", "max_drop", "search", "passes")
"""Options that ask for other widths."""


@dataclass(frozen=True, eq=False)
class ChosenWords(Finding):
    """The words that stay.

    Attributes:
        kept: their ids, ascending [K].
        size: how many there were.
        unknown: the kept id that others are read as.
        named: what the tokenizer calls it.
        source: what they were chosen by.
        tokens: of the texts, special ones left out; None for a list of ids.
        covered: of these, those that are kept.
        inputs: the graph inputs that take ids.
        small: the tokenizer that a smaller one is made of, where one is wanted.
        renumbered: whether the cut model's ids are places among the kept.
        asked: whether a smaller tokenizer was asked for: a checkpoint has one in any case.
    """

    by: ClassVar[str] = "choose_words"
    kept: NDArray[np.int64]
    size: int
    unknown: int
    named: str | None
    source: str
    tokens: int | None = None
    covered: int | None = None
    inputs: tuple[str, ...] = ()
    small: SmallTokenizer | None = None
    renumbered: bool = False
    asked: bool = False

    def numbered(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Returns feeds of ids that are kept with the ids that the cut model takes."""
        if not self.renumbered:
            return dict(feeds)
        return {k: np.searchsorted(self.kept, v).astype(v.dtype) if k in self.inputs else v for k, v in feeds.items()}

    def beside(self, dense: Mapping[str, Any], cut: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Returns feeds of the dense and of the cut model with words that stay, each with the ids that it takes."""
        return [self.known(dense), self.numbered(self.known(cut))]

    def known(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Returns feeds whose ids are of words that stay: others are replaced by some of these."""
        result = dict(feeds)
        for name in self.inputs:
            ids = np.asarray(result[name])
            result[name] = np.where(np.isin(ids, self.kept), ids, self.kept[ids % len(self.kept)]).astype(ids.dtype)
        return result


@dataclass(frozen=True)
class CutWords(Finding):
    """What was cut, as the report has it.

    Attributes:
        kept: words that are left.
        words: that there were.
        tokens: of the texts.
        share: of these that are kept; None for a list of ids.
        source: what they were chosen by.
        unknown: the id that others are read as.
        named: what the tokenizer calls it.
        bytes_before: of tables, heads and their biases.
        bytes_after: the same, with what takes their place.
        parameters_before: elements of tables, heads and their biases.
        parameters_after: the same.
        exact_difference: of the cut model and the original, on words that are left.
        small_tokenizer: whether a smaller tokenizer was asked for.
    """

    by: ClassVar[str] = "cut-vocabulary"
    kept: int
    words: int
    tokens: int | None
    share: float | None
    source: str
    unknown: int
    named: str | None
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    exact_difference: float | None = None
    small_tokenizer: bool = False


def wants_words(options: PruneOptions) -> bool:
    """Returns whether a vocabulary is to be cut."""
    return options.vocabulary is not None or options.vocabulary_coverage is not None


def words_alone(options: PruneOptions) -> bool:
    """Returns whether nothing but the vocabulary is to be cut."""
    return wants_words(options) and options.experts is None and all(getattr(options, name) is None for name in WIDTHS)


def planned_words(state: State) -> Iterator[str]:
    """Yields a sentence on the words that would be left, if some would go."""
    words = state.get(ChosenWords)
    if words is not None:
        yield f"{len(words.kept):,} of {words.size:,} words would be left, by {words.source}"


def choose_words(model: Model, calibration: Any, options: PruneOptions, always: Collection[int] = ()) -> ChosenWords:
    """Returns the words that are to stay in a normalised model: those that are asked for, special ones, and ``always``.

    Raises:
        ModelError: it has no table that token ids look up.
        OptionError: the vocabulary cannot be read or does not fit the model, or nothing would be left, or nothing go.
    """
    words, coverage = find_words(model), options.vocabulary_coverage
    if options.small_tokenizer:
        require_no_other_lookup(model, words)
    source = calibration if options.vocabulary is None else options.vocabulary
    if coverage is not None and not 0.0 < coverage <= 1.0:
        raise OptionError(f"vocabulary-coverage is {coverage:g}; give a share of the tokens above 0, and at most 1")
    if source is None or (isinstance(source, str) and source == SELF):
        raise OptionError("vocabulary-coverage needs texts to count words in; give --vocabulary or --calibration")
    if isinstance(source, Iterator):  # words are counted before it is read as samples, or checked
        if options.vocabulary is None:
            raise OptionError("vocabulary-coverage counts words of data that is read once more behind; give it as a list")
        source = list(source)
    if options.small_tokenizer and options.tokenizer is None:
        raise OptionError("small-tokenizer makes a smaller one of the model's tokenizer; give --tokenizer DIR")
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    ids, counts = listed_ids(source, words.size), None
    if ids is None:
        fields = {"text_column": options.text_column, "tokenizer": options.tokenizer, "mask_input": options.mask_input}
        try:
            counts = count_words(source, model.inputs(), words.inputs, words.size, tokenizer, **fields)
        except OptionError as err:  # it is read as calibration data are
            if options.vocabulary is None:
                raise
            raise OptionError(str(err).replace("calibration ", "vocabulary ", 1)) from err
        counts[[i for i in _specials(tokenizer) if i < words.size]] = 0
        ids = np.flatnonzero(counts) if coverage is None or not counts.any() else most_frequent(counts, coverage)
    elif coverage is not None:
        raise OptionError("vocabulary-coverage chooses among words of texts; leave it out beside a list of ids")
    name = str(source) if isinstance(source, (str, Path)) else "ids from Python" if counts is None else "texts from Python"
    if not ids.size:
        raise OptionError(f"vocabulary '{name}' leaves no word; give texts, or a list of token ids")
    kept, unknown, named = _with_specials(ids, tokenizer, options, words.size, always)
    if len(kept) == words.size:
        raise OptionError(
            f"vocabulary '{name}' has all {words.size:,} words of the model; leave it out, or give --vocabulary-coverage"
        )
    tokens = None if counts is None else int(counts.sum())
    covered = None if counts is None else int(counts[kept].sum())
    small = None
    if options.small_tokenizer and options.tokenizer is not None:
        small = SmallTokenizer(options.tokenizer)
        small.check(kept, _some_texts(source, options))
    asked = small is not None
    return ChosenWords(kept, words.size, unknown, named, name, tokens, covered, words.inputs, small, asked, asked)


def _specials(tokenizer: TextTokenizer | None) -> frozenset[int]:
    if tokenizer is None:
        return frozenset()
    named = (tokenizer.pad, tokenizer.separator)
    return tokenizer.special | {i for i in named if i is not None}


def _with_specials(
    ids: NDArray[np.int64], tokenizer: TextTokenizer | None, options: PruneOptions, size: int, more: Collection[int]
) -> tuple[NDArray[np.int64], int, str | None]:
    """Returns the ids with those that always stay, and the one that others are read as, with its name.

    A tokenizer that knows every byte has nothing unknown: what goes is read as a blank then, where that is one token.
    """
    unknown, named = int(ids[0]), None
    always = set(more)
    if tokenizer is not None and options.tokenizer is not None:
        own, basic = unknown_and_basic(options.tokenizer)
        ((blank, _),) = tokenizer.encode([" "], None)
        plain = [i for i in blank if i not in tokenizer.special]
        if own is not None and own < size:
            unknown, named = own, "the unknown token"
        elif len(plain) == 1 and plain[0] < size:
            unknown, named = plain[0], "a blank"
        always |= {unknown, *_specials(tokenizer), *basic}
        if options.small_tokenizer:
            always |= SmallTokenizer(options.tokenizer).needed({*map(int, ids), *always})
    ids = np.union1d(ids, np.asarray([i for i in sorted(always) if i < size], np.int64))
    return ids, unknown, named


def _some_texts(source: Any, options: PruneOptions) -> list[str]:
    """A few of the texts that the words were chosen by."""
    found = texts_of(source, options.text_column)
    return [] if found is None else list(itertools.islice(found, CHECKED_TEXTS))


@dataclass(frozen=True)
class CutVocabularyPass(Pass[ChosenWords]):
    """Cut tables of words and heads to the words that were chosen; ids and logits keep their meaning.

    Before: ``Gather(table, ids)``, ``MatMul(x, head)``. After: ``Gather(table', Gather(map, ids))``, and the product with
    ``head'`` laid out at full width, -inf where words went.
    """

    name: ClassVar[str] = "cut-vocabulary"

    def plan(self, state: State) -> ChosenWords:
        """Returns the words that stay."""
        return state.found(ChosenWords)

    def apply(self, state: State, plan: ChosenWords) -> PassResult:
        """Cuts them, and compares the result with what it was on words that stay; adds a ``CutWords``.

        Raises:
            CheckError: it is not the same.
        """
        model = state.model
        whole = OnnxOriginal(*onnx_graph(model).light(), model.source, model.store, model.merged)
        words, weights, elements = find_words(model), model.weight_bytes(), model.parameters()
        cut_words(model, words, plan.kept, plan.unknown, tables=not plan.renumbered)
        model.graph.cleanup(remove_unused_node_outputs=False).toposort()
        model.settle()
        entry = cut_words_entry(plan, words, _checked(state, whole, words, plan))
        left = entry.bytes_before - weights + model.weight_bytes(), entry.parameters_before - elements + model.parameters()
        state.add(replace(entry, bytes_after=left[0], parameters_after=left[1]))
        return PassResult(state, (Change("words", "vocabulary", plan.size, len(plan.kept)),))


def cut_words_entry(plan: ChosenWords, words: Words, difference: float | None) -> CutWords:
    """Returns what the report says of words that were cut, of as many numbers each as the others."""
    share, kept = len(plan.kept) / plan.size, len(plan.kept)
    return CutWords(
        kept=kept,
        words=plan.size,
        tokens=plan.tokens,
        share=None if plan.tokens is None or plan.covered is None else plan.covered / plan.tokens,
        source=plan.source,
        unknown=plan.unknown,
        named=plan.named,
        bytes_before=words.bytes(),
        bytes_after=round(words.bytes() * share),
        parameters_before=words.parameters(),
        parameters_after=round(words.parameters() * share),
        exact_difference=difference,
        small_tokenizer=plan.asked,
    )


def _checked(state: State, whole: OnnxOriginal, words: Words, plan: ChosenWords) -> float:
    """Compares the cut model with what it was, -inf added to the logits of words that went; returns the difference."""
    state.engine().require_form(whole, state.model, state.model.resized)
    reference = whole.model()
    reference.normalise()
    assert state.calibration is not None
    feeds = plan.known(first_samples(state, state.calibration.batches[0], SAMPLES))
    hide_logits(reference, find_words(reference), plan.kept)
    engine, left = state.engine(), () if state.walk is None else state.walk.unspecified
    try:
        session = engine.whole(reference, "the original")
    except CheckError:
        engine.whole(state.found(DenseModel).stored)  # says what is wrong with the model as it came
        raise
    outputs = [name for name in session.outputs if name not in left]
    try:
        theirs = session.run(feeds, outputs, arrays=True)
    except Exception:  # of ONNX Runtime: a class of its own for each release
        require_runs(state, session)
        raise
    del session, reference
    given = plan.numbered(feeds)
    ours = engine.whole(state.model, "the model with fewer words").run(given, outputs, arrays=True)
    engine.require_written(state.model, given, ours, state.model.least_precision())
    if plan.renumbered:
        theirs = {name: value[..., plan.kept] if name in words.wide else value for name, value in theirs.items()}
    return require_close(ours, theirs, state.model.least_precision(), "fewer words against all of them")
