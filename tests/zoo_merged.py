"""Merged decoders: models of the decoder zoo without and with their cache as the branches of one If, as Optimum has them.

Both are exported by torch and merged here: initializers of equal content are one, outside the If; small ones stay in the
branches; what the branch with a cache does not give (keys and values of the encoder) is an empty constant in it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import zoo
import zoo_decoders
from onnx import TensorProto, helper

CONDITION = "use_cache_branch"
SOURCE = 11  # tokens of the encoder
Feeds = dict[str, np.ndarray]


def merge(no_past: onnx.ModelProto, with_past: onnx.ModelProto) -> onnx.ModelProto:
    """Returns one graph of both, whose condition is true for the second."""
    branches: list[onnx.GraphProto] = []
    shared: dict[tuple[object, ...], onnx.TensorProto] = {}
    inputs: dict[str, onnx.ValueInfoProto] = {}
    given = {o.name for o in with_past.graph.output}
    for name, model in (("no_past", no_past), ("with_past", with_past)):
        graph, renamed, local = model.graph, {}, []
        for tensor in graph.initializer:
            if not tensor.dims or (len(tensor.dims) == 1 and tensor.data_type in (TensorProto.INT32, TensorProto.INT64)):
                local.append(tensor)
                continue
            key = (tensor.data_type, *tensor.dims, onnx.numpy_helper.to_array(tensor).tobytes())
            if key not in shared:
                shared[key] = onnx.TensorProto()
                shared[key].CopyFrom(tensor)
                shared[key].name = f"{tensor.name}_{name}_merged"
            renamed[tensor.name] = shared[key].name
        nodes = list(graph.node)
        for node in nodes:
            node.input[:] = [renamed.get(i, i) for i in node.input]
        for output in no_past.graph.output:
            if name == "with_past" and output.name not in given:
                dims = [d.dim_value for d in output.type.tensor_type.shape.dim]
                kind = output.type.tensor_type.elem_type
                empty = helper.make_tensor("empty", kind, [0, dims[1], 1, dims[3]], [])
                nodes.append(helper.make_node("Constant", [], [output.name], value=empty))
        body = helper.make_graph(nodes, name, [], list(no_past.graph.output), local)
        branches.append(body)
        inputs |= {value.name: value for value in graph.input}
    ends = list(no_past.graph.output)
    choice = helper.make_node(
        "If", [CONDITION], [o.name for o in ends], "choice", else_branch=branches[0], then_branch=branches[1]
    )
    condition = helper.make_tensor_value_info(CONDITION, TensorProto.BOOL, [1])
    graph = helper.make_graph([choice], "merged", [*inputs.values(), condition], ends, list(shared.values()))
    return helper.make_model(graph, opset_imports=no_past.opset_import, ir_version=no_past.ir_version)


def caches_of(model: Any, pair: bool) -> list[tuple[str, int, int]]:
    """Returns the name behind the layer's number, the heads and their width, for each cache of a layer."""
    heads = model.config.decoder_attention_heads if hasattr(model.config, "decoder_attention_heads") else zoo_decoders.HEADS
    width = getattr(model.config, "d_kv", zoo_decoders.HEAD_DIM)
    sides = ("decoder.", "encoder.") if pair else ("",)
    return [(f"{side}{what}", heads, width) for side in sides for what in ("key", "value")]


def feeds_of(name: str, past: int | None, batch: int = 2, length: int = 7, seed: int = 0) -> Feeds:
    """A seeded batch for one of the two graphs: without a cache, or with one of ``past`` tokens."""
    rng = np.random.default_rng([seed, batch, length])
    ids = rng.integers(zoo_decoders.START + 1, zoo_decoders.VOCABULARY, (batch, length))
    if zoo_decoders.BY_NAME[name].reads == "text":
        return {"input_ids": ids, "attention_mask": np.ones((batch, length + (past or 0)), np.int64)}
    mask = np.ones((batch, SOURCE), np.int64)
    mask[-1, -3:] = 0
    hidden = rng.standard_normal((batch, SOURCE, zoo_decoders.HIDDEN)).astype(np.float32)
    return {"encoder_attention_mask": mask, "input_ids": ids, "encoder_hidden_states": hidden}


def _export(name: str, model: Any, past: int | None, path: Path) -> onnx.ModelProto:
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    pair = zoo_decoders.BY_NAME[name].reads != "text"
    caches = [(f"{i}.{tail}", h, w) for i in range(zoo_decoders.LAYERS) for tail, h, w in caches_of(model, pair)]
    feeds = feeds_of(name, past)
    batch = len(feeds["input_ids"])
    if past is not None:
        for tail, heads, width in caches:
            length = SOURCE if "encoder" in tail else past
            feeds[f"past_key_values.{tail}"] = np.full((batch, heads, length, width), 0.1, np.float32)
    names = list(feeds)
    outputs = ["logits", *(f"present.{tail}" for tail, _, _ in caches if past is None or "encoder" not in tail)]

    class Wrapped(torch.nn.Module):
        """Names the inputs one by one and returns tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            named = dict(zip(names, inputs, strict=True))
            flat = {n.removeprefix("past_key_values."): named.pop(n) for n in names if n.startswith("past")}

            def cache(side: str) -> Any:
                layers = range(zoo_decoders.LAYERS) if flat else ()
                return DynamicCache([(flat[f"{i}.{side}key"], flat[f"{i}.{side}value"]) for i in layers])

            if not pair:
                result = self.model(**named, past_key_values=cache(""), use_cache=True)
                sides = {"": result.past_key_values}
            else:
                both = EncoderDecoderCache(cache("decoder."), cache("encoder."))
                result = self.model(
                    encoder_outputs=(named["encoder_hidden_states"],),
                    attention_mask=named["encoder_attention_mask"],
                    decoder_input_ids=named["input_ids"],
                    past_key_values=both,
                    use_cache=True,
                )
                both = result.past_key_values
                sides = {"decoder.": both.self_attention_cache, "encoder.": both.cross_attention_cache}
            made = {
                f"present.{i}.{side}{what}": getattr(layer, what + "s")
                for side, cached in sides.items()
                for i, layer in enumerate(cached.layers)
                for what in ("key", "value")
            }
            return (result.logits, *(made[o] for o in outputs[1:]))

    def axes(tensor: str) -> dict[int, str]:
        if "encoder." in tensor or tensor.startswith("encoder"):
            return {0: "batch", (2 if "." in tensor else 1): "source"}
        if tensor.startswith("past"):
            return {0: "batch", 2: "past"}
        if tensor.startswith("present"):
            return {0: "batch", 2: "total" if past is None else "past + sequence"}
        return {0: "batch", 1: "total" if tensor == "attention_mask" else "sequence"}

    torch.onnx.export(
        Wrapped().eval(),
        tuple(torch.from_numpy(value) for value in feeds.values()),
        str(path),
        input_names=names,
        output_names=outputs,
        opset_version=17,
        dynamo=False,
        dynamic_axes={tensor: axes(tensor) for tensor in [*names, *outputs]},
    )
    return onnx.load(path)


def with_half_ends(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the merged model with inputs and outputs in float16 and Casts around its If, as converters leave them."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    (choice,) = result.graph.node
    before, after = [], []
    for value in result.graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
            before.append(helper.make_node("Cast", [value.name], [f"{value.name}_float"], to=TensorProto.FLOAT))
            for node in (node for attribute in choice.attribute for node in attribute.g.node):
                node.input[:] = [f"{i}_float" if i == value.name else i for i in node.input]
    for number, value in enumerate(result.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
        choice.output[number] = f"{value.name}_float"
        after.append(helper.make_node("Cast", [choice.output[number]], [value.name], to=TensorProto.FLOAT16))
    del result.graph.node[:]
    result.graph.node.extend([*before, choice, *after])
    return result


@functools.cache
def half_ends(name: str) -> Path:
    """Returns the file of `ready` with float16 around it."""
    whole, path = ready(name), zoo.session_folder() / f"{name}-merged-half.onnx"
    with zoo.alone(path.name):
        if not path.exists():
            onnx.save(with_half_ends(onnx.load(whole)), path)
    return path


@functools.cache
def ready(name: str) -> Path:
    """Exports and merges one of the decoder zoo's architectures, once for all test workers; returns the file."""
    folder = zoo.session_folder()
    path = folder / f"{name}-merged.onnx"
    with zoo.alone(path.name):
        if not path.exists():
            _make(name, path)
    return path


def _make(name: str, path: Path) -> None:
    import torch

    torch.manual_seed(0)
    with zoo._quiet():
        model = zoo_decoders.BY_NAME[name].make("eager" if name == "t5" else "sdpa").eval()
        zoo._randomise(model)
        both: Sequence[onnx.ModelProto] = [
            _export(name, model, past, path.with_name(f"{name}-{past}.onnx")) for past in (None, zoo_decoders.PAST)
        ]
    onnx.save(merge(*both), path.with_suffix(".draft"))
    path.with_suffix(".draft").replace(path)
