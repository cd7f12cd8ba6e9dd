"""Passes written as text: ``allocate-widths{ffn=0.5},prune-groups{repair=bias}``.

    passes = pass ("," pass)*      pass = name [ "{" [ option ("," option)* ] "}" ]      option = field "=" value

as in the textual pipelines of MLIR and xdsl. Names are those of the passes; fields are those of their dataclasses, with
``-`` or ``_`` between words; a value is read as the field's type says, ``none`` where that may be None.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from liar_opt.passes.base import Pass
from liar_opt.runtime.errors import OptionError

WRITTEN = (bool, int, float, str)
"""Types of fields that can be written, in the order in which they are tried."""


def parse_passes(
    text: str, known: Sequence[type[Pass[Any]]], usual: Mapping[str, Any] | None = None
) -> tuple[Pass[Any], ...]:
    """Returns the passes that a text names, with their options.

    Args:
        text: see above.
        known: every pass, in the order in which they run.
        usual: values of fields that are not written, for the passes that have them, instead of their own defaults.

    Raises:
        OptionError: the text is not of the form above, names what there is not, repeats a pass, or changes the order.
    """
    by_name = {step.name: step for step in known}
    order = [step.name for step in known]
    found: list[Pass[Any]] = []
    for name, written in _split(text):
        if name not in by_name:
            raise OptionError(f"passes: there is no pass '{name}'; choose among {', '.join(order)}")
        if found and order.index(name) <= order.index(found[-1].name):
            raise OptionError(
                f"passes: '{name}' cannot run behind '{found[-1].name}'; each runs once, in the order of --list-passes"
            )
        options = dict(_option(by_name[name], option) for option in written)
        if len(options) < len(written):
            raise OptionError(f"passes: an option of '{name}' is given twice; give it once")
        fields = {field.name for field in dataclasses.fields(by_name[name])}
        found.append(by_name[name](**{k: v for k, v in (usual or {}).items() if k in fields} | options))
    return tuple(found)


def _split(text: str) -> list[tuple[str, list[str]]]:
    """Returns names and options as they are written."""
    entry = re.compile(r"\s*([\w-]+)\s*(?:\{([^{}]*)\}\s*)?(,|$)")
    entries, place = [], 0
    while True:
        match = entry.match(text, place)
        if match is None:
            raise OptionError(
                f"passes: '{text[place:].strip()}' is no list of passes; write them as name{{option=value,...}},name"
            )
        options = [o.strip() for o in (match[2] or "").split(",")]
        entries.append((match[1], [o for o in options if o]))
        if match[3] == "":
            return entries
        place = match.end()


def _option(step: type[Pass[Any]], written: str) -> tuple[str, Any]:
    """Returns the field and the value of one option."""
    types = _fields(step)
    name, equals, value = (part.strip() for part in written.partition("="))
    field = name.replace("-", "_")
    if not equals or field not in types:
        there = f"its options are {', '.join(types)}" if types else "it has none"
        raise OptionError(f"passes: '{written}' is no option of '{step.name}'; {there}, each written as option=value")
    for kind in types[field]:
        parsed = _parsed(kind, value)
        if parsed is not None:
            return field, parsed[0]
    wanted = " or ".join("none" if kind is NoneType else kind.__name__ for kind in types[field])
    raise OptionError(f"passes: option '{field}' of '{step.name}' is '{value}'; give {wanted}")


def _fields(step: type[Pass[Any]]) -> dict[str, list[type]]:
    """Returns the types that can be written, by field; fields that hold functions or passes alone are left out."""
    hints = typing.get_type_hints(step)
    result = {}
    for field in dataclasses.fields(step):
        members = typing.get_args(hints[field.name]) or (hints[field.name],)
        literal = {type(v) for m in members if typing.get_origin(m) is typing.Literal for v in typing.get_args(m)}
        types = [kind for kind in (NoneType, *WRITTEN) if kind in members or kind in literal]
        if any(kind is not NoneType for kind in types):
            result[field.name] = types
    return result


def _parsed(kind: type, value: str) -> tuple[Any] | None:
    """Returns a value of a type in a tuple, or None where the text is not of this type."""
    low = value.lower()
    if kind is NoneType:
        return (None,) if low == "none" else None
    if kind is bool:
        return ({"true": True, "false": False}[low],) if low in ("true", "false") else None
    try:
        return (kind(value),)
    except ValueError:
        return None
