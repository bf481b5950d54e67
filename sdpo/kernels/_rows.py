"""What is left of a row once its vocabulary is summed up: loss, weight, and the slopes of K + 1 categories."""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.kernels._math import SAMPLED, divergence_terms, finite_or_zero, log_add_exp, times_exp


@triton.jit
def sum_blocks(tops, masses, moments, row, BLOCKS, BLOCK_B: tl.constexpr):
    """The sums of a row's blocks of columns, as vectors, and the logsumexp over all of them."""
    blocks = tl.arange(0, BLOCK_B)
    real = blocks < BLOCKS
    top = tl.load(tops + row * BLOCKS + blocks, mask=real, other=-float("inf"))
    mass = tl.load(masses + row * BLOCKS + blocks, mask=real, other=0.0)
    moment = tl.load(moments + row * BLOCKS + blocks, mask=real, other=0.0)
    base = finite_or_zero(tl.max(top, 0))
    total = tl.sum(times_exp(mass, top - base), 0)
    log_total = tl.where(total > 0.0, base + tl.log(tl.where(total > 0.0, total, 1.0)), -float("inf"))
    return top, mass, moment, log_total


@triton.jit
def entropy_of_blocks(top, mass, moment, normalizer):
    """Σ −p·log p over blocks, from Σ exp(z − z*) and Σ (z − z*)·exp(z − z*) of each."""
    lower = top - normalizer
    some = mass > 0.0
    return tl.sum(times_exp(tl.where(some, -tl.where(some, lower, 0.0) * mass - moment, 0.0), lower), 0)


@triton.jit
def close_row(
    inside, tops, masses, moments, log_outside, row, BLOCKS,
    OWNER: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """logsumexp inside, outside and over all of a row, and its entropy.

    The blocks of the support's owner were summed before the support was known, the other model's without it.
    """
    top, mass, moment, log_blocks = sum_blocks(tops, masses, moments, row, BLOCKS, BLOCK_B)
    base = finite_or_zero(tl.max(inside, 0))
    inner = tl.sum(tl.exp(inside - base), 0)
    log_inside = tl.where(inner > 0.0, base + tl.log(tl.where(inner > 0.0, inner, 1.0)), -float("inf"))
    log_rest = log_blocks
    if OWNER:
        log_rest = tl.load(log_outside + row)
    normalizer = log_add_exp(log_inside, log_rest)
    entropy = entropy_of_blocks(top, mass, moment, normalizer)
    if not OWNER:
        log_p = inside - normalizer
        p = tl.exp(log_p)
        entropy += tl.sum(tl.where(p > 0.0, -p * log_p, 0.0), 0)
    return log_inside, log_rest, normalizer, entropy


@triton.jit
def loss_weights(
    log_token, old, extra, slope_weights, lift, row, clip, log_clip,
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
        slope_weight = tl.load(slope_weights + row).to(tl.float32)
    if LIFT:
        slope_weight *= tl.load(lift)
    return weight, clipped, slope_weight


@triton.jit
def topk_rows(
    inside_p, inside_q, token_p, token_q,
    tops_p, masses_p, moments_p, log_outside_p,
    tops_q, masses_q, moments_q, log_outside_q,
    old, extra, slope_weights, lift,
    stats, inside_slopes, outside_slope, gains,
    width, K, BLOCKS, alpha, rest, clip, log_clip, chain, outer,
    MODE: tl.constexpr, BUCKET: tl.constexpr, STUDENT_OWNS: tl.constexpr, TEACHER_OWNS: tl.constexpr,
    OLD: tl.constexpr, EXTRA: tl.constexpr, OWN: tl.constexpr, LIFT: tl.constexpr, SOFTCAP: tl.constexpr,
    GAIN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Statistics, rows of ``width`` in the order of ``TokenStats``, slopes at the support and of the tail, gain."""
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, BLOCK_K)
    real = ranks < K
    z_p = tl.load(inside_p + row * K + ranks, mask=real, other=-float("inf"))
    z_q = tl.load(inside_q + row * K + ranks, mask=real, other=-float("inf"))
    mass_p, tail_p, norm_p, entropy_p = close_row(
        z_p, tops_p, masses_p, moments_p, log_outside_p, row, BLOCKS, STUDENT_OWNS, BLOCK_B
    )
    mass_q, tail_q, norm_q, entropy_q = close_row(
        z_q, tops_q, masses_q, moments_q, log_outside_q, row, BLOCKS, TEACHER_OWNS, BLOCK_B
    )
    if STUDENT_OWNS == 0:
        tl.store(log_outside_p + row, tail_p)
    log_tail_p, log_tail_q = tail_p - norm_p, tail_q - norm_q
    log_mass_p, log_mass_q = mass_p - norm_p, mass_q - norm_q
    log_token, log_token_q = tl.load(token_p + row) - norm_p, tl.load(token_q + row) - norm_q

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
        log_token, old, extra, slope_weights, lift, row, clip, log_clip, OLD, EXTRA, OWN, LIFT
    )
    scale *= chain
    slope *= scale
    if SOFTCAP:
        capped = z_p / outer
        slope *= tl.where(real, 1.0 - capped * capped, 0.0)
    rounded = slope.to(inside_slopes.dtype.element_ty)
    tl.store(inside_slopes + row * K + ranks, rounded, mask=real)
    if GAIN:
        kept = tl.sum(slope * rounded.to(tl.float32), 0)
        gain = tl.sum(slope * slope, 0) / tl.where(kept > 0.0, kept, 1.0)
        tl.store(gains + row, tl.where(kept > 0.0, gain, 1.0))
    tl.store(outside_slope + row, tail_slope * scale)
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
