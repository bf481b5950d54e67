"""The few primitives in which 0 · (−∞) = 0, in value and in gradient.

A vocabulary entry can be impossible (logit −∞, log-probability −∞). Its share of every expectation is zero,
but IEEE arithmetic says NaN: −∞ − (−∞) in the value, 0 · ∞ in the gradient. A ``where`` afterwards
repairs the value only, since autograd still multiplies a zero by an infinite derivative. So every
function here replaces the dangerous input *before* the arithmetic: where the result is fixed, the gradient is
exactly zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def upcast(values: Tensor) -> Tensor:
    """Return ``values`` in the working precision: float64 stays, everything else becomes float32.

    The gradient returns in the input's own dtype.
    """
    return values if values.dtype == torch.float64 else values.float()


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities [..., V] of logits [..., V] in the working precision; −∞ stays −∞ with gradient 0.

    The gradient with respect to a logit is g − p·Σg, for a nearly certain token a difference of near equals. Taken
    relative to that token's logit, in value and gradient, it is minus the sum of all others instead.
    """
    logits = upcast(logits)
    if logits.requires_grad:
        top = logits.gather(-1, logits.argmax(dim=-1, keepdim=True))
        logits = logits - top.masked_fill(top.isneginf(), 0.0)
    return torch.log_softmax(logits, dim=-1)


def logsumexp(values: Tensor) -> Tensor:
    """log Σ exp over the last dimension, [..., V] to [...]; nothing but −∞ gives −∞ with gradient 0."""
    empty = values.isneginf().all(dim=-1)
    filled = values.masked_fill(empty.unsqueeze(-1), 0.0)
    return torch.logsumexp(filled, dim=-1).masked_fill(empty, -math.inf)


def logaddexp(left: Tensor, right: Tensor) -> Tensor:
    """log(exp(left) + exp(right)), element by element; −∞ on both sides gives −∞ with gradient 0."""
    empty = left.isneginf() & right.isneginf()
    total = torch.logaddexp(left.masked_fill(empty, 0.0), right.masked_fill(empty, 0.0))
    return total.masked_fill(empty, -math.inf)


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p − log q, element by element; equal probabilities have 0, also where both are 0 (−∞ on both sides)."""
    return (log_p - log_q).masked_fill(log_p == log_q, 0.0)


def common_support(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make ``log_p − log_q`` safe to differentiate under an expectation over p.

    Returns ``(log_p, log_q, infinite)``. Both logs are 0, with gradient 0, wherever p = 0 or q = 0, so that
    their difference vanishes there. ``infinite`` is true where p > 0 = q: there the log-ratio is +∞, and the
    caller says what that means.
    """
    impossible = log_p.isneginf()
    infinite = log_q.isneginf() & ~impossible
    undefined = impossible | infinite
    return log_p.masked_fill(undefined, 0.0), log_q.masked_fill(undefined, 0.0), infinite


def zero_where_not(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` where ``mask`` holds, elsewhere 0 with gradient exactly 0, even over NaN or ±∞."""
    return values.masked_fill(~mask, 0.0)
