"""Time and memory of the parts of a step, for `rollout.py`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from step import synchronize
from transformers import TrainerCallback

ROLLOUT = ("generation", "weight sync", "sleep", "sampled log-probs", "rollout, rest")
PARTS = (*ROLLOUT, "teacher", "student", "optimizer", "rest")
CHECK = "check"  # of the weights; no part of a step


def card_in_use() -> int:
    """Bytes of the card's memory in use by any program; 0 without a card."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


class Parts(TrainerCallback):
    """Time and memory of the parts of each step. A part within another is not counted in the outer one."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.peak: dict[str, int] = {}
        self.in_use: dict[str, int] = {}
        self._open: list[str] = []
        self._since = 0.0

    def begin(self, name: str) -> None:
        self._count()
        self._open.append(name)

    def end(self) -> None:
        self._count()
        self._open.pop()

    def _count(self) -> None:
        """Count what happened since the last call in the part that is open."""
        synchronize()
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.steps[-1][name] += now - self._since
            if torch.cuda.is_available():
                self.in_use[name] = max(self.in_use.get(name, 0), card_in_use())
                self.peak[name] = max(self.peak.get(name, 0), torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self._open:  # outside of a step
            yield
            return
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Count the calls of a method of one object."""
        true = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return true(*args, **kwargs)

        setattr(owner, method, call)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(defaultdict(float))
        self.begin("rest")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.begin("optimizer")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.end()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.end()
