"""Writes a small encoder, a tokenizer and texts by the base install alone: what the main job is tried on without torch.

    python tools/dev/small_model.py FOLDER

leaves ``model.onnx`` (two layers of attention and feed-forward, seeded weights), ``tokenizer/tokenizer.json`` and
``texts.txt`` in the folder. Opset 17 and IR version 8 are read by the oldest stated versions of onnx and ONNX Runtime.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS, WIDTH, HEADS, HIDDEN, LAYERS = 61, 24, 3, 80, 2
LAYER = """
    n{i} = LayerNormalization <axis = -1> (x{i}, ones, zeros)
    qp{i} = MatMul(n{i}, q{i}_weight)
    kp{i} = MatMul(n{i}, k{i}_weight)
    vp{i} = MatMul(n{i}, v{i}_weight)
    qs{i} = Reshape(qp{i}, split)
    ks{i} = Reshape(kp{i}, split)
    vs{i} = Reshape(vp{i}, split)
    qt{i} = Transpose <perm = [0, 2, 1, 3]> (qs{i})
    kt{i} = Transpose <perm = [0, 2, 3, 1]> (ks{i})
    vt{i} = Transpose <perm = [0, 2, 1, 3]> (vs{i})
    s{i} = MatMul(qt{i}, kt{i})
    sm{i} = Add(s{i}, bias)
    p{i} = Softmax <axis = -1> (sm{i})
    c{i} = MatMul(p{i}, vt{i})
    ct{i} = Transpose <perm = [0, 2, 1, 3]> (c{i})
    cj{i} = Reshape(ct{i}, join)
    o{i} = MatMul(cj{i}, o{i}_weight)
    y{i} = Add(x{i}, o{i})
    m{i} = LayerNormalization <axis = -1> (y{i}, ones, zeros)
    u{i} = MatMul(m{i}, up{i}_weight)
    a{i} = Relu(u{i})
    d{i} = MatMul(a{i}, down{i}_weight)
    x{next} = Add(y{i}, d{i})
"""


def model() -> onnx.ModelProto:
    """Returns the encoder: input_ids and attention_mask, int64 [b, s], to hidden, float32 [b, s, d]."""
    layers = "".join(LAYER.format(i=i, next=i + 1) for i in range(LAYERS))
    found = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
encoder (int64[batch, sequence] input_ids, int64[batch, sequence] attention_mask)
    => (float[batch, sequence, {WIDTH}] hidden) {{
    x0 = Gather(table, input_ids)
    real = Cast <to = 1> (attention_mask)
    absent = Sub(one, real)
    low = Mul(absent, lowest)
    bias = Unsqueeze(low, axes)
{layers}
    hidden = LayerNormalization <axis = -1> (x{LAYERS}, ones, zeros)
}}"""
    )
    rng = np.random.default_rng(0)
    attention = {f"{name}{i}_weight": (WIDTH, WIDTH) for i in range(LAYERS) for name in "qkvo"}
    ffn = {f"{k}{i}_weight": s for i in range(LAYERS) for k, s in (("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH)))}
    shapes = {"table": (WORDS, WIDTH), **attention, **ffn}
    arrays = {name: (rng.standard_normal(s) * s[0] ** -0.5).astype(np.float32) for name, s in shapes.items()}
    arrays |= {"ones": np.ones(WIDTH, np.float32), "zeros": np.zeros(WIDTH, np.float32)}
    arrays |= {"one": np.array(1, np.float32), "lowest": np.array(-1e4, np.float32), "axes": np.array([1, 2])}
    arrays |= {"split": np.array([0, 0, HEADS, WIDTH // HEADS]), "join": np.array([0, 0, WIDTH])}
    found.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.checker.check_model(found, full_check=True)
    return found


def main(folder: Path) -> None:
    """Writes the three files."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", *(f"word{i}" for i in range(WORDS - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    rng = np.random.default_rng(1)
    lines = [" ".join(words[i] for i in rng.integers(2, WORDS, rng.integers(3, 20))) for _ in range(200)]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    onnx.save(model(), folder / "model.onnx")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
