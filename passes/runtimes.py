"""What each runtime wants of the widths of a model that it is to run: one row each, with its sources.

A width that is no multiple of what a kernel works on is filled up with zeros, or computed by a slower kernel, or not at
all: it costs as much as the next multiple, or more. Sources, by the number in a row:

     1  MLAS packs the columns of a weight in sixteens: github.com/microsoft/onnxruntime,
        onnxruntime/core/mlas/lib/sgemm.cpp; described in github.com/li-weihua/DevelopNotes, docs/source/mlas.rst
     2  NVIDIA, Matrix Multiplication Background, "Tensor Core Requirements": multiples of 16 bytes, best of 128 (64 halves)
        docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html
     3  CUDA attention crashes where values are not as wide as keys: github.com/microsoft/onnxruntime/issues/28357
     4  TensorRT keeps convolutions of half floats in channels of 8, of int8 in 16 or 32:
        github.com/NVIDIA/TensorRT/issues/3876
     5  oneDNN blocks channels by 16 with AVX-512 (nChw16c), by 8 before it (nChw8c):
        oneapi-src.github.io/oneDNN/v3.0/dev_guide_understanding_memory_formats.html
     6  Qualcomm, HTP guidelines, "Number of channels": round up to a multiple of 32
        docs.qualcomm.com/doc/80-63442-10/topic/htp_guidelines_channels.html
     7  Apple, Deploying Transformers on the Apple Neural Engine: the last axis of a buffer is aligned to 64 bytes
        (32 halves): channels as exporters lay them out [b, s, c]; in the layout that Apple advises, [b, c, 1, s], it is the
        sequence, and widths are free machinelearning.apple.com/research/neural-engine-transformers
     8  ONNX Runtime Web reads four numbers at a time where four divide the width, and multiplies in tiles of 32:
        unpkg.com/onnxruntime-web@1.24.3/lib/wasm/jsep/webgpu/ops/3rd-party/matmul_packed_webgpu.ts
     9  transformers.js sizes the first cache by one number of heads, and one width of each, for all layers (of OpenELM
        alone by a list of heads): github.com/huggingface/transformers.js, src/configs.js (getKeyValueShapes)
    10  MatMulNBits has blocks of a power of two along the contracted axis, of which the last may be part of one; GenAI's
        model builder takes 32
        github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
    11  GenAI sizes its caches by one number of heads (a list of them only since pull request 2214):
        github.com/microsoft/onnxruntime-genai/issues/2062, github.com/microsoft/onnxruntime-genai/pull/2214
    12  K-quants are blocks of 256 along a row, and what no 256 divides falls back to larger types:
        github.com/ggml-org/llama.cpp/pull/1921, github.com/ggml-org/llama.cpp/pull/28474
    13  Marlin's 4-bit kernels want 128 along the contracted axis and groups of 128, of each part of a model that is split:
        github.com/vllm-project/vllm/issues/9913, github.com/vllm-project/vllm/pull/2497
    14  tensor parallelism divides heads, and key-value heads where there are as many as parts:
        docs.vllm.ai/en/v0.15.0/api/vllm/model_executor/models/llama/
    15  OpenVINO's weights of 4 bits come in groups of 128:
        docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/weight-compression/4-bit-weight-quantization.html
    16  TensorRT and QNN run 8 bits as QDQ (what quantises as it goes is left to the CPU; onnxruntime-qnn 2.7 knows
        QLinearConv beside): github.com/onnxruntime/onnxruntime-qnn/releases/tag/v2.7.0,
        onnxruntime.ai/docs/performance/model-optimizations/quantization.html,
        onnxruntime.ai/docs/execution-providers/QNN-ExecutionProvider.html
    17  DeciLM's feed-forward widths are multiples of 256 and all layers have as many heads:
        github.com/vllm-project/vllm, vllm/model_executor/models/nemotron_nas.py (_ffn_mult_to_intermediate_size)
"""

import math
from dataclasses import dataclass, replace

FILES = ("onnx", "checkpoint")
QDQ = ("int8-static",)
BLOCK = 32
"""Of 4-bit weights, where no runtime says another."""


@dataclass(frozen=True)
class Runtime:
    """What one runtime wants.

    Attributes:
        ffn: kept feed-forward widths are multiples of this, of each part where a model is split.
        conv: kept channels between convolutions are.
        heads: kept numbers of heads (of key-value heads, where heads share them) are.
        block: of 4-bit weights; it divides what a matrix of these contracts.
        always: whether weights have such blocks always, and not only where they are quantised in this run.
        equal_heads: whether all layers keep as many heads.
        equal_widths: whether values must be as wide as queries and keys.
        whole_layers: whether layers may go as a whole.
        schemes: how ``--quantize`` may quantise for it.
        reads: what it loads, of "onnx" and "checkpoint": one that reads ONNX may get it from a checkpoint later on.
        sources: numbers of the list above.
    """

    ffn: int
    conv: int
    block: int
    sources: tuple[int, ...]
    heads: int = 1
    always: bool = False
    equal_heads: bool = False
    equal_widths: bool = False
    whole_layers: bool = True
    schemes: tuple[str, ...] = ("int8", "int8-static", "int4")
    reads: tuple[str, ...] = FILES


RUNTIMES: dict[str, Runtime] = {
    "ort-cpu": Runtime(ffn=16, conv=16, block=BLOCK, sources=(1, 10)),
    "ort-cuda": Runtime(ffn=64, conv=8, block=BLOCK, equal_widths=True, sources=(2, 3, 10)),
    "tensorrt": Runtime(ffn=64, conv=32, block=128, equal_widths=True, schemes=QDQ, sources=(2, 3, 4, 16)),
    "openvino": Runtime(ffn=16, conv=16, block=128, sources=(5, 15)),
    "qnn": Runtime(ffn=32, conv=32, block=BLOCK, schemes=QDQ, sources=(6, 16)),
    "coreml": Runtime(ffn=32, conv=32, block=BLOCK, sources=(7,)),
    "webgpu": Runtime(
        ffn=32, conv=4, block=BLOCK, equal_heads=True, equal_widths=True, whole_layers=False, sources=(8, 9, 10)
    ),
    "genai": Runtime(
        ffn=32, conv=16, block=BLOCK, equal_heads=True, equal_widths=True, whole_layers=False, sources=(1, 3, 10, 11)
    ),
    "gguf": Runtime(
        ffn=256, conv=1, block=256, always=True, equal_heads=True, equal_widths=True, reads=("checkpoint",), sources=(12,)
    ),
    "vllm": Runtime(
        ffn=128, conv=1, block=128, equal_heads=True, equal_widths=True, reads=("checkpoint",), sources=(2, 13, 14)
    ),
}
"""By the names that ``--for`` takes: ONNX Runtime on the CPU and on CUDA, TensorRT, OpenVINO, Qualcomm's HTP, Core ML, the
browser (transformers.js), ONNX Runtime GenAI, llama.cpp's files, and vLLM."""

DECILM = Runtime(ffn=256, conv=1, block=BLOCK, equal_heads=True, reads=("checkpoint",), sources=(17,))
"""What ``--format deci`` can say, whatever runs it."""


def of_format(row: Runtime, deci: bool) -> Runtime:
    """Returns what a runtime wants of a format: of DeciLM both its own widths and those that the format can say."""
    if not deci:
        return row
    return replace(row, ffn=math.lcm(row.ffn, DECILM.ffn), equal_heads=True)
