"""torch as the engine: parts of a traced graph run in ATen operators, where the module's parameters are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.engine import ConstantPatch, Engine, NotFinite, Part, Patch, Value
from liar_opt.frontend.fx_module import Executor, FxModel, FxOriginal, Patched, to_numpy
from liar_opt.frontend.onnx_segments import VARIANCE_FLOOR, Tap, nodes_for, row_mask
from liar_opt.frontend.walk import GraphWalk
from liar_opt.runtime.errors import InternalError, ModelError, OptionError
from liar_opt.runtime.torch_backend import BatchMoments, RunningMoments, batch_moments, real_rows, stream_gain, under_kernel

FAILURES = (RuntimeError, IndexError, ValueError)
"""What torch raises where data does not fit a model."""


@dataclass(frozen=True)
class TorchEngine(Engine):
    """torch on the device of a module.

    Attributes:
        model: the traced module; what was traced is its original.
    """

    model: FxModel
    name = "torch"

    def part(
        self,
        walk: GraphWalk,
        start: int,
        stop: int,
        wanted: Sequence[str],
        given: Mapping[str, Value],
        *,
        taps: Sequence[Tap] = (),
        patches: Sequence[Patch | ConstantPatch] = (),
        once: bool = False,
    ) -> TorchPart:
        """Finds the nodes."""
        assert isinstance(walk.model, FxModel)
        read = {*wanted, *(t.tensor for t in taps), *(t.numbers for t in taps if t.numbers)}
        read.update(term for t in taps if t.stream is not None for term in t.stream.terms)
        nodes = nodes_for(walk.model.graph.nodes, start, stop, read, given)
        return TorchPart(self, Executor(walk.model, self.model.device, patched(patches)), nodes, wanted, taps, sorted(read))

    def whole(self, source: FxModel | FxOriginal, what: str = "the model") -> TorchRunner:
        """Returns a traced module that runs as it is now."""
        return TorchRunner(source.model() if isinstance(source, FxOriginal) else source, self.model.device)

    def array(self, value: Value) -> NDArray[Any]:
        """Returns a tensor as an array."""
        return value if isinstance(value, np.ndarray) else to_numpy(value)

    def fault(self, feeds: Mapping[str, Any], said: str) -> Exception:
        """Returns what to raise for a batch that a part fails on: the data's fault, where the original fails on it, too."""
        model = self.model
        own = {spec.name for spec in model.signature}
        feeds = {name: value for name, value in feeds.items() if name in own}
        try:
            Executor(model.original.model(), model.device).run(feeds)
        except FAILURES:
            fed = ", ".join(f"'{name}' {list(np.shape(value))}" for name, value in feeds.items())
            made = "where liar-opt made them up, give real ones (--calibration), or another length (--sequence-length)"
            fits = "is its sequence length or a token id beyond what the model was made for?"
            return ModelError(f"torch fails on the calibration data ({fed}): {said}; {fits} ({made})")
        return InternalError(f"torch fails on a part of the model: {said}")


class TorchPart(Part):
    """Nodes of a traced graph.

    Args:
        engine: what it belongs to.
        executor: of the graph.
        nodes: in execution order.
        wanted: names of the tensors to return.
        taps: the activations.
        read: names of all tensors that are returned or measured.
    """

    def __init__(
        self,
        engine: TorchEngine,
        executor: Executor,
        nodes: Sequence[Any],
        wanted: Sequence[str],
        taps: Sequence[Tap],
        read: Sequence[str],
    ) -> None:
        super().__init__(taps)
        self.engine, self.executor, self.nodes = engine, executor, nodes
        self.wanted, self.read = wanted, read
        self.sums = {t.place: RunningMoments(self.moments[t.place], t.bounds) for t in taps}

    def run(
        self,
        feeds: Mapping[str, Value],
        mask: NDArray[np.bool_] | None = None,
        held_back: bool = False,
        arrays: Collection[str] = (),
    ) -> dict[str, Value]:
        """Runs one batch."""
        try:
            values = {**feeds, **self.executor.run(feeds, self.nodes, self.read)}
        except FAILURES as err:
            raise self.engine.fault(feeds, " ".join(str(err).split())[:300]) from err
        for tap in self.taps:
            try:
                self.sums[tap.place].add(_moments(tap, values, mask), held_back)
            except OptionError as err:
                raise NotFinite(tap.tensor) from err
        return {n: self.engine.array(values[n]) if n in arrays else values[n] for n in self.wanted}

    def finish(self) -> dict[Any, Any]:
        """Returns the moments of all batches."""
        for tap in self.taps:
            try:
                self.sums[tap.place].finish()
            except OptionError as err:
                raise NotFinite(tap.tensor) from err
        return self.moments


class TorchRunner:
    """A traced module behind the face of a session.

    Args:
        model: the module, cut or not.
        device: where it runs.
    """

    def __init__(self, model: FxModel, device: Any) -> None:
        self.executor = Executor(model, device)
        self.inputs = [spec.name for spec in model.signature]
        self.outputs = [t.name for t in model.graph.outputs]

    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None, arrays: bool | Sequence[str] = False
    ) -> dict[str, Any]:
        """Runs it; all that comes back are arrays, bfloat16 as float32."""
        found = self.executor.run(feeds, wanted=self.outputs if outputs is None else outputs)
        return {name: host_array(value) for name, value in found.items()}

    def as_deployed(self) -> TorchRunner:
        """Returns itself."""
        return self


def host_array(tensor: Any) -> NDArray[Any]:
    """Returns a tensor as an array; bfloat16 as float32."""
    plain = tensor.detach().cpu()
    return np.asarray((plain.float() if str(plain.dtype) == "torch.bfloat16" else plain).numpy())


def patched(patches: Sequence[Patch | ConstantPatch]) -> Patched:
    """Returns the constants that patches change, by (node, input position), and what they add to outputs, by node."""
    constants: dict[tuple[int, int], NDArray[Any]] = {}
    shifts: dict[int, NDArray[Any]] = {}
    for patch in patches:
        if isinstance(patch, ConstantPatch):
            constants[id(patch.place[0]), patch.place[1]] = patch.value
            continue
        for use in patch.uses:
            constants[id(use.holder), use.weight_position] = patch.weight
            if np.any(patch.shift):
                free = [use.weight.shape[axis] for axis in use.column_axes]
                shape = [*free, *[1] * (-1 - use.output_axis)] if len(free) == 1 else free
                shifts[id(use.node)] = (patch.shift * use.scale).reshape(shape).astype(patch.weight.dtype)
    return Patched(constants, shifts)


def _moments(tap: Tap, values: Mapping[str, Any], mask: NDArray[np.bool_] | None) -> BatchMoments:
    rows = None if mask is None or tap.layout == "all" else row_mask(mask, tap.layout, tap.repeat)
    source = values[tap.tensor]
    if tap.window is not None:
        steps = [s * n for s, n in zip(tap.window.strides, tap.every, strict=True)]
        source = under_kernel(source, tap.window.kernel, steps, tap.window.dilations, tap.window.pads)
    x = real_rows(source, tap.axis, rows)
    if tap.numbers:
        x = x[real_rows(values[tap.numbers].reshape(-1, 1), 1, rows)[:, 0] == tap.expert]
    gain = None
    if tap.stream is not None:
        terms = [real_rows(values[t], -1, rows) for t in tap.stream.terms]
        gain = stream_gain(x, terms, tap.stream.weight, tap.stream.offset, tap.stream.projection, VARIANCE_FLOOR)
    return batch_moments(x, tap.bounds, gain)
