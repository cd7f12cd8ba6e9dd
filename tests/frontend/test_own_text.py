"""A module writes its own calibration text through its generate: seeded, of its own distribution, windows filled."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import words
import zoo_fx
from modules import prune_module

from liar_opt.frontend.own_text import GenerateWriter
from liar_opt.runtime.calibration_data import CalibrationData
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.self_calibration import TOP_P, write_calibration
from liar_opt.runtime.signatures import InputSpec
from liar_opt.tools.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = [InputSpec(name, np.dtype("int64"), ("b", "s")) for name in ("input_ids", "attention_mask")]
END = 2


def write(module: Any, **options: Any) -> CalibrationData:
    given: dict[str, Any] = {"samples": 6, "sequence_length": 9, "vocabulary": zoo_fx.VOCABULARY, **options}
    return write_calibration(lambda: module, INPUTS, author=GenerateWriter.of, **given)


def windows(data: CalibrationData) -> np.ndarray:
    return np.concatenate([batch["input_ids"] for batch in data.batches])


def test_the_seed_decides_and_nothing_is_left_behind() -> None:
    module = zoo_fx.build("llama").train()
    settings, state = module.generation_config, torch.get_rng_state()
    told: list[tuple[int, int]] = []
    first = write(module, samples=70, progress=lambda done, total: told.append((done, total)))
    torch.rand(3)
    np.testing.assert_array_equal(windows(first), windows(write(module, samples=70)))
    assert (windows(first)[:6] != windows(write(module, samples=70, seed=1))[:6]).any()
    assert told == sorted(told) and told[-1] == (70 * 9, 70 * 9)
    assert "70 windows of 9 tokens, written by the model itself through its generate with seed 0" in first.source
    assert first.tokens == 630 and first.samples == 70 and not first.synthetic
    torch.set_rng_state(state)
    write(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training and module.generation_config is settings


def test_every_token_is_one_that_the_model_expects() -> None:
    """An end token ends nothing: what stands behind it is no padding but the model's own."""
    module = zoo_fx.build("llama")
    assert module.generation_config.eos_token_id == END
    ids = windows(write(module, samples=60, sequence_length=13))
    with torch.no_grad():
        logits = module(input_ids=torch.from_numpy(ids)).logits[:, :-1].double()
    share = torch.softmax(logits, -1).numpy()
    chosen = np.take_along_axis(share, ids[:, 1:, None], -1)
    assert (np.where(share > chosen, share, 0.0).sum(-1) < TOP_P).all()
    assert len(set(ids[:, 0].tolist())) > 10  # first tokens are drawn over the whole vocabulary
    behind = [row[np.flatnonzero(row == END)[0] + 1 :] for row in ids[:, :-1] if END in row]
    assert behind and any(rest.any() for rest in behind)


def test_the_tokenizer_says_how_texts_begin(tmp_path: Path) -> None:
    begun = words.save_tokenizer(tmp_path / "begun")
    assert set(windows(write(zoo_fx.build("llama"), tokenizer=begun))[:, 0]) == {words.CLS}


def test_a_checkpoint_calibrates_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo_fx.build("llama").save_pretrained(tmp_path / "model")
    options = ["--calibration", "self", "--samples", "12", "--sequence-length", "9", "--multiple-of", "4", "--no-latency"]
    found = []
    for name in ("a", "b"):  # without a tokenizer beside the weights, and with one
        paths = ["-o", str(tmp_path / name), "--report", str(tmp_path / f"{name}.json")]
        assert main([str(tmp_path / "model"), *options, "--sparsity", "0.3", *paths]) == 0, capsys.readouterr().err
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
        words.save_tokenizer(tmp_path / "model")
    for report in found:
        assert report["calibration"]["tokens"] == 12 * 9 and "through its generate" in report["calibration"]["source"]
        assert report["verification"]["exact_difference"] < 1e-4
        assert report["after"]["parameters"] < report["before"]["parameters"]


def test_no_more_tokens_than_positions() -> None:
    with pytest.raises(OptionError, match="'sequence_length' is 65, and the model has positions for 64"):
        prune_module(zoo_fx.build("llama"), "self", sequence_length=65)


def test_what_cannot_write_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(*_: Any, **__: Any) -> None:
        raise AssertionError("was traced")

    with monkeypatch.context() as patch:
        patch.setattr("liar_opt.passes.open_module.trace", traced)
        for module, name in ((zoo_fx.build("bert"), "BertModel"), (torch.nn.Linear(3, 4), "Linear")):
            with pytest.raises(OptionError, match=f"by its own generate, .*, and {name} has none; give --calibration"):
                prune_module(module, "self")
    module = zoo_fx.build("llama")
    with torch.no_grad():
        module.lm_head.weight.fill_(float("nan"))
    settings = module.generation_config
    with pytest.raises(OptionError, match="generate of LlamaForCausalLM fails"):
        write(module)
    assert module.generation_config is settings
