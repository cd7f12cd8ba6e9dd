"""The table of operator rules that :mod:`liar_opt.frontend.walk` walks a graph with, and how rules get into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

if TYPE_CHECKING:
    from liar_opt.frontend.axes import Factor
    from liar_opt.frontend.walk import GraphWalk

Axes = tuple["Factor", ...]
Rule = Callable[["GraphWalk", gs.Node], None]
RULES: dict[tuple[str, str], Rule] = {}
MICROSOFT = "com.microsoft"
SKIPS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
"""Operators of that domain that add their first two inputs, and where the bias is that they add as well."""


def rule(*ops: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Registers a rule for operators of ``domain``."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[domain, op] = function
        return function

    return register
