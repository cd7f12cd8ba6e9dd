"""How a piece of a model is run: what ONNX Runtime and torch offer alike to the passes.

A :class:`Part` is the nodes between two places of a graph, ready to run on batch after batch. It returns tensors, which
stay on the engine's device, and adds up the moments of activations there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.onnx_segments import Place, Tap
from liar_opt.frontend.records import ConsumerUse, StandIn
from liar_opt.frontend.walk import GraphWalk
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.sessions import Runner

if TYPE_CHECKING:
    from liar_opt.frontend.model import Model, Original

Value = Any
"""A tensor: an array, or what the engine keeps on its device."""


class NotFinite(Exception):
    """An activation has NaN or Inf; the argument is its name."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A consumer's weight with zeros in the removed rows, and what is added to its output, x W [m]."""

    uses: tuple[ConsumerUse, ...]
    weight: NDArray[Any]
    shift: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ConstantPatch:
    """Another value for the constant at one place: (node, input position)."""

    place: tuple[Any, int]
    value: NDArray[Any]


AnyPatch = Patch | ConstantPatch | StandIn
"""Other numbers in a weight, or another tensor in the place of one."""


def stand_ins(patches: Sequence[AnyPatch]) -> dict[str, StandIn]:
    """Returns what stands in for tensors, by their names."""
    return {patch.target: patch for patch in patches if isinstance(patch, StandIn)}


class Part(ABC):
    """Some nodes of a graph.

    Args:
        taps: the activations whose moments are added up, by tensor and axis.
    """

    def __init__(self, taps: Sequence[Tap]) -> None:
        self.taps = taps
        self.moments: dict[Place, Moments] = {t.place: Moments(t.width) for t in taps}

    @abstractmethod
    def run(
        self,
        feeds: Mapping[str, Value],
        mask: NDArray[np.bool_] | None = None,
        held_back: bool = False,
        arrays: Collection[str] = (),
    ) -> dict[str, Value]:
        """Runs one batch, and adds to the moments.

        Args:
            feeds: the graph's inputs, and the tensors that were given.
            mask: the rows that count, bool [b, s] or [b]; None: all.
            held_back: whether the rows count for the fold that is held back.
            arrays: the tensors that come back as arrays; others may stay on the device.

        Returns:
            The tensors that were wanted, by name.

        Raises:
            NotFinite: an activation that is measured has NaN or Inf.
            InternalError: it fails, and no data is known to be the reason.
            MemoryError: there was no memory.
        """

    def finish(self) -> dict[Place, Moments]:
        """Returns the moments of all batches.

        Raises:
            NotFinite: as ``run``.
        """
        return self.moments


class Reference(ABC):
    """A whole model with other values for some of its constants, which is never cut: what a cut one is compared with."""

    @abstractmethod
    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns its outputs, of the graph as it is written."""

    @abstractmethod
    def rounded(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns them with every weight moved by its rounding error."""

    def reordered(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns them computed as in the other ways of `Engine.ways`, whose sums may have another order."""
        return self.run(feeds)


class Engine(ABC):
    """What runs a model, whole or in parts."""

    name: str
    """What the user knows it by."""
    copies_weights: bool = False
    """Whether a part that is ready to run holds its weights a second time, in the memory of the host."""

    @abstractmethod
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
    ) -> Part:
        """Makes the nodes [start, stop) ready that ``wanted`` and ``taps`` need.

        Args:
            walk: the analysis; the graph may have been cut since.
            start: position of the first node.
            stop: position behind the last node.
            wanted: names of the tensors to return.
            given: tensors made before ``start`` that are at hand, as an example. What else is needed is made again.
            taps: activations whose moments are added up.
            patches: consumers and constants that have other values, tensors that others stand in for; the graph stays as it
                is.
            once: whether it will run a few times only: nothing is prepared for more.
        """

    @abstractmethod
    def whole(self, source: Any, what: str = "the model") -> Runner:
        """Loads a whole model.

        Args:
            source: a model, or where one comes from.
            what: how messages call it.

        Raises:
            ModelError: it cannot be loaded as it came.
            CheckError: one that we made cannot be loaded.
        """

    @abstractmethod
    def array(self, value: Value) -> NDArray[Any]:
        """Returns a tensor as an array."""

    @abstractmethod
    def ways(self, model: Model) -> Iterator[tuple[str, Callable[[], Runner]]]:
        """Yields in which ways a cut model will be run, in words, with what loads it so; as it is written first.

        What loads it raises whatever the engine does.
        """

    @abstractmethod
    def reference(
        self, walk: GraphWalk, outputs: Sequence[str], patches: Sequence[AnyPatch], store: ArrayStore | None
    ) -> Reference:
        """Returns a whole graph in which consumers and constants have other values, or tensors others in their place.

        Args:
            walk: the analysis of the graph, which stays as it is.
            outputs: what is computed.
            patches: the other values.
            store: where weights go that are made; None keeps them in memory.
        """

    @abstractmethod
    def rounded(self, model: Model, what: str) -> Runner:
        """Loads a whole model with every weight moved by its rounding error; ``what`` is how messages call it."""

    @abstractmethod
    def require_form(self, original: Original, model: Model, spared: Collection[str]) -> None:
        """Checks that a cut model can stand where the original stood, before it is run.

        Args:
            original: the model as it came.
            model: the cut one.
            spared: caches among its inputs and outputs, which may have lost heads.

        Raises:
            CheckError: it cannot.
        """

    def require_written(self, model: Model, feeds: Mapping[str, Any], found: Mapping[str, Any], dtype: str) -> float | None:
        """Checks what will be written, where that is another graph than the one that was cut.

        Args:
            model: the cut model.
            feeds: its inputs.
            found: what it gave.
            dtype: the precision of the comparison.

        Returns:
            How far it is from ``found``, relative; None where the graph is written as it is.

        Raises:
            CheckError: it computes something else.
        """
        return None
