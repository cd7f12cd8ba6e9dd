"""What goes whole against widths: sublayers, transformer blocks, both in one budget with widths, and other tools' rules.

    python tools/dev/bench.py blocks --folder FOLDER                       # MiniLM at 35 and 50 %
    python tools/dev/bench.py blocks --folder FOLDER --latency             # of the files that lie there; on a quiet machine
    python tools/dev/bench.py blocks --model smollm2 --ratios 0.2 0.35 0.5 --folder FOLDER

All remove the same share of the prunable parameters, the rules of other tools as near to it as whole parts come:

- LLM-Drop's rule (arXiv 2406.15786), a formula: sublayers whose input and output in the stream have the highest cosine go,
  one measurement of all; nothing is repaired.
- ReplaceMe's rule (arXiv 2505.02819), a formula: the run of blocks whose input and output have the highest cosine goes, a
  map by least squares is folded into the last product before it.

MiniLM: cosine of the embeddings of held-out reviews. SmolLM2, with its cache: perplexity, a prompt of 128 tokens, the token
behind it, bytes of the cache a token that are not zeros. A finished cell is kept in FOLDER/cells.json.
"""

import argparse
import functools
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from liar_opt.frontend.blocks import MIXES, WEIGHS, Run, find_stacks
from liar_opt.frontend.leave_out import leave_out
from liar_opt.frontend.onnx_model import OnnxModel, OnnxOriginal, onnx_graph
from liar_opt.frontend.walk import walk
from liar_opt.passes.choose_blocks import Gap, stream_rows
from liar_opt.passes.onnx_backend import OnnxBackend
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.parts_job import finish_parts, without_parts
from liar_opt.passes.prune_job import inspect, prune
from liar_opt.runtime.latency import Deployed, measure_latency
from liar_opt.runtime.memory import MemoryWatch
from liar_opt.runtime.sessions import Session
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.demo_assets import minilm_folder
from liar_opt.tools.dev.harness import Cells, commit, say, setting, table, work_folder
from liar_opt.tools.dev.subjects.minilm import HELD_OUT, Held, Workplace
from liar_opt.tools.dev.subjects.smollm2 import HEAD_DIM, KEY_VALUE_HEADS, ensure, past_names, perplexity
from liar_opt.tools.dev.tables.decoder import windows

WAYS: dict[str, dict[str, Any]] = {
    "widths": {},
    "whole sublayers on": {"whole_layers": "on"},
    "1 block and widths": {"blocks": 1},
    "blocks auto": {"blocks": "auto"},
    "blocks auto, whole sublayers on": {"blocks": "auto", "whole_layers": "on"},
}
LLM_DROP, REPLACE_ME = "LLM-Drop's rule", "ReplaceMe's rule"
ROWS = (*WAYS, LLM_DROP, REPLACE_ME)
LOOKED_AT = 4
"""Batches on which cosines are taken."""
SECONDS = 1.0
"""For which a model and the dense one are timed in turns, on each batch."""
PAST = 128
"""Tokens of the prompt, and of the cache in front of the next token."""
Feeds = dict[str, np.ndarray]


# The rules of other tools ---------------------------------------------------------------------------------------------


def cosines(
    model: OnnxModel, pairs: Sequence[tuple[str, str]], batches: Sequence[Feeds], masks: Sequence[Any]
) -> list[float]:
    """The mean over real rows of the cosine of two tensors of the stream, for each pair."""
    proto, given = model.to_proto(), {t.name for t in model.graph.inputs}
    names = sorted({name for pair in pairs for name in pair} - given - {o.name for o in proto.graph.output})
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session, sums, rows = Session(proto.SerializeToString()), np.zeros(len(pairs)), 0
    wanted = sorted({name for pair in pairs for name in pair} - given)
    for feeds, mask in itertools.islice(zip(batches, masks, strict=True), LOOKED_AT):
        values = {**feeds, **session.run(feeds, wanted, arrays=True)}
        for i, (before, behind) in enumerate(pairs):
            x, y = (stream_rows(values[name], mask) for name in (before, behind))
            sums[i] += ((x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))).sum()
        rows += len(x)
    return [float(s) for s in sums / rows]


def llm_drop(
    path: Path, goal: int, batches: Sequence[Feeds], masks: Sequence[Any]
) -> tuple[onnx.ModelProto, list[int], list[str]]:
    """Leaves out sublayers, the highest cosine first, until as near to `goal` parameters went as comes.

    Returns:
        What is left, which sublayers went, and the caches that hold zeros since.
    """
    model = _normal(onnx.load(path))
    (stack,) = find_stacks(walk(model))
    kinds = stack.kinds * stack.blocks
    pairs = [(stack.tensors[stack.offset + k], stack.tensors[stack.offset + k + 1]) for k in range(len(kinds))]
    parts = [k for k, kind in enumerate(kinds) if kind in (MIXES, WEIGHS)]
    found = cosines(model, [pairs[k] for k in parts], batches, masks)
    left, before, gone = model, model.parameters(), 0
    renamed: dict[str, str] = {}
    dropped: list[int] = []
    empty: list[str] = []
    for place in np.argsort(-np.asarray(found)):
        trial = OnnxOriginal(*left.light(), left.source, left.store).model()
        trial.normalise()
        source, target = (_resolved(name, renamed) for name in pairs[parts[place]])
        caches = leave_out(walk(trial), source, target)
        more = before - trial.parameters()
        if abs(more - goal) >= abs(gone - goal):
            break
        left, gone = trial, more
        renamed[target] = source
        dropped.append(int(place))
        empty += caches
    return left.to_proto(), sorted(dropped), empty


def _normal(proto: onnx.ModelProto) -> OnnxModel:
    model = OnnxModel.from_proto(proto)
    model.normalise()
    return model


def _resolved(name: str, renamed: Mapping[str, str]) -> str:
    while name in renamed:
        name = renamed[name]
    return name


@dataclass(eq=False)
class ReplaceMe(OnnxBackend):
    """Of all runs of blocks that whose input and output have the highest cosine."""

    def gaps(self, runs: Sequence[Run], repair: str) -> list[Gap]:
        """Returns where it would go."""
        data, known = self.state.calibration, super().gaps(runs, repair)
        assert data is not None
        found = cosines(
            onnx_graph(self.state.model), [(g.run.before, g.run.behind) for g in known], data.batches, data.row_masks
        )
        return [known[int(np.argmax(found))]]


# The models -----------------------------------------------------------------------------------------------------------


class Subject(ABC):
    """A model, its data, and what is measured of it.

    Attributes:
        path: the dense model's file.
        columns: names of what is measured.
    """

    path: Path
    columns: tuple[str, ...] = ()

    @property
    @abstractmethod
    def calibration(self) -> tuple[Any, dict[str, Any]]:
        """What `prune` takes, and the options that say how it is read."""

    @abstractmethod
    def batches(self) -> tuple[Sequence[Feeds], Sequence[Any]]:
        """The same as batches and row masks."""

    @abstractmethod
    def quality(self, proto: onnx.ModelProto, report: Mapping[str, Any]) -> dict[str, float]:
        """What is measured of a model."""

    @abstractmethod
    def timed(self, path: Path) -> dict[str, Feeds]:
        """What a model is timed on, by name."""

    @functools.cached_property
    def prunable(self) -> int:
        """Parameters of all widths that may be cut."""
        return int(inspect(self.path).report["prunable_parameters"])


class MiniLm(Subject):
    """MiniLM, and the embeddings of reviews."""

    columns = ("cosine, held-out", "its 5 % quantile")

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.work = Workplace(folder, options)
        self.path, self.seed = self.work.model, options.seed

    @functools.cached_property
    def held(self) -> Held:
        """The reviews."""
        return Held(self.work, HELD_OUT)

    @property
    def calibration(self) -> tuple[Any, dict[str, Any]]:
        """Sentences of editorials."""
        return self.work.sentences, {"tokenizer": minilm_folder()}

    def batches(self) -> tuple[Sequence[Feeds], Sequence[Any]]:
        """The same."""
        data = self.work.batches(self.path)
        return data.batches, data.row_masks

    def quality(self, proto: onnx.ModelProto, report: Mapping[str, Any]) -> dict[str, float]:
        """The cosine."""
        found = self.held.cosine(proto.SerializeToString())
        return dict(zip(self.columns, (found["mean"], found["p5"]), strict=True))

    def timed(self, path: Path) -> dict[str, Feeds]:
        """One and eight sentences of 16 words."""
        rng = np.random.default_rng(self.seed)
        made = {}
        for size in (1, 8):
            ids = rng.integers(1000, 30000, (size, 16))
            made[f"batch {size}"] = {
                "input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)
            }  # fmt: skip
        return made


class SmolLm2(Subject):
    """SmolLM2 with its cache."""

    columns = ("perplexity", "cache, bytes a token")

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.path, tokenizer = ensure(cache_folder() / "smollm2", past=True)
        self.options = options
        self.fit = windows("brown", options.calibration_tokens, options.window, options.seed, tokenizer)
        self.held = windows("wikipedia", options.evaluation_tokens, options.window, options.seed, tokenizer)

    def feed(self, ids: np.ndarray, shapes: Mapping[str, Sequence[int]] | None = None, past: int = 0) -> Feeds:
        """Tokens [b, s], and an empty cache or one of zeros; `shapes`: (heads, width) of each past tensor."""
        heads = dict.fromkeys(past_names("past_key_values"), (KEY_VALUE_HEADS, HEAD_DIM)) if shapes is None else shapes
        empty = {n: np.zeros((len(ids), h, past, d), np.float32) for n, (h, d) in heads.items()}
        mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        return {"input_ids": ids, "attention_mask": mask, **empty}

    @property
    def calibration(self) -> tuple[Any, dict[str, Any]]:
        """Windows of Brown."""
        return self.feed(self.fit), {"batch_size": 8, "samples": len(self.fit)}

    def batches(self) -> tuple[Sequence[Feeds], Sequence[Any]]:
        """The same."""
        parts = [self.feed(rows) for rows in np.array_split(self.fit, max(1, len(self.fit) // 8))]
        return parts, [None] * len(parts)

    def quality(self, proto: onnx.ModelProto, report: Mapping[str, Any]) -> dict[str, float]:
        """Perplexity, and what of the cache is not always zero."""
        session, shapes = Session(proto.SerializeToString()), _caches(proto)
        rows = np.array_split(self.held, max(1, len(self.held) * self.held.shape[1] // 1024))
        feeds = [self.feed(part, shapes) for part in rows]
        found = perplexity(lambda f: session.run(f, ["logits"], arrays=True)["logits"], feeds)
        empty = {n.replace("present", "past_key_values") for n in report.get("empty", ())}
        held = sum(4 * h * d for n, (h, d) in shapes.items() if n not in empty)
        return dict(zip(self.columns, (found, float(held)), strict=True))

    def timed(self, path: Path) -> dict[str, Feeds]:
        """A prompt, and the next token."""
        shapes = _caches(onnx.load(path))
        return {
            f"prompt of {PAST}": self.feed(self.held[:1, :PAST], shapes),
            "next token": self.feed(self.held[:1, :1], shapes, PAST),
        }


def _caches(proto: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Heads and width of each past tensor of a graph."""
    found = {}
    for given in proto.graph.input:
        if given.name.startswith("past_key_values"):
            dims = given.type.tensor_type.shape.dim
            found[given.name] = (dims[1].dim_value, dims[3].dim_value)
    return found


# The table ------------------------------------------------------------------------------------------------------------


def made(subject: Subject, name: str, ratio: float, path: Path, seed: int) -> dict[str, Any]:
    """Makes the model of a row and measures its quality."""
    began = time.perf_counter()
    calibration, given = subject.calibration
    given = {**given, "seed": seed, "provider": "cpu", "latency": False}
    cell: dict[str, Any] = {"commit": commit()}
    if name == LLM_DROP:
        proto, cell["which"], empty = llm_drop(subject.path, round(ratio * subject.prunable), *subject.batches())
    else:
        if name == REPLACE_ME:
            model = _normal(onnx.load(subject.path))
            blocks = max(1, round(ratio * find_stacks(walk(model))[0].blocks))
            options = PruneOptions(**given, blocks=blocks, block_repair="fold")
            result = finish_parts(without_parts(ReplaceMe.open(subject.path, calibration, options), blocks), MemoryWatch())
        else:
            result = prune(subject.path, calibration, **given, sparsity=ratio, fresh=True, **WAYS[name])
        proto, report = result.model, result.report
        left = report.get("blocks") or {}
        empty = left.get("caches", [])
        cell |= {"compared": report.get("blocks_compared"), "notes": report["model"]["notes"]}
        cell["which"] = [left["first"], left["blocks"]] if left else None
        cell["whole"] = [g["name"] for g in report["groups"] if g.get("stand_in")]
    onnx.save(proto, path)
    cell |= {"bytes": path.stat().st_size, "parameters": OnnxModel.from_proto(proto).parameters()}
    return {**cell, **subject.quality(proto, {"empty": empty}), "seconds": time.perf_counter() - began}


def times(subject: Subject, path: Path) -> dict[str, list[float]]:
    """Seconds of the dense model and of another, in turns, on each batch."""
    found = {}
    dense, other = subject.timed(subject.path), subject.timed(path)
    for name in dense:
        models = [Deployed(subject.path), Deployed(path)]
        found[name] = list(measure_latency(models, [dense[name], other[name]], budget=SECONDS, least=20, most=2000).seconds)
    return found


def lines(subject: Subject, cells: Mapping[str, Any], rows: Sequence[tuple[str, float]]) -> str:
    """The table of what is known."""
    dense = cells["dense"]
    found = {"dense": dense} | {f"{100 * ratio:.0f} %, {name}": cells.get(f"{name} {ratio:g}") for name, ratio in rows}
    clocks = list(dict.fromkeys(k for c in found.values() if c for k in c.get("latency", {})))
    body = []
    for label, cell in found.items():
        if cell is None:
            continue
        shown = [_figure(column, cell[column]) for column in subject.columns]
        change = "" if cell is dense else f"{cell['parameters'] / dense['parameters'] - 1:+.1%}"
        pairs = [cell.get("latency", {}).get(clock) for clock in clocks]
        speed = ["" if p is None else f"{1000 * p[1]:.2f} ms ({p[0] / p[1]:.2f} x)" for p in pairs]
        body.append([label, _what(cell), change, f"{cell['bytes'] / 1e6:.1f} MB", *shown, *speed])
    text: str = table(["", "what went whole", "parameters", "file", *subject.columns, *clocks], body)
    return text


def _figure(column: str, value: float) -> str:
    return f"{value:,.0f}" if "bytes" in column else f"{value:.4f}" if value <= 1 else f"{value:.2f}"


def _what(cell: Mapping[str, Any]) -> str:
    compared, which = cell.get("compared"), cell.get("which")
    parts = [f"{len(cell['whole'])} sublayers"] if cell.get("whole") else []
    if compared:
        tried = ", ".join(f"{one['blocks']}: {one['error']:.4f}" for one in compared["tried"] if one["error"] is not None)
        parts.append(f"{compared['chosen']} blocks (error of {tried})")
    elif isinstance(which, list) and "compared" in cell:
        parts.append(f"blocks {which[0] + 1} to {which[0] + which[1]}" if which[1] > 1 else f"block {which[0] + 1}")
    elif which:
        parts.append(f"{len(which)} sublayers")
    return "; ".join(parts)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--model", choices=("minilm", "smollm2"), default="minilm")
    parser.add_argument("--ratios", type=float, nargs="+", help="default: 0.35 0.5, of SmolLM2 0.2 too")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=ROWS)
    parser.add_argument("--latency", action="store_true", help="time the models that lie in the folder, and make none")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="of SmolLM2")
    parser.add_argument("--evaluation-tokens", type=int, default=8192, help="of SmolLM2")
    parser.add_argument("--window", type=int, default=128, help="of SmolLM2")
    parser.add_argument("--folder", type=Path, help="where models and figures are kept; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Run and print the table."""
    smollm2 = options.model == "smollm2"
    ratios = options.ratios or ((0.2, 0.35, 0.5) if smollm2 else (0.35, 0.5))
    with work_folder(options.folder) as folder:
        subject: Subject = SmolLm2(folder, options) if smollm2 else MiniLm(folder, options)
        cells, given = Cells(folder / "cells.json" if options.folder else None), setting(options.seed)

        def dense() -> dict[str, Any]:
            proto = onnx.load(subject.path)
            size = {"bytes": subject.path.stat().st_size, "parameters": OnnxModel.from_proto(proto).parameters()}
            return {**size, **subject.quality(proto, {})}

        cells.made("dense", dense)
        rows = [(name, ratio) for ratio in ratios for name in options.rows]
        for name, ratio in rows:
            key = f"{name} {ratio:g}"
            path = folder / f"{key.replace(' ', '-').replace(',', '').replace(chr(39), '')}.onnx"
            if not options.latency:
                cell = cells.made(key, functools.partial(made, subject, name, ratio, path, options.seed))
                say(f"{key}: {cell}")
            elif key in cells.found and path.is_file() and "latency" not in cells.found[key]:
                cell = {**cells.found.pop(key), "latency": times(subject, path)}
                cells.made(key, lambda cell=cell: cell)  # type: ignore[misc]
                say(f"{key}: {cell['latency']}")
        shares = " ".join(f"{ratio:g}" for ratio in ratios)
        tokens = f" --calibration-tokens {options.calibration_tokens} --evaluation-tokens {options.evaluation_tokens}"
        print(
            f"`python tools/dev/bench.py blocks --model {options.model} --ratios {shares} --seed "
            f"{options.seed}{tokens if smollm2 else ''}`\n\nCommit {given['commit']}, {given['date']}.\n"
        )
        print(lines(subject, cells.found, rows), flush=True)
    return 0
