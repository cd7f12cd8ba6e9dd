"""How the cost of liar-opt grows: with layers, with width, with tokens. Ratios, each within one run, on seeded models.

    python tools/dev/bench.py performance                     # all sections; some minutes on 2 cores
    python tools/dev/bench.py performance --only analysis --layers 2 10 100
    python tools/dev/bench.py performance --only solver --widths 1024 4096 16384    # the last takes many minutes

Needs `pip install -e '.[demo]'`. The graphs are exports of randomly initialised BERT (TorchScript) and LLaMA (dynamo), kept
in the cache folder.

- analysis: reading, normalising and finding the groups of graphs of 2 to 100 layers; linear is a constant time a layer.
- moments: the dense model with the moments of every group beside the dense model alone.
- solver: greedy selection of half of the channels, and the repair, beside one Cholesky factorisation of that width; all
  are O(n^3).
- whole: the command on random tokens, beside one pass over them, and its peak memory beside the model.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from liar_opt.frontend.onnx_engine import OnnxEngine
from liar_opt.frontend.onnx_segments import tap_for
from liar_opt.passes.base import Pipeline
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.runtime.arrays import HOST
from liar_opt.runtime.sessions import Session
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.demo_assets import MINILM_INPUTS, MINILM_OUTPUT, export_bert, moved_into_place
from liar_opt.tools.dev.harness import Others, measured, say, setting, table
from liar_opt.tools.dev.subjects.smollm2 import export as export_decoder
from liar_opt.tools.dev.tables.solver import rows_of

LAYERS = (2, 6, 12, 25, 50, 100)
WIDTHS = (256, 512, 1024, 2048, 4096)
SHAPES = ((384, 12, 6), (768, 12, 2))
"""d, heads, layers of BERT for the moments; h is 4 d."""
WHOLE = (3, 6, 12)
BATCHES, BATCH, TOKENS = 8, 8, 128
WORDS = 1000
TURNS = 3
Section = Callable[[argparse.Namespace], str]


# Models ----------------------------------------------------------------------------------------------------------------


def bert(folder: Path, d: int, heads: int, layers: int) -> Path:
    """A BERT encoder with random weights, exported once."""
    path = folder / f"bert-{d}-{layers}.onnx"
    if path.is_file():
        return path
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": d, "intermediate_size": 4 * d, "num_attention_heads": heads}
    config = BertConfig(vocab_size=WORDS, num_hidden_layers=layers, attn_implementation="eager", **sizes)
    with moved_into_place(path) as temporary:
        export_bert(BertModel(config, add_pooling_layer=False), MINILM_OUTPUT, temporary)
    return path


def llama(folder: Path, layers: int) -> Path:
    """A small LLaMA with grouped queries and random weights, exported once."""
    path = folder / f"llama-{layers}.onnx"
    if path.is_file():
        return path
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=WORDS, num_hidden_layers=layers, **sizes)
    return export_decoder(LlamaForCausalLM(config).eval(), path)


def tokens(seed: int) -> dict[str, np.ndarray]:
    """Random tokens without padding, all batches behind each other."""
    ids = np.random.default_rng(seed).integers(0, WORDS, (BATCHES * BATCH, TOKENS))
    return dict(zip(MINILM_INPUTS, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))


def batches(seed: int) -> list[dict[str, np.ndarray]]:
    """The same in batches."""
    whole = tokens(seed)
    return [{n: v[i * BATCH : (i + 1) * BATCH] for n, v in whole.items()} for i in range(BATCHES)]


# Sections --------------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], turns: int = TURNS) -> float:
    """The median over some turns."""
    found = []
    for _ in range(turns):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def analysis(options: argparse.Namespace) -> str:
    """Seconds of what `liar-opt inspect` does, by layers."""
    rows = []
    makers: tuple[tuple[str, Callable[[int], Path]], ...] = (
        ("BERT, TorchScript", lambda n: bert(options.folder, 64, 4, n)),
        ("LLaMA, dynamo", lambda n: llama(options.folder, n)),
    )
    for name, make in makers:
        least = 0.0
        for layers in options.layers:
            path = make(layers)
            runs: list[tuple[float, ...]] = []
            for _ in range(TURNS):
                times = [time.perf_counter()]
                state = load_state(path)
                times.append(time.perf_counter())
                for step in (NormaliseGraphPass(), FindGroupsPass()):
                    Pipeline(passes=[step])(state)
                    times.append(time.perf_counter())
                runs.append(tuple(b - a for a, b in itertools.pairwise(times)))
            parts = [statistics.median(run[i] for run in runs) for i in range(3)]
            whole = sum(parts)
            least = least or whole / layers
            nodes = len(state.model.graph.nodes)
            cells = [f"{1000 * s:.0f} ms" for s in (*parts, whole)]
            cells += [f"{1000 * whole / layers:.1f} ms", f"{whole / layers / least:.2f}x"]
            rows.append([name, str(layers), f"{nodes:,}", str(len(state.groups)), *cells])
            say(f"analysis: {rows[-1]}")
    head = ["graph", "layers", "nodes", "groups", "read", "normalise", "find groups", "together", "a layer"]
    return table([*head, f"over {options.layers[0]} layers"], rows)


def moments(options: argparse.Namespace) -> str:
    """The dense model with and without moments, batch by batch in turns."""
    rows = []
    for d, heads, layers in SHAPES:
        path = bert(options.folder, d, heads, layers)
        state = load_state(path)
        Pipeline(passes=[NormaliseGraphPass(), FindGroupsPass()])(state)
        walk, nodes = state.analysed(), state.model.graph.nodes
        taps = [tap_for(walk, c.uses[0], c.width, ()) for g in state.groups for c in g.consumers]
        outputs = [t.name for t in state.model.graph.outputs]
        measuring = OnnxEngine().part(walk, 0, len(nodes), outputs, {}, taps=taps)
        plain = Session(path.read_bytes(), "cpu")
        given = batches(options.seed)
        times: tuple[list[float], list[float]] = ([], [])
        measuring.run(given[0])
        plain.run(given[0], arrays=True)
        for feeds in given:
            began = time.perf_counter()
            plain.run(feeds, arrays=True)
            between = time.perf_counter()
            measuring.run(feeds)
            times[0].append(between - began)
            times[1].append(time.perf_counter() - between)
        forward, both = (statistics.median(t) for t in times)
        per_token = sum(2 * t.width**2 for t in taps)
        counted = per_token / (layers * (2 * 12 * d * d + 4 * TOKENS * d))
        cells = [f"{1000 * forward:.1f} ms", f"{1000 * both:.1f} ms", f"**{(both - forward) / forward:.2f}x**"]
        rows.append([f"BERT, {layers} layers of {d}", str(len(taps)), *cells, f"{counted / 2:.2f}x to {counted:.2f}x"])
        say(f"moments: {rows[-1]}")
    text = (
        f"One batch of {BATCH} x {TOKENS} tokens, median of {BATCHES}; operations counted with one triangle of X^T X and "
        "with both.\n\n"
    )
    head = ["model", "moments", "forward", "with moments", "moments over forward", "operations, moments over forward"]
    return text + table(head, rows)


def solver(options: argparse.Namespace) -> str:
    """Selection and repair of one dimension, by its width: `bench.py solver` has more."""
    return rows_of(tuple(options.widths), options.seed, [HOST])


def whole(options: argparse.Namespace) -> str:
    """The command on BERT of some depths."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "tokens.npz", **tokens(options.seed))  # type: ignore[arg-type]
        for layers in WHOLE:
            path = bert(options.folder, 384, 12, layers)
            plain, given = Session(path.read_bytes(), "cpu"), batches(options.seed)
            plain.run(given[0], arrays=True)
            forward = seconds_of(lambda s=plain, g=given: [s.run(feeds, arrays=True) for feeds in g])  # type: ignore[misc]
            del plain
            for label, chosen in (("uniform", ["--allocate", "uniform"]), ("curves", [])):
                command = [
                    sys.executable,
                    "-m",
                    "liar_opt",
                    str(path),
                    "-o",
                    str(folder / "out.onnx"),
                    "--force",
                    "--quiet",
                ]
                command += ["--calibration", str(folder / "tokens.npz"), "--batch-size", str(BATCH), "--sparsity", "0.5"]
                command += [*chosen, "--provider", "cpu", "--no-latency", "--fresh", "--report", str(folder / "r.json")]
                used = measured(command, folder)
                if used["code"]:
                    raise SystemExit(f"liar-opt ended with {used['code']}")
                total = json.loads((folder / "r.json").read_text(encoding="utf-8"))["seconds"]["total"]
                size = path.stat().st_size
                row = [f"{layers}, {label}", f"{forward:.2f} s", f"{used['wall']:.1f} s", f"{used['wall'] / forward:.1f}x"]
                row += [f"{total:.1f} s", f"{total / forward:.1f}x", f"{used['peak'] / 2**20:,.0f} MiB"]
                rows.append([*row, f"{used['peak'] / size:.1f}x of {size / 2**20:,.0f} MiB"])
                say(f"whole: {rows[-1]}")
    text = f"BERT of width 384, half of the prunable parameters, {BATCHES} batches of {BATCH} x {TOKENS} random tokens.\n\n"
    head = ["layers, widths", "one forward pass", "command", "over forward", "passes alone", "over forward", "peak memory"]
    return text + table([*head, "over the model"], rows)


SECTIONS: dict[str, Section] = {"analysis": analysis, "moments": moments, "solver": solver, "whole": whole}


def sections(options: argparse.Namespace) -> Iterator[str]:
    """Runs what was asked for; a heading, the machine and the table of each."""
    given = setting(options.seed)
    for name in options.only or SECTIONS:
        others = Others()
        text = SECTIONS[name](options)
        machine = f"{given['cores']} cores, {given['processor']}, BLAS kernels for {' and '.join(given['blas'])}"
        yield (
            f"### {name.capitalize()}\n\n`python tools/dev/bench.py performance --only {name}`\n\n"
            f"Seed {given['seed']}; commit {given['commit']}, {given['date']}; {machine}; {others.sentence()}.\n\n{text}"
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--only", choices=tuple(SECTIONS), action="append", help="this section alone (may be repeated)")
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="of the graphs that are analysed")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the dimensions that are solved")
    parser.add_argument("--make", action="store_true", help="make the graphs of all sections and stop")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "performance", help="where the graphs are kept")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """The command."""
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.make:
        for layers in options.layers:
            print(bert(options.folder, 64, 4, layers), llama(options.folder, layers), flush=True)
        for d, heads, layers in (*SHAPES, *((384, 12, layers) for layers in WHOLE)):
            print(bert(options.folder, d, heads, layers), flush=True)
        return 0
    for text in sections(options):
        print(text, flush=True)
    return 0
