"""The warnings that a recorded run would get from the trainer's monitors.

A module of `figures.py`; nothing to run.
"""

from __future__ import annotations

from typing import Any

from curves import ACCURACY, LEARNED, Run, fall

from sdpo_rl.diagnose.monitors import Monitors

COLLAPSED = 0.5  # of the best accuracy so far, to the end
LEAD = 500  # samples from an early warning to the fall of the accuracy, at least


def entries(run: Run) -> list[dict[str, Any]]:
    """The log of a run, one entry per logged step, as the trainer logs them."""
    names = list(run["log"])
    return [
        {name: value for name, value in zip(names, row, strict=True) if value is not None}
        for row in zip(*run["log"].values(), strict=True)
    ]


def warnings(run: Run, *, evaluations: bool) -> dict[str, int]:
    """The samples after which each monitor first has a message, by the name of the monitor.

    Args:
        run: a record with the log of every step.
        evaluations: also show the held-out accuracy to the monitors, as the reward of an evaluation.

    Returns:
        Only the monitors that have one, in the order in which they do.
    """
    monitors = Monitors()
    points = {point[0]: point[ACCURACY] for point in run["points"]} if evaluations else {}
    found: dict[str, int] = {}
    for entry in entries(run):
        samples = int(entry["step"]) * run["samples_per_step"]
        messages = monitors.observe(entry)
        if samples in points:
            messages |= monitors.observe({"eval_loss": 0.0, "eval_reward": points[samples]})
        for name in messages:
            found.setdefault(name, samples)
    return found


def problem(run: Run) -> str | None:
    """What is wrong with the warnings of a run; `None` if nothing is.

    A run that collapses should have a warning at least `LEAD` samples before, and a run that keeps what it learned
    should have none. Other runs may have any.
    """
    fell = fall(run, COLLAPSED)
    if fell is None and (fall(run) is not None or max(point[ACCURACY] for point in run["points"]) < LEARNED):
        return None
    if fell is None:
        found = warnings(run, evaluations=True)
        return f"{', '.join(found)} without a fall" if found else None
    # By the log of training alone: a run without evaluations is to be warned, too.
    first = min(warnings(run, evaluations=False).values(), default=None)
    if first is None:
        return "no warning"
    return f"after {first} samples, the fall after {fell}" if first > fell - LEAD else None
