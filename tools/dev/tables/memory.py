"""Prune a model that is larger than the memory it may use, and say what it took.

    python tools/dev/bench.py memory --size 3GB --memory 2GB

The model is LLaMA-shaped (RMSNorm, rotary embeddings, grouped-query attention by Expand, SwiGLU) with random weights in
external data, written tensor by tensor. The installed command prunes it on random token ids. Printed are the peak of the
anonymous memory (what the process made itself: this stands beside the limit) and of the resident memory (pages of the
mapped files included, which the system may take back), and the time beside one dense forward pass of the same batches in
ONNX Runtime. Nothing of the model is kept.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from liar_opt.runtime.memory import parse_size, show_size

SHAPES = {"small": (1024, 2816, 16, 4), "large": (2048, 5504, 32, 8)}
"""Width, feed-forward width, heads, key-value heads."""
LARGE_FROM = 10**9
VOCABULARY = 8192
LENGTH = 64


class LlamaWriter:
    """Writes the model: weights go to the file as they are drawn.

    Args:
        folder: where ``model.onnx`` and its ``model.onnx.data`` go.
        size: bytes of weights, about; rounded to whole layers.
        seed: of the weights.
    """

    def __init__(self, folder: Path, size: int, seed: int) -> None:
        self.path = folder / "model.onnx"
        self.width, self.hidden, self.heads, self.groups = SHAPES["large" if size >= LARGE_FROM else "small"]
        self.size = self.width // self.heads
        layer = self.width * (2 * self.width + 2 * self.groups * self.size + 3 * self.hidden)
        self.layers = max(2, round((size / 4 - 2 * VOCABULARY * self.width) / layer))
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.offset = 0

    def write(self) -> Path:
        """Writes the files and returns the path of the model."""
        with self.path.with_name(self.path.name + ".data").open("wb") as self.stream:
            self._embed()
            for layer in range(self.layers):
                self._attention(f"layers.{layer}.attention")
                self._feed_forward(f"layers.{layer}.mlp")
            self.node("MatMul", [self._norm("norm"), self.weight("lm_head", self.width, VOCABULARY)], "logits")
        ends = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", LENGTH])]
        outs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", LENGTH, VOCABULARY])]
        graph = helper.make_graph(self.nodes, "llama", ends, outs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        self.path.write_bytes(model.SerializeToString())
        return self.path

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds a node with one output."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{len(self.nodes)}", **attributes))
        return output

    def weight(self, name: str, *shape: int, gain: float = 1.0) -> str:
        """Draws a matrix, writes it to the external data, and returns its name."""
        value = self.rng.standard_normal(shape, np.float32) * np.float32(gain / shape[0] ** 0.5)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, entry in (("location", self.path.name + ".data"), ("offset", self.offset), ("length", value.nbytes)):
            tensor.external_data.add(key=key, value=str(entry))
        self.initializers.append(tensor)
        self.stream.write(value.data)
        self.offset += value.nbytes
        return name

    def constant(self, name: str, value: Any) -> str:
        """Adds a small initializer."""
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _embed(self) -> None:
        self.x = self.node("Gather", [self.weight("embed", VOCABULARY, self.width, gain=90.0), "input_ids"], "embedded")
        angles = np.arange(LENGTH)[:, None] / 10000.0 ** (np.arange(0, self.size, 2) / self.size)
        both = np.concatenate([angles, angles], axis=1).astype(np.float32)
        self.constant("cos", np.cos(both))
        self.constant("sin", np.sin(both))
        self.constant("mask", np.triu(np.full((LENGTH, LENGTH), -1e9, np.float32), 1))
        self.constant("scale", np.float32(self.size**-0.5))
        self.constant("two", np.float32(2))
        self.constant("tiny", np.float32(1e-6))
        self.constant("by_head", np.asarray([0, LENGTH, self.heads, self.size]))
        self.constant("by_group", np.asarray([0, LENGTH, self.groups, self.size]))
        self.constant("apart", np.asarray([2]))
        self.constant("repeat", np.asarray([1, 1, self.heads // self.groups, 1, 1]))
        self.constant("joined", np.asarray([0, self.heads, LENGTH, self.size]))
        self.constant("flat", np.asarray([0, LENGTH, self.width]))
        for name, value in (("zero", 0), ("middle", self.size // 2), ("end", self.size), ("last", 3)):
            self.constant(name, np.asarray([value]))

    def _norm(self, name: str) -> str:
        gain = self.constant(f"{name}.gain", np.ones(self.width, np.float32))
        square = self.node("Pow", [self.x, "two"], f"{name}_square")
        mean = self.node("ReduceMean", [square], f"{name}_mean", axes=[-1], keepdims=1)
        root = self.node("Sqrt", [self.node("Add", [mean, "tiny"], f"{name}_shifted")], f"{name}_root")
        return self.node("Mul", [self.node("Div", [self.x, root], f"{name}_unit"), gain], f"{name}_out")

    def _heads(self, name: str, source: str, heads: int, shape: str, rotate: bool) -> str:
        weight = self.weight(f"{name}.weight", self.width, heads * self.size)
        product = self.node("MatMul", [source, weight], f"{name}_flat")
        split = self.node("Reshape", [product, shape], f"{name}_split")
        x = self.node("Transpose", [split], f"{name}_heads", perm=[0, 2, 1, 3])
        if not rotate:
            return x
        first = self.node("Slice", [x, "zero", "middle", "last"], f"{name}_first")
        second = self.node("Slice", [x, "middle", "end", "last"], f"{name}_second")
        turned = self.node("Concat", [self.node("Neg", [second], f"{name}_neg"), first], f"{name}_turned", axis=-1)
        left = self.node("Mul", [x, "cos"], f"{name}_cos")
        return self.node("Add", [left, self.node("Mul", [turned, "sin"], f"{name}_sin")], f"{name}_rotated")

    def _repeated(self, name: str, x: str) -> str:
        apart = self.node("Unsqueeze", [x, "apart"], f"{name}_apart")
        return self.node("Reshape", [self.node("Expand", [apart, "repeat"], f"{name}_wide"), "joined"], f"{name}_repeated")

    def _attention(self, name: str) -> None:
        h = self._norm(f"{name}_norm")
        q = self._heads(f"{name}.q", h, self.heads, "by_head", True)
        k = self._repeated(f"{name}.k", self._heads(f"{name}.k", h, self.groups, "by_group", True))
        v = self._repeated(f"{name}.v", self._heads(f"{name}.v", h, self.groups, "by_group", False))
        kt = self.node("Transpose", [k], f"{name}_kt", perm=[0, 1, 3, 2])
        scores = self.node("Mul", [self.node("MatMul", [q, kt], f"{name}_qk"), "scale"], f"{name}_scaled")
        shares = self.node("Softmax", [self.node("Add", [scores, "mask"], f"{name}_masked")], f"{name}_shares", axis=-1)
        seen = self.node("MatMul", [shares, v], f"{name}_seen")
        back = self.node("Transpose", [seen], f"{name}_back", perm=[0, 2, 1, 3])
        flat = self.node("Reshape", [back, "flat"], f"{name}_joined")
        self._add(name, self.node("MatMul", [flat, self.weight(f"{name}.o.weight", self.width, self.width)], f"{name}_o"))

    def _feed_forward(self, name: str) -> None:
        h = self._norm(f"{name}_norm")
        gate = self.node("MatMul", [h, self.weight(f"{name}.gate.weight", self.width, self.hidden)], f"{name}_gate")
        up = self.node("MatMul", [h, self.weight(f"{name}.up.weight", self.width, self.hidden)], f"{name}_up")
        silu = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{name}_sigmoid")], f"{name}_silu")
        both = self.node("Mul", [silu, up], f"{name}_both")
        self._add(
            name, self.node("MatMul", [both, self.weight(f"{name}.down.weight", self.hidden, self.width)], f"{name}_d")
        )

    def _add(self, name: str, change: str) -> None:
        self.x = self.node("Add", [self.x, change], f"{name}_stream")


def watch(command: list[str]) -> tuple[float, dict[str, int], str]:
    """Runs a command; returns its seconds, the peaks of its memory by kind, and what it printed."""
    began = time.perf_counter()
    peaks = {"RssAnon": 0, "VmHWM": 0}
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                break
            for name, value in (line.split(":", 1) for line in lines):
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(0.02)
        code = process.wait()
        printed.seek(0)
        text = printed.read()
    if code:
        sys.exit(f"{' '.join(command)} failed with {code}:\n{text}")
    return time.perf_counter() - began, peaks, text


FORWARD = """
import sys, time, numpy as np, onnxruntime as ort
model, feeds, batch = sys.argv[1], np.load(sys.argv[2])["input_ids"], int(sys.argv[3])
session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
batches = [feeds[i : i + batch] for i in range(0, len(feeds), batch)]
session.run(None, {"input_ids": batches[0]})
began = time.perf_counter()
for b in batches:
    session.run(None, {"input_ids": b})
print(time.perf_counter() - began)
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    parser.add_argument("--size", default="300MB", help="bytes of weights (default: %(default)s)")
    parser.add_argument("--memory", default="2GB", help="given to the command (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help=f"sequences of {LENGTH} tokens (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sparsity", default="0.3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")


def main(options: argparse.Namespace) -> None:
    """Makes the model, prunes it, and prints the table."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        writer = LlamaWriter(folder, parse_size(options.size), options.seed)
        model = writer.write()
        print(f"{writer.layers} layers, {show_size(writer.offset)} of weights in float32", flush=True)
        ids = np.random.default_rng(options.seed).integers(0, VOCABULARY, (options.samples, LENGTH))
        np.savez(folder / "feeds.npz", input_ids=ids)
        batch = str(options.batch_size)
        forward = [sys.executable, "-c", FORWARD, str(model), str(folder / "feeds.npz"), batch]
        _, dense, printed = watch(forward)
        dense_seconds = float(printed.split()[-1])
        command = [sys.executable, "-m", "liar_opt", str(model), "--calibration", str(folder / "feeds.npz")]
        command += ["--samples", str(options.samples), "--batch-size", batch, "--sparsity", options.sparsity]
        command += ["--allocate", "uniform", "--report", str(folder / "report.json"), "--memory", options.memory]
        seconds, peaks, printed = watch([*command, "--seed", str(options.seed)])
        print(printed)
        report = json.loads((folder / "report.json").read_text())
        written = sum(p.stat().st_size for p in folder.glob("model.liar.onnx*"))
    limit = parse_size(options.memory)
    tokens = options.samples * LENGTH
    passes = {k: round(v, 1) for k, v in report["seconds"].items()}
    print(f"seed {options.seed}, {os.cpu_count()} cores; {tokens:,} tokens in batches of {batch} x {LENGTH}")
    print("| | limit | foreseen | anonymous memory | resident, with mapped files |\n| --- | ---: | ---: | ---: | ---: |")
    cells = [limit, report["memory"]["estimated_peak"], peaks["RssAnon"], peaks["VmHWM"]]
    print(f"| liar-opt | {' | '.join(show_size(c) for c in cells)} |")
    print(f"| forward pass | | | {show_size(dense['RssAnon'])} | {show_size(dense['VmHWM'])} |")
    disk = show_size(report["memory"]["on_disk"])
    print(f"\n{show_size(writer.offset)} in, {show_size(written)} out; {disk} on disk meanwhile")
    print(f"{seconds:.0f} s, one dense forward pass of the same batches {dense_seconds:.1f} s; by pass: {passes}")
