"""torch as the engine: parts of a traced graph run in ATen operators, where the module's parameters are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.engine import AnyPatch, ConstantPatch, Engine, NotFinite, Part, Reference, Value, stand_ins
from liar_opt.frontend.fx_module import Executor, FxModel, FxOriginal, Patched, to_numpy, to_torch
from liar_opt.frontend.fx_rewrite import changed_parameters, copy_without, cut_graph_module, cut_module
from liar_opt.frontend.graph_tensors import is_constant, nudged
from liar_opt.frontend.model import Model, Original
from liar_opt.frontend.onnx_segments import VARIANCE_FLOOR, Tap, nodes_for, row_mask
from liar_opt.frontend.records import StandIn
from liar_opt.frontend.walk import GraphWalk
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.compare import TOLERANCES
from liar_opt.runtime.errors import InternalError, ModelError, OptionError
from liar_opt.runtime.torch_backend import BatchMoments, RunningMoments, batch_moments, real_rows, stream_gain, under_kernel

if TYPE_CHECKING:
    import torch

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
        patches: Sequence[AnyPatch] = (),
        once: bool = False,
    ) -> TorchPart:
        """Finds the nodes."""
        assert isinstance(walk.model, FxModel)
        read = {*wanted, *(name for t in taps for name in t.reads)}
        nodes = nodes_for(walk.model.graph.nodes, start, stop, read, given, stand_ins(patches))
        return TorchPart(self, Executor(walk.model, self.model.device, patched(patches)), nodes, wanted, taps, sorted(read))

    def whole(self, source: FxModel | FxOriginal, what: str = "the model") -> TorchRunner:
        """Returns a traced module that runs as it is now."""
        return TorchRunner(source.model() if isinstance(source, FxOriginal) else source, self.model.device)

    def array(self, value: Value) -> NDArray[Any]:
        """Returns a tensor as an array."""
        return value if isinstance(value, np.ndarray) else to_numpy(value)

    def ways(self, model: Model) -> Iterator[tuple[str, Callable[[], TorchRunner]]]:
        """Yields the one way that there is."""
        yield "in torch", functools.partial(self.whole, cast(FxModel, model))

    def reference(
        self, walk: GraphWalk, outputs: Sequence[str], patches: Sequence[AnyPatch], store: ArrayStore | None
    ) -> TorchReference:
        """Returns the traced graph, which runs with other constants."""
        return TorchReference(self, cast(FxModel, walk.model), outputs, patched(patches))

    def rounded(self, model: Model, what: str) -> TorchRunner:
        """Returns a traced module with every weight moved by its rounding error."""
        fx = cast(FxModel, model)
        return TorchRunner(fx, self.model.device, _rounded(fx, Patched()))

    def require_form(self, original: Original, model: Model, spared: Collection[str]) -> None:
        """Checks nothing: what a trace takes and gives is the module's own."""


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
            raise InternalError(f"torch fails on a part of the model: {' '.join(str(err).split())[:300]}") from err
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
        changed: what is other than in the graph.
    """

    def __init__(self, model: FxModel, device: Any, changed: Patched | None = None) -> None:
        self.executor = Executor(model, device, changed)
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


class TorchReference(Reference):
    """A traced module with other values for some constants.

    Args:
        engine: what runs it.
        model: the module.
        outputs: what is computed.
        changed: what is other than in the graph.
    """

    def __init__(self, engine: TorchEngine, model: FxModel, outputs: Sequence[str], changed: Patched) -> None:
        self.engine, self.model, self.outputs, self.changed = engine, model, list(outputs), changed
        self.runner = TorchRunner(model, engine.model.device, changed)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns its outputs."""
        return self.runner.run(feeds, self.outputs)

    @functools.cached_property
    def _moved(self) -> TorchRunner:
        return TorchRunner(self.model, self.engine.model.device, _rounded(self.model, self.changed))

    def rounded(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns them with every weight moved by its rounding error."""
        return self._moved.run(feeds, self.outputs)


def _rounded(model: FxModel, changed: Patched) -> Patched:
    """Returns what moves every weight by its rounding error, those that are changed already included."""
    rng = np.random.default_rng(0)
    places = [(node, i) for node in model.graph.nodes for i, t in enumerate(node.inputs) if is_constant(t)]
    moved = {id(node.inputs[i].values): nudged(node.inputs[i].values, rng) for node, i in places}
    constants = {(id(node), i): moved[id(node.inputs[i].values)] for node, i in places}
    return Patched(
        constants | {place: nudged(value, rng) for place, value in changed.constants.items()},
        changed.shifts,
        changed.stand_ins,
    )


class TimedModule:
    """A module behind the face of a session, for timing: in its own code, or as the traced graph.

    What is in training mode is timed as a copy that is not, of the same parameters: no running mean may move.

    Args:
        model: its graph, cut or not.
        module: what is run.
        own_code: whether that is the module as it was written.
    """

    def __init__(self, model: FxModel, module: torch.nn.Module, own_code: bool = True) -> None:
        if any(part.training for part in module.modules()):
            module = copy_without(module, {name for name, _ in module.named_parameters(remove_duplicate=False)}).eval()
        self.model, self.module, self.own_code = model, module, own_code
        self.inputs = [spec.name for spec in model.signature]

    @classmethod
    def of(cls, model: FxModel) -> TimedModule:
        """Returns a module as it was cut; the traced graph where no attributes make its code fit."""
        assert model.program is not None and model.module is not None
        if not changed_parameters(model):
            return cls(model, model.module)
        try:
            return cls(
                model, cut_module(model, dict(model.program.example_inputs[1]), TOLERANCES[model.least_precision()])[0]
            )
        except ModelError:
            return cls(model, model.module).as_graph()

    def as_graph(self) -> TimedModule:
        """Returns the traced graph of the same."""
        model = self.model
        return TimedModule(model, cut_graph_module(model).to(model.device), own_code=False) if self.own_code else self

    def run(self, feeds: Mapping[str, Any]) -> None:
        """Runs it once, to the end."""
        import torch

        arguments = {name: to_torch(feeds[name], self.model.device) for name in self.inputs}
        with torch.no_grad():
            self.module(**arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def count_flops(model: FxModel, feeds: Mapping[str, Any]) -> int | None:
    """Returns the operations of all products and convolutions for inputs of the shapes of ``feeds``; none is carried out.

    A multiplication and an addition are two operations. None where a shape depends on the data.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    # torch's counter knows not all kernels of attention, and none of them where queries share keys and values.
    kernels = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    attention = {getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}"): _attention_flops for kernel in kernels}
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), counter:
            Executor(model, model.device).run({spec.name: feeds[spec.name] for spec in model.signature})
    except FAILURES:
        return None
    return int(counter.get_total_flops())


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Returns the operations for queries [b, h, s, e], keys [b, k, t, e] and values [b, k, t, v]."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def host_array(tensor: Any) -> NDArray[Any]:
    """Returns a tensor as an array; bfloat16 as float32."""
    plain = tensor.detach().cpu()
    return np.asarray((plain.float() if str(plain.dtype) == "torch.bfloat16" else plain).numpy())


def patched(patches: Sequence[AnyPatch]) -> Patched:
    """Returns what patches change: constants by (node, input position), outputs by node, what stands in for tensors."""
    constants: dict[tuple[int, int], NDArray[Any]] = {}
    shifts: dict[int, NDArray[Any]] = {}
    for patch in patches:
        if isinstance(patch, ConstantPatch):
            constants[id(patch.place[0]), patch.place[1]] = patch.value
            continue
        if isinstance(patch, StandIn):
            continue
        for use in patch.uses:
            constants[id(use.holder), use.weight_position] = patch.weight
            if np.any(patch.shift):
                free = [use.weight.shape[axis] for axis in use.column_axes]
                shape = [*free, *[1] * (-1 - use.output_axis)] if len(free) == 1 else free
                shifts[id(use.node)] = (patch.shift * use.scale).reshape(shape).astype(patch.weight.dtype)
    return Patched(constants, shifts, stand_ins(patches))


def _moments(tap: Tap, values: Mapping[str, Any], mask: NDArray[np.bool_] | None) -> BatchMoments:
    import torch

    rows = None if mask is None or tap.layout == "all" else row_mask(mask, tap.layout, tap.repeat)
    source = values[tap.tensor]
    if tap.window is not None:
        steps = [s * n for s, n in zip(tap.window.strides, tap.every, strict=True)]
        source = under_kernel(source, tap.window.kernel, steps, tap.window.dilations, tap.window.pads)
    x = real_rows(source, tap.axis, rows)
    if tap.beside:
        x = torch.cat([x, real_rows(values[tap.beside], tap.axis, rows)], dim=1)
    if tap.numbers:
        x = x[real_rows(values[tap.numbers].reshape(-1, 1), 1, rows)[:, 0] == tap.expert]
    gain = None
    if tap.stream is not None:
        terms = [real_rows(values[t], -1, rows) for t in tap.stream.terms]
        gain = stream_gain(x, terms, tap.stream.weight, tap.stream.offset, tap.stream.projection, VARIANCE_FLOOR)
    return batch_moments(x, tap.bounds, gain)
