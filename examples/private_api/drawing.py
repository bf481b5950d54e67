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
WIDTH, HEIGHT, SMALL_HEIGHT = 860, 400, 230  # of the figure, of one panel, of each of several
LEFT, TOP, BOTTOM = 46, 14, 44  # of a panel, around its axes
TITLE_WIDTH = 20  # of the y axis, of a single panel
TITLE_HEIGHT, LABEL_HEIGHT = 20, 17


class Band(NamedTuple):
    """One line: its mean and the range of its seeds at each number of samples."""

    samples: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Frame(NamedTuple):
    """Where the axes of a panel are."""

    left: float
    right: float
    top: float
    bottom: float
    last: int  # samples at the right end

    def x(self, samples: float) -> float:
        """Position of a number of samples."""
        return self.left + samples / self.last * (self.right - self.left)

    def y(self, value: float) -> float:
        """Position of a value in [0, 1]."""
        return self.bottom - value * (self.bottom - self.top)

    def points(self, samples: Sequence[int], values: Sequence[float]) -> str:
        """Positions of several, as SVG has them."""
        return " ".join(
            f"{self.x(at):.1f},{self.y(value):.1f}" for at, value in zip(samples, values, strict=True)
        )


def draw(
    panels: Mapping[str, Mapping[str, Band]], title: str, *, columns: int = 1, label_width: int = 290
) -> str:
    """Mean lines between bands from the least to the largest seed, with labels at their ends.

    Args:
        panels: lines by name, by the heading of their panel; values in [0, 1].
        title: what the y axis is; a single panel has it beside the axis.
        columns: panels side by side.
        label_width: space for the labels at the right of a panel.

    Returns:
        The SVG element, the same for the same panels.
    """
    names = list(dict.fromkeys(name for bands in panels.values() for name in bands))
    styles = {
        name: (COLORS[i % len(COLORS)], DASHES[i // len(COLORS) % len(DASHES)])
        for i, name in enumerate(names)
    }
    last = max(band.samples[-1] for bands in panels.values() for band in bands.values())
    rows = math.ceil(len(panels) / columns)
    labels = max(len(bands) for bands in panels.values())
    above = TOP + (TITLE_HEIGHT if any(panels) else 0)
    height = max(HEIGHT if len(panels) == 1 else SMALL_HEIGHT, above + BOTTOM + LABEL_HEIGHT * labels)
    width = WIDTH / columns
    margin = LEFT + (TITLE_WIDTH if len(panels) == 1 else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {rows * height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{TEXT}">',
        f"<title>{escape(title)} against samples</title>",
    ]
    for place, (heading, bands) in enumerate(panels.items()):
        left, top = place % columns * width, place // columns * height
        frame = Frame(left + margin, left + width - label_width, top + above, top + height - BOTTOM, last)
        if heading:
            parts.append(
                f'<text x="{frame.left:.1f}" y="{top + TOP + 2}" font-weight="600">{escape(heading)}</text>'
            )
        parts += [*_axes(frame), *_lines(frame, bands, styles), *_labels(frame, bands, styles)]
        if len(panels) == 1:
            place = f'transform="translate(14 {(frame.top + frame.bottom) / 2:.1f}) rotate(-90)"'
            parts.append(f'<text {place} text-anchor="middle">{escape(title)}</text>')
    return "\n".join([*parts, "</svg>"])


def _axes(frame: Frame) -> list[str]:
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = frame.y(tick)
        parts.append(
            f'<path d="M{frame.left:.1f} {at:.1f}H{frame.right:.1f}" stroke="{TEXT}" opacity=".25"/>'
        )
        parts.append(f'<text x="{frame.left - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for samples in ticks(frame.last, at_most=max(2, int((frame.right - frame.left) / 70))):
        parts.append(
            f'<text x="{frame.x(samples):.1f}" y="{frame.bottom + 20:.1f}" text-anchor="middle">{samples}</text>'
        )
    middle = (frame.left + frame.right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{frame.bottom + 38:.1f}" text-anchor="middle">samples</text>')
    return parts


def _lines(frame: Frame, bands: Mapping[str, Band], styles: Mapping[str, tuple[str, str]]) -> list[str]:
    parts = []
    for name, band in bands.items():
        outline = frame.points(band.samples + band.samples[::-1], band.high + band.low[::-1])
        parts.append(f'<polygon points="{outline}" fill="{styles[name][0]}" opacity=".15"/>')
    for name, band in bands.items():
        color, dash = styles[name]
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(
            f'<polyline points="{frame.points(band.samples, band.mean)}" fill="none" stroke="{color}" '
            f'stroke-width="2.5" stroke-linejoin="round"{dashes}/>'
        )
    return parts


def _labels(frame: Frame, bands: Mapping[str, Band], styles: Mapping[str, tuple[str, str]]) -> list[str]:
    """The last mean and the name of each line, joined to its end."""
    parts = []
    places = label_places({name: frame.y(band.mean[-1]) for name, band in bands.items()}, frame.bottom)
    for name, place in places.items():
        band, color = bands[name], styles[name][0]
        start, end = frame.x(band.samples[-1]) + 2, frame.right + 14
        parts.append(
            f'<path d="M{start:.1f} {frame.y(band.mean[-1]):.1f}L{end:.1f} {place:.1f}" stroke="{color}" '
            'opacity=".5"/>'
        )
        parts.append(
            f'<text x="{end + 4:.1f}" y="{place + 4:.1f}" fill="{color}" font-weight="600">'
            f"{band.mean[-1]:.2f} {escape(name)}</text>"
        )
    return parts


def ticks(last: int, *, at_most: int) -> list[int]:
    """Round numbers of samples from 0 to `last`.

    Example:
        >>> ticks(9600, at_most=6)
        [0, 2000, 4000, 6000, 8000]
    """
    power = 10 ** max(0, int(math.log10(last)) - 1)
    step = next(s for s in (power * m for m in (1, 2, 5, 10, 20, 50, 100)) if last / s < at_most)
    return list(range(0, last + 1, step))


def label_places(ends: Mapping[str, float], bottom: float) -> dict[str, float]:
    """Where labels are written: near the ends of their lines, without overlap, above the bottom.

    Example:
        >>> label_places({"a": 100.0, "b": 100.0}, bottom=110.0)
        {'a': 93.0, 'b': 110.0}
    """
    order = sorted(ends, key=lambda name: ends[name])
    places: dict[str, float] = {}
    lowest = -math.inf
    for name in order:
        places[name] = max(ends[name], lowest + LABEL_HEIGHT)
        lowest = places[name]
    limit = bottom
    for name in reversed(order):
        places[name] = min(places[name], limit)
        limit = places[name] - LABEL_HEIGHT
    return places
