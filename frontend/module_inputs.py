"""Batches as users of torch have them, by the names of a module's arguments.

A batch is a dict by argument name, or what ``module(*batch)`` takes: a tensor, or a tuple or list of tensors, which go to
the arguments of ``forward`` in order. One item more than ``forward`` takes, with one entry for each sample, is the label of
``(inputs, label)`` batches and is left out; so is what stands behind a dict, as in ``(dict, label)``. ``(tensors, dict)``
is arguments by position and by name. Where a label might be an argument that has a default, nothing is guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_opt.runtime.errors import OptionError

if TYPE_CHECKING:
    import torch

LABELS = {"labels", "label", "return_loss"}
"""Arguments that are for training."""


def named_source(module: torch.nn.Module, source: Any, batch_size: int = 32) -> Any:
    """Returns calibration data whose batches are dicts by argument name; what is no batch of tensors stays.

    Args:
        module: whose arguments they are.
        source: a tensor or an array of samples, a tuple (one batch), a list of batches or anything that gives some, such as
            a DataLoader; a ``torch.utils.data.Dataset``; or what is passed on: a path, texts, dicts.
        batch_size: samples of a batch, where a dataset gives single ones.

    Raises:
        OptionError: batches do not fit the arguments.
    """
    if source is None or isinstance(source, (str, bytes, Path, Mapping)) or hasattr(source, "column_names"):
        return source
    if _is_array(source) or (isinstance(source, tuple) and _is_batch(source) and _fits(module, source)):
        return named_batch(module, source, "the calibration data")
    if isinstance(source, (list, tuple)):
        return [_item(module, item, number) for number, item in enumerate(source)]
    if not isinstance(source, Iterable) and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        from torch.utils.data import DataLoader

        source = DataLoader(source, batch_size=batch_size)
    return _Batches(module, source) if isinstance(source, Iterable) else source


def named_batch(module: torch.nn.Module, batch: Any, where: str) -> dict[str, Any]:
    """Returns a batch as a dict by argument name.

    Args:
        module: whose arguments they are.
        batch: a dict, a tensor, or a tuple or list of tensors.
        where: what the batch is, for messages.

    Raises:
        OptionError: it does not fit the arguments, or may fit them in two ways.
    """
    if isinstance(batch, Mapping):
        return {str(k): v for k, v in batch.items() if v is not None}
    if _is_array(batch):
        return _by_position(module, [batch], where)
    if not isinstance(batch, (list, tuple)) or not _is_batch(batch):
        raise OptionError(
            f"{where} is of type '{type(batch).__name__}'; give a tensor, a tuple of tensors, or a dict by argument name"
        )
    if isinstance(batch[0], Mapping) and len(batch) == 2:
        return named_batch(module, batch[0], where)
    if isinstance(batch[0], (list, tuple)) and len(batch) == 2 and isinstance(batch[1], Mapping):
        return {**_by_position(module, batch[0], where), **named_batch(module, batch[1], where)}
    return _by_position(module, batch, where)


def required_tensors(module: torch.nn.Module, batch: Mapping[str, Any], where: str) -> None:
    """Checks that every input is one tensor.

    Raises:
        OptionError: one is a list or dict of tensors, no dense numbers at all, or has no samples.
    """
    import torch

    for name, value in batch.items():
        kind = type(value).__name__
        items = list(value.values()) if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and any(getattr(v, "ndim", 0) for v in items)):
            raise OptionError(
                f"input '{name}' is a {kind} of tensors in {where}, and {type(module).__name__} can be traced and measured "
                "with one tensor an argument alone; wrap it in a module whose forward takes the tensors one by one"
            )
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as err:
            raise OptionError(f"input '{name}' of {where} is of type '{kind}' and no tensor; give numbers") from err
        if tensor.ndim and not len(tensor):
            raise OptionError(f"input '{name}' of {where} has no samples (shape {list(tensor.shape)}); give some")
        if tensor.layout != torch.strided or tensor.is_meta:
            what = "on the meta device, without numbers" if tensor.is_meta else "sparse"
            raise OptionError(f"input '{name}' of {where} is {what}; give a dense tensor")


class _Batches:
    """Batches of an iterable, each named when its turn comes; the first of an iterator is there again the next time."""

    def __init__(self, module: torch.nn.Module, source: Iterable[Any]) -> None:
        self.module, self.source = module, source
        self.head = list(itertools.islice(source, 1)) if isinstance(source, Iterator) else []

    def __iter__(self) -> Iterator[Any]:
        items = itertools.chain(self.head, self.source)
        return (_item(self.module, item, number) for number, item in enumerate(items))


def _item(module: torch.nn.Module, item: Any, number: int) -> Any:
    """Returns a named batch; what is no batch of tensors is left to who reads texts and arrays."""
    if _is_array(item) or (isinstance(item, (list, tuple)) and _is_batch(item)):
        return named_batch(module, item, f"item {number} of the calibration data")
    return item


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and len(value.shape) > 0


def _is_batch(items: Sequence[Any]) -> bool:
    first = items[0] if items else None
    inside = isinstance(first, (list, tuple)) and len(items) == 2 and isinstance(items[1], Mapping)
    return (
        _is_array(first) or (isinstance(first, Mapping) and len(items) == 2 and not isinstance(items[1], Mapping)) or inside
    )


def _fits(module: torch.nn.Module, items: Sequence[Any]) -> bool:
    """Returns whether a tuple can be one batch; a longer one holds batches."""
    return len(items) <= len(_arguments(module)[0]) + 1 or not all(map(_is_array, items))


def _arguments(module: torch.nn.Module) -> tuple[list[str], int]:
    """Returns the names of the arguments that tensors go to in order, and how many of them have no default."""
    found = [
        p for p in signature(module.forward).parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    found = [p for p in found if p.name not in LABELS]
    return [p.name for p in found], sum(p.default is p.empty for p in found)


def _by_position(module: torch.nn.Module, values: Sequence[Any], where: str) -> dict[str, Any]:
    given, (names, needed) = list(values), _arguments(module)
    kind, listed = type(module).__name__, ", ".join(names)
    if not names:
        raise OptionError(
            f"{where} holds tensors by position, and {kind}.forward names no arguments; give dicts of tensors by name"
        )
    if len(given) == len(names) + 1 and _one_each(given[-1], given[0]):
        given.pop()
    if not needed <= len(given) <= len(names):
        raise OptionError(
            f"{where} has {len(given)} items ({', '.join(map(_described, given[:6]))}), and {kind}.forward takes "
            f"{f'{needed} to ' if needed < len(names) else ''}{len(names)}: {listed}; give as many tensors in this order, "
            "one more for a label, or dicts by argument name"
        )
    if len(given) == max(needed, 1) + 1 and len(getattr(given[-1], "shape", ())) <= 1:
        raise OptionError(
            f"the last item of {where} ({_described(given[-1])}) may be a label, or the argument '{names[len(given) - 1]}' "
            f"of {kind}.forward; give dicts by argument name"
        )
    return {name: value for name, value in zip(names, given, strict=False) if value is not None}


def _one_each(item: Any, samples: Any) -> bool:
    """Returns whether there is an entry for each sample, as labels have."""
    if isinstance(item, Mapping):
        return True
    shape = tuple(getattr(item, "shape", ()))
    count = shape[0] if shape else len(item) if isinstance(item, (list, tuple)) else None
    return count is not None and tuple(getattr(samples, "shape", ()))[:1] == (count,)


def _described(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if _is_array(value) else type(value).__name__
