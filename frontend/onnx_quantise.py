"""An ONNX model in small integers, by ``onnxruntime.quantization``.

    int8         weights in 8 bits by output channel, activations as they come (DynamicQuantizeLinear, MatMulInteger)
    int8-static  both in 8 bits, ranges of activations from calibration batches (QDQ around contractions and tables)
    int4         weights in blocks of 4 bits along what is contracted (MatMulNBits); tables likewise (GatherBlockQuantized)

The quantiser works on files, in a folder of its own among the system's temporary ones: nothing is written beside the input.
What comes back is mapped or copied, and the folder is gone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from liar_opt.frontend.onnx_model import OnnxOriginal
from liar_opt.frontend.quantised_in import quantised_node
from liar_opt.frontend.weight_files import EXTERNAL_LIMIT, read_model, write_model
from liar_opt.frontend.widen_graph import bodies_of
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.extras import onnx_runtime, require
from liar_opt.runtime.whole_file import scratch_folder

DYNAMIC, STATIC, BLOCKS = "int8", "int8-static", "int4"
SCHEMES = (DYNAMIC, STATIC, BLOCKS)
CONTRACTIONS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
"""What static quantisation takes, beside tables: sums, normalisations and softmaxes stay in float."""
TAKEN = {
    DYNAMIC: "of a product or a table; convolutions are taken by int8-static",
    STATIC: "of a product, a convolution or a table",
    BLOCKS: "of a product or a table; convolutions are taken by int8-static",
}
"""What each scheme quantises, in words."""
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
ACCURACY = 4
"""Of MatMulNBits: activations in 8 bits, as ONNX Runtime's fast kernels have them."""


class RefusedError(OptionError):
    """The quantiser, or ONNX Runtime behind it, does not take a graph; the message has its words."""


@dataclass(frozen=True)
class Scheme:
    """How a model is quantised.

    Attributes:
        name: one of ``SCHEMES``.
        block: of 4-bit weights.
        symmetric: whether activations of static quantisation have no zero point, as TensorRT wants it.
    """

    name: str
    block: int = 32
    symmetric: bool = False


Batches = Sequence[Mapping[str, NDArray[Any]]]


def quantised(model: OnnxOriginal, scheme: Scheme, batches: Batches = ()) -> tuple[OnnxOriginal, int]:
    """Returns a quantised model, and the bytes of its file.

    Args:
        model: as it would be written.
        scheme: how.
        batches: what static quantisation takes the ranges of activations from.

    Raises:
        RefusedError: the quantiser does not take it.
    """
    with scratch_folder() as folder:
        source, target = folder / "float.onnx", folder / "quantised.onnx"
        light, arrays = model.as_written()
        write_model(light, arrays, source)
        large = sum(a.nbytes for a in arrays.values()) > EXTERNAL_LIMIT
        try:
            with _quiet():
                _quantise(source, target, scheme, batches, large)
        except MemoryError:
            raise
        except Exception as err:  # it raises whatever it comes across
            raise RefusedError(words_of(err)) from err
        source.unlink()
        size = sum(p.stat().st_size for p in folder.iterdir() if p.name.startswith(target.name))
        made, data = read_model(target)
        if quantised_node(made) is None:
            raise RefusedError(f"it finds no weight that {scheme.name} takes, {TAKEN[scheme.name]}")
        return OnnxOriginal(made, data), size


def require_quantiser(name: str | None) -> None:
    """Checks that ONNX Runtime's quantiser is there, with what it imports; None: nothing is to be quantised.

    Raises:
        OptionError: it is not, or is too old for blocks of 4 bits.
    """
    if name is not None:
        require("quantize", "sympy")
    if name != BLOCKS:
        return
    require("quantize int4", "onnx_ir")
    onnx_runtime()
    if importlib.util.find_spec("onnxruntime.quantization.matmul_nbits_quantizer") is None:
        raise OptionError("quantize int4 needs the quantiser of a newer ONNX Runtime: pip install -U onnxruntime")


def words_of(err: Exception) -> str:
    """Returns what an error says, on one line."""
    text = " ".join(str(err).split())[:300] or type(err).__name__
    return text.rstrip(".")


def _quantise(source: Path, target: Path, scheme: Scheme, batches: Batches, large: bool) -> None:
    """Has ONNX Runtime quantise one file into another."""
    from onnxruntime import quantization

    if scheme.name == BLOCKS:
        _in_blocks(source, target, scheme, large)
        return
    nodes = onnx.load(source, load_external_data=False).graph.node
    branches = any(True for node in nodes for _ in bodies_of(node))
    options = {"DefaultTensorType": onnx.TensorProto.FLOAT, "EnableSubgraph": branches, "MatMulConstBOnly": True}
    if scheme.name == DYNAMIC:
        from onnxruntime.quantization.registry import IntegerOpsRegistry

        # Convolutions of signed weights have no kernel on the CPU.
        operators = [name for name in IntegerOpsRegistry if name != "Conv"]
        quantization.quantize_dynamic(
            source,
            target,
            op_types_to_quantize=operators,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=large,
            extra_options=options,
        )
        return
    if branches:
        raise RefusedError("its branches (If, Loop) have activations whose ranges cannot be taken")
    quantization.quantize_static(
        source,
        target,
        _reader(batches, source),
        op_types_to_quantize=[*CONTRACTIONS, "Gather"],
        per_channel=True,
        # Unsigned activations have the faster kernels on x86, and lose as much; no zero point is for signed ones.
        activation_type=quantization.QuantType.QInt8 if scheme.symmetric else quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=large,
        extra_options={**options, "ActivationSymmetric": scheme.symmetric, "WeightSymmetric": True},
    )


def _in_blocks(source: Path, target: Path, scheme: Scheme, large: bool) -> None:
    """Quantises weights, and tables where the graph allows: those need a newer opset, in which other nodes may be wrong."""
    model = _blocks(source, scheme, ("MatMul", "Gather"))
    try:
        onnx.checker.check_model(model.model)
    except Exception:  # or too large to be checked
        model = _blocks(source, scheme, ("MatMul",))
    model.save_model_to_file(str(target), large)


def _blocks(source: Path, scheme: Scheme, operators: tuple[str, ...]) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(onnx.load(source))
    model.replace_gemm_with_matmul()
    tables = {t.name for t in model.model.graph.initializer if t.data_type in FLOATS and len(t.dims) == 2}
    others = []  # it would take tables of integers, too
    for place, node in enumerate(model.model.graph.node):
        node.name = node.name or f"node_{place}_{node.output[0]}"
        if node.op_type == "Gather" and node.input[0] not in tables:
            others.append(node.name)
    quantizer = MatMulNBitsQuantizer(
        model.model,
        block_size=scheme.block,
        is_symmetric=False,
        accuracy_level=ACCURACY,
        nodes_to_exclude=others,
        op_types_to_quantize=operators,
    )
    quantizer.process()
    return quantizer.model


def _reader(batches: Batches, source: Path) -> Any:
    """Returns batches as the calibration of ONNX Runtime reads them, with no input that the graph does not have."""
    from onnxruntime.quantization import CalibrationDataReader

    names = {value.name for value in onnx.load(source, load_external_data=False).graph.input}
    rows: Iterator[dict[str, Any]] = ({k: np.asarray(v) for k, v in b.items() if k in names} for b in batches)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(rows, None)

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Takes from the terminal what the quantiser logs and prints: what matters it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
