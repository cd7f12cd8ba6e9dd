"""Checks a cut module against the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from liar_opt.frontend.fx_module import Executor, FxModel, analyse, precision
from liar_opt.frontend.fx_rewrite import cut_graph_module, cut_module
from liar_opt.passes.base import Finding, Pass, PassResult, State
from liar_opt.passes.express_widths import FinalFields
from liar_opt.passes.open_module import OpenedModule, vocabulary
from liar_opt.passes.prune_groups import Cut
from liar_opt.passes.sweep import held_batches
from liar_opt.passes.verify_model import Verification, mask_model, project_queries
from liar_opt.runtime.compare import TOLERANCES, DifferenceMeter, holds_logits, require_close, require_repeatable
from liar_opt.runtime.errors import CheckError, ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class CutModule(Finding):
    """The module with its smaller weights.

    Attributes:
        module: the module, or the traced graph where no attributes make its code fit.
        traced: why it is the traced graph; None where it is not.
    """

    by: ClassVar[str] = "verify-module"
    module: torch.nn.Module
    traced: str | None = None


@dataclass(frozen=True)
class VerifyModulePass(Pass[None]):
    """Check the cut module against the original: both forms compute what the masked original computes.

    Attributes:
        batches: calibration batches on which the output difference is measured.
        checkpoint: whether the module's own code must fit.
    """

    name: ClassVar[str] = "verify-module"
    batches: int = 2
    checkpoint: bool = False

    def plan(self, state: State) -> None:
        """Plans nothing."""

    def apply(self, state: State, plan: None) -> PassResult:
        """Runs the checks; adds a ``Verification`` and the ``CutModule``.

        Where no attributes make the module's own code fit, the result is the traced graph.

        Raises:
            CheckError: the cut graph differs from the masked original.
            ModelError: a checkpoint was asked for, and the module's own code cannot be made to fit; or the module's outputs
                are not the same twice.
        """
        model, data = state.model, state.calibration
        assert isinstance(model, FxModel) and data is not None
        device = model.device
        dtype = precision(model)
        original, reference = model.original.model(), model.original.model()
        project_queries(reference, state.found(Cut).query_forms)
        mask_model(analyse(reference), state.repairs)
        opened, fields = state.found(OpenedModule), state.get(FinalFields)
        example = opened.example
        cut = Executor(model, device)
        masked = Executor(reference, device)
        ours, theirs = _arrays(cut.run(example)), _arrays(masked.run(example))
        try:
            exact = require_close(ours, theirs, dtype, "cut against masked original")
        except CheckError:
            require_repeatable(theirs, _arrays(masked.run(example)))
            raise
        try:
            module, attributes = cut_module(model, example, TOLERANCES[dtype], () if fields is None else fields.changes)
            state.add(CutModule(module))
        except ModelError as err:
            if self.checkpoint:
                raise
            # What its code computes from other sizes no attribute can say; the graph is cut and has been checked.
            module, attributes = cut_graph_module(model).to(device), ()
            state.add(CutModule(module, str(err).partition("; write")[0]))
        held = held_batches(len(data.batches))
        dense, meter = Executor(original, device), DifferenceMeter()
        for done, i in enumerate(held[: self.batches]):
            x, y = _arrays(cut.run(data.batches[i])), _arrays(dense.run(data.batches[i]))
            for name, value in y.items():
                shown = opened.outputs.get(name, name)
                meter.add(shown, x[name], value, data.row_masks[i], holds_logits(shown, value.shape, vocabulary(model)))
            state.progress("verify", done + 1, len(held[: self.batches]))
        state.add(Verification(exact, dtype, meter.result(), attributes=list(attributes)))
        return PassResult(state)


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    import torch

    return {k: (v.float() if v.dtype == torch.bfloat16 else v).detach().cpu().numpy() for k, v in tensors.items()}
