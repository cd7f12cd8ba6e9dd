"""Quantise a pruned checkpoint by torchao, and compare the four corners as those of ONNX (`passes.quantise_result`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from liar_opt.frontend.fx_engine import TimedModule
from liar_opt.frontend.fx_module import FxOriginal
from liar_opt.frontend.onnx_quantise import Scheme
from liar_opt.frontend.torchao_module import BITS, RunModule, module_bytes, quantised_module
from liar_opt.passes.base import Finding, OutputNames, State
from liar_opt.passes.fit_module import CutModule
from liar_opt.passes.open_module import traced_model
from liar_opt.passes.options import DECI, PruneOptions
from liar_opt.passes.quantise_result import Corners, Quantised
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.extras import require

if TYPE_CHECKING:
    import torch

ELSEWHERE = "write ONNX with --format onnx (in Python: checkpoint=False)"


@dataclass(frozen=True, eq=False)
class QuantisedModule(Finding):
    """The quantised result, a model of transformers."""

    by: ClassVar[str] = "quantise_module"
    module: torch.nn.Module


def require_form(options: PruneOptions) -> None:
    """Checks that the form of the result can be quantised: ONNX in all ways, a checkpoint by torchao to 8 bits.

    Raises:
        OptionError: it cannot, or torchao is missing.
    """
    name = options.quantize
    if name is None or options.checkpoint is False:
        return
    if options.checkpoint == DECI:
        raise OptionError(
            f"what reads DeciLM reads no weights of torchao; leave quantize or --format deci out, or {ELSEWHERE}"
        )
    if name != BITS:
        raise OptionError(
            f"a checkpoint is quantised to {BITS} alone: of what torchao keeps in one a CPU computes nothing smaller, and "
            f"ranges of activations are not among it; give {BITS}, or {ELSEWHERE}"
        )
    require("quantize of a checkpoint", "torch", "transformers", "torchao")


def quantise_module(state: State, batch: Mapping[str, Any], timed: bool) -> Quantised:
    """Quantises the dense and the pruned module, and compares the corners; adds both findings.

    Args:
        state: behind the checks.
        batch: what is timed.
        timed: whether anything is.
    """
    original, model, names = state.as_it_came(), traced_model(state), state.found(OutputNames).by_tensor
    assert isinstance(original, FxOriginal)
    modules = {"dense": original.module, "pruned": state.found(CutModule).module}

    sizes = {name: module_bytes(module) for name, module in modules.items()}
    found = Corners(
        state,
        Scheme(BITS),
        partial(RunModule, model),
        partial(TimedModule, model),
        {(name, False): (m, sizes[name]) for name, m in modules.items()},
    )
    found.quantise(lambda _, module: quantised_module(module), batch)
    if ("pruned", True) in found.models:
        state.add(QuantisedModule(found.models["pruned", True][0]))
    compared = found.compared(batch, timed)
    return replace(compared, output=names.get(compared.output or "", compared.output))
