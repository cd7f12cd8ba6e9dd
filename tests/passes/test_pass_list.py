"""Passes written as text, and what a run makes of them."""

from dataclasses import replace
from typing import Any

import graphs
import numpy as np
import pytest

import liar_opt
from liar_opt.passes.allocate_widths import AllocateWidthsPass
from liar_opt.passes.chosen_passes import PASSES, passes_of_text
from liar_opt.passes.options import PruneOptions
from liar_opt.passes.pass_list import parse_passes
from liar_opt.passes.prune_groups import PruneGroupsPass
from liar_opt.passes.verify_model import VerifyModelPass
from liar_opt.runtime.errors import OptionError

OPTIONS = PruneOptions(seed=3)


def test_names_options_and_values_are_read() -> None:
    text = " allocate-widths{ffn=0.5, multiple-of = 4,uniform=true} ,prune-groups{ridge=none,repair=bias},verify-model"
    assert parse_passes(text, PASSES) == (
        AllocateWidthsPass(ffn=0.5, multiple_of=4, uniform=True),
        PruneGroupsPass(repair="bias"),
        VerifyModelPass(),
    )
    assert parse_passes("allocate-widths{query-key=auto}", PASSES)[0] == AllocateWidthsPass(query_key="auto")
    assert parse_passes("prune-groups{}", PASSES, {"seed": 7})[0] == PruneGroupsPass(seed=7)
    assert parse_passes("prune-groups{seed=5}", PASSES, {"seed": 7})[0] == PruneGroupsPass(seed=5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no list of passes"),
        ("prune-groups{repair=bias", "no list of passes"),
        ("prune-groups,", "no list of passes"),
        ("fold", "no pass 'fold'; choose among normalise-graph"),
        ("prune-groups,allocate-widths", "cannot run behind 'prune-groups'"),
        ("prune-groups,prune-groups", "each runs once"),
        ("prune-groups{keep=1}", "its options are score, repair"),
        ("prune-groups{repair}", "no option"),
        ("prune-groups{ridge=1,ridge=2}", "given twice"),
        ("find-groups{x=1}", "it has none"),
        ("limit-drop{metric=f}", "no option"),
        ("allocate-widths{ffn=half}", "'half'; give none or float"),
        ("allocate-widths{multiple_of=1.5}", "give int"),
        ("prune-groups{new_bias=0}", "give bool"),
    ],
)
def test_what_is_not_understood_is_said(text: str, said: str) -> None:
    with pytest.raises(OptionError, match=said.replace("(", r"\(")):
        parse_passes(text, PASSES)


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("prune-groups", {}, "0 of them decide the widths"),
        ("allocate-widths,meet-target,prune-groups", {}, "2 of them"),
        ("allocate-widths{ffn=0.5}", {}, "nothing would be cut"),
        ("limit-drop,search-widths", {}, "search-widths"),
        ("allocate-widths{ffn=0.5},prune-groups", {"repair": "bias"}, "'repair' is given beside"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(text: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        passes_of_text(text, replace(OPTIONS, **options))


def test_curves_are_measured_where_they_are_needed() -> None:
    uniform = passes_of_text("allocate-widths{ffn=0.5},prune-groups", OPTIONS)
    assert [s.name for s in (*uniform.deciding, *uniform.cutting, *uniform.checking)] == [
        "allocate-widths",
        "prune-groups",
        "verify-model",
    ]
    limited = passes_of_text("limit-drop{max-drop=2%},prune-groups{repair=bias}", OPTIONS)
    assert [s.name for s in (*limited.deciding, *limited.cutting, *limited.checking)] == [
        "measure-curves",
        "limit-drop",
        "verify-model",
    ]
    assert limited.cut.repair == "bias" and limited.cut.seed == 3


def test_passes_do_what_the_options_do() -> None:
    text = "agraph (float[N, 6] x) => (float[N, 5] y) { h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }"
    model = graphs.parse(text, {"w1": (6, 16), "w2": (16, 5)})
    data = {"x": np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)}
    by_options = liar_opt.prune(model, data, ffn=0.5, multiple_of=1, repair="bias", latency=False)
    passes = "allocate-widths{ffn=0.5,multiple-of=1},prune-groups{repair=bias},verify-model{batches=1}"
    by_text = liar_opt.prune(model, data, passes=passes, latency=False)
    assert by_text.model.SerializeToString() == by_options.model.SerializeToString()
    assert by_text.report["options"]["prune-groups"]["repair"] == "bias"
