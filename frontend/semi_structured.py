"""torch's own form of weights of which two of each four inputs are zero: what its kernels for CUDA multiply."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import TYPE_CHECKING

from liar_opt.runtime.errors import OptionError

if TYPE_CHECKING:
    import torch


def semi_structured(module: torch.nn.Module, names: Collection[str]) -> torch.nn.Module:
    """Returns a copy of a module whose weights are in that form.

    Args:
        module: on a CUDA device, in half precision.
        names: the parameters that have the pattern.

    Raises:
        OptionError: torch has no kernels for it there.
    """
    import torch

    owners = {f"{path}.weight" if path else "weight": m for path, m in module.named_modules()}
    linear = [n for n in names if isinstance(owners.get(n), torch.nn.Linear)]
    first = next(iter(module.parameters()))
    if not first.is_cuda or first.dtype not in (torch.float16, torch.bfloat16):
        raise OptionError(
            f"torch multiplies 2:4 weights on CUDA in half precision alone, and the module is in {first.dtype} on "
            f"{first.device}; move it there first: module.half().cuda()"
        )
    result = copy.deepcopy(module)
    for name in linear:
        owner = result.get_submodule(name.rpartition(".")[0])
        weight = torch.sparse.to_sparse_semi_structured(owner.get_parameter("weight").detach())
        owner.weight = torch.nn.Parameter(weight, requires_grad=False)
    return result
