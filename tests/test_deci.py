"""Checkpoints of DeciLM: feed-forward widths of each layer, read by code of their own and by what serves them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import liar_opt
from liar_opt.frontend.decilm import as_deci
from liar_opt.frontend.hf_checkpoint import without_cache
from liar_opt.frontend.modeling_decilm import DeciLMConfig, DeciLMForCausalLM, ffn_multiple, ffn_width
from liar_opt.passes.result import ModuleResult
from liar_opt.runtime.errors import OptionError
from liar_opt.tools import cli
from liar_opt.tools.dev.deci_gguf import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS, LAYERS, FFN = 61, 4, 1024
SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": FFN,
    "max_position_embeddings": 64,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def model(kind: str = "Llama", **more: Any) -> Any:
    """A decoder whose layers differ in how much they do."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(module.named_parameters()):
            if name.endswith("bias"):
                parameter.normal_()
            elif "mlp" in name:
                parameter.mul_(1.0 + 2.0 * (index % 5))
    return module


def batches(count: int = 4) -> list[dict[str, np.ndarray]]:
    rngs = map(np.random.default_rng, range(count))
    return [{"input_ids": rng.integers(3, WORDS, (4, 13)), "attention_mask": np.ones((4, 13), np.int64)} for rng in rngs]


def pruned(module: Any, **options: Any) -> ModuleResult:
    given: dict[str, Any] = {"checkpoint": "deci", "latency": False, "sparsity": 0.4, "fresh": True, **options}
    result = liar_opt.prune(module, batches(), **given)
    assert isinstance(result, ModuleResult)
    return result


@functools.cache
def free() -> ModuleResult:
    return pruned(model())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return free().save(tmp_path_factory.mktemp("deci") / "out")


def logits(module: Any, length: int = 11) -> np.ndarray:
    with torch.no_grad(), without_cache(module):
        found: np.ndarray = module(input_ids=torch.arange(3, 3 + 2 * length).reshape(2, length)).logits.numpy()
    return found


def widths(result: ModuleResult, kind: str = "ffn") -> list[int]:
    return [g["after"] for g in result.report["groups"] if g["kind"] == kind]


def test_each_layer_has_a_width_of_its_own(folder: Path) -> None:
    result = free()
    assert len(set(widths(result))) > 1 and all(n % 256 == 0 for n in widths(result)) and min(widths(result)) < FFN
    assert result.report["verification"]["exact_difference"] < 1e-4
    config = json.loads((folder / "config.json").read_text("utf-8"))
    said = [ffn_width(b["ffn"]["ffn_mult"], config["hidden_size"]) for b in config["block_configs"]]
    assert said == widths(result) and config["architectures"] == ["DeciLMForCausalLM"]
    assert config["model_type"] == "nemotron-nas" and config["rope_theta"] == 5000.0
    assert all(b["attention"]["n_heads_in_group"] == 2 for b in config["block_configs"])


def test_transformers_alone_loads_it(folder: Path) -> None:
    script = (
        "import sys, torch, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "ids = torch.arange(3, 25).reshape(2, 11)\n"
        "written = m.generate(ids, max_new_tokens=6, do_sample=False)\n"
        "torch.save((m(input_ids=ids, use_cache=False).logits, written), sys.argv[2])\n"
        "assert 'liar_opt' not in sys.modules\n"
    )
    kept = folder.parent / "out.pt"
    subprocess.run([sys.executable, "-c", script, str(folder), str(kept)], capture_output=True, text=True, check=True)
    theirs, written = torch.load(kept)
    np.testing.assert_allclose(theirs.detach().numpy(), logits(free().module), rtol=1e-4, atol=1e-4)
    ours: Any = free().module
    ids = torch.arange(3, 25).reshape(2, 11)
    assert torch.equal(written, ours.generate(ids, max_new_tokens=6, do_sample=False))  # with the cache


@pytest.mark.rest
def test_it_is_read_back_and_pruned_again(folder: Path, tmp_path: Path) -> None:
    assert [g.size for g in liar_opt.inspect(folder).groups] == widths(free())
    again = liar_opt.prune(folder, batches(), ffn=0.3, latency=False)
    assert isinstance(again, ModuleResult) and sum(widths(again)) < sum(widths(free()))
    loaded = DeciLMForCausalLM.from_pretrained(again.save(tmp_path / "again")).eval()
    np.testing.assert_allclose(logits(loaded), logits(again.module), rtol=1e-4, atol=1e-4)


@pytest.mark.rest
def test_heads_go_where_they_are_asked_for(tmp_path: Path) -> None:
    assert any("heads are left alone: llama.cpp's converter" in note for note in free().report["model"]["notes"])
    assert not widths(free(), "heads")
    result = pruned(model(), sparsity=None, heads=0.3, ffn=0.4, allocate="curves")
    assert widths(result, "heads") == [2] * LAYERS
    out = result.save(tmp_path / "out")
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    loaded = DeciLMForCausalLM.from_pretrained(out).eval()
    np.testing.assert_allclose(logits(loaded), logits(result.module), rtol=1e-4, atol=1e-4)


GOALS: dict[str, dict[str, Any]] = {
    "target": {"sparsity": None, "target": "params=0.7x"},
    "max-drop": {"sparsity": None, "max_drop": "30%"},
    "search": {"search": 0.5},
    "uniform": {"allocate": "uniform"},
    "blocks": {"blocks": 1},
    "tensor-parallel": {"tensor_parallel": 2, "sparsity": None, "ffn": 0.4},
}


@pytest.mark.rest
@pytest.mark.parametrize("name", GOALS)
def test_whatever_sets_the_goal(name: str, tmp_path: Path) -> None:
    result = pruned(model(), **GOALS[name])
    assert all(n % 256 == 0 for n in widths(result))
    loaded = DeciLMForCausalLM.from_pretrained(result.save(tmp_path / "out")).eval()
    np.testing.assert_allclose(logits(loaded), logits(result.module), rtol=1e-4, atol=1e-4)


# What is shaped like a Llama ------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "a window as long as all": ("Mistral", {"sliding_window": 64}),
    "wide heads": ("Llama", {"head_dim": 16}),
    "llama3": ("Llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "all heads alone": ("Llama", {"num_key_value_heads": 6}),
}


@pytest.mark.parametrize("name", LIKE)
def test_models_shaped_like_it_are_said_as_they_are(name: str, tmp_path: Path) -> None:
    kind, more = LIKE[name]
    module = model(kind, **more)
    made: Any = as_deci(module, {"input_ids": torch.arange(3, 25).reshape(2, 11)})
    assert made.model.layers[0].mlp.up_proj.weight.data_ptr() == module.model.layers[0].mlp.up_proj.weight.data_ptr()
    made.save_pretrained(tmp_path)
    loaded = DeciLMForCausalLM.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(logits(loaded), logits(module), rtol=1e-5, atol=1e-5)


UNLIKE: dict[str, tuple[str, dict[str, Any], str]] = {
    "an odd width": ("Llama", {"intermediate_size": 300}, "feed-forward width 300 is no multiple of 256"),
    "another activation": ("Llama", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
    "a window": ("Mistral", {"sliding_window": 8}, "sliding window"),
    "other positions": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rotated as 'linear'"),
    "other tensors": ("Qwen3", {"head_dim": 8}, "its tensors are not those of a Llama"),
    "other code": ("Granite", {"residual_multiplier": 0.5}, "a Llama computes something else of its tensors"),
    "no Llama": ("GPTNeoX", {}, "its configuration has no 'rms_norm_eps'"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_what_it_cannot_say_is_refused(name: str) -> None:
    kind, more, match = UNLIKE[name]
    with pytest.raises(OptionError, match=f"{kind}ForCausalLM cannot be said as DeciLM: .*{match}"):
        pruned(model(kind, **more))


def test_what_contradicts_is_refused() -> None:
    with pytest.raises(OptionError, match="checkpoint is 'deco', of type 'str'; give True or False, 'deci' or None"):
        pruned(model(), checkpoint="deco")
    with pytest.raises(OptionError, match="what reads DeciLM reads no weights of torchao"):
        pruned(model(), quantize="int8")
    with pytest.raises(OptionError, match="converter takes the heads of DeciLM to be"):
        pruned(model(), runtime="gguf", sparsity=None, heads=0.3)


@pytest.mark.rest
def test_what_contradicts_a_model_is_refused() -> None:
    with pytest.raises(OptionError, match="whole-layers works on a traced graph"):
        pruned(model(), whole_layers="on", uniform=True)
    with pytest.raises(OptionError, match="no narrower ffn fits the format deci"):
        pruned(model(intermediate_size=256), sparsity=None, ffn=0.4)
    with pytest.raises(OptionError, match="Linear cannot be said as DeciLM: its configuration has no 'hidden_size'"):
        liar_opt.prune(torch.nn.Linear(8, 8), [{"input": torch.ones(2, 8)}], checkpoint="deci")


def idle() -> Any:
    """A decoder of which one layer's attention does next to nothing."""
    module = model()
    with torch.no_grad():
        module.model.layers[2].self_attn.o_proj.weight.mul_(1e-3)
    return module


def test_attention_goes_whole(tmp_path: Path) -> None:
    """The oracle: the original whose attention adds nothing computes what is left, but for the feed-forward layers' cut."""
    result = pruned(idle(), whole_layers="on", sparsity=0.185)  # three steps of 256 channels, and an attention
    kept = widths(result, "heads")
    assert kept[2] == 0 and set(kept) <= {0, 3} and result.report["verification"]["exact_difference"] < 1e-4
    out = result.save(tmp_path / "out")
    blocks = json.loads((out / "config.json").read_text("utf-8"))["block_configs"]
    assert [b["attention"]["no_op"] for b in blocks] == [not n for n in kept]
    assert [b["attention"]["n_heads_in_group"] for b in blocks] == [2 if n else None for n in kept]
    assert all(b["ffn"]["ffn_mult"] for b in blocks)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    assert not [n for n, _ in loaded.named_parameters() if n.startswith("model.layers.2.self_attn")]
    np.testing.assert_allclose(logits(loaded), logits(result.module), rtol=1e-4, atol=1e-4)
    # Beside the original: attention that adds nothing, and the weights of the result at their places.
    masked, whole = idle(), dict(loaded.named_parameters())
    state = masked.state_dict()
    for index, group in enumerate(g for g in result.report["groups"] if g["kind"] == "ffn"):
        stays, layer = group.get("kept", list(range(FFN))), f"model.layers.{index}"
        down = torch.zeros_like(state[f"{layer}.mlp.down_proj.weight"])
        down[:, stays] = whole[f"{layer}.mlp.down_proj.weight"]
        state[f"{layer}.mlp.down_proj.weight"] = down
        if not kept[index]:
            state[f"{layer}.self_attn.o_proj.weight"].zero_()
    masked.load_state_dict(state)
    np.testing.assert_allclose(logits(loaded), logits(masked), rtol=1e-4, atol=1e-4)
    ids = torch.arange(3, 25).reshape(2, 11)
    cached, not_cached = (loaded.generate(ids, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, not_cached)


def test_multiples_stand_for_their_widths() -> None:
    for hidden in (48, 576, 2048, 3584, 4096, 8192, 16384):
        for width in range(256, 8 * hidden + 256, 256):
            multiple = ffn_multiple(width, hidden)
            assert isinstance(multiple, float)
            assert ffn_width(multiple, hidden) == ffn_width(round(multiple, 6), hidden) == width  # as mlx-lm rounds it


@pytest.mark.rest
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model().save_pretrained(tmp_path / "model")
    joined: dict[str, Any] = {k: np.concatenate([b[k] for b in batches()]) for k in batches(1)[0]}
    np.savez(tmp_path / "data.npz", **joined)
    given = [str(tmp_path / "model"), "--calibration", str(tmp_path / "data.npz"), "--ffn", "0.4", "--no-latency"]
    assert cli.main([*given, "--format", "deci", "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "ffn_mult 32.0 -> " in told and "feed-forward widths in multiples of 256" in told
    assert (tmp_path / "out" / "modeling_decilm.py").is_file()
    assert cli.main([*given, "--format", "deci", "-o", str(tmp_path / "out"), "--force", "--quiet"]) == 0
    assert cli.main([*given, "--format", "deci", "-o", str(tmp_path / "out.onnx")]) == 2
    assert "deci is a folder, and" in capsys.readouterr().err


# What reads it --------------------------------------------------------------------------------------------------------


def every_form() -> Any:
    """A model with layers of all forms."""
    blocks = [
        {"attention": {"n_heads_in_group": 3}, "ffn": {"ffn_mult": ffn_multiple(512, 48)}},
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": ffn_multiple(768, 48)}},
        {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": ffn_multiple(256, 48)}},
        {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": ffn_multiple(1024, 48)}},
    ]
    torch.manual_seed(1)
    return DeciLMForCausalLM(DeciLMConfig(block_configs=blocks, **SIZES)).eval()


def test_layers_without_attention_generate_through_the_cache() -> None:
    module = every_form()
    ids = torch.arange(3, 25).reshape(2, 11)
    first = module.generate(ids, max_new_tokens=6, do_sample=False)
    second = module.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(first, second) and first.shape == (2, 17)


@pytest.mark.parametrize("form", ["pruned", "every form"])
def test_llama_cpp_reads_it(form: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    llama = pytest.importorskip("llama_cpp")
    module: Any = free().module
    if form == "every form":
        module, folder = every_form(), tmp_path
        module.save_pretrained(folder)
    write_gguf(folder, tmp_path / "model.gguf")
    options = {"n_ctx": 32, "logits_all": True, "n_threads": 1, "verbose": False}
    loaded = llama.Llama(str(tmp_path / "model.gguf"), type_k=0, type_v=0, **options)  # a cache in float32
    ids = list(range(3, 14))
    loaded.eval(ids)
    theirs = np.array(loaded.scores[: len(ids)])
    np.testing.assert_allclose(theirs, logits(module)[0], rtol=1e-4, atol=1e-4)


def test_mlx_lm_reads_it(folder: Path) -> None:
    core = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    loaded, _ = utils.load_model(folder)
    theirs = np.array(loaded(core.array(np.arange(3, 25).reshape(2, 11))).astype(core.float32))
    np.testing.assert_allclose(theirs, logits(free().module), rtol=1e-3, atol=1e-3)
