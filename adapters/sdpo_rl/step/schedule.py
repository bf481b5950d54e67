"""Which rows a micro-batch contains, and when a generation batch begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """What decides which rows a micro-batch contains; under another, a saved progress means nothing.

    Attributes:
        world_size: processes.
        per_device_train_batch_size: rows of a micro-batch.
        gradient_accumulation_steps: micro-batches of an optimizer step.
        steps_per_generation: micro-batches of a generation batch.
        num_iterations: passes over a generation batch.
        num_generations: completions of a prompt.
    """

    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_generation: int
    num_iterations: int
    num_generations: int

    @property
    def generate_every(self) -> int:
        """Micro-batches from one generation batch to the next.

        Examples:
            >>> Schedule(2, 4, 2, 8, 3, 4).generate_every
            24
        """
        return self.steps_per_generation * self.num_iterations

    def samples_per_tick(self, teacher_tick: str) -> float:
        """Completions of all processes that are generated from one update of the teacher to the next.

        Args:
            teacher_tick: `SDPOConfig.teacher_tick`.

        Examples:
            >>> schedule = Schedule(2, 4, 2, 8, 1, 4)
            >>> schedule.samples_per_tick("optimizer_step"), schedule.samples_per_tick("generation_batch")
            (16.0, 64.0)
        """
        micro_batches = float(self.steps_per_generation)
        if teacher_tick == "optimizer_step":
            micro_batches = self.gradient_accumulation_steps / self.num_iterations
        return micro_batches * self.per_device_train_batch_size * self.world_size


def schedule_of(args: Any, *, world_size: int, num_iterations: int, num_generations: int) -> Schedule:
    """The schedule of a run.

    Args:
        args: its `GRPOConfig`.
        world_size: as in `Schedule`.
        num_iterations: as in `Schedule`.
        num_generations: as in `Schedule`.
    """
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    sizes = {name: getattr(args, name) for name in names}
    return Schedule(
        world_size=world_size, num_iterations=num_iterations, num_generations=num_generations, **sizes
    )
