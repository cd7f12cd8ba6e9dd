"""Measure liar-opt on a CUDA device, beside the CPU of the same machine.

    python tools/dev/bench.py cuda                  # some six minutes
    python tools/dev/bench.py cuda --only latency

Model and sentences are those of `bench.py minilm`. Needs a CUDA device that ONNX Runtime and torch can use.

- runs: `prune()` of all-MiniLM-L6-v2 on either device, over one pass of the dense model there; what the pruned model keeps.
- latency: dense over pruned in ONNX Runtime on the device, as exported (float32) and as its transformers optimizer fuses
  it (float16), beside the ratio of FLOPs.
- targets: what `--target latency` comes to there.
- decoder: a LLaMA with seeded weights, as a torch module: seconds and memory of the device. Its weights mean nothing, so
  neither does its output; the work is that of a trained one.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.walk import count_flops
from liar_opt.passes.prune_job import prune
from liar_opt.runtime.latency import Deployed, measure_latency
from liar_opt.runtime.sessions import Session, cuda_works
from liar_opt.tools.demo_assets import MINILM_INPUTS
from liar_opt.tools.dev.harness import say, setting, table, work_folder
from liar_opt.tools.dev.subjects.minilm import BOTH, HALVES, Held, Workplace, forward_seconds, optimised

DEVICES: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
SHAPES = ((1, 128), (32, 128), (128, 128), (32, 512))
TARGETS = ("latency=1.25x", "latency=1.5x")
BATCH = 128
"""Sentences of a batch whose latency is a target; fewer leave the device waiting for the next kernel."""
LLAMA = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "vocab_size": 8192}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048}
WINDOWS, WINDOW = 32, 512
REPEATS = 3


def runs(work: Workplace) -> str:
    """Whole runs in this process: seconds, over one pass of the dense model, and the cosine."""
    held, data, rows = Held(work), work.batches(work.model), []
    dense = {device: Session(work.model.read_bytes(), device) for device in DEVICES}
    for session in dense.values():
        forward_seconds(session, data)
    for name, halves in HALVES.items():
        for device, session in dense.items():
            forward, seconds = [], []
            for _ in range(REPEATS):
                forward.append(forward_seconds(session, data))
                result = work.prune(work.model, provider=device, **halves)
                seconds.append(result.report["seconds"]["total"])
            cosine = held.cosine(result.model.SerializeToString())["mean"]
            exact = result.report["verification"]["exact_difference"]
            one, all_ = statistics.median(forward), statistics.median(seconds)
            rows.append([f"{name}, {device}", f"{one:.2f} s", f"{all_:.2f} s", f"{all_ / one:.1f}x"])
            rows[-1] += [f"{cosine:.4f}", f"{exact:.1e}"]
            stages = {stage: round(taken, 2) for stage, taken in result.report["seconds"].items()}
            say(f"runs: {rows[-1]}; {stages}")
    head = ["removed, device", "one forward pass", "`prune()`", "over forward", "cosine, held-out", "cut against masked"]
    text: str = table(head, rows)
    return text


def latency(work: Workplace) -> str:
    """Dense and pruned in turns, float32 as exported and float16 as optimised."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    fused = optimised(work.model, work.folder / "optimised.onnx")
    half = work.folder / "half.onnx"
    onnx.save(convert_float_to_float16(onnx.load(fused), keep_io_types=True), half)
    models = {}
    for name, path in (("float32", work.model), ("float16", half)):
        models[name] = path.read_bytes()
        models[f"{name}, pruned"] = work.prune(path, provider="cuda", **HALVES[BOTH]).model.SerializeToString()
    counted = [OnnxModel.from_proto(onnx.load_from_string(models[name])) for name in ("float32", "float32, pruned")]
    for model in counted:
        model.normalise()
    timed = [Deployed(m, device="cuda") for m in models.values()]
    rng, rows = np.random.default_rng(work.options.seed), []
    for b, s in SHAPES:
        values = (rng.integers(1000, 2000, (b, s)), np.ones((b, s), np.int64), np.zeros((b, s), np.int64))
        feeds = dict(zip(MINILM_INPUTS, values, strict=True))
        dense, pruned = (count_flops(m, feeds) or 0 for m in counted)
        found = measure_latency(timed, feeds, 6.0, least=10, most=4000)
        times = dict(zip(models, found.seconds, strict=True))
        cells = [f"{b} x {s}", f"{dense / pruned:.2f}"]
        for name in ("float32", "float16"):
            before, after = times[name], times[f"{name}, pruned"]
            cells += [f"{1000 * before:.2f} ms", f"{1000 * after:.2f} ms", f"**{before / after:.2f}**"]
        rows.append([*cells, str(found.runs)])
        say(f"latency: {rows[-1]}")
    head = ["batch x tokens", "FLOPs, dense / pruned", "float32", "pruned", "dense / pruned"]
    text: str = table([*head, "float16, fused", "pruned", "dense / pruned", "runs"], rows)
    return text


def targets(work: Workplace) -> str:
    """Asked for beside measured again, longer."""
    held, rows = Held(work), []
    for target in TARGETS:
        began = time.perf_counter()
        result = work.prune(work.model, provider="cuda", target=target, batch_size=BATCH)
        seconds = time.perf_counter() - began
        report, model = result.report["target"], result.model.SerializeToString()
        timed = [Deployed(m, device="cuda") for m in (work.model, model)]
        feeds = work.batches(work.model, batch_size=BATCH).batches[0]
        asked, found = report["dense"] / report["wanted"], measure_latency(timed, feeds, 4.0, most=4000).speedup
        cosine = held.cosine(model)["mean"]
        rows.append([target, f"{asked:.2f}x", f"{found:.3f}x", f"{found / asked - 1:+.1%}"])
        rows[-1] += [f"{cosine:.4f}", f"{seconds:.0f} s"]
        say(f"targets: {rows[-1]}")
    text: str = table(["target", "asked", "came out", "off by", "cosine, held-out", "took"], rows)
    return text


def decoder(work: Workplace) -> str:
    """A torch module on either device."""
    import torch
    import transformers

    rng, rows = np.random.default_rng(work.options.seed), []
    torch.manual_seed(work.options.seed)
    config = transformers.LlamaConfig(**LLAMA, **HEADS, attn_implementation="sdpa", use_cache=False)
    module = transformers.LlamaForCausalLM(config).eval()
    size = sum(p.numel() for p in module.parameters())
    batches = [{"input_ids": rng.integers(0, LLAMA["vocab_size"], (4, WINDOW))} for _ in range(WINDOWS // 4)]
    for device in ("cuda", "cpu") if work.options.decoder_on_cpu else ("cuda",):
        module = module.to(device)
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = prune(module, batches, sparsity=0.2, seed=work.options.seed, latency=False)
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        stages = ", ".join(f"{k} {v:.1f}" for k, v in result.report["seconds"].items() if v >= 0.5)
        cells = [device, f"{size / 1e6:.0f} M", f"{WINDOWS * WINDOW:,}", f"{seconds:.1f} s"]
        rows.append([*cells, f"{peak / 2**30:.1f} GiB" if peak else "-", stages])
        say(f"decoder: {rows[-1]}")
    text: str = table(["device", "parameters", "tokens", "`prune()`", "memory of the device", "seconds by stage"], rows)
    return text


SECTIONS: Mapping[str, Callable[[Workplace], str]] = {
    "runs": runs,
    "latency": latency,
    "targets": targets,
    "decoder": decoder,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--only", choices=tuple(SECTIONS), action="append", help="leave out the others; may be repeated")
    parser.add_argument("--decoder-on-cpu", action="store_true", help="prune the decoder there too; takes minutes")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Run the sections and print their tables."""
    if not cuda_works():
        raise SystemExit("ONNX Runtime has no working CUDA device here")
    import torch

    with work_folder(options.folder) as folder:
        work, given = Workplace(folder, options), setting(options.seed)
        print(
            f"`python tools/dev/bench.py cuda`\n\nSeed {given['seed']}; commit {given['commit']}, {given['date']}; "
            f"{torch.cuda.get_device_name()}; {given['cores']} cores, {given['processor']};\n"
            f"{', '.join(f'{p} {v}' for p, v in given['versions'].items())}."
        )
        for name, run in SECTIONS.items():
            if not options.only or name in options.only:
                print(f"\n### {name.capitalize()}\n\n{run(work)}", flush=True)
    return 0
