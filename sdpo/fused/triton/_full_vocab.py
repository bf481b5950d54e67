"""The divergence over the full vocabulary: one pass over both models' products for its value, one for its gradient.

With g = ∂/∂log p and G = Σ g over the vocabulary, the gradient w.r.t. a logit is g − G · p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._math import divergence_terms, finite_or_zero, softcap_backward, weighted_logsumexp
from sdpo.fused.triton._reductions import load_logits
from sdpo.fused.triton._statistics import (
    STAT_PER_TOKEN,
    _store_model_statistics,
    entropy_of_blocks,
    load_blocks,
)


@triton.jit
def full_statistics(
    block_max_ptr, block_sumexp_ptr, block_moment_ptr, token_logit_ptr, anchor_ptr, normalizer_ptr, stats_ptr,
    BLOCKS, stride_stats,
    IS_TEACHER: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The anchor (largest logit), the normalizer relative to it, and the statistics of one model.

    Reads the block sums [C, BLOCKS] and token_logit [C]. Writes anchor, normalizer [C] and the model's part of
    stats; all tokens are in the support.
    """
    pid_c = tl.program_id(0).to(tl.int64)
    block_max, block_sumexp, block_moment = load_blocks(
        block_max_ptr, block_sumexp_ptr, block_moment_ptr, pid_c, BLOCKS, BLOCK_B
    )
    anchor = finite_or_zero(tl.max(block_max, 0))
    normalizer = weighted_logsumexp(block_max - anchor, block_sumexp)
    tl.store(anchor_ptr + pid_c, anchor)
    tl.store(normalizer_ptr + pid_c, normalizer)
    log_prob = tl.load(token_logit_ptr + pid_c) - anchor - normalizer
    entropy = entropy_of_blocks(block_max - anchor, block_sumexp, block_moment, normalizer)
    _store_model_statistics(stats_ptr, stride_stats, pid_c, log_prob, entropy, 1.0, -float("inf"), IS_TEACHER)


@triton.jit
def load_log_probs(
    products_ptr, bias_ptr, anchor_ptr, normalizer_ptr, c, offs_v, V, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits and log-probabilities of token c at offs_v; −inf beyond the vocabulary."""
    logits = load_logits(
        products_ptr, bias_ptr, c, offs_v, offs_v < V, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    return logits, logits - tl.load(anchor_ptr + c) - tl.load(normalizer_ptr + c)


@triton.jit
def full_divergence(
    student_products_ptr, student_bias_ptr, student_anchor_ptr, student_normalizer_ptr,
    teacher_products_ptr, teacher_bias_ptr, teacher_anchor_ptr, teacher_normalizer_ptr,
    block_value_ptr, block_g_ptr, block_unlikely_g_ptr, block_unlikely_p_ptr,
    V, student_scale, student_softcap, teacher_scale, teacher_softcap, alpha, one_minus_alpha,
    STUDENT_HAS_BIAS: tl.constexpr, STUDENT_HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr, TEACHER_HAS_SOFTCAP: tl.constexpr,
    MODE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Per block of BLOCK_V tokens, four sums: the divergence, g, and g and p of the tokens with p ≤ 1/2.

    Reads both models' products [C, V], anchor and normalizer [C]. Writes the sums [C, blocks].
    """
    pid_c, pid_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    _, log_p = load_log_probs(
        student_products_ptr, student_bias_ptr, student_anchor_ptr, student_normalizer_ptr, pid_c, offs_v, V,
        student_scale, student_softcap, STUDENT_HAS_BIAS, STUDENT_HAS_SOFTCAP,
    )  # fmt: skip
    _, log_q = load_log_probs(
        teacher_products_ptr, teacher_bias_ptr, teacher_anchor_ptr, teacher_normalizer_ptr, pid_c, offs_v, V,
        teacher_scale, teacher_softcap, TEACHER_HAS_BIAS, TEACHER_HAS_SOFTCAP,
    )  # fmt: skip
    terms, g = divergence_terms(log_p, log_q, alpha, one_minus_alpha, MODE)
    p = tl.exp(log_p)
    offs_b = pid_c * tl.num_programs(1) + pid_v
    tl.store(block_value_ptr + offs_b, tl.sum(terms, 0))
    tl.store(block_g_ptr + offs_b, tl.sum(g, 0))
    tl.store(block_unlikely_g_ptr + offs_b, tl.sum(tl.where(p > 0.5, 0.0, g), 0))
    tl.store(block_unlikely_p_ptr + offs_b, tl.sum(tl.where(p > 0.5, 0.0, p), 0))


@triton.jit
def sum_blocks(
    block_value_ptr, block_g_ptr, block_unlikely_g_ptr, block_unlikely_p_ptr,
    stats_ptr, sum_g_ptr, unlikely_g_ptr, unlikely_p_ptr,
    BLOCKS, stride_stats,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Sum what ``full_divergence`` wrote [C, BLOCKS] into stats.per_token, sum_g, unlikely_g and unlikely_p [C]."""
    pid_c = tl.program_id(0).to(tl.int64)
    offs_b = pid_c * BLOCKS + tl.arange(0, BLOCK_B)
    mask = tl.arange(0, BLOCK_B) < BLOCKS
    value = tl.sum(tl.load(block_value_ptr + offs_b, mask=mask, other=0.0), 0)
    tl.store(stats_ptr + STAT_PER_TOKEN * stride_stats + pid_c, value)
    tl.store(sum_g_ptr + pid_c, tl.sum(tl.load(block_g_ptr + offs_b, mask=mask, other=0.0), 0))
    tl.store(unlikely_g_ptr + pid_c, tl.sum(tl.load(block_unlikely_g_ptr + offs_b, mask=mask, other=0.0), 0))
    tl.store(unlikely_p_ptr + pid_c, tl.sum(tl.load(block_unlikely_p_ptr + offs_b, mask=mask, other=0.0), 0))


@triton.jit
def full_grad(
    student_products_ptr, student_bias_ptr, student_anchor_ptr, student_normalizer_ptr,
    teacher_products_ptr, teacher_bias_ptr, teacher_anchor_ptr, teacher_normalizer_ptr,
    sum_g_ptr, unlikely_g_ptr, unlikely_p_ptr, grad_scale_ptr, tokens_ptr, policy_scale_ptr,
    grad_logits_ptr, block_square_ptr, block_along_ptr,
    V, student_scale, student_softcap, teacher_scale, teacher_softcap, alpha, one_minus_alpha,
    STUDENT_HAS_BIAS: tl.constexpr, STUDENT_HAS_SOFTCAP: tl.constexpr,
    TEACHER_HAS_BIAS: tl.constexpr, TEACHER_HAS_SOFTCAP: tl.constexpr,
    MODE: tl.constexpr, HAS_POLICY: tl.constexpr, HAS_ROW_SCALE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write grad_logits [C, V] = (g − G · p) · grad_scale through the soft-cap.

    With HAS_POLICY the gradient has one more term, policy_scale [C] · (1[v = y] − p) with y of tokens [C].

    Reads what ``full_divergence`` read, and sum_g, unlikely_g, unlikely_p and grad_scale [C]. With HAS_ROW_SCALE it
    also writes, per block [C, blocks], the gradient's square and its product with the rounded gradient.
    """
    pid_c, pid_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_v = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    logits, log_p = load_log_probs(
        student_products_ptr, student_bias_ptr, student_anchor_ptr, student_normalizer_ptr, pid_c, offs_v, V,
        student_scale, student_softcap, STUDENT_HAS_BIAS, STUDENT_HAS_SOFTCAP,
    )  # fmt: skip
    _, log_q = load_log_probs(
        teacher_products_ptr, teacher_bias_ptr, teacher_anchor_ptr, teacher_normalizer_ptr, pid_c, offs_v, V,
        teacher_scale, teacher_softcap, TEACHER_HAS_BIAS, TEACHER_HAS_SOFTCAP,
    )  # fmt: skip
    _, g = divergence_terms(log_p, log_q, alpha, one_minus_alpha, MODE)
    p = tl.exp(log_p)
    grad = g - tl.load(sum_g_ptr + pid_c) * p
    # g − G · p of a nearly certain token is a difference of near equals. With G = g + Σ g of the others and 1 − p =
    # Σ p of the others it is a sum over the others alone.
    certain_grad = g * tl.load(unlikely_p_ptr + pid_c) - tl.load(unlikely_g_ptr + pid_c) * p
    grad = tl.where(p > 0.5, certain_grad, grad) * tl.load(grad_scale_ptr + pid_c)
    if HAS_POLICY:
        others = tl.where(p > 0.5, tl.load(unlikely_p_ptr + pid_c), 1.0 - p)
        is_token = offs_v == tl.load(tokens_ptr + pid_c)
        grad += tl.load(policy_scale_ptr + pid_c) * tl.where(is_token, others, -p)
    grad = softcap_backward(grad, logits, student_softcap, STUDENT_HAS_SOFTCAP)
    rounded = grad.to(grad_logits_ptr.dtype.element_ty)
    tl.store(grad_logits_ptr + pid_c * V + offs_v, rounded, mask=offs_v < V)
    if HAS_ROW_SCALE:
        offs_b = pid_c * tl.num_programs(1) + pid_v
        tl.store(block_square_ptr + offs_b, tl.sum(grad * grad, 0))
        tl.store(block_along_ptr + offs_b, tl.sum(grad * rounded.to(tl.float32), 0))
