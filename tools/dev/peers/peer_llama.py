"""Prune a Llama checkpoint with the public code of others: a driver of `peer_files.Job`.

    python tools/dev/peers/peer_llama.py FOLDER        # started by bench.py peers, in the peer's own environment

Every method calls the repository's own functions on the calibration windows of the job.

- flap, wanda-sp: FLAP's repository (lib/prune.py: prune_flap, prune_wanda_sp).
- slimgpt, grail-flap, grail-slimgpt: GRAIL's repository, whose lib/prune.py holds SlimGPT, and FLAP and SlimGPT with
  GRAIL's compensation after them.
- llm-pruner: the steps of the repository's llama3.py (Taylor, block-wise), without the training that follows.
- slicegpt: the steps of the repository's run_slicegpt.py. It narrows the residual stream, not FFN and heads.
- osscar: the pruning class, layer by layer.
- torch-pruning-l2: BasePruner on the FFN alone.

FLAP's and GRAIL's files know heads of width 128, each with its own keys and values. With grouped-query attention what can
be removed is a group of heads and the keys and values that it shares: their files are loaded with the width of a group in
place of 128, and their `compress`, which cuts the layer, is replaced by `compress` here, which cuts groups.
"""

import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peer_files import Job, export, on_the_processor, stand_in
from peer_osscar import osscar_layers
from torch import nn

FIRST, LAST = 4, 2
"""LLM-Pruner leaves the first four and the last two layers alone (its README)."""
ROWS = 8
"""Windows in one backward pass."""
Told = tuple[str, str, str]


class Sizes:
    """Widths of a Llama, and the parameters of a group of heads and of an FFN unit.

    Attributes:
        groups: of heads that share keys and values, a layer.
        block: columns of the output projection that a group owns.
        group: parameters of a group.
        unit: parameters of an FFN unit.
        budget: parameters to remove, in all.
    """

    def __init__(self, config: Any, ratio: float) -> None:
        d = config.hidden_size
        width = d // config.num_attention_heads
        self.layers, self.hidden, self.groups = (
            config.num_hidden_layers,
            config.intermediate_size,
            config.num_key_value_heads,
        )
        self.block = width * config.num_attention_heads // self.groups
        self.group = 2 * d * self.block + 2 * d * width
        self.unit = 3 * d
        self.total = self.layers * (self.groups * self.group + self.hidden * self.unit)
        self.budget = ratio * self.total

    def even(self) -> tuple[int, float]:
        """Groups a layer, and the fraction of the FFN, that make up the budget when every layer loses the same."""
        groups = int(self.budget / self.total * self.groups)
        return groups, (self.budget / self.layers - groups * self.group) / (self.hidden * self.unit)


def windows(job: Job) -> Any:
    """The calibration tokens, [n, s]."""
    return torch.cat([torch.from_numpy(batch["input_ids"]) for batch in job.batches()])


class Gone(nn.Module):
    """Stands for an attention whose groups are all removed: its bias."""

    def __init__(self, bias: Any) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, hidden_states: Any, **kwargs: Any) -> tuple[Any, None, None]:
        """Returns the bias for every token of [b, s, d]."""
        return torch.zeros_like(hidden_states) + (0 if self.bias is None else self.bias), None, None


def compress(
    layer: Any,
    attn_mask: Any,
    mlp_mask: Any,
    attn_mean_inp: Any,
    mlp_mean_inp: Any,
    device: Any,
    bias: bool = True,
    unstr: bool = False,
) -> None:
    """Takes the place of FLAP's `compress`: cuts groups of heads and FFN units, and what they meant goes to the bias."""
    if attn_mask is not None:
        a = layer.self_attn
        block = a.o_proj.weight.shape[1] // attn_mask.numel()
        kept, shared = attn_mask.repeat_interleave(block), attn_mask.repeat_interleave(a.head_dim)
        if bias and attn_mean_inp is not None:
            a.o_proj.bias = nn.Parameter((attn_mean_inp.float() * ~kept) @ a.o_proj.weight.data.T)
        if not kept.any():
            layer.self_attn = Gone(a.o_proj.bias)
        else:
            a.q_proj.weight.data, a.o_proj.weight.data = a.q_proj.weight.data[kept], a.o_proj.weight.data[:, kept]
            a.k_proj.weight.data, a.v_proj.weight.data = a.k_proj.weight.data[shared], a.v_proj.weight.data[shared]
            _resize(a)
    if mlp_mask is not None:
        m = layer.mlp
        if bias and mlp_mean_inp is not None:
            m.down_proj.bias = nn.Parameter((mlp_mean_inp.float() * ~mlp_mask) @ m.down_proj.weight.data.T)
        for name in ("up_proj", "gate_proj"):
            getattr(m, name).weight.data = getattr(m, name).weight.data[mlp_mask]
        m.down_proj.weight.data = m.down_proj.weight.data[:, mlp_mask]


def _resize(attention: Any) -> None:
    """Makes an attention believe in the shapes of its weights."""
    attention.num_heads = attention.q_proj.weight.shape[0] // attention.head_dim
    attention.num_key_value_heads = attention.k_proj.weight.shape[0] // attention.head_dim
    attention.hidden_size = attention.q_proj.weight.shape[0]


def lib_prune(job: Job, block: int, changes: Mapping[str, str] | None = None) -> Any:
    """`lib.prune` of FLAP's or GRAIL's repository with another width of a head, fed with the job's windows."""
    repository = job.repository
    assert repository is not None
    sys.path.insert(0, str(repository))
    stand_in("datasets", load_dataset=None, load_from_disk=None)
    package = importlib.import_module("lib")
    source = (repository / "lib" / "prune.py").read_text(encoding="utf-8")
    for old, new in {
        "repeat_interleave(128)": f"repeat_interleave({block})",
        "-1, 128)": f"-1, {block})",
        "int(args.pruning_ratio*layer.self_attn.num_heads)": "args.remove_groups",
        **(changes or {}),
    }.items():
        source = source.replace(old, new)
    module = ModuleType("lib.prune")
    module.__package__ = package.__name__
    sys.modules["lib.prune"] = module
    exec(compile(source, str(repository / "lib" / "prune.py"), "exec"), module.__dict__)
    ids = windows(job)
    module.__dict__.update(compress=compress, get_loaders=lambda *a, **k: ([(row[None],) for row in ids], None))
    return module


def flap_like(job: Job, model: Any) -> Told:
    """FLAP and what is built in its frame."""
    sizes = Sizes(model.config, job.ratio)
    groups, ffn = sizes.even()
    name = {"flap": "prune_flap", "wanda-sp": "prune_wanda_sp", "grail-flap": "prune_flap"}.get(job.method, "prune_slimgpt")
    changes = {"int(args.pruning_ratio * num_heads)": "args.remove_groups"}  # of prune_slimgpt
    module, ids = lib_prune(job, sizes.block, changes), windows(job)
    model.seqlen = ids.shape[1]
    shared = Namespace(num_attention_heads=sizes.groups, hidden_size=model.config.hidden_size, pretraining_tp=1)
    for layer in model.model.layers:
        layer.self_attn.config = shared
    arguments = Namespace(
        nsamples=len(ids),
        comp_nsamples=len(ids),
        seed=job.seed,
        dataset="",
        metrics="WIFV",
        structure="AL-AM",
        remove_heads=-1,
        remove_groups=groups,
        pruning_ratio=job.ratio if name == "prune_flap" else ffn,
        unstr=False,
        compensate=job.method.startswith("grail"),
        ridge_lambda=1e-3,
        no_bias_compensation=False,
    )
    with job.timed():
        getattr(module, name)(arguments, model, None, torch.device("cpu"))
    tool = "FLAP 3bb57db" if job.method in ("flap", "wanda-sp") else "GRAIL ba5e48b"
    note = "WIFV, AL-AM" if name == "prune_flap" else f"{groups} groups of heads and {100 * ffn:.1f} % of the FFN a layer"
    return tool, "pickled module", note + ("; --compensate, ridge 1e-3" if arguments.compensate else "")


def llm_pruner(job: Job, model: Any) -> Told:
    """`llama3.py`: Taylor (param_first), block-wise; the ratio is raised as far as the budget goes."""
    stand_in("LLMPruner.evaluator.ppl", PPLMetric=None)
    sys.path.insert(0, str(job.repository))
    for name in ("LLMPruner", "LLMPruner.evaluator"):
        sys.modules.pop(name, None)
    tp = importlib.import_module("LLMPruner.torch_pruning")
    pruners = importlib.import_module("LLMPruner.pruner.hf_llama_pruner")
    rms = importlib.import_module("transformers.models.llama.modeling_llama").LlamaRMSNorm
    sizes, layers = Sizes(model.config, job.ratio), model.model.layers
    inner = range(FIRST, len(layers) - LAST)
    width = layers[0].self_attn.head_dim

    def groups(ratio: float) -> int:
        return int((sizes.groups * width - int(sizes.groups * width * (1 - ratio))) // width)

    def removed(ratio: float) -> int:
        units = sizes.hidden - int(sizes.hidden * (1 - ratio))
        return int(len(inner) * (groups(ratio) * sizes.group + units * sizes.unit))

    ratio = max(r for r in (step / 1000 for step in range(1000)) if removed(r) <= sizes.budget)
    roots = [layers[i].mlp.gate_proj for i in inner]
    if groups(ratio):  # it fails where it is asked for less than one of a layer
        roots = [layers[i].self_attn.k_proj for i in inner] + roots
    ids = windows(job)
    with job.timed():
        pruner = tp.pruner.MetaPruner(
            model,
            ids[:2, :8],
            importance=pruners.TaylorImportance(group_reduction="sum", taylor="param_first"),
            global_pruning=False,
            iterative_steps=1,
            ch_sparsity=ratio,
            ignored_layers=[],
            channel_groups={},
            consecutive_groups={layer.self_attn.k_proj: layer.self_attn.head_dim for layer in layers},
            customized_pruners={rms: pruners.hf_rmsnorm_pruner},
            root_module_types=None,
            root_instances=roots,
        )
        model.zero_grad()
        for start in range(0, len(ids), ROWS):
            rows = ids[start : start + ROWS]
            (model(rows, labels=rows).loss * len(rows) / len(ids)).backward()
        pruner.step()
        model.zero_grad()
    for layer in layers:
        _resize(layer.self_attn)
    what = f"{groups(ratio)} groups of heads and {100 * ratio:.1f} % of the FFN"
    note = f"Taylor, param_first, block-wise, {what} of layers {inner.start} to {inner.stop - 1}; no training"
    return "LLM-Pruner 128a07d", "pickled module", note


def slicegpt(job: Job, model: Any) -> Told:
    """`run_slicegpt.py`; the new width is the widest multiple of 8 whose layers keep no more than the budget leaves."""
    sys.path.insert(0, str(job.repository / "src") if job.repository else "")
    stand_in("datasets", Dataset=None, DatasetDict=None)
    theirs = {
        name: importlib.import_module(f"slicegpt.{name}") for name in ("rotate", "layernorm_fusion", "slicing_scheduler")
    }
    adapter = importlib.import_module("slicegpt.adapters.llama_adapter").LlamaModelAdapter(model)
    sizes, d = Sizes(model.config, job.ratio), model.config.hidden_size
    narrow = next(
        n for n in range(d, 0, -8) if sizes.total * n / d + 2 * sizes.layers * n * n <= sizes.total - sizes.budget
    )
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in windows(job).split(ROWS)]
    model.config.use_cache = False
    with job.timed():
        theirs["layernorm_fusion"].replace_layers(adapter)
        theirs["layernorm_fusion"].fuse_modules(adapter)
        scheduler = theirs["slicing_scheduler"].ConstSlicingScheduler(narrow)
        theirs["rotate"].rotate_and_slice(adapter, batches, scheduler, final_orientation="random")
    note = (
        f"the residual stream from {d} to {narrow}, {100 * (1 - narrow / d):.1f} %; its rotations count as layers' weights"
    )
    return "TransformerCompression 6b12cde", "weights for a module of its own", note


def osscar(job: Job, model: Any) -> Told:
    """Groups of heads and FFN units of every layer by `OSSCAR_prune`, then cut."""
    sizes = Sizes(model.config, job.ratio)
    groups, ffn = sizes.even()
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in windows(job).split(ROWS)]
    model.config.use_cache = False
    with job.timed():
        osscar_layers(
            job,
            model,
            model.model.layers,
            batches,
            attention=lambda layer: layer.self_attn.o_proj,
            ffn=lambda layer: layer.mlp.down_proj,
            blocks=sizes.groups,
            removed=(groups / sizes.groups, ffn),
        )
    for layer in model.model.layers:
        heads = layer.self_attn.o_proj.weight.abs().sum(0).reshape(sizes.groups, -1).sum(1) > 0
        compress(layer, heads, layer.mlp.down_proj.weight.abs().sum(0) > 0, None, None, None)
    return (
        "OSSCAR 0bd7887",
        "zeroed weights; cut by the driver",
        f"defaults; {groups} groups and {100 * ffn:.1f} % of the FFN a layer",
    )


def torch_pruning(job: Job, model: Any) -> Told:
    """`examples/LLMs/prune_llm.py` on the FFN alone: the residual stream and the heads stay."""
    tp = importlib.import_module("torch_pruning")

    sizes = Sizes(model.config, job.ratio)
    fraction = sizes.budget / (sizes.layers * sizes.hidden * sizes.unit)
    stay = [
        m for n, m in model.named_modules() if n.endswith(("_proj", "lm_head")) and not n.endswith(("gate_proj", "up_proj"))
    ]
    stay += [m for m in model.modules() if isinstance(m, nn.Embedding)]
    with job.timed():
        pruner = tp.pruner.BasePruner(
            model,
            windows(job)[:1],
            importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False,
            output_transform=lambda out: out.logits.sum(),
            pruning_ratio=fraction,
            ignored_layers=stay,
        )
        for group in pruner.step(interactive=True):
            group.prune()
    return (
        f"torch-pruning {version('torch-pruning')}",
        "pickled module",
        f"group L2, {100 * fraction:.1f} % of the FFN alone",
    )


def minitron(job: Job, model: Any) -> Told:
    """`modelopt.torch.prune` in the mode that its guide has for language models; made for Megatron-Core's modules."""
    mtp = importlib.import_module("modelopt.torch.prune")

    registry = importlib.import_module("modelopt.torch.prune.pruning").PruneModeRegistry
    if "mcore_minitron" not in registry:
        raise SystemExit(
            "Error: the mode that prunes language models, 'mcore_minitron', is registered with Megatron-Core alone, whose "
            "modules it takes; the other one, 'fastnas', is made for convolutional networks"
        )
    sizes, ids = Sizes(model.config, job.ratio), windows(job)
    with job.timed():
        mtp.prune(
            model,
            mode="mcore_minitron",
            constraints={"export_config": {"ffn_hidden_size": int(sizes.hidden * (1 - job.ratio))}},
            dummy_input=ids[:1],
            config={"forward_loop": lambda m: m(ids[:ROWS])},
        )
    return f"nvidia-modelopt {version('nvidia-modelopt')}", "Megatron-Core checkpoint", ""


METHODS: dict[str, Callable[[Job, Any], Told]] = {
    "minitron": minitron,
    **dict.fromkeys(("flap", "wanda-sp", "slimgpt", "grail-flap", "grail-slimgpt"), flap_like),
    "llm-pruner": llm_pruner,
    "slicegpt": slicegpt,
    "osscar": osscar,
    "torch-pruning-l2": torch_pruning,
}


class Plain(nn.Module):
    """Takes tensors by position and returns the logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any) -> Any:
        """Returns logits [b, s, vocabulary]."""
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def main() -> int:
    """Prune one checkpoint as the job says."""
    from transformers import LlamaForCausalLM

    job = Job(Path(sys.argv[1]))
    torch.manual_seed(job.seed)
    on_the_processor()
    model: Any = LlamaForCausalLM.from_pretrained(
        str(job.checkpoint), attn_implementation="eager", torch_dtype=torch.float32
    ).eval()
    told = METHODS[job.method](job, model) if job.ratio else ("none", "dense", "")
    for layer in model.model.layers:  # what FLAP's frame put there
        layer.self_attn.config = model.config
    rows = windows(job)[:2].numpy()
    export(Plain(model), {"input_ids": rows, "attention_mask": rows * 0 + 1}, "logits", job.folder / "pruned.onnx")
    job.finish(*told)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
