"""Calibration text that the dense model writes itself.

Tokens are drawn one by one from the model's own distribution (temperature 1), of which only the most likely tokens that
together hold `TOP_P` of the probability are kept, `TOP_K` at most (nucleus sampling, arXiv 1904.09751): the long tail of a
small model is noise. Each window begins with the tokenizer's begin token where the tokenizer puts one before every text,
and with a token drawn uniformly otherwise, so that no two windows are about the same. An end token ends nothing: the model
goes on behind it, as packed texts do.

With a key-value cache in the graph each step runs one token; without one the prefix is run anew at every step, which costs
about half a window's length times as much. Both give the same text, up to rounding at the edge of a draw. A model of
transformers writes through its own ``generate`` (`frontend.own_text`), at the same temperature and with the same nucleus.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.calibration_data import CalibrationData, check_options, load_calibration
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.packing import packed_rows
from liar_opt.runtime.sessions import Runner
from liar_opt.runtime.signatures import InputSpec, Signature, name_from_layer, names
from liar_opt.runtime.text_tokenizer import load_tokenizer

SELF = "self"
"""The calibration source that means: the model's own text."""
TEMPERATURE, TOP_K, TOP_P = 1.0, 1000, 0.95
WINDOW = 128
"""Tokens of a window unless the user says otherwise."""
INSTEAD = "give --calibration a file of texts instead"
_LOGIT_BYTES = 1 << 28
"""Of the logits of one run, at most: rows are run in chunks where the prefix is run anew."""
_ROWS = 64
"""Windows that are written together at most."""


def is_own_text(source: Any) -> bool:
    """Returns whether a calibration source means the model's own text."""
    return isinstance(source, str) and source == SELF


class Author(Protocol):
    """What writes on behind first tokens, and how, for the report."""

    @property
    def how(self) -> str:
        """Says how, behind "written by the model itself"."""

    def write(
        self, first: NDArray[np.int64], length: int, rng: np.random.Generator, progress: Callable[[int], None]
    ) -> NDArray[np.int64]:
        """Writes windows [n, length] on behind first tokens [n, 1]; see `Writer.write`."""


@dataclass(frozen=True)
class Writer:
    """A decoder that writes.

    Attributes:
        session: the dense model.
        signature: its inputs.
        logits: the output that holds the scores of the next token, [b, s, vocabulary].
        caches: the output that holds the new value of each key or value cache, by the input's name; empty without a cache.
    """

    session: Runner
    signature: Signature
    logits: str
    caches: dict[str, str]

    @classmethod
    def of(cls, session: Runner, signature: Signature) -> "Writer":
        """Finds what is needed among the outputs; a cache of fixed length is of no use here."""
        logits = next((name for name in session.outputs if "logits" in name.lower()), session.outputs[0])
        caches = {} if signature.seen else _pairs(signature.past, [name for name in session.outputs if name != logits])
        return cls(session, signature, logits, caches)

    @property
    def how(self) -> str:
        """What its speed depends on."""
        return "through its cache" if self.caches else "by running each prefix anew"

    def write(
        self,
        first: NDArray[np.int64],
        length: int,
        rng: np.random.Generator,
        progress: Callable[[int], None] = lambda step: None,
    ) -> NDArray[np.int64]:
        """Writes on behind first tokens.

        Args:
            first: [n, 1].
            length: tokens of each window, the first one counted.
            rng: draws the tokens.
            progress: called with the number of tokens that each window has.

        Returns:
            Windows [n, length].

        Raises:
            OptionError: the output is no scores of a next token.
        """
        ids = np.zeros((len(first), length), dtype=np.int64)
        ids[:, :1] = first
        past: dict[str, Any] = {}
        width = 1
        for step in range(1, length):
            if self.caches:
                scores, past = self._step(ids[:, step - 1 : step], step - 1, past)
            else:
                scores = self._prefix(ids, step, width)
            width = scores.shape[1]
            ids[:, step] = draw(scores, rng.random(len(first)))
            progress(step + 1)
        return ids

    def _step(self, ids: NDArray[np.int64], cached: int, past: dict[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
        """Scores [n, vocabulary] behind one more token, and the caches with it."""
        feed = {**self.signature.feed(ids, np.ones(ids.shape, np.bool_), cached=cached), **past}
        found = self.session.run(feed, [self.logits, *self.caches.values()], [self.logits])
        return self._last(found[self.logits], ids, 0), {name: found[new] for name, new in self.caches.items()}

    def _prefix(self, ids: NDArray[np.int64], step: int, width: int) -> NDArray[Any]:
        """Scores [n, vocabulary] behind the first `step` tokens, which are run anew; `width`: of the scores before."""
        static = self.signature.length()
        padded = ids[:, :step] if static is None else np.pad(ids[:, :step], ((0, 0), (0, static - step)))
        real = np.broadcast_to(np.arange(padded.shape[1]) < step, padded.shape)
        rows = self.signature.batch or max(1, _LOGIT_BYTES // (4 * padded.shape[1] * width))
        scores = []
        for start in range(0, len(ids), rows):
            chunk = slice(start, start + rows)
            found = self.session.run(self.signature.feed(padded[chunk], real[chunk]), [self.logits], arrays=True)
            scores.append(self._last(found[self.logits], padded[chunk], step - 1))
        return np.concatenate(scores)

    def _last(self, logits: NDArray[Any], ids: NDArray[np.int64], position: int) -> NDArray[Any]:
        if logits.ndim != 3 or logits.shape[:2] != ids.shape:
            raise OptionError(
                f"calibration 'self' needs logits [batch, sequence, vocabulary], and output '{self.logits}' has the shape "
                f"{list(logits.shape)} for tokens {list(ids.shape)}; {INSTEAD}."
            )
        return logits[:, position]


def _pairs(past: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    """New values by the name of the cache: by name (`past_key_values.0.key`, `present.0.key`), else in order."""
    ends = {name: name_from_layer(name) for name in outputs}
    by_name = {cache: [name for name, end in ends.items() if end == name_from_layer(cache)] for cache in past}
    if all(len(found) == 1 for found in by_name.values()):
        return {cache: found[0] for cache, found in by_name.items()}
    return dict(zip(past, outputs, strict=True)) if len(past) == len(outputs) else {}


def draw(scores: NDArray[Any], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    """Draws a token for each row of scores: the nucleus of `TOP_P`, of `TOP_K` tokens at most, at `TEMPERATURE`.

    Args:
        scores: logits [n, vocabulary].
        uniforms: in [0, 1), [n]: the token whose share of the cumulated probabilities holds it is drawn.
    """
    tokens = np.empty(len(scores), dtype=np.int64)
    for row, (logits, uniform) in enumerate(zip(scores, uniforms, strict=True)):
        weights = np.exp((logits - logits.max()).astype(np.float64) / TEMPERATURE)
        best = np.argpartition(-weights, min(TOP_K, len(weights)) - 1)[:TOP_K]
        best = best[np.lexsort((best, -weights[best]))]
        cumulated = np.cumsum(weights[best])
        nucleus = int(np.searchsorted(cumulated, TOP_P * weights.sum())) + 1
        within = cumulated[: min(nucleus, len(best))]
        tokens[row] = best[np.searchsorted(within, uniform * within[-1], side="right")]
    return tokens


def write_calibration(
    load: Callable[[], Any],
    inputs: Sequence[InputSpec],
    *,
    author: Callable[[Any, Signature], Author] = Writer.of,
    tokenizer: str | Path | None = None,
    samples: int = 512,
    batch_size: int = 32,
    sequence_length: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
    positions: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CalibrationData:
    """Lets the dense model write its own calibration text.

    Args:
        load: makes the session of the dense model; called when the options have been checked.
        inputs: the graph's inputs.
        author: makes of what was loaded, and of the inputs, what writes.
        tokenizer: says which token begins a text and which are special; without it every token may begin a window.
        samples: windows.
        batch_size: windows of a calibration batch at most; see `calibration_data.load_calibration`.
        sequence_length: tokens of a window; `WINDOW`, or what the model takes, if None.
        seed: of every draw.
        vocabulary: rows of the embedding table.
        positions: tokens that the model has positions for, when known.
        progress: called with the tokens written and to be written.

    Raises:
        OptionError: the model cannot write, or an option does not fit.
    """
    check_options(samples=samples, batch_size=batch_size, sequence_length=sequence_length, positions=positions)
    signature = Signature.read(inputs, None)
    _require_decoder(signature)
    limits = [limit for limit in (signature.length(), positions) if limit is not None]
    length = min([sequence_length or WINDOW, *limits])
    if length < 2:
        raise OptionError(f"'sequence_length' is {length}; calibration 'self' needs at least 2.")
    rng = np.random.default_rng(seed)
    first = _first_tokens(samples, tokenizer, vocabulary, rng)
    writer = author(load(), signature)
    rows = signature.batch or _ROWS
    written = []
    for start in range(0, samples, rows):
        chunk = first[start : start + rows]
        whole = np.resize(chunk, (rows, 1)) if signature.batch else chunk

        def tell(step: int, before: int = start * length, size: int = len(chunk)) -> None:
            progress(before + step * size, samples * length)

        written.append(writer.write(whole, length, rng, tell)[: len(chunk)])
    ids = np.concatenate(written)
    if (static := signature.length()) is not None:
        ids = np.pad(ids, ((0, 0), (0, static - length)))
    real = np.broadcast_to(np.arange(ids.shape[1]) < length, ids.shape)
    feed = signature.feed(ids, real)
    given = {name: feed[name] for name in feed if signature.roles[name] in ("ids", "mask", "type")}
    size = packed_rows(samples, length, batch_size)
    data = load_calibration(given, inputs, samples=samples, batch_size=size, seed=seed, vocabulary=vocabulary)
    said = (
        f"{samples} windows of {length} tokens, written by the model itself {writer.how} with seed {seed} (top-p {TOP_P:g})"
    )
    return replace(data, source=said)


def _require_decoder(signature: Signature) -> None:
    """Refuses what cannot write, before it is loaded.

    Raises:
        OptionError: the model takes no tokens, is an encoder-decoder, or has inputs that cannot be made.
    """
    if signature.ids is None or "decoder_ids" in signature.roles.values():
        raise OptionError(f"calibration 'self' needs a decoder, which continues its own tokens; {INSTEAD}.")
    unknown = [name for name in signature.inputs if name not in signature.roles]
    if unknown:
        raise OptionError(f"calibration 'self' cannot fill the model's inputs {names(unknown)}; {INSTEAD}.")


def _first_tokens(
    samples: int, tokenizer: str | Path | None, vocabulary: int | None, rng: np.random.Generator
) -> NDArray[np.int64]:
    """First tokens [n, 1]; see the module's docstring."""
    special: frozenset[int] = frozenset()
    size = vocabulary
    if tokenizer is not None:
        reader = load_tokenizer(tokenizer)
        begin = reader.encode(["a"], None)[0][0][0]
        if begin in reader.special:
            return np.full((samples, 1), begin, dtype=np.int64)
        special, size = reader.special, min(vocabulary or reader.size, reader.size)
    if size is None:
        raise OptionError("calibration 'self' cannot tell the size of the model's vocabulary; pass --tokenizer DIR.")
    return rng.choice([token for token in range(size) if token not in special], (samples, 1)).astype(np.int64)
