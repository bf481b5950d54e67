"""The logits of each token's likeliest candidates, recomputed as dot products without rounding error.

A tensor core accumulates with fewer digits than float32 has: its logits are off by 1e-6 of their size. Where two
peaked models agree in nearly everything, this is up to 1e-4 of their divergence, and a few tokens cause it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._math import add_log, logaddexp, logsumexp, to_logits
from sdpo.fused.triton._reductions import load_logits
from sdpo.fused.triton._topk_loss import _store_support, load_support

# Logits recomputed per token, at most; a power of two.
MAX_RECOMPUTED = tl.constexpr(8)
# The least probability worth it: as a share of what the likeliest token leaves to all others, which make up the
# divergence of models that agree on that token; and in absolute terms.
MIN_SHARE, MIN_PROBABILITY = tl.constexpr(2.0**-6), tl.constexpr(2.0**-100)
# Loads of the dot products in flight.
NUM_STAGES = tl.constexpr(3)


@triton.jit
def exact_logits(
    hidden_ptr, weight_ptr, bias_ptr, c, offs_v, mask, D, stride_wv, stride_wd, scale, softcap, anchor,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of token c at offs_v [MAX_RECOMPUTED], less the anchor, from hidden [C, D] and weight [V, D]."""
    # The product of two 16-bit numbers is exact in float32, and float64 keeps the sum exact enough.
    total = tl.zeros((MAX_RECOMPUTED, BLOCK_D), tl.float64)
    for start in tl.range(0, D, BLOCK_D, num_stages=NUM_STAGES):
        offs_d = start + tl.arange(0, BLOCK_D)
        hidden = tl.load(hidden_ptr + c * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
        weight = tl.load(
            weight_ptr + offs_v[:, None] * stride_wv + offs_d[None, :] * stride_wd,
            mask=mask[:, None] & (offs_d < D)[None, :],
            other=0.0,
        )
        total += (hidden[None, :] * weight.to(tl.float32)).to(tl.float64)
    product = tl.sum(total, 1)
    bias = tl.zeros((MAX_RECOMPUTED,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        logits = to_logits(product.to(tl.float32), bias, scale, softcap, HAS_SOFTCAP) - anchor
    else:
        logits = ((product + bias) * scale - anchor).to(tl.float32)
    return logits


@triton.jit
def largest_two_below(
    limit, products_ptr, bias_ptr, c, start, V, scale, softcap, anchor,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, STEP_V: tl.constexpr,
):  # fmt: skip
    """The two largest logits below a limit in the block of token c that begins at start.

    Returns the largest, its token id and the second largest. Limit and logits are less the anchor. STEP_V logits
    are loaded at a time.
    """
    largest = tl.full((), -float("inf"), tl.float32)
    second, largest_id = largest, start
    for offset in range(0, BLOCK_V, STEP_V):
        offs_v = start + offset + tl.arange(0, STEP_V)
        logits = load_logits(
            products_ptr, bias_ptr, c, offs_v, offs_v < V, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        logits = logits - anchor
        logits = tl.where(logits < limit, logits, -float("inf"))
        step_largest, index = tl.max(logits, 0, return_indices=True)
        step_second = tl.max(tl.where(logits < step_largest, logits, -float("inf")), 0)
        second = tl.maximum(tl.maximum(second, step_second), tl.minimum(largest, step_largest))
        largest_id = tl.where(step_largest > largest, start + offset + index, largest_id)
        largest = tl.maximum(largest, step_largest)
    return largest, largest_id, second


@triton.jit
def likeliest_tokens(
    products_ptr, bias_ptr, c, logits, log_outside, block_max, anchor, normalizer, V, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, OWNS_SUPPORT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The likeliest candidates of token c, at most MAX_RECOMPUTED: those worth recomputing.

    Returns their number and, in as many slots, the index in the support, −1 if outside. Of those outside also the
    token id and the logit. A model that does not own the support may have likely tokens outside; they are searched
    in the blocks whose maximum is likely.
    """
    slots, offs_k, offs_b = tl.arange(0, MAX_RECOMPUTED), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_B)
    index_in_support = tl.full((MAX_RECOMPUTED,), -1, tl.int32)
    outside_ids = tl.full((MAX_RECOMPUTED,), 0, tl.int64)
    outside_logits = tl.full((MAX_RECOMPUTED,), -float("inf"), tl.float32)
    # Probabilities of the support that are not taken yet, and the largest of them.
    inside_p = tl.exp(logits - normalizer)
    best_p, index = tl.max(inside_p, 0, return_indices=True)
    others_p = tl.sum(tl.where(offs_k == index, 0.0, inside_p), 0) + tl.exp(log_outside - normalizer)
    min_p = tl.maximum(others_p * MIN_SHARE, MIN_PROBABILITY)
    block = index * 0 - 1  # that holds the best one, −1 if it is in the support
    if not OWNS_SUPPORT:
        # Of each block, the largest probability that is not taken yet, and the logit that those taken reach.
        block_p = tl.exp(block_max - normalizer)
        block_limit = tl.full((BLOCK_B,), float("inf"), tl.float32)
        best_outside_p, best_block = tl.max(block_p, 0, return_indices=True)
        block = tl.where(best_outside_p > best_p, best_block, -1)
        best_p = tl.maximum(best_p, best_outside_p)
    count = 0
    while (count < MAX_RECOMPUTED) & (best_p >= min_p):
        if not OWNS_SUPPORT:  # noqa: SIM102 (a constexpr: the compiler drops the branch)
            if block >= 0:
                limit = tl.sum(tl.where(offs_b == block, block_limit, 0.0), 0)
                largest, largest_id, second = largest_two_below(
                    limit, products_ptr, bias_ptr, c, block * BLOCK_V, V, scale, softcap, anchor,
                    HAS_BIAS, HAS_SOFTCAP, BLOCK_V, BLOCK_V // 2,
                )  # fmt: skip
                outside_ids = tl.where(slots == count, largest_id.to(tl.int64), outside_ids)
                outside_logits = tl.where(slots == count, largest, outside_logits)
                block_limit = tl.where(offs_b == block, largest, block_limit)
                block_p = tl.where(offs_b == block, tl.exp(second - normalizer), block_p)
        index = tl.where(block >= 0, -1, index)
        index_in_support = tl.where(slots == count, index, index_in_support)
        inside_p = tl.where(offs_k == index, 0.0, inside_p)
        best_p, index = tl.max(inside_p, 0, return_indices=True)
        if not OWNS_SUPPORT:
            best_outside_p, best_block = tl.max(block_p, 0, return_indices=True)
            block = tl.where(best_outside_p > best_p, best_block, -1)
            best_p = tl.maximum(best_p, best_outside_p)
        count += 1
    return count, index_in_support, outside_ids, outside_logits


@triton.jit
def recompute_top_logits(
    products_ptr, bias_ptr, hidden_ptr, weight_ptr, exact_bias_ptr, ids_ptr, tokens_ptr,
    support_logits_ptr, token_logit_ptr, block_max_ptr, block_sumexp_ptr, anchor_ptr, log_outside_ptr,
    V, K, D, BLOCKS, stride_wv, stride_wd, scale, exact_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, OWNS_SUPPORT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``anchor_support`` of one model, with the logits of the likeliest tokens recomputed.

    Also reads products [C, V] and their factors hidden [C, D] and weight [V, D], ids [C, K] and tokens [C]. The
    products become logits with bias and scale, exact products with exact_bias and exact_scale.
    """
    pid_c = tl.program_id(0).to(tl.int64)
    anchor, logits, token_logit, log_outside, block_max = load_support(
        support_logits_ptr, token_logit_ptr, block_max_ptr, block_sumexp_ptr, log_outside_ptr, pid_c, K, BLOCKS,
        OWNS_SUPPORT, BLOCK_K, BLOCK_B,
    )  # fmt: skip
    normalizer = logaddexp(logsumexp(logits), log_outside)
    count, index_in_support, outside_ids, outside_logits = likeliest_tokens(
        products_ptr, bias_ptr, pid_c, logits, log_outside, block_max, anchor, normalizer, V, scale, softcap,
        HAS_BIAS, HAS_SOFTCAP, OWNS_SUPPORT=OWNS_SUPPORT, BLOCK_K=BLOCK_K, BLOCK_B=BLOCK_B, BLOCK_V=BLOCK_V,
    )  # fmt: skip
    if count > 0:
        is_inside = index_in_support >= 0
        ids = tl.load(ids_ptr + pid_c * K + index_in_support, mask=is_inside, other=0) + outside_ids
        mask = tl.arange(0, MAX_RECOMPUTED) < count
        exact = exact_logits(
            hidden_ptr, weight_ptr, exact_bias_ptr, pid_c, ids, mask, D, stride_wv, stride_wd, exact_scale, softcap,
            anchor, HAS_BIAS, HAS_SOFTCAP, BLOCK_D,
        )  # fmt: skip
        is_slot = tl.arange(0, BLOCK_K)[:, None] == index_in_support[None, :]
        replacement = tl.sum(tl.where(is_slot, exact[None, :], 0.0), 1)
        logits = tl.where(tl.sum(is_slot.to(tl.int32), 1) > 0, replacement, logits)
        # The sampled token has the logit of the support: no probability may come out above 1.
        is_sampled = mask & (ids == tl.load(tokens_ptr + pid_c))
        replacement = tl.sum(tl.where(is_sampled, exact, 0.0), 0)
        token_logit = tl.where(tl.sum(is_sampled.to(tl.int32), 0) > 0, replacement, token_logit)
        if not OWNS_SUPPORT:
            change = tl.exp(exact - normalizer) - tl.exp(outside_logits - normalizer)
            change = tl.sum(tl.where(mask & (index_in_support < 0), change, 0.0), 0)
            log_outside = add_log(normalizer, tl.exp(log_outside - normalizer) + change)
    _store_support(
        support_logits_ptr, token_logit_ptr, anchor_ptr, log_outside_ptr, pid_c,
        anchor, logits, token_logit, log_outside, K, BLOCK_K,
    )  # fmt: skip
