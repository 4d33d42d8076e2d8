"""The report's charts as SVG text: every group has its name, so that colour only helps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from monai_iou.evaluation.columns import Column
from monai_iou.evaluation.svg import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Point,
    dots,
    figure,
    line,
    marker,
    shortened,
    text,
    x_axis,
    y_axis,
)
from monai_iou.metrics.lesion_maps import ROUNDING
from monai_iou.tables import counted

ROW = 58
FEW_POINTS = 25
NAME = 72  # characters of a name that fit above its row


def distribution(groups: Mapping[str, Sequence[Point]], title: str, bounded: bool) -> str:
    """One row per group: a dot per case, the box of the quartiles, the median as a bar, and whiskers.

    The whiskers end at the last values within 1.5 times the box's length from it (Tukey 1977).

    Args:
        groups: points by group name; `x` is the value and `y` is not used.
        title: what the values are, with the unit; the axis label.
        bounded: whether the axis is that of a score from 0 to 1.
    """
    values = [point.x for points in groups.values() for point in points]
    high = 1.0 if bounded else max([*values, 1e-6]) * 1.05
    height = TOP + ROW * len(groups) + BOTTOM
    axis = Axis(0.0, high, 24, WIDTH - RIGHT)
    parts = [x_axis(axis, height, title)]
    for row, (name, points) in enumerate(groups.items()):
        top = TOP + ROW * row
        parts.append(text(24, top + 12, f"{shortened(name, NAME)} (n = {len(points)})", "start", "name"))
        parts += _box([point.x for point in points], axis, top + 36)
        # Dots are spread by their order, the same in every run, so that equal values stay visible.
        middle = float(np.median([point.x for point in points])) if points else 0.0
        places = [(axis(p.x), top + 36 + ((i * 7) % 13 - 6) * 1.5, p.note) for i, p in enumerate(points)]
        parts += dots(places, [abs(point.x - middle) for point in points], 2.6)
    return figure(height, f"Distribution of {title} for each label", parts)


def _box(values: Sequence[float], axis: Axis, middle: float) -> list[str]:
    if not values:
        return []
    low, median, high = (float(value) for value in np.percentile(values, [25, 50, 75]))
    reach = 1.5 * (high - low)
    ends = min(v for v in values if v >= low - reach), max(v for v in values if v <= high + reach)
    width = max(axis(high) - axis(low), 1.0)
    return [
        *(line(axis(end), middle - 6, axis(end), middle + 6, "whisker") for end in ends),
        line(axis(ends[0]), middle, axis(min(low, median)), middle, "whisker"),
        line(axis(high), middle, axis(ends[1]), middle, "whisker"),
        f'<rect class="box" x="{axis(low):.1f}" y="{middle - 12:.1f}" width="{width:.1f}" height="24"/>',
        line(axis(median), middle - 12, axis(median), middle + 12, "median"),
    ]


def recall_chart(lesions: Sequence[tuple[float, bool]], title: str) -> str:
    """Share of the reference's lesions that were found, by volume, with Wilson's 95 % intervals.

    Args:
        lesions: volume in mm^3 and whether it was found.
        title: the axis label.
    """
    bins: dict[int, list[bool]] = {}
    least = min((volume for volume, _ in lesions if volume > 0), default=1.0)  # 0 has no logarithm
    for volume, detected in lesions:
        # The volume of a voxel of an oblique affine is off by some digits: 10 mm^3 is not below 10.
        bins.setdefault(math.floor(math.log10(max(volume, least) / (1 - ROUNDING))), []).append(detected)
    height = 260
    y = Axis(0.0, 1.0, height - BOTTOM, TOP)
    parts = [y_axis(y, "Share of lesions found")]
    width = (WIDTH - LEFT - RIGHT) / max(1, len(bins))
    for i, (power, hits) in enumerate(sorted(bins.items())):
        middle = LEFT + width * (i + 0.5)
        share, n = sum(hits) / len(hits), len(hits)
        low, high = _wilson(share, n)
        bar = min(width * 0.6, 56)
        parts.append(
            f'<rect class="bar" x="{middle - bar / 2:.1f}" y="{y(share):.1f}" width="{bar:.1f}" '
            f'height="{y(0) - y(share):.1f}"><title>{sum(hits)} of {n} lesions found</title></rect>'
        )
        parts.append(line(middle, y(low), middle, y(high), "whisker"))
        parts.append(text(middle, height - BOTTOM + 15, f"{_power(power)} to {_power(power + 1)}", "middle", "small"))
        parts.append(text(middle, height - BOTTOM + 28, f"{sum(hits)}/{n}", "middle", "small"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, height - 2, title, "middle", "small"))
    return figure(height, "Share of lesions found by lesion volume", parts)


def bland_altman(points: Sequence[Point]) -> str:
    """Prediction minus reference volume against their mean, with the mean difference and the limits of agreement.

    Args:
        points: of one label; `x` the mean and `y` the difference, in ml. Limits: mean +- 1.96 standard deviations of
            the difference (Bland and Altman 1986), for three points or more.
    """
    differences = np.array([point.y for point in points] or [0.0])
    limits = len(points) > 2
    mean, spread = float(differences.mean()), 1.96 * float(differences.std(ddof=1)) if limits else 0.0
    # Volumes may be tiny: only an axis of no length at all is given one.
    reach = (max(float(abs(differences).max()), abs(mean) + spread) or 1e-3) * 1.15
    height = 300
    largest = max((point.x for point in points), default=0.0) or 1.0
    x, y = Axis(0.0, largest * 1.05, LEFT, WIDTH - RIGHT), Axis(-reach, reach, height - BOTTOM, TOP)
    parts = [x_axis(x, height, "Mean of prediction and reference, ml"), y_axis(y, "Prediction - reference, ml")]
    # Each text has a place of its own beside its line, as the lines may lie on each other.
    lines = (
        ("mean", mean, "median", LEFT + 4, -4, "start"),
        ("+1.96 SD", mean + spread, "limit", WIDTH - RIGHT, -4, "end"),
        ("-1.96 SD", mean - spread, "limit", WIDTH - RIGHT, 12, "end"),
    )
    for name, value, kind, place, shift, anchor in lines if limits else lines[:1]:
        parts.append(line(LEFT, y(value), WIDTH - RIGHT, y(value), kind))
        parts.append(text(place, y(value) + shift, f"{name} {value:+.3g} ml", anchor, "small"))
    places = [(x(point.x), y(point.y), point.note) for point in points]
    parts += dots(places, [abs(point.y - mean) for point in points], 4)
    return figure(height, "Prediction against reference volume (Bland-Altman)", parts)


def paired(points: Sequence[Point], first: str, second: str, column: Column) -> str:
    """Each case's score in two evaluations, one against the other, with the line on which both are the same.

    Args:
        points: `x` the first evaluation's score and `y` the second's.
        first: name of the first, along the horizontal axis.
        second: name of the second.
        column: the score.
    """
    values = [value for point in points for value in (point.x, point.y)]
    high = 1.0 if column.bounded else max([*values, 1e-6]) * 1.05
    height = 420
    x, y = Axis(0.0, high, LEFT, WIDTH - RIGHT), Axis(0.0, high, height - BOTTOM, TOP)
    parts = [
        x_axis(x, height, shortened(f"{column.title}: {first}", NAME)),
        y_axis(y, shortened(f"{column.title}: {second}", 48)),
        line(x(0), y(0), x(high), y(high), "limit"),
        *dots([(x(p.x), y(p.y), p.note) for p in points], [abs(p.y - p.x) for p in points], 4),
    ]
    better = sum((point.y > point.x) == (column.better == "higher") for point in points if point.x != point.y)
    worse = sum(point.x != point.y for point in points) - better
    verdict = f"{shortened(second, 40)} is better in {counted(better, 'case')}, worse in {worse}"
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, height + 8, verdict, "middle", "small"))
    return figure(height + 14, f"{column.title} of every case in both evaluations", parts)


def forest(rows: Sequence[tuple[str, float, float | None, float | None, str]], title: str) -> str:
    """One row a difference: its interval as a line, its mean as a square, and zero as the dashed line.

    Args:
        rows: name, mean, low and high, or None where there is no interval, and a note such as the p-value.
        title: the axis label.
    """
    ends = [abs(value) for _, *numbers, _ in rows for value in numbers if value is not None]
    reach = max([*ends, 1e-6]) * 1.1
    height = TOP + 26 * len(rows) + BOTTOM
    axis = Axis(-reach, reach, 210, WIDTH - 110)
    parts = [x_axis(axis, height, title), line(axis(0), TOP, axis(0), height - BOTTOM, "limit")]
    for i, (name, mean, low, high, note) in enumerate(rows):
        middle = TOP + 26 * (i + 0.5)
        parts.append(text(200, middle + 4, shortened(name, 32), "end"))
        interval = ""
        if low is not None and high is not None:
            parts.append(line(axis(low), middle, axis(high), middle, "whisker"))
            interval = f" [{low:+.4g}, {high:+.4g}]"
        parts.append(marker("square", axis(mean), middle, f"{name}: {mean:+.4g}{interval}", "dot", 4))
        parts.append(text(WIDTH - 100, middle + 4, note, "start", "small"))
    return figure(height, title, parts)


def curve(lines: Mapping[str, Sequence[Point]], x_label: str, y_label: str, title: str) -> str:
    """Curves of scores from 0 to 1 against a number: the first one solid, the others dashed.

    Args:
        lines: points by name; dots mark them where they are few.
        x_label: the horizontal axis.
        y_label: the vertical axis.
        title: of the figure.
    """
    height = 300
    furthest = max([point.x for points in lines.values() for point in points] or [1.0])
    x, y = Axis(0.0, max(1.0, furthest), LEFT, WIDTH - RIGHT), Axis(0.0, 1.0, height - BOTTOM, TOP)
    parts = [x_axis(x, height, x_label), y_axis(y, y_label)]
    for i, points in enumerate(lines.values()):
        # One line of many points: dashes would start anew at each piece of it.
        places = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in points)
        parts.append(f'<polyline class="{"limit" if i else "whisker"}" points="{places}"/>')
        if len(points) <= FEW_POINTS:
            parts += [marker("circle", x(point.x), y(point.y), point.note, "dot", 3) for point in points]
    drawn = ", ".join(f"{name}: {'dashed' if i else 'solid'}" for i, name in enumerate(lines))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, height + 8, drawn, "middle", "small"))
    return figure(height + 14, title, parts)


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = 1.96
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _power(power: int) -> str:
    """A power of ten as people write it: 1e-6, 0.1, 10, 1k, 100k, 1M."""
    for step, unit in ((6, "M"), (3, "k")):
        if power >= step:
            return f"{10 ** (power - step)}{unit}"
    return f"{10.0**power:g}" if power > -5 else f"1e{power}"
