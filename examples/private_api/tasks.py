"""The prompts of the private API, their right answers, and the feedback of the interpreter on a completion.

A module of `train.py`; nothing to run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kit import FUNCTIONS, KitError, run

SYSTEM = (
    "You write one line of Python that calls the module kit, for example kit.name(argument). "
    "Reply with the expression only."
)
WORDS = [
    "Amber",
    "Birch",
    "Cedar",
    "Delta",
    "Ember",
    "Fjord",
    "Grove",
    "Haven",
    "Ivory",
    "Joker",
    "Koala",
    "Lemon",
]
HELD_OUT_WORDS = ["Maple", "North", "Ocean", "Pearl"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Task:
    """One question about `kit`."""

    function: str
    argument: str  # as Python writes it
    phrasing: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The conversation that the model continues."""
        question = f"Use kit to get {self.phrasing.format(self.argument)}."
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]

    @property
    def answer(self) -> str:
        """The right call."""
        return f"kit.{self.function}({self.argument})"


class Verdict(NamedTuple):
    """What a reward function returns for one completion."""

    score: float
    feedback: str | None


def draw_task(rng: random.Random, split: Split) -> Task:
    """A random task. The splits share no phrasing and no argument."""
    name = rng.choice(list(FUNCTIONS))
    function = FUNCTIONS[name]
    *train, held_out = function.phrasings
    phrasing = held_out if split == "test" else rng.choice(train)
    return Task(name, repr(_argument(rng, function.kind, split)), phrasing)


def _argument(rng: random.Random, kind: str, split: Split) -> Any:
    if kind == "word":
        return rng.choice(HELD_OUT_WORDS if split == "test" else WORDS)
    while True:
        values = [rng.randint(1, 9) for _ in range(rng.randint(3, 5))]
        if rng.random() < 0.5:
            values[-1] = values[0]  # or few lists would have a duplicate
        if (sum(values) % 4 == 0) == (split == "test"):
            return values


def held_out_tasks(count: int = 96) -> list[Task]:
    """The tasks on which every run is evaluated."""
    rng = random.Random("held out")
    return [draw_task(rng, "test") for _ in range(count)]


def training_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Rows of a dataset: the prompt, and the task for the interpreter alone."""
    rng = random.Random(f"train {seed}")
    tasks = [draw_task(rng, "train") for _ in range(count)]
    return [{"prompt": task.prompt, "function": task.function, "argument": task.argument} for task in tasks]


def expression(completion: str) -> str:
    """The line of a completion that calls `kit`, without the fences that chat models put around code.

    Example:
        >>> expression("```python\\nkit.peak([1, 2])\\n```")
        'kit.peak([1, 2])'
    """
    lines = [line.strip().strip("`").strip() for line in completion.splitlines()]
    return next((line for line in lines if "kit." in line), completion.strip())


def judge(completion: str, function: str, argument: str) -> Verdict:
    """Score 1 if the call returns the right value, else 0 with the interpreter's message and the documentation.

    Example:
        >>> print(judge("kit.max([1])", "tally", "[1]").feedback)
        AttributeError: module 'kit' has no attribute 'max'. kit.tally(argument) returns the sum of a list.
    """
    expected = run(f"kit.{function}({argument})")
    call = expression(completion)
    try:
        value = run(call)
    except KitError as error:
        message = str(error)
    else:
        if value == expected and type(value) is type(expected):
            return Verdict(1.0, None)
        message = f"AssertionError: {call:.60} is {value!r:.40}, expected {expected!r}"
    return Verdict(0.0, f"{message}. kit.{function}(argument) {FUNCTIONS[function].purpose}.")


def interpreter(
    completions: Sequence[Any], function: Sequence[str], argument: Sequence[str], **_: Any
) -> list[Verdict]:
    """The reward function: one `(score, feedback)` pair per completion."""
    rows = zip(completions, function, argument, strict=True)
    return [judge(turns[0]["content"], name, value) for turns, name, value in rows]


class ShuffledInterpreter:
    """The control: the same scores, but each failure gets the feedback on another failure of the batch, if any."""

    __name__ = "shuffled_interpreter"

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"shuffle {seed}")

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[Verdict]:
        """As `interpreter`."""
        verdicts = interpreter(completions, **columns)
        failed = [row for row, verdict in enumerate(verdicts) if verdict.score == 0]
        self._rng.shuffle(failed)
        feedback = [verdicts[row].feedback for row in failed]
        # Each gets that of the next in a random order: never its own.
        for row, text in zip(failed, feedback[1:] + feedback[:1], strict=True):
            verdicts[row] = Verdict(0.0, text)
        return verdicts
