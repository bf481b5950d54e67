"""Generation turns of a sharded model: every forward needs the weights, and so the calls, of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..teacher import shards


class GenerationTurns:
    """Lets every process take part in the turns that another one's tool calls need.

    Args:
        device: of the flags that the processes exchange.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        self._in_tool_loop = False
        self._last_call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def turn(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate(prompt_ids, ...)`, announced to the processes that have left their tool loop."""
        if self._in_tool_loop:
            shards.any_rank(True, self._device)
        self._last_call = args, kwargs
        return generate(*args, **kwargs)

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
