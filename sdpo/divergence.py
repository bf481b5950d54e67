"""Divergences between log-probability vectors: Kullback–Leibler and the generalized Jensen–Shannon.

From log-probabilities to nats per position.
"""

from __future__ import annotations

import math

from torch import Tensor

from sdpo._numerics import common_support, logaddexp, upcast
from sdpo._validate import check_alpha, check_distribution, check_shape


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) = Σ p · (log p − log q).

    Tokens with p = 0 contribute 0, in value and gradient. A token with p > 0 = q makes the divergence truly
    infinite: the value is +inf, never NaN, and that token contributes no gradient, so a position that is
    masked afterwards cannot turn a batch into NaN.

    Args:
        log_p: [..., V] floating, normalised log-probabilities, nats.
        log_q: [..., V] floating, normalised log-probabilities, nats.

    Returns:
        [...] nats, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: the shapes differ.

    Gradient: to both arguments; detach the teacher's.

    Source: Kullback and Leibler, 1951.

    Examples:
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
        >>> round(kl_divergence(p.log(), q.log()).item(), 4), kl_divergence(q.log(), p.log()).item()
        (0.6931, inf)
    """
    check_distribution("log_p", log_p)
    check_distribution("log_q", log_q)
    check_shape("log_q", log_q, log_p.shape, like="the shape of log_p")
    log_p, log_q, infinite = common_support(upcast(log_p), upcast(log_q))
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(infinite, math.inf).sum(dim=-1)


def generalized_jsd(student_log_probs: Tensor, teacher_log_probs: Tensor, *, alpha: float) -> Tensor:
    """Generalized Jensen–Shannon divergence, with the two Kullback–Leibler divergences as its end points.

    With p the student, q the teacher and M = (1−α)·p + α·q::

        α = 0        KL(q‖p)                          forward, mass-covering
        0 < α < 1    (1−α)·KL(p‖M) + α·KL(q‖M)        at most H_b(α) = −α·log α − (1−α)·log(1−α) ≤ ln 2
        α = 1        KL(p‖q)                          reverse, mode-seeking

    The end points are conventions, not limits: JSD_α → 0 as α → 0 or 1, while JSD_α / α → KL(q‖p) and JSD_α /
    (1−α) → KL(p‖q). Near agreement JSD_α ≈ α·(1−α)·KL: a change of α changes the size of the gradient too.

    Args:
        student_log_probs: [..., V] floating, normalised, nats. Entries of -inf are exact: value and gradient stay
            finite wherever the divergence is.
        teacher_log_probs: [..., V] floating, normalised, nats.
        alpha: 0 for KL(teacher‖student), 1 for KL(student‖teacher), between them the weight of the teacher in M.

    Returns:
        [...] nats, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a floating tensor, or alpha not a number.
        ValueError: the shapes differ, or alpha is outside [0, 1].

    Gradient: to both arguments; detach the teacher's.

    Source: SDPO, arXiv 2601.20802, section 2; generalized JSD as in GKD, arXiv 2306.13649, section 3.

    Examples:
        >>> import torch
        >>> p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log()
        >>> [round(generalized_jsd(p, q, alpha=a).item(), 4) for a in (0.0, 0.5, 1.0)]
        [inf, 0.2158, 0.6931]
    """
    check_distribution("student_log_probs", student_log_probs)
    check_distribution("teacher_log_probs", teacher_log_probs)
    check_shape("teacher_log_probs", teacher_log_probs, student_log_probs.shape, like="the student's shape")
    alpha = check_alpha(alpha)
    if alpha == 0.0:
        return kl_divergence(teacher_log_probs, student_log_probs)
    if alpha == 1.0:
        return kl_divergence(student_log_probs, teacher_log_probs)
    log_p, log_q = upcast(student_log_probs), upcast(teacher_log_probs)
    log_m = logaddexp(log_p + math.log1p(-alpha), log_q + math.log(alpha))
    return (1.0 - alpha) * kl_divergence(log_p, log_m) + alpha * kl_divergence(log_q, log_m)
