"""What a cut does to the outputs is the same whether the model runs in parts or as a whole, and the parts are made once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import graphs
import numpy as np
import pytest
from streams import BLOCK, WEIGHTS, batches, data, four, prepared

from liar_opt.frontend.engine import AnyPatch, Patch
from liar_opt.frontend.onnx_engine import OnnxEngine
from liar_opt.frontend.records import StandIn
from liar_opt.passes.probe_outputs import ProbeOutputs
from liar_opt.passes.sweep import Sweep
from liar_opt.runtime.calibration_data import CalibrationData


def halved(group: Any) -> Patch:
    """The consumer of a group with zeros in half of its rows."""
    (consumer,) = group.consumers
    use = consumer.uses[0]
    weight = np.array(use.holder.inputs[use.weight_position].values)
    weight[::2] = 0.0
    return Patch(consumer.uses, weight, np.linspace(-0.1, 0.1, weight.shape[1]))


@pytest.fixture
def sweep() -> Sweep:
    return Sweep(prepared(four(), 0.5))


def test_in_parts_as_in_one(sweep: Sweep) -> None:
    groups = sweep.state.groups
    parts, whole = ProbeOutputs(sweep, groups), ProbeOutputs(sweep)
    assert len(parts.places) > len(groups) and len(whole.places) == 2
    source, bias = "n2", np.full(6, 0.2, np.float32)
    stand_in = StandIn("z2", source, np.diag(np.arange(6, dtype=np.float32)), bias)
    for patches in ([halved(g)] for g in groups):
        assert parts.difference(patches) == pytest.approx(whole.difference(patches), rel=1e-4)
    together: list[list[AnyPatch]] = [[halved(groups[1]), halved(groups[3])], [stand_in], [stand_in, halved(groups[0])]]
    for several in together:
        lost = parts.difference(several)
        assert lost == pytest.approx(whole.difference(several), rel=1e-4)
        assert lost is not None and lost > 1e-3
    assert parts.difference([]) is None


def test_what_is_made_grows_with_the_depth_alone(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the dense model once, and one part more for each group."""
    made, part = [], OnnxEngine.part

    def counted(self: Any, walk: Any, start: int, stop: int, *arguments: Any, **options: Any) -> Any:
        made.append(stop - start)
        return part(self, walk, start, stop, *arguments, **options)

    monkeypatch.setattr(OnnxEngine, "part", counted)
    probes = ProbeOutputs(sweep, sweep.state.groups)
    for group in sweep.state.groups:
        probes.difference([halved(group)])
    assert len(made) == len(probes.places) - 1 + len(sweep.state.groups)
    assert sum(made) <= 2 * len(sweep.walk.model.graph.nodes)


def test_what_no_compared_output_needs_does_not_run() -> None:
    """Four outputs are compared; the fifth comes last."""
    early = " ".join(f"e{i} = Tanh(x1)" for i in range(4))
    outs = ", ".join(f"float[b, s, 6] {n}" for n in ("e0", "e1", "e2", "e3", "x2"))
    text = f"f (float[b, s, 6] x0) => ({outs}) {{ {BLOCK.format(0, 1)} {early}\n {BLOCK.format(1, 2)} }}"
    sweep = Sweep(prepared(graphs.parse(text, WEIGHTS), 0.5))
    first, second = sorted(sweep.state.groups, key=lambda g: g.start)
    probes = ProbeOutputs(sweep, sweep.state.groups)
    assert probes.difference([halved(first)]) == pytest.approx(ProbeOutputs(sweep).difference([halved(first)]), rel=1e-4)
    assert probes.difference([halved(second)]) is None


def test_the_first_samples_of_held_back_batches_are_compared() -> None:
    """As many as have the rows, with their masks."""
    masks = tuple(np.arange(5) < np.arange(1, 9)[:, None] for _ in range(20))
    found = replace(data(batches(20, 0), masks), tokens=20 * int(masks[0].sum()))
    probes = ProbeOutputs(Sweep(prepared(four(), 0.5, found)), rows=16)
    given: CalibrationData = probes.data
    assert len(given.batches) == 2
    for batch, mask, place in zip(given.batches, given.row_masks, (5, 15), strict=True):
        np.testing.assert_array_equal(batch["x0"], found.batches[place]["x0"][:3])
        assert mask is not None and np.array_equal(mask, masks[place][:3])
