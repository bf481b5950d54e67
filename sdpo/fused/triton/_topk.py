"""Exact top-K of each row from the maxima of its groups, and the sum of all it leaves out.

The K groups with the largest maxima hold the K largest logits; they are found in the same way, in the K best
regions of groups. What is not chosen enters the outside sum whole, in the last step token by token. Ties go to the
lower token id, exactly: among equal maxima the earlier are taken, and each stands for one equal logit at least.
Sums are relative to the row's largest logit, which every step meets: the logarithm of what is left out has more
digits than that of what it is left out of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._math import (
    MASKED,
    SMALLEST,
    finite_or_zero,
    first_k,
    log_add_exp,
    log_mass,
    log_sum_exp,
    order_key,
)
from sdpo.fused.triton._reductions import logits_at


@triton.jit
def _store_choice(chosen_places, places, real, chosen, rank, row, K, BLOCK_K: tl.constexpr):
    """Write the chosen places in ascending order, −1 where fewer than K were real."""
    tl.store(chosen_places + row * K + rank, places, mask=chosen)
    ranks = tl.arange(0, BLOCK_K)
    found = tl.sum(real.to(tl.int32))
    tl.store(chosen_places + row * K + ranks, ranks * 0 - 1, mask=(ranks >= found) & (ranks < K))


@triton.jit
def choose_regions(
    group_tops, group_masses, chosen_regions, log_others, GROUPS, K,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Ids of the K best regions of WIDE groups, ascending (−1: fewer exist), and logsumexp of the others."""
    row = tl.program_id(0).to(tl.int64)
    regions = tl.arange(0, BLOCK_R)
    groups = regions[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    real = regions * WIDE < GROUPS
    tops = tl.load(group_tops + row * GROUPS + groups, mask=groups < GROUPS, other=-float("inf"))
    region_tops = tl.max(tops, 1)
    peak = finite_or_zero(tl.max(region_tops, 0))
    chosen, rank = first_k(tl.where(real, order_key(region_tops), SMALLEST), K)
    _store_choice(chosen_regions, regions, real, chosen, rank, row, K, BLOCK_K)
    other = (chosen == 0)[:, None] & (groups < GROUPS)
    tops = tl.load(group_tops + row * GROUPS + groups, mask=other, other=-float("inf"))
    masses = tl.load(group_masses + row * GROUPS + groups, mask=other, other=0.0)
    tl.store(log_others + row, log_mass(tl.ravel(tops) - peak, tl.ravel(masses)))


@triton.jit
def choose_groups(
    group_tops, group_masses, chosen_regions, chosen_groups, log_others, GROUPS, K,
    WIDE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Ids of the K best groups in the chosen regions, ascending (−1: fewer exist), and logsumexp of all others."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_G)
    region = tl.load(chosen_regions + row * K + place // WIDE, mask=place // WIDE < K, other=-1)
    groups = region * WIDE + place % WIDE
    real = (region >= 0) & (groups < GROUPS)
    tops = tl.load(group_tops + row * GROUPS + groups, mask=real, other=-float("inf"))
    chosen, rank = first_k(tl.where(real, order_key(tops), SMALLEST), K)
    _store_choice(chosen_groups, groups, real, chosen, rank, row, K, BLOCK_K)
    other = real & (chosen == 0)
    masses = tl.load(group_masses + row * GROUPS + groups, mask=other, other=0.0)
    log_rest = log_mass(tl.where(other, tops - finite_or_zero(tl.max(tops, 0)), -float("inf")), masses)
    tl.store(log_others + row, log_add_exp(log_rest, tl.load(log_others + row)))


@triton.jit
def choose_tokens(
    products, bias, chosen_groups, chosen_parts, log_others, ids, inside, log_outside, V, K, inner, outer,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Ids and logits of the K largest among the chosen groups, and the logsumexp of all others.

    By way of the K best of the PARTS parts that a group has, PART tokens each: theirs fit the registers.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    group = tl.load(chosen_groups + row * K + part // PARTS, mask=part // PARTS < K, other=-1)
    parts = group * PARTS + part % PARTS
    real = (group >= 0) & (parts * PART < V)
    columns = parts[:, None] * PART + tl.arange(0, PART)[None, :]
    z = logits_at(products, bias, row, columns, real[:, None] & (columns < V), V, inner, outer, BIAS, SOFTCAP)
    tops = tl.max(z, 1)
    masses = tl.sum(tl.exp(z - finite_or_zero(tops)[:, None]), 1)
    chosen, rank = first_k(tl.where(real, order_key(tops), SMALLEST), K)
    _store_choice(chosen_parts, parts, real, chosen, rank, row, K, BLOCK_K)
    peak = finite_or_zero(tl.max(tops, 0))
    log_rest = log_mass(tl.where(chosen, -float("inf"), tops - peak), tl.where(chosen, 0.0, masses))
    log_rest = log_add_exp(log_rest, tl.load(log_others + row))
    tl.debug_barrier()  # what is chosen is read by other threads than wrote it

    token = tl.arange(0, BLOCK_T)
    part = tl.load(chosen_parts + row * K + token // PART, mask=token // PART < K, other=-1)
    columns = part * PART + token % PART
    real = (part >= 0) & (columns < V)
    z = logits_at(products, bias, row, columns, real, V, inner, outer, BIAS, SOFTCAP)
    chosen, rank = first_k(tl.where(real, order_key(z), SMALLEST), K)
    tl.store(ids + row * K + rank, columns.to(tl.int64), mask=chosen)
    tl.store(inside + row * K + rank, z, mask=chosen)
    log_inner = log_sum_exp(tl.where(real & (chosen == 0), z - peak, -float("inf")))
    tl.store(log_outside + row, log_add_exp(log_inner, log_rest))


@triton.jit
def _logit_of(tokens, products, bias, row, V, inner, outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The sampled token's logit."""
    token = tl.load(tokens + row)
    return logits_at(products, bias, row, token, token < V, V, inner, outer, BIAS, SOFTCAP)


@triton.jit
def take_tokens(
    products, bias, tokens, ids, inside, token_logits, V, K, inner, outer,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits at given ids, which are lost from the products, and the sampled token's."""
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, BLOCK_K)
    real = ranks < K
    columns = tl.load(ids + row * K + ranks, mask=real, other=0)
    z = logits_at(products, bias, row, columns, real, V, inner, outer, BIAS, SOFTCAP)
    token = _logit_of(tokens, products, bias, row, V, inner, outer, BIAS, SOFTCAP)
    tl.store(inside + row * K + ranks, z, mask=real)
    tl.store(token_logits + row, token)
    tl.debug_barrier()  # every thread has read before one overwrites
    tl.store(products + row * V + columns, ranks * 0.0 + MASKED, mask=real)


@triton.jit
def read_tokens(
    products, bias, tokens, token_logits, V, inner, outer, BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """The sampled token's logit."""
    row = tl.program_id(0).to(tl.int64)
    token = _logit_of(tokens, products, bias, row, V, inner, outer, BIAS, SOFTCAP)
    tl.store(token_logits + row, token)
