"""The passes over a chunk's products: each reads every element once, one program per row and block of columns."""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._math import MASKED, finite_or_zero, log_mass, through_softcap, times_exp, to_logits

# How far above the sampled token's logit the largest may lie, and how far below it log Σ exp of the tokens
# outside, in a row whose shares are relative to it: beyond, bf16 or a sum runs out of range.
REACH, DEPTH = tl.constexpr(40.0), tl.constexpr(60.0)
# So far below the largest logit that nothing is left, yet finite.
FAR = tl.constexpr(-1e30)


@triton.jit
def at_least(away):
    """FAR in place of −inf, so that away · exp(away) is 0 there; NaN stays NaN."""
    return tl.maximum(away, FAR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def logits_at(
    products, bias, row, columns, real, V, inner, outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """A row's logits at columns of any shape; −inf at those that are not real."""
    values = tl.load(products + row * V + columns, mask=real, other=MASKED)
    shift = 0.0
    if BIAS:
        shift = tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)
    return to_logits(values, shift, inner, outer, SOFTCAP)


@triton.jit
def load_logits(products, bias, row, columns, V, inner, outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """A row's logits at a block of columns; −inf beyond the vocabulary."""
    return logits_at(products, bias, row, columns, columns < V, V, inner, outer, BIAS, SOFTCAP)


@triton.jit
def _newest_first():
    """Row and block of a program; the last columns first: the product wrote them last, the cache holds them."""
    return tl.program_id(0).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)


@triton.jit
def block_sums(
    products, bias, tops, masses, moments, token_logits, shares, V, inner, outer,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per block of columns: the largest logit z*, Σ exp(z − z*), and Σ (z − z*)·exp(z − z*).

    With SHARES also exp(z − the sampled token's z) itself, in 16 bits: the slope outside the support but for a
    factor of its row, which is not yet known.
    """
    row, block = _newest_first()
    columns = block * BLOCK + tl.arange(0, BLOCK)
    z = load_logits(products, bias, row, columns, V, inner, outer, BIAS, SOFTCAP)
    top = tl.max(z, 0)
    base = finite_or_zero(top)
    away = at_least(z - base)
    e = tl.exp(away)
    place = row * tl.num_programs(1) + block
    tl.store(tops + place, top)
    tl.store(masses + place, tl.sum(e, 0))
    tl.store(moments + place, tl.sum(away * e, 0))
    if SHARES:
        share = e * tl.exp(base - tl.load(token_logits + row))
        share = through_softcap(share, z, outer, SOFTCAP).to(shares.dtype.element_ty)
        tl.store(shares + row * V + columns, share, mask=columns < V)


@triton.jit
def group_sums(
    products, bias, tops, masses, moments, group_tops, group_masses, token_logits, shares, V, GROUPS, inner, outer,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As ``block_sums``, and the first two per group of GROUP neighbouring columns."""
    row, block = _newest_first()
    groups = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    z = load_logits(products, bias, row, columns, V, inner, outer, BIAS, SOFTCAP)
    group_top = tl.max(z, 1)
    base = finite_or_zero(group_top)
    away = at_least(z - base[:, None])
    e = tl.exp(away)
    group_mass = tl.sum(e, 1)
    group_moment = tl.sum(away * e, 1)
    tl.store(group_tops + row * GROUPS + groups, group_top)
    tl.store(group_masses + row * GROUPS + groups, group_mass)
    top = tl.max(group_top, 0)
    lower = at_least(group_top - finite_or_zero(top))
    scale = tl.exp(lower)
    place = row * tl.num_programs(1) + block
    tl.store(tops + place, top)
    tl.store(masses + place, tl.sum(group_mass * scale, 0))
    tl.store(moments + place, tl.sum((group_moment + lower * group_mass) * scale, 0))
    if SHARES:
        share = e * tl.exp(base - tl.load(token_logits + row))[:, None]
        share = through_softcap(share, z, outer, SOFTCAP).to(shares.dtype.element_ty)
        tl.store(shares + row * V + columns, share, mask=columns < V)


@triton.jit
def shares_again(
    products, bias, tops, masses, log_outside, token_logits, shares, origins, V, BLOCKS, inner, outer,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, OWNER: tl.constexpr, BLOCK: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The logit that a row's shares are relative to; where the sampled token's will not do, they are made again.

    They are then relative to log Σ exp of what they are shares of: all that is outside the support.
    """
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCK_B)
    place = row * BLOCKS + blocks
    top = tl.load(tops + place, mask=blocks < BLOCKS, other=-float("inf"))
    peak = tl.max(top, 0)
    if OWNER:
        tail = tl.load(log_outside + row) + finite_or_zero(peak)
    else:
        tail = log_mass(top, tl.load(masses + place, mask=blocks < BLOCKS, other=0.0))
    origin = tl.load(token_logits + row)
    near = (origin > -float("inf")) & (peak - origin <= REACH)
    near &= (origin - tail <= DEPTH) | (tail == -float("inf"))
    origin = tl.where(near, origin, finite_or_zero(tail))
    tl.store(origins + row, origin)
    for block in range(tl.program_id(1), tl.where(near, 0, BLOCKS), tl.num_programs(1)):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        z = load_logits(products, bias, row, columns, V, inner, outer, BIAS, SOFTCAP)
        share = through_softcap(tl.exp(z - origin), z, outer, SOFTCAP).to(shares.dtype.element_ty)
        tl.store(shares + row * V + columns, share, mask=columns < V)


@triton.jit
def outside_slopes(
    products, bias, slopes, outside, log_outside, V, inner, outer,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write outside · exp(z − log_outside), times what the soft-cap lets through; the support is for later."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    z = load_logits(products, bias, row, columns, V, inner, outer, BIAS, SOFTCAP)
    slope = times_exp(tl.load(outside + row), z - finite_or_zero(tl.load(log_outside + row)))
    slope = through_softcap(slope, z, outer, SOFTCAP).to(slopes.dtype.element_ty)
    tl.store(slopes + row * V + columns, slope, mask=columns < V)


@triton.jit
def inside_slopes(ids, values, slopes, V, K, BLOCK_K: tl.constexpr):
    """Write the slopes [c, K] of the support over what ``outside_slopes`` left there."""
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, BLOCK_K)
    real = ranks < K
    columns = tl.load(ids + row * K + ranks, mask=real, other=0)
    tl.store(slopes + row * V + columns, tl.load(values + row * K + ranks, mask=real), mask=real)
