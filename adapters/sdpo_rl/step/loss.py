"""The loss of one micro-batch: the core's losses, called with hidden states or with logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import sdpo

from ..config import SDPOConfig
from . import token_weights
from .head import HeadTransform


class Targets(NamedTuple):
    """What the loss needs besides the outputs of both models, all [B, T]."""

    tokens: Tensor
    loss_mask: Tensor
    old_log_probs: Tensor | None
    weights: Tensor | None
    row_weights: Tensor | None = None  # part of the weights


def loss_targets(config: SDPOConfig, completions: Mapping[str, Tensor]) -> Targets:
    """The targets of a micro-batch from its completions [B, T], by the names of TRL's inputs.

    The weights are the product of those of the rollout, those of the rows and, for `sequence-mean`, one over the
    row's tokens; `None`: all ones.
    """
    mask = completions["loss_mask"]
    weights = None
    if config.rollout_is_clip is not None:
        weights = rollout_weights(completions, clip=config.rollout_is_clip)
    if weights is not None:
        weights = weights.expand(mask.shape)
    if config.loss_aggregation == "sequence-mean":
        per_row = (1.0 / mask.sum(-1, keepdim=True).clamp(min=1)).expand(mask.shape)
        weights = per_row if weights is None else weights * per_row
    row_weights = completions.get("row_weights")
    if row_weights is not None:
        row_weights = row_weights.expand(mask.shape)
        weights = row_weights if weights is None else weights * row_weights
    old_log_probs = completions.get("old_per_token_logps")
    return Targets(completions["completion_ids"], mask, old_log_probs, weights, row_weights)


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


def fused(
    config: SDPOConfig,
    student: sdpo.LMHead,
    teachers: Sequence[sdpo.LMHead],
    targets: Targets,
    *,
    temperature: float,
    transform: HeadTransform,
) -> sdpo.FusedOutput | sdpo.LossOutput:
    """The fused loss over hidden states. Two `teachers` are the centre and the live model of a trust region."""
    reference = teachers[0] if len(teachers) == 2 else None
    old_log_probs = targets.old_log_probs if config.is_clip is not None else None
    output = sdpo.fused_distillation_loss(
        student,
        teachers[-1],
        targets.tokens,
        support=config.support,
        k=config.k if config.uses_topk else None,
        tail=config.tail if config.uses_topk else None,
        alpha=config.alpha,
        temperature=temperature,
        loss_mask=targets.loss_mask,
        old_log_probs=old_log_probs,
        is_clip=config.is_clip if old_log_probs is not None else None,
        weights=targets.weights,
        softcap=transform.softcap,
        logit_scale=transform.logit_scale,
        reference=reference,
        trust_region_coef=None if reference is None else config.trust_region_coef,
        reduction="none" if config.weighs_tokens else "sum",
        chunk_size=config.loss_chunk_size,
        backend="auto" if config.loss_backend == "logits" else config.loss_backend,
    )
    if not config.weighs_tokens:
        return output
    mask = targets.loss_mask
    weights = token_weights.distillation_weights(config, output, mask)
    loss = sdpo.self_distillation_loss(
        output.per_token, mask, row_mask=mask.any(dim=-1), weights=output.weights * weights
    )
    return loss._replace(metrics=output.metrics | {"token_weight": _mean(weights, mask)})


def from_logits(
    config: SDPOConfig,
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    targets: Targets,
    *,
    temperature: float,
) -> sdpo.LossOutput:
    """The same loss from whole logits [B, T, V], for LM heads that cannot be fused."""
    student, teacher = student_logits.float(), teacher_logits[0].float()
    if len(teacher_logits) == 2:
        teacher = sdpo.trust_region_logits(teacher, teacher_logits[1].float(), coef=config.trust_region_coef)
    k = config.k if config.uses_topk else None
    per_token = sdpo.distillation_loss(
        student,
        teacher,
        tokens=targets.tokens if config.support == "sampled" else None,
        support=config.support,
        k=k,
        tail=config.tail if config.uses_topk else None,
        alpha=config.alpha,
        temperature=temperature,
    )
    statistics = sdpo.token_statistics(
        student, teacher, targets.tokens, support=config.support, k=k, temperature=temperature
    )
    weights = torch.ones_like(statistics.log_probs) if targets.weights is None else targets.weights
    clipped = {}
    if targets.old_log_probs is not None and config.is_clip is not None:
        weights = weights * sdpo.importance_weights(
            statistics.log_probs, targets.old_log_probs, clip=config.is_clip
        )
        ratio = (statistics.log_probs - targets.old_log_probs).exp()
        clipped["is_clip_fraction"] = (ratio > config.is_clip).float()
    mask = targets.loss_mask
    others = clipped
    if config.weighs_tokens:
        others = clipped | {"token_weight": token_weights.distillation_weights(config, statistics, mask)}
        weights = weights * others["token_weight"]
    loss = sdpo.self_distillation_loss(per_token, mask, row_mask=mask.any(dim=-1), weights=weights)
    return loss._replace(metrics=sdpo.mean_metrics(per_token, weights, statistics, mask=mask, **others))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return sdpo.token_sum(values.detach(), mask).mean()


# Metrics of the core that are logged: always, and with a top-K support.
_LOGGED = (
    "divergence",
    "student_entropy",
    "teacher_entropy",
    "sampled_token_log_ratio",
    "sampled_token_agreement",
)
_LOGGED_WITH_TOPK = ("student_topk_mass", "teacher_topk_mass", "student_tail_mass", "teacher_tail_mass")


def step_metrics(
    config: SDPOConfig, output: sdpo.FusedOutput | sdpo.LossOutput, targets: Targets
) -> dict[str, tuple[Tensor, Tensor]]:
    """The metrics of a micro-batch as (sum over its active tokens, their number)."""
    names = [*_LOGGED]
    if config.uses_topk:
        names += _LOGGED_WITH_TOPK
    if targets.old_log_probs is not None and config.is_clip is not None:
        names.append("is_clip_fraction")
    if config.weighs_tokens:
        names.append("token_weight")
    count = output.metrics["active_tokens"]
    means = {name: output.metrics[name] for name in names}
    if targets.row_weights is not None:
        means["row_weight"] = _mean(targets.row_weights, targets.loss_mask)
    return {f"self_distillation/{name}": (mean * count, count) for name, mean in means.items()}
