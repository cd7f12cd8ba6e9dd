"""Prune the FFN of an ONNX file with qonnx's PruneChannels: a driver of `peer_files.Job`.

    python tools/dev/peers/peer_qonnx.py FOLDER        # started by bench.py peers, in the peer's own environment

qonnx leaves the choice of channels to its caller: here those of the smallest L2 norm in the widening weights of a
transformer's FFN (the matrices [d, h] whose h is larger than d), as many as the ratio says.
"""

import importlib
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from peer_files import Job


def main() -> int:
    """Prune one ONNX file as the job says."""
    wrapper = importlib.import_module("qonnx.core.modelwrapper").ModelWrapper
    prune_channels = importlib.import_module("qonnx.transformation.pruning").PruneChannels
    job = Job(Path(sys.argv[1]))
    proto = onnx.load(job.onnx)
    products = {node.input[1] for node in proto.graph.node if node.op_type == "MatMul"}
    widening = [
        t for t in proto.graph.initializer if t.name in products and len(t.dims) == 2 and 30_000 > t.dims[1] > t.dims[0]
    ]
    chosen = {}
    for tensor in widening:
        norms = np.linalg.norm(numpy_helper.to_array(tensor), axis=0)
        chosen[tensor.name] = {1: {int(c) for c in np.argsort(norms)[: round(job.ratio * norms.size)]}}
    with job.timed():
        pruned = wrapper(proto).transform(prune_channels(chosen))
    pruned.save(str(job.folder / "pruned.onnx"))
    job.finish(f"qonnx {version('qonnx')}", "plain ONNX", "L2, FFN alone")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
