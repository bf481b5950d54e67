"""What a task is to the training program: questions, right answers, and a judge with feedback.

A module of `kit_task.py`, `house_style.py` and `train.py`; nothing to run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Split = Literal["train", "test"]
Messages = list[dict[str, str]]
HELD_OUT = 96  # questions of an evaluation


class Verdict(NamedTuple):
    """What a reward function returns for one completion."""

    score: float
    feedback: str | None


class Question(NamedTuple):
    """One prompt."""

    prompt: Messages
    answer: str  # a right completion
    columns: dict[str, Any]  # what the judge needs to know; the model never sees it


@dataclass(frozen=True)
class Environment:
    """A task: replace `draw` and `judge` to train on your own tools.

    Args:
        name: of the task.
        draw: a random question of a split; the splits share none.
        judge: scores a completion, with feedback on a failure; called as ``judge(completion, **columns)``.
        max_completion: tokens of a completion.
        threads: completions judged at a time.
    """

    name: str
    draw: Callable[[random.Random, Split], Question]
    judge: Callable[..., Verdict]
    max_completion: int
    threads: int = 1

    def held_out(self, count: int) -> list[Question]:
        """The questions on which every run is evaluated."""
        rng = random.Random("held out")
        return [self.draw(rng, "test") for _ in range(count)]

    def training(self, seed: int, count: int) -> list[Question]:
        """The questions of a run."""
        rng = random.Random(f"train {seed}")
        return [self.draw(rng, "train") for _ in range(count)]


class Reward:
    """The reward function of an environment: one `(score, feedback)` pair per completion.

    Args:
        environment: the task.
        shuffle: for the control: each failure gets the feedback on another failure of the batch, if there is one.
        seed: of the shuffling.
    """

    __name__ = "judge"

    def __init__(self, environment: Environment, *, shuffle: bool = False, seed: int = 0) -> None:
        self._environment, self._shuffle = environment, shuffle
        self._rng = random.Random(f"shuffle {seed}")

    def __call__(
        self, completions: Sequence[Any], columns: Sequence[dict[str, Any]], **_: Any
    ) -> list[Verdict]:
        """Judge a batch."""
        texts = [turns[0]["content"] for turns in completions]
        with ThreadPoolExecutor(self._environment.threads) as pool:
            verdicts = list(
                pool.map(lambda text, known: self._environment.judge(text, **known), texts, columns)
            )
        return self._shuffled(verdicts) if self._shuffle else verdicts

    def _shuffled(self, verdicts: list[Verdict]) -> list[Verdict]:
        failed = [row for row, verdict in enumerate(verdicts) if verdict.score == 0]
        self._rng.shuffle(failed)
        feedback = [verdicts[row].feedback for row in failed]
        # Each gets that of the next in a random order: never its own.
        for row, text in zip(failed, feedback[1:] + feedback[:1], strict=True):
            verdicts[row] = Verdict(0.0, text)
        return verdicts
