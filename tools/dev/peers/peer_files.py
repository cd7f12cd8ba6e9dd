"""What a driver of a peer reads and writes: the same files for every tool, in an environment of the peer's own.

`bench.py peers` starts `python peer_X.py FOLDER`. The folder holds

    job.json      {"method": what to run, "onnx": file, "checkpoint": folder, "calibration": .npz, "ratio": of the prunable
                   parameters to remove, "seed": int, "repository": folder of the tool's public code, or null}

and gets

    pruned.onnx   the result
    report.json   {"tool": name and version, "seconds": of the tool's own work, "peak_mib": of the process, "artefact": what
                   the tool itself leaves, "note": settings}

The calibration file holds arrays named `<batch>.<input>`, batches in the order of their names. Stands alone: needs numpy
and torch, nothing of liar-opt; `report.json` is written last, so a folder with one is finished.

Nothing of a peer's code is changed on disk. Code that asks for a GPU by name is given the processor (`on_the_processor`).
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


class Job:
    """One folder: what is asked for, and where the answer goes.

    Attributes:
        folder: of the files above.
        method: which of the driver's methods is asked for.
        ratio: of the prunable parameters, to remove.
        seconds: that the tool's own work took, by `timed`.
    """

    def __init__(self, folder: Path) -> None:
        given: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        self.folder = folder
        self.method: str = given["method"]
        self.onnx = Path(given["onnx"])
        self.checkpoint = Path(given["checkpoint"])
        self.ratio: float = given["ratio"]
        self.seed: int = given["seed"]
        self.repository = Path(given["repository"]) if given["repository"] else None
        self.calibration = Path(given["calibration"])
        self.seconds = 0.0

    def batches(self) -> list[dict[str, Any]]:
        """The calibration batches, each {input: array}."""
        return read_batches(self.calibration)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the block as the tool's own work."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began

    def finish(self, tool: str, artefact: str, note: str = "") -> None:
        """Writes the report; `pruned.onnx` is there already."""
        if not (self.folder / "pruned.onnx").is_file():
            raise RuntimeError(f"'{self.folder}' has no pruned.onnx")
        report = {
            "tool": tool,
            "seconds": round(self.seconds, 2),
            "peak_mib": round(peak_mebibytes(), 1),
            "artefact": artefact,
            "note": note,
        }
        (self.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read_batches(path: Path) -> list[dict[str, Any]]:
    """The calibration batches of a file, in order, each {input: array}."""
    batches: dict[str, dict[str, Any]] = {}
    with np.load(path) as arrays:
        for key in sorted(arrays.files):
            number, name = key.split(".", 1)
            batches.setdefault(number, {})[name] = arrays[key]
    return list(batches.values())


def peak_mebibytes() -> float:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def on_the_processor() -> None:
    """Makes code that names a GPU (`.cuda()`, `.to("cuda")`, `device="cuda:0"`) run where there is none."""
    import torch

    def named(value: Any) -> Any:
        return torch.device("cpu") if str(value).startswith("cuda") else value

    def moving(method: Any) -> Any:
        def to(itself: Any, *args: Any, **kwargs: Any) -> Any:
            return method(itself, *map(named, args), **{key: named(value) for key, value in kwargs.items()})

        return to

    def stay(itself: Any, *args: Any, **kwargs: Any) -> Any:
        return itself

    kinds: tuple[Any, ...] = (torch.Tensor, torch.nn.Module)
    for kind in kinds:
        kind.to, kind.cuda = moving(kind.to), stay
    cuda: Any = torch.cuda
    cuda.synchronize = cuda.empty_cache = lambda *args: None


def stand_in(name: str, **members: Any) -> None:
    """Puts a module of this name in place of one that the peer imports and that is not wanted here."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


def export(module: Any, batch: dict[str, Any], output: str, path: Path) -> None:
    """Writes a torch module as ONNX with dynamic axes: the TorchScript exporter takes what `torch.export` refuses.

    Args:
        module: called with tensors by position, in the order of `batch`; returns one tensor.
        batch: example arrays {input: [b, s]}.
        output: name of the output.
        path: where to write.
    """
    import torch

    names = list(batch)
    axes = {name: {0: "batch", 1: "sequence"} for name in [*names, output]}
    example = tuple(torch.from_numpy(value) for value in batch.values())
    with torch.no_grad():
        torch.onnx.export(
            module.eval(),
            example,
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=[output],
            dynamic_axes=axes,
        )
