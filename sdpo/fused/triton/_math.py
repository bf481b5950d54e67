"""The formulas that the kernels share, element by element, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

# Marks a token that a sum leaves out, in place of its product. No product of finite numbers comes out as this.
MASKED = tl.constexpr(-3.4028234663852886e38)

FORWARD_KL = tl.constexpr(0)  # KL(teacher ‖ student), alpha = 0
REVERSE_KL = tl.constexpr(1)  # KL(student ‖ teacher), alpha = 1
JSD = tl.constexpr(2)  # 0 < alpha < 1
SAMPLED = tl.constexpr(3)  # the surrogate of the sampled token

# The order key of an element that cannot be selected; no float has it.
EXCLUDED_KEY = tl.constexpr(-(2**31))


@triton.jit
def to_logits(products, bias, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """scale · (products + bias) or, soft-capped, softcap · tanh of that; −inf where MASKED."""
    logits = (products + bias) * scale
    if HAS_SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(logits))
        abs_tanh = (1.0 - e) / (1.0 + e)
        logits = softcap * tl.where(logits < 0.0, -abs_tanh, abs_tanh)
    return tl.where(products == MASKED, -float("inf"), logits)


@triton.jit
def softcap_backward(grad, logits, softcap, HAS_SOFTCAP: tl.constexpr):
    """grad · (1 − tanh²), tanh taken from the logits that it gave."""
    if HAS_SOFTCAP:
        tanh = logits / softcap
        grad = tl.where(logits == -float("inf"), 0.0, grad * (1.0 - tanh * tanh))
    return grad


@triton.jit
def weighted_exp(weight, exponent):
    """weight · exp(exponent), 0 where the weight is 0 even if the exponent is not finite."""
    return tl.where(weight == 0.0, 0.0, weight * tl.exp(tl.where(weight == 0.0, 0.0, exponent)))


@triton.jit
def finite_or_zero(values):
    """−inf replaced by 0: a reference point that can be subtracted."""
    return tl.where(values == -float("inf"), 0.0, values)


@triton.jit
def add_log(base, total):
    """base + log(total); −inf if the total is 0, NaN if it is NaN."""
    return tl.where(total == 0.0, -float("inf"), base + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def logsumexp(logits):
    """log Σ exp(logits) over a vector; −inf if all are −inf."""
    base = finite_or_zero(tl.max(logits, 0))
    return add_log(base, tl.sum(tl.exp(logits - base), 0))


@triton.jit
def weighted_logsumexp(logits, weights):
    """log Σ weights · exp(logits) over vectors; elements to leave out have a logit of −inf and a weight of 0."""
    base = finite_or_zero(tl.max(logits, 0))
    return add_log(base, tl.sum(weighted_exp(weights, logits - base), 0))


@triton.jit
def logaddexp(x, y):
    """log(exp(x) + exp(y)); −inf if both are −inf."""
    base = finite_or_zero(tl.maximum(x, y))
    return add_log(base, tl.exp(x - base) + tl.exp(y - base))


@triton.jit
def order_key(values):
    """int32 in the order of the floats, all above EXCLUDED_KEY."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def kth_largest(keys, k):
    """A threshold that k keys reach: the k-th largest key, or a smaller number that no other key reaches.

    Found bit by bit; EXCLUDED_KEY if fewer than k keys are above it.
    """
    excluded = tl.full((), EXCLUDED_KEY, tl.int32)
    count = tl.sum((keys >= 0).to(tl.int32))
    threshold = tl.where(count >= k, excluded * 0, excluded)
    bit = 30
    while (bit >= 0) & (count != k):
        candidate = threshold | (1 << bit)
        candidate_count = tl.sum((keys >= candidate).to(tl.int32))
        threshold = tl.where(candidate_count >= k, candidate, threshold)
        count = tl.where(candidate_count >= k, candidate_count, count)
        bit -= 1
    return threshold


@triton.jit
def select_k(keys, k):
    """Mask of the k largest keys, ties to the lower index, and the position of each among the selected by index."""
    threshold = kth_largest(keys, k)
    above = keys > threshold
    tied = (keys == threshold) & (keys > EXCLUDED_KEY)
    ties_wanted = k - tl.sum(above.to(tl.int32))
    # Both counts in one scan, as halves of an int32: a block has at most 2^15 keys.
    counts = tl.cumsum(above.to(tl.int32) * 65536 + tied.to(tl.int32), 0)
    ties = counts & 65535
    selected = above | (tied & (ties <= ties_wanted))
    return selected, (counts >> 16) + tl.minimum(ties, ties_wanted) - 1


@triton.jit
def _expm1_near_zero(x):
    """exp(x) − 1 for |x| < 1/2."""
    series = 1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0))
    series = 1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * series))
    return x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * series))


@triton.jit
def _log1p_near_zero(x):
    """log(1 + x) for −0.4 < x < 0.7."""
    ratio = x / (2.0 + x)
    square = ratio * ratio
    series = 1.0 / 7.0 + square * (1.0 / 9.0 + square * (1.0 / 11.0 + square / 13.0))
    return 2.0 * ratio * (1.0 + square * (1.0 / 3.0 + square * (1.0 / 5.0 + square * series)))


@triton.jit
def _kl_terms(log_p, log_q):
    """p · log(p/q) − p + q and p · log(p/q), as ``divergence_and_grad`` in sdpo.fused._torch has them."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    p_is_zero = log_p == -float("inf")
    q_is_zero = log_q == -float("inf")
    log_ratio = tl.where(p_is_zero | q_is_zero, 0.0, log_p - log_q)
    is_near = tl.abs(log_ratio) < 0.5
    # With x = log(q/p) the term is p · (expm1(x) − x): a difference of near equals, its series is none.
    x = -tl.where(is_near, log_ratio, 0.0)
    series = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0)))
    near = p * (x * x * 0.5 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * series))))
    term = tl.where(is_near, near, p * (log_ratio - 1.0) + q)
    term = tl.where(p_is_zero, q, term)
    is_infinite = q_is_zero & (log_p > -float("inf"))
    return tl.where(is_infinite, float("inf"), term), p * tl.where(is_infinite, -1.0, log_ratio)


@triton.jit
def _log_ratio_to_mixture(log_ratio, weight, one_minus_weight):
    """log(p / ((1 − weight) · p + weight · q)) from log_ratio = log q − log p."""
    is_near = tl.abs(log_ratio) < 0.5
    near = _log1p_near_zero(weight * _expm1_near_zero(tl.where(is_near, log_ratio, 0.0)))
    return -tl.where(is_near, near, tl.log(one_minus_weight + weight * tl.exp(log_ratio)))


@triton.jit
def divergence_terms(log_p, log_q, alpha, one_minus_alpha, MODE: tl.constexpr):
    """Token by token, the terms of the divergence and g = ∂/∂log p; p is the student, q the teacher."""
    if MODE == FORWARD_KL:
        term, _ = _kl_terms(log_q, log_p)
        g = tl.where(log_p == -float("inf"), 0.0, -tl.exp(log_q))
    elif MODE == REVERSE_KL:
        term, g = _kl_terms(log_p, log_q)
    else:
        both_zero = (log_p == -float("inf")) & (log_q == -float("inf"))
        log_ratio = tl.where(
            both_zero, 0.0, tl.where(both_zero, 0.0, log_q) - tl.where(both_zero, 0.0, log_p)
        )
        log_ratio = tl.minimum(tl.maximum(log_ratio, -80.0), 80.0)
        g = one_minus_alpha * tl.exp(log_p) * _log_ratio_to_mixture(log_ratio, alpha, one_minus_alpha)
        term = g + alpha * tl.exp(log_q) * _log_ratio_to_mixture(-log_ratio, one_minus_alpha, alpha)
    return term, g
