"""Checkpoints: what stock transformers loads, what a configuration can say, and what is refused."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
import torch
import transformers
import zoo_fx
from modules import prune_module

import liar_opt
from liar_opt.frontend import hf_checkpoint
from liar_opt.frontend.hf_checkpoint import example_inputs, express, load_module, positions, without_cache
from liar_opt.passes.result import ModuleResult
from liar_opt.runtime.calibration_data import first_rows
from liar_opt.runtime.errors import LiarOptWarning, ModelError
from liar_opt.tools.cli import main
from liar_opt.tools.report import target_met

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


@pytest.mark.parametrize("name", zoo_fx.of_each_kind(FIELDS, but=("clip", "gemma3")))
def test_a_checkpoint_says_its_widths(name: str, tmp_path: Path) -> None:
    result = pruned(name, sparsity=0.4, allocate="uniform")
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


def test_a_width_that_no_field_says_is_told_without_trying_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration with many numbers that are alike: hundreds of models were made to find that none of them says it."""
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]}
    config = transformers.MobileViTConfig(image_size=32, patch_size=2, num_attention_heads=4, **sizes)
    module = transformers.MobileViTModel(config).eval()
    made: list[Any] = []
    shapes_made = hf_checkpoint._shapes_made

    def counted(*given: Any) -> Any:
        made.append(given)
        return shapes_made(*given)

    monkeypatch.setattr(hf_checkpoint, "_shapes_made", counted)
    before = {k: tuple(v.shape) for k, v in module.state_dict().items()}

    def wanted(inner: Callable[[int], int]) -> dict[str, tuple[int, ...]]:
        up = {k: (inner(s[0]), *s[1:]) for k, s in before.items() if "intermediate.dense" in k}
        down = {k: (s[0], inner(s[1])) for k, s in before.items() if k.endswith(".output.dense.weight") and "att" not in k}
        return {**before, **up, **down}

    for width in (32, 48, 64):  # of one stage, while one ratio says those of all
        pair, narrow = {(width, width - 1)}, {n: n - (n == width) for n in (32, 48, 64)}
        assert express(module, wanted(narrow.__getitem__), pair, (), ratios=pair, valid=False) is None
    fewer = {k: (s[0] * 3 // 4, *s[1:]) for k, s in before.items() if any(n in k for n in ("query", "key", "value"))}
    pairs = {(4, 3), (16, 12), (24, 18), (32, 24)}
    assert express(module, {**before, **fewer}, pairs, {4, 6, 8}, valid=False) is None
    assert len(made) < 100
    all_of_them = {(n, n - n // 16) for n in (32, 48, 64)}
    said = express(module, wanted(lambda n: n - n // 16), all_of_them, (), ratios=all_of_them, valid=False)
    assert [c.name for c in said or ()] == ["mlp_ratio"]


@pytest.mark.rest
def test_widths_that_a_class_rounds_are_left_alone(tmp_path: Path) -> None:
    """One less than MobileViT's expanded widths can be said by chance; the widths that are wanted cannot."""
    sizes = {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 48]}
    config = transformers.MobileViTConfig(image_size=64, patch_size=2, num_attention_heads=4, **sizes)
    torch.manual_seed(0)
    module = transformers.MobileViTModel(config).eval()
    data = [{"pixel_values": torch.randn(4, 3, 64, 64)} for _ in range(3)]
    result = prune_module(module, data, sparsity=0.2, latency=False)
    result.save(tmp_path / "smaller")
    loaded = transformers.MobileViTModel.from_pretrained(tmp_path / "smaller").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**data[0])[0], result.module(**data[0])[0])
    assert result.report["after"]["parameters"] < result.report["before"]["parameters"]


def test_some_widths_of_a_kind_can_be_said(tmp_path: Path) -> None:
    """MobileBERT's bottlenecks have a width that other parts of it have as well; its feed-forward layers have a field.

    So has its embedding, which is read as three parts beside each other.
    """
    config = transformers.MobileBertConfig(
        **{"vocab_size": 97, "hidden_size": 48, "embedding_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 72, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    )
    data = [{"input_ids": torch.randint(3, 97, (2, 16))} for _ in range(3)]
    result = prune_module(transformers.MobileBertModel(config).eval(), data, ffn=0.5, latency=False)
    assert {g.size for g in result.groups} == {24, 72}
    loaded = transformers.MobileBertModel.from_pretrained(result.save(tmp_path / "out")).eval()
    arrays = {"input_ids": data[0]["input_ids"].numpy()}
    for a, b in zip(run(loaded, arrays), run(result.module, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert any(n.startswith("ffn of width 32 are left alone") for n in result.report["model"]["notes"])


def test_layers_without_a_bias_keep_none() -> None:
    result = pruned("llama", sparsity=0.4, allocate="uniform")
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
    assert not (tmp_path / "out").exists()


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
    arguments += ["--allocate", "uniform"]
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
    for place, form, said in (("small", "onnx", "onnx writes a file"), ("a.onnx", "checkpoint", "checkpoint is a folder")):
        capsys.readouterr()
        assert main([*arguments, "--format", form, "-o", str(tmp_path / place), "--quiet"]) == 2
        assert said in capsys.readouterr().err
    program = tmp_path / "small.pt2"  # no configuration that would have to say the heads
    assert main([*arguments, "-o", str(program), "--quiet"]) == 0
    arrays = zoo_fx.feeds("bert", seed=3)
    (theirs, *_) = oracle.run(onnx.load(output), arrays)
    with torch.no_grad():
        ours = torch.export.load(program).module()(**{k: torch.from_numpy(v) for k, v in arrays.items()})
    np.testing.assert_allclose(next(iter(ours.values())).numpy(), theirs, rtol=1e-3, atol=1e-4)


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


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small() -> ModuleResult:
    return pruned("llama", ffn=0.4)


def test_a_folder_that_liar_opt_wrote_is_replaced(small: ModuleResult, tmp_path: Path) -> None:
    out = small.save(tmp_path / "out")
    before = files(out)
    assert "liar_opt.json" in before and set(json.loads(before["liar_opt.json"])["files"]) == before.keys() - {
        "liar_opt.json"
    }
    with pytest.raises(liar_opt.OptionError, match="exists; give --force"):
        small.save(out)
    moved = shutil.copytree(out, tmp_path / "copy")  # digests say it, not times
    assert files(small.save(moved, force=True)) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "out"]


@pytest.mark.parametrize(
    "change", ["a file", "a file below", "a folder", "a link", "other weights", "no note", "a broken note"]
)
def test_a_folder_that_holds_what_others_wrote_is_refused(change: str, small: ModuleResult, tmp_path: Path) -> None:
    out = small.save(tmp_path / "out")
    name = {"a file": "notes.txt", "a file below": "sub/notes.txt", "a folder": "sub", "a link": "link"}.get(change)
    if change in ("a file", "a file below"):
        (out / str(name)).parent.mkdir(exist_ok=True)
        (out / str(name)).write_text("precious")
    elif change == "a folder":
        (out / "sub").mkdir()
    elif change == "a link":
        (out / "link").symlink_to("config.json")
    elif change == "other weights":  # of the same size: trained further
        weights = bytearray((out / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (out / "model.safetensors").write_bytes(weights)
    else:
        (out / "liar_opt.json").write_text("{") if change == "a broken note" else (out / "liar_opt.json").unlink()
    before = files(out)
    with pytest.raises(liar_opt.OptionError, match="which liar-opt did not write, or not so, and which would be lost"):
        small.save(out, force=True)
    assert files(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, other = stored("bert", tmp_path / "model"), stored("bert", tmp_path / "other")
    before = files(tmp_path)
    assert main([str(model), "-o", str(other), "--force"]) == 2
    assert "which liar-opt did not write" in capsys.readouterr().err
    for output in (tmp_path, other / "config.json"):
        assert main([str(model), "-o", str(output), "--force"]) == 2
    (tmp_path / "link").symlink_to(other)
    assert main([str(model), "-o", str(tmp_path / "link"), "--force"]) == 2
    assert "is a symbolic link" in capsys.readouterr().err
    calibration = data("bert", tmp_path / "data.npz")
    for option in ("--report", "--html"):
        for place in (model / "config.json", model / "model.safetensors", calibration):
            arguments = [str(model), "--calibration", str(calibration), "--force", option, str(place)]
            assert main([*arguments, "-o", str(tmp_path / "out")]) == 2
            assert "reads or writes as well" in capsys.readouterr().err
    assert {k: v for k, v in files(tmp_path).items() if k != "data.npz" and not k.startswith("link")} == before


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_out_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is copied beside the weights comes from the folder or from the blobs of the hub's cache."""
    cache = tmp_path / "models--owner--name"
    model = stored("bert", cache / "snapshots" / "rev")
    (cache / "blobs").mkdir()
    (cache / "blobs" / "abc").write_text("of the hub")
    (model / "vocab.txt").symlink_to("../../blobs/abc")
    options = ["--ffn", "0.5", "--no-latency", "--quiet", "--samples", "8"]
    assert main([str(model), "-o", str(tmp_path / "out"), *options]) == 0
    assert (tmp_path / "out" / "vocab.txt").read_text() == "of the hub" and not (
        tmp_path / "out" / "vocab.txt"
    ).is_symlink()
    (tmp_path / "secret.txt").write_text("secret")
    (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
    capsys.readouterr()
    assert main([str(model), "-o", str(tmp_path / "again"), *options]) == 2
    assert "notes.txt' is a link that leads out of the checkpoint's folder" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


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


# -- what a configuration's class takes ------------------------------------------------------------------------------

LLAMA = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    **zoo_fx.SPECIAL,
}
GEMMA3 = {**LLAMA, "hidden_size": 80, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 24}
SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 24, "depths": [1, 1], "num_heads": [3, 6], "window_size": 4}
SEGFORMER = {
    **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 24], "patch_sizes": [7, 3]},
    **{"strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [4, 3], "image_size": 32},
}
DINO = {"image_size": 28, "patch_size": 14, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
MAMBA = {"vocab_size": 97, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 1, "time_step_rank": 16}

# Class, configuration, ratios, and what the configuration says in the end.
SAID: dict[str, tuple[str, dict[str, Any], dict[str, float], set[str]]] = {
    "llama-heads": (
        "LlamaForCausalLM",
        LLAMA,
        {"heads": 0.25},
        {"num_attention_heads 8 -> 4", "num_key_value_heads 4 -> 2"},
    ),
    "gemma3-270m": ("Gemma3ForCausalLM", GEMMA3, {"sparsity": 0.2}, {"intermediate_size 72 -> 48"}),
    "eight-of-eight": (
        "LlamaForCausalLM",
        {**LLAMA, "num_key_value_heads": 8, "head_dim": 8},
        {"heads": 0.5},
        {"num_attention_heads 8 -> 4", "num_key_value_heads 8 -> 4"},
    ),
    "t5-eight-of-eight": (
        "T5EncoderModel",
        {"vocab_size": 97, "d_model": 40, "d_kv": 8, "num_heads": 8, "d_ff": 72, "num_layers": 1},
        {"heads": 0.25},
        {"num_heads 8 -> 6"},
    ),
    "swin": ("SwinModel", SWIN, {"ffn": 0.25}, {"mlp_ratio 4.0 -> 3.0"}),
    "segformer": ("SegformerModel", SEGFORMER, {"ffn": 0.3}, {"mlp_ratios[0] 4 -> 3", "mlp_ratios[1] 3 -> 2"}),
    "dinov2": ("Dinov2Model", DINO, {"ffn": 0.3}, {"mlp_ratio 4 -> 3"}),
    "mamba": ("MambaForCausalLM", MAMBA, {"ffn": 0.3}, {"intermediate_size 96 -> 64", "time_step_rank 16 -> 8"}),
}


def made(model: str, config: dict[str, Any]) -> Any:
    model_class = getattr(transformers, model)
    torch.manual_seed(0)
    module = model_class(model_class.config_class(**config)).eval()
    for p in module.parameters():
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    return module


def drawn(module: Any, batch: int, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    example = example_inputs(module)
    assert example is not None
    if "pixel_values" in example:
        return {"pixel_values": torch.randn(batch, *example["pixel_values"].shape[1:], generator=generator).numpy()}
    return {"input_ids": torch.randint(3, 97, (batch, 11), generator=generator).numpy()}


@pytest.mark.parametrize("name", sorted(SAID))
def test_widths_that_the_class_of_a_configuration_takes(name: str, tmp_path: Path) -> None:
    model, config, ratios, fields = SAID[name]
    module = made(model, config)
    result = prune_module(module, [drawn(module, 4, s) for s in range(3)], latency=False, **ratios)
    said = {str(f) for f in result.fields or ()}
    assert said == fields or (name == "gemma3-270m" and said == {"num_attention_heads 4 -> 2"})  # either loses as little
    loaded, info = type(module).from_pretrained(result.save(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    assert loaded.num_parameters() < module.num_parameters()
    arrays = drawn(module, 2, 9)
    for a, b in zip(run(loaded.eval(), arrays), run(result.module, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_heads_that_no_number_can_say_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five heads of a stream of 65 that no number between one and five divides."""
    config = {**LLAMA, "hidden_size": 65, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 12}
    made("LlamaForCausalLM", config).save_pretrained(tmp_path / "model")

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("liar_opt.passes.calibrate.load_calibration", work)
    assert main([str(tmp_path / "model"), "--heads", "0.2", "-o", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "nothing would go: of 5 heads the configuration of LlamaForCausalLM can say 1, no other" in told
    assert "--format onnx" in told and told.count("\n") == 1


def test_inspect_counts_what_will_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("Dinov2Model", DINO).save_pretrained(tmp_path / "dino")
    made("SwinModel", SWIN).save_pretrained(tmp_path / "swin")
    zoo_fx.build("bert").save_pretrained(tmp_path / "bert")
    for name in ("dino", "swin", "bert"):
        assert main(["inspect", str(tmp_path / name), "--report", str(tmp_path / f"{name}.json"), "--explain"]) == 0
        found = json.loads((tmp_path / f"{name}.json").read_text())
        arguments = [str(tmp_path / name), "--dry-run", "--report", str(tmp_path / "dry.json"), "-o", str(tmp_path / "out")]
        assert main([*arguments, "--force"]) == 0
        dry = json.loads((tmp_path / "dry.json").read_text())
        assert [g["name"] for g in found["groups"]] == [g["name"] for g in dry["groups"]]
        assert found["refusals"] == dry["refusals"]
        assert found["prunable_parameters"] == dry["prunable"]["before"]
    told = capsys.readouterr()
    assert "of 96 channels the configuration of Dinov2Model can say 24, 48, 72" in told.err
    assert "cannot say another number of heads" in " ".join(told.out.split())


# -- goals, and a width for each layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"target": "params=0.85x"}, {"target": "size=0.85x"}, {"max_drop": "10%"}], ids=str)
def test_a_checkpoint_meets_a_goal(options: dict[str, str], tmp_path: Path) -> None:
    """As near as the steps of one width for all layers allow; what was reached is said."""
    folder, calibration = stored("llama", tmp_path / "model"), data("llama", tmp_path / "data.npz")
    result = prune_module(folder, calibration, multiple_of=4, latency=False, batch_size=4, **options)
    model_class: Any = transformers.LlamaForCausalLM
    loaded, info = model_class.from_pretrained(result.save(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    arrays = zoo_fx.feeds("llama", seed=9)
    for a, b in zip(run(loaded.eval(), arrays), run(result.module, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    report, target = result.report, result.report["target"]
    assert report["verification"]["exact_difference"] < 1e-4
    assert len({g["after"] for g in report["groups"] if g["kind"] == "ffn"}) == 1
    assert loaded.num_parameters() < zoo_fx.build("llama").num_parameters()
    said = target_met(report)
    if "max_drop" in options:
        assert 0.0 < target["found"] <= 0.1 and f"{100 * target['found']:.2f} % lost with" in said
        assert target["sparsity"] == pytest.approx(1.0 - report["prunable"]["after"] / report["prunable"]["before"])
        return
    step = 4 * 3 * 60 * 2  # four channels of three matrices, in both layers
    bytes_each = 4 if "size" in options["target"] else 1
    assert abs(target["found"] - target["wanted"]) <= step * bytes_each
    assert abs(loaded.num_parameters() * bytes_each - target["found"]) <= 0.02 * target["found"]
    assert said.startswith(f"target {options['target']}: ") and ", asked " in said


GEMMA3N = {
    **{"vocab_size": 97, "vocab_size_per_layer_input": 97, "hidden_size": 48, "hidden_size_per_layer_input": 8},
    **{"intermediate_size": [72, 72, 72], "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 12, "max_position_embeddings": 64, "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2},
    **{"activation_sparsity_pattern": [0.0, 0.0, 0.0], **zoo_fx.SPECIAL},
}
PVT = {
    **{"image_size": 32, "num_encoder_blocks": 3, "depths": [1, 2, 1], "sequence_reduction_ratios": [2, 1, 1]},
    **{"hidden_sizes": [16, 24, 24], "patch_sizes": [4, 2, 1], "strides": [4, 2, 1], "num_attention_heads": [1, 2, 2]},
    **{"mlp_ratios": [4, 4, 4]},
}
LAGUNA = {
    **{"vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6},
    **{"num_key_value_heads": 1, "head_dim": 12, "num_attention_heads_per_layer": [6, 6]},
    **{"mlp_layer_types": ["dense"] * 2, "layer_types": ["full_attention"] * 2, **zoo_fx.SPECIAL},
}
# Class, configuration, a part of the names of weights that are made small, the field, and the kind of its groups.
ENTRIES: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "gemma3n": ("Gemma3nForCausalLM", GEMMA3N, "layers.1.mlp.down_proj", "intermediate_size", "ffn"),
    "pvt": ("PvtModel", PVT, "block.2.0.mlp.dense2", "mlp_ratios", "ffn"),
    "laguna": ("LagunaForCausalLM", LAGUNA, "layers.1.self_attn.o_proj", "num_attention_heads_per_layer", "heads"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.rest if n == "gemma3n" else ()) for n in sorted(ENTRIES)]
)
def test_a_list_in_the_configuration_says_a_width_for_each_entry(name: str, tmp_path: Path) -> None:
    model, config, small, field, kind = ENTRIES[name]
    module = made(model, config)
    weights = [p for n, p in module.named_parameters() if small in n and p.ndim > 1]
    assert weights
    for p in weights:
        p.data *= 0.02
    options: dict[str, Any] = {"multiple_of": 4, "latency": False, kind: 0.4, "allocate": "curves"}
    result = prune_module(module, [drawn(module, 4, s) for s in range(3)], **options)
    groups = [g for g in result.report["groups"] if g["kind"] == kind]
    assert len({g["after"] / g["before"] for g in groups}) > 1
    assert result.report["verification"]["exact_difference"] < 1e-4
    loaded, info = type(module).from_pretrained(result.save(tmp_path / "out"), output_loading_info=True)
    assert not any(info.values())
    was, now = getattr(module.config, field), getattr(loaded.config, field)
    assert len({a / b for a, b in zip(now, was, strict=True)}) > 1
    arrays = drawn(module, 2, 9)
    for a, b in zip(run(loaded.eval(), arrays), run(result.module, arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# -- what is no plain checkpoint --------------------------------------------------------------------------------------

QUANTISED: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
}


@pytest.mark.parametrize("method", sorted(QUANTISED))
def test_quantised_checkpoints_are_named(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stored("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTISED[method]}))
    for arguments in (["inspect", str(model)], [str(model), "-o", str(tmp_path / "out")]):
        assert main(arguments) == 2
        told = capsys.readouterr()
        assert f"is quantised ({method}); prune the float checkpoint and quantise the result" in told.err
        assert told.err.count("\n") == 1 and not told.out
    assert not (tmp_path / "out").exists()


def test_float8_weights_are_quantised_without_a_configuration_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    model = stored("llama", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in weights.items()}, model / "model.safetensors")
    assert main(["inspect", str(model)]) == 2
    assert "is quantised (weights of type F8_E4M3)" in capsys.readouterr().err


@pytest.mark.parametrize("beside", [True, False])
def test_adapters_are_named(beside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stored("llama", tmp_path / "model")
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "owner/base"}))
    if not beside:
        (model / "config.json").unlink()
    assert main(["inspect", str(model)]) == 2
    told = capsys.readouterr().err
    assert "holds an adapter (adapter_config.json)" in told and "'owner/base'" in told and "merge_and_unload" in told
    assert told.count("\n") == 1


def test_code_of_a_checkpoint_is_named_and_never_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: Any) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", ask)
    model = stored("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "modeling_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyModel"}}
    # A class of transformers needs no code of the folder's, whatever else is named.
    (model / "config.json").write_text(json.dumps({**config, **own}))
    assert main(["inspect", str(model), "--quiet"]) == 0
    capsys.readouterr()
    (model / "config.json").write_text(json.dumps({**config, **own, "model_type": "my", "architectures": ["MyModel"]}))
    assert main(["inspect", str(model)]) == 2
    told = capsys.readouterr()
    assert "needs code of its own (auto_map in config.json), which liar-opt does not run" in told.err
    assert told.err.count("\n") == 1 and not told.out


def test_a_configuration_that_is_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = stored("bert", tmp_path / "model")
    for text in ("{", "[]", "[" * 100_000):
        (model / "config.json").write_text(text)
        assert main(["inspect", str(model)]) == 2
        assert "config.json' " in (told := capsys.readouterr().err) and told.count("\n") == 1


@pytest.mark.parametrize("more", [["--quiet"], []])
def test_weights_that_are_missing_are_told_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from liar_opt.passes import module_backend

    model = stored("llama", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(["inspect", str(model), *more]) == 0
    told = capsys.readouterr().err
    assert told.startswith("liar-opt: warning: weights that LlamaForCausalLM has are not in")
    assert told.count("at random") == 1

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module_backend.TorchBackend, "choose", stop)
    assert main([str(model), "-o", str(tmp_path / "out"), *more]) == 130
    assert "liar-opt: warning: weights that LlamaForCausalLM has are not in" in capsys.readouterr().err


def test_weights_that_are_missing_or_left_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers draws what is missing, and drops what it has no place for, and we have it say nothing."""
    from safetensors.torch import load_file, save_file

    model = stored("llama", tmp_path / "model")
    weights, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    up = "model.layers.1.mlp.up_proj.weight"
    rest = {name: value for name, value in weights.items() if name != up}
    save_file({**rest, "other": torch.ones(3)}, model / "model.safetensors", {"format": "pt"})
    with pytest.warns(LiarOptWarning, match="drawn them at random"):
        _, notes = load_module(model, allow_pickle=False)
    assert [n for n in notes if f"drawn them at random: '{up}'" in n and "that LlamaForCausalLM has" in n]
    assert [n for n in notes if "will not be in the result: 'other'" in n]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert not any("weights" in n for n in liar_opt.inspect(model).report["model"]["notes"])
    broken: tuple[Any, ...] = (5, {})
    for named in broken:
        (model / "config.json").write_text(json.dumps({**config, "architectures": named}))
        assert type(load_module(model, allow_pickle=False)[0]).__name__ == "LlamaModel"
    (model / "config.json").write_text(json.dumps({**config, "architectures": None}))
    _, notes = load_module(model, allow_pickle=False)  # the body alone
    assert [n for n in notes if "are not of LlamaModel, and will not be in the result: 'lm_head" in n]
    capsys.readouterr()
    save_file({"other": torch.ones(3)}, model / "model.safetensors", {"format": "pt"})
    assert main(["inspect", str(model)]) == 2
    told = capsys.readouterr().err
    assert "holds 0 % of the weights of LlamaModel" in told and told.count("\n") == 1


def test_eight_samples_are_timed() -> None:
    module = zoo_fx.build("llama")
    result = prune_module(module, [zoo_fx.feeds("llama", batch=12)] * 2, ffn=0.5)
    assert result.report["latency"]["batch"].startswith("input_ids [8, ")


@pytest.mark.parametrize(("family", "rows", "expected"), [("Bert", 16, 16), ("Roberta", 18, 16)])
def test_made_up_inputs_are_no_longer_than_the_positions(family: str, rows: int, expected: int, tmp_path: Path) -> None:
    """RoBERTa's positions begin behind the row for padding."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=rows)
    module = getattr(transformers, f"{family}Model")(config).eval()
    assert positions(module) == expected
    result = prune_module(module, samples=8, ffn=0.5, latency=False)
    assert result.report["calibration"]["tokens"] == 8 * expected
