"""Exact top-K of each token's logits by way of the maxima of groups, and log Σ exp of all that is not selected.

Neighbouring logits form groups, a few neighbouring groups a region. The K groups with the largest maxima hold the K
largest logits, and the K regions with the largest maxima hold those groups. What a step does not select enters the
sum as a whole, in the last step token by token. Ties go to the lower token id, exactly: among equal maxima the
earlier are selected, and each stands for at least one equal logit. The sums are relative to the token's largest
logit, which takes part in every step: what is left out may be many orders of magnitude smaller.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._math import (
    EXCLUDED_KEY,
    MASKED,
    finite_or_zero,
    logaddexp,
    logsumexp,
    order_key,
    select_k,
    weighted_logsumexp,
)
from sdpo.fused.triton._reductions import load_logits


@triton.jit
def _store_selected(selected_ptr, indices, valid, selected, position, c, K, BLOCK_K: tl.constexpr):
    """Write the selected indices to selected [C, K] in ascending order; −1 where fewer than K are valid."""
    tl.store(selected_ptr + c * K + position, indices, mask=selected)
    offs_k = tl.arange(0, BLOCK_K)
    count = tl.sum(valid.to(tl.int32))
    tl.store(selected_ptr + c * K + offs_k, offs_k * 0 - 1, mask=(offs_k >= count) & (offs_k < K))


@triton.jit
def select_top_regions(
    group_max_ptr, group_sumexp_ptr, regions_ptr, log_outside_ptr,
    GROUPS, K,
    GROUPS_PER_REGION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The K regions with the largest logits. Reads group_max and group_sumexp [C, GROUPS].

    Writes regions [C, K], ascending, −1 where fewer exist, and log_outside [C] over all other regions.
    """
    pid_c = tl.program_id(0).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    offs_g = offs_r[:, None] * GROUPS_PER_REGION + tl.arange(0, GROUPS_PER_REGION)[None, :]
    valid = offs_r * GROUPS_PER_REGION < GROUPS
    group_max = tl.load(group_max_ptr + pid_c * GROUPS + offs_g, mask=offs_g < GROUPS, other=-float("inf"))
    region_max = tl.max(group_max, 1)
    largest = finite_or_zero(tl.max(region_max, 0))
    selected, position = select_k(tl.where(valid, order_key(region_max), EXCLUDED_KEY), K)
    _store_selected(regions_ptr, offs_r, valid, selected, position, pid_c, K, BLOCK_K)
    # Loaded a second time, so that the selection need not keep them in registers.
    outside = (selected == 0)[:, None] & (offs_g < GROUPS)
    group_max = tl.load(group_max_ptr + pid_c * GROUPS + offs_g, mask=outside, other=-float("inf"))
    group_sumexp = tl.load(group_sumexp_ptr + pid_c * GROUPS + offs_g, mask=outside, other=0.0)
    log_outside = weighted_logsumexp(tl.ravel(group_max) - largest, tl.ravel(group_sumexp))
    tl.store(log_outside_ptr + pid_c, log_outside)


@triton.jit
def select_top_groups(
    group_max_ptr, group_sumexp_ptr, regions_ptr, groups_ptr, log_outside_ptr,
    GROUPS, K,
    GROUPS_PER_REGION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The K groups with the largest logits, from the selected regions [C, K].

    Writes groups [C, K], ascending, −1 where fewer exist. Adds the groups not selected to log_outside [C].
    """
    pid_c = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_G)
    offs_k = offs // GROUPS_PER_REGION
    region = tl.load(regions_ptr + pid_c * K + offs_k, mask=offs_k < K, other=-1)
    offs_g = region * GROUPS_PER_REGION + offs % GROUPS_PER_REGION
    valid = (region >= 0) & (offs_g < GROUPS)
    group_max = tl.load(group_max_ptr + pid_c * GROUPS + offs_g, mask=valid, other=-float("inf"))
    selected, position = select_k(tl.where(valid, order_key(group_max), EXCLUDED_KEY), K)
    _store_selected(groups_ptr, offs_g, valid, selected, position, pid_c, K, BLOCK_K)
    outside = valid & (selected == 0)
    group_sumexp = tl.load(group_sumexp_ptr + pid_c * GROUPS + offs_g, mask=outside, other=0.0)
    largest = finite_or_zero(tl.max(group_max, 0))
    log_rest = weighted_logsumexp(tl.where(outside, group_max - largest, -float("inf")), group_sumexp)
    tl.store(log_outside_ptr + pid_c, logaddexp(log_rest, tl.load(log_outside_ptr + pid_c)))


@triton.jit
def select_top_tokens(
    products_ptr, bias_ptr, groups_ptr, parts_ptr, ids_ptr, support_logits_ptr, log_outside_ptr,
    V, K, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PARTS_PER_GROUP: tl.constexpr, PART_V: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The K tokens with the largest logits, from the selected groups [C, K].

    A group has PARTS_PER_GROUP parts of PART_V tokens; the K best parts are selected first, since their tokens fit
    the registers. Writes ids and support_logits [C, K], and parts [C, K] as scratch. Adds the tokens not selected
    to log_outside [C].
    """
    pid_c = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    offs_k = offs_p // PARTS_PER_GROUP
    group = tl.load(groups_ptr + pid_c * K + offs_k, mask=offs_k < K, other=-1)
    parts = group * PARTS_PER_GROUP + offs_p % PARTS_PER_GROUP
    valid = (group >= 0) & (parts * PART_V < V)
    offs_v = parts[:, None] * PART_V + tl.arange(0, PART_V)[None, :]
    mask = valid[:, None] & (offs_v < V)
    logits = load_logits(
        products_ptr, bias_ptr, pid_c, offs_v, mask, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    part_max = tl.max(logits, 1)
    part_sumexp = tl.sum(tl.exp(logits - finite_or_zero(part_max)[:, None]), 1)
    selected, position = select_k(tl.where(valid, order_key(part_max), EXCLUDED_KEY), K)
    _store_selected(parts_ptr, parts, valid, selected, position, pid_c, K, BLOCK_K)
    largest = finite_or_zero(tl.max(part_max, 0))
    log_rest = weighted_logsumexp(
        tl.where(selected, -float("inf"), part_max - largest), tl.where(selected, 0.0, part_sumexp)
    )
    log_rest = logaddexp(log_rest, tl.load(log_outside_ptr + pid_c))
    tl.debug_barrier()  # the parts are read by other threads than wrote them

    offs_t = tl.arange(0, BLOCK_T)
    offs_k = offs_t // PART_V
    part = tl.load(parts_ptr + pid_c * K + offs_k, mask=offs_k < K, other=-1)
    offs_v = part * PART_V + offs_t % PART_V
    valid = (part >= 0) & (offs_v < V)
    logits = load_logits(
        products_ptr, bias_ptr, pid_c, offs_v, valid, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    selected, position = select_k(tl.where(valid, order_key(logits), EXCLUDED_KEY), K)
    tl.store(ids_ptr + pid_c * K + position, offs_v.to(tl.int64), mask=selected)
    tl.store(support_logits_ptr + pid_c * K + position, logits, mask=selected)
    log_other = logsumexp(tl.where(valid & (selected == 0), logits - largest, -float("inf")))
    tl.store(log_outside_ptr + pid_c, logaddexp(log_other, log_rest))


@triton.jit
def _load_token_logit(
    products_ptr, bias_ptr, tokens_ptr, c, V, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):  # fmt: skip
    """The logit of the sampled token of token c."""
    token = tl.load(tokens_ptr + c)
    return load_logits(products_ptr, bias_ptr, c, token, token < V, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def gather_support(
    products_ptr, bias_ptr, tokens_ptr, ids_ptr, support_logits_ptr, token_logit_ptr,
    V, K, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Take a support that the other model owns out of the products [C, V], which are then MASKED there.

    Reads tokens [C] and ids [C, K]. Writes support_logits [C, K] and token_logit [C].
    """
    pid_c = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    ids = tl.load(ids_ptr + pid_c * K + offs_k, mask=mask, other=0)
    logits = load_logits(products_ptr, bias_ptr, pid_c, ids, mask, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    token_logit = _load_token_logit(
        products_ptr, bias_ptr, tokens_ptr, pid_c, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    tl.store(support_logits_ptr + pid_c * K + offs_k, logits, mask=mask)
    tl.store(token_logit_ptr + pid_c, token_logit)
    tl.debug_barrier()  # every thread has read the products before one overwrites them
    tl.store(products_ptr + pid_c * V + ids, offs_k * 0.0 + MASKED, mask=mask)


@triton.jit
def gather_token_logits(
    products_ptr, bias_ptr, tokens_ptr, token_logit_ptr,
    V, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The logits of the sampled tokens. Reads products [C, V] and tokens [C], writes token_logit [C]."""
    pid_c = tl.program_id(0).to(tl.int64)
    token_logit = _load_token_logit(
        products_ptr, bias_ptr, tokens_ptr, pid_c, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    tl.store(token_logit_ptr + pid_c, token_logit)
