# ruff: noqa: E501 - graphs in ONNX text read best on one line
"""Segments run one by one give what the whole model gives, and moments in the graph are those of numpy."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import oracle
import pytest
import torch

from liar_opt import prune
from liar_opt.frontend import onnx_segments
from liar_opt.frontend.onnx_segments import (
    ROWS,
    Tap,
    extract,
    live_tensors,
    names_read,
    plan_segments,
    row_mask,
    stream_of,
    tap_for,
)
from liar_opt.frontend.records import Window
from liar_opt.frontend.rewrite import Rewriter
from liar_opt.runtime.moments import Moments
from liar_opt.runtime.sessions import Session, as_array, element_type

# Three feed-forward blocks on a residual stream; the mask is alive everywhere.
BLOCK = "u{0} = MatMul(x{0}, w{0})  h{0} = Relu(u{0})  z{0} = MatMul(h{0}, v{0})  m{0} = Mul(z{0}, mask)  x{1} = Add(x{0}, m{0})"
STREAM = f"f (float[b, s, 6] x0, float[b, s, 1] mask) => (float[b, s, 6] x3) {{ {BLOCK.format(0, 1)}\n {BLOCK.format(1, 2)}\n {BLOCK.format(2, 3)} }}"
WEIGHTS: graphs.Weights = {f"{w}{i}": ((6, 9 + i) if w == "w" else (9 + i, 6)) for i in range(3) for w in "wv"}


def run(extracted: onnx_segments.Extracted, feeds: dict[str, Any], arrays: bool = True) -> dict[str, Any]:
    return Session(extracted.serialise(), "cpu", extracted.weights).run(feeds, arrays=arrays)


def test_segments_are_cut_at_the_stream() -> None:
    _, state, found = graphs.analyse(graphs.parse(STREAM, WEIGHTS))
    wide, segments = plan_segments(state, found.groups)
    assert wide == ()
    assert [len(s.groups) for s in segments] == [1, 1, 1]
    nodes = state.model.graph.nodes
    positions = [next(i for i, n in enumerate(nodes) if n is s.first) for s in segments]
    assert [live_tensors(state, p) for p in positions[1:]] == [["x1"], ["x2"]]


def test_segment_by_segment_is_the_whole_model() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    _, state, found = graphs.analyse(proto)
    feeds = graphs.feeds_of(proto, {"b": 2, "s": 5})
    _, segments = plan_segments(state, found.groups)
    nodes = state.model.graph.nodes
    starts = [next(i for i, n in enumerate(nodes) if n is s.first) for s in segments[1:]]
    alive: dict[str, Any] = {}
    for start, stop in zip([0, *starts], [*starts, len(nodes)], strict=True):
        names = live_tensors(state, stop) if stop < len(nodes) else ["x3"]
        types = {name: element_type(value) for name, value in alive.items()}
        alive = run(extract(state, start, stop, names, types), {**feeds, **alive}, arrays=False)
    np.testing.assert_allclose(as_array(alive["x3"]), oracle.run(proto, feeds)[0], rtol=1e-6)


def test_sizes_that_come_from_outside() -> None:
    """A decoder of images is resized to what an early layer was: half of ``sizes`` is known before the segment begins."""
    text = """f (float[b, 6, p, q] x) => (float[b, 7, p, q] y) {
        n = Shape(x)  cut = Slice(n, two, four)  p1 = Gather(n, at2)  q1 = Gather(n, at3)  p2 = Unsqueeze(p1, zero)
        q2 = Unsqueeze(q1, zero)  joined = Concat<axis=0>(p2, q2)  pq = Cast<to=7>(joined)
        u = Conv<strides=[2, 2]>(x, w1)  h = Relu(u)  v = Conv(h, w2)  s = Shape(v)  first = Slice(s, zero, two)
        sizes = Concat<axis=0>(first, OUTSIDE)  y = Resize<mode="linear">(v, , , sizes) }"""
    weights: graphs.Weights = {
        "w1": (11, 6, 1, 1),
        "w2": (7, 11, 1, 1),
        "two": np.asarray([2]),
        "four": np.asarray([4]),
        "zero": np.asarray([0]),
    }
    for outside in ("cut", "pq"):
        proto = graphs.parse(text.replace("OUTSIDE", outside), {**weights, "at2": np.asarray(2), "at3": np.asarray(3)})
        _, state, _ = graphs.analyse(proto)
        feeds = graphs.feeds_of(proto, {"b": 2, "p": 6, "q": 8})
        middle = next(i for i, n in enumerate(state.model.graph.nodes) if n.op == "Relu")
        alive = run(extract(state, 0, middle, live_tensors(state, middle), {}), feeds, arrays=False)
        types = {name: element_type(value) for name, value in alive.items()}
        rest = extract(state, middle, len(state.model.graph.nodes), ["y"], types)
        np.testing.assert_allclose(run(rest, alive)["y"], oracle.run(proto, feeds)[0], rtol=1e-5, atol=1e-6)


def test_sizes_from_outside_that_were_computed_with() -> None:
    """Half of a target is a product of sizes: unknown lengths would make the target's length, and so the rank, unknown."""
    text = """f (float[b, s, 6] x) => (float[n, 3, c] y) {
        u = MatMul(x, w1)  h = Relu(u)  z = MatMul(h, w2)  n = Shape(z)  first = Slice(n, zero, one)  rows = Mul(first, seven)
        last = Slice(n, one, two)  more = Add(last, nought)  wide = Mul(more, lone)  t = Concat<axis=0>(rows, wide)
        whole = Concat<axis=0>(t, three)  r = Reshape(z, whole)  y = Transpose<perm=[0, 2, 1]>(r) }"""
    values = {"zero": [0], "one": [1], "two": [2], "seven": [7], "nought": [0], "lone": 1, "three": [3]}
    weights: graphs.Weights = {"w1": (6, 11), "w2": (11, 21), **{n: np.asarray(v) for n, v in values.items()}}
    proto = graphs.parse(text, weights)
    _, state, _ = graphs.analyse(proto)
    feeds = graphs.feeds_of(proto, {"b": 2, "s": 5})
    nodes = state.model.graph.nodes
    middle = next(i for i, n in enumerate(nodes) if n.op == "Concat" and "whole" in {t.name for t in n.outputs})
    alive = run(extract(state, 0, middle, live_tensors(state, middle), {}), feeds, arrays=False)
    types = {name: element_type(value) for name, value in alive.items()}
    rest = extract(state, middle, len(nodes), ["y"], types)
    assert {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in rest.model.graph.input}["t"] == [2]
    np.testing.assert_allclose(run(rest, alive)["y"], oracle.run(proto, feeds)[0], rtol=1e-5, atol=1e-6)


def test_groups_that_share_weights_over_others_are_wide() -> None:
    shared = BLOCK.replace("w{0}", "w").replace("v{0}", "v")
    text = f"f (float[b, s, 6] x0, float[b, s, 1] mask) => (float[b, s, 6] x3) {{ {shared.format(0, 1)}\n {BLOCK.format(1, 2)}\n {shared.format(2, 3)} }}"
    _, state, found = graphs.analyse(graphs.parse(text, {"w": (6, 11), "v": (11, 6), "w1": (6, 5), "v1": (5, 6)}))
    wide, segments = plan_segments(state, found.groups)
    assert [g.size for g in wide] == [11]
    assert [[g.size for g in s.groups] for s in segments] == [[5]]


IF = """f (float[b, 6] x, bool c) => (float[b, 6] y) {
    u = MatMul(x, w1)  h = Relu(u)  z = MatMul(h, w2)  k = Tanh(x)
    r = If (c) <
        then_branch = g1 () => (float[b, 6] t) { t = Add(k, w3) },
        else_branch = g2 () => (float[b, 6] e) { e = Mul(k, w3) }
    >
    a = Add(r, z)  u2 = MatMul(a, w4)  h2 = Relu(u2)  y = MatMul(h2, w5) }"""
IF_WEIGHTS: graphs.Weights = {"w1": (6, 11), "w2": (11, 6), "w3": (6,), "w4": (6, 13), "w5": (13, 6)}


def test_branches_keep_what_they_read() -> None:
    """A branch reads tensors and weights from outside: they are alive, and part of the segment."""
    proto = graphs.parse(IF, IF_WEIGHTS)
    _, state, found = graphs.analyse(proto)
    assert [g.size for g in found.groups] == [11, 13]
    nodes = state.model.graph.nodes
    place = next(i for i, n in enumerate(nodes) if n.op == "If")
    assert "k" in live_tensors(state, place)
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32), "c": np.asarray(True)}
    alive = run(extract(state, 0, place, live_tensors(state, place), {}), feeds)
    types = {name: element_type(value) for name, value in alive.items()}
    result = run(extract(state, place, len(nodes), ["y"], types), {**feeds, **alive})
    np.testing.assert_allclose(result["y"], oracle.run(proto, feeds)[0], rtol=1e-6)
    plan_segments(state, found.groups)


# Each layer reads a cache of its own, whose sizes are asked for on top of the graph, and casts it there, as exporters do.
CACHED = """p{0} = Cast<to=1>(past{0})  n{0} = Shape(past{0})  q{0} = Gather(n{0}, one)"""
LAYER = """a{0} = MatMul(x{0}, k{0})  t{0} = Concat<axis=0>(bs, q{0}, four)  r{0} = Reshape(a{0}, t{0})
    c{0} = Transpose<perm=[0, 2, 1, 3]>(r{0})  j{0} = Concat<axis=2>(p{0}, c{0})  present{0} = Cast<to=10>(j{0})
    m{0} = ReduceMean<axes=[2], keepdims=0>(j{0})  f{0} = Reshape(m{0}, flat)
    o{0} = MatMul(f{0}, v{0})  w{0} = Unsqueeze(o{0}, one)  y{0} = Add(x{0}, w{0})  u{0} = MatMul(y{0}, up{0})
    h{0} = Relu(u{0})  z{0} = MatMul(h{0}, down{0})  x{1} = Add(y{0}, z{0})"""
HEADS = (3, 5, 4)


def cached() -> onnx.ModelProto:
    """Three layers of unlike heads (of 4) and feed-forward widths on a stream of 6."""
    pasts = "".join(f", float16[b, {n}, p, 4] past{i}" for i, n in enumerate(HEADS))
    tops, layers = ("\n".join(part.format(i, i + 1) for i in range(3)) for part in (CACHED, LAYER))
    ends = "".join(f", float16[b, {n}, t, 4] present{i}" for i, n in enumerate(HEADS))
    text = f"f (float[b, s, 6] x0{pasts}) => (float[b, s, 6] x3{ends}) {{ n = Shape(x0)  bs = Slice(n, zero, two)\n {tops}\n {layers} }}"
    weights: graphs.Weights = {
        name: np.asarray(value)
        for name, value in {"zero": [0], "one": [1], "two": [2], "four": [4], "flat": [0, -1]}.items()
    }
    for i, heads in enumerate(HEADS):
        weights = {
            **weights,
            f"k{i}": (6, 4 * heads),
            f"v{i}": (4 * heads, 6),
            f"up{i}": (6, 9 + i),
            f"down{i}": (9 + i, 6),
        }
    return graphs.parse(text, weights)


def test_segments_come_in_the_order_of_the_weights() -> None:
    """Shapes that are read on top of the graph, far from any layer, put nothing before anything else."""
    _, state, found = graphs.analyse(cached())
    wide, segments = plan_segments(state, found.groups)
    assert wide == ()
    assert [(g.kind, g.size) for s in segments for g in s.groups] == [
        (kind, size) for i, n in enumerate(HEADS) for kind, size in (("heads", n), ("ffn", 9 + i))
    ]
    assert len(segments) == 6
    nodes = state.model.graph.nodes
    first = [next(i for i, n in enumerate(nodes) if n is s.first) for s in segments]
    last = [next(i for i, n in enumerate(nodes) if n is s.last) for s in segments]
    assert first == sorted(first) and all(end < start for end, start in zip(last, first[1:], strict=False))


def test_what_a_cut_will_change_is_not_kept_but_made_anew() -> None:
    """A cache that was laid out on top of the graph, and the number of its heads, are those of the cut graph behind a cut."""
    proto = cached()
    _, state, found = graphs.analyse(proto)
    _, segments = plan_segments(state, found.groups)
    nodes = state.model.graph.nodes
    groups = [segment.groups[0] for segment in segments]
    place = next(i for i, n in enumerate(nodes) if n is segments[2].first)
    plain, waiting = live_tensors(state, place), live_tensors(state, place, [g.factor for g in groups[2:]])
    assert {"p1", "q1", "p2", "q2"} <= set(plain)
    assert set(plain) - set(waiting) == {name for name in plain if name[0] in "npqt" and name[1:] in ("1", "2")}
    # The second layer is cut behind what was kept; so are the caches that are given.
    feeds = graphs.feeds_of(proto, {"b": 2, "s": 5, "p": 3})
    alive = run(extract(state, 0, place, waiting, {}), feeds, arrays=False)
    kept = [0, 2, 3]
    Rewriter(state).cut(groups[2].cut(kept))
    given = {**feeds, "past1": feeds["past1"][:, kept]}
    types = {name: element_type(value) for name, value in alive.items()}
    place = next(i for i, n in enumerate(nodes) if n is segments[2].first)
    rest = run(extract(state, place, len(nodes), ["x3"], types), {**given, **alive})
    masked = {t.name: onnx.numpy_helper.to_array(t).copy() for t in proto.graph.initializer}
    masked["v1"].reshape(5, 4, 6)[[1, 4]] = 0.0
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(masked[tensor.name], tensor.name))
    np.testing.assert_allclose(rest["x3"], oracle.run(proto, feeds)[0], rtol=1e-5, atol=1e-5)


def test_what_is_not_at_hand_is_made_again() -> None:
    """A segment needs no tensor that was not kept: it is made from the inputs, however far before."""
    proto = graphs.parse(STREAM, WEIGHTS)
    _, state, _ = graphs.analyse(proto)
    feeds = graphs.feeds_of(proto, {"b": 2, "s": 5})
    nodes = state.model.graph.nodes
    for start in (0, 4, 9, len(nodes)):
        result = run(extract(state, start, len(nodes), ["x3"], {}), feeds)
        np.testing.assert_allclose(result["x3"], oracle.run(proto, feeds)[0], rtol=1e-6)


def test_names_inside_a_loop_are_its_own() -> None:
    """A body's inputs, and what a branch inside it reads of them, are no tensors of the graph around it."""
    text = """f (float[b, 6] x, bool c) => (float[b, 6] y) {
        u = MatMul(x, w1)  h = Relu(u)  z = MatMul(h, w2)
        y = Loop (three, yes, z) <body = again (int64 i, bool go, float[b, 6] carried) => (bool on, float[b, 6] made) {
            on = Identity(go)
            t = If (c) <
                then_branch = g1 () => (float[b, 6] r1) { r1 = Tanh(carried) },
                else_branch = g2 () => (float[b, 6] r2) { r2 = Mul(carried, x) }
            >
            made = Add(t, carried)
        }> }"""
    proto = graphs.parse(text, {"w1": (6, 11), "w2": (11, 6), "three": np.asarray(3), "yes": np.asarray(True)})
    _, state, found = graphs.analyse(proto)
    assert [g.size for g in found.groups] == [11]
    nodes = state.model.graph.nodes
    loop = next(i for i, n in enumerate(nodes) if n.op == "Loop")
    assert names_read(nodes[loop]) == {"z", "x", "c"}
    feeds = {"x": np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32), "c": np.asarray(True)}
    alive = run(extract(state, 0, loop, live_tensors(state, loop), {}), feeds)
    types = {name: element_type(value) for name, value in alive.items()}
    result = run(extract(state, loop, len(nodes), ["y"], types), {**feeds, **alive})
    np.testing.assert_allclose(result["y"], oracle.run(proto, feeds)[0], rtol=1e-6)


def test_a_stream_that_was_cut_is_the_one_of_now() -> None:
    """The width of the stream went first: what is seen of it has as many columns as are left."""
    text = f"f (float[b, s, 7] x) => (float[b, s, 7] y) {{ x0 = MatMul(x, into)\n {BLOCK.format(0, 1).replace('mask', 'half')}\n y = MatMul(x1, out) }}"
    proto = graphs.parse(text, {**WEIGHTS, "into": (7, 6), "out": (6, 7), "half": np.asarray(0.5, np.float32)})
    _, state, found = graphs.analyse(proto)
    stream = next(g for g in found.groups if g.size == 6)
    use = next(u for u in state.consumers if u.node.outputs[0].name == "z0")
    Rewriter(state).cut(stream.cut([0, 2, 3, 5]))
    seen = stream_of(state, use)
    assert seen is None or (seen.projection.shape[0], seen.weight.shape[0]) == (4, 9)


# -- moments ---------------------------------------------------------------------------------------------------------

MASK = np.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)


def moments_of(tap: Tap, value: np.ndarray, mask: np.ndarray | None, opset: int = 17) -> Moments:
    shape = "ijkl"[: value.ndim]
    text = f"f (float[{', '.join(shape)}] x) => (float[{', '.join(shape)}] y) {{ t = Identity(x)  y = Neg(t) }}"
    proto = graphs.parse(text, opset=opset)
    _, state, _ = graphs.analyse(proto)
    rows = {} if mask is None else {f"{ROWS}_{tap.layout}{tap.repeat}": row_mask(mask, tap.layout, tap.repeat)}
    result = run(extract(state, 0, 0, [], {}, [tap]), {"x": value, **rows})
    moments = Moments(tap.width)
    count, total = (result[f"{tap.key}/{name}"] for name in ("count", "total"))
    second = [result[f"{tap.key}/second{i}"] for i in range(len(tap.bounds) - 1)]
    moments.add_block_rows(int(count), total.reshape(-1), second, tap.bounds)
    return moments


LAYOUTS: dict[str, tuple[tuple[int, ...], int, str, int, Any]] = {
    # shape, contracted axis, layout, repeat, rows of numpy
    "bs": ((3, 4, 7), 2, "bs", 1, lambda x: x[MASK]),
    "bs, contracted in the middle": ((3, 7, 4), 1, "bs", 1, lambda x: x.transpose(0, 2, 1)[MASK]),
    "sb": ((4, 3, 7), 2, "sb", 1, lambda x: x[MASK.T]),
    "flat": ((12, 7), 1, "bs", 1, lambda x: x[MASK.reshape(-1)]),
    "b": ((3, 7), 1, "b", 1, lambda x: x),
    "b*": ((3, 5, 7), 2, "b*", 5, lambda x: x.reshape(-1, 7)),
    "all": ((2, 5, 7), 2, "all", 1, lambda x: x.reshape(-1, 7)),
    "all, contracted first": ((7, 5), 0, "all", 1, lambda x: x.T),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_moments_are_those_of_the_real_rows(name: str) -> None:
    shape, axis, layout, repeat, select = LAYOUTS[name]
    value = (np.random.default_rng(0).standard_normal(shape) + 0.5).astype(np.float32)
    moments = moments_of(Tap("x", axis, len(shape), 7, layout, repeat), value, None if layout == "all" else MASK)
    rows = select(value).astype(np.float64)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.T, bias=True), rtol=1e-3, atol=1e-5)


WINDOWS = {
    "a line": ((2, 7, 23), Window((3,), (2,), (2,), (1, 4)), (1,)),
    "one place in three": ((2, 7, 23), Window((3,), (2,), (1,), (1, 1)), (3,)),
    "an image": ((2, 7, 9, 8), Window((3, 2), (1, 2), (1, 1), (1, 0, 1, 0)), (1, 1)),
    "one place in four": ((2, 7, 9, 8), Window((3, 3), (1, 1), (2, 1), (0, 1, 2, 1)), (2, 2)),
}


@pytest.mark.parametrize("opset", [9, 10, 17])
@pytest.mark.parametrize("name", WINDOWS)
def test_moments_of_what_lies_under_a_kernel(name: str, opset: int) -> None:
    shape, window, every = WINDOWS[name]
    value = (np.random.default_rng(0).standard_normal(shape) + 0.5).astype(np.float32)
    width = 7 * window.size
    moments = moments_of(Tap("x", 1, len(shape), width, window=window, every=every), value, None, opset)
    # A convolution by a kernel of one 1 for each channel and place gives the rows, as torch slides it.
    kernel = torch.eye(width).reshape(width, *window.kernel, 7).movedim(-1, 1)
    count, pads = len(window.kernel), window.pads
    around = [p for i in reversed(range(count)) for p in (pads[i], pads[count + i])]
    padded = torch.nn.functional.pad(torch.from_numpy(value), around)
    slide = torch.nn.functional.conv1d if count == 1 else torch.nn.functional.conv2d
    under = slide(padded, kernel, stride=window.strides, dilation=window.dilations)
    thinned: Any = under.numpy()
    for axis, step in enumerate(every):
        thinned = np.take(thinned, range(0, thinned.shape[2 + axis], step), 2 + axis)
    rows = np.moveaxis(thinned, 1, -1).reshape(-1, width).astype(np.float64)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.T, bias=True), rtol=1e-3, atol=1e-5)


def test_places_are_thinned_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """f (float[b, 6, 30] x) => (float[b, 7, 26] y) { u = Conv(x, w1)  h = Relu(u)  y = Conv(h, w2) }"""
    _, state, _ = graphs.analyse(graphs.parse(text, {"w1": (12, 6, 3), "w2": (7, 12, 3)}))
    use, batch = state.consumers[-1], (state.symbols["b"],)
    assert (tap_for(state, use, 36, batch).every, tap_for(state, use, 36, batch).repeat) == ((1,), 26)
    monkeypatch.setattr(onnx_segments, "MOST_PLACES", 10)
    tap = tap_for(state, use, 36, batch)
    assert (tap.layout, tap.every, tap.repeat) == ("b*", (3,), 9)
    assert tap_for(state, use, 36, ()).every == (3,)


def test_samples_that_are_all_padding_are_left_out() -> None:
    mask = np.asarray([[1, 1], [0, 0], [1, 0]], bool)
    value = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    moments = moments_of(Tap("x", 2, 3, 7, "b*", 5), value, mask)
    np.testing.assert_allclose(moments.mean, value[[0, 2]].reshape(-1, 7).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("width", [8, 9, 10, 11])
def test_blocks_of_the_triangle_are_the_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    value = np.random.default_rng(0).standard_normal((3, 4, width)).astype(np.float32)
    tap = Tap("x", 2, 3, width, "bs")
    whole = moments_of(tap, value, MASK)
    monkeypatch.setattr(onnx_segments, "TRIANGLE_FROM", 8)
    blocks = moments_of(tap, value, MASK)
    assert len(tap.bounds) == onnx_segments.BLOCKS + 1
    np.testing.assert_allclose(blocks.uncentred, whole.uncentred, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(blocks.uncentred, blocks.uncentred.T)


@pytest.mark.parametrize("opset", [7, 8, 9, 10, 11])
@pytest.mark.parametrize("width", [7, 8])
def test_moments_at_old_opsets(width: int, opset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemm wanted a bias before opset 11, and Slice had its bounds as attributes before opset 10, without steps."""
    monkeypatch.setattr(onnx_segments, "TRIANGLE_FROM", 8)
    value = np.random.default_rng(0).standard_normal((3, 4, width)).astype(np.float32)
    tap = Tap("x", 2, 3, width, "bs")
    expected = value[MASK].astype(np.float64)
    moments = moments_of(tap, value, MASK, opset)
    np.testing.assert_allclose(moments.covariance, np.cov(expected.T, bias=True), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("opset", [7, 8])
def test_graphs_older_than_what_moments_need(opset: int) -> None:
    """Parts of them are run at a newer opset, in which two operators say something otherwise; the result keeps its own."""
    text = """f (float[b, 1, s, 6] x) => (float[b, 3, t, 12] y) {
        c = Conv<pads = [1, 1, 1, 1]>(x, w0)  a = Relu(c)
        d = Conv<pads = [1, 1, 1, 1]>(a, w1)  e = BatchNormalization<spatial = 1>(d, scale, offset, mean, var)
        f = Upsample<scales = [1.0, 1.0, 2.0, 2.0], mode = "nearest">(e)  g = Relu(f)  y = Conv(g, w2) }"""
    weights: graphs.Weights = {"w0": (5, 1, 3, 3), "w1": (11, 5, 3, 3), "w2": (3, 11, 1, 1)}
    normal: graphs.Weights = {
        "scale": (11,),
        "offset": (11,),
        "mean": (11,),
        "var": np.linspace(0.5, 2, 11, dtype=np.float32),
    }
    proto = graphs.parse(text, {**weights, **normal}, opset=opset)
    data = {"x": np.random.default_rng(0).standard_normal((16, 1, 5, 6)).astype(np.float32)}
    result = prune(proto, calibration=data, ffn=0.5, multiple_of=1, latency=False, provider="cpu")
    assert {o.domain: o.version for o in result.model.opset_import}[""] == opset
    assert result.report["verification"]["exact_difference"] < 1e-5
    kept = {i.name: list(i.dims) for i in result.model.graph.initializer}
    assert [3, 6, 1, 1] in kept.values() or [3, 5, 1, 1] in kept.values()


def test_half_precision_is_multiplied_in_float32() -> None:
    value = np.full((3, 4, 7), 300.0, np.float16)  # 300^2 overflows float16
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> f (float16[b, s, 7] x) => (float16[b, s, 7] y) { y = Neg(x) }'
    )
    _, state, _ = graphs.analyse(proto)
    result = run(extract(state, 0, 0, [], {}, [tap := Tap("x", 2, 3, 7)]), {"x": value})
    assert float(result[f"{tap.key}/second0"][0, 0]) == 12 * 90000.0


TAPS: dict[str, tuple[str, graphs.Weights, tuple[str, ...], tuple[str, int]]] = {
    "bs": ("h = Relu(u)  y = MatMul(h, w2)", {}, ("b", "s"), ("bs", 1)),
    "flattened": ("f = Reshape(u, flat)  h = Relu(f)  y = MatMul(h, w2)", {"flat": np.asarray([-1, 11])}, ("b", "s"), ("bs", 1)),
    "sb": ("t = Transpose<perm=[1,0,2]>(u)  h = Relu(t)  y = MatMul(h, w2)", {}, ("b", "s"), ("sb", 1)),
    "first token": ("t = Gather<axis=1>(u, k0)  h = Relu(t)  y = MatMul(h, w2)", {"k0": np.asarray(0)}, ("b", "s"), ("b", 1)),
    "images": ("h = Relu(u)  y = MatMul(h, w2)", {}, ("b",), ("b*", 7)),
    "no mask": ("h = Relu(u)  y = MatMul(h, w2)", {}, (), ("all", 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", TAPS)
def test_layout_of_a_tap(name: str) -> None:
    rest, weights, dimensions, wanted = TAPS[name]
    rank = {"flattened": "b2, 7", "first token": "b, 7"}.get(name, "b2, s2, 7")
    text = f"f (float[b, s, 6] x) => (float[{rank}] y) {{ u = MatMul(x, w1)  {rest} }}"
    if name == "images":
        text = text.replace("[b, s, 6]", "[b, 7, 6]")
    _, state, _ = graphs.analyse(graphs.parse(text, {"w1": (6, 11), "w2": (11, 7), **weights}))
    use = next(u for u in state.consumers if u.weight.name == "w2")
    tap = tap_for(state, use, 11, tuple(state.symbols[d] for d in dimensions))
    assert (tap.layout, tap.repeat) == wanted
