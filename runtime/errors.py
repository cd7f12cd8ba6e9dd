"""The exceptions of liar-opt: one root, and who can act on it.

``ModelError``, ``OptionError`` and ``CheckError`` are for the user: a model that cannot be used, an option or a
data file that does not fit, a result that failed its check. ``InternalError`` is a bug of ours and is not their kin;
where it is known which groups bring it out, it is a ``GroupFault``, and costs their sparsity instead of the run.
"""

from collections.abc import Mapping


class LiarOptError(Exception):
    """Root of every error that liar-opt raises on purpose; its message is one sentence for the user."""


class ModelError(LiarOptError):
    """The model cannot be read, is not supported, or has nothing to prune (exit code 2)."""


class OptionError(LiarOptError):
    """An option, a path or a calibration file does not fit (exit code 2)."""


class CheckError(LiarOptError):
    """The result failed a check and was not written (exit code 1)."""


class LiarOptWarning(UserWarning):
    """What the user should know before the work goes on; the command says it as a line, also where it is quiet."""


class InternalError(Exception):
    """A bug of liar-opt; shown with its traceback (exit code 3)."""


class GroupFault(InternalError):
    """A bug of liar-opt that some groups bring out: the run starts again without them.

    Attributes:
        reasons: by the name of each group, what failed.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"'{name}': {reason}" for name, reason in reasons.items()))
        self.reasons = dict(reasons)

    def __reduce__(self) -> tuple[type["GroupFault"], tuple[dict[str, str]]]:
        """Says how it is sent to another process."""
        return type(self), (self.reasons,)
