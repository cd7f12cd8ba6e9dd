"""Parts of a lowered module that are trained: vectors as they are, matrices by a product of low rank on top of them.

A :class:`Subset` knows which constants are trained and what stands for them while that goes on; :class:`Distillation` runs
the module beside the dense one, whose outputs are what it is trained for. Nothing of the graph changes before
:meth:`Subset.write`.

A vector v is trained as it is. A matrix W becomes  W + M * (L R)  with L [a, r] zero at the start and R [r, b] drawn, M the
places where W is not zero: what is zero stays zero, in each step and in what is written (the masked form of LoRA in PERP,
arXiv 2312.15230).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from liar_opt.frontend.fx_module import Executor, FxModel, to_numpy, to_torch
from liar_opt.frontend.graph_tensors import is_float
from liar_opt.frontend.walk import GraphWalk
from liar_opt.runtime.training import divergence, squares

if TYPE_CHECKING:
    import torch

RANK = 8
"""Of what is added to a matrix."""
SCALE = 2.0
"""What the product of low rank is multiplied by: LoRA's alpha over its rank."""


@dataclass(frozen=True, eq=False)
class _Part:
    """One parameter that is trained.

    Attributes:
        constants: of the graph, all with the same value.
        leaves: the vector, or the two factors of what is added to a matrix; in float32, or in float64 where it is.
        whole: the matrix, as it is; None for a vector.
        mask: where it is not zero; None where that is everywhere.
    """

    constants: tuple[gs.Constant, ...]
    leaves: tuple[torch.Tensor, ...]
    whole: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def value(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns what stands for the parameter."""
        if self.whole is None:
            return self.leaves[0].to(dtype)
        added = (self.leaves[0] @ self.leaves[1]) * SCALE
        if self.mask is not None:
            added = added * self.mask
        return (self.whole + added).to(dtype)


class Subset:
    """The parameters of a module of which something is trained.

    Args:
        walk: the analysis of the module, which may have been cut since.
        matrices: whether matrices are trained, too, by a product of low rank.
        wide: a size that the matrices do not have which are trained: that of the vocabulary.
        seed: of what is drawn.
    """

    def __init__(self, walk: GraphWalk, matrices: bool, wide: int | None, seed: int) -> None:
        import torch

        assert isinstance(walk.model, FxModel)
        self.model = walk.model
        generator = torch.Generator().manual_seed(seed)
        self.parts: list[_Part] = []
        places = _linear_places(walk) if matrices else set()
        for constants in _parameters(self.model):
            value = constants[0].values
            if value.ndim == 1:
                self.parts.append(self._vector(constants))
            elif value.ndim == 2 and places and wide not in value.shape and _read_at(constants, places):
                self.parts.append(self._matrix(constants, generator))

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What is trained."""
        return [leaf for part in self.parts for leaf in part.leaves]

    @property
    def numbers(self) -> int:
        """How many numbers those are."""
        return sum(leaf.numel() for leaf in self.leaves)

    @property
    def names(self) -> list[str]:
        """The names of the parameters that change."""
        return [c.name for part in self.parts for c in part.constants]

    def bind(self, executor: Executor) -> None:
        """Has an executor compute with what is trained, as it is now."""
        for part in self.parts:
            value = part.value(to_torch(part.constants[0].values[:0]).dtype)
            for constant in part.constants:
                executor.bind(constant, value)

    def write(self) -> None:
        """Gives the constants of the graph the values that were trained."""
        import torch

        with torch.no_grad():
            for part in self.parts:
                old = part.constants[0].values
                new = to_numpy(part.value(to_torch(old[:0]).dtype)).copy()
                for constant in part.constants:
                    constant.values = new

    def _vector(self, constants: tuple[gs.Constant, ...]) -> _Part:
        return _Part(constants, (self._leaf(to_torch(constants[0].values, self.model.device)),))

    def _matrix(self, constants: tuple[gs.Constant, ...], generator: torch.Generator) -> _Part:
        import torch

        whole = to_torch(constants[0].values, self.model.device)
        whole = whole if whole.dtype == torch.float64 else whole.float()
        rows, columns = whole.shape
        rank = min(RANK, rows, columns)
        drawn = torch.randn((rank, columns), generator=generator) / math.sqrt(columns)
        zero = torch.zeros((rows, rank))
        leaves = tuple(self._leaf(t.to(whole.dtype).to(self.model.device)) for t in (zero, drawn))
        mask = whole != 0
        return _Part(constants, leaves, whole, None if bool(mask.all()) else mask)

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        kind = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return tensor.detach().to(kind).clone().requires_grad_(True)


def _parameters(model: FxModel) -> list[tuple[gs.Constant, ...]]:
    """Returns the constants of each parameter of a module, those of new biases among them, in the graph's order.

    One that was cut in two ways is none.
    """
    assert model.module is not None
    tied = {name: id(p) for name, p in model.module.named_parameters(remove_duplicate=False)}
    found: dict[Any, list[gs.Constant]] = {}
    for constant in model.constants():
        new = constant.name not in model.originals and constant.name.endswith("_bias")
        if (constant.name in model.trained or new) and is_float(constant.dtype):
            found.setdefault(tied.get(constant.name, constant.name), []).append(constant)
    groups = (g for g in found.values() if all(c.shape == g[0].shape for c in g))
    return [tuple(g) for g in groups if all(c.values is g[0].values or np.array_equal(c.values, g[0].values) for c in g)]


def _linear_places(walk: GraphWalk) -> set[tuple[int, int]]:
    """Returns where weights of linear layers are read: the node's id and the input position."""
    plain = (u for u in walk.consumers if u.lookup is None and u.window is None)
    return {(id(u.node), u.weight_position) for u in plain}


def _read_at(constants: Collection[gs.Constant], places: Collection[tuple[int, int]]) -> bool:
    """Returns whether constants are read at some places alone."""
    read = ((n, i, c) for c in constants for n in c.outputs for i, t in enumerate(n.inputs) if t is c)
    return all((id(node), position) in places for node, position, _ in read)


@dataclass(frozen=True)
class Batch:
    """One batch: the feeds of both models, and the rows that count (bool [b, s] or [b]; None: all)."""

    dense: Mapping[str, NDArray[Any]]
    feeds: Mapping[str, NDArray[Any]]
    mask: NDArray[np.bool_] | None


@dataclass(eq=False)
class Distillation:
    """A module beside the dense one: how far its outputs are from those, on batches.

    Attributes:
        dense: the other model.
        model: the module.
        subset: what is trained of it.
        outputs: those that are compared, with what the dense model calls them.
        logits: whether they are logits, and the distance KL(dense || module) a row; else it is the squared error over the
            square of the dense output, the mean over the outputs.
        room: bytes that the dense model's outputs may take; beyond them it runs each time.
    """

    dense: FxModel
    model: FxModel
    subset: Subset
    outputs: Mapping[str, str]
    logits: bool
    room: int
    _known: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Makes both models ready to run."""
        self._dense, self._model = (Executor(m, m.device) for m in (self.dense, self.model))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Returns the distance on one batch, with gradients to what is trained."""
        wanted = self._wanted(batch)
        self.subset.bind(self._model)
        total = self._distance(self._model.run_trained(batch.feeds, list(self.outputs)), wanted, batch.mask)
        return total / self._count(wanted)

    def distance(self, batches: Sequence[Batch]) -> float:
        """Returns the distance on batches."""
        total = count = 0.0
        self.subset.bind(self._model)
        for batch in batches:
            wanted = self._wanted(batch)
            total += float(self._distance(self._model.run(batch.feeds, wanted=list(self.outputs)), wanted, batch.mask))
            count += self._count(wanted)
        return total / count

    def _wanted(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Returns the rows of the dense model's outputs; those of logits are kept in half precision."""
        import torch

        known = self._known.get(id(batch))
        if known is not None:
            return known
        found = self._dense.run(batch.dense, wanted=list(self.outputs.values()))
        rows = {name: _rows(found[theirs], batch.mask) for name, theirs in self.outputs.items()}
        if self.logits:
            rows = {name: v.half() if v.dtype == torch.float32 else v for name, v in rows.items()}
        size = sum(v.numel() * v.element_size() for v in rows.values())
        if size <= self.room:
            self.room -= size
            self._known[id(batch)] = rows
        return rows

    def _distance(
        self, found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], mask: NDArray[np.bool_] | None
    ) -> torch.Tensor:
        """Returns the sum over rows of logits, or over the outputs."""
        import torch

        parts = []
        for name, dense in wanted.items():
            rows = _rows(found[name], mask)
            parts.append(divergence(rows, dense) if self.logits else squares(rows, dense) / _power(dense))
        return torch.stack(parts).sum()

    def _count(self, wanted: Mapping[str, torch.Tensor]) -> float:
        """Returns what that is divided by."""
        return float(sum(len(v) for v in wanted.values()) or 1) if self.logits else float(len(wanted))


def _power(wanted: torch.Tensor) -> float:
    return float(wanted.float().square().sum()) or 1.0


def _rows(output: torch.Tensor, mask: NDArray[np.bool_] | None) -> torch.Tensor:
    """Returns the rows of an output that count, [rows, width]; as `compare.output_rows`."""
    import torch

    if output.ndim == 0:
        return output.reshape(1, 1)
    if mask is not None and output.ndim > 1:
        if output.ndim > mask.ndim and tuple(output.shape[: mask.ndim]) == mask.shape:
            output = output[torch.from_numpy(np.ascontiguousarray(mask)).to(output.device)]
        elif output.shape[0] == mask.shape[0]:
            kept = mask if mask.ndim == 1 else mask.any(axis=1)
            output = output[torch.from_numpy(np.ascontiguousarray(kept)).to(output.device)]
    return output.reshape(-1, output.shape[-1])
