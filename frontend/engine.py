"""How a piece of a model is run: what ONNX Runtime and torch offer alike to the passes.

A :class:`Part` is the nodes between two places of a graph, ready to run on batch after batch. It returns tensors, which
stay on the engine's device, and adds up the moments of activations there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.onnx_segments import Place, Tap
from liar_opt.frontend.records import ConsumerUse
from liar_opt.frontend.walk import GraphWalk
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.sessions import Runner

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


class Engine(ABC):
    """What runs a model, whole or in parts."""

    name: str
    """What the user knows it by."""

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
        patches: Sequence[Patch | ConstantPatch] = (),
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
            patches: consumers and constants that have other values; the graph stays as it is.
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
