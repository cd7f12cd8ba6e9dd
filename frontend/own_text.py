"""A model of transformers writes calibration text through its own ``generate``; see `runtime.self_calibration`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.hf_checkpoint import quiet_loading
from liar_opt.frontend.plain_module import evaluating
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.self_calibration import INSTEAD, TEMPERATURE, TOP_K, TOP_P
from liar_opt.runtime.signatures import Signature, one_line

if TYPE_CHECKING:
    import torch


def require_generate(module: torch.nn.Module) -> None:
    """Checks that a module can write.

    Raises:
        OptionError: it has no ``generate`` of transformers.
    """
    if not callable(getattr(module, "generate", None)) or not hasattr(module, "generation_config"):
        raise OptionError(
            f"calibration 'self' needs a module that continues a text by its own generate, as those of transformers with a "
            f"language head do, and {type(module).__name__} has none; {INSTEAD}"
        )


@dataclass(frozen=True)
class GenerateWriter:
    """A module that writes; its settings for generation are as they were afterwards, and so is the generator of torch."""

    module: Any
    how = "through its generate"

    @classmethod
    def of(cls, module: torch.nn.Module, signature: Signature) -> GenerateWriter:
        """Takes the module; its ``generate`` fills all inputs beside the tokens."""
        return cls(module)

    def write(
        self, first: NDArray[np.int64], length: int, rng: np.random.Generator, progress: Callable[[int], None]
    ) -> NDArray[np.int64]:
        """Writes on behind first tokens.

        Args:
            first: [n, 1].
            length: tokens of each window, the first one counted.
            rng: seeds torch.
            progress: called with the number of tokens that each window has.

        Returns:
            Windows [n, length].

        Raises:
            OptionError: ``generate`` fails.
        """
        import torch
        from transformers import GenerationConfig

        device = next(p.device for p in self.module.parameters())
        ids = torch.from_numpy(first).to(device)
        # No end token, no forced or suppressed ones: the model's own distribution, to the end of the window.
        how = GenerationConfig(do_sample=True, temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P, pad_token_id=0)
        how.max_length, how.min_length = length, length
        before, self.module.generation_config = self.module.generation_config, how
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), torch.no_grad(), evaluating(self.module), quiet_loading():
                torch.manual_seed(int(rng.integers(1 << 62)))
                written = self.module.generate(ids, attention_mask=torch.ones_like(ids), streamer=_Progress(progress))
        except Exception as err:  # the module's own code, and its classes of errors
            raise OptionError(
                f"calibration 'self': generate of {type(self.module).__name__} fails ({one_line(err)}); {INSTEAD}"
            ) from err
        finally:
            self.module.generation_config = before
        return np.asarray(written.cpu().numpy(), np.int64)


class _Progress:
    """Counts tokens, as a streamer of transformers; it is given the first ones, and then one of each window."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell, self.count = tell, 0

    def put(self, tokens: Any) -> None:
        self.count += 1
        self.tell(self.count)

    def end(self) -> None:
        """Nothing is left to tell."""
