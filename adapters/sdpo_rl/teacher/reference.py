"""The model that `anchor_weight` stays close to, where no reference model and no adapter gives one."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import SDPOConfig
from .store import TeacherStore


def start_of_training(
    model: nn.Module, config: SDPOConfig, reference: Any, *, seed: int
) -> TeacherStore | None:
    """The weights that training begins with, stored as those of a frozen teacher; `None`: they are not needed.

    Memory: one copy of the trainable parameters, in their dtype; with `teacher_offload="cpu"` in CPU memory.

    Args:
        model: the unwrapped model.
        config: of the run.
        reference: the reference model that TRL loaded, or `None`.
        seed: of the run.
    """
    if config.anchor_weight == 0.0 or reference is not None or hasattr(model, "peft_config"):
        return None
    # Of the options a store reads those of its teacher alone.
    frozen = SDPOConfig(teacher_mode="frozen", teacher_offload=config.teacher_offload)
    return TeacherStore(model, frozen, seed=seed)
