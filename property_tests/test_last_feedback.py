"""`last_feedback`, batch after batch: a text counts in the batch in which it is assigned, and in no other."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from sdpo_rl.rollout.feedback import FeedbackCollector

Batches = list[list[str | None] | None]  # the texts of each batch; `None`: nothing is assigned


def assigns(batches: Batches) -> Any:
    def judge(completions: list[Any], **_: Any) -> list[float]:
        if (texts := remaining.pop(0)) is not None:
            judge.last_feedback = texts  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    remaining = list(batches)
    return judge


def writes_in_place(batches: Batches) -> Any:
    def judge(completions: list[Any], **_: Any) -> list[float]:
        if (texts := remaining.pop(0)) is not None:
            judge.last_feedback[:] = texts  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    remaining = list(batches)
    judge.last_feedback = []  # type: ignore[attr-defined]
    return judge


def writes_row_by_row(batches: Batches) -> Any:
    """Into existing rows; a row without a remark is not written."""

    def judge(completions: list[Any], **_: Any) -> list[float]:
        for row, text in enumerate(remaining.pop(0) or []):
            if text is not None:
                judge.last_feedback[row] = text  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    remaining = list(batches)
    judge.last_feedback = [None, None]  # type: ignore[attr-defined]
    return judge


def writes_to_its_own_list(batches: Batches) -> Any:
    """The attribute is a second name of a list that the function holds in a variable."""

    def judge(completions: list[Any], **_: Any) -> list[float]:
        if (texts := remaining.pop(0)) is not None:
            own.clear()
            own.extend(texts)
        return [0.0] * len(completions)

    remaining, own = list(batches), []  # type: ignore[var-annotated]
    judge.last_feedback = own  # type: ignore[attr-defined]
    return judge


def later(batches: Batches) -> Any:
    async def judge(completions: list[Any], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        if (texts := remaining.pop(0)) is not None:
            judge.last_feedback = texts  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    remaining = list(batches)
    return judge


class Judge:
    """The common part of the classes below: `assign` once per batch."""

    last_feedback: Any = None

    def __init__(self, batches: Batches) -> None:
        self.remaining = list(batches)

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        if (texts := self.remaining.pop(0)) is not None:
            self.assign(texts)
        return [0.0] * len(completions)

    judge = __call__

    def assign(self, texts: Any) -> None:
        self.last_feedback = texts


class Tuples(Judge):
    def assign(self, texts: Any) -> None:
        self.last_feedback = tuple(texts)


class Slots:
    __slots__ = ("last_feedback", "remaining")
    __init__, __call__ = Judge.__init__, Judge.__call__

    def assign(self, texts: Any) -> None:
        self.last_feedback = list(texts)


def of_its_class(batches: Batches) -> Any:
    class OfClass(Judge):
        def assign(self, texts: Any) -> None:
            type(self).last_feedback = list(texts)

    return OfClass(batches)


class Property(Judge):
    """A value that is stored under another name."""

    stored: Any = None

    @property
    def last_feedback(self) -> Any:  # type: ignore[override]
        return self.stored

    def assign(self, texts: Any) -> None:
        self.stored = list(texts)


KINDS: dict[str, Callable[[Batches], Any]] = {
    "assigns": assigns,
    "writes in place": writes_in_place,
    "writes row by row": writes_row_by_row,
    "writes to its own list": writes_to_its_own_list,
    "later": later,
    "object": Judge,
    "method": lambda batches: Judge(batches).judge,
    "partial method": lambda batches: functools.partial(Judge(batches).judge, how="kindly"),
    "tuples": Tuples,
    "slots": Slots,
    "of its class": of_its_class,
    "property": Property,
}
FIXED: list[str | None] = ["off by one", None]


def collected(kind: Callable[[Batches], Any], batches: Batches) -> list[list[str | None]]:
    collector = FeedbackCollector()
    wrapped = collector.wrap(kind(batches))
    rounds = []
    for _ in batches:
        result = wrapped(completions=["!", "!"])
        assert (asyncio.run(result) if asyncio.iscoroutine(result) else result) == [0.0, 0.0]
        rounds.append(collector.take(2))
    return rounds


DIFFERENT: Batches = [["first", None], None, [None, "third"], None, None]
SAME: Batches = [None, ["same", "same"], ["same", "same"], None, ["same", None]]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_one_batch_do_not_count_in_the_next(kind: str) -> None:
    assert collected(KINDS[kind], DIFFERENT) == [texts or [None, None] for texts in DIFFERENT]


# The same texts written into the same list cannot be told from old ones.
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"writes to its own list"}))
def test_equal_texts_count_again(kind: str) -> None:
    assert collected(KINDS[kind], SAME) == [texts or [None, None] for texts in SAME]


@pytest.mark.parametrize("kind", ["assigns", "later", "object", "method", "partial method"])
def test_the_same_list_counts_again_when_it_is_assigned(kind: str) -> None:
    batches: Batches = [FIXED, FIXED, None, FIXED]
    assert collected(KINDS[kind], batches) == [FIXED, FIXED, [None, None], FIXED]


def test_a_function_keeps_its_list_and_its_texts() -> None:
    judge = assigns([["first", None], None])
    collector = FeedbackCollector()
    wrapped = collector.wrap(judge)
    wrapped(completions=["!", "!"])
    collector.take(2)
    own = judge.last_feedback
    wrapped(completions=["!", "!"])
    collector.take(2)
    assert judge.last_feedback is own
    assert own == ["first", None]
    assert type(own[0]) is str


def test_texts_from_before_the_first_batch_do_not_count() -> None:
    judge = assigns([None, ["now", None]])
    judge.last_feedback = ["tried out", "by hand"]
    assert collected(lambda _: judge, [None, None]) == [[None, None], ["now", None]]


def test_concurrent_methods_of_one_object_share_its_texts() -> None:
    """The second begins when the first has assigned its texts but not returned."""

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
