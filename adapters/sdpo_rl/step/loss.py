"""The loss of one micro-batch: the core's losses, called with hidden states or with logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdpo

from ..config import SDPOConfig
from . import token_weights
from .divergence import anchor, entropy, sampled_log_probs, token_divergence
from .head import HeadTransform
from .policy import PolicyTargets, PolicyTerm, policy_targets
from .policy_loss import SampledTokens, policy_loss, policy_sum

# Of entropies and mask [B, T], the tokens [B, T] bool that keep their policy loss.
EntropyMask = Callable[[Tensor, Tensor], Tensor]


class Targets(NamedTuple):
    """What the loss needs besides the outputs of both models, all [B, T]."""

    tokens: Tensor
    loss_mask: Tensor
    old_log_probs: Tensor | None
    weights: Tensor | None
    row_weights: Tensor | None = None  # part of the weights
    policy: PolicyTargets | None = None
    rollout_log_probs: Tensor | None = None  # of an inference engine that the student itself corrects


class TokenValues(NamedTuple):
    """What the loss knows of each token [B, T], in nats, without gradient; zero where it computed nothing."""

    divergence: Tensor
    log_probs: Tensor  # the student's, of the sampled token
    teacher_log_probs: Tensor


class StepLoss(NamedTuple):
    """The loss of a micro-batch, with gradient from `total`.

    Attributes:
        total: [] of both parts.
        metrics: means over the tokens with a distillation loss, and `active_tokens`, their number, by name.
        policy_total: [] of GRPO's part, detached; `None` without.
        policy_metrics: (sum, weight) by name.
        tokens: the divergence of each token before any weight, and both models' log-probabilities.
    """

    total: Tensor
    metrics: dict[str, Tensor]
    tokens: TokenValues
    policy_total: Tensor | None = None
    policy_metrics: Mapping[str, tuple[Tensor, Tensor]] = {}


class _TokenLosses(NamedTuple):
    """Losses [B, T] with gradient, and what is known about the tokens."""

    per_token: Tensor
    weights: Tensor  # of the divergence
    statistics: sdpo.TokenStatistics | sdpo.FusedOutput
    weighed: bool = False  # the weights have the factors of `token_weights` and `token_fraction`
    policy_loss: Tensor | None = None
    sampled: SampledTokens | None = None  # with the policy loss


def loss_targets(
    config: SDPOConfig, completions: Mapping[str, Tensor], *, distillation_weight: float = 1.0
) -> Targets:
    """The targets of a micro-batch from its completions [B, T], by the names of TRL's inputs.

    The weights are the product of those of the rollout, those of the rows, `distillation_weight` and, for
    `sequence-mean`, one over the row's tokens; `None`: all ones.
    """
    mask = completions["loss_mask"]
    factors: list[Tensor] = []
    if config.rollout_is_clip is not None:
        rollout = rollout_weights(completions, clip=config.rollout_is_clip)
        factors += [] if rollout is None else [rollout.expand(mask.shape)]
    if config.loss_aggregation == "sequence-mean":
        factors.append((1.0 / mask.sum(-1, keepdim=True).clamp(min=1)).expand(mask.shape))
    row_weights = completions.get("row_weights")
    if row_weights is not None:
        row_weights = row_weights.expand(mask.shape)
        factors.append(row_weights)
    if distillation_weight != 1.0:
        factors.append(torch.full(mask.shape, distillation_weight, device=mask.device))
    return Targets(
        tokens=completions["completion_ids"],
        loss_mask=mask,
        old_log_probs=completions.get("old_per_token_logps"),
        weights=reduce(torch.mul, factors) if factors else None,
        row_weights=row_weights,
        policy=policy_targets(completions),
        rollout_log_probs=None if config.rollout_is_clip is None else uncorrected_log_probs(completions),
    )


def rollout_weights(completions: Mapping[str, Tensor], *, clip: float) -> Tensor | None:
    """Detached weights [B, T] or [B, 1] for the difference of trainer and inference engine; `None` without one.

    TRL's own ratio, where it computed one, truncated at `clip`; otherwise min(π_old/π_rollout, clip) per token.
    A token that the engine could not score (NaN) has weight 1.
    """
    ratio = completions.get("importance_sampling_ratio")
    if ratio is not None:
        return ratio.detach().float().nan_to_num(1.0).clamp(max=clip)
    old, rollout = completions.get("old_per_token_logps"), completions.get("sampling_per_token_logps")
    if old is None or rollout is None:
        return None
    return sdpo.importance_weights(old.float(), rollout.float(), clip=clip)


def uncorrected_log_probs(completions: Mapping[str, Tensor]) -> Tensor | None:
    """The inference engine's log-probabilities [B, T] of an on-policy batch; `None` without any.

    The trainer then computes no log-probabilities of its own, and `rollout_weights` has nothing to compare with.
    """
    corrected = ("importance_sampling_ratio", "old_per_token_logps")
    return (
        None
        if any(name in completions for name in corrected)
        else completions.get("sampling_per_token_logps")
    )


def correct_rollout(config: SDPOConfig, targets: Targets, log_probs: Tensor) -> Targets:
    """On-policy the student is π_old: its `log_probs` [B, T], detached, give the weights min(π/π_rollout, clip)."""
    if targets.rollout_log_probs is None or config.rollout_is_clip is None:
        return targets
    weights = sdpo.importance_weights(log_probs, targets.rollout_log_probs, clip=config.rollout_is_clip)
    return targets._replace(weights=weights if targets.weights is None else targets.weights * weights)


def fused(
    config: SDPOConfig,
    student: sdpo.LMHead,
    teachers: Sequence[sdpo.LMHead],
    targets: Targets,
    *,
    temperature: float,
    transform: HeadTransform,
    term: PolicyTerm | None = None,
    entropy_mask: EntropyMask | None = None,
) -> StepLoss:
    """The fused loss over hidden states. Two `teachers` are the reference and the live model of a trust region.

    GRPO's part is computed in the pass of the divergence, or, where it `needs_log_probs`, from those that a second
    pass gives with their gradient.
    """
    head: dict[str, Any] = {
        "temperature": temperature,
        "softcap": transform.softcap,
        "logit_scale": transform.logit_scale,
        "chunk_size": config.loss_chunk_size,
    }
    if targets.rollout_log_probs is not None:
        # The weights of GRPO's part are others, so the loss cannot compute these with its own log-probabilities.
        with torch.no_grad():
            log_probs = sdpo.fused_log_probs(student, targets.tokens, loss_mask=targets.loss_mask, **head)
        targets = correct_rollout(config, targets, log_probs)
    reference = teachers[0] if len(teachers) == 2 else None
    is_clip = None if targets.old_log_probs is None else config.is_clip
    in_pass = None if term is None or term.needs_log_probs else term
    # Evidence weighs the policy loss: the loss of each token is then multiplied by it afterwards.
    summed = in_pass is None or config.token_weights != "evidence"
    output = sdpo.fused_distillation_loss(
        student,
        teachers[-1],
        targets.tokens,
        support=config.support,
        k=config.k if config.uses_topk else None,
        tail=config.tail if config.uses_topk else None,
        alpha=config.alpha,
        old_log_probs=None if is_clip is None and in_pass is None else targets.old_log_probs,
        is_clip=is_clip,
        reference=reference,
        trust_region_coef=None if reference is None else config.trust_region_coef,
        token_fraction=token_weights.kept_fraction(config) if summed else None,
        token_weights=token_weights.weights_of_kept(config) if summed else None,
        reduction="sum" if summed else "none",
        backend="auto" if config.loss_backend == "logits" else config.loss_backend,
        **head,
        **_fused_weights(targets, in_pass),
    )
    if term is None and not config.weighs_tokens:
        return StepLoss(output.total, output.metrics, _token_values(output.per_token, output))
    losses = _TokenLosses(output.per_token, output.weights, output, weighed=summed)
    if in_pass is not None:
        losses = losses._replace(policy_loss=output.policy_loss, sampled=SampledTokens(output.log_probs))
        loss = _weighted_sum(config, targets, term, losses)
        return loss._replace(total=output.total) if summed else loss
    if term is not None and targets.policy is not None:
        if term.needs_entropy:
            values = sdpo.fused_log_probs_and_entropy(
                student, targets.tokens, loss_mask=targets.policy.mask, **head
            )
            sampled = SampledTokens(values.log_probs, values.entropy)
        else:
            sampled = SampledTokens(
                sdpo.fused_log_probs(student, targets.tokens, loss_mask=targets.policy.mask, **head)
            )
        losses = _with_policy_loss(losses, term, targets, targets.policy, sampled, entropy_mask)
    return _weighted_sum(config, targets, term, losses, divergence=output.total)


def _fused_weights(targets: Targets, term: PolicyTerm | None) -> dict[str, Any]:
    """Mask and weights; with GRPO's part those of one pass over the tokens of both parts."""
    if term is None or targets.policy is None:
        return {"loss_mask": targets.loss_mask, "weights": targets.weights}
    distillation = torch.ones_like(targets.policy.weights) if targets.weights is None else targets.weights
    weights = distillation.masked_fill(~targets.loss_mask, 0.0) + targets.policy.weights
    ranges: dict[str, Any] = {"sapo_temperatures": term.sapo_temperatures}
    if term.surrogate != "sapo":
        ranges = {"clip_low": term.clip_low, "clip_high": term.clip_high}
    return {
        "loss_mask": targets.loss_mask | targets.policy.mask,
        "weights": weights,
        "advantages": targets.policy.advantages,
        "policy_weight": targets.policy.weights / weights.masked_fill(weights == 0.0, 1.0),
        "surrogate": term.surrogate,
        **ranges,
    }


def from_logits(
    config: SDPOConfig,
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    targets: Targets,
    *,
    temperature: float,
    term: PolicyTerm | None = None,
    entropy_mask: EntropyMask | None = None,
    reference_logits: Tensor | None = None,
) -> StepLoss:
    """The same loss from whole logits [B, T, V], for LM heads and options that cannot be fused."""
    student, teacher = student_logits.float(), teacher_logits[0].float()
    if len(teacher_logits) == 2:
        teacher = sdpo.trust_region_logits(teacher, teacher_logits[1].float(), coef=config.trust_region_coef)
    k = config.k if config.uses_topk else None
    per_token = token_divergence(config, student, teacher, targets, temperature=temperature)
    statistics = sdpo.token_statistics(
        student, teacher, targets.tokens, support=config.support, k=k, temperature=temperature
    )
    targets = correct_rollout(config, targets, statistics.log_probs)
    old_log_probs = targets.old_log_probs
    weights = torch.ones_like(statistics.log_probs) if targets.weights is None else targets.weights
    if old_log_probs is not None and config.is_clip is not None:
        weights = weights * sdpo.importance_weights(statistics.log_probs, old_log_probs, clip=config.is_clip)
    losses = _TokenLosses(per_token, weights, statistics)
    if term is not None and targets.policy is not None:
        found = entropy(student, temperature) if term.needs_entropy else None
        sampled = SampledTokens(sampled_log_probs(student, targets.tokens, temperature), found)
        losses = _with_policy_loss(losses, term, targets, targets.policy, sampled, entropy_mask)
    loss = _weighted_sum(config, targets, term, losses)
    if reference_logits is None:
        return loss
    distance = anchor(student, reference_logits, temperature=temperature)
    mask = targets.loss_mask
    weighted = sdpo.self_distillation_loss(distance, mask, row_mask=mask.any(dim=-1), weights=targets.weights)
    return loss._replace(
        total=loss.total + config.anchor_weight * weighted.total,
        metrics={**loss.metrics, "anchor": weighted.metrics["divergence"]},
    )


def _with_policy_loss(
    losses: _TokenLosses,
    term: PolicyTerm,
    targets: Targets,
    policy: PolicyTargets,
    sampled: SampledTokens,
    entropy_mask: EntropyMask | None,
) -> _TokenLosses:
    """The losses with GRPO's, computed from what the student says about the sampled tokens."""
    if entropy_mask is not None and sampled.entropy is not None:
        sampled = sampled._replace(has_policy_loss=entropy_mask(sampled.entropy.detach(), policy.mask))
    loss = policy_loss(term, sampled.log_probs, targets.old_log_probs, policy)
    return losses._replace(policy_loss=loss, sampled=sampled)


def _weighted_sum(
    config: SDPOConfig,
    targets: Targets,
    term: PolicyTerm | None,
    losses: _TokenLosses,
    *,
    divergence: Tensor | None = None,
) -> StepLoss:
    """Both parts of the loss over their tokens with their weights, and their metrics.

    Args:
        config: of the run.
        targets: of the micro-batch.
        term: GRPO's part; `None` without.
        losses: of each token.
        divergence: [] weighted sum of the divergence, where the losses of the tokens carry no gradient.
    """
    mask, weights, statistics = targets.loss_mask, losses.weights, losses.statistics
    others: dict[str, Tensor] = {}
    evidence = None
    if targets.old_log_probs is not None and config.is_clip is not None:
        ratio = (statistics.log_probs - targets.old_log_probs).exp()
        others["is_clip_fraction"] = (ratio > config.is_clip).float()
    if config.weighs_tokens:
        others["token_weight"] = token_weights.divergence_factors(config, statistics, losses.per_token, mask)
        weights = weights if losses.weighed else weights * others["token_weight"]
    if config.token_weights == "evidence" and targets.policy is not None:
        evidence = token_weights.evidence_factors(config, statistics, mask, targets.policy.advantages)
        others["token_weight"] = evidence
    loss = sdpo.self_distillation_loss(losses.per_token, mask, row_mask=mask.any(dim=-1), weights=weights)
    metrics = sdpo.mean_metrics(losses.per_token, weights, statistics, mask=mask, **others)
    tokens = _token_values(losses.per_token, statistics)
    total = loss.total if divergence is None else divergence
    if term is None or targets.policy is None or losses.policy_loss is None or losses.sampled is None:
        return StepLoss(total, metrics, tokens)
    weighted = losses.policy_loss if evidence is None else losses.policy_loss * evidence
    policy = policy_sum(term, targets.policy, weighted, losses.sampled, targets.old_log_probs)
    return StepLoss(total + policy.total, metrics, tokens, policy.total.detach(), policy.metrics)


def _token_values(per_token: Tensor, statistics: sdpo.TokenStatistics | sdpo.FusedOutput) -> TokenValues:
    return TokenValues(per_token.detach(), statistics.log_probs, statistics.teacher_log_probs)


# Metrics of the core that are logged: always, and with a top-K support.
_LOGGED = (
    "divergence",
    "student_entropy",
    "teacher_entropy",
    "sampled_token_log_ratio",
    "sampled_token_agreement",
)
_LOGGED_WITH_TOPK = ("student_topk_mass", "teacher_topk_mass", "student_tail_mass", "teacher_tail_mass")


def step_metrics(config: SDPOConfig, output: StepLoss, targets: Targets) -> dict[str, tuple[Tensor, Tensor]]:
    """The metrics of a micro-batch as (sum over its active tokens, their number)."""
    names = [*_LOGGED]
    if config.uses_topk:
        names += _LOGGED_WITH_TOPK
    if targets.old_log_probs is not None and config.is_clip is not None:
        names.append("is_clip_fraction")
    if config.weighs_tokens:
        names.append("token_weight")
    if config.anchor_weight > 0.0:
        names.append("anchor")
    count = output.metrics["active_tokens"]
    means = {name: output.metrics[name] for name in names}
    if targets.row_weights is not None:
        means["row_weight"] = sdpo.token_sum(targets.row_weights, targets.loss_mask).mean()
    sums = {name: (mean * count, count) for name, mean in means.items()}
    return {f"self_distillation/{name}": pair for name, pair in {**sums, **output.policy_metrics}.items()}
