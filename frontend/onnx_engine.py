"""ONNX Runtime as the engine: models and parts of them become sessions here, and its errors are put in words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from liar_opt.frontend.engine import AnyPatch, ConstantPatch, Engine, NotFinite, Part, Patch, Reference, Value, stand_ins
from liar_opt.frontend.graph_tensors import nudged
from liar_opt.frontend.model import Model, Original
from liar_opt.frontend.onnx_form import require_format, require_interface, require_signature, require_valid
from liar_opt.frontend.onnx_model import OnnxModel, OnnxOriginal, onnx_graph
from liar_opt.frontend.onnx_patch import patch_constant, patch_consumer
from liar_opt.frontend.onnx_segments import ROWS, Extracted, Tap, extract, row_mask
from liar_opt.frontend.sound_model import shown
from liar_opt.frontend.walk import GraphWalk
from liar_opt.frontend.weight_files import without_data
from liar_opt.frontend.widen_graph import nodes_within, widen
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.arrays import HOST, solver
from liar_opt.runtime.compare import require_close
from liar_opt.runtime.errors import CheckError, InternalError, LiarOptError, ModelError, OptionError
from liar_opt.runtime.sessions import Level, Runner, Session, as_array, element_type, unknown_operators

NO_MEMORY = ("Failed to allocate memory", "bad_alloc", "bad allocation")
"""How ONNX Runtime says that there is no memory left."""
Source = OnnxOriginal | OnnxModel | Extracted | tuple[bytes, Mapping[str, NDArray[Any]]]
"""A model: as it came, as it is now, a part of one, or as bytes with the data of its large initializers."""


@dataclass(frozen=True)
class OnnxEngine(Engine):
    """ONNX Runtime on one device.

    Attributes:
        device: where it runs.
        low_memory: whether weights are used where they lie (see ``Session``).
    """

    device: Literal["cpu", "cuda"] = "cpu"
    low_memory: bool = False
    name = "ONNX Runtime"

    @property
    def copies_weights(self) -> bool:  # type: ignore[override]
        """Whether ONNX Runtime packs the weights of a part."""
        return not self.low_memory

    def session(self, source: Source, level: Level | None = None, low_memory: bool | None = None) -> Session:
        """Loads a model; raises what ONNX Runtime raises.

        Args:
            source: the model.
            level: how far ONNX Runtime's optimizer goes; None leaves it to ONNX Runtime.
            low_memory: as the engine is, if None.
        """
        if isinstance(source, Extracted):
            source = source.serialise(), source.weights
        elif not isinstance(source, tuple):
            source = source.detached()
        return Session(
            source[0], self.device, source[1], self.low_memory if low_memory is None else low_memory, level=level
        )

    def whole(self, source: Source, what: str = "the model") -> Session:
        """Loads a whole model.

        Raises:
            ModelError: ONNX Runtime cannot load a model as it came; the message names the operator that it lacks.
            CheckError: it cannot load one that we made.
        """
        try:
            return self.session(source)
        except Exception as err:
            if isinstance(source, OnnxOriginal):
                raise ModelError(cannot_load(source, _line(err))) from err
            raise CheckError(f"ONNX Runtime cannot load {what}: {_line(err)}") from err

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
    ) -> OnnxPart:
        """Makes a session of some nodes.

        Raises:
            InternalError: ONNX Runtime cannot load it, and it could load the whole.
        """
        types = {name: element_type(value) for name, value in given.items()}
        extracted = extract(walk, start, stop, wanted, types, taps, stand_ins(patches))
        apply_patches(extracted, patches)
        try:
            session = self.session(extracted, low_memory=self.low_memory or once)
        except Exception as err:
            raise InternalError(f"ONNX Runtime cannot load a part of the model: {_line(err)}") from err
        return OnnxPart(session, wanted, taps)

    def array(self, value: Value) -> NDArray[Any]:
        """Returns a tensor as an array."""
        return as_array(value)

    def ways(self, model: Model) -> Iterator[tuple[str, Callable[[], Session]]]:
        """Yields ONNX Runtime's optimizer off and on; what it packs does not fit where memory is tight."""
        parts = onnx_graph(model).detached()
        levels: tuple[Level, ...] = ("none",) if self.low_memory else ("none", "all")
        for level in levels:
            how = f"with ONNX Runtime's optimizer {'off' if level == 'none' else 'on'}"
            yield how, functools.partial(self.session, parts, level, level == "none")

    def reference(
        self, walk: GraphWalk, outputs: Sequence[str], patches: Sequence[AnyPatch], store: ArrayStore | None
    ) -> OnnxReference:
        """Makes a session of the whole graph, without ONNX Runtime's optimizer."""
        whole = extract(walk, 0, len(walk.model.graph.nodes), list(outputs), {}, (), stand_ins(patches))
        apply_patches(whole, patches)
        return OnnxReference(self, whole, store)

    def rounded(self, model: Model, what: str) -> Session:
        """Loads a model with every weight moved by its rounding error."""
        return self.whole(_rounded(*onnx_graph(model).detached()), what)

    def require_form(self, original: Original, model: Model, spared: Collection[str]) -> None:
        """Checks the interface, and that it is valid ONNX if the original was."""
        assert isinstance(original, OnnxOriginal)
        require_interface(original, onnx_graph(model), spared)
        require_format(original, onnx_graph(model))

    def require_written(self, model: Model, feeds: Mapping[str, Any], found: Mapping[str, Any], dtype: str) -> float | None:
        """Checks a merged decoder, branch by branch, against the flat graph that was cut."""
        merged = model.merged
        if merged is None:
            return None
        proto, arrays = onnx_graph(model).as_written()
        require_signature(merged.shell, proto, merged.sizes(model.resized))
        require_valid(without_data(proto))
        session = self.whole((widen(proto).SerializeToString(), arrays), "the pruned model")
        worst = 0.0
        for branch in (merged.first, merged.second):
            chosen = {**feeds, **merged.feeds(branch, found)}
            names = {
                output: name
                for output, name in zip(merged.shell.graph.node[0].output, branch.outputs, strict=True)
                if name is not None and name in found
            }
            ours = session.run(chosen, list(names), arrays=True)
            theirs = {output: found[name] for output, name in names.items()}
            worst = max(worst, require_close(ours, theirs, dtype, f"{branch.attribute} against the flat graph"))
        return worst


class OnnxReference(Reference):
    """A graph with other values for some constants.

    Args:
        engine: what runs it.
        part: the whole of it.
        store: where weights go that are moved.
    """

    def __init__(self, engine: OnnxEngine, part: Extracted, store: ArrayStore | None) -> None:
        self.engine, self.part, self.store = engine, part, store
        self.session = engine.session(part, "none", low_memory=True)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns its outputs, without ONNX Runtime's optimizer."""
        return self.session.run(feeds, arrays=True)

    @functools.cached_property
    def _moved(self) -> Session:
        return self.engine.session(_rounded(self.part.serialise(), self.part.weights, self.store), "none", low_memory=True)

    @functools.cached_property
    def _optimized(self) -> Session:
        return self.engine.session(self.part, "all", low_memory=False)

    def rounded(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns them with every weight moved by its rounding error."""
        return self._moved.run(feeds, arrays=True)

    def reordered(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns them with ONNX Runtime's optimizer, which computes in another order."""
        return self._optimized.run(feeds, arrays=True)


def _rounded(model: bytes, arrays: Mapping[str, Any], store: ArrayStore | None = None) -> tuple[bytes, dict[str, Any]]:
    """Returns a model, and the data of its large weights, with every weight moved by its rounding error.

    The large ones are in ``store`` then, if there is one.
    """
    rng = np.random.default_rng(0)
    proto = onnx.ModelProto.FromString(model)
    for tensor in proto.graph.initializer:
        if tensor.name not in arrays:
            value = nudged(onnx.numpy_helper.to_array(tensor), rng)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    moved = ((name, nudged(value, rng)) for name, value in arrays.items())
    return proto.SerializeToString(), {name: v if store is None else store.put(v) for name, v in moved}


class OnnxPart(Part):
    """A session that returns tensors, and sums of activations beside them.

    Args:
        session: of the extracted nodes.
        wanted: names of the tensors to return.
        taps: the activations.
    """

    def __init__(self, session: Session, wanted: Sequence[str], taps: Sequence[Tap]) -> None:
        super().__init__(taps)
        self.session, self.wanted = session, list(wanted)

    def run(
        self,
        feeds: Mapping[str, Value],
        mask: NDArray[np.bool_] | None = None,
        held_back: bool = False,
        arrays: Collection[str] = (),
    ) -> dict[str, Value]:
        """Runs one batch."""
        rows = {}
        if mask is not None:
            laid = {(t.layout, t.repeat) for t in self.taps if t.layout != "all"}
            rows = {f"{ROWS}_{layout}{repeat}": row_mask(mask, layout, repeat) for layout, repeat in laid}
        sums = [o for t in self.taps for o in t.outputs]
        # Where the solver is on the device as well, the sums stay there (`runtime.arrays`), but for the counts.
        few = sums if solver() is HOST else [o for t in self.taps for o in t.outputs[:2]]
        values = run_session(self.session, {**feeds, **rows}, [*self.wanted, *sums], [*arrays, *few])
        for tap in self.taps:
            seen, count = (values[o] for o in tap.outputs[:2])
            total, *second = (solver().there(values[o]) for o in tap.outputs[2:])
            try:
                self.moments[tap.place].add_block_rows(
                    float(count.reshape(-1)[0]), total.reshape(-1), second, tap.bounds, held_back, int(seen)
                )
            except OptionError as err:
                raise NotFinite(tap.tensor) from err
        return {name: values[name] for name in self.wanted}


def run_session(
    session: Runner,
    feeds: Mapping[str, Value],
    outputs: Sequence[str],
    arrays: Sequence[str],
    engine: str = OnnxEngine.name,
) -> dict[str, Value]:
    """Runs a session on one batch; arguments as ``Session.run``, and what messages call what runs it.

    Raises:
        InternalError: it fails. Whether the original fails on that data as well, `verify_model.require_runs` tells.
        MemoryError: ONNX Runtime found no memory.
    """
    try:
        return session.run(feeds, outputs, arrays)
    except (LiarOptError, InternalError):
        raise
    except Exception as err:
        if any(text in str(err) for text in NO_MEMORY):
            raise MemoryError(_line(err)) from err
        part = ", ".join(f"'{name}'" for name in outputs[:3])
        raise InternalError(f"{engine} fails on the part of the model that computes {part}: {_line(err)}") from err


def apply_patches(segment: Extracted, patches: Sequence[AnyPatch]) -> None:
    """Gives consumers and constants of an extracted segment other values, in place."""
    for patch in patches:
        if isinstance(patch, ConstantPatch):
            patch_constant(segment, [patch.place], patch.value)
        elif isinstance(patch, Patch):
            patch_consumer(segment, patch.uses, patch.weight, patch.shift)


def cannot_load(dense: OnnxOriginal, reason: str) -> str:
    """Returns a sentence on an original that ONNX Runtime does not take, for ``reason``, one line of its own."""
    name = f"'{dense.source}'" if dense.source else "the model"
    nodes = {(n.domain, n.op_type): shown(n) for n in nodes_within(dense.proto.graph.node)}
    unknown = unknown_operators(nodes)
    if not unknown:
        return f"ONNX Runtime cannot load {name}: {reason}"
    first = next(text for (domain, op), text in nodes.items() if unknown[0] in (op, f"{domain}::{op}"))
    out = "--custom-ops LIBRARY.so (custom_ops=) loads it" if "::" in unknown[0] else "a newer one may have it"
    more = f", nor {', '.join(unknown[1:4])}" if unknown[1:] else ""
    return f"{unknown[0]} is not in this ONNX Runtime{more} (node {first} of {name}); {out}"


def _line(err: Exception) -> str:
    return " ".join(str(err).split())[:300]
