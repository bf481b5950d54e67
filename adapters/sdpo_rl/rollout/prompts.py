"""Prompts and completions, plain and conversational: their texts, and the tokens of a prompt."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import ProcessorMixin
from trl import prepare_multimodal_messages

from .control import ControlStrings

Prompt = str | list[dict[str, Any]]
Completion = str | list[dict[str, Any]]


def is_conversational(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(turn, Mapping) and "role" in turn for turn in prompt)
    )


def check_prompts(prompts: Sequence[Any]) -> None:
    """Every prompt is a non-empty string, or messages of text of which the last is the user's or a tool's.

    Raises:
        TypeError: a prompt of another kind.
        ValueError: an empty string, or a conversation that ends with another turn, has no user turn with text, or
            has a turn with media or without content.
    """
    for row, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"prompt {row}: expected a non-empty string, got ''; remove the row")
            continue
        if not is_conversational(prompt):
            raise TypeError(
                f"prompt {row}: expected a string or a non-empty list of messages with a role, got "
                f"{prompt!r:.200}; convert it"
            )
        try:
            check_turns(prompt)
            _check_question(prompt)
        except ValueError as error:
            raise ValueError(f"prompt {row}: {error}") from error


def _check_question(prompt: list[dict[str, Any]]) -> None:
    roles = [turn["role"] for turn in prompt]
    if "user" not in roles:
        raise ValueError(
            "expected a 'user' turn, into which the reprompt is written, got turns of "
            f"{', '.join(map(repr, dict.fromkeys(roles)))}; add one"
        )
    question(prompt)


def check_turns(turns: Sequence[Mapping[str, Any]]) -> None:
    """A conversation that the model answers: of text, with a user or tool turn at the end.

    Raises:
        ValueError: another turn is the last, or a turn has media or no content, or the last one no text.
    """
    if (role := turns[-1]["role"]) not in ("user", "tool"):
        raise ValueError(
            f"expected a 'user' or 'tool' turn at the end, which the model answers, got a {role!r} turn; remove it"
        )
    if media := media_types(turns):
        raise ValueError(
            f"expected text in every turn, got parts of type {', '.join(media)}; images and other media do not "
            "reach the loss: leave them out"
        )
    for turn in turns:
        if "content" not in turn:
            raise ValueError(
                f"expected a 'content' in every turn, got a {turn['role']!r} turn with {sorted(turn)}; set it to ''"
            )
    if not is_text(content := turns[-1]["content"]):
        raise ValueError(
            "expected text in the last turn, a string or parts {'type': 'text', 'text': '...'}, got "
            f"{content!r:.200}; leave out what is no text"
        )


def media_types(turns: Sequence[Mapping[str, Any]]) -> list[str]:
    """The types of the parts that are media, each once, in alphabetical order."""
    contents = [turn.get("content") for turn in turns]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    types = {str(part.get("type", "text")) for part in parts if isinstance(part, Mapping)}
    return sorted(kind for kind in types if kind.startswith(("image", "audio", "video", "input_")))


def question(prompt: Prompt) -> str:
    """The text that the reprompt replaces: a plain prompt itself, or the last user turn's text."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[_question_place(prompt)].get("content")
    if not is_text(content):
        raise ValueError(
            "expected text in the last user turn, a string or parts {'type': 'text', 'text': '...'}, got "
            f"{content!r:.200}; images and other media cannot be reprompted: remove the row"
        )
    return content if isinstance(content, str) else _parts_text(content)


def is_text(content: Any) -> bool:
    """Whether the content of a turn is a string or a list of parts that are text."""
    return isinstance(content, str) or (
        isinstance(content, list)
        and all(
            isinstance(part, Mapping)
            and part.get("type", "text") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        )
    )


def with_question(prompt: Prompt, text: str) -> Prompt:
    """The prompt with its question replaced; every other message and every other key stays as it is."""
    if isinstance(prompt, str):
        return text
    place = _question_place(prompt)
    turn = prompt[place]
    content = text if isinstance(turn["content"], str) else [{"type": "text", "text": text}]
    return [*prompt[:place], {**turn, "content": content}, *prompt[place + 1 :]]


def _question_place(prompt: Sequence[Mapping[str, Any]]) -> int:
    """The index of the last user turn."""
    return max(place for place, turn in enumerate(prompt) if turn["role"] == "user")


def texts_of(value: Any) -> Iterator[str]:
    """All strings in a prompt or completion, at any depth of its messages, keys included.

    Examples:
        >>> [*texts_of([{"role": "user", "content": "1 + 1?"}])]
        ['role', 'content', 'user', '1 + 1?']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts_of([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a prompt or completion with the strings of `texts_of` changed, but for roles and types.

    Examples:
        >>> with_texts([{"role": "user", "content": " why "}], str.strip)
        [{'role': 'user', 'content': 'why'}]
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            with_texts(key, change): item if key in ("role", "type") else with_texts(item, change)
            for key, item in value.items()
        }
    return [with_texts(item, change) for item in value] if isinstance(value, list) else copy.deepcopy(value)


def completion_text(completion: Completion, *, strip: Callable[[str], str] | None = None) -> str:
    """A completion as a text: its string, or a transcript of its turns.

    A transcript has a line for every text, tool call and tool result, in their order. It is plain text, for the
    user turn of a reprompt, where a chat template's own tokens of a tool call would start one.

    Args:
        completion: a string, or messages.
        strip: removes the thinking from a text of the model; that in fields of their own is then left out too.
            `None`: the thinking stays.

    Examples:
        >>> call = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
        >>> turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "name": "add", "content": "3"}]
        >>> print(completion_text([*turns, {"role": "assistant", "content": "It is 3."}]))
        add({"a": 1, "b": 2})
        3
        It is 3.
    """
    if isinstance(completion, str):
        return completion if strip is None else strip(completion)
    return "\n".join(line for message in completion for line in _message_lines(message, strip) if line)


def _message_lines(message: Mapping[str, Any], strip: Callable[[str], str] | None) -> list[str]:
    content = message.get("content")
    text = content if isinstance(content, str) else _parts_text(content)
    if message["role"] == "tool":
        return [text]
    thoughts = message.get("reasoning_content") or message.get("thinking")
    calls = [_call_text(call.get("function", call)) for call in message.get("tool_calls") or []]
    if strip is not None:
        return [strip(text), *calls]
    return [f"<think>{thoughts}</think>" if thoughts else "", text, *calls]


def _call_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{function.get('name')}({written})"


def _parts_text(content: Any) -> str:
    return "".join(part.get("text", "") for part in content or [])


@dataclass
class Renderer:
    """Prompts → token ids, exactly as the student's prompts are made: the chat template applied once.

    Args:
        tokenizer: the trainer's processing class, a tokenizer or a processor.
        tools: the trainer's tools.
        row_tools: tools of each row of the batch, in place of `tools`; `None`: every row has `tools`.
        chat_template: the trainer's chat template; `None`: the tokenizer's.
        template_kwargs: further arguments of the chat template.
        control: keeps control strings in inserted texts text; `None`: they are control tokens.
    """

    tokenizer: Any
    tools: Sequence[Any] | None = None
    row_tools: Sequence[Sequence[Any]] | None = None
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    control: ControlStrings | None = None

    def __call__(self, prompts: Sequence[Prompt], rows: Sequence[int] = ()) -> list[list[int]]:
        """The ids of each prompt, without padding; `rows` are the prompts' rows in the batch, for `row_tools`."""
        if not prompts:
            return []
        if self.row_tools is not None and not isinstance(prompts[0], str):
            return [
                self._tokenize([prompt], self.row_tools[row])[0]
                for prompt, row in zip(prompts, rows, strict=True)
            ]
        # Rows of a group often have the same demonstration: equal prompts are tokenized once.
        keys = [prompt if isinstance(prompt, str) else repr(prompt) for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        ids = dict(zip(distinct, self._tokenize([*distinct.values()], self.tools), strict=True))
        return [list(ids[key]) for key in keys]

    def text(self, prompt: Prompt, **template_kwargs: Any) -> str:
        """A conversation as a string, as the chat template writes it, with further arguments of the template."""
        rendered = self._apply_template(
            self.tokenizer, [prompt], self.tools, tokenize=False, **template_kwargs
        )
        return str(rendered[0])

    def _tokenize(self, prompts: Sequence[Prompt], tools: Sequence[Any] | None) -> list[list[int]]:
        control = self.control
        if control is None or not any(map(control.has_break, texts_of(list(prompts)))):
            return self._ids(self.tokenizer, prompts, tools)
        return [control.without_breaks(ids) for ids in self._ids(control.processing_class, prompts, tools)]

    def _ids(
        self, processing_class: Any, prompts: Sequence[Prompt], tools: Sequence[Any] | None
    ) -> list[list[int]]:
        if isinstance(prompts[0], str):
            encoded = processing_class(text=list(prompts))
        else:
            encoded = self._apply_template(processing_class, prompts, tools, tokenize=True, return_dict=True)
        return [list(ids) for ids in encoded["input_ids"]]

    def _apply_template(
        self,
        processing_class: Any,
        prompts: Sequence[Any],
        tools: Sequence[Any] | None,
        **arguments: Any,
    ) -> Any:
        # Templates of multimodal models take lists of parts alone: GRPOTrainer makes them for every processor.
        if isinstance(processing_class, ProcessorMixin):
            prompts = [prepare_multimodal_messages(prompt) for prompt in prompts]
        return processing_class.apply_chat_template(
            conversation=list(prompts),
            tools=list(tools) if tools else None,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            **{**self.template_kwargs, **arguments},
        )
