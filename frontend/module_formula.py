"""What a traced module computes, as a digest: two graphs with one digest do the same with weights of the same names."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping

from liar_opt.frontend.blocks import Run, Stack
from liar_opt.frontend.fx_module import FxModel
from liar_opt.frontend.graph_tensors import is_constant, present
from liar_opt.frontend.module_blocks import BlockList
from liar_opt.frontend.weight_files import as_bytes


def blocks_differ(model: FxModel, stack: Stack, blocks: BlockList) -> bool:
    """Returns whether blocks of a stack do not all compute the same of the stream, their weights aside."""
    found = set()
    for entry, (before, behind) in enumerate(itertools.pairwise(stack.streams), blocks.first):

        def named(name: str, entry: int = entry) -> str:
            return blocks.moved(name, -1) if blocks.entry(name) == entry else name

        found.add(_digests(model, named, fixed={before: b"stream"})[behind])
    return len(found) > 1


def computes_the_rest(shorter: FxModel, whole: FxModel, blocks: BlockList, run: Run) -> bool:
    """Returns whether a module without a run computes what the whole one does where the run hands the stream on."""
    dropped = blocks.dropped(run)
    expected = _digests(whole, lambda name: blocks.renamed(name, dropped) or f"gone {name}", same={run.behind: run.before})
    made = _digests(shorter, lambda name: name)
    return [made.get(name) for name in shorter.results] == [expected.get(name) for name in whole.results]


def _digests(
    model: FxModel,
    named: Callable[[str], str],
    fixed: Mapping[str, bytes] | None = None,
    same: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """Returns a digest of how each tensor is computed; of weights their names count, of other constants what they are.

    Args:
        model: as it was traced.
        named: what a weight is to be called.
        fixed: digests of some tensors, whatever they are computed of.
        same: tensors that stand for others, which come behind them.
    """
    assert model.module is not None
    weights, found = set(model.module.state_dict()), {t.name: t.name.encode() for t in model.graph.inputs}
    for node in model.graph.nodes:
        attributes = sorted((name, repr(value)) for name, value in node.attrs.items())
        call = model.calls.get(node.name)
        asked = "" if call is None else repr([(name, kind) for name, kind, _ in call.arguments])
        own = hashlib.sha256(f"{node.domain} {node.op} {attributes} {asked}".encode())
        for tensor in node.inputs:
            if present(tensor) and tensor.name not in found and is_constant(tensor):
                known = tensor.name in weights
                word = named(tensor.name).encode() if known else as_bytes(tensor.values)
                found[tensor.name] = hashlib.sha256(f"{known} {tensor.dtype} {tensor.shape} ".encode() + word).digest()
            own.update(found[tensor.name] if present(tensor) else b"none")
        for place, tensor in enumerate(node.outputs):
            found[tensor.name] = hashlib.sha256(own.digest() + b"%d" % place).digest()
            if fixed is not None and tensor.name in fixed:
                found[tensor.name] = fixed[tensor.name]
            if same is not None and tensor.name in same:
                found[tensor.name] = found[same[tensor.name]]
    return found
