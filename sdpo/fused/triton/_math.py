"""The formulas the kernels share, element by element, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

# Stands in a buffer of products for "not part of this sum": no product of finite numbers comes out as it.
MASKED = tl.constexpr(-3.4028234663852886e38)

FORWARD = tl.constexpr(0)  # α = 0
REVERSE = tl.constexpr(1)  # α = 1
MIXTURE = tl.constexpr(2)  # α between
SAMPLED = tl.constexpr(3)  # the sampled token's surrogate

SMALLEST = tl.constexpr(-(2**31))


@triton.jit
def to_logits(products, bias, inner, outer, SOFTCAP: tl.constexpr):
    """inner·(products + bias), through outer·tanh if soft-capped; −inf where masked."""
    scaled = (products + bias) * inner
    if SOFTCAP:
        shrunk = tl.exp(-2.0 * tl.abs(scaled))
        bounded = (1.0 - shrunk) / (1.0 + shrunk)
        logits = outer * tl.where(scaled < 0.0, -bounded, bounded)
    else:
        logits = scaled
    return tl.where(products == MASKED, -float("inf"), logits)


@triton.jit
def times_exp(weight, exponent):
    """weight · exp(exponent), 0 where the weight is 0 even if the exponent is not finite."""
    return tl.where(weight == 0.0, 0.0, weight * tl.exp(tl.where(weight == 0.0, 0.0, exponent)))


@triton.jit
def finite_or_zero(values):
    """−inf replaced by 0: a reference point that can be subtracted."""
    return tl.where(values == -float("inf"), 0.0, values)


@triton.jit
def log_of(base, total):
    """base + log(total); −inf if the total is 0, NaN if it is."""
    return tl.where(total == 0.0, -float("inf"), base + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def log_sum_exp(logits):
    """log Σ exp over a vector; −inf if all are."""
    base = finite_or_zero(tl.max(logits, 0))
    return log_of(base, tl.sum(tl.exp(logits - base), 0))


@triton.jit
def log_mass(tops, masses):
    """log Σ masses·exp(tops) over vectors; what does not belong has a top of −inf and a mass of 0."""
    base = finite_or_zero(tl.max(tops, 0))
    return log_of(base, tl.sum(times_exp(masses, tops - base), 0))


@triton.jit
def log_add_exp(left, right):
    """log(exp(left) + exp(right)); −inf if both are."""
    base = finite_or_zero(tl.maximum(left, right))
    return log_of(base, tl.exp(left - base) + tl.exp(right - base))


@triton.jit
def through_softcap(slope, z, outer, SOFTCAP: tl.constexpr):
    """A slope times what the soft-cap lets through at logits z."""
    if SOFTCAP:
        capped = z / outer
        slope = tl.where(z == -float("inf"), 0.0, slope * (1.0 - capped * capped))
    return slope


@triton.jit
def order_key(values):
    """int32 in the order of the floats, above SMALLEST, which is free to mark what is no candidate."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def threshold_of(keys, k):
    """A key that k keys of the block reach: the k-th largest itself, or any below it that no further one reaches.

    Found bit by bit, SMALLEST if there are fewer than k candidates.
    """
    smallest = tl.full((), SMALLEST, tl.int32)
    reached = tl.sum((keys >= 0).to(tl.int32))
    found = tl.where(reached >= k, smallest * 0, smallest)
    bit = 30
    while (bit >= 0) & (reached != k):
        candidate = found | (1 << bit)
        count = tl.sum((keys >= candidate).to(tl.int32))
        found = tl.where(count >= k, candidate, found)
        reached = tl.where(count >= k, count, reached)
        bit -= 1
    return found


@triton.jit
def first_k(keys, k):
    """Mask of the k largest keys, ties to the lower position, and each one's rank by position."""
    threshold = threshold_of(keys, k)
    above = keys > threshold
    tied = (keys == threshold) & (keys > SMALLEST)
    room = k - tl.sum(above.to(tl.int32))
    # Both counts in one scan: blocks hold at most 2^15 keys.
    seen = tl.cumsum(above.to(tl.int32) * 65536 + tied.to(tl.int32), 0)
    ties = seen & 65535
    chosen = above | (tied & (ties <= room))
    return chosen, (seen >> 16) + tl.minimum(ties, room) - 1


@triton.jit
def _expm1_near(x):
    """exp(x) − 1 for |x| < 1/2."""
    series = 1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0))
    series = 1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * series))
    return x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * series))


@triton.jit
def _log1p_near(y):
    """log(1 + y) for −0.4 < y < 0.7."""
    ratio = y / (2.0 + y)
    square = ratio * ratio
    series = 1.0 / 7.0 + square * (1.0 / 9.0 + square * (1.0 / 11.0 + square / 13.0))
    return 2.0 * ratio * (1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * series)))


@triton.jit
def _kl_term(log_p, log_q):
    """p·log(p/q) − p + q and p·log(p/q), as ``sdpo.fused._torch.divergence`` has them, infinities included."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    no_p = log_p == -float("inf")
    no_q = log_q == -float("inf")
    undefined = no_p | no_q
    d = tl.where(undefined, 0.0, log_p - log_q)
    is_near = tl.abs(d) < 0.5
    x = -tl.where(is_near, d, 0.0)
    # x + expm1(−x) loses everything to cancellation; its series does not.
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0)))
    near = p * (x * x * 0.5 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * series))))
    term = tl.where(is_near, near, p * (d - 1.0) + q)
    term = tl.where(no_p, q, term)
    infinite = no_q & (log_p > -float("inf"))
    return tl.where(infinite, float("inf"), term), p * tl.where(infinite, -1.0, d)


@triton.jit
def _log_over_mixture(delta, weight, rest):
    """log(p / (rest·p + weight·q)) from delta = log q − log p."""
    is_near = tl.abs(delta) < 0.5
    near = _log1p_near(weight * _expm1_near(tl.where(is_near, delta, 0.0)))
    return -tl.where(is_near, near, tl.log(rest + weight * tl.exp(delta)))


@triton.jit
def divergence_terms(log_p, log_q, alpha, rest, MODE: tl.constexpr):
    """Terms of the divergence and g = ∂/∂log p, token by token; rest is 1 − alpha."""
    if MODE == FORWARD:
        term, _ = _kl_term(log_q, log_p)
        g = tl.where(log_p == -float("inf"), 0.0, -tl.exp(log_q))
    elif MODE == REVERSE:
        term, g = _kl_term(log_p, log_q)
    else:
        nowhere = (log_p == -float("inf")) & (log_q == -float("inf"))
        delta = tl.where(nowhere, 0.0, tl.where(nowhere, 0.0, log_q) - tl.where(nowhere, 0.0, log_p))
        delta = tl.minimum(tl.maximum(delta, -80.0), 80.0)
        g = rest * tl.exp(log_p) * _log_over_mixture(delta, alpha, rest)
        term = g + alpha * tl.exp(log_q) * _log_over_mixture(-delta, rest, alpha)
    return term, g
