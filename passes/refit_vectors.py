"""Refit all biases and gains of normalisations of a pruned model to the dense one, in closed form, layer by layer.

At a site u = gain * n + bias of the pruned model and the same tensor y of the dense one, the least squares of each channel
(`runtime.channel_fit`) say what gain and bias should be. Sites come in execution order, and each sees what those before it
have become. A site is left alone where that is no better on batches that are held back, and all are where the outputs are
no better on them. What is learned in PERP (arXiv 2312.15230) by gradients for the output is solved here for each tensor;
no gradient is needed, so that it works on graphs as well.

A tensor whose channels were cut has no twin in the dense model, and its bias stays.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.channel_vectors import Site, sites_of
from liar_opt.frontend.either_model import analysis_of
from liar_opt.frontend.engine import Engine
from liar_opt.frontend.graph_tensors import is_float
from liar_opt.frontend.onnx_segments import live_tensors
from liar_opt.frontend.walk import GraphWalk
from liar_opt.passes.base import Change, DenseModel, Finding, Pass, PassResult, State
from liar_opt.passes.calibrate import divided
from liar_opt.passes.probe_outputs import PROBE_OUTPUTS, some_rows, square, squared_difference
from liar_opt.passes.prune_groups import Cut
from liar_opt.passes.sweep import cut_arrays, held_batches
from liar_opt.passes.verify_model import compared_again, dense_session
from liar_opt.runtime.channel_fit import ChannelMoments
from liar_opt.runtime.compare import output_rows
from liar_opt.runtime.errors import InternalError

ROWS, HELD_ROWS = 8192, 2048
"""Tokens, or samples, that are fitted to and that judge, at the most: two numbers of a channel want few."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Refitted(Finding):
    """What refitting came to, as the report has it.

    Attributes:
        sites: places with a gain or a bias whose tensor the dense model has, too.
        refitted: those that were better on held-back batches.
        parameters: numbers of these.
        before: relative squared error of the first outputs on held-back batches, before.
        after: and after.
        kept: whether that is less; else everything is as it was.
        seconds: that it took.
    """

    by: ClassVar[str] = "refit-vectors"
    sites: int
    refitted: int
    parameters: int
    before: float
    after: float
    kept: bool
    seconds: float


@dataclass(frozen=True)
class RefitVectorsPass(Pass[list[Site]]):
    """Refit biases and gains to the tensors of the dense model, by least squares of each channel."""

    name: ClassVar[str] = "refit-vectors"

    def requires(self, state: State) -> None:
        """Checks that there is data."""
        if state.calibration is None:
            raise InternalError("nothing was measured to refit to")

    def plan(self, state: State) -> list[Site]:
        """Returns the sites, in execution order."""
        return list(sites_of(state.model))

    def apply(self, state: State, plan: list[Site]) -> PassResult:
        """Refits them; adds ``Refitted``, and measures the outputs anew where they changed."""
        began = time.perf_counter()
        refit = _Refit(state)
        before = refit.error()
        old = [(c, c.values) for s in plan for c in (s.gain, s.bias) if c is not None]
        done: list[Site] = []
        found = 0
        for index, site in enumerate(plan):
            better = refit.at(site)
            found += better is not None
            done += [site] if better else []
            state.progress("refit", index + 1, len(plan))
        after = refit.error() if done else before
        kept = bool(after < before)
        if not kept:
            for constant, value in old:
                constant.values = value
        numbers = sum(s.width * ((s.gain is not None) + (s.bias is not None)) for s in done)
        state.add(Refitted(found, len(done), numbers, before, after if kept else before, kept, time.perf_counter() - began))
        if not kept:
            return PassResult(state)
        compared_again(state)
        return PassResult(state, (Change("refit", "biases and gains", numbers, numbers),))


class _Refit:
    """Both models, run from site to site on the same batches.

    Args:
        state: behind the check of the cut.
    """

    def __init__(self, state: State) -> None:
        assert state.calibration is not None
        self.state, self.engine = state, state.engine()
        dense = state.found(DenseModel).original.model()
        dense.normalise()
        data, cut = divided(state.calibration, state.model.inputs()), state.get(Cut)
        away = set(held_batches(len(data.batches))) if len(data.batches) > 1 else set()
        chosen = _enough(data.batches, data.row_masks, away)
        self.masks, self.held = [data.row_masks[i] for i in chosen], [i in away for i in chosen]
        feeds = [data.batches[i] for i in chosen]
        small = [cut_arrays(f, {} if cut is None else cut.ends) for f in feeds]
        self.dense = _Side(self.engine, analysis_of(dense), feeds)
        self.pruned = _Side(self.engine, state.analysed(), small)
        self._theirs: list[Arrays] = []

    def at(self, site: Site) -> bool | None:
        """Refits one site; returns whether that was better, or None where the dense model has no such tensor."""
        name = site.output
        position = self.dense.makers.get(name)
        if position is None:
            return None
        ours, theirs = self.pruned.to(self.pruned.makers[name] + 1, name), self.dense.to(position + 1, name)
        if any(u.shape != y.shape or u.shape[site.axis] != site.width for u, y in zip(ours, theirs, strict=True)):
            return None
        fit, judge = ChannelMoments(site.width), ChannelMoments(site.width)
        for u, y, mask, held in zip(ours, theirs, self.masks, self.held, strict=True):
            (judge if held else fit).add(*(_rows(array, site.axis, mask) for array in (u, y)))
        alpha, beta = fit.fit(site.gain is not None, site.bias is not None)
        if not (np.isfinite(alpha).all() and np.isfinite(beta).all() and judge.error(alpha, beta) < judge.error()):
            return False
        site.write(alpha, beta)
        along = (-1, *[1] * ((-site.axis if site.axis < 0 else ours[0].ndim - site.axis) - 1))
        a, b = (v.reshape(along) for v in (alpha, beta))
        self.pruned.replace(name, [(a * u + b).astype(u.dtype) for u in ours])
        return True

    def error(self) -> float:
        """Returns the relative squared error of the first outputs on the batches that are held back, the mean over them."""
        names = [t.name for t in self.state.model.graph.outputs if getattr(t, "dtype", None) and is_float(t.dtype)]
        names = names[:PROBE_OUTPUTS]
        session = self.engine.whole(self.state.model.loadable(), "the pruned model")
        judges = [i for i, held in enumerate(self.held) if held] or list(range(len(self.held)))
        if not self._theirs:
            original = dense_session(self.state)
            self._theirs = [original.run(self.dense.feeds[i], names, arrays=True) for i in judges]
        lost, power = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for i, wanted in zip(judges, self._theirs, strict=True):
            found = session.run(self.pruned.feeds[i], names, arrays=True)
            for name in names:
                if found[name].shape == wanted[name].shape:
                    x, y = (some_rows(v, self.masks[i]) for v in (found[name], wanted[name]))
                    lost[name] += squared_difference(x, y)
                    power[name] += square(y)
        return sum(lost[n] / (power[n] or 1.0) for n in names) / max(1, len(names))


class _Side:
    """One of both models, and the live tensors of each batch where it stands.

    Args:
        engine: runs it.
        walk: its analysis.
        feeds: the batches.
    """

    def __init__(self, engine: Engine, walk: GraphWalk, feeds: Sequence[Arrays]) -> None:
        self.engine, self.walk, self.feeds = engine, walk, feeds
        self.makers = {t.name: i for i, n in enumerate(walk.model.graph.nodes) for t in n.outputs if t.name}
        self.position = 0
        self.values: list[dict[str, Any]] = [{} for _ in feeds]

    def to(self, stop: int, name: str) -> list[NDArray[Any]]:
        """Goes on to a position, or stays where it is further; returns a tensor of each batch."""
        stop = max(stop, self.position)
        live = live_tensors(self.walk, stop)
        given = self.values[0]
        fresh = [n for n in dict.fromkeys([name, *live]) if n not in given]
        part = self.engine.part(self.walk, self.position, stop, fresh, given, once=True) if fresh else None
        found = []
        for index, feeds in enumerate(self.feeds):
            known = self.values[index]
            made = {} if part is None else part.run({**feeds, **known}, arrays=[n for n in fresh if n == name])
            values = {**known, **made}
            found.append(self.engine.array(values[name]))
            self.values[index] = {n: values[n] for n in live}
        self.position = stop
        return found

    def replace(self, name: str, arrays: Sequence[NDArray[Any]]) -> None:
        """Has a live tensor be another."""
        for values, array in zip(self.values, arrays, strict=True):
            if name in values:
                values[name] = array


def _enough(batches: Sequence[Arrays], masks: Sequence[NDArray[np.bool_] | None], away: set[int]) -> list[int]:
    """Returns the batches that are enough to fit to and to judge by."""
    rows, found = {True: 0, False: 0}, []
    for i, (feeds, mask) in enumerate(zip(batches, masks, strict=True)):
        held = i in away
        if rows[held] < (HELD_ROWS if held else ROWS):
            found.append(i)
            sizes = (v.size if v.ndim == 2 else len(v) for v in feeds.values() if v.ndim)
            rows[held] += int(mask.sum()) if mask is not None else max(sizes, default=1)
    return found


def _rows(array: NDArray[Any], axis: int, mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Lays an array out as the rows that count, [rows, channels]."""
    laid = np.moveaxis(array, axis, -1)
    if mask is not None and laid.ndim == 2 and mask.ndim == 2 and len(laid) == mask.size != mask.shape[0]:
        return laid[mask.reshape(-1)]
    return output_rows(laid, mask)
