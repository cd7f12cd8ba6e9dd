"""Runs a file in what is to serve it: for the table of `bench.py runtimes`, and for tests, which skip what is not there."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
Feeds = Mapping[str, NDArray[Any]]


class Ran(NamedTuple):
    """What came out, in the order of the model's outputs, and the seconds of one run: the median."""

    outputs: list[NDArray[Any]]
    seconds: float


@dataclass(frozen=True)
class Runner:
    """One runtime.

    Attributes:
        reads: the suffix of the files that it loads.
        needs: the Python package, or with a leading "npm:" the package of node.
        run: takes a file, feeds by name and how often, on one thread.
    """

    reads: str
    needs: str
    run: Callable[[Path, Feeds, int], Ran]

    @property
    def missing(self) -> str | None:
        """What is not installed; None where it can run."""
        kind, _, name = self.needs.rpartition(":")
        if not kind:
            return None if importlib.util.find_spec(self.needs) else self.needs
        node = shutil.which("node")
        if node is None:
            return "node"
        asked = [node, "-e", f"require.resolve('{name}', {{paths: {json.dumps(_node_folders())}}})"]
        return name if subprocess.run(asked, capture_output=True).returncode else None


def _node_folders() -> list[str]:
    return [str(Path.cwd()), *filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep))]


def timed(run: Callable[[], list[Any]], repeats: int) -> Ran:
    """Runs something once, and then so often with the clock."""
    outputs, seconds = run(), []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return Ran([np.asarray(value) for value in outputs], statistics.median(seconds) if seconds else float("nan"))


def onnxruntime_runs(path: Path, feeds: Feeds, repeats: int) -> Ran:
    """ONNX Runtime itself, which the others are compared with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return timed(lambda: list(session.run(None, dict(feeds))), repeats)


def openvino_runs(path: Path, feeds: Feeds, repeats: int) -> Ran:
    """OpenVINO, on the CPU, in float32."""
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(core.read_model(str(path)), "CPU", settings)
    return timed(lambda: [model(dict(feeds))[output] for output in model.outputs], repeats)


def node_runs(package: str) -> Callable[[Path, Feeds, int], Ran]:
    """One of the two packages of npm."""

    def run(path: Path, feeds: Feeds, repeats: int) -> Ran:
        with tempfile.TemporaryDirectory() as temporary:
            folder, listed = Path(temporary), []
            for place, (name, array) in enumerate(feeds.items()):
                kept = np.ascontiguousarray(array)
                (folder / f"{place}.in").write_bytes(kept.tobytes())
                listed.append({"name": name, "type": str(kept.dtype), "dims": kept.shape, "file": f"{place}.in"})
            (folder / "feeds.json").write_text(json.dumps(listed), encoding="utf-8")
            script = [HERE / "node_runner.js", package, path.resolve(), folder, repeats]
            done = subprocess.run(["node", *map(str, script)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr.strip()[-300:])
            found = json.loads((folder / "results.json").read_text("utf-8"))
            outputs = [
                np.fromfile(folder / o["file"], o["type"]).reshape([int(n) for n in o["dims"]]) for o in found["outputs"]
            ]
        return Ran(outputs, statistics.median(found["times"]) / 1000 if found["times"] else float("nan"))

    return run


def torch_runs(path: Path, feeds: Feeds, repeats: int) -> Ran:
    """torch.export.load."""
    import torch

    module, given = torch.export.load(path).module(), {k: torch.from_numpy(v) for k, v in feeds.items()}
    with torch.no_grad():
        return timed(lambda: [v.numpy() for v in torch.utils._pytree.tree_leaves(module(**given))], repeats)


def executorch_runs(path: Path, feeds: Feeds, repeats: int) -> Ran:
    """ExecuTorch with XNNPACK: traced again for these shapes, lowered, and run by its Python bindings."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # pyright: ignore[reportMissingImports]
    from executorch.exir import to_edge_transform_and_lower  # pyright: ignore[reportMissingImports]
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    given = {k: torch.from_numpy(v) for k, v in feeds.items()}
    program = torch.export.export(torch.export.load(path).module(), (), given, strict=False)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    method = Runtime.get().load_program(lowered.buffer).load_method("forward")
    order = list(given.values())
    return timed(lambda: [value.numpy() for value in method.execute(order)], repeats)


def transformers_runs(path: Path, feeds: Feeds, repeats: int) -> Ran:
    """Stock transformers, without the cache of keys and values."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
    causal = any("CausalLM" in name for name in config.architectures or ())
    maker: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    module = maker.from_pretrained(path, trust_remote_code=True).eval()
    given = {k: torch.from_numpy(v) for k, v in feeds.items()}
    with torch.no_grad():
        return timed(lambda: [module(**given)[0].numpy()], repeats)


RUNNERS: dict[str, Runner] = {
    "onnxruntime": Runner(".onnx", "onnxruntime", onnxruntime_runs),
    "openvino": Runner(".onnx", "openvino", openvino_runs),
    "onnxruntime-node": Runner(".onnx", "npm:onnxruntime-node", node_runs("onnxruntime-node")),
    "onnxruntime-web (wasm)": Runner(".onnx", "npm:onnxruntime-web", node_runs("onnxruntime-web")),
    "torch.export": Runner(".pt2", "torch", torch_runs),
    "executorch (XNNPACK)": Runner(".pt2", "executorch", executorch_runs),
    "transformers": Runner("", "transformers", transformers_runs),
}
"""By the name that the table has; what reads "" reads folders."""
