"""Which rows of an optimizer step are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Candidate:
    """A row that may be kept.

    Attributes:
        order: its place among the rows of the step.
        divergence: mean over its tokens with a loss, nats; `None`: it has no teacher signal.
        success: its score reaches the threshold.
        content: what is written of it; empty until it is kept.
    """

    order: int
    divergence: float | None
    success: bool
    content: dict[str, Any]


def choose(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The rows to keep, at most `count`, in their order.

    The first row without a signal (from two rows on, or where no row has one), the success of the largest
    divergence (from three rows on), and otherwise the rows of the largest divergence. A choice from the rows of
    several micro-batches is that from the choices of each.

    Args:
        candidates: rows of one optimizer step.
        count: the most rows to keep, at least 1.

    Examples:
        >>> rows = [Candidate(i, d, s, {}) for i, (d, s) in enumerate([(0.1, True), (0.9, False), (None, False)])]
        >>> [row.order for row in choose(rows, 1)], [row.order for row in choose(rows, 2)]
        ([1], [1, 2])
    """
    by_divergence = sorted(
        (row for row in candidates if row.divergence is not None),
        key=lambda row: (-(row.divergence or 0.0), row.order),
    )
    kept = []
    if count >= 2 or not by_divergence:
        kept += sorted((row for row in candidates if row.divergence is None), key=lambda row: row.order)[:1]
    if count >= 3:
        kept += [row for row in by_divergence if row.success][:1]
    kept += [row for row in by_divergence if row not in kept][: count - len(kept)]
    return sorted(kept, key=lambda row: row.order)
