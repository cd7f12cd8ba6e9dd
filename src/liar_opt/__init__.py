"""liar-opt: make a trained transformer smaller without training it.

``liar_opt.prune("model.onnx", calibration=..., sparsity=0.4)`` is the whole job; ``liar_opt.inspect`` lists what can go.

The names are loaded when they are first used, so that the command is there at once, to be interrupted.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liar_opt.passes.prune_job import inspect, prune
    from liar_opt.passes.result import Inspection, PruneResult
    from liar_opt.runtime.errors import CheckError, InternalError, LiarOptError, ModelError, OptionError

__version__ = "0.2.0"
__all__ = [
    "CheckError",
    "Inspection",
    "InternalError",
    "LiarOptError",
    "ModelError",
    "OptionError",
    "PruneResult",
    "__version__",
    "inspect",
    "prune",
]
_PLACES = {"prune": "passes.prune_job", "inspect": "passes.prune_job"} | dict.fromkeys(
    ("Inspection", "PruneResult"), "passes.result"
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'liar_opt' has no attribute '{name}'")
    found = getattr(import_module(f"liar_opt.{_PLACES.get(name, 'runtime.errors')}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
