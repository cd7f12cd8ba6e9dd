"""Each option exists once: the signature of ``prune`` and its documentation are held against the dataclass."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import liar_opt
from liar_opt.passes.options import OPTIONS, PruneOptions, documented
from liar_opt.runtime.errors import OptionError

BESIDE = ("model", "calibration")


def test_the_signature_is_that_of_the_options() -> None:
    given = {n: p for n, p in inspect.signature(liar_opt.prune).parameters.items() if n not in BESIDE}
    assert list(given) == [f.name for f in fields(PruneOptions)]
    assert all(p.kind is p.KEYWORD_ONLY for p in given.values())
    assert {n: p.default for n, p in given.items()} == {f.name: f.default for f in fields(PruneOptions)}
    assert {n: p.annotation for n, p in given.items()} == {f.name: f.type for f in fields(PruneOptions)}


def test_every_option_is_documented() -> None:
    texts = documented(liar_opt.prune)
    assert list(texts) == [*BESIDE, *OPTIONS]
    assert {name: texts[name] for name in OPTIONS} == {name: what.help for name, what in OPTIONS.items()}
    assert all(what.help and not what.help.endswith(".") for what in OPTIONS.values())


def test_what_is_given() -> None:
    options = PruneOptions(samples=8, query_key="auto")
    assert [name for name in OPTIONS if options.given(name)] == ["query_key", "samples"]
    assert options.data()["samples"] == 8 and "query_key" not in options.data()


@pytest.mark.parametrize(
    "option, sentence",
    [
        ({"ffn": "0.5"}, "ffn is '0.5', of type 'str'; give a number or None"),
        ({"ffn": True}, "ffn is True, of type 'bool'; give a number or None"),
        ({"samples": 8.5}, "samples is 8.5, of type 'float'; give a whole number"),
        ({"seed": None}, "seed is None, of type 'NoneType'; give a whole number"),
        ({"blocks": "some"}, "blocks is 'some', of type 'str'; give a whole number, 'auto' or None"),
        ({"score": 5}, "score is 5, of type 'int'; give text or a function"),
        ({"uniform": "no"}, "uniform is 'no', of type 'str'; give True or False or None"),
        ({"tokenizer": 5}, "tokenizer is 5, of type 'int'; give text, a path or None"),
        ({"custom_ops": 5}, "custom_ops is 5, of type 'int'; give text, a path, a list or None"),
        ({"progress": None}, "progress is None, of type 'NoneType'; give a function"),
        ({"observer": 5}, "observer is 5, of type 'int'; give a function or None"),
        ({"memory": 1.5}, "memory is 1.5, of type 'float'; give a whole number, text or None"),
    ],
)
def test_options_of_another_type(option: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        PruneOptions(**option)


def test_numbers_of_other_libraries() -> None:
    given: dict[str, Any] = {"ffn": np.float32(0.5), "samples": np.int64(8), "latency": np.bool_(False), "memory": 2e9}
    options = PruneOptions(**given)
    assert (options.ffn, options.samples, options.memory) == (0.5, 8, 2_000_000_000)
    assert isinstance(options.memory, int)
    more: list[dict[str, Any]] = [{"heads": 0}, {"resume": Path()}, {"custom_ops": [Path()]}, {"checkpoint": "deci"}]
    assert all(PruneOptions(**taken) for taken in more)
