"""Checkpoints: what stock transformers loads, what a configuration can say, and what is refused."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zoo_fx

import liar_opt
from liar_opt.frontend.hf_checkpoint import example_inputs, without_cache
from liar_opt.passes.prune_module import ModuleResult, prune_module
from liar_opt.runtime.calibration_data import first_rows
from liar_opt.runtime.errors import ModelError
from liar_opt.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

# What the configuration says for each architecture: the fields that change for a narrower FFN and fewer heads.
FIELDS = {
    "bart": {"encoder_ffn_dim", "decoder_ffn_dim"},
    "clip": {"intermediate_size"},  # of both parts
    "deepseek-v3": {"intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_key_value_heads"},
    "dinov2": {"head_dim", "num_attention_heads", "mlp_ratio"},  # an integer: its FFN is cut by halves
    "gemma3": {"intermediate_size", "num_attention_heads", "num_key_value_heads"},
    "gpt2": {"n_inner"},
    "llama": {"intermediate_size", "num_attention_heads", "num_key_value_heads"},
    "mamba": {"intermediate_size", "time_step_rank"},
    "mamba2": {"expand", "n_groups", "num_heads"},
    "mixtral": {"intermediate_size", "num_attention_heads", "num_key_value_heads"},
    "phi3": {"intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"},
    "siglip-vision": {"intermediate_size"},  # of its pooler too
    "t5": {"d_ff", "num_heads"},
    "whisper": {"encoder_ffn_dim", "decoder_ffn_dim"},
}


def run(module: Any, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    held = without_cache(module) if isinstance(module, torch.nn.Module) else contextlib.nullcontext()
    with torch.no_grad(), held:
        output = module(**zoo_fx.tensors(arrays))
    return [v.numpy() for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, torch.Tensor)]


def pruned(name: str, **options: Any) -> ModuleResult:
    return prune_module(
        zoo_fx.build(name), [zoo_fx.feeds(name, seed=s) for s in range(3)], latency=False, multiple_of=4, **options
    )


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_checkpoint_says_its_widths(name: str, tmp_path: Path) -> None:
    result = pruned(name, sparsity=0.4)
    folder = result.save(tmp_path / "out")
    assert result.fields is not None
    assert {f.name for f in result.fields} == FIELDS[name]
    model_class = getattr(transformers, zoo_fx.MODELS[name].model)
    loaded, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    arrays = zoo_fx.feeds(name, seed=9)
    for a, b in zip(run(loaded.eval(), arrays), run(result.module, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert loaded.num_parameters() < zoo_fx.build(name).num_parameters()


def test_experts_that_all_tokens_share_stay_in_proportion(tmp_path: Path) -> None:
    """Two of them: one field says their width together and that of every other expert."""
    sizes = {"hidden_size": 48, "intermediate_size": 72, "moe_intermediate_size": 40, "head_dim": 12}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
    torch.manual_seed(0)
    config = transformers.AfmoeConfig(
        **sizes, **counts, vocab_size=97, num_experts_per_tok=2, num_shared_experts=2, num_dense_layers=1, pad_token_id=0
    )
    module = transformers.AfmoeForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(3, 97, (2, 16))} for _ in range(3)]
    result = prune_module(module, batches, sparsity=0.3, multiple_of=8, latency=False)
    widths = {g.size: c.after for g in result.groups for c in result.changes if c.where == g.name and g.kind == "ffn"}
    assert widths[80] == 2 * widths[40] < 80 and not result.report["model"]["notes"]
    loaded, info = transformers.AfmoeForCausalLM.from_pretrained(result.save(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad(), without_cache(loaded):
        found = loaded.eval()(**batches[0]).logits
    with torch.no_grad(), without_cache(result.module):
        torch.testing.assert_close(found, result.module(**batches[0]).logits)


def test_a_configuration_that_says_no_width() -> None:
    module = transformers.OpenAIGPTModel(
        transformers.OpenAIGPTConfig(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4)
    ).eval()
    data = [{"input_ids": torch.randint(3, 97, (2, 16))} for _ in range(3)]
    with pytest.raises(
        ModelError, match=r"cannot say another feed-forward width or another number of heads .*--format onnx"
    ):
        prune_module(module, data, sparsity=0.3, latency=False)
    report = prune_module(module, data, sparsity=0.3, latency=False, checkpoint=False).report
    assert report["verification"]["exact_difference"] < 1e-4


def test_some_widths_of_a_kind_can_be_said() -> None:
    """MobileBERT's bottlenecks have a width that other parts of it have as well; its feed-forward layers have a field."""
    config = transformers.MobileBertConfig(
        **{"vocab_size": 97, "hidden_size": 48, "embedding_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 72, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    )
    data = [{"input_ids": torch.randint(3, 97, (2, 16))} for _ in range(3)]
    result = prune_module(transformers.MobileBertModel(config).eval(), data, ffn=0.5, latency=False)
    assert {g.size for g in result.groups} == {72}
    assert any(n.startswith("ffn of width 32 are left alone") for n in result.report["model"]["notes"])


def test_layers_without_a_bias_keep_none() -> None:
    result = pruned("llama", sparsity=0.4)
    assert all(m.bias is None for m in result.module.modules() if isinstance(m, torch.nn.Linear))
    errors = [r for g in result.report["groups"] for r in g["repairs"]]
    assert errors and all(r["error_repair"] <= r["error_none"] for r in errors)
    free = pruned("llama", sparsity=0.4, checkpoint=False)
    assert any(m.bias is not None for m in free.module.modules() if isinstance(m, torch.nn.Linear))


def test_bert_cannot_say_its_heads(tmp_path: Path) -> None:
    with pytest.raises(liar_opt.OptionError, match=r"BertModel.*head_dim.*another number of heads.*--format onnx"):
        pruned("bert", heads=0.4)
    result = pruned("bert", sparsity=0.3)
    assert {g.kind for g in result.groups} == {"ffn"}
    assert any("heads are left alone" in note for note in result.report["model"]["notes"])
    narrow = pruned("bert", heads=0.4, checkpoint=False)
    with pytest.raises(liar_opt.OptionError, match="--format onnx"):
        narrow.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def stored(name: str, folder: Path) -> Path:
    zoo_fx.build(name).save_pretrained(folder)
    return folder


def data(name: str, path: Path) -> Path:
    parts = [zoo_fx.feeds(name, batch=8, seed=s) for s in range(4)]
    joined: dict[str, Any] = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    np.savez(path, **joined)
    return path


def test_the_command_makes_a_checkpoint_that_transformers_alone_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, calibration = stored("llama", tmp_path / "model"), data("llama", tmp_path / "data.npz")
    (model / "generation_config.json").write_text(json.dumps({"max_length": 17}))
    (model / "vocab.txt").write_text("a\nb\n")
    arguments = [str(model), "--calibration", str(calibration), "--sparsity", "0.4", "--multiple-of", "4", "--no-latency"]
    assert main([*arguments, "-o", str(tmp_path / "out"), "--report", str(tmp_path / "r.json")]) == 0
    told = capsys.readouterr().out
    assert "intermediate_size 88 -> 52" in told and "num_key_value_heads 3 -> 2" in told
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["output"]["path"] == str(tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a\nb\n"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_length"] == 17
    script = (
        "import sys, torch, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print([round(float(v), 4) for v in m(input_ids=torch.arange(3, 20).reshape(1, -1)).logits[0, -1, :5]])\n"
        "assert 'liar_opt' not in sys.modules\n"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert not any(word in fresh.stderr for word in ("newly initialized", "mismatch", "not used"))
    here = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        logits = here(input_ids=torch.arange(3, 20).reshape(1, -1)).logits[0, -1, :5]
    np.testing.assert_allclose(json.loads(fresh.stdout), logits.numpy(), atol=2e-4)
    # Once more: the output exists.
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
    assert "give --force" in capsys.readouterr().err


def test_the_command_writes_onnx_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, calibration = stored("bert", tmp_path / "model"), data("bert", tmp_path / "data.npz")
    output = tmp_path / "small.onnx"
    arguments = [str(model), "--calibration", str(calibration), "--heads", "0.4", "--ffn", "0.5", "--no-latency"]
    assert main([*arguments, "--format", "onnx", "-o", str(output), "--quiet"]) == 0
    assert {g.kind: g.size for g in liar_opt.inspect(output).groups} == {"heads": 3, "ffn": 48}


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        ("config", "has no config.json"),
        ("weights", "has no weights"),
        ("pickle", "pickle files, which can run code"),
        ("truncated", "transformers cannot load"),
    ],
)
def test_unusable_folders(spoil: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stored("bert", tmp_path / "model")
    weights = model / "model.safetensors"
    if spoil == "config":
        (model / "config.json").unlink()
    elif spoil == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    if spoil == "pickle":
        torch.save(zoo_fx.build("bert").state_dict(), model / "pytorch_model.bin")
    assert main([str(model), "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    if spoil == "pickle":
        assert main([str(model), "-o", str(tmp_path / "out"), "--allow-pickle", "--no-latency", "--quiet"]) == 0


def test_an_output_that_is_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stored("bert", tmp_path / "model")
    assert main([str(model), "-o", str(model), "--force"]) == 2
    assert "is the input" in capsys.readouterr().err
    shutil.rmtree(model)
    assert main([str(model), "-o", str(tmp_path / "out")]) == 2


@pytest.mark.parametrize("name", ["bert", "clip", "vit", "wav2vec2", "whisper"])
def test_a_configuration_says_what_a_model_reads(name: str) -> None:
    module = zoo_fx.build(name)
    feeds = example_inputs(module)
    assert feeds is not None
    assert feeds.keys() == zoo_fx.feeds(name).keys()
    with torch.no_grad():
        module(**feeds)


def test_a_configuration_that_does_not_say_what_a_model_reads() -> None:
    with pytest.raises(liar_opt.OptionError, match="array for each of pixel_values, pixel_attention_mask, spatial_shapes"):
        prune_module(zoo_fx.build("siglip2-vision"), sparsity=0.3)


def test_arrays_in_a_file_say_what_a_model_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint that reads sound, on the command line."""
    module, feeds = zoo_fx.build("whisper"), zoo_fx.feeds("whisper")
    module.save_pretrained(tmp_path / "model")
    (tmp_path / "folder").mkdir()
    np.savez_compressed(tmp_path / "data.npz", **feeds)  # type: ignore[arg-type]
    for key, value in feeds.items():
        np.save(tmp_path / "folder" / f"{key}.npy", value)
    for given in (tmp_path / "data.npz", tmp_path / "folder"):
        said = first_rows(given, 2)
        assert said is not None
        for key, value in feeds.items():
            np.testing.assert_array_equal(said[key], value[:2])
    assert first_rows(tmp_path, 2) is None and first_rows(["a text"], 2) is None and first_rows("owner/name", 2) is None
    options = ["--calibration", str(tmp_path / "data.npz"), "--ffn", "0.5", "--no-latency", "-o", str(tmp_path / "small")]
    assert main([str(tmp_path / "model"), *options]) == 0
    assert "decoder_ffn_dim 72 ->" in capsys.readouterr().out
