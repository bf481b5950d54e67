"""What is left of a text: thinking stripped as bracket rewriting has it, and a cut that keeps both ends."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sdpo.reprompt import cut_middle, strip_thinking

PIECES = st.lists(st.sampled_from(["<think>", "</think>", "a", "b ", "\n", "{x}"]), max_size=9).map("".join)
FRAGMENTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</th", "ink>", "<", " a"]), max_size=12
).map("".join)


def naive_strip(text: str) -> str:
    """Bracket rewriting: innermost pairs vanish first, then what a lone bracket claims."""
    if not re.search("</?think>", text):
        return text
    text = text.replace("<think>", "\1").replace("</think>", "\2")
    while re.search("\1[^\1\2]*\2", text):
        text = re.sub("\1[^\1\2]*\2", "", text)
    return text.rpartition("\2")[2].partition("\1")[0].strip()


def regex_strip(text: str) -> str:
    return re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()


def closed_only_strip(text: str) -> str:
    return text.rpartition("</think>")[2].strip()


@given(PIECES)
def test_thinking_equals_bracket_rewriting(text: str) -> None:
    assert strip_thinking(text) == naive_strip(text)


@pytest.mark.parametrize("counter_example", [regex_strip, closed_only_strip, str.strip])
def test_bracket_rewriting_rejects_simpler_rules(counter_example: Callable[[str], str]) -> None:
    witnesses = ["<think>a", "a</think>b", "<think>a<think>b</think>c</think>d", "a <think>b</think>", " a"]
    assert any(counter_example(text) != naive_strip(text) for text in witnesses)
    assert all(strip_thinking(text) == naive_strip(text) for text in witnesses)


@given(FRAGMENTS)
@example("<thi<think></think>nk>x</think> y")
def test_stripping_is_idempotent_and_leaves_no_tag(text: str) -> None:
    once = strip_thinking(text)
    assert strip_thinking(once) == once
    assert "<think>" not in once
    assert "</think>" not in once


def test_one_pass_over_broken_tags_is_not_enough() -> None:
    text = "<thi<think></think>nk>secret"
    assert "<think>" in regex_strip(text)
    assert strip_thinking(text) == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("  no tag\n", "  no tag\n"),
        ("<think>a</think>\n\n  b ", "b"),
        ("<think>a</think><think>b</think>c", "c"),
        ("x <think>a<think>b</think>c</think> d", "x  d"),
        ("a</think>b</think>c", "c"),
        ("a<think>b", "a"),
        ("<think>only thoughts</think>", ""),
        ("</think>", ""),
    ],
)
def test_thinking_examples(text: str, kept: str) -> None:
    assert strip_thinking(text) == kept


def is_a_cut(cut: Callable[..., list[int]], items: list[int], limit: int, marker: list[int]) -> bool:
    result = cut(items, limit, marker=marker)
    if len(items) <= limit:
        return result == items
    gap = marker if limit > len(marker) else []
    head = (limit - len(gap) + 1) // 2
    tail = limit - len(gap) - head
    return result == items[:head] + gap + list(reversed(list(reversed(items))[:tail]))


@given(st.lists(st.integers(), max_size=12), st.integers(0, 14), st.lists(st.just(-1), max_size=4))
@example([1, 2, 3], 2, [-1, -1])
def test_cut_middle_keeps_both_ends(items: list[int], limit: int, marker: list[int]) -> None:
    before = list(items)
    assert is_a_cut(cut_middle, items, limit, marker)
    assert items == before
    assert len(cut_middle(items, limit, marker=marker)) == min(len(items), limit)
    assume(items)
    assert cut_middle(tuple(items), len(items), marker=marker) == items


def test_cut_middle_rejects_other_cuts() -> None:
    def from_the_right(items: list[int], limit: int, *, marker: list[int]) -> list[int]:
        return items[:limit]

    def empty_tail_by_minus_zero(items: list[int], limit: int, *, marker: list[int]) -> list[int]:
        gap = marker if limit > len(marker) else []
        kept = limit - len(gap)
        return [*items[: kept - kept // 2], *gap, *items[-(kept // 2) :]] if len(items) > limit else items

    items = list(range(10))
    assert not is_a_cut(from_the_right, items, 6, [-1])
    assert is_a_cut(empty_tail_by_minus_zero, items, 6, [-1])
    assert not is_a_cut(empty_tail_by_minus_zero, items, 2, [-1])
    with pytest.raises(ValueError, match=r"limit: expected an int in .*, got -1"):
        cut_middle(items, -1, marker=[])
