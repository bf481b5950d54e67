"""Token rows → padded batches whose padding changes no number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def left_pad(rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, P] of rows of different lengths, padded on the left.

    Example:
        >>> ids, mask = left_pad([[5], [6, 7]], pad_id=0, device=torch.device("cpu"))
        >>> ids.tolist(), mask.tolist()
        ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
    """
    width = max((len(row) for row in rows), default=0)
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids.view(len(rows), width).to(device), mask.view(len(rows), width).to(device)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, L] that count attended tokens only, so that left padding moves none of them.

    Example:
        >>> position_ids(torch.tensor([[0, 0, 1, 1]])).tolist()
        [[0, 0, 0, 1]]
    """
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def compact(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Prompt and completion side by side [B, P'+T'], without the columns that are padding in every row.

    Returns ids, attention mask and T'. The prompt is left-padded and the completion right-padded, so the
    kept columns are a suffix of the prompt and a prefix of the completion. Reads two sizes from the device.
    """
    sizes = torch.stack([prompt_mask.sum(-1).max(), completion_mask.sum(-1).max()]).tolist()
    prompt, completion = max(sizes[0], 1), max(sizes[1], 1)
    ids = torch.cat([prompt_ids[:, -prompt:], completion_ids[:, :completion]], dim=1)
    mask = torch.cat([prompt_mask[:, -prompt:], completion_mask[:, :completion]], dim=1)
    return ids, mask, completion
