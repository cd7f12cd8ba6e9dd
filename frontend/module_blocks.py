"""Blocks of a torch module: the entries of a list of modules. Some go, and its configuration says how many stay."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from liar_opt.frontend.blocks import Run, Stack, inside
from liar_opt.frontend.fx_module import FxModel, to_torch
from liar_opt.frontend.fx_rewrite import copy_without, set_tensor
from liar_opt.frontend.graph_tensors import is_constant
from liar_opt.frontend.hf_checkpoint import FieldChange, changed_config, configs_of, is_stock, quiet_loading, says
from liar_opt.frontend.walk import GraphWalk
from liar_opt.runtime.errors import ModelError
from liar_opt.runtime.token_fields import ID

if TYPE_CHECKING:
    import torch

COUNT = re.compile(r"layer|block|depth|n_lay", re.IGNORECASE)
"""What the field of a configuration that says how many blocks there are is called."""
FROM = re.compile(r"layer|block|depth|first|start", re.IGNORECASE)
"""What one that says from which block on they are others is called."""
FIELDS_TOGETHER = 2
"""Fields that may say it together."""


@dataclass(frozen=True)
class BlockList:
    """A list of modules whose entries are the blocks of a stack.

    Attributes:
        path: its qualified name.
        first: the entry that is the first block.
        entries: how many it has.
        lent: entries of which something is read outside their block: they stay.
    """

    path: str
    first: int
    entries: int
    lent: frozenset[int]

    def may_go(self, run: Run) -> bool:
        """Returns whether the blocks of a run may be left out of the list."""
        return self.lent.isdisjoint(self.dropped(run))

    def dropped(self, run: Run) -> range:
        """Returns the entries that go with a run."""
        return range(self.first + run.first, self.first + run.first + run.length)

    def entry(self, name: str) -> int | None:
        """Returns the entry that a parameter is of; None where it is of none."""
        head, _, rest = name.partition(f"{self.path}.")
        number = rest.partition(".")[0]
        return int(number) if not head and rest and number.isdigit() else None

    def renamed(self, name: str, dropped: range) -> str | None:
        """Returns what a parameter is called without some entries; None where it goes."""
        number = self.entry(name)
        if number is None or number < dropped.start:
            return name
        if number in dropped:
            return None
        return self.moved(name, number - len(dropped))

    def moved(self, name: str, entry: int) -> str:
        """Returns the name of the same parameter of another entry."""
        rest = name[len(self.path) + 1 :].partition(".")[2]
        return f"{self.path}.{entry}.{rest}"


def block_list(walk: GraphWalk, stack: Stack) -> BlockList | None:
    """Returns the list of modules whose entries are the blocks of a stack, or None."""
    import torch

    assert isinstance(walk.model, FxModel) and walk.model.module is not None
    module = walk.model.module
    names = {
        n for n, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    }
    makers = {t.name: n for n in walk.model.graph.nodes for t in n.outputs}
    within = [[*inside(walk, *pair), makers[pair[1]]] for pair in itertools.pairwise(stack.streams)]
    read = [_constants(nodes) & names for nodes in within]
    reached = _reached(walk, within)
    for path, part in module.named_modules():
        if not isinstance(part, (torch.nn.ModuleList, torch.nn.Sequential)) or len(part) < stack.blocks:
            continue
        found = BlockList(path, 0, len(part), frozenset())
        numbers = [{found.entry(name) for name in own} for own in read]
        if not all(len(own) == 1 and None not in own for own in numbers):
            continue
        entries = [number for own in numbers for number in own if number is not None]
        if entries == list(range(entries[0], entries[0] + len(entries))):
            used = [(found.entry(name), blocks) for name, blocks in reached]
            lent = {entry for entry, blocks in used if entry is not None and not blocks <= {entry - entries[0]}}
            return BlockList(path, entries[0], len(part), frozenset(lent))
    return None


def _reached(walk: GraphWalk, within: Sequence[Sequence[Any]]) -> list[tuple[str, set[int]]]:
    """Returns the constants that nodes outside of all blocks read, each with the blocks that read what comes of it.

    -1 stands for the outputs of the model. A mask that a block makes of a buffer of its own reaches that block alone.
    """
    place = {id(n): block for block, nodes in enumerate(within) for n in nodes}
    ends = {t.name for t in walk.model.graph.outputs}
    reached: dict[int, set[int]] = {}
    found = []
    for node in reversed(walk.model.graph.nodes):
        if id(node) in place:
            continue
        own = {-1} if any(t.name in ends for t in node.outputs) else set[int]()
        for reader in (n for t in node.outputs for n in t.outputs):
            own |= {place[id(reader)]} if id(reader) in place else reached.get(id(reader), {-1})
        reached[id(node)] = own
        found += [(name, own) for name in _constants([node])]
    return found


def _constants(nodes: Iterable[Any]) -> set[str]:
    """Returns the names of the constants that nodes read."""
    return {t.name for n in nodes for t in n.inputs if is_constant(t)}


def fewer_blocks(module: torch.nn.Module, blocks: BlockList, dropped: range) -> tuple[FieldChange, ...] | None:
    """Returns what the configuration of a transformers model must say for fewer blocks; None where it cannot.

    A field that counts them has their number and is called so; one that says from which block on they are others has a
    smaller one. Beside them lists with an entry for each block lose the entries, and lists of blocks have their new places.
    """
    wanted = {}
    for name, tensor in module.state_dict().items():
        new = blocks.renamed(name, dropped)
        if new is not None:
            wanted[new] = tuple(tensor.shape)
    config: Any = module.config
    counts, lists = list(_counts(config, blocks.entries, dropped)), list(_lists(config, blocks.entries, dropped))
    for number in range(1, FIELDS_TOGETHER + 1):
        for chosen in itertools.combinations(counts, number):
            parts = {change.path for change in chosen}
            own = [change for change in lists if change.path in parts]
            each = [change for change in own if len(change.before) == blocks.entries]
            for more in (own, each, []):
                changes = (*chosen, *more)
                if says(module, changes, wanted):
                    return changes
    return None


def _counts(config: Any, entries: int, dropped: range) -> Iterator[FieldChange]:
    """Yields fields that count blocks, and behind them those that may say from which block on they are others."""
    places = [(path, name, value) for path, part in _parts(config) for name, value in vars(part).items()]
    numbers = [(path, name, value) for path, name, value in places if type(value) is int and not ID.search(name)]
    for path, name, value in numbers:
        if value == entries and COUNT.search(name):
            yield FieldChange(path, name, value, value - len(dropped))
    for path, name, value in numbers:
        if dropped.start < value < entries and FROM.search(name):
            yield FieldChange(path, name, value, value - len(range(dropped.start, min(value, dropped.stop))))


def _lists(config: Any, entries: int, dropped: range) -> Iterator[FieldChange]:
    """Yields lists with an entry for each block, and lists of the places of some blocks."""
    for path, part in _parts(config):
        for name, value in vars(part).items():
            if not isinstance(value, (list, tuple)) or name.startswith("_") or ID.search(name):
                continue
            if COUNT.search(name) and _are_places(value, entries):
                left = type(value)(v - sum(d < v for d in dropped) for v in value if v not in dropped)
                yield FieldChange(path, name, value, left)
            elif len(value) == entries:
                yield FieldChange(path, name, value, type(value)(v for i, v in enumerate(value) if i not in dropped))
            elif (each := _written_out(value)) and len(each) == entries:
                yield FieldChange(path, name, value, [[[v for i, v in enumerate(each) if i not in dropped], 1]])


def _written_out(value: Sequence[Any]) -> list[Any]:
    """Returns what pairs of a list and how often it comes stand for ([[["global", "local"], 2]]); empty of others."""
    pairs = [v for v in value if isinstance(v, (list, tuple)) and len(v) == 2 and isinstance(v[0], (list, tuple))]
    if len(pairs) < len(value) or not all(type(count) is int and count > 0 for _, count in pairs):
        return []
    return [kind for kinds, count in pairs for _ in range(count) for kind in kinds]


def _are_places(value: Sequence[Any], entries: int) -> bool:
    """Returns whether a list may be of the places of some blocks: ascending, each once; of two blocks [0, 1] is of each."""
    whole = all(type(v) is int and 0 <= v < entries for v in value) and list(value) == sorted(set(value))
    return whole and 0 < len(value) and (len(value) < entries or entries > 2)


def _parts(config: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield (), config
    parts = {id(c) for c in configs_of(config)[1:]}
    yield from (((name,), value) for name, value in vars(config).items() if id(value) in parts)


def without_entries(
    module: torch.nn.Module,
    blocks: BlockList,
    dropped: range,
    values: Mapping[str, np.ndarray],
    adopted: Mapping[str, str],
    fields: Sequence[FieldChange] | None,
) -> torch.nn.Module:
    """Returns a module without some of its blocks.

    Args:
        module: it is not changed.
        blocks: the list.
        dropped: the entries that go.
        values: other values of its parameters, by the names that they have now.
        adopted: parameters (those of the normalisation before the gap) that get the values of others.
        fields: what its configuration must say; None for one that is no model of transformers: a copy loses the entries.

    Raises:
        ModelError: a parameter cannot be found, or the class makes no such model.
    """
    import torch

    device = next((p.device for p in module.parameters()), "cpu")
    state = dict(module.state_dict(keep_vars=True))
    missing = next((n for n in (*values, *adopted, *adopted.values()) if n not in state), None)
    if missing is not None and fields is not None:
        raise ModelError(
            f"{type(module).__name__} has no parameter '{missing}' in its state; give block-repair none or map"
        )
    given = {name: to_torch(np.array(value), device) for name, value in values.items()}
    given |= {name: state[other].detach().clone() for name, other in adopted.items()}
    if fields is None:
        result = copy_without(module, set(given))
        for name, value in given.items():
            set_tensor(result, name, value)
        parent, _, attribute = blocks.path.rpartition(".")
        old: Any = result.get_submodule(blocks.path)
        kept = [entry for i, entry in enumerate(old) if i not in dropped]
        made = torch.nn.ModuleList(kept) if isinstance(old, torch.nn.ModuleList) else torch.nn.Sequential(*kept)
        setattr(result.get_submodule(parent), attribute, made.train(old.training))
        return result
    assert is_stock(module)
    source: Any = module
    with quiet_loading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new: Any = type(source)(changed_config(source.config, fields))
    left: dict[str, Any] = {}
    for name, tensor in state.items():
        renamed = blocks.renamed(name, dropped)
        if renamed is not None:
            left[renamed] = given[name] if name in given else tensor.detach().clone()
    new.load_state_dict(left, assign=True)
    new.tie_weights()
    if hasattr(source, "generation_config"):
        new.generation_config = copy.deepcopy(source.generation_config)
        places = getattr(new.generation_config, "alignment_heads", None)  # of Whisper's decoder: block, head
        if places and "decoder" in blocks.path:
            left_of = {old: old - sum(d < old for d in dropped) for old in range(blocks.entries) if old not in dropped}
            new.generation_config.alignment_heads = [[left_of[b], *rest] for b, *rest in places if b in left_of]
    trained = {blocks.renamed(n, dropped): p.requires_grad for n, p in source.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trained.get(name, True))
    made_so: torch.nn.Module = new.to(device).train(source.training)
    return made_so
