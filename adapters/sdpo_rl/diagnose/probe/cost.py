"""Time and memory of a training step, from what a generation batch and its forwards took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..report import checkpointing, teacher_bytes

# Forwards of the student that a training step is worth: its own, and a backward of twice its operations; one more
# where gradient checkpointing computes it again.
_FORWARDS, _WITH_CHECKPOINTING = 3, 4


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes on one process; `None`: not known.

    Attributes:
        generation_seconds: sampling and scoring of a generation batch, measured.
        student_seconds: the student's forward over the rows with a signal of a generation batch, measured.
        teacher_seconds: the teacher's forward over the same rows, measured.
        step_seconds: a generation batch with everything that is learned from it, estimated: generation, teacher
            and three forwards of the student, four with gradient checkpointing; each of them `num_iterations` times
            but for the generation.
        weight_bytes: all parameters and buffers.
        gradient_bytes: of the trainable parameters.
        optimizer_bytes: two values for each trainable parameter in its own dtype; `None` for an optimizer other
            than torch's AdamW.
        teacher_bytes: the teacher's state.
        generation_peak_bytes: most that was allocated on the GPU during the generation; `None` on a CPU.
        forward_peak_bytes: the same during the forwards, which have no gradient.
    """

    generation_seconds: float
    student_seconds: float
    teacher_seconds: float
    step_seconds: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int | None
    teacher_bytes: int
    generation_peak_bytes: int | None
    forward_peak_bytes: int | None


class StoredBytes(NamedTuple):
    """What one process stores during training besides activations, bytes.

    Attributes:
        weights: all parameters and buffers.
        gradients: of the trainable parameters.
        optimizer: two values for each trainable parameter in its own dtype; `None` for an optimizer other than
            torch's AdamW.
        teacher: its state.
    """

    weights: int
    gradients: int
    optimizer: int | None
    teacher: int


def stored_bytes(trainer: Any) -> StoredBytes:
    """What training stores besides activations.

    Args:
        trainer: an `SDPOTrainer`.
    """
    model = trainer._unwrapped
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    return StoredBytes(
        weights=sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]),
        gradients=gradients,
        optimizer=2 * gradients if optimizer in ("adamw_torch", "adamw_torch_fused") else None,
        teacher=teacher_bytes(trainer)[0],
    )


def cost(
    trainer: Any,
    *,
    generation_seconds: float,
    student_seconds: float,
    teacher_seconds: float,
    generation_peak: int | None,
    forward_peak: int | None,
) -> Cost:
    """The cost of a generation batch of the trainer, by what was measured of one.

    Args:
        trainer: an `SDPOTrainer`.
        generation_seconds: of one generation batch.
        student_seconds: of its forwards.
        teacher_seconds: of its forwards.
        generation_peak: bytes allocated on the GPU at most.
        forward_peak: bytes allocated on the GPU at most.
    """
    stored = stored_bytes(trainer)
    recomputes = checkpointing(trainer._unwrapped, trainer.args) != "off"
    learning = teacher_seconds + (_WITH_CHECKPOINTING if recomputes else _FORWARDS) * student_seconds
    return Cost(
        generation_seconds=generation_seconds,
        student_seconds=student_seconds,
        teacher_seconds=teacher_seconds,
        step_seconds=generation_seconds + trainer.num_iterations * learning,
        weight_bytes=stored.weights,
        gradient_bytes=stored.gradients,
        optimizer_bytes=stored.optimizer,
        teacher_bytes=stored.teacher,
        generation_peak_bytes=generation_peak,
        forward_peak_bytes=forward_peak,
    )


def reset_peak(device: torch.device) -> None:
    """Count the allocated memory of a GPU from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Bytes that were allocated on the GPU at most since `reset_peak`; `None` on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
