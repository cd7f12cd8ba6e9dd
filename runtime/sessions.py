"""ONNX Runtime sessions for calibration: the same code on CPU and CUDA, activations kept on the device.

A :class:`Session` runs a model given as bytes or as a file. Inputs are numpy arrays or what an earlier run returned;
outputs stay where they were computed unless they are asked for as arrays.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from liar_opt.runtime import ranks
from liar_opt.runtime.errors import InternalError, OptionError
from liar_opt.runtime.extras import onnx_runtime

Provider = Literal["auto", "cpu", "cuda"]
Level = Literal["none", "all"]
"""How far ONNX Runtime's optimizer goes."""
PROVIDERS: tuple[Provider, ...] = ("auto", "cpu", "cuda")
EXACT = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
"""How CUDA computes what is measured: products of float32 keep its mantissa (by default they have ten bits of it), and
convolutions are not searched anew for every length of a batch."""


@functools.cache
def cuda_works() -> bool:
    """Returns whether ONNX Runtime can make a session on a CUDA device of this machine."""
    import onnx

    onnxruntime = onnx_runtime()

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return False
    _load_libraries()
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "probe", ends[:1], ends[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
    except Exception:  # what ONNX Runtime raises for a missing driver is not specified
        return False
    return "CUDAExecutionProvider" in session.get_providers()


def resolve_provider(provider: str) -> Literal["cpu", "cuda"]:
    """Returns the device that ``provider`` means on this machine.

    Raises:
        OptionError: unknown, or "cuda" where ONNX Runtime has no working CUDA device.
    """
    if provider not in PROVIDERS:
        raise OptionError(f"provider '{provider}' is unknown; choose one of {', '.join(PROVIDERS)}")
    if provider == "auto":
        onnxruntime = onnx_runtime()

        # The probe loads CUDA libraries, which is slow where there is no device at all.
        return "cuda" if _device_present() and onnxruntime.get_device() == "GPU" and cuda_works() else "cpu"
    if provider == "cuda" and not cuda_works():
        raise OptionError(
            "provider 'cuda' needs a CUDA device, its driver and the libraries of onnxruntime-gpu; use provider 'cpu'"
        )
    return "cuda" if provider == "cuda" else "cpu"


def _load_libraries() -> None:
    """Loads CUDA's libraries from where torch's packages bring them: ONNX Runtime looks in the system's folders alone."""
    onnxruntime = onnx_runtime()

    load = getattr(onnxruntime, "preload_dlls", None)  # since 1.21
    if load is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it misses; the session that follows tells
            load()


def device_unused(device: str) -> bool:
    """Returns whether the CPU is used for want of libraries: there is a CUDA device, and ONNX Runtime was built for one."""
    onnxruntime = onnx_runtime()

    return device == "cpu" and _device_present() and onnxruntime.get_device() == "GPU" and not cuda_works()


def _device_present() -> bool:
    return any(
        Path(p).exists()
        for p in ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia", "C:/Windows/System32/nvcuda.dll")
    )


_libraries: tuple[Path, ...] = ()


@contextlib.contextmanager
def custom_operators(libraries: Collection[str | Path]) -> Iterator[None]:
    """Every session that is made within the block, in any thread, knows the operators of these libraries besides.

    Args:
        libraries: shared libraries that export ``RegisterCustomOps``. They run code in this process.

    Raises:
        OptionError: one is missing, or is no library of operators for this ONNX Runtime.
    """
    onnxruntime = onnx_runtime()

    global _libraries
    paths = tuple(Path(library).resolve() for library in libraries)
    for path in paths:
        if not path.is_file():
            raise OptionError(f"library '{path}' of custom operators is no file; give --custom-ops the path of a library")
        try:
            onnxruntime.SessionOptions().register_custom_ops_library(str(path))
        except Exception as err:  # of ONNX Runtime: a class of its own for each release
            raise OptionError(
                f"library '{path}' of custom operators cannot be loaded ({' '.join(str(err).split())[:300]}); give "
                "--custom-ops one that was built for this ONNX Runtime and this machine"
            ) from err
    before, _libraries = _libraries, tuple(dict.fromkeys((*_libraries, *paths)))  # one given twice would clash
    try:
        yield
    finally:
        _libraries = before


def operator_libraries() -> tuple[str, ...]:
    """Returns the libraries that are in use: a process that loads models by itself needs them, too."""
    return tuple(map(str, _libraries))


def unknown_operators(operators: Iterable[tuple[str, str]]) -> list[str]:
    """Returns which of some operators, (domain, name), this ONNX Runtime lacks, as ``domain::name``.

    What libraries of custom operators bring cannot be listed: where there is one, no operator is unknown.
    """
    onnxruntime = onnx_runtime()

    domains = {name: "" if name == "ai.onnx" else name for name, _ in operators}
    schemas = onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema() if not _libraries else ()
    known = {(schema.domain, schema.name) for schema in schemas}
    found = ((domains[domain], name) for domain, name in dict.fromkeys(operators))
    return [f"{domain}::{name}" if domain else name for domain, name in found if known and (domain, name) not in known]


def refusal_of(model: bytes) -> str | None:
    """Returns what ONNX Runtime says against a light model, on one line; None where it takes it. It needs no weights."""
    try:
        _plain_session(_with_inputs(model, None))
    except Exception as err:  # of ONNX Runtime: a class of its own for each release
        return " ".join(str(err).split())[:300]
    return None


def _plain_session(model: bytes) -> None:
    onnxruntime = onnx_runtime()

    onnxruntime.set_default_logger_severity(4)
    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _options() -> Any:
    """Returns the options of a session, with the libraries of custom operators; nothing is logged."""
    onnxruntime = onnx_runtime()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for library in _libraries:
        options.register_custom_ops_library(str(library))
    return options


class Runner(Protocol):
    """A whole model, loaded.

    Attributes:
        inputs: names of its inputs.
        outputs: names of its outputs.
    """

    inputs: list[str]
    outputs: list[str]

    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None, arrays: bool | Sequence[str] = False
    ) -> dict[str, Any]:
        """Runs it; arguments and result as of ``Session.run``."""
        ...

    def as_deployed(self) -> Runner:
        """Returns one of the same model that is as fast as those that users make: what latency is measured on."""
        ...


class Session:
    """One model, loaded in ONNX Runtime.

    Args:
        model: the model as bytes, or its file.
        device: where it runs.
        weights: data of the initializers that the model names as external.
        low_memory: whether the weights are used where they lie: on the CPU they become inputs of the graph, since
            initializers are copied, all at once, while a session is made. Otherwise ONNX Runtime packs them, which is a
            little faster, and folds what it can.
        exact: whether CUDA computes as `EXACT` says; otherwise as ONNX Runtime does for those who do not ask.
        level: how far ONNX Runtime's optimizer goes; None leaves it to ``low_memory`` and, else, to ONNX Runtime ("all").
    """

    def __init__(
        self,
        model: bytes | Path,
        device: Literal["cpu", "cuda"] = "cpu",
        weights: Mapping[str, NDArray[Any]] | None = None,
        low_memory: bool = False,
        exact: bool = True,
        level: Level | None = None,
    ) -> None:
        onnxruntime = onnx_runtime()

        self._made: tuple[Any, ...] = (model, device, weights, low_memory) if device == "cuda" else ()

        onnxruntime.set_default_logger_severity(4)
        options = _options()
        # Sessions run in turns, with numpy between them. The threads of one that has run would wait for its next run by
        # spinning, on the cores that the others want: 60 parts of SmolLM2 took three times as long on two cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if (share := ranks.threads()) is not None:
            options.intra_op_num_threads = share
        self._weights = {k: np.require(v, requirements=["C", "ALIGNED"]) for k, v in (weights or {}).items()}
        values = {name: _ort_value(v) for name, v in self._weights.items()}
        self._fed = values if low_memory and device == "cpu" else {}
        if self._fed:
            model = _with_inputs(model, self._fed.keys())
        elif values:
            options.add_external_initializers(list(values), list(values.values()))
        if low_memory:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.enable_cpu_mem_arena = False
        if level is not None:
            levels = onnxruntime.GraphOptimizationLevel
            options.graph_optimization_level = {"none": levels.ORT_DISABLE_ALL, "all": levels.ORT_ENABLE_ALL}[level]
            options.add_session_config_entry("session.disable_prepacking", "1")  # it is run a few times only
        cuda = [("CUDAExecutionProvider", EXACT if exact else {})] if device == "cuda" else []
        self.device = device
        self._session: Any = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[*cuda, "CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding"] if low_memory else None,
            **({} if cuda else {"enable_fallback": 0}),  # to the CPU again, and a banner on stdout
        )
        self.inputs = [i.name for i in self._session.get_inputs() if i.name not in self._fed]
        self.outputs = [o.name for o in self._session.get_outputs()]

    def as_deployed(self) -> Session:
        """Returns a session of the same model that is as fast as those that users make: what latency is measured on."""
        if self.device == "cpu":
            return self
        model, device, weights, low_memory = self._made
        return Session(model, device, weights, low_memory, exact=False)

    def run(
        self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None, arrays: bool | Sequence[str] = False
    ) -> dict[str, Any]:
        """Runs the model.

        Args:
            feeds: for each input (others are ignored) an array or a device value.
            outputs: names of the outputs to compute; all of them if None.
            arrays: the outputs that come back as numpy arrays, or whether all do; the others stay on the device, if it is
                not this one.

        Returns:
            The outputs by name. What is no tensor comes back in its parts, as arrays: ``all[0]``, ``all[1]`` of a sequence
            ``all``, ``scores[yes]`` of a map or of one for each sample; what has no numbers or strings in it is left out.
        """
        names = list(dict.fromkeys(self.outputs if outputs is None else outputs))  # a graph may give one twice
        to_host = set(names if arrays is True else arrays or ())
        binding = self._session.io_binding()
        bound: list[NDArray[Any]] = []  # ONNX Runtime reads an array's memory in the run and does not own it
        for name in self.inputs:
            if name not in feeds:
                raise InternalError(f"input '{name}' of a session was not fed")
            value = feeds[name]
            if isinstance(value, np.ndarray):
                value = value.astype(np.float32) if value.dtype.kind == "V" else value  # a graph that was widened
                bound.append(np.ascontiguousarray(value).reshape(value.shape))
                binding.bind_cpu_input(name, bound[-1])
            else:
                binding.bind_ortvalue_input(name, value)
        for name, weight in self._fed.items():
            binding.bind_ortvalue_input(name, weight)
        for name in names:
            binding.bind_output(name, "cpu" if name in to_host else self.device)
        self._session.run_with_iobinding(binding)
        results = binding.get_outputs()
        if to_host and self.device == "cpu":  # one that is kept would keep all outputs of its run, in ONNX Runtime's vector
            to_host = set(names)
        if all(v.is_tensor() for v in results):
            return {n: (v.numpy() if n in to_host else v) for n, v in zip(names, results, strict=True)}
        found: dict[str, Any] = {}
        for name, value, held in zip(names, results, binding.copy_outputs_to_cpu(), strict=True):
            if value.is_tensor():
                found[name] = held if name in to_host else value
            else:
                found |= tensors_within(name, held)
        return found


def tensors_within(name: str, value: Any) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a sequence or a map, each by the name of the output with its place or key behind it.

    A sequence of maps with the same keys (a classifier's, one for each sample) gives one array for each key.
    """
    if isinstance(value, np.ndarray):
        return {name: value}
    if isinstance(value, list) and value and all(isinstance(v, dict) and v.keys() == value[0].keys() for v in value):
        return {f"{name}[{key}]": np.asarray([v[key] for v in value]) for key in value[0]}
    if isinstance(value, (list, dict)):
        places = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for place, part in places for k, v in tensors_within(f"{name}[{place}]", part).items()}
    return {name: np.asarray(value)} if isinstance(value, (bool, int, float, str, np.generic)) else {}


def _with_inputs(model: bytes | Path, names: Collection[str] | None) -> bytes:
    """Returns a light model in which initializers are inputs; if None, all whose data is not in it."""
    import onnx

    proto = onnx.load(model, load_external_data=False) if isinstance(model, Path) else onnx.ModelProto.FromString(model)
    tensors = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    listed = {value.name for value in proto.graph.input}
    for tensor in tensors:
        held = tensor.data_location != onnx.TensorProto.EXTERNAL if names is None else tensor.name not in names
        if held:
            proto.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    data: bytes = proto.SerializeToString()
    return data


def _ort_value(array: NDArray[Any]) -> Any:
    onnxruntime = onnx_runtime()

    if array.dtype.kind != "V":
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    # bfloat16 is no type of numpy's own.
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), element_type(array))


def element_type(value: Any) -> int:
    """Returns the ONNX element type of an array or a device value."""
    import onnx

    if isinstance(value, np.ndarray):
        return int(onnx.helper.np_dtype_to_tensor_dtype(value.dtype))
    return int(value.element_type())


def as_array(value: Any) -> NDArray[Any]:
    """Returns an array for an array or a device value."""
    return value if isinstance(value, np.ndarray) else np.asarray(value.numpy())
