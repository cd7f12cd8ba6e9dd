"""Names from elsewhere on a terminal: nodes, files, columns and arrays are called what somebody called them.

A terminal obeys what such a name may hold: escape sequences set its title or clear it, a carriage return writes over the
line, marks of direction turn it round, and what has no width hides. Everything that this program prints passes
:func:`printable`.
"""

import re
import unicodedata
from collections.abc import Callable

UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of what is not printed: controls, format marks (direction, zero width), surrogates (bytes of a file's
name that are no UTF-8), separators of lines and paragraphs."""


def printable(text: object, keep: str = "") -> str:
    r"""Returns a text with escapes such as ``\x1b`` and ``\u202e`` in the place of what a terminal would obey.

    Args:
        text: what is printed.
        keep: control characters that may stay, as the line feeds of a text of several lines.
    """
    return _replaced(str(text), keep, escaped)


def escaped(character: str) -> str:
    """Returns a character as Python and JSON write it where it cannot stand for itself."""
    code = ord(character)
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def printable_json(text: str) -> str:
    """Returns a text in JSON that says the same, and has an escape for all but line feeds that a terminal would obey."""
    return _replaced(text, "\n", _json_escape)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _replaced(text: str, keep: str, escape: Callable[[str], str]) -> str:
    # Line by line: nearly all of them have nothing to replace, which is told fast.
    return "".join(
        line if line.isprintable() else "".join(_safe(c, keep, escape) for c in line) for line in re.split("(\n)", text)
    )


def _safe(character: str, keep: str, escape: Callable[[str], str]) -> str:
    return character if character in keep or unicodedata.category(character) not in UNSAFE else escape(character)
