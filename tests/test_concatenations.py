# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Consumers of concatenations, as in U-Nets, DenseNets, the necks of YOLO and packed inputs: each part is cut alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
import streams
import torch
import transformers
from graphs import Weights

import liar_opt
from liar_opt.frontend.engine import Patch
from liar_opt.frontend.onnx_model import onnx_graph
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.passes.groups import ChannelGroup
from liar_opt.passes.probe_outputs import ProbeOutputs, repaired, together
from liar_opt.passes.prune_groups import GroupVisitor, PruneGroupsPass
from liar_opt.passes.result import ModuleResult
from liar_opt.passes.sweep import Sweep
from liar_opt.runtime.calibration_data import CalibrationData


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def conv(target: str, source: str, name: str, kernel: int = 3, more: str = "", act: str = "Relu") -> str:
    """A convolution that keeps the size of the image, with its activation."""
    pads = ",".join(["1" if kernel == 3 else "0"] * 4)
    return f"{target}c = Conv<pads=[{pads}]{more}>({source}, {name}w, {name}b)\n {target} = {act}({target}c)\n"


def conv_weights(**shapes: tuple[int, int, int]) -> dict[str, Any]:
    """Draws weights whose outputs have the size of their inputs, by name: (outputs, inputs, kernel)."""
    rng = np.random.default_rng(len(shapes))
    result: dict[str, Any] = {}
    for name, (outputs, inputs, kernel) in shapes.items():
        scale = np.float32(1.4 / (kernel * inputs**0.5))
        result[f"{name}w"] = scale * rng.standard_normal((outputs, inputs, kernel, kernel)).astype(np.float32)
        result[f"{name}b"] = rng.standard_normal(outputs).astype(np.float32) * np.float32(0.3)
    return result


UNET = (
    "f (float[b, 3, 8, 4] x) => (float[b, 2, 8, 4] y) {\n"
    + conv("s", "x", "s")
    + conv("e1", "s", "e1")
    + "p1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e1)\n"
    + conv("e2", "p1", "e2")
    + "p2 = AveragePool<kernel_shape=[2,2], strides=[2,2]>(e2)\n"
    + conv("m", "p2", "m")
    + 'r = Resize<mode="nearest">(m, , twice)\n c1 = Concat<axis=1>(r, e2)\n'
    + conv("d1", "c1", "d1")
    + "t = ConvTranspose<kernel_shape=[2,2], strides=[2,2]>(d1, tw)\n c2 = Concat<axis=1>(e1, t)\n"
    + conv("d2", "c2", "d2")
    + "y = Conv(d2, ow, ob) }"
)
UNET_WEIGHTS = {
    **conv_weights(s=(5, 3, 3), e1=(7, 5, 3), e2=(9, 7, 3), m=(11, 9, 3), d1=(8, 20, 3), d2=(6, 13, 3), o=(2, 6, 1)),
    **{"twice": np.asarray([1, 1, 2, 2], np.float32), "tw": (8, 6, 2, 2)},
}

# Every layer reads all before it, behind a normalisation of its own; one tensor is part of several concatenations.
DENSENET = (
    "f (float[b, 3, 5, 4] x) => (float[b, 2, 5, 4] y) {\n"
    + conv("s", "x", "s")
    + conv("f0", "s", "f0")
    + "n0 = BatchNormalization(f0, g0, h0, m0, v0)\n a0 = Relu(n0)\n"
    + conv("f1", "a0", "f1")
    + "c1 = Concat<axis=1>(f0, f1)\n n1 = BatchNormalization(c1, g1, h1, m1, v1)\n a1 = Relu(n1)\n"
    + conv("f2", "a1", "f2")
    + "c2 = Concat<axis=1>(f0, f1, f2)\n n2 = BatchNormalization(c2, g2, h2, m2, v2)\n a2 = Relu(n2)\n y = Conv(a2, ow, ob) }"
)


def normalisations(*widths: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {}
    for i, width in enumerate(widths):
        result |= {f"{name}{i}": rng.uniform(0.5, 1.5, width).astype(np.float32) for name in "gv"}
        result |= {f"{name}{i}": rng.standard_normal(width).astype(np.float32) * np.float32(0.2) for name in "hm"}
    return result


DENSENET_WEIGHTS = {
    **conv_weights(s=(5, 3, 3), f0=(7, 5, 3), f1=(4, 7, 3), f2=(6, 11, 3), o=(2, 17, 1)),
    **normalisations(7, 11, 17),
}

# C2f: parts of a split come back beside what was made of them. SPPF: pools of pools. Then a neck that reads two sizes.
YOLO = (
    "f (float[b, 3, 4, 6] x) => (float[b, 2, 4, 6] y) {\n"
    + conv("s", "x", "s")
    + conv("i", "s", "i", 1)
    + "p, q = Split<axis=1>(i, halves)\n"
    + conv("k", "q", "k")
    + conv("l", "k", "l")
    + "z = Add(q, l)\n cf = Concat<axis=1>(p, q, z)\n"
    + conv("o", "cf", "o", 1, act="Sigmoid")
    + conv("u", "o", "u", 1)
    + "".join(f"u{i + 1} = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(u{i or ''})\n" for i in range(2))
    + "sp = Concat<axis=1>(u, u1, u2)\n"
    + conv("v", "sp", "v", 1)
    + conv("w", "v", "w", 3, ", strides=[2,2]")
    + 'r = Resize<mode="nearest">(w, , twice)\n n = Concat<axis=1>(r, o)\n'
    + "y = Conv<pads=[1,1,1,1]>(n, yw, yb) }"
)
YOLO_WEIGHTS = {
    **conv_weights(
        s=(5, 3, 3), i=(8, 5, 1), k=(6, 4, 3), l=(4, 6, 3), o=(9, 12, 1), u=(5, 9, 1), v=(7, 15, 1), w=(6, 7, 3)
    ),
    **conv_weights(y=(2, 15, 3)),
    **{"halves": ints(4, 4), "twice": np.asarray([1, 1, 2, 2], np.float32)},
}

PACKED = """f (float[b, s, 6] x) => (float[b, s, 6] y) {
    ua = MatMul(x, wa)  va = Add(ua, ba)  a = Relu(va)  uc = MatMul(x, wc)  vc = Add(uc, bc)  c = Tanh(vc)
    p = Concat<axis=-1>(a, x, c)  h = MatMul(p, wp)  hb = Add(h, bp)  y = Add(x, hb) }"""
PACKED_WEIGHTS: Weights = {"wa": (6, 11), "ba": (11,), "wc": (6, 9), "bc": (9,), "wp": (26, 6), "bp": (6,)}

# Sums of concatenations tie part by part; a slice of one, and one whose parts were put in another order.
SUMS = """f (float[b, s, 6] x) => (float[b, s, 7] y) {
    ua = MatMul(x, wa)  a = Relu(ua)  uc = MatMul(x, wc)  c = Tanh(uc)  p = Concat<axis=-1>(a, c)
    ur = MatMul(x, wr)  r = Relu(ur)  t = Add(p, r)  y0 = MatMul(t, w0)
    f = Slice(t, zero, five, last)  y1 = MatMul(f, w1)
    g, h = Split<axis=-1>(t, parts)  o = Concat<axis=-1>(h, g, h)  y2 = MatMul(o, w2)  y3 = Add(y0, y1)  y = Add(y3, y2) }"""
SUMS_WEIGHTS: Weights = {
    **{"wa": (6, 5), "wc": (6, 8), "wr": (6, 13), "w0": (13, 7), "w1": (5, 7), "w2": (21, 7)},
    **{"zero": ints(0), "five": ints(5), "last": ints(-1), "parts": ints(5, 8)},
}

# Heads and a feed-forward layer side by side before one projection.
PARALLEL = """f (float[b, s, 12] x) => (float[b, s, 12] y) {
    q0 = MatMul(x, wq)  q1 = Reshape(q0, heads)  q = Transpose<perm=[0,2,1,3]>(q1)
    k0 = MatMul(x, wk)  k1 = Reshape(k0, heads)  k = Transpose<perm=[0,2,3,1]>(k1)
    v0 = MatMul(x, wv)  v1 = Reshape(v0, heads)  v = Transpose<perm=[0,2,1,3]>(v1)
    l = MatMul(q, k)  p = Softmax(l)  o0 = MatMul(p, v)  o1 = Transpose<perm=[0,2,1,3]>(o0)  o = Reshape(o1, flat)
    u = MatMul(x, wu)  m = Relu(u)  c = Concat<axis=-1>(o, m)  d = MatMul(c, wo)  y = Add(x, d) }"""
PARALLEL_WEIGHTS: Weights = {
    **{"wq": (12, 12), "wk": (12, 12), "wv": (12, 12), "wu": (12, 17), "wo": (29, 12)},
    **{"heads": ints(0, 0, 3, 4), "flat": ints(0, 0, 12)},
}

GRAPHS: dict[str, tuple[str, Weights, list[tuple[str, int]]]] = {
    "U-Net": (UNET, UNET_WEIGHTS, [("ffn", n) for n in (6, 6, 7, 8, 9, 11)]),
    "DenseNet": (DENSENET, DENSENET_WEIGHTS, [("ffn", n) for n in (4, 6, 7)]),
    "YOLO": (YOLO, YOLO_WEIGHTS, [("ffn", n) for n in (4, 4, 5, 6, 6, 7, 9)]),
    "packed inputs": (PACKED, PACKED_WEIGHTS, [("ffn", 9), ("ffn", 11)]),
    "sums of concatenations": (SUMS, SUMS_WEIGHTS, [("ffn", 5), ("ffn", 8)]),
    "heads beside a layer": (PARALLEL, PARALLEL_WEIGHTS, [("ffn", 17), ("heads", 3)]),
}


def model_of(name: str) -> onnx.ModelProto:
    text, weights, _ = GRAPHS[name]
    return graphs.parse(text, weights)


@pytest.mark.parametrize("name", GRAPHS)
def test_each_part_is_cut_alone(name: str) -> None:
    proto = model_of(name)
    assert graphs.sizes(proto) == GRAPHS[name][2]
    groups = graphs.analyse(proto)[2].groups
    assert len({g.name for g in groups}) == len(groups)
    assert any(np.any(c.owners < 0) for g in groups for c in g.consumers)
    graphs.prove(proto, {"b": 2, "s": 5}, values=True)


def feeds_of(proto: onnx.ModelProto, seed: int) -> list[dict[str, np.ndarray]]:
    return [graphs.feeds_of(proto, {"b": 4, "s": 5}, seed + i) for i in range(6)]


def error(proto: onnx.ModelProto, cut: onnx.ModelProto) -> float:
    """Mean squared difference on rows that were not measured."""
    feeds = feeds_of(proto, 100)
    return float(np.mean([np.square(oracle.run(cut, f)[0] - oracle.run(proto, f)[0]).mean() for f in feeds]))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_repair_uses_all_parts(name: str) -> None:
    """Groups get widths of their own, so that parts of one consumer lose other shares."""
    proto = model_of(name)
    options: dict[str, Any] = {"sparsity": 0.5, "multiple_of": 1, "latency": False, "batch_size": 4, "fresh": True}
    found = {r: liar_opt.prune(proto, feeds_of(proto, 0), repair=r, **options) for r in ("none", "liar")}
    for result in found.values():
        assert result.report["verification"]["exact_difference"] < 1e-5
        shares = {round(g["after"] / g["before"], 3) for g in result.report["groups"]}
        assert len(shares) > 1
    assert error(proto, found["liar"].model) < 0.9 * error(proto, found["none"].model)
    assert result.report["after"]["parameters"] < result.report["before"]["parameters"]


def test_parts_that_are_cut_in_turn_are_repaired_as_if_together() -> None:
    """Without a ridge, the fit on what both cuts leave is the fit of the second on what the first one has left."""
    proto = model_of("packed inputs")
    feeds = feeds_of(proto, 0)
    options: dict[str, Any] = {"ffn": 0.4, "multiple_of": 1, "latency": False, "batch_size": 4, "fresh": True}
    result = liar_opt.prune(proto, feeds, ridge=1e-9, weighting="none", **options)
    (first, second) = (g["kept"] for g in result.report["groups"])
    parts = result.report["groups"]
    assert [g["before"] for g in parts] == [11, 9] or [g["before"] for g in parts] == [9, 11]
    a, c = (first, second) if parts[0]["before"] == 11 else (second, first)
    kept = [*a, *range(11, 17), *(17 + i for i in c)]
    weights = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}
    x = np.concatenate([f["x"].reshape(-1, 6) for f in feeds]).astype(np.float64)
    rows = [np.maximum(x @ weights["wa"] + weights["ba"], 0.0), x, np.tanh(x @ weights["wc"] + weights["bc"])]
    packed = np.concatenate(rows, axis=1)
    target = packed @ weights["wp"] + weights["bp"]
    known = np.concatenate([packed[:, kept], np.ones((len(packed), 1))], axis=1)
    fit = np.linalg.lstsq(known, target, rcond=None)[0]
    made = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
    assert np.allclose(made["wp"], fit[:-1], atol=1e-3)
    assert np.allclose(made["bp"], fit[-1], atol=1e-3)


@pytest.mark.parametrize("repair", ["dense", "residual"])
def test_the_dense_output_is_fitted_once(repair: str) -> None:
    """The bias of the second part's repair is beside that of the first: the mean of the output is that of the dense one."""
    proto = model_of("packed inputs")
    feeds = feeds_of(proto, 0)
    options: dict[str, Any] = {"ffn": 0.5, "multiple_of": 1, "latency": False, "batch_size": 4, "fresh": True}
    result = liar_opt.prune(proto, feeds, repair=repair, weighting="none", **options)
    assert result.report["verification"]["exact_difference"] < 1e-5
    kinds = [c["repair"] for change in result.changes for c in change.details["consumers"]]
    assert kinds == ["dense", "dense"]
    means = [np.mean([oracle.run(m, f)[0] for f in feeds], axis=(0, 1, 2)) for m in (proto, result.model)]
    unrepaired = liar_opt.prune(proto, feeds, repair="none", **options)
    off = np.mean([oracle.run(unrepaired.model, f)[0] for f in feeds], axis=(0, 1, 2)) - means[0]
    assert np.abs(means[1] - means[0]).max() < 1e-4 < 0.01 * np.abs(off).max()


def test_patches_for_both_parts_are_one() -> None:
    """A search compares widths of all groups at a time, each repaired by itself."""
    proto = model_of("packed inputs")
    state = streams.prepared(proto, 0.5, CalibrationData(tuple(feeds_of(proto, 0)), (None,) * 6, 24, 1, "test", (), False))
    sweep = Sweep(state)
    run, probes = _Patched(sweep, PruneGroupsPass(score="magnitude", repair="none")), ProbeOutputs(sweep)
    sweep.over(run, state.groups)
    removed = [p for patches in run.patches for p in patches]
    lost, alone = probes.difference(removed), probes.difference(run.patches[0])
    (first,), (second,) = run.patches
    (both,) = together([first, second])
    assert isinstance(both, Patch)
    assert np.array_equal(both.shift, first.shift + second.shift)
    cut = onnx_graph(PruneGroupsPass(score="magnitude", repair="none")(state).state.model).to_proto()
    dense = [oracle.run(proto, feeds)[0] for feeds in probes.data.batches]
    off = [oracle.run(cut, feeds)[0] - y for feeds, y in zip(probes.data.batches, dense, strict=True)]
    about = [np.square(a - a.mean(-1, keepdims=True)).sum() for a in (np.stack(off), np.stack(dense))]
    assert lost == pytest.approx(float(about[0] / about[1]), rel=1e-3)
    assert lost != pytest.approx(alone, rel=0.1)


class _Patched(GroupVisitor):
    """Notes what the cut of each group makes of its consumers, with the blocks that a cut draws by magnitude."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.patches: list[list[Patch]] = []

    def group(self, group: ChannelGroup, moments: Any) -> None:
        measured = [self.measured(c, moments) for c in group.consumers]
        blocks = self.select(group, measured, self.state.keep[group.name])
        self.patches.append(repaired(self, group, measured, blocks))


def test_one_tensor_that_is_several_parts_is_one_dimension() -> None:
    text = """f (float[b, s, 6] x) => (float[b, s, 7] y) { u = MatMul(x, w1)  h = Relu(u)  n = Neg(u)
        c = Concat<axis=-1>(h, x, n, h)  y = MatMul(c, w2) }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (39, 7)})
    (group,) = graphs.analyse(proto)[2].groups
    assert (group.kind, group.size, group.block_width) == ("ffn", 11, 3)
    graphs.prove(proto, {"b": 2, "s": 3})


def test_a_part_of_one_channel_stays() -> None:
    text = PACKED.replace("p = Concat<axis=-1>(a, x, c)", "o = MatMul(x, wo)  t = Tanh(o)  p = Concat<axis=-1>(t, a, x, c)")
    proto = graphs.parse(text, {**PACKED_WEIGHTS, "wo": (6, 1), "wp": (27, 6)})
    assert graphs.sizes(proto) == [("ffn", 9), ("ffn", 11)]
    graphs.prove(proto, {"b": 2, "s": 3})


def test_a_part_that_is_an_output_stays() -> None:
    text = PACKED.replace("=> (float[b, s, 6] y)", "=> (float[b, s, 6] y, float[b, s, 9] c)")
    proto = graphs.parse(text, PACKED_WEIGHTS)
    assert graphs.sizes(proto) == [("ffn", 11)]
    assert "axis of graph output 'c'" in graphs.reasons(proto)
    graphs.prove(proto, {"b": 2, "s": 3})


def test_the_basis_of_values_beside_others_is_left() -> None:
    """Another part may change the weight later, on channels that are those of before."""
    proto = model_of("heads beside a layer")
    (values,) = graphs.analyse(proto)[2].values
    assert values.bent == "its consumer reads other dimensions in the same axis"
    feeds = feeds_of(proto, 0)
    result = liar_opt.prune(proto, feeds, values=0.5, ffn=0.3, multiple_of=1, latency=False, batch_size=4, fresh=True)
    assert result.report["verification"]["exact_difference"] < 1e-5
    assert any("cut by channels" in r["reason"] for r in result.report["refusals"])


def test_the_positions_of_others_stay() -> None:
    """Of a convolution each place under the kernel has the channels of all parts."""
    _, state, found = graphs.analyse(model_of("U-Net"))
    by_size = {g.size: g for g in found.groups}
    deep = by_size[11]
    (consumer,) = deep.consumers
    assert consumer.width == 9 * 20
    assert consumer.owners.reshape(9, 20)[4].tolist() == [*range(11), *[-1] * 9]
    assert [parts_of(by_size[n], consumer.uses[0]) for n in (11, 9)] == [list(range(11)), list(range(11, 20))]
    rewriter = Rewriter(state)
    rewriter.cut(deep.cut([2, 3, 5]))
    assert rewriter.size(consumer.uses[0].width) == 9 * 12
    rewriter.cut(by_size[9].cut([0, 8]))
    assert consumer.uses[0].node.inputs[1].shape == (8, 5, 3, 3)


def parts_of(group: ChannelGroup, use: Any) -> list[int]:
    """Returns the channels of a convolution that a group has."""
    (own,) = (c for c in group.consumers if c.uses[0] is use)
    return np.flatnonzero(own.owners.reshape(9, -1)[0] >= 0).tolist()


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    proto = model_of("U-Net")
    options: dict[str, Any] = {"ffn": 0.4, "multiple_of": 1, "latency": False, "batch_size": 4, "fresh": True}

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "calibrate" and done == total - 1:
            raise KeyboardInterrupt

    whole = liar_opt.prune(proto, feeds_of(proto, 0), **options)
    with pytest.raises(KeyboardInterrupt):
        liar_opt.prune(proto, feeds_of(proto, 0), resume=tmp_path / "run", progress=stop, **options)
    resumed = liar_opt.prune(proto, feeds_of(proto, 0), resume=tmp_path / "run", **options)
    assert resumed.report["resumed"] > 0
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()


class _Parallel(torch.nn.Module):
    """Heads and a feed-forward layer side by side before one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(12, 12) for _ in range(3))
        self.up, self.out = torch.nn.Linear(12, 17), torch.nn.Linear(29, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (layer(x).view(b, s, 3, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, 12)
        result: torch.Tensor = x + self.out(torch.cat([heads, torch.relu(self.up(x))], -1))
        return result


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_module(backend: str) -> None:
    torch.manual_seed(0)
    module = _Parallel().eval()
    x = torch.randn(24, 6, 12)
    result = liar_opt.prune(
        module, {"x": x.numpy()}, ffn=0.4, heads=0.34, multiple_of=1, latency=False, batch_size=4, backend=backend
    )
    assert [(g["before"], g["after"]) for g in result.report["groups"]] == [(3, 2), (17, 10)]
    assert result.report["verification"]["exact_difference"] < 1e-5
    assert isinstance(result, ModuleResult)
    assert result.module.get_parameter("out.weight").shape == (12, 18)


def test_gradients_of_a_module_are_those_of_each_part() -> None:
    """The part of which the loss knows nothing loses what it is asked to; of the other what matters stays."""
    torch.manual_seed(0)
    module = _Parallel().eval()
    with torch.no_grad():
        module.out.weight[:, 12:] *= torch.where(torch.arange(17) < 5, 1.0, 0.0)
    x = torch.randn(24, 6, 12)
    options: dict[str, Any] = {"ffn": 0.7, "multiple_of": 1, "latency": False, "batch_size": 4, "score": "taylor"}
    result = liar_opt.prune(
        module,
        {"x": x.numpy()},
        **options,
        labelled=[({"x": x[i : i + 4]}, None) for i in range(0, 8, 4)],
        loss=lambda outputs, _: next(iter(outputs.values())).square().sum(),
    )
    (part,) = (g for g in result.report["groups"] if g["before"] == 17)
    assert part["kept"] == [0, 1, 2, 3, 4]


def test_a_checkpoint_whose_configuration_says_the_width_of_all_parts(tmp_path: Path) -> None:
    """SegFormer's head puts what four stages give side by side, each as wide as one field says."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[16, 32, 40, 48], depths=[1] * 4, num_attention_heads=[1, 2, 4, 6], decoder_hidden_size=24
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "dense")
    images = {"pixel_values": np.random.default_rng(0).standard_normal((4, 3, 64, 64)).astype(np.float32)}
    result = liar_opt.prune(tmp_path / "dense", images, ffn=0.5, multiple_of=1, latency=False, batch_size=2)
    found = [(g["before"], g["after"]) for g in result.report["groups"]]
    assert [pair for pair in found if pair[0] == 24] == [(24, 12)] * 5
    assert len(found) == 9 and all(after == before // 2 for before, after in found)  # mlp_ratios say those of the stages
    assert result.report["verification"]["exact_difference"] < 1e-5
    result.save(tmp_path / "cut")
    loaded, info = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert loaded.config.decoder_hidden_size == 12
    assert not info["missing_keys"] and not info["mismatched_keys"]
