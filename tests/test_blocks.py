"""Whole blocks: what is left equals the original in which the map stands, on graphs, modules and checkpoints.

The reference is made here, of the original's file by tensor names, and of the original's module by its list of layers.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
import torch
import transformers
import zoo_decoders
import zoo_fx
import zoo_merged
from onnx import helper, numpy_helper
from test_both_engines import batches, export, made

import liar_opt
from liar_opt.frontend.blocks import Stack, find_stacks, inside, last_product
from liar_opt.frontend.fx_module import FxModel, analyse, lower, trace
from liar_opt.frontend.hf_checkpoint import without_cache
from liar_opt.frontend.module_blocks import BlockList, block_list, fewer_blocks, without_entries
from liar_opt.frontend.module_formula import blocks_differ, computes_the_rest
from liar_opt.frontend.onnx_model import OnnxModel
from liar_opt.frontend.walk import walk
from liar_opt.passes import auto_blocks, meet_target
from liar_opt.passes.base import WholeModel
from liar_opt.passes.meet_target import MetAlreadyError
from liar_opt.passes.result import ModuleResult, PruneResult
from liar_opt.runtime.errors import ModelError, OptionError

pytestmark = pytest.mark.usefixtures("one_thread")

CLOSE = 2e-5
"""Relative; sums of four layers in float32."""
Feeds = dict[str, np.ndarray]
PLAIN: dict[str, Any] = {"latency": False, "provider": "cpu"}


def replaced(path: Path, result: PruneResult) -> onnx.ModelProto:
    """Returns the original in which all that reads the stream behind the gap reads the map of that before it."""
    proto, found = onnx.load(path), result.report["blocks"]
    source, target = found["source"], found["target"]
    cut = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    name = source
    if found["repair"] == "map":
        matrix = next(v for n, v in cut.items() if n.startswith(f"{target}_stand_in") and v.ndim == 2)
        bias = next(v for n, v in cut.items() if n.startswith(f"{target}_stand_in") and v.ndim == 1)
        proto.graph.initializer.extend(
            [numpy_helper.from_array(matrix, "test_map"), numpy_helper.from_array(bias, "test_b")]
        )
        name = "test_mapped"
    place = max((i for i, n in enumerate(proto.graph.node) if source in n.output), default=-1) + 1
    for node in proto.graph.node:
        node.input[:] = [name if n == target else n for n in node.input]
    ends = [o.name for o in proto.graph.output]
    if target in ends:
        for node in proto.graph.node:
            node.output[:] = ["test_old" if n == target else n for n in node.output]
        proto.graph.node.append(helper.make_node("Identity", [name], [target]))
    if found["repair"] == "map":
        proto.graph.node.insert(place, helper.make_node("MatMul", [source, "test_map"], ["test_product"]))
        proto.graph.node.insert(place + 1, helper.make_node("Add", ["test_product", "test_b"], [name]))
    return proto


def other_feeds(shape: tuple[int, int], seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    mask = np.ones(shape, np.int64)
    mask[-1, -2:] = 0
    return {"input_ids": rng.integers(3, 100, shape), "attention_mask": mask}


def hidden(found: Any) -> torch.Tensor:
    result: torch.Tensor = found if isinstance(found, torch.Tensor) else found[0]
    return result


# -- finding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kinds"), [("bert", "m.w."), ("llama", "m.w.")])
def test_blocks_are_what_repeats_in_the_stream(name: str, kinds: str) -> None:
    model = OnnxModel.load(export(name))
    model.normalise()
    analysis = walk(model)
    (stack,) = find_stacks(analysis)
    assert (stack.blocks, stack.kinds) == (4, kinds)
    run = stack.runs(2)[1]
    assert (run.before, run.behind) == (stack.streams[1], stack.streams[3])
    weights = {u.node.name for u in analysis.consumers}
    within = [n for n in inside(analysis, run.before, run.behind) if n.name in weights]
    assert len(within) == 2 * (6 if name == "bert" else 7)
    assert run.sums is not None
    use = last_product(analysis, run, run.sums[0])
    assert use is not None and use.weight.shape[use.weight_axis] == 88


def test_what_the_stream_hands_to_two_blocks_is_no_place_between() -> None:
    text = """
<ir_version: 8, opset_import: ["" : 17]>
skips (float[b, 6] x) => (float[b, 6] y) {
    h0 = MatMul(x, w0)
    a0 = Add(x, h0)
    h1 = MatMul(a0, w1)
    a1 = Add(a0, h1)
    h2 = MatMul(a1, w2)
    a2 = Add(a1, h2)
    h3 = MatMul(a2, w3)
    a3 = Add(a2, h3)
    y = Add(a3, a1)
}
"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for i in range(4):
        value = rng.standard_normal((6, 6)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, f"w{i}"))
    model = OnnxModel.from_proto(proto)
    model.normalise()
    (stack,) = find_stacks(walk(model))
    assert stack.streams == ("x", "a0", "a1", "y")  # a1 is read behind a2 and a3


# -- graphs ------------------------------------------------------------------------------------------------------------


@functools.cache
def graph_without(name: str, **options: Any) -> PruneResult:
    """An export without some blocks; what several tests read."""
    return liar_opt.prune(export(name), batches(), **options, **PLAIN)


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("options", [{"blocks": 1}, {"blocks": 2}, {"blocks": 1, "block_repair": "none"}], ids=str)
def test_a_graph_equals_the_original_with_the_map_in_it(name: str, options: dict[str, Any]) -> None:
    result = graph_without(name, **options)
    found = result.report["blocks"]
    assert found["of"] == 4 and len(found["tried"]) == 5 - options["blocks"]
    assert found["error"] == min(found["tried"]) <= found["error_none"] + 1e-12
    assert found["repair"] == options.get("block_repair", "map")
    reference = replaced(export(name), result)
    onnx.checker.check_model(result.model)
    for shape in ((1, 5), (3, 17), (4, 13)):
        feeds = other_feeds(shape, shape[1])
        assert oracle.difference(oracle.run(result.model, feeds), oracle.run(reference, feeds)) < CLOSE
    weights = sum(t.name.endswith("weight") or "MatMul" in t.name for t in result.model.graph.initializer)
    assert weights < sum(t.name.endswith("weight") or "MatMul" in t.name for t in onnx.load(export(name)).graph.initializer)
    assert result.report["after"]["parameters"] < result.report["before"]["parameters"]
    assert result.report["after"]["flops"] < result.report["before"]["flops"]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_map_is_folded_into_the_product_before(name: str) -> None:
    result = liar_opt.prune(export(name), batches(), blocks=1, block_repair="fold", **PLAIN)
    found = result.report["blocks"]
    assert found["first"] > 0 and found["repair"] == "fold" and found["error"] < found["error_none"]
    assert not any("stand_in" in t.name for t in result.model.graph.initializer)
    old = {t.name: numpy_helper.to_array(t) for t in onnx.load(export(name)).graph.initializer}
    changed = [numpy_helper.to_array(t) for t in result.model.graph.initializer]
    changed = [
        v
        for v in changed
        if v.ndim == 2
        and v.dtype == np.float32
        and not any(v.shape == o.shape and np.array_equal(v, o) for o in old.values())
    ]
    assert [sorted(v.shape) for v in changed] == [[48 if name == "llama" else 60, 88]]


def test_blocks_and_widths_share_a_sparsity() -> None:
    alone = liar_opt.prune(export("llama"), batches(), sparsity=0.4, multiple_of=4, fresh=True, **PLAIN)
    both = liar_opt.prune(export("llama"), batches(), sparsity=0.4, blocks=1, multiple_of=4, fresh=True, **PLAIN)
    assert both.report["prunable"]["before"] == alone.report["prunable"]["before"]
    assert both.report["prunable"]["after"] == pytest.approx(alone.report["prunable"]["after"], rel=0.02)
    assert both.report["blocks"]["prunable"] > 0 and len(both.report["groups"]) == 6 and len(alone.report["groups"]) == 8
    assert both.report["before"] == alone.report["before"]


def test_a_target_counts_the_blocks() -> None:
    result = liar_opt.prune(export("llama"), batches(), target="params=0.6x", blocks=1, multiple_of=4, fresh=True, **PLAIN)
    before, after = (result.report[when]["parameters"] for when in ("before", "after"))
    assert after == pytest.approx(0.6 * before, rel=0.02)
    assert result.report["target"]["dense"] == before


@pytest.mark.parametrize(
    "goal", [{"sparsity": 0.4}, pytest.param({"target": "flops=0.6x"}, marks=pytest.mark.rest)], ids=str
)
def test_as_many_blocks_go_as_leave_the_least_error(goal: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    judged = oracle.judged(monkeypatch)
    result = liar_opt.prune(export("llama"), batches(), blocks="auto", multiple_of=4, fresh=True, **goal, **PLAIN)
    report, found = result.report, result.report["blocks_compared"]
    assert [one["blocks"] for one in found["tried"]] == list(range(len(found["tried"])))
    assert found["chosen"] == len(found["tried"]) - 2  # it ends with one that is worse, or that takes too much
    errors = [one["error"] for one in found["tried"] if one["why"] is None]
    assert found["decided_by"] == "error" and found["chosen"] == int(np.argmin(errors))
    assert errors[: found["chosen"] + 1] == sorted(errors[: found["chosen"] + 1], reverse=True)
    assert report.get("blocks", {"blocks": 0})["blocks"] == found["chosen"]
    assert report["after"]["parameters"] == found["tried"][found["chosen"]]["parameters"]
    if "sparsity" in goal:
        assert report["prunable"]["after"] == pytest.approx(0.6 * report["prunable"]["before"], rel=0.02)
    else:
        assert report["after"]["flops"] == pytest.approx(0.6 * report["before"]["flops"], rel=0.02)
    lost = oracle.relative_square(result.model, export("llama"), judged[0].batches)
    assert errors[found["chosen"]] == pytest.approx(lost, rel=1e-3)


@pytest.mark.rest
def test_blocks_and_widths_share_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts weights."""
    shapes: set[tuple[int, ...]] = set()

    def measure(models: Any, feeds: Any, **options: Any) -> Any:
        shapes.update(f["input_ids"].shape for f in (feeds if isinstance(feeds, list) else [feeds]))
        seconds = [0.01 + 1e-7 * m.parameters() for m in models]
        return SimpleNamespace(seconds=seconds, speedup=seconds[0] / seconds[-1], spread=0.001)

    monkeypatch.setattr(meet_target, "deployed", lambda model, device: model)
    monkeypatch.setattr(meet_target, "measure_latency", measure)
    data = batches(3)
    options: dict[str, Any] = {"target": "latency=1.05x", "multiple_of": 4, "batch_size": 4, "fresh": True}
    report = liar_opt.prune(export("llama"), data, blocks="auto", **options, **PLAIN).report
    met, (none, one) = report["target"], report["blocks_compared"]["tried"]
    assert none["error"] > 0 and one["why"] == auto_blocks.ENOUGH
    assert met["found"] == pytest.approx(met["dense"] / 1.05, rel=0.02)
    assert met["found"] == pytest.approx(0.01 + 1e-7 * report["after"]["parameters"], rel=0.02)
    assert shapes == {data[0]["input_ids"].shape}


def test_what_is_timed_is_the_first_batch_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there are few, which are divided for other goals."""
    seen: list[tuple[int, ...]] = []

    class Refused:
        def __init__(self, backend: Any, watch: Any) -> None:
            seen.append(backend.state.found(WholeModel).data.batches[0]["input_ids"].shape)

        def checked(self) -> None:
            raise MetAlreadyError("too fast")

    monkeypatch.setattr(auto_blocks, "ModelJob", Refused)
    data = batches(2)
    for target in ("latency=1.5x", "params=0.5x"):
        with pytest.raises(OptionError, match="too fast"):
            liar_opt.prune(export("llama"), data, blocks="auto", target=target, batch_size=4, block_repair="none", **PLAIN)
    first = data[0]["input_ids"].shape
    assert seen == [first, (1, first[1])]


def lazy() -> Any:
    """A model two of whose blocks add next to nothing."""
    module = copy.deepcopy(made("llama"))
    with torch.no_grad():
        for layer in module.model.layers[1:3]:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
    return module


@pytest.mark.rest
@pytest.mark.parametrize("checkpoint", [False, True])
def test_blocks_that_add_nothing_go_before_widths(checkpoint: bool) -> None:
    options: dict[str, Any] = {"sparsity": 0.6, "checkpoint": checkpoint, "multiple_of": 4, "fresh": True}
    result = liar_opt.prune(lazy(), batches(), blocks="auto", **options, **PLAIN)
    found = result.report["blocks_compared"]
    assert found["chosen"] == 2 and result.report["blocks"]["first"] == 1
    assert found["tried"][2]["error"] < 0.8 * found["tried"][0]["error"]
    assert result.report["prunable"]["after"] == pytest.approx(0.4 * result.report["prunable"]["before"], rel=0.1)
    assert result.report["blocks"]["added"] == (0 if checkpoint else 48 * 49)


@pytest.mark.rest
def test_a_largest_loss_takes_what_leaves_the_fewest_parameters() -> None:
    options: dict[str, Any] = {"max_drop": 0.05, "checkpoint": False, "multiple_of": 4, "fresh": True}
    result = liar_opt.prune(lazy(), batches(), blocks="auto", **options, **PLAIN)
    found = result.report["blocks_compared"]
    known = [one["parameters"] for one in found["tried"] if one["parameters"] is not None]
    assert found["decided_by"] == "parameters" and min(known) == found["tried"][found["chosen"]]["parameters"]
    assert found["chosen"] >= 1 and result.report["target"]["found"] <= 0.05


@pytest.mark.rest
def test_a_dry_run_compares_too() -> None:
    result = liar_opt.prune(export("llama"), batches(), blocks="auto", sparsity=0.4, dry_run=True, multiple_of=4, **PLAIN)
    assert len(result.report["blocks_compared"]["tried"]) > 1 and "after" not in result.report
    assert result.model == onnx.load(export("llama"))


CACHED = [
    c for c in zoo_decoders.deep_cases() if c.cache and c.exporter == "torchscript" and c.architecture in ("gpt2", "llama")
]


@pytest.mark.parametrize("case", CACHED, ids=lambda c: c.name)
def test_caches_stay_and_those_of_blocks_that_went_hold_zeros(case: Any) -> None:
    built = zoo_decoders.ready(case)
    data = [{k: np.random.default_rng(i).permutation(v) for k, v in built.feeds.items()} for i in range(4)]
    result = liar_opt.prune(built.path, data, blocks=2, **PLAIN)
    gone, first = set(result.report["blocks"]["caches"]), result.report["blocks"]["first"]
    assert gone == {f"present.{i}.{what}" for i in (first, first + 1) for what in ("key", "value")}
    names = [o.name for o in result.model.graph.output]
    reference = replaced(built.path, result)
    for feeds in (built.feeds, built.other_feeds):
        ours, theirs = (dict(zip(names, oracle.run(p, feeds), strict=True)) for p in (result.model, reference))
        for name in names:
            assert ours[name].shape == theirs[name].shape
            if name not in gone:
                assert oracle.difference([ours[name]], [theirs[name]]) < CLOSE
                continue
            past = feeds[name.replace("present", "past_key_values")]
            assert np.array_equal(ours[name][:, :, : past.shape[2]], past) and not ours[name][:, :, past.shape[2] :].any()


# -- modules and checkpoints -------------------------------------------------------------------------------------------


def test_a_module_is_a_traced_graph_with_the_map() -> None:
    module = made("llama")
    result = liar_opt.prune(module, batches(), blocks=2, checkpoint=False, **PLAIN)
    graph = graph_without("llama", blocks=2)
    assert isinstance(result, ModuleResult)
    ours, theirs = result.report["blocks"], graph.report["blocks"]
    assert (ours["first"], ours["repair"]) == (theirs["first"], "map")
    assert ours["tried"] == pytest.approx(theirs["tried"], rel=0.05)
    feeds = other_feeds((3, 11), 5)
    with torch.no_grad():
        found = hidden(result.module(**{k: torch.from_numpy(v) for k, v in feeds.items()})).numpy()
    assert oracle.difference([found], oracle.run(graph.model, feeds)[:1]) < 1e-2  # each has its own ridge
    assert result.report["after"]["parameters"] < result.report["before"]["parameters"]


def _config(name: str) -> Any:
    common = {"vocab_size": 101, "num_hidden_layers": 5, "num_attention_heads": 4, "max_position_embeddings": 64}
    sizes = {"hidden_size": 48, "intermediate_size": 88, "initializer_range": 0.1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tf: Any = transformers
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    made: dict[str, Any] = {
        "llama": lambda: tf.LlamaConfig(**common, **sizes, num_key_value_heads=2),
        "qwen2": lambda: tf.Qwen2Config(
            **common, **sizes, num_key_value_heads=2, use_sliding_window=True, sliding_window=7, layer_types=kinds
        ),
        "gpt2": lambda: tf.GPT2Config(vocab_size=101, n_embd=48, n_layer=5, n_head=4, n_positions=64, **special),
        "gpt2_by_number": lambda: tf.GPT2Config(
            vocab_size=101, n_embd=48, n_layer=5, n_head=4, n_positions=64, scale_attn_by_inverse_layer_idx=True, **special
        ),
        "bert": lambda: tf.BertConfig(**common, **sizes),
        "distilbert": lambda: tf.DistilBertConfig(
            vocab_size=101, dim=48, n_layers=5, n_heads=4, hidden_dim=88, max_position_embeddings=64
        ),
        "t5": lambda: tf.T5Config(vocab_size=101, d_model=48, d_kv=12, d_ff=88, num_layers=5, num_heads=4, **special),
    }
    return made[name]()


CLASSES = {
    "llama": ("LlamaForCausalLM", "model.layers"),
    "qwen2": ("Qwen2ForCausalLM", "model.layers"),
    "gpt2": ("GPT2LMHeadModel", "transformer.h"),
    "bert": ("BertModel", "encoder.layer"),
    "distilbert": ("DistilBertModel", "transformer.layer"),
    "t5": ("T5EncoderModel", "encoder.block"),
}


def checkpoint(name: str, folder: Path) -> Any:
    """Saves a model of five layers that do not do the same; returns it."""
    torch.manual_seed(3)
    config = _config(name)
    config.use_cache = False
    kind = getattr(transformers, CLASSES[name.removesuffix("_by_number")][0])
    module = kind(config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif index % 3:
                parameter.mul_(1.0 + 0.2 * (index % 4))
    module.save_pretrained(folder)
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


def without(module: Any, path: str, dropped: range) -> Any:
    """Returns a copy of a module without some entries of its list of layers."""
    result = copy.deepcopy(module)
    parent, _, attribute = path.rpartition(".")
    kept = [layer for i, layer in enumerate(result.get_submodule(path)) if i not in dropped]
    setattr(result.get_submodule(parent), attribute, torch.nn.ModuleList(kept))
    return result


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("llama", "bert") else pytest.mark.rest) for n in CLASSES]
)
def test_a_stock_checkpoint_has_fewer_layers(name: str, tmp_path: Path) -> None:
    module = checkpoint(name, tmp_path / "whole")
    result = liar_opt.prune(tmp_path / "whole", batches(8), blocks=2, block_repair="none", **PLAIN)
    found = result.report["blocks"]
    dropped = range(found["first"], found["first"] + 2)
    assert name != "t5" or found["first"] > 0  # the first layer has the positions of all
    result.save(tmp_path / "small")
    kind = getattr(transformers, CLASSES[name][0])
    loaded = kind.from_pretrained(tmp_path / "small", attn_implementation="eager").eval()
    assert len(loaded.get_submodule(CLASSES[name][1])) == 3
    reference = without(module, CLASSES[name][1], dropped)
    for shape in ((2, 6), (3, 19)):
        feeds = {k: torch.from_numpy(v) for k, v in other_feeds(shape, 7).items()}
        with torch.no_grad():
            ours, theirs = hidden(loaded(**feeds)), hidden(reference(**feeds))
        assert oracle.difference([ours.numpy()], [theirs.numpy()]) < CLOSE
    if name == "qwen2":
        kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
        assert loaded.config.layer_types == [k for i, k in enumerate(kinds) if i not in dropped]


@pytest.mark.parametrize(
    ("fields", "dropped", "said"),
    [
        ({"mlp_only_layers": [0, 3], "eos_token_id": [1, 2, 3, 4, 5]}, [1, 2], {"mlp_only_layers": [0, 1]}),
        ({"mlp_only_layers": [0, 3]}, [0], {"mlp_only_layers": [2]}),
        ({"mlp_only_layers": [], "decoder_sparse_step": 1}, [1], {}),
    ],
)
def test_a_configuration_says_which_of_fewer_blocks_are_others(fields: Any, dropped: list[int], said: Any) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 28, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 12}
    common = {"vocab_size": 61, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Qwen2MoeConfig(**sizes, **common, num_experts=4, num_experts_per_tok=2, **fields)
    model = transformers.Qwen2MoeForCausalLM(config)
    blocks, gone = BlockList("model.layers", 0, 5, frozenset()), range(dropped[0], dropped[-1] + 1)
    changes = fewer_blocks(model, blocks, gone)
    assert changes is not None
    wanted = {"num_hidden_layers": 5 - len(gone), "layer_types": ["full_attention"] * (5 - len(gone)), **said}
    assert {change.name: change.after for change in changes} == wanted


def test_a_configuration_says_from_which_block_on_they_are_others() -> None:
    latent = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
    sizes = {"hidden_size": 24, "intermediate_size": 28, "moe_intermediate_size": 20, "vocab_size": 61}
    groups = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
    config = transformers.DeepseekV3Config(**latent, **sizes, **groups, num_hidden_layers=5, num_attention_heads=4)
    model = transformers.DeepseekV3ForCausalLM(config)
    changes = fewer_blocks(model, BlockList("model.layers", 0, 5, frozenset()), range(1, 3))
    assert changes is not None
    assert {c.name: c.after for c in changes if c.name != "layer_types"} == {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
    }


def test_a_configuration_says_kinds_of_blocks_by_how_often_they_come() -> None:
    kinds = [[["global", "local"], 2]]
    config = transformers.GPTNeoConfig(
        vocab_size=61, hidden_size=24, num_layers=4, num_heads=2, intermediate_size=28, attention_types=kinds
    )
    module: Any = transformers.GPTNeoForCausalLM(config)
    changes = fewer_blocks(module, BlockList("transformer.h", 0, 4, frozenset()), range(1, 2))
    assert changes is not None
    assert {c.name: c.after for c in changes} == {
        "num_layers": 3,
        "attention_types": [[["global", "global", "local"], 1]],
        "attention_layers": ["global", "global", "local"],
    }


def traced(config: Any) -> tuple[FxModel, Stack, BlockList | None]:
    """Returns a causal model as it was traced, its stack of blocks, and their list."""
    torch.manual_seed(0)
    module = getattr(transformers, config.architectures[0])(config).eval()
    with without_cache(module):
        ids = torch.arange(33).reshape(3, 11)
        model = lower(trace(module, {"input_ids": ids}), module)
    analysis = analyse(model)
    (stack,) = find_stacks(analysis)
    return model, stack, block_list(analysis, stack)


def test_a_mask_of_its_own_leaves_a_block_free_to_go() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 24, "num_layers": 2, "num_heads": 2, "intermediate_size": 28}
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 16}
    model, stack, blocks = traced(transformers.GPTNeoConfig(**sizes, **kinds, architectures=["GPTNeoForCausalLM"]))
    assert blocks == BlockList("transformer.h", 0, 2, frozenset())  # each reads a buffer, for a mask that it alone reads
    assert blocks_differ(model, stack, blocks)


@pytest.mark.parametrize("by_number", [False, True])
def test_what_a_block_does_by_its_number_is_seen(by_number: bool) -> None:
    def config(layers: int) -> Any:
        sizes = {"vocab_size": 61, "n_embd": 24, "n_layer": layers, "n_head": 2, "n_positions": 16}
        architectures = ["GPT2LMHeadModel"]
        return transformers.GPT2Config(
            **sizes, scale_attn_by_inverse_layer_idx=by_number, architectures=architectures, bos_token_id=1, eos_token_id=2
        )

    model, stack, blocks = traced(config(3))
    assert blocks is not None and blocks_differ(model, stack, blocks) is by_number
    shorter = traced(config(2))[0]
    same = [computes_the_rest(shorter, model, blocks, run) for run in stack.runs(1)]
    assert same == [not by_number, not by_number, True]  # the last moves none


def test_a_checkpoint_whose_blocks_go_by_number_loses_the_last(tmp_path: Path) -> None:
    module = checkpoint("gpt2_by_number", tmp_path / "whole")
    result = liar_opt.prune(tmp_path / "whole", batches(4), blocks=1, block_repair="none", **PLAIN)
    assert result.report["blocks"]["first"] == 4
    assert any(
        "depends on its number: of 'transformer.h' none but the last can go" in n for n in result.report["model"]["notes"]
    )
    result.save(tmp_path / "small")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "small", attn_implementation="eager").eval()
    feeds = {k: torch.from_numpy(v) for k, v in other_feeds((2, 6), 7).items()}
    with torch.no_grad():
        ours, theirs = hidden(loaded(**feeds)), hidden(without(module, "transformer.h", range(4, 5))(**feeds))
    assert oracle.difference([ours.numpy()], [theirs.numpy()]) < CLOSE


def test_what_generating_says_of_blocks_goes_with_them() -> None:
    module: Any = transformers.WhisperForConditionalGeneration(zoo_fx.build("whisper").config)
    entries = module.config.decoder_layers
    module.generation_config.alignment_heads = [[0, 1], [entries - 1, 0], [entries - 1, 2]]
    blocks = BlockList("model.decoder.layers", 0, entries, frozenset())
    fields = fewer_blocks(module, blocks, range(1))
    made: Any = without_entries(module, blocks, range(1), {}, {}, fields)
    assert made.config.decoder_layers == entries - 1
    assert made.generation_config.alignment_heads == [[entries - 2, 0], [entries - 2, 2]]
    assert module.generation_config.alignment_heads[0] == [0, 1]


@pytest.mark.parametrize("name", ["llama", "gpt2", pytest.param("bert", marks=pytest.mark.rest)])
def test_a_checkpoint_holds_the_map_in_the_layer_before(name: str, tmp_path: Path) -> None:
    module = checkpoint(name, tmp_path / "whole")
    result = liar_opt.prune(tmp_path / "whole", batches(8), blocks=1, **PLAIN)
    found = result.report["blocks"]
    assert found["repair"] == "fold" and found["error"] < found["error_none"]
    result.save(tmp_path / "small")
    kind, path = getattr(transformers, CLASSES[name][0]), CLASSES[name][1]
    loaded = kind.from_pretrained(tmp_path / "small", attn_implementation="eager").eval()
    assert len(loaded.get_submodule(path)) == 4
    reference = without(module, path, range(found["first"], found["first"] + 1))
    before = f"{path}.{found['first'] - 1}."
    changed = {
        n
        for (n, p), (_, q) in zip(loaded.named_parameters(), reference.named_parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert changed and all(n.startswith(before) for n in changed)
    assert {tuple(sorted(loaded.get_parameter(n).shape)) for n in changed if loaded.get_parameter(n).ndim == 2} == {
        (48, 192 if name == "gpt2" else 88)
    }
    feeds = {k: torch.from_numpy(v) for k, v in batches(8)[5].items()}
    with torch.no_grad():
        whole, ours, plain = (hidden(m(**feeds)) for m in (module, loaded, reference))
    assert (ours - whole).square().mean() < (plain - whole).square().mean()


def test_a_checkpoint_loses_blocks_and_widths(tmp_path: Path) -> None:
    checkpoint("llama", tmp_path / "whole")
    result = liar_opt.prune(tmp_path / "whole", batches(8), blocks=1, ffn=0.5, **PLAIN)
    assert isinstance(result, ModuleResult)
    result.save(tmp_path / "small")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert (loaded.config.num_hidden_layers, loaded.config.intermediate_size) == (4, 48)
    feeds = {k: torch.from_numpy(v) for k, v in other_feeds((2, 9), 3).items()}
    with torch.no_grad():
        assert oracle.difference([loaded(**feeds).logits.numpy()], [result.module(**feeds).logits.numpy()]) < CLOSE


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"blocks": 0}, "blocks 0 is below 1"),
        ({"blocks": 4}, "has 4 blocks in a row; give 3 at most"),
        ({"blocks": 1, "block_repair": "glue"}, "glue"),
        ({"sparsity": 0.3, "block_repair": "none"}, "block-repair says what stands where blocks were; give --blocks N"),
        ({"blocks": "auto", "resume": "folder"}, "resume keeps one run, and blocks auto makes several"),
        (
            {"blocks": "auto", "ffn": 0.3},
            "blocks auto shares a sparsity, a target or max-drop with widths, and ffn is none",
        ),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        liar_opt.prune(export("llama"), batches(), **options, **PLAIN)


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    text = """
<ir_version: 8, opset_import: ["" : 17]>
ffn (float[b, 6] x) => (float[b, 6] y) {
    h = MatMul(x, up)
    a = Relu(h)
    y = MatMul(a, down)
}
"""
    proto = onnx.parser.parse_model(text)
    for name, shape in (("up", (6, 40)), ("down", (40, 6))):
        value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    with pytest.raises(ModelError, match="no blocks are found in the model"):
        liar_opt.prune(proto, None, blocks=1, **PLAIN)


def test_a_merged_decoder_is_refused_before_the_work() -> None:
    with pytest.raises(ModelError, match="a merged decoder has its blocks twice"):
        liar_opt.prune(zoo_merged.ready("bart"), None, blocks=1, **PLAIN)


def test_a_checkpoint_that_shares_one_layer_cannot_say_fewer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=101, embedding_size=16, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=88
    )
    transformers.AlbertModel(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(ModelError, match="no entries of one list of modules"):
        liar_opt.prune(tmp_path / "whole", batches(4), blocks=1, **PLAIN)


def test_a_checkpoint_has_no_place_for_a_map(tmp_path: Path) -> None:
    checkpoint("bert", tmp_path / "whole")
    with pytest.raises(OptionError, match="no configuration can say; give fold"):
        liar_opt.prune(tmp_path / "whole", batches(4), blocks=1, block_repair="map", **PLAIN)


def test_the_command_says_what_went(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from liar_opt.tools import cli

    data: dict[str, Any] = {k: np.concatenate([b[k] for b in batches(8)]) for k in batches(1)[0]}
    np.savez(tmp_path / "data.npz", **data)
    out, page = tmp_path / "out.onnx", tmp_path / "page.html"
    arguments = [str(export("bert")), "-o", str(out), "--calibration", str(tmp_path / "data.npz"), "--blocks", "1"]
    assert cli.main([*arguments, "--html", str(page), "--no-latency"]) == 0
    printed = capsys.readouterr().out
    assert "of 4 went; a linear map stands there" in printed and out.is_file()
    assert "of 4 went; a linear map stands there" in page.read_text(encoding="utf-8")
    assert cli.main([*arguments[:3], "--force", "--blocks", "9"]) == 2
    assert "give 3 at most" in capsys.readouterr().err
