"""Twelve methods of distillation and policy optimization, each composed of a few functions of `sdpo`.

Every function takes tensors and returns the scalar loss of one batch::

    student_logits, teacher_logits    [B, T, V] at the completion tokens; only the student's carry a gradient
    tokens, loss_mask                 [B, T] sampled ids, and which of them count
    old_log_probs                     [B, T] log-probability of the sampled tokens when they were sampled
    rewards, success, group_ids       [B] score, whether it is a success, which prompt
    row_mask, has_teacher             [B] whether there was anything to show to the teacher

The temperature divides both models' logits; old_log_probs are at the same temperature. What else distinguishes the
methods is outside the loss: whose completions are trained on, what the teacher reads, whose weights it has.
README.md says so for each. Here a batch is a step. To split a step, add up totals and counts and divide once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sdpo

# Settings of the SDPO paper: section 3 (generalization), 4 (rich feedback) and 5 (one question at test time).
SDPO_SETTINGS = {
    "generalization": dict(alpha=0.5, k=100),
    "rich feedback": dict(alpha=1.0, k=20),
    "test time": dict(alpha=1.0, k=20),
}


def gkd(
    student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """GKD, arXiv 2306.13649, section 3: mean over tokens of JSD_alpha(teacher, student)."""
    per_token = sdpo.distillation_loss(
        student_logits, teacher_logits, support="full", alpha=alpha, temperature=temperature
    )
    return sdpo.token_sum(per_token, loss_mask).mean()


def on_policy_distillation(
    student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, loss_mask: Tensor, *, temperature: float
) -> Tensor:
    """On-policy distillation (Thinking Machines, 2025): log p(y) − log q(y), with the gradient of KL(p‖q)."""
    student = sampled_log_probs(student_logits, tokens, temperature)
    teacher = sampled_log_probs(teacher_logits, tokens, temperature)
    return sdpo.token_sum(sdpo.sampled_reverse_kl(student, teacher), loss_mask).mean()


def sdft(student_logits: Tensor, teacher_logits: Tensor, loss_mask: Tensor, *, temperature: float) -> Tensor:
    """SDFT, arXiv 2601.19897: mean over tokens of KL(p‖q), q being the student with a demonstration."""
    per_token = sdpo.distillation_loss(
        student_logits, teacher_logits, support="full", alpha=1.0, temperature=temperature
    )
    return sdpo.token_sum(per_token, loss_mask).mean()


def opsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    loss_mask: Tensor,
    *,
    alpha: float,
    clip: float,
    temperature: float,
) -> Tensor:
    """OPSD, arXiv 2601.18734: mean over tokens of Σ_v min(d_v, clip), d the entries of JSD_alpha."""
    student = tempered(student_logits, temperature).log_softmax(dim=-1)
    teacher = tempered(teacher_logits.detach(), temperature).log_softmax(dim=-1)
    return sdpo.token_sum(sdpo.clip_entries(student, teacher, alpha=alpha, clip=clip), loss_mask).mean()


def sdpo_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor,
    loss_mask: Tensor,
    *,
    row_mask: Tensor,
    alpha: float,
    k: int,
    is_clip: float,
    temperature: float,
) -> Tensor:
    """SDPO, arXiv 2601.20802, section 2: top-K divergence with a tail bucket, weighted off-policy."""
    per_token = sdpo.distillation_loss(
        student_logits,
        teacher_logits,
        support="student",
        k=k,
        tail="bucket",
        alpha=alpha,
        temperature=temperature,
    )
    log_probs = sampled_log_probs(student_logits, tokens, temperature)
    weights = sdpo.importance_weights(log_probs, old_log_probs, clip=is_clip)
    return sdpo.self_distillation_loss(per_token, loss_mask, row_mask=row_mask, weights=weights).mean()


def sdpo_hybrid(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor,
    loss_mask: Tensor,
    *,
    row_mask: Tensor,
    advantages: Tensor,
    weight: float,
    clip_low: float,
    clip_high: float,
    temperature: float,
    **objective: Any,
) -> Tensor:
    """SDPO with GRPO, arXiv 2601.20802, section 4.5: λ times GRPO's loss and 1 − λ times SDPO's."""
    rollout = (tokens, old_log_probs, loss_mask)
    distillation = sdpo_loss(
        student_logits, teacher_logits, *rollout, row_mask=row_mask, temperature=temperature, **objective
    )
    log_probs = sampled_log_probs(student_logits, tokens, temperature)
    policy = sdpo.clipped_policy_gradient(
        log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_high
    )
    return weight * sdpo.token_sum(policy, loss_mask).mean() + (1.0 - weight) * distillation


def sc_sdpo(
    student_logits: Tensor,
    teacher_logits: Tensor,
    loss_mask: Tensor,
    *,
    row_mask: Tensor,
    success: Tensor,
    group_ids: Tensor,
    alpha: float,
    k: int,
    temperature: float,
) -> Tensor:
    """SC-SDPO, arXiv 2605.27765: SDPO times √(p(1−p)) of the prompt's pass rate p, over the batch's mean."""
    per_token = sdpo.distillation_loss(
        student_logits,
        teacher_logits,
        support="student",
        k=k,
        tail="bucket",
        alpha=alpha,
        temperature=temperature,
    )
    weights = sdpo.pass_rate_weights(success, group_ids).unsqueeze(-1).expand_as(per_token)
    return sdpo.self_distillation_loss(per_token, loss_mask, row_mask=row_mask, weights=weights).mean()


def srpo(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor,
    loss_mask: Tensor,
    *,
    success: Tensor,
    has_teacher: Tensor,
    advantages: Tensor,
    alpha: float,
    k: int,
    beta: float,
    clip_low: float,
    clip_high: float,
    temperature: float,
) -> Tensor:
    """SRPO, arXiv 2604.02288, section 3.3: GRPO or SDPO weighted by exp(−βH(q)), over all routed tokens."""
    policy_rows, distilled_rows = sdpo.route_rows(success, has_teacher)
    log_probs = sampled_log_probs(student_logits, tokens, temperature)
    policy = sdpo.clipped_policy_gradient(
        log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_high
    )
    distillation = sdpo.distillation_loss(
        student_logits,
        teacher_logits,
        support="student",
        k=k,
        tail="bucket",
        alpha=alpha,
        temperature=temperature,
    )
    distilled = loss_mask & distilled_rows.unsqueeze(-1)
    weights = sdpo.confidence_weights(entropy(teacher_logits, temperature), distilled, beta=beta)
    total = sdpo.token_sum(policy, loss_mask & policy_rows.unsqueeze(-1)).total
    total = total + sdpo.token_sum(weights * distillation, distilled).total
    return total / loss_mask.sum().clamp(min=1)


def rlsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor,
    loss_mask: Tensor,
    *,
    advantages: Tensor,
    mix: float,
    evidence_clip: float,
    clip_low: float,
    clip_high: float,
    temperature: float,
) -> Tensor:
    """RLSD, arXiv 2604.03128: GRPO with A·[(1−λ) + λ·clip(exp(sign(A)·Δ), 1−ε, 1+ε)] per token."""
    log_probs = sampled_log_probs(student_logits, tokens, temperature)
    teacher = sampled_log_probs(teacher_logits, tokens, temperature)
    per_token = sdpo.evidence_weights(advantages, log_probs, teacher, mix=mix, clip=evidence_clip)
    loss = sdpo.clipped_policy_gradient(
        log_probs, old_log_probs, per_token, clip_low=clip_low, clip_high=clip_high
    )
    return sdpo.token_sum(loss, loss_mask).mean()


def sdar(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor,
    loss_mask: Tensor,
    *,
    advantages: Tensor,
    coef: float,
    beta: float,
    clip_low: float,
    clip_high: float,
    temperature: float,
) -> Tensor:
    """SDAR, arXiv 2605.15155: GRPO + coef · mean of σ(βΔ)·(log q(y) − log p(y)), the gate detached."""
    log_probs = sampled_log_probs(student_logits, tokens, temperature)
    teacher = sampled_log_probs(teacher_logits, tokens, temperature).detach()
    policy = sdpo.clipped_policy_gradient(
        log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_high
    )
    gated = sdpo.evidence_gate(log_probs, teacher, beta=beta) * (teacher - log_probs)
    return sdpo.token_sum(policy + coef * gated, loss_mask).mean()


def sdpg(
    student_logits: Tensor,
    teacher_logits: Tensor,
    reference_log_probs: Tensor,
    tokens: Tensor,
    old_log_probs: Tensor,
    loss_mask: Tensor,
    *,
    advantages: Tensor,
    distillation_coef: float,
    reference_coef: float,
    clip_low: float,
    clip_high: float,
    temperature: float,
) -> Tensor:
    """SDPG, arXiv 2606.04036: GRPO + β·1[A>0]·KL(p‖q) + α·½·log²(p(y)/p_0(y)), the mean over tokens."""
    log_probs = sampled_log_probs(student_logits, tokens, temperature)
    policy = sdpo.clipped_policy_gradient(
        log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_high
    )
    distillation = sdpo.distillation_loss(
        student_logits, teacher_logits, support="full", alpha=1.0, temperature=temperature
    )
    rewarded = (advantages > 0).unsqueeze(-1)
    reference = 0.5 * (log_probs - reference_log_probs.detach()).square()
    terms = policy + distillation_coef * distillation.where(rewarded, 0.0) + reference_coef * reference
    return sdpo.token_sum(terms, loss_mask).mean()


def rlcsd(
    student_log_probs: Tensor,
    right_log_probs: Tensor,
    wrong_log_probs: Tensor,
    old_log_probs: Tensor,
    loss_mask: Tensor,
    *,
    right_mask: Tensor,
    wrong_mask: Tensor,
    advantages: Tensor,
    squash: float,
    size: float,
    threshold: float,
    coef: float,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """RLCSD, arXiv 2606.11709: GRPO, and apart from it the tokens whose A moved by λ·tanh(evidence/τ)."""
    evidence = sdpo.contrastive_evidence(right_log_probs, wrong_log_probs, wrong_mask)
    shift = (size * (evidence / squash).tanh()).where(right_mask.unsqueeze(-1), 0.0)
    plain = advantages.unsqueeze(-1).expand_as(shift)
    shifted = (plain.sign() * (plain + shift)).clamp(min=0.0) * plain.sign()
    moved = loss_mask & (shift.abs() > threshold)
    options = dict(clip_low=clip_low, clip_high=clip_high)
    unmoved_loss = sdpo.clipped_policy_gradient(student_log_probs, old_log_probs, plain, **options)
    moved_loss = sdpo.clipped_policy_gradient(student_log_probs, old_log_probs, shifted, **options)
    unmoved = sdpo.token_sum(unmoved_loss, loss_mask & ~moved).mean()
    return unmoved + coef * sdpo.token_sum(moved_loss, moved).mean()


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits at the temperature of the rollout, in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def sampled_log_probs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Log-probability [B, T] of the sampled tokens."""
    return sdpo.gather_log_probs(tempered(logits, temperature), tokens.unsqueeze(-1)).log_probs.squeeze(-1)


def entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy [B, T] in nats of the next-token distributions."""
    return torch.special.entr(tempered(logits, temperature).softmax(dim=-1)).sum(dim=-1)
