"""The part of the trainer that keeps the ranks of a sharded model together while they generate."""

from __future__ import annotations

from typing import Any

from ..teacher import shards

_Trainer: Any = object


class Lockstep(_Trainer):
    """Every rank generates as often as the others: a turn on one needs the weights of all."""

    _awaited = False

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self._awaited:
            shards.any_rank(True, self.accelerator.device)
        self._turn = args, kwargs
        return super()._generate_single_turn(*args, **kwargs)

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loop, to whose end every rank goes along: another rank's turn needs the weights of this one."""
        if self.use_vllm or self.accelerator.num_processes == 1 or not shards.is_sharded(self._unwrapped):
            return super()._tool_call_loop(*args, **kwargs)
        self._awaited = True
        try:
            result = super()._tool_call_loop(*args, **kwargs)
        finally:
            self._awaited = False
        (prompt_ids, *rest), options = self._turn
        while shards.any_rank(False, self.accelerator.device):
            self._generate_single_turn(prompt_ids[:1], *rest, **options)
        return result
