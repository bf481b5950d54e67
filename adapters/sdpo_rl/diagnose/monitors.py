"""Signs of a collapse in the logged metrics of a run. Each function returns a message with a remedy, or None.

A run is compared with its own start, since lengths, entropies and rewards differ from task to task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple, TypeGuard

# Each number below is compared with a mean of logged values, because a single value is one batch and batches
# differ. The numbers come from the recorded runs of examples/private_api ("the records") and from the logs in
# property_tests/recordings ("the recordings"). docs/choosing.md shows which recorded runs have a warning.
WINDOW = 5  # values in the mean at the start, and in most means of the last values
# Values in the mean of cut completions and of training rewards. In their first twenty steps some runs cut more
# completions for five steps, up to .3, and learn all the same.
LONG_WINDOW = 15
# Rise of the fraction of cut completions, that is completions at the length limit. The first number is for a
# student whose entropy is above its start: in the records, runs whose teacher is no faster than the paper's stay
# below .11, but for three that learn nothing, five of six with adapters, and one of 48000 completions, which falls
# (.50). The second number is for any other student, which may have learned to write longer answers: here such runs
# stay below .11 in 9600 completions. Of seventeen in 48000, twelve stay below .24 and keep what they learned. In
# the other five, of α=0 without a part of GRPO's loss, text of the teacher's prompt spreads (.28 to .49).
CUT_RISE_WITH_ENTROPY, CUT_RISE_ALONE = 0.125, 0.25
# Rise of the student's entropy: as a multiple of the start, and in nats per token. In the records the entropy
# rises to at most 3.9 times its start, whether a run learns or not. The second number
# is for starts near 0: the rise is .1 to .3 in the recordings that learn, and .7 in the one that collapses.
ENTROPY_RATIO, _ENTROPY_RISE = 4.0, 0.5
# Fall of the training reward from its best, as a fraction of the range of logged rewards. Of the runs that learned,
# those of 9600 completions stayed below .17 in the records, but for two: .23 with text of the teacher's prompt in
# the completions, and .24 where the rewards are small and the fall is within their noise. Those of the recordings
# stayed below .18. Twelve that went on to 48000 fell by .21 to .42: text of the teacher's prompt stands in their
# completions.
REWARD_FALL = 0.2
# The two changes must also be this many standard errors of the difference of the two means. Without this
# condition the noise of small batches would pass the limits sooner or later; with it, at most one in twenty runs
# of a thousand batches of noise has a warning. The number for rewards is larger, because the best of many means
# lies above their expected value even if nothing changes.
CUT_STANDARD_ERRORS, REWARD_STANDARD_ERRORS = 4.0, 5.0
# The noise is that of all values, or of about as many of the last ones, whichever is larger.
RECENT = 100
# Smallest fall of a reward, as a fraction of it: the same rewards in another order have another mean in float32.
_ROUNDING = 1e-6
# Divergence in nats per token. A useful batch has .01 or more; below this number the models agree on nearly all
# tokens.
_NO_DIVERGENCE = 1e-3
# Fall of the held-out reward from its best, as a fraction of the range of all rewards of the run. The best is a
# mean of this many successive evaluations, and as many last ones must be below it, because a single evaluation can
# be far above or below its neighbours. While little is learned the range is small, so the fall must also be this
# many standard errors: without this condition one success of an early evaluation was warned of in the records.
HELD_OUT_FALL, FALLEN_EVALUATIONS, HELD_OUT_STANDARD_ERRORS = 0.25, 3, 3.0
# Fraction of the failed rows whose feedback contains the answer. A smaller one can be chance.
_MANY_ANSWERS = 0.25

_SLOW_DOWN = (
    "Resume from a checkpoint before that with a lower learning rate, a slower teacher (a smaller "
    "teacher_update_rate, at most 0.05 with teacher_rate_samples=256), or, without routing, more of GRPO's loss "
    "(grpo_weight=0.5 or larger; grpo_weight_final=1.0 makes it grow)."
)

_REWARD, _CUT, _ENTROPY = "reward", "completions/clipped_ratio", "self_distillation/student_entropy"

Comparison = Callable[[float, float], str | None]  # of the start and now
Evaluation = tuple[float, float]  # held-out reward, mean training reward since the evaluation before


class Noise(NamedTuple):
    """Sums over the differences of successive values of a metric."""

    squares: float = 0.0
    pairs: int = 0  # of successive values
    # The same with weights that fall with age.
    recent_squares: float = 0.0
    recent_pairs: float = 0.0

    def add(self, difference: float) -> Noise:
        """With one more difference."""
        # A product overflows to infinity, a power raises an error.
        square, kept = difference * difference, 1 - 1 / RECENT
        return Noise(
            self.squares + square,
            self.pairs + 1,
            self.recent_squares * kept + square,
            self.recent_pairs * kept + 1,
        )

    @property
    def variance(self) -> float:
        """Of a value: half of the mean square, so that a slow trend does not count.

        Recent values alone can have more noise than all, as those of a reward that is 0 until the first successes.
        """
        if not self.pairs:
            return 0.0
        return max(self.squares / self.pairs, self.recent_squares / self.recent_pairs) / 2


def length_limit(start: float, now: float, *, entropy_rose: bool, error: float = 0.0) -> str | None:
    """Completions no longer end.

    Args:
        start: fraction of completions at the length limit when training began.
        now: the same of the last batches.
        entropy_rose: the student's mean entropy is above that of the start.
        error: standard error of `now - start`.

    Examples:
        >>> length_limit(0.1, 0.25, entropy_rose=False) is None
        True
        >>> length_limit(0.1, 0.25, entropy_rose=True)[:70]
        '25% of the completions are cut at max_completion_length, after 10% at '
    """
    limit = CUT_RISE_WITH_ENTROPY if entropy_rose else CUT_RISE_ALONE
    if now - start < max(limit, CUT_STANDARD_ERRORS * error):
        return None
    return (
        f"{now:.0%} of the completions are cut at max_completion_length, after {start:.0%} at the start. If they "
        f"repeat themselves or the teacher's prompt, the run may collapse. {_SLOW_DOWN} If they are good, raise "
        "max_completion_length."
    )


def entropy(start: float, now: float) -> str | None:
    """The student becomes random.

    Args:
        start: nats per token of the student when training began.
        now: the same of the last batches.

    Examples:
        >>> entropy(0.5, 1.5) is None
        True
        >>> entropy(0.5, 2.4)[:68]
        'The entropy of the student rose from 0.50 to 2.40 nats per token: it'
    """
    if now < ENTROPY_RATIO * start or now - start < _ENTROPY_RISE:
        return None
    return (
        f"The entropy of the student rose from {start:.2f} to {now:.2f} nats per token: it becomes random, and its "
        f"teacher follows it. {_SLOW_DOWN}"
    )


def reward(best: float, now: float, reward_range: float, *, error: float = 0.0) -> str | None:
    """The training reward fell.

    Args:
        best: largest mean reward of `LONG_WINDOW` successive batches.
        now: mean reward of the last `LONG_WINDOW` batches.
        reward_range: largest minus smallest mean reward of a batch.
        error: standard error of `best - now`.

    Examples:
        >>> reward(0.5, 0.4, reward_range=0.8) is None
        True
        >>> reward(0.5, 0.3, reward_range=0.8)[:41]
        'The training reward fell from 0.5 to 0.3.'
    """
    if best - now <= max(REWARD_FALL * reward_range, REWARD_STANDARD_ERRORS * error, _ROUNDING * abs(best)):
        return None
    return (
        f"The training reward fell from {best:.3g} to {now:.3g}. Unless the prompts became harder, what was "
        f"learned is being lost. {_SLOW_DOWN}"
    )


def agreement(now: float) -> str | None:
    """There is nothing left to learn from the teacher.

    Args:
        now: mean divergence of the last batches, nats per token with a loss.

    Examples:
        >>> agreement(0.02) is None
        True
        >>> agreement(0.0001)[:67]
        'Teacher and student differ by 0.0001 nats per token: nothing is lef'
    """
    if abs(now) >= _NO_DIVERGENCE:  # an estimate from sampled tokens may be negative
        return None
    return (
        f"Teacher and student differ by {now:.1g} nats per token: nothing is left to learn from this feedback. "
        "Stop here, or take harder prompts. If it has been so from the start, the model does not use its feedback: "
        "make the feedback say what to do, or take a larger model."
    )


def held_out(evaluations: Sequence[Evaluation]) -> str | None:
    """The held-out reward fell while that of training did not, or by less.

    Args:
        evaluations: of one data set, in order.

    Examples:
        >>> held_out([(0.1, 0.1), (0.4, 0.3), (0.5, 0.5), (0.6, 0.5), (0.5, 0.6), (0.45, 0.6)]) is None
        True
        >>> fallen = [(0.4, 0.3), (0.5, 0.3), (0.6, 0.3), (0.2, 0.6), (0.1, 0.7), (0.1, 0.7)]
        >>> held_out(fallen)[:64]
        'The held-out reward fell from 0.5 to 0.1, while the training rew'
    """
    in_succession = [
        evaluations[end - FALLEN_EVALUATIONS : end] for end in range(FALLEN_EVALUATIONS, len(evaluations) + 1)
    ]
    earlier, last = in_succession[:-FALLEN_EVALUATIONS], evaluations[-FALLEN_EVALUATIONS:]
    if not earlier:
        return None
    best, trained = max((_means(some) for some in earlier), key=lambda means: means[0])
    rewards = [reward for evaluation in evaluations for reward in evaluation]
    fall = HELD_OUT_FALL * (max(rewards) - min(rewards))
    now, trained_now = _means(last)
    if trained - trained_now > fall or any(best - reward <= fall for reward, _ in last):
        return None
    if best - now <= HELD_OUT_STANDARD_ERRORS * _error_of_held_out(evaluations):
        return None
    return (
        f"The held-out reward fell from {best:.3g} to {last[-1][0]:.3g}, while the training reward went from "
        f"{trained:.3g} to {trained_now:.3g}: what is learned no longer holds for other prompts. Go back to the "
        "checkpoint of the best evaluation, and train with more prompts or a lower learning rate."
    )


def _error_of_held_out(evaluations: Sequence[Evaluation]) -> float:
    """Standard error of the difference of two means of `FALLEN_EVALUATIONS` held-out rewards."""
    differences = [after - before for (before, _), (after, _) in pairwise(evaluations)]
    # Half of the mean square is the variance of one, as in `Noise`.
    return math.sqrt(fmean(difference * difference for difference in differences) / FALLEN_EVALUATIONS)


def _means(evaluations: Sequence[Evaluation]) -> Evaluation:
    held_out_rewards, trained = zip(*evaluations, strict=True)
    return fmean(held_out_rewards), fmean(trained)


def answer_in_feedback(fraction: float) -> str | None:
    """The answer is in the feedback.

    Args:
        fraction: rows whose feedback has a correct completion of their group, among the failed rows with feedback
            whose group has one.

    Examples:
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
    """Keeps the first and the last logged values and the evaluations of a run, and compares them."""

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, list[float]] = {}
        self._noise: dict[str, Noise] = {}
        # Of training rewards: smallest and largest of a batch ("low", "high"), and the best mean ("best").
        self._rewards: dict[str, float] = {}
        self._trained: list[float] = []  # training rewards since the last evaluation
        self._evaluated = False  # an evaluation came after the last training reward
        self._evaluations: dict[str, list[Evaluation]] = {}  # by data set

    def state(self) -> dict[str, Any]:
        """The values so far, in types that JSON has."""
        return {
            "first": self._first,
            "last": self._last,
            "noise": {name: list(sums) for name, sums in self._noise.items()},
            "rewards": self._rewards,
            "trained": self._trained,
            "evaluated": self._evaluated,
            "evaluations": {name: [list(e) for e in seen] for name, seen in self._evaluations.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Continue from `state()`.

        Args:
            state: of this version or of an earlier one, whose checkpoints do not have every part.

        Returns:
            The names of the parts that begin anew: those that the state lacks, and "last" if it lacks "noise".
        """
        if "noise" not in state:  # without it the last values cannot be compared with the start
            state = {name: value for name, value in state.items() if name != "last"}
        missing = sorted(self.state().keys() - state.keys())
        state = {**Monitors().state(), **state}
        self._first = {name: list(values) for name, values in state["first"].items()}
        self._last = {name: list(values) for name, values in state["last"].items()}
        self._noise = {name: Noise(*sums) for name, sums in state["noise"].items()}
        self._rewards = dict(state["rewards"])
        self._trained, self._evaluated = list(state["trained"]), state["evaluated"]
        self._evaluations = {
            name: [(held_out_reward, reward) for held_out_reward, reward in seen]
            for name, seen in state["evaluations"].items()
        }
        return missing

    def observe(self, logs: Mapping[str, Any]) -> dict[str, str]:
        """The messages for one entry of the log, by the name of the monitor."""
        if "eval_reward" in logs:
            messages = {"held_out": self._evaluate(logs)}
        else:
            if _is_number(reward := logs.get(_REWARD)):
                # Not in `_evaluate`: with several data sets it is called several times in succession.
                self._trained = [*([] if self._evaluated else self._trained), reward]
                self._evaluated = False
            messages = {
                "entropy": self._compare(logs, _ENTROPY, entropy),
                # After "entropy", which stores the entropy of this entry.
                "length_limit": self._compare(
                    logs,
                    _CUT,
                    lambda start, now: length_limit(
                        start, now, entropy_rose=self._rose(_ENTROPY), error=self._error(_CUT, WINDOW)
                    ),
                    window=LONG_WINDOW,
                ),
                "reward": self._reward(logs.get(_REWARD)),
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

    def _compare(
        self, logs: Mapping[str, Any], name: str, monitor: Comparison, window: int = WINDOW
    ) -> str | None:
        """The message of `monitor(start, now)`, once there are enough values."""
        value = logs.get(name)
        if not _is_number(value):
            return None
        first, last = self._first.setdefault(name, []), self._keep(name, value)
        if len(first) < WINDOW:
            first.append(value)
        return monitor(fmean(first), self._now(name, window)) if len(last) >= WINDOW else None

    def _keep(self, name: str, value: float) -> list[float]:
        """Store a value; returns the last values, this one included."""
        last = self._last.setdefault(name, [])
        if last:
            self._noise[name] = self._noise.get(name, Noise()).add(value - last[-1])
        last.append(value)
        del last[:-LONG_WINDOW]
        return last

    def _reward(self, value: Any) -> str | None:
        if not _is_number(value):
            return None
        last, seen = self._keep(_REWARD, value), self._rewards
        seen["low"], seen["high"] = min(seen.get("low", value), value), max(seen.get("high", value), value)
        if len(last) < LONG_WINDOW:
            return None
        seen["best"] = max(seen.get("best", -math.inf), fmean(last))
        reward_range, error = seen["high"] - seen["low"], self._error(_REWARD, LONG_WINDOW)
        return reward(seen["best"], fmean(last), reward_range, error=error)

    def _error(self, name: str, others: int) -> float:
        """Standard error of the mean of the last values minus the mean of `others` values."""
        variance = self._noise.get(name, Noise()).variance
        return math.sqrt(variance * (1 / LONG_WINDOW + 1 / others))

    def _now(self, name: str, window: int) -> float:
        """The mean of the last `window` values; missing values count as the mean at the start."""
        start, last = fmean(self._first[name]), self._last[name][-window:]
        return start + sum(value - start for value in last) / window

    def _rose(self, name: str) -> bool:
        """Whether the mean of the last values is above the mean at the start."""
        return name in self._last and self._now(name, LONG_WINDOW) > fmean(self._first[name])

    def _evaluate(self, logs: Mapping[str, Any]) -> str | None:
        reward = logs["eval_reward"]
        # With several data sets the name of the loss says which one it is; the reward has the same name for all.
        data = next((name for name in logs if name.startswith("eval_") and name.endswith("_loss")), "")
        seen = self._evaluations.setdefault(data, [])
        self._evaluated = True
        if not self._trained or not _is_number(reward):
            return None
        seen.append((reward, fmean(self._trained)))
        return held_out(seen)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)
