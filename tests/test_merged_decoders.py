"""Merged decoders end to end: both branches of the pruned model give what the masked original gives, and can write.

The reference is the original laid out flat, written to a file and masked there, without the code that cuts or folds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import oracle
import pytest
import words
import zoo_decoders
import zoo_merged

import liar_opt
from liar_opt.frontend.onnx_model import CACHE_SHAPES, OnnxModel
from liar_opt.frontend.onnx_segments import plan_segments
from liar_opt.passes.sweep import cut_arrays
from liar_opt.runtime.compare import TOLERANCES
from liar_opt.runtime.errors import CheckError
from liar_opt.tools.cli import main

NAMES = ("bart", "t5", "gpt2")
GROUPS = {"bart": {"ffn": 2, "heads": 4}, "t5": {"ffn": 2, "heads": 4}, "gpt2": {"ffn": 2, "heads": 2}}
PAST = 4
Feeds = dict[str, np.ndarray]


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: ort.InferenceSession, feeds: Feeds, cached: bool) -> Feeds:
    """Runs one branch of a merged decoder; caches that are not given are empty."""
    batch = len(feeds["input_ids"])
    whole = {zoo_merged.CONDITION: np.asarray([cached])}
    for value in model.get_inputs():
        if value.name.startswith("past"):
            whole[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
    names = [o.name for o in model.get_outputs()]
    given = {k: v for k, v in feeds.items() if k in {i.name for i in model.get_inputs()}}
    whole = in_types(model, whole | given)
    return dict(zip(names, model.run(None, whole), strict=True))


def in_types(model: ort.InferenceSession, feeds: Feeds) -> Feeds:
    """Returns the float32 among the feeds as float16 where the model takes that."""
    half = {v.name for v in model.get_inputs() if v.type == "tensor(float16)"}
    return {name: value.astype(np.float16) if name in half else value for name, value in feeds.items()}


def past_of(outputs: Feeds, only: str = "") -> Feeds:
    return {k.replace("present", "past_key_values"): v for k, v in outputs.items() if k.startswith("present") and only in k}


def masked(path: Path, found: Any, kept: oracle.Kept, folder: Path) -> onnx.ModelProto:
    """Returns the flat original with the removed channels multiplied by zero."""
    stored = OnnxModel.load(path).stored
    assert stored is not None
    flat = folder / "flat.onnx"
    onnx.save(onnx.ModelProto.FromString(stored.proto.SerializeToString()), flat)
    proto = onnx.load(flat, load_external_data=False)
    for tensor in proto.graph.initializer:
        if tensor.name in stored.arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(stored.arrays[tensor.name]), tensor.name))
    onnx.save(proto, flat)
    return oracle.masked(flat, found, kept)


def drawn_caches(model: ort.InferenceSession, batch: int, seed: int) -> Feeds:
    """Caches of decoders, of tokens that were never written."""
    rng = np.random.default_rng(seed)
    inputs = [v for v in model.get_inputs() if v.name.startswith("past") and "encoder" not in v.name.replace("decoder", "")]
    return {v.name: rng.standard_normal((batch, v.shape[1], PAST, v.shape[3])).astype(np.float32) for v in inputs}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_branch_equals_the_masked_original(name: str, half: bool, tmp_path: Path) -> None:
    path = zoo_merged.half_ends(name) if half else zoo_merged.ready(name)
    tolerance = TOLERANCES["float16" if half else "float32"]
    model, state, found = oracle.analyse(path)
    assert {kind: sum(g.kind == kind for g in found.groups) for kind in ("ffn", "heads")} == GROUPS[name]
    assert all(len(c.uses) == 2 for g in found.groups for c in g.consumers)
    assert not plan_segments(state, found.groups)[0]  # no group spans layers, whatever bias they share
    kept = oracle.random_kept(found.groups, 1)
    reference = masked(path, found, kept, tmp_path)
    proto, ends = oracle.prune_with_ends(model, state, found, kept)
    onnx.checker.check_model(proto)
    original, pruned = session(onnx.load(path)), session(proto)
    feeds = zoo_merged.feeds_of(name, PAST)
    past = in_types(original, drawn_caches(original, len(feeds["input_ids"]), 3))
    empty = {k: v[:, :, :0] for k, v in past.items()}
    # A mask covers what is in the cache, too, of which the branch without one knows nothing.
    fresh = zoo_merged.feeds_of(name, None)
    wanted, cached = (named(reference, in_types(original, given), ends) for given in (fresh | empty, feeds | past))
    outputs = run(pruned, fresh, cached=False)
    for output, value in outputs.items():
        assert oracle.difference([value], [wanted[output]]) <= tolerance, output
    handed = past_of(outputs, "encoder")
    for output, value in run(pruned, feeds | cut_arrays(past, ends) | handed, cached=True).items():
        if f"with_past/{output}" in cached:
            assert oracle.difference([value], [cached[f"with_past/{output}"]]) <= tolerance, output
    dense = run(original, fresh, cached=False)["logits"]
    assert oracle.difference([dense], [wanted["logits"]]) > 2 * tolerance


def named(proto: onnx.ModelProto, feeds: Feeds, ends: oracle.Ends) -> Feeds:
    """Returns the outputs of the flat original, as far as the cut graph has them."""
    return cut_arrays(dict(zip([o.name for o in proto.graph.output], oracle.run(proto, feeds), strict=True)), ends)


@pytest.mark.parametrize("name", NAMES)
def test_generation_through_both_branches(name: str) -> None:
    """A token at a time through the cache gives what the branch without a cache gives for the whole."""
    result = liar_opt.prune(
        zoo_merged.ready(name), ffn=0.5, heads=0.5, multiple_of=2, samples=8, sequence_length=12, latency=False
    )
    model = session(result.model)
    feeds = zoo_merged.feeds_of(name, None)
    outputs = run(model, feeds, cached=False)
    ids, written = feeds["input_ids"], []
    handed = past_of(outputs)
    for _ in range(5):
        new = outputs["logits"][:, -1:].argmax(-1)
        written.append(new)
        ids = np.concatenate([ids, new], axis=1)
        step = feeds | {"input_ids": new, **handed}
        if "attention_mask" in feeds:
            step["attention_mask"] = np.ones_like(ids)
        outputs = run(model, step, cached=True)
        # What the branch does not give it was given, and is kept.
        handed |= {k: v for k, v in past_of(outputs).items() if v.size}
        whole = feeds | {"input_ids": ids}
        if "attention_mask" in feeds:
            whole["attention_mask"] = np.ones_like(ids)
        plain = run(model, whole, cached=False)["logits"][:, -1:]
        assert oracle.difference([outputs["logits"]], [plain]) <= TOLERANCES["float32"]


def test_the_interface_is_kept_and_says_the_caches(tmp_path: Path) -> None:
    path = zoo_merged.ready("bart")
    before = onnx.load(path)
    result = liar_opt.prune(path, ffn=0.5, heads=0.5, multiple_of=2, samples=8, sequence_length=12, latency=False)
    after = onnx.load(result.save(tmp_path / "out.onnx"))
    assert after.SerializeToString() == result.model.SerializeToString()
    for ends in ("input", "output"):
        assert [v.name for v in getattr(before.graph, ends)] == [v.name for v in getattr(after.graph, ends)]
    shapes = {
        v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim]
        for v in [*after.graph.input, *after.graph.output]
    }
    caches = {name: shape for name, shape in shapes.items() if name.startswith(("past", "present"))}
    assert {shape[1] for shape in caches.values()} == {zoo_decoders.HEADS // 2}
    assert result.report["cache_shapes"] == caches
    assert {p.key: json.loads(p.value) for p in after.metadata_props} == {CACHE_SHAPES: caches}
    (choice,) = after.graph.node
    assert choice.input[0] == zoo_merged.CONDITION
    bodies = {a.name: a.g for a in choice.attribute}
    (old,) = before.graph.node
    for attribute in old.attribute:
        body = bodies[attribute.name]
        assert [v.name for v in body.output] == [v.name for v in attribute.g.output]
        assert body.output[1].type.tensor_type.shape.dim[1].dim_value == zoo_decoders.HEADS // 2
        products = {n.name for n in attribute.g.node if n.op_type == "MatMul"}
        assert products <= {n.name for n in body.node}
    constants = {n.output[0]: n.attribute[0].t.dims for n in bodies["then_branch"].node if n.op_type == "Constant"}
    assert all(list(dims) == [0, zoo_decoders.HEADS // 2, 1, zoo_decoders.HEAD_DIM] for dims in constants.values())
    assert len(constants) == 2 * zoo_decoders.LAYERS
    assert result.report["verification"]["folded_difference"] <= TOLERANCES["float32"]
    large = {t.name: list(t.dims) for t in after.graph.initializer if len(t.dims) == 2}
    assert [zoo_decoders.HIDDEN, (zoo_decoders.FFN + 8) // 2] in large.values()


def test_a_second_run_on_the_result(tmp_path: Path) -> None:
    first = liar_opt.prune(
        zoo_merged.ready("bart"), ffn=0.5, heads=0.5, multiple_of=2, samples=8, sequence_length=12, latency=False
    )
    again = liar_opt.prune(first.model, ffn=0.5, multiple_of=2, samples=8, sequence_length=12, latency=False)
    assert {(g["kind"], g["before"]) for g in again.report["groups"]} == {("ffn", 26), ("heads", 3)}
    assert again.report["after"]["parameters"] < first.report["after"]["parameters"]
    assert [v.name for v in again.model.graph.input] == [v.name for v in first.model.graph.input]


def test_what_is_given_as_for_a_decoder_that_is_not_merged() -> None:
    """Token ids, states of the encoder and its mask; the condition may be there, too."""
    feeds = zoo_merged.feeds_of("bart", None, batch=12)
    feeds[zoo_merged.CONDITION] = np.asarray([False])
    result = liar_opt.prune(zoo_merged.ready("bart"), feeds, ffn=0.5, multiple_of=2, batch_size=4, latency=False)
    assert result.report["calibration"]["samples"] == 12
    outputs = result.report["verification"]["outputs"]
    # With nothing in the cache both branches compute one thing.
    assert outputs["logits"]["relative_rms"] == pytest.approx(outputs["with_past/logits"]["relative_rms"], rel=1e-4)


def test_a_decoder_writes_its_own_text() -> None:
    result = liar_opt.prune(
        zoo_merged.ready("gpt2"), "self", ffn=0.5, multiple_of=2, samples=6, sequence_length=8, latency=False
    )
    assert "written by the model itself" in result.report["calibration"]["source"]


@pytest.mark.parametrize("more", [{"sparsity": 0.4}, {"max_drop": 0.2}, {"repair": "residual", "ffn": 0.5}])
def test_other_ways_to_say_how_much(more: dict[str, Any]) -> None:
    result = liar_opt.prune(
        zoo_merged.ready("bart"), multiple_of=2, samples=16, batch_size=4, sequence_length=12, latency=False, **more
    )
    assert result.report["after"]["parameters"] < result.report["before"]["parameters"]


def test_a_metric_gets_a_merged_decoder() -> None:
    seen = []

    def metric(proto: onnx.ModelProto) -> float:
        seen.append([n.op_type for n in proto.graph.node])
        return 1.0

    liar_opt.prune(
        zoo_merged.ready("bart"), max_drop=0.1, metric=metric, multiple_of=2, samples=8, sequence_length=12, latency=False
    )
    assert len(seen) > 1
    assert all(operators == ["If"] for operators in seen)


def test_perplexity_of_both(tmp_path: Path) -> None:
    path, out, report = zoo_merged.ready("gpt2"), tmp_path / "out.onnx", tmp_path / "r.json"
    liar_opt.prune(path, ffn=0.5, multiple_of=2, samples=8, sequence_length=12, latency=False).save(out)
    (tmp_path / "set.txt").write_text("\n".join(["the cat sat on a mat and rain fell over london"] * 20))
    data = ["--data", str(tmp_path / "set.txt"), "--tokenizer", str(words.plain_tokenizer(tmp_path / "tokenizer"))]
    common = ["--task", "perplexity", *data, "--window", "16", "--resamples", "50", "--report", str(report)]
    assert main(["eval", str(path), str(out), *common]) == 0
    (found,) = json.loads(report.read_text(encoding="utf-8"))["metrics"].values()
    assert found["values"][0] != found["values"][1]
    assert np.isfinite(found["values"]).all()


def test_a_folded_model_that_differs_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from liar_opt.frontend.merged_decoder import MergedDecoder

    fold = MergedDecoder.fold

    def wrong(self: MergedDecoder, flat: onnx.ModelProto, resized: Any) -> onnx.ModelProto:
        result = fold(self, flat, resized)
        body = next(a.g for a in result.graph.node[-1].attribute if a.name == "then_branch")
        scale = next(
            t for t in body.initializer if t.data_type == onnx.TensorProto.FLOAT and onnx.numpy_helper.to_array(t).size == 1
        )
        scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
        return result

    monkeypatch.setattr(MergedDecoder, "fold", wrong)
    with pytest.raises(CheckError, match="then_branch against the flat graph"):
        liar_opt.prune(zoo_merged.ready("bart"), ffn=0.5, multiple_of=2, samples=8, sequence_length=12, latency=False)


def test_the_command_with_external_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decoder_model_merged.onnx"
    onnx.save(onnx.load(zoo_merged.ready("bart")), path, save_as_external_data=True, location="weights", size_threshold=64)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert main(["inspect", str(path)]) == 0
    assert "out_proj" in capsys.readouterr().out
    out, report = tmp_path / "out.onnx", tmp_path / "r.json"
    chosen = "--ffn 0.5 --heads 0.5 --multiple-of 2 --samples 8 --sequence-length 12 --quiet".split()
    common = [str(path), "-o", str(out), *chosen]
    assert main([*common, "--report", str(report)]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    plain = out.read_bytes()
    assert json.loads(report.read_text(encoding="utf-8"))["cache_shapes"]["present.0.encoder.key"][1] == 3
    assert main([*common, "--force", "--memory", "3GB", "--resume", "--no-latency"]) == 0
    first, second = session(onnx.load_from_string(plain)), session(onnx.load(out))
    feeds = zoo_merged.feeds_of("bart", None)
    one, other = (run(model, feeds, cached=False)["logits"] for model in (first, second))
    assert oracle.difference([one], [other]) <= TOLERANCES["float32"]
    assert {p.name for p in tmp_path.iterdir()} == {*before, "out.onnx", "r.json"}
