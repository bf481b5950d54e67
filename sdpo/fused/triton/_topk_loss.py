"""The loss over a support of K tokens and the tail, once the vocabulary is summed: small kernels on [C, K].

Logits, and log Σ exp outside, are relative to the token's anchor, its largest logit at the support: float32
resolves logits near 50 with three digits less than the differences between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._math import (
    SAMPLED,
    divergence_terms,
    finite_or_zero,
    logaddexp,
    logsumexp,
    softcap_backward,
    weighted_exp,
    weighted_logsumexp,
)
from sdpo.fused.triton._statistics import (
    STAT_LOG_PROBS,
    STAT_PER_TOKEN,
    STAT_STUDENT_LOG_TAIL,
    STAT_TEACHER_LOG_PROBS,
    STAT_TEACHER_LOG_TAIL,
    _store_model_statistics,
    entropy_of_blocks,
    load_blocks,
)

# The smallest factor of the unscaled gradient: as a share of the largest gradient at the support, which is divided
# by the factor; and in absolute terms.
MIN_FACTOR_SHARE, MIN_FACTOR = tl.constexpr(1e-28), tl.constexpr(1e-37)


@triton.jit
def load_support(
    support_logits_ptr, token_logit_ptr, block_max_ptr, block_sumexp_ptr, log_outside_ptr, c, K, BLOCKS,
    OWNS_SUPPORT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The anchor of token c and, relative to it, logits [K], the sampled token's, log Σ exp outside, block maxima.

    The blocks of the support's owner include the support; its log_outside [C] is known, relative to its largest
    logit, which is the anchor. The blocks of the other model leave the support out, and give its log Σ exp outside.
    """
    offs_k = tl.arange(0, BLOCK_K)
    logits = tl.load(support_logits_ptr + c * K + offs_k, mask=offs_k < K, other=-float("inf"))
    anchor = finite_or_zero(tl.max(logits, 0))
    offs_b = tl.arange(0, BLOCK_B)
    mask_b = offs_b < BLOCKS
    block_max = tl.load(block_max_ptr + c * BLOCKS + offs_b, mask=mask_b, other=-float("inf")) - anchor
    if OWNS_SUPPORT:
        log_outside = tl.load(log_outside_ptr + c)
    else:
        block_sumexp = tl.load(block_sumexp_ptr + c * BLOCKS + offs_b, mask=mask_b, other=0.0)
        log_outside = weighted_logsumexp(block_max, block_sumexp)
    return anchor, logits - anchor, tl.load(token_logit_ptr + c) - anchor, log_outside, block_max


@triton.jit
def _store_support(
    support_logits_ptr, token_logit_ptr, anchor_ptr, log_outside_ptr, c,
    anchor, logits, token_logit, log_outside, K, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store what ``load_support`` returned, in place."""
    offs_k = tl.arange(0, BLOCK_K)
    tl.debug_barrier()  # every thread has read before one overwrites
    tl.store(support_logits_ptr + c * K + offs_k, logits, mask=offs_k < K)
    tl.store(token_logit_ptr + c, token_logit)
    tl.store(anchor_ptr + c, anchor)
    tl.store(log_outside_ptr + c, log_outside)


@triton.jit
def anchor_support(
    support_logits_ptr, token_logit_ptr, block_max_ptr, block_sumexp_ptr, anchor_ptr, log_outside_ptr,
    K, BLOCKS,
    OWNS_SUPPORT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Make one model's support_logits [C, K] and token_logit [C] relative to the anchor, in place.

    Reads block_max and block_sumexp [C, BLOCKS] and, of the support's owner, log_outside [C]. Writes anchor and
    log_outside [C].
    """
    pid_c = tl.program_id(0).to(tl.int64)
    anchor, logits, token_logit, log_outside, _ = load_support(
        support_logits_ptr, token_logit_ptr, block_max_ptr, block_sumexp_ptr, log_outside_ptr, pid_c, K, BLOCKS,
        OWNS_SUPPORT, BLOCK_K, BLOCK_B,
    )  # fmt: skip
    _store_support(
        support_logits_ptr, token_logit_ptr, anchor_ptr, log_outside_ptr, pid_c,
        anchor, logits, token_logit, log_outside, K, BLOCK_K,
    )  # fmt: skip


@triton.jit
def support_statistics(
    support_logits_ptr, token_logit_ptr, block_max_ptr, block_sumexp_ptr, block_moment_ptr, anchor_ptr,
    log_outside_ptr, normalizer_ptr, stats_ptr,
    K, BLOCKS, stride_stats,
    IS_TEACHER: tl.constexpr, OWNS_SUPPORT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The normalizer and the statistics of one model.

    Reads support_logits [C, K], token_logit, anchor and log_outside [C], and the block sums [C, BLOCKS]. Writes
    normalizer [C], relative to the anchor, and the model's part of stats.
    """
    pid_c = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    logits = tl.load(support_logits_ptr + pid_c * K + offs_k, mask=offs_k < K, other=-float("inf"))
    block_max, block_sumexp, block_moment = load_blocks(
        block_max_ptr, block_sumexp_ptr, block_moment_ptr, pid_c, BLOCKS, BLOCK_B
    )
    log_inside, log_outside = logsumexp(logits), tl.load(log_outside_ptr + pid_c)
    normalizer = logaddexp(log_inside, log_outside)
    anchor = tl.load(anchor_ptr + pid_c)
    entropy = entropy_of_blocks(block_max - anchor, block_sumexp, block_moment, normalizer)
    if not OWNS_SUPPORT:  # the blocks leave the support out
        log_p = logits - normalizer
        p = tl.exp(log_p)
        entropy += tl.sum(tl.where(p > 0.0, -p * log_p, 0.0), 0)
    log_prob = tl.load(token_logit_ptr + pid_c) - normalizer
    topk_mass = tl.exp(log_inside - normalizer)
    tl.store(normalizer_ptr + pid_c, normalizer)
    _store_model_statistics(
        stats_ptr, stride_stats, pid_c, log_prob, entropy, topk_mass, log_outside - normalizer, IS_TEACHER
    )


@triton.jit
def sampled_token_terms(log_p, log_q, log_tail_p):
    """The surrogate A · log p with constant A = log p − log q: value, gradient at the token and of the tail."""
    is_infinite = (log_q == -float("inf")) & (log_p > -float("inf"))
    no_grad = (log_p == -float("inf")) | is_infinite
    constant_log_p = tl.where(no_grad, 0.0, log_p)
    advantage = constant_log_p - tl.where(no_grad, 0.0, log_q)
    value = tl.where(is_infinite, float("inf"), advantage * constant_log_p)
    grad_tail = -advantage * tl.exp(log_tail_p)
    return value, -grad_tail, grad_tail


@triton.jit
def topk_terms(
    log_p, log_q, log_tail_p, log_tail_q, alpha, one_minus_alpha, MODE: tl.constexpr, HAS_TAIL: tl.constexpr
):  # fmt: skip
    """The divergence over the support and, with HAS_TAIL, the tail: value, gradient at the support and of the tail.

    With g = ∂/∂log p and G = Σ g over all categories, the gradient is g − G · p.
    """
    terms, g = divergence_terms(log_p, log_q, alpha, one_minus_alpha, MODE)
    value = tl.sum(terms, 0)
    sum_g = tl.sum(g, 0)
    grad_tail = tl.zeros_like(sum_g)
    if HAS_TAIL:
        term, g_tail = divergence_terms(log_tail_p, log_tail_q, alpha, one_minus_alpha, MODE)
        value += term
        sum_g += g_tail
        grad_tail = tl.where(log_tail_p == -float("inf"), 0.0, g_tail - sum_g * tl.exp(log_tail_p))
    p = tl.exp(log_p)
    grad = g - sum_g * p
    # The gradient of a nearly certain category is a difference of near equals. All gradients sum to 0, so it is
    # also minus the sum of the others.
    sum_others = tl.sum(tl.where(p > 0.5, 0.0, grad), 0)
    grad = tl.where(p > 0.5, -(sum_others + grad_tail), grad)
    if HAS_TAIL:
        grad_tail = tl.where(tl.exp(log_tail_p) > 0.5, -sum_others, grad_tail)
    return value, grad, grad_tail


@triton.jit
def add_policy_gradient(
    policy_scale, grad, grad_tail, is_token, token_is_outside, log_p, log_tail_p, log_token_p
):  # fmt: skip
    """As ``_add_policy_gradient`` in sdpo.fused._torch: the gradient at the support, of the tail, at the token."""
    share = tl.exp(tl.where(token_is_outside, log_token_p - log_tail_p, 0.0))
    grad_token = grad_tail * share + policy_scale * (1.0 - tl.exp(log_token_p))
    grad_token = tl.where(token_is_outside, grad_token, 0.0)
    p, p_tail = tl.exp(log_p), tl.exp(log_tail_p)
    others = tl.sum(tl.where(is_token, 0.0, p), 0) + p_tail
    grad += policy_scale * tl.where(is_token, others, -p)
    return grad, grad_tail - policy_scale * p_tail, grad_token


@triton.jit
def topk_loss(
    ids_ptr, student_logits_ptr, student_anchor_ptr, student_log_outside_ptr, student_normalizer_ptr,
    teacher_logits_ptr, teacher_normalizer_ptr, grad_scale_ptr, grad_origin_ptr, tokens_ptr, policy_scale_ptr,
    stats_ptr, grad_support_ptr, grad_tail_ptr, grad_token_ptr, row_scale_ptr,
    V, K, stride_stats, alpha, one_minus_alpha, softcap,
    MODE: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_POLICY: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, UNSCALED_GRAD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The divergence of each token, the gradient at its support and of its tail, and the row scale.

    Reads ids [C, K], both models' support_logits [C, K] and what ``support_statistics`` wrote, and grad_scale [C].
    Writes stats.per_token, grad_support [C, K], grad_tail [C] and, with HAS_ROW_SCALE, row_scale [C].

    With UNSCALED_GRAD, grad_support is grad_logits [C, V], which holds exp(logits − grad_origin). The factor that
    makes this the gradient of the tail goes into row_scale, and the gradient at the support is divided by it.

    With HAS_POLICY the gradient is also that of the policy loss. Reads tokens and policy_scale [C]. Writes the
    gradient at a sampled token outside the support to grad_token [C] or, with UNSCALED_GRAD, to grad_logits.
    """
    pid_c = tl.program_id(0).to(tl.int64)
    stats_ptr += pid_c
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    logits_p = tl.load(student_logits_ptr + pid_c * K + offs_k, mask=mask, other=-float("inf"))
    logits_q = tl.load(teacher_logits_ptr + pid_c * K + offs_k, mask=mask, other=-float("inf"))
    log_tail_p = tl.load(stats_ptr + STAT_STUDENT_LOG_TAIL * stride_stats)
    log_tail_q = tl.load(stats_ptr + STAT_TEACHER_LOG_TAIL * stride_stats)

    if MODE == SAMPLED:
        log_prob = tl.load(stats_ptr + STAT_LOG_PROBS * stride_stats)
        teacher_log_prob = tl.load(stats_ptr + STAT_TEACHER_LOG_PROBS * stride_stats)
        value, grad_token, grad_tail = sampled_token_terms(log_prob, teacher_log_prob, log_tail_p)
        grad = tl.where(mask, grad_token, 0.0)
    else:
        normalizer_p = tl.load(student_normalizer_ptr + pid_c)
        normalizer_q = tl.load(teacher_normalizer_ptr + pid_c)
        log_p, log_q = logits_p - normalizer_p, logits_q - normalizer_q
        if not HAS_TAIL:
            log_p = log_p - finite_or_zero(logsumexp(logits_p) - normalizer_p)
            log_q = log_q - finite_or_zero(logsumexp(logits_q) - normalizer_q)
        value, grad, grad_tail = topk_terms(
            log_p, log_q, log_tail_p, log_tail_q, alpha, one_minus_alpha, MODE, HAS_TAIL
        )
    tl.store(stats_ptr + STAT_PER_TOKEN * stride_stats, value)

    anchor = tl.load(student_anchor_ptr + pid_c)
    grad_scale = tl.load(grad_scale_ptr + pid_c)
    grad *= grad_scale
    grad_tail *= grad_scale
    grad_token = tl.zeros_like(grad_tail)
    if HAS_POLICY:
        normalizer = tl.load(student_normalizer_ptr + pid_c)
        token, log_token_p = tl.load(tokens_ptr + pid_c), tl.load(stats_ptr + STAT_LOG_PROBS * stride_stats)
        is_token = tl.load(ids_ptr + pid_c * K + offs_k, mask=mask, other=-1) == token
        token_is_outside = (tl.sum(is_token.to(tl.int32), 0) == 0) & (log_token_p > -float("inf"))
        grad, grad_tail, grad_token = add_policy_gradient(
            tl.load(policy_scale_ptr + pid_c), grad, grad_tail, is_token, token_is_outside, logits_p - normalizer,
            log_tail_p, log_token_p,
        )  # fmt: skip
        grad_token = softcap_backward(grad_token, log_token_p + normalizer + anchor, softcap, HAS_SOFTCAP)
    grad = softcap_backward(grad, logits_p + anchor, softcap, HAS_SOFTCAP)
    factor = tl.zeros_like(grad_scale) + 1.0
    if UNSCALED_GRAD:
        log_outside = tl.load(student_log_outside_ptr + pid_c)
        factor = weighted_exp(grad_tail, tl.load(grad_origin_ptr + pid_c) - anchor - log_outside)
        largest = tl.maximum(tl.max(tl.abs(grad), 0), tl.abs(grad_token))
        min_factor = tl.maximum(largest * MIN_FACTOR_SHARE, MIN_FACTOR)
        factor = tl.where(tl.abs(factor) < min_factor, min_factor, factor)
        offs = pid_c * V + tl.load(ids_ptr + pid_c * K + offs_k, mask=mask, other=0)
    else:
        offs = pid_c * K + offs_k
        tl.store(grad_tail_ptr + pid_c, grad_tail)
    rounded = (grad / factor).to(grad_support_ptr.dtype.element_ty)
    tl.store(grad_support_ptr + offs, rounded, mask=mask)
    rounded_token = (grad_token / factor).to(grad_support_ptr.dtype.element_ty)
    if HAS_POLICY:
        if UNSCALED_GRAD:
            tl.store(grad_support_ptr + pid_c * V + token, rounded_token, mask=token_is_outside)
        else:
            tl.store(grad_token_ptr + pid_c, rounded_token)
    if HAS_ROW_SCALE:
        # As `row_scale` in sdpo.fused._torch, over the support and a sampled token outside.
        along = tl.sum(grad * (rounded.to(tl.float32) * factor), 0)
        square = tl.sum(grad * grad, 0)
        if HAS_POLICY:
            along += grad_token * (rounded_token.to(tl.float32) * factor)
            square += grad_token * grad_token
        row_scale = square / tl.where(along > 0.0, along, 1.0)
        tl.store(row_scale_ptr + pid_c, tl.where(along > 0.0, row_scale, 1.0) * factor)
