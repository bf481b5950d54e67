"""The events of the Trainer's loop that have no method to override, and which logs are its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback

_RUNTIME = "_runtime"


def is_log_of_trainer(logs: Mapping[str, Any]) -> bool:
    """Whether the Trainer logs this, on all processes: steps, the end of training, or an evaluation.

    Steps have a loss and a learning rate, the others a loss and a runtime under their prefix, which an evaluation
    may choose. Anything else is a call of the user, perhaps on one process.

    Examples:
        >>> is_log_of_trainer({"loss": 0.1, "learning_rate": 1e-5})
        True
        >>> is_log_of_trainer({"eval_loss": 0.1, "eval_runtime": 2.0, "eval_accuracy": 0.5})
        True
        >>> is_log_of_trainer({"my_loss": 0.1, "judge_runtime": 2.0})
        False
    """
    prefixes = [name.removesuffix(_RUNTIME) for name in logs if name.endswith(_RUNTIME)]
    return {"loss", "learning_rate"} <= logs.keys() or any(f"{prefix}_loss" in logs for prefix in prefixes)


def log_alone(trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
    """Log the user's values only; `GRPOTrainer.log` would also log its accumulated metrics and clear them.

    Any log resets `control.should_log`; it is restored, so that a log that the Trainer has scheduled still happens.

    Args:
        trainer: a GRPOTrainer.
        logs: as for `Trainer.log`.
        *args: as for `Trainer.log`.
        **kwargs: as for `Trainer.log`.
    """
    is_due = trainer.control.should_log
    Trainer.log(trainer, logs, *args, **kwargs)
    trainer.control.should_log = is_due


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
        """Also after an epoch without a batch, before the Trainer stops because of it."""
        self._epoch_end()
