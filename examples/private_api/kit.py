"""The private module `kit`, and an interpreter that runs one call of it: nothing a model writes is evaluated.

A module of `kit_task.py`, which has the prompts; nothing to run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Kind = Literal["list", "word"]


class Function(NamedTuple):
    """One function of the module."""

    purpose: str  # its documentation, after "kit.name(argument)"
    call: Callable[[Any], Any]
    kind: Kind  # of its argument
    phrasings: tuple[str, ...]  # how a prompt asks for it; {0} is the argument; the last is held out


# No name can be guessed from its purpose.
FUNCTIONS: dict[str, Function] = {
    "peak": Function(
        "returns the largest number of a list",
        max,
        "list",
        ("the largest number in {0}", "the maximum of {0}", "the biggest element of {0}"),
    ),
    "trough": Function(
        "returns the smallest number of a list",
        min,
        "list",
        ("the smallest number in {0}", "the minimum of {0}", "the least element of {0}"),
    ),
    "tally": Function(
        "returns the sum of a list",
        sum,
        "list",
        ("the sum of {0}", "the total of the numbers in {0}", "all numbers of {0} added together"),
    ),
    "mirror": Function(
        "returns a list in reverse order",
        lambda values: values[::-1],
        "list",
        ("the list {0} reversed", "{0} in reverse order", "{0} from back to front"),
    ),
    "ladder": Function(
        "returns a list in ascending order",
        sorted,
        "list",
        ("the list {0} sorted", "{0} in ascending order", "{0} sorted from small to large"),
    ),
    "girth": Function(
        "returns the number of elements of a list",
        len,
        "list",
        ("the length of {0}", "the number of elements in {0}", "how many items {0} has"),
    ),
    "level": Function(
        "returns the mean of a list",
        lambda values: sum(values) / len(values),
        "list",
        ("the mean of {0}", "the average of {0}", "the arithmetic mean of the numbers in {0}"),
    ),
    "sift": Function(
        "returns a list without duplicates",
        lambda values: list(dict.fromkeys(values)),
        "list",
        ("{0} without duplicates", "the unique elements of {0}", "{0} with repeated elements removed"),
    ),
    "shout": Function(
        "returns a text in upper case",
        str.upper,
        "word",
        ("the text {0} in upper case", "{0} in capital letters", "the word {0} uppercased"),
    ),
    "hush": Function(
        "returns a text in lower case",
        str.lower,
        "word",
        ("the text {0} in lower case", "{0} in small letters", "the word {0} lowercased"),
    ),
    "helm": Function(
        "returns the first element of a list",
        lambda values: values[0],
        "list",
        ("the first element of {0}", "the item at the start of {0}", "the head of the list {0}"),
    ),
    "stern": Function(
        "returns the last element of a list",
        lambda values: values[-1],
        "list",
        ("the last element of {0}", "the item at the end of {0}", "the final element of {0}"),
    ),
}

# A completion has a few dozen tokens; what is longer is refused before it is parsed.
MAX_CHARACTERS = 500


class KitError(Exception):
    """What the interpreter reports: an error message of one line."""


def run(source: str) -> Any:
    """The value of ``kit.name(literal)``.

    The source is parsed, never evaluated: it must be one call of a function of `kit` with one literal.

    Args:
        source: one Python expression.

    Returns:
        What the function returns.

    Raises:
        KitError: the source is something else, the function does not exist, or it cannot take the argument.

    Examples:
        >>> run("kit.peak([3, 8, 5])")
        8
        >>> run("kit.max([3, 8, 5])")
        Traceback (most recent call last):
        ...
        kit.KitError: AttributeError: module 'kit' has no attribute 'max'
    """
    if len(source) > MAX_CHARACTERS:
        raise KitError(f"SyntaxError: more than {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise KitError("SyntaxError: the reply is not one expression") from None
    match tree:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="kit"), attr=name), args=[argument], keywords=[]
        ) if not isinstance(argument, ast.Starred):
            return _call(name, argument)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="kit"), attr=name)) if name in FUNCTIONS:
            raise KitError(f"TypeError: kit.{name}() takes exactly one argument")
        case _:
            raise KitError("SyntaxError: the reply is not one call of kit")


def _call(name: str, argument: ast.expr) -> Any:
    if name not in FUNCTIONS:
        raise KitError(f"AttributeError: module 'kit' has no attribute '{name}'")
    try:
        value = ast.literal_eval(argument)
    except (ValueError, TypeError, MemoryError, RecursionError):
        raise KitError(f"TypeError: the argument of kit.{name}() is not a literal") from None
    try:
        return FUNCTIONS[name].call(value)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise KitError(f"{type(error).__name__}: kit.{name}() cannot take {value!r:.40}") from None
