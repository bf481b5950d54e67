"""When the teacher of a run is updated."""

from __future__ import annotations


class TickSchedule:
    """Counts the updates of the teacher that are due at the end of an optimizer step.

    Where no step since the last update had a signal, the student has not moved, and none is due.

    Attributes:
        student_moved: a step since the last update had a signal.
        generation_batches: that ended before.

    Args:
        per_generation_batch: one update for each generation batch, not for each optimizer step.

    Examples:
        >>> ticks = TickSchedule(per_generation_batch=True)
        >>> [ticks.due(has_signal=step == 0, generation_batches=step // 2) for step in range(5)]
        [0, 0, 1, 0, 0]
    """

    def __init__(self, *, per_generation_batch: bool) -> None:
        self._per_generation_batch = per_generation_batch
        self.student_moved = False
        self.generation_batches = 0

    def due(self, *, has_signal: bool, generation_batches: int) -> int:
        """The updates that are due.

        Args:
            has_signal: of the optimizer step that just ended.
            generation_batches: that have ended so far.
        """
        self.student_moved = self.student_moved or has_signal
        ticks = 1
        if self._per_generation_batch:
            ticks = generation_batches - self.generation_batches
            self.generation_batches = generation_batches
        if not ticks:
            return 0
        moved, self.student_moved = self.student_moved, False
        return ticks if moved else 0
