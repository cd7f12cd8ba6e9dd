"""Real exports of the ONNX Runtime GenAI model builder under the oracle: small seeded models, cut, generated with.

    pip install onnxruntime-genai        # into an environment of its own, beside liar-opt, torch and transformers
    python tools/dev/bench.py genai --folder /tmp/genai [--only llama qwen3] [--markdown table.md]

Every model is exported once into the folder and cut at random, without repair. The masked original, made by onnx alone,
must generate the same tokens through its whole cache as the cut graph through its smaller one. GenAI itself then generates
with the cut graph: its tokens must be the same as well. The exit code is 1 if any differ.

All layers keep the same number of heads, which is written into GenAI's configuration: it runs models with a sliding window
in no other way.

Graphs for CUDA (fp16) run on the CPU here where its kernels know their inputs; what they do not know is said in the table.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from liar_opt.runtime.user_cache import cache_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests"))

import decoding
import oracle

VOCABULARY, PROMPT, NEW = 200, 7, 16
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WHOLE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
"""All of a head's width is turned: half of 16 is less than the CPU kernel takes."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 32, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"sliding_window": 32, "original_max_position_embeddings": 64}),
    "phi": ("Phi", {"num_key_value_heads": 6, "rope_parameters": WHOLE}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
    "nemotron": ("Nemotron", {"rope_parameters": WHOLE}),
    "olmo": ("Olmo", {}),
    "granite": ("Granite", {}),
    "smollm3": ("SmolLM3", {}),
    "ernie": ("Ernie4_5", {"head_dim": 16}),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32}),
}
TARGETS = {"fp32": "cpu", "fp16": "cuda"}
HALF = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")


@dataclass(frozen=True)
class Row:
    """What became of one export."""

    family: str
    precision: str
    groups: str
    difference: str
    tokens: str
    genai: str

    @property
    def failed(self) -> bool:
        """Whether tokens differ, or only the cut graph does not run."""
        return "differ" in (self.tokens, self.genai) or self.genai.startswith("does not run:")


def checkpoint(family: str, folder: Path) -> None:
    """Writes a seeded model with a tokenizer of words."""
    import tokenizers
    import torch
    import transformers

    name, more = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            scale = weight.mean().round() if weight.ndim == 1 else 0.0
            weight.copy_(scale + torch.randn_like(weight) * 0.15)
    model.save_pretrained(folder)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = dict(zip([*special.values(), *(f"w{i}" for i in range(4, VOCABULARY))], range(VOCABULARY), strict=True))
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)


def export(family: str, precision: str, folder: Path) -> Path:
    """Exports one model, if that has not been done, and returns the folder that GenAI reads."""
    out = folder / f"{family}-{precision}"
    if (out / "model.onnx").exists():
        return out
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    source, cache = folder / f"{family}-checkpoint", str(folder / "cache")
    checkpoint(family, source)
    place = (family, str(source), str(out), precision, TARGETS[precision], cache)
    create_model(*place, **parse_extra_options(*place, ["hf_token=false"]))
    return out


def configure(folder: Path, graph: onnx.ModelProto) -> None:
    """Writes into GenAI's configuration how many heads the graph has."""
    config = json.loads((folder / "genai_config.json").read_text())
    node = next(n for n in graph.graph.node if n.op_type == "GroupQueryAttention")
    numbers = {a.name: a.i for a in node.attribute}
    decoder = config["model"]["decoder"]
    decoder["num_attention_heads"], decoder["num_key_value_heads"] = numbers["num_heads"], numbers["kv_num_heads"]
    decoder["session_options"]["provider_options"] = []
    (folder / "genai_config.json").write_text(json.dumps(config))


def generated_by_genai(folder: Path, prompt: np.ndarray) -> list[int]:
    """Returns the tokens that GenAI adds to a prompt: all that were asked for, or those up to an end token."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    options = onnxruntime_genai.GeneratorParams(model)
    options.set_search_options(max_length=PROMPT + NEW, do_sample=False)
    generator = onnxruntime_genai.Generator(model, options)
    generator.append_tokens(prompt.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[PROMPT:]]


def prove(family: str, precision: str, folder: Path, seed: int) -> Row:
    """Exports, cuts, and generates with the cut graph, the masked original and GenAI."""
    source = export(family, precision, folder)
    path = source / "model.onnx"
    model, state, found = oracle.analyse(path)
    groups = ", ".join(f"{n} {kind}" for kind, n in Counter(f"{g.kind} of {g.size}" for g in found.groups).items())
    left = [reason for reason in state.left] + [f"{op} has no rule" for op in state.unknown]
    groups = "; ".join([groups, *(reason.split(":")[0] for reason in left)])
    kept = oracle.random_kept(found.groups, seed)
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, max(g.size for g in found.groups if g.kind == "heads")))
    kept |= {g.name + g.kind: sorted(rng.permutation(g.size)[:count].tolist()) for g in found.groups if g.kind == "heads"}
    reference = oracle.masked(path, found, kept)
    cut = oracle.prune(model, state, found, kept)
    prompt = np.random.default_rng(seed).integers(4, VOCABULARY, (1, PROMPT))
    try:
        tokens, logits = decoding.Decoder(cut).generate(prompt, NEW)
        wanted, reference_logits = decoding.Decoder(reference).generate(prompt, NEW)
    except Exception as err:  # a kernel that the CPU lacks
        return Row(family, precision, groups, "-", "-", " ".join(str(err).split())[-120:])
    difference = float(np.abs(logits - reference_logits).max() / np.abs(reference_logits).max())
    whole = folder / "cut"
    shutil.rmtree(whole, ignore_errors=True)
    shutil.copytree(source, whole, ignore=shutil.ignore_patterns("*.onnx*"))
    onnx.save(cut, whole / "model.onnx")
    configure(whole, cut)
    return Row(
        *(family, precision, groups, f"{difference:.1e}"),
        "same" if np.array_equal(tokens, wanted) else "differ",
        beside_genai(whole, source, prompt, tokens[0].tolist()),
    )


def beside_genai(whole: Path, source: Path, prompt: np.ndarray, wanted: list[int]) -> str:
    """Returns whether GenAI makes the tokens ``wanted`` of a cut graph; if not at all, whether it can of the whole one."""
    try:
        made = generated_by_genai(whole, prompt)
    except Exception as err:
        try:
            generated_by_genai(source, prompt)
        except Exception:
            return "does not run, nor does the whole model"
        return f"does not run: {' '.join(str(err).split())[-120:]}"
    ended = len(made) == NEW or SHAPE["eos_token_id"] in (made[-1], wanted[len(made)])
    return "same" if ended and made == wanted[: len(made)] else "differ"


def table(rows: list[Row]) -> str:
    """Returns the rows in Markdown."""
    heads = ("family", "precision", "groups", "largest difference", f"{NEW} tokens", f"{NEW} tokens by GenAI")
    lines = [
        heads,
        ("---",) * len(heads),
        *((r.family, r.precision, r.groups, r.difference, r.tokens, r.genai) for r in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--folder", type=Path, default=cache_folder() / "genai", help="where exports are kept")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the cuts and the prompt")
    parser.add_argument("--markdown", type=Path, help="file to write the table to")


def main(options: argparse.Namespace) -> int:
    """Runs all that is asked for and prints the table."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for precision in TARGETS:
        for family in options.only:
            if precision == "fp32" or family in HALF:
                rows.append(prove(family, precision, options.folder, options.seed))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(table(rows), end="")
    if options.markdown:
        options.markdown.write_text(table(rows))
    return int(any(row.failed for row in rows))
