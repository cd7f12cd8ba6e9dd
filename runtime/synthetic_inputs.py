"""Made-up inputs of the right shapes and ranges, where there is no calibration data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime.calibration_batches import Batched, CalibrationJob, batch_rows
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.signatures import STATE_ROLES, InputSpec, Signature, describe, is_float

Array = NDArray[Any]
IMAGE_SIZES = (224, 384, 256, 336, 448, 512, 518, 640, 192, 128, 96, 64, 32)
"""Heights and widths that image models are made for, the commonest first."""
SEQUENCE = 64
"""Noise needs no more, and position tables are rarely shorter."""
VOCABULARY = 64
"""Below the embedding table of every model that we know."""
BYTES = 1 << 33
"""Of one input: more comes of a graph with absurd sizes."""


def synthesise(job: CalibrationJob) -> Batched:
    """Makes inputs of the right shapes and ranges, and nothing more: what is fitted to them is fitted to noise.

    Raises:
        OptionError: They would be too large.
    """
    signature = job.signature
    sizes: dict[str, int] = {}
    group: dict[str, Array] = {}
    made = signature.made(name for name in signature.inputs if signature.roles.get(name) not in STATE_ROLES)
    for spec in (spec for name, spec in signature.inputs.items() if name not in made):
        shape = _synthetic_shape(spec, job, sizes)
        need = math.prod(shape) * spec.dtype.itemsize
        if need > BYTES:
            raise OptionError(
                f"{job.samples} made-up samples of model input {describe(spec)} would take {need:,} bytes; give fewer "
                "samples, or real ones (--calibration)."
            )
        group[spec.name] = _synthetic_values(spec, shape, job)
    for spec in signature.inputs.values():
        if _counts(spec, signature) and (length := _open_length(group, signature)) is not None:
            group[spec.name] = np.full(group[spec.name].shape, length, dtype=spec.dtype)
    batches, masks = batch_rows([group], job)
    warnings = [
        "no calibration data was given: the repair is fitted to random inputs, so accuracy will be lower than with a "
        "few hundred real samples; pass --calibration."
    ]
    if signature.ids and job.vocabulary is None:
        warnings.append(f"the vocabulary is not known: ids for input '{signature.ids}' are drawn below {VOCABULARY}.")
    said = f"synthetic inputs, {job.samples} drawn with seed {job.seed}"
    return Batched(batches, masks, job.samples, said, warnings).doubted(signature)


def _counts(spec: InputSpec, signature: Signature) -> bool:
    """Whether an input says how long each sample is: [b], of no other role, and called so."""
    named = re.search(r"(^|[_.])len(gth)?s?$", spec.name.lower()) is not None
    return named and len(spec.shape) == 1 and spec.dtype.kind in "iu" and spec.name not in signature.roles


def _open_length(group: Mapping[str, Array], signature: Signature) -> int | None:
    """The size of the first axis behind the batch that the graph leaves open."""
    for name, values in group.items():
        for dim, size in zip(signature.inputs[name].shape[1:], values.shape[1:], strict=True):
            if not isinstance(dim, int):
                return int(size)
    return None


def _synthetic_shape(spec: InputSpec, job: CalibrationJob, sizes: dict[str, int]) -> tuple[int, ...]:
    shared = spec.name in job.signature.shared
    shape: list[int] = []
    for axis, dim in enumerate(spec.shape):
        if axis == 0 and not shared:
            shape.append(job.samples)
        elif isinstance(dim, int):
            shape.append(dim)
        else:
            free = _synthetic_size(spec, axis, job)
            shape.append(sizes.setdefault(dim, free) if dim else free)
    return tuple(shape)


def _synthetic_size(spec: InputSpec, axis: int, job: CalibrationJob) -> int:
    if is_float(spec.dtype) and len(spec.shape) == 4:
        return 3 if axis == 1 else job.image_size or IMAGE_SIZES[0]
    if job.sequence_length is not None:
        return job.sequence_length
    if is_float(spec.dtype) and len(spec.shape) == 2 and spec.name not in job.signature.roles:
        return 16000  # a second of sound
    static = [s.shape[1] for s in job.signature.inputs.values() if len(s.shape) == 2 and s.name in job.signature.roles]
    limit = job.positions or SEQUENCE
    return next((dim for dim in static if isinstance(dim, int)), min(limit, SEQUENCE))


def _synthetic_values(spec: InputSpec, shape: tuple[int, ...], job: CalibrationJob) -> Array:
    role = job.signature.roles.get(spec.name)
    if role == "mask":
        return np.ones(shape, dtype=spec.dtype)
    if role == "position":
        return np.broadcast_to(np.arange(shape[-1] if shape else 1), shape).astype(spec.dtype)
    if role == "ids":
        return job.rng.integers(job.vocabulary or VOCABULARY, size=shape).astype(spec.dtype)
    if role is None and spec.name in (rows := job.rows or {}) and not is_float(spec.dtype):
        return job.rng.integers(rows[spec.name], size=shape).astype(spec.dtype)
    if role is None and is_float(spec.dtype):
        return np.asarray(job.rng.standard_normal(shape, dtype=np.float32), dtype=np.float32).astype(spec.dtype)
    return np.zeros(shape, dtype=spec.dtype)
