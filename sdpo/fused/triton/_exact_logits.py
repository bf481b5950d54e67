"""The likeliest tokens of a row once more, each as a dot product that loses nothing.

A matrix unit sums up with fewer digits than float32 has: its logits are off by 1e-6 of their size. Where two peaked
models agree in all but a little, that is up to 1e-4 of their divergence, and a few tokens are the cause.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.fused.triton._math import log_add_exp, log_of, log_sum_exp, to_logits
from sdpo.fused.triton._reductions import load_logits

# Tokens of a row that are made again, at most, and the least probability that is worth it, as a share of what the
# likeliest token leaves to all others: that much a divergence of models that agree on it is made of.
TOKENS, PROBABLE = tl.constexpr(8), tl.constexpr(2.0**-6)
NEVER = tl.constexpr(2.0**-100)
# Loads of the dot products under way at a time.
STAGES = tl.constexpr(3)


@triton.jit
def exact_logits(
    states, head, bias, row, columns, real, D, head_row, head_column, inner, outer, anchor,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits at those of a few columns that are real, less the anchor, from states [c, D] and head [V, D]."""
    # A product of two 16-bit numbers is exact in float32; float64 keeps it so that their sum is, too.
    total = tl.zeros((TOKENS, BLOCK_D), tl.float64)
    for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_D)
        state = tl.load(states + row * D + place, mask=place < D, other=0.0).to(tl.float32)
        weight = tl.load(
            head + columns[:, None] * head_row + place[None, :] * head_column,
            mask=real[:, None] & (place < D)[None, :],
            other=0.0,
        )
        total += (state[None, :] * weight.to(tl.float32)).to(tl.float64)
    product = tl.sum(total, 1)
    shift = tl.zeros((TOKENS,), tl.float32)
    if BIAS:
        shift = tl.load(bias + columns, mask=real, other=0.0).to(tl.float32)
    if SOFTCAP:
        logits = to_logits(product.to(tl.float32), shift, inner, outer, SOFTCAP) - anchor
    else:
        logits = ((product + shift) * inner - anchor).to(tl.float32)
    return logits


@triton.jit
def largest_below(
    limit, products, bias, row, start, V, inner, outer, anchor,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The largest logit below a limit in a block of columns, less the anchor, its column, and the next largest."""
    found = tl.full((), -float("inf"), tl.float32)
    second, column = found, start
    for offset in range(0, BLOCK, PIECE):
        columns = start + offset + tl.arange(0, PIECE)
        logits = load_logits(products, bias, row, columns, V, inner, outer, BIAS, SOFTCAP) - anchor
        logits = tl.where(logits < limit, logits, -float("inf"))
        top, place = tl.max(logits, 0, return_indices=True)
        runner_up = tl.max(tl.where(logits < top, logits, -float("inf")), 0)
        second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(found, top))
        column = tl.where(top > found, start + offset + place, column)
        found = tl.maximum(found, top)
    return found, column, second


@triton.jit
def refined(
    z, token, log_rest, top, anchor, ids, tokens,
    products, bias, inner, states, head, head_bias, head_inner, outer, row, K, V, D, head_row, head_column,
    OWNER: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z, token and log_rest, as ``load_support`` has them, with the likeliest tokens made again.

    The sampled token's logit is its logit of the support: no probability may come out above 1. A model that did not
    choose the support may have likely tokens outside; they are looked for in the blocks of columns that say so.
    """
    slots, ranks, blocks = tl.arange(0, TOKENS), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_B)
    # Of each of the likeliest: its rank in the support (−1: it is outside), its column and its logit as it was.
    rank_of = tl.full((TOKENS,), -1, tl.int32)
    columns = tl.full((TOKENS,), 0, tl.int64)
    was = tl.full((TOKENS,), -float("inf"), tl.float32)
    norm = log_add_exp(log_sum_exp(z), log_rest)
    inside = tl.exp(z - norm)
    best, rank = tl.max(inside, 0, return_indices=True)
    others = tl.sum(tl.where(ranks == rank, 0.0, inside), 0) + tl.exp(log_rest - norm)
    least = tl.maximum(others * PROBABLE, NEVER)
    block = rank * 0 - 1
    if not OWNER:
        # The likeliest token of each block that is not made again yet, and the logit that those lie below.
        outside = tl.exp(top - norm)
        limits = tl.full((BLOCK_B,), float("inf"), tl.float32)
        best_outside, place = tl.max(outside, 0, return_indices=True)
        block = tl.where(best_outside > best, place, -1)
        best = tl.maximum(best, best_outside)
    turn = 0
    while (turn < TOKENS) & (best >= least):
        if not OWNER:  # noqa: SIM102 (one is known to the compiler)
            if block >= 0:
                limit = tl.sum(tl.where(blocks == block, limits, 0.0), 0)
                found, column, following = largest_below(
                    limit, products, bias, row, block * BLOCK, V, inner, outer, anchor,
                    BIAS, SOFTCAP, BLOCK, BLOCK // 2,
                )  # fmt: skip
                columns = tl.where(slots == turn, column.to(tl.int64), columns)
                was = tl.where(slots == turn, found, was)
                limits = tl.where(blocks == block, found, limits)
                outside = tl.where(blocks == block, tl.exp(following - norm), outside)
        rank = tl.where(block >= 0, -1, rank)
        rank_of = tl.where(slots == turn, rank, rank_of)
        inside = tl.where(ranks == rank, 0.0, inside)
        best, rank = tl.max(inside, 0, return_indices=True)
        if not OWNER:
            best_outside, place = tl.max(outside, 0, return_indices=True)
            block = tl.where(best_outside > best, place, -1)
            best = tl.maximum(best, best_outside)
        turn += 1
    if turn > 0:
        columns = tl.load(ids + row * K + rank_of, mask=rank_of >= 0, other=0) + columns
        real = slots < turn
        logits = exact_logits(
            states, head, head_bias, row, columns, real, D, head_row, head_column, head_inner, outer, anchor,
            BIAS, SOFTCAP, BLOCK_D,
        )  # fmt: skip
        hit = ranks[:, None] == rank_of[None, :]
        made = tl.sum(tl.where(hit, logits[None, :], 0.0), 1)
        z = tl.where(tl.sum(hit.to(tl.int32), 1) > 0, made, z)
        sampled = real & (columns == tl.load(tokens + row))
        made = tl.sum(tl.where(sampled, logits, 0.0), 0)
        token = tl.where(tl.sum(sampled.to(tl.int32), 0) > 0, made, token)
        if not OWNER:
            change = tl.where(real & (rank_of < 0), tl.exp(logits - norm) - tl.exp(was - norm), 0.0)
            log_rest = log_of(norm, tl.exp(log_rest - norm) + tl.sum(change, 0))
    return z, token, log_rest
