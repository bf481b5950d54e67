"""The thinking in a completion: what stands between two marks, or what the tokenizer's response template says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdpo import strip_thinking

from ..config import SDPOConfig
from .prompts import Completion, completion_text

# From tokenizer and ids to a message, by a response template; `None`: there is none.
ParseResponse = Callable[[Any, Sequence[int]], Mapping[str, Any] | None]


def demonstration_texts(
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    config: SDPOConfig,
    tokenizer: Any,
    parse: ParseResponse,
) -> list[str]:
    """Each completion's text where it is shown as a solution.

    Args:
        completions: one per row.
        completion_ids: the tokens of each.
        config: whether demonstrations have their thinking, and its marks.
        tokenizer: as for `without_thinking`.
        parse: as for `without_thinking`.
    """
    if not config.remove_thinking_from_demonstration:
        return [completion_text(completion) for completion in completions]
    return [
        without_thinking(completion, ids, tokenizer, config.thinking_marks, parse)
        for completion, ids in zip(completions, completion_ids, strict=True)
    ]


def without_thinking(
    completion: Completion,
    ids: Sequence[int],
    tokenizer: Any,
    marks: Sequence[str],
    parse: ParseResponse,
) -> str:
    """A completion's text without its thinking, as `strip_thinking` defines it.

    TRL decodes completions without special tokens, so a mark that is one, or has one in it, is in the ids alone.
    Where the ids have no marks, the thinking is what the response template of the tokenizer finds, if it has one or
    TRL knows one for its chat template. Several messages, or one that TRL has parsed, are taken as they are: what
    TRL found is in fields of its own, and the marks are looked for in each text.

    Args:
        completion: a string, or messages.
        ids: the completion's tokens.
        tokenizer: the trainer's processing class.
        marks: what the model writes before a thought and after it.
        parse: finds the thinking where there are no marks.
    """

    def strip(text: str) -> str:
        return strip_thinking(text, opening=marks[0], closing=marks[1])

    shown = completion_text(completion, strip=strip)
    if not isinstance(completion, str) and len(completion) > 1:
        return shown
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    text = completion_text(completion)
    if text != tokenizer.decode(list(ids), skip_special_tokens=True):
        return shown
    whole = tokenizer.decode(list(ids), skip_special_tokens=False)
    if _count(whole, marks) > _count(text, marks):
        return _without(strip(whole), _special_tokens(tokenizer))
    if _count(whole, marks) == 0:
        message = parse(tokenizer, ids)
        if message is not None and (message.get("reasoning_content") or message.get("thinking")):
            return completion_text([dict(message)], strip=strip)
    return shown


def _count(text: str, marks: Sequence[str]) -> int:
    return sum(map(text.count, marks))


def _special_tokens(tokenizer: Any) -> set[str]:
    """What decoding without special tokens leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}


def _without(text: str, parts: set[str]) -> str:
    return re.sub("|".join(sorted(map(re.escape, parts), key=len, reverse=True)), "", text) if parts else text
