"""Curves as SVG, without a plotting library: readable on light and dark pages.

A module of `report.py` and `figures.py`; nothing to run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

# On white and on black, each with a contrast of 3 at least.
COLORS = ("#12906a", "#d9622f", "#5b80c9", "#8a8a8a", "#a065b8", "#a8820a", "#c2508a", "#3f8fa3")
DASHES = ("", "6 3", "2 3")  # a dash for each round through the colors
TEXT = "#808080"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 400, 46, 290, 14, 44
LABEL_HEIGHT = 17


class Band(NamedTuple):
    """One line: its mean and the range of its seeds at each number of samples."""

    samples: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def draw(bands: Mapping[str, Band], title: str) -> str:
    """Mean lines between bands from the least to the largest seed, with labels at their ends.

    Args:
        bands: by the name of the line; values in [0, 1].
        title: what the y axis is.

    Returns:
        The SVG element, the same for the same bands.
    """
    last = max(band.samples[-1] for band in bands.values())
    height = max(HEIGHT, TOP + BOTTOM + LABEL_HEIGHT * len(bands))

    def x(samples: float) -> float:
        return LEFT + samples / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return height - BOTTOM - value * (height - TOP - BOTTOM)

    def points(samples: Sequence[int], values: Sequence[float]) -> str:
        return " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in zip(samples, values, strict=True))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{TEXT}">',
        f"<title>{escape(title)} against samples</title>",
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{x(last):.1f}" stroke="{TEXT}" opacity=".25"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for samples in ticks(last):
        parts.append(
            f'<text x="{x(samples):.1f}" y="{height - BOTTOM + 20}" text-anchor="middle">{samples}</text>'
        )
    middle = (LEFT + x(last)) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 6}" text-anchor="middle">samples</text>')
    styles = {
        name: (COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)])
        for i, name in enumerate(bands)
    }
    for name, band in bands.items():
        outline = points(band.samples + band.samples[::-1], band.high + band.low[::-1])
        parts.append(f'<polygon points="{outline}" fill="{styles[name][0]}" opacity=".15"/>')
    for name, band in bands.items():
        color, dash = styles[name]
        parts.append(
            f'<polyline points="{points(band.samples, band.mean)}" fill="none" stroke="{color}" stroke-width="2.5" '
            f'stroke-linejoin="round"{f" stroke-dasharray={dash!r}" if dash else ""}/>'
        )
    places = label_places({name: y(band.mean[-1]) for name, band in bands.items()}, height - BOTTOM)
    for name, place in places.items():
        end = bands[name].mean[-1]
        style = f'fill="{styles[name][0]}" font-weight="600"'
        start = x(bands[name].samples[-1])
        parts.append(
            f'<path d="M{start + 2:.1f} {y(end):.1f}L{x(last) + 14:.1f} {place:.1f}" stroke="{styles[name][0]}" '
            'opacity=".5"/>'
        )
        parts.append(
            f'<text x="{x(last) + 18:.1f}" y="{place + 4:.1f}" {style}>{end:.2f} {escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


def ticks(last: int) -> list[int]:
    """Round numbers of samples from 0 to `last`: six at most.

    Example:
        >>> ticks(9600)
        [0, 2000, 4000, 6000, 8000]
    """
    power = 10 ** max(0, int(math.log10(last)) - 1)
    step = next(s for s in (power * m for m in (1, 2, 5, 10, 20, 50, 100)) if last / s <= 5)
    return list(range(0, last + 1, step))


def label_places(ends: Mapping[str, float], bottom: float) -> dict[str, float]:
    """Where labels are written: near the ends of their lines, without overlap, above the bottom.

    Example:
        >>> label_places({"a": 100.0, "b": 100.0}, bottom=110.0)
        {'a': 93.0, 'b': 110.0}
    """
    places: dict[str, float] = {}
    order = sorted(ends, key=lambda name: ends[name])
    for name in order:
        above = [places[other] for other in places]
        places[name] = max([ends[name], *(place + LABEL_HEIGHT for place in above)])
    limit = bottom
    for name in reversed(order):
        places[name] = min(places[name], limit)
        limit = places[name] - LABEL_HEIGHT
    return places
