"""SmolLM2-135M with feed-forward widths of each layer beside one width for all, at equal size, in llama.cpp.

    pip install llama-cpp-python gguf           # into an environment of its own, beside liar-opt
    python tools/dev/bench.py deci --ratios 0.1667 0.3333
    python tools/dev/bench.py deci --ratios 0.3333 --without-llama-cpp

Needs what `bench.py smollm2` needs; texts, windows and the file of finished cells are those of `bench.py decoder`. Sixths
of the 1,536 channels are multiples of 256, which both forms can say. Files are of float32, without words. Tokens a second
are on one thread: of whole windows, as a prompt is read, and of tokens one by one, as text is written; medians.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from liar_opt.passes.prune_job import prune
from liar_opt.tools.dev.deci_gguf import write_gguf
from liar_opt.tools.dev.harness import say, table, work_folder
from liar_opt.tools.dev.subjects.smollm2 import load_model, perplexity
from liar_opt.tools.dev.tables.checkpoint import of_module
from liar_opt.tools.dev.tables.decoder import Workplace, add_setting, batches_of, feed

WRITTEN = 8
"""Windows whose second half is read a token at a time."""
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("one width for all layers", {"checkpoint": True, "uniform": True}),
    "deci": ("a width for each layer", {"checkpoint": "deci", "allocate": "curves"}),
}


def plain_model() -> Any:
    """The model as one that was never quantised, which can be saved."""
    import transformers

    model = load_model()
    said = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**said)).eval()
    plain.load_state_dict(model.state_dict())
    return plain


def in_llama_cpp(folder: Path, held: np.ndarray, path: Path) -> dict[str, float]:
    """Perplexity over windows [n, s], and tokens a second, of a checkpoint that is written as a GGUF file."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    write_gguf(folder, path)
    loaded = llama_cpp.Llama(str(path), n_ctx=held.shape[1], logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)
    seconds, singly = [], []

    def logits(given: Any) -> np.ndarray:
        found = []
        for ids in given["input_ids"]:
            loaded.reset()
            began = time.perf_counter()
            loaded.eval([int(i) for i in ids])
            seconds.append(time.perf_counter() - began)
            found.append(np.array(loaded.scores[: len(ids)]))
        return np.stack(found)

    value = perplexity(logits, batches_of(held))
    for ids in held[:WRITTEN]:
        half = len(ids) // 2
        loaded.reset()
        loaded.eval([int(i) for i in ids[:half]])
        for i in ids[half:]:
            began = time.perf_counter()
            loaded.eval([int(i)])
            singly.append(time.perf_counter() - began)
    speeds = {"speed": held.shape[1] / statistics.median(seconds), "written": 1 / statistics.median(singly)}
    return {"llama.cpp": value, **speeds, "bytes": path.stat().st_size}


def cell(work: Workplace, form: str, ratio: float, without: bool) -> dict[str, Any]:
    """Prunes once and measures; nothing goes at ratio 0."""
    module: Any = plain_model()
    ids = work.calibration("brown")
    with work_folder(None) as folder:
        if ratio:
            common: dict[str, Any] = {"batch_size": 8, "samples": len(ids), "seed": work.options.seed, "latency": False}
            result: Any = prune(module, feed(ids), ffn=ratio, provider="cpu", **common, **FORMS[form][1])
            result.save(folder / "out")
            module = result.module
        else:
            module.save_pretrained(folder / "out")
        found = {} if without else in_llama_cpp(folder / "out", work.held, folder / "out.gguf")
    parameters = sum(p.numel() for p in module.parameters())
    widths = [layer.mlp.up_proj.out_features for layer in module.model.layers]
    return {"perplexity": of_module(module, work.held), "parameters": parameters, "widths": widths, **found}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--ratios", type=float, nargs="+", default=[1 / 6, 1 / 3], help="of the feed-forward channels")
    parser.add_argument("--without-llama-cpp", action="store_true", help="perplexity in torch alone")
    add_setting(parser)
    parser.set_defaults(calibration_tokens=8192)


def main(options: argparse.Namespace) -> int:
    """The command."""
    work, found = Workplace(options), []
    for ratio in (0.0, *options.ratios):
        for form, (name, _) in FORMS.items():
            if not ratio and form != "one":
                continue
            without = options.without_llama_cpp
            key = {"form": form, "ffn": round(ratio, 4), "without": without, "table": "deci"}
            made = work.cached(key, partial(cell, work, form, ratio, without))
            times = [] if without else [f"{made['llama.cpp']:.2f}", *(f"{made[k]:.0f}" for k in ("speed", "written"))]
            row = [
                f"{ratio:.0%}",
                name if ratio else "dense",
                f"{made['parameters'] / 1e6:.1f}",
                f"{made['perplexity']:.2f}",
            ]
            found.append([*row, *([*times, f"{made['bytes'] / 1e6:.0f}"] if times else [""] * 4)])
            say(" | ".join(found[-1]))
    head = [
        "channels gone",
        "form",
        "parameters, M",
        "perplexity, torch",
        "in llama.cpp",
        "tokens/s read",
        "tokens/s written",
        "MB",
    ]
    print(table(head, found), end="")
    return 0
