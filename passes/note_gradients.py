"""Note the gradients that some scores need: the dense module runs forward and backward on labelled batches."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from liar_opt.frontend.fx_module import Executor
from liar_opt.passes.base import OutputNames, Pass, PassResult, State
from liar_opt.passes.gradient_scores import KNOWLEDGE, Gradients, Labelled, Loss, mask_gradients, own_samples
from liar_opt.passes.groups import ChannelGroup
from liar_opt.passes.open_module import traced_model
from liar_opt.runtime.ranks import current


@dataclass(frozen=True)
class NoteGradientsPass(Pass[list[ChannelGroup]]):
    """Note the gradients of a loss by a mask on the blocks of every group, on the dense module.

    Attributes:
        score: what asks for them.
        loss: takes the outputs by the names that the module gives them, and labels.
        labelled: batches and labels; both are drawn from the calibration data for a score that needs none.
        seed: for what is drawn.
    """

    name: ClassVar[str] = "note-gradients"
    score: str = KNOWLEDGE
    loss: Loss | None = None
    labelled: Labelled | None = None
    seed: int = 0

    def plan(self, state: State) -> list[ChannelGroup]:
        """Returns the groups that may lose blocks, or will."""
        known = state.get(Gradients)
        if known is not None:
            return []
        return [g for g in state.groups if not state.keep or state.keep.get(g.name, g.size) < g.size]

    def apply(self, state: State, plan: list[ChannelGroup]) -> PassResult:
        """Adds the gradients, where they are not known yet."""
        labelled, loss = self.labelled, self.loss
        if not plan:
            return PassResult(state)
        if self.score == KNOWLEDGE:
            assert state.calibration is not None
            labelled, loss = own_samples(state.calibration.batches, state.calibration.row_masks, self.seed)
        assert labelled is not None and loss is not None
        asked, names, model = loss, state.found(OutputNames).by_tensor, traced_model(state)

        @functools.wraps(loss)
        def named(outputs: Mapping[str, Any], labels: Any) -> Any:
            return asked({names.get(n, n): v for n, v in outputs.items()}, labels)

        found = current().once(lambda: mask_gradients(Executor(model, model.device), plan, labelled, named))
        state.add(Gradients(found))
        return PassResult(state)
