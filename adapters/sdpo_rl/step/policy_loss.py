"""GRPO's loss of a token from the log-probabilities of the sampled tokens: TRL's formulas, with gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import sdpo

from .policy import PolicyTargets, PolicyTerm

# The range of the logarithm of a row's ratio in VESPO's code, which TRL follows.
_VESPO_RANGE = (math.log(1e-8), 20.0)


class SampledTokens(NamedTuple):
    """What the student says about the sampled tokens, [B, T] each, with gradient where the loss needs one."""

    log_probs: Tensor
    entropy: Tensor | None = None
    has_policy_loss: Tensor | None = None  # bool, those of highest entropy; `None`: all


class PolicySum(NamedTuple):
    """GRPO's part of a micro-batch."""

    total: Tensor  # []
    metrics: dict[str, tuple[Tensor, Tensor]]  # sum and count by name


def policy_sum(
    term: PolicyTerm,
    targets: PolicyTargets,
    loss: Tensor,
    sampled: SampledTokens,
    old_log_probs: Tensor | None,
) -> PolicySum:
    """GRPO's part of a micro-batch: the weighted sum over its tokens, and the metrics `policy_...`.

    Args:
        term: of the run.
        targets: of the micro-batch.
        loss: [B, T] policy loss, with or without gradient.
        sampled: with a gradient where the term needs the log-probabilities.
        old_log_probs: [B, T]; `None`: the policy is its own old one.
    """
    mask = targets.mask
    kept = mask if sampled.has_policy_loss is None else sampled.has_policy_loss
    loss = loss.masked_fill(~kept, 0.0)
    total = _weighted(loss, mask, targets.weights)
    metrics = {"policy_loss": _mean(loss, mask)}
    old = sampled.log_probs.detach() if old_log_probs is None else old_log_probs
    new, base = ratio_terms(term, sampled.log_probs, old, mask)
    if term.surrogate in ("clipped", "cispo"):
        clipped = _clipped(term, (new - base).detach().exp(), targets.advantages)
        metrics["policy_clip_fraction"] = _mean(clipped, mask)
    if targets.reference_log_probs is not None:
        distance = sdpo.anchor_estimate(sampled.log_probs, targets.reference_log_probs)
        if term.kl_times_ratio:
            distance = distance * (new - base).exp()
        total = total + _weighted(distance, mask, targets.kl_weights)
        metrics["policy_kl"] = _mean(distance, mask)
    if sampled.entropy is not None:
        metrics["policy_entropy"] = _mean(sampled.entropy, kept)
        if term.has_entropy_bonus:
            weighted = (sampled.entropy * targets.entropy_weights).masked_fill(~kept, 0.0)
            total = total - weighted.sum() / kept.sum().clamp(min=1)
    return PolicySum(total, metrics)


def _weighted(values: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    return sdpo.self_distillation_loss(values, mask, row_mask=mask.any(dim=-1), weights=weights).total


def _mean(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    found = sdpo.token_sum(values.detach(), mask)
    return found.total, found.count


def _clipped(term: PolicyTerm, ratio: Tensor, advantages: Tensor) -> Tensor:
    """1.0 for tokens [B, T] whose ratio left the range in the direction of the advantage."""
    above = (ratio > 1.0 + term.clip_high) & (advantages > 0.0)
    below = (ratio < 1.0 - term.clip_low) & (advantages < 0.0)
    return (above | below).float()


def policy_loss(
    term: PolicyTerm, log_probs: Tensor, old_log_probs: Tensor | None, targets: PolicyTargets
) -> Tensor:
    """The policy loss of each token [B, T], 0 for the rows that the term masks as off-policy.

    Args:
        term: of the run.
        log_probs: of the sampled tokens [B, T], with gradient.
        old_log_probs: likewise, when they were sampled; `None`: the policy is its own old one.
        targets: of the micro-batch.
    """
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    loss = _surrogate(term, log_probs, old, targets)
    if term.off_policy_threshold is None:
        return loss
    return loss.masked_fill(~_is_kept(term.off_policy_threshold, log_probs, old, targets), 0.0)


def ratio_terms(
    term: PolicyTerm, log_probs: Tensor, old_log_probs: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Logarithms [B, T] of the policy's probability and the old one's, whose difference is that of the ratio.

    With importance weights of whole sequences it is the mean over the tokens of a row, and the old one is 0.
    """
    if term.ratio_level == "token":
        return log_probs, old_log_probs
    mean = _row_sum(log_probs - old_log_probs, mask) / mask.sum(-1, keepdim=True).clamp(min=1)
    return mean.expand(log_probs.shape), torch.zeros_like(log_probs)


def _surrogate(term: PolicyTerm, log_probs: Tensor, old: Tensor, targets: PolicyTargets) -> Tensor:
    advantages = targets.advantages
    if term.surrogate == "vespo":
        return -_vespo_weights(term, log_probs, old, targets) * advantages * log_probs
    new, base = ratio_terms(term, log_probs, old, targets.mask)
    if term.surrogate == "clipped":
        return sdpo.clipped_policy_gradient(
            new,
            base,
            advantages,
            clip_low=term.clip_low,
            clip_high=term.clip_high,
            ratio_limit=term.ratio_limit,
        )
    if term.surrogate == "cispo":
        ratio = sdpo.importance_weights(new, base, clip=1.0 + term.clip_high)
        return -ratio * advantages * log_probs
    positive, other = term.sapo_temperatures
    temperature = torch.where(advantages > 0.0, positive, other)
    gate = torch.sigmoid(temperature * ((new - base).exp() - 1.0))
    return -(4.0 / temperature) * gate * advantages


@torch.no_grad()
def _vespo_weights(term: PolicyTerm, log_probs: Tensor, old: Tensor, targets: PolicyTargets) -> Tensor:
    """φ(w) = exp(λ) · w^k · exp(−λ·w) of a row's ratio w, [B, 1], detached (VESPO, arXiv 2602.10693)."""
    log_ratio = _row_sum((log_probs - old).clamp(-20.0, 20.0), targets.mask)
    if targets.rollout_ratio is not None:
        log_ratio = log_ratio + _row_sum(targets.rollout_ratio.log().clamp(*_VESPO_RANGE), targets.mask)
    log_ratio = log_ratio.clamp(*_VESPO_RANGE)
    is_positive = targets.advantages[:, :1] >= 0.0
    (k_positive, k_negative), (rate_positive, rate_negative) = term.vespo_exponents, term.vespo_rates
    k = torch.where(is_positive, k_positive, k_negative)
    rate = torch.where(is_positive, rate_positive, rate_negative).clamp(min=1e-4)
    return (rate + k * log_ratio - rate * log_ratio.exp()).exp()


def _is_kept(threshold: float, log_probs: Tensor, old: Tensor, targets: PolicyTargets) -> Tensor:
    """Rows [B, 1] with an advantage ≥ 0 or close to what sampled them (DeepSeek-V3.2, arXiv 2512.02556)."""
    sampling = old if targets.sampling_log_probs is None else targets.sampling_log_probs
    gap = (sampling - log_probs.detach()).nan_to_num(nan=0.0)  # NaN: the engine could not score the token
    mean = _row_sum(gap, targets.mask) / targets.mask.sum(-1, keepdim=True).clamp(min=1)
    return (targets.advantages[:, :1] >= 0.0) | (mean <= threshold)


def _row_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sums [B, 1] over the tokens of a mask."""
    return values.masked_fill(~mask, 0.0).sum(-1, keepdim=True)
