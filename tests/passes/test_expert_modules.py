"""Whole experts of torch modules and checkpoints: stock transformers loads what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import liar_opt
from liar_opt.runtime.errors import OptionError

SIZES = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61}
COMMON = {**SIZES, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
NARROW = {"intermediate_size": 28, "moe_intermediate_size": 20, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}
GROUPED = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_key_value_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "mixtral": (
        "Mixtral",
        {**COMMON, "intermediate_size": 20, "num_local_experts": 5, "num_experts_per_tok": 2},
        "num_local_experts",
        3,
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {**COMMON, **NARROW, "shared_expert_intermediate_size": 36, "num_experts": 5, "mlp_only_layers": [1]},
        "num_experts",
        3,
    ),
    "olmoe": ("Olmoe", {**COMMON, "intermediate_size": 20, "num_experts": 6, "num_experts_per_tok": 2}, "num_experts", 4),
    "deepseek-v3": ("DeepseekV3", {**COMMON, **NARROW, **LATENT, **GROUPED}, "n_routed_experts", 4),
}


def module(name: str, large: bool = True) -> Any:
    family, fields, _, _ = MODELS[name]
    torch.manual_seed(7)
    made = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**fields)).eval()
    if not large:
        return made
    with torch.no_grad():
        for parameter, value in made.named_parameters():
            if ".gate." in parameter or ".experts." in parameter:
                value.normal_(0, 0.3)
        for buffer, value in made.named_buffers():
            if "correction" in buffer:
                value.normal_(0, 0.05)
    return made


def ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, 61, shape)


def logits(model: Any, given: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(input_ids=torch.from_numpy(given)).logits)


def never_chosen(model: Any, kept: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the routers of a module give -inf to the experts that are not kept, where they multiply."""
    gates = [m for n, m in model.named_modules() if n.endswith(".gate") and hasattr(m, "weight")]
    gone = {}
    for gate, own in zip(gates, kept, strict=True):
        mask = torch.full((gate.weight.shape[0],), -torch.inf)
        mask[own] = 0
        gone[id(gate.weight)] = mask
        if hasattr(gate, "e_score_correction_bias"):
            gate.e_score_correction_bias += mask
    linear = torch.nn.functional.linear

    def masked(x: Any, weight: Any, bias: Any = None) -> Any:
        made = linear(x, weight, bias)
        return made + gone[id(weight)] if id(weight) in gone else made

    monkeypatch.setattr(torch.nn.functional, "linear", masked)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "deepseek-v3" else pytest.mark.rest) for n in MODELS])
def test_a_checkpoint_of_fewer_experts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, field, left = module(name), *MODELS[name][2:]
    model.save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"batch_size": 4, "provider": "cpu", "latency": False}
    result: Any = liar_opt.prune(tmp_path / "dense", {"input_ids": ids(16, 9)}, experts=0.4, **options)
    found = result.report["experts"]
    assert all(layer["after"] == left for layer in found["layers"])
    assert found["exact_difference"] < 1e-5
    if name == "deepseek-v3":  # as many of each group
        assert all(sum(i < 4 for i in layer["kept"]) == left // 2 for layer in found["layers"])
    result.save(tmp_path / "fewer")
    assert json.loads((tmp_path / "fewer" / "config.json").read_text())[field] == left
    loaded = type(model).from_pretrained(tmp_path / "fewer").eval()
    assert result.report["after"]["parameters"] == sum(p.numel() for p in loaded.parameters())
    dense = [logits(model, ids(*shape, seed=3)) for shape in ((1, 1), (2, 7), (5, 3))]
    ours = [logits(loaded, ids(*shape, seed=3)) for shape in ((1, 1), (2, 7), (5, 3))]
    never_chosen(model, [layer["kept"] for layer in found["layers"]], monkeypatch)
    theirs = [logits(model, ids(*shape, seed=3)) for shape in ((1, 1), (2, 7), (5, 3))]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(ours, dense, strict=True)) > 1e-3


def test_as_many_stay_in_a_group_as_it_is_chosen_by() -> None:
    """DeepSeek adds up the best two of each group; of one expert there are no best two."""
    torch.manual_seed(7)
    model = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**{**MODELS["deepseek-v3"][1], "topk_group": 2})
    )
    with pytest.raises(
        OptionError, match=r"leave 1 of 4 experts of each of 2 groups .*, and 2 are needed to choose 2 for each"
    ):
        liar_opt.prune(model.eval(), {"input_ids": ids(4, 9)}, experts=0.75, provider="cpu")


def test_experts_and_widths_of_a_checkpoint(tmp_path: Path) -> None:
    """Of the widths of experts those are kept that torch's grouped product can run: rows of 16 bytes."""
    model = module("mixtral")
    model.save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"batch_size": 4, "provider": "cpu", "latency": False, "multiple_of": 1}
    result: Any = liar_opt.prune(tmp_path / "dense", {"input_ids": ids(32, 9)}, experts=0.4, ffn=0.5, **options)
    result.save(tmp_path / "fewer")
    config = json.loads((tmp_path / "fewer" / "config.json").read_text())
    assert config["num_local_experts"] == 3
    assert config["intermediate_size"] == 12
    loaded = type(model).from_pretrained(tmp_path / "fewer").eval()
    np.testing.assert_allclose(logits(loaded, ids(2, 7)), logits(result.module, ids(2, 7)), rtol=1e-4, atol=1e-5)
    assert result.report["before"]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.rest
def test_a_dry_run_gives_the_module_as_it_came() -> None:
    model = module("mixtral")
    result: Any = liar_opt.prune(model, {"input_ids": ids(16, 9)}, experts=0.4, dry_run=True, provider="cpu")
    assert result.module is model
    assert sum("3 of 5 experts would be left" in note for note in result.report["model"]["notes"]) == 4


class Mixture(torch.nn.Module):
    """Experts in one parameter behind their router, of no library; how many there are is in its code."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.router = torch.nn.Linear(8, count)
        self.up = torch.nn.Parameter(torch.randn(count, 8, 11) * 0.3)
        self.down = torch.nn.Parameter(torch.randn(count, 11, 8) * 0.3)

    def forward(self, x: Any) -> Any:
        rows = x.reshape(-1, 8)
        scores = self.router(rows).reshape(-1, self.count).softmax(-1)
        best, choice = scores.topk(2, -1)
        chosen = choice.reshape(-1)
        hidden = torch.bmm(rows.repeat_interleave(2, 0)[:, None], self.up[chosen]).relu()
        made = torch.bmm(hidden, self.down[chosen])[:, 0] * best.reshape(-1, 1)
        return x + made.reshape(-1, 2, 8).sum(1).reshape(x.shape)


def test_a_module_of_no_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(*(Mixture(count) for count in (6, 5, 7, 6))).eval()
    batches = [torch.randn(4, 5, 8) for _ in range(4)]
    result: Any = liar_opt.prune(model, batches, experts=0.4, provider="cpu", latency=False)
    kept = [layer["kept"] for layer in result.report["experts"]["layers"]]
    assert [m.count for m in result.module] == [len(own) for own in kept] == [4, 3, 4, 4]
    assert [m.router.out_features for m in result.module] == [4, 3, 4, 4]
    x = torch.randn(3, 2, 8)
    with torch.no_grad():
        for layer, own in zip(model, kept, strict=True):
            gone = torch.ones(layer.count, dtype=torch.bool)
            gone[own] = False
            layer.router.bias[gone] = -torch.inf
        torch.testing.assert_close(result.module(x), model(x), rtol=1e-4, atol=1e-5)
    result.save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").stat().st_size > 0
