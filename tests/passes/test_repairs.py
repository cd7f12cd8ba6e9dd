"""Repairs by name and by a user's function, on rows that they have not seen."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import pytest
from streams import STREAM, WEIGHTS, error, pruned

from liar_opt.passes.repairs import AWARE, REPAIRS
from liar_opt.runtime.errors import OptionError


def test_each_repair_is_better_than_none() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)
    for score in ("greedy", "activation-weighted"):
        errors = {name: error(proto, pruned(proto, 0.5, score=score, repair=name)[0]) for name in REPAIRS}
        assert errors["liar"] == min(e for name, e in errors.items() if name not in AWARE)
        assert all(errors[name] < errors["bias"] for name in AWARE)
        assert errors["scaling"] < errors["none"] and errors["bias"] < errors["none"]


def test_a_users_function_writes_what_it_returns() -> None:
    proto = graphs.parse(STREAM, WEIGHTS)

    def as_none(consumer: Any, kept: Any, removed: Any) -> Any:
        return consumer.weight[kept], np.zeros(consumer.weight.shape[1])

    own, _, result = pruned(proto, 0.5, repair=as_none)
    assert error(proto, own) == pytest.approx(error(proto, pruned(proto, 0.5, repair="none")[0]), rel=1e-5)
    assert result.changes[0].details["consumers"][0]["repair"] == "as_none"
    details = result.changes[0].details["consumers"][0]
    assert details["error_repair"] == pytest.approx(details["error_none"], rel=1e-4)


def one(consumer: Any, kept: Any, removed: Any) -> Any:
    return consumer.weight[kept]


def whole(consumer: Any, kept: Any, removed: Any) -> Any:
    return consumer.weight, np.zeros(6)


def nan(consumer: Any, kept: Any, removed: Any) -> Any:
    return consumer.weight[kept] * np.nan, np.zeros(6)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (one, "'one' did not return"),
        (whole, r"'whole' returned weights \[17, 6\] and bias \[6\]; return \[8, 6\] and \[6\]"),
        (nan, "NaN"),
    ],
)
def test_a_users_function_that_is_wrong(function: Any, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        pruned(graphs.parse(STREAM, WEIGHTS), 0.5, repair=function)
