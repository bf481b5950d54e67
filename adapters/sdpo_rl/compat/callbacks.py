"""Hooks into the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class BeforeTraining(TrainerCallback):
    """Calls `function()` when the model is prepared and a checkpoint is loaded, before the first batch."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is in place."""
        self._function()


class AfterOptimizerStep(TrainerCallback):
    """Calls `function()` after every optimizer step, before anything is logged, evaluated or saved."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped and gradients are cleared."""
        self._function()
