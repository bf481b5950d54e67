"""The curves of one or two runs as shapes of SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .run import Run

WIDTH, HEIGHT = 280, 170
LEFT, RIGHT, TOP, BOTTOM = 55, 8, 20, 24
# Beyond it, the differences and sums of an axis are no finite numbers.
_LARGEST = 1e300
# Points of a series, of which more are averaged, and those from which on it is also smoothed.
_MOST_POINTS, _SMOOTHED_FROM = 400, 16
_TICKS = 4
# The label of a mark: its height and least width, the width of a character, and the numbers that it lists.
_LABEL, _CHARACTER, _LISTED = 16.0, 6.0, 3


class Metric(NamedTuple):
    """A series of a panel: its label and the names that it may have in the log, the first of them that is there."""

    label: str
    names: tuple[str, ...]


class Panel(NamedTuple):
    """A chart.

    Args:
        title: of the chart.
        unit: of its values.
        metrics: its series.
        warnings: names of the warnings that belong to it.
        share: its values are in [0, 1].
    """

    title: str
    unit: str
    metrics: tuple[Metric, ...]
    warnings: tuple[str, ...] = ()
    share: bool = False


def _ours(label: str, *names: str) -> Metric:
    return Metric(label, tuple(f"self_distillation/{name}" for name in names))


PANELS = (
    Panel(
        "Reward",
        "mean of a batch",
        (Metric("training", ("reward",)), Metric("held-out", ("eval_reward",))),
        ("held_out", "reward"),
    ),
    Panel(
        "Divergence",
        "nats per token with a loss",
        (_ours("teacher to student", "divergence"),),
        ("agreement", "mass", "endings"),
    ),
    Panel(
        "log q − log p",
        "mean of the sampled tokens, nats",
        (_ours("log q − log p", "sampled_token_log_ratio"),),
    ),
    Panel(
        "Entropy",
        "nats per token",
        (
            Metric("student", ("self_distillation/student_entropy", "entropy")),
            _ours("teacher", "teacher_entropy"),
        ),
        ("entropy",),
    ),
    Panel(
        "Signal",
        "share of rows",
        (
            _ours("any", "reprompt_sample_fraction"),
            _ours("demonstration", "success_sample_fraction"),
            _ours("feedback", "feedback_used_fraction"),
        ),
        ("no_signal", "ceiling", "truncated", "dropped", "answer_in_feedback"),
        share=True,
    ),
    Panel(
        "Length",
        "tokens of a completion",
        (Metric("mean", ("completions/mean_length",)),),
        ("collapse",),
    ),
    Panel(
        "Cut at the length limit",
        "share of completions",
        (Metric("cut", ("completions/clipped_ratio",)),),
        ("length_limit",),
        share=True,
    ),
    Panel(
        "Text of the templates",
        "share of completions",
        (_ours("repeated", "reprompt_text_fraction"),),
        share=True,
    ),
    Panel(
        "Distance of the teacher",
        "of its weights, relative to the student's",
        (_ours("teacher to student", "teacher_distance"),),
    ),
)


class Tick(NamedTuple):
    """A mark of an axis: its place and its text."""

    at: float
    text: str


class Line(NamedTuple):
    """A series as drawn.

    Args:
        label: with the run's name where there are two.
        colour: number of its colour.
        dash: number of its dashes.
        path: of the values.
        smooth: path of their moving average; empty where they are few.
        steps: of its points.
        values: of its points.
    """

    label: str
    colour: int
    dash: int
    path: str
    smooth: str
    steps: list[int]
    values: list[float]


class Mark(NamedTuple):
    """One or several warnings as drawn: where their numbers would overlap, they have one label.

    Args:
        places: of the warnings, each a line.
        at: middle of the label.
        width: of the label.
        label: their numbers in the list of warnings.
        text: their messages.
    """

    places: list[float]
    at: float
    width: float
    label: str
    text: str


class Chart(NamedTuple):
    """A panel as drawn."""

    title: str
    unit: str
    lines: list[Line]
    marks: list[Mark]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    first: int
    last: int
    summary: str


def charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each panel of which a run has values.

    Args:
        runs: one or two.
    """
    return [chart for panel in PANELS if (chart := _chart(panel, runs)) is not None]


def _chart(panel: Panel, runs: Sequence[Run]) -> Chart | None:
    found = [
        (number, index, metric.label, series)
        for number, run in enumerate(runs)
        for index, metric in enumerate(panel.metrics)
        if (series := _series(run.history, metric))
    ]
    if not found:
        return None
    points = [point for *_, series in found for point in series]
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    values = [value for _, value in points]
    low, high, y_ticks = _axis(min(values), max(values), share=panel.share)
    x = _scale(first, last, LEFT, WIDTH - RIGHT)
    y = _scale(low, high, HEIGHT - BOTTOM, TOP)
    lines = []
    for number, index, label, series in found:
        smooth = _smoothed(series)
        lines.append(
            Line(
                label=_label(panel, label, runs, number),
                colour=number if len(runs) > 1 else index,
                dash=index if len(runs) > 1 else 0,
                path=_path(series, x, y),
                smooth=_path(smooth, x, y) if smooth else "",
                steps=[step for step, _ in series],
                values=[value for _, value in series],
            )
        )
    return Chart(
        panel.title,
        panel.unit,
        lines,
        _marks(panel, runs, x, first, last),
        [Tick(x(step), str(step)) for step in _steps(first, last)],
        [Tick(y(value), text) for value, text in y_ticks],
        first,
        last,
        "; ".join(
            f"{line.label}: {_number(line.values[0])} at step {line.steps[0]}, {_number(line.values[-1])} at step "
            f"{line.steps[-1]}"
            for line in lines
        ),
    )


def _label(panel: Panel, label: str, runs: Sequence[Run], number: int) -> str:
    if len(runs) == 1:
        return label
    name = runs[number].name
    return name if len(panel.metrics) == 1 else f"{name}: {label}"


def _marks(panel: Panel, runs: Sequence[Run], x: Any, first: int, last: int) -> list[Mark]:
    warnings = enumerate((warning for run in runs for warning in run.warnings), 1)
    found = [
        (x(min(max(warning.step, first), last)), number, warning.message)
        for number, warning in warnings
        if warning.name in panel.warnings
    ]
    marks: list[Mark] = []
    groups: list[list[tuple[float, int, str]]] = []
    for one in sorted(found):
        group = [one]
        # A label grows as it takes others in, and may then reach the one before.
        while marks and _mark(group).at - marks[-1].at < (_mark(group).width + marks[-1].width) / 2:
            marks.pop()
            group = groups.pop() + group
        groups.append(group)
        marks.append(_mark(group))
    return marks


def _mark(group: Sequence[tuple[float, int, str]]) -> Mark:
    """The mark of warnings, each with its place, number and message."""
    places = sorted({place for place, *_ in group})
    texts = {number: text for _, number, text in group}
    numbers = sorted(texts)
    label = ", ".join(map(str, numbers)) if len(numbers) <= _LISTED else f"{numbers[0]} … {numbers[-1]}"
    width = max(_LABEL, _CHARACTER * len(label) + _LABEL / 2)
    middle = (places[0] + places[-1]) / 2
    text = "\n".join(f"{number}: {texts[number]}" for number in numbers)
    return Mark(
        places,
        round(min(max(middle, width / 2), WIDTH - width / 2), 1),
        round(width, 1),
        label,
        text if len(group) > 1 else group[0][2],
    )


def _series(history: Iterable[dict[str, Any]], metric: Metric) -> list[tuple[int, float]]:
    """Step and value of a metric, averaged to a number of points that a page can hold."""
    for name in metric.names:
        points = [(entry["step"], float(entry[name])) for entry in history if _is_number(entry.get(name))]
        if points:
            size = math.ceil(len(points) / _MOST_POINTS)
            groups = [points[i : i + size] for i in range(0, len(points), size)]
            return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _smoothed(series: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The moving average over a tenth of the points; empty for few."""
    if len(series) < _SMOOTHED_FROM:
        return []
    half = max(1, len(series) // 20)
    windows = [series[max(0, i - half) : i + half + 1] for i in range(len(series))]
    return [
        (step, sum(value for _, value in window) / len(window))
        for (step, _), window in zip(series, windows, strict=True)
    ]


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """A linear map of [low, high] to [start, end]; of one value, to the middle."""

    def place(value: float) -> float:
        if low == high:
            return round((start + end) / 2, 1)
        return round(start + (value - low) / (high - low) * (end - start), 1)

    return place


def _axis(low: float, high: float, *, share: bool) -> tuple[float, float, list[tuple[float, str]]]:
    """Ends of the value axis and its ticks; it has 0 where all values have one sign, and all of [0, 1] for a share.

    Examples:
        >>> _axis(0.2, 3.9, share=False)
        (0.0, 4.0, [(0.0, '0'), (1.0, '1'), (2.0, '2'), (3.0, '3'), (4.0, '4')])
    """
    if share:
        return 0.0, 1.0, [(i / 4, f"{i * 25}%") for i in range(5)]
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = low + 1.0
    step = _nice((high - low) / _TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [(i * step, _number(i * step)) for i in range(first, last + 1)]
    return ticks[0][0], ticks[-1][0], ticks


def _nice(step: float) -> float:
    """The next number of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _steps(first: int, last: int) -> list[int]:
    """Round steps between the first and the last, both included."""
    if first == last:
        return [first]
    size = max(1, round(_nice((last - first) / _TICKS)))
    middle = range(math.ceil(first / size) * size, last, size)
    least = (last - first) / 8  # nearer to an end, two labels would overlap
    return [first, *(step for step in middle if step - first > least and last - step > least), last]


def _number(value: float) -> str:
    """Three digits, in few characters: the space beside the axis is narrow.

    Examples:
        >>> [_number(value) for value in (0.0, -0.15, 1500.0, 1.5e-5, 2e6)]
        ['0', '−0.15', '1500', '1.5e−5', '2e6']
    """
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", "−")


def _path(series: Sequence[tuple[int, float]], x: Any, y: Any) -> str:
    points = [f"{x(step)},{y(value)}" for step, value in series]
    if len(points) == 1:  # a line of no length, which round ends make a dot
        points *= 2
    return "M" + " ".join(points)
