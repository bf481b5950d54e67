"""GRPO's part of the loss: TRL's objective as a weighted sum over tokens, with the weights of each `loss_type`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..config import SDPOConfig
from .batch import sampled_mask

Surrogate = Literal["clipped", "cispo", "sapo", "vespo"]
RatioLevel = Literal["token", "sequence"]
# Of the other loss types: "clipped".
_SURROGATES: dict[str, Surrogate] = {"cispo": "cispo", "sapo": "sapo", "vespo": "vespo"}


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
        ratio_limit: the largest ratio (two-sided clipping), `delta`.
        ratio_level: whether a token has its own ratio or that of its row, `importance_sampling_level`.
        vespo_exponents: k of advantages ≥ 0 and of others, for `vespo`.
        vespo_rates: λ likewise.
        off_policy_threshold: the mean log-ratio above which rows with a negative advantage have no loss; `None`:
            none of them is masked.
        entropy_fraction: `top_entropy_quantile`, the share of the tokens with a policy loss, of highest entropy.
        has_entropy_bonus: whether the entropy has a weight, in the present step or in a later one.
    """

    loss_type: str
    clip_low: float
    clip_high: float
    sapo_temperatures: tuple[float, float]
    kl_coef: float
    kl_times_ratio: bool
    max_completion_length: int
    ratio_limit: float = math.inf
    ratio_level: RatioLevel = "token"
    vespo_exponents: tuple[float, float] = (2.0, 3.0)
    vespo_rates: tuple[float, float] = (3.0, 2.0)
    off_policy_threshold: float | None = None
    entropy_fraction: float = 1.0
    has_entropy_bonus: bool = False

    @property
    def surrogate(self) -> Surrogate:
        """The function of ratio and advantage."""
        return _SURROGATES.get(self.loss_type, "clipped")

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy of the student decides about the loss or is a part of it."""
        return self.has_entropy_bonus or self.entropy_fraction < 1.0

    @property
    def needs_log_probs(self) -> bool:
        """Whether the pass of the divergence cannot have it: it is no function of one token's ratio alone."""
        return (
            self.needs_entropy
            or self.kl_coef != 0.0
            or self.ratio_limit < math.inf
            or self.ratio_level != "token"
            or self.surrogate == "vespo"
            or self.off_policy_threshold is not None
        )


class PolicyTargets(NamedTuple):
    """What GRPO's part needs besides the student's log-probabilities, all [B, T]."""

    mask: Tensor  # bool, tokens with a policy loss
    advantages: Tensor
    weights: Tensor  # of the policy loss in the total
    kl_weights: Tensor  # of the distance to the reference model in the total
    entropy_weights: Tensor  # of the mean entropy in the total, the same for all tokens
    reference_log_probs: Tensor | None
    sampling_log_probs: Tensor | None = None  # of the inference engine
    rollout_ratio: Tensor | None = (
        None  # the trainer's probability over the inference engine's, as TRL bounds it
    )


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
        ratio_limit=_option(args, "delta", math.inf),
        ratio_level=_option(args, "importance_sampling_level", "token"),
        vespo_exponents=(_option(args, "vespo_k_pos", 2.0), _option(args, "vespo_k_neg", 3.0)),
        vespo_rates=(_option(args, "vespo_lambda_pos", 3.0), _option(args, "vespo_lambda_neg", 2.0)),
        off_policy_threshold=_option(args, "off_policy_mask_threshold", None),
        entropy_fraction=_option(args, "top_entropy_quantile", 1.0),
        has_entropy_bonus=_option(args, "entropy_coef", 0.0) != 0.0
        or _option(args, "use_adaptive_entropy", False),
    )


def _option(args: Any, name: str, off: Any) -> Any:
    """An option that older releases of TRL, which Unsloth pins, may not have."""
    value = getattr(args, name, None)
    return off if value is None else value


def part_weights(config: SDPOConfig, *, step: int, last_step: int) -> tuple[float, float]:
    """The factors of GRPO's part and of the divergence in an optimizer step; 1 and 1 where rows are routed.

    Otherwise λ and 1 − λ, where λ changes linearly from the first step, 0, to the last.

    Examples:
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

    Examples:
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
    return ones / step_tokens.clamp(min=1)  # dapo, cispo, vespo


def policy_mask(config: SDPOConfig, term: PolicyTerm, inputs: Mapping[str, Any]) -> Tensor:
    """Tokens [B, T] bool that GRPO's part is computed for.

    Args:
        config: with `routing`: rows with a distillation loss then have no policy loss.
        term: of the run.
        inputs: of a micro-batch.
    """
    mask = _routed_mask(config, inputs)
    # The tokens of highest entropy are found among all.
    return mask if term.entropy_fraction < 1.0 else mask & _has_gradient(term, inputs)


def signal_mask(config: SDPOConfig, term: PolicyTerm, inputs: Mapping[str, Any]) -> Tensor:
    """Of `policy_mask` the tokens [B, T] bool of rows whose part of the loss has a gradient."""
    return _routed_mask(config, inputs) & _has_gradient(term, inputs)


def _routed_mask(config: SDPOConfig, inputs: Mapping[str, Any]) -> Tensor:
    mask = sampled_mask(inputs)
    if config.routing == "srpo":
        mask = mask & ~inputs["loss_mask"].any(-1, keepdim=True)
    return mask


def _has_gradient(term: PolicyTerm, inputs: Mapping[str, Any]) -> Tensor:
    """Rows [B, 1] with an advantage, or with a term that needs none."""
    advantages: Tensor = inputs["advantages"]
    return (advantages != 0.0)[:, None] | (term.kl_coef != 0.0 or term.has_entropy_bonus)


def policy_inputs(
    config: SDPOConfig,
    term: PolicyTerm,
    inputs: Mapping[str, Any],
    *,
    weight: Tensor,
    entropy_coef: float,
    accumulation_steps: int,
    step_tokens: Tensor,
) -> dict[str, Tensor]:
    """The further inputs [B, T] of a micro-batch for its policy loss, by name.

    Args:
        config: as in `policy_mask`.
        term: of the run.
        inputs: of the micro-batch.
        weight: [] factor of all weights.
        entropy_coef: weight of the mean entropy in TRL's loss, in the present step.
        accumulation_steps: as in `token_weights`.
        step_tokens: as in `token_weights`.
    """
    sampled = sampled_mask(inputs)
    weights = token_weights(term, sampled, accumulation_steps=accumulation_steps, step_tokens=step_tokens)
    mask = policy_mask(config, term, inputs)
    advantages = inputs["advantages"].float()[:, None].expand(mask.shape)
    weights = (weights * weight).expand(mask.shape) * mask
    ratio = None if term.surrogate == "vespo" else inputs.get("importance_sampling_ratio")
    return {
        "policy_mask": mask,
        "policy_advantages": advantages,
        "policy_weights": weights if ratio is None else weights * ratio.detach().float(),
        "policy_kl_weights": weights * term.kl_coef,
        "policy_entropy_weights": (weight * (entropy_coef / accumulation_steps)).expand(mask.shape),
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
        entropy_weights=completions["policy_entropy_weights"],
        reference_log_probs=completions.get("ref_per_token_logps"),
        sampling_log_probs=completions.get("sampling_per_token_logps"),
        rollout_ratio=completions.get("importance_sampling_ratio"),
    )
