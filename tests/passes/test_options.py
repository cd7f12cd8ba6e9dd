"""Each option exists once: the signature of ``prune`` and its documentation are held against the dataclass."""

import inspect
from dataclasses import fields

import liar_opt
from liar_opt.passes.options import OPTIONS, PruneOptions, documented

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
