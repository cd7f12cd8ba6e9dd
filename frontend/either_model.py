"""What depends on whether a model is an ONNX graph or a traced module: its analysis, what runs it, and what a user gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.walk import GraphWalk, count_flops, walk, walk_sized

if TYPE_CHECKING:
    from liar_opt.frontend.engine import Engine
    from liar_opt.frontend.model import Model


def analysis_of(model: Model) -> GraphWalk:
    """Returns the analysis of a graph, which is in normal form."""
    if not model.traced:
        return walk(model)
    from liar_opt.frontend.fx_module import FxModel, analyse

    assert isinstance(model, FxModel)
    return analyse(model)


def engine_of(model: Model, device: Literal["cpu", "cuda"], low_memory: bool) -> Engine:
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


def bytes_on(model: Model, feeds: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Returns the bytes of every tensor that is no constant, for inputs of the shapes of ``feeds``.

    Empty where the graph does not say them.
    """
    if not model.traced:
        from liar_opt.frontend.live_memory import tensor_sizes

        whole = walk_sized(model, feeds)
        return {} if whole is None else tensor_sizes(whole)
    from liar_opt.frontend.fx_module import FxModel, tensor_bytes

    assert isinstance(model, FxModel)
    return tensor_bytes(model, feeds)


def flops_of(model: Model, feeds: Mapping[str, Any]) -> int | None:
    """Returns the operations of all products and convolutions of a graph for inputs of the shapes of ``feeds``.

    A multiplication and an addition are two; pointwise operators and softmax are not counted. None where they cannot be.
    """
    if not model.traced:
        return count_flops(model, {k: np.asarray(v) for k, v in feeds.items()})
    from liar_opt.frontend import fx_engine
    from liar_opt.frontend.fx_module import FxModel

    assert isinstance(model, FxModel)
    return fx_engine.count_flops(model, feeds)


def as_given(model: Model) -> Any:
    """Returns a model as its user has it: an ONNX proto, or the traced graph as a module."""
    if not model.traced:
        from liar_opt.frontend.onnx_model import onnx_graph

        return onnx_graph(model).as_given()
    from liar_opt.frontend.fx_module import FxModel
    from liar_opt.frontend.fx_rewrite import cut_graph_module

    assert isinstance(model, FxModel)
    return cut_graph_module(model).to(model.device)
