"""The picture of a study over an amount, as SVG text: a curve with a band for each choice, a panel for each score."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.evidence.pictures import Scale, line, svg

# Seven of Okabe and Ito's colours, which people who see few colours can tell apart, and a dark yellow.
COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#0072b2", "#8c8c00")
TOP, FLOOR, HEIGHT = 40, 300, 400
PANELS = ((50, 370), (425, 745))
LEGEND_COLUMNS, LEGEND_TOP, LEGEND_ROW = 4, 352, 22


@dataclass(frozen=True)
class Point:
    """The mean of one choice at an amount (above 0), and its 95 % interval; None for too few seeds to have one."""

    amount: float
    mean: float
    interval: tuple[float, float] | None


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[Point]]], axis: str) -> str:
    """Draw two scores over the amounts, on a logarithmic axis; a point without an interval is a hollow circle.

    Args:
        panels: title of a panel -> name of a choice -> its points by rising amount; scores from 0 to 1.
        axis: what the amounts are.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    amounts = sorted({p.amount for curves in panels.values() for points in curves.values() for p in points})
    parts = []
    for (title, curves), (start, end) in zip(panels.items(), PANELS, strict=True):
        across = Scale(math.log10(amounts[0]), math.log10(amounts[-1]), start, end)
        up = Scale(0.0, 1.0, FLOOR, TOP)
        parts += _axes(title, axis, amounts, across, up)
        for name, points in curves.items():
            parts += _curve(points, across, up, COLOURS[names.index(name)])
    for index, name in enumerate(names):
        x = PANELS[0][0] + 175 * (index % LEGEND_COLUMNS)
        y = LEGEND_TOP + LEGEND_ROW * (index // LEGEND_COLUMNS)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="14" height="10" fill="{COLOURS[index]}"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{html.escape(name)}</text>')
    return svg(HEIGHT, parts)


def _axes(title: str, axis: str, amounts: Sequence[float], across: Scale, up: Scale) -> list[str]:
    start, end = across.start, across.end
    parts = [line(start, FLOOR, end, FLOOR, "axis"), line(start, FLOOR, start, TOP, "axis")]
    parts.append(f'<text x="{(start + end) / 2:.1f}" y="24" text-anchor="middle">{html.escape(title)}</text>')
    parts.append(f'<text x="{(start + end) / 2:.1f}" y="{FLOOR + 34}" text-anchor="middle">{html.escape(axis)}</text>')
    for amount in amounts:
        x = across(math.log10(amount))
        parts += [line(x, FLOOR, x, FLOOR + 4, "axis"), _centred(f"{amount:g}", x, FLOOR + 18)]
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        y = up(tick)
        parts += [line(start - 4, y, start, y, "axis"), _centred(f"{tick:g}", start - 16, y + 4)]
    return parts


def _curve(points: Sequence[Point], across: Scale, up: Scale, colour: str) -> list[str]:
    """Return bands where there are intervals, a line, and circles: filled where there is an interval."""
    lefts = [across(math.log10(point.amount)) for point in points]
    parts = []
    for known, group in itertools.groupby(zip(lefts, points, strict=True), lambda pair: pair[1].interval is not None):
        edges = [(x, *map(up, point.interval)) for x, point in group if point.interval]
        outline = [(x, low) for x, low, _ in edges] + [(x, high) for x, _, high in reversed(edges)]
        band = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
        ends = "".join(line(x, low, x, high, "end") for x, low, high in edges)
        if known:
            parts.append(f'<polygon class="band" points="{band}" fill="{colour}" fill-opacity="0.12"/>')
            parts.append(f'<g stroke="{colour}" stroke-opacity="0.5">{ends}</g>')
    places = [(x, up(point.mean)) for x, point in zip(lefts, points, strict=True)]
    middle = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(f'<polyline class="curve" points="{middle}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    for (x, y), point in zip(places, points, strict=True):
        fill = colour if point.interval else "#fff"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}" stroke="{colour}"/>')
    return parts


def _centred(text: str, x: float, y: float) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
