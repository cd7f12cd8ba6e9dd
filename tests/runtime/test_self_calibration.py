"""The dense model writes its own calibration text: the same with and without a cache, and what its distribution says."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import words
import zoo
import zoo_decoders
from zoo_decoders import VOCABULARY, Case

from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.self_calibration import TOP_P, draw, write_calibration
from liar_opt.runtime.sessions import Session
from liar_opt.runtime.signatures import InputSpec

CACHED, PLAIN = Case("llama", "torchscript", cache=True), Case("llama", "torchscript")


@functools.cache
def proto(case: Case) -> onnx.ModelProto:
    return onnx.load(zoo_decoders.ready(case).path)


def write(model: onnx.ModelProto, **options: Any) -> CalibrationData:
    given: dict[str, Any] = {"samples": 6, "sequence_length": 9, "vocabulary": VOCABULARY, **options}
    return write_calibration(
        lambda: Session(model.SerializeToString()),
        OnnxModel.from_proto(onnx.ModelProto.FromString(model.SerializeToString())).inputs(),
        **given,
    )


def windows(data: CalibrationData) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in data.batches for row in batch["input_ids"]]


def test_with_and_without_a_cache_the_text_is_the_same() -> None:
    cached, plain = write(proto(CACHED)), write(proto(PLAIN))
    assert windows(cached) == windows(plain)
    assert "through its cache" in cached.source and "running each prefix anew" in plain.source
    assert cached.tokens == plain.tokens == 54 and cached.samples == 6
    assert cached.batches[0]["past_key_values.0.key"].shape == (1, zoo_decoders.GROUPS, 0, zoo_decoders.HEAD_DIM)
    assert not cached.synthetic and cached.warnings == ()


def test_the_seed_decides() -> None:
    assert windows(write(proto(CACHED))) == windows(write(proto(CACHED)))
    assert windows(write(proto(CACHED))) != windows(write(proto(CACHED), seed=1))


def test_progress_ends_where_it_must() -> None:
    told: list[tuple[int, int]] = []
    write(proto(CACHED), samples=70, progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told) and told[-1] == (70 * 9, 70 * 9)


def test_chunks_do_not_change_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = windows(write(proto(PLAIN)))
    monkeypatch.setattr("liar_opt.runtime.self_calibration._LOGIT_BYTES", 4 * 8 * VOCABULARY * 2)
    assert windows(write(proto(PLAIN))) == whole


def test_every_token_is_one_that_the_model_expects() -> None:
    ids = np.array(sorted(windows(write(proto(PLAIN), samples=20))))
    logits = zoo.run(zoo_decoders.ready(PLAIN).path, {"input_ids": ids, "attention_mask": np.ones_like(ids)})["logits"]
    weights = np.exp(logits[:, :-1].astype(np.float64) - logits.max())
    share = weights / weights.sum(-1, keepdims=True)
    chosen = np.take_along_axis(share, ids[:, 1:, None], -1)
    above = np.where(share > chosen, share, 0.0).sum(-1)
    assert (above < TOP_P).all()
    assert len(set(ids[:, 0].tolist())) > 10  # first tokens are drawn over the whole vocabulary


def test_draw_follows_the_probabilities_within_the_nucleus() -> None:
    shares = np.array([0.04, 0.5, 0.3, 0.16])
    scores = np.repeat(np.log(shares)[None], 4000, axis=0).astype(np.float32)
    found = np.bincount(draw(scores, np.random.default_rng(0).random(4000)), minlength=4) / 4000
    assert found[0] == 0  # the others hold 96 %
    assert found[1:] == pytest.approx(shares[1:] / 0.96, abs=0.03)


def test_a_graph_of_static_axes_writes_as_well() -> None:
    static = onnx.ModelProto()
    static.CopyFrom(proto(PLAIN))
    for value in static.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, (4, 9), strict=True):
            dim.dim_value = size
    data = write(static)
    assert {batch["input_ids"].shape for batch in data.batches} == {(4, 9)}
    assert data.tokens == 54
    masked = [(batch, mask) for batch, mask in zip(data.batches, data.row_masks, strict=True)]
    kept = [
        row.tolist() for batch, mask in masked for row, real in zip(batch["input_ids"], _rows(mask), strict=True) if real
    ]
    dynamic = windows(write(proto(PLAIN)))
    assert sorted(map(tuple, kept))[:1] and len(kept) == len(dynamic)


def _rows(mask: Any) -> list[bool]:
    return [bool(row.any()) for row in mask]


def test_the_tokenizer_says_how_texts_begin(tmp_path: Path) -> None:
    begun = words.save_tokenizer(tmp_path / "begun")
    assert {window[0] for window in windows(write(proto(CACHED), tokenizer=begun))} == {words.CLS}
    plain = words.plain_tokenizer(tmp_path / "plain")
    first = [window[0] for window in windows(write(proto(CACHED), tokenizer=plain, samples=40, sequence_length=2))]
    assert len(set(first)) > 5 and max(first) < len(words.SPECIALS) + len(set(words.WORDS))


def test_what_cannot_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="positions for 41"):
        write(proto(PLAIN), sequence_length=42, positions=41)
    with pytest.raises(OptionError, match="at least 2"):
        write(proto(PLAIN), sequence_length=1)
    with pytest.raises(OptionError, match="vocabulary; pass --tokenizer"):
        write(proto(PLAIN), vocabulary=None)
    for refused, *specs in (
        ("needs a decoder", ("input_ids", ("b", "s"), "int64"), ("decoder_input_ids", ("b", "t"), "int64")),
        ("needs a decoder", ("pixel_values", ("b", 3, 5, 7), "float32")),
        (
            "cannot fill .*'encoder_hidden_states'",
            ("input_ids", ("b", "s"), "int64"),
            ("encoder_hidden_states", ("b", "e", 5), "float32"),
        ),
    ):
        inputs = [InputSpec(name, np.dtype(kind), shape) for name, shape, kind in specs]
        with pytest.raises(OptionError, match=refused):
            write_calibration(lambda: pytest.fail("was loaded"), inputs, vocabulary=9)
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (int64[b, s] input_ids) => (float[b, s] y) { y = Cast <to = 1>(input_ids) }"""
    with pytest.raises(OptionError, match="needs logits"):
        write(onnx.parser.parse_model(text))
