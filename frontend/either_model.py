"""What depends on whether a model is an ONNX graph or a traced module: its analysis, what runs it, and what a user gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from liar_opt.frontend.walk import GraphWalk, walk

if TYPE_CHECKING:
    from liar_opt.frontend.engine import Engine
    from liar_opt.frontend.onnx_model import OnnxModel


def analysis_of(model: OnnxModel) -> GraphWalk:
    """Returns the analysis of a graph, which is in normal form."""
    if not model.traced:
        return walk(model)
    from liar_opt.frontend.fx_module import FxModel, analyse

    assert isinstance(model, FxModel)
    return analyse(model)


def engine_of(model: OnnxModel, device: Literal["cpu", "cuda"], low_memory: bool) -> Engine:
    """Returns what runs a model: ONNX Runtime, or torch where the module is.

    Args:
        model: the graph.
        device: where ONNX Runtime computes.
        low_memory: whether the weights are used where they lie.
    """
    if not model.traced:
        from liar_opt.frontend.onnx_engine import OnnxEngine

        return OnnxEngine(device, low_memory)
    from liar_opt.frontend.fx_engine import TorchEngine
    from liar_opt.frontend.fx_module import FxModel

    assert isinstance(model, FxModel)
    return TorchEngine(model)


def as_given(model: OnnxModel) -> Any:
    """Returns a model as its user has it: an ONNX proto, or the traced graph as a module."""
    if not model.traced:
        return model.as_given()
    from liar_opt.frontend.fx_module import FxModel
    from liar_opt.frontend.fx_rewrite import cut_graph_module

    assert isinstance(model, FxModel)
    return cut_graph_module(model).to(model.device)
