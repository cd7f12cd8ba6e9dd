"""A torch module as an ONNX model, through the exporter of torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx

from liar_opt.frontend.fx_module import named_arguments
from liar_opt.frontend.hf_checkpoint import experts_by_lookup, without_cache
from liar_opt.runtime.errors import ModelError
from liar_opt.runtime.extras import require
from liar_opt.runtime.signatures import InputSpec

if TYPE_CHECKING:
    import torch


def symbolic_axes(signature: Sequence[InputSpec]) -> dict[str, list[int]]:
    """Returns the axes of each input that have no size."""
    return {s.name: [i for i, d in enumerate(s.shape) if isinstance(d, str)] for s in signature}


def export_onnx(
    module: torch.nn.Module, feeds: Mapping[str, torch.Tensor], symbolic: Mapping[str, list[int]]
) -> onnx.ModelProto:
    """Exports a module.

    Args:
        module: what to export.
        feeds: example inputs by argument name; the graph's inputs have these names.
        symbolic: the axes of each input that are to be symbolic.

    Raises:
        ModelError: the exporter refuses it.
        OptionError: a package that the exporter needs is not installed.
    """
    require("writing a torch module as ONNX", "onnxscript")
    import torch

    shapes: dict[str, Any] = {k: {axis: torch.export.Dim.AUTO for axis in symbolic.get(k, [])} for k in feeds}
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    try:
        registration.setLevel(logging.ERROR)
        quiet = contextlib.redirect_stdout(io.StringIO())
        asked = named_arguments(module, feeds)
        with torch.no_grad(), warnings.catch_warnings(), quiet, without_cache(module), experts_by_lookup(module), asked:
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, (), kwargs=dict(feeds), input_names=list(feeds), dynamic_shapes=shapes, dynamo=True, verbose=False
            )
    except Exception as err:  # the exporter fails in many ways
        raise ModelError(f"torch.onnx cannot export {type(module).__name__}: {' '.join(str(err).split())[:300]}") from err
    finally:
        registration.setLevel(level)
    assert program is not None
    proto = program.model_proto
    assert isinstance(proto, onnx.ModelProto)
    return proto
