"""Tensors times factors that are still on the GPU, at the bandwidth of its memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements per program. Both kernels are bound by the bandwidth, and few large programs reach it.
SCALE_BLOCK, SUM_BLOCK_D = 8192, 1024


@triton.jit
def scale_kernel(values_ptr, factor_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """out = values · factor, computed in float32; values and out have numel elements, the factor is a tensor []."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    product = tl.load(values_ptr + offs, mask=mask).to(tl.float32) * tl.load(factor_ptr).to(tl.float32)
    tl.store(out_ptr + offs, product.to(out_ptr.dtype.element_ty), mask=mask)


def scaled(values: Tensor, factor: Tensor) -> Tensor:
    """``values * factor`` for a contiguous tensor and a factor [] of any dtype, in the dtype of ``values``."""
    out = torch.empty_like(values)
    grid = (triton.cdiv(values.numel(), SCALE_BLOCK),)
    with torch.cuda.device_of(values):
        scale_kernel[grid](values, factor, out, values.numel(), BLOCK=SCALE_BLOCK, num_warps=8)
    return out


@triton.jit
def sum_partials_kernel(
    partials_ptr, row_scale_ptr, out_ptr, D, PARTIALS, HAS_ROW_SCALE: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out [C, D] = row_scale [C] · the sum of partials [PARTIALS, C, D] over the first dimension."""
    pid_c = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    offs = pid_c * D + offs_d
    total = tl.load(partials_ptr + offs, mask=mask, other=0.0)
    # C as an int64: the sums of a long chunk with a small vocabulary may be more than 2^31 numbers.
    stride = tl.num_programs(0).to(tl.int64) * D
    offs_partial = offs
    for _ in range(1, PARTIALS):
        offs_partial += stride
        total += tl.load(partials_ptr + offs_partial, mask=mask, other=0.0)
    if HAS_ROW_SCALE:
        total *= tl.load(row_scale_ptr + pid_c)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_partials(partials: Tensor, row_scale: Tensor | None, out: Tensor) -> Tensor:
    """Write ``row_scale[:, None] * partials.sum(0)`` to a contiguous out [C, D]; partials [n, C, D] in float32."""
    count, tokens, width = partials.shape
    with torch.cuda.device_of(partials):
        sum_partials_kernel[(tokens, triton.cdiv(width, SUM_BLOCK_D))](
            partials, row_scale, out, width, count,
            HAS_ROW_SCALE=row_scale is not None, BLOCK_D=SUM_BLOCK_D, num_warps=4,
        )  # fmt: skip
    return out
