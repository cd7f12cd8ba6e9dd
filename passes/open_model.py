"""Opens ONNX models: from a path or from memory."""

import hashlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from liar_opt.frontend.model import Model
from liar_opt.frontend.onnx_model import OnnxModel, OnnxOriginal
from liar_opt.frontend.weight_files import MAP_FROM, tensor_bytes
from liar_opt.passes.base import DenseModel, Opened, State
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.later import later
from liar_opt.runtime.memory import LARGE_MODEL, Memory


def is_module_source(model: Any) -> bool:
    """Returns whether a model is a torch module, the folder of a checkpoint, or a hub name, and no ONNX file."""
    if isinstance(model, (str, Path)):
        named = re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) is not None and Path(model).suffix != ".onnx"
        return Path(model).is_dir() or (named and not Path(model).exists())
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def load_state(model: str | Path | onnx.ModelProto | OnnxModel, memory: int | str | None = None) -> State:
    """Takes a model from a path or from memory; where its weights are is kept for the checks.

    Raises:
        ModelError: it cannot be read.
    """
    limit = Memory.of(memory)
    if isinstance(model, OnnxModel):
        loaded = model
    elif isinstance(model, onnx.ModelProto):
        loaded = OnnxModel.from_proto(model)
    elif isinstance(model, (str, Path)):
        # Of what is large beside the limit nothing is copied.
        loaded = OnnxModel.load(model, min(MAP_FROM, limit.limit // LARGE_MODEL))
    else:
        raise OptionError(f"a model is a path or an onnx.ModelProto, not {type(model).__name__}")
    if not loaded.graph.inputs:
        name = f"'{loaded.source}'" if loaded.source else "the model"
        raise ModelError(f"{name} has no inputs; there is nothing to measure")
    state = State(loaded, memory=limit)
    source = loaded.source
    digest = later(lambda: _sha256(source)) if source is not None and source.is_file() else None
    state.memory.model = loaded.weight_bytes()
    stored = loaded.stored if loaded.stored is not None else OnnxOriginal(*loaded.light())
    if state.memory.low:
        loaded.align(state.memory.store)
        loaded.store = state.memory.store
    sizes = model_sizes(loaded)
    if stored.reading is not None:
        sizes["bytes"] = stored_bytes(stored)
    state.add(DenseModel(replace(stored, store=loaded.store)), Opened(sizes, digest))
    return state


def model_sizes(model: Model) -> dict[str, int]:
    """Returns the number of parameters and nodes, and the bytes of the weights."""
    return {"parameters": model.parameters(), "bytes": model.weight_bytes(), "nodes": len(model.graph.nodes)}


def stored_bytes(model: OnnxOriginal) -> int:
    """Returns the bytes of the weights of a model as its file has them."""
    proto, arrays = model.as_written()
    return sum(arrays[t.name].nbytes if t.name in arrays else tensor_bytes(t) for t in proto.graph.initializer)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
