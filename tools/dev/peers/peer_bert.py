"""Prune a BERT checkpoint with the tools of others that take torch modules: a driver of `peer_files.Job`.

    python tools/dev/peers/peer_bert.py FOLDER        # started by bench.py peers, in the peer's own environment

Every method calls the tool's own code; what stands here prepares its inputs and writes the result as ONNX.

- kwon: Kwon et al. 2022, retraining-free-pruning: masks by Fisher information, rearranged, tuned. Its masks are folded into
  the weights and cut here. Its budget is of multiply-adds, here at a length of one token, where that is of parameters.
- k-prune: the same for K-prune (Park et al. 2024), which cuts by itself.
- torch-pruning-l2, torch-pruning-taylor: torch_pruning.BasePruner with the group importance named, uniform, heads and FFN.
- gradnas: NVIDIA Model Optimizer's GradNAS (in releases that have it).
- osscar: the pruning class of OSSCAR's repository, layer by layer; its own driver is for OPT alone.

Where a loss is needed, the labels are in the calibration file under "labels".
"""

import importlib
import json
import logging
import pkgutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer_files import Job, export, on_the_processor, stand_in
from peer_osscar import osscar_layers
from torch import nn

OUTPUTS = {True: "logits", False: "last_hidden_state"}


def load(checkpoint: Path) -> tuple[Any, bool]:
    """The torch model, and whether it is a classifier."""
    import transformers

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    classifier = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])
    kind = transformers.BertForSequenceClassification if classifier else transformers.BertModel
    return kind.from_pretrained(str(checkpoint), attn_implementation="eager").eval(), classifier


def tensors(job: Job, labels: bool = True) -> list[dict[str, Any]]:
    """The calibration batches as tensors, with labels where there are any and they are wanted."""
    batches = [{key: torch.from_numpy(value) for key, value in batch.items()} for batch in job.batches()]
    return batches if labels else [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]


def layers_of(model: Any) -> Any:
    """The encoder's layers."""
    return getattr(model, model.base_model_prefix, model).encoder.layer


def shares(model: Any, ratio: float) -> tuple[int, int]:
    """Heads and FFN units a layer to remove: whole heads up to the ratio, the rest of the parameters from the FFN."""
    c = model.config
    d, width = c.hidden_size, c.hidden_size // c.num_attention_heads
    head, unit = 4 * d * width + 3 * width, 2 * d + 1
    heads = int(ratio * c.num_attention_heads)
    units = (ratio * (c.num_attention_heads * head + c.intermediate_size * unit) - heads * head) / unit
    return heads, round(units)


class Constant(nn.Module):
    """What is left of a sublayer whose input is empty: its bias."""

    def __init__(self, bias: Any) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, hidden: Any) -> Any:
        """Returns the bias for every token of [b, s, ...]."""
        return self.bias.expand(*hidden.shape[:-1], -1)


class Through(nn.Module):
    """Stands for the self-attention of a layer without heads."""

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> tuple[Any]:
        """Returns the input, which `Constant` takes for its shape."""
        return (hidden,)


def cut(layer: Any, heads: Any, units: Any) -> None:
    """Folds real masks into a layer's weights and removes what is zero.

    Args:
        layer: a BertLayer.
        heads: [q] factors of the heads' outputs.
        units: [h] factors of the FFN's hidden units.
    """
    attention = layer.attention
    width = attention.self.attention_head_size
    factors = heads.repeat_interleave(width)
    kept = factors.nonzero().flatten()
    if kept.numel():
        for name in ("query", "key", "value"):
            _rows(getattr(attention.self, name), kept)
        _columns(attention.output.dense, kept, factors)
        attention.self.num_attention_heads = int((heads != 0).sum())
        attention.self.all_head_size = kept.numel()
    else:
        attention.self, attention.output.dense = Through(), Constant(attention.output.dense.bias)
    kept = units.nonzero().flatten()
    if kept.numel():
        _rows(layer.intermediate.dense, kept)
        _columns(layer.output.dense, kept, units)
    else:
        layer.intermediate, layer.output.dense = nn.Identity(), Constant(layer.output.dense.bias)


def _rows(linear: Any, kept: Any) -> None:
    linear.weight = nn.Parameter(linear.weight.data[kept])
    linear.bias = nn.Parameter(linear.bias.data[kept])
    linear.out_features = kept.numel()


def _columns(linear: Any, kept: Any, factors: Any) -> None:
    linear.weight = nn.Parameter(linear.weight.data[:, kept] * factors[kept])
    linear.in_features = kept.numel()


def kwon(job: Job, model: Any) -> tuple[str, str, str]:
    """The steps of the repository's main.py, from the gradients to the tuned masks."""
    import numpy
    from scipy.sparse.linalg import lsmr

    sys.path.insert(0, str(job.repository))
    stand_in("cupy", asarray=lambda array: numpy.asarray(array, numpy.float64), asnumpy=numpy.asarray)
    stand_in("cupyx.scipy.sparse.linalg", lsmr=lsmr)
    parts = {name: importlib.import_module(f"prune.{name}") for name in ("fisher", "search", "rearrange", "rescale")}
    schedule = importlib.import_module("utils.schedule")
    config, batches, keep = model.config, tensors(job), 1 - job.ratio
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with job.timed():
        ones = torch.ones(config.num_hidden_layers, config.num_attention_heads)
        neurons = torch.ones(config.num_hidden_layers, config.intermediate_size)
        grads = parts["fisher"].collect_mask_grads(model, ones, neurons, batches)
        teacher = schedule.get_pruning_schedule(target=keep, num_iter=2)[0]
        teachers = parts["search"].search_mac(config, *grads, 1, teacher)
        masks = parts["search"].search_mac(config, *grads, 1, keep)
        masks = [parts["rearrange"].rearrange_mask(m, g) for m, g in zip(masks, grads, strict=True)]
        heads, units = parts["rescale"].rescale_mask(model, config, *teachers, *masks, batches, classification_task=True)
    for index, layer in enumerate(layers_of(model)):
        cut(layer, heads[index], units[index])
    return "retraining-free-pruning 806ac5a", "masks; folded and cut by the driver", "defaults"


def k_prune(job: Job, model: Any) -> tuple[str, str, str]:
    """`kprune` with the settings of the repository's script."""
    sys.path.insert(0, str(job.repository / "src") if job.repository else "")
    prune, capacity = importlib.import_module("prune"), importlib.import_module("utils.capacity")
    c, batches = model.config, tensors(job)
    width = c.hidden_size // c.num_attention_heads
    for parameter in model.parameters():
        parameter.requires_grad = False
    head, unit = (
        f / 1e9 for f in (capacity.flops_per_head(1, width, c.hidden_size), capacity.flops_per_neuron(1, c.hidden_size))
    )
    total = c.num_hidden_layers * (c.num_attention_heads * head + c.intermediate_size * unit)
    masks = (
        torch.ones(c.num_hidden_layers, c.num_attention_heads),
        torch.ones(c.num_hidden_layers, c.intermediate_size),
    )
    settings = {"lam_pred": 1.0, "lam_rep": 2.5e-4, "mu": 64.0, "T": 2.0}
    with job.timed():
        prune.kprune(
            model,
            batches,
            False,
            width,
            *settings.values(),
            total,
            head,
            unit,
            *masks,
            job.ratio,
            True,
            logging.getLogger(),
        )
    for layer in layers_of(model):  # it leaves the number of heads as a tensor, which the exporter would trace
        if layer.attention.self is not None:
            layer.attention.self.num_attention_heads = int(layer.attention.self.num_attention_heads)
            layer.attention.self.all_head_size = int(layer.attention.self.all_head_size)
    return "K-prune 9ca629a", "pickled module", "lam_pred 1, lam_rep 2.5e-4, mu 64, T 2, tuning"


def torch_pruning(job: Job, model: Any) -> tuple[str, str, str]:
    """The steps of the repository's examples/transformers/prune_hf_bert.py, the residual stream left alone."""
    tp = importlib.import_module("torch_pruning")

    taylor = job.method == "torch-pruning-taylor"
    heads, units = shares(model, job.ratio)
    c, numbers = model.config, dict[Any, int]()
    batches = tensors(job)
    residual = [m for n, m in model.named_modules() if n.endswith("output.dense") or "pooler" in n or n == "classifier"]
    residual += [m for m in model.modules() if isinstance(m, nn.Embedding | nn.LayerNorm)]
    for layer in layers_of(model):
        own = layer.attention.self
        numbers |= dict.fromkeys((own.query, own.key, own.value), own.num_attention_heads)
    example = {key: value[:2] for key, value in batches[0].items() if key != "labels"}
    importance = (
        tp.importance.TaylorImportance() if taylor else tp.importance.MagnitudeImportance(p=2, group_reduction="mean")
    )
    with job.timed():
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=importance,
            global_pruning=False,
            pruning_ratio=units / c.intermediate_size,
            num_heads=numbers,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=heads / c.num_attention_heads,
            ignored_layers=residual,
            output_transform=lambda out: out[0].sum(),
        )
        if taylor:
            for batch in batches:
                model(**batch).loss.backward()
        for group in pruner.step(interactive=True):
            group.prune()
    for layer in layers_of(model):
        own = layer.attention.self
        own.num_attention_heads = pruner.num_heads[own.query]
        own.all_head_size = own.query.out_features
        own.attention_head_size = own.all_head_size // own.num_attention_heads
    note = "Taylor" if taylor else "group L2"
    return f"torch-pruning {version('torch-pruning')}", "pickled module", f"{note}, uniform, heads and FFN alone"


def _names_that_torch_moved() -> None:
    """Release 0.31 imports parts of `torch.onnx` from where they were in its time."""
    moved = importlib.import_module("torch.onnx._internal.torchscript_exporter")
    for item in pkgutil.iter_modules(moved.__path__):
        module = importlib.import_module(f"{moved.__name__}.{item.name}")
        for place in ("torch.onnx", "torch.onnx._internal"):
            sys.modules[f"{place}.{item.name}"] = module
            setattr(sys.modules[place], item.name, module)


def gradnas(job: Job, model: Any) -> tuple[str, str, str]:
    """`modelopt.torch.prune` in mode "gradnas", as its guide has it for BERT, to a number of parameters."""
    _names_that_torch_moved()
    mtp = importlib.import_module("modelopt.torch.prune")

    batches, c = tensors(job), model.config
    # Positional: it looks at the signature of a forward that it has replaced.
    example = tuple(batches[0][key][:2] for key in ("input_ids", "attention_mask", "token_type_ids"))
    width = c.hidden_size // c.num_attention_heads
    layer = c.num_attention_heads * (4 * c.hidden_size * width + 3 * width) + c.intermediate_size * (2 * c.hidden_size + 1)
    total = sum(p.numel() for p in model.parameters())
    with job.timed():
        pruned, _ = mtp.prune(
            model,
            mode="gradnas",
            constraints={"params": total - job.ratio * c.num_hidden_layers * layer},
            dummy_input=example,
            config={
                "data_loader": batches,
                "collect_func": lambda batch: dict(batch),
                "loss_func": lambda output, batch: output.loss,
            },
        )
    model.pruned = pruned
    return f"nvidia-modelopt {version('nvidia-modelopt')}", "state of its own", "gradnas, parameters as the constraint"


def osscar(job: Job, model: Any) -> tuple[str, str, str]:
    """Heads and FFN units of every layer by `OSSCAR_prune`, then cut."""
    heads, units = shares(model, job.ratio)
    c = model.config
    with job.timed():
        osscar_layers(
            job,
            model,
            layers_of(model),
            tensors(job, labels=False),
            attention=lambda layer: layer.attention.output.dense,
            ffn=lambda layer: layer.output.dense,
            blocks=c.num_attention_heads,
            removed=(heads / c.num_attention_heads, units / c.intermediate_size),
        )
    for layer in layers_of(model):
        width = layer.attention.self.attention_head_size
        kept = layer.attention.output.dense.weight.reshape(c.hidden_size, -1, width).abs().sum((0, 2)) > 0
        cut(layer, kept.float(), (layer.output.dense.weight.abs().sum(0) > 0).float())
    return "OSSCAR 0bd7887", "zeroed weights; cut by the driver", "defaults, layer by layer by the driver"


METHODS: dict[str, Callable[[Job, Any], tuple[str, str, str]]] = {
    "kwon": kwon,
    "k-prune": k_prune,
    "torch-pruning-l2": torch_pruning,
    "torch-pruning-taylor": torch_pruning,
    "gradnas": gradnas,
    "osscar": osscar,
}


class Plain(nn.Module):
    """Takes tensors by position and returns one."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Any) -> Any:
        """Returns the logits or the last hidden state."""
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=True)[0]


def main() -> int:
    """Prune one checkpoint as the job says."""
    job = Job(Path(sys.argv[1]))
    torch.manual_seed(job.seed)
    on_the_processor()
    model, classifier = load(job.checkpoint)
    example = {key: value[:2] for key, value in job.batches()[0].items() if key != "labels"}
    told = METHODS[job.method](job, model) if job.ratio else ("none", "dense", "")
    model = getattr(model, "pruned", model)
    export(Plain(model, list(example)), example, OUTPUTS[classifier], job.folder / "pruned.onnx")
    job.finish(*told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
