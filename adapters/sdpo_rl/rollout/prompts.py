"""Prompts, plain and conversational: their question, their reprompt, their tokens within a limit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdpo import Reprompts, Templates, build_reprompts, cut_middle, strip_thinking

Prompt = str | list[dict[str, Any]]
Completion = str | list[dict[str, Any]]

CUT_MARKER = " ... "


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping) and "role" in prompt[0]
    )


def check_prompts(prompts: Sequence[Any]) -> None:
    """Every prompt is a string, or messages that end with a user turn of text.

    Raises:
        TypeError: a prompt of another kind.
        ValueError: a conversation that does not end with a user turn, or whose last turn holds no text alone.
    """
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            continue
        if not is_conversational(prompt):
            raise TypeError(
                f"prompt {row} must be a string or a non-empty list of messages with a role, got {prompt!r:.200}"
            )
        if prompt[-1]["role"] != "user":
            raise ValueError(
                f"prompt {row} ends with a {prompt[-1]['role']!r} turn; SDPO writes the reprompt into the last "
                "user turn, so every prompt must end with one"
            )
        question(prompt)


def question(prompt: Prompt) -> str:
    """The text that the reprompt replaces: a plain prompt itself, or the last user turn's text."""
    return prompt if isinstance(prompt, str) else _content_text(prompt[-1].get("content"))


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type", "text") == "text" for part in content
    ):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
        raise ValueError(
            "a text part of the last user turn holds no text: expected {'type': 'text', 'text': '...'}, got "
            f"{content!r:.200}"
        )
    raise ValueError(
        f"the last user turn must be text: a string or text parts, got {content!r:.200}; images and other media "
        "cannot be reprompted"
    )


def with_question(prompt: Prompt, text: str) -> Prompt:
    """The prompt with its question replaced; every earlier message and every other key stays as it is."""
    if isinstance(prompt, str):
        return text
    content = text if isinstance(prompt[-1]["content"], str) else [{"type": "text", "text": text}]
    return [*prompt[:-1], {**prompt[-1], "content": content}]


def completion_text(completion: Completion, *, thinking: bool = True) -> str:
    """What a completion says: its string, or a transcript of its turns, with or without the thinking.

    A transcript has a line for every text, tool call and tool result, in their order. It is plain text, for the
    user turn of a reprompt: a chat template's own marks of a call would there start one.

    Example:
        >>> call = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
        >>> turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": "add", "content": "3"}]
        >>> print(completion_text([*turns, {"role": "assistant", "content": "It is 3."}]))
        add({"a": 1, "b": 2})
        3
        It is 3.
    """
    if isinstance(completion, str):
        return completion if thinking else strip_thinking(completion)
    return "\n".join(line for message in completion for line in _lines(message, thinking) if line)


def _lines(message: Mapping[str, Any], thinking: bool) -> list[str]:
    content = message.get("content")
    text = content if isinstance(content, str) else _parts_text(content)
    if message["role"] == "tool":
        return [text]
    thoughts = message.get("reasoning_content") or message.get("thinking")
    calls = [_call_text(call.get("function", call)) for call in message.get("tool_calls") or []]
    if not thinking:
        return [strip_thinking(text), *calls]
    return [f"<think>{thoughts}</think>" if thoughts else "", text, *calls]


def _call_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{function.get('name')}({written})"


def _parts_text(content: Any) -> str:
    return "".join(part.get("text", "") for part in content or [])


@dataclass
class Renderer:
    """Prompt → token ids, exactly as the student's prompts are made: the chat template applied once.

    `tools`, `chat_template` and `template_kwargs` are the trainer's own; a plain prompt is tokenized as it is.
    Where every row of the batch has tools of its own, `row_tools` holds them and takes the place of `tools`.
    """

    tokenizer: Any
    tools: Sequence[Any] | None = None
    row_tools: Sequence[Sequence[Any]] | None = None
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[Prompt], rows: Sequence[int] = ()) -> list[list[int]]:
        """The ids of each prompt, without padding; `rows` are the prompts' places in the batch of `row_tools`."""
        if not prompts:
            return []
        if self.row_tools is not None and not isinstance(prompts[0], str):
            return [
                self._chat([prompt], self.row_tools[row])[0]
                for prompt, row in zip(prompts, rows, strict=True)
            ]
        # The rows of a group are often shown the same demonstration: what reads the same is tokenized once.
        keys = [prompt if isinstance(prompt, str) else repr(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        ids = dict(zip(distinct, self._tokens([*distinct.values()]), strict=True))
        return [list(ids[key]) for key in keys]

    def _tokens(self, prompts: Sequence[Prompt]) -> Sequence[Sequence[int]]:
        if not isinstance(prompts[0], str):
            return self._chat(prompts, self.tools)
        encoded: Sequence[Sequence[int]] = self.tokenizer(text=prompts)["input_ids"]
        return encoded

    def _chat(self, prompts: Sequence[Prompt], tools: Sequence[Any] | None) -> list[list[int]]:
        encoded = self.tokenizer.apply_chat_template(
            conversation=list(prompts),
            tools=list(tools) if tools else None,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **self.template_kwargs,
        )
        return [list(ids) for ids in encoded["input_ids"]]


@dataclass(frozen=True)
class TeacherPrompts:
    """Reprompts as tokens. Rows without signal have an empty list and `row_mask` false."""

    ids: list[list[int]]
    row_mask: list[bool]
    has_demonstration: list[bool]
    uses_feedback: list[bool]
    truncated: list[bool]
    dropped: list[bool]


@dataclass
class Reprompter:
    """Question, demonstrations and feedback → the teacher's prompt, at most `limit` tokens long.

    What does not fit is cut out of the demonstrations and the feedback, never out of the frame: the question,
    the earlier turns and the generation prompt stay whole. A row whose frame alone is too long gets no signal
    (`dropped`). `truncation` names the place of the cut; `error` raises instead.
    """

    renderer: Renderer
    templates: Templates
    feedback_only_without_solution: bool
    truncation: str

    def __call__(
        self,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Sequence[str]],
        feedback: Sequence[str | None],
        limits: Sequence[int],
    ) -> TeacherPrompts:
        """Tokens of every active row; `limits` holds the longest reprompt of each."""
        built = self._build(prompts, demonstrations, feedback)
        active = [row for row, on in enumerate(built.row_mask) if on]
        rendered = self.renderer([with_question(prompts[row], built.texts[row]) for row in active], active)
        ids: list[list[int]] = [[] for _ in prompts]
        row_mask = list(built.row_mask)
        truncated, dropped = [False] * len(prompts), [False] * len(prompts)
        for row, row_ids in zip(active, rendered, strict=True):
            if len(row_ids) <= limits[row]:
                ids[row] = row_ids
                continue
            shown = feedback[row] if built.uses_feedback[row] else None
            fitted = self._fit(row, prompts[row], demonstrations[row], shown, len(row_ids), limits[row])
            truncated[row], dropped[row] = fitted is not None, fitted is None
            row_mask[row] = fitted is not None
            ids[row] = fitted or []
        return TeacherPrompts(
            ids=ids,
            row_mask=row_mask,
            has_demonstration=list(built.has_demonstration),
            uses_feedback=list(built.uses_feedback),
            truncated=truncated,
            dropped=dropped,
        )

    def _build(
        self,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Sequence[str]],
        feedback: Sequence[str | None],
    ) -> Reprompts:
        return build_reprompts(
            [question(prompt) for prompt in prompts],
            demonstrations,
            feedback,
            templates=self.templates,
            feedback_only_without_solution=self.feedback_only_without_solution,
        )

    def _fit(
        self,
        row: int,
        prompt: Prompt,
        demonstrations: Sequence[str],
        feedback: str | None,
        length: int,
        limit: int,
    ) -> list[int] | None:
        if self.truncation == "error":
            raise ValueError(
                f"a reprompt has {length} tokens and max_reprompt_length leaves {limit}; raise "
                "max_reprompt_length, or choose reprompt_truncation='middle'"
            )
        texts = [*demonstrations, *([feedback] if feedback is not None else [])]
        tokens = [self._encode(text) for text in texts]
        total = sum(map(len, tokens))
        budget = total - (length - limit)
        # Cutting and decoding can change the count by a few tokens, hence more than one try.
        while budget > 0:
            cut = [self._cut(piece, len(piece) * budget // total) for piece in tokens]
            shown = cut[len(demonstrations)] if feedback is not None else None
            built = self._build([prompt], [cut[: len(demonstrations)]], [shown])
            ids = self.renderer([with_question(prompt, built.texts[0])], [row])[0]
            if len(ids) <= limit:
                return ids if built.row_mask[0] else None
            budget -= max(len(ids) - limit, 1)
        return None

    def _encode(self, text: str) -> list[int]:
        return list(self.renderer.tokenizer(text=text, add_special_tokens=False)["input_ids"])

    def _cut(self, tokens: list[int], limit: int) -> str:
        decode: Callable[[list[int]], str] = self.renderer.tokenizer.decode
        if len(tokens) <= limit:
            return decode(tokens)
        marker = self._encode(CUT_MARKER)
        if limit <= len(marker):
            return ""
        if self.truncation == "middle":
            return decode(list(cut_middle(tokens, limit, marker=marker)))
        kept = limit - len(marker)
        return decode([*marker, *tokens[-kept:]] if self.truncation == "left" else [*tokens[:kept], *marker])
