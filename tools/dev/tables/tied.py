"""What it costs heads to be tied over layers: all-MiniLM-L6-v2 with one position bias, of zeros, for all layers.

    python tools/dev/bench.py tied

The bias is made as T5 and MPNet make theirs, looked up by distance in one table [32, heads], and added to the scores of
every layer. Being zero it changes nothing that the model computes, so the same trained weights are pruned without it, with
it, and with it while all layers have to keep the same heads, as they had to before each could take its own of the table.
"""

import argparse
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx import helper, numpy_helper

from liar_opt.frontend import ties
from liar_opt.tools.dev.harness import say, setting, table, work_folder
from liar_opt.tools.dev.subjects.minilm import Held, Workplace

RATIOS = (0.25, 0.5)
HEADS, BUCKETS = 12, 32
BIAS = "position_bias"


def with_bias(source: Path, target: Path) -> Path:
    """Writes the model with one bias of zeros, by distance and head, added in front of every softmax."""
    proto = onnx.load(source)
    graph, made = proto.graph, []
    numbers = {
        **{"none": np.int64(0), "one": np.int64(1), "most": np.int64(BUCKETS - 1)},
        **{"first": np.array([0]), "last": np.array([-1]), "table": np.zeros((BUCKETS, HEADS), np.float32)},
    }
    graph.initializer.extend(numpy_helper.from_array(np.asarray(v), f"{BIAS}/{n}") for n, v in numbers.items())

    def node(op: str, inputs: str, output: str, **attributes: Any) -> None:
        names = [name if name == graph.input[0].name else f"{BIAS}/{name}" for name in inputs.split()]
        made.append(helper.make_node(op, names, [f"{BIAS}/{output}"], f"{BIAS}/{output}", **attributes))

    node("Shape", graph.input[0].name, "sizes", start=1, end=2)
    node("Squeeze", "sizes", "tokens")
    node("Range", "none tokens one", "places")
    node("Unsqueeze", "places last", "down")
    node("Unsqueeze", "places first", "across")
    node("Sub", "down across", "apart")
    node("Abs", "apart", "distance")
    node("Min", "distance most", "bucket")
    node("Gather", "table bucket", "found")
    node("Transpose", "found", "turned", perm=[2, 0, 1])
    node("Unsqueeze", "turned first", "bias")
    for old in graph.node:
        if old.op_type == "Softmax":
            scores = old.input[0]
            old.input[0] = f"{scores}/{BIAS}"
            made.append(helper.make_node("Add", [scores, f"{BIAS}/bias"], [old.input[0]], f"{old.name}/{BIAS}"))
        made.append(old)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in made]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(proto, target)
    return target


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Run and print the table."""
    with work_folder(options.folder) as folder:
        work = Workplace(folder, options)
        held, biased = Held(work), with_bias(work.model, folder / "biased.onnx")
        assert held.cosine(biased.read_bytes())["mean"] > 1 - 1e-6
        rows = []
        for name, model, least in (
            ("no bias", work.model, ties.LEAST_LAYERS),
            ("one bias, each layer its own heads", biased, ties.LEAST_LAYERS),
            ("one bias, the same heads in all layers", biased, 1000),
        ):
            cosines = []
            with mock.patch.object(ties, "LEAST_LAYERS", least):
                for ratio in RATIOS:
                    result = work.prune(model, heads=ratio)
                    cosines.append(f"{held.cosine(result.model.SerializeToString())['mean']:.4f}")
                    groups = sum(g["kind"] == "heads" for g in result.report["groups"])
                    say(f"tied: {name}, {ratio:.0%}: {groups} groups of heads, {cosines[-1]}")
            rows.append([name, str(groups), *cosines])
    given = setting(options.seed)
    print(f"`python tools/dev/bench.py tied`\n\nSeed {given['seed']}; commit {given['commit']}, {given['date']}.\n")
    print(table(["", "groups of heads", *(f"{ratio:.0%} of the heads gone" for ratio in RATIOS)], rows))
    return 0
