"""Off-policy correction: truncated, detached probability ratios."""

from __future__ import annotations

import math

from torch import Tensor

from sdpo._numerics import log_ratio, upcast
from sdpo._validate import check_real, check_shape, check_tensor

# exp(±20) is far outside every useful clip; the bound keeps a broken log-probability from overflowing the
# ratio.
LOG_RATIO_BOUND = 20.0


def importance_weights(log_probs: Tensor, old_log_probs: Tensor, *, clip: float) -> Tensor:
    """Truncated importance weights min(π/π_old, clip), to be multiplied into a per-token loss.

    Formula: ``min(exp(clamp(log_probs - old_log_probs, -20, 20)), clip)``. Truncated above only: a token that
    became likely counts at most clip times, one that became unlikely as little as its ratio says, down to
    exp(−20). Exactly on-policy the ratio is 1. Where the sampler could not score a token (old_log_probs NaN) no
    correction is known, and the ratio is 1. The same function corrects a mismatch of the inference engine:
    ``importance_weights(old, rollout, clip=ρ)``.

    Args:
        log_probs: [...] floating, current log-probabilities of the sampled tokens, nats.
        old_log_probs: [...] floating, those at sampling; NaN where unknown.
        clip: the largest weight, in (0, inf].

    Returns:
        [...] ratios, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a floating tensor, or clip not a number.
        ValueError: the shapes differ, or clip is not in (0, inf].

    Gradient: none; the result is detached.

    Source: truncated importance sampling (Ionides, 2008), as SDPO, arXiv 2601.20802, applies it per token.

    Examples:
        >>> import torch
        >>> new = torch.tensor([-1.0, -1.0, -1.0, -1.0])
        >>> old = torch.tensor([-1.0, 0.0, -9.0, float("nan")])
        >>> [round(w, 4) for w in importance_weights(new, old, clip=2.0).tolist()]
        [1.0, 0.3679, 2.0, 1.0]
    """
    check_tensor("log_probs", log_probs, "floating")
    check_tensor("old_log_probs", old_log_probs, "floating")
    check_shape("old_log_probs", old_log_probs, log_probs.shape, like="the shape of log_probs")
    clip = check_real(
        "clip", clip, low=0.0, high=math.inf, open_low=True, meaning="the largest weight, for example 2.0"
    )
    new, old = upcast(log_probs).detach(), upcast(old_log_probs).detach()
    exponent = log_ratio(new, old).masked_fill(old.isnan(), 0.0).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return exponent.exp().clamp(max=clip)
