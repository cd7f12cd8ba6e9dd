"""liar-opt: make a trained transformer smaller without training it.

``liar_opt.prune("model.onnx", calibration=..., sparsity=0.4)`` is the whole job; ``liar_opt.inspect`` lists what can go.
"""

from liar_opt.passes.prune_job import inspect, prune
from liar_opt.passes.result import Inspection, PruneResult
from liar_opt.runtime.errors import CheckError, InternalError, LiarOptError, ModelError, OptionError

__version__ = "0.1.0"
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
