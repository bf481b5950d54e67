"""Forwards of a few rows at a time: for memory, and so that no batch is wider than what the model reads.

Rows lie as [left pad | prompt | completion | right pad]. One row with a long prompt and another with a long
completion make a batch that is wider than each of them; a loader's `max_seq_length` then cuts it off on the
right, silently. A forward without a gradient also holds one layer's activations of all its tokens, which for
long reprompts is the largest memory of a step, and saves no time beyond what fills the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .batch import columns
from .forward import CompletionStates


class RowGroup(NamedTuple):
    """Rows that run together, and the columns that any of them attends."""

    rows: slice
    columns: slice
    right: int  # completion columns cut off on the right


def row_groups(sizes: Sequence[tuple[int, int]], *, width_limit: float, token_limit: float) -> list[RowGroup]:
    """Consecutive rows of a `compact` batch, in groups of about as many rows, each within both limits.

    `sizes` are the tokens of each row's prompt and completion. A single row may be beyond the limits.

    Example:
        >>> row_groups([(2, 1), (0, 2)], width_limit=3, token_limit=100)
        [RowGroup(rows=slice(0, 1, None), columns=slice(0, 3, None), right=1), \
RowGroup(rows=slice(1, 2, None), columns=slice(2, 4, None), right=0)]
    """
    count, (prompt, length) = len(sizes), columns(sizes)
    width = prompt + length
    if width <= width_limit and count * width <= token_limit:
        return [RowGroup(slice(0, count), slice(0, width), 0)]
    # At least one completion column stays, also in a row without a completion.
    bounds = [(prompt - before, prompt + max(after, 1)) for before, after in sizes]
    # Groups of about as many rows each: a last one of few rows would leave the device idle.
    tokens = sum(last - first for first, last in bounds)
    most = math.ceil(count / max(1, math.ceil(tokens / token_limit)))
    groups: list[RowGroup] = []
    start, (first, last) = 0, bounds[0]
    for row in range(1, count + 1):
        if row < count:
            low, high = min(first, bounds[row][0]), max(last, bounds[row][1])
            rows = row + 1 - start
            if rows <= most and high - low <= width_limit and rows * (high - low) <= token_limit:
                first, last = low, high
                continue
        groups.append(RowGroup(slice(start, row), slice(first, last), width - last))
        if row < count:
            start, (first, last) = row, bounds[row]
    return groups


def run_groups(
    forward: Callable[..., Any], arguments: Mapping[str, Any], groups: Sequence[RowGroup], *, length: int
) -> Any:
    """`forward(arguments, length=T)` group by group: `CompletionStates` or logits [B, T, ...], joined again.

    Columns that were cut off are zero; no loss looks at them.
    """
    if len(groups) == 1 and groups[0].right == 0:
        return forward(arguments, length=length)
    parts = []
    for group in groups:
        kept = length - group.right
        own = {
            name: value[group.rows, group.columns] if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        if "logits_to_keep" in own:
            own["logits_to_keep"] = kept + 1
        parts.append(forward(own, length=kept))
    rights = [group.right for group in groups]
    if not isinstance(parts[0], CompletionStates):
        return torch.cat([pad(part, (0, 0, 0, right)) for part, right in zip(parts, rights, strict=True)])
    hidden = [pad(part.hidden, (0, 0, 0, right)) for part, right in zip(parts, rights, strict=True)]
    return CompletionStates(torch.cat(hidden), parts[0].head)
