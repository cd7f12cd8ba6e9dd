"""The vocabulary of torch modules and checkpoints: parameters, configuration and tokenizer go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
import words
import zoo_fx
from modules import prune_module
from oracle import run

from liar_opt.frontend.hf_checkpoint import without_cache
from liar_opt.passes.result import ModuleResult
from liar_opt.runtime.compare import relative_difference
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.text_tokenizer import load_tokenizer
from liar_opt.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
V = zoo_fx.VOCABULARY
TEXTS = ["the cat sat on a mat", "the cat sat", "rain fell"]
TEXT = {**zoo_fx.TEXT, "pad_token_id": words.PAD}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", TEXT),
    "roberta": ("RobertaForMaskedLM", {**TEXT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    "gpt2": ("GPT2LMHeadModel", {**zoo_fx.GPT, "pad_token_id": None}),
    "llama": ("LlamaForCausalLM", {**zoo_fx.GROUPED, "eos_token_id": 9}),
    "encoder": ("BertModel", TEXT),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    model, config = MODELS[name]
    model_class = getattr(transformers, model)
    module = model_class(model_class.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return module


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return words.save_tokenizer(tmp_path / "tokenizer")


def outputs(module: Any, ids: list[int]) -> list[np.ndarray]:
    with torch.no_grad(), without_cache(module):
        result = module(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64))
    return [v.numpy() for v in torch.utils._pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]


def compare(whole: Any, made: Any, result: ModuleResult, tokenizer: Path, small: Path) -> None:
    assert result.words is not None
    kept = result.words.kept
    old, new = load_tokenizer(tokenizer), load_tokenizer(small)
    assert new.size <= len(kept)
    for text in TEXTS:
        ((before, _),), ((after, _),) = old.encode([text], None), new.encode([text], None)
        assert kept[after].tolist() == before
        for ours, theirs in zip(outputs(made, after), outputs(whole, before), strict=True):
            theirs = theirs[..., kept] if theirs.shape[-1] == V else theirs
            assert relative_difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """Stock transformers loads it, ids are those of its own tokenizer, and what is tied stays so."""
    module = build(name)
    result = prune_module(module, vocabulary=TEXTS, tokenizer=tokenizer)
    entry = result.report["vocabulary"]
    assert result.words is not None and entry["kept"] == len(result.words.kept) < 20 and entry["exact_difference"] <= 1e-4
    folder = result.save(tmp_path / "out")
    loaded = type(module).from_pretrained(folder).eval()
    config = json.loads((folder / "config.json").read_text())
    assert loaded.config.vocab_size == config["vocab_size"] == entry["kept"]
    if name == "llama":  # its end is no special token of the tokenizer, and stays
        assert result.words.kept[config["eos_token_id"]] == 9
        assert result.words.kept[json.loads((folder / "generation_config.json").read_text())["eos_token_id"]] == 9
    tied = name in ("bert", "roberta", "gpt2")
    if name != "encoder":
        assert tied == (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.get_input_embeddings().num_embeddings == entry["kept"]
    compare(module, loaded, result, tokenizer, folder)
    assert module.config.vocab_size == V and module.get_input_embeddings().num_embeddings == V  # it is not changed


@pytest.mark.parametrize("name", ["bart", "t5", "whisper", "clip"])
def test_other_architectures(name: str, tokenizer: Path, tmp_path: Path) -> None:
    """Tables shared by an encoder and a decoder, sound and images beside texts; saving loads it and compares."""
    module = zoo_fx.build(name)
    result = prune_module(module, vocabulary=TEXTS, tokenizer=tokenizer)
    entry = result.report["vocabulary"]
    assert entry["kept"] < 20 and entry["bytes_after"] * entry["words"] == entry["bytes_before"] * entry["kept"]
    config = type(module).from_pretrained(result.save(tmp_path / "out")).config
    assert getattr(config, "text_config", config).vocab_size == entry["kept"]


def test_what_is_written_with_the_ids_of_before(tokenizer: Path, tmp_path: Path) -> None:
    """Bad words, languages by name, an image's place in the text: with the ids of now, and what went left out."""
    module = build("gpt2")
    module.config.image_token_index = 40
    module.generation_config = transformers.GenerationConfig(eos_token_id=words.SEP, pad_token_id=words.PAD)
    module.generation_config.bad_words_ids = [[V - 1], [words.PAD], [words.PAD, V - 1]]
    module.generation_config.lang_to_id = {"<|en|>": 41}
    result = prune_module(module, vocabulary=TEXTS, tokenizer=tokenizer)
    assert result.words is not None
    kept = result.words.kept.tolist()
    loaded = type(module).from_pretrained(result.save(tmp_path / "out")).eval()
    assert loaded.config.image_token_index == kept.index(40)
    assert loaded.generation_config.lang_to_id == {"<|en|>": kept.index(41)}
    assert loaded.generation_config.bad_words_ids == [[kept.index(words.PAD)]]
    loaded.generate(input_ids=torch.tensor([[1, 4]]), max_new_tokens=2)
    assert module.generation_config.bad_words_ids[0] == [V - 1]


@pytest.mark.rest
def test_two_vocabularies() -> None:
    """An encoder of fewer words keeps those, and the ids that its own configuration names."""
    few = transformers.BertConfig(**{**zoo_fx.TEXT, "vocab_size": 61, "pad_token_id": 5})
    decoder = transformers.GPT2Config(**{**zoo_fx.GPT, "pad_token_id": 7}, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(few, decoder)
    config.decoder_start_token_id = config.pad_token_id = 7
    torch.manual_seed(0)
    module: Any = transformers.EncoderDecoderModel(config).eval()
    result = prune_module(module, vocabulary=range(20, 90), checkpoint=False)
    made: Any = result.module
    assert result.words is not None
    kept = result.words.kept.tolist()
    assert made.decoder.get_input_embeddings().num_embeddings == made.decoder.lm_head.out_features == len(kept) < V
    assert made.config.decoder.pad_token_id == made.config.decoder_start_token_id == kept.index(7)
    assert made.encoder.get_input_embeddings().num_embeddings == made.config.encoder.vocab_size == 61
    assert made.config.encoder.pad_token_id == made.encoder.get_input_embeddings().padding_idx == 5


def test_a_folder_with_widths(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer is that of the folder; widths and words go together, and one more run finds fewer words."""
    module = build("bert")
    folder, output = tmp_path / "model", tmp_path / "out"
    module.save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "spiece.model").write_bytes(b"what no longer fits")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS * 10))
    more = ["--vocabulary", str(texts), "--calibration", str(texts), "--ffn", "0.5", "-o", str(output)]
    assert main([str(folder), *more, "--no-latency"]) == 0
    told = capsys.readouterr().out
    assert "words" in told and "100.00 % of the 110 tokens" in told
    loaded = transformers.BertForMaskedLM.from_pretrained(output)
    assert loaded.config.vocab_size == 12 and loaded.config.intermediate_size in (40, 48)
    assert load_tokenizer(output).size == 12 and not (output / "spiece.model").exists()
    assert main([str(output), "--vocabulary", str(texts), "--force", "-o", str(tmp_path / "again")]) == 2  # has them all


def test_a_dry_run_with_widths_says_what_would_go() -> None:
    module = build("bert")
    result = prune_module(module, vocabulary=np.arange(40), ffn=0.5, checkpoint=False, dry_run=True)
    assert result.report["model"]["notes"] == ["40 of 101 words would be left, by ids from Python"] and result.words is None
    assert result.module is module and result.graph_module is not None


def test_onnx(tokenizer: Path, tmp_path: Path) -> None:
    """An export keeps the ids that the module had, or has those of the smaller tokenizer beside it."""
    module = build("gpt2")
    given: dict[str, Any] = {"vocabulary": TEXTS, "tokenizer": tokenizer, "checkpoint": False}
    result = prune_module(module, **given)
    path = result.save(tmp_path / "out.onnx")
    ids = load_tokenizer(tokenizer).encode([TEXTS[0]], None)[0][0]
    (theirs,) = outputs(module, ids)
    feeds = {"input_ids": np.asarray([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    (ours,) = run(onnx.load(path), feeds)
    assert result.words is not None and ours.shape[-1] == V
    kept = result.words.kept
    assert relative_difference(ours[..., kept], theirs[..., kept]) <= 1e-5 and np.isneginf(np.delete(ours, kept, 2)).all()
    small = prune_module(module, **given, small_tokenizer=True)
    path = small.save(tmp_path / "small.onnx")
    ids = load_tokenizer(tmp_path / "small.tokenizer").encode([TEXTS[0]], None)[0][0]
    (ours,) = run(onnx.load(path), {**feeds, "input_ids": np.asarray([ids])})
    assert relative_difference(ours, theirs[..., kept]) <= 1e-5
    small.save(tmp_path / "traced.pt2")
    program: Any = torch.export.load(tmp_path / "traced.pt2").module()
    again = program(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64))
    assert relative_difference(torch.utils._pytree.tree_leaves(again)[0].detach().numpy(), ours) <= 1e-5


def test_ids_alone(tmp_path: Path) -> None:
    """A module can be cut by a list; a checkpoint of it lacks the tokenizer that gives these ids."""
    result = prune_module(build("llama"), vocabulary=range(10, 60))
    module: Any = result.module
    assert result.words is not None and {0, 1, 9, 10, 59} <= set(result.words.kept.tolist())
    assert module.get_input_embeddings().weight.shape[0] == len(result.words.kept)
    with pytest.raises(OptionError, match="needs the tokenizer"):
        result.save(tmp_path / "out")


def test_a_dry_run_of_words_alone_cuts_nothing() -> None:
    module = build("bert")
    planned = prune_module(module, vocabulary=np.arange(40), checkpoint=False, dry_run=True)
    assert planned.report["vocabulary"]["kept"] == 40 and "after" not in planned.report and not planned.changes
    assert planned.module is module
    done = prune_module(module, vocabulary=np.arange(40), checkpoint=False)
    assert done.report["vocabulary"]["parameters_after"] == planned.report["vocabulary"]["parameters_after"]
    assert done.report["latency"]["speedup"] > 0
