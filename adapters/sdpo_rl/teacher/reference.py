"""The model that `anchor_weight` stays close to, where TRL has no reference model for `beta`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import SDPOConfig
from .store import TeacherStore


def start_of_training(
    model: nn.Module, config: SDPOConfig, reference: Any, *, beta: float, seed: int
) -> TeacherStore | None:
    """The weights that training begins with, stored as those of a frozen teacher; `None`: they are not needed.

    A model with adapters, too: without them it is not the one that training begins with, if they were trained
    before, or are initialised to other products than zero. Only `beta` has TRL's reference of such a model.

    Memory: one copy of the trainable parameters, in their dtype; with `teacher_offload="cpu"` in CPU memory.

    Args:
        model: the unwrapped model.
        config: of the run.
        reference: the reference model that TRL loaded, or `None`.
        beta: of `GRPOConfig`.
        seed: of the run.
    """
    has_own_reference = beta != 0.0 and hasattr(model, "peft_config")
    if config.anchor_weight == 0.0 or reference is not None or has_own_reference:
        return None
    # Of the options a store reads those of its teacher alone.
    frozen = SDPOConfig(teacher_mode="frozen", teacher_offload=config.teacher_offload)
    return TeacherStore(model, frozen, seed=seed)
