"""Prune one ONNX file with onnxsim, to have something to compare with. Stands alone; runs in an environment of its own.

    python -m venv peer && peer/bin/pip install 'onnxsim>=0.8' onnxruntime
    peer/bin/python tools/dev/peers/peer_onnxsim.py model.onnx --calibration batches.npz --kind ffn --sparsity 0.5 \
        --output pruned.onnx --report pruned.json

The calibration file holds arrays named `<batch>.<graph input>`, such as `00003.input_ids`; batches are taken in the order
of their names. What onnxsim does with them: it ranks channels by |weight row| * |activation| and heads by |W| * |X|, both
over the whole batch with its padding (`apply_structured_wanda_pruning`, `apply_attention_head_wanda_pruning`); then
`apply_pruning_finetune` fits every matched MatMul and Gemm to the dense model's activations by ridge regression.
It matches fixed patterns. A graph in which it finds none comes back as it was, without a word, so the report says
which weights changed their shape.

The report holds seconds (wall and processor) of each stage, the peak memory of the process, and the parameters before and
after. No stage is warmed up and nothing but the stages is timed: reading, checking and writing are apart.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxsim
from onnxsim.onnx_simplifier import PyModelExecutor as executor
from peer_files import peak_mebibytes, read_batches


def shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Dimensions of every initializer."""
    return {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}


class Stages:
    """Seconds by name of stage: wall, processor, and what of the wall is onnxsim running the model on a batch.

    onnxsim makes a new session for every batch, on one thread; that counts as running the model.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self._running = 0.0
        run = executor.Run

        def timed(itself: Any, *arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(itself, *arguments)
            finally:
                self._running += time.perf_counter() - began

        executor.Run = timed

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under a name."""
        wall, processor, running = time.perf_counter(), time.process_time(), self._running
        yield
        self.seconds[name] = {
            "wall": round(time.perf_counter() - wall, 2),
            "processor": round(time.process_time() - processor, 2),
            "running_model": round(self._running - running, 2),
            "peak_mib": round(peak_mebibytes(), 1),
        }
        print(f"{name}: {self.seconds[name]}", file=sys.stderr, flush=True)


def prune(
    model: onnx.ModelProto, batches: list[dict[str, Any]], options: argparse.Namespace, stages: Stages
) -> onnx.ModelProto:
    """Remove channels and heads, then fit the rest, as the options say."""
    calls: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
        "ffn": lambda m: onnxsim.apply_structured_wanda_pruning(m, calibration_data=batches, sparsity=options.sparsity),
        "heads": lambda m: onnxsim.apply_attention_head_wanda_pruning(
            m, calibration_data=batches, sparsity=options.heads_sparsity
        ),
    }
    if options.score == "magnitude":
        calls = {
            "ffn": lambda m: onnxsim.apply_structured_pruning(m, sparsity=options.sparsity),
            "heads": lambda m: onnxsim.apply_attention_head_pruning(m, sparsity=options.heads_sparsity),
        }
    pruned = onnx.ModelProto()
    pruned.CopyFrom(model)
    # Heads first: the projections around a fused attention node are a channel group of their own to the other call.
    for kind in ("heads", "ffn") if options.kind == "both" else (options.kind,):
        with stages.stage(f"prune {kind}"):
            pruned = calls[kind](pruned)
    if not options.no_refit:
        with stages.stage("refit"):
            pruned = onnxsim.apply_pruning_finetune(model, pruned, calibration_data=batches, reg_param=options.ridge)
    return pruned


def main() -> int:
    """Prune, write the model and the report; exit code 3 when onnxsim found nothing to prune."""
    parser = argparse.ArgumentParser(description="prune one ONNX file with onnxsim")
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help=".npz with arrays named <batch>.<graph input>")
    parser.add_argument("--kind", choices=("ffn", "heads", "both"), default="ffn")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--heads-sparsity", type=float, help="of the heads, where it is another")
    parser.add_argument("--score", choices=("wanda", "magnitude"), default="wanda")
    parser.add_argument("--no-refit", action="store_true", help="leave out apply_pruning_finetune")
    parser.add_argument(
        "--ridge", type=float, default=1e-2, help="reg_param of apply_pruning_finetune; its default is 1e-2"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    options.heads_sparsity = options.sparsity if options.heads_sparsity is None else options.heads_sparsity

    batches, model = read_batches(options.calibration), onnx.load(options.model)
    before, before_mib, stages = shapes(model), peak_mebibytes(), Stages()
    began, processor = time.perf_counter(), time.process_time()
    pruned = prune(model, batches, options, stages)
    seconds, processor = time.perf_counter() - began, time.process_time() - processor

    after = shapes(pruned)
    changed = {name: [before.get(name), shape] for name, shape in after.items() if before.get(name) != shape}
    onnx.checker.check_model(pruned)
    onnx.save(pruned, options.output)
    report = {
        "tool": f"onnxsim {onnxsim.__version__}",
        "kind": options.kind,
        "sparsity": options.sparsity,
        "heads_sparsity": options.heads_sparsity,
        "score": options.score,
        "refit": not options.no_refit,
        "batches": len(batches),
        "seconds": round(seconds, 2),
        "processor_seconds": round(processor, 2),
        "stages": stages.seconds,
        "peak_mib": round(peak_mebibytes(), 1),
        "peak_mib_before": round(before_mib, 1),
        "parameters": [sum(map(math.prod, before.values())), sum(map(math.prod, after.values()))],
        "changed_weights": changed,
    }
    options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if changed else 3


if __name__ == "__main__":
    sys.exit(main())
