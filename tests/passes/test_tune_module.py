"""Tuning of a pruned module: only its subset changes, the result is better on held-back batches, or as it was."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from modules import prune_module

import liar_opt
from liar_opt.frontend import fx_training
from liar_opt.passes import tune_module
from liar_opt.passes.checkpoint import TRAINING
from liar_opt.passes.result import ModuleResult
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.training import KeptTraining
from liar_opt.tools.cli import main
from liar_opt.tools.report import tuned

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 4, "max_position_embeddings": 64}


def _llama() -> Any:
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=8, num_key_value_heads=4, intermediate_size=88, initializer_range=0.1, use_cache=False
    )
    return transformers.LlamaForCausalLM(config)


def _bert() -> Any:
    config = transformers.BertConfig(**SIZES, num_attention_heads=4, intermediate_size=88, initializer_range=0.1)
    return transformers.BertModel(config, add_pooling_layer=False)


class _Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 32, 40, 24)
        parts = (torch.nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.parts = torch.nn.ModuleList(parts)
        self.head = torch.nn.Linear(24, 11)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            pixels = torch.relu(part(pixels))
        return torch.as_tensor(self.head(pixels.mean((2, 3))))


MODELS = {"llama": _llama, "bert": _bert, "convolutions": _Convolutions}


@functools.cache
def made(name: str) -> Any:
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.mul_(1.0 + 0.1 * (index % 3)) if parameter.ndim > 1 else parameter.add_(
                0.1 * torch.randn(parameter.shape)
            )
    return module


def batches(name: str, count: int = 12) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        if name == "convolutions":
            result.append({"pixels": torch.from_numpy(rng.normal(size=(8, 3, 9, 7)).astype(np.float32))})
            continue
        mask = np.ones((4, 13), np.int64)
        mask[1, -4:] = 0
        result.append({"input_ids": rng.integers(3, 101, (4, 13)), "attention_mask": mask})
    return result


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Goes on by a second each time it is read: a minute is some dozen steps."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(tune_module, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    yield


def pruned(name: str, **options: Any) -> ModuleResult:
    options = {"checkpoint": name == "llama", **options}
    return prune_module(
        made(name), batches(name), sparsity=0.4, allocate="uniform", multiple_of=4, latency=False, **options
    )


def state(result: ModuleResult) -> dict[str, torch.Tensor]:
    return dict(result.module.state_dict())


@functools.cache
def untuned(name: str) -> ModuleResult:
    return pruned(name)


@functools.cache
def after_tuning(name: str, what: str) -> ModuleResult:
    return pruned(name, tune=3.0, tune_what=what)


CASES = [(name, what) for name in MODELS for what in ("biases", "lora")]
SHOWN = {("llama", "lora"), ("convolutions", "biases")}


@pytest.mark.parametrize(("name", "what"), [pytest.param(*c, marks=() if c in SHOWN else pytest.mark.rest) for c in CASES])
def test_what_is_tuned_is_nearer_and_the_rest_as_it_was(name: str, what: str) -> None:
    dense = {n: v.clone() for n, v in made(name).state_dict().items()}
    before, after = untuned(name), after_tuning(name, what)
    assert all(torch.equal(v, dense[n]) for n, v in made(name).state_dict().items())
    entry = after.report["tune"]
    assert entry["kept"] and entry["after"] < entry["before"] and entry["steps"] > 20
    assert entry["loss"] == ("kl" if name == "llama" else "mse")
    old, new = state(before), state(after)
    assert old.keys() == new.keys()
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    vectors = {n for n, p in after.module.named_parameters() if p.ndim == 1}
    if what == "biases":
        assert changed <= vectors and entry["rank"] is None
        assert entry["parameters"] == sum(old[n].numel() for n in vectors if n in old)
    else:
        tables = {n for n, v in old.items() if v.ndim > 1 and ("embed" in n or "lm_head" in n)}
        assert not changed & tables and entry["rank"] == 8
        assert (changed - vectors) or name == "convolutions"
        steps = {n: old[n].float() - new[n].float() for n in changed - vectors}
        assert all(int(torch.linalg.matrix_rank(step, rtol=1e-4)) <= 8 for step in steps.values() if step.ndim == 2)
    # what the report says of the outputs is that of the tuned model
    shown = [r.report["verification"]["outputs"] for r in (before, after)]
    first = next(iter(shown[0]))
    assert shown[1][first]["relative_rms"] != shown[0][first]["relative_rms"]
    assert before.report["verification"]["exact_difference"] == after.report["verification"]["exact_difference"]
    assert "held-back batches" in tuned(entry) and "undone" not in tuned(entry)


@pytest.mark.rest
def test_the_same_seed_gives_the_same() -> None:
    first, second, other = (state(pruned("bert", tune=1.0, seed=s)) for s in (0, 0, 1))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_a_tuned_checkpoint_loads_and_all_forms_agree(tmp_path: Path) -> None:
    result = after_tuning("llama", "lora")
    feeds = {k: torch.from_numpy(v) for k, v in batches("llama")[0].items()}
    loaded = transformers.LlamaForCausalLM.from_pretrained(result.save(tmp_path / "out")).eval()
    with torch.no_grad():
        wanted = result.module(**feeds).logits
        torch.testing.assert_close(loaded(**feeds).logits, wanted)
        traced = result.graph_module(**feeds)
    logits = traced["logits"] if isinstance(traced, dict) else traced.logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.rest
def test_zeros_stay_zero() -> None:
    """Of a weight that no cut touches and of one that is cut and not repaired."""
    torch.manual_seed(0)
    module = MODELS["llama"]().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < 0.5)
    settings = {"ffn": 0.3, "repair": "none", "multiple_of": 4, "latency": False}
    before, after = (
        prune_module(module, batches("llama"), **settings, **more) for more in ({}, {"tune": 4.0, "tune_what": "lora"})
    )
    assert after.report["tune"]["kept"]
    old, new = state(before), state(after)
    matrices = [n for n, v in old.items() if "layers" in n and v.ndim == 2]
    assert all(torch.equal(old[n] == 0, new[n] == 0) for n in matrices)
    assert sum(not torch.equal(old[n], new[n]) for n in matrices) == len(matrices)


def test_what_is_no_better_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are far too long."""
    wild = {name: tune_module.SUBSETS[name].__class__(50.0) for name in tune_module.SUBSETS}
    monkeypatch.setattr(tune_module, "SUBSETS", wild)
    before, after = untuned("convolutions"), pruned("convolutions", tune=1.0)
    entry = after.report["tune"]
    assert not entry["kept"] and entry["after"] == entry["before"] and entry["best"] == 0 and entry["steps"] > 3
    old, new = state(before), state(after)
    assert all(torch.equal(old[n], new[n]) for n in old)
    assert before.report["verification"]["outputs"] == after.report["verification"]["outputs"]
    assert "it was undone" in tuned(entry)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fx_training.Distillation.loss, [0]

    def loss(self: Any, batch: Any) -> torch.Tensor:
        calls[0] += 1
        return real(self, batch) * (1.0 if calls[0] < 40 else float("nan"))

    monkeypatch.setattr(fx_training.Distillation, "loss", loss)
    result = pruned("convolutions", tune=5.0)
    entry = result.report["tune"]
    assert entry["kept"] and entry["after"] < entry["before"] and entry["steps"] == 39
    assert entry["stopped"] == "the loss was not finite at step 40" and "ended early" in tuned(entry)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process is forked, and killed by SIGKILL")
def test_a_killed_run_goes_on_and_is_never_worse(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    options: dict[str, Any] = {"tune": 3.0, "resume": folder}

    def killed() -> None:
        def progress(stage: str, done: int, total: int) -> None:
            if stage == "tune" and done > 120:
                os.kill(os.getpid(), signal.SIGKILL)

        pruned("convolutions", **options, progress=progress)

    first = multiprocessing.get_context("fork").Process(target=killed)
    first.start()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    left = KeptTraining(folder / TRAINING).found
    assert left is not None and left["standing"]["best"] < left["standing"]["before"]
    with pytest.raises(OptionError, match=r"is of another run: 'tune-module tune' was 3\.0, now it is 5"):
        pruned("convolutions", **{**options, "tune": 5.0})
    entry = pruned("convolutions", **options).report["tune"]
    assert entry["before"] == left["standing"]["before"] and entry["after"] <= left["standing"]["best"] and entry["kept"]
    assert entry["steps"] > left["standing"]["step"] and left["seconds"] < entry["seconds"] < 190
    assert not folder.exists()


@pytest.mark.rest
def test_one_sample_cannot_be_held_back() -> None:
    single = [{k: v[:1] for k, v in batches("bert")[0].items()}]
    result = prune_module(made("bert"), single, ffn=0.4, checkpoint=False, latency=False, tune=1.0)
    assert not result.report["tune"]["kept"] and "one sample" in result.report["tune"]["stopped"]
    assert result.report["tune"]["before"] is None  # JSON has no NaN
    assert "undone" in tuned(result.report["tune"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tune": 0.0}, "minutes above zero"),
        ({"tune": -1.0}, "minutes above zero"),
        ({"tune": float("nan")}, "minutes above zero"),
        ({"tune": 1.0, "tune_what": "heads"}, "unknown"),
        ({"tune_what": "lora"}, "--tune MINUTES"),
        ({"tune": 1.0, "backend": "onnxruntime"}, "leave it or backend"),
        ({"tune": 1.0, "blocks": 1}, "behind a cut of widths"),
        ({"tune": 1.0, "pattern": "2:4"}, "not a pattern; run it on the result"),
    ],
)
def test_bad_options_are_one_sentence_before_any_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        liar_opt.prune(torch.nn.Identity(), batches("bert"), **options)


def test_without_data_there_is_nothing_to_learn() -> None:
    with pytest.raises(OptionError, match="give some"):
        liar_opt.prune(torch.nn.Identity(), None, tune=1.0)


def test_a_graph_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "model.onnx"), "--tune", "5", "--calibration", "texts.txt"]) == 2
    said = capsys.readouterr().err
    assert "--refit" in said and said.count("\n") == 1
