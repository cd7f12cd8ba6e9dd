"""Llama with other widths in each layer, as DeciLM and Nemotron-NAS say them; liar-opt writes this file beside a model.

It is loaded by ``transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` and imports nothing of
liar-opt. The configuration has an entry of ``block_configs`` for each layer:

    attention   n_heads_in_group    heads that share keys and values; all layers have ``num_attention_heads``
                no_op               the layer has no attention
                replace_with_linear ``self_attn.linear_attn`` in place of it
    ffn         ffn_mult            m: the width is 2/3 m hidden_size, up to the next multiple of 256
                no_op               the layer has no feed-forward layer
                replace_with_linear ``mlp.linear_mlp`` in place of it

Read by vLLM and by llama.cpp's converter (the architecture ``DeciLMForCausalLM`` of both) and by mlx-lm (``nemotron-nas``).
"""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

MULTIPLE = 256
"""What feed-forward widths are multiples of."""


@dataclasses.dataclass
class AttentionConfig:
    """What the attention of one layer is; None and False where there is nothing special."""

    n_heads_in_group: int | None = None
    no_op: bool = False
    num_sink_tokens: int | None = None
    replace_with_linear: bool = False
    sparsify: list[str] | None = None
    unshifted_sink: bool = False
    use_prefill_window_in_sink_attention: bool = False
    window_length: int | None = None


@dataclasses.dataclass
class FFNConfig:
    """What the feed-forward layer of one layer is."""

    ffn_mult: float | None = None
    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: list[str] | None = None


@dataclasses.dataclass
class BlockConfig:
    """One layer."""

    attention: AttentionConfig
    ffn: FFNConfig

    def __post_init__(self) -> None:
        if isinstance(self.attention, dict):
            self.attention = AttentionConfig(**self.attention)
        if isinstance(self.ffn, dict):
            self.ffn = FFNConfig(**self.ffn)


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """Returns the width that a multiple stands for."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return -(-width // MULTIPLE) * MULTIPLE


def ffn_multiple(width: int, hidden_size: int) -> float:
    """Returns a multiple that stands for a width, a multiple of `MULTIPLE`."""
    return 3 * width / (2 * hidden_size)


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama's, with an entry for each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        made = (
            None
            if block_configs is None
            else [b if isinstance(b, BlockConfig) else BlockConfig(**b) for b in block_configs]
        )
        if made is not None and len(made) != self.num_hidden_layers:
            raise ValueError(f"block_configs has {len(made)} entries for {self.num_hidden_layers} layers")
        self.block_configs: Any = made

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data; how positions are rotated is said as older readers want it, too."""
        said: dict[str, Any] = super().to_dict()
        if self.block_configs is not None:
            said["block_configs"] = [dataclasses.asdict(block) for block in self.block_configs]
        rope = said.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
            said["rope_theta"] = rope["rope_theta"]
            said["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        return said


@contextlib.contextmanager
def without_layers(config: DeciLMConfig) -> Iterator[None]:
    """Has a configuration say that there are no layers: a Llama makes none, and its own take their place."""
    count, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = count


class Nothing(nn.Module):
    """In place of a layer that is not there: what is added to the stream is zero."""

    def __init__(self, pair: bool):
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        """Returns zeros."""
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.pair else zeros


class LinearAttention(nn.Module):
    """A linear map in place of attention."""

    def __init__(self, config: DeciLMConfig):
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        """Returns the map of what is read, as attention returns it."""
        return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
    """A linear map in place of a feed-forward layer."""

    def __init__(self, config: DeciLMConfig):
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> Any:
        """Returns the map of what is read."""
        return self.linear_mlp(x)


class DeciLMDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A Llama's layer with the widths of its own entry.

    Args:
        config: of the model.
        index: of the layer.
        place: in the cache of keys and values, which layers without attention have no place in.
    """

    def __init__(self, config: DeciLMConfig, index: int, place: int):
        block, own = config.block_configs[index], copy.copy(config)
        attention, ffn = block.attention, block.ffn
        if attention.n_heads_in_group is not None:
            own.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
        own.intermediate_size = MULTIPLE if ffn.ffn_mult is None else ffn_width(ffn.ffn_mult, config.hidden_size)
        super().__init__(own, place)
        layer: Any = self
        layer.self_attn.config = layer.mlp.config = config
        if attention.no_op:
            layer.input_layernorm, layer.self_attn = nn.Identity(), Nothing(pair=True)
        elif attention.replace_with_linear:
            layer.self_attn = LinearAttention(config)
        if ffn.no_op:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), Nothing(pair=False)
        elif ffn.replace_with_linear:
            layer.mlp = LinearMLP(config)


class DeciLMModel(LlamaModel):  # type: ignore[misc]
    """A Llama with such layers."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig):
        with without_layers(config):
            super().__init__(config)
        layers, place = [], 0
        for index, block in enumerate(config.block_configs):
            layers.append(DeciLMDecoderLayer(config, index, place))
            place += not (block.attention.no_op or block.attention.replace_with_linear)
        self.layers = nn.ModuleList(layers)
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """A language model of it."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig):
        with without_layers(config):
            super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()


DeciLMConfig.register_for_auto_class()
DeciLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
