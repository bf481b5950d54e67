"""What is left of a text: thinking stripped as bracket rewriting has it, and a cut that keeps both ends.

Of a completion: the same, though its marks may be special tokens, or its tokenizer has a response template.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tiny
from hypothesis import assume, example, given
from hypothesis import strategies as st
from trl import chat_template_utils

from sdpo.reprompt import cut_middle, strip_thinking
from sdpo_rl.compat.trl import parsed_response
from sdpo_rl.rollout.thinking import without_thinking

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


# --- other marks ------------------------------------------------------------------------------------------

MARKS = [("[THINK]", "[/THINK]"), ("<t", "<t>"), ("<|a|>analysis", "<|a|>final"), ("(*", "*)")]


@given(PIECES, st.sampled_from(MARKS))
def test_any_two_marks_are_brackets(text: str, marks: tuple[str, str]) -> None:
    renamed = text.replace("<think>", marks[0]).replace("</think>", marks[1])
    got = strip_thinking(renamed, opening=marks[0], closing=marks[1])
    assert got == strip_thinking(text)


def test_marks_are_no_patterns_and_the_default_ones_are_not_looked_for() -> None:
    assert strip_thinking("<think>a</think>b", opening="(*", closing="*)") == "<think>a</think>b"
    assert strip_thinking("a.b|c", opening=".", closing="|") == "ac"
    assert re.sub(".b|", "", "a.b|c") != "ac"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"opening": ""},
            ValueError,
            "opening, closing: expected two different marks, got '' and '</think>'",
        ),
        ({"closing": ""}, ValueError, "two different marks"),
        ({"opening": "|", "closing": "|"}, ValueError, "two different marks"),
        ({"opening": None}, TypeError, "opening: expected a string, got NoneType"),
    ],
)
def test_bad_marks_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        strip_thinking("text", **changes)


# --- completions as tokens --------------------------------------------------------------------------------

THINK = ["<think>", "</think>"]
MISTRAL = ["[THINK]", "[/THINK]"]
HARMONY = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>"]
CHANNELS = ["<|channel|>analysis<|message|>", "<|channel|>final<|message|>"]
SECRET = "<|channel|>analysis<|message|>secret<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>42<|return|>"


def tokenizer_with(special: list[str], words: list[str] = [], **changes: Any) -> Any:  # noqa: B006
    tokenizer = tiny.tokenizer(**changes)
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(words)
    return tokenizer


def demonstration(tokenizer: Any, text: str, marks: list[str], *, as_messages: bool = False) -> str:
    """Of a completion with these tokens, decoded as TRL decodes it."""
    ids = tokenizer(text)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    completion = [{"role": "assistant", "content": decoded}] if as_messages else decoded
    return without_thinking(completion, ids, tokenizer, marks, parsed_response)


@pytest.mark.parametrize("as_messages", [False, True])
@pytest.mark.parametrize(
    ("special", "marks", "text", "shown"),
    [
        (THINK, THINK, "<think>secret</think>42<eos>", "42"),
        (MISTRAL, MISTRAL, "[THINK]secret[/THINK]42<eos>", "42"),
        (THINK, THINK, "<think>a</think>4<think>b</think>2", "42"),
        (THINK, THINK, "<think>a<think>b</think>c</think>42", "42"),
        (THINK, THINK, "secret</think>42", "42"),
        (THINK, THINK, "42<think>never ends", "42"),
        (THINK, THINK, "<think>never ends", ""),
        (THINK[:1], THINK, "<think>secret</think>42", "42"),
        (THINK[1:], THINK, "<think>secret</think>42", "42"),
        (HARMONY, CHANNELS, SECRET + FINAL, "42"),
        (HARMONY, CHANNELS, SECRET, ""),
        ([], THINK, "<think>secret</think>42", "42"),
        ([], THINK, "  no thought\n", "  no thought\n"),
        (THINK, THINK, "  no thought <eos>", "  no thought "),
        (MISTRAL, THINK, "[THINK]other marks[/THINK]42", "other marks42"),
    ],
)
def test_marks_may_be_special_tokens(
    special: list[str], marks: list[str], text: str, shown: str, as_messages: bool
) -> None:
    assert demonstration(tokenizer_with(special), text, marks, as_messages=as_messages) == shown


@given(PIECES)
def test_thinking_in_plain_text_is_as_before(text: str) -> None:
    assert demonstration(PLAIN, text, THINK) == strip_thinking(PLAIN.decode(PLAIN(text)["input_ids"]))


PLAIN = tiny.tokenizer()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (SECRET + FINAL, "42"),
        (SECRET + FINAL.removesuffix("<|return|>"), "42"),
        (SECRET * 2 + FINAL, "42"),
        (SECRET, ""),
        ("<|channel|>analysis<|message|>never ends", ""),
        ("42", "42"),
    ],
)
def test_a_response_template_says_what_is_thinking(own: bool, text: str, shown: str) -> None:
    """The tokenizer's, or the one that TRL has for its chat template; the tokenizer does not change."""
    template = None if own else chat_template_utils.gptoss_chat_template
    tokenizer = tokenizer_with(HARMONY, chat_template=template)
    if own:
        tokenizer.response_template = chat_template_utils.gptoss_template
    assert demonstration(tokenizer, text, THINK) == shown
    assert demonstration(tokenizer_with(HARMONY), SECRET + FINAL, THINK) != "42"
    assert (getattr(tokenizer, "response_template", None) is not None) == own


def test_what_is_parsed_already_is_taken_as_it_is() -> None:
    tokenizer = tokenizer_with(THINK)
    ids = tokenizer("<think>secret</think>f({})42")["input_ids"]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    parsed = {"role": "assistant", "reasoning_content": "secret", "content": "42", "tool_calls": [call]}
    assert without_thinking([parsed], ids, tokenizer, THINK, parsed_response) == "42\nf({})"
    turns = [parsed, {"role": "tool", "name": "f", "content": "7"}, {"role": "assistant", "content": "so 7"}]
    assert without_thinking(turns, ids, tokenizer, THINK, parsed_response) == "42\nf({})\n7\nso 7"


# --- cutting ----------------------------------------------------------------------------------------------


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
