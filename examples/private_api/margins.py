"""How far the limits of the trainer's warnings are from the recorded runs.

The numbers are computed from the records without calling the monitors, and a test compares the two. A module of
`tables.py`; nothing to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from curves import ACCURACY, Run, fall
from replay import COLLAPSED, LEAD, entries

from sdpo_rl.diagnose.monitors import FALLEN_EVALUATIONS, HELD_OUT_FALL, LONG_WINDOW, WINDOW

CUT, ENTROPY, REWARD = "completions/clipped_ratio", "self_distillation/student_entropy", "reward"


def logged(run: Run, name: str) -> list[tuple[int, float]]:
    """Pairs of samples and value of a metric, of the steps that have it.

    Args:
        run: a record with the log of every step.
        name: name of the metric.
    """
    return [
        (int(entry["step"]) * run["samples_per_step"], entry[name]) for entry in entries(run) if name in entry
    ]


def rises(run: Run, name: str, window: int = LONG_WINDOW) -> list[tuple[int, float]]:
    """Rise of a metric over its start, at each step: pairs of samples and rise.

    The start is the mean of the first `WINDOW` values; the rise is the mean of the last values minus the start.

    Args:
        run: a record with the log of every step.
        name: name of the metric.
        window: number of last values; while there are fewer, the start stands for the missing ones.
    """
    samples, values = zip(*logged(run, name), strict=True)
    start = fmean(values[:WINDOW])
    found = []
    for seen in range(WINDOW, len(values) + 1):
        last = values[:seen][-window:]
        found.append((samples[seen - 1], sum(value - start for value in last) / window))
    return found


def last_early(run: Run) -> int:
    """The last number of samples at which a warning is early; the end of a run that does not collapse."""
    fell = fall(run, COLLAPSED)
    return int(run["points"][-1][0]) if fell is None else fell - LEAD


def largest_cut_rise(run: Run, *, entropy_rose: bool) -> float:
    """The largest rise of the cut completions until `last_early`.

    Args:
        run: a record with the log of every step.
        entropy_rose: count the steps at which the student's entropy is above its start, or all others.
    """
    entropy = dict(rises(run, ENTROPY))
    entropy_rise = 0.0  # some steps log no entropy and keep the value before
    largest = 0.0
    for samples, rise in rises(run, CUT):
        entropy_rise = entropy.get(samples, entropy_rise)
        if samples <= last_early(run) and (entropy_rise > 0) == entropy_rose:
            largest = max(largest, rise)
    return largest


def largest_entropy_ratio(run: Run) -> float:
    """The largest entropy of the student until `last_early`, as a multiple of its start."""
    start = fmean(value for _, value in logged(run, ENTROPY)[:WINDOW])
    return max(
        1 + rise / start for samples, rise in rises(run, ENTROPY, WINDOW) if samples <= last_early(run)
    )


def largest_reward_fall(run: Run) -> float:
    """The largest fall of the training reward until `last_early`, over the range of rewards so far."""
    rewards = logged(run, REWARD)
    best, largest = -math.inf, 0.0
    for end in range(LONG_WINDOW, len(rewards) + 1):
        seen = [reward for _, reward in rewards[:end]]
        now, reward_range = fmean(seen[-LONG_WINDOW:]), max(seen) - min(seen)
        best = max(best, now)
        if reward_range > 0 and rewards[end - 1][0] <= last_early(run):
            largest = max(largest, (best - now) / reward_range)
    return largest


def largest_held_out_fall(run: Run) -> float:
    """The largest fall of the held-out accuracy in a whole run, while the training reward did not fall as far.

    The fall goes from the best mean of `FALLEN_EVALUATIONS` successive evaluations to the largest of as many last
    ones, over the range of held-out accuracies and training rewards so far.
    """
    size = FALLEN_EVALUATIONS
    seen: list[tuple[float, float]] = []
    largest = 0.0
    rewards = logged(run, REWARD)
    for before, point in pairwise(run["points"]):
        trained = [reward for samples, reward in rewards if before[0] < samples <= point[0]]
        seen.append((point[ACCURACY], fmean(trained)))
        reward_range = max(map(max, seen)) - min(map(min, seen))
        if len(seen) < 2 * size or reward_range == 0:
            continue
        groups = [seen[end - size : end] for end in range(size, len(seen) - size + 1)]
        means = [(fmean(held for held, _ in group), fmean(reward for _, reward in group)) for group in groups]
        best, trained_then = max(means, key=lambda mean: mean[0])
        share = (best - max(held for held, _ in seen[-size:])) / reward_range
        trained_fall = (trained_then - fmean(reward for _, reward in seen[-size:])) / reward_range
        if trained_fall <= HELD_OUT_FALL:
            largest = max(largest, share)
    return largest


def leave_one_out(kept: Sequence[float], collapsed: Sequence[float]) -> int:
    """How many runs a limit set by the other runs classifies correctly.

    The limit is the middle between the largest number of the runs that learned and the smallest of those that
    collapsed, without the run in question.

    Args:
        kept: numbers of the runs that learned, which should be below the limit.
        collapsed: numbers of the runs that collapsed, which should not be below it.

    Examples:
        >>> leave_one_out([0.0, 0.1], [0.3, 0.5])
        4
        >>> leave_one_out([0.0, 0.1, 0.25], [0.3, 0.5])
        3
    """
    correct = 0
    for index, value in enumerate(kept):
        others = [*kept[:index], *kept[index + 1 :]]
        correct += value < (max(others) + min(collapsed)) / 2
    for index, value in enumerate(collapsed):
        others = [*collapsed[:index], *collapsed[index + 1 :]]
        correct += value >= (max(kept) + min(others)) / 2
    return correct
