"""Live feedback: whatever shape a reward function's output has, every text stays with its row."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, name_of

from sdpo_rl.feedback import FeedbackCollector, join_feedback, split_rewards

# --- one function's output --------------------------------------------------------------------------------

scores = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-5, 5)
texts = st.none() | st.sampled_from(["", " \n", "line 2: {x}", "two\nlines", "off by one"])
SHAPES: list[Callable[[Any, Any], Any]] = [
    lambda score, text: (score, text),
    lambda score, text: [score, text],
    lambda score, text: {"score": score, "feedback": text},
    lambda score, text: {"score": score} if text is None else {"feedback": text, "score": score},
    lambda score, text: score if text is None else (score, text),
]
rows = st.lists(st.tuples(scores, texts, st.sampled_from(SHAPES)), max_size=8)


def property_scores_and_texts_stay_with_their_rows(split: Any, table: Any, container: Any) -> None:
    got_scores, got_texts = split("judge", container(shape(s, t) for s, t, shape in table), len(table))
    assert got_texts == [text for _, text, _ in table]
    assert got_scores == [None if s is None else float(s) for s, *_ in table]


def forgets_rows_without_score(name: str, outputs: Any, count: int) -> Any:
    got_scores, got_texts = split_rewards(name, outputs, count)
    return got_scores, [None if s is None else t for s, t in zip(got_scores, got_texts, strict=True)]


def property_blank_texts_do_not_count(join: Any, column: Any) -> None:
    kept = [text for text in column if text is not None and not text.isspace() and text]
    joined = join(column)
    assert (joined is None) == (not kept)
    if kept:
        assert joined.split("\n\n") == kept


# --- several functions, one batch -------------------------------------------------------------------------

tables = st.integers(1, 5).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(texts, min_size=count, max_size=count), min_size=1, max_size=4),
        st.none() | st.lists(texts, min_size=count, max_size=count),
    )
)


KINDS = ["pairs", "later", "object", "partial", "method", "partial method"]


def reward(column: list[str | None], kind: str) -> Any:
    """A reward function that says the texts of `column`, in one of the ways there are."""

    def pairs(completions: list[Any], **_: Any) -> list[Any]:
        return [(0.0, text) for text in column]

    async def later(completions: list[Any], **_: Any) -> list[Any]:
        await asyncio.sleep(0)
        return [(0.0, text) for text in column]

    class Remembers:
        last_feedback: list[str | None] | None = None

        def __call__(self, completions: list[Any], **_: Any) -> list[float]:
            self.last_feedback = list(column)
            return [0.0] * len(completions)

        def judge(self, completions: list[Any], how: str = "strictly", **_: Any) -> list[float]:
            return self(completions)

    def bound(completions: list[Any], said: Any, **_: Any) -> list[Any]:
        return [{"score": 0.0, "feedback": text} for text in said]

    return {
        "pairs": pairs,
        "later": later,
        "object": Remembers(),
        "method": Remembers().judge,
        "partial method": functools.partial(Remembers().judge, how="kindly"),
        "partial": functools.partial(bound, said=column),
    }[kind]


def collect(
    columns: list[list[str | None]], kinds: list[str], static: list[str | None] | None
) -> list[str | None]:
    collector = FeedbackCollector()
    wrapped = [collector.wrap(reward(c, k)) for c, k in zip(columns, kinds, strict=False)]
    count = len(columns[0])
    for function in reversed(wrapped):  # async functions finish in any order
        result = function(prompts=["?"] * count, completions=["!"] * count)
        got = asyncio.run(result) if asyncio.iscoroutine(result) else result
        assert got == [0.0] * count
    return collector.take(count, static)


def property_rows_gather_the_texts_of_all_functions_in_order(
    gather: Any, table: Any, kinds: list[str]
) -> None:
    columns, static = table
    rows = list(zip(*columns, strict=True))
    expected = ["\n\n".join(t for t in row if t and t.strip()) or None for row in rows]
    if static is not None:
        expected = [
            said if said is not None else (known if known and known.strip() else None)
            for said, known in zip(expected, static, strict=True)
        ]
    assert gather(columns, kinds, static) == expected


def last_function_wins(columns: Any, kinds: list[str], static: Any) -> Any:
    return collect(columns[-1:], kinds, static)


CLAIMS = [
    Claim(
        property_scores_and_texts_stay_with_their_rows,
        split_rewards,
        forgets_rows_without_score,
        {"table": rows, "container": st.sampled_from([list, tuple, iter])},
    ),
    Claim(
        property_blank_texts_do_not_count,
        join_feedback,
        lambda column: "\n\n".join(t for t in column if t) or None,
        {"column": st.lists(st.none() | st.sampled_from(["", " ", "\n", "a", "b{}"]))},
    ),
    Claim(
        property_rows_gather_the_texts_of_all_functions_in_order,
        collect,
        last_function_wins,
        {"table": tables, "kinds": st.permutations(KINDS)},
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_wrong_twin(claim: Claim) -> None:
    claim.rejects_wrong_twin()


# --- wrapping ---------------------------------------------------------------------------------------------


class Judge:
    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        return [0.0 for _ in completions]


class AsyncJudge:
    async def __call__(self, completions: list[Any], **_: Any) -> list[tuple[float, str]]:
        return [(1.0, "why") for _ in completions]


def test_names_survive() -> None:
    wrap = FeedbackCollector().wrap
    assert wrap(reward([], "pairs")).__name__ == "pairs"
    assert wrap(reward([], "later")).__name__ == "later"
    assert wrap(reward([], "partial")).__name__ == "bound"
    assert wrap(Judge()).__name__ == "Judge"


def test_async_stays_async() -> None:
    wrap = FeedbackCollector().wrap
    assert asyncio.iscoroutinefunction(wrap(reward([], "later")))
    assert asyncio.iscoroutinefunction(wrap(AsyncJudge()))
    assert not asyncio.iscoroutinefunction(wrap(reward([], "pairs")))


def test_reward_models_and_names_pass_through() -> None:
    model = torch.nn.Linear(1, 1)
    assert FeedbackCollector().wrap(model) is model
    assert FeedbackCollector().wrap("org/reward-model") == "org/reward-model"


def test_a_batch_is_forgotten_once_taken() -> None:
    collector = FeedbackCollector()
    collector.wrap(reward(["old"], "pairs"))(completions=["!"])
    assert collector.take(1) == ["old"]
    assert collector.take(1) == [None]


def test_two_methods_of_one_judge_say_it_once() -> None:
    class Twofold:
        def __init__(self) -> None:
            self.last_feedback: list[str] = []

        def score(self, completions: list[Any], **_: Any) -> list[float]:
            self.last_feedback = ["off by one"]
            return [0.0]

        def length(self, completions: list[Any], **_: Any) -> list[float]:
            return [1.0]

        def style(self, completions: list[Any], **_: Any) -> list[float]:
            self.last_feedback = ["too long"]
            return [1.0]

    judge, collector = Twofold(), FeedbackCollector()
    wrapped = [collector.wrap(method) for method in (judge.score, judge.length, judge.style)]
    for _ in range(2):
        for function in wrapped:
            function(completions=["!"])
        assert collector.take(1) == ["off by one\n\ntoo long"]


def test_a_column_holds_texts() -> None:
    with pytest.raises(TypeError, match=r"column 'feedback' must hold strings or None, got list in row 1"):
        FeedbackCollector().take(2, ["fine", ["a", "b"]])


# --- `last_feedback`, batch after batch -------------------------------------------------------------------

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


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_scores_and_texts_in_two_lists_are_refused_with_the_way_out(rows: int) -> None:
    scores, texts = [1.0] * rows, ["why"] * rows
    for outputs in ((scores, texts), [scores, texts], (torch.tensor(scores), texts)):
        with pytest.raises(
            ValueError, match=r"'judge'.*pair of lists.*per row.*list\(zip\(scores, texts\)\)"
        ):
            split_rewards("judge", outputs, rows)


def test_two_rows_are_no_pair_of_lists() -> None:
    assert split_rewards("judge", ([1.0, None], [0.0, "why"]), 2) == ([1.0, 0.0], [None, "why"])
    assert split_rewards("judge", torch.tensor([1.0, 0.0]), 2) == ([1.0, 0.0], [None, None])
    with pytest.raises(ValueError, match="2 items for 8 completions"):
        split_rewards("judge", [(1.0, "a"), (0.0, "b")], 8)
