"""The hidden tests of the house style accept no function that only looks right on them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from programs import EXAMPLES

sys.path.insert(0, str(EXAMPLES / "private_api"))

import house_style
from house_style import PROBLEMS, Problem, styled
from sandbox import is_same

# Tests that are too weak.
WEAK_LISTS = (([3, 1, 2],), ([5, 4],))
WEAK_WORDS = (("stone",), ("Ab",))
WEAK_NUMBERS = ((3,), (8,))
FURTHEST = 5  # place of an element from either end, at most


def argument_type(problem: Problem) -> type:
    return type(problem.arguments[0][0])


def weakened(problem: Problem) -> Problem:
    """A function with tests that are too weak."""
    arguments = {list: WEAK_LISTS, str: WEAK_WORDS, int: WEAK_NUMBERS}
    return dataclasses.replace(problem, arguments=arguments[argument_type(problem)])


def short_cuts(problem: Problem) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Functions that are wrong, by what they do."""
    for case in problem.cases():
        yield f"the constant {case.expected!r}", lambda _, value=case.expected: value
    yield "the argument", styled
    for place in range(-FURTHEST, FURTHEST):
        yield f"element {place}", lambda argument, place=place: styled(argument[place])
    for other in PROBLEMS.values():
        # `twice(word)` and `double(n)` are one operation, on arguments of different types.
        if other.name != problem.name and argument_type(other) is argument_type(problem):
            yield other.name, lambda argument, solve=other.solve: styled(solve(argument))
            yield f"not {other.name}", lambda argument, solve=other.solve: styled(not solve(argument))


def passes(function: Callable[[Any], Any], problem: Problem) -> bool:
    """Whether a function passes the hidden tests."""
    try:
        return all(is_same(function(*case.arguments), case.expected) for case in problem.cases())
    except (TypeError, LookupError, AttributeError):
        return False


def accepted(problem: Problem) -> list[str]:
    """The short cuts that the hidden tests accept."""
    return [name for name, function in short_cuts(problem) if passes(function, problem)]


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=list(PROBLEMS))
def test_the_hidden_tests_accept_no_short_cut(problem: Problem) -> None:
    assert passes(lambda argument: styled(problem.solve(argument)), problem)
    assert accepted(problem) == []
    assert 2 <= len(problem.arguments) <= 4  # a run executes them thousands of times


def test_the_search_above_can_find() -> None:
    found = {problem.name: accepted(weakened(problem)) for problem in PROBLEMS.values()}
    assert {name: names for name, names in found.items() if names} == {
        "largest(values)": ["element 0"],
        "smallest(values)": ["element 1"],
        "is_positive(n)": ["the constant 'yes'", "the constant 'yes'"],
    }
    word = dataclasses.replace(PROBLEMS["lower(word)"], arguments=(("a",), ("bb",)))
    assert accepted(word) == ["the argument", "backwards(word)"]
    number = dataclasses.replace(PROBLEMS["is_even(n)"], arguments=((3,), (-8,)))
    assert accepted(number) == ["not is_positive(n)"]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("is_positive(n)", "'yes' if n else 'no'"),
        ("is_positive(n)", "'yes' if n >= 0 else 'no'"),
        ("is_positive(n)", "'yes' if n > 2 else 'no'"),
        ("is_positive(n)", "'yes' if n > 2 else 'maybe'"),
        ("is_even(n)", "'yes' if n > 5 else 'no'"),
        ("is_even(n)", "'yes' if n != 3 else 'no'"),
        ("is_even(n)", "'yes' if n % 4 == 0 else 'no'"),
        ("is_long(word)", "'yes' if word.islower() else 'no'"),
        ("is_long(word)", "'yes' if len(word) > 3 else 'no'"),
        ("is_long(word)", "'yes' if len(word) == 5 else 'no'"),
        ("half(n)", "('number', 1.5 if n == 3 else 4.0)"),
        ("square(n)", "('number', n * abs(n))"),
        ("smallest(values)", "('number', values[1])"),
        ("smallest(values)", "('number', values[len(values) // 2])"),
        ("largest(values)", "('number', values[0])"),
        ("largest(values)", "('number', max([0, *values]))"),
        ("total(values)", "('number', sum(set(values)))"),
        ("ordered(values)", "('list', sorted(set(values)))"),
        ("tail(values)", "('list', sorted(values)[:-1])"),
        ("lower(word)", "('text', word.swapcase())"),
    ],
)
def test_a_function_that_is_almost_right_fails(name: str, wrong: str) -> None:
    assert house_style.judge(f"def {name}:\n    return {wrong}", name).score == 0
    assert house_style.judge(house_style.answer(PROBLEMS[name]), name).score == 1


def test_recorded_replies_have_the_score_that_they_get_now() -> None:
    for path in (EXAMPLES / "private_api" / "records").glob("house_style-*.json"):
        record = json.loads(path.read_text())
        for reply in (*record["before"], *record["after"]):
            name = reply["question"].split(" a function ")[1].split(" that returns ")[0]
            assert house_style.judge(reply["reply"], name).score == reply["score"]
