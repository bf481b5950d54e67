"""Whole tensors times numbers that wait on the GPU, at the speed of its memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, JOINED = 8192, 1024


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


@triton.jit
def join(parts, gains, out, COUNT, D, PIECES, GAIN: tl.constexpr, BLOCK: tl.constexpr):
    """gain · (the sum over the pieces of a row), COUNT rows of D numbers a piece."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, real = row * D + columns, columns < D
    total = tl.load(parts + first, mask=real, other=0.0)
    place = first
    for _ in range(1, PIECES):
        place += COUNT * D
        total += tl.load(parts + place, mask=real, other=0.0)
    if GAIN:
        total *= tl.load(gains + row)
    tl.store(out + first, total.to(out.dtype.element_ty), mask=real)


def joined(parts: Tensor, gain: Tensor | None, out: Tensor) -> Tensor:
    """Write ``gain[:, None] * parts.sum(0)`` to a contiguous out [c, D], from parts [n, c, D] in float32."""
    pieces, count, width = parts.shape
    with torch.cuda.device_of(parts):
        join[(count, triton.cdiv(width, JOINED))](
            parts, out if gain is None else gain, out, count, width, pieces,
            GAIN=gain is not None, BLOCK=JOINED, num_warps=4,
        )  # fmt: skip
    return out
