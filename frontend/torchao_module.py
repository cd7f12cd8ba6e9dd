"""A model of transformers with weights in 8 bits, by torchao, as ``from_pretrained`` loads it (``TorchAoConfig``).

The weight of every linear layer becomes whole numbers with a scale for each output channel; tables, a head that is one of
them, and vectors stay. Of what torchao has this is what a CPU computes and safetensors keeps: its weights in 4 bits are
computed on CUDA alone, or have a byte each, or no form in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_opt.frontend.fx_engine import host_array
from liar_opt.frontend.fx_module import FxModel, to_torch
from liar_opt.frontend.hf_checkpoint import quiet_loading, without_cache
from liar_opt.frontend.onnx_quantise import RefusedError, words_of
from liar_opt.runtime.whole_file import scratch_folder

if TYPE_CHECKING:
    import torch

BITS = "int8"
"""What ``--quantize`` calls it."""


def quantised_module(module: torch.nn.Module) -> tuple[torch.nn.Module, int]:
    """Returns a model of transformers with weights in 8 bits, as anybody would load it, and the bytes of its files.

    Raises:
        RefusedError: torchao, or transformers, does not take it.
    """
    given: Any = module
    device = next(given.parameters()).device
    try:
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
        from transformers import TorchAoConfig

        with scratch_folder() as folder, quiet_loading():
            given.save_pretrained(folder / "float")
            how = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
            made: Any = type(given).from_pretrained(folder / "float", quantization_config=how, dtype="auto")
            made = made.eval().to(device)
            made.save_pretrained(folder / "small")
            return made, _stored(folder / "small")
    except MemoryError:
        raise
    except Exception as err:  # they raise whatever they come across
        raise RefusedError(words_of(err)) from err


def module_bytes(module: torch.nn.Module) -> int:
    """Returns the bytes of the files in which transformers keeps a model's weights."""
    given: Any = module
    with scratch_folder() as folder, quiet_loading():
        given.save_pretrained(folder)
        return _stored(folder)


def _stored(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class RunModule:
    """A module in place of the one that was traced, behind the face of a session.

    Args:
        model: the trace.
        module: what is run.
    """

    def __init__(self, model: FxModel, module: torch.nn.Module) -> None:
        self.model, self.module = model, module

    def run(self, feeds: Mapping[str, Any], arrays: bool = False) -> dict[str, Any]:
        """Runs it once; returns those of its outputs that are tensors, as arrays, named as in the trace."""
        import torch

        arguments = {spec.name: to_torch(feeds[spec.name], self.model.device) for spec in self.model.signature}
        with torch.no_grad(), without_cache(self.module):
            leaves = torch.utils._pytree.tree_leaves(self.module(**arguments))
        found = [host_array(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return dict(zip(self.model.results, found, strict=True))
