"""Llama-shaped models as DeciLM: the same weights, with a configuration that says the widths of each layer.

What reads such a checkpoint, and how (vllm-project/vllm, vllm/model_executor/models/nemotron_nas.py; ggml-org/llama.cpp,
conversion of DeciModel; mlx-lm 0.32.2 from PyPI):

    transformers   the code beside the weights (`modeling_decilm`), with trust_remote_code
    vLLM           models/nemotron_nas.py: ffn_mult, n_heads_in_group, no_op; no linear maps
    llama.cpp      conversion of DeciLMForCausalLM: ffn_mult, n_heads_in_group, no attention, a linear map for attention;
                   heads are hidden_size / num_attention_heads wide, positions rotated plainly or as Llama 3's; words are
                   those of Llama 3 or of a sentencepiece tokenizer; a layer without a feed-forward layer adds nothing
    mlx-lm         models/nemotron-nas.py: all of it, but linear maps by another name; heads as in llama.cpp's

All compute the width of a feed-forward layer as ffn_mult says it, up to the next multiple of 256, and know one number of
heads.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from liar_opt.frontend.hf_checkpoint import DECILM, FieldChange, is_stock, quiet_loading, without_cache
from liar_opt.runtime.compare import TOLERANCES, relative_difference
from liar_opt.runtime.errors import OptionError

if TYPE_CHECKING:
    import torch

ROTATIONS = ("default", "llama3")
"""How positions may be rotated: what all that read such a checkpoint know."""
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "vocab_size")
"""Fields of a configuration without which a model is not shaped like a Llama."""
ELSEWHERE = "leave --format deci out (in Python: checkpoint='deci'), or write ONNX with --format onnx"


def is_deci(module: torch.nn.Module) -> bool:
    """Returns whether a module is of this form already."""
    return type(module).__name__ == DECILM and hasattr(module.config, "block_configs")


def as_deci(module: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Returns a Llama-shaped model in this form, with the same tensors.

    Args:
        module: the model; it is not changed.
        example: inputs on which both must give the same.

    Raises:
        OptionError: it is not shaped like a Llama, or has what this form cannot say.
    """
    if is_deci(module):
        return module
    name = type(module).__name__
    why = _unlike(module)
    if why is not None:
        raise OptionError(f"{name} cannot be said as DeciLM: {why}; {ELSEWHERE}")
    made = _made(module)
    if made is None:
        raise OptionError(f"{name} cannot be said as DeciLM: its tensors are not those of a Llama; {ELSEWHERE}")
    worst, allowed = _difference(module, made, example)
    if not worst <= allowed:
        raise OptionError(f"{name} cannot be said as DeciLM: a Llama computes something else of its tensors; {ELSEWHERE}")
    return made


def _unlike(module: torch.nn.Module) -> str | None:
    """Returns what a configuration says that this form has no word for; None where there is nothing."""
    from liar_opt.frontend.modeling_decilm import MULTIPLE

    given: Any = module
    said = given.config.to_dict() if is_stock(module) else {}
    missing = next((field for field in NEEDED if type(said.get(field)) not in (int, float)), None)
    if missing is not None:
        return f"its configuration has no '{missing}'"
    if said.get("hidden_act", "silu") != "silu":
        return f"its activation is {said['hidden_act']!r}, and what reads DeciLM has silu"
    if said["intermediate_size"] % MULTIPLE:
        return f"its feed-forward width {said['intermediate_size']} is no multiple of {MULTIPLE}, as all widths are there"
    if any(kind != "full_attention" for kind in said.get("layer_types") or ()) or _slides(said):
        return "its attention has a sliding window"
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROTATIONS or rope.get("partial_rotary_factor", said.get("partial_rotary_factor") or 1.0) != 1.0:
        return (
            f"its positions are rotated as {kind!r}, and what reads DeciLM knows {' and '.join(ROTATIONS)}, of whole heads"
        )
    return None


def _slides(said: Mapping[str, Any]) -> bool:
    window = said.get("sliding_window")
    whole = said.get("layer_types") or said.get("use_sliding_window") is False
    return not whole and isinstance(window, int) and window < said.get("max_position_embeddings", 0)


def _made(module: torch.nn.Module) -> torch.nn.Module | None:
    """Returns the model in this form, its biases filled up with zeros; None where its tensors are others."""
    import torch

    from liar_opt.frontend.modeling_decilm import DeciLMConfig, DeciLMForCausalLM, ffn_multiple

    given: Any = module
    said, tensors = given.config.to_dict(), dict(module.state_dict())
    fields = {name: said[name] for name in DeciLMConfig().to_dict() if name in said}
    for name in ("architectures", "auto_map", "model_type", "transformers_version", "block_configs"):
        fields.pop(name, None)
    heads = said["num_attention_heads"]
    width = ffn_multiple(said["intermediate_size"], said["hidden_size"])
    alike = {"n_heads_in_group": heads // (said.get("num_key_value_heads") or heads)}
    blocks = [{"attention": dict(alike), "ffn": {"ffn_mult": width}} for _ in range(said["num_hidden_layers"])]
    fields["attention_bias"] = any(".self_attn." in name and name.endswith(".bias") for name in tensors)
    fields["mlp_bias"] = any(".mlp." in name and name.endswith(".bias") for name in tensors)
    config = DeciLMConfig(block_configs=blocks, **fields)
    config._attn_implementation = given.config._attn_implementation
    with quiet_loading(), torch.device("meta"):
        made = DeciLMForCausalLM(config)
    wanted = {name: value.shape for name, value in made.state_dict().items()}
    place = next(iter(tensors.values()))
    for name in wanted.keys() - tensors.keys():
        if name.endswith(".bias"):
            tensors[name] = torch.zeros(wanted[name], dtype=place.dtype, device=place.device)
    if {name: value.shape for name, value in tensors.items()} != wanted:
        return None
    made.load_state_dict(tensors, assign=True)
    made.model.rotary_emb = type(made.model.rotary_emb)(config=config).to(place.device)  # no tensor that is stored
    made.tie_weights()
    made.generation_config = given.generation_config
    for parameter in made.parameters():
        parameter.requires_grad_(next(given.parameters()).requires_grad)
    result: torch.nn.Module = made.train(module.training)
    return result


def _difference(module: torch.nn.Module, made: torch.nn.Module, example: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """Returns how far the logits of two models are apart, and how far they may be."""
    import torch

    with torch.no_grad(), without_cache(module), without_cache(made):
        ours, theirs = (m(**example).logits.float().cpu().numpy() for m in (made, module))
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    return relative_difference(ours, theirs), TOLERANCES.get(dtype, TOLERANCES["float32"])


def deci_fields(module: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> tuple[FieldChange, ...]:
    """Returns what the configuration must say for other shapes of the tensors.

    Args:
        module: the model as it is.
        shapes: of all its tensors, as they will be.

    Raises:
        OptionError: layers would not have as many heads.
    """
    from liar_opt.frontend.modeling_decilm import MULTIPLE, ffn_multiple

    config: Any = module.config
    found, heads, groups, widths = [], set(), set(), [MULTIPLE]
    for index, block in enumerate(config.block_configs):
        layer = f"model.layers.{index}"
        if block.ffn.ffn_mult is not None:
            width = shapes[f"{layer}.mlp.down_proj.weight"][1]
            widths.append(width)
            multiple = ffn_multiple(width, config.hidden_size)
            found.append(FieldChange(("block_configs", str(index), "ffn"), "ffn_mult", block.ffn.ffn_mult, multiple))
        shared, place = block.attention.n_heads_in_group, ("block_configs", str(index), "attention")
        if shared is None:
            continue
        left = [shapes[f"{layer}.self_attn.{name}_proj.weight"][0] // config.head_dim for name in "qk"]
        if not all(left):
            found += [FieldChange(place, "n_heads_in_group", shared, None), FieldChange(place, "no_op", False, True)]
            continue
        heads.add(left[0])
        groups.add(left[1])
    if len(heads) > 1:
        raise OptionError(f"DeciLM has one number of heads for all layers, and these would have {sorted(heads)}")
    for name, values in (("num_attention_heads", heads), ("num_key_value_heads", groups)):
        if len(values) == 1:
            found.append(FieldChange((), name, getattr(config, name), values.pop()))
    found.append(FieldChange((), "intermediate_size", config.intermediate_size, max(widths)))
    return tuple(change for change in found if change.before != change.after)


@functools.cache
def reads_heads() -> str:
    """Returns the sentence on fewer heads."""
    return (
        "heads are left alone: llama.cpp's converter and mlx-lm take them to be hidden_size / num_attention_heads wide; "
        "--heads RATIO cuts them for vLLM and transformers"
    )
