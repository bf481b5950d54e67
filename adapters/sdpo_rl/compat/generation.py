"""Generation calls: in step across the processes of a sharded model, and checked against the model's context."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..teacher import shards

logger = logging.getLogger("sdpo_rl")

# Parts of the messages that torch raises where a table of positions is too short: embedding, `gather`, CUDA.
# Python's own "list index out of range" must not match: it can come from a user's logits processor.
_POSITION_ERRORS = ("out of range in self", "out of bounds", "device-side assert")


class GenerationCalls:
    """Keeps the processes of a sharded model in step: each joins in the calls that another's tool loop makes.

    A row longer than the model's context raises an error if the model fails on it, and logs a warning otherwise.

    Args:
        device: where the flags that the processes exchange are stored.
        context_length: tokens that the model says it can process; infinity if it says nothing.
        max_completion_length: the option of `GRPOConfig`; `None` means no limit.
    """

    def __init__(self, device: Any, *, context_length: float, max_completion_length: int | None) -> None:
        self._device = device
        self._context_length, self._max_completion_length = context_length, max_completion_length
        self._has_warned = False
        self._in_tool_loop = self._in_lockstep = False
        self._last_call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def call(self, generate: Callable[..., Any], prompt_ids: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Calls `generate(prompt_ids, ...)`; in lockstep, first tells processes that are done to join in.

        Raises:
            ValueError: the model has no positions for a prompt and its completion.
        """
        if self._in_lockstep:
            shards.any_rank(True, self._device)
        self._last_call = (prompt_ids, *args), kwargs
        try:
            output = generate(prompt_ids, *args, **kwargs)
        except (IndexError, RuntimeError) as error:
            longest = max(map(len, prompt_ids), default=0)
            fits = longest + (self._max_completion_length or math.inf) <= self._context_length
            if fits or not any(text in str(error) for text in _POSITION_ERRORS):
                raise
            raise ValueError(
                f"max_completion_length: expected prompts and completions within the model's context of "
                f"{self._context_length} tokens, got a prompt of {longest} and max_completion_length="
                f"{self._max_completion_length}, beyond which it may have no positions ({error}); lower "
                "max_completion_length, or remove long prompts"
            ) from error
        if not self._in_tool_loop:
            self._warn_of_length(prompt_ids, output[0])
        return output

    def _warn_of_length(self, prompt_ids: Sequence[Any], completion_ids: Sequence[Any]) -> None:
        longest = max(map(_tokens, prompt_ids, completion_ids), default=0)
        if longest > self._context_length and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "A prompt and its completion have %d tokens, more than the model's context of %d. Lower "
                "max_completion_length=%s, or remove long prompts.",
                longest,
                self._context_length,
                self._max_completion_length,
            )

    def tool_loop(
        self,
        tool_loop: Callable[..., Any],
        generate: Callable[..., Any],
        prompts: Any,
        prompt_ids: Sequence[Any],
        *args: Any,
        in_lockstep: bool,
        **kwargs: Any,
    ) -> Any:
        """Runs `tool_loop`; in lockstep, a process that is done joins in each call that another still makes."""
        self._in_tool_loop, self._in_lockstep = True, in_lockstep
        try:
            result = tool_loop(prompts, prompt_ids, *args, **kwargs)
            # Done: from here it answers the announcements of other processes, with one row, and makes none.
            self._in_lockstep = False
            while in_lockstep and shards.any_rank(False, self._device):
                (last_ids, *rest), last_kwargs = self._last_call
                generate(last_ids[:1], *rest, **last_kwargs)
        finally:
            self._in_tool_loop = self._in_lockstep = False
        # After the loop, not in each call: TRL cuts a completion of several turns to `max_completion_length`.
        self._warn_of_length(prompt_ids, result[2])
        return result


def _tokens(prompt: Sequence[Any], completion: Sequence[Any]) -> int:
    return len(prompt) + len(completion)
