"""Tasks of lm-evaluation-harness: answered as numpy answers them. Skips where the harness is not installed."""

import json
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest
import words

from liar_opt.tools import cli

VOCABULARY, WIDTH = 40, 5
DECODER = f"""
d (int64[b, s] input_ids, int64[b, s] attention_mask) => (float[b, s, {VOCABULARY}] logits) {{
    x = Gather(table, input_ids)
    logits = MatMul(x, head)
}}"""
TASK = """task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""


def test_multiple_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval.evaluator")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = words.plain_tokenizer(tmp_path / "tokenizer")
    protos = [graphs.parse(DECODER, {"table": (VOCABULARY, WIDTH), "head": (WIDTH, VOCABULARY)}, seed=s) for s in (1, 2)]
    models = [tmp_path / f"{index}.onnx" for index in range(2)]
    for proto, path in zip(protos, models, strict=True):
        onnx.save(proto, path)
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {
            "q": " ".join(rng.choice(words.WORDS, rng.integers(2, 7))),
            "choices": [" ".join(rng.choice(words.WORDS, n)) for n in (1, 2, 1)],
            "gold": int(rng.integers(3)),
        }
        for _ in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    argv = ["eval", *map(str, models), "--task", f"lm-eval:{tmp_path / 'mine.yaml'}", "--tokenizer", str(folder)]
    assert cli.main([*argv, "--batch-size", "7", "--report", str(tmp_path / "r.json")]) == 0
    known = {w: i for i, w in enumerate(dict.fromkeys(["[SEP]", "[CLS]", "[UNK]", "[PAD]", *words.WORDS]))}
    wanted = []
    for proto in protos:
        table, head = (onnx.numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer)
        right = []
        for row in rows:
            scores = []
            for choice in row["choices"]:
                context, continuation = ([known[w] for w in text.split()] for text in (row["q"], choice))
                ids = [*context, *continuation]
                logits = table[ids[:-1]] @ head
                likely = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                scores.append(sum(likely[len(context) - 1 + i, word] for i, word in enumerate(continuation)))
            right.append(int(np.argmax(scores)) == row["gold"])
        wanted.append(np.mean(right))
    (metric,) = json.loads((tmp_path / "r.json").read_text())["metrics"].values()
    assert metric["values"] == pytest.approx(wanted)
    assert metric["samples"] == 20
    assert metric["differences"][0]["low"] <= metric["differences"][0]["difference"] <= metric["differences"][0]["high"]
    capsys.readouterr()
    assert cli.main([*argv[:4], "lm-eval:no-such-task", *argv[5:]]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("liar-opt: error: lm-evaluation-harness cannot run 'no-such-task'")


def test_a_model_without_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval.evaluator")
    model = graphs.parse("f (float[b, 3] x) => (float[b, 2] y) { y = MatMul(x, w) }", {"w": (3, 2)})
    onnx.save(model, tmp_path / "m.onnx")
    folder = words.plain_tokenizer(tmp_path / "tokenizer")
    argv = ["eval", str(tmp_path / "m.onnx"), "--task", "lm-eval:hellaswag"]
    assert cli.main([*argv, "--tokenizer", str(folder)]) == 2
    assert "no token id input" in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(argv) == 2
    assert "--tokenizer DIR" in capsys.readouterr().err.splitlines()[-1]
