"""What the top-K and the full-vocabulary loss share: sums over blocks, the statistics of a token, its weights."""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused._types import TokenStats
from sdpo.fused.triton._math import weighted_exp

# Where a statistic is in stats [len(TokenStats), C].
STAT_PER_TOKEN = tl.constexpr(TokenStats._fields.index("per_token"))
STAT_WEIGHTS = tl.constexpr(TokenStats._fields.index("weights"))
STAT_LOG_PROBS = tl.constexpr(TokenStats._fields.index("log_probs"))
STAT_TEACHER_LOG_PROBS = tl.constexpr(TokenStats._fields.index("teacher_log_probs"))
STAT_STUDENT_ENTROPY = tl.constexpr(TokenStats._fields.index("student_entropy"))
STAT_TEACHER_ENTROPY = tl.constexpr(TokenStats._fields.index("teacher_entropy"))
STAT_STUDENT_TOPK_MASS = tl.constexpr(TokenStats._fields.index("student_topk_mass"))
STAT_TEACHER_TOPK_MASS = tl.constexpr(TokenStats._fields.index("teacher_topk_mass"))
STAT_STUDENT_LOG_TAIL = tl.constexpr(TokenStats._fields.index("student_log_tail"))
STAT_TEACHER_LOG_TAIL = tl.constexpr(TokenStats._fields.index("teacher_log_tail"))
STAT_CLIPPED = tl.constexpr(TokenStats._fields.index("clipped"))


@triton.jit
def load_blocks(block_max_ptr, block_sumexp_ptr, block_moment_ptr, c, BLOCKS, BLOCK_B: tl.constexpr):
    """The sums [BLOCKS] of token c's blocks, as ``block_reductions`` left them."""
    offs_b = tl.arange(0, BLOCK_B)
    mask = offs_b < BLOCKS
    block_max = tl.load(block_max_ptr + c * BLOCKS + offs_b, mask=mask, other=-float("inf"))
    block_sumexp = tl.load(block_sumexp_ptr + c * BLOCKS + offs_b, mask=mask, other=0.0)
    block_moment = tl.load(block_moment_ptr + c * BLOCKS + offs_b, mask=mask, other=0.0)
    return block_max, block_sumexp, block_moment


@triton.jit
def entropy_of_blocks(block_max, block_sumexp, block_moment, normalizer):
    """Σ −p · log p in nats over all tokens of the blocks."""
    log_scale = block_max - normalizer
    is_filled = block_sumexp > 0.0
    weight = -tl.where(is_filled, log_scale, 0.0) * block_sumexp - block_moment
    return tl.sum(weighted_exp(tl.where(is_filled, weight, 0.0), log_scale), 0)


@triton.jit
def _store_model_statistics(
    stats_ptr, stride_stats, c, log_prob, entropy, topk_mass, log_tail, IS_TEACHER: tl.constexpr
):  # fmt: skip
    """The statistics of one model at token c."""
    LOG_PROB: tl.constexpr = STAT_TEACHER_LOG_PROBS if IS_TEACHER else STAT_LOG_PROBS
    ENTROPY: tl.constexpr = STAT_TEACHER_ENTROPY if IS_TEACHER else STAT_STUDENT_ENTROPY
    TOPK_MASS: tl.constexpr = STAT_TEACHER_TOPK_MASS if IS_TEACHER else STAT_STUDENT_TOPK_MASS
    LOG_TAIL: tl.constexpr = STAT_TEACHER_LOG_TAIL if IS_TEACHER else STAT_STUDENT_LOG_TAIL
    tl.store(stats_ptr + LOG_PROB * stride_stats + c, log_prob)
    tl.store(stats_ptr + ENTROPY * stride_stats + c, entropy)
    tl.store(stats_ptr + TOPK_MASS * stride_stats + c, topk_mass)
    tl.store(stats_ptr + LOG_TAIL * stride_stats + c, log_tail)


@triton.jit
def token_weights(
    old_log_probs_ptr, weights_ptr, grad_weights_ptr, loss_scale_ptr, stats_ptr, grad_scale_ptr,
    C, stride_stats, is_clip, log_is_clip, dlogits_dproducts,
    HAS_OLD_LOG_PROBS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_GRAD_WEIGHTS: tl.constexpr,
    HAS_LOSS_SCALE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The weights of the loss, and all factors that each token's gradient w.r.t. the products has.

    Reads stats.log_probs, old_log_probs, weights and grad_weights [C], and loss_scale []. Writes stats.weights,
    stats.clipped and grad_scale [C].
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    log_prob = tl.load(stats_ptr + STAT_LOG_PROBS * stride_stats + offs_c, mask=mask, other=0.0)
    clipped = tl.zeros_like(log_prob)
    weight = clipped + 1.0
    if HAS_OLD_LOG_PROBS:
        old_log_prob = tl.load(old_log_probs_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
        # NaN: sampled by no known policy. Equal: −inf for both, too.
        is_neutral = (old_log_prob != old_log_prob) | (old_log_prob == log_prob)
        log_ratio = tl.where(is_neutral, 0.0, log_prob - tl.where(is_neutral, 0.0, old_log_prob))
        weight = tl.minimum(tl.exp(tl.minimum(tl.maximum(log_ratio, -20.0), 20.0)), is_clip)
        clipped = tl.where(log_ratio > log_is_clip, 1.0, 0.0)
    if HAS_WEIGHTS:
        weight *= tl.load(weights_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    grad_scale = weight
    if HAS_GRAD_WEIGHTS:
        grad_scale = tl.load(grad_weights_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    if HAS_LOSS_SCALE:
        grad_scale *= tl.load(loss_scale_ptr)
    tl.store(stats_ptr + STAT_WEIGHTS * stride_stats + offs_c, weight, mask=mask)
    tl.store(stats_ptr + STAT_CLIPPED * stride_stats + offs_c, clipped, mask=mask)
    tl.store(grad_scale_ptr + offs_c, grad_scale * dlogits_dproducts, mask=mask)
