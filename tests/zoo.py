"""The test zoo: small seeded transformers, exported to ONNX in every way that users export them.

Every size is odd or distinct (hidden 60 = 5 heads of 12, feed-forward 88, 2 layers, 101 words, 37 positions), so that a
transposed or confused axis fails. Every parameter is drawn anew, biases and normalisation weights too: freshly
initialised ones are all zeros or all ones, which exporters merge into one shared tensor. The cases named `*-initial`
keep the initialisation, and so that sharing, on purpose.

`build` writes one model and proves it before handing it out: ONNX Runtime loads it, and its outputs equal those of the
torch module (tolerances: `RTOL`) on a padded batch and, where axes are dynamic, on a batch of another size.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

LAYERS, HEADS, HEAD_DIM, FFN, VOCABULARY, POSITIONS = 2, 5, 12, 88, 101, 37
HIDDEN = HEADS * HEAD_DIM
DEPTH, ODD_HEADS = 4, 4  # layers of a deep model, and the heads of every second one of them
PADDING = 1  # the padding word; RoBERTa and MPNet count positions from it
BATCH, OTHER_BATCH = (2, 13), (3, 9)  # (batch, sequence) exported, and the other one run where axes are dynamic
IMAGE, PATCH = (24, 28), 4  # 6 x 7 patches and the class token: a sequence of 43
OPSETS = {"torchscript": 17, "dynamo": 18}  # what each exporter is asked for unless a case says otherwise
# 13: LayerNormalization decomposed, no SDPA before 14; 23: Attention is one operator; ONNX Runtime 1.31 loads no later
# Attention than that of 25.
OLDEST, FUSED, NEWEST = 13, 23, 25
RTOL = {"float32": 1e-4, "float16": 3e-2}  # relative to the largest magnitude of the reference output
ONE_ATTENTION = frozenset({"deberta-v3", "mpnet"})  # transformers has no SDPA variant of these
ONE_BIAS = frozenset({"mpnet"})  # by position, with an axis of heads, for all layers
NO_MASK = frozenset({"vit"})
TOKEN_TYPES = frozenset({"bert", "bert-pooler", "bert-classifier", "bert-words", "electra", "albert"})


@dataclass(frozen=True)
class Case:
    """One export. `expected` counts the channel groups by kind, or is the sentence with which liar-opt refuses.

    Kinds: "ffn" and "heads" as everywhere; "pooler" is the hidden layer of a pooler whose output a classifier reads.
    """

    name: str
    architecture: str
    exporter: str  # "torchscript" | "dynamo"
    attention: str  # "eager" | "sdpa" | "classic" (`_classic`: as transformers 4 wrote it)
    axes: str  # "dynamic" | "static"
    opset: int
    dtype: str = "float32"  # "float32" | "float16"
    optimiser: str = ""  # "" | "transformers" | "transformers-mha" | "extended" (ONNX Runtime's own, saved)
    weights: str = "random"  # "random" | "initial"
    half_by: str = "torch"  # who made a float16 model: "torch" (module.half()) | "onnxruntime" (converted graph)
    deep: bool = False
    expected: dict[str, int] | str = dataclasses.field(default_factory=dict, hash=False)

    @property
    def optimised(self) -> bool:
        """Whether ONNX Runtime rewrote the graph after export."""
        return bool(self.optimiser)


@dataclass(frozen=True, eq=False)
class Built:
    """A model on disk with inputs that run it and the facts a test needs."""

    case: Case
    path: Path
    feeds: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]  # of the torch module, for `feeds`
    other_feeds: dict[str, np.ndarray] | None  # another batch and sequence size; None where axes are static
    other_outputs: dict[str, np.ndarray] | None
    mask: str | None  # name of the input that is 0 at padding
    layers: int = LAYERS
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    ffn: int = FFN


# --------------------------------------------------------------------------------------------------------- the matrix


def expected_groups(architecture: str, exporter: str, axes: str, layers: int = LAYERS) -> dict[str, int]:
    """Groups that must be found, by kind.

    ALBERT uses one layer's weights twice: the TorchScript exporter keeps one tensor, so its layers prune together; the
    dynamo exporter writes each use's transposed matrix on its own and shares the biases alone, which can be copied.
    MPNet adds one position bias, with an axis of heads, to the scores of every layer, and DeBERTa looks relative positions
    up by an index that the dynamo exporter expands over the heads once, for all layers: each layer takes its own heads.
    """
    groups = {"ffn": layers, "heads": layers}
    if architecture == "albert" and exporter == "torchscript":
        groups = {"ffn": 1, "heads": 1}
    if architecture == "bert-classifier":
        groups["pooler"] = 1
    return groups


def _case(architecture: str, exporter: str, attention: str, axes: str, opset: int | None = None, **more: Any) -> Case:
    opset = OPSETS[exporter] if opset is None else opset
    marks = [f"opset{opset}"] if opset != OPSETS[exporter] else []
    if more.get("dtype") == "float16":
        marks.append("fp16" if more.get("half_by", "torch") == "torch" else "fp16ort")
    marks += [more[key] for key in ("optimiser", "weights") if more.get(key)]
    marks += ["deep"] if more.get("deep") else []
    name = "-".join([architecture, exporter, attention, axes, *marks])
    return Case(
        *(name, architecture, exporter, attention, axes, opset),
        expected=expected_groups(architecture, exporter, axes, DEPTH if more.get("deep") else LAYERS),
        **more,
    )


def exported(case: Case) -> Case:
    """The case whose file is rewritten to make this one; itself, if nothing is."""
    if not case.optimised and case.half_by == "torch":
        return case
    return _case(case.architecture, case.exporter, case.attention, case.axes, case.opset)


ARCHITECTURES = ("bert", "distilbert", "roberta", "electra", "albert", "deberta-v3", "mpnet", "vit")
EXPORTERS = ("torchscript", "dynamo")
AXES = ("dynamic", "static")


def attentions(architecture: str) -> tuple[str, ...]:
    """The attention implementations that transformers has for an architecture."""
    return ("eager",) if architecture in ONE_ATTENTION else ("eager", "sdpa")


# What the exporters or ONNX Runtime cannot do, checked against torch 2.13 and ONNX Runtime 1.31.
IMPOSSIBLE = {
    "bert-torchscript-sdpa-dynamic-fp16": "the exporter mixes float32 into float16 SDPA; ONNX Runtime refuses",
}


def cases(fast: bool) -> list[Case]:
    """All cases; with `fast` a handful that shows each exporter, attention, kind of axes and fused operator once."""
    everything = [case for case in every_case() if case.name not in IMPOSSIBLE]
    return [case for case in everything if case.name in QUICK] if fast else everything


def quick_cases() -> set[str]:
    """Names of cases that show, together, all that the matrix shows one thing at a time: what CI runs of it.

    Covered are each architecture by each exporter, and each exporter with each attention and kind of axes, opset, type, and
    optimiser on each family; the cheapest first (the dynamo exporter is slow, and its files can serve several).
    """
    every = cases(fast=False)
    things = {
        case.name: {
            (case.architecture, case.exporter),
            (case.exporter, case.attention, case.axes),
            (case.exporter, case.opset),
            (case.exporter, case.dtype, case.half_by),
            (case.exporter, case.optimiser),
            (case.exporter, case.attention == "classic", case.optimised),
            (case.architecture == "vit", case.optimiser),
        }
        for case in every
    }
    chosen = {case.name for case in every if case.name in QUICK}
    left = set().union(*things.values()) - set().union(*(things[name] for name in chosen))
    made = {exported(case).name for case in every if case.name in chosen}

    def gain(case: Case) -> float:
        return len(things[case.name] & left) / (1 if case.exporter == "torchscript" or exported(case).name in made else 4)

    while left:
        best = max(every, key=gain)
        made.add(exported(best).name)
        chosen.add(best.name)
        left -= things[best.name]
    return chosen


def deep_cases() -> list[Case]:
    """Models of more layers, every second one of other widths, by both exporters."""
    return [_case(a, e, attentions(a)[-1], "dynamic", deep=True) for a in ARCHITECTURES for e in EXPORTERS]


def words_case(exporter: str, **more: Any) -> Case:
    """BERT with the head that guesses words, tied to its table."""
    return _case("bert-words", exporter, "sdpa", "dynamic", **more)


QUICK = {
    "bert-torchscript-eager-dynamic",
    "bert-dynamo-sdpa-dynamic",
    "distilbert-dynamo-eager-static",
    "albert-torchscript-sdpa-dynamic",
    "vit-dynamo-sdpa-dynamic-opset23",
    "bert-torchscript-eager-dynamic-initial",
    "bert-torchscript-eager-dynamic-transformers",
    "vit-torchscript-classic-dynamic-transformers",
}


def every_case() -> list[Case]:
    """The whole matrix, with what is known to be `IMPOSSIBLE`."""
    matrix = [
        _case(architecture, exporter, attention, axes)
        for architecture in ARCHITECTURES
        for exporter in EXPORTERS
        for attention in attentions(architecture)
        for axes in AXES
    ]
    # The TorchScript exporter has no SDPA below opset 14.
    opsets = [_case(a, "torchscript", "eager", "dynamic", OLDEST) for a in ARCHITECTURES]
    opsets += [
        _case("bert", "torchscript", "eager", "static", OLDEST),
        _case("bert", "torchscript", "sdpa", "dynamic", 14),
        _case("bert", "torchscript", "sdpa", "dynamic", 20),
    ]
    opsets += [_case(a, "dynamo", attentions(a)[-1], "dynamic", FUSED) for a in ARCHITECTURES]
    opsets += [_case("bert", "dynamo", "sdpa", "static", FUSED), _case("bert", "dynamo", "eager", "dynamic", NEWEST)]
    opsets += [_case("bert", "dynamo", "sdpa", "dynamic", NEWEST)]
    heads = [_case(a, e, "sdpa", "dynamic") for a in ("bert-pooler", "bert-classifier") for e in EXPORTERS]
    initial = [_case("bert", e, "eager", "dynamic", weights="initial") for e in EXPORTERS]
    half = [
        _case("bert", e, a, "dynamic", dtype="float16", half_by=by)
        for e in EXPORTERS
        for a in ("eager", "sdpa")
        for by in ("torch", "onnxruntime")
    ]
    optimised = [
        _case(architecture, exporter, attention, axes, optimiser=optimiser)
        for architecture, axes in (("bert", "dynamic"), ("bert", "static"), ("vit", "dynamic"))
        for exporter in EXPORTERS
        for attention in ("eager", "sdpa")
        for optimiser in ("transformers", "transformers-mha", "extended")
    ]
    optimised += [
        _case(a, "torchscript", "eager", "dynamic", optimiser=o, dtype="float16", half_by="onnxruntime")
        for a in ("bert", "vit")
        for o in ("transformers", "transformers-mha")
    ]
    optimised += [
        _case(a, "torchscript", attentions(a)[-1], "dynamic", optimiser="extended")
        for a in ("roberta", "albert", "mpnet", "deberta-v3")
    ]
    classic = [
        _case(a, e, "classic", axes, optimiser=o)
        for a in ("bert", "vit")
        for e in EXPORTERS
        for axes in AXES
        for o in ("", "transformers", "transformers-mha")
    ]
    classic += [_case(a, "torchscript", "classic", "dynamic", OLDEST, optimiser="transformers") for a in ("bert", "vit")]
    classic += [
        _case(a, "torchscript", "classic", "dynamic", optimiser=o, dtype="float16", half_by="onnxruntime")
        for a in ("bert", "vit")
        for o in ("transformers", "transformers-mha")
    ]
    return matrix + opsets + heads + initial + half + optimised + classic


# --------------------------------------------------------------------------------------------------------- the models


def _model(case: Case, layers: int = LAYERS, heads: int = HEADS, ffn: int = FFN) -> Any:
    """The model of a case, as it was initialised."""
    import transformers

    tf: Any = transformers  # the configurations' own types leave fields out

    attention = "eager" if case.attention == "classic" else case.attention
    common: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "attn_implementation": attention,
    }
    text: dict[str, Any] = {
        **common,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": PADDING,
    }
    makers: dict[str, Callable[[], Any]] = {
        "bert": lambda: tf.BertModel(tf.BertConfig(**text), add_pooling_layer=False),
        "bert-pooler": lambda: tf.BertModel(tf.BertConfig(**text)),
        "bert-classifier": lambda: tf.BertForSequenceClassification(tf.BertConfig(**text, num_labels=3)),
        "bert-words": lambda: tf.BertForMaskedLM(tf.BertConfig(**text)),
        "distilbert": lambda: tf.DistilBertModel(
            tf.DistilBertConfig(
                dim=HIDDEN,
                n_layers=layers,
                n_heads=heads,
                hidden_dim=ffn,
                vocab_size=VOCABULARY,
                max_position_embeddings=POSITIONS,
                pad_token_id=PADDING,
                attn_implementation=attention,
            )
        ),
        "roberta": lambda: tf.RobertaModel(tf.RobertaConfig(**text), add_pooling_layer=False),
        "electra": lambda: tf.ElectraModel(tf.ElectraConfig(**text, embedding_size=28)),
        "albert": lambda: tf.AlbertModel(tf.AlbertConfig(**text, embedding_size=28), add_pooling_layer=False),
        # The fields of microsoft/deberta-v3-*: position bucket projections shared with the content's.
        "deberta-v3": lambda: tf.DebertaV2Model(
            tf.DebertaV2Config(
                **text,
                type_vocab_size=0,
                relative_attention=True,
                max_relative_positions=-1,
                position_buckets=7,
                norm_rel_ebd="layer_norm",
                share_att_key=True,
                pos_att_type=["p2c", "c2p"],
                position_biased_input=False,
            )
        ),
        "mpnet": lambda: tf.MPNetModel(tf.MPNetConfig(**text), add_pooling_layer=False),
        "vit": lambda: tf.ViTModel(tf.ViTConfig(**common, image_size=IMAGE, patch_size=PATCH), add_pooling_layer=False),
    }
    return makers[case.architecture]()


def mixed(model: Any, other: Any, depth: int) -> Any:
    """Returns a model of `depth` layers with every second layer of another one, whose layers have other widths."""
    import torch

    for name, layers in model.named_modules():
        if isinstance(layers, torch.nn.ModuleList) and len(layers) == depth:
            for i in range(1, depth, 2):
                layers[i] = other.get_submodule(name)[i]
    return model


def _module(case: Case) -> Any:
    """The torch module of a case, in evaluation mode, returning a tuple of tensors."""
    import torch

    torch.manual_seed(0)
    model = _model(case)
    if case.deep:
        heads = HEADS if case.architecture in ONE_BIAS else ODD_HEADS
        model = mixed(_model(case, DEPTH), _model(case, DEPTH, heads, FFN + 12), DEPTH)
    model.eval()
    if case.weights == "random":
        _randomise(model)
    if case.attention == "classic":
        _classic(model)

    class Wrapped(torch.nn.Module):
        """Names the inputs one by one and returns tensors, as the usual export scripts do."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: Any) -> Any:
            named = dict(zip(input_names(case), inputs, strict=True))
            if case.attention == "classic" and "attention_mask" in named:
                mask = named["attention_mask"][:, None, None, :].to(torch.float32)  # b s -> b 1 1 s
                named["attention_mask"] = (1.0 - mask) * torch.finfo(torch.float32).min
            result = self.model(**named)
            return tuple(getattr(result, name) for name in output_names(case))

    wrapped = Wrapped().eval()
    return wrapped.half() if case.dtype == "float16" and case.half_by == "torch" else wrapped


def _classic(model: Any) -> None:
    """Give BERT or ViT the attention of transformers 4, which most published graphs hold.

    The number of heads and the joint width stand as constants in the shapes of Reshape, and the scores are divided.
    Only this form is fused by ONNX Runtime's transformers optimizer for ViT.
    """
    import math

    import torch

    def attend(hidden: Any, mask: Any, query: Any, key: Any, value: Any) -> Any:
        def split(x: Any) -> Any:
            return x.view((*x.size()[:-1], HEADS, HEAD_DIM)).permute(0, 2, 1, 3)  # b s (q d) -> b q s d

        q, k, v = split(query(hidden)), split(key(hidden)), split(value(hidden))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(HEAD_DIM)  # b q s s
        scores = scores if mask is None else scores + mask
        context = torch.matmul(torch.nn.functional.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        return context.view((*context.size()[:-2], HIDDEN))

    def replace(module: Any, names: tuple[str, str, str], output: Any) -> None:
        projections = [getattr(module, name) for name in names]

        def forward(hidden_states: Any, attention_mask: Any = None, **_: Any) -> Any:
            context = attend(hidden_states, attention_mask, *projections)
            return (context if output is None else output(context)), None

        module.forward = forward

    for module in model.modules():
        if hasattr(module, "o_proj"):
            replace(module, ("q_proj", "k_proj", "v_proj"), module.o_proj)
        elif hasattr(module, "query"):
            replace(module, ("query", "key", "value"), None)


def _randomise(model: Any) -> None:
    """Draw every parameter: matrices keep the scale of their input, vectors differ from each other everywhere."""
    import torch

    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_scale = "norm" in name.lower() and name.endswith("weight")
                parameter.copy_(0.3 * noise + (1.0 if is_scale else 0.0))
            elif "embedding" in name.lower():
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(noise * (parameter[0].numel() ** -0.5))


def input_names(case: Case) -> list[str]:
    """Names of the graph inputs, in order."""
    if case.architecture in NO_MASK:
        return ["pixel_values"]
    return ["input_ids", "attention_mask"] + (["token_type_ids"] if case.architecture in TOKEN_TYPES else [])


def output_names(case: Case) -> list[str]:
    """Names of the graph outputs, in order."""
    logits = {"bert-classifier": ["logits"], "bert-words": ["logits"]}
    return {"bert-pooler": ["last_hidden_state", "pooler_output"], **logits}.get(case.architecture, ["last_hidden_state"])


def feeds_of(case: Case, size: tuple[int, int] = BATCH, seed: int = 0) -> dict[str, np.ndarray]:
    """A seeded batch whose last row is padded (images know no padding; their size is fixed, `size[0]` of them)."""
    rng = np.random.default_rng([seed, *size])
    if case.architecture in NO_MASK:
        # A converted graph keeps float32 at its inputs.
        dtype = case.dtype if case.half_by == "torch" else "float32"
        return {"pixel_values": rng.standard_normal((size[0], 3, *IMAGE)).astype(dtype)}
    mask = np.ones(size, np.int64)
    mask[-1, -4:] = 0
    ids = np.where(mask == 1, rng.integers(PADDING + 1, VOCABULARY, size), PADDING)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": rng.integers(0, 2, size)}
    return {name: feeds[name] for name in input_names(case)}


# -------------------------------------------------------------------------------------------------------- the exports


def _register_once() -> None:
    """Keeps the dynamo exporter's table of what each operator becomes, which it makes anew for each export, in a second."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    made: Any = ONNXRegistry.from_torchlib
    if not hasattr(made, "cache_clear"):
        ONNXRegistry.from_torchlib = staticmethod(functools.cache(made))  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn and print about things that are not news here."""
    _register_once()
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _export(case: Case, module: Any, path: Path) -> None:
    import torch

    names, outputs = input_names(case), output_names(case)
    arguments = tuple(torch.from_numpy(value) for value in feeds_of(case).values())
    common: dict[str, Any] = {"input_names": names, "output_names": outputs, "opset_version": case.opset}
    dynamic = {0: "batch"} if case.architecture in NO_MASK else {0: "batch", 1: "sequence"}
    if case.exporter == "torchscript":
        axes = {name: dynamic for name in names + outputs} if case.axes == "dynamic" else None
        if axes is not None:
            axes |= {name: {0: "batch"} for name in outputs if name != "last_hidden_state"}
        torch.onnx.export(module, arguments, str(path), dynamo=False, dynamic_axes=axes, **common)
        return
    # `*inputs` is one argument of the wrapper, hence the tuple in a tuple.
    shapes = (tuple(dict.fromkeys(dynamic, torch.export.Dim.DYNAMIC) for _ in names),)
    torch.onnx.export(
        module,
        arguments,
        str(path),
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=shapes if case.axes == "dynamic" else None,
        **common,
    )


def _optimise(case: Case, path: Path) -> None:
    """Rewrite the file by ONNX Runtime as `case.optimiser` and `case.half_by` say."""
    if case.optimiser == "extended":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.log_severity_level = 3
        rewritten = path.with_suffix(".extended")
        options.optimized_model_filepath = str(rewritten)
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        rewritten.replace(path)
        return
    convert = case.dtype == "float16" and case.half_by == "onnxruntime"
    if case.optimiser:
        from onnxruntime.transformers.fusion_options import FusionOptions
        from onnxruntime.transformers.optimizer import optimize_model

        model_type = "vit" if case.architecture == "vit" else "bert"
        fusion = FusionOptions(model_type)
        fusion.use_multi_head_attention = case.optimiser == "transformers-mha"
        # ONNX Runtime's own first pass leaves a file of this one case that it then refuses to load.
        level = 0 if (case.exporter, case.attention, case.axes) == ("torchscript", "sdpa", "static") else None
        model = optimize_model(
            str(path), model_type, num_heads=HEADS, hidden_size=HIDDEN, optimization_options=fusion, opt_level=level
        )
        if convert:
            model.convert_float_to_float16(keep_io_types=True)
        model.save_model_to_file(str(path))
    elif convert:
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


def run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name in ONNX Runtime on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def difference(got: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Largest absolute difference over the outputs, relative to each reference's largest magnitude."""
    assert got.keys() == reference.keys(), (got.keys(), reference.keys())
    worst = 0.0
    for name, want in reference.items():
        assert got[name].shape == want.shape, (name, got[name].shape, want.shape)
        want64, got64 = want.astype(np.float64), got[name].astype(np.float64)
        assert np.isfinite(got64).all(), name
        worst = max(worst, float(np.abs(got64 - want64).max() / np.abs(want64).max()))
    return worst


def _reference(module: Any, feeds: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    import torch

    with torch.no_grad():
        outputs = module(*(torch.from_numpy(value) for value in feeds.values()))
    return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}


def build(case: Case, folder: Path) -> Built:
    """Export a case into `folder`, check it against torch, and return it; a model already there is used as it is.

    Raises:
        AssertionError: The exported graph does not compute what the module computes.
    """
    path = Path(folder) / f"{case.name}.onnx"
    feeds = feeds_of(case)
    other = feeds_of(case, OTHER_BATCH, seed=1) if case.axes == "dynamic" else None
    answers = path.with_suffix(".npz")
    if not answers.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _quiet():
            module = _module(case)
            arrays: dict[str, np.ndarray] = {}
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                draft = Path(scratch) / path.name
                base = path.with_name(f"{exported(case).name}.onnx")
                if base != path and base.exists():
                    shutil.copyfile(base, draft)
                else:
                    _export(case, module, draft)
                _optimise(case, draft)
                for prefix, batch in (("feeds", feeds), ("other", other)):
                    if batch is None:
                        continue
                    reference = _reference(module, batch, output_names(case))
                    error = difference(run(draft, batch), reference)
                    assert error <= RTOL[case.dtype], f"{case.name}: {prefix} off by {error:.2e} from torch"
                    arrays |= {f"{prefix}:{name}": value for name, value in reference.items()}
                np.savez(Path(scratch) / "answers.npz", **arrays)  # type: ignore[arg-type]
                draft.replace(path)
                (Path(scratch) / "answers.npz").replace(answers)
    with np.load(answers) as stored:
        outputs, other_outputs = (
            {key.partition(":")[2]: stored[key] for key in stored.files if key.startswith(prefix)}
            for prefix in ("feeds:", "other:")
        )
    mask = None if case.architecture in NO_MASK else "attention_mask"
    return Built(case, path, feeds, outputs, other, other_outputs if other is not None else None, mask)


@functools.cache
def session_folder() -> Path:
    """The folder of models to share: that of the test session (conftest.py names it), else one of this process."""
    named = os.environ.get("LIAR_ZOO")
    folder = Path(named or tempfile.mkdtemp(prefix="liar-zoo-"))
    folder.mkdir(parents=True, exist_ok=True)
    if not named:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def alone(name: str) -> FileLock:
    """Held while something is made in the shared folder: other test workers wait for it, and find it there."""
    return FileLock(session_folder() / f"{name}.lock")


@functools.cache
def ready(case: Case) -> Built:
    """`build` once, in a folder that all test workers share."""
    if case.exporter == "dynamo" and exported(case) != case:
        ready(exported(case))
    with alone(case.name):
        return build(case, session_folder())


def fingerprint() -> str:
    """Names what an export depends on, for whoever keeps a folder of builds between runs."""
    import onnx
    import onnxruntime
    import torch
    import transformers

    versions = [module.__version__ for module in (onnx, onnxruntime, torch, transformers)]
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("zoo*.py"))]
    return hashlib.sha256(b"".join(sources) + " ".join(versions).encode()).hexdigest()[:16]
