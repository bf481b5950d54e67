"""The events of the Trainer's loop that have no method to override."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class TrainingHooks(TrainerCallback):
    """Calls `begin()` once the model is prepared and a checkpoint loaded, the others at the ends they name."""

    def __init__(
        self, *, begin: Callable[[], None], step_end: Callable[[], None], epoch_end: Callable[[], None]
    ) -> None:
        self._begin, self._step_end, self._epoch_end = begin, step_end, epoch_end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first batch."""
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before anything is logged, evaluated or saved."""
        self._step_end()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the training stops where there was no batch."""
        self._epoch_end()
