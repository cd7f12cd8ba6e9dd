"""Compare ways to find what an error of each group is worth at the output, and what a model loses that is cut by them.

    python tools/dev/bench.py probes                                          # all-MiniLM-L6-v2
    python tools/dev/bench.py probes --subject smollm2 --ratios 0.35 --rows 256 1024

Every group is cut to half of its blocks and repaired, once. What that is worth is found

- alone: the model behind it runs with that cut alone, on so many real rows of held-back batches (what `prune` does, on
  as many as `passes.probe_outputs.ENOUGH_ROWS`);
- one in k: so for one in k groups of a kind; the logarithms of the others lie on the line between their neighbours;
- jointly: all at once, y + c (y_cut - y) with c in {-a, 0, a} drawn for every group and sample, in some passes over the
  same batches. The energies of the output, relative to the sample's, are regressed on c^2, not negative. "equal" chooses a
  by group so that all add the same to the output, by their error in the stream.

Each is compared with the same on all calibration batches. Cost: forward passes over the calibration data, counted by rows
and by the share of nodes that run; a joint pass counts once though it runs every consumer twice.
Quality: MiniLM by the mean cosine on 1,024 film reviews, as `bench.py minilm`; SmolLM2 by perplexity on Wikipedia, as
`bench.py decoder`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import helper
from scipy.optimize import nnls
from scipy.stats import spearmanr

from liar_opt.frontend.graph_tensors import detached_tensors
from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.frontend.onnx_segments import extract
from liar_opt.passes.allocate_widths import AllocateWidthsPass
from liar_opt.passes.base import Pipeline, State
from liar_opt.passes.curves import Curves
from liar_opt.passes.find_groups import FindGroupsPass
from liar_opt.passes.measure_curves import MeasureCurvesPass, NoteCurves
from liar_opt.passes.normalise_graph import NormaliseGraphPass
from liar_opt.passes.open_model import load_state
from liar_opt.passes.probe_outputs import ENOUGH_ROWS, ProbeOutputs
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.sweep import Sweep
from liar_opt.runtime.calibration_data import CalibrationData, load_calibration
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.dev.harness import say, setting, table, work_folder
from liar_opt.tools.dev.subjects.minilm import Held, Workplace
from liar_opt.tools.dev.subjects.smollm2 import ensure, ensure_tokenizer
from liar_opt.tools.dev.tables.decoder import feed, measure, windows

Array = NDArray[np.float64]
ROWS = (64, 128, 256, 512, 1024)
EVERY = (2, 3)
JOINT = ((1, 0.5), (4, 0.25), (4, 0.5), (16, 0.5))
"""Passes and amplitudes."""


class Noted(ProbeOutputs):
    """Runs on all data, and notes what is changed for each group."""

    def __init__(self, sweep: Sweep, groups: Sequence[Any], data: CalibrationData) -> None:
        super().__init__(sweep, groups)
        self.data, self.live = data, [[{} for _ in data.batches]]
        self.patches: list[Sequence[Any]] = []

    def difference(self, patches: Sequence[Any]) -> float | None:
        """Measures, and notes."""
        self.patches.append(patches)
        return super().difference(patches)


class Ways:
    """The ways, on one model.

    Args:
        state: with groups and calibration data.
        most: batches that the truth is measured on.
    """

    def __init__(self, state: State, most: int) -> None:
        self.state, step = state, MeasureCurvesPass()
        self.sweep = Sweep(state, "measure", "stream")
        data, self.groups = self.sweep.data, sorted(step.plan(state), key=lambda g: g.start)
        all_of = replace(data, batches=data.batches[:most], row_masks=data.row_masks[:most])
        self.noted = Noted(self.sweep, self.groups, all_of)
        self.visitor = NoteCurves(self.sweep, PruneGroupsPass(), self.noted)
        self.sweep.over(self.visitor, self.groups)
        self.curves = {g.name: self.visitor.curves[g.name] for g in self.groups}
        patches = dict(zip(self.visitor.curves, self.noted.patches, strict=True))
        self.patches = [patches[g.name] for g in self.groups]
        self.truth = np.asarray([c.worth for c in self.curves.values()])
        # What was measured at half of the blocks, over its worth: the error there in the stream.
        half = [c.errors[g.size - g.size // 2] for g, c in zip(self.groups, self.curves.values(), strict=True)]
        self.errors = np.asarray(half) / self.truth

    def alone(self, rows: int) -> tuple[Array, float]:
        """Worths, and the passes that they cost."""
        probes = ProbeOutputs(self.sweep, self.groups, rows)
        lost = np.asarray([probes.difference(own) or 0.0 for own in self.patches])
        return lost / self.errors, self.passes(probes.data)

    def passes(self, data: CalibrationData) -> float:
        """Returns what it costs to run what is behind each group on some data."""
        behind = [1 - g.start / len(self.sweep.walk.model.graph.nodes) for g in self.groups]
        return rows_of(data) * sum(behind) / self.sweep.data.tokens

    def every(self, step: int, rows: int) -> tuple[Array, float]:
        """Worths of which one in so many was measured; the last of a kind is."""
        worth, cost = self.alone(rows)
        logs, share = np.log(np.maximum(worth, 1e-12)), 0
        for kind in {g.kind for g in self.groups}:
            own = np.asarray([i for i, g in enumerate(self.groups) if g.kind == kind])
            known = own[::-1][::step][::-1]
            share += known.size
            logs[own] = np.interp(own, known, logs[known])
        return np.exp(logs), cost * share / len(self.groups)

    def joint(self, passes: int, most: float, equal: bool, rows: int) -> tuple[Array, float]:
        """Worths by regression."""
        probes = ProbeOutputs(self.sweep, (), rows)
        (out, *_), rng = self.noted.outputs, np.random.default_rng(0)
        amplitudes = np.full(len(self.groups), most)
        if equal:
            amplitudes = np.minimum(most * np.sqrt(self.errors.mean() / self.errors), 1.0)
        session, squares, energies = self._all_at_once(out), [], []
        for feeds, mask in zip(probes.data.batches, probes.data.row_masks, strict=True):
            dense = self._run(session, feeds, out, np.zeros((len(self.groups), 1)))
            weight = np.ones(dense.shape[:2]) if mask is None else mask.astype(np.float64)
            power = (np.square(dense).sum(-1) * weight).sum(-1)
            for _ in range(passes):
                c = rng.integers(-1, 2, (len(self.groups), len(dense))) * amplitudes[:, None]
                off = self._run(session, feeds, out, c) - dense
                energies.append((np.square(off).sum(-1) * weight).sum(-1) / power)
                squares.append(np.square(c).T)
        design = np.concatenate(squares)
        scale = np.maximum(design.mean(0), 1e-12)
        lost: Array = nnls(design / scale, np.concatenate(energies))[0] / scale
        worth: Array = lost / self.errors
        return worth, rows_of(probes.data) * (passes + 1) / self.sweep.data.tokens

    def _run(self, session: Any, feeds: Mapping[str, Any], out: str, c: Array) -> Array:
        given = {f"joint{k}": own.reshape(-1, 1, 1).astype(np.float32) for k, own in enumerate(c)}
        output: Array = session.run({**feeds, **given}, [out], arrays=True)[out].astype(np.float64)
        centred: Array = output - output.mean(-1, keepdims=True)
        return centred

    def _all_at_once(self, out: str) -> Any:
        """Returns the model with y + c (y_cut - y) behind every consumer, c [b, 1, 1] an input for each group."""
        walk, engine = self.sweep.walk, self.sweep.engine
        whole = extract(walk, 0, len(walk.model.graph.nodes), [out], {})
        graph = whole.model.graph
        for k, patches in enumerate(self.patches):
            graph.input.append(helper.make_tensor_value_info(f"joint{k}", onnx.TensorProto.FLOAT, [None, 1, 1]))
            for p, patch in enumerate(patches):
                stored, data = detached_tensors([gs.Constant(f"joint{k}/{p}/cut", np.ascontiguousarray(patch.weight))])
                graph.initializer.extend(stored)
                whole.weights.update(data)
                for u, use in enumerate(patch.uses):
                    name, first = f"joint{k}/{p}/{u}", use.node.outputs[0].name
                    at = next(i for i, n in enumerate(graph.node) if n.output[0] == first)
                    twin, node = onnx.NodeProto(), graph.node[at]
                    twin.CopyFrom(node)
                    twin.name, twin.input[use.weight_position], twin.output[0] = name, stored[0].name, f"{name}/y"
                    node.output[0] = f"{name}/dense"
                    shift = (patch.shift * use.scale).astype(np.float32)
                    graph.initializer.append(onnx.numpy_helper.from_array(shift, f"{name}/shift"))
                    made = [
                        twin,
                        helper.make_node("Add", [f"{name}/y", f"{name}/shift"], [f"{name}/cut"]),
                        helper.make_node("Sub", [f"{name}/cut", f"{name}/dense"], [f"{name}/off"]),
                        helper.make_node("Mul", [f"{name}/off", f"joint{k}"], [f"{name}/part"]),
                        helper.make_node("Add", [f"{name}/dense", f"{name}/part"], [first]),
                    ]
                    for j, new in enumerate(made):
                        graph.node.insert(at + 1 + j, new)
        return engine.session(whole, low_memory=True)  # type: ignore[attr-defined]


def rows_of(data: CalibrationData) -> int:
    """Returns the real rows of token ids."""
    pairs = zip(data.batches, data.row_masks, strict=True)
    return sum(int(next(iter(feeds.values())).size if mask is None else mask.sum()) for feeds, mask in pairs)


class Subject:
    """A model, its calibration data and what it is measured by."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.measured: Callable[[onnx.ModelProto], float]
        if options.subject == "minilm":
            work = Workplace(folder, options)
            held = Held(work)
            self.path, self.data, self.what = work.model, work.batches(work.model), "cosine"
            self.measured = lambda proto: held.cosine(proto.SerializeToString())["mean"]
        else:
            self.path, tokenizer = ensure(cache_folder() / "smollm2")[0], ensure_tokenizer(cache_folder() / "smollm2")
            ids = windows("brown", options.tokens, 128, options.seed, tokenizer)
            held_out = windows("wikipedia", options.tokens, 128, options.seed, tokenizer)
            inputs = load_state(self.path).model.inputs()
            self.data = load_calibration(feed(ids), inputs, samples=len(ids), batch_size=8, seed=options.seed)
            self.what, self.measured = "perplexity", lambda proto: measure(proto, held_out)

    def state(self) -> State:
        """Returns the analysed model."""
        state = load_state(self.path)
        state.calibration = self.data
        Pipeline(passes=[NormaliseGraphPass(), FindGroupsPass()])(state)
        return state

    def quality(self, ways: Ways, worth: Array, ratio: float) -> float:
        """What is left of a model that is cut by curves of these worths."""
        state = self.state()
        scaled = zip(ways.curves.items(), worth / ways.truth, strict=True)
        state.add(Curves({name: replace(c, errors=c.errors * factor) for (name, c), factor in scaled}))
        AllocateWidthsPass(sparsity=ratio, allocate="curves")(state)
        PruneGroupsPass()(state)
        return self.measured(onnx_graph(state.model).to_proto())


def found(ways: Ways, options: argparse.Namespace) -> dict[str, tuple[Array, float]]:
    """Worths and passes of every way."""
    default = ENOUGH_ROWS
    result = {"alone, all batches": (ways.truth, ways.passes(ways.noted.data))}
    result |= {f"alone, {rows:,} rows": ways.alone(rows) for rows in sorted({*options.rows, default}, reverse=True)}
    result |= {f"one in {step}, {default:,} rows": ways.every(step, default) for step in options.every}
    for passes, most in JOINT if options.joint else ():
        for equal in (False, True):
            name = f"jointly, {passes} x {max(options.rows):,} rows, a = {most}{', equal' if equal else ''}"
            result[name] = ways.joint(passes, most, equal, max(options.rows))
    return result


def apart(worth: Array, truth: Array) -> tuple[float, float]:
    """Rank correlation, and the root mean square of the logarithms' difference about its median."""
    off = np.log(np.maximum(worth, 1e-12) / truth)
    return float(spearmanr(worth, truth).statistic), float(np.sqrt(np.mean(np.square(off - np.median(off)))))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--subject", choices=("minilm", "smollm2"), default="minilm")
    parser.add_argument(
        "--ratios", type=float, nargs="*", default=(0.35, 0.5), help="of the prunable parameters, to remove"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="that groups are probed on alone")
    parser.add_argument("--every", type=int, nargs="*", default=EVERY, help="one in so many is probed")
    parser.add_argument("--joint", action=argparse.BooleanOptionalAction, default=True, help="and all at once")
    parser.add_argument("--batches", type=int, default=16, help="that the truth is measured on, at most")
    parser.add_argument("--tokens", type=int, default=8192, help="of SmolLM2's calibration, and held out")
    parser.add_argument("--folder", type=Path, help="where to make files; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    """Measures and prints."""
    with work_folder(options.folder) as folder:
        subject = Subject(options, folder)
        ways = Ways(subject.state(), options.batches)
        rows, known = [], dict[tuple[bytes, float], float]()
        for name, (worth, cost) in found(ways, options).items():
            rank, off = apart(worth, ways.truth)
            qualities = []
            for ratio in options.ratios:
                key = worth.tobytes(), ratio
                known[key] = known[key] if key in known else subject.quality(ways, worth, ratio)
                qualities.append(f"{known[key]:.4f}")
            rows.append([name, f"{cost:.2f}", f"{rank:.3f}", f"{off:.0%}", *qualities])
            say(" ".join(rows[-1]))
    about = setting(options.seed)
    print(
        f"Seed {options.seed}; commit {about['commit']}, {about['date']}; {len(ways.groups)} groups, each of which `prune` "
        f"probes on {ENOUGH_ROWS} rows.\n"
    )
    head = [
        "worth measured",
        "passes",
        "rank correlation",
        "rms off",
        *(f"{subject.what}, {r:.0%}" for r in options.ratios),
    ]
    print(table(head, rows))
    return 0
