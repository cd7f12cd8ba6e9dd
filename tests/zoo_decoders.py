"""The decoder zoo: small seeded language models and encoder-decoders from `transformers` configurations, exported to ONNX.

Sizes are distinct where an architecture allows it (6 query heads of 8 that share 2 key-value heads, feed-forward 44, 2
layers, 101 words), so that a transposed or confused axis fails. Every parameter is drawn anew, as in `zoo`.

A case with `cache` has the past keys and values as inputs and the present ones as outputs, as runtimes for generation
want them; the others read a whole text. `build` proves each export against torch before it is handed out.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zoo

LAYERS, HEADS, GROUPS, HEAD_DIM, FFN, VOCABULARY, POSITIONS = 2, 6, 2, 8, 44, 101, 41
HIDDEN = HEADS * HEAD_DIM
EXPERTS, EXPERT_FFN = 4, 20
DEPTH, ODD_GROUPS, ODD_HEADS = 4, 3, 4  # layers of a deep model; key-value heads, or heads, of every second one of them
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
FFN_WIDTHS = (
    *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)
GROUP_COUNTS = ("num_key_value_heads", "num_kv_heads")
PADDING, START = 1, 2
BATCH, OTHER_BATCH = (2, 13), (3, 9)
PAST = 5  # positions in the cache of the exported example
MELS, FRAMES = 10, 30  # sound: 30 frames, halved by the stem to 15 encoder positions
OPSETS = {"torchscript": 17, "dynamo": 18}
FUSED = zoo.FUSED
RTOL = 1e-4


@dataclass(frozen=True)
class Decoder:
    """An architecture: how to make it, and the channel groups that must be found in any export of it."""

    name: str
    make: Maker
    expected: dict[str, int]
    reads: str = "text"  # "text" (a decoder) | "texts" (encoder-decoder) | "sound" (encoder-decoder over a spectrogram)
    attention: str = "sdpa"


def _common(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": PADDING,
        "bos_token_id": START,
        "eos_token_id": START,
        **more,
    }


def _grouped(**more: Any) -> dict[str, Any]:
    return _common(num_key_value_heads=GROUPS, **more)


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes a model of `transformers`; attention is "eager" or "sdpa", `changes` are fields of the configuration."""

    family: str
    model: str
    fields: dict[str, Any]

    def __call__(self, attention: str, **changes: Any) -> Any:
        import transformers

        tf: Any = transformers
        config = getattr(tf, f"{self.family}Config")(**{**self.fields, **changes})
        config._experts_implementation = "batched_mm"  # the only one that the exporters know
        return getattr(tf, self.model)._from_config(config, attn_implementation=attention)


def _causal(family: str, **fields: Any) -> Maker:
    return _pairs(family, f"{'Gemma3' if family == 'Gemma3Text' else family}ForCausalLM", **fields)


def _pairs(family: str, model: str, **fields: Any) -> Maker:
    return Maker(family, model, fields)


_BART = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": FFN + 8,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PADDING,
    "bos_token_id": START,
    "eos_token_id": START,
    "decoder_start_token_id": START,
    "forced_eos_token_id": None,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": HEAD_DIM + 2,
    "d_ff": FFN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": PADDING,
    "eos_token_id": START,
    "decoder_start_token_id": START,
}
PLAIN = {"ffn": LAYERS, "heads": LAYERS}
BOTH = {"ffn": 2 * LAYERS, "heads": 3 * LAYERS}

DECODERS = (
    Decoder("gpt2", _pairs("GPT2", "GPT2LMHeadModel", **_common(n_inner=FFN)), PLAIN),
    Decoder("opt", _causal("OPT", **_common(ffn_dim=FFN, word_embed_proj_dim=HIDDEN)), PLAIN),
    Decoder("llama", _causal("Llama", **_grouped()), PLAIN),
    Decoder(
        "llama-tied-mha", _causal("Llama", **_common(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)), PLAIN
    ),
    Decoder("mistral", _causal("Mistral", **_grouped(sliding_window=6, head_dim=HEAD_DIM + 2)), PLAIN),
    Decoder("qwen2", _causal("Qwen2", **_grouped()), PLAIN),
    Decoder("qwen3", _causal("Qwen3", **_grouped(head_dim=HEAD_DIM + 2)), PLAIN),
    Decoder("gemma", _causal("Gemma", **_common(num_key_value_heads=1, head_dim=HEAD_DIM + 2)), PLAIN),
    Decoder("gemma2", _causal("Gemma2", **_grouped(head_dim=HEAD_DIM + 2, sliding_window=6)), PLAIN, attention="eager"),
    Decoder("gemma3", _causal("Gemma3Text", **_grouped(head_dim=HEAD_DIM + 2, sliding_window=6)), PLAIN),
    Decoder("phi3", _causal("Phi3", **_grouped()), PLAIN),
    Decoder("phi", _causal("Phi", **_grouped(partial_rotary_factor=0.5)), PLAIN),
    Decoder("gpt-neox", _causal("GPTNeoX", **_common(rotary_pct=0.5)), PLAIN),
    Decoder("gpt-j", _causal("GPTJ", **_common(n_inner=FFN, rotary_dim=4)), PLAIN, attention="eager"),
    Decoder(
        "codegen",
        _causal(
            "CodeGen",
            **{**_common(n_inner=FFN, rotary_dim=4, n_ctx=POSITIONS), "hidden_size": 64, "num_attention_heads": 8},
        ),
        PLAIN,
        attention="eager",
    ),
    Decoder(
        "gpt-neo",
        _causal(
            "GPTNeo",
            **_common(num_layers=LAYERS, num_heads=HEADS, attention_types=[[["global", "local"], 1]], window_size=6),
        ),
        PLAIN,
        attention="eager",
    ),
    Decoder("gpt-bigcode", _causal("GPTBigCode", **_common(n_inner=FFN, multi_query=True)), PLAIN),
    Decoder(
        "falcon-mqa",
        _causal("Falcon", **_common(ffn_hidden_size=FFN, multi_query=True, new_decoder_architecture=False)),
        PLAIN,
    ),
    Decoder(
        "falcon-gqa",
        _causal("Falcon", **_common(ffn_hidden_size=FFN, num_kv_heads=GROUPS, new_decoder_architecture=True)),
        PLAIN,
    ),
    Decoder("bloom", _causal("Bloom", **_common(n_layer=LAYERS, n_head=HEADS)), PLAIN, attention="eager"),
    Decoder(
        "mpt",
        _causal(
            "Mpt",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            n_heads=HEADS,
            n_layers=LAYERS,
            expansion_ratio=2,
            max_seq_len=POSITIONS,
        ),
        PLAIN,
        attention="eager",
    ),
    Decoder("stablelm", _causal("StableLm", **_grouped(partial_rotary_factor=0.5)), PLAIN),
    # Queries and keys are normalised head by head, in operators of their own: their heads cannot be cut.
    Decoder("stablelm-qk", _causal("StableLm", **_grouped(partial_rotary_factor=0.5, qk_layernorm=True)), {"ffn": LAYERS}),
    Decoder("olmo2", _causal("Olmo2", **_grouped()), {"ffn": LAYERS}),
    Decoder("granite", _causal("Granite", **_grouped()), PLAIN),
    Decoder("starcoder2", _causal("Starcoder2", **_grouped(sliding_window=6)), PLAIN),
    Decoder("cohere", _causal("Cohere", **_grouped()), PLAIN),
    Decoder("glm", _causal("Glm", **_grouped(head_dim=HEAD_DIM, partial_rotary_factor=0.5)), PLAIN),
    Decoder("nemotron", _causal("Nemotron", **_grouped(head_dim=HEAD_DIM, partial_rotary_factor=0.5)), PLAIN),
    Decoder("smollm3", _causal("SmolLM3", **_grouped(no_rope_layers=[1, 0])), PLAIN),
    Decoder(
        "mixtral",
        _causal("Mixtral", **_grouped(intermediate_size=EXPERT_FFN, num_local_experts=EXPERTS, num_experts_per_tok=2)),
        PLAIN,
    ),
    Decoder(
        "qwen2-moe",
        _causal(
            "Qwen2Moe",
            **_grouped(
                moe_intermediate_size=EXPERT_FFN,
                shared_expert_intermediate_size=FFN + 8,
                num_experts=EXPERTS,
                num_experts_per_tok=2,
            ),
        ),
        {"ffn": 2 * LAYERS, "heads": LAYERS},  # one expert is shared by all tokens
    ),
    Decoder(
        "olmoe",
        _causal("Olmoe", **_grouped(intermediate_size=EXPERT_FFN, num_experts=EXPERTS, num_experts_per_tok=2)),
        {"ffn": LAYERS},
    ),
    Decoder("t5", _pairs("T5", "T5ForConditionalGeneration", **_T5), BOTH, "texts"),
    Decoder(
        "t5-gated",
        _pairs("T5", "T5ForConditionalGeneration", **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        BOTH,
        "texts",
    ),
    Decoder("umt5", _pairs("UMT5", "UMT5ForConditionalGeneration", **_T5), BOTH, "texts"),
    Decoder("bart", _pairs("Bart", "BartForConditionalGeneration", **_BART), BOTH, "texts"),
    Decoder("marian", _pairs("Marian", "MarianMTModel", **_BART), BOTH, "texts"),
    Decoder("pegasus", _pairs("Pegasus", "PegasusForConditionalGeneration", **_BART), BOTH, "texts"),
    Decoder(
        "whisper",
        _pairs(
            "Whisper",
            "WhisperForConditionalGeneration",
            **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
            num_mel_bins=MELS,
            max_source_positions=FRAMES // 2,
            max_target_positions=POSITIONS,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        BOTH,
        "sound",
    ),
)
BY_NAME = {d.name: d for d in DECODERS}
# Beside the widths of all feed-forward layers and the numbers of heads that share keys. One rotary table serves all layers,
# and one bias by position: there, heads are as wide, or as many, in all.
ODD_PAIR = {"encoder_attention_heads": ODD_HEADS, "decoder_attention_heads": ODD_HEADS}
ODD: dict[str, dict[str, Any]] = {
    "gpt2": {"num_attention_heads": ODD_HEADS},
    "opt": {"num_attention_heads": ODD_HEADS},
    "gpt-neo": {"num_heads": ODD_HEADS},
    "gpt-bigcode": {"num_attention_heads": ODD_HEADS},
    **{name: ODD_PAIR for name in ("bart", "marian", "pegasus", "whisper")},
    **{name: {"num_key_value_heads": 1} for name in ("qwen3", "mistral", "gemma2", "gemma3")},
}
Caches = Sequence[tuple[int, int]]  # of each layer: key-value heads, width of a head


@dataclass(frozen=True)
class Case:
    """One export of an architecture."""

    architecture: str
    exporter: str  # "torchscript" | "dynamo"
    cache: bool = False
    opset: int = 0
    attention: str = ""
    deep: bool = False

    @property
    def expected(self) -> dict[str, int]:
        """Groups that must be found, by kind."""
        found = BY_NAME[self.architecture].expected
        return {k: n * DEPTH // LAYERS if self.deep else n for k, n in found.items()}

    @property
    def name(self) -> str:
        """Unique among the cases."""
        marks = [f"opset{self.opset}"] if self.opset else []
        marks += ["deep"] if self.deep else []
        marks += [self.attention] if self.attention else []
        return "-".join([self.architecture, self.exporter, *(["cache"] if self.cache else []), *marks])


# What the exporters cannot do, checked against torch 2.13 and transformers 5.23, beside operators that opset 17 lacks.
IMPOSSIBLE = {
    ("cohere", "torchscript"): "a wrong number of heads, or ranks that differ, in its rotary embedding",
    ("glm", "torchscript"): "ranks that differ in its rotary embedding",
    ("whisper", "torchscript"): "aten::diff",
    ("t5", "dynamo"): "a view of strides that it cannot prove",
    ("t5-gated", "dynamo"): "a view of strides that it cannot prove",
    ("umt5", "dynamo"): "a view of strides that it cannot prove",
}
# Where one axis of a projection counts queries, keys and values, they have one width: values cannot be cut alone.
ONE_WIDTH = {
    "torchscript": {"bloom", "falcon-mqa", "falcon-gqa"},
    "dynamo": {"bloom", "falcon-mqa", "falcon-gqa"},
}
BLOCKS = {
    (HEADS, 1),
    (GROUPS, HEADS // GROUPS),
    (4, 2),
}  # heads and query heads in each; CodeGen lays its heads out as 4 x 2
# Laid out as others are; their export by dynamo, some seconds each, would show nothing new.
ALIKE = {"granite", "nemotron", "starcoder2", "qwen2", "marian", "pegasus", "olmoe", "stablelm-qk", "gpt-neo", "umt5"}
QUICK_DYNAMO = ("gpt2", "llama", "phi3", "mixtral", "whisper")
CACHED_DYNAMO = ("gpt2", "llama", "gemma3", "falcon-mqa", "opt")


def cases() -> list[Case]:
    """All cases: whole texts by both exporters; caches by TorchScript, and some by dynamo, which is slow."""
    whole = [Case(d.name, exporter) for d in DECODERS for exporter in ("torchscript", "dynamo")]
    cached = [Case(d.name, "torchscript", True) for d in DECODERS if d.reads == "text"]
    cached += [Case(name, "dynamo", True) for name in CACHED_DYNAMO]
    # Attention as one operator. With rotary embeddings such exports do not run: their tables have a batch of one.
    cached += [Case("gpt2", "dynamo", opset=FUSED), Case("bart", "dynamo", opset=FUSED), Case("opt", "dynamo", True, FUSED)]
    every = [c for c in (*whole, *cached) if (c.architecture, c.exporter) not in IMPOSSIBLE]
    return [c for c in every if c.exporter == "torchscript" or c.architecture not in ALIKE]


def deep_cases() -> list[Case]:
    """Deep models: whole texts and caches by TorchScript, and those of `cases` by dynamo."""
    return [Case(c.architecture, c.exporter, c.cache, deep=True) for c in cases() if not c.opset]


def is_quick(case: Case) -> bool:
    """Whether an export takes less than a second, or stands for the others of its exporter."""
    if case.exporter == "torchscript":
        return case.cache or case.architecture not in ALIKE
    named = {"": QUICK_DYNAMO, "cache": ("llama",), "opset": ("bart", "opt")}
    return case.architecture in named["opset" if case.opset else "cache" if case.cache else ""]


@dataclass(frozen=True, eq=False)
class Built:
    """A model on disk with inputs that run it."""

    case: Case
    path: Path
    feeds: dict[str, np.ndarray]
    other_feeds: dict[str, np.ndarray]


# --------------------------------------------------------------------------------------------------------- the models


def deep_model(architecture: str, attention: str) -> Any:
    """Returns a model of `DEPTH` layers, of which every second one has other widths, as far as the architecture allows."""
    make = BY_NAME[architecture].make
    longer: dict[str, Any] = {name: DEPTH for name in LAYER_COUNTS if name in make.fields}
    if "no_rope_layers" in make.fields:
        longer["no_rope_layers"] = make.fields["no_rope_layers"] * (DEPTH // LAYERS)
    if "attention_types" in make.fields:
        longer["attention_types"] = [[["global", "local"], DEPTH // 2]]
    odd: dict[str, Any] = {name: make.fields[name] + 12 for name in FFN_WIDTHS if name in make.fields}
    odd |= {name: ODD_GROUPS for name in GROUP_COUNTS if make.fields.get(name) == GROUPS} | ODD.get(architecture, {})
    return zoo.mixed(make(attention, **longer), make(attention, **{**longer, **odd}), DEPTH)


def cache_width(model: Any) -> list[tuple[int, int]]:
    """Returns (key-value heads, width of a head) of every layer's cache."""
    import torch

    with torch.no_grad():
        result = model(input_ids=torch.tensor([[3, 4]]), use_cache=True).past_key_values
    return [(int(layer.keys.shape[1]), int(layer.keys.shape[3])) for layer in result.layers]


def feeds_of(case: Case, size: tuple[int, int], seed: int, caches: Caches = (), past: int = PAST) -> dict[str, np.ndarray]:
    """A seeded batch; with a cache, of `past` positions, its keys and values are drawn too."""
    rng = np.random.default_rng([seed, *size])
    batch, length = size
    reads = BY_NAME[case.architecture].reads
    ids = rng.integers(START + 1, VOCABULARY, size)
    if reads == "sound":
        sound = rng.standard_normal((batch, MELS, FRAMES)).astype(np.float32)
        return {"input_features": sound, "decoder_input_ids": ids}
    total = length + (past if case.cache else 0)
    mask = np.ones((batch, total), np.int64)
    # A row with nothing to look at is undefined: texts are padded on the right, caches on the left.
    mask[-1, slice(0, 2) if case.cache and past else slice(-2, None)] = 0
    result: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": mask}
    if reads == "texts":
        result = {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": rng.integers(START + 1, VOCABULARY, (batch, 7)),
        }
    for layer, (groups, width) in enumerate(caches if case.cache else []):
        for what in ("key", "value"):
            value = rng.standard_normal((batch, groups, past, width)).astype(np.float32)
            result[f"past_key_values.{layer}.{what}"] = value
    return result


def _module(case: Case) -> tuple[Any, list[tuple[int, int]]]:
    import torch

    torch.manual_seed(0)
    attention = case.attention or BY_NAME[case.architecture].attention
    model = (deep_model(case.architecture, attention) if case.deep else BY_NAME[case.architecture].make(attention)).eval()
    zoo._randomise(model)
    caches = cache_width(model) if case.cache else []
    names = list(feeds_of(case, BATCH, 0, caches))

    class Wrapped(torch.nn.Module):
        """Names the inputs one by one and returns tensors, as the usual export scripts do."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            named = dict(zip(names, inputs, strict=True))
            if not case.cache:
                return self.model(**named, use_cache=False).logits
            from transformers.cache_utils import DynamicCache

            flat = [named.pop(n) for n in names if n.startswith("past")]
            cache = DynamicCache(list(zip(flat[::2], flat[1::2], strict=True)))
            result = self.model(**named, past_key_values=cache, use_cache=True)
            return (result.logits, *(t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)))

    return Wrapped().eval(), caches


def output_names(caches: list[tuple[int, int]]) -> list[str]:
    """Names of the graph outputs, in order."""
    return ["logits", *(f"present.{i}.{what}" for i in range(len(caches)) for what in ("key", "value"))]


def _axes(case: Case, name: str) -> dict[int, str]:
    if name in ("input_features",):
        return {0: "batch"}
    if name.startswith("past"):
        return {0: "batch", 2: "past"}
    if name.startswith("present"):
        return {0: "batch", 2: "total"}
    if name.startswith("decoder") or (name == "logits" and BY_NAME[case.architecture].reads != "text"):
        return {0: "batch", 1: "target"}
    return {0: "batch", 1: "total" if name == "attention_mask" and case.cache else "sequence"}


def _export(case: Case, module: Any, feeds: dict[str, np.ndarray], outputs: list[str], path: Path) -> None:
    import torch

    arguments = tuple(torch.from_numpy(value) for value in feeds.values())
    common: dict[str, Any] = {
        "input_names": list(feeds),
        "output_names": outputs,
        "opset_version": case.opset or OPSETS[case.exporter],
    }
    if case.exporter == "torchscript":
        axes = {name: _axes(case, name) for name in [*feeds, *outputs]}
        torch.onnx.export(module, arguments, str(path), dynamo=False, dynamic_axes=axes, **common)
        return
    shapes = (tuple(dict.fromkeys(_axes(case, name), torch.export.Dim.DYNAMIC) for name in feeds),)
    torch.onnx.export(
        module, arguments, str(path), dynamo=True, external_data=False, verbose=False, dynamic_shapes=shapes, **common
    )


def build(case: Case, folder: Path) -> Built:
    """Exports a case into `folder` and checks it against torch; a model that is there already is used as it is.

    Raises:
        AssertionError: the exported graph does not compute what the module computes.
    """
    path = Path(folder) / f"{case.name}.onnx"
    stored = path.with_suffix(".npz")
    if not stored.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with zoo._quiet():
            module, caches = _module(case)
            feeds, other = feeds_of(case, BATCH, 0, caches), feeds_of(case, OTHER_BATCH, 1, caches, PAST + 2)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                draft = Path(scratch) / path.name
                _export(case, module, feeds, output_names(caches), draft)
                for batch in (feeds, other):
                    reference = zoo._reference(module, batch, output_names(caches)) if caches else _logits(module, batch)
                    error = zoo.difference(zoo.run(draft, batch), reference)
                    assert error <= RTOL, f"{case.name}: off by {error:.2e} from torch"
                arrays = {f"{k}:{n}": v for k, b in (("feeds", feeds), ("other", other)) for n, v in b.items()}
                np.savez(Path(scratch) / "feeds.npz", **arrays)  # type: ignore[arg-type]
                draft.replace(path)
                (Path(scratch) / "feeds.npz").replace(stored)
    with np.load(stored) as archive:
        first, second = (
            {key.partition(":")[2]: archive[key] for key in archive.files if key.startswith(prefix)}
            for prefix in ("feeds:", "other:")
        )
    return Built(case, path, first, second)


def _logits(module: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        return {"logits": module(*(torch.from_numpy(v) for v in feeds.values())).numpy()}


@functools.cache
def ready(case: Case) -> Built:
    """`build` once, in a folder that all test workers share."""
    with zoo.alone(case.name):
        return build(case, zoo.session_folder())
