"""The matrix products between hidden states and logits: 16-bit inputs, results in float32.

Near the logits of a language model, bf16 numbers are 0.06 to 0.13 apart, which costs a divergence its second digit.
So inputs may be bf16 or fp16, but every product here returns float32 (float64 for float64 inputs).

Shapes: C tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sdpo.fused import triton as kernels

# Rows of the weight converted at a time where the device has no product of 16-bit inputs with a float32 result:
# a converted copy of the whole weight would double its memory.
SLAB_ROWS = 8192

# Summands that one product adds up, at most. The accumulators of the tensor cores truncate towards zero: a sum
# shrinks by about 1e-9 of itself per summand, up to 2e-4 over a vocabulary of 150k. A longer sum is split along
# its inner dimension K (split-K), and the partial sums are added exactly.
SPLIT_K_SUMMANDS = 2**14

# Elements of a result that occupy a GPU. cuBLAS splits a sum with fewer of them by itself.
MIN_SPLIT_K_OUTPUTS = 2**21

# The product of random numbers that measures the accumulation bias: large enough that cuBLAS does not split it.
# Only a corner is compared with float64, and there the results beyond so many standard deviations: large logits
# carry the probability, and a small result, a sum of both signs, is biased less.
SAMPLE_ROWS, SAMPLE_CORNER, LARGE_DEVIATIONS = (4096, 2048), 512, 2.5

# The loss scale is the power of two that puts the largest fp16 gradient near this value: far below the largest fp16
# number (65504), far above the smallest (6e-8).
FP16_TARGET = 256.0
# The least weight that the scale follows, so that weights of zero give a finite scale.
FP16_LEAST_WEIGHT = 2.0**-64


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products under torch.autocast on this device; None if it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def operand_dtype(hidden: Tensor, weight: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype of a product's inputs: autocast's, as for a linear layer, or else the wider of the two."""
    if autocast is not None and hidden.dtype != torch.float64:
        return autocast
    return torch.promote_types(hidden.dtype, weight.dtype)


def working_dtype(operand: torch.dtype) -> torch.dtype:
    """The dtype of everything after a product: float64 stays, everything else is float32."""
    return torch.float64 if operand == torch.float64 else torch.float32


def has_mixed_product(device: torch.device, operand: torch.dtype) -> bool:
    """Whether one product takes 16-bit inputs and returns float32."""
    return (
        device.type == "cuda" and operand in (torch.bfloat16, torch.float16) and _torch_has_mixed_products()
    )


@functools.cache
def _torch_has_mixed_products() -> bool:
    return hasattr(torch.ops.aten.mm, "dtype_out") and hasattr(torch.ops.aten.bmm, "dtype_out")


def grad_logits_dtype(device: torch.device, operand: torch.dtype) -> torch.dtype:
    """The dtype in which the gradient of the logits enters its products."""
    return operand if has_mixed_product(device, operand) else working_dtype(operand)


def fp16_loss_scale(weights: Tensor, bound: float) -> Tensor:
    """The power of two [] float32 by which fp16 gradients are multiplied, against underflow.

    ``bound`` times the largest of ``weights`` [n] bounds the loss weights; weights that are not finite are ignored.
    """
    finite = torch.where(weights.isfinite(), weights.abs(), 0.0).float()
    largest = torch.cat([finite.flatten(), finite.new_full((1,), FP16_LEAST_WEIGHT)]).amax() * bound
    return torch.exp2((math.log2(FP16_TARGET) - largest.log2()).floor())


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``hidden @ weight.T``: [C, D] and [V, D] into out [C, V] of the working dtype.

    ``hidden`` may have a wider dtype than ``weight``; it is not rounded.
    """
    if hidden.dtype == weight.dtype == out.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if hidden.dtype == weight.dtype and has_mixed_product(hidden.device, hidden.dtype):
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    if has_mixed_product(hidden.device, weight.dtype):
        # Two products with one result: of the rounded hidden states, and of what the rounding removed.
        rounded = hidden.to(weight.dtype)
        project(rounded, weight, out)
        remainder = (hidden - rounded).to(weight.dtype)
        return torch.addmm(out, remainder, weight.t(), out_dtype=out.dtype, out=out)
    wide = hidden.to(out.dtype)
    for start in range(0, weight.shape[0], SLAB_ROWS):
        slab = slice(start, start + SLAB_ROWS)
        torch.mm(wide, weight[slab].to(out.dtype).t(), out=out[:, slab])
    return out


def accumulation_bias(device: torch.device, operand: torch.dtype, summands: int) -> float:
    """Tensor-core accumulation bias: the share of itself by which a large sum of products is too small.

    Measured once per device, dtype and number of summands, on random numbers; it hardly depends on them. On an H200
    it is 3e-6 to 4e-6 for 3584 summands: the logits of two models that nearly agree differ by that much less, and
    their divergence is too small by twice as much.
    """
    return (
        _measure_accumulation_bias(device, operand, summands) if has_mixed_product(device, operand) else 0.0
    )


@functools.lru_cache(maxsize=64)
def _measure_accumulation_bias(device: torch.device, operand: torch.dtype, summands: int) -> float:
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(rows, summands, generator=generator, device=device, dtype=operand) for rows in SAMPLE_ROWS
    )
    corner = slice(0, SAMPLE_CORNER)
    measured = torch.mm(left, right.t(), out_dtype=torch.float32)[corner, corner].double()
    exact = left[corner].double() @ right[corner].double().t()
    large = exact.abs() > LARGE_DEVIATIONS * exact.std()
    return 1.0 - float((measured * exact)[large].sum() / exact[large].square().sum())


def grad_hidden_from_logits(
    grad_logits: Tensor,
    weight: Tensor,
    out: Tensor,
    row_scale: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """``row_scale[:, None] * (grad_logits @ weight)``: the gradient of the hidden states, into out [C, D].

    grad_logits [C, V], weight [V, D]; 16-bit gradients, which only exist where a mixed product does, come with a
    row_scale [C]. A 16-bit ``out`` is rounded once, at the end, as in a linear layer's backward. Partial sums are
    stored in ``scratch``, float32, if it is large enough.
    """
    if grad_logits.itemsize == 2:
        return kernels.sum_partials(_split_k_sums(grad_logits, weight, scratch), row_scale, out)
    if grad_logits.dtype == weight.dtype == out.dtype:
        return torch.mm(grad_logits, weight, out=out)
    total = grad_logits.new_zeros(grad_logits.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], SLAB_ROWS):
        slab = slice(start, start + SLAB_ROWS)
        total.addmm_(grad_logits[:, slab], weight[slab].to(grad_logits.dtype))
    return out.copy_(total)


def _split_k_sums(grad_logits: Tensor, weight: Tensor, scratch: Tensor | None) -> Tensor:
    """Partial sums [parts, C, D] of ``grad_logits @ weight`` in float32, from 16-bit tensors [C, V] and [V, D]."""
    size = (grad_logits.shape[0], weight.shape[1])
    if size[0] * size[1] < MIN_SPLIT_K_OUTPUTS:
        return torch.mm(grad_logits, weight, out_dtype=torch.float32)[None]
    count, width = split_k(weight.shape[0])
    even = count * width
    has_remainder = even < weight.shape[0]
    shape = (count + has_remainder, *size)
    if scratch is not None and scratch.numel() >= math.prod(shape):
        parts = scratch.view(-1)[: math.prod(shape)].view(shape)
    else:
        parts = torch.empty(shape, dtype=torch.float32, device=grad_logits.device)
    torch.bmm(
        grad_logits[:, :even].unflatten(1, (count, width)).transpose(0, 1),
        weight[:even].unflatten(0, (count, width)),
        out_dtype=torch.float32,
        out=parts[:count],
    )
    if has_remainder:
        torch.mm(grad_logits[:, even:], weight[even:], out_dtype=torch.float32, out=parts[count])
    return parts


def split_k(vocabulary: int) -> tuple[int, int]:
    """Number and width of the equal parts of a sum over the vocabulary; fewer than 8 columns a part may remain."""
    least = math.ceil(vocabulary / SPLIT_K_SUMMANDS)
    # 16-bit rows are read fastest where each starts at a multiple of 16 bytes.
    aligned = (n for n in range(least, 2 * least) if vocabulary % (8 * n) == 0)
    count = next(aligned, least)
    width = vocabulary // count
    return count, width if width < 8 else width // 8 * 8


def accumulate_grad_weight(
    grad_logits: Tensor, hidden: Tensor, total: Tensor, row_scale: Tensor | None = None, *, overwrite: bool
) -> None:
    """Add ``(row_scale[:, None] * grad_logits).T @ hidden``, [C, V] and [C, D], to total [V, D], or overwrite."""
    if row_scale is not None:
        hidden = (hidden * row_scale[:, None]).to(hidden.dtype)
    beta = 0.0 if overwrite else 1.0
    if grad_logits.dtype == total.dtype:
        torch.addmm(total, grad_logits.t(), hidden.to(grad_logits.dtype), beta=beta, out=total)
    else:
        torch.addmm(total, grad_logits.t(), hidden, beta=beta, out_dtype=total.dtype, out=total)


def accumulate_grad_bias(grad_logits: Tensor, total: Tensor, row_scale: Tensor | None = None) -> None:
    """Add the sum of ``row_scale[:, None] * grad_logits`` [C, V] over the tokens to total [V]."""
    if row_scale is None:
        total += grad_logits.sum(dim=0, dtype=total.dtype)
        return
    for start in range(0, total.shape[0], SLAB_ROWS):
        slab = slice(start, start + SLAB_ROWS)
        total[slab] += row_scale @ grad_logits[:, slab].to(row_scale.dtype)
