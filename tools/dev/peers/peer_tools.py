"""The tools that `bench.py peers` runs: how each is started, in which environment, and what it cannot do.

Four kinds:

- liar-opt itself, with default settings, and with the widths shared out evenly;
- "formula, ours": the published rule among liar-opt's scores, repairs and allocations, where the authors' code does not
  take the model (see `passes/scores.py`, `passes/repairs.py`, `passes/allocations.py` for the sources);
- tools from PyPI;
- the authors' public code, from clones, started by `peer_bert.py` and `peer_llama.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liar_opt.tools.dev.peers.peer_tasks import Task

HERE = Path(__file__).resolve().parent
_TORCH = (
    "torch==2.13.0",
    "transformers==4.41.2",
    "accelerate",
    "ml-collections",
    "sentencepiece",
    "scipy",
    "onnx",
    "numpy",
)
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "onnxsim": ("onnxsim>=0.8", "onnxruntime", "onnx", "numpy"),
    "qonnx": ("qonnx", "onnxruntime", "onnx", "numpy"),
    "torch": _TORCH,
    "torch-pruning": (*_TORCH, "torch-pruning"),
    "modelopt-0.31": (
        "nvidia-modelopt==0.31.0",
        "pulp",
        "torchprofile==0.0.4",
        "torch==2.13.0",
        "transformers==4.48.3",
        "onnx",
        "numpy",
    ),
    "modelopt": ("nvidia-modelopt==0.47.0", "torch==2.13.0", "transformers==4.57.1", "onnx", "numpy"),
}
REPOSITORIES: dict[str, tuple[str, str]] = {
    "kwon": ("WoosukKwon+retraining-free-pruning", ""),
    "k-prune": ("snudm-starlab+K-prune", ""),
    "flap": ("CASIA-LMC-Lab+FLAP", ""),
    "grail": ("TWWinde+GRAIL_Compensation", "grail-llm"),
    "llm-pruner": ("horseee+LLM-Pruner", ""),
    "slicegpt": ("microsoft+TransformerCompression", ""),
    "osscar": ("mazumder-lab+OSSCAR", ""),
}
"""Clones, and the folder in them that holds the code."""
ENCODERS, DECODERS = ("classifier", "minilm"), ("smollm2",)
EVERYTHING = ENCODERS + DECODERS
PUBLISHED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "LIAR": (
        'BERT keeps "98% accuracy even after removing 50% of its parameters"',
        "abstract of arXiv 2407.13331",
        ("liar-opt", "liar-opt-even"),
    ),
    "Kwon et al.": (
        'BERT-base: "2.0x reduction in FLOPs and 1.56x speedup in inference latency, while maintaining '
        '< 1% loss in accuracy"',
        "abstract of arXiv 2204.09656",
        ("kwon",),
    ),
    "K-prune": (
        '"up to 58.02%p higher F1 score compared to existing retraining-free pruning algorithms" at 80 % on SQuAD',
        "abstract of arXiv 2308.03449",
        ("k-prune",),
    ),
    "OSSCAR": (
        'OPT-2.7B: "125x lower test perplexity on WikiText with 2x inference time speedup" than ZipLM',
        "abstract of arXiv 2403.12983",
        ("osscar", "osscar-llm"),
    ),
    "SliceGPT": (
        '"up to 25% of the model parameters (including embeddings) for LLAMA2-70B, OPT 66B and Phi-2 models while '
        'maintaining 99%, 99% and 90% zero-shot task performance"',
        "abstract of arXiv 2401.15024",
        ("slicegpt-llm",),
    ),
    "FLAP": ('LLaMA in "3 to 5 minutes on a single GPU"', "README of CASIA-LMC-Lab/FLAP", ("flap-llm", "formula-flap")),
}
"""What its authors say of a method, on their models: the words, their source, and the rows here."""
_LABELS = "needs the loss of a labelled task; sentence embeddings have none"


@dataclass(frozen=True)
class Peer:
    """One row of the table: a driver of `peer_files.Job`.

    Attributes:
        name: on the command line.
        label: in the table.
        tasks: the models that it is run on.
        driver: the script beside this file.
        method: of the driver.
        environment: the name of a virtual environment; this one if None.
        repository: the name of a clone, where code comes from one.
        graph: the ONNX file that it starts from, "plain" or "optimised".
        reasons: what an exit code of the driver means.
        excuses: for models that it cannot take: why.
    """

    name: str
    label: str
    tasks: tuple[str, ...]
    driver: str = ""
    method: str = ""
    environment: str | None = None
    repository: str | None = None
    graph: str = "plain"
    reasons: Mapping[int, str] = field(default_factory=dict)
    excuses: Mapping[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether this is liar-opt, or a formula in it."""
        return False

    def command(self, task: Task, ratio: float, folder: Path, repository: Path | None, seed: int) -> list[str]:
        """The driver's command line; writes the job."""
        job = {
            "method": self.method,
            "onnx": str(task.graph(self.graph)),
            "checkpoint": str(task.checkpoint),
            "calibration": str(task.calibration),
            "ratio": ratio,
            "seed": seed,
            "repository": str(repository) if repository else None,
        }
        (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
        return [str(HERE / self.driver), str(folder)]

    def read_report(self, folder: Path) -> dict[str, Any]:
        """What the driver wrote: tool, seconds, artefact, note."""
        return _only(json.loads((folder / "report.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Ours(Peer):
    """liar-opt by its own command.

    Attributes:
        options: of the command, beside model, data and sparsity.
        formula: whether this stands for a published method.
    """

    options: tuple[str, ...] = ()
    formula: bool = False

    @property
    def ours(self) -> bool:
        """Whether this is liar-opt, or a formula in it."""
        return not self.formula

    def command(self, task: Task, ratio: float, folder: Path, repository: Path | None, seed: int) -> list[str]:
        """`liar-opt`, without the latency that it would measure."""
        results = [f"--output={folder / 'pruned.onnx'}", f"--report={folder / 'liar.json'}", "--force", "--quiet"]
        shared = [f"--sparsity={ratio}", f"--seed={seed}", "--provider=cpu", "--no-latency", "--fresh"]
        return ["-m", "liar_opt", str(task.graph(self.graph)), *task.our_data(), *shared, *self.options, *results]

    def read_report(self, folder: Path) -> dict[str, Any]:
        """The same keys from liar-opt's own report."""
        report = json.loads((folder / "liar.json").read_text(encoding="utf-8"))
        seconds = report["seconds"]["total"]
        note = " ".join(self.options)
        return {"tool": "liar-opt", "seconds": round(seconds, 2), "artefact": "plain ONNX or checkpoint", "note": note}


@dataclass(frozen=True)
class Onnxsim(Peer):
    """onnxsim, by `peer_onnxsim.py`: whole heads up to the ratio, the rest from the FFN, then the refit of both.

    Attributes:
        score: "wanda" or "magnitude".
    """

    score: str = "wanda"

    def command(self, task: Task, ratio: float, folder: Path, repository: Path | None, seed: int) -> list[str]:
        """Its own options, not a job file."""
        heads, ffn = task.shares(ratio)
        chosen = ["--kind=both", f"--sparsity={ffn}", f"--heads-sparsity={heads}", f"--score={self.score}"]
        results = [f"--output={folder / 'pruned.onnx'}", f"--report={folder / 'report.json'}"]
        return [
            str(HERE / self.driver),
            str(task.graph(self.graph)),
            f"--calibration={task.calibration}",
            *chosen,
            *results,
        ]

    def read_report(self, folder: Path) -> dict[str, Any]:
        """The same keys from its report."""
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        note = f"{self.score}, refit, {self.graph} graph"
        return {
            **_only(report),
            "artefact": "plain ONNX" if self.graph == "plain" else "ONNX, fused operators",
            "note": note,
        }


def _only(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("tool", "seconds", "artefact", "note") if key in report}


def _ours(name: str, label: str, *options: str, tasks: tuple[str, ...] = EVERYTHING, formula: bool = False) -> Peer:
    return Ours(name, label, tasks, options=options, formula=formula)


def _formula(name: str, label: str, *options: str) -> Peer:
    more = (*options, "--weighting=none")
    return _ours(f"formula-{name}", f"{label} (formula, ours)", *more, tasks=ENCODERS, formula=True)


def _onnxsim(name: str, label: str, tasks: tuple[str, ...], **fields: Any) -> Peer:
    nothing = {3: "finds nothing to prune in this graph, and says nothing"}
    return Onnxsim(name, label, tasks, "peer_onnxsim.py", environment="onnxsim", reasons=nothing, **fields)


def _bert(name: str, label: str, environment: str, repository: str | None = None, labels: bool = False) -> Peer:
    excuses = {"minilm": _LABELS} if labels else {}
    return Peer(name, label, ENCODERS, "peer_bert.py", name, environment, repository, excuses=excuses)


def _llama(method: str, label: str, repository: str | None, environment: str = "torch") -> Peer:
    return Peer(f"{method}-llm", label, DECODERS, "peer_llama.py", method, environment, repository)


_ALL: tuple[Peer, ...] = (
    _ours("liar-opt", "liar-opt"),
    _ours("liar-opt-even", "liar-opt, same widths in all layers", "--allocate=uniform"),
    _onnxsim("onnxsim-wanda", "onnxsim Wanda, optimised graph", ENCODERS, graph="optimised"),
    _onnxsim("onnxsim-l2", "onnxsim L2, optimised graph", ENCODERS, graph="optimised", score="magnitude"),
    _onnxsim("onnxsim-plain", "onnxsim Wanda, plain graph", EVERYTHING),
    Peer("qonnx", "qonnx PruneChannels", ENCODERS, "peer_qonnx.py", "", "qonnx"),
    _bert("torch-pruning-l2", "Torch-Pruning, group L2", "torch-pruning"),
    _bert("torch-pruning-taylor", "Torch-Pruning, Taylor", "torch-pruning", labels=True),
    _bert("kwon", "Kwon et al.", "torch", "kwon", labels=True),
    _bert("k-prune", "K-prune", "torch", "k-prune", labels=True),
    _bert("osscar", "OSSCAR", "torch", "osscar"),
    _bert("gradnas", "NVIDIA Model Optimizer 0.31, GradNAS", "modelopt-0.31", labels=True),
    _formula("flap", "FLAP", "--score=wifv", "--repair=bias", "--allocate=flap"),
    _formula("wanda-sp", "Wanda-sp", "--score=activation-weighted", "--repair=none", "--allocate=uniform"),
    _formula("grail", "GRAIL on Wanda-sp", "--score=activation-weighted", "--repair=liar", "--allocate=uniform"),
    _formula("slimgpt", "SlimGPT", "--score=greedy", "--repair=liar", "--ridge=1e-2", "--allocate=uniform"),
    _llama("flap", "FLAP", "flap"),
    _llama("wanda-sp", "Wanda-sp", "flap"),
    _llama("slimgpt", "SlimGPT, as in GRAIL's repository", "grail"),
    _llama("grail-flap", "GRAIL on FLAP", "grail"),
    _llama("grail-slimgpt", "GRAIL on SlimGPT", "grail"),
    _llama("llm-pruner", "LLM-Pruner, untrained", "llm-pruner"),
    _llama("slicegpt", "SliceGPT", "slicegpt"),
    _llama("osscar", "OSSCAR", "osscar"),
    _llama("torch-pruning-l2", "Torch-Pruning, group L2", None, "torch-pruning"),
    _llama("minitron", "NVIDIA Model Optimizer, Minitron", None, "modelopt"),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
