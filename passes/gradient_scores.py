"""Scores that need gradients: torch modules alone. All but one need labelled batches and a loss of them.

With a mask m_j on block j of a group, all ones, g_j = dL/dm_j = sum over its channels and rows of x dL/dx. One forward and
one backward pass of the dense model give it for every group and sample:

    fisher     sum over samples of g_j^2       diagonal of the empirical Fisher   Kwon et al. (arXiv 2204.09656)
    taylor     mean over samples of |g_j|      first-order Taylor                 Michel et al. (arXiv 1905.10650)
    snip       |sum over samples of g_j|       connection sensitivity             SNIP (arXiv 1810.02340), by blocks

    knowledge  predictive / its mean + representational / its mean                K-prune (arXiv 2308.03449)

K-prune's *predictive* knowledge of a block is what the outputs' distribution loses without it, to second order: with
p = softmax(z / t) of the dense model, t^2 KL(p || p of m) ~ t^2/2 sum_j H_jj (1 - m_j)^2, where H is the Fisher information
E_y[g g^T] with g = d log p_y / dm and y drawn from p itself: no labels are needed. The *representational* knowledge is
E|x_B W_B|^2, what the sub-layer's own output loses. The paper weighs the two by a factor tuned for each task; here each is
divided by its mean over the group, and blocks are compared within their group alone. The formulas follow its abstract and
a summary of it; its authors' code was not at hand.

A labelled batch is a pair: the module's arguments by name, and whatever the loss takes beside the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.passes.base import Finding
from liar_opt.passes.groups import ChannelGroup
from liar_opt.runtime.errors import OptionError

if TYPE_CHECKING:
    import torch

    from liar_opt.frontend.fx_module import Executor

Loss = Callable[[Mapping[str, "torch.Tensor"], Any], "torch.Tensor"]
"""A user's own: (outputs by name, labels) -> a scalar; summed or averaged over the samples."""
Labelled = Sequence[tuple[Mapping[str, Any], Any]]
LABELLED_SCORES = ("fisher", "taylor", "snip")
KNOWLEDGE = "knowledge"
GRADIENT_SCORES = (*LABELLED_SCORES, KNOWLEDGE)
TEMPERATURE = 2.0
"""Of K-prune's predictive knowledge."""
DRAWS = 4
"""Outputs drawn from the model's own distribution for each calibration batch."""


@dataclass(frozen=True, eq=False)
class Gradients(Finding):
    """The gradients of each group's blocks, by its name."""

    by: ClassVar[str] = "note-gradients"
    by_group: Mapping[str, Any]


def require_labels(score: Any, loss: Loss | None, labelled: Labelled | None, torch_module: bool) -> None:
    """Checks that a score has what it needs.

    Raises:
        OptionError: a gradient score without labelled batches, a loss, or a torch module.
    """
    if score in GRADIENT_SCORES and not torch_module:
        raise OptionError(f"score '{score}' needs gradients: give the torch module or its checkpoint, not an ONNX file")
    if score not in LABELLED_SCORES:
        if loss is not None or labelled is not None:
            raise OptionError(f"loss and labelled are for the scores {', '.join(LABELLED_SCORES)}; leave them out")
        return
    if loss is None or not labelled:
        raise OptionError(
            f"score '{score}' needs labels: give labelled=[(arguments, labels), ...] and loss=function(outputs, labels)"
        )


def mask_gradients(
    executor: Executor, groups: Sequence[ChannelGroup], labelled: Labelled, loss: Loss
) -> dict[str, NDArray[np.float64]]:
    """Returns dL/dm of every group by its name, [samples, blocks].

    Args:
        executor: runs the dense module.
        groups: whose blocks are masked.
        labelled: batches of arguments with their labels.
        loss: takes the outputs and the labels.

    Raises:
        OptionError: a batch does not run, the loss is no scalar or does not depend on the outputs, or a gradient is NaN.
    """
    watched = {u.activation.name for g in groups for c in g.consumers for u in c.uses}
    found: dict[str, list[NDArray[np.float64]]] = {g.name: [] for g in groups}
    name = getattr(loss, "__name__", type(loss).__name__)
    for feeds, labels in labelled:
        try:
            outputs, activations = executor.run_watched(feeds, watched)
        except (KeyError, RuntimeError, ValueError, IndexError) as err:
            raise OptionError(f"a labelled batch does not run ({' '.join(str(err).split())[:200]}); its keys are the "
                              f"module's arguments, found {', '.join(map(str, feeds))}") from err  # fmt: skip
        value: Any = loss(outputs, labels)
        if getattr(value, "ndim", None) != 0 or not value.requires_grad:
            raise OptionError(f"loss function '{name}' did not return a scalar tensor made of the outputs")
        value.backward()
        for group in groups:
            found[group.name].append(_of_group(group, activations))
    result = {n: np.concatenate(parts) for n, parts in found.items()}
    broken = [n for n, g in result.items() if not np.isfinite(g).all()]
    if broken:
        raise OptionError(f"loss function '{name}' gives a gradient of NaN or Inf at '{broken[0]}'")
    return result


def own_samples(
    batches: Sequence[Mapping[str, Any]], masks: Sequence[NDArray[np.bool_] | None], seed: int
) -> tuple[Labelled, Loss]:
    """Returns calibration batches as labelled ones, and a loss that draws the labels from the model: the sum of log p_y.

    Args:
        batches: arguments of the module.
        masks: the rows of each batch that are no padding, [b, s]; they count where outputs have a row for each token.
        seed: of what is drawn.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def surprise(outputs: Mapping[str, torch.Tensor], mask: NDArray[np.bool_] | None) -> torch.Tensor:
        logits = next(iter(outputs.values()))
        chances = torch.log_softmax(logits.double() / TEMPERATURE, dim=-1)
        drawn = torch.multinomial(chances.detach().exp().reshape(-1, chances.shape[-1]).cpu(), 1, generator=generator)
        picked = chances.reshape(-1, chances.shape[-1]).gather(1, drawn.to(chances.device))
        if mask is not None and tuple(logits.shape[:-1]) == mask.shape:
            picked = picked[torch.from_numpy(mask.reshape(-1)).to(picked.device)]
        return picked.sum()

    return [(feeds, mask) for feeds, mask in zip(batches, masks, strict=True) for _ in range(DRAWS)], surprise


def knowledge(gradients: NDArray[np.float64], representational: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns one number a block from d log p_y / dm, [draws, blocks], and E|x_B W_B|^2, [blocks]."""
    predictive = 0.5 * TEMPERATURE**2 * np.square(gradients).mean(axis=0)
    parts = (part / (float(part.mean()) or 1.0) for part in (predictive, representational))
    return np.asarray(sum(parts))


def _of_group(group: ChannelGroup, activations: Mapping[str, torch.Tensor]) -> NDArray[np.float64]:
    """Sums x dL/dx over rows and the channels of each block, and over the group's consumers: [samples, blocks]."""
    total: Any = 0.0
    for consumer in group.consumers:
        for use in consumer.uses:
            x = activations[use.activation.name]
            grad = x.grad
            product = (x.detach() * grad).double() if grad is not None else x.detach().double() * 0.0
            product = product.movedim(use.activation_axis, -1).reshape(x.shape[0], -1, consumer.width).sum(1)
            ones = np.zeros((consumer.width, group.size))
            inside = np.flatnonzero(consumer.owners >= 0)
            ones[inside, consumer.owners[inside]] = 1.0
            total = total + product.cpu().numpy() @ ones
    return np.asarray(total)


def gradient_values(score: str, gradients: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns one number a block from dL/dm, [samples, blocks]; the higher the more it is kept."""
    if score == "fisher":
        return np.asarray(np.square(gradients).sum(axis=0))
    if score == "taylor":
        return np.asarray(np.abs(gradients).mean(axis=0))
    return np.asarray(np.abs(gradients.sum(axis=0)))
