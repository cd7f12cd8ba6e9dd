"""What a cut does to the outputs is the same whether the model runs in parts or as a whole, and the parts are made once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import graphs
import numpy as np
import pytest
from streams import BLOCK, FOUR_WEIGHTS, NORMED, WEIGHTS, batches, data, four, prepared

from liar_opt.frontend.engine import AnyPatch, Patch
from liar_opt.frontend.onnx_engine import OnnxEngine, OnnxPart
from liar_opt.frontend.records import StandIn
from liar_opt.passes import probe_outputs
from liar_opt.passes.probe_outputs import PROBE_ROWS, ProbeOutputs
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


HEADS = {
    "product": "y = MatMul(n, head)",
    "biased": "m = MatMul(n, head)  y = Add(shift, m)",
    "shared": "turned = Transpose<perm=[1,0]>(rows)  y = MatMul(n, turned)",
}


@pytest.mark.parametrize("head", HEADS)
def test_a_vocabulary_is_looked_at_in_the_rows_that_are_compared(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With masks that leave other rows in each batch, and a head that is patched itself."""
    blocks = "\n".join(NORMED.format(i, i + 1, "Relu") for i in range(4))
    text = f"f (float[b, s, 6] x0) => (float[b, s, 40] y) {{ {blocks} n = LayerNormalization(x4, g0) {HEADS[head]} }}"
    drawn = np.random.default_rng(5).standard_normal((6, 40)).astype(np.float32)
    weights = {**FOUR_WEIGHTS, "head": drawn, "rows": np.ascontiguousarray(drawn.T), "shift": drawn[0]}
    masks = tuple(np.arange(90) < n for n in (90, 70))
    found = data(batches(2, 0, (8, 90)), tuple(np.tile(mask, (8, 1)) for mask in masks))
    sweep = Sweep(prepared(graphs.parse(text, weights), 0.5, replace(found, tokens=8 * 160)))
    sizes: list[int] = []
    ran = OnnxPart.run

    def run(self: Any, feeds: Any, *arguments: Any, **options: Any) -> Any:
        made = ran(self, feeds, *arguments, **options)
        sizes.extend(np.asarray(value).size for name, value in made.items() if name == "y")
        return made

    monkeypatch.setattr(OnnxPart, "run", run)
    probes = ProbeOutputs(sweep, sweep.state.groups)
    assert list(probes.heads) == ["y"]
    (own,) = (use for use in sweep.walk.consumers if use is probes.heads["y"])
    patches = [[halved(g)] for g in sweep.state.groups]
    matrix = own.laid_out(1.5 * own.matrix(np.asarray(own.weight.values)), own.weight.shape)
    patches.append([Patch((own,), matrix, np.linspace(-0.1, 0.1, 40))])
    lost = [probes.difference(patch) for patch in patches]
    assert max(sizes) == PROBE_ROWS * 40
    monkeypatch.setattr(probe_outputs, "head_of", lambda *_: None)
    whole = ProbeOutputs(sweep, sweep.state.groups)
    assert not whole.heads
    assert lost == pytest.approx([whole.difference(patch) for patch in patches], rel=1e-4)
    assert all(value is not None and value > 1e-3 for value in lost)


def test_an_output_that_is_no_product_has_no_head(sweep: Sweep) -> None:
    assert not ProbeOutputs(sweep).heads
