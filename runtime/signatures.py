"""What a graph's inputs are for, and how they are fed.

Token ids, masks, token types and positions are told apart by name, shape and order. What a decoder needs besides (an empty
key-value cache, its lengths and positions, what an encoder-decoder has written so far) is made here where nobody gives it:
the cache of a calibration run has length 0 on its sequence axis, or is all zeros and masked out where the graph fixes that
length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.errors import OptionError

Array = NDArray[Any]
TEXT_ROLES = ("ids", "mask", "type", "position")
STATE_ROLES = ("past", "lengths", "total", "cache_position", "last", "branch", "decoder_ids", "decoder_mask")
"""Inputs that are made where they are not given.

"past": a key or value cache of self-attention, [b, heads, p, width], [b, p, heads, width] or [2, b, heads, p, width];
"lengths": the tokens of each sample, less one, [b] or [b, 1]; "total": those of the longest sample;
"cache_position": places of the new tokens in the cache, [s]; "last": how many positions give logits (0 = all);
"branch": whether a merged decoder takes the branch that reads its cache (no); "decoder_ids", "decoder_mask": what an
encoder-decoder has written so far, [b, s].
"""

IN_ITS_SOURCE = re.compile(r"(Status Message: )?/\S*onnxruntime\S*:\d+ (\S+\([^()]*\) )?")
"""Where in its own source ONNX Runtime raises an error."""

_MASK_NAMES = ("attention_mask", "input_mask", "padding_mask", "mask")
_STATE_NAMES = {
    "lengths": r"seqlens_k",
    "total": r"total_seq(uence)?_len(gth)?",
    "cache_position": r"cache_positions?",
    "last": r"(num_)?logits_to_keep",
    "branch": r"use_cache_branch",
    "decoder_ids": r"decoder_input_ids",
    "decoder_mask": r"decoder_(attention|padding)_mask",
}
_CACHE = r"past|cache"


@dataclass(frozen=True)
class InputSpec:
    """One graph input.

    Attributes:
        name: The input's name in the graph.
        dtype: Its element type.
        shape: One entry an axis: an int is static, a str a symbolic dimension, None unknown. Axis 0 is the batch.
        in_place: Whether it is a cache that is written in place: its length says nothing of the tokens in it.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    in_place: bool = False


@dataclass(frozen=True)
class Signature:
    """The graph's inputs and what each of them is for.

    Attributes:
        inputs: By name, in graph order.
        roles: ``ids``, ``mask``, ``type``, ``position`` or one of `STATE_ROLES` by input name; inputs of another
            purpose are absent.
        ids: First input with the role ``ids``, if any.
        mask: The input that marks real tokens, if any.
        shared: Inputs without a batch axis of their own (scalars, [1, s] or [3] beside [b, s]): the same for every sample.
        batch: The static batch size, if any.
    """

    inputs: dict[str, InputSpec]
    roles: dict[str, str]
    ids: str | None
    mask: str | None
    shared: frozenset[str]
    batch: int | None

    @classmethod
    def read(cls, inputs: Sequence[InputSpec], mask_input: str | None) -> Signature:
        """Tells the inputs apart.

        Raises:
            OptionError: There are none, `mask_input` is none of them, or they have different static batch sizes.
        """
        if not inputs:
            raise OptionError("the model has no inputs; nothing can be calibrated.")
        specs = {spec.name: spec for spec in inputs}
        if mask_input is not None and mask_input not in specs:
            raise OptionError(f"mask input '{mask_input}' is no input of the model; it has {names(specs)}.")
        roles = _roles(inputs, mask_input)
        masks = [name for name, role in roles.items() if role == "mask"]
        mask = mask_input or next((name for name in _MASK_NAMES if name in masks), masks[0] if masks else None)
        made = {name for name, role in roles.items() if role in STATE_ROLES}
        leading = {spec.shape[0] for spec in inputs if spec.shape and spec.name not in made}
        # Beside inputs of any number of samples one of a fixed size is the same for all (the scales of a voice, [3]).
        fixed = (
            {1} if all(isinstance(size, int) for size in leading) else {size for size in leading if isinstance(size, int)}
        )
        shared = frozenset(
            spec.name
            for spec in inputs
            if not spec.shape
            or (spec.shape[0] in fixed and leading != {1} and roles.get(spec.name) != "past")
            or roles.get(spec.name) in ("cache_position", "total", "last", "branch")
        )
        batched = {name: spec for name, spec in specs.items() if roles.get(name) != "past" or len(spec.shape) == 4}
        static = {size: name for name, size in _leading_ints(batched, shared)}
        if len(static) > 1:
            raise OptionError(
                f"inputs {names(static.values())} have different static batch sizes {sorted(static)}; "
                "export the model with one batch size, or with a dynamic batch axis."
            )
        ids = next((name for name, role in roles.items() if role == "ids"), None)
        return cls(specs, roles, ids, mask, shared, next(iter(static), None))

    @property
    def past(self) -> tuple[str, ...]:
        """The key and value caches, in graph order."""
        return tuple(name for name in self.inputs if self.roles.get(name) == "past")

    @property
    def seen(self) -> int:
        """Tokens that a key-value cache of fixed length holds; 0 where its length is free, or there is no cache."""
        appended = (self.inputs[name].shape for name in self.past if not self.inputs[name].in_place)
        return max((_fixed_length(shape) for shape in appended), default=0)

    def length(self) -> int | None:
        """Tokens of a sample, where the graph fixes them.

        Raises:
            OptionError: Two inputs fix different lengths.
        """
        static = {
            spec.shape[1] - (self.seen if name == self.mask else 0): name
            for name, spec in self.inputs.items()
            if self.roles.get(name) in TEXT_ROLES and len(spec.shape) == 2 and isinstance(spec.shape[1], int)
        }
        if len(static) > 1:
            raise OptionError(
                f"inputs {names(static.values())} have different static lengths {sorted(map(str, static))}; give an .npz "
                "file with arrays of these shapes."
            )
        return next(iter(static), None)

    def made(self, given: Iterable[str]) -> tuple[str, ...]:
        """Inputs that are made where they are not given: the state of a decoder, and positions."""
        there = set(given)
        kinds = (*STATE_ROLES, "position") if self.ids in there else STATE_ROLES
        return tuple(name for name in self.inputs if name not in there and self.roles.get(name) in kinds)

    def feed(
        self,
        ids: NDArray[np.int64],
        real: NDArray[np.bool_],
        types: NDArray[np.int64] | None = None,
        *,
        cached: int = 0,
        pad: int = 0,
    ) -> dict[str, Array]:
        """A feed for token ids, without the key-value cache where `cached` says that the caller has one.

        Args:
            ids: Token ids [b, s].
            real: Which of them are no padding [b, s].
            types: Token types [b, s]; zeros if None.
            cached: Tokens that the caller's cache holds already.
            pad: Token id behind which an encoder-decoder begins to write.
        """
        before = np.zeros((len(ids), self.seen), np.bool_) if self.seen else np.ones((len(ids), cached), np.bool_)
        values: dict[str, Array] = {
            "ids": ids,
            "type": np.zeros_like(ids) if types is None else types,
            "mask": np.concatenate([before, real], axis=1),
        }
        feed: dict[str, Array] = {}
        for name, spec in self.inputs.items():
            role = self.roles.get(name, "")
            if role in values:
                value = values[role][:1] if name in self.shared else values[role]
                feed[name] = cast(value, spec, "the tokenizer")
        return self.completed(feed, real, pad=pad, cached=cached)

    def completed(
        self, batch: dict[str, Array], real: NDArray[np.bool_], *, pad: int = 0, cached: int = 0
    ) -> dict[str, Array]:
        """A batch with all that is made, in the order of the graph's inputs.

        Args:
            batch: What is there.
            real: Real tokens, [b, s] (or [b] where only the batch axis is known).
            pad: Token id behind which an encoder-decoder begins to write.
            cached: Tokens that the caller's cache holds already; the cache itself is left to the caller then.
        """
        real = real if real.ndim == 2 else real[:, None]
        ids = batch.get(self.ids or "")
        whole = dict(batch)
        for name in self.made(batch):
            role, spec = self.roles[name], self.inputs[name]
            if not (cached and role == "past"):
                value = _state(role, spec, real, ids, pad, cached)
                whole[name] = cast(value[:1] if name in self.shared and value.ndim == 2 else value, spec, "the batches")
        return {name: whole[name] for name in self.inputs if name in whole}

    def real_rows(self, batch: Mapping[str, Array], additive: bool) -> NDArray[np.bool_]:
        """Which rows of a batch its mask input calls real: [b, s], or all of [b] when no token axis is known."""
        first = batch[next(name for name in batch if name not in self.shared)]
        tokens = batch[self.ids] if self.ids else None
        mask = batch[self.mask] if self.mask and self.mask not in self.shared else None
        if mask is not None and mask.ndim == 2 and (tokens is None or tokens.shape == mask.shape):
            real: NDArray[np.bool_] = (mask >= 0) if additive else (mask != 0)
            return real
        return np.ones(first.shape[:1] if tokens is None else tokens.shape, dtype=np.bool_)


def _leading_ints(specs: Mapping[str, InputSpec], shared: frozenset[str]) -> Iterator[tuple[str, int]]:
    for name, spec in specs.items():
        if name not in shared and isinstance(spec.shape[0], int):
            yield name, spec.shape[0]


def _roles(inputs: Sequence[InputSpec], mask_input: str | None) -> dict[str, str]:
    """What each input is for, by its name; inputs with a name that says nothing, by their order: ids, mask, type."""
    roles: dict[str, str] = {}
    nameless: list[str] = []
    for spec in inputs:
        name = spec.name.lower()
        tokens = len(spec.shape) == 2 and spec.dtype.kind in "biu"
        if spec.name == mask_input:
            roles[spec.name] = "mask"
        elif role := _state_role(spec):
            roles[spec.name] = role
        elif re.search(r"type_?ids?|segment", name):
            roles[spec.name] = "type"
        elif re.search(r"position|pos_?ids?", name):
            roles[spec.name] = "position"
        elif "mask" in name and "masked" not in name:
            roles[spec.name] = "mask"
        elif tokens and spec.dtype.kind != "b" and re.search(r"(ids?|tokens?)([._:]\d+)?$", name):
            roles[spec.name] = "ids"
        elif tokens and re.fullmatch(r"onnx::.*|[\W_\d]*(inputs?|args?|in|x|tensor|data)?[\W_\d]*", name):
            nameless.append(spec.name)
    free = [role for role in ("ids", "mask", "type") if role not in roles.values()]
    roles |= dict(zip(nameless, free, strict=False))
    if "ids" not in roles.values():  # a decoder that is a graph of its own
        roles = {name: {"decoder_ids": "ids", "decoder_mask": "mask"}.get(role, role) for name, role in roles.items()}
    return {spec.name: roles[spec.name] for spec in inputs if spec.name in roles}


def _state_role(spec: InputSpec) -> str | None:
    name = spec.name.lower()
    # keys and values of the encoder are no cache of what was written: there is none for a text
    crossed = re.search(r"encoder\.|cross", name.replace("decoder.", ""))
    if is_float(spec.dtype) and len(spec.shape) in (4, 5) and re.search(_CACHE, name) and not crossed:
        return "past"
    return next((role for role, pattern in _STATE_NAMES.items() if re.fullmatch(pattern, name)), None)


def _fixed_length(shape: Sequence[int | str | None]) -> int:
    length = shape[-2]
    return length if isinstance(length, int) and all(isinstance(dim, int) for dim in shape[-3:]) else 0


def _state(role: str, spec: InputSpec, real: NDArray[np.bool_], ids: Array | None, pad: int, cached: int) -> Array:
    """What is made for an input; see `STATE_ROLES`."""
    batch, length = real.shape
    rank = len(spec.shape)
    if role == "past":
        # the free axis of those behind the batch is the sequence: nothing has been seen yet
        lead = (batch,) if rank == 4 else (2, batch)
        return np.zeros((*lead, *(dim if isinstance(dim, int) else 0 for dim in spec.shape[-3:])), dtype=spec.dtype)
    if role == "lengths":
        last: Array = cached + real.sum(axis=1) - 1
        return last.reshape(batch, *(1,) * (rank - 1))
    if role == "total":
        return np.full((1,) * rank, cached + length)
    if role == "cache_position":
        return cached + np.arange(length)
    if role in ("last", "branch"):
        return np.zeros((1,) * rank, dtype=np.int64)
    if role == "decoder_ids":
        # the text itself, one token later: position t is to say token t
        start = np.full((batch, 1), pad, dtype=np.int64)
        return start if ids is None else np.concatenate([start, ids[:, :-1]], axis=1)
    if role == "decoder_mask":
        return real
    # positions: counted from the first real token, over padding at the end as well
    padded_left = not real[:, 0].all()
    counted = np.maximum(np.cumsum(real, axis=1) - 1, 0) if padded_left else np.tile(np.arange(length), (batch, 1))
    return cached + counted


def name_from_layer(name: str) -> str:
    """A cache's name from its layer's number on: the same before a run (`past_key_values.0.key`) and behind it."""
    return name[next((i for i, letter in enumerate(name) if letter.isdigit()), 0) :]


def names(given: Iterable[object]) -> str:
    """Names for a message, in quotes."""
    return ", ".join(f"'{name}'" for name in given) or "none"


def describe(spec: InputSpec) -> str:
    """An input for a message: name, type and shape."""
    return f"'{spec.name}' ({spec.dtype} [{', '.join('?' if dim is None else str(dim) for dim in spec.shape)}])"


def one_line(error: BaseException) -> str:
    """The first line of an error of a library, for use within a sentence."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(". ")


def told_by_runtime(error: BaseException) -> str:
    """What ONNX Runtime says of an error, on one line, without where in its own source it says so."""
    return IN_ITS_SOURCE.sub("", " ".join(str(error).split()))[:300]


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is floating point, those of ml_dtypes included."""
    return dtype.kind == "f" or "float" in dtype.name  # bfloat16 and the float8 types of ml_dtypes are of kind V


def cast(values: Array, spec: InputSpec, where: str) -> Array:
    """Values in the dtype of the input, when nothing is lost (floats may be rounded, not overflow).

    Raises:
        OptionError: Another kind of numbers, numbers out of range, NaN or Inf.
    """
    have, need = values.dtype, spec.dtype
    what = f"array '{spec.name}' of {where}"
    if is_float(have):
        if not is_float(need):
            raise OptionError(f"{what} is of type '{have}'; model input {describe(spec)} needs whole numbers.")
        bad = ~np.isfinite(values)
        if bad.any():
            first = [int(axis[0]) for axis in np.nonzero(bad)]
            found = f"{int(bad.sum())} NaN or Inf values (the first at {first})"
            raise OptionError(f"{what} has {found}; remove those samples.")
    elif have.kind not in "biu":
        raise OptionError(f"{what} is of type '{have}'; model input {describe(spec)} needs numbers.")
    if have == need:
        return np.ascontiguousarray(values) if values.ndim else values
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(need)
    if is_float(have):
        kept = bool(np.isfinite(cast).all())
    elif have.kind == "b" or not values.size:
        kept = True
    elif need.kind == "b":
        kept = bool(np.isin(values, (0, 1)).all())
    elif need.kind in "iu":
        limits = np.iinfo(need)
        kept = limits.min <= int(values.min()) and int(values.max()) <= limits.max
    else:
        kept = bool((cast.astype(np.float64) == values).all())
    if not kept:
        raise OptionError(f"{what} ('{have}') has values that model input {describe(spec)} cannot hold.")
    return cast
