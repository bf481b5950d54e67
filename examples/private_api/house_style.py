"""A second task: Python functions whose hidden tests expect a house style that no prompt mentions.

The prompt asks for a small function. The tests expect that a number comes back as ``("number", value)``, a text as
``("text", value)``, a list as ``("list", value)`` and a truth value as ``"yes"`` or ``"no"``. The feedback is the
failed assertion. Held out are functions that training never asks for. A module of `train.py`; nothing to run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from environment import Environment, Question, Split, Verdict
from sandbox import Case, run_tests

SYSTEM = "You write one small Python function. Reply with the code only."


@dataclass(frozen=True)
class Problem:
    """One function to write."""

    name: str
    request: str
    arguments: tuple[tuple[Any, ...], ...]  # of the tests
    solve: Callable[..., Any]  # its value before the house style
    body: str  # an expression for a right solution

    def cases(self) -> list[Case]:
        """The hidden tests."""
        return [Case(list(arguments), styled(self.solve(*arguments))) for arguments in self.arguments]


def styled(value: Any) -> Any:
    """A value as the house returns it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    kind = {str: "text", list: "list"}.get(type(value), "number")
    return (kind, value)


# The largest and the smallest have other places in the second list. It has a number twice and none above zero.
_LISTS = (([3, 1, 2],), ([-7, -4, -5, -4, -2],))
_WORDS = (("stone",), ("Ab",))
_NUMBERS = ((3,), (8,), (-5,))
TRAIN = (
    Problem("double(n)", "twice a number n", _NUMBERS, lambda n: 2 * n, "n * 2"),
    Problem("square(n)", "the square of a number n", _NUMBERS, lambda n: n * n, "n * n"),
    Problem("largest(values)", "the largest of a list of numbers", _LISTS, max, "max(values)"),
    Problem("total(values)", "the sum of a list of numbers", _LISTS, sum, "sum(values)"),
    Problem("upper(word)", "a word in upper case", _WORDS, str.upper, "word.upper()"),
    Problem("twice(word)", "a word written two times", _WORDS, lambda word: word * 2, "word * 2"),
    Problem("reverse(values)", "a list in reverse order", _LISTS, lambda v: v[::-1], "values[::-1]"),
    Problem("ordered(values)", "a list in ascending order", _LISTS, sorted, "sorted(values)"),
    # A truth value tells little: these functions have more tests.
    Problem(
        "is_even(n)",
        "whether a number n is even",
        ((3,), (8,), (-2,), (-5,)),
        lambda n: n % 2 == 0,
        "n % 2 == 0",
    ),
    Problem(
        "is_long(word)",
        "whether a word has more than four letters",
        (("stone",), ("Lamp",), ("ab",), ("PLANETS",)),
        lambda w: len(w) > 4,
        "len(word) > 4",
    ),
)
HELD_OUT = (
    Problem("half(n)", "a number n divided by two", _NUMBERS, lambda n: n / 2, "n / 2"),
    Problem("smallest(values)", "the smallest of a list of numbers", _LISTS, min, "min(values)"),
    Problem("lower(word)", "a word in lower case", _WORDS, str.lower, "word.lower()"),
    Problem("backwards(word)", "a word from back to front", _WORDS, lambda word: word[::-1], "word[::-1]"),
    Problem("tail(values)", "a list without its first element", _LISTS, lambda v: v[1:], "values[1:]"),
    Problem(
        "is_positive(n)",
        "whether a number n is above zero",
        ((8,), (-3,), (0,), (1,)),
        lambda n: n > 0,
        "n > 0",
    ),
)
PROBLEMS = {problem.name: problem for problem in (*TRAIN, *HELD_OUT)}
OPENINGS = ("Write", "Please write", "Define", "Implement")


def draw_question(rng: random.Random, split: Split) -> Question:
    """A random question. The splits share no function."""
    problem = rng.choice(TRAIN if split == "train" else HELD_OUT)
    request = f"{rng.choice(OPENINGS)} a function {problem.name} that returns {problem.request}."
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]
    return Question(prompt, answer(problem), {"problem": problem.name})


def answer(problem: Problem) -> str:
    """A right solution."""
    value = f"'yes' if {problem.body} else 'no'"
    if not isinstance(problem.solve(*problem.arguments[0]), bool):
        value = f"({styled(problem.solve(*problem.arguments[0]))[0]!r}, {problem.body})"
    return f"def {problem.name}:\n    return {value}"


def source(completion: str) -> str:
    """The code of a completion, without the fences that chat models put around it.

    Examples:
        >>> source("```python\\ndef f(x):\\n    return x\\n```")
        'def f(x):\\n    return x'
    """
    lines = completion.strip().splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("def ")]
    if not starts:
        return completion.strip()
    code = []
    for index, line in enumerate(lines[starts[0] :]):
        if index and line.strip() and not line.startswith((" ", "\t")):
            break
        code.append(line)
    return "\n".join(code).rstrip()


_passed: set[tuple[str, str]] = set()  # sources, with the problem whose tests they passed


def judge(completion: str, problem: str) -> Verdict:
    """Score 1 if the hidden tests pass, else 0 with the first failure."""
    code = source(completion)
    # A model that learns writes the same function again and again, and each run of the tests is a process.
    if (code, problem) in _passed:
        return Verdict(1.0, None)
    outcome = run_tests(code, problem.split("(")[0], PROBLEMS[problem].cases())
    # Not what fails: a process may run out of time because the machine is busy.
    if outcome.passed:
        _passed.add((code, problem))
    return Verdict(float(outcome.passed), outcome.message)


HOUSE_STYLE = Environment("house_style", draw_question, judge, max_completion=48, threads=4)
