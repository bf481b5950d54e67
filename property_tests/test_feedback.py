"""Feedback: whatever form a reward function's output has, every text stays with its row."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, name_of

from sdpo_rl.rollout.feedback import (
    FeedbackCollector,
    column_name,
    column_texts,
    environment_feedback,
    join_feedback,
    split_rewards,
)

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
    shown = [text for text in column if text is not None and not text.isspace() and text]
    joined = join(column)
    assert (joined is None) == (not shown)
    if shown:
        assert joined.split("\n\n") == shown


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_scores_and_texts_in_two_lists_are_refused_with_the_way_out(rows: int) -> None:
    scores, texts = [1.0] * rows, ["why"] * rows
    for outputs in ((scores, texts), [scores, texts], (torch.tensor(scores), texts)):
        with pytest.raises(
            ValueError, match=r"'judge'.*pair per row.*pair of lists.*list\(zip\(scores, texts\)\)"
        ):
            split_rewards("judge", outputs, rows)


def test_two_rows_are_no_pair_of_lists() -> None:
    assert split_rewards("judge", ([1.0, None], [0.0, "why"]), 2) == ([1.0, 0.0], [None, "why"])
    assert split_rewards("judge", torch.tensor([1.0, 0.0]), 2) == ([1.0, 0.0], [None, None])
    with pytest.raises(ValueError, match=r"expected 8 items.*got 2 items"):
        split_rewards("judge", [(1.0, "a"), (0.0, "b")], 8)


@pytest.mark.parametrize("score", ["1.0", "nan", b"1", torch.empty((), device="meta")])
def test_what_only_looks_like_a_number_is_refused_with_function_and_row(score: Any) -> None:
    for item in (score, (score, "why"), {"score": score}):
        with pytest.raises(TypeError, match=r"'judge', row 1: expected a number.*return one of these"):
            split_rewards("judge", [0.0, item], 2)


@pytest.mark.parametrize("outputs", [{0.0, 1.0}, frozenset([0.0, 1.0]), b"ab"])
def test_outputs_without_an_order_are_refused(outputs: Any) -> None:
    with pytest.raises(TypeError, match=r"'judge': expected one item per row, got .*; return a list"):
        split_rewards("judge", outputs, 2)


def test_texts_that_no_tokenizer_takes_are_refused_where_they_come_from() -> None:
    """The text of a subprocess, say, that was decoded with errors='surrogateescape'."""
    broken = b"caf\xe9".decode(errors="surrogateescape")
    found = r"expected text that UTF-8 can encode, got '\\udce9' at character 3; decode bytes"
    with pytest.raises(ValueError, match=rf"reward function 'judge', row 1: {found}"):
        split_rewards("judge", [0.0, (0.0, broken)], 2)
    with pytest.raises(ValueError, match=rf"the column 'feedback', row 1: {found}"):
        column_texts([{"feedback": "fine"}, {"feedback": broken}])
    with pytest.raises(ValueError, match=rf"SimpleNamespace.feedback: {found}"):
        environment_feedback([SimpleNamespace(feedback=broken)])
    fine = "\U0001f600 \0 \u202e"
    assert split_rewards("judge", [(0.0, fine)], 1) == ([0.0], [fine])


@pytest.mark.parametrize(
    "score", [float("inf"), -float("inf"), torch.tensor(torch.inf), 1e39, -1e39, 10**400, -(10**400)]
)
def test_an_infinite_score_is_refused_with_function_and_row(score: Any) -> None:
    for item in (score, (score, "why"), {"score": score}):
        with pytest.raises(ValueError, match=r"'judge', row 1: expected a finite score, got .*; clip it"):
            split_rewards("judge", [0.0, item], 2)


def test_the_largest_float32_and_what_is_not_judged_pass() -> None:
    largest = torch.finfo(torch.float32).max
    items = [largest, -largest, None, float("nan"), (None, "why")]
    scores, texts = split_rewards("judge", items, 5)
    assert scores[:3] == [largest, -largest, None]
    assert math.isnan(scores[3])  # type: ignore[arg-type]
    assert (scores[4], texts[4]) == (None, "why")


# --- several functions, one batch -------------------------------------------------------------------------

tables = st.integers(1, 5).flatmap(
    lambda count: st.tuples(
        st.lists(st.lists(texts, min_size=count, max_size=count), min_size=1, max_size=4),
        st.none() | st.lists(texts, min_size=count, max_size=count),
    )
)


KINDS = ["pairs", "later", "object", "partial", "method", "partial method"]


def reward(column: list[str | None], kind: str) -> Any:
    """A reward function that returns the texts of `column`, in one of the possible ways."""

    def pairs(completions: list[Any], **_: Any) -> list[Any]:
        return [(0.0, text) for text in column]

    async def later(completions: list[Any], **_: Any) -> list[Any]:
        await asyncio.sleep(0)
        return [(0.0, text) for text in column]

    class Judge:
        last_feedback: list[str | None] | None = None

        def __call__(self, completions: list[Any], **_: Any) -> list[float]:
            self.last_feedback = list(column)
            return [0.0] * len(completions)

        def judge(self, completions: list[Any], how: str = "strictly", **_: Any) -> list[float]:
            return self(completions)

    def bound(completions: list[Any], texts: Any, **_: Any) -> list[Any]:
        return [{"score": 0.0, "feedback": text} for text in texts]

    return {
        "pairs": pairs,
        "later": later,
        "object": Judge(),
        "method": Judge().judge,
        "partial method": functools.partial(Judge().judge, how="kindly"),
        "partial": functools.partial(bound, texts=column),
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
            live if live is not None else (text if text and text.strip() else None)
            for live, text in zip(expected, static, strict=True)
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
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


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


def test_take_clears_the_texts() -> None:
    collector = FeedbackCollector()
    collector.wrap(reward(["old"], "pairs"))(completions=["!"])
    assert collector.take(1) == ["old"]
    assert collector.take(1) == [None]


def test_a_list_that_two_methods_share_counts_once() -> None:
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


def test_a_function_that_empties_its_completions_is_counted_by_what_it_was_given() -> None:
    def consuming(completions: list[Any], **_: Any) -> list[Any]:
        return [(0.0, f"got {completions.pop(0)}") for _ in range(len(completions))]

    collector = FeedbackCollector()
    assert collector.wrap(consuming)(completions=["a", "b"]) == [0.0, 0.0]
    assert collector.take(2) == ["got a", "got b"]


# --- columns ----------------------------------------------------------------------------------------------


def test_a_column_holds_texts() -> None:
    with pytest.raises(TypeError, match=r"column 'feedback': expected strings or None, got list in row 1"):
        column_texts([{"feedback": "fine"}, {"feedback": ["a", "b"]}])


def test_feedback_is_a_column_of_either_name() -> None:
    assert column_texts([{"prompt": "?", "privileged_context": "why"}, {"prompt": "?"}]) == ["why", None]
    assert column_texts([{"prompt": "?"}]) == [None]
    assert [column_name(names) for names in (["prompt"], ["feedback"], ["prompt", "privileged_context"])] == [
        None,
        "feedback",
        "privileged_context",
    ]
    with pytest.raises(
        ValueError, match=r"feedback: expected one column.*got feedback and privileged_context"
    ):
        column_name(["privileged_context", "prompt", "feedback"])


def test_feedback_of_a_rollout_function_precedes_the_dataset_s() -> None:
    assert column_texts([{"privileged_context": "static", "feedback": "live"}]) == ["live"]
