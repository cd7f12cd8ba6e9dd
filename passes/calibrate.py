"""The calibration data of a run: read for the model's inputs, in batches that fit the memory."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from liar_opt.frontend.causal import is_causal
from liar_opt.frontend.either_model import bytes_on
from liar_opt.frontend.live_memory import live_bytes
from liar_opt.frontend.tables import looked_up, vocabulary
from liar_opt.passes.base import State
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.plan_memory import TensorSizes
from liar_opt.passes.sweep import HELD_BACK
from liar_opt.passes.verify_model import dense_session
from liar_opt.runtime.calibration_data import CalibrationData, load_calibration
from liar_opt.runtime.memory import anonymous, show_size
from liar_opt.runtime.ranks import current
from liar_opt.runtime.self_calibration import Author, is_own_text, write_calibration
from liar_opt.runtime.signatures import InputSpec, Signature
from liar_opt.runtime.synthetic_inputs import IMAGE_SIZES

SESSIONS = 3
"""So many hold the memory of a batch at a time, which ONNX Runtime keeps: of the dense model, and of two segments."""
BASE = 1 << 26
"""What a process has before the work is counted in steps of this."""
LEAST_BATCHES = 3
"""One to measure a loss on, one to choose the ridge on, and one to fit to."""
SIDE_BY_SIDE = 6
"""Batches that are made smaller leave room for so many: three sessions check the result, each takes about twice as much."""


def calibrate(
    state: State,
    source: Any,
    options: PruneOptions,
    limit: int | None,
    author: tuple[Callable[[], Any], Callable[[Any, Signature], Author]],
) -> CalibrationData:
    """Returns the calibration data of a model: read, made up, or written by the model itself.

    Args:
        state: the analysed model.
        source: see :func:`liar_opt.prune`.
        options: of the run.
        limit: how many tokens a sample may have at the most; None for any number.
        author: what loads the model that may write, and what makes a writer of it.

    Raises:
        OptionError: it cannot be read, or does not fit the model's inputs.
    """
    fields = {name: value for name, value in options.data().items() if name != "packing"}
    fields |= {"vocabulary": vocabulary(state.model), "positions": limit}
    inputs = state.analysed().input_specs()
    if source is None:
        fields["rows"] = looked_up(state.model)
    if is_own_text(source):
        written = {k: v for k, v in fields.items() if k not in ("text_column", "mask_input")}
        progress = functools.partial(state.progress, "write")
        return current().once(lambda: write_calibration(author[0], inputs, author=author[1], progress=progress, **written))
    packing = is_causal(state.model) if options.packing == "auto" else options.packing == "on"
    if source is None and any(len(i.shape) == 4 and not isinstance(i.shape[-1], int) for i in inputs):
        fields["image_size"] = _image_size(state, inputs, fields)
    return load_calibration(source, inputs, packing=packing, **fields)


def _image_size(state: State, inputs: Sequence[InputSpec], fields: Mapping[str, Any]) -> int | None:
    """Returns the first of the usual sizes that the model runs with: graphs leave open what their positions fix."""
    session = dense_session(state)
    for size in IMAGE_SIZES:
        one = load_calibration(None, inputs, **{**fields, "samples": 1}, image_size=size)
        try:
            session.run(one.batches[0], session.outputs)
        except Exception:  # of ONNX Runtime: a class of its own for each release
            continue
        return size
    return None


def fitted(state: State, data: CalibrationData, notes: list[str]) -> CalibrationData:
    """Returns the data in smaller batches where the live tensors of the model, run on one, take more than may be used.

    Args:
        state: the analysed model.
        data: in the batches that were asked for.
        notes: gets a sentence where they became smaller.
    """
    dynamic = all(not i.shape or not isinstance(i.shape[0], int) for i in state.analysed().input_specs())
    sizes = bytes_on(state.model, data.batches[0]) if dynamic else {}
    if not sizes:
        return data
    need = live_bytes(state.model.graph.nodes, sizes)
    samples = max((len(value) for value in data.batches[0].values() if value.ndim), default=1)
    room, sessions = state.memory.limit, 1
    if state.memory.asked:  # beside what the process has; in steps, so that a run that goes on makes the same batches
        room = max(room - -(-current().most(anonymous() or 0) // BASE) * BASE, room // 4)
        sessions = SESSIONS
    if sessions * need <= room or samples == 1:
        state.add(TensorSizes(sizes))
        return data
    fits = max(1, samples * room // (SIDE_BY_SIDE * need))
    fitted = data.in_batches_of(1 << (fits.bit_length() - 1) if state.memory.asked else fits)
    notes.append(
        f"calibration ran in {len(fitted.batches)} batches: one of {samples} samples takes {show_size(need)} of memory, "
        f"and {show_size(state.memory.limit)} may be used"
    )
    return fitted


def divided(data: CalibrationData, inputs: Sequence[InputSpec]) -> CalibrationData:
    """Returns data of few batches in smaller ones, some of which can be held back, where the batch axis is free."""
    free = all(not i.shape or not isinstance(i.shape[0], int) for i in inputs)
    if len(data.batches) >= LEAST_BATCHES or not free:
        return data
    samples = sum(max((len(v) for v in batch.values() if v.ndim), default=1) for batch in data.batches)
    return data.in_batches_of(max(1, samples // HELD_BACK))
