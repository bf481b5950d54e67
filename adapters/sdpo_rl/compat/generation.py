"""Calls of generation: in step across the processes of a sharded model, and checked against the model's context."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..teacher import shards

logger = logging.getLogger("sdpo_rl")

# Parts of the messages that torch raises where a table of positions is too short: embedding, `gather`, CUDA.
_OUTSIDE = ("out of range", "out of bounds", "device-side assert")


class GenerationTurns:
    """Lets every process take part in the turns that another one's tool calls need.

    A row beyond the model's context is an error where the model has no such positions, and a warning elsewhere.

    Args:
        device: of the flags that the processes exchange.
        context_length: tokens of a row that the model declares to process.
        max_completion_length: of `GRPOConfig`; `None`: no limit.
    """

    def __init__(self, device: Any, *, context_length: float, max_completion_length: int | None) -> None:
        self._device = device
        self._context_length, self._max_completion_length = context_length, max_completion_length
        self._has_warned = False
        self._in_tool_loop = False
        self._last_call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def turn(self, generate: Callable[..., Any], prompt_ids: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """`generate(prompt_ids, ...)`, announced to the processes that have left their tool loop.

        Raises:
            ValueError: the model has no positions for a prompt and its completion.
        """
        if self._in_tool_loop:
            shards.any_rank(True, self._device)
        self._last_call = (prompt_ids, *args), kwargs
        try:
            output = generate(prompt_ids, *args, **kwargs)
        except (IndexError, RuntimeError) as error:
            longest = max(map(len, prompt_ids), default=0)
            fits = longest + (self._max_completion_length or math.inf) <= self._context_length
            if fits or not any(text in str(error) for text in _OUTSIDE):
                raise
            raise ValueError(
                f"max_completion_length: expected prompts and completions within the model's context of "
                f"{self._context_length} tokens, got a prompt of {longest} and max_completion_length="
                f"{self._max_completion_length}, and the model has no further positions ({error}); lower "
                "max_completion_length, or remove long prompts"
            ) from error
        longest = max(map(_tokens, prompt_ids, output[0]), default=0)
        if longest > self._context_length and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "A prompt and its completion have %d tokens, more than the model's context of %d. Lower "
                "max_completion_length=%s, or remove long prompts.",
                longest,
                self._context_length,
                self._max_completion_length,
            )
        return output

    def tool_loop(
        self, tool_loop: Callable[..., Any], generate: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`tool_loop(...)`, and then a turn of one row for each turn of a process that still calls tools."""
        self._in_tool_loop = True
        try:
            result = tool_loop(*args, **kwargs)
        finally:
            self._in_tool_loop = False
        (prompt_ids, *rest), options = self._last_call
        while shards.any_rank(False, self._device):
            generate(prompt_ids[:1], *rest, **options)
        return result


def _tokens(prompt: Sequence[Any], completion: Sequence[Any]) -> int:
    return len(prompt) + len(completion)
