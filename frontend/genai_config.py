"""The configuration that ONNX Runtime GenAI reads beside a decoder: the cut model gets one with the heads that it has."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liar_opt.runtime.token_fields import ID, renumbered
from liar_opt.runtime.whole_file import write_whole

NAME = "genai_config.json"


def write_config(
    source: Path, target: Path, groups: Sequence[Mapping[str, Any]], words: Mapping[int, int] | None = None
) -> str | None:
    """Writes the configuration beside a cut model, if there is one beside the original.

    Args:
        source: the original model.
        target: the cut model.
        groups: those of the report.
        words: new token ids by old ones, where ids are others now.

    Returns:
        What has to be done by hand; None where nothing has.
    """
    beside = source.parent / NAME
    heads = [g for g in groups if g["kind"] == "heads"]
    if not beside.is_file():
        return None
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        decoder = config["model"]["decoder"]
        layers = int(decoder["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"'{beside}' is no configuration of a decoder; nothing was written for GenAI"
    if words is not None:
        named = {k: renumbered(k, v, words) for k, v in config["model"].items() if ID.search(k)}
        config["model"] |= {**named, "vocab_size": len(words)}
    shared = {g["after"] for g in heads}
    if any(g["after"] < g["before"] for g in heads):
        if len(shared) > 1 or len(heads) != layers:
            return (
                f"{NAME} says one number of heads for all {layers} layers, and here they differ; it was not written, give "
                "--heads (heads=), which cuts all layers alike"
            )
        kept = shared.pop()
        decoder["num_key_value_heads"] = kept
        decoder["num_attention_heads"] = kept * int(heads[0]["queries_per_block"])
    if target.parent.resolve() == source.parent.resolve():
        return f"'{beside}' belongs to the original and stays; write the cut model into a folder of its own for GenAI"
    decoder["filename"] = target.name
    place = target.parent / NAME
    if place.exists():
        return f"'{place}' exists and stays as it is; remove it to have it written with the heads of the cut model"
    write_whole(place, json.dumps(config, indent=4))
    return None
