"""Cuts the groups of a traced module, measured in torch or on the module's export."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.fx_module import Executor, FxModel, lower
from liar_opt.frontend.onnx_segments import VARIANCE_FLOOR, Place, Tap, live_tensors, nodes_for, row_mask
from liar_opt.passes.base import Finding, State
from liar_opt.passes.groups import ChannelGroup, Consumer
from liar_opt.passes.measured import Measured
from liar_opt.passes.open_module import device_of
from liar_opt.passes.prune_groups import PruneGroupsPass, SegmentRun, Sweep
from liar_opt.passes.repairs import AWARE
from liar_opt.runtime.errors import InternalError, ModelError, OptionError
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.torch_backend import BatchMoments, RunningMoments, batch_moments, real_rows, stream_gain


@dataclass(frozen=True, eq=False)
class Gradients(Finding):
    """The gradients of each group's blocks, by its name."""

    by: ClassVar[str] = "prune_module"
    by_group: Mapping[str, Any]


@dataclass(frozen=True)
class PruneModulePass(PruneGroupsPass):
    """Cut every group of a traced module, measured in torch, and fold the repair into its consumers."""

    def requires(self, state: State) -> None:
        """Checks the options.

        Raises:
            OptionError: as for ONNX graphs, or a repair that asks for the dense model beside the cut one.
        """
        super().requires(state)
        if self.repair in AWARE:
            raise OptionError(f"repair '{self.repair}' works on ONNX files alone; export the module, or give repair 'liar'")

    def _run(self, state: State, sweep: Sweep) -> SegmentRun:
        return _TorchRun(self, state, *sweep)


@dataclass(frozen=True)
class PruneExportedPass(PruneModulePass):
    """The same, measured in ONNX Runtime on the module's export."""

    def _run(self, state: State, sweep: Sweep) -> SegmentRun:
        from liar_opt.passes.module_on_onnx import OnnxRun

        return OnnxRun(self, state, *sweep)


class _TorchRun(SegmentRun):
    """The loop's state; segments of the traced graph run in torch."""

    def __init__(
        self, options: PruneGroupsPass, state: State, wide: tuple[ChannelGroup, ...], segments: tuple[Any, ...]
    ) -> None:
        super().__init__(options, state, wide, segments)
        assert isinstance(state.model, FxModel)
        self.executor = Executor(state.model, device_of(state.model))
        self.gradients: NDArray[np.float64] | None = None

    def measure(self, taps: list[Tap], stop: int, first: Any) -> dict[Place, Moments]:
        """Runs from the segment before, as it was cut, to the activations, and adds their moments up in float64."""
        start = 0 if self.alive_at is None else self.position(self.alive_at)
        names = [] if first is None else live_tensors(self.walk, self.position(first), self.waiting)
        made = [n for n in names if n not in self.alive[0]]
        wanted = {*made, *(t.tensor for t in taps), *(t.numbers for t in taps if t.numbers)}
        wanted.update(term for t in taps if t.stream is not None for term in t.stream.terms)
        nodes = nodes_for(self.walk.model.graph.nodes, start, stop, wanted, self.alive[0])
        result = {t.place: Moments(t.width) for t in taps}
        sums = {t.place: RunningMoments(result[t.place], t.bounds) for t in taps}
        for index, feeds in enumerate(self.data.batches):
            inputs = {**feeds, **self.alive[index]}
            try:
                values = {**inputs, **self.executor.run(inputs, nodes, sorted(wanted))}
            except (RuntimeError, IndexError, ValueError) as err:
                raise self._fault(feeds, " ".join(str(err).split())[:300]) from err
            for tap in taps:
                with _finite(tap):
                    sums[tap.place].add(self._moments(tap, values, index), index in self.held)
            if first is not None:
                self.alive[index] = {n: values[n] for n in names}
            self.tick()
        for tap in taps:
            with _finite(tap):
                sums[tap.place].finish()
        if first is not None:
            self.alive_at = first
        self.executor.forget()
        return result

    def _fault(self, feeds: Mapping[str, Any], said: str) -> Exception:
        """Returns what to raise for a batch that a part fails on: the data's fault, where the original fails on it, too."""
        model = self.state.model
        assert isinstance(model, FxModel) and model.program is not None and model.module is not None
        try:
            Executor(lower(model.program, model.module), device_of(model)).run(feeds)
        except (RuntimeError, IndexError, ValueError):
            fed = ", ".join(f"'{name}' {list(np.shape(value))}" for name, value in feeds.items())
            made = "liar-opt made them up: give real ones (--calibration), or another length (--sequence-length)"
            fits = "is its sequence length or a token id beyond what the model was made for?"
            return ModelError(
                f"torch fails on the calibration data ({fed}): {said}; {made if self.data.synthetic else fits}"
            )
        return InternalError(f"torch fails on a part of the model: {said}")

    def prune(self, group: ChannelGroup, moments: dict[Place, Moments]) -> None:
        """Finds the gradients of the group, where there are any, and goes on as usual."""
        gradients = self.state.get(Gradients)
        self.gradients = None if gradients is None else gradients.by_group.get(group.name)
        super().prune(group, moments)

    def measured(self, consumer: Consumer, moments: dict[Place, Moments]) -> Measured:
        """Adds the gradients of the group."""
        return replace(super().measured(consumer, moments), gradients=self.gradients)

    def _moments(self, tap: Tap, values: Mapping[str, Any], index: int) -> BatchMoments:
        mask = self.data.row_masks[index]
        rows = None if mask is None or tap.layout == "all" else row_mask(mask, tap.layout, tap.repeat)
        x = real_rows(values[tap.tensor], tap.axis, rows)
        if tap.numbers:
            x = x[real_rows(values[tap.numbers].reshape(-1, 1), 1, rows)[:, 0] == tap.expert]
        gain = None
        if tap.stream is not None:
            terms = [real_rows(values[t], -1, rows) for t in tap.stream.terms]
            gain = stream_gain(x, terms, tap.stream.weight, tap.stream.offset, tap.stream.projection, VARIANCE_FLOOR)
        return batch_moments(x, tap.bounds, gain)


@contextlib.contextmanager
def _finite(tap: Tap) -> Iterator[None]:
    """Says which activation it was that is not finite."""
    try:
        yield
    except OptionError as err:
        raise ModelError(
            f"activation '{tap.tensor}' has NaN or Inf on the calibration data; check the module on that data "
            "(float16 may overflow)"
        ) from err
