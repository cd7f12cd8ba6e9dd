"""ONNX Runtime sessions: arrays in, device values on, CUDA where there is one."""

from __future__ import annotations

import gc

import graphs
import numpy as np
import pytest

from liar_opt.frontend.weight_files import lightened
from liar_opt.runtime.errors import InternalError, OptionError
from liar_opt.runtime.sessions import Session, as_array, cuda_works, element_type, resolve_provider, tensors_within

PROTO = graphs.parse("f (float[a, b] x, float z) => (float[a, b] y, float[b, a] t) { y = Mul(x, z)  t = Transpose(y) }")


def session(device: str = "cpu") -> Session:
    return Session(PROTO.SerializeToString(), "cuda" if device == "cuda" else "cpu")


def test_arrays_in_and_out() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = session().run({"x": x, "z": np.asarray(2, np.float32), "unused": x}, arrays=True)
    np.testing.assert_array_equal(result["y"], 2 * x)
    np.testing.assert_array_equal(result["t"], 2 * x.T)
    assert list(session().run({"x": x, "z": np.asarray(2, np.float32)}, outputs=["t"], arrays=True)) == ["t"]


def test_values_can_be_fed_again() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    own = session()
    first = own.run({"x": x, "z": np.asarray(3, np.float32)})
    second = own.run({"x": first["y"], "z": np.asarray(5, np.float32)}, arrays=True)
    np.testing.assert_array_equal(second["y"], 15 * x)
    assert element_type(first["y"]) == element_type(x) == 1
    np.testing.assert_array_equal(as_array(first["y"]), 3 * x)


def test_what_is_kept_of_a_run_keeps_nothing_else() -> None:
    """ONNX Runtime's values hold all outputs of their run."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    mixed = session().run({"x": x, "z": np.asarray(3, np.float32)}, arrays=["t"])
    assert all(isinstance(v, np.ndarray) for v in mixed.values())
    assert not any(isinstance(v, np.ndarray) for v in session().run({"x": x, "z": np.asarray(3, np.float32)}).values())


@pytest.mark.parametrize("seed", range(20))
def test_arrays_that_are_not_contiguous_live_until_the_run(seed: int) -> None:
    """The copy that makes them contiguous must not be freed before ONNX Runtime reads it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((700, 300)).astype(np.float32)
    own = session()
    gc.collect()
    result = own.run({"x": x.T, "z": np.asarray(1.0 + seed, np.float32)}, arrays=True)
    np.testing.assert_array_equal(result["y"], x.T * np.float32(1.0 + seed))


def test_a_lean_session_uses_weights_where_they_lie() -> None:
    """They are no initializers, which ONNX Runtime would copy: what is written to them is seen."""
    proto = graphs.parse("f (float[a, 40] x) => (float[a, 50] y) { y = MatMul(x, w) }", {"w": (40, 50)})
    light, weights = lightened(proto)
    weight = np.array(weights["w"])
    own = Session(light.SerializeToString(), "cpu", {"w": weight}, low_memory=True)
    assert own.inputs == ["x"]
    x = np.random.default_rng(0).standard_normal((7, 40)).astype(np.float32)
    np.testing.assert_allclose(own.run({"x": x}, arrays=True)["y"], x @ weight, rtol=1e-5, atol=1e-5)
    weight *= 2
    np.testing.assert_allclose(own.run({"x": x}, arrays=True)["y"], x @ weight, rtol=1e-5, atol=1e-5)


def test_a_missing_feed_is_a_bug() -> None:
    with pytest.raises(InternalError, match="input 'z'"):
        session().run({"x": np.zeros((2, 3), np.float32)})


def test_providers() -> None:
    assert resolve_provider("cpu") == "cpu"
    assert resolve_provider("auto") == ("cuda" if cuda_works() else "cpu")
    with pytest.raises(OptionError, match="provider 'tpu' is unknown"):
        resolve_provider("tpu")


@pytest.mark.skipif(cuda_works(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(OptionError, match="needs a CUDA device"):
        resolve_provider("cuda")


@pytest.mark.skipif(not cuda_works(), reason="no CUDA device")
def test_cuda_keeps_values_on_the_device() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    own = session("cuda")
    first = own.run({"x": x, "z": np.asarray(3, np.float32)})
    assert first["y"].device_name() == "cuda"
    second = own.run({"x": first["y"], "z": np.asarray(5, np.float32)}, arrays=True)
    np.testing.assert_allclose(second["y"], 15 * x)
    assert own.run({"x": x, "z": np.asarray(1, np.float32)}, arrays=True)["t"].shape == (3, 2)


def test_the_parts_of_what_is_no_tensor() -> None:
    one, two = np.ones(2), np.zeros(3)
    assert list(tensors_within("all", [one, [two]])) == ["all[0]", "all[1][0]"]
    found = tensors_within("scores", [{"yes": 0.25, "no": 0.75}, {"yes": 0.5, "no": 0.5}])
    np.testing.assert_array_equal(found["scores[yes]"], [0.25, 0.5])
    np.testing.assert_array_equal(found["scores[no]"], [0.75, 0.5])
    assert tensors_within("map", {3: "text"})["map[3]"] == "text"
    assert tensors_within("empty", []) == tensors_within("nothing", None) == {}
