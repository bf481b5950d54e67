"""Numbers of the records: means over seeds, and their text.

A module of `run.py`, `report.py` and `figures.py`; nothing to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from drawing import Band

Run = dict[str, Any]  # a record, as `train.py` writes it
PROBABILITY, ACCURACY = 1, 2  # columns of a run's points, after the samples
# `accuracy` of a run: the judge's on greedy completions, or the share of right ones among those sampled.
JUDGED, SAMPLED = "judged", "sampled"
# A run has fallen if its accuracy stays below the first number times the best before, to the end. A run whose best
# is below the second number has learned nothing that it could lose.
FALLEN, LEARNED = 0.8, 0.1
BEST_FROM = 0.5  # accuracy of a run that learned enough to see it go up and down


def model_name(given: str) -> str:
    """What a record calls a model: its hub id, or the name of its folder without the path to it.

    Examples:
        >>> model_name("Qwen/Qwen2.5-Coder-0.5B-Instruct")
        'Qwen/Qwen2.5-Coder-0.5B-Instruct'
    """
    return Path(given).name if Path(given).is_dir() else given


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each arm, in the order in which they come."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run["arm"], []).append(run)
    return grouped


def values(runs: Sequence[Run], column: int) -> dict[int, list[float]]:
    """One value per seed, at each number of samples that all seeds have."""
    curves = [{point[0]: point[column] for point in run["points"]} for run in runs]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not shared:
        names = ", ".join(f"{run['arm']}, seed {run['seed']}" for run in runs)
        raise ValueError(
            f"points: expected an evaluation after the same number of samples in every run of an arm, got none of "
            f"{names}; leave out the records of runs that were interrupted before"
        )
    return {samples: [curve[samples] for curve in curves] for samples in shared}


def mean_curve(runs: Sequence[Run], column: int) -> list[tuple[int, float]]:
    """The mean over seeds at each number of samples that all seeds have."""
    return [(samples, fmean(seeds)) for samples, seeds in values(runs, column).items()]


def band(runs: Sequence[Run], column: int) -> Band:
    """The mean over seeds, and their range."""
    seeds = values(runs, column)
    return Band(
        list(seeds),
        [fmean(of) for of in seeds.values()],
        [min(of) for of in seeds.values()],
        [max(of) for of in seeds.values()],
    )


def table(runs: Sequence[Run], column: int = ACCURACY) -> tuple[list[int], list[tuple[str, list[float]]]]:
    """Up to seven numbers of samples, and each arm's mean there; an arm that ended earlier shows its last."""
    means = {arm: mean_curve(group, column) for arm, group in by_arm(runs).items()}
    ticks = [samples for samples, _ in max(means.values(), key=len)]
    chosen = sorted({ticks[round(i * (len(ticks) - 1) / 6)] for i in range(7)})
    rows = []
    for arm, points in means.items():
        rows.append((arm, [[value for at, value in points if at <= samples][-1] for samples in chosen]))
    return chosen, rows


def best(run: Run) -> float:
    """The largest accuracy of a run."""
    return max(point[ACCURACY] for point in run["points"])


def at(run: Run, samples: int, column: int) -> float:
    """The value of a run at its last evaluation within a number of samples."""
    return float([point[column] for point in run["points"] if point[0] <= samples][-1])


def fall(run: Run, share: float = FALLEN) -> int | None:
    """Samples from which on the accuracy is below a share of its best so far, to the end; `None` if it is not.

    Examples:
        >>> fall({"points": [[0, 0, 0.0], [64, 0, 0.5], [128, 0, 0.3], [192, 0, 0.1]]})
        128
        >>> fall({"points": [[0, 0, 0.0], [64, 0, 0.5], [128, 0, 0.3], [192, 0, 0.5]]}) is None
        True
    """
    largest, start = 0.0, None
    for samples, _, accuracy in run["points"]:
        largest = max(largest, accuracy)
        if accuracy >= share * largest:
            start = None
        elif start is None:
            start = samples
    return start if largest >= LEARNED else None


def lowest_share(run: Run, best_from: float = BEST_FROM) -> tuple[float, int | None]:
    """The lowest accuracy as a share of the best until then, and the samples there, once the best is `best_from`.

    Examples:
        >>> lowest_share({"points": [[0, 0, 0.0], [64, 0, 0.4], [128, 0, 0.8], [192, 0, 0.2], [256, 0, 0.8]]})
        (0.25, 192)
    """
    largest, lowest, place = 0.0, 1.0, None
    for samples, _, accuracy in run["points"]:
        largest = max(largest, accuracy)
        if largest >= best_from and accuracy < lowest * largest:
            lowest, place = accuracy / largest, int(samples)
    return lowest, place


def summary(runs: Sequence[Run]) -> str:
    """The held-out accuracy of every arm, as text."""
    chosen, rows = table(runs)
    width = max(len(arm) for arm, _ in rows) + 2
    lines = ["held-out accuracy".ljust(width) + "".join(f"{samples:>8}" for samples in chosen)]
    lines += [arm.ljust(width) + "".join(f"{value:8.2f}" for value in means) for arm, means in rows]
    return "\n".join(lines)


def one_line(run: Run) -> str:
    """What came out of a run."""
    samples, probability, accuracy = run["points"][-1]
    state = "" if run["complete"] else " (incomplete)"
    return (
        f"{run['arm']}, seed {run['seed']}: accuracy {accuracy:.2f}, best {best(run):.2f}, "
        f"probability {probability:.2f} after {samples} samples{state}, {run['seconds']:.0f} s"
    )
