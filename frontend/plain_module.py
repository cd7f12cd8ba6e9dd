"""The module that is pruned: out of its wrappers, its weights computed from nothing but themselves.

What compiles, copies or averages a module holds it, and it is that module which is traced, cut and given back. Weights that
are computed from other parameters (weight and spectral normalisation, LoRA and all else that is registered as a
parametrisation, masks of ``torch.nn.utils.prune``) are folded into plain ones on a copy: only those can be cut.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from liar_opt.runtime.errors import ModelError

if TYPE_CHECKING:
    import torch

HELD_AS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}
"""Wrappers of torch, and the attribute under which each holds the module."""


class PlainModule(NamedTuple):
    """A module without wrappers and parametrisations, and what was done for it, a sentence each."""

    module: torch.nn.Module
    notes: tuple[str, ...]


def plain_module(module: torch.nn.Module) -> PlainModule:
    """Takes a module out of the wrappers of torch, and folds its parametrisations on a copy; it is not changed.

    Raises:
        ModelError: it holds adapters of PEFT or modules of TorchScript, or cannot be copied.
    """
    notes = []
    while (held := _held(module)) is not None:
        notes.append(f"the result is the module inside {type(module).__name__}")
        module = held
    _require_plain(module)
    folds = _folds(module)
    if not folds:
        return PlainModule(module, tuple(notes))
    copied = copied_module(module)
    _give_own_classes(copied)
    with evaluating(copied):  # spectral normalisation goes on iterating while it trains
        for fold in _folds(copied):
            fold()
    notes.append(f"{len(folds)} weights that are computed from other parameters were folded into plain ones")
    return PlainModule(copied, tuple(notes))


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode; afterwards every part of it is in the mode that it was in."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def copied_module(module: torch.nn.Module, memo: dict[int, Any] | None = None) -> torch.nn.Module:
    """Returns a deep copy; tensors that a module has computed and kept are copied without what is behind them.

    Args:
        module: what to copy.
        memo: what stands for objects, by their id, as for ``copy.deepcopy``.

    Raises:
        ModelError: something in it cannot be copied.
    """
    import torch

    known = dict(memo or {})
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(module, known)
    except Exception as err:  # whatever an attribute's class raises
        reason = " ".join(str(err).split())[:200]
        raise ModelError(
            f"{type(module).__name__} cannot be copied ({reason}); keep what it holds out of the module"
        ) from err


def _held(module: torch.nn.Module) -> torch.nn.Module | None:
    """Returns the module inside a wrapper of torch; None where it is no wrapper."""
    import torch

    for kind in type(module).__mro__:
        if kind.__name__ in HELD_AS and kind.__module__.startswith("torch."):
            held = getattr(module, HELD_AS[kind.__name__], None)
            return held if isinstance(held, torch.nn.Module) else None
    return None


def _require_plain(module: torch.nn.Module) -> None:
    """Checks that nothing in a module is beyond tracing or folding.

    Raises:
        ModelError: something is; with the way out.
    """
    import torch

    for name, part in module.named_modules():
        where = f"'{name}' of {type(module).__name__} is" if name else "the model is"
        kinds = {(k.__module__.partition(".")[0], k.__name__) for k in type(part).__mro__}
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{where} a ScriptModule, which torch.export cannot trace; give the nn.Module that it was made of, or "
                "export it to ONNX and give that file"
            )
        if ("peft", "PeftModel") in kinds or ("peft", "BaseTunerLayer") in kinds:
            raise ModelError(
                f"{type(module).__name__} holds LoRA adapters (of PEFT): merge them first (merge_and_unload), and give the "
                "module that this returns"
            )
        if ("torch", "FullyShardedDataParallel") in kinds or ("torch", "FSDPModule") in kinds:
            raise ModelError(
                f"{where} sharded over processes (FSDP): load its whole state into the module that it was made "
                "of, and give that"
            )


def _give_own_classes(module: torch.nn.Module) -> None:
    """Gives parametrised parts classes of their own: folding deletes a property of the class that a copy shares."""
    from torch.nn.utils import parametrize

    for part in module.modules():
        if parametrize.is_parametrized(part):
            kind = type(part)
            members = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            part.__class__ = type(kind.__name__, kind.__bases__, members)


def _folds(module: torch.nn.Module) -> list[Callable[[], Any]]:
    """Returns what makes each weight plain that a module's parts compute from other parameters."""
    import functools

    from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    result: list[Callable[[], Any]] = []
    for part in module.modules():
        names = list(getattr(part, "parametrizations", ())) if parametrize.is_parametrized(part) else []
        result += [functools.partial(parametrize.remove_parametrizations, part, name) for name in names]
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                result.append(functools.partial(remove_weight_norm, part, hook.name))
            elif isinstance(hook, SpectralNorm):
                result.append(functools.partial(remove_spectral_norm, part, hook.name))
            elif isinstance(hook, prune.BasePruningMethod):
                result.append(functools.partial(prune.remove, part, hook._tensor_name))
    return result


def require_weights(module: torch.nn.Module) -> None:
    """Checks that the weights of a module hold numbers.

    Raises:
        ModelError: some are on the meta device, or of a lazy module that has not run yet.
    """
    import torch

    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise ModelError(
                f"'{name}' of {type(module).__name__} is of a lazy module that has not run; run it once before"
            )
        if tensor.is_meta:
            raise ModelError(
                f"'{name}' of {type(module).__name__} is on the meta device, without numbers; load the weights"
            )
