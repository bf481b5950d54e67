"""Signs of a collapse in the metrics that a run logs: functions of numbers, each a message with its remedy or None.

A run is compared with its own start, since lengths, entropies and rewards differ from task to task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

# Logged values that are averaged, at the start and now: one value is a batch, and batches differ.
_WINDOW = 5
# Fraction of completions at the length limit: a quarter, and much more than at the start. In the records of
# examples/private_api, runs that kept what they had learned stayed below .23; one that lost it passed .25 a
# thousand completions before it did, and ended with .6.
_MANY_AT_LIMIT, _RISE_AT_LIMIT = 0.25, 0.18
# Entropy in nats per token, as a multiple of the start's and as a difference. In these records it rises to 3.5
# times the start's within twenty steps, and falls again, whether a run learns or not. The difference is for starts
# near 0.
_ENTROPY_RATIO, _ENTROPY_RISE = 4.0, 1.0
# Nats per token between teacher and student. A token of a useful batch has a hundredth and more on average; this is
# what few of a thousand tokens leave where the models agree on all others.
_NO_DIVERGENCE = 1e-3
# Fall of the held-out reward from its best, as a fraction of the range of all rewards of the run, in this many
# evaluations in succession: in the same records two such evaluations passed in runs that went on to learn.
_HELD_OUT_FALL, _FALLEN_EVALUATIONS = 0.25, 3
# Fraction of the rows with feedback whose feedback has the answer: fewer are chance.
_MANY_ANSWERS = 0.25

_SLOW_DOWN = (
    "Resume from a checkpoint before that with a lower learning rate or a slower teacher "
    "(teacher_rate_samples=256 with teacher_update_rate=0.05 or less), or enlarge the generation batch."
)

Evaluation = tuple[float, float]  # held-out reward, mean training reward since the evaluation before


def length_limit(start: float, now: float) -> str | None:
    """Completions no longer end.

    Args:
        start: fraction of completions at the length limit when training began.
        now: the same of the last batches.

    Example:
        >>> length_limit(0.1, 0.25) is None
        True
        >>> length_limit(0.1, 0.8)[:70]
        '80% of the completions are cut at max_completion_length, after 10% at '
    """
    if now < _MANY_AT_LIMIT or now - start < _RISE_AT_LIMIT:
        return None
    return (
        f"{now:.0%} of the completions are cut at max_completion_length, after {start:.0%} at the start. If they "
        f"repeat themselves, the run collapses. {_SLOW_DOWN} If they are good, raise max_completion_length."
    )


def entropy(start: float, now: float) -> str | None:
    """The student becomes random.

    Args:
        start: nats per token of the student when training began.
        now: the same of the last batches.

    Example:
        >>> entropy(0.5, 1.5) is None
        True
        >>> entropy(0.5, 2.4)[:68]
        'The entropy of the student rose from 0.50 to 2.40 nats per token: it'
    """
    if now < _ENTROPY_RATIO * start or now - start < _ENTROPY_RISE:
        return None
    return (
        f"The entropy of the student rose from {start:.2f} to {now:.2f} nats per token: it becomes random, and its "
        f"teacher follows it. {_SLOW_DOWN}"
    )


def agreement(now: float) -> str | None:
    """There is nothing left to learn from the teacher.

    Args:
        now: mean divergence of the last batches, nats per token with a loss.

    Example:
        >>> agreement(0.02) is None
        True
        >>> agreement(0.0001)[:67]
        'Teacher and student differ by 0.0001 nats per token: nothing is lef'
    """
    if now >= _NO_DIVERGENCE:
        return None
    return (
        f"Teacher and student differ by {now:.1g} nats per token: nothing is left to learn from this feedback. "
        "Stop here, or take harder prompts. If it has been so from the start, the model does not use its feedback: "
        "make the feedback say what to do, or take a larger model."
    )


def held_out(evaluations: Sequence[Evaluation]) -> str | None:
    """The held-out reward fell while that of training did not.

    Args:
        evaluations: of one data set, in order.

    Example:
        >>> held_out([(0.1, 0.1), (0.4, 0.3), (0.5, 0.5), (0.45, 0.6)]) is None
        True
        >>> held_out([(0.1, 0.1), (0.5, 0.3), (0.2, 0.6), (0.1, 0.7), (0.1, 0.7)])[:64]
        'The held-out reward fell from 0.5 to 0.1, while the training rew'
    """
    if len(evaluations) <= _FALLEN_EVALUATIONS:
        return None
    earlier, last = evaluations[:-_FALLEN_EVALUATIONS], evaluations[-_FALLEN_EVALUATIONS:]
    best, trained = max(earlier, key=lambda evaluation: evaluation[0])
    rewards = [reward for evaluation in evaluations for reward in evaluation]
    fall = _HELD_OUT_FALL * (max(rewards) - min(rewards))
    trained_now = sum(reward for _, reward in last) / len(last)
    if trained_now < trained or any(best - reward <= fall for reward, _ in last):
        return None
    return (
        f"The held-out reward fell from {best:.3g} to {last[-1][0]:.3g}, while the training reward went from "
        f"{trained:.3g} to {trained_now:.3g}: the model memorizes its prompts. Go back to the checkpoint of the "
        "best evaluation, and train with more prompts or a lower learning rate."
    )


def answer_in_feedback(fraction: float) -> str | None:
    """The answer is in the feedback.

    Args:
        fraction: rows whose feedback has a correct completion of their group, among the failed rows with feedback
            whose group has one.

    Example:
        >>> answer_in_feedback(0.1) is None
        True
        >>> answer_in_feedback(0.5)[:64]
        'The feedback of 50% of the failed rows has a correct completion '
    """
    if fraction < _MANY_ANSWERS:
        return None
    return (
        f"The feedback of {fraction:.0%} of the failed rows has a correct completion of their prompt in it. The "
        "teacher then copies the answer and teaches little about the way to it. Unless the answers themselves are "
        "to be learned, let the feedback say what is wrong, not what is right."
    )


class Monitors:
    """The first and the last values of what a run logs, and its evaluations."""

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, list[float]] = {}
        self._trained: list[float] = []  # training rewards from one evaluation to the next
        self._evaluated = False  # since the last of them
        self._evaluations: dict[str, list[Evaluation]] = {}  # by data set

    def state(self) -> dict[str, Any]:
        """What was seen so far, in JSON's types."""
        return {
            "first": self._first,
            "last": self._last,
            "trained": self._trained,
            "evaluated": self._evaluated,
            "evaluations": {name: [list(e) for e in seen] for name, seen in self._evaluations.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()`."""
        self._first = {name: list(values) for name, values in state["first"].items()}
        self._last = {name: list(values) for name, values in state["last"].items()}
        self._trained, self._evaluated = list(state["trained"]), state["evaluated"]
        self._evaluations = {
            name: [(held_out_reward, reward) for held_out_reward, reward in seen]
            for name, seen in state["evaluations"].items()
        }

    def observe(self, logs: Mapping[str, Any]) -> dict[str, str]:
        """The messages that one entry of the log gives rise to, by the name of the monitor."""
        if "eval_reward" in logs:
            messages = {"held_out": self._evaluate(logs)}
        else:
            if _is_number(reward := logs.get("reward")):
                # Not by the evaluation: there may be one for each of several data sets.
                self._trained = [*([] if self._evaluated else self._trained), reward]
                self._evaluated = False
            messages = {
                "length_limit": self._compare(logs, "completions/clipped_ratio", length_limit),
                "entropy": self._compare(logs, "self_distillation/student_entropy", entropy),
                "agreement": self._compare(
                    logs, "self_distillation/divergence", lambda _, now: agreement(now)
                ),
                "answer_in_feedback": self._compare(
                    logs,
                    "self_distillation/answer_in_feedback_fraction",
                    lambda _, now: answer_in_feedback(now),
                ),
            }
        return {name: message for name, message in messages.items() if message is not None}

    def _compare(self, logs: Mapping[str, Any], name: str, monitor: Any) -> str | None:
        """The message of `monitor(start, now)`, once there are enough values."""
        value = logs.get(name)
        if not _is_number(value):
            return None
        first, last = self._first.setdefault(name, []), self._last.setdefault(name, [])
        if len(first) < _WINDOW:
            first.append(value)
        last.append(value)
        del last[:-_WINDOW]
        if len(last) < _WINDOW:
            return None
        message: str | None = monitor(sum(first) / _WINDOW, sum(last) / _WINDOW)
        return message

    def _evaluate(self, logs: Mapping[str, Any]) -> str | None:
        reward = logs["eval_reward"]
        # Several data sets have losses of several names, but one name of the reward.
        data = next((name for name in logs if name.startswith("eval_") and name.endswith("_loss")), "")
        seen = self._evaluations.setdefault(data, [])
        self._evaluated = True
        if not self._trained or not _is_number(reward):
            return None
        seen.append((reward, sum(self._trained) / len(self._trained)))
        return held_out(seen)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)
