"""Leave blocks out of a torch module: entries of a list of modules go, or nodes of its traced graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from liar_opt.frontend.blocks import Run, Stack, inside
from liar_opt.frontend.fx_module import FxModel
from liar_opt.frontend.fx_rewrite import changed_parameters, cut_graph_module
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.module_blocks import BlockList, block_list, fewer_blocks, without_entries
from liar_opt.frontend.module_formula import blocks_differ, computes_the_rest
from liar_opt.passes.base import DenseModel, State
from liar_opt.passes.choose_blocks import ChosenRun, LeftOut
from liar_opt.passes.fit_module import CutModule
from liar_opt.passes.open_module import module_of, opened_again, traced_model
from liar_opt.passes.replace_blocks import ReplacedBlocks
from liar_opt.runtime.errors import InternalError, ModelError

if TYPE_CHECKING:
    import torch

MAPPED = "a linear map stands where blocks were"
ELSEWHERE = "write ONNX with --format onnx (in Python: checkpoint=False, block_repair='map')"
LAST = "none but the last can go"


def listed_runs(state: State, runs: Sequence[Run], checkpoint: bool) -> list[Run]:
    """Returns the runs that are entries of a list of modules; of a checkpoint those that its configuration can say.

    Raises:
        ModelError: there are none.
    """
    module, walk = module_of(state), state.analysed()
    lists = {id(stack): block_list(walk, stack) for stack in {id(r.stack): r.stack for r in runs}.values()}
    name = type(module).__name__
    if not any(lists.values()):
        raise ModelError(f"the blocks of {name} are no entries of one list of modules that can be left out; {ELSEWHERE}")
    listed = [run for run in runs if (own := lists[id(run.stack)]) is not None and own.may_go(run)]
    if not listed:
        path = next(own.path for own in lists.values() if own is not None)
        raise ModelError(f"of each run of blocks of {name} ('{path}') other parts of it read something; {ELSEWHERE}")
    if not checkpoint:
        return listed
    said: dict[tuple[int, int], bool] = {}
    for run in listed:
        own = lists[id(run.stack)]
        assert own is not None
        said[id(run.stack), run.first] = fewer_blocks(module, own, own.dropped(run)) is not None
    found = [run for run in listed if said[id(run.stack), run.first]]
    if not found:
        config = getattr(module, "config", None)
        raise ModelError(
            f"the configuration of {name} ({getattr(config, 'model_type', 'none')}) cannot say fewer blocks; write ONNX "
            "with --format onnx (in Python: checkpoint=False)"
        )
    left = [run for stack in {id(r.stack): r.stack for r in found}.values() for run in _that_stay_so(state, found, stack)]
    if not left:
        raise ModelError(f"what a block of {name} computes depends on its number, and {LAST} here; {ELSEWHERE}")
    return left


def _that_stay_so(state: State, runs: Sequence[Run], stack: Stack) -> list[Run]:
    """Returns the runs of a stack without which a checkpoint computes with the other blocks what it did.

    Where blocks do not all compute the same, what one computes may depend on its number (GPT-2 can divide the scores of
    attention by it). One run is tried; where others then do something else, only the last blocks can go.
    """
    own, mine = block_list(state.analysed(), stack), [run for run in runs if run.stack is stack]
    assert own is not None
    whole = state.found(DenseModel).original.model()
    assert isinstance(whole, FxModel)
    last = [run for run in mine if own.dropped(run).stop == own.entries]
    tried = next((run for run in mine if run not in last), None)
    if tried is None or not blocks_differ(whole, stack, own):
        return mine
    module, dropped = module_of(state), own.dropped(tried)
    made = without_entries(module, own, dropped, {}, {}, fewer_blocks(module, own, dropped))
    if computes_the_rest(traced_model(opened_again(state, made)), whole, own, tried):
        return mine
    if last:
        name = type(module).__name__
        state.model.notes.append(f"what a block of {name} computes depends on its number: of '{own.path}' {LAST}")
    return last


def leave_out_of_module(
    state: State, chosen: ChosenRun, repair: str, checkpoint: bool
) -> tuple[State, LeftOut, dict[str, str]]:
    """Returns the state of a module without a run of blocks, what the report says, and the names of its outputs before.

    Raises:
        ModelError: what is left cannot be traced, or something in the run is needed behind it.
        CheckError: the result is not the original in which the map stands.
    """
    trial = ReplacedBlocks(state, chosen, repair)
    module, traced, own = module_of(state), None, None
    if repair == "map":
        model = traced_model(state)
        trial.cut()
        made: torch.nn.Module = cut_graph_module(model).to(model.device)
        traced = MAPPED
    else:
        own = block_list(state.analysed(), chosen.gap.run.stack)
        assert own is not None
        made = _shortened(state, trial, own, chosen, module, checkpoint)
    left = opened_again(state, made)
    before, after = state.found(DenseModel).original.model(), traced_model(left)
    assert isinstance(before, FxModel)
    if len(before.results) != len(after.results):
        raise InternalError(f"{len(before.results)} outputs became {len(after.results)}")
    names = dict(zip(after.results, before.results, strict=True))
    if own is not None and checkpoint and not computes_the_rest(after, before, own, chosen.gap.run):
        raise ModelError(
            f"what blocks of {type(module).__name__} compute depends on their number, and its configuration does not say "
            f"what they do now without {chosen.gap.run.length} of them; {ELSEWHERE}"
        )
    difference = trial.checked(after, (), names)
    left.add(CutModule(made, traced))
    return left, trial.entry([], difference), names


def _shortened(
    state: State, trial: ReplacedBlocks, own: BlockList, chosen: ChosenRun, module: torch.nn.Module, checkpoint: bool
) -> torch.nn.Module:
    """Returns a module without the entries of a run, the change of the last product before it written in."""
    run, dropped = chosen.gap.run, own.dropped(chosen.gap.run)
    adopted: dict[str, str] = {}
    if chosen.gap.target != run.behind:  # the normalisation behind the gap takes the place of that before it
        walk = state.analysed()
        makers = {t.name: n for n in walk.model.graph.nodes for t in n.outputs}
        last = [*inside(walk, chosen.gap.target, run.behind), makers[run.behind]]
        names = {t.name for n in last for t in n.inputs if is_constant(t)}
        adopted = {own.moved(name, dropped.start - 1): name for name in names if own.entry(name) == dropped[-1]}
    trial.fold()
    values = changed_parameters(traced_model(state))
    fields = fewer_blocks(module, own, dropped) if checkpoint else None
    return without_entries(module, own, dropped, values, adopted, fields)
