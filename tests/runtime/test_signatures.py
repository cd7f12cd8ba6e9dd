from typing import Any

import numpy as np
import pytest

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.signatures import InputSpec, Signature, told_by_runtime


def spec(name: str, shape: tuple[int | str | None, ...] = ("b", "s"), dtype: str = "int64") -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape)


def read(*specs: InputSpec) -> Signature:
    return Signature.read(specs, None)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "role"),
    [
        ("past_key_values.0.key", ("b", 3, "p", 8), "float16", "past"),
        ("past_key_values.0.decoder.value", ("b", 3, "p", 8), "float32", "past"),
        ("past_key_values.0.encoder.value", ("b", 3, "e", 8), "float32", None),
        ("past_0", (2, "b", 3, "p", 8), "float32", "past"),
        ("past_key_self_1", ("b", 3, "p", 8), "float32", "past"),
        ("past_key_cross_1", ("b", 3, "e", 8), "float32", None),
        ("k_cache", ("b", "p", 3, 8), "float32", "past"),
        ("cache.layers.0.key", ("b", 3, "p", 8), "float32", "past"),
        ("seqlens_k", ("b",), "int32", "lengths"),
        ("total_sequence_length", (), "int32", "total"),
        ("cache_position", ("s",), "int64", "cache_position"),
        ("decoder_input_ids", ("b", "t"), "int64", "decoder_ids"),
        ("decoder_attention_mask", ("b", "t"), "int64", "decoder_mask"),
        ("use_cache_branch", (1,), "bool", "branch"),
        ("position_ids", ("b", "s"), "int64", "position"),
        ("pixel_values", ("b", 3, 8, 8), "float32", None),
    ],
)
def test_roles(name: str, shape: tuple[int | str | None, ...], dtype: str, role: str | None) -> None:
    assert read(spec("input_ids"), spec(name, shape, dtype)).roles.get(name) == role


def test_a_decoder_of_its_own_reads_its_decoder_ids() -> None:
    signature = read(spec("decoder_input_ids"), spec("encoder_hidden_states", ("b", "e", 5), "float32"))
    assert signature.ids == "decoder_input_ids"


def test_feed_behind_a_cache_goes_on_where_it_ends() -> None:
    signature = read(
        spec("input_ids"),
        spec("attention_mask", ("b", "t")),
        spec("position_ids"),
        spec("past.0.key", ("b", 3, "p", 8), "float32"),
        spec("seqlens_k", ("b", 1), "int32"),
        spec("total_sequence_length", (), "int32"),
        spec("cache_position", ("s",)),
    )
    feed = signature.feed(np.array([[7], [9]]), np.ones((2, 1), np.bool_), cached=4)
    assert "past.0.key" not in feed
    assert feed["attention_mask"].tolist() == [[1] * 5] * 2
    assert feed["position_ids"].tolist() == [[4], [4]]
    assert feed["seqlens_k"].tolist() == [[4], [4]] and feed["seqlens_k"].dtype == np.int32
    assert feed["total_sequence_length"] == 5 and feed["cache_position"].tolist() == [4]
    start = signature.feed(np.array([[7, 8]]), np.ones((1, 2), np.bool_))
    assert start["past.0.key"].shape == (1, 3, 0, 8)
    assert start["seqlens_k"].tolist() == [[1]] and start["total_sequence_length"] == 2


def test_a_cache_of_fixed_length_is_zeros_behind_the_mask() -> None:
    signature = read(spec("input_ids", (2, 4)), spec("attention_mask", (2, 9)), spec("past.0.key", (2, 3, 5, 8), "float32"))
    assert signature.seen == 5 and signature.length() == 4
    feed = signature.feed(np.ones((2, 4), np.int64), np.array([[True] * 4, [True, True, False, False]]))
    assert feed["past.0.key"].shape == (2, 3, 5, 8) and not feed["past.0.key"].any()
    assert feed["attention_mask"].tolist() == [[0] * 5 + [1] * 4, [0] * 5 + [1, 1, 0, 0]]


def test_a_cache_with_the_batch_second() -> None:
    signature = read(spec("input_ids"), spec("past_0", (2, "b", 3, "p", 8), "float32"))
    assert signature.feed(np.ones((4, 6), np.int64), np.ones((4, 6), np.bool_))["past_0"].shape == (2, 4, 3, 0, 8)
    assert signature.batch is None and "past_0" not in signature.shared


def test_an_input_of_a_fixed_size_beside_any_number_of_samples_is_the_same_for_all() -> None:
    inputs = spec("input"), spec("input_lengths", ("b",))
    assert read(*inputs, spec("scales", (3,), "float32")).shared == {"scales"}
    assert read(spec("x", (3, 4), "float32"), spec("z", (3,), "float32")).shared == set()


def test_an_encoder_decoder_writes_the_text_behind_a_start() -> None:
    signature = read(spec("input_ids"), spec("decoder_input_ids", ("b", "t")), spec("decoder_attention_mask", ("b", "t")))
    ids, real = np.array([[5, 6, 7], [8, 9, 1]]), np.array([[True] * 3, [True, True, False]])
    feed = signature.feed(ids, real, pad=1)
    assert feed["decoder_input_ids"].tolist() == [[1, 5, 6], [1, 8, 9]]
    assert feed["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_two_static_lengths_are_refused() -> None:
    signature = read(spec("input_ids", ("b", 5)), spec("attention_mask", ("b", 6)))
    with pytest.raises(OptionError, match="different static lengths"):
        signature.length()


@pytest.mark.parametrize("left", [False, True])
def test_positions_count_from_the_first_real_token(left: bool) -> None:
    signature = read(spec("input_ids"), spec("position_ids"))
    real: Any = np.array([[True, True, True], [False, False, True] if left else [True, False, False]])
    positions = signature.feed(np.ones((2, 3), np.int64), real)["position_ids"]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0] if left else [0, 1, 2]]


def test_a_merged_decoder_runs_without_its_cache() -> None:
    signature = read(
        spec("input_ids"), spec("past.0.key", ("b", 3, "p", 8), "float32"), spec("use_cache_branch", (1,), "bool")
    )
    feed = signature.feed(np.array([[7, 8], [9, 3]]), np.ones((2, 2), np.bool_))
    assert feed["use_cache_branch"].tolist() == [False]
    assert feed["use_cache_branch"].dtype == np.bool_
    assert feed["past.0.key"].shape == (2, 3, 0, 8)


def test_what_onnx_runtime_says_without_where_in_its_source() -> None:
    said = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape node. Name:'/m/r' Status "
        "Message: /onnxruntime_src/onnxruntime/core/providers/cpu/tensor/reshape_helper.h:91 "
        "onnxruntime::ReshapeHelper::ReshapeHelper(const onnxruntime::TensorShape&, bool) input_shape_size == "
        "requested_shape_size was false. Input shape:{2,16}\n"
    )
    told = told_by_runtime(RuntimeError(said))
    assert told.endswith("Name:'/m/r' input_shape_size == requested_shape_size was false. Input shape:{2,16}")
    assert told_by_runtime(RuntimeError("indices element out of data bounds")) == "indices element out of data bounds"
