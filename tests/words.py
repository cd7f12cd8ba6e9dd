"""A tokenizer of some twenty words, written as transformers writes one."""

import json
import re
from pathlib import Path
from typing import Any

WORDS = re.findall(r"\w+", "the cat sat on a mat while rain fell over london and nobody said one more word about it today")
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PAD, UNK, CLS, SEP = 3, 2, 1, 0  # the pad is not 0, so that a forgotten pad id shows


def save_tokenizer(folder: Path, *, left: bool = False, pad: bool = True, limit: int | None = None) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    order = ["[SEP]", "[CLS]", "[UNK]", "[PAD]" if pad else "[OTHER]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(dict.fromkeys(order))}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment, unused-ignore]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment, unused-ignore]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"padding_side": "left" if left else "right"}
    if pad:
        config["pad_token"] = {"content": "[PAD]"}
    if limit:
        config["model_max_length"] = limit
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def plain_tokenizer(folder: Path, *, end: str | None = "[SEP]") -> Path:
    """Adds no special tokens to a text; names an end token."""
    save_tokenizer(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**raw, "post_processor": None}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end} if end else {}))
    return folder
