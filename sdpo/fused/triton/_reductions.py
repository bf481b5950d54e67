"""The passes over a chunk's products [C, V]: each reads every element once, one program per token and block.

Outside the support the gradient of a token's logits is factor · exp(logits), where the factor depends on sums over
the whole vocabulary. A bf16 gradient need not wait for them: the pass that sums also writes the unscaled gradient
exp(logits − origin), and the factor becomes part of the token's row scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._math import (
    MASKED,
    finite_or_zero,
    softcap_backward,
    to_logits,
    weighted_exp,
    weighted_logsumexp,
)

# The sampled token's logit is the origin of the unscaled gradient, unless the largest logit is further above it, or
# log Σ exp outside further below it, than this: bf16, or a sum, would leave its range.
MAX_ABOVE_ORIGIN, MAX_BELOW_ORIGIN = tl.constexpr(40.0), tl.constexpr(60.0)
# A finite exponent whose exp is 0.
VERY_NEGATIVE = tl.constexpr(-1e30)


@triton.jit
def clamp_to_finite(exponent):
    """VERY_NEGATIVE in place of −inf, so that exponent · exp(exponent) is 0 there; NaN stays NaN."""
    return tl.maximum(exponent, VERY_NEGATIVE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_logits(
    products_ptr, bias_ptr, c, offs_v, mask, V, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits of token c at offs_v, of any shape; −inf outside the mask."""
    products = tl.load(products_ptr + c * V + offs_v, mask=mask, other=MASKED)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask, other=0.0).to(tl.float32)
    return to_logits(products, bias, scale, softcap, HAS_SOFTCAP)


@triton.jit
def _last_block_first():
    """Token and block of a program. The matrix product wrote the last columns last: they may still be in L2."""
    return tl.program_id(0).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def block_reductions(
    products_ptr, bias_ptr, block_max_ptr, block_sumexp_ptr, block_moment_ptr, token_logit_ptr, grad_logits_ptr,
    V, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UNSCALED_GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Per block of BLOCK_V logits z: max z, Σ exp(z − max), Σ (z − max) · exp(z − max).

    Reads products [C, V] and, with UNSCALED_GRAD, token_logit [C], the origin. Writes block_max, block_sumexp and
    block_moment [C, blocks] and, with UNSCALED_GRAD, grad_logits [C, V].
    """
    pid_c, pid_v = _last_block_first()
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    logits = load_logits(
        products_ptr, bias_ptr, pid_c, offs_v, mask, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    block_max = tl.max(logits, 0)
    base = finite_or_zero(block_max)
    exponent = clamp_to_finite(logits - base)
    e = tl.exp(exponent)
    offs_b = pid_c * tl.num_programs(1) + pid_v
    tl.store(block_max_ptr + offs_b, block_max)
    tl.store(block_sumexp_ptr + offs_b, tl.sum(e, 0))
    tl.store(block_moment_ptr + offs_b, tl.sum(exponent * e, 0))
    if UNSCALED_GRAD:
        grad = e * tl.exp(base - tl.load(token_logit_ptr + pid_c))
        grad = softcap_backward(grad, logits, softcap, HAS_SOFTCAP)
        tl.store(grad_logits_ptr + pid_c * V + offs_v, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def block_and_group_reductions(
    products_ptr, bias_ptr, block_max_ptr, block_sumexp_ptr, block_moment_ptr, group_max_ptr, group_sumexp_ptr,
    token_logit_ptr, grad_logits_ptr,
    V, GROUPS, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UNSCALED_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr, GROUP_V: tl.constexpr,
):  # fmt: skip
    """``block_reductions``, and the first two of them per group of GROUP_V neighbouring logits.

    Also writes group_max and group_sumexp [C, GROUPS].
    """
    pid_c, pid_v = _last_block_first()
    offs_g = pid_v * (BLOCK_V // GROUP_V) + tl.arange(0, BLOCK_V // GROUP_V)
    offs_v = offs_g[:, None] * GROUP_V + tl.arange(0, GROUP_V)[None, :]
    mask = offs_v < V
    logits = load_logits(
        products_ptr, bias_ptr, pid_c, offs_v, mask, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    group_max = tl.max(logits, 1)
    base = finite_or_zero(group_max)
    exponent = clamp_to_finite(logits - base[:, None])
    e = tl.exp(exponent)
    group_sumexp = tl.sum(e, 1)
    group_moment = tl.sum(exponent * e, 1)
    tl.store(group_max_ptr + pid_c * GROUPS + offs_g, group_max)
    tl.store(group_sumexp_ptr + pid_c * GROUPS + offs_g, group_sumexp)
    block_max = tl.max(group_max, 0)
    group_exponent = clamp_to_finite(group_max - finite_or_zero(block_max))
    group_scale = tl.exp(group_exponent)
    offs_b = pid_c * tl.num_programs(1) + pid_v
    tl.store(block_max_ptr + offs_b, block_max)
    tl.store(block_sumexp_ptr + offs_b, tl.sum(group_sumexp * group_scale, 0))
    tl.store(
        block_moment_ptr + offs_b, tl.sum((group_moment + group_exponent * group_sumexp) * group_scale, 0)
    )
    if UNSCALED_GRAD:
        grad = e * tl.exp(base - tl.load(token_logit_ptr + pid_c))[:, None]
        grad = softcap_backward(grad, logits, softcap, HAS_SOFTCAP)
        tl.store(grad_logits_ptr + pid_c * V + offs_v, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def check_unscaled_grad(
    products_ptr, bias_ptr, block_max_ptr, block_sumexp_ptr, log_outside_ptr, token_logit_ptr, grad_logits_ptr,
    grad_origin_ptr,
    V, BLOCKS, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, OWNS_SUPPORT: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The origin of each token's unscaled gradient. Where the sampled token's logit is out of range, log Σ exp over
    the tokens outside the support takes its place, and the gradient is rewritten.

    Reads token_logit [C], block_max and block_sumexp [C, BLOCKS] and, if the student owns the support, log_outside
    [C] relative to its largest logit. Writes grad_origin [C] and, for a few tokens, grad_logits [C, V].
    """
    pid_c = tl.program_id(0).to(tl.int64)
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = offs_b < BLOCKS
    block_max = tl.load(block_max_ptr + pid_c * BLOCKS + offs_b, mask=mask_b, other=-float("inf"))
    largest = tl.max(block_max, 0)
    if OWNS_SUPPORT:
        log_outside = tl.load(log_outside_ptr + pid_c) + finite_or_zero(largest)
    else:
        block_sumexp = tl.load(block_sumexp_ptr + pid_c * BLOCKS + offs_b, mask=mask_b, other=0.0)
        log_outside = weighted_logsumexp(block_max, block_sumexp)
    origin = tl.load(token_logit_ptr + pid_c)
    in_range = (origin > -float("inf")) & (largest - origin <= MAX_ABOVE_ORIGIN)
    in_range &= (origin - log_outside <= MAX_BELOW_ORIGIN) | (log_outside == -float("inf"))
    origin = tl.where(in_range, origin, finite_or_zero(log_outside))
    tl.store(grad_origin_ptr + pid_c, origin)
    for block in range(tl.program_id(1), tl.where(in_range, 0, BLOCKS), tl.num_programs(1)):
        offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
        mask = offs_v < V
        logits = load_logits(
            products_ptr, bias_ptr, pid_c, offs_v, mask, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        grad = softcap_backward(tl.exp(logits - origin), logits, softcap, HAS_SOFTCAP)
        tl.store(grad_logits_ptr + pid_c * V + offs_v, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_tail_grad(
    products_ptr, bias_ptr, anchor_ptr, log_outside_ptr, grad_tail_ptr, grad_logits_ptr,
    V, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Spread the gradient of each token's tail over the vocabulary: grad_tail · softmax over the tokens outside.

    Reads products [C, V], grad_tail, anchor and log_outside [C], relative to the anchor. Writes grad_logits [C, V];
    at the support ``scatter_support_grad`` overwrites it.
    """
    pid_c, pid_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = offs_v < V
    logits = load_logits(
        products_ptr, bias_ptr, pid_c, offs_v, mask, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    log_outside = finite_or_zero(tl.load(log_outside_ptr + pid_c) + tl.load(anchor_ptr + pid_c))
    grad = weighted_exp(tl.load(grad_tail_ptr + pid_c), logits - log_outside)
    grad = softcap_backward(grad, logits, softcap, HAS_SOFTCAP)
    tl.store(grad_logits_ptr + pid_c * V + offs_v, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scatter_support_grad(
    ids_ptr, tokens_ptr, grad_support_ptr, grad_token_ptr, grad_logits_ptr,
    V, K,
    HAS_POLICY: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write grad_support [C, K] into grad_logits [C, V] at ids [C, K].

    With HAS_POLICY also grad_token [C] at tokens [C], where they are outside the support.
    """
    pid_c = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    ids = tl.load(ids_ptr + pid_c * K + offs_k, mask=mask, other=0)
    grad = tl.load(grad_support_ptr + pid_c * K + offs_k, mask=mask)
    tl.store(grad_logits_ptr + pid_c * V + ids, grad, mask=mask)
    if HAS_POLICY:
        token = tl.load(tokens_ptr + pid_c)
        is_outside = tl.sum((mask & (ids == token)).to(tl.int32), 0) == 0
        tl.store(grad_logits_ptr + pid_c * V + token, tl.load(grad_token_ptr + pid_c), mask=is_outside)
