"""Train a small mixture of experts on sentences, and compare experts against widths at equal size.

    python tools/dev/bench.py experts

A Mixtral of four layers, eight experts each of which two are chosen, learns film reviews and editorials (byte pairs of its
own) for some minutes on the CPU. Then the same share of its experts' parameters goes as whole experts, as widths of all
experts, or half as the one and half as the other; perplexity is that of sentences neither learned nor calibrated on.
"""

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import liar_opt
from liar_opt.tools.demo_assets import sentences
from liar_opt.tools.dev.harness import Cells, say, setting, table, work_folder

WORDS, WIDTH, LAYERS, EXPERTS, TOP_K, HIDDEN, WINDOW = 2000, 96, 4, 8, 2, 128, 64
BATCH, RATE, WARM = 16, 2e-3, 50
HELD_OUT, CALIBRATION = 256, 256
"""Windows that are measured on, and that are calibrated on."""
RUNS: dict[str, dict[str, Any]] = {
    "experts 25 %": {"experts": 0.25},
    "widths 25 %": {"ffn": 0.25},
    "experts 12.5 %, widths 14.3 %": {"experts": 0.125, "ffn": 1 / 7},
    "experts 50 %": {"experts": 0.5},
    "widths 50 %": {"ffn": 0.5},
    "experts 25 %, widths 33 %": {"experts": 0.25, "ffn": 1 / 3},
}


def windows(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """Tokens of shuffled sentences, one behind the other, in windows: to learn, to calibrate on, to measure on."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [s.text for name in ("reviews", "nyt") for s in sentences(name)]
    order = np.random.default_rng(seed).permutation(len(texts))
    texts = [texts[i] for i in order]
    path = folder / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=WORDS, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(path))
    tokenizer = Tokenizer.from_file(str(path))
    ids = np.asarray([i for text in texts for i in (*tokenizer.encode(text).ids, 0)], np.int64)
    rows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    last = len(rows) - HELD_OUT - CALIBRATION
    return {"learn": rows[:last], "calibrate": rows[last : last + CALIBRATION], "measure": rows[last + CALIBRATION :]}


def trained(folder: Path, rows: np.ndarray, steps: int, seed: int) -> Any:
    """The model, trained where the folder has none."""
    import torch
    import transformers

    place = folder / "model"
    if (place / "config.json").exists():
        return transformers.MixtralForCausalLM.from_pretrained(place).eval()
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        initializer_range=0.05,
        router_aux_loss_coef=0.01,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = transformers.MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    rng, began = np.random.default_rng(seed), time.perf_counter()
    for step in range(steps):
        share = min(1.0, (step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * share
        ids = torch.from_numpy(rows[rng.integers(0, len(rows), BATCH)])
        loss = model(input_ids=ids, labels=ids, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            say(f"step {step + 1} of {steps}: loss {float(loss):.3f}, {time.perf_counter() - began:.0f} s")
    model.eval().save_pretrained(place)
    return model


def perplexity(model: Any, rows: np.ndarray) -> float:
    """Of every token but the first of each window."""
    import torch

    total = 0.0
    with torch.no_grad():
        for part in np.array_split(rows, max(1, len(rows) // BATCH)):
            ids = torch.from_numpy(part)
            total += float(model(input_ids=ids, labels=ids).loss) * len(part)
    return math.exp(total / len(rows))


def cell(model: Any, rows: Mapping[str, np.ndarray], options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Prunes; returns parameters, perplexity, and what was said of the experts."""
    ids = {"input_ids": rows["calibrate"]}
    began = time.perf_counter()
    result: Any = liar_opt.prune(model, ids, **options, multiple_of=1, provider="cpu", seed=seed, latency=False)
    seconds = time.perf_counter() - began
    experts = result.report.get("experts") or {}
    return {
        "parameters": result.report["after"]["parameters"],
        "perplexity": perplexity(result.module, rows["measure"]),
        "score": experts.get("score", ""),
        "losses": experts.get("losses", {}),
        "seconds": seconds,
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=RUNS)
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--folder", type=Path, help="where the model and the figures are kept; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Run and print the table."""
    with work_folder(options.folder) as folder:
        rows, given = windows(folder, options.seed), setting(options.seed)
        model = trained(folder, rows["learn"], options.steps, options.seed)
        cells = Cells(folder / "cells.json" if options.folder else None)
        dense = cells.made("dense", lambda: perplexity(model, rows["measure"]))
        size = sum(p.numel() for p in model.parameters())
        print(
            f"`python tools/dev/bench.py experts`\n\nSeed {given['seed']}; commit {given['commit']}, {given['date']}; "
            f"{options.steps:,} steps of {BATCH} x {WINDOW} tokens; {CALIBRATION} windows calibrated on, {HELD_OUT} "
            "held out.\n"
        )
        lines = [["dense", f"{size:,}", "", f"{dense:.2f}", ""]]
        for name in options.runs:
            made = cells.made(name, lambda name=name: cell(model, rows, RUNS[name], options.seed))  # type: ignore[misc]
            say(f"{name}: {made}")
            change = f"{made['parameters'] / size - 1:+.1%}"
            losses = ", ".join(f"{score} {loss:.4f}" for score, loss in made["losses"].items())
            lines.append([name, f"{made['parameters']:,}", change, f"{made['perplexity']:.2f}", losses])
        print(table(["gone", "parameters", "", "perplexity", "relative difference of logits, by score"], lines), flush=True)
    return 0
