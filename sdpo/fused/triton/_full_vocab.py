"""The divergence over the full vocabulary: a pass for its value and one for its gradient, over both models."""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._math import divergence_terms, finite_or_zero, log_mass, through_softcap
from sdpo.fused.triton._reductions import load_logits
from sdpo.fused.triton._topk_loss import entropy_of_blocks, load_blocks, loss_weights


@triton.jit
def normalizers(tops, masses, moments, anchors, norms, entropy, BLOCKS, BLOCK_B: tl.constexpr):
    """Largest logit, logsumexp relative to it, and entropy of each row from its blocks."""
    row = tl.program_id(0).to(tl.int64)
    top, mass, moment = load_blocks(tops, masses, moments, row, BLOCKS, BLOCK_B)
    anchor = finite_or_zero(tl.max(top, 0))
    norm = log_mass(top - anchor, mass)
    tl.store(anchors + row, anchor)
    tl.store(norms + row, norm)
    tl.store(entropy + row, entropy_of_blocks(top - anchor, mass, moment, norm))


@triton.jit
def full_terms(
    products_p, products_q, bias_p, bias_q, anchor_p, norm_p, anchor_q, norm_q, values, commons, smalls, masses, V,
    inner_p, outer_p, inner_q, outer_q, alpha, rest,
    BIAS_P: tl.constexpr, BIAS_Q: tl.constexpr, SOFTCAP_P: tl.constexpr, SOFTCAP_Q: tl.constexpr,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per block of columns, sums: the divergence's terms, g = ∂/∂log p, and g and p where p is at most a half."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    z_p = load_logits(products_p, bias_p, row, columns, V, inner_p, outer_p, BIAS_P, SOFTCAP_P)
    z_q = load_logits(products_q, bias_q, row, columns, V, inner_q, outer_q, BIAS_Q, SOFTCAP_Q)
    log_p = z_p - tl.load(anchor_p + row) - tl.load(norm_p + row)
    log_q = z_q - tl.load(anchor_q + row) - tl.load(norm_q + row)
    terms, g = divergence_terms(log_p, log_q, alpha, rest, MODE)
    place = row * tl.num_programs(1) + block
    tl.store(values + place, tl.sum(terms, 0))
    tl.store(commons + place, tl.sum(g, 0))
    p = tl.exp(log_p)
    tl.store(smalls + place, tl.sum(tl.where(p > 0.5, 0.0, g), 0))
    tl.store(masses + place, tl.sum(tl.where(p > 0.5, 0.0, p), 0))


@triton.jit
def full_rows(
    values, commons, smalls, masses, anchor_p, norm_p, anchor_q, norm_q, token_p, token_q,
    old, extra, grad_weights, lift, stats, common, small, small_mass, scale, width, BLOCKS, clip, log_clip, chain,
    OLD: tl.constexpr, EXTRA: tl.constexpr, OWN: tl.constexpr, LIFT: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Loss and weights of each row into ``stats``; its sums and the gradient's scale, for ``full_slopes``."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCK_B)
    real = blocks < BLOCKS
    value = tl.sum(tl.load(values + row * BLOCKS + blocks, mask=real, other=0.0), 0)
    place = row * BLOCKS + blocks
    tl.store(common + row, tl.sum(tl.load(commons + place, mask=real, other=0.0), 0))
    tl.store(small + row, tl.sum(tl.load(smalls + place, mask=real, other=0.0), 0))
    tl.store(small_mass + row, tl.sum(tl.load(masses + place, mask=real, other=0.0), 0))
    log_token = tl.load(token_p + row) - tl.load(anchor_p + row) - tl.load(norm_p + row)
    log_token_q = tl.load(token_q + row) - tl.load(anchor_q + row) - tl.load(norm_q + row)
    weight, clipped, slope_weight = loss_weights(
        log_token, old, extra, grad_weights, lift, row, clip, log_clip, OLD, EXTRA, OWN, LIFT
    )
    tl.store(scale + row, slope_weight * chain)
    tl.store(stats + row, value)
    tl.store(stats + 1 * width + row, weight)
    tl.store(stats + 2 * width + row, log_token)
    tl.store(stats + 3 * width + row, log_token_q)
    tl.store(stats + 10 * width + row, clipped)


@triton.jit
def full_slopes(
    products_p, products_q, bias_p, bias_q, anchor_p, norm_p, anchor_q, norm_q, common, small, small_mass, scale,
    slopes, wholes, kepts, V,
    inner_p, outer_p, inner_q, outer_q, alpha, rest,
    BIAS_P: tl.constexpr, BIAS_Q: tl.constexpr, SOFTCAP_P: tl.constexpr, SOFTCAP_Q: tl.constexpr,
    MODE: tl.constexpr, GAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write (g − G·p) · scale, times what the soft-cap lets through; per block, both sums of the gain."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    z_p = load_logits(products_p, bias_p, row, columns, V, inner_p, outer_p, BIAS_P, SOFTCAP_P)
    z_q = load_logits(products_q, bias_q, row, columns, V, inner_q, outer_q, BIAS_Q, SOFTCAP_Q)
    log_p = z_p - tl.load(anchor_p + row) - tl.load(norm_p + row)
    log_q = z_q - tl.load(anchor_q + row) - tl.load(norm_q + row)
    _, g = divergence_terms(log_p, log_q, alpha, rest, MODE)
    p = tl.exp(log_p)
    slope = g - tl.load(common + row) * p
    # g − G·p of a nearly certain token is a difference of near equals; with the others' mass for 1 − p it is not.
    certain = g * tl.load(small_mass + row) - tl.load(small + row) * p
    slope = tl.where(p > 0.5, certain, slope) * tl.load(scale + row)
    slope = through_softcap(slope, z_p, outer_p, SOFTCAP_P)
    rounded = slope.to(slopes.dtype.element_ty)
    tl.store(slopes + row * V + columns, rounded, mask=columns < V)
    if GAIN:
        place = row * tl.num_programs(1) + block
        tl.store(wholes + place, tl.sum(slope * slope, 0))
        tl.store(kepts + place, tl.sum(slope * rounded.to(tl.float32), 0))
