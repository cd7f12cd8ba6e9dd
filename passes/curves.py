"""Error curves: what a group loses at each width, and the curves that earlier runs have kept.

Who tries a second sparsity, a target or a largest loss waits for the cut alone: curves are kept (`runtime.kept_results`), a
file for each model, calibration data and way to measure them. The code that measured is part of the name, so that curves of
another version are never taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.passes.base import DenseModel, Finding, State
from liar_opt.passes.checkpoint import digests_of
from liar_opt.runtime.kept_results import code_digest, file_of, load_result, store_result

SHOWN = 33
"""Points of a curve in the report."""


@dataclass(frozen=True, eq=False)
class GroupCurve:
    """What one group loses.

    Attributes:
        errors: with 0, 1, ... k blocks kept, [k + 1]; the last is zero. Relative squared differences of the output.
        values: the score of every block on the dense model, [k].
        worth: what an error of one, relative to the stream, does to the output.
        deviation: the standard deviation of the score (`scores.Score.deviation`); None: that of the values.
        whole: what is lost when the whole sublayer goes, by what stands in for it (`groups.FORMS`): measured in the output,
            and no less than the curve says of nothing kept.
    """

    errors: NDArray[np.float64]
    values: NDArray[np.float64]
    worth: float = 1.0
    deviation: float | None = None
    whole: Mapping[int, float] = field(default_factory=dict)

    def points(self) -> list[tuple[int, float]]:
        """Returns (blocks kept, error) at `SHOWN` places at the most, evenly spread, both ends included."""
        places = np.unique(np.linspace(0, self.errors.size - 1, SHOWN).round().astype(np.int64))
        return [(int(p), float(self.errors[p])) for p in places]


@dataclass(frozen=True, eq=False)
class Curves(Finding):
    """The error curves of a run.

    Attributes:
        by_group: the curve of each group, by its name.
        kept: whether an earlier run measured them.
    """

    by: ClassVar[str] = "measure-curves"
    by_group: Mapping[str, GroupCurve]
    kept: bool = False


def file_of_curves(state: State, options: Mapping[str, Any]) -> Path | None:
    """Returns the file for the curves of a model on its calibration data; None where they cannot be told from others.

    Args:
        state: with its dense model and its calibration data.
        options: of the pass that measures, plain data; a function of the user's own has no name to be found again by.
    """
    if state.calibration is None or state.get(DenseModel) is None or any(callable(o) for o in options.values()):
        return None
    import onnxruntime

    given: dict[str, Any] = {
        **digests_of(state),
        "options": dict(options),
        "runtime": [onnxruntime.__version__, np.__version__, state.device, state.memory.low],
        "code": code_digest(),
    }
    return file_of("curves", given, ".npz")


def load_curves(path: Path) -> dict[str, GroupCurve] | None:
    """Returns the curves by group name; None where there are none, or the file is broken."""
    found = load_result(path, _read)
    numbers = (a for c in (found or {}).values() for a in (c.errors, c.values, np.asarray(c.worth)))
    return found if all(a.dtype.kind == "f" and np.isfinite(a).all() for a in numbers) else None


def _read(stream: IO[bytes]) -> dict[str, GroupCurve]:
    with np.load(stream) as file:
        noted = zip(file["names"], file["worths"], file["deviations"], strict=True)
        return {
            str(name): GroupCurve(
                file[f"errors {name}"],
                file[f"values {name}"],
                float(worth),
                None if np.isnan(dev) else float(dev),
                {int(form): float(error) for form, error in file[f"whole {name}"]},
            )
            for name, worth, dev in noted
        }


def store_curves(path: Path, curves: Mapping[str, GroupCurve]) -> None:
    """Keeps curves; a cache that cannot be written costs the next run its time, nothing else."""
    arrays: dict[str, Any] = {
        "names": np.asarray(list(curves), dtype=np.str_),
        "worths": np.asarray([c.worth for c in curves.values()], np.float64),
        "deviations": np.asarray([np.nan if c.deviation is None else c.deviation for c in curves.values()], np.float64),
    }
    for name, curve in curves.items():
        whole = np.asarray(list(curve.whole.items()), np.float64).reshape(-1, 2)
        arrays |= {f"errors {name}": curve.errors, f"values {name}": curve.values, f"whole {name}": whole}
    store_result(path, lambda stream: np.savez(stream, **arrays))
