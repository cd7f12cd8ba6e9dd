"""A process that holds one model and times it: run as a script, it loads neither this package nor anything that is slow.

    python timing_worker.py job.json

The job names the model, the data of its large weights, what it is fed and where it runs. One line of JSON says that it is
loaded, or what went wrong; then each line on standard input, "SECONDS LEAST MOST", is answered by one line with the seconds
of single runs. It ends with its standard input, so that it never outlives who asked.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

WARMING = 2
"""Runs before those that are timed, in each turn: threads that slept wake up, caches fill."""
WARM_SECONDS = 0.5
"""What those take at the most: in a run of a second neither is seen."""


def main(path: str) -> None:
    """Loads the model of a job, and times it whenever it is asked to."""
    import numpy as np
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    blob = np.memmap(job["blob"], np.uint8, "c") if job["bytes"] else np.zeros(0, np.uint8)

    def array(entry: dict[str, Any]) -> Any:
        size = int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
        return blob[entry["offset"] : entry["offset"] + size].view(entry["dtype"]).reshape(entry["shape"])

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = job["threads"]
    for library in job["libraries"]:
        options.register_custom_ops_library(library)
    values = {}
    for name, entry in job["weights"].items():
        if entry["type"] is None:
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array(entry))
        else:  # a type that numpy lacks
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array(entry), entry["type"])
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    cuda = ["CUDAExecutionProvider"] if job["device"] == "cuda" else []
    if cuda and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    session = onnxruntime.InferenceSession(job["model"], options, providers=[*cuda, "CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    feeds = {name: np.array(array(entry)) for name, entry in job["feeds"].items() if name in wanted}
    fastest = seconds_of(session, feeds)
    answer("ready")
    for line in sys.stdin:
        seconds, least, most = (float(part) for part in line.split())
        for _ in range(min(WARMING, int(WARM_SECONDS / fastest))):
            fastest = min(fastest, seconds_of(session, feeds))
        times: list[float] = []
        start = time.perf_counter()
        while len(times) < least or (time.perf_counter() - start < seconds and len(times) < most):
            times.append(seconds_of(session, feeds))
        fastest = min(fastest, *times)
        answer(times)


def seconds_of(session: Any, feeds: dict[str, Any]) -> float:
    """Runs once; returns how long it took."""
    began = time.perf_counter()
    session.run(None, feeds)
    return time.perf_counter() - began


def answer(what: Any) -> None:
    """Writes one line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as err:
        answer({"error": f"{type(err).__name__}: {err}"})
        sys.exit(1)
