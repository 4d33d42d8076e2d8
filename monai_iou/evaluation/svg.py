"""The parts of the report's charts as SVG text: axes, lines, texts and dots.

Colours come from the page's CSS classes, so that the charts follow light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 560
LEFT, RIGHT, TOP, BOTTOM = 84, 20, 12, 44
MANY_DOTS, NAMED_DOTS = 400, 100


@dataclass(frozen=True)
class Point:
    """A value and what it is of; `note` is its tooltip."""

    x: float
    y: float
    note: str


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic axis from `low` to `high`, drawn from pixel `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of `value`."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four to eight round values, or the powers of ten."""
        if self.logarithmic:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers]
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        # Rounded to digits, not to places: volumes in ml may be very small.
        return [float(f"{i * step:.10g}") for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def figure(height: float, title: str, parts: Iterable[str]) -> str:
    """The whole chart; `title` is read aloud and names a saved file."""
    start = f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(title)}">'
    return _markup(f"{start}{''.join(parts)}</svg>")


def _markup(text: str) -> str:
    """Tell the template that `text` is markup: every name and note in it has been escaped here."""
    from markupsafe import Markup  # comes with jinja2; imported here, as jinja2 is

    return Markup(text)


def x_axis(axis: Axis, height: float, label: str) -> str:
    """The horizontal axis at the bottom of a chart, with its grid."""
    base = height - BOTTOM
    ticks = "".join(
        line(axis(tick), TOP, axis(tick), base, "grid") + text(axis(tick), base + 15, f"{tick:.6g}", "middle", "small")
        for tick in axis.ticks()
    )
    return ticks + text((axis.start + axis.end) / 2, base + 34, label, "middle")


def y_axis(axis: Axis, label: str) -> str:
    """The vertical axis, with its grid."""
    ticks = "".join(
        line(LEFT, axis(tick), WIDTH - RIGHT, axis(tick), "grid")
        + text(LEFT - 8, axis(tick) + 4, f"{tick:.6g}", "end", "small")
        for tick in axis.ticks()
    )
    middle = (axis.start + axis.end) / 2
    turned = f'x="16" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 16 {middle:.1f})"'
    return f"{ticks}<text {turned}>{html.escape(label)}</text>"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A line; `kind` is its class in the style sheet."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, content: str, anchor: str, kind: str = "") -> str:
    """A text that starts, ends or has its middle at a point."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(content)}</text>'


def marker(shape: str, x: float, y: float, note: str, kind: str, size: float) -> str:
    """A circle or a square with a tooltip."""
    title = f"<title>{html.escape(note)}</title>" if note else ""
    if shape == "circle":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{title}</circle>'
    place = f'x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"'
    return f'<rect class="{kind}" {place}>{title}</rect>'


def dots(places: Sequence[tuple[float, float, str]], far: Sequence[float], size: float) -> list[str]:
    """A dot at each place, with its tooltip; of very many dots only the far ones are elements of their own.

    A page of thousands of cases opens in a second if the dots of a chart are one path.

    Args:
        places: pixels and tooltip.
        far: how far each is from the middle of the data, which decides whose names are kept.
        size: radius of a dot in pixels.
    """
    if len(places) <= MANY_DOTS:
        return [marker("circle", x, y, note, "dot", size) for x, y, note in places]
    order = sorted(range(len(places)), key=lambda i: -far[i])
    named = [marker("circle", *places[i], "dot", size) for i in order[:NAMED_DOTS]]
    path = "".join(f"M{x:.1f} {y:.1f}h.01" for x, y, _ in (places[i] for i in sorted(order[NAMED_DOTS:])))
    return [f'<path class="dots" stroke-width="{2 * size}" d="{path}"/>', *named]


def shortened(name: str, length: int = 11) -> str:
    """A name cut to what fits."""
    return name if len(name) <= length else name[: length - 1] + "…"
