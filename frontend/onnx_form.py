"""Whether a cut ONNX graph can stand where the original stood: the same interface, in valid ONNX."""

from collections.abc import Callable, Collection
from typing import Any

import onnx

from liar_opt.frontend.onnx_model import OnnxModel, OnnxOriginal
from liar_opt.runtime.errors import CheckError

Resized = dict[str, dict[int, int]]


def require_interface(dense: OnnxOriginal, pruned: OnnxModel, spared: Collection[str]) -> None:
    """Checks that inputs and outputs have the names, types and shapes of the original's.

    Args:
        dense: the original.
        pruned: the cut model.
        spared: caches, which may have lost heads.

    Raises:
        CheckError: they have not.
    """
    resized = {name: axes for name, axes in pruned.resized.items() if name in spared}
    require_signature(dense.proto, pruned.light()[0], resized)


def require_format(dense: OnnxOriginal, pruned: OnnxModel) -> None:
    """Checks that a cut model is valid ONNX, if the original is.

    Raises:
        CheckError: it is not.
    """
    # Graphs that ONNX Runtime's optimizer wrote may be refused from the start: they are no worse for being smaller.
    require_valid(pruned.skeleton(), lambda: _checker_error(dense.model().skeleton()) is None)


def require_signature(dense: onnx.ModelProto, pruned: onnx.ModelProto, resized: Resized) -> None:
    """Checks inputs and outputs of a proto.

    Args:
        dense: the original.
        pruned: the cut one.
        resized: the new sizes of axes, by name and axis.

    Raises:
        CheckError: they are others.
    """
    weights = {t.name for t in dense.graph.initializer}
    inputs = [i for i in dense.graph.input if i.name not in weights]
    for what, before, after in (
        ("inputs", inputs, pruned.graph.input),
        ("outputs", dense.graph.output, pruned.graph.output),
    ):
        if _signature(before, resized) != _signature(after):
            raise CheckError(f"the {what} changed from {_signature(before)} to {_signature(after)}")


def require_valid(proto: onnx.ModelProto, was_valid: Callable[[], bool] = lambda: True) -> None:
    """Checks that the ONNX checker accepts a proto.

    Raises:
        CheckError: it does not, and ``was_valid`` says that it did of the original.
    """
    error = _checker_error(proto)
    if error is not None and was_valid():
        raise CheckError(f"the ONNX checker refuses the result: {' '.join(str(error).split())[:300]}") from error


def is_valid(proto: onnx.ModelProto) -> bool:
    """Returns whether the ONNX checker accepts a proto."""
    return _checker_error(proto) is None


def _signature(values: Any, resized: Resized | None = None) -> list[tuple[str, int, list[int | str]]]:
    """Returns names, element types and shapes; in shapes the axes of ``resized`` have their new sizes."""
    result = []
    for value in values:
        kind = value.type.tensor_type
        shape: list[int | str] = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]
        for axis, size in (resized or {}).get(value.name, {}).items() if shape else ():
            shape[axis] = size
        result.append((value.name, kind.elem_type, shape))
    return result


def _checker_error(proto: onnx.ModelProto) -> Exception | None:
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as err:
        return err
    return None
