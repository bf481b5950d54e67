"""What a model's own forward shows about the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .batch import position_ids
from .forward import forward_arguments

# `reads_padding` runs this many tokens, beside this much padding on the left.
_TOKENS, _PADDING = 8, 4
# Differences below these, relative to the largest logit, are rounding: between rows of one shape, and between rows
# that are shifted. Multiples of the precision count where they are larger.
_SAME_SHAPE, _SHIFTED = (1e-4, 4), (1e-3, 8)


@torch.no_grad()
def reads_padding(model: Any, unwrapped: Any, ids: Tensor) -> bool:
    """Whether the logits of a row depend on the padding before it, which the attention mask hides.

    A recurrent layer without a mask carries padding into its state, and positions that count padding shift the row.
    One forward of three short rows: two differ in the ids of their padding alone, the third has none on the left.

    Args:
        model: what runs, wrapped for several processes or not, in evaluation mode.
        unwrapped: the model inside `model`.
        ids: [n] int64, the tokens of a row without padding.

    Returns:
        Whether rows of different lengths must not run together.
    """
    row = ids[:_TOKENS]
    padded = [pad(row, (_PADDING, 0), value=token) for token in (0, 1)]
    attended = pad(torch.ones_like(row), (_PADDING, 0))
    mask = torch.stack([attended, attended, attended.roll(-_PADDING)])
    rows = torch.stack([*padded, padded[0].roll(-_PADDING)])
    logits = model(**forward_arguments(unwrapped, rows, mask, position_ids(mask), rows.shape[1])).logits
    precision = max(torch.finfo(dtype).eps for dtype in _dtypes(unwrapped, logits))
    first, second = logits[:2, _PADDING:].double()
    alone = logits[2, : len(row)].double()
    size = alone.abs().amax()

    def differ(other: Tensor, bounds: tuple[float, int]) -> Tensor:
        gaps = torch.where(other == first, 0.0, other - first).abs().amax(dim=-1)
        return gaps > max(bounds[0], bounds[1] * precision) * size

    # Rounding may send a token of a shifted row to another expert, which changes it and few others.
    shifted = differ(alone, _SHIFTED).float().mean() > 0.5
    return bool(differ(second, _SAME_SHAPE).any() | shifted)


def _dtypes(model: Any, logits: Tensor) -> list[torch.dtype]:
    """Those in which the model computes."""
    device = logits.device.type
    weight = model.get_input_embeddings().weight
    dtypes = [logits.dtype, *([weight.dtype] if weight.is_floating_point() else [])]
    return [*dtypes, torch.get_autocast_dtype(device)] if torch.is_autocast_enabled(device) else dtypes
