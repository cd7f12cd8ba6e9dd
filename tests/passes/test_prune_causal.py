"""A decoder from texts, and from what it writes itself: packed windows, an empty cache, and what the report says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import words
import zoo_decoders

from liar_opt.passes.prune_job import prune
from liar_opt.passes.result import PruneResult
from liar_opt.runtime.errors import OptionError
from liar_opt.runtime.perplexity import negative_log_likelihood
from liar_opt.runtime.sessions import Session
from liar_opt.tools.cli import main

CACHED = zoo_decoders.Case("llama", "torchscript", cache=True)
PLAIN = zoo_decoders.Case("llama", "torchscript")
LEARNED = zoo_decoders.Case("gpt2", "torchscript")
TEXTS = ["the cat sat on a mat while rain fell over london", "nobody said one more word about it today"] * 40


def pruned(calibration: Any, tokenizer: Path | None = None, **options: Any) -> PruneResult:
    path = zoo_decoders.ready(CACHED).path
    given: dict[str, Any] = {"sequence_length": 8, "batch_size": 4, "latency": False, "sparsity": 0.3, "multiple_of": 4}
    return prune(path, calibration, tokenizer=tokenizer, **{**given, **options})


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return words.plain_tokenizer(tmp_path / "tokenizer")


def test_texts_are_packed_where_the_model_is_causal(tokenizer: Path) -> None:
    report = pruned(TEXTS, tokenizer).report
    tokens = sum(len(text.split()) for text in TEXTS) + len(TEXTS) - 1
    assert report["calibration"]["tokens"] == tokens
    assert "of 8 tokens" in report["calibration"]["source"]
    assert report["options"]["calibration"]["packing"] == "auto"
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["verification"]["exact_difference"] < 1e-4


def test_packing_can_be_turned_off(tokenizer: Path) -> None:
    report = pruned(TEXTS, tokenizer, packing="off").report
    assert "at most 8 tokens each" in report["calibration"]["source"]
    with pytest.raises(OptionError, match="packing 'sometimes' is unknown"):
        pruned(TEXTS, tokenizer, packing="sometimes")


def test_calibration_self(tokenizer: Path) -> None:
    report = pruned("self", tokenizer, samples=24).report
    assert report["calibration"]["tokens"] == 24 * 8
    assert (
        "24 windows of 8 tokens, written by the model itself through its cache with seed 0"
        in report["calibration"]["source"]
    )
    assert not report["calibration"]["synthetic"]
    assert report["after"]["parameters"] < report["before"]["parameters"]
    again = pruned("self", tokenizer, samples=24)
    assert again.report["groups"] == report["groups"]


def test_more_tokens_than_positions(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = zoo_decoders.ready(LEARNED).path, tmp_path / "out.onnx"
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    for calibration in (str(text), "self"):
        code = main(
            [
                str(path),
                "-o",
                str(out),
                "--calibration",
                calibration,
                "--tokenizer",
                str(tokenizer),
                "--sequence-length",
                "42",
            ]
        )
        error = capsys.readouterr().err
        assert code == 2 and not out.exists()
        assert "'sequence_length' is 42" in error and f"positions for {zoo_decoders.POSITIONS} tokens" in error


def test_perplexity_is_that_of_the_same_weights_in_torch() -> None:
    import torch

    rng = np.random.default_rng(0)
    ids = rng.integers(3, zoo_decoders.VOCABULARY, (24, 8))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    path = zoo_decoders.ready(PLAIN).path
    result = prune(path, feed, ffn=0.5, heads=0.5, repair="none", multiple_of=4, latency=False)

    model = zoo_decoders._module(PLAIN)[0].model
    groups = {kind: [g for g in result.report["groups"] if g["kind"] == kind] for kind in ("ffn", "heads")}
    for layer, ffn, heads in zip(model.model.layers, groups["ffn"], groups["heads"], strict=True):
        for weight, group in ((layer.mlp.down_proj.weight, ffn), (layer.self_attn.o_proj.weight, heads)):
            assert group["after"] < group["before"]
            lost = np.setdiff1d(np.arange(group["before"]), group["kept"])
            with torch.no_grad():
                weight.view(weight.shape[0], group["before"], -1)[:, lost] = 0.0

    def perplexity(logits: np.ndarray) -> float:
        return float(np.exp(negative_log_likelihood(logits[:, :-1], ids[:, 1:]).mean()))

    def of_torch(given: Any) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(model(**{name: torch.from_numpy(value) for name, value in given.items()}).logits)

    pruned = Session(result.model.SerializeToString())
    dense = Session(path.read_bytes())
    found, before = (perplexity(s.run(feed, ["logits"], arrays=True)["logits"]) for s in (pruned, dense))
    assert found == pytest.approx(perplexity(of_torch(feed)), rel=1e-5)
    assert abs(found / before - 1) > 1e-3
