"""The loss of one micro-batch: the core's losses, fed from a model's hidden states or logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdpo

from ..config import SDPOConfig
from .forward import CompletionStates, HeadTransform


class Targets(NamedTuple):
    """What the loss needs beside the two models' outputs, all [B, T]."""

    tokens: Tensor
    loss_mask: Tensor
    old_log_probs: Tensor | None
    weights: Tensor | None


def fused(
    config: SDPOConfig,
    student: CompletionStates,
    teachers: Sequence[CompletionStates],
    targets: Targets,
    *,
    temperature: float,
    transform: HeadTransform,
) -> sdpo.FusedOutput:
    """The fused loss over hidden states. Two `teachers` are the centre and the live model of a trust region."""
    reference = teachers[0] if len(teachers) == 2 else None
    old_log_probs = targets.old_log_probs if config.is_clip is not None else None
    return sdpo.fused_distillation_loss(
        _lm_head(student),
        _lm_head(teachers[-1]),
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
        reference=None if reference is None else _lm_head(reference),
        trust_region_coef=None if reference is None else config.trust_region_coef,
        chunk_size=config.loss_chunk_size,
        backend="auto" if config.loss_backend == "logits" else config.loss_backend,
    )


def _lm_head(states: CompletionStates) -> sdpo.LMHead:
    return sdpo.LMHead(states.hidden, states.head.weight, states.head.bias)


def rollout_weights(rows: Mapping[str, Tensor], *, clip: float) -> Tensor | None:
    """Detached weights [B, T] or [B, 1] for the gap between trainer and inference engine; `None` without one.

    TRL's own ratio, where it computed one, truncated at `clip`; otherwise min(π_old/π_rollout, clip) per token.
    A token that the engine could not score (NaN) weighs 1.
    """
    ratio = rows.get("importance_sampling_ratio")
    if ratio is not None:
        return ratio.detach().float().nan_to_num(1.0).clamp(max=clip)
    old, rollout = rows.get("old_per_token_logps"), rows.get("sampling_per_token_logps")
    if old is None or rollout is None:
        return None
    return sdpo.importance_weights(old.float(), rollout.float(), clip=clip)


def from_logits(
    config: SDPOConfig,
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    targets: Targets,
    *,
    temperature: float,
) -> Any:
    """The same loss from whole logits [B, T, V], for heads that cannot be fused."""
    p = student_logits.float() / temperature
    q = teacher_logits[0].float() / temperature
    if len(teacher_logits) == 2:
        live = teacher_logits[1].float() / temperature
        q = sdpo.trust_region_logits(q, live, coef=config.trust_region_coef)
    if config.support == "full":
        per_token = sdpo.full_distillation_loss(p, q, alpha=config.alpha)
    elif config.support == "sampled":
        per_token = sdpo.sampled_token_distillation_loss(p, q, targets.tokens)
    else:
        per_token = sdpo.topk_distillation_loss(
            p,
            q,
            k=config.k,
            alpha=config.alpha,
            tail=config.tail,
            support=config.support,
        )
    log_p, log_q = p.detach().log_softmax(-1), q.log_softmax(-1)
    tokens = targets.tokens[..., None]
    log_probs = log_p.gather(-1, tokens).squeeze(-1)
    weights = torch.ones_like(log_probs) if targets.weights is None else targets.weights
    if targets.old_log_probs is not None and config.is_clip is not None:
        weights = weights * sdpo.importance_weights(log_probs, targets.old_log_probs, clip=config.is_clip)
    mask = targets.loss_mask
    k = min(config.k, p.shape[-1])
    top = sdpo.topk_log_probs(q if config.support == "teacher" else p.detach(), k=k)
    inside_p, inside_q = (sdpo.gather_log_probs(x, top.indices) for x in (p.detach(), q))
    return LogitsOutput(
        total=torch.where(mask, per_token * weights, 0.0).sum(),
        per_token=per_token.detach(),
        log_probs=log_probs,
        teacher_log_probs=log_q.gather(-1, tokens).squeeze(-1),
        student_entropy=_entropy(log_p),
        teacher_entropy=_entropy(log_q),
        student_topk_mass=inside_p.log_probs.exp().sum(-1),
        teacher_topk_mass=inside_q.log_probs.exp().sum(-1),
        student_log_tail=inside_p.log_tail,
        teacher_log_tail=inside_q.log_tail,
    )


class LogitsOutput(NamedTuple):
    """What `from_logits` and the fused losses have in common; all but `total` are [B, T] without gradient."""

    total: Tensor
    per_token: Tensor
    log_probs: Tensor
    teacher_log_probs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_topk_mass: Tensor
    teacher_topk_mass: Tensor
    student_log_tail: Tensor
    teacher_log_tail: Tensor


def _entropy(log_probs: Tensor) -> Tensor:
    return -torch.where(log_probs.isneginf(), 0.0, log_probs.exp() * log_probs).sum(-1)


def step_metrics(config: SDPOConfig, output: Any, targets: Targets) -> dict[str, tuple[Tensor, Tensor]]:
    """The per-token metrics of a micro-batch as (sum, weight) pairs over its active tokens."""
    mask = targets.loss_mask
    count = mask.sum()
    gap = output.teacher_log_probs - output.log_probs
    values = {
        "divergence": output.per_token,
        "student_entropy": output.student_entropy,
        "teacher_entropy": output.teacher_entropy,
        "sampled_token_log_ratio": gap,
        "sampled_token_agreement": (gap >= 0).float(),
    }
    if config.uses_topk:
        values["student_topk_mass"] = output.student_topk_mass
        values["teacher_topk_mass"] = output.teacher_topk_mass
        values["student_tail_mass"] = output.student_log_tail.exp()
        values["teacher_tail_mass"] = output.teacher_log_tail.exp()
    if targets.old_log_probs is not None and config.is_clip is not None:
        ratio = (output.log_probs - targets.old_log_probs).exp()
        values["is_clip_fraction"] = (ratio > config.is_clip).float()
    return {
        f"self_distillation/{name}": (torch.where(mask, value, 0.0).sum(), count)
        for name, value in values.items()
    }
