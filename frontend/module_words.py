"""Words of a torch module: its own parameters are cut, and what its code and its configuration say of words."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.fx_module import to_numpy, to_torch
from liar_opt.frontend.fx_rewrite import copy_without, set_layer_sizes, set_tensor
from liar_opt.frontend.hf_checkpoint import configs_of
from liar_opt.frontend.vocabulary import Words
from liar_opt.runtime.errors import ModelError
from liar_opt.runtime.token_fields import ID, named_ids, renumbered

if TYPE_CHECKING:
    import torch


def cut_module_words(module: torch.nn.Module, words: Words, kept: NDArray[np.int64]) -> torch.nn.Module:
    """Returns a copy of a module that has some of its words: ids are places among the kept ones, logits as many.

    Args:
        module: it is not changed.
        words: of its traced graph, whose constants are its parameters and buffers.
        kept: ids, ascending [K].

    Raises:
        ModelError: the module has no such parameters (any more).
    """
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    axes = {place.constant.name: place.axis for place in words.places}
    missing = next((n for n in axes if n not in tensors or tensors[n].shape[axes[n]] != words.size), None)
    if missing is not None:
        raise ModelError(
            f"{type(module).__name__} has no parameter '{missing}' with a row for each of {words.size:,} words; write ONNX "
            "with --format onnx (in Python: checkpoint=False)"
        )
    values = {n: np.take(to_numpy(tensors[n]), kept, axis) for n, axis in axes.items()}
    result = copy_without(module, set(values))
    for name, value in values.items():
        set_tensor(result, name, to_torch(np.ascontiguousarray(value), tensors[name].device))
    set_layer_sizes(module, result, values)
    new = {int(old): place for place, old in enumerate(kept)}
    for owner in _owners(result, {words.size, len(kept)}):
        for name, value in list(vars(owner).items()):
            if ID.search(name):
                setattr(owner, name, renumbered(name, value, new))
            elif type(value) is int and value == words.size and "vocab" in name:
                setattr(owner, name, len(kept))
    return result


def ids_said(module: torch.nn.Module, size: int) -> set[int]:
    """Returns the token ids that a module's configurations name, those below ``size``: they have to stay."""
    owners = _owners(module, {size})
    return {i for o in owners for name, value in vars(o).items() for i in named_ids(name, value) if 0 <= i < size}


def _owners(module: torch.nn.Module, sizes: Collection[int]) -> Iterator[Any]:
    """Yields all modules, and the configurations that they hold, each once.

    Parts with a vocabulary of their own, of which they have a table, are left out: their ids are not of these ``sizes``.
    """
    rows = {n for part in module.modules() if type(n := getattr(part, "num_embeddings", None)) is int}

    def foreign(config: Any) -> bool:
        own = vars(config).get("vocab_size") if hasattr(config, "to_dict") else None
        return type(own) is int and own not in sizes and own in rows

    seen: dict[int, Any] = {}
    others: list[str] = []
    for path, part in module.named_modules():
        config = getattr(part, "config", None)
        if foreign(config) and path:
            others.append(f"{path}.")
        if any(f"{path}.".startswith(other) for other in others):
            continue
        seen[id(part)] = part
        for one in (config, getattr(part, "generation_config", None)):
            if one is not None and hasattr(one, "to_dict"):
                seen |= {id(c): c for c in configs_of(one) if not foreign(c)}
    yield from seen.values()
