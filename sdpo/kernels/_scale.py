"""A tensor times a number that waits on the GPU, at the speed of its memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192


@triton.jit
def scale(values, factor, out, COUNT, BLOCK: tl.constexpr):
    """values · factor, computed in float32; the factor is a tensor []."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(values + place, mask=place < COUNT).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(out + place, product.to(out.dtype.element_ty), mask=place < COUNT)


def scaled(values: Tensor, factor: Tensor) -> Tensor:
    """``values * factor`` for a contiguous tensor and a factor [] of any dtype, in the dtype of ``values``."""
    out = torch.empty_like(values)
    with torch.cuda.device_of(values):
        scale[(triton.cdiv(values.numel(), BLOCK),)](
            values, factor, out, values.numel(), BLOCK=BLOCK, num_warps=8
        )
    return out
