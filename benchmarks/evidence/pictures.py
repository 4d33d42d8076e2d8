"""The picture of a study as SVG text: every seed of every choice, and its difference from the baseline.

Plain SVG, so that the same table gives the same bytes wherever it is drawn.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROW, TOP, BOTTOM = 24, 34, 40
NAMES, LEFT, RIGHT = 210, (220, 440), (480, 740)
WIDTH = 760

STYLE = (
    "text{font:12px sans-serif;fill:#222}.axis{stroke:#888}.zero{stroke:#888;stroke-dasharray:4 3}"
    ".seed{fill:none;stroke:#0072b2;stroke-width:1.5}.mean{stroke:#222;stroke-width:2}"
    ".whisker{stroke:#d55e00;stroke-width:2}.dot{fill:#d55e00}rect.page{fill:#fff}"
)


@dataclass(frozen=True)
class Line:
    """One choice: its name, the mean of each seed, and difference and interval, None for the baseline itself."""

    name: str
    seeds: Sequence[float]
    difference: tuple[float, float, float] | None = None


def draw(lines: Sequence[Line], score: str, baseline: str) -> str:
    """Draw the seeds' means on the left and the differences with their 95 % intervals on the right.

    Args:
        lines: at least one.
        score: what the axis shows.
        baseline: what the differences are from.
    """
    height = TOP + ROW * len(lines) + BOTTOM
    values = [value for each in lines for value in each.seeds]
    scale = Scale(min(values), max(values), *LEFT)
    parts = [_axis(scale, height, f"{score}, a circle per seed, their mean as a bar")]
    reach = max([abs(value) for each in lines for value in each.difference or ()] + [1e-3])
    other = Scale(-reach, reach, *RIGHT)
    parts += [_axis(other, height, f"difference from {baseline}"), _upright(other(0), height, "zero")]
    for index, each in enumerate(lines):
        middle = TOP + ROW * (index + 0.5)
        parts.append(f'<text x="{NAMES}" y="{middle + 4:.1f}" text-anchor="end">{html.escape(each.name)}</text>')
        parts += [f'<circle class="seed" cx="{scale(v):.1f}" cy="{middle:.1f}" r="4"/>' for v in each.seeds]
        mean = scale(sum(each.seeds) / len(each.seeds))
        parts.append(line(mean, middle - 7, mean, middle + 7, "mean"))
        if each.difference is not None:
            centre, low, high = (other(value) for value in each.difference)
            parts.append(line(low, middle, high, middle, "whisker"))
            parts.append(f'<circle class="dot" cx="{centre:.1f}" cy="{middle:.1f}" r="4"/>')
    return svg(height, parts)


@dataclass(frozen=True)
class Scale:
    """A linear axis from `low` to `high`, with a margin, drawn from pixel `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        margin = 0.05 * (self.high - self.low) or 0.01
        share = (value - self.low + margin) / (self.high - self.low + 2 * margin)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return two to five round values; one if the axis has no length."""
        span = self.high - self.low
        if not span:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(span / 3))
        steps = [factor * power for factor in (10, 5, 2, 1)]
        return next(found for found in map(self._multiples, steps) if len(found) > 1)

    def _multiples(self, step: float) -> list[float]:
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]


def _axis(scale: Scale, height: float, title: str) -> str:
    floor = height - BOTTOM + 4
    parts = [line(scale.start, floor, scale.end, floor, "axis")]
    for tick in scale.ticks():
        parts.append(line(scale(tick), floor, scale(tick), floor + 4, "axis"))
        parts.append(f'<text x="{scale(tick):.1f}" y="{floor + 18:.1f}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text x="{(scale.start + scale.end) / 2:.1f}" y="20" text-anchor="middle">{html.escape(title)}</text>'
    )
    return "".join(parts)


def _upright(x: float, height: float, kind: str) -> str:
    return line(x, TOP, x, height - BOTTOM, kind)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Return a line between two points, of a class of the style."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def svg(height: float, parts: Iterable[str]) -> str:
    """Return a picture of the width of a page."""
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">'
    )
    page = f'<rect class="page" width="{WIDTH}" height="{height}"/>'
    return "\n".join([opening, f"<style>{STYLE}</style>", page, *parts, "</svg>"]) + "\n"
