"""Means over micro-batches and ranks that cost no device synchronisation until they are logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class MetricSums:
    """Weighted sums by name: `add` keeps tensors, `means` reduces over ranks once and returns floats.

    Every rank must add the same names, in any order, with weight zero where it has nothing to say.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add `(sum, weight)` pairs of 0-dim tensors."""
        for name, (total, weight) in values.items():
            pair = torch.stack([total.detach().float(), weight.detach().float()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def state(self) -> dict[str, Tensor]:
        """What was added since the last `means`: sum and weight [2] by name."""
        return dict(self._sums)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self._sums = dict(state)

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Sum over weight by name, over all ranks; forgets what was added. A name without weight is left out."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return {
            name: total / weight for name, (total, weight) in zip(names, totals, strict=True) if weight > 0
        }
