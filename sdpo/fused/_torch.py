"""One chunk of the fused loss in plain torch: any device, any dtype, and the reference for the kernels.

The gradient of a divergence L w.r.t. the logits z. The categories are the K tokens of the support and, with a
bucket, the tail. Let x_j be the log-probability of category j, g_j = ∂L/∂x_j with the x_j taken as independent,
and G = Σ_j g_j. All x_j share the normalizer log Σ exp z, whose derivative w.r.t. z_v is p_v. The tail's x also
contains log Σ_{v outside} exp z_v, whose derivative is the softmax over the tokens outside. With
grad_j = g_j − G·p_j,

    ∂L/∂z_v = grad_v                               v inside the support
    ∂L/∂z_v = grad_tail · softmax_outside(z)_v     v outside

Nothing is divided by a nearly empty tail, and the tail is never computed as 1 − Σp. The policy gradient has the
same form, but for the sampled token where it is outside the support: its gradient is written by itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo._numerics import logaddexp, logsumexp
from sdpo.fused._given import given_at_support
from sdpo.fused._policy import policy_scale
from sdpo.fused._types import (
    AtSupport,
    GradLogits,
    ModelChunk,
    Objective,
    Project,
    ProjectTeacher,
    TokenInputs,
    TokenStats,
)
from sdpo.given import TeacherTopK
from sdpo.importance import importance_weights


def chunk_loss(
    project_student: Project,
    project_teacher: ProjectTeacher,
    tokens: TokenInputs,
    objective: Objective,
    stats: Tensor,
    grad_logits: GradLogits | None,
) -> None:
    """Fill ``stats`` [len(TokenStats), C] and, unless None, ``grad_logits``.

    The gradient is that of Σ weights · per_token w.r.t. the student's products. The products of both models are
    overwritten; ``grad_logits.values`` may be the student's.
    """
    student, teacher, token = project_student(), project_teacher(), tokens.tokens[:, None]
    z_student = logits_from_products(student.products, student.bias, student.accumulation_bias, objective)
    token_student = z_student.gather(1, token)
    if isinstance(teacher, TeacherTopK):
        support = teacher.ids
        p_split = split_at_support(z_student, support, scratch=torch.empty_like(z_student))
        p = _at_support(p_split, token_student)
        q = given_at_support(teacher, tokens.tokens, p.log_tail, z_student.shape[1])
    else:
        z_teacher = teacher_logits(teacher, objective)
        support = select_support(z_student, z_teacher, tokens.tokens, objective)
        token_teacher = z_teacher.gather(1, token)
        q = _at_support(split_at_support(z_teacher, support), token_teacher)
        p_split = split_at_support(z_student, support, scratch=z_teacher)
        p = _at_support(p_split, token_student)
    if objective.support == "sampled":
        per_token, grad_inside, grad_tail = _sampled_token(p.token_log_prob, q.token_log_prob, p.log_tail)
    else:
        per_token, grad_inside, grad_tail = _divergence_on_support(p, q, objective)
    weights, clipped = _loss_weights(p.token_log_prob, tokens, objective)
    torch.stack(
        TokenStats(
            per_token=per_token,
            weights=weights,
            log_probs=p.token_log_prob,
            teacher_log_probs=q.token_log_prob,
            student_entropy=p.entropy,
            teacher_entropy=q.entropy,
            student_topk_mass=p.log_mass.exp(),
            teacher_topk_mass=q.log_mass.exp(),
            student_log_tail=p.log_tail,
            teacher_log_tail=q.log_tail,
            clipped=clipped,
        ),
        out=stats,
    )
    if tokens.row_factors is not None:
        weights, _ = _loss_weights(p.token_log_prob, tokens.weighed(stats), objective)
        TokenStats(*stats.unbind()).weights.copy_(weights)
    if grad_logits is not None:
        scale = weights if tokens.grad_weights is None else tokens.grad_weights.to(weights.dtype)
        scale = scale if tokens.loss_scale is None else scale * tokens.loss_scale
        # d logits / d products, but for the soft-cap.
        scale = (scale * (objective.logit_scale / objective.temperature))[:, None]
        grad_inside, grad_tail = grad_inside * scale, grad_tail * scale[:, 0]
        of_policy, at_token = policy_scale(p.token_log_prob, tokens, objective), None
        if of_policy is not None:
            grad_inside, grad_tail, grad_token = _add_policy_gradient(
                of_policy, grad_inside, grad_tail, support == token, p
            )
            at_token = token, softcap_backward_(grad_token[:, None], token_student, objective)
        softmax_outside = softcap_backward_(p_split.outside, z_student, objective)
        grad_inside = softcap_backward_(grad_inside, p_split.inside + p_split.anchor, objective)
        _write_grad_logits(grad_logits, support, grad_inside, grad_tail[:, None], softmax_outside, at_token)


def logits_from_products(
    products: Tensor, bias: Tensor | None, accumulation_bias: float, objective: Objective
) -> Tensor:
    """Turn products [C, V] into logits in place: accumulation bias, head bias, scale, soft-cap, temperature."""
    if accumulation_bias != 0.0:
        products.mul_(1.0 / (1.0 - accumulation_bias))
    if bias is not None:
        products.add_(bias.to(products.dtype))
    if objective.softcap is None:
        factor = objective.logit_scale / objective.temperature
        return products if factor == 1.0 else products.mul_(factor)
    capped = products.mul_(objective.logit_scale / objective.softcap).tanh_()
    return capped.mul_(objective.softcap / objective.temperature)


def teacher_logits(teacher: ModelChunk, objective: Objective) -> Tensor:
    """The teacher's logits [C, V]: of a trust region, the mixture of its reference's and the live model's."""
    logits = logits_from_products(teacher.products, teacher.bias, teacher.accumulation_bias, objective)
    coef = objective.trust_region_coef
    if teacher.reference is None or coef is None:
        return logits
    reference = logits_from_products(
        teacher.reference, teacher.reference_bias, teacher.accumulation_bias, objective
    )
    # Not lerp: it subtracts −inf from −inf where a token is impossible.
    return reference.mul_(1 - coef).add_(logits, alpha=coef)


def softcap_backward_(grad: Tensor, logits: Tensor, objective: Objective) -> Tensor:
    """Multiply a gradient w.r.t. soft-capped logits, in place, by 1 − tanh², from the logits themselves."""
    if objective.softcap is None:
        return grad
    capped = logits * (objective.temperature / objective.softcap)
    return grad.mul_(capped.square_().neg_().add_(1.0))


def select_support(student: Tensor, teacher: Tensor, tokens: Tensor, objective: Objective) -> Tensor:
    """Token ids [C, K] of the support: one model's K likeliest, the sampled token, or every token (K = V)."""
    if objective.support == "sampled":
        return tokens[:, None]
    owner = teacher if objective.support == "teacher" else student
    if objective.k is None:
        return torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
    return owner.topk(objective.k, dim=1, sorted=False).indices


class SupportSplit(NamedTuple):
    """Logits [C, V] divided into the K tokens of the support and the rest.

    All but the anchor are relative to the anchor: float32 resolves logits near 50 with three digits less than the
    differences between them.
    """

    anchor: Tensor  # [C, 1] the largest logit of the support
    inside: Tensor  # [C, K] logits of the support
    log_inside: Tensor  # [C] logsumexp over the support
    log_outside: Tensor  # [C] logsumexp over all other tokens; −inf if there are none
    normalizer: Tensor  # [C] logsumexp over the vocabulary
    entropy: Tensor  # [C] nats
    outside: Tensor  # [C, V] softmax over the tokens outside, exactly 0 inside


def split_at_support(logits: Tensor, support: Tensor, scratch: Tensor | None = None) -> SupportSplit:
    """Divide logits [C, V] at token ids [C, K]; overwrites the logits of the support.

    Without ``scratch`` [C, V] for a product, ``outside`` is overwritten as well.
    """
    inside = logits.gather(1, support)
    anchor = inside.amax(dim=1, keepdim=True)
    anchor = anchor.masked_fill(anchor.isneginf(), 0.0)
    inside = inside - anchor
    logits.scatter_(1, support, -math.inf)
    top, top_id = logits.max(dim=1)
    empty = top.isneginf()
    outside = torch.softmax(logits, dim=1).masked_fill_(empty[:, None], 0.0)
    # The softmax of the largest logit outside is exp(top − logsumexp over the tokens outside).
    top_share = outside.gather(1, top_id[:, None])[:, 0].masked_fill(empty, 1.0)
    log_outside = top - anchor[:, 0] - top_share.log()
    log_inside = logsumexp(inside)
    normalizer = logaddexp(log_inside, log_outside)
    # Finite, so that an impossible token adds 0 to the mean logit.
    logits.clamp_(min=torch.finfo(logits.dtype).min)
    mean_outside = torch.mul(outside, logits, out=outside if scratch is None else scratch).sum(dim=1)
    inside_p = (inside - normalizer[:, None]).exp()
    mean = (inside_p * inside.masked_fill(inside.isneginf(), 0.0)).sum(dim=1)
    mean = mean + (log_outside - normalizer).exp() * (mean_outside - anchor[:, 0])
    return SupportSplit(anchor, inside, log_inside, log_outside, normalizer, normalizer - mean, outside)


def _at_support(split: SupportSplit, token_logit: Tensor) -> AtSupport:
    """Normalize a split distribution; ``token_logit`` [C, 1] is the sampled token's."""
    return AtSupport(
        log_probs=split.inside - split.normalizer[:, None],
        log_tail=split.log_outside - split.normalizer,
        log_mass=split.log_inside - split.normalizer,
        token_log_prob=(token_logit - split.anchor)[:, 0] - split.normalizer,
        entropy=split.entropy,
    )


def divergence_and_grad(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """JSD_α of normalized log-probabilities [C, M], p the student's: value [C] and gradient g − G·p [C, M].

    The Kullback–Leibler divergences are summed as Σ p·log(p/q) − p + q: every term is ≥ 0, and an error of the
    normalizers, common to a token's categories, cancels in first order. In the JSD the corrections −p + q cancel
    term by term. Where a divergence is infinite its category sends no gradient, as in the plain loss.
    """
    p, q = log_p.exp(), log_q.exp()
    no_p, no_q = log_p.isneginf(), log_q.isneginf()
    if alpha == 0.0:
        terms = _kl_terms(q, p, (log_q - log_p).masked_fill(no_p | no_q, 0.0), no_q, no_p)
        g = (-q).masked_fill(no_p, 0.0)
    elif alpha == 1.0:
        log_ratio = (log_p - log_q).masked_fill(no_p | no_q, 0.0)
        terms = _kl_terms(p, q, log_ratio, no_p, no_q)
        # g is p·(log_ratio + 1), and 0 where infinite. Here less p, which changes no gradient g − G·p.
        g = p * log_ratio.masked_fill(no_q & ~no_p, -1.0)
    else:
        delta = (log_q - log_p).masked_fill(no_p & no_q, 0.0).clamp(-80.0, 80.0)
        g = (1 - alpha) * p * _log_over_mixture(delta, alpha)
        terms = g + alpha * q * _log_over_mixture(-delta, 1 - alpha)
    return terms.sum(dim=1), _without_cancellation(g - g.sum(dim=1, keepdim=True) * p, p)


def _without_cancellation(grad: Tensor, p: Tensor) -> Tensor:
    """A gradient [C, M] that sums to 0, with that of a category of p > 1/2 as minus the sum of all others.

    Computed as g − G·p it would be a difference of near equals where p is close to 1.
    """
    large = p > 0.5
    return torch.where(large, -grad.masked_fill(large, 0.0).sum(dim=1, keepdim=True), grad)


def _kl_terms(p: Tensor, q: Tensor, log_ratio: Tensor, no_p: Tensor, no_q: Tensor) -> Tensor:
    """p·log(p/q) − p + q: q where p = 0, +inf where p > 0 = q; ``log_ratio`` is finite, 0 in both cases."""
    near = log_ratio.abs() < 1.0
    small = log_ratio.masked_fill(~near, 0.0)
    terms = torch.where(near, p * (small + (-small).expm1()), p * (log_ratio - 1.0) + q)
    return torch.where(no_p, q, terms).masked_fill(no_q & ~no_p, math.inf)


def _log_over_mixture(delta: Tensor, weight: float) -> Tensor:
    """log(p / ((1−w)·p + w·q)) from delta = log q − log p in [−80, 80]; float32 needs no wider interval."""
    near = delta.abs() < 1.0
    small = (weight * delta.masked_fill(~near, 0.0).expm1()).log1p()
    return -torch.where(near, small, ((1 - weight) + weight * delta.exp()).log())


def _divergence_on_support(p: AtSupport, q: AtSupport, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence [C], its gradient on the support [C, K] and of the tail [C]."""
    log_p, log_q = p.log_probs, q.log_probs
    if objective.tail == "bucket":
        log_p = torch.cat([log_p, p.log_tail[:, None]], dim=1)
        log_q = torch.cat([log_q, q.log_tail[:, None]], dim=1)
        per_token, grad = divergence_and_grad(log_p, log_q, objective.alpha)
        return per_token, grad[:, :-1], grad[:, -1]
    if objective.tail == "renormalize":
        log_p, log_q = _renormalize(log_p), _renormalize(log_q)
    per_token, grad = divergence_and_grad(log_p, log_q, objective.alpha)
    return per_token, grad, torch.zeros_like(per_token)


def _renormalize(log_probs: Tensor) -> Tensor:
    log_mass = logsumexp(log_probs)[:, None]
    return log_probs - log_mass.masked_fill(log_mass.isneginf(), 0.0)


def _sampled_token(log_p: Tensor, log_q: Tensor, log_tail_p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The surrogate A·log p with A = log p − log q detached: g = A at the sampled token, 0 elsewhere."""
    impossible = log_p.isneginf()
    infinite = log_q.isneginf() & ~impossible
    advantage = (log_p - log_q).masked_fill(impossible | infinite, 0.0)
    per_token = (advantage * log_p.masked_fill(impossible, 0.0)).masked_fill(infinite, math.inf)
    grad = advantage * log_tail_p.exp()
    return per_token, grad[:, None], -grad


def _loss_weights(log_probs: Tensor, tokens: TokenInputs, objective: Objective) -> tuple[Tensor, Tensor]:
    """Importance weight × the caller's weight [C], and 1 where the importance weight was truncated."""
    weights, clipped = torch.ones_like(log_probs), torch.zeros_like(log_probs)
    if tokens.old_log_probs is not None and objective.is_clip is not None:
        old = tokens.old_log_probs.to(log_probs.dtype)
        weights = importance_weights(log_probs, old, clip=objective.is_clip)
        clipped = (log_probs - old > math.log(objective.is_clip)).to(log_probs.dtype)
    if tokens.weights is not None:
        weights = weights * tokens.weights.to(weights.dtype)
    return weights, clipped


def _add_policy_gradient(
    scale: Tensor, grad_inside: Tensor, grad_tail: Tensor, is_token: Tensor, student: AtSupport
) -> tuple[Tensor, Tensor, Tensor]:
    """Add scale · (1[v = y] − p_v): the gradient on the support [C, K], of the tail [C] and at token y [C].

    The last is 0 where ``is_token`` [C, K] finds the sampled token y in the support.
    """
    log_token = student.token_log_prob
    outside = ~is_token.any(dim=1) & ~log_token.isneginf()
    # The token's share of the divergence's tail, and 1 − p.
    share = (log_token - student.log_tail).masked_fill(~outside, -math.inf).exp()
    grad_token = (grad_tail * share - scale * log_token.expm1()).masked_fill(~outside, 0.0)
    p, p_tail = student.log_probs.exp(), student.log_tail.exp()
    # On the support 1 − p is the sum of all others: no difference of near equals where p is close to 1.
    others = p.masked_fill(is_token, 0.0).sum(dim=1) + p_tail
    policy = scale[:, None] * torch.where(is_token, others[:, None], -p)
    return grad_inside + policy, grad_tail - scale * p_tail, grad_token


def _write_grad_logits(
    grad_logits: GradLogits,
    support: Tensor,
    inside: Tensor,
    tail: Tensor,
    softmax_outside: Tensor,
    token: tuple[Tensor, Tensor] | None,
) -> None:
    """Write a gradient from its values inside [C, K] and its tail [C, 1] times the softmax outside [C, V].

    ``token``, ids [C, 1] and values [C, 1], overwrites the tail at these ids, and is overwritten by the support.
    """
    values = grad_logits.values
    torch.mul(softmax_outside, tail, out=values)
    entries = [(support, inside)] if token is None else [token, (support, inside)]
    for ids, exact in entries:
        values.scatter_(1, ids, exact.to(values.dtype))
    if grad_logits.row_scale is not None:
        exact = torch.cat([exact for _, exact in entries], dim=1)
        projection = (exact * exact.to(values.dtype).to(exact.dtype)).sum(dim=1)
        grad_logits.row_scale.copy_(row_scale(exact.square().sum(dim=1), projection))


def row_scale(norm_squared: Tensor, projection: Tensor) -> Tensor:
    """The factor [C] on a rounded gradient ĝ, from Σg² and Σg·ĝ, with which its projection on g is g itself.

    The gradient of a peaked distribution is a few large numbers, each with the 8 bits of bf16. With this factor the
    remaining error is orthogonal to g, so it changes the length of g, and of what is computed from it, in second
    order only.
    """
    return torch.where(projection > 0.0, norm_squared / projection, 1.0)
