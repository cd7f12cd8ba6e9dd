"""The options of :func:`liar_opt.prune`: each once, with its type, default and help, and what it belongs to.

The signature of ``prune`` (a test holds it against this), its documentation, the command and the report read them from
here. What is a field of a pass has its default and its help from there.
"""

import inspect
import numbers
import re
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np

from liar_opt.passes.allocate_widths import DEFAULT_SPARSITY, AllocateWidthsPass
from liar_opt.passes.allocations import ALLOCATIONS
from liar_opt.passes.base import Observer, Progress, no_progress
from liar_opt.passes.gradient_scores import Labelled, Loss
from liar_opt.passes.limit_drop import Metric
from liar_opt.passes.pattern_weights import PatternWeightsPass
from liar_opt.passes.prune_groups import VALUE_CUTS, WEIGHTINGS, PruneGroupsPass
from liar_opt.passes.repairs import REPAIRS, RepairFunction
from liar_opt.passes.runtimes import RUNTIMES
from liar_opt.passes.scores import SCORES, ScoreFunction
from liar_opt.runtime.arrays import SOLVERS
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.patterns import SOLVERS as PATTERN_SOLVERS
from liar_opt.runtime.sessions import PROVIDERS

PACKINGS = ("auto", "on", "off")
BACKENDS = ("torch", "onnxruntime")
WHOLE_LAYERS = ("auto", "on", "off")
TUNED = ("biases", "lora")
DECI: Literal["deci"] = "deci"
"""What ``checkpoint`` may be beside true and false."""
BLOCK_REPAIRS = ("auto", "map", "fold", "none")
UNSAID: Any = object()


@dataclass(frozen=True)
class Description:
    """What there is to say of an option beside its type and default.

    Attributes:
        help: one sentence, without its full stop.
        group: of the command's options; "" for an option that Python alone has.
        kind: what the command reads a value as.
        metavar: what the command's help calls a value.
        choices: the values that there are.
        more: what the command's help says beside.
        flag: the command's own spelling, of an option that takes no value there.
        spelled: likewise, of one that takes a value, where that is not its name.
        sets: what the flag sets.
        shown: the command's own help, where that must say something else.
        demo: whether ``liar-opt demo`` has it.
        data: whether it says how calibration data is read.
    """

    help: str = ""
    group: str = ""
    kind: type = str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    more: str = ""
    flag: str = ""
    spelled: str = ""
    sets: Any = UNSAID
    shown: str = ""
    demo: bool = True
    data: bool = False


def documented(thing: Any) -> dict[str, str]:
    """Returns the texts of the "Attributes" or "Args" section of a Google-style docstring, by name."""
    texts: dict[str, str] = {}
    inside = False
    name = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        entry = re.match(r"    (\w+): (.*)", line)
        if not line.startswith(" ") and line:
            inside = line in ("Attributes:", "Args:")
        elif inside and entry:
            name, texts[entry[1]] = entry[1], entry[2]
        elif inside and name and line.strip():
            texts[name] += f" {line.strip()}"
    return {key: text.rstrip(".") for key, text in texts.items()}


def _told(group: str = "", **more: Any) -> dict[str, Description]:
    """Describes an option whose help is said in ``PruneOptions``."""
    return {"description": Description(group=group, **more)}


def _of(step: type[Any], name: str, **more: Any) -> dict[str, Description]:
    """Describes an option that is a field of a pass."""
    return _told("pruning", help=documented(step).get(name, ""), **more)


def _ratio(name: str, **more: Any) -> dict[str, Description]:
    return _of(AllocateWidthsPass, name, kind=float, metavar="RATIO", **more)


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The options of one run.

    Attributes:
        uniform: layers keep the same width; if None as a checkpoint needs it.
        new_bias: layers without a bias may get one for the repair; if None unless a checkpoint has no place for it.
        target: what the result shall be, instead of a ratio: params=10M, size=40MB, flops=0.5x, latency=2x (twice as fast),
            or latency=5ms.
        max_drop: the largest loss, such as 1% or 0.01, instead of a ratio: as much is removed as it allows. Without a
            metric it is 1 - the mean cosine of the first output on held-back calibration batches.
        metric: a function that takes a model (an ONNX proto) and returns a number, the higher the better; max_drop is
            relative to its value on the dense model then.
        allocate: how a ratio is shared out over the layers: "uniform" takes it of each, "curves" by the error that each
            width leaves in the output after repair, "global" and "flap" by the scores; if None, "curves" for a sparsity
            where there is calibration data, else "uniform".
        whole_layers: whether whole attention and feed-forward layers may go, where the error curves say so: what they add
            to the residual stream is a constant then, or a linear map of what they read. "auto" lets all go that the
            format can say, but attention whose keys and values are outputs of the model; "on" that, too: they are computed
            still. A torch module is a traced graph then. It takes up to twice as long to measure.
        search: seconds, at the most, to exchange widths between groups from there, by the measured error of the output.
        experts: share of the experts of each layer that go, with their rows of the router. They go first: a sparsity, a
            target or a limit counts what they took. Alone, nothing else is cut.
        vocabulary: words of these texts alone are left (what calibration data may be, read by the tokenizer), or those of
            a list of token ids (.json, .npy, .txt, an array); special tokens stay; alone, nothing else is cut.
        vocabulary_coverage: the most frequent words that cover this share of the tokens (0.999), of the vocabulary's texts
            or of the calibration data.
        small_tokenizer: write a smaller tokenizer beside the model (OUT.tokenizer), and have the model take its ids.
        blocks: so many consecutive blocks are left out, and what is left is repaired where they were; which ones is chosen
            by the error of the output. They go first: a sparsity, a target or a limit counts what they took. Alone, no
            width is cut. "auto" tries 0, 1, 2, ... in one budget with widths, and takes what leaves the least error: each
            is a run of its own.
        block_repair: what stands where blocks were: "map" is a linear map of its own, "fold" changes the last product
            before them, which a checkpoint can say, "none" nothing; "auto" takes "fold" for checkpoints and else "map".
        runtime: what the result is to run on; widths then are what its kernels want, and equal where it knows one number.
        tensor_parallel: the parts that the result is to be split into; they divide all heads and feed-forward widths.
        quantize: quantise the result: ONNX to "int8" (activations as they come), "int8-static" (their ranges from the
            calibration data) or "int4" (weights in blocks, which widths then are multiples of), a checkpoint to "int8"
            (weights alone, by torchao).
        sparse_storage: write weights of many zeros as sparse initializers (ONNX), where that takes fewer bytes.
        tune: minutes, at the most, in which a small subset of a pruned module is trained against the outputs of the dense
            one on the calibration data, nothing labelled; undone where that is no better on held-back batches. Without it
            nothing is trained.
        tune_what: what is trained: "biases", and the gains of normalisations, or "lora", which adds products of low rank to
            the matrices of linear layers, merged at the end; what is zero stays zero.
        refit: fit all biases and gains of normalisations to the tensors of the dense model once more, behind the repair, in
            closed form; undone where that is no better on held-back batches. Of ONNX files what tune is of modules.
        choose: pick among scores ("score"; of a pattern alone its solvers), draws of the calibration samples
            ("samples"), or both ("score,samples"): each try is the whole cut to the same widths, and what loses least on
            samples that no try has seen is the result; as many samples are read as all draws need.
        choose_tries: so many are made, at the most.
        choose_minutes: none begins that would end later, by the longest so far.
        passes: the passes that run, with their options, as allocate-widths{ffn=0.5},prune-groups{repair=bias}, instead of
            the options that are theirs; the analysis and the check of the result always run.
        tokenizer: folder of a Hugging Face tokenizer, needed for texts.
        text_column: the column with the text, for .jsonl, .csv and datasets.
        samples: calibration samples at most.
        batch_size: samples a batch.
        sequence_length: tokens of a sample at most.
        mask_input: the input that is zero at padding; found by itself if None.
        packing: whether texts are written behind each other and cut into full windows: "on", "off", or "auto", which does
            so where the model is causal.
        provider: "auto", "cpu" or "cuda".
        solver: where selection and repair are computed: "host" is numpy on the CPU, "device" torch on the CUDA device, and
            moments that were measured there stay; "auto" takes the device where there is one and a torch for it, unless the
            provider is "cpu".
        memory: what the work may take beside the files that it maps, in bytes or as 2GB or 512MiB; half of what is free if
            None.
        resume: a folder in which finished segments are kept: a run that was interrupted goes on from the last one. It is
            made where it is not there, and removed when the run is done.
        fresh: measure error curves and latency tables again, instead of taking those that an earlier run on the same model
            and data has kept in the cache folder.
        seed: for all that is drawn.
        example: a batch to trace a torch module with, if nothing else says what it takes.
        checkpoint: whether a pruned module must be one that stock transformers loads; true for its models if None. "deci"
            is one of DeciLM (Nemotron-NAS): a Llama-shaped model whose layers have feed-forward widths of their own.
        allow_pickle: read weights from pickle files, which can run code.
        backend: what measures a torch module: "torch", or "onnxruntime" on its export.
        loss: for the scores that need gradients (torch modules alone): takes the outputs by name and the labels, and
            returns a scalar tensor.
        labelled: pairs of the module's arguments, a batch by name, and the labels that the loss takes.
        custom_ops: shared libraries with operators that ONNX Runtime lacks and the model needs; they run code.
        dry_run: stop after the widths are decided; the result holds the unpruned model.
        latency: whether to time the dense and the pruned model.
        progress: called with (stage, done, total).
        observer: called after each pass with the pass and its result.
    """

    sparsity: float | None = field(
        default=None, metadata=_ratio("sparsity", more=f"{DEFAULT_SPARSITY:g} if no ratio is given")
    )
    ffn: float | None = field(default=None, metadata=_ratio("ffn"))
    heads: float | None = field(default=None, metadata=_ratio("heads"))
    values: float | None = field(default=None, metadata=_ratio("values"))
    value_cut: str = field(
        default=PruneGroupsPass.value_cut, metadata=_of(PruneGroupsPass, "value_cut", choices=VALUE_CUTS)
    )
    query_key: float | Literal["auto"] | None = field(default=None, metadata=_ratio("query_key"))
    recurrent: float | None = field(default=None, metadata=_ratio("recurrent"))
    multiple_of: int = field(
        default=AllocateWidthsPass.multiple_of, metadata=_of(AllocateWidthsPass, "multiple_of", kind=int, metavar="N")
    )
    uniform: bool | None = field(default=None, metadata=_told("pruning", flag="--uniform", sets=True, demo=False))
    new_bias: bool | None = field(
        default=None,
        metadata=_told(
            "pruning", flag="--no-new-bias", sets=False, shown="never give a layer a bias that had none", demo=False
        ),
    )
    target: str | None = field(default=None, metadata=_told("pruning", metavar="GOAL"))
    max_drop: float | str | None = field(default=None, metadata=_told("pruning", metavar="LOSS"))
    metric: Metric | None = field(default=None, metadata=_told())
    allocate: str | None = field(default=None, metadata=_told("pruning", choices=tuple(ALLOCATIONS)))
    whole_layers: str = field(default="off", metadata=_told("pruning", choices=WHOLE_LAYERS))
    search: float | None = field(default=None, metadata=_told("pruning", kind=float, metavar="SECONDS"))
    experts: float | None = field(default=None, metadata=_told("pruning", kind=float, metavar="RATIO", demo=False))
    vocabulary: Any = field(default=None, metadata=_told("pruning", metavar="TEXTS", demo=False))
    vocabulary_coverage: float | None = field(
        default=None, metadata=_told("pruning", kind=float, metavar="SHARE", demo=False)
    )
    small_tokenizer: bool = field(default=False, metadata=_told("pruning", flag="--small-tokenizer", sets=True, demo=False))
    blocks: int | Literal["auto"] | None = field(default=None, metadata=_told("pruning", metavar="N", demo=False))
    block_repair: str = field(default="auto", metadata=_told("pruning", choices=BLOCK_REPAIRS, demo=False))
    runtime: str | None = field(default=None, metadata=_told("pruning", choices=tuple(RUNTIMES), spelled="--for"))
    tensor_parallel: int | None = field(default=None, metadata=_told("pruning", kind=int, metavar="N"))
    quantize: str | None = field(default=None, metadata=_told("pruning", choices=("int8", "int8-static", "int4")))
    pattern: str | None = field(default=None, metadata=_of(PatternWeightsPass, "pattern", metavar="PATTERN", demo=False))
    pattern_solver: str = field(
        default=PatternWeightsPass.pattern_solver,
        metadata=_of(PatternWeightsPass, "pattern_solver", choices=tuple(PATTERN_SOLVERS), demo=False),
    )
    sparse_storage: bool = field(default=False, metadata=_told("pruning", flag="--sparse-storage", sets=True, demo=False))
    tune: float | None = field(default=None, metadata=_told("pruning", kind=float, metavar="MINUTES", demo=False))
    tune_what: str = field(default="biases", metadata=_told("pruning", choices=TUNED, demo=False))
    refit: bool = field(default=False, metadata=_told("pruning", flag="--refit", sets=True, demo=False))
    choose: str | None = field(default=None, metadata=_told("pruning", metavar="WORDS", demo=False))
    choose_tries: int = field(default=6, metadata=_told("pruning", kind=int, metavar="N", demo=False))
    choose_minutes: float | None = field(default=None, metadata=_told("pruning", kind=float, metavar="MINUTES", demo=False))
    passes: str | None = field(
        default=None, metadata=_told("pruning", metavar="LIST", more="--list-passes shows them", demo=False)
    )
    score: str | ScoreFunction = field(
        default=PruneGroupsPass.score, metadata=_of(PruneGroupsPass, "score", choices=tuple(SCORES))
    )
    repair: str | RepairFunction = field(
        default=PruneGroupsPass.repair, metadata=_of(PruneGroupsPass, "repair", choices=tuple(REPAIRS))
    )
    ridge: float | None = field(
        default=PruneGroupsPass.ridge, metadata=_of(PruneGroupsPass, "ridge", kind=float, metavar="RIDGE")
    )
    weighting: str = field(
        default=PruneGroupsPass.weighting, metadata=_of(PruneGroupsPass, "weighting", choices=WEIGHTINGS)
    )
    tokenizer: str | Path | None = field(
        default=None, metadata=_told("calibration", kind=Path, metavar="DIR", demo=False, data=True)
    )
    text_column: str | None = field(default=None, metadata=_told("calibration", metavar="NAME", demo=False, data=True))
    samples: int = field(default=512, metadata=_told("calibration", kind=int, metavar="N", data=True))
    batch_size: int = field(default=32, metadata=_told("calibration", kind=int, metavar="N", data=True))
    sequence_length: int | None = field(default=None, metadata=_told("calibration", kind=int, metavar="N", data=True))
    mask_input: str | None = field(default=None, metadata=_told("calibration", metavar="NAME", demo=False, data=True))
    packing: str = field(default="auto", metadata=_told("calibration", choices=PACKINGS, demo=False, data=True))
    provider: str = field(default="auto", metadata=_told("calibration", choices=PROVIDERS))
    solver: str = field(default="auto", metadata=_told("calibration", choices=SOLVERS))
    memory: int | str | None = field(default=None, metadata=_told("calibration", metavar="SIZE"))
    resume: str | Path | None = field(
        default=None,
        metadata=_told("calibration", kind=Path, metavar="FOLDER", more="without FOLDER, beside the output", demo=False),
    )
    fresh: bool = field(default=False, metadata=_told("calibration", flag="--fresh", sets=True, demo=False))
    seed: int = field(default=0, metadata=_told("calibration", kind=int, metavar="N", data=True))
    example: Any = field(default=None, metadata=_told())
    checkpoint: bool | Literal["deci"] | None = field(default=None, metadata=_told())
    allow_pickle: bool = field(default=False, metadata=_told("model", flag="--allow-pickle", sets=True))
    backend: str = field(default="torch", metadata=_told())
    loss: Loss | None = field(default=None, metadata=_told())
    labelled: Labelled | None = field(default=None, metadata=_told())
    custom_ops: str | Path | Sequence[str | Path] | None = field(
        default=None,
        metadata=_told(
            shown="a shared library with operators that ONNX Runtime lacks and the model needs; it runs code (repeatable)",
            kind=Path,
            metavar="LIBRARY",
        ),
    )
    dry_run: bool = field(
        default=False,
        metadata=_told(
            "checks",
            flag="--dry-run",
            sets=True,
            shown="stop when the widths are decided; nothing is written but the report",
        ),
    )
    latency: bool = field(
        default=True,
        metadata=_told("checks", flag="--no-latency", sets=False, shown="do not time the dense and the pruned model"),
    )
    progress: Progress = field(default=no_progress, metadata=_told())
    observer: Observer | None = field(default=None, metadata=_told())

    def __post_init__(self) -> None:
        """Checks the types of all options.

        Raises:
            OptionError: one is of another.
        """
        for option in fields(self):
            value = getattr(self, option.name)
            if not _fits(value, option.type):
                shown, kind = repr(value)[:60], type(value).__name__
                raise OptionError(f"{option.name} is {shown}, of type '{kind}'; give {_told_type(option.type)}")
            if isinstance(value, float) and not any(hint in (float, Any) for hint in _alternatives(option.type)):
                object.__setattr__(self, option.name, int(value))  # 2e9 bytes, say

    def data(self) -> dict[str, Any]:
        """Returns the options that say how calibration data is read, by name."""
        return {name: getattr(self, name) for name, what in OPTIONS.items() if what.data}

    def given(self, name: str) -> bool:
        """Returns whether an option does not have its default."""
        value, default = getattr(self, name), getattr(type(self), name)
        return value is not None if default is None else bool(value != default)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a value is of a type that an option may have; a whole float is an integer."""
    for one in _alternatives(hint):
        origin = get_origin(one)
        if one is Any or (one in (str, Path) and isinstance(value, one)):
            return True
        if one in (None, type(None)) and value is None:
            return True
        if one is bool and isinstance(value, (bool, np.bool_)):
            return True
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if (one is float and number) or (one is int and number and value == value // 1):
            return True
        if origin is Literal and isinstance(value, str) and value in get_args(one):
            return True
        if (origin is Callable and callable(value)) or (
            origin is Sequence and hasattr(value, "__iter__") and not isinstance(value, (str, bytes))
        ):
            return True
    return False


def _told_type(hint: Any) -> str:
    names: dict[Any, str] = {str: "text", Path: "a path", bool: "True or False", float: "a number", int: "a whole number"}
    names |= {type(None): "None", Callable: "a function", Sequence: "a list"}
    told = [repr(get_args(h)[0]) if get_origin(h) is Literal else names[get_origin(h) or h] for h in _alternatives(hint)]
    return " or ".join(told) if len(told) < 3 else f"{', '.join(told[:-1])} or {told[-1]}"


_TEXTS = documented(PruneOptions)
OPTIONS: dict[str, Description] = {
    f.name: replace(f.metadata["description"], help=f.metadata["description"].help or _TEXTS.get(f.name, ""))
    for f in fields(PruneOptions)
}
"""What there is to say of each option, by its name, in their order."""


def documentation() -> str:
    """Returns the options as the "Args" of a docstring lists them."""
    wrap = textwrap.TextWrapper(124, initial_indent=8 * " ", subsequent_indent=12 * " ", break_on_hyphens=False)
    return "\n".join(wrap.fill(f"{name}: {what.help}.") for name, what in OPTIONS.items())
