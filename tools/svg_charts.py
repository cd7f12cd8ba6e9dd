"""Charts as inline SVG: small functions of numbers, as wide as a phone, drawn in the colours of the page's style.

Classes name the colours of :data:`CHART_STYLE`: ``k0`` to ``k5`` are series, ``grid``, ``axis`` and ``ink`` the rest. A
``title`` inside a mark is what a browser shows when it is pointed at.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from liar_opt.tools.html_elements import Markup, element

WIDTH, HEIGHT = 340.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 24.0, 12.0, 36.0
COLOURS = 6
ROW = 34.0
Format = Callable[[float], str]
CHART_STYLE = """
:root { --paper: #ffffff; --ink: #1c2330; --soft: #5b6575; --grid: #e3e7ee; --box: #f5f7fa;
  --k0: #2563c9; --k1: #c25e10; --k2: #1d7f4f; --k3: #7b49c4; --k4: #b3324f; --k5: #66750f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171d; --ink: #e6e9ef; --soft: #a3adbd; --grid: #2c323d;
  --box: #1c2029; --k0: #7fb0ff; --k1: #f2a35e; --k2: #6fd3a0; --k3: #c3a1f7; --k4: #f58aa3; --k5: #c3d263; } }
.ink { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); } .gone { fill: var(--grid); }
.line { fill: none !important; stroke-width: 1.8; } .ring { fill: var(--paper) !important; stroke-width: 1.5; }
.k0 { fill: var(--k0); stroke: var(--k0); } .k1 { fill: var(--k1); stroke: var(--k1); }
.k2 { fill: var(--k2); stroke: var(--k2); } .k3 { fill: var(--k3); stroke: var(--k3); }
.k4 { fill: var(--k4); stroke: var(--k4); } .k5 { fill: var(--k5); stroke: var(--k5); }
"""
"""Colours, for readers of light and of dark pages."""


@dataclass(frozen=True)
class Scale:
    """Values to places, linear or logarithmic."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Returns the place of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.begin + (self.end - self.begin) * ((value - low) / (high - low) if high > low else 0.5)

    def ticks(self, most: int = 5) -> list[float]:
        """Returns round values between the ends."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            step = max(1, -(-(last - first) // most))
            return [10.0**exponent for exponent in range(first, last + 1, step)]
        return round_ticks(self.low, self.high, most)


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Returns at most ``most`` multiples of 1, 2 or 5 times a power of ten between two values."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Mark:
    """One thing in a chart: where it is, its colour, and what it is called."""

    x: float
    y: float
    series: int
    name: str
    hollow: bool = False


def columns(values: Sequence[tuple[str, float, int]], label: str, x_label: str, y_label: str) -> Markup:
    """Shares from 0 to 1 as columns in a row: (name, share, series) each."""
    y = Scale(0, 1, HEIGHT - BOTTOM, TOP)
    width = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
    bars = []
    for index, (name, share, series) in enumerate(values):
        left, gap = LEFT + index * width, min(width / 5, 2.0)
        place = {"x": left + gap, "width": width - 2 * gap}
        bars.append(element("rect", y=TOP, height=y(0) - TOP, class_="gone", **place))
        title = element("title", f"{name}: {100 * share:.1f} % kept")
        bars.append(
            element("g", title, element("rect", y=y(share), height=y(0) - y(share), class_=f"k{series % COLOURS}", **place))
        )
    return framed(label, None, y, percent, percent, x_label, y_label, *bars)


def lines(
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    marks: Sequence[Mark],
    colour: int,
    label: str,
    x_label: str,
    y_label: str,
) -> Markup | None:
    """Curves over a share from 0 to 1, on a logarithmic axis; later ones are stronger. None where nothing is positive."""
    positive = [y for _, points in series for _, y in points if y > 0]
    if not positive:
        return None
    high = max(positive)
    low = max(min(positive), high * 1e-5)
    x, y = Scale(0, 1, LEFT, WIDTH - RIGHT), Scale(low, max(high, low * 10), HEIGHT - BOTTOM, TOP, log=True)
    drawn = []
    for index, (name, points) in enumerate(series):
        places = " ".join(f"{x(px):.1f},{y(max(py, low)):.1f}" for px, py in points if py > 0)
        strength = 0.3 + 0.7 * (index + 1) / len(series)
        line = element("polyline", points=places, class_=f"line k{colour % COLOURS}", stroke_opacity=strength)
        drawn.append(element("g", element("title", name), line))
    drawn += [dot(x(m.x), y(max(m.y, low)), m) for m in marks if m.y > 0]
    return framed(label, x, y, percent, power_of_ten, x_label, y_label, *drawn)


def dots(marks: Sequence[Mark], label: str, x_label: str, y_label: str) -> Markup | None:
    """Marks over whole numbers from 1, on a logarithmic axis. None where nothing is positive."""
    shown = [m for m in marks if m.y > 0]
    if not shown:
        return None
    low, high = min(m.y for m in shown), max(m.y for m in shown)
    x = Scale(0.5, max(m.x for m in shown) + 0.5, LEFT, WIDTH - RIGHT)
    y = Scale(max(low, high * 1e-6) * 0.8, high * 1.25, HEIGHT - BOTTOM, TOP, log=True)
    drawn = [dot(x(m.x), y(max(m.y, y.low)), m) for m in shown]
    return framed(label, x, y, whole_number, power_of_ten, x_label, y_label, *drawn)


def scatter(marks: Sequence[Mark], label: str, x_label: str, y_label: str, x_format: Format, y_format: Format) -> Markup:
    """Marks with their names, on linear axes that hold them all."""
    x = around([m.x for m in marks], LEFT, WIDTH - RIGHT)
    y = around([m.y for m in marks], HEIGHT - BOTTOM, TOP)
    drawn = []
    for mark in marks:
        right = x(mark.x) > (LEFT + WIDTH - RIGHT) / 2
        place = {"x": x(mark.x) + (-8 if right else 8), "text_anchor": "end" if right else "start"}
        drawn += [
            dot(x(mark.x), y(mark.y), mark, 5.0),
            element("text", _short(mark.name), y=y(mark.y) - 6, class_="ink", **place),
        ]
    return framed(label, x, y, x_format, y_format, x_label, y_label, *drawn)


def intervals(rows: Sequence[tuple[str, float, float, float, int]], label: str, x_label: str) -> Markup:
    """Differences with their ends, one under the other, and zero: (name, difference, low, high, series) each."""
    height = ROW * len(rows) + BOTTOM
    ends = [v for _, d, low, high, _ in rows for v in (d, low, high)]
    x = around([*ends, 0.0], RIGHT, WIDTH - RIGHT)
    drawn = [element("line", x1=x(0), x2=x(0), y1=0.0, y2=height - BOTTOM, class_="axis")]
    for index, (name, difference, low, high, series) in enumerate(rows):
        middle = ROW * index + 24
        told = f"{name}: {difference:+.4f} ({low:+.4f} to {high:+.4f})"
        drawn.append(element("text", _short(name, 48), x=RIGHT, y=middle - 11, class_="ink"))
        whisker = element("line", x1=x(low), x2=x(high), y1=middle, y2=middle, class_=f"line k{series % COLOURS}")
        drawn.append(element("g", whisker, dot(x(difference), middle, Mark(difference, 0, series, told))))
    for value in x.ticks(4):
        drawn.append(
            element("text", f"{value:+g}" if value else "0", x=x(value), y=height - 22, text_anchor="middle", class_="ink")
        )
    drawn.append(element("text", x_label, x=WIDTH / 2, y=height - 4, text_anchor="middle", class_="ink"))
    return _svg(label, height, *drawn)


def percent(value: float) -> str:
    """Returns a share from 0 to 1 in percent."""
    return f"{100 * value:g} %"


def whole_number(value: float) -> str:
    """Returns a number from 1 on that is whole; others are left blank."""
    return f"{value:.0f}" if value >= 1 and abs(value - round(value)) < 1e-9 else ""


def power_of_ten(value: float) -> str:
    """Returns a power of ten as a number, or with an exponent where it is small."""
    return f"{value:g}" if value >= 1e-3 else f"1e{math.log10(value):.0f}"


def around(values: Sequence[float], begin: float, end: float) -> Scale:
    """Returns a scale that holds all values, with a margin."""
    low, high = min(values), max(values)
    margin = (high - low) * 0.15 or abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, begin, end)


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def dot(x: float, y: float, mark: Mark, radius: float = 3.5) -> Markup:
    """A mark at its place, which says its name when it is pointed at."""
    style = f"{'ring' if mark.hollow else 'dot'} k{mark.series % COLOURS}"
    return element("g", element("title", mark.name), element("circle", cx=x, cy=y, r=radius, class_=style))


def framed(
    label: str,
    x: Scale | None,
    y: Scale,
    x_format: Format,
    y_format: Format,
    x_label: str,
    y_label: str,
    *drawn: Markup,
    below: float = 0.0,
) -> Markup:
    """Axes and grid around what is drawn, with some space below for its own use."""
    frame = []
    for value in y.ticks():
        frame.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value), class_="grid"))
        frame.append(element("text", y_format(value), x=LEFT - 5, y=y(value) + 4, text_anchor="end", class_="ink"))
    for value in [] if x is None else x.ticks():
        assert x is not None
        frame.append(
            element("text", x_format(value), x=x(value), y=HEIGHT - BOTTOM + 14, text_anchor="middle", class_="ink")
        )
    frame.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    frame.append(element("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="ink"))
    turned = f"translate(10 {middle:.0f}) rotate(-90)"
    frame.append(element("text", y_label, transform=turned, text_anchor="middle", class_="ink"))
    return _svg(label, HEIGHT + below, *frame, *drawn)


def _svg(label: str, height: float, *drawn: Markup) -> Markup:
    return element("svg", *drawn, viewBox=f"0 0 {WIDTH:.0f} {height:.0f}", role="img", aria_label=label)
