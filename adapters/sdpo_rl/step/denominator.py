"""One denominator for a whole optimizer step, whatever its micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor


class StepWindow:
    """Active tokens (or rows) of the optimizer step that a micro-batch belongs to.

    The loss of a micro-batch is its sum over the count of its whole step, so that a step split into any
    micro-batches gives one loss and one gradient. The counts of a generation batch are known before its first
    micro-batch. When a step spans several generation batches the later counts are not known yet: all its
    micro-batches then share one estimate, and `correction` is what the accumulated gradient must be
    multiplied by once the true count is known.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._denominator: Tensor | None = None
        self._seen: Tensor | None = None
        self._exact = True

    def set_counts(self, counts: Tensor) -> None:
        """The counts [M] of the M micro-batches of a new generation batch, summed over ranks."""
        self._counts = counts.to(torch.float32)

    def denominator(self, *, step: int, index: int, length: int, generate_every: int) -> Tensor:
        """The count to divide by, at least 1.

        `step` counts micro-batches, `index` is this one's place in its optimizer step of `length`
        micro-batches, and a new generation batch is made every `generate_every` of them.
        """
        if self._counts is None:
            raise RuntimeError("set_counts() must come before denominator()")
        slots = len(self._counts)
        if index == 0 or self._denominator is None or self._seen is None:
            generation = step // generate_every
            known = [
                (step + ahead) % slots
                for ahead in range(length)
                if (step + ahead) // generate_every == generation
            ]
            # Not indexed by a list, which would travel to the device and hold everything up behind the forwards.
            total = torch.stack([self._counts[slot] for slot in known]).sum()
            self._exact = len(known) == length
            self._denominator = (total * (length / len(known))).clamp(min=1.0)
            self._seen = torch.zeros_like(total)
        self._seen = self._seen + self._counts[step % slots]
        return self._denominator

    def correction(self) -> Tensor | None:
        """Estimate over true count of the step that just ended; `None` where the count was exact."""
        if self._exact or self._denominator is None or self._seen is None:
            return None
        return self._denominator / self._seen.clamp(min=1.0)
