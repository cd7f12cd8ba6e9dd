"""Prune a LLaMA of the shape of 7, 13 or 70 billion parameters with seeded weights, and tell time and memory by stage.

    python tools/dev/bench.py large                                      # 7 B, 32 blocks, 16,384 tokens: wants a large GPU
    python tools/dev/bench.py large --layers 1 --tokens 512              # one block, and what it says of all
    python tools/dev/bench.py large --shape 70b --layers 1 --sparsity 0.2

The module is bfloat16 and runs so; it is pruned by `prune()`, in a process of its own for each row, uniform widths. The
weights mean nothing, so neither does the output; the work is that of a trained one. With fewer layers than the model has,
the whole is estimated: what a block takes, measured in the passes that go over blocks, times blocks, and the rest once; the
memory is that of the run, with the weights of the blocks that are missing.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from liar_opt.passes.prune_job import prune
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.tools.dev.harness import Others, say, setting, table, work_folder

SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        "num_key_value_heads": 8,
    },
}
VOCABULARY = 32000
WINDOW = 512
"""Tokens of a sample."""
BY_BLOCK = ("find-groups", "prove-groups", "prune-groups", "verify-model")
"""Passes whose time grows with the blocks."""


def module_of(shape: dict[str, int], layers: int, vocabulary: int, seed: int) -> Any:
    """Returns a LLaMA in bfloat16, on the CUDA device where there is one."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        **{**shape, "num_hidden_layers": layers}, vocab_size=vocabulary, attn_implementation="sdpa", use_cache=False
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def once(options: argparse.Namespace) -> dict[str, Any]:
    """Prunes in this process; returns what it took."""
    import torch

    shape = SHAPES[options.shape]
    shape = {**shape, **({"hidden_size": options.width} if options.width else {})}
    shape |= {"intermediate_size": options.inner} if options.inner else {}
    shape |= {"num_attention_heads": options.heads} if options.heads else {}
    layers = options.layers or shape["num_hidden_layers"]
    cuda, watch = torch.cuda.is_available(), MemoryWatch()
    module = module_of(shape, layers, options.vocabulary, options.seed)
    parameters, block = (sum(p.numel() for p in m.parameters()) for m in (module, module.model.layers[0]))
    rng, window = np.random.default_rng(options.seed), min(WINDOW, options.tokens // 2)
    samples = options.tokens // window
    ids = [
        {"input_ids": rng.integers(0, options.vocabulary, (min(options.batch, samples - i), window))}
        for i in range(0, samples, options.batch)
    ]
    device = next(module.parameters()).device
    with torch.no_grad():
        began = time.perf_counter()
        for feeds in ids:
            module(input_ids=torch.from_numpy(feeds["input_ids"]).to(device))
        if cuda:
            torch.cuda.synchronize()
        forward = time.perf_counter() - began
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = prune(
        module,
        ids,
        sparsity=float(options.sparsity[0]),
        allocate="uniform",
        checkpoint=False,
        latency=False,
        seed=options.seed,
        solver=options.solver,
    )
    return {
        "seconds": {**result.report["seconds"], "wall": time.perf_counter() - began},
        "forward": forward,
        "layers": layers,
        "of": shape["num_hidden_layers"],
        "parameters": parameters,
        "block": block,
        "tokens": samples * window,
        "left": result.report["after"]["parameters"],
        "solver": result.report["solver"],
        "device": torch.cuda.max_memory_allocated() if cuda else None,
        "host": watch.resident,
    }


def shown(found: dict[str, Any], sparsity: float) -> list[list[str]]:
    """Returns the row of what was measured, and one of the estimate where blocks are missing."""
    seconds, layers, whole = found["seconds"], found["layers"], found["of"]
    stages = ", ".join(
        f"{name} {taken:.1f}" for name, taken in seconds.items() if name not in ("total", "wall") and taken > 0.05
    )
    device = f"{found['device'] / 2**30:.1f} GiB" if found["device"] else "-"
    where = f"{found['solver']['where']}, {found['solver']['precision']}"
    row = [f"{layers} of {whole}", f"{sparsity:.0%}", f"{found['tokens']:,}", f"{found['forward']:.1f} s"]
    rows = [[*row, f"{seconds['wall']:.1f} s", device, f"{(found['host'] or 0) / 2**30:.1f} GiB", where, stages]]
    if layers == whole:
        return rows
    by_block = sum(seconds.get(name, 0.0) for name in BY_BLOCK) / layers
    total = seconds["wall"] + by_block * (whole - layers)
    missing = 2 * found["block"] * (whole - layers)
    held = [None if m is None else (m + missing) / 2**30 for m in (found["device"], found["host"])]
    rows.append(
        [
            f"**{whole}, estimated**",
            f"{sparsity:.0%}",
            f"{found['tokens']:,}",
            f"{found['forward'] / layers * whole:.1f} s",
            f"{total:.0f} s",
            *("-" if m is None else f"{m:.1f} GiB" for m in held),
            "",
            f"{by_block:.1f} s a block",
        ]
    )
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7b", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks of the model that are made; default: all")
    parser.add_argument("--width", type=int, metavar="D", help="another width of the stream, to try this out")
    parser.add_argument("--inner", type=int, metavar="H", help="another width of the feed-forward layers")
    parser.add_argument("--heads", type=int, metavar="N", help="another number of heads")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, metavar="N", help="of calibration (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="samples of a batch (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.5], help="one run each (default: 0.2 0.5)")
    parser.add_argument("--solver", default="auto", help="as the option of liar-opt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # one run, in this process


def main(options: argparse.Namespace) -> int:
    """Prints the table."""
    if options.into is not None:
        options.into.write_text(json.dumps(once(options)), encoding="utf-8")
        return 0
    rows, others, given = [], Others(), setting(options.seed)
    passed = ("shape", "layers", "width", "inner", "heads", "vocabulary", "tokens", "batch", "solver", "seed")
    with work_folder(None) as folder:
        for sparsity in options.sparsity:
            into = folder / "found.json"
            command = [sys.executable, str(Path(__file__).parents[1] / "bench.py"), "large", "--into", str(into)]
            command += [f"--{n}={getattr(options, n)}" for n in passed if getattr(options, n) is not None]
            say(f"large: {options.shape}, {sparsity:.0%}")
            if subprocess.run([*command, "--sparsity", str(sparsity)]).returncode:
                raise SystemExit("the run failed")
            rows += shown(json.loads(into.read_text(encoding="utf-8")), sparsity)
    print(f"Seed {given['seed']}; commit {given['commit']}, {given['date']}; {given['cores']} cores, {given['processor']}.")
    print(f"{others.sentence()}.\n")
    head = ["blocks", "removed", "tokens", "one forward pass", "`prune()`", "device memory", "host memory", "solved on"]
    print(table([*head, "seconds by stage"], rows))
    return 0
