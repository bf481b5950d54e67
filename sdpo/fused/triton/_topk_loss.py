"""What is left of a row once its vocabulary is summed up: loss, weight, and the slopes of K + 1 categories."""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._exact_logits import refined
from sdpo.fused.triton._math import (
    SAMPLED,
    divergence_terms,
    finite_or_zero,
    log_add_exp,
    log_mass,
    log_sum_exp,
    through_softcap,
    times_exp,
)

# The smallest factor of the slopes that lie outside, as a share of the largest slope of the support, which is
# divided by it; and at all.
LEAST_SHARE, LEAST = tl.constexpr(1e-28), tl.constexpr(1e-37)


@triton.jit
def load_blocks(tops, masses, moments, row, BLOCKS, BLOCK_B: tl.constexpr):
    """The sums of a row's blocks of columns, as vectors."""
    blocks = tl.arange(0, BLOCK_B)
    real = blocks < BLOCKS
    top = tl.load(tops + row * BLOCKS + blocks, mask=real, other=-float("inf"))
    mass = tl.load(masses + row * BLOCKS + blocks, mask=real, other=0.0)
    moment = tl.load(moments + row * BLOCKS + blocks, mask=real, other=0.0)
    return top, mass, moment


@triton.jit
def entropy_of_blocks(top, mass, moment, normalizer):
    """Σ −p·log p over blocks, from Σ exp(z − z*) and Σ (z − z*)·exp(z − z*) of each."""
    lower = top - normalizer
    some = mass > 0.0
    return tl.sum(times_exp(tl.where(some, -tl.where(some, lower, 0.0) * mass - moment, 0.0), lower), 0)


@triton.jit
def load_support(
    inside, token_logits, tops, masses, moments, log_outside, row, K, BLOCKS,
    OWNER: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A row less its anchor, which comes first: logits inside, the sampled token's, logsumexp outside, blocks.

    The anchor is the largest logit inside: logits of 50, as they are, have three digits less than their distances.
    The blocks of the support's owner were summed before the support was known, the other model's without it. What
    the owner left outside is relative to its largest logit, the anchor, as it comes.
    """
    ranks = tl.arange(0, BLOCK_K)
    z = tl.load(inside + row * K + ranks, mask=ranks < K, other=-float("inf"))
    anchor = finite_or_zero(tl.max(z, 0))
    top, mass, moment = load_blocks(tops, masses, moments, row, BLOCKS, BLOCK_B)
    top -= anchor
    log_rest = log_mass(top, mass)
    if OWNER:
        log_rest = tl.load(log_outside + row)
    return anchor, z - anchor, tl.load(token_logits + row) - anchor, log_rest, top, mass, moment


@triton.jit
def entropy_of(inside, top, mass, moment, normalizer, OWNER: tl.constexpr):
    """Of a whole row, in nats."""
    entropy = entropy_of_blocks(top, mass, moment, normalizer)
    if not OWNER:
        log_p = inside - normalizer
        p = tl.exp(log_p)
        entropy += tl.sum(tl.where(p > 0.0, -p * log_p, 0.0), 0)
    return entropy


@triton.jit
def loss_weights(
    log_token, old, extra, grad_weights, lift, row, clip, log_clip,
    OLD: tl.constexpr, EXTRA: tl.constexpr, OWN: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """Weight of the loss, whether its importance was cut, and weight of the gradient."""
    clipped = tl.zeros_like(log_token)
    weight = clipped + 1.0
    if OLD:
        before = tl.load(old + row).to(tl.float32)
        neutral = (before != before) | (before == log_token)
        ratio = tl.where(neutral, 0.0, log_token - tl.where(neutral, 0.0, before))
        weight = tl.minimum(tl.exp(tl.minimum(tl.maximum(ratio, -20.0), 20.0)), clip)
        clipped = tl.where(ratio > log_clip, 1.0, 0.0)
    if EXTRA:
        weight *= tl.load(extra + row).to(tl.float32)
    slope_weight = weight
    if OWN:
        slope_weight = tl.load(grad_weights + row).to(tl.float32)
    if LIFT:
        slope_weight *= tl.load(lift)
    return weight, clipped, slope_weight


@triton.jit
def topk_rows(
    ids, tokens, inside_p, inside_q, token_p, token_q,
    tops_p, masses_p, moments_p, log_outside_p, origin_p,
    tops_q, masses_q, moments_q, log_outside_q,
    products_p, bias_p, inner_p, states_p, head_p, head_bias_p, head_inner_p, outer_p,
    D_p, head_row_p, head_column_p,
    products_q, bias_q, inner_q, states_q, head_q, head_bias_q, head_inner_q, outer_q,
    D_q, head_row_q, head_column_q,
    old, extra, grad_weights, lift,
    stats, inside_slopes, outside_slope, gains,
    width, K, V, BLOCKS, alpha, rest, clip, log_clip, chain,
    MODE: tl.constexpr, BUCKET: tl.constexpr, STUDENT_OWNS: tl.constexpr, TEACHER_OWNS: tl.constexpr,
    EXACT_P: tl.constexpr, EXACT_Q: tl.constexpr, BIAS_P: tl.constexpr, BIAS_Q: tl.constexpr,
    OLD: tl.constexpr, EXTRA: tl.constexpr, OWN: tl.constexpr, LIFT: tl.constexpr, SOFTCAP: tl.constexpr,
    GAIN: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics, rows of ``width`` in the order of ``TokenStats``, slopes at the support and of the tail, gain.

    With SHARES the slopes outside lie there as exp(z − origin): their factor goes into the gain, and the slopes at
    the support, which are put among them, are divided by it.
    """
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, BLOCK_K)
    real = ranks < K
    anchor_p, z_p, at_token_p, tail_p, top_p, mass_p, moment_p = load_support(
        inside_p, token_p, tops_p, masses_p, moments_p, log_outside_p, row, K, BLOCKS,
        STUDENT_OWNS, BLOCK_K, BLOCK_B,
    )  # fmt: skip
    anchor_q, z_q, at_token_q, tail_q, top_q, mass_q, moment_q = load_support(
        inside_q, token_q, tops_q, masses_q, moments_q, log_outside_q, row, K, BLOCKS,
        TEACHER_OWNS, BLOCK_K, BLOCK_B,
    )  # fmt: skip
    if EXACT_P:
        z_p, at_token_p, tail_p = refined(
            z_p, at_token_p, tail_p, top_p, anchor_p, ids, tokens,
            products_p, bias_p, inner_p, states_p, head_p, head_bias_p, head_inner_p, outer_p,
            row, K, V, D_p, head_row_p, head_column_p,
            STUDENT_OWNS, BIAS_P, SOFTCAP, BLOCK_K, BLOCK_B, BLOCK, BLOCK_D,
        )  # fmt: skip
    if EXACT_Q:
        z_q, at_token_q, tail_q = refined(
            z_q, at_token_q, tail_q, top_q, anchor_q, ids, tokens,
            products_q, bias_q, inner_q, states_q, head_q, head_bias_q, head_inner_q, outer_q,
            row, K, V, D_q, head_row_q, head_column_q,
            TEACHER_OWNS, BIAS_Q, SOFTCAP, BLOCK_K, BLOCK_B, BLOCK, BLOCK_D,
        )  # fmt: skip
    log_inside_p, log_inside_q = log_sum_exp(z_p), log_sum_exp(z_q)
    norm_p, norm_q = log_add_exp(log_inside_p, tail_p), log_add_exp(log_inside_q, tail_q)
    entropy_p = entropy_of(z_p, top_p, mass_p, moment_p, norm_p, STUDENT_OWNS)
    entropy_q = entropy_of(z_q, top_q, mass_q, moment_q, norm_q, TEACHER_OWNS)
    if not SHARES:
        tl.debug_barrier()  # every thread has read what one overwrites
        tl.store(log_outside_p + row, tail_p + anchor_p)
    log_tail_p, log_tail_q = tail_p - norm_p, tail_q - norm_q
    log_mass_p, log_mass_q = log_inside_p - norm_p, log_inside_q - norm_q
    log_token, log_token_q = at_token_p - norm_p, at_token_q - norm_q

    if MODE == SAMPLED:
        never = log_token == -float("inf")
        infinite = (log_token_q == -float("inf")) & (log_token > -float("inf"))
        off = never | infinite
        held = tl.where(off, 0.0, log_token)
        advantage = held - tl.where(off, 0.0, log_token_q)
        value = tl.where(infinite, float("inf"), advantage * held)
        tail_slope = -advantage * tl.exp(log_tail_p)
        slope = tl.where(real, -tail_slope, 0.0)
    else:
        log_p, log_q = z_p - norm_p, z_q - norm_q
        if not BUCKET:
            log_p = log_p - finite_or_zero(log_mass_p)
            log_q = log_q - finite_or_zero(log_mass_q)
        terms, g = divergence_terms(log_p, log_q, alpha, rest, MODE)
        value = tl.sum(terms, 0)
        common = tl.sum(g, 0)
        tail_slope = tl.zeros_like(common)
        if BUCKET:
            term, g_tail = divergence_terms(log_tail_p, log_tail_q, alpha, rest, MODE)
            value += term
            common += g_tail
            tail_slope = tl.where(log_tail_p == -float("inf"), 0.0, g_tail - common * tl.exp(log_tail_p))
        p = tl.exp(log_p)
        slope = g - common * p
        # Slopes sum to 0. That of a nearly certain category is a difference of near equals: the others have it.
        others = tl.sum(tl.where(p > 0.5, 0.0, slope), 0)
        slope = tl.where(p > 0.5, -(others + tail_slope), slope)
        if BUCKET:
            tail_slope = tl.where(tl.exp(log_tail_p) > 0.5, -others, tail_slope)

    weight, clipped, scale = loss_weights(
        log_token, old, extra, grad_weights, lift, row, clip, log_clip, OLD, EXTRA, OWN, LIFT
    )
    scale *= chain
    slope *= scale
    slope = through_softcap(slope, z_p + anchor_p, outer_p, SOFTCAP)
    tail_slope *= scale
    factor = tl.zeros_like(scale) + 1.0
    if SHARES:
        least = tl.maximum(tl.max(tl.abs(slope), 0) * LEAST_SHARE, LEAST)
        factor = times_exp(tail_slope, tl.load(origin_p + row) - anchor_p - tail_p)
        factor = tl.where(tl.abs(factor) < least, least, factor)
    rounded = (slope / factor).to(inside_slopes.dtype.element_ty)
    place = row * K + ranks
    if SHARES:
        place = row * V + tl.load(ids + place, mask=real, other=0)
    tl.store(inside_slopes + place, rounded, mask=real)
    if GAIN:
        kept = tl.sum(slope * (rounded.to(tl.float32) * factor), 0)
        gain = tl.sum(slope * slope, 0) / tl.where(kept > 0.0, kept, 1.0)
        tl.store(gains + row, tl.where(kept > 0.0, gain, 1.0) * factor)
    if not SHARES:
        tl.store(outside_slope + row, tail_slope)
    tl.store(stats + row, value)
    tl.store(stats + 1 * width + row, weight)
    tl.store(stats + 2 * width + row, log_token)
    tl.store(stats + 3 * width + row, log_token_q)
    tl.store(stats + 4 * width + row, entropy_p)
    tl.store(stats + 5 * width + row, entropy_q)
    tl.store(stats + 6 * width + row, tl.exp(log_mass_p))
    tl.store(stats + 7 * width + row, tl.exp(log_mass_q))
    tl.store(stats + 8 * width + row, log_tail_p)
    tl.store(stats + 9 * width + row, log_tail_q)
    tl.store(stats + 10 * width + row, clipped)
