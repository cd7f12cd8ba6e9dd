"""Writes a checkpoint of DeciLM, or of Llama, as a GGUF file for llama.cpp, through the package `gguf`.

    python tools/dev/deci_gguf.py smaller/ smaller.gguf

llama.cpp's own convert_hf_to_gguf.py does this, with the words of Llama 3 or of a sentencepiece tokenizer. Here token ids
go in and logits come out: the file has no words, so that it says nothing but what the model computes. Its architecture is
`deci`, with an entry for each layer of how many heads there are and how wide the feed-forward layer is, or `llama`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from liar_opt.frontend.modeling_decilm import ffn_width

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.linear_attn": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: Path, path: Path) -> None:
    """Writes the file, in float32.

    Args:
        folder: the checkpoint; its positions are rotated plainly.
        path: of the file.
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text("utf-8"))
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    blocks = config.get("block_configs")
    head = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(path, "llama" if blocks is None else "deci")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    shared = [config["num_key_value_heads"]] * layers if blocks is None else [_shared(b, heads) for b in blocks]
    if blocks is None:
        writer.add_head_count(heads)
        writer.add_head_count_kv(shared[0])
        writer.add_feed_forward_length(config["intermediate_size"])
    else:
        writer.add_head_count([0 if _gone(b) else heads for b in blocks])
        writer.add_head_count_kv(shared)
        writer.add_feed_forward_length([_width(b, config["hidden_size"]) for b in blocks])
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            place, array = _placed(name), tensor.float().numpy()
            if place is not None:
                layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
                turned = heads if ".q_proj." in name else shared[layer] if ".k_proj." in name else 0
                writer.add_tensor(place, _turned(array, turned) if turned else np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gone(block: dict[str, Any]) -> bool:
    attention = block["attention"]
    return attention["n_heads_in_group"] is None and not attention["replace_with_linear"]


def _shared(block: dict[str, Any], heads: int) -> int:
    group = block["attention"]["n_heads_in_group"]
    return 0 if group is None else int(heads // group)


def _width(block: dict[str, Any], hidden: int) -> int:
    multiple = block["ffn"]["ffn_mult"]
    return 0 if multiple is None else ffn_width(multiple, hidden)


def _placed(name: str) -> str | None:
    """Returns what llama.cpp calls a tensor; None for one that it does not have."""
    stem, _, kind = name.rpartition(".")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.{kind}"
    parts = stem.split(".", 3)
    return f"blk.{parts[2]}.{NAMES[parts[3]]}.{kind}" if len(parts) == 4 and parts[3] in NAMES else None


def _turned(array: Any, heads: int) -> Any:
    """Returns rows of queries or keys in the order of llama.cpp, which rotates neighbours and not halves."""
    rows, *rest = array.shape
    return np.ascontiguousarray(array.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(array.shape))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("path", type=Path)
    given = parser.parse_args()
    write_gguf(given.folder, given.path)
