"""Traces of modules that tests share: `torch.export` takes longer than all that is done with what it gives."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from liar_opt.frontend import fx_module

MOST = 60
"""Traces that a worker keeps."""
PLAIN = (bool, int, float, str, tuple, list, dict, type(None))
NO_MATTER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""What a configuration says that the code of a model does not read; the tensors say their types themselves."""

HISTORY = ("name_or_path", "_weight_conversions", "_use_kernels")
"""What a model of transformers notes of itself when it is loaded."""


class Traces:
    """In the place of ``trace``: a kind of module is traced once for inputs of the same shapes.

    A kind is all but the numbers: classes, configurations, settings, and the shapes, types and sharing of the tensors. What
    the numbers are a trace never sees. Each module gets a program with its own tensors, as if it had been traced itself.
    """

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def __call__(self, module: Any, feeds: Mapping[str, Any], free: bool = True) -> Any:
        kind = kind_of(module)
        if kind is None:
            return fx_module.trace(module, feeds, free=free)
        key = (*kind, free, tuple((n, str(v.dtype), tuple(v.shape)) for n, v in feeds.items()))
        if key not in self.known:
            while len(self.known) >= MOST:
                del self.known[next(iter(self.known))]
            self.known[key] = fx_module.trace(module, feeds, free=free)
        return with_tensors_of(module, self.known[key], feeds)


def kind_of(module: Any) -> tuple[Any, ...] | None:
    """Returns what tells a module from others but for its numbers; None where its code may be that of one test alone."""
    import torch

    parts = list(module.named_modules(remove_duplicate=False))
    ignored = {*vars(torch.nn.Module()), *HISTORY}
    own = {name: {k: v for k, v in vars(part).items() if k not in ignored} for name, part in parts}
    stock = type(module).__module__.startswith(("transformers.", "liar_opt."))
    for name, part in parts:
        hooked = part._forward_hooks or part._forward_pre_hooks
        local = "<locals>" in type(part).__qualname__
        if hooked or (not stock and (local or any(callable(v) for v in own[name].values()))):
            return None
    digest = hashlib.sha256(str(module).encode())
    configs: dict[int, str] = {}
    for name, part in parts:
        config = getattr(part, "config", None)
        if config is not None and id(config) not in configs:
            configs[id(config)] = _config(config)
        said = {k: repr(v) for k, v in own[name].items() if isinstance(v, PLAIN)}
        called = {k: getattr(v, "__qualname__", "") for k, v in own[name].items() if callable(v)}
        digest.update(f"{name} {part.training} {sorted(said.items())} {sorted(called.items())}".encode())
        digest.update(configs.get(id(config), "").encode())
        for key, value in own[name].items():
            if isinstance(value, torch.Tensor):  # no parameter and no buffer: its numbers stand in the trace
                digest.update(f"{key} {value.dtype} {value.tolist()}".encode())
    first: dict[int, str] = {}
    for name, tensor in _tensors(module).items():
        same = first.setdefault(id(tensor), name)
        digest.update(f"{name} {same} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}".encode())
        digest.update(str(tensor.requires_grad).encode())
    return (tuple(type(part) for _, part in parts), digest.hexdigest())


def with_tensors_of(module: Any, program: Any, feeds: Mapping[str, Any]) -> Any:
    """Returns a program with the tensors of another module of the same kind."""
    own, result = _tensors(module), copy.copy(program)
    result._state_dict = {name: own.get(name, value) for name, value in program.state_dict.items()}
    result._constants = {name: own.get(name, value) for name, value in program.constants.items()}
    result._example_inputs = ((), dict(feeds))
    return result


def _tensors(module: Any) -> dict[str, Any]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _config(config: Any) -> str:
    """Returns what a configuration of transformers says, and which of several ways to compute it takes."""
    ways = {
        k: v for k, v in vars(config).items() if k.endswith("_implementation") or k.endswith("_implementation_internal")
    }
    said = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    kept = {k: v for k, v in said.items() if k not in NO_MATTER}
    return f"{type(config)} {json.dumps(kept, sort_keys=True, default=repr)} {ways}"
