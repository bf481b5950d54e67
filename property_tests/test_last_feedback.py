"""`last_feedback`, batch after batch: what was said in a batch is heard in it, and in no other."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from sdpo_rl.rollout.feedback import FeedbackCollector

Batches = list[list[str | None] | None]  # what is said in each batch; nothing where `None`


def assigns(batches: Batches) -> Any:
    def judge(completions: list[Any], **_: Any) -> list[float]:
        if (said := coming.pop(0)) is not None:
            judge.last_feedback = said  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    coming = list(batches)
    return judge


def writes_in_place(batches: Batches) -> Any:
    def judge(completions: list[Any], **_: Any) -> list[float]:
        if (said := coming.pop(0)) is not None:
            judge.last_feedback[:] = said  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    coming = list(batches)
    judge.last_feedback = []  # type: ignore[attr-defined]
    return judge


def writes_row_by_row(batches: Batches) -> Any:
    """Into rows that are there; a row that is fine is left alone."""

    def judge(completions: list[Any], **_: Any) -> list[float]:
        for row, text in enumerate(coming.pop(0) or []):
            if text is not None:
                judge.last_feedback[row] = text  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    coming = list(batches)
    judge.last_feedback = [None, None]  # type: ignore[attr-defined]
    return judge


def writes_to_its_own_list(batches: Batches) -> Any:
    """The attribute is a second name of a list that the function knows by its first."""

    def judge(completions: list[Any], **_: Any) -> list[float]:
        if (said := coming.pop(0)) is not None:
            mine.clear()
            mine.extend(said)
        return [0.0] * len(completions)

    coming, mine = list(batches), []  # type: ignore[var-annotated]
    judge.last_feedback = mine  # type: ignore[attr-defined]
    return judge


def later(batches: Batches) -> Any:
    async def judge(completions: list[Any], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        if (said := coming.pop(0)) is not None:
            judge.last_feedback = said  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    coming = list(batches)
    return judge


class Remembers:
    """What the kinds below have in common: `say` once a batch."""

    last_feedback: Any = None

    def __init__(self, batches: Batches) -> None:
        self.coming = list(batches)

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        if (said := self.coming.pop(0)) is not None:
            self.say(said)
        return [0.0] * len(completions)

    judge = __call__

    def say(self, said: Any) -> None:
        self.last_feedback = said


class Tuples(Remembers):
    def say(self, said: Any) -> None:
        self.last_feedback = tuple(said)


class Slots:
    __slots__ = ("coming", "last_feedback")
    __init__, __call__ = Remembers.__init__, Remembers.__call__

    def say(self, said: Any) -> None:
        self.last_feedback = list(said)


def for_its_class(batches: Batches) -> Any:
    class Judge(Remembers):
        def say(self, said: Any) -> None:
            type(self).last_feedback = list(said)

    return Judge(batches)


class Property(Remembers):
    """What is kept elsewhere."""

    kept: Any = None

    @property
    def last_feedback(self) -> Any:  # type: ignore[override]
        return self.kept

    def say(self, said: Any) -> None:
        self.kept = list(said)


SPEAKERS: dict[str, Callable[[Batches], Any]] = {
    "assigns": assigns,
    "writes in place": writes_in_place,
    "writes row by row": writes_row_by_row,
    "writes to its own list": writes_to_its_own_list,
    "later": later,
    "object": Remembers,
    "method": lambda batches: Remembers(batches).judge,
    "partial method": lambda batches: functools.partial(Remembers(batches).judge, how="kindly"),
    "tuples": Tuples,
    "slots": Slots,
    "for its class": for_its_class,
    "property": Property,
}
CANNED: list[str | None] = ["off by one", None]


def heard(speaker: Callable[[Batches], Any], batches: Batches) -> list[list[str | None]]:
    collector = FeedbackCollector()
    wrapped = collector.wrap(speaker(batches))
    rounds = []
    for _ in batches:
        result = wrapped(completions=["!", "!"])
        assert (asyncio.run(result) if asyncio.iscoroutine(result) else result) == [0.0, 0.0]
        rounds.append(collector.take(2))
    return rounds


DIFFERENT: Batches = [["first", None], None, [None, "third"], None, None]
SAME: Batches = [None, ["same", "same"], ["same", "same"], None, ["same", None]]


@pytest.mark.parametrize("kind", SPEAKERS)
def test_what_was_said_of_one_batch_is_not_said_of_the_next(kind: str) -> None:
    assert heard(SPEAKERS[kind], DIFFERENT) == [said or [None, None] for said in DIFFERENT]


# The same texts in the same list, written to behind the object's back, look like old ones.
@pytest.mark.parametrize("kind", sorted(SPEAKERS.keys() - {"writes to its own list"}))
def test_what_is_said_again_is_heard_again(kind: str) -> None:
    assert heard(SPEAKERS[kind], SAME) == [said or [None, None] for said in SAME]


@pytest.mark.parametrize("kind", ["assigns", "later", "object", "method", "partial method"])
def test_the_very_same_list_counts_when_it_is_assigned_again(kind: str) -> None:
    batches: Batches = [CANNED, CANNED, None, CANNED]
    assert heard(SPEAKERS[kind], batches) == [CANNED, CANNED, [None, None], CANNED]


def test_a_function_keeps_its_list_and_its_texts() -> None:
    judge = assigns([["first", None], None])
    collector = FeedbackCollector()
    wrapped = collector.wrap(judge)
    wrapped(completions=["!", "!"])
    collector.take(2)
    mine = judge.last_feedback
    wrapped(completions=["!", "!"])
    collector.take(2)
    assert judge.last_feedback is mine
    assert mine == ["first", None]
    assert type(mine[0]) is str


def test_what_was_there_before_the_first_batch_is_not_said() -> None:
    judge = assigns([None, ["now", None]])
    judge.last_feedback = ["tried out", "by hand"]
    assert heard(lambda _: judge, [None, None]) == [[None, None], ["now", None]]


def test_methods_that_wait_for_each_other_hear_one_another_s_object() -> None:
    """The second begins when the first has spoken but not returned."""

    class Judge:
        last_feedback: list[str] | None = None

        async def first(self, completions: list[Any], **_: Any) -> list[float]:
            self.last_feedback = ["early"]
            await asyncio.sleep(0.01)
            return [0.0]

        async def second(self, completions: list[Any], **_: Any) -> list[float]:
            return [0.0]

    judge, collector = Judge(), FeedbackCollector()
    wrapped = [collector.wrap(method) for method in (judge.first, judge.second)]

    async def both() -> None:
        await asyncio.gather(*(function(completions=["!"]) for function in wrapped))

    for _ in range(2):
        asyncio.run(both())
        assert collector.take(1) == ["early"]
