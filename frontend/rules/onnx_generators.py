"""Rules of ONNX operators that make a tensor from a size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from liar_opt.frontend.rules import meaning

if TYPE_CHECKING:
    from liar_opt.frontend.walk import GraphWalk


def constant_of_shape(w: GraphWalk, node: gs.Node) -> None:
    target = w.value(node, 0)
    if target is None:
        w.give_up(node, "ConstantOfShape of a target that is not known")
        return
    meaning.filled(w, node, target.tolist(), ("input", 0))


def eye_like(w: GraphWalk, node: gs.Node) -> None:
    """The diagonal pairs the indices of one axis with those of the other."""
    axes = w.axes_of(node)
    w.pin(axes, f"paired by EyeLike (node '{node.name}')")
    w.output(node, axes)


def counted(w: GraphWalk, node: gs.Node) -> None:
    w.output(node, (w.fresh(w.unforeseen(), f"Range of numbers that are not known (node '{node.name}')"),))


def drawn_like(w: GraphWalk, node: gs.Node) -> None:
    """Fewer numbers would be others, too."""
    axes = w.axes_of(node)
    w.pin(axes, f"random numbers are drawn for it (node '{node.name}')")
    w.output(node, axes)
