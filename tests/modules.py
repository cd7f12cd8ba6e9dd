"""``prune`` for tests of torch modules: the result is known to be a module."""

from typing import Any

from liar_opt import prune
from liar_opt.passes.result import ModuleResult


def prune_module(model: Any, calibration: Any = None, **options: Any) -> ModuleResult:
    """Returns the pruned module."""
    result = prune(model, calibration, **options)
    assert isinstance(result, ModuleResult)
    return result
