"""The likeliest tokens of the support once more, each as a dot product that loses nothing.

A matrix unit sums up with fewer digits than float32 has: its logits are off by 2e-6 of their size. Where two peaked
models agree in all but a little, that is up to 1e-4 of their divergence, and a few tokens are the cause.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sdpo.kernels._math import log_add_exp, log_sum_exp, to_logits
from sdpo.kernels._rows import load_support

# Tokens of a row that are made again, at most, and the least probability that is worth it.
TOKENS, PROBABLE = tl.constexpr(16), tl.constexpr(2.0**-11)


@triton.jit
def refine(
    ids, tokens, inside, refined, token_logits, tops, masses, moments, log_outside, states, head, bias,
    K, D, BLOCKS, head_row, head_column, inner, outer,
    OWNER: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write to ``refined`` logits of exact products of states [c, D] and head [V, D], for the largest inside.

    To ``token_logits`` as well if the sampled token is among them: no probability may come out above 1. The
    programs of a row share its tokens out by rank; none reads what another writes.
    """
    row = tl.program_id(0).to(tl.int64)
    ranks = tl.arange(0, BLOCK_K)
    columns = tl.load(ids + row * K + ranks, mask=ranks < K, other=0)
    _, z, log_rest, _, _, _ = load_support(
        inside, tops, masses, moments, log_outside, row, K, BLOCKS, OWNER, BLOCK_K, BLOCK_B
    )
    p = tl.exp(z - log_add_exp(log_sum_exp(z), log_rest))
    best = tl.max(p, 0)
    turn = 0
    while (turn < TOKENS) & (best >= PROBABLE):
        rank = tl.argmax(p, 0)
        if turn % tl.num_programs(1) == tl.program_id(1):
            column = tl.sum(tl.where(ranks == rank, columns, 0), 0).to(tl.int64)
            # A product of two 16-bit numbers is exact in float32; float64 keeps it so that their sum is, too.
            total = tl.zeros((BLOCK_D,), tl.float64)
            for start in range(0, D, BLOCK_D):
                place = start + tl.arange(0, BLOCK_D)
                state = tl.load(states + row * D + place, mask=place < D, other=0.0).to(tl.float32)
                weight = tl.load(head + column * head_row + place * head_column, mask=place < D, other=0.0)
                total += (state * weight.to(tl.float32)).to(tl.float64)
            shift = 0.0
            if BIAS:
                shift = tl.load(bias + column).to(tl.float32)
            logit = to_logits(tl.sum(total, 0).to(tl.float32), shift, inner, outer, SOFTCAP)
            tl.store(refined + row * K + rank, logit)
            tl.store(token_logits + row, logit, mask=column == tl.load(tokens + row))
        p = tl.where(ranks == rank, 0.0, p)
        best = tl.max(p, 0)
        turn += 1
