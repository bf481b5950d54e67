"""Inserted texts, cut to a number of tokens at places between their characters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from typing import Any

from .control import enclose, inner_tokenizer
from .prompts import Renderer

CUT_MARKER = " ... "


class CuttableText:
    """A text that is going to be inserted, and the number of its tokens.

    A part of it is a part of its characters, never decoded tokens: where a token ends within a character, the
    cut is before or after that character.

    Args:
        text: a demonstration or feedback.
        renderer: whose tokenizer counts.
    """

    def __init__(self, text: str, renderer: Renderer) -> None:
        self._renderer = renderer
        self._control = renderer.control
        self._text = self._control.break_inserted(enclose(text)) if self._control else text
        self.count = len(self._tokens(self._text))

    def cut(self, limit: int, truncation: str) -> str:
        """About `limit` tokens, marker included; empty if there is room for the marker alone.

        Args:
            limit: largest number of tokens.
            truncation: the part that is cut: "middle", "left" or "right".
        """
        if self.count <= limit:
            return self._joined(self._text)
        remaining = limit - CuttableText(CUT_MARKER, self._renderer).count
        if remaining <= 0:
            return ""
        tail_length = {"left": remaining, "middle": remaining // 2, "right": 0}[truncation]
        head = self._text[: self._head_end(remaining - tail_length)]
        tail = self._text[self._tail_start(tail_length) :]
        if not (head + tail).strip():
            return ""
        return self._joined(f"{head}{CUT_MARKER}{tail}")

    def _joined(self, text: str) -> str:
        return self._control.joined(text) if self._control else text

    def _has_break(self, text: str) -> bool:
        return self._control is not None and self._control.has_break(text)

    def _tokenizer(self, text: str) -> Any:
        if self._control is not None and self._has_break(text):
            return inner_tokenizer(self._control.processing_class)
        return inner_tokenizer(self._renderer.tokenizer)

    def _tokens(self, text: str) -> list[int]:
        ids = self._tokenizer(text)(text=text, add_special_tokens=False)["input_ids"]
        return self._control.without_breaks(ids) if self._control and self._has_break(text) else list(ids)

    @cached_property
    def _spans(self) -> list[tuple[int, int]] | None:
        """First and last place of each token in the text; `None` for a tokenizer that does not tell."""
        tokenizer = self._tokenizer(self._text)
        if not getattr(tokenizer, "is_fast", False):
            return None
        encoded = tokenizer(text=self._text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        break_id = self._control.break_id if self._control and self._has_break(self._text) else None
        return [span for i, span in spans if i != break_id]

    def _head_end(self, length: int) -> int:
        """Where the first `length` tokens end."""
        if length == 0 or self._spans is None:
            return _longest(len(self._text), length, lambda n: len(self._tokens(self._text[:n])))
        # Of a character that is several tokens, each has the span of the whole.
        return min(self._spans[length - 1][1], self._spans[length][0])

    def _tail_start(self, length: int) -> int:
        """Where the last `length` tokens begin."""
        size = len(self._text)
        if length == 0 or self._spans is None:
            return size - _longest(size, length, lambda n: len(self._tokens(self._text[size - n :])))
        return self._spans[-length - 1][1]


def _longest(size: int, limit: int, count: Callable[[int], int]) -> int:
    """How many of `size` characters are at most `limit` tokens; `count` rises with their number."""
    return 0 if limit == 0 else bisect_right(range(1, size + 1), limit, key=count)
