"""How far the limits of the trainer's warnings are from the recorded runs.

Computed from the records alone, not by the monitors. A module of `tables.py`; nothing to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from curves import ACCURACY, Run, fall
from replay import COLLAPSED, EARLY, entries

from sdpo_rl.diagnose.monitors import FALLEN_EVALUATIONS, HELD_OUT_FALL, LONG_WINDOW, WINDOW

LIMIT, ENTROPY, REWARD = "completions/clipped_ratio", "self_distillation/student_entropy", "reward"


def rises(run: Run, name: str, window: int = LONG_WINDOW) -> list[tuple[int, float]]:
    """Samples, and the mean of the last values of a metric less that of the first.

    Args:
        run: a record with the log of every step.
        name: of the metric.
        window: the last values; those before the first count as the start.
    """
    samples: list[int] = []
    values: list[float] = []
    found = []
    for entry in entries(run):
        if name in entry:
            values.append(entry[name])
            samples.append(int(entry["step"]) * run["samples_per_step"])
    start = fmean(values[:WINDOW])
    for seen in range(WINDOW, len(values) + 1):
        last = values[:seen][-window:]
        found.append((samples[seen - 1], sum(value - start for value in last) / window))
    return found


def in_time(run: Run) -> int:
    """The samples after which a warning is no longer early; all of a run that does not collapse."""
    fell = fall(run, COLLAPSED)
    return int(run["points"][-1][0]) if fell is None else fell - EARLY


def most_at_limit(run: Run, *, uncertain: bool) -> float:
    """The largest rise of the completions at the length limit, in time.

    Args:
        run: a record with the log of every step.
        uncertain: where the student's entropy is above the start's, or where it is not.
    """
    entropy = dict(rises(run, ENTROPY))
    now = 0.0  # of the entropy, which some steps do not have
    largest = 0.0
    for samples, rise in rises(run, LIMIT):
        now = entropy.get(samples, now)
        if samples <= in_time(run) and (now > 0) == uncertain:
            largest = max(largest, rise)
    return largest


def most_entropy(run: Run) -> float:
    """The largest entropy of the student over the start's, in time."""
    start = fmean([entry[ENTROPY] for entry in entries(run) if ENTROPY in entry][:WINDOW])
    return max(1 + rise / start for samples, rise in rises(run, ENTROPY, WINDOW) if samples <= in_time(run))


def most_reward(run: Run) -> float:
    """The largest fall of the training reward from its best mean, over the range of rewards until then, in time."""
    rewards = [(int(entry["step"]) * run["samples_per_step"], entry[REWARD]) for entry in entries(run)]
    best, largest = -math.inf, 0.0
    for end in range(LONG_WINDOW, len(rewards) + 1):
        seen = [reward for _, reward in rewards[:end]]
        now, extent = fmean(seen[-LONG_WINDOW:]), max(seen) - min(seen)
        best = max(best, now)
        if extent > 0 and rewards[end - 1][0] <= in_time(run):
            largest = max(largest, (best - now) / extent)
    return largest


def most_held_out(run: Run) -> float:
    """The largest fall of the held-out accuracy while that of training did not fall so far, to the end of the run.

    From the best mean of some evaluations in succession to the largest of as many, over the range of both
    accuracies until then.
    """
    size = FALLEN_EVALUATIONS
    seen: list[tuple[float, float]] = []
    largest = 0.0
    rewards = {
        int(entry["step"]) * run["samples_per_step"]: entry[REWARD]
        for entry in entries(run)
        if REWARD in entry
    }
    for before, point in zip(run["points"], run["points"][1:], strict=False):
        trained = [reward for samples, reward in rewards.items() if before[0] < samples <= point[0]]
        seen.append((point[ACCURACY], fmean(trained)))
        extent = max(map(max, seen)) - min(map(min, seen))
        if len(seen) < 2 * size or extent == 0:
            continue
        groups = [seen[end - size : end] for end in range(size, len(seen) - size + 1)]
        means = [(fmean(held for held, _ in group), fmean(reward for _, reward in group)) for group in groups]
        best, trained_then = max(means, key=lambda mean: mean[0])
        share = (best - max(held for held, _ in seen[-size:])) / extent
        trained_fall = (trained_then - fmean(reward for _, reward in seen[-size:])) / extent
        if trained_fall <= HELD_OUT_FALL:
            largest = max(largest, share)
    return largest


def left_out(kept: Sequence[float], collapsed: Sequence[float]) -> int:
    """How many numbers are on their side of the middle between the largest and the smallest of the others.

    Args:
        kept: of runs that are to be below.
        collapsed: of runs that are to be above.

    Example:
        >>> left_out([0.0, 0.1], [0.3, 0.5])
        4
        >>> left_out([0.0, 0.1, 0.25], [0.3, 0.5])
        4
    """
    right = 0
    for index, value in enumerate(kept):
        others = [*kept[:index], *kept[index + 1 :]]
        right += value < (max(others) + min(collapsed)) / 2
    for index, value in enumerate(collapsed):
        others = [*collapsed[:index], *collapsed[index + 1 :]]
        right += value >= (max(kept) + min(others)) / 2
    return right


def standard_error(run: Run) -> float:
    """Of the largest rise of the completions at the length limit in time, by the number of completions."""
    shares = [entry[LIMIT] for entry in entries(run)]
    start, completions = fmean(shares[:WINDOW]), run["samples_per_step"]
    now = start + max(rise for samples, rise in rises(run, LIMIT) if samples <= in_time(run))
    return math.sqrt((now * (1 - now) / LONG_WINDOW + start * (1 - start) / WINDOW) / completions)
