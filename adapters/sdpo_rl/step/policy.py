"""GRPO's part of the loss: TRL's objective as a weighted sum over tokens, with the weights of each `loss_type`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import sdpo

from ..config import SDPOConfig
from .batch import sampled_mask

Surrogate = Literal["clipped", "cispo", "sapo"]
_SURROGATES: dict[str, Surrogate] = {"cispo": "cispo", "sapo": "sapo"}  # of the other loss types: "clipped"


@dataclass(frozen=True)
class PolicyTerm:
    """GRPO's part of a run's loss, by the options of `GRPOConfig`.

    Attributes:
        loss_type: which tokens' mean it is, and the surrogate.
        clip_low: lower half-width of the range of the ratio.
        clip_high: upper half-width.
        sapo_temperatures: of positive and of other advantages, for `sapo`.
        kl_coef: weight of the distance to the reference model, `beta`.
        kl_times_ratio: whether that distance is multiplied by the ratio, with gradient.
        max_completion_length: for `dr_grpo`.
    """

    loss_type: str
    clip_low: float
    clip_high: float
    sapo_temperatures: tuple[float, float]
    kl_coef: float
    kl_times_ratio: bool
    max_completion_length: int

    @property
    def surrogate(self) -> Surrogate:
        """The function of ratio and advantage."""
        return _SURROGATES.get(self.loss_type, "clipped")


class PolicyTargets(NamedTuple):
    """What GRPO's part needs besides the student's log-probabilities, all [B, T]."""

    mask: Tensor  # bool, tokens with a policy loss
    advantages: Tensor
    weights: Tensor  # of the policy loss in the total
    kl_weights: Tensor  # of the distance to the reference model in the total
    reference_log_probs: Tensor | None


class PolicySum(NamedTuple):
    """GRPO's part of a micro-batch."""

    total: Tensor  # []
    metrics: dict[str, tuple[Tensor, Tensor]]  # sum and count by name


def policy_term(args: Any) -> PolicyTerm:
    """The term that a `GRPOConfig` describes."""
    epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    # TRL's bound of the ratio in `cispo` is the ratio itself, and there is none below.
    widths = (1.0, epsilon_high - 1.0) if args.loss_type == "cispo" else (args.epsilon, epsilon_high)
    return PolicyTerm(
        loss_type=args.loss_type,
        clip_low=widths[0],
        clip_high=widths[1],
        sapo_temperatures=(args.sapo_temperature_pos, args.sapo_temperature_neg),
        kl_coef=args.beta,
        kl_times_ratio=args.use_bias_correction_kl,
        max_completion_length=args.max_completion_length,
    )


def part_weights(config: SDPOConfig, *, step: int, last_step: int) -> tuple[float, float]:
    """The factors of GRPO's part and of the divergence in an optimizer step; 1 and 1 where rows are routed.

    Otherwise λ and 1 − λ, where λ changes linearly from the first step, 0, to the last.

    Example:
        >>> config = SDPOConfig(grpo_weight=0.75, grpo_weight_final=0.25)
        >>> [part_weights(config, step=step, last_step=4) for step in (0, 2, 4)]
        [(0.75, 0.25), (0.5, 0.5), (0.25, 0.75)]
    """
    if config.routing != "none":
        return 1.0, 1.0
    weight, final = config.grpo_weight, config.grpo_weight_final
    if final is not None:
        weight += (final - weight) * min(step / max(last_step, 1), 1.0)
    return weight, 1.0 - weight


def token_weights(term: PolicyTerm, mask: Tensor, *, accumulation_steps: int, step_tokens: Tensor) -> Tensor:
    """Weights [B, 1] with which the policy losses of a micro-batch add up to its part of TRL's loss.

    Args:
        term: with the `loss_type`.
        mask: [B, T] bool, sampled tokens of all rows of the micro-batch.
        accumulation_steps: micro-batches of the optimizer step; 1 in an evaluation.
        step_tokens: [] sampled tokens of the optimizer step, the mean over processes.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> term = PolicyTerm("grpo", 0.2, 0.2, (1.0, 1.05), 0.0, False, 8)
        >>> token_weights(term, mask, accumulation_steps=1, step_tokens=torch.tensor(3.0)).tolist()
        [[0.25], [0.5]]
    """
    rows = mask.shape[0]
    lengths = mask.sum(-1, keepdim=True)
    ones = torch.ones_like(lengths, dtype=torch.float32)
    if term.loss_type in ("grpo", "sapo"):
        return ones / lengths.clamp(min=1) / (rows * accumulation_steps)
    if term.loss_type == "bnpo":
        return ones / lengths.sum().clamp(min=1) / accumulation_steps
    if term.loss_type == "dr_grpo":
        return ones / (rows * term.max_completion_length * accumulation_steps)
    if term.loss_type == "luspo":
        return ones / (rows * accumulation_steps)
    return ones / step_tokens.clamp(min=1)  # dapo, cispo


def policy_mask(config: SDPOConfig, term: PolicyTerm, inputs: Mapping[str, Any]) -> Tensor:
    """Tokens [B, T] bool with a policy loss.

    Args:
        config: with `routing`: rows with a distillation loss then have no policy loss.
        term: of the run.
        inputs: of a micro-batch.
    """
    mask = sampled_mask(inputs)
    if config.routing == "srpo":
        mask = mask & ~inputs["loss_mask"].any(-1, keepdim=True)
    return mask & (inputs["advantages"] != 0.0)[:, None] if term.kl_coef == 0.0 else mask


def policy_inputs(
    config: SDPOConfig,
    term: PolicyTerm,
    inputs: Mapping[str, Any],
    *,
    weight: Tensor,
    accumulation_steps: int,
    step_tokens: Tensor,
) -> dict[str, Tensor]:
    """The further inputs [B, T] of a micro-batch for its policy loss, by name.

    Args:
        config: as in `policy_mask`.
        term: of the run.
        inputs: of the micro-batch.
        weight: [] factor of all weights.
        accumulation_steps: as in `token_weights`.
        step_tokens: as in `token_weights`.
    """
    sampled = sampled_mask(inputs)
    weights = token_weights(term, sampled, accumulation_steps=accumulation_steps, step_tokens=step_tokens)
    mask = policy_mask(config, term, inputs)
    advantages = inputs["advantages"].float()[:, None].expand(mask.shape)
    weights = (weights * weight).expand(mask.shape) * mask
    ratio = inputs.get("importance_sampling_ratio")
    return {
        "policy_mask": mask,
        "policy_advantages": advantages,
        "policy_weights": weights if ratio is None else weights * ratio.detach().float(),
        "policy_kl_weights": weights * term.kl_coef,
    }


def policy_targets(completions: Mapping[str, Tensor]) -> PolicyTargets | None:
    """The targets of a micro-batch from its completions, by the names of its inputs; `None` without the part."""
    if "policy_mask" not in completions:
        return None
    return PolicyTargets(
        mask=completions["policy_mask"],
        advantages=completions["policy_advantages"],
        weights=completions["policy_weights"],
        kl_weights=completions["policy_kl_weights"],
        reference_log_probs=completions.get("ref_per_token_logps"),
    )


def surrogate_loss(
    term: PolicyTerm, log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor
) -> Tensor:
    """The policy loss of each token [B, T]; without `old_log_probs` the policy is its own old one."""
    old = log_probs.detach() if old_log_probs is None else old_log_probs
    if term.surrogate == "clipped":
        return sdpo.clipped_policy_gradient(
            log_probs, old, advantages, clip_low=term.clip_low, clip_high=term.clip_high
        )
    if term.surrogate == "cispo":
        ratio = sdpo.importance_weights(log_probs, old, clip=1.0 + term.clip_high)
        return -ratio * advantages * log_probs
    ratio = (log_probs - old).exp()
    positive, other = term.sapo_temperatures
    temperature = torch.where(advantages > 0.0, positive, other)
    return -(4.0 / temperature) * torch.sigmoid(temperature * (ratio - 1.0)) * advantages


def policy_sum(
    term: PolicyTerm,
    targets: PolicyTargets,
    policy_loss: Tensor,
    *,
    old_log_probs: Tensor | None,
    log_probs: Tensor,
) -> PolicySum:
    """GRPO's part of a micro-batch: the weighted sum over its tokens, and the metrics `policy_...`.

    Args:
        term: of the run.
        targets: of the micro-batch.
        policy_loss: [B, T], with or without gradient.
        old_log_probs: [B, T]; `None`: the policy is its own old one.
        log_probs: of the sampled tokens [B, T], with a gradient where the term has a `kl_coef`.
    """
    mask, rows = targets.mask, targets.mask.any(dim=-1)
    total = sdpo.self_distillation_loss(policy_loss, mask, row_mask=rows, weights=targets.weights).total
    means = {"policy_loss": policy_loss.detach()}
    if term.surrogate != "sapo":
        means["policy_clip_fraction"] = _clipped(term, log_probs.detach(), old_log_probs, targets.advantages)
    if targets.reference_log_probs is not None:
        distance = sdpo.anchor_estimate(log_probs, targets.reference_log_probs)
        if term.kl_times_ratio:
            old = log_probs.detach() if old_log_probs is None else old_log_probs
            distance = distance * (log_probs - old).exp()
        total = (
            total
            + sdpo.self_distillation_loss(distance, mask, row_mask=rows, weights=targets.kl_weights).total
        )
        means["policy_kl"] = distance.detach()
    sums = {name: sdpo.token_sum(values, mask) for name, values in means.items()}
    return PolicySum(total, {name: (found.total, found.count) for name, found in sums.items()})


def _clipped(term: PolicyTerm, log_probs: Tensor, old_log_probs: Tensor | None, advantages: Tensor) -> Tensor:
    """1.0 for tokens [B, T] whose ratio left the range in the direction of the advantage."""
    if old_log_probs is None:
        return torch.zeros_like(log_probs)
    ratio = (log_probs - old_log_probs).exp()
    above = (ratio > 1.0 + term.clip_high) & (advantages > 0.0)
    below = (ratio < 1.0 - term.clip_low) & (advantages < 0.0)
    return (above | below).float()
