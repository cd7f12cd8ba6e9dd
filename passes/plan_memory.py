"""How much memory a segment takes, and how its groups are measured so that they stay under the limit.

What is anonymous at a time is: what the process has already, a copy of the segment's weights (ONNX Runtime packs them;
none where the limit is tight), the activations of one batch that are live together, the live tensors between segments where
they stay in memory, and

    measuring    2 folds x 8 n^2 for the moments of each activation of width n, and 4 n^2 for what one batch adds
    solving      the moments of one group, and SOLVING x 8 n^2 for its widest: covariances, factors, the downdated inverse

Groups of one segment whose moments do not fit together are measured one after the other, each by a run of the segment,
and their moments wait on disk: the results are the same. Whether the largest group fits is asked before the first segment.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from liar_opt.frontend.either_model import bytes_on
from liar_opt.passes.base import Finding, State
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.memory import show_size

FOLDS = 16
"""Bytes of the moments of both folds, for each entry of X^T X."""
BATCH = 4
"""Bytes of one batch's X^T X, for each entry."""
SOLVING = 40
"""Bytes that selection and repair need, for each entry of the covariance, beside the moments."""


@dataclass(frozen=True)
class TensorSizes(Finding):
    """The bytes of every tensor of the dense model on the first calibration batch, by name; none where it does not say."""

    by: ClassVar[str] = "sizes_of"
    bytes: Mapping[str, int]


def sizes_of(state: State) -> Mapping[str, int]:
    """Returns the bytes of every tensor on the first calibration batch; what is cut later is no larger.

    They are found once: by who asks first, before anything is cut. Empty where the graph does not say its sizes.
    """
    sizes = state.get(TensorSizes)
    if sizes is None:
        assert state.calibration is not None
        sizes = TensorSizes(bytes_on(state.model, state.calibration.batches[0]))
        state.add(sizes)
    return sizes.bytes


@dataclass(frozen=True)
class Need:
    """What one group needs.

    Attributes:
        name: the group.
        widths: of each activation that is measured.
        weights: elements of its consumers' weights; they are solved for in float64.
    """

    name: str
    widths: tuple[int, ...]
    weights: int

    @property
    def moments(self) -> int:
        """Bytes of its moments."""
        return sum(FOLDS * w * w for w in self.widths)

    @property
    def measuring(self) -> int:
        """Bytes while it is measured."""
        return self.moments + sum(BATCH * w * w for w in self.widths)

    @property
    def solving(self) -> int:
        """Bytes while it is solved, beside its moments."""
        return SOLVING * max(self.widths) ** 2 + 24 * self.weights


SPARE = 1 << 25
"""Bytes by which a process grows while it works, beside what is counted: sessions, code that is loaded late."""


SLACK = 1 << 23
"""What is added where the least that would do is said: no two runs begin with the same memory."""
ROUNDS = 8
"""How often the least is asked for again: with more room, more stays in memory."""


def require_room(
    needs: Sequence[tuple[Need, int]], limit: int, anew: Callable[[int], Sequence[tuple[Need, int]]] | None = None
) -> None:
    """Checks that every group fits by itself.

    Args:
        needs: each with the bytes that are needed beside it.
        limit: bytes that may be used.
        anew: the same under another limit, where what is needed depends on it.

    Raises:
        OptionError: one does not; the least that would do for all is said.
    """
    least, need = _largest(needs)
    if least <= limit:
        return
    for _ in range(ROUNDS if anew is not None else 0):
        assert anew is not None
        more, _need = _largest(anew(least + SLACK))
        if more <= least:
            break
        least, need = more, _need
    raise OptionError(
        f"memory {show_size(limit)} is too small for the moments of group '{need.name}' (width {max(need.widths)}); "
        f"give at least {show_size(least + SLACK)}, or a smaller batch size"
    )


def _largest(needs: Sequence[tuple[Need, int]]) -> tuple[int, Need]:
    """Returns the most that one group needs with what is beside it, and the group."""
    return max(((fixed + max(n.measuring, n.solving) + SPARE, n) for n, fixed in needs), key=lambda pair: pair[0])


class Parts(NamedTuple):
    """How the groups of a segment are measured.

    Attributes:
        groups: positions of those that are measured together, for each run of the segment.
        on_disk: whether moments go to disk until they are solved.
        need: the largest need, in bytes.
    """

    groups: list[list[int]]
    on_disk: bool
    need: int


def measure_together(needs: Sequence[Need], fixed: int, limit: int) -> Parts:
    """Returns which groups are measured together; one that does not fit by itself takes what it needs.

    Args:
        needs: of the groups, in order.
        fixed: bytes that are needed whatever is measured.
        limit: bytes that may be used; `SPARE` of them stay free.
    """
    limit -= SPARE
    whole = max(sum(n.measuring for n in needs), sum(n.moments for n in needs) + max((n.solving for n in needs), default=0))
    if fixed + whole <= limit:
        return Parts([list(range(len(needs)))], False, fixed + whole)
    least = max(fixed + max(n.measuring, n.solving) for n in needs)
    parts: list[list[int]] = []
    room = 0
    for i, need in enumerate(needs):
        if not parts or need.measuring > room:
            parts.append([])
            room = max(limit, least) - fixed
        parts[-1].append(i)
        room -= need.measuring
    return Parts(parts, True, least)
