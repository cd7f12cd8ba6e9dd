"""GenAI's configuration beside a cut model says the heads that it has, or a sentence says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from liar_opt.frontend.genai_config import NAME, write_config

DECODER = {"filename": "model.onnx", "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3}


def heads(*after: int) -> list[dict[str, Any]]:
    return [{"kind": "heads", "before": 3, "after": n, "queries_per_block": 2} for n in after]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "whole" / NAME).write_text(json.dumps({"model": {"decoder": DECODER, "vocab_size": 9}}))
    return tmp_path / "whole" / "model.onnx"


@pytest.mark.parametrize(("groups", "queries", "keys"), [(heads(2, 2), 4, 2), (heads(3, 3), 6, 3), ([], 6, 3)])
def test_the_heads_that_are_left_are_said(source: Path, groups: list[dict[str, Any]], queries: int, keys: int) -> None:
    target = source.parents[1] / "cut" / "small.onnx"
    assert write_config(source, target, groups) is None
    config = json.loads((target.parent / NAME).read_text())
    changed = {"filename": "small.onnx", "num_attention_heads": queries, "num_key_value_heads": keys}
    assert config == {"model": {"decoder": {**DECODER, **changed}, "vocab_size": 9}}
    assert "exists and stays" in (write_config(source, target, groups) or "")


@pytest.mark.parametrize("groups", [heads(2, 1), heads(2)])
def test_layers_that_differ_are_named(source: Path, groups: list[dict[str, Any]]) -> None:
    target = source.parents[1] / "cut" / "small.onnx"
    assert "one number of heads for all 2 layers" in (write_config(source, target, groups) or "")
    assert not (target.parent / NAME).exists()


def test_the_originals_own_is_never_written(source: Path) -> None:
    before = (source.parent / NAME).read_text()
    assert "stays" in (write_config(source, source.with_name("small.onnx"), heads(2, 2)) or "")
    assert (source.parent / NAME).read_text() == before


def test_no_configuration_and_a_broken_one(tmp_path: Path) -> None:
    assert write_config(tmp_path / "model.onnx", tmp_path / "cut.onnx", heads(2, 2)) is None
    (tmp_path / NAME).write_text("{")
    assert "no configuration of a decoder" in (write_config(tmp_path / "model.onnx", tmp_path / "cut.onnx", []) or "")


def test_ids_that_are_others_now(source: Path) -> None:
    (source.parent / NAME).write_text(
        json.dumps({"model": {"decoder": DECODER, "vocab_size": 9, "eos_token_id": [2, 7], "pad_token_id": 3}})
    )
    target = source.parents[1] / "cut" / "small.onnx"
    assert write_config(source, target, [], {0: 0, 3: 1, 7: 2}) is None
    model = json.loads((target.parent / NAME).read_text())["model"]
    assert (model["vocab_size"], model["eos_token_id"], model["pad_token_id"]) == (3, [2], 1)
