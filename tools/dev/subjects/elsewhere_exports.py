"""Export small transformers that are not torch's, in an environment of their framework's own.

    python tools/dev/subjects/elsewhere_exports.py FRAMEWORK FOLDER [MODEL ..]        # started by bench.py exporters

Frameworks: `optimum` (transformers, through Hugging Face's optimum-onnx), `keras` (Keras 3 on TensorFlow and KerasHub,
through tf2onnx), `flax` (Flax NNX, through jax2onnx) and `paddle` (PaddlePaddle, through paddle2onnx). Each model gets
seeded weights and noise, and is written to FOLDER/NAME.onnx. Stands alone: nothing of liar-opt is needed.
"""

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

WORDS, HIDDEN, HEADS, FFN, LAYERS, TOKENS = 100, 32, 4, 64, 2, 16
Exports = Iterator[tuple[str, Callable[[Path], object]]]


def noise(shape: Any) -> Any:
    """What is added to every weight; arrays of one shape get the same, so that biases that were zeros stay equal."""
    return (0.1 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


# Optimum ---------------------------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    **{"vocab_size": WORDS, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS},
    **{"intermediate_size": FFN, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": HEADS // 2}
WIDE: dict[str, Any] = {**GROUPED, "head_dim": HIDDEN // HEADS}
PAIR: dict[str, Any] = {
    **{"vocab_size": WORDS, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS},
    **{"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": FFN, "decoder_ffn_dim": FFN},
    **{"max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
}
SPEECH: dict[str, Any] = {
    **{k: v for k, v in PAIR.items() if k != "max_position_embeddings"},
    **{"num_mel_bins": 16, "max_target_positions": 64, "bos_token_id": 1, "suppress_tokens": None},
    **{"begin_suppress_tokens": None},
}
T5: dict[str, Any] = {
    **{
        "vocab_size": WORDS,
        "d_model": HIDDEN,
        "d_kv": HIDDEN // HEADS,
        "d_ff": FFN,
        "num_layers": LAYERS,
        "num_heads": HEADS,
    },
    **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
}
GPT: dict[str, Any] = {
    **{"vocab_size": WORDS, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
IMAGE: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 8, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": HEADS, "intermediate_size": FFN},
}
SOUND: dict[str, Any] = {
    **{"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": FFN},
    **{"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 32},
}
STAGES: dict[str, Any] = {"hidden_sizes": [16, 32, 40, 48], "depths": [1] * 4, "num_attention_heads": [1, 2, 4, 6]}
WINDOWS: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
}
WORDS_AND_IMAGES: dict[str, Any] = {
    "text_config": {**{k: v for k, v in TEXT.items() if "token" not in k}, "max_position_embeddings": 32},
    "vision_config": IMAGE,
}
EMBED, WRITE, ANSWER, SEE = (
    "feature-extraction",
    "text-generation-with-past",
    "text2text-generation-with-past",
    "image-classification",
)
OPTIMUM: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertForSequenceClassification", "text-classification", TEXT),
    "RoBERTa": ("RobertaModel", EMBED, TEXT),
    "ALBERT": ("AlbertModel", EMBED, {**TEXT, "embedding_size": 16}),
    "ELECTRA": ("ElectraModel", EMBED, {**TEXT, "embedding_size": 16}),
    "DeBERTa-v2": (
        "DebertaV2Model",
        EMBED,
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    ),
    "ModernBERT": ("ModernBertModel", EMBED, {**TEXT, "global_attn_every_n_layers": 2, "local_attention": 16}),
    "MPNet": ("MPNetModel", EMBED, TEXT),
    "RoFormer": ("RoFormerModel", EMBED, TEXT),
    "MobileBERT": ("MobileBertModel", EMBED, {**TEXT, "embedding_size": 16, "intra_bottleneck_size": 16}),
    "ESM": ("EsmModel", EMBED, {**TEXT, "mask_token_id": 3, "position_embedding_type": "rotary"}),
    "GPT-2": ("GPT2LMHeadModel", WRITE, GPT),
    "GPT-J": ("GPTJForCausalLM", WRITE, {**GPT, "rotary_dim": 4}),
    "GPTBigCode": ("GPTBigCodeForCausalLM", WRITE, GPT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", WRITE, TEXT),
    "BLOOM": ("BloomForCausalLM", WRITE, {"vocab_size": WORDS, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}),
    "Llama": ("LlamaForCausalLM", WRITE, GROUPED),
    "Mistral": ("MistralForCausalLM", WRITE, GROUPED),
    "Qwen3": ("Qwen3ForCausalLM", WRITE, WIDE),
    "Gemma 2": ("Gemma2ForCausalLM", WRITE, WIDE),
    "Phi-3": ("Phi3ForCausalLM", WRITE, GROUPED),
    "SmolLM3": ("SmolLM3ForCausalLM", WRITE, GROUPED),
    "T5": ("T5ForConditionalGeneration", ANSWER, T5),
    "BART": ("BartForConditionalGeneration", ANSWER, PAIR),
    "Marian": ("MarianMTModel", ANSWER, PAIR),
    "Whisper": ("WhisperForConditionalGeneration", "automatic-speech-recognition-with-past", SPEECH),
    "ViT": ("ViTForImageClassification", SEE, IMAGE),
    "BEiT": ("BeitForImageClassification", SEE, IMAGE),
    "Swin": ("SwinForImageClassification", SEE, WINDOWS),
    "Swin v2": ("Swinv2ForImageClassification", SEE, WINDOWS),
    "ConvNeXt": ("ConvNextForImageClassification", SEE, {"depths": [1] * 4, "hidden_sizes": [16, 24, 32, 40]}),
    "PoolFormer": ("PoolFormerForImageClassification", SEE, {"depths": [1] * 4, "hidden_sizes": [16, 24, 32, 40]}),
    "SegFormer": ("SegformerForSemanticSegmentation", "semantic-segmentation", {**STAGES, "decoder_hidden_size": 32}),
    "YOLOS": ("YolosForObjectDetection", "object-detection", {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 5}),
    "CLIP": ("CLIPModel", "zero-shot-image-classification", {**WORDS_AND_IMAGES, "projection_dim": 16}),
    "SigLIP": ("SiglipModel", "zero-shot-image-classification", WORDS_AND_IMAGES),
    "AST": ("ASTModel", EMBED, {**IMAGE, "num_mel_bins": 32, "max_length": 64}),
    "Wav2Vec2": ("Wav2Vec2ForCTC", "automatic-speech-recognition", SOUND),
    "HuBERT": ("HubertModel", EMBED, SOUND),
    "WavLM": ("WavLMModel", EMBED, SOUND),
}
"""Class, task, configuration."""


def optimum_models() -> Exports:
    """Transformers as `optimum-cli export onnx` writes them: all sizes open, decoders with their caches."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    export = importlib.import_module("optimum.exporters.onnx").main_export

    def write(kind: str, task: str, fields: Mapping[str, Any], path: Path) -> None:
        torch.manual_seed(0)
        cls = getattr(transformers, kind)
        model = cls(cls.config_class(**fields)).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/checkpoint")
            export(f"{folder}/checkpoint", output=f"{folder}/onnx", task=task, do_validation=False)
            files = sorted(Path(folder, "onnx").glob("*.onnx"))
            for file in files:
                part = file.stem.replace("_model", "").replace("_", " ")
                shutil.move(file, path if len(files) == 1 else path.with_name(f"{path.stem}, {part}.onnx"))

    for name, (kind, task, fields) in OPTIMUM.items():
        yield name, lambda path, kind=kind, task=task, fields=fields: write(kind, task, fields, path)  # type: ignore[misc]


# Keras -----------------------------------------------------------------------------------------------------------------


def keras_models() -> Exports:
    """Models of Keras' own layers, and the backbones of KerasHub."""
    os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    tf = importlib.import_module("tensorflow")
    keras = importlib.import_module("keras")
    hub = importlib.import_module("keras_hub").models
    layers = keras.layers

    def gelu(x: Any, approximate: bool = False, name: str | None = None) -> Any:
        """tf2onnx 1.17 does not know the operator Erfc, of which TensorFlow makes this one."""
        if approximate:
            return 0.5 * x * (1 + tf.tanh(0.7978845608 * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + tf.math.erf(x / 2**0.5))

    tf.nn.gelu = gelu

    def block(x: Any, attention: Any, activation: str) -> Any:
        y = layers.LayerNormalization()(x)
        x = x + attention(y, y)
        y = layers.Dense(FFN, activation=activation)(layers.LayerNormalization()(x))
        return x + layers.Dense(HIDDEN)(y)

    def encoder(attention: Callable[[], Any], activation: str) -> Any:
        tokens = keras.Input((None,), dtype="int32", name="tokens")
        x = layers.Embedding(WORDS, HIDDEN)(tokens)
        for _ in range(LAYERS):
            x = block(x, attention(), activation)
        return keras.Model(tokens, layers.Dense(10)(x))

    def image() -> Any:
        pixels = keras.Input((32, 32, 3), name="pixels")
        x = layers.Reshape((16, HIDDEN))(layers.Conv2D(HIDDEN, 8, 8)(pixels))
        for _ in range(LAYERS):
            x = block(x, layers.MultiHeadAttention(HEADS, HIDDEN // HEADS), "gelu")
        return keras.Model(pixels, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))

    size = {"vocabulary_size": WORDS, "num_layers": LAYERS, "hidden_dim": HIDDEN, "intermediate_dim": FFN}
    plain = {**size, "num_heads": HEADS}
    learned = {**plain, "max_sequence_length": 128}
    query = {**size, "num_query_heads": HEADS, "num_key_value_heads": HEADS // 2}
    heard = {**plain, "num_mels": 16, "max_encoder_sequence_length": 128, "max_decoder_sequence_length": 64}
    electra = {**{k: v for k, v in learned.items() if k != "vocabulary_size"}, "vocab_size": WORDS, "embedding_dim": 16}
    seen = {"image_shape": (32, 32, 3), "patch_size": 8, "num_layers": LAYERS, "num_heads": HEADS, "hidden_dim": HIDDEN}
    made: Mapping[str, Callable[[], Any]] = {
        "MultiHeadAttention": lambda: encoder(lambda: layers.MultiHeadAttention(HEADS, HIDDEN // HEADS), "gelu"),
        "GroupQueryAttention": lambda: encoder(
            lambda: layers.GroupQueryAttention(HIDDEN // HEADS, HEADS, HEADS // 2), "silu"
        ),
        "images": image,
        "BERT": lambda: hub.BertBackbone(**learned),
        "RoBERTa": lambda: hub.RobertaBackbone(**learned),
        "XLM-R": lambda: hub.XLMRobertaBackbone(**learned),
        "DistilBERT": lambda: hub.DistilBertBackbone(**learned),
        "ALBERT": lambda: hub.AlbertBackbone(**learned, embedding_dim=16),
        "ELECTRA": lambda: hub.ElectraBackbone(**electra),
        "DeBERTa-v3": lambda: hub.DebertaV3Backbone(**learned),
        "GPT-2": lambda: hub.GPT2Backbone(**learned),
        "OPT": lambda: hub.OPTBackbone(**learned),
        "BLOOM": lambda: hub.BloomBackbone(**learned),
        "GPT-NeoX": lambda: hub.GPTNeoXBackbone(**learned),
        "Falcon": lambda: hub.FalconBackbone(**size, num_attention_heads=HEADS),
        "Llama": lambda: hub.LlamaBackbone(**query),
        "Mistral": lambda: hub.MistralBackbone(**query, sliding_window=8),
        "Gemma": lambda: hub.GemmaBackbone(
            **{**query, "num_key_value_heads": 1, "intermediate_dim": 2 * FFN}, head_dim=HIDDEN // HEADS
        ),
        "Qwen2": lambda: hub.QwenBackbone(**query),
        "Phi-3": lambda: hub.Phi3Backbone(**query),
        "T5": lambda: hub.T5Backbone(**plain, key_value_dim=HIDDEN // HEADS),
        "BART": lambda: hub.BartBackbone(**learned),
        "Whisper": lambda: hub.WhisperBackbone(**heard),
        "ViT": lambda: hub.ViTBackbone(**seen, mlp_dim=FFN),
    }
    for name, make in made.items():
        yield name, lambda path, make=make: _export_keras(make(), path)  # type: ignore[misc]


def _export_keras(model: Any, path: Path) -> None:
    for variable in model.weights:
        value = variable.numpy()
        if value.dtype == np.float32 and value.size > 1:
            variable.assign(value + noise(value.shape))

    def example(tensor: Any) -> Any:
        shape = [2, *(TOKENS if d is None else d for d in tensor.shape[1:])]
        return np.ones(shape, "float32" if "float" in tensor.dtype else "int32")

    inputs = model.input
    if isinstance(inputs, dict):
        model({name: example(tensor) for name, tensor in inputs.items()})
    else:
        model(example(inputs))
    model.export(str(path), format="onnx", verbose=False)


# Flax ------------------------------------------------------------------------------------------------------------------


def flax_models() -> Exports:
    """Models of Flax NNX layers, and attention written with einsum."""
    jax, nnx = importlib.import_module("jax"), importlib.import_module("flax.nnx")
    jnp = jax.numpy
    convert = importlib.import_module("jax2onnx").to_onnx
    save = importlib.import_module("onnx").save

    class Block(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, rngs: Any) -> None:
            self.first, self.second = nnx.LayerNorm(HIDDEN, rngs=rngs), nnx.LayerNorm(HIDDEN, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, HIDDEN, HIDDEN, HIDDEN, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(HIDDEN, FFN, rngs=rngs), nnx.Linear(FFN, HIDDEN, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x + self.attention(self.first(x))
            return x + self.down(nnx.gelu(self.up(self.second(x))))

    class Encoder(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, rngs: Any) -> None:
            self.words = nnx.Embed(WORDS, HIDDEN, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
            self.head = nnx.Linear(HIDDEN, 10, rngs=rngs)

        def __call__(self, ids: Any) -> Any:
            x = self.words(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    class Images(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, rngs: Any) -> None:
            self.patches = nnx.Conv(3, HIDDEN, (8, 8), strides=(8, 8), rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
            self.head = nnx.Linear(HIDDEN, 10, rngs=rngs)

        def __call__(self, pixels: Any) -> Any:
            x = self.patches(pixels)
            x = x.reshape(x.shape[0], 16, HIDDEN)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(1))

    class Einsums(nnx.Module):  # type: ignore[misc, name-defined]
        """Heads in groups, a gated feed-forward layer, weights of three axes."""

        def __init__(self, rngs: Any) -> None:
            def weight(*shape: int) -> Any:
                return nnx.Param(jax.random.normal(rngs.params(), shape) * 0.2)

            width = HIDDEN // HEADS
            self.words, self.q, self.o = weight(WORDS, HIDDEN), weight(HIDDEN, HEADS, width), weight(HEADS, width, HIDDEN)
            self.k, self.v = weight(HIDDEN, HEADS // 2, width), weight(HIDDEN, HEADS // 2, width)
            self.gate, self.up, self.down = weight(HIDDEN, FFN), weight(HIDDEN, FFN), weight(FFN, HIDDEN)

        def __call__(self, ids: Any) -> Any:
            x = self.words[...][ids]
            n = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
            q, k, v = (jnp.einsum("bsd,dhk->bshk", n, w[...]) for w in (self.q, self.k, self.v))
            k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
            p = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k) / (HIDDEN // HEADS) ** 0.5, -1)
            x = x + jnp.einsum("bqhk,hkd->bqd", jnp.einsum("bhqt,bthk->bqhk", p, v), self.o[...])
            return x + (jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]

    ids = jax.ShapeDtypeStruct((2, TOKENS), jnp.int32)
    made = {
        "MultiHeadAttention": (Encoder, ids),
        "images": (Images, ("B", 32, 32, 3)),
        "einsum, grouped heads": (Einsums, ids),
    }
    for name, (kind, inputs) in made.items():
        yield name, lambda path, kind=kind, inputs=inputs: save(convert(kind(nnx.Rngs(0)), [inputs]), str(path))  # type: ignore[misc]


# Paddle ----------------------------------------------------------------------------------------------------------------


def paddle_models() -> Exports:
    """Models of Paddle's own layers."""
    paddle = importlib.import_module("paddle")
    nn, spec = paddle.nn, importlib.import_module("paddle.static").InputSpec

    class Encoder(nn.Layer):  # type: ignore[misc, name-defined]
        def __init__(self, before: bool, activation: str) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(
                HIDDEN, HEADS, FFN, dropout=0.0, activation=activation, normalize_before=before
            )
            self.words, self.head = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, 10)
            self.layers = nn.TransformerEncoder(layer, LAYERS)

        def forward(self, ids: Any) -> Any:
            return self.head(self.layers(self.words(ids)))

    class Images(nn.Layer):  # type: ignore[misc, name-defined]
        """One weight for queries, keys and values."""

        def __init__(self) -> None:
            super().__init__()
            self.patches, self.head = nn.Conv2D(3, HIDDEN, 8, 8), nn.Linear(HIDDEN, 10)
            self.packed, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
            self.first, self.second = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

        def forward(self, pixels: Any) -> Any:
            width = HIDDEN // HEADS
            x = self.patches(pixels).flatten(2).transpose((0, 2, 1))
            packed = self.packed(self.first(x)).reshape((-1, 16, 3, HEADS, width)).transpose((2, 0, 3, 1, 4))
            p = nn.functional.softmax(packed[0].matmul(packed[1].transpose((0, 1, 3, 2))) * width**-0.5, -1)
            x = x + self.out(p.matmul(packed[2]).transpose((0, 2, 1, 3)).reshape((-1, 16, HIDDEN)))
            x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
            return self.head(x.mean(1))

    def export(model: Any, inputs: Any, path: Path) -> None:
        paddle.seed(0)
        model.eval()
        for parameter in model.parameters():
            parameter.set_value(parameter.numpy() + noise(parameter.shape))
        paddle.onnx.export(model, str(path.with_suffix("")), input_spec=[inputs], opset_version=17)

    text, fixed = spec([None, None], "int64", "ids"), spec([2, TOKENS], "int64", "ids")
    made = {
        "TransformerEncoder, normalised behind": (lambda: Encoder(False, "gelu"), text),
        "TransformerEncoder, normalised before": (lambda: Encoder(True, "relu"), text),
        "TransformerEncoder, static": (lambda: Encoder(True, "relu"), fixed),
        "images, packed weights": (Images, spec([None, 3, 32, 32], "float32", "pixels")),
    }
    for name, (make, inputs) in made.items():
        yield name, lambda path, make=make, inputs=inputs: export(make(), inputs, path)  # type: ignore[misc]


FRAMEWORKS: Mapping[str, Callable[[], Exports]] = {
    "optimum": optimum_models,
    "keras": keras_models,
    "flax": flax_models,
    "paddle": paddle_models,
}


def main() -> int:
    """The command."""
    framework, folder, only = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    for name, export in FRAMEWORKS[framework]():
        if only and name not in only:
            continue
        path = folder / f"{name}.onnx"
        try:
            export(path)
        except Exception as err:  # a framework that fails on one model goes on with the others
            path.with_suffix(".error").write_text(f"{type(err).__name__}: {err}"[:300], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
