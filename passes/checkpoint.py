"""A run that was interrupted goes on: what each segment came to is kept in a folder until the run is done.

The folder holds ``run.json`` (which model, data and options it belongs to, and the widths that were decided) and a folder
for each finished segment: the kept blocks, the new weights and biases, the state of the random numbers, and the live
tensors behind it; and how a training behind the cut stands. A segment's folder appears whole or not at all. Cuts are made
again from these, by the code that made them the first time, so that the result is the same to the last bit; nothing is
measured again. One process at a time works in the folder (``run.lock``).

What is removed, at the end of the run or behind one that was killed there, is what bears these names; any other file stays,
and the folder with it.
"""

import contextlib
import functools
import hashlib
import json
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from liar_opt.frontend.weight_files import as_bytes
from liar_opt.passes.base import DenseModel, Finding, State
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.one_at_a_time import Held
from liar_opt.runtime.ranks import current

RUN = "run.json"
LOCK = "run.lock"
TRAINING = "training.pt"
"""How a training behind the cut stands (`passes.tune_module`)."""
STEP = "segment-"
UNFINISHED = ".unfinished"
SEGMENT = re.compile(rf"{STEP}\d+({re.escape(UNFINISHED)})?")
CONTENT = re.compile(r"groups\.json|(weights-\d+-\d+|turns-\d+|alive-\d+)\.npz")
"""Names of the folders of segments, and of the files in them."""


@dataclass(frozen=True, eq=False)
class KeptGroup:
    """What one group came to: name, kept blocks, report, (weight, bias) of each consumer, changes of basis."""

    name: str
    blocks: list[int]
    details: dict[str, Any]
    consumers: list[tuple[NDArray[Any], NDArray[Any]]]
    turns: list[NDArray[np.float64]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Finished:
    """One finished segment: its groups, and the state of the random numbers behind it."""

    groups: list[KeptGroup]
    generator: dict[str, Any]


@dataclass(eq=False)
class Checkpoint:
    """The folder of one run.

    Attributes:
        folder: where it is.
        done: number of finished segments.
        decided: what was decided before the first segment, in plain data; None where nothing was.
    """

    folder: Path
    done: int = 0
    decided: dict[str, Any] | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    held: Held | None = None

    @classmethod
    def open(cls, folder: Path, identity: dict[str, Any]) -> "Checkpoint":
        """Takes up the folder of an earlier run, or begins one.

        Args:
            folder: the folder.
            identity: plain data that must be the same for a run to go on.

        Raises:
            OptionError: it holds another run or other files, cannot be made, or another process works in it.
        """
        taken: list[Checkpoint] = []

        def take() -> tuple[int, dict[str, Any] | None]:
            taken.append(cls._held(folder, identity))
            return taken[0].done, taken[0].decided

        done, decided = current().once(take)
        return taken[0] if taken else cls(folder, done, decided, identity)

    @classmethod
    def _held(cls, folder: Path, identity: dict[str, Any]) -> "Checkpoint":
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"resume '{folder}' is a file; give a folder")
        if folder.is_dir() and not (folder / RUN).is_file() and not all(map(_is_ours, folder.iterdir())):
            raise OptionError(f"resume folder '{folder}' holds other files; give a new one, or that of an earlier run")
        try:
            folder.mkdir(exist_ok=True)
            held = Held(folder / LOCK)
        except BlockingIOError as err:
            raise OptionError(f"another run works in the resume folder '{folder}'; wait for it, or give another") from err
        except OSError as err:
            raise OptionError(f"resume folder '{folder}' cannot be made ({err.strerror or err}); give another") from err
        try:
            checkpoint = cls._taken_up(folder, json.loads(json.dumps(identity)))
        except BaseException:
            held.close()
            raise
        checkpoint.held = held
        return checkpoint

    @classmethod
    def _taken_up(cls, folder: Path, identity: dict[str, Any]) -> "Checkpoint":
        run = folder / RUN
        if not run.is_file():
            checkpoint = cls(folder, identity=identity)
            try:
                _remove_ours(folder)  # of a run that was killed when it was done
                checkpoint._write_run()
            except OSError as err:
                raise OptionError(f"resume folder '{folder}' cannot be made ({err.strerror or err}); give another") from err
            return checkpoint
        try:
            stored = json.loads(run.read_text(encoding="utf-8"))
            before = stored["identity"]
        except (ValueError, KeyError, TypeError, OSError) as err:
            raise OptionError(f"'{run}' cannot be read; remove the folder and begin again") from err
        for name, old, new in _differences(before, identity):
            raise OptionError(
                f"resume folder '{folder}' is of another run: {name} was {_shown(old)}, now it is {_shown(new)}; "
                "give the same, or another folder"
            )
        done = 0
        while (folder / f"{STEP}{done + 1}").is_dir():
            done += 1
        return cls(folder, done, stored["decided"], identity)

    def decide(self, decided: Mapping[str, Any]) -> None:
        """Notes what was decided before the first segment."""
        self.decided = dict(decided)
        current().once(self._write_run)

    def save(self, number: int, finished: Finished, alive: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        """Keeps a finished segment, whole or not at all, and forgets the live tensors before it.

        Args:
            number: of the segment.
            finished: what it came to.
            alive: the live tensors behind it, for each batch; in every process, which hands on what is its own.

        Raises:
            OptionError: the disk is full.
        """
        if current().rank:
            for _ in alive:
                pass
            self.done = number
            return
        place = self.folder / f"{STEP}{number}"
        temporary = self.folder / f"{STEP}{number}{UNFINISHED}"
        _remove_segment(temporary)
        try:
            temporary.mkdir()
            plain = {
                "generator": finished.generator,
                "groups": [{"name": g.name, "blocks": g.blocks, "details": g.details} for g in finished.groups],
            }
            (temporary / "groups.json").write_text(json.dumps(plain), encoding="utf-8")
            for i, group in enumerate(finished.groups):
                for j, pair in enumerate(group.consumers):
                    np.savez(temporary / f"weights-{i}-{j}.npz", weight=pair[0], bias=pair[1])
                if group.turns:
                    np.savez(temporary / f"turns-{i}.npz", *group.turns)
            for i, values in enumerate(alive):
                # numpy's files know no bfloat16
                kinds = [v.dtype.name if v.dtype.kind == "V" else "" for v in values.values()]
                stored = (v.view(np.uint16) if kind else v for v, kind in zip(values.values(), kinds, strict=True))
                named: dict[str, Any] = {f"v{k}": v for k, v in enumerate(stored)}
                named |= {"names": np.asarray(list(values), np.str_), "kinds": np.asarray(kinds, np.str_)}
                np.savez(temporary / f"alive-{i}.npz", **named)
            temporary.rename(place)
        except OSError as err:
            _remove_segment(temporary)
            raise OptionError(
                f"resume folder '{self.folder}' cannot take a segment ({err.strerror or err}); free space and go on"
            ) from err
        self.done = number
        for old in (self.folder / f"{STEP}{number - 1}").glob("alive-*.npz"):
            old.unlink(missing_ok=True)

    def load(self, number: int) -> Finished:
        """Returns a finished segment.

        Raises:
            OptionError: its files are damaged.
        """
        try:
            return current().once(lambda: self._finished(number))
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as err:
            raise self._damaged(number) from err

    def _damaged(self, number: int) -> OptionError:
        place = self.folder / f"{STEP}{number}"
        return OptionError(f"'{place}' of an earlier run is damaged; remove the folder '{self.folder}' and begin again")

    def _finished(self, number: int) -> Finished:
        place = self.folder / f"{STEP}{number}"
        plain = json.loads((place / "groups.json").read_text(encoding="utf-8"))
        groups = []
        for i, group in enumerate(plain["groups"]):
            pairs: list[tuple[NDArray[Any], NDArray[Any]]] = []
            while (weights := place / f"weights-{i}-{len(pairs)}.npz").is_file():
                with np.load(weights) as file:
                    pairs.append((file["weight"], file["bias"]))
            turns = []
            if (place / f"turns-{i}.npz").is_file():
                with np.load(place / f"turns-{i}.npz") as file:
                    turns = [file[name] for name in file.files]
            groups.append(KeptGroup(group["name"], group["blocks"], group["details"], pairs, turns))
        return Finished(groups, plain["generator"])

    def alive(self, wanted: Collection[int]) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Yields some batches, each with the live tensors behind the last finished segment.

        Raises:
            OptionError: its files are damaged.
        """
        for index in range(current().once(lambda: sum(1 for _ in self._place.glob("alive-*.npz")))):
            values = current().once(functools.partial(self._alive, index))
            if index in wanted:
                yield index, values

    @property
    def _place(self) -> Path:
        return self.folder / f"{STEP}{self.done}"

    def _alive(self, index: int) -> dict[str, NDArray[Any]]:
        try:
            with np.load(self._place / f"alive-{index}.npz") as values:
                words = zip(values["names"], values["kinds"], strict=True)
                found = [(str(name), values[f"v{k}"], str(kind)) for k, (name, kind) in enumerate(words)]
            return {name: value.view(kind) if kind else value for name, value, kind in found}
        except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as err:
            raise self._damaged(self.done) from err

    def close(self) -> None:
        """Lets another run work in the folder; what is kept stays."""
        if self.held is not None:
            self.held.close()

    def remove(self) -> None:
        """Removes what was kept, and the folder if nothing else is in it: the run is done."""
        if current().rank:
            return
        _remove_ours(self.folder)
        self.close()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _write_run(self) -> None:
        temporary = self.folder / f"{RUN}{UNFINISHED}"
        temporary.write_text(json.dumps({"identity": self.identity, "decided": self.decided}), encoding="utf-8")
        temporary.replace(self.folder / RUN)


def _is_ours(entry: Path) -> bool:
    """Returns whether an entry of the folder is what a run keeps there, with nothing else in it."""
    if SEGMENT.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
        return all(CONTENT.fullmatch(file.name) and file.is_file() for file in entry.iterdir())
    return entry.name in (RUN, LOCK, TRAINING, f"{RUN}{UNFINISHED}") and entry.is_file()


def _remove_ours(folder: Path) -> None:
    """Removes what runs keep; first what says that there is one, so that none goes on from half of it."""
    for name in (RUN, TRAINING, f"{RUN}{UNFINISHED}"):
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    for entry in list(folder.iterdir()):
        if SEGMENT.fullmatch(entry.name):
            _remove_segment(entry)


def _remove_segment(place: Path) -> None:
    with contextlib.suppress(OSError):
        if not place.is_symlink():
            for file in list(place.iterdir()):
                if CONTENT.fullmatch(file.name):
                    file.unlink()
            place.rmdir()


@dataclass(frozen=True)
class Digests(Finding):
    """SHA-256 of the dense model with its weights, and of the calibration data."""

    by: ClassVar[str] = "digests_of"
    model: str
    data: str


def digests_of(state: State) -> dict[str, str]:
    """Returns the digests of the dense model and of the calibration data; both are read once in a run."""
    digests = state.get(Digests)
    if digests is None:
        assert state.calibration is not None
        digests = Digests(state.found(DenseModel).original.digest(), digest_of(state.calibration))
        state.add(digests)
    return {"model": digests.model, "calibration data": digests.data}


def digest_of(data: CalibrationData) -> str:
    """Returns the SHA-256 of calibration data."""
    digest = hashlib.sha256()
    for batch, mask in zip(data.batches, data.row_masks, strict=True):
        for name, array in [*sorted(batch.items()), *([] if mask is None else [("", mask)])]:
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(as_bytes(array))
    return digest.hexdigest()


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{name} {key}".strip())
    elif old != new:
        yield f"'{name}'", old, new


def _shown(value: Any) -> str:
    text = "not given" if value is None else f"{value}"
    return text if len(text) <= 40 else f"{text[:12]}..."
