"""A model as it came: what can be had again any number of times, whatever it was made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liar_opt.frontend.onnx_model import OnnxModel


class Original(ABC):
    """A stored ONNX file, or a traced module."""

    @abstractmethod
    def model(self) -> OnnxModel:
        """Returns the model as a graph; each call makes a new one, weights are shared."""

    @abstractmethod
    def as_given(self) -> Any:
        """Returns the model as its user has it: an ONNX proto, or a module."""

    @abstractmethod
    def digest(self) -> str:
        """Returns the SHA-256 of the model with all its weights."""
