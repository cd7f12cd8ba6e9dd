"""Check that graphs of other exporters than torch's own are found and cut exactly.

    python tools/dev/bench.py exporters                       # some minutes, most of them for pip
    python tools/dev/bench.py exporters --frameworks optimum --models T5 Whisper

`elsewhere_exports.py` exports small seeded models in a virtual environment of each framework, which is made with pip under
`--venvs` where it is missing. Half of each graph is removed here, without repair, and the outputs are compared with those
of the original whose removed channels are masked. The exit code is 1 where a model differs, or where nothing was found.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import onnx

import liar_opt
from liar_opt.runtime.errors import LiarOptError
from liar_opt.runtime.user_cache import cache_folder
from liar_opt.tools.dev.harness import HERE, environment, say, table

ENVIRONMENTS = {
    "optimum": ("optimum-onnx[onnxruntime]", "torch"),
    "keras": ("tensorflow-cpu", "tf2onnx", "keras", "keras-hub"),
    "flax": ("flax", "jax2onnx"),
    "paddle": ("paddlepaddle", "paddle2onnx", "packaging", "onnxoptimizer", "polygraphy"),
}
SCRIPT = HERE / "subjects" / "elsewhere_exports.py"


def row(framework: str, path: Path) -> tuple[list[str], bool]:
    """The row of a model, and whether it is as it should be."""
    producer = onnx.load(path, load_external_data=False).producer_name
    head = [f"{framework}: {path.stem}", producer or "not said"]
    try:
        report = liar_opt.prune(
            path,
            sparsity=0.5,
            allocate="uniform",
            repair="none",
            multiple_of=2,
            latency=False,
            samples=8,
        ).report
    except LiarOptError as err:
        return [*head, "", "", str(err)], False
    kinds = [group["kind"] for group in report["groups"]]
    found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    share = report["prunable"]["before"] / report["before"]["parameters"]
    exact = report["verification"]["exact_difference"]
    return [*head, found, f"{share:.0%}", f"{exact:.1e}"], exact < 1e-4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--frameworks", choices=tuple(ENVIRONMENTS), nargs="+", default=list(ENVIRONMENTS))
    parser.add_argument("--models", nargs="+", default=[], help="export these alone")
    parser.add_argument("--venvs", type=Path, default=cache_folder() / "frameworks", help="folder of virtual environments")


def main(options: argparse.Namespace) -> int:
    """The command."""
    rows, good = [], True
    for framework in options.frameworks:
        python = environment(framework, ENVIRONMENTS[framework], options.venvs)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            with log.open("w", encoding="utf-8") as out:
                command = [str(python), str(SCRIPT), framework, folder, *options.models]
                code = subprocess.run(command, cwd=folder, stdout=out, stderr=out).returncode
            if code:
                say(log.read_text(encoding="utf-8", errors="replace")[-2000:])
                return 1
            for path in sorted(Path(folder).iterdir()):
                if path.suffix == ".error":
                    say(f"{framework} cannot export {path.stem}: {path.read_text(encoding='utf-8')}")
                elif path.suffix == ".onnx":
                    cells, fine = row(framework, path)
                    rows.append(cells)
                    good &= fine
    print(table(["model", "exporter", "found", "prunable", "cut against masked"], rows))
    return 0 if good else 1
