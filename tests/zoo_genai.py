"""Decoders of fused operators, as the model builder of ONNX Runtime GenAI writes them: seeded, with a cache.

One layer is  x -> (Skip)SimplifiedLayerNormalization -> q, k, v -> attention with cache -> o -> skip -> gated FFN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, POSITIONS = 89, 48


@dataclass(frozen=True)
class Shape:
    """What differs between the decoders of the zoo.

    Attributes:
        operator: "GroupQueryAttention", "MultiHeadAttention", "Attention" (of the standard, opset 23) or "stacked"
            (ONNX Runtime's Attention: projections inside, keys and values of a layer in one cache).
        packed: q, k and v are one product.
        rotary: "inside" the attention, a "node" of its own, or "" for none.
        qk_norm: a normalisation of each head of q and k.
        sinks: one number a head in the softmax's denominator.
        window: the local window, -1 for none; with ``sliding`` the cache is no longer than that.
        bias: projections have biases.
        gated: the FFN is gated.
        odd: heads, groups and FFN width of every second layer, where they are others.
    """

    operator: str = "GroupQueryAttention"
    packed: bool = True
    rotary: str = "inside"
    qk_norm: bool = False
    sinks: bool = False
    window: int = -1
    sliding: bool = False
    softcap: float = 0.0
    bias: bool = False
    gated: bool = True
    hidden: int = 48
    heads: int = 6
    groups: int = 3
    width: int = 16
    ffn: int = 40
    layers: int = 2
    dtype: str = "float32"
    odd: tuple[int, int, int] | None = None

    def of(self, layer: int) -> Shape:
        """What one layer is."""
        if self.odd is None or layer % 2 == 0:
            return self
        heads, groups, ffn = self.odd
        return replace(self, heads=heads, groups=groups, ffn=ffn)


SHAPES = {
    "llama": Shape(),
    "qwen2": Shape(bias=True),
    "qwen3": Shape(qk_norm=True),
    "mistral": Shape(window=5, packed=False),
    "gemma2": Shape(window=9, sliding=True, softcap=30.0),
    "gpt-oss": Shape(sinks=True, window=4, bias=True),
    "phi": Shape(groups=6, bias=True, gated=False),
    "multi-query": Shape(groups=1, packed=False),
    "rotary node": Shape(rotary="node", packed=False),
    "multi-head": Shape(operator="MultiHeadAttention", groups=6, packed=False, rotary="node", bias=True),
    "gpt2": Shape(operator="MultiHeadAttention", groups=6, packed=False, rotary="", bias=True, gated=False),
    "gpt2, stacked": Shape(operator="stacked", groups=6, rotary="", bias=True, gated=False),
    "opset 23": Shape(operator="Attention", packed=False, rotary="node"),
    "opset 23, softcap": Shape(operator="Attention", packed=False, rotary="node", softcap=20.0, groups=6),
    "llama, float16": Shape(dtype="float16"),
}


class _Builder:
    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.rng = np.random.default_rng(seed)
        self.dtype = np.dtype(shape.dtype)
        self.kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        if not any(w.name == name for w in self.weights):
            self.weights.append(numpy_helper.from_array(value, name))
        return name

    def normal(self, name: str, *sizes: int, around: float = 0.0, scale: float = 0.2) -> str:
        return self.constant(name, (around + scale * self.rng.standard_normal(sizes)).astype(self.dtype))

    def node(self, op: str, inputs: list[str], name: str, outputs: list[str] | None = None, **attributes: Any) -> str:
        outputs = outputs or [f"{name}/out"]
        domain = "com.microsoft" if (op in EITHER and self.shape.operator != "Attention") or op in FUSED else ""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def linear(self, x: str, name: str, rows: int, columns: int) -> str:
        y = self.node("MatMul", [x, self.normal(f"{name}.weight", rows, columns)], f"{name}/MatMul")
        if not self.shape.bias:
            return y
        return self.node("Add", [y, self.normal(f"{name}.bias", columns)], f"{name}/Add")

    def ints(self, *values: int) -> str:
        return self.constant(f"ints{list(values)}", np.asarray(values, np.int64))

    def tables(self) -> tuple[str, str]:
        half = self.shape.width // 2
        angles = np.outer(np.arange(POSITIONS), 10.0 ** -(np.arange(half) / half))
        return self.constant("cos", np.cos(angles).astype(self.dtype)), self.constant(
            "sin", np.sin(angles).astype(self.dtype)
        )

    def head_norm(self, x: str, name: str, heads: int) -> str:
        width = self.shape.width
        y = self.node("Reshape", [x, self.ints(0, -1, width)], f"{name}/Reshape_1")
        scale = self.normal(f"{name}.weight", width, around=1.0)
        y = self.node("SimplifiedLayerNormalization", [y, scale], name, axis=-1, epsilon=1e-6, stash_type=1)
        return self.node("Reshape", [y, self.ints(0, -1, heads * width)], f"{name}/Reshape_2")

    def rotate(self, x: str, name: str, heads: int) -> str:
        cos, sin = self.tables()
        if self.shape.operator == "Attention":
            return self.node("RotaryEmbedding", [x, cos, sin, "position_ids"], name, num_heads=heads)
        return self.node("RotaryEmbedding", [x, "position_ids", cos, sin], name)

    def attention(self, x: str, layer: str, i: int) -> str:
        s = self.shape
        q_size, kv_size = s.heads * s.width, s.groups * s.width
        if s.operator == "stacked":
            inputs = [x, self.normal(f"{layer}.qkv", s.hidden, 3 * q_size), self.normal(f"{layer}.bias", 3 * q_size)]
            ends = [f"{layer}/attention", f"present_{i}"]
            inputs += ["", f"past_{i}"]
            return self.node("Attention", inputs, f"{layer}/Attention", ends, num_heads=s.heads, unidirectional=1)
        if s.packed:
            q, k, v = self.linear(x, f"{layer}.qkv", s.hidden, q_size + 2 * kv_size), "", ""
        else:
            q, k, v = (
                self.linear(x, f"{layer}.{n}", s.hidden, size)
                for n, size in (("q", q_size), ("k", kv_size), ("v", kv_size))
            )
        if s.qk_norm:
            sizes = self.ints(q_size, kv_size, kv_size)
            q, k, v = (f"{layer}/{n}" for n in "qkv")
            self.node("Split", [f"{layer}.qkv/MatMul/out", sizes], f"{layer}/Split", [q, k, v], axis=-1)
            q, k = self.head_norm(q, f"{layer}.q_norm", s.heads), self.head_norm(k, f"{layer}.k_norm", s.groups)
        if s.rotary == "node":
            q, k = self.rotate(q, f"{layer}/q_rotary", s.heads), self.rotate(k, f"{layer}/k_rotary", s.groups)
        past, present = (
            [f"past_key_values.{i}.{n}" for n in ("key", "value")],
            [f"present.{i}.{n}" for n in ("key", "value")],
        )
        outputs, name = [f"{layer}/attention", *present], f"{layer}/{s.operator}"
        if s.operator == "GroupQueryAttention":
            tables = list(self.tables()) if s.rotary == "inside" else ["", ""]
            sink = self.normal(f"{layer}.sinks", s.heads, scale=1.0) if s.sinks else ""
            extra: dict[str, Any] = {"sliding_window_cache": 1} if s.sliding else {}
            return self.node(
                *(s.operator, [q, k, v, *past, "seqlens_k", "total_length", *tables, "", "", sink], name, outputs),
                num_heads=s.heads,
                kv_num_heads=s.groups,
                do_rotary=int(s.rotary == "inside"),
                local_window_size=s.window,
                softcap=s.softcap,
                **extra,
            )
        if s.operator == "MultiHeadAttention":
            inputs = [q, k, v, "", "", "", *past]
            return self.node(s.operator, inputs, name, outputs, num_heads=s.heads, unidirectional=1)
        return self.node(
            *(s.operator, [q, k, v, "", *past], name, outputs),
            q_num_heads=s.heads,
            kv_num_heads=s.groups,
            is_causal=1,
            softcap=s.softcap,
        )

    def ffn(self, x: str, layer: str) -> str:
        s = self.shape
        up = self.linear(x, f"{layer}.up", s.hidden, s.ffn)
        if s.gated:
            gate = self.linear(x, f"{layer}.gate", s.hidden, s.ffn)
            turned = self.node("Sigmoid", [gate], f"{layer}/Sigmoid")
            up = self.node("Mul", [up, self.node("Mul", [gate, turned], f"{layer}/Silu")], f"{layer}/Mul")
        else:
            up = self.node("QuickGelu" if s.operator != "Attention" else "Relu", [up], f"{layer}/Gelu")
        return self.linear(up, f"{layer}.down", s.ffn, s.hidden)

    def norm(self, x: str, name: str, skip: str = "") -> tuple[str, str]:
        scale = self.normal(f"{name}.weight", self.shape.hidden, around=1.0)
        if self.shape.operator == "Attention":
            total = self.node("Add", [x, skip], f"{name}/skip") if skip else x
            return self.node("RMSNormalization", [total, scale], name, axis=-1, epsilon=1e-6), total
        if not skip:
            return self.node("SimplifiedLayerNormalization", [x, scale], name, axis=-1, epsilon=1e-6, stash_type=1), x
        outputs = [f"{name}/out", "", "", f"{name}/sum"]
        return self.node("SkipSimplifiedLayerNormalization", [x, skip, scale], name, outputs, epsilon=1e-6), outputs[3]

    def build(self) -> onnx.ModelProto:
        s = self.shape
        mask = "attention_mask"
        if s.operator == "GroupQueryAttention":
            count = self.node("ReduceSum", [mask, self.ints(1)], "count", keepdims=0)
            less = self.node("Sub", [count, self.ints(1)], "less")
            self.node("Cast", [less], "seqlens", ["seqlens_k"], to=TensorProto.INT32)
            length = self.node(
                "Gather", [self.node("Shape", [mask], "shape"), self.constant("one", np.asarray(1))], "length"
            )
            self.node("Cast", [length], "total", ["total_length"], to=TensorProto.INT32)
        stream = self.node("Gather", [self.normal("embed.weight", VOCABULARY, s.hidden, scale=1.0), "input_ids"], "embed")
        added = ""
        for i in range(s.layers):
            layer, self.shape = f"layers.{i}", s.of(i)
            x, stream = self.norm(stream, f"{layer}.input_norm", added)
            y = self.linear(self.attention(x, layer, i), f"{layer}.o", self.shape.heads * s.width, s.hidden)
            x, stream = self.norm(stream, f"{layer}.post_norm", y)
            added = self.ffn(x, layer)
        x, _ = self.norm(stream, "final_norm", added)
        self.node("MatMul", [x, self.normal("head.weight", s.hidden, VOCABULARY)], "head", ["logits"])
        inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
        if s.operator == "GroupQueryAttention":
            inputs.append(helper.make_tensor_value_info(mask, TensorProto.INT64, ["batch", "total"]))
        if s.rotary == "node":
            inputs.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "sequence"]))
        outputs = [helper.make_tensor_value_info("logits", self.kind, ["batch", "sequence", VOCABULARY])]
        past_length, length = ("past_sliding", "total_sliding") if s.sliding else ("past", "total")
        for i in range(s.layers):
            ends = [(f"past_key_values.{i}.{n}", f"present.{i}.{n}") for n in ("key", "value")]
            sizes: list[int | str] = ["batch", s.of(i).groups]
            if s.operator == "stacked":
                ends, sizes = [(f"past_{i}", f"present_{i}")], [2, "batch", s.of(i).groups]
            for before, after in ends:
                last = s.width if s.operator == "stacked" else "width"
                inputs.append(helper.make_tensor_value_info(before, self.kind, [*sizes, past_length, last]))
                outputs.append(helper.make_tensor_value_info(after, self.kind, [*sizes, length, last]))
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.weights)
        opset = 23 if s.operator == "Attention" else 17
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)


EITHER = {"RotaryEmbedding", "Attention"}
FUSED = {"GroupQueryAttention", "MultiHeadAttention", "SkipSimplifiedLayerNormalization", "QuickGelu"}


def decoder(shape: Shape, seed: int = 0) -> onnx.ModelProto:
    """Returns the seeded decoder of a shape."""
    return _Builder(shape, seed).build()
