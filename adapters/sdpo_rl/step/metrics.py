"""Means over micro-batches and processes that do not synchronize with the device until they are logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Metrics = dict[str, tuple[Tensor, Tensor]]  # sum and weight [] by name


class MetricSums:
    """Weighted sums by name: `add` accumulates tensors, `means` reduces over processes once and returns floats.

    Every process must add the same names, in any order, with weight zero for nothing.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add the sums and the weights."""
        for name, (total, weight) in metrics.items():
            pair = torch.stack([total.detach().float(), weight.detach().float()])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def state(self) -> dict[str, Tensor]:
        """What was added since the last `means`: sum and weight [2] by name."""
        return dict(self._sums)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        self._sums = dict(state)

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Sum over weight by name, and start again; a name without weight is left out.

        Args:
            reduce: sums a tensor over all processes.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return {
            name: total / weight for name, (total, weight) in zip(names, totals, strict=True) if weight > 0
        }


class EvaluationLoss:
    """The loss of an evaluation: the mean over all its tokens or rows, and GRPO's part as TRL's mean over batches.

    Attributes:
        batches: of this process so far.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._sums = MetricSums()

    def add(self, total: Tensor, policy_total: Tensor | None, *, count: Tensor, denominator: Tensor) -> None:
        """Add a batch.

        Args:
            total: [] sum of its loss, GRPO's part included.
            policy_total: [] GRPO's part of it; `None`: there is none.
            count: [] tokens or rows (see `loss_count`).
            denominator: [] what its loss is divided by.
        """
        self.batches += 1
        policy = torch.zeros_like(total) if policy_total is None else policy_total
        parts = {"loss": (total - policy, count), "policy": (policy / denominator, torch.ones_like(policy))}
        self._sums.add(parts)

    def mean(self, reduce: Callable[[Tensor], Tensor]) -> float:
        """The loss, and start again; `reduce` sums a tensor over all processes."""
        self.batches = 0
        return sum(self._sums.means(reduce).values(), 0.0)
