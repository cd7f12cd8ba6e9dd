"""What passes work on: a graph, whatever it was made of, and the model as it came.

:class:`Model` is what ONNX graphs (`onnx_model`) and traced modules (`fx_module`) have in common: the graph in the classes
of onnx-graphsurgeon, its weights, and what became of its sizes. :class:`Original` gives it again any number of times.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from liar_opt.frontend.fold_weights import Left
from liar_opt.frontend.graph_tensors import Narrow, constant_value, is_float
from liar_opt.runtime.array_store import ArrayStore
from liar_opt.runtime.signatures import InputSpec

if TYPE_CHECKING:
    from liar_opt.frontend.merged_decoder import MergedDecoder
    from liar_opt.frontend.ties import Taken

PRECISION = ("bfloat16", "float16", "float32", "float64")
"""Types of weights, the least precise first."""


class Original(ABC):
    """A stored ONNX file, or a traced module."""

    @abstractmethod
    def model(self) -> Model:
        """Returns the model as a graph; each call makes a new one, weights are shared."""

    @abstractmethod
    def as_given(self) -> Any:
        """Returns the model as its user has it: an ONNX proto, or a module."""

    @abstractmethod
    def digest(self) -> str:
        """Returns the SHA-256 of the model with all its weights."""


@dataclass(eq=False)
class Model(ABC):
    """A graph of operators.

    Attributes:
        traced: whether it is a module, lowered, and no graph of ONNX.
        graph: the nodes and their tensors.
        source: the file or folder that it came from.
        notes: what its user should know.
        resized: by name of an input or output and axis: the size that it has now.
        store: where new weights go that need not be in memory; None keeps them.
        tied: whether layers that share a table by heads (a position bias) must keep the same ones (`ties`).
        computed: weights that the graph computes and that were not folded, with the reason.
    """

    traced: ClassVar[bool] = False
    graph: gs.Graph
    source: Path | None = None
    notes: list[str] = field(default_factory=list)
    resized: dict[str, dict[int, int]] = field(default_factory=dict)
    store: ArrayStore | None = None
    computed: list[Left] = field(default_factory=list)
    tied: bool = False

    @property
    @abstractmethod
    def opset(self) -> int:
        """The version of the standard operator set."""

    @property
    def merged(self) -> MergedDecoder | None:
        """What the graph is folded to when it is written, if it came from a merged decoder."""
        return None

    @property
    def inside(self) -> frozenset[str]:
        """The initializers that lie in branches (of an If, Loop or Scan); what else a branch reads is outside."""
        return frozenset()

    @abstractmethod
    def inputs(self) -> list[InputSpec]:
        """Returns the inputs: name, dtype and shape, with symbolic dimensions as strings."""

    @abstractmethod
    def normalise(self) -> int:
        """Brings the graph to the form that the analysis expects; returns the number of nodes removed."""

    @abstractmethod
    def loadable(self) -> Any:
        """Returns what an engine loads, of the graph as it is now."""

    @abstractmethod
    def structure(self) -> bytes:
        """Returns what is known of the model without the data of its weights."""

    @abstractmethod
    def file_bytes(self) -> int:
        """Returns the size of the model's file, to a few bytes for each weight."""

    # -- what is new ------------------------------------------------------------------------------------------------

    @abstractmethod
    def adopt(self, constant: gs.Constant) -> None:
        """Counts a new constant among the parameters, where these are known by their names."""

    @abstractmethod
    def mapped(
        self, name: str, source: gs.Tensor, weight: np.ndarray, bias: np.ndarray, made: gs.Variable
    ) -> list[gs.Node]:
        """Returns the nodes that make ``made`` = source W + b.

        Args:
            name: a prefix of new names that nothing has.
            source: [.., n].
            weight: W, [n, m].
            bias: b, [m].
            made: what they make.
        """

    @abstractmethod
    def pick(self, table: gs.Tensor, taken: Taken, names: Iterator[str]) -> list[gs.Node]:
        """Returns nodes that take some indices of a table, and are not in the graph yet; ``names`` are for what is new."""

    @abstractmethod
    def spread(self, name: str, source: gs.Tensor, bias: gs.Constant, made: gs.Variable) -> list[gs.Node]:
        """Returns the nodes that make ``made`` = b in each row of a tensor of the shape of ``source``; as `mapped`."""

    # -- weights ----------------------------------------------------------------------------------------------------

    def least_precision(self) -> str:
        """Returns the least precise type of the weights, as they are stored."""
        weights = [c for c in self.constants() if is_float(c.dtype) and int(np.prod(c.shape)) > 1]
        names = {np.dtype(c.kind if isinstance(c, Narrow) else c.dtype).name for c in weights}
        return next((p for p in PRECISION if p in names), "float32")

    def constants(self, unread: bool = False) -> Iterator[gs.Constant]:
        """Yields every constant of the graph that a node uses, once, those that branches alone read included.

        Args:
            unread: whether those that are outputs, and that no node uses, are yielded, too.
        """
        seen: set[int] = set()
        for node in self.graph.nodes:
            for tensor in (*node.inputs, *(t for t in read_inside(node) if t.name not in self.inside)):
                if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor
        for tensor in self.graph.outputs if unread else ():
            if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor

    def parameters(self) -> int:
        """Returns the number of elements of floating-point constants."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape, dtype in self._arrays() if is_float(dtype))

    def weight_bytes(self) -> int:
        """Returns the bytes of all constants."""
        return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in self._arrays())

    def _arrays(self) -> Iterator[tuple[Sequence[int], np.dtype[Any]]]:
        """Yields shape and dtype, as stored, of all constants, those included that nodes and branches hold."""
        within = [n for g in self.graph.subgraphs(recursive=True) for n in g.nodes]
        held = (t for n in within for t in n.inputs if isinstance(t, gs.Constant) and t.name in self.inside)
        for constant in itertools.chain(self.constants(unread=True), {id(t): t for t in held}.values()):
            narrow = isinstance(constant, Narrow) and constant.stored is not None
            yield constant.shape, np.dtype(constant.stored.dtype if narrow else constant.dtype)
        for node in (*self.graph.nodes, *within):
            value = constant_value(node) if node.op == "Constant" else None
            if value is not None:
                yield value.shape, value.dtype

    def settle(self) -> None:
        """Moves weights that are new to the store, if there is one."""
        for constant in self.constants() if self.store is not None else ():
            if isinstance(constant._values, np.ndarray):
                constant.values = self.settled(constant.values)

    def settled(self, value: np.ndarray) -> np.ndarray:
        """Returns an array as it is in the store; what is mapped already (read-only) stays where it is."""
        return self.store.put(value) if self.store is not None and value.flags.writeable else value

    def resize(self, tensor: gs.Variable, axis: int, size: int) -> None:
        """Notes that an axis of a graph input or output has another size now."""
        self.resized.setdefault(tensor.name, {})[axis] = size
        if tensor.shape is not None and len(tensor.shape) > axis:
            tensor.shape = [size if i == axis else d for i, d in enumerate(tensor.shape)]


def read_inside(node: gs.Node) -> Iterator[gs.Tensor]:
    """Yields what the branches of a node read, and give out as it is."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from inner.inputs
                yield from read_inside(inner)
            yield from value.outputs
