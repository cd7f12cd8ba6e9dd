"""OSSCAR's own pruning class on the layers of any transformer: shared by `peer_bert.py` and `peer_llama.py`.

The repository's driver is for OPT alone; its class (`osscar_prune.OSSCAR_prune`) takes any linear layer. This does what
that driver does, with its defaults: layer after layer on the outputs of the pruned layers before, moments of the inputs of
the two output projections, then its fast pruning, then the next layer's inputs.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peer_files import Job


class _Stop(Exception):
    """Raised when the first layer's inputs are known."""


def osscar_layers(
    job: Job,
    model: Any,
    layers: Iterable[Any],
    batches: list[dict[str, Any]],
    *,
    attention: Callable[[Any], Any],
    ffn: Callable[[Any], Any],
    blocks: int,
    removed: tuple[float, float],
) -> None:
    """Prunes both output projections of every layer in place; what is removed becomes zero columns.

    Args:
        job: of the repository.
        model: called with a batch by name.
        layers: its layers, in order.
        batches: {input: [b, s]}, with "attention_mask".
        attention: a layer -> its linear output projection.
        ffn: a layer -> its second linear projection.
        blocks: heads (or groups of heads) of a layer.
        removed: the fractions of heads and of FFN units.
    """
    sys.path.insert(0, str(job.repository))
    theirs = importlib.import_module("osscar_prune").OSSCAR_prune
    layers, real = list(layers), [batch["attention_mask"].bool() for batch in batches]
    inputs: list[tuple[Any, Any]] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        inputs.append((args, kwargs))
        raise _Stop

    handle = layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for batch in batches:
        try:
            with torch.no_grad():
                model(**batch)
        except _Stop:
            continue
    handle.remove()

    for layer in layers:
        pruners = {}
        for name, find, fraction in (("self_attn.out_proj", attention, removed[0]), ("fc2", ffn, removed[1])):
            if fraction > 0:
                linear = find(layer)
                pruners[name] = (linear, theirs(linear, "OSSCAR_prune", 1, 1, 10, 2, layername=name, num_heads=blocks))
        for given, tokens in zip(inputs, real, strict=True):
            handles = [linear.register_forward_hook(_watch(pruner, tokens)) for linear, pruner in pruners.values()]
            _run(layer, given)
            for handle in handles:
                handle.remove()
        for _, pruner in pruners.values():
            pruner.prune(sp_fc=removed[1] - 1e-9, sp_out=removed[0] - 1e-9)  # it rounds what it keeps down
            pruner.free()
        inputs = [((_run(layer, given), *given[0][1:]), given[1]) for given in inputs]


def _watch(pruner: Any, tokens: Any) -> Callable[[Any, Any, Any], None]:
    """A hook that gives a pruner the real tokens of a batch."""

    def seen(_: Any, args: Any, out: Any) -> None:
        pruner.add_batch(args[0][tokens].detach(), out[tokens].detach())

    return seen


def _run(layer: Any, given: tuple[Any, Any]) -> Any:
    with torch.no_grad():
        return layer(*given[0], **given[1])[0]
