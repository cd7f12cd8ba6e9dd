"""Cut the vocabulary of a torch module: its ids become places among the words that stay (`frontend.module_words`).

A checkpoint gets the smaller tokenizer that gives these ids; an export to ONNX keeps the ids that the module had, with
tables as `cut_vocabulary` makes them, unless the smaller tokenizer is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from liar_opt.frontend.fx_module import to_numpy, to_torch
from liar_opt.frontend.hf_checkpoint import without_cache
from liar_opt.frontend.module_words import cut_module_words, ids_said
from liar_opt.frontend.plain_module import evaluating
from liar_opt.frontend.vocabulary import find_words, require_no_other_lookup
from liar_opt.passes.base import Change, DenseModel, Finding, Pass, PassResult, State
from liar_opt.passes.cut_vocabulary import ChosenWords, choose_words, cut_words_entry
from liar_opt.passes.fit_module import CutModule
from liar_opt.passes.open_module import OpenedModule, module_of, traced_model
from liar_opt.passes.options import PruneOptions
from liar_opt.runtime.compare import require_close
from liar_opt.runtime.errors import ModelError, OptionError
from liar_opt.runtime.text_tokenizer import fast_file

if TYPE_CHECKING:
    import torch

LOW = 8
"""Ids of padding below this keep their number: positions may be counted from it (RoBERTa)."""


@dataclass(frozen=True, eq=False)
class WholeModule(Finding):
    """The module that the words were taken from, widths cut already."""

    by: ClassVar[str] = "cut-module-words"
    module: torch.nn.Module


def choose_module_words(state: State, calibration: Any, options: PruneOptions) -> ChosenWords:
    """Returns the words that are to stay in a module; those that its configurations name always do.

    Raises:
        ModelError: it has no table that token ids look up.
        OptionError: the vocabulary cannot be read or does not fit the model, or a checkpoint lacks its tokenizer.json.
    """
    module, model = module_of(state), traced_model(state)
    if options.checkpoint and options.tokenizer is not None and fast_file(Path(options.tokenizer)) is None:
        raise OptionError(
            f"a checkpoint of fewer words needs a smaller tokenizer, and '{options.tokenizer}' has no tokenizer.json: "
            "save_pretrained of a fast tokenizer writes one; or write ONNX with --format onnx"
        )
    small = bool(options.tokenizer is not None and (options.checkpoint or options.small_tokenizer))
    words = find_words(model)
    require_no_other_lookup(model, words)
    said = ids_said(module, words.size)
    config = getattr(module, "config", None)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and 0 <= padding < LOW:
        said |= set(range(padding))
    chosen = choose_words(model, calibration, replace(options, small_tokenizer=small), said)
    return replace(chosen, renumbered=True, asked=options.small_tokenizer)


@dataclass(frozen=True)
class CutModuleWordsPass(Pass[ChosenWords]):
    """Cut embeddings, heads and their biases of a module to the words that were chosen; its configuration says so.

    Before: ``Embedding(V, d)``, ``Linear(d, V)``. After: ``Embedding(K, d)``, ``Linear(d, K)``, tied where they were.
    """

    name: ClassVar[str] = "cut-module-words"

    def plan(self, state: State) -> ChosenWords:
        """Returns the words that stay."""
        return state.found(ChosenWords)

    def apply(self, state: State, plan: ChosenWords) -> PassResult:
        """Cuts them, and compares both modules on words that stay; adds the ``CutModule`` and a ``CutWords``.

        Raises:
            ModelError: the module computes something from its ids that is another thing now.
        """
        cut = state.get(CutModule)
        whole = module_of(state) if cut is None else cut.module
        if cut is not None and cut.traced is not None:
            raise ModelError(
                f"words cannot be cut of a traced graph ({cut.traced}); prune the exported module, or leave one of both out"
            )
        words = find_words(state.found(DenseModel).original.model())
        made = cut_module_words(whole, words, plan.kept)
        before = numbered(state.found(OpenedModule).example, plan, new=False)
        after = numbered(before, plan)
        ours, theirs = _outputs(made, after), _outputs(whole, before)
        for name, value in theirs.items():
            if name in ours and value.ndim and value.shape[-1] == words.size and ours[name].shape[-1] == len(plan.kept):
                theirs[name] = value[..., plan.kept]
        exact = require_close(ours, theirs, traced_model(state).least_precision(), "fewer words against all of them")
        state.add(CutModule(made), WholeModule(whole), cut_words_entry(plan, words, exact))
        return PassResult(state, (Change("words", "vocabulary", plan.size, len(plan.kept)),))


def numbered(feeds: Mapping[str, torch.Tensor], words: ChosenWords, new: bool = True) -> dict[str, torch.Tensor]:
    """Returns feeds of a module with ids of words that are kept, or (``new``) with the ids that these have now."""
    arrays = {name: to_numpy(feeds[name]) for name in words.inputs if name in feeds}
    ids = words.numbered(arrays) if new else words.known(arrays)
    return {name: to_torch(ids[name], value.device) if name in ids else value for name, value in feeds.items()}


def _outputs(module: torch.nn.Module, feeds: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """All tensors that a module gives, numbered."""
    import torch

    with evaluating(module), torch.no_grad(), without_cache(module):
        leaves = torch.utils._pytree.tree_leaves(module(**feeds))
    found = [v.float() if v.dtype == torch.bfloat16 else v for v in leaves if isinstance(v, torch.Tensor)]
    return {f"{i}": v.detach().cpu().numpy() for i, v in enumerate(found)}
