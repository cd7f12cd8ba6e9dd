"""Which fields of configurations hold token ids, and what they say of fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest

from liar_opt.runtime.token_fields import ID, named_ids, new_ids, renumbered, token_ids

NEW = {7: 1, 3: 0, 9: 2}


def test_ids() -> None:
    assert [new_ids(value, NEW) for value in (7, [7, 8], (3, 7), None, -1, 8, [[1, 3]])] == [
        *(1, [1], (0, 1), None, -1, None, [[0]])
    ]
    assert list(token_ids([[1, 3], (4,), None])) == [1, 3, 4]


@pytest.mark.parametrize(
    ("name", "value", "named", "after"),
    [
        ("eos_token_id", [7, 9], [7, 9], [1, 2]),
        ("image_token_index", 9, [9], 2),
        ("pad_index", 3, [3], 0),
        ("lang_to_id", {"<|en|>": 7, "<|de|>": 4}, [7, 4], {"<|en|>": 1}),
        ("forced_decoder_ids", [[3, 7], [9, 8]], [7, 8], [[3, 1]]),  # the first is a place
        ("forced_decoder_ids", [[1, None]], [], [[1, None]]),
        ("bad_words_ids", [[7, 9], [8], [8, 7]], [], [[1, 2]]),  # what is left of [8, 7] is no bad word
        ("bad_words_ids", [[8]], [], None),
        ("sequence_bias", [[[7, 9], -10.0], [[8], 2.0]], [], [[[1, 2], -10.0]]),
        ("sequence_bias", {(7,): -1.5, (7, 8): 1.0}, [], {(1,): -1.5}),
        ("num_tokens", 7, [], 1),
    ],
)
def test_fields(name: str, value: Any, named: list[int], after: Any) -> None:
    assert list(named_ids(name, value)) == named and renumbered(name, value, NEW) == after


def test_names() -> None:
    names = ("eos_token_id", "pad_token_ids", "padding_idx", "suppress_tokens", "eoa_token_index", "task_to_id")
    assert all(map(ID.search, names))
    others = ("num_tokens", "hidden_size", "max_new_tokens", "head_in_index", "loss_ignore_index", "moe_layer_end_index")
    assert not any(map(ID.search, others))
