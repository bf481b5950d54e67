"""Token rows → padded batches whose padding changes no number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Reading(NamedTuple):
    """What a model reads: prompts, padded on the left, beside completions, padded on the right."""

    ids: Tensor  # [B, P+T]
    mask: Tensor  # [B, P+T]
    sizes: Sequence[tuple[int, int]]  # tokens of each row's prompt and completion


def left_pad(rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P] of rows of different lengths, padded on the left.

    Example:
        >>> ids, mask = left_pad([[5], [6, 7]], pad_id=0, device=torch.device("cpu"))
        >>> ids.tolist(), mask.tolist()
        ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
    """
    width = max(map(len, rows), default=0)
    padding = torch.tensor([width - len(row) for row in rows], dtype=torch.long)
    mask = (torch.arange(width) >= padding[:, None]).long()
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    return ids.view(len(rows), width).to(device), mask.to(device)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, L] that count attended tokens only, so that left padding moves none of them.

    Example:
        >>> position_ids(torch.tensor([[0, 0, 1, 1]])).tolist()
        [[0, 0, 0, 1]]
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def columns(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Columns P and T for rows of so many prompt and completion tokens; at least one of each.

    Example:
        >>> columns([(3, 0), (2, 5)])
        (3, 5)
    """
    prompts, completions = zip(*sizes, strict=True)
    return max(1, *prompts), max(1, *completions)


def compact(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    sizes: Sequence[tuple[int, int]],
) -> Reading:
    """Prompt and completion side by side, without the columns that are padding in every row.

    The prompt is left-padded and the completion right-padded, so the kept columns are a suffix of the prompt and
    a prefix of the completion.
    """
    prompt, completion = columns(sizes)
    ids = torch.cat([prompt_ids[:, -prompt:], completion_ids[:, :completion]], dim=1)
    mask = torch.cat([prompt_mask[:, -prompt:], completion_mask[:, :completion]], dim=1)
    return Reading(ids, mask, sizes)
