"""Prompts and reprompts as tokens: a conversation is rendered as the student's, and only inserted texts are cut."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import trl
from hypothesis import strategies as st
from jinja2 import TemplateError
from strategies import Claim, name_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sdpo import Templates, cut_middle
from sdpo_rl.rollout.cuts import CUT_MARKER, CuttableText
from sdpo_rl.rollout.prompts import Renderer, check_prompts, completion_text, question, with_question
from sdpo_rl.rollout.reprompts import Reprompter, TeacherPrompts

TOKENIZER = tiny.tokenizer()
TEMPLATES = Templates(
    reprompt="{prompt}|{solution}{feedback}|again",
    solution="S{successful_previous_attempt}",
    feedback="F{feedback_raw}",
)


def decode(ids: list[int]) -> str:
    return "".join(tiny.VOCABULARY[i] for i in ids)


# --- fitting into a limit ---------------------------------------------------------------------------------

Fit = Callable[..., TeacherPrompts]
words = st.text("ab {}\n<", max_size=30)
MARKS = {"system": tiny.SYSTEM, "user": tiny.USER, "assistant": tiny.BOT, "tool": tiny.USER}
SYSTEM = [{"role": "system", "content": "s"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
RESULTS = [
    {"role": "assistant", "content": "look", "tool_calls": [CALL]},
    {"role": "tool", "name": "look", "content": "{7}"},
]
cases = {
    "prompt": st.sampled_from(
        [
            "why {x}?",
            tiny.user("why {x}?"),
            [*SYSTEM, *tiny.user("{}")],
            [*tiny.user("why {x}?"), *RESULTS],
            [*SYSTEM, *tiny.user("no"), *RESULTS, *tiny.user("{}"), *RESULTS, RESULTS[1]],
        ]
    ),
    "demonstrations": st.lists(words, max_size=3),
    "feedback": st.none() | words,
    "limit": st.integers(0, 90),
    "mode": st.sampled_from(["middle", "left", "right"]),
    "both": st.booleans(),
}


def fit(
    prompt: Any, demonstrations: list[str], feedback: str | None, limit: int, mode: str, both: bool
) -> Any:
    reprompter = Reprompter(Renderer(TOKENIZER), TEMPLATES, not both, mode)
    return reprompter([prompt], [demonstrations], [feedback], [limit])


def cuts_the_tokens_from_the_right(prompt: Any, *args: Any) -> Any:
    """Within any limit, but without the generation prompt."""
    demonstrations, feedback, limit, mode, both = args
    whole = fit(prompt, demonstrations, feedback, 10**6, mode, both)
    cut = len(whole.ids[0]) > limit
    return TeacherPrompts(
        [whole.ids[0][:limit]],
        whole.row_mask,
        whole.has_demonstration,
        whole.uses_feedback,
        [cut],
        [False],
        [limit],
        whole.whole_lengths,
        [[]],
    )


def property_only_inserted_texts_are_cut_and_the_limit_holds(
    fitting: Fit, prompt: Any, demonstrations: Any, feedback: Any, limit: int, mode: str, both: bool
) -> None:
    shown = [text for text in demonstrations if text.strip()]
    remark = feedback if feedback and feedback.strip() and (both or not shown) else None
    texts = [*shown, *([remark] if remark is not None else [])]
    before, after = f"{prompt}|", "|again"
    if not isinstance(prompt, str):
        turns = [MARKS[turn["role"]] + turn["content"] for turn in prompt]
        place = max(i for i, turn in enumerate(prompt) if turn["role"] == "user")
        before, after = "".join(turns[: place + 1]) + "|", "|again" + "".join(turns[place + 1 :]) + "<bot>"
    marked = [*("S" + text for text in shown), *(["F" + remark] if remark is not None else [])]
    special = sum(len(mark) - 1 for mark in re.findall("<system>|<user>|<bot>", before + after))
    whole = before + "".join(marked) + after
    size = len(whole) - special

    got = fitting(prompt, demonstrations, feedback, limit, mode, both)
    ids, on = got.ids[0], got.row_mask[0]
    inserted = decode(ids).removeprefix(before) if on else ""
    assert (got.has_demonstration, got.uses_feedback) == (["S" in inserted], ["F" in inserted])
    assert on == bool(inserted)
    assert on == bool(ids)
    assert not (got.truncated[0] and got.dropped[0])
    if not texts:
        assert not on
        assert not (got.truncated[0])
        assert not (got.dropped[0])
    elif size <= limit:
        assert decode(ids) == whole
        assert not (got.truncated[0])
        assert not (got.dropped[0])
    elif on:
        assert got.truncated[0]
        assert got.limits == [limit]
        assert got.whole_lengths == [size]
        assert any(CUT_MARKER in text for text in got.cut_texts[0])
        assert all(text in inserted for text in got.cut_texts[0])
        assert len(ids) <= limit
        assert decode(ids).startswith(before)
        assert decode(ids).endswith(after)
        assert CUT_MARKER in decode(ids)
    else:
        assert got.dropped[0]
        left = limit - (len(before + after) - special)
        assert left < len(texts) * (2 + len(CUT_MARKER) + 1) + len(texts)


def property_the_named_side_is_cut(fitting: Fit, text: str, limit: int, mode: str) -> None:
    """Of one long demonstration remains its tail, its head, or both ends."""
    got = fitting("q", [text], None, limit, mode, False)
    remainder = decode(got.ids[0])[len("q|S") : -len("|again")]
    assert len(got.ids[0]) == limit
    head, _, tail = remainder.partition(CUT_MARKER)
    assert text.startswith(head)
    assert text.endswith(tail)
    assert {"left": head == "", "right": tail == "", "middle": abs(len(head) - len(tail)) <= 1}[mode]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, as of characters that a byte-level tokenizer has no token for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


BYTES = byte_tokenizer()


class Slow:
    """A tokenizer that does not tell where its tokens are in the text."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, text: str, **arguments: Any) -> Any:
        assert "return_offsets_mapping" not in arguments
        return self.inner(text=text, **arguments)


Cut = Callable[[Any, str, int, str], str]


def cut_text(tokenizer: Any, text: str, limit: int, mode: str) -> str:
    return CuttableText(text, Renderer(tokenizer)).cut(limit, mode)


def cut_tokens(tokenizer: Any, text: str, limit: int, mode: str) -> str:
    """Cuts wherever the count demands, also within a character."""
    ids, marker = (BYTES(text=part)["input_ids"] for part in (text, CUT_MARKER))
    if mode == "middle":
        return BYTES.decode(cut_middle(ids, limit, marker=marker))
    kept = limit - len(marker)
    return BYTES.decode([*ids[:kept], *marker] if mode == "right" else [*marker, *ids[-kept:]])


def property_no_character_is_split(cut: Cut, text: str, limit: int, mode: str, slow: bool) -> None:
    """What remains are characters of the text, U+FFFD among them only if it was there, and nothing is wasted."""
    got = cut(Slow(BYTES) if slow else BYTES, text, limit, mode)
    size = len(got.encode())
    assert size <= limit
    if len(text.encode()) <= limit:
        assert got == text
    elif got:
        head, _, tail = got.partition(CUT_MARKER)
        assert text.startswith(head)
        assert text.endswith(tail)
        assert size > limit - 8  # no more than two characters are lost for it
    else:
        assert limit < len(CUT_MARKER) + 8


CLAIMS = [
    Claim(
        property_no_character_is_split,
        cut_text,
        cut_tokens,
        {
            "text": st.text("aäß漢🙂\ufffd", min_size=5, max_size=30),
            "limit": st.integers(6, 60),
            "mode": cases["mode"],
            "slow": st.booleans(),
        },
    ),
    Claim(
        property_only_inserted_texts_are_cut_and_the_limit_holds, fit, cuts_the_tokens_from_the_right, cases
    ),
    Claim(
        property_the_named_side_is_cut,
        fit,
        lambda *args: fit(*args[:4], "middle", args[5]),
        {
            "text": st.text("abcdefgh", min_size=50, max_size=60),
            "limit": st.integers(25, 45),
            "mode": cases["mode"],
        },
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_too_long_can_be_an_error() -> None:
    reprompter = Reprompter(Renderer(TOKENIZER), TEMPLATES, True, "error")
    assert reprompter(["q"], [["abc"]], [None], [13]).row_mask == [True]
    with pytest.raises(ValueError, match=r"max_reprompt_length: .*12 tokens, got 11; raise .*'middle'"):
        reprompter(["q"], [["abc"]], [None], [11])


def test_a_demonstration_that_is_cut_away_is_none() -> None:
    """Equal shares: of a short text beside a long one nothing but the marker would remain."""
    for mode in ("middle", "left", "right"):
        got = fit("q", ["ab" * 4], "ba" * 60, 60, mode, True)
        assert decode(got.ids[0]).startswith("q|Fb" if mode != "left" else "q|F ")
        assert (got.row_mask, got.truncated, got.dropped) == ([True], [True], [False])
        assert (got.has_demonstration, got.uses_feedback) == ([False], [True])
        got = fit("q", ["ab" * 60], "ba" * 4, 60, mode, True)
        assert (got.has_demonstration, got.uses_feedback) == ([True], [False])


def test_the_tokenizer_is_not_changed() -> None:
    tokenizer = tiny.tokenizer(padding_side="right", truncation_side="right")
    before = copy.deepcopy(tokenizer.init_kwargs), tokenizer.padding_side, tokenizer.truncation_side
    Reprompter(Renderer(tokenizer), TEMPLATES, True, "left")([tiny.user("q")], [["a" * 50]], [None], [30])
    assert (tokenizer.init_kwargs, tokenizer.padding_side, tokenizer.truncation_side) == before


def test_rows_without_signal_are_not_rendered() -> None:
    rendered: list[Any] = []

    class Watching(Renderer):
        def __call__(self, prompts: Any, rows: Any = ()) -> Any:
            rendered.extend(prompts)
            return super().__call__(prompts, rows)

    got = Reprompter(Watching(TOKENIZER), TEMPLATES, True, "middle")(
        ["a", "b", "c"], [[], ["x"], [" "]], [None, None, ""], [99, 99, 99]
    )
    assert rendered == ["b|Sx|again"]
    assert got.row_mask == [False, True, False]


class Counting:
    """A tokenizer that counts the texts it is given."""

    def __init__(self) -> None:
        self.texts = 0

    def __call__(self, text: list[str]) -> Any:
        self.texts += len(text)
        return TOKENIZER(text=text)

    def apply_chat_template(self, conversation: list[Any], **arguments: Any) -> Any:
        self.texts += len(conversation)
        return TOKENIZER.apply_chat_template(conversation=conversation, **arguments)


@pytest.mark.parametrize("chat", [False, True])
def test_equal_prompts_are_tokenized_once(chat: bool) -> None:
    def asked(system: str, text: str) -> Any:
        return [{"role": "system", "content": system}, *tiny.user(text)] if chat else system + text

    # New objects, as a dataset returns them; the same question after other instructions is another prompt.
    prompts = [asked(*pair) for pair in [("s", "a"), ("t", "a"), ("s", "a"), ("s", "b"), ("t", "a")]]
    counting = Counting()
    rendered = Renderer(counting)(prompts)
    assert rendered == [Renderer(TOKENIZER)([prompt])[0] for prompt in prompts]
    assert counting.texts == len({decode(ids) for ids in rendered}) == 3


# --- the chat template ------------------------------------------------------------------------------------

TEMPLATE_FILES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
CONVERSATIONS = [
    [{"role": "system", "content": "be kind"}, {"role": "user", "content": "QUESTION"}],
    [
        {"role": "user", "content": "earlier"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": "QUESTION"},
    ],
    [*tiny.user("QUESTION"), *RESULTS],
]


def as_parts(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in conversation]


def text(tokenizer: Any, prompt: Any, **arguments: Any) -> str:
    return decode(Renderer(tokenizer, template_kwargs=arguments)([prompt])[0])


@pytest.mark.parametrize("path", TEMPLATE_FILES, ids=lambda path: path.stem)
def test_a_real_template_is_applied_once_around_the_new_question(path: Path) -> None:
    """Rendering with another question is the rendering with the question replaced, and nothing else."""
    tokenizer = tiny.tokenizer(chat_template=path.read_text(), bos_token=tiny.EOS)
    tried = 0
    for conversation in (*CONVERSATIONS, *map(as_parts, CONVERSATIONS), tiny.user("QUESTION")):
        try:
            tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        except (TypeError, TemplateError):  # the template itself refuses this kind of conversation
            continue
        plain = text(tokenizer, conversation)
        # Some templates write parts of text as code.
        if plain.count("QUESTION") != 1 or re.search("[\"']text[\"']", plain):
            continue
        tried += 1
        other = "line {one}\n\nline two"
        assert text(tokenizer, with_question(conversation, other)) == plain.replace("QUESTION", other)
    assert tried


def test_the_student_s_prompts_are_rendered_alike(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, chat_template_kwargs={"tag": "t"})
    prompts = [row["prompt"] for row in tiny.conversations()]
    assert trainer._reprompter().renderer(prompts) == trainer._tokenize_prompts(prompts)[0]


def test_template_arguments_of_the_teacher_precede(tmp_path: Path) -> None:
    config = tiny.config(apply_chat_template_kwargs={"tag": "teacher"})
    trainer = tiny.trainer(tmp_path, sdpo_config=config, chat_template_kwargs={"tag": "student"})
    assert decode(trainer._reprompter().renderer([tiny.user("q")])[0]).endswith("<bot>teacher")


def test_tools_reach_the_template() -> None:
    def weather(city: str) -> str:
        """Tell the weather.

        Args:
            city: where.
        """
        return city

    assert (
        decode(Renderer(TOKENIZER, tools=[weather])([tiny.user("q")])[0])
        == "<system>tools: weather<user>q<bot>"
    )


def test_the_trainer_s_chat_template_replaces_the_tokenizer_s() -> None:
    own = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert decode(Renderer(TOKENIZER, chat_template=own)([tiny.user("q")])[0]) == "[q]"


# --- prompts and completions -----------------------------------------------------------------------------


def test_only_the_last_user_turn_changes() -> None:
    prompt = [
        {"role": "system", "content": "s"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "n",
        },
    ]
    before = copy.deepcopy(prompt)
    assert question(prompt) == "ab"
    assert with_question(prompt, "new") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "new"}], "name": "n"},
    ]
    assert prompt == before
    assert with_question("old", "new") == "new"
    assert with_question(prompt, question(prompt))[-1]["content"][0]["text"] == "ab"
    assert question([*prompt, *RESULTS]) == "ab"
    assert with_question([*prompt, *RESULTS], "new") == [*with_question(prompt, "new"), *RESULTS]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "one"}], "one"),
        (
            [
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "tool", "name": "t", "content": "4"},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "it is "}, {"type": "text", "text": "4"}],
                },
            ],
            "4\nit is 4",
        ),
        ([], ""),
    ],
)
def test_the_text_of_a_completion(completion: Any, expected: str) -> None:
    assert completion_text(completion) == expected


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "prompt 1: expected a non-empty string, got ''; remove"),
        ([], TypeError, r"prompt 1: expected a string or a non-empty list of messages with a role, got \[\]"),
        (7, TypeError, "prompt 1: .* got 7"),
        ([{"content": "no role"}], TypeError, "prompt 1: .*role"),
        ([*tiny.user("q"), {"content": "no role"}], TypeError, "prompt 1: .*role"),
        (
            [*tiny.user("q"), RESULTS[0]],
            ValueError,
            "prompt 1: expected a 'user' or 'tool' turn at the end, .*got a 'assistant' turn; remove it",
        ),
        ([*tiny.user("q"), *RESULTS, *SYSTEM], ValueError, "prompt 1: .* at the end, .*got a 'system' turn"),
        (
            [*SYSTEM, *RESULTS],
            ValueError,
            "prompt 1: expected a 'user' turn, into which the reprompt is written, got turns of 'system', "
            "'assistant', 'tool'; add one",
        ),
        (
            [*tiny.user("q"), {"role": "assistant", "tool_calls": [CALL]}, RESULTS[1]],
            ValueError,
            r"prompt 1: expected a 'content' in every turn, got a 'assistant' turn with \['role', 'tool_calls'\]",
        ),
        (
            [*tiny.user("q"), RESULTS[0], {**RESULTS[1], "content": [{"type": "image"}]}],
            ValueError,
            "prompt 1: expected text in every turn, got parts of type image",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}]}, *RESULTS],
            ValueError,
            "prompt 1: expected text in every turn, got parts of type image",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], ValueError, "prompt 1: expected text.*images"),
        ([{"role": "user", "content": None}], ValueError, "expected text.*got None"),
        ([{"role": "user"}], ValueError, "expected a 'content' in every turn"),
        (
            [{"role": "user", "content": [{"type": "image"}]}, {"role": "user", "content": "q"}],
            ValueError,
            "prompt 1: expected text in every turn, got parts of type image",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            ValueError,
            r"'text': '\.\.\.'.*got \[\{'type': 'text'\}\]",
        ),
        ([{"role": "user", "content": [{"text": None}]}], ValueError, "expected text.*'text': None"),
    ],
)
def test_prompts_are_checked(prompt: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_prompts(["fine", prompt])


def test_a_prompt_may_end_with_a_tool_s_result() -> None:
    check_prompts([[*tiny.user("q"), *RESULTS], [*SYSTEM, *tiny.user("q"), *RESULTS, *RESULTS, RESULTS[1]]])
