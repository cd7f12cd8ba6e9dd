"""HTML from Python values: what is not markup already is escaped, so that a node's name can say what it likes."""

import html
from collections.abc import Iterable

from rich.table import Table

VOID = {"meta", "br", "circle", "line", "path", "polyline", "rect"}


class Markup(str):
    """Text that is HTML; any other string is text."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """Returns an element; attributes that are words of Python end with an underscore, those that are None are left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{shown}>" if name in ("meta", "br") else f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{joined(children)}</{name}>")


def joined(children: Iterable[str | None]) -> Markup:
    """Returns children in a row; those that are None are left out."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c) for c in children if c is not None))


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def table(shown: Table) -> Markup:
    """Returns a rich table as an HTML table that scrolls in a box of its own."""
    sides = [None if column.justify == "left" else "number" for column in shown.columns]
    head = [element("th", str(c.header), class_=side, scope="col") for c, side in zip(shown.columns, sides, strict=True)]
    rows = zip(*([str(cell) for cell in column.cells] for column in shown.columns), strict=True)
    body = [
        element("tr", *(element("td", cell, class_=side) for cell, side in zip(row, sides, strict=True))) for row in rows
    ]
    whole = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    # focusable, so that the keyboard scrolls it as well
    return element("div", whole, class_="scroll", tabindex="0")


def document(title: str, mark: str, style: str, *sections: str | None) -> str:
    """Returns a whole page, which loads nothing: the policy in its head forbids it."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("title", title),
        element("style", Markup(style)),
    )
    return f"{mark}\n{element('html', head, element('body', element('main', *sections)), lang='en')}\n"
