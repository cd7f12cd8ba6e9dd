"""Small seeded transformers for the FX frontend: a class and a configuration each; nothing is downloaded.

Sizes are odd or distinct (hidden 60 = 5 heads of 12, feed-forward 88, 2 layers), so that a confused axis fails. Vectors
are drawn anew: freshly initialised biases and normalisation weights are all zeros or ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from _pytest.mark import ParameterSet

VOCABULARY = 101
SEQUENCE, TARGET, BATCH = 13, 11, 3
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 88,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, **SPECIAL, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}
GPT = {"vocab_size": VOCABULARY, "n_embd": 60, "n_layer": 2, "n_head": 5, "n_positions": 64, "n_inner": 88, **SPECIAL}
IMAGE = {
    "hidden_size": 60,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "intermediate_size": 88,
    "image_size": 24,
    "patch_size": 4,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 60,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 88,
    "decoder_ffn_dim": 72,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        model: the class in transformers.
        config: arguments of its configuration.
        inputs: "text", "seq2seq", "speech", "audio", "image", "text+image" or "patches".
        groups: the channel groups that must be found, by kind.
        fields: the fields of the configuration that say the widths; None where it cannot say those of every kind.
    """

    model: str
    config: dict[str, Any] = field(hash=False)
    inputs: str = "text"
    groups: dict[str, int] = field(default_factory=lambda: {"ffn": 2, "heads": 2}, hash=False)
    fields: tuple[str, ...] | None = None


def _without(config: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names} | more


MODELS = {
    "albert": Model("AlbertModel", {**TEXT, "embedding_size": 32}, groups={"ffn": 1, "heads": 1}),
    "bart": Model("BartModel", {**SEQ2SEQ, "max_position_embeddings": 64}, "seq2seq", {"ffn": 4, "heads": 6}),
    "beit": Model("BeitModel", IMAGE, "image"),
    "bert": Model("BertModel", TEXT),
    "bloom": Model(
        "BloomForCausalLM", _without(GPT, "n_embd", "n_positions", "n_inner", hidden_size=60), groups={"ffn": 2}
    ),
    "camembert": Model("CamembertModel", {**TEXT, "pad_token_id": 1}),
    "clip": Model(
        "CLIPModel",
        {"text_config": {**TEXT, **SPECIAL, "eos_token_id": 99}, "vision_config": IMAGE, "projection_dim": 20},
        "text+image",
        {"ffn": 4, "heads": 4},
    ),
    "clip-text": Model("CLIPTextModel", {**TEXT, **SPECIAL}),
    "clip-vision": Model("CLIPVisionModel", IMAGE, "image"),
    "cohere": Model("CohereForCausalLM", GROUPED),
    "deberta-v2": Model(
        "DebertaV2Model", {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    ),
    "deit": Model("DeiTModel", IMAGE, "image"),
    "dinov2": Model("Dinov2Model", _without(IMAGE, "intermediate_size", mlp_ratio=2), "image"),
    "deepseek-v3": Model(
        "DeepseekV3ForCausalLM",
        {
            **TEXT,
            **SPECIAL,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "q_lora_rank": 20,
            "kv_lora_rank": 14,
            "qk_nope_head_dim": 12,
            "qk_rope_head_dim": 8,
            "v_head_dim": 10,
            "moe_intermediate_size": 40,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
        },
        groups={"ffn": 3, "heads": 2},
    ),
    "distilbert": Model(
        "DistilBertModel",
        {"vocab_size": VOCABULARY, "dim": 60, "n_layers": 2, "n_heads": 5, "hidden_dim": 88, "max_position_embeddings": 64},
    ),
    "electra": Model("ElectraModel", {**TEXT, "embedding_size": 60}),
    "esm": Model("EsmModel", {**TEXT, "pad_token_id": 1, "position_embedding_type": "rotary"}),
    "falcon": Model(
        "FalconForCausalLM",
        _without(
            TEXT, "intermediate_size", ffn_hidden_size=88, multi_query=False, new_decoder_architecture=False, **SPECIAL
        ),
    ),
    "flaubert": Model("FlaubertModel", {"vocab_size": VOCABULARY, "emb_dim": 60, "n_layers": 2, "n_heads": 5, **SPECIAL}),
    "funnel": Model(
        "FunnelModel",
        {
            **_without(TEXT, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
            **{"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 60, "n_head": 5, "d_head": 12, "d_inner": 88},
        },
        groups={"ffn": 3, "heads": 3},
    ),
    "gemma": Model("GemmaForCausalLM", GROUPED),
    "gemma2": Model("Gemma2ForCausalLM", {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 10}),
    "gemma3": Model("Gemma3ForCausalLM", {**GROUPED, "sliding_window": 8, "query_pre_attn_scalar": 10}),
    "gpt-bigcode": Model("GPTBigCodeForCausalLM", GPT),
    "gpt-neo": Model(
        "GPTNeoForCausalLM",
        {
            **_without(TEXT, "num_hidden_layers", "num_attention_heads"),
            **SPECIAL,
            "num_layers": 2,
            "num_heads": 5,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "gpt-neox": Model("GPTNeoXForCausalLM", {**TEXT, **SPECIAL, "rotary_pct": 0.5}),
    "gpt-oss": Model(
        "GptOssForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    ),
    "gpt2": Model("GPT2LMHeadModel", GPT),
    "gptj": Model("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "llama": Model("LlamaForCausalLM", GROUPED),
    "mamba": Model(
        "MambaForCausalLM",
        {
            **SPECIAL,
            **{"vocab_size": VOCABULARY, "hidden_size": 60, "num_hidden_layers": 1, "state_size": 6, "time_step_rank": 8},
            **{"intermediate_size": 88, "conv_kernel": 3},
        },
        groups={"ffn": 2},  # the inner width, and the rank of the time steps
    ),
    "mamba2": Model(
        "Mamba2ForCausalLM",
        {
            **SPECIAL,
            **{"vocab_size": VOCABULARY, "hidden_size": 60, "num_hidden_layers": 1, "state_size": 6, "n_groups": 2},
            **{"num_heads": 10, "head_dim": 12, "expand": 2, "chunk_size": 7, "conv_kernel": 3},
        },
        groups={"heads": 1},  # with the groups of states
    ),
    "mistral": Model("MistralForCausalLM", {**GROUPED, "sliding_window": None}),
    "mixtral": Model("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "modernbert": Model("ModernBertModel", {**TEXT, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2}),
    "mpnet": Model("MPNetModel", {**TEXT, "pad_token_id": 1}),
    "olmo2": Model("Olmo2ForCausalLM", GROUPED, groups={"ffn": 2}),
    "opt": Model("OPTForCausalLM", _without(TEXT, "intermediate_size", ffn_dim=88, word_embed_proj_dim=60)),
    "phi": Model("PhiForCausalLM", {**TEXT, "num_key_value_heads": 5, "partial_rotary_factor": 0.5}),
    "phi3": Model("Phi3ForCausalLM", _without(GROUPED, "head_dim")),
    "qwen2": Model("Qwen2ForCausalLM", GROUPED),
    "qwen3": Model("Qwen3ForCausalLM", GROUPED),
    "roberta": Model("RobertaModel", {**TEXT, "pad_token_id": 1}),
    "siglip-vision": Model("SiglipVisionModel", IMAGE, "image", groups={"ffn": 2, "heads": 3}),  # one in its pooler
    "siglip2-vision": Model(
        "Siglip2VisionModel", {**_without(IMAGE, "image_size"), "num_patches": 16, "vision_use_head": False}, "patches"
    ),
    "smollm3": Model("SmolLM3ForCausalLM", GROUPED),
    "stablelm": Model("StableLmForCausalLM", {**TEXT, **SPECIAL, "num_key_value_heads": 5, "partial_rotary_factor": 0.5}),
    "starcoder2": Model("Starcoder2ForCausalLM", _without(GROUPED, "head_dim")),
    "swin": Model(
        "SwinModel",
        {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [3, 6], "window_size": 4},
        "image",
    ),
    "t5": Model(
        "T5Model",
        {"vocab_size": VOCABULARY, "d_model": 60, "d_kv": 12, "d_ff": 88, "num_layers": 2, "num_heads": 5},
        "seq2seq",
        {"ffn": 4, "heads": 6},
    ),
    "vit": Model("ViTModel", IMAGE, "image"),
    "wav2vec2": Model(
        "Wav2Vec2Model",
        {
            **_without(TEXT, "max_position_embeddings"),
            "conv_dim": [16, 16],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
        },
        "audio",
    ),
    "whisper": Model(
        "WhisperModel",
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 24, "max_target_positions": 32},
        "speech",
        {"ffn": 4, "heads": 6},
    ),
}


KINDS = {
    *("bert", "mpnet", "vit", "swin", "siglip2-vision", "clip", "wav2vec2", "t5", "whisper", "mixtral", "mamba"),
    *("gpt2", "llama", "gemma3", "phi3", "bloom", "falcon", "gpt-bigcode", "gpt-neox"),
}
"""One architecture of each way to lay heads, gates, experts, ties and images out: what CI runs of the zoo."""


def of_each_kind(names: Iterable[str], but: Collection[str] = ()) -> list[ParameterSet]:
    """Returns architectures as parameters of a test; others than ``KINDS``, and ``but``, run with ``--all`` alone."""
    return [pytest.param(n, marks=() if n in KINDS and n not in but else pytest.mark.rest) for n in sorted(names)]


def build(name: str, seed: int = 0) -> Any:
    """Makes a model in evaluation mode, its vectors drawn anew."""
    import torch
    import transformers

    entry = MODELS[name]
    torch.manual_seed(seed)
    model_class = getattr(transformers, entry.model)
    module = model_class(model_class.config_class(**entry.config)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def feeds(name: str, batch: int = BATCH, sequence: int = SEQUENCE, seed: int = 2) -> dict[str, np.ndarray]:
    """Returns a batch with padding in it, where there are tokens."""
    rng = np.random.default_rng(seed)
    kind, config = MODELS[name].inputs, MODELS[name].config

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, (batch, length))

    if kind in ("text", "seq2seq"):
        result = {"input_ids": ids(sequence), "attention_mask": np.ones((batch, sequence), np.int64)}
        result["attention_mask"][1, 2 * sequence // 3 :] = 0
        return {**result, "decoder_input_ids": ids(TARGET)} if kind == "seq2seq" else result
    if kind == "speech":
        return {
            "input_features": rng.standard_normal((batch, 16, 48)).astype(np.float32),
            "decoder_input_ids": ids(TARGET),
        }
    if kind == "audio":
        return {"input_values": rng.standard_normal((batch, 411)).astype(np.float32)}
    if kind == "patches":  # 16 of them, of which the image of the second sample has 12
        result = {"pixel_attention_mask": np.ones((batch, 16), np.int64), "spatial_shapes": np.full((batch, 2), 4)}
        result["pixel_attention_mask"][1, 12:], result["spatial_shapes"][1] = 0, (3, 4)
        return {"pixel_values": rng.standard_normal((batch, 16, 48)).astype(np.float32), **result}
    size = config.get("image_size") or config["vision_config"]["image_size"]
    text = {"input_ids": ids(sequence), "attention_mask": np.ones((batch, sequence), np.int64)} if "+" in kind else {}
    return {**text, "pixel_values": rng.standard_normal((batch, 3, size, size)).astype(np.float32)}


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the arrays as tensors."""
    import torch

    return {k: torch.from_numpy(v) for k, v in arrays.items()}
