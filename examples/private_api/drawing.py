"""Curves as SVG, without a plotting library: readable in light and dark, on a phone and on a wide page.

A module of `report.py` and `figures.py`, and of the embedded demo's report; nothing to run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from style import FIGURE, LINES, PALETTE, PHONE_FONT

DASHES = ("", "6 3", "2 3")  # the next one where all colors are used
# In units of the figure. The sizes leave room for the text on a phone, which is the largest.
WIDTH = 640
HEIGHT, SMALL_HEIGHT = 300, 130  # between the axes of a single panel, of each of several
LEFT, RIGHT = 62, 84  # of a panel, beside its axes
TITLE_HEIGHT, HEADING_HEIGHT, TICKS_HEIGHT = 52, 38, 40
LABEL_HEIGHT, LINE_HEIGHT = 22, 28  # of a value at the end of a line, of a line of the legend
SWATCH = 40
CHARACTER = 0.57 * PHONE_FONT  # mean width
MIDDLE = 'dy=".35em"'  # centers a text vertically


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


class Look(NamedTuple):
    """How the line of a name is drawn."""

    color: str  # a class of the style
    dashes: str  # an attribute


def draw(panels: Mapping[str, Mapping[str, Band]], title: str, *, columns: int = 1) -> str:
    """Mean lines between bands from the smallest to the largest seed, with their last values, above a legend.

    Args:
        panels: lines by name, by the heading of their panel; values in [0, 1].
        title: what the values are.
        columns: panels side by side.

    Returns:
        The SVG element with its style, the same for the same panels.
    """
    names = dict.fromkeys(name for bands in panels.values() for name in bands)
    looks = {name: _look(i) for i, name in enumerate(names)}
    # A run that was interrupted early has its evaluation before training alone, after 0 samples.
    last = max([1, *(band.samples[-1] for bands in panels.values() for band in bands.values())])
    above = HEADING_HEIGHT if any(panels) else 0
    inside = HEIGHT if len(panels) == 1 else SMALL_HEIGHT
    width, height = WIDTH / columns, above + inside + TICKS_HEIGHT
    below = TITLE_HEIGHT + math.ceil(len(panels) / columns) * height
    legend, end = _legend(looks, below + LINE_HEIGHT / 2)
    heading = f"{title[0].upper()}{title[1:]} over samples"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {end:.0f}" role="img" class="figure">',
        f"<title>{escape(heading)}</title>",
        f"<style>\n{PALETTE}{FIGURE}</style>",
        f'<rect class="card" width="{WIDTH}" height="{end:.0f}" rx="10"/>',
        f'<text class="heading" x="16" y="24" {MIDDLE}>{escape(heading)}</text>',
    ]
    for place, (name, bands) in enumerate(panels.items()):
        left, top = place % columns * width, TITLE_HEIGHT + place // columns * height
        frame = Frame(left + LEFT, left + width - RIGHT, top + above, top + above + inside, last)
        if name:
            at = f'x="{left + 16:.1f}" y="{top + 12:.1f}"'
            parts.append(f'<text class="heading" {at} {MIDDLE}>{escape(name)}</text>')
        parts += [*_axes(frame), *_lines(frame, bands, looks), *_values(frame, bands, looks)]
    return "\n".join([*parts, *legend, "</svg>"])


def _look(number: int) -> Look:
    dash = DASHES[number // LINES % len(DASHES)]
    return Look(f"c{number % LINES}", f' stroke-dasharray="{dash}"' if dash else "")


def _axes(frame: Frame) -> list[str]:
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = frame.y(tick)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {at:.1f}H{frame.right:.1f}"/>')
        parts.append(
            f'<text x="{frame.left - 8:.1f}" y="{at:.1f}" {MIDDLE} text-anchor="end">{tick:g}</text>'
        )
    for samples in ticks(frame.last, at_most=max(2, int((frame.right - frame.left) / 80))):
        place = f'x="{frame.x(samples):.1f}" y="{frame.bottom + 20:.1f}"'
        parts.append(f'<text {place} {MIDDLE} text-anchor="middle">{samples}</text>')
    return parts


def _lines(frame: Frame, bands: Mapping[str, Band], looks: Mapping[str, Look]) -> list[str]:
    parts = []
    for name, band in bands.items():
        outline = frame.points(band.samples + band.samples[::-1], band.high + band.low[::-1])
        parts.append(f'<polygon class="band {looks[name].color}" points="{outline}"/>')
    for name, band in bands.items():
        points = frame.points(band.samples, band.mean)
        parts.append(f'<polyline class="line {looks[name].color}" points="{points}"{looks[name].dashes}/>')
    return parts


def _values(frame: Frame, bands: Mapping[str, Band], looks: Mapping[str, Look]) -> list[str]:
    """The last mean of each line, joined to its end."""
    parts = []
    places = label_places({name: frame.y(band.mean[-1]) for name, band in bands.items()}, frame.bottom)
    for name, place in places.items():
        band, color = bands[name], looks[name].color
        start, end = frame.x(band.samples[-1]) + 2, frame.right + 14
        line = f"M{start:.1f} {frame.y(band.mean[-1]):.1f}L{end:.1f} {place:.1f}"
        parts.append(f'<path class="link {color}" d="{line}"/>')
        at = f'x="{end + 4:.1f}" y="{place:.1f}"'
        parts.append(f'<text class="value {color}" {at} {MIDDLE}>{band.mean[-1]:.2f}</text>')
    return parts


def _legend(looks: Mapping[str, Look], top: float) -> tuple[list[str], float]:
    """The name of each line, in as many columns as the longest name leaves, and where the legend ends."""
    longest = SWATCH + CHARACTER * max(map(len, looks))
    columns = max(1, min(len(looks), int((WIDTH - 16) / (longest + 16))))
    parts = []
    for number, (name, look) in enumerate(looks.items()):
        x = 16 + number % columns * (WIDTH - 16) / columns
        y = top + number // columns * LINE_HEIGHT
        parts.append(f'<path class="line {look.color}" d="M{x:.1f} {y:.1f}h{SWATCH - 12}"{look.dashes}/>')
        parts.append(f'<text x="{x + SWATCH:.1f}" y="{y:.1f}" {MIDDLE}>{escape(name)}</text>')
    return parts, top + math.ceil(len(looks) / columns) * LINE_HEIGHT


def ticks(last: int, *, at_most: int) -> list[int]:
    """Round numbers of samples from 0 to `last`.

    Examples:
        >>> ticks(9600, at_most=6)
        [0, 2000, 4000, 6000, 8000]
    """
    power = 10 ** max(0, int(math.log10(last)) - 1)
    step = next(s for s in (power * m for m in (1, 2, 5, 10, 20, 50, 100)) if last / s < at_most)
    return list(range(0, last + 1, step))


def label_places(ends: Mapping[str, float], bottom: float) -> dict[str, float]:
    """Where labels are written: near the ends of their lines, without overlap, above the bottom.

    Examples:
        >>> label_places({"a": 100.0, "b": 100.0}, bottom=110.0)
        {'a': 88.0, 'b': 110.0}
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
