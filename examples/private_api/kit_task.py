"""The prompts of the private API, their right answers, and the feedback of the interpreter on a completion.

A module of `train.py`; nothing to run.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from environment import Environment, Question, Split, Verdict
from kit import FUNCTIONS, KitError, run
from sandbox import is_same

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


def draw_question(rng: random.Random, split: Split) -> Question:
    """A random question. The splits share no phrasing and no argument.

    Examples:
        >>> draw_question(random.Random(0), "train").answer
        'kit.level([5, 9, 5])'
    """
    name = rng.choice(list(FUNCTIONS))
    *train, held_out = FUNCTIONS[name].phrasings
    phrasing = held_out if split == "test" else rng.choice(train)
    value = _argument(rng, FUNCTIONS[name].kind, split)
    while not is_told_apart(name, value):
        value = _argument(rng, FUNCTIONS[name].kind, split)
    argument = repr(value)
    request = f"Use kit to get {phrasing.format(argument)}."
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]
    return Question(prompt, f"kit.{name}({argument})", {"function": name, "argument": argument})


def is_told_apart(name: str, argument: Any) -> bool:
    """Whether no other function returns the same: the judge sees the value, not which function was called.

    Examples:
        >>> is_told_apart("helm", [4, 1, 5]), is_told_apart("helm", [4, 1, 4])
        (True, False)
    """
    function = FUNCTIONS[name]
    value = function.call(argument)
    others = (other for other in FUNCTIONS.values() if other.kind == function.kind and other is not function)
    return not any(is_same(other.call(argument), value) for other in others)


def _argument(rng: random.Random, kind: str, split: Split) -> Any:
    if kind == "word":
        return rng.choice(HELD_OUT_WORDS if split == "test" else WORDS)
    while True:
        values = [rng.randint(1, 9) for _ in range(rng.randint(3, 5))]
        if rng.random() < 0.5:
            values[-1] = values[0]  # or few lists would have a duplicate
        if (sum(values) % 4 == 0) == (split == "test"):
            return values


def expression(completion: str) -> str:
    """The line of a completion that calls `kit`, without the fences that chat models put around code.

    Examples:
        >>> expression("```python\\nkit.peak([1, 2])\\n```")
        'kit.peak([1, 2])'
    """
    lines = [line.strip().strip("`").strip() for line in completion.splitlines()]
    return next((line for line in lines if "kit." in line), completion.strip())


def only_expression(completion: str) -> str:
    """A completion that is one line with a call, without the fences that chat models put around code.

    Raises:
        KitError: there is another line, or a comment.

    Examples:
        >>> only_expression("```python\\nkit.peak([1, 2])\\n```")
        'kit.peak([1, 2])'
        >>> only_expression("kit.peak([1, 2])\\nis the answer")
        Traceback (most recent call last):
        ...
        kit.KitError: SyntaxError: the reply is not one expression
    """
    lines = [line.strip() for line in completion.splitlines()]
    lines = [line for line in lines if line and not re.fullmatch(r"```\w*", line)]
    if len(lines) != 1 or "#" in lines[0]:
        raise KitError("SyntaxError: the reply is not one expression")
    return lines[0].strip("`").strip()


def judge(
    completion: str, function: str, argument: str, *, read: Callable[[str], str] = expression
) -> Verdict:
    """Score 1 if the call returns the right value, else 0 with the interpreter's message and the documentation.

    Args:
        completion: what the model wrote.
        function: name of the right one.
        argument: of the call, as a literal.
        read: finds the call in the completion.

    Examples:
        >>> print(judge("kit.max([1])", "tally", "[1]").feedback)
        AttributeError: module 'kit' has no attribute 'max'. kit.tally(argument) returns the sum of a list.
    """
    expected = run(f"kit.{function}({argument})")
    try:
        call = read(completion)
        value = run(call)
    except KitError as error:
        message = str(error)
    else:
        if is_same(value, expected):
            return Verdict(1.0, None)
        message = f"AssertionError: {call:.60} is {value!r:.40}, expected {expected!r}"
    return Verdict(0.0, f"{message}. kit.{function}(argument) {FUNCTIONS[function].purpose}.")


KIT = Environment("kit", draw_question, judge, max_completion=24)
# Text beside the call makes the reply wrong.
KIT_STRICT = Environment("kit_strict", draw_question, partial(judge, read=only_expression), max_completion=24)
