"""The matrix products between hidden states and logits, accumulated in the working precision.

bf16 logits are spaced 0.06 to 0.13 apart where language models put them, which costs a divergence its second
digit. Inputs may be bf16 or fp16, but what comes out of a product here is float32 (float64 for float64).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from sdpo.fused import triton as kernels

# Vocabulary rows converted at a time where the device has no product of 16-bit inputs with a float32 result.
_SLAB = 8192

# Terms that the matrix units add up in one go. Their accumulators cut off what does not fit, always towards zero:
# the sum shrinks by about 1e-9 of itself a term, up to 2e-4 over a vocabulary of 150k.
_TERMS = 2**14

# Numbers of a result that fill a GPU. What is smaller cuBLAS splits into pieces by itself.
_FILLS = 2**21

# A product of random numbers that shows how much of itself is cut off: large enough not to be split into pieces,
# seen in a corner, and there in the results beyond so many standard deviations: it is the large logits that have
# the probability, and a small one, whose sum went up and down, has lost less.
_SAMPLE, _SEEN, _LARGE = (4096, 2048), 512, 2.5

# Half-precision gradients are lifted by a power of two so that their largest entry sits near this value: far
# below fp16's largest number (65504), far above its smallest (6e-8).
_LIFTED = 256.0
_LEAST = 2.0**-64


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Dtype that autocast wants for products on this device; None if it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def operand_dtype(hidden: Tensor, head: Tensor, autocast: torch.dtype | None) -> torch.dtype:
    """Dtype of a product's inputs: autocast's, if it is on, as for a linear layer; else the wider of the two."""
    if autocast is not None and hidden.dtype != torch.float64:
        return autocast
    return torch.promote_types(hidden.dtype, head.dtype)


def working_dtype(operand: torch.dtype) -> torch.dtype:
    """Dtype of everything after a product: float64 stays, everything else is float32."""
    return torch.float64 if operand == torch.float64 else torch.float32


def has_mixed_product(device: torch.device, operand: torch.dtype) -> bool:
    """Whether 16-bit inputs can be multiplied into float32 in one product."""
    return device.type == "cuda" and operand in (torch.bfloat16, torch.float16) and _knows_mixed_products()


@functools.cache
def _knows_mixed_products() -> bool:
    return hasattr(torch.ops.aten.mm, "dtype_out") and hasattr(torch.ops.aten.bmm, "dtype_out")


def grad_logits_dtype(device: torch.device, operand: torch.dtype) -> torch.dtype:
    """Dtype in which the gradient of the logits enters its products."""
    return operand if has_mixed_product(device, operand) else working_dtype(operand)


def fp16_loss_scale(weights: Tensor, bound: float) -> Tensor:
    """Power of two that lifts fp16 gradients out of the underflow, [] float32.

    The largest of ``weights`` [N], times ``bound``, bounds the loss weights; what is not finite is left out.
    """
    finite = torch.where(weights.isfinite(), weights.abs(), 0.0).float()
    # No weight at all needs no lift, and one lifted by infinity would be NaN.
    largest = torch.cat([finite.flatten(), finite.new_full((1,), _LEAST)]).amax() * bound
    return torch.exp2((math.log2(_LIFTED) - largest.log2()).floor())


def project(hidden: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """``hidden @ head.T``: [c, D] and [V, D] into out [c, V] of the working dtype; hidden may have more digits."""
    if hidden.dtype == head.dtype == out.dtype:
        return torch.mm(hidden, head.t(), out=out)
    if hidden.dtype == head.dtype and has_mixed_product(hidden.device, hidden.dtype):
        return torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)
    if has_mixed_product(hidden.device, head.dtype):
        # More digits than the head has: their upper half and what it leaves, two products into one.
        upper = hidden.to(head.dtype)
        project(upper, head, out)
        lower = (hidden - upper).to(head.dtype)
        return torch.addmm(out, lower, head.t(), out_dtype=out.dtype, out=out)
    wide = hidden.to(out.dtype)
    for start in range(0, head.shape[0], _SLAB):
        slab = slice(start, start + _SLAB)
        torch.mm(wide, head[slab].to(out.dtype).t(), out=out[:, slab])
    return out


def accumulation_bias(device: torch.device, operand: torch.dtype, width: int) -> float:
    """Share of itself by which a large sum of ``width`` products is too small: what the matrix units cut off.

    Measured once per device, dtype and width, on random numbers; it hardly depends on them. On an H200 it is 3e-6
    to 4e-6 at a width of 3584: two models that nearly agree differ by that much less, and their divergence is too
    small by twice as much.
    """
    return _measured_loss(device, operand, width) if has_mixed_product(device, operand) else 0.0


@functools.lru_cache(maxsize=64)
def _measured_loss(device: torch.device, operand: torch.dtype, width: int) -> float:
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(rows, width, generator=generator, device=device, dtype=operand) for rows in _SAMPLE
    )
    found = torch.mm(left, right.t(), out_dtype=torch.float32)[:_SEEN, :_SEEN].double()
    exact = left[:_SEEN].double() @ right[:_SEEN].double().t()
    large = exact.abs() > _LARGE * exact.std()
    return 1.0 - float((found * exact)[large].sum() / exact[large].square().sum())


def grad_hidden_from_logits(
    slope: Tensor, head: Tensor, out: Tensor, gain: Tensor | None = None, scratch: Tensor | None = None
) -> Tensor:
    """``gain · (slope @ head)``: the gradient of the hidden states from that of the logits, into out [c, D].

    slope [c, V], head [V, D]; a gain [c] comes with slopes of 16 bits, which come where a mixed product is. An
    ``out`` of 16 bits is rounded to once, at the end, as in a linear layer's backward. Summands lie in ``scratch``,
    float32, where it is large enough.
    """
    if slope.itemsize == 2:
        return kernels.joined(_parts(slope, head, scratch), gain, out)
    if slope.dtype == head.dtype == out.dtype:
        return torch.mm(slope, head, out=out)
    total = slope.new_zeros(slope.shape[0], head.shape[1])
    for start in range(0, head.shape[0], _SLAB):
        slab = slice(start, start + _SLAB)
        total.addmm_(slope[:, slab], head[slab].to(slope.dtype))
    return out.copy_(total)


def _parts(slope: Tensor, head: Tensor, scratch: Tensor | None) -> Tensor:
    """Summands [n, c, D] of ``slope @ head`` in float32, from 16-bit tensors [c, V] and [V, D]."""
    size = (slope.shape[0], head.shape[1])
    if size[0] * size[1] < _FILLS:
        return torch.mm(slope, head, out_dtype=torch.float32)[None]
    count, width = pieces(head.shape[0])
    whole = count * width
    rest = whole < head.shape[0]
    shape = (count + rest, *size)
    if scratch is not None and scratch.numel() >= math.prod(shape):
        parts = scratch.view(-1)[: math.prod(shape)].view(shape)
    else:
        parts = torch.empty(shape, dtype=torch.float32, device=slope.device)
    torch.bmm(
        slope[:, :whole].unflatten(1, (count, width)).transpose(0, 1),
        head[:whole].unflatten(0, (count, width)),
        out_dtype=torch.float32,
        out=parts[:count],
    )
    if rest:
        torch.mm(slope[:, whole:], head[whole:], out_dtype=torch.float32, out=parts[count])
    return parts


def pieces(vocabulary: int) -> tuple[int, int]:
    """Number and width of the equal pieces of a long sum; fewer than 8 columns for each may be left over."""
    least = math.ceil(vocabulary / _TERMS)
    # Rows of 16-bit numbers that start at multiples of 16 bytes are read fastest.
    even = (n for n in range(least, 2 * least) if vocabulary % (8 * n) == 0)
    count = next(even, least)
    width = vocabulary // count
    return count, width if width < 8 else width // 8 * 8


def accumulate_grad_weight(
    slope: Tensor, hidden: Tensor, total: Tensor, gain: Tensor | None = None, *, first: bool
) -> None:
    """Add ``(gain · slope).T @ hidden``, [C, V] and [C, D], to the head's gradient total [V, D] in place."""
    if gain is not None:
        hidden = (hidden * gain[:, None]).to(hidden.dtype)
    if slope.dtype == total.dtype:
        torch.addmm(total, slope.t(), hidden.to(slope.dtype), beta=0.0 if first else 1.0, out=total)
    else:
        torch.addmm(total, slope.t(), hidden, beta=0.0 if first else 1.0, out_dtype=total.dtype, out=total)


def accumulate_grad_bias(slope: Tensor, total: Tensor, gain: Tensor | None = None) -> None:
    """Add the sum of ``gain · slope`` [C, V] over its rows to the bias' gradient total [V] in place."""
    if gain is None:
        total += slope.sum(dim=0, dtype=total.dtype)
        return
    for start in range(0, total.shape[0], _SLAB):
        slab = slice(start, start + _SLAB)
        total[slab] += gain @ slope[:, slab].to(gain.dtype)
