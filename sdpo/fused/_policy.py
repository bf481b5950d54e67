"""The policy loss of a token, a function of the log-probability of the sampled token, and its derivative.

Its gradient w.r.t. the logits z needs no more than the derivative s = ∂loss/∂log p(y) and the probabilities p,

    ∂loss/∂z_v = s · (1[v = y] − p_v)

so it is written with that of the divergence, in the same pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdpo.fused._types import Objective, Surrogate, TokenInputs
from sdpo.importance import LOG_RATIO_BOUND


class PolicyTerm(NamedTuple):
    """The policy loss of each token, [...] each, without gradient."""

    loss: Tensor
    derivative: Tensor  # that w.r.t. the log-probability of the sampled token
    clipped: Tensor  # 1 where the range of the ratio took effect


def policy_term(
    log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor, surrogate: Surrogate
) -> PolicyTerm:
    """The surrogate of tokens with log-probabilities [...]; without ``old_log_probs`` of a ratio of 1."""
    advantages = advantages.to(log_probs.dtype)
    possible = ~log_probs.isneginf()
    log_ratio = torch.zeros_like(log_probs)
    if old_log_probs is not None:
        old = old_log_probs.to(log_probs.dtype)
        # NaN: sampled by no known policy. Equal: −inf for both, too.
        neutral = old.isnan() | (old == log_probs)
        log_ratio = torch.where(neutral, 0.0, log_probs - old.masked_fill(neutral, 0.0))
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    follows = possible & (log_ratio.abs() <= LOG_RATIO_BOUND)  # the ratio has a derivative
    low, high = 1.0 - surrogate.clip_low, 1.0 + surrogate.clip_high
    if surrogate.kind == "clipped":
        loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
        clipped = ((ratio > high) & (advantages > 0.0)) | ((ratio < low) & (advantages < 0.0))
        derivative = (-ratio * advantages).masked_fill(clipped | ~follows, 0.0)
    elif surrogate.kind == "cispo":
        derivative = (-ratio.clamp(low, high) * advantages).masked_fill(~possible, 0.0)
        loss = derivative * log_probs.masked_fill(~possible, 0.0)
        clipped = (ratio < low) | (ratio > high)
    else:
        positive, negative = surrogate.sapo_temperatures
        temperature = torch.full_like(ratio, negative).masked_fill(advantages > 0.0, positive)
        gate = torch.sigmoid(temperature * (ratio - 1.0))
        loss = -(4.0 / temperature) * gate * advantages
        derivative = (-4.0 * gate * (1.0 - gate) * ratio * advantages).masked_fill(~follows, 0.0)
        clipped = torch.zeros_like(ratio)
    return PolicyTerm(loss, derivative, clipped.to(log_probs.dtype))


def policy_scale(log_probs: Tensor, tokens: TokenInputs, objective: Objective) -> Tensor | None:
    """All factors [C] of 1[v = y] − p_v in the gradient w.r.t. the products; None without a policy gradient."""
    if tokens.policy is None or objective.surrogate is None:
        return None
    term = policy_term(log_probs, tokens.old_log_probs, tokens.policy.advantages, objective.surrogate)
    scale = term.derivative * tokens.policy.grad_weights.to(term.derivative.dtype)
    scale = scale if tokens.loss_scale is None else scale * tokens.loss_scale
    return scale * (objective.logit_scale / objective.temperature)
