"""How whole runs are compared: by the relative squared difference of the output on rows that none of them was fitted to."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from liar_opt.passes.base import State, WholeModel
from liar_opt.passes.calibrate import divided
from liar_opt.passes.prune_groups import Cut
from liar_opt.passes.sweep import held_batches
from liar_opt.passes.verify_model import ComparedSessions, first_difference, whole_session
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.signatures import Signature


def held_out(state: State, who: str, divide: bool = True) -> CalibrationData:
    """Takes batches to judge by out of the calibration data of a ``WholeModel``, where there are others; returns them.

    Args:
        state: analysed, with its calibration data.
        who: judges, for the note where there are no others.
        divide: few batches; where a time is asked for, it is that of the first batch as it is.
    """
    known = state.found(WholeModel)
    assert state.calibration is not None
    data = divided(state.calibration, state.analysed().input_specs()) if divide else state.calibration
    held = held_batches(len(data.batches))
    rest = [i for i in range(len(data.batches)) if i not in held]
    if rest:
        state.add(replace(known, data=_some(data, rest)))
        return _some(data, held)
    state.model.notes.append(f"{who} judges by rows that were fitted to: there are no others; give more samples")
    return data


def _some(data: CalibrationData, batches: list[int]) -> CalibrationData:
    own = tuple(data.batches[i] for i in batches)
    return replace(data, batches=own, row_masks=tuple(data.row_masks[i] for i in batches))


def shared_out(data: CalibrationData, sizes: Sequence[int], signature: Signature, seed: int) -> list[CalibrationData]:
    """Returns parts of so many samples each that have none in common, drawn alike from all batches.

    Args:
        data: no fewer samples than all parts have.
        sizes: of the parts.
        signature: of the model's inputs; batches of a fixed size stay whole.
        seed: of the draw.
    """
    rng, fixed = np.random.default_rng(seed), signature.batch is not None
    lengths = [_samples(batch, signature) for batch in data.batches]
    total = sum(1 if fixed else length for length in lengths)
    counts = [max(1, size * total // max(sum(lengths), 1)) if fixed else size for size in sizes]
    counts = [*counts, max(total - sum(counts), 0)]  # what nobody gets
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    owners = np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]
    parts: list[list[tuple[dict[str, Any], Any]]] = [[] for _ in sizes]
    start = 0
    for batch, mask, length in zip(data.batches, data.row_masks, lengths, strict=True):
        units = 1 if fixed else length
        own = rng.permutation(owners[start : start + units])
        start += units
        for number, part in enumerate(parts):
            rows = np.flatnonzero(own == number)
            if fixed and rows.size:
                part.append((batch, mask))
            elif rows.size:
                feeds = {n: v if n in signature.shared or not v.ndim else v[rows] for n, v in batch.items()}
                part.append((feeds, None if mask is None else mask[rows]))
    return [_made(data, part, signature) for part in parts]


def _samples(batch: Mapping[str, Any], signature: Signature) -> int:
    return next((len(v) for n, v in batch.items() if n not in signature.shared and v.ndim), 1)


def _made(data: CalibrationData, part: Sequence[tuple[dict[str, Any], Any]], signature: Signature) -> CalibrationData:
    batches, masks = tuple(batch for batch, _ in part), tuple(mask for _, mask in part)
    samples = sum(_samples(batch, signature) for batch in batches)
    tokens = sum(int(mask.sum()) for mask in masks if mask is not None) or data.tokens * samples // max(data.samples, 1)
    return replace(data, batches=batches, row_masks=masks, samples=samples, tokens=tokens)


def output_error(state: State, judged: CalibrationData, way_out: str) -> float:
    """Returns the relative squared difference of the output of a checked model to that of the model as it came.

    Args:
        state: behind the checks.
        judged: the rows.
        way_out: what to do instead where that cannot be said.

    Raises:
        OptionError: the model has no output that holds numbers.
    """
    known, cut = state.get(ComparedSessions), state.get(Cut)
    if known is None:
        known = ComparedSessions(whole_session(state), state.engine().whole(state.model.loadable(), "the changed model"))
    ends = {} if cut is None else cut.ends
    found = first_difference(known.pruned, known.dense, judged, range(len(judged.batches)), ends)
    if found is None:
        raise OptionError(f"the model has no floating-point output to judge by; {way_out}")
    return found.relative_rms**2
