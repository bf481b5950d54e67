"""One chunk of the fused loss in plain torch: any device, any dtype, and the oracle of the kernels.

The gradient of a divergence L over K tokens and a bucket for the rest, with respect to the logits z. Write
x_j = log p_j for the categories (K tokens, then the tail), g_j = ∂L/∂x_j with the x_j taken as independent, and
G = Σ_j g_j. All x_j share the normaliser log Σ exp z, whose derivative is p_v; the tail's x also holds
log Σ_{v outside} exp z_v, whose derivative is the softmax over the outside tokens alone. So, with the categories'
slopes s_j = g_j − G·p_j,

    ∂L/∂z_v = s_v                              inside the support
    ∂L/∂z_v = s_tail · softmax_outside(z)_v    outside: the tail's slope, shared out by probability

Nothing is divided by a nearly empty tail, and nothing is subtracted from 1 to find it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdpo._numerics import logaddexp, logsumexp
from sdpo.fused._types import GradLogits, Make, Objective, TokenInputs, TokenStats
from sdpo.importance import importance_weights


class Split(NamedTuple):
    """A chunk of distributions, seen as K tokens and the rest; logits and their sums relative to the anchor.

    Logits of 50, as they are, have three digits less than the distances between them.
    """

    anchor: Tensor  # [c, 1] the largest logit at the support
    inside: Tensor  # [c, K] logits at the support
    log_inside: Tensor  # [c] logsumexp over the support
    log_outside: Tensor  # [c] logsumexp over all other tokens; −inf if there are none
    normalizer: Tensor  # [c] logsumexp over the vocabulary
    entropy: Tensor  # [c] nats
    outside: Tensor  # [c, V] softmax over the tokens outside, exactly 0 inside


def divergence(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """JSD_α of normalised log-probabilities [c, M], p the student: value [c] and slopes s = g − G·p [c, M].

    The Kullback–Leibler divergences are summed as Σ p·log(p/q) − p + q: every term is ≥ 0, and an error of the
    normalisers, common to a row, drops out in first order. In the JSD those corrections cancel token by token.
    Where a divergence is infinite its token sends no gradient, as in the plain loss.
    """
    p, q = log_p.exp(), log_q.exp()
    no_p, no_q = log_p.isneginf(), log_q.isneginf()
    if alpha == 0.0:
        terms = _kl_terms(q, p, (log_q - log_p).masked_fill(no_p | no_q, 0.0), no_q, no_p)
        g = (-q).masked_fill(no_p, 0.0)
    elif alpha == 1.0:
        log_ratio = (log_p - log_q).masked_fill(no_p | no_q, 0.0)
        terms = _kl_terms(p, q, log_ratio, no_p, no_q)
        # Adding c·p to g changes no slope. g is p·(log_ratio + 1), and 0 where infinite: shifted by −p.
        g = p * log_ratio.masked_fill(no_q & ~no_p, -1.0)
    else:
        delta = (log_q - log_p).masked_fill(no_p & no_q, 0.0).clamp(-80.0, 80.0)
        g = (1 - alpha) * p * _log_over_mixture(delta, alpha)
        terms = g + alpha * q * _log_over_mixture(-delta, 1 - alpha)
    return terms.sum(dim=1), _balanced(g - g.sum(dim=1, keepdim=True) * p, p)


def _balanced(slopes: Tensor, p: Tensor) -> Tensor:
    """Slopes [c, M], which sum to 0, with the one of a nearly certain category as minus the sum of the others.

    By itself it is g − G·p, a difference of near equals.
    """
    large = p > 0.5
    return torch.where(large, -slopes.masked_fill(large, 0.0).sum(dim=1, keepdim=True), slopes)


def _kl_terms(p: Tensor, q: Tensor, log_ratio: Tensor, no_p: Tensor, no_q: Tensor) -> Tensor:
    """p·log(p/q) − p + q: q where p = 0, +inf where p > 0 = q; ``log_ratio`` is finite, 0 in both cases."""
    near = log_ratio.abs() < 1.0
    small = log_ratio.masked_fill(~near, 0.0)
    terms = torch.where(near, p * (small + (-small).expm1()), p * (log_ratio - 1.0) + q)
    return torch.where(no_p, q, terms).masked_fill(no_q & ~no_p, math.inf)


def _log_over_mixture(delta: Tensor, weight: float) -> Tensor:
    """log(p / ((1−w)·p + w·q)) from delta = log q − log p in [−80, 80], beyond which nothing of it is left."""
    near = delta.abs() < 1.0
    small = (weight * delta.masked_fill(~near, 0.0).expm1()).log1p()
    return -torch.where(near, small, ((1 - weight) + weight * delta.exp()).log())


def logits_from_products(products: Tensor, bias: Tensor | None, recipe: Objective, lost: float) -> Tensor:
    """Turn products [c, V] into logits, in place: what was lost, bias, scale, soft-cap, temperature."""
    if lost != 0.0:
        products.mul_(1.0 / (1.0 - lost))
    if bias is not None:
        products.add_(bias.to(products.dtype))
    if recipe.softcap is None:
        factor = recipe.logit_scale / recipe.temperature
        return products if factor == 1.0 else products.mul_(factor)
    return (
        products.mul_(recipe.logit_scale / recipe.softcap).tanh_().mul_(recipe.softcap / recipe.temperature)
    )


def softcap_backward_(slope: Tensor, logits: Tensor, recipe: Objective) -> Tensor:
    """Multiply a slope, in place, by 1 − tanh²: what the soft-cap lets through, read off its own result."""
    if recipe.softcap is None:
        return slope
    capped = logits * (recipe.temperature / recipe.softcap)
    return slope.mul_(capped.square_().neg_().add_(1.0))


def split(logits: Tensor, ids: Tensor, scratch: Tensor | None = None) -> Split:
    """Read logits [c, V] at ids [c, K] and sum all other tokens; the logits at ids are lost.

    Without ``scratch`` [c, V] to multiply in, the softmax outside is lost as well.
    """
    inside = logits.gather(1, ids)
    anchor = inside.amax(dim=1, keepdim=True)
    anchor = anchor.masked_fill(anchor.isneginf(), 0.0)
    inside = inside - anchor
    logits.scatter_(1, ids, -math.inf)
    top, place = logits.max(dim=1)
    empty = top.isneginf()
    outside = torch.softmax(logits, dim=1).masked_fill_(empty[:, None], 0.0)
    # The largest logit's share of the mass outside is exp(top − log_outside).
    share = outside.gather(1, place[:, None])[:, 0].masked_fill(empty, 1.0)
    log_outside = top - anchor[:, 0] - share.log()
    log_inside = logsumexp(inside)
    normalizer = logaddexp(log_inside, log_outside)
    # Finite, so that an impossible token adds 0 to the mean logit.
    logits.clamp_(min=torch.finfo(logits.dtype).min)
    mean_outside = torch.mul(outside, logits, out=outside if scratch is None else scratch).sum(dim=1)
    inside_p = (inside - normalizer[:, None]).exp()
    mean = (inside_p * inside.masked_fill(inside.isneginf(), 0.0)).sum(dim=1)
    mean = mean + (log_outside - normalizer).exp() * (mean_outside - anchor[:, 0])
    return Split(anchor, inside, log_inside, log_outside, normalizer, normalizer - mean, outside)


def row_gain(whole: Tensor, kept: Tensor) -> Tensor:
    """The factor [c] on rounded slopes ŝ, from whole = Σs² and kept = Σs·ŝ, that makes their projection on s be s.

    The slopes of a peaked row are a few large numbers, and bf16 has 8 bits for each. Times this factor the error
    that is left is orthogonal to the row and changes its length, and that of its gradient, in second order only.
    """
    return torch.where(kept > 0.0, whole / kept, 1.0)


def select_support(student: Tensor, teacher: Tensor, tokens: Tensor, recipe: Objective) -> Tensor:
    """Token ids [c, K] of the support: a model's K likeliest, the sampled token, or (K = V) every token."""
    if recipe.support == "sampled":
        return tokens[:, None]
    owner = student if recipe.support == "student" else teacher
    if recipe.k is None or recipe.k == owner.shape[1]:
        return torch.arange(owner.shape[1], device=owner.device).expand_as(owner)
    return owner.topk(recipe.k, dim=1, sorted=False).indices


def chunk(
    make_student: Make,
    make_teacher: Make,
    rows: TokenInputs,
    recipe: Objective,
    stats: Tensor,
    slope: GradLogits | None,
) -> None:
    """The loss of one chunk: fills ``stats``, and ``slope`` with d(weighted loss)/d(student products).

    The buffers of both sides are consumed; the slope's values may take the student's.
    """
    teacher, student = make_teacher(), make_student()
    z_student = logits_from_products(student.products, student.bias, recipe, student.accumulation_bias)
    z_teacher = logits_from_products(teacher.products, teacher.bias, recipe, teacher.accumulation_bias)
    if teacher.reference is not None and recipe.trust_region_coef is not None:
        reference = logits_from_products(
            teacher.reference, teacher.reference_bias, recipe, teacher.accumulation_bias
        )
        # Not lerp: it would subtract −inf from −inf where a token is impossible.
        z_teacher = reference.mul_(1 - recipe.trust_region_coef).add_(
            z_teacher, alpha=recipe.trust_region_coef
        )
    ids = select_support(z_student, z_teacher, rows.tokens, recipe)
    token = rows.tokens[:, None]
    token_student, token_teacher = z_student.gather(1, token)[:, 0], z_teacher.gather(1, token)[:, 0]
    q = split(z_teacher, ids)
    p = split(z_student, ids, scratch=z_teacher)

    log_p, log_q = p.inside - p.normalizer[:, None], q.inside - q.normalizer[:, None]
    log_tail_p, log_tail_q = p.log_outside - p.normalizer, q.log_outside - q.normalizer
    log_token = token_student - p.anchor[:, 0] - p.normalizer
    log_token_q = token_teacher - q.anchor[:, 0] - q.normalizer
    if recipe.support == "sampled":
        value, inside, outside = _sampled(log_token, log_token_q, log_tail_p)
    else:
        value, inside, outside = _topk(log_p, log_q, log_tail_p, log_tail_q, recipe)

    weights, clipped = _weights(log_token, rows, recipe)
    if slope is not None:
        scale = weights if rows.grad_weights is None else rows.grad_weights.to(weights.dtype)
        scale = (scale if rows.loss_scale is None else scale * rows.loss_scale)[:, None]
        scale = scale * (recipe.logit_scale / recipe.temperature)
        whole = softcap_backward_(p.outside, z_student, recipe)
        torch.mul(whole, outside[:, None] * scale, out=slope.values)
        inside = softcap_backward_(inside * scale, p.inside + p.anchor, recipe)
        rounded = inside.to(slope.values.dtype)
        slope.values.scatter_(1, ids, rounded)
        if slope.row_scale is not None:
            kept = (inside * rounded.to(inside.dtype)).sum(dim=1)
            slope.row_scale.copy_(row_gain(inside.square().sum(dim=1), kept))
    known = TokenStats(
        per_token=value,
        weights=weights,
        log_probs=log_token,
        teacher_log_probs=log_token_q,
        student_entropy=p.entropy,
        teacher_entropy=q.entropy,
        student_topk_mass=(p.log_inside - p.normalizer).exp(),
        teacher_topk_mass=(q.log_inside - q.normalizer).exp(),
        student_log_tail=log_tail_p,
        teacher_log_tail=log_tail_q,
        clipped=clipped,
    )
    torch.stack(known, out=stats)


def _topk(
    log_p: Tensor, log_q: Tensor, log_tail_p: Tensor, log_tail_q: Tensor, recipe: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Value [c], slopes at the support [c, K] and of the tail [c]."""
    if recipe.tail == "renormalize":
        value, inside = divergence(_renormalize(log_p), _renormalize(log_q), recipe.alpha)
        return value, inside, torch.zeros_like(value)
    log_p = torch.cat([log_p, log_tail_p[:, None]], dim=1)
    log_q = torch.cat([log_q, log_tail_q[:, None]], dim=1)
    value, slopes = divergence(log_p, log_q, recipe.alpha)
    return value, slopes[:, :-1], slopes[:, -1]


def _renormalize(log_probs: Tensor) -> Tensor:
    mass = logsumexp(log_probs)[:, None]
    return log_probs - mass.masked_fill(mass.isneginf(), 0.0)


def _sampled(log_p: Tensor, log_q: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The surrogate A·log p with A = log p − log q held fixed: g = A at the token, 0 elsewhere."""
    never = log_p.isneginf()
    infinite = log_q.isneginf() & ~never
    advantage = (log_p - log_q).masked_fill(never | infinite, 0.0)
    value = (advantage * log_p.masked_fill(never, 0.0)).masked_fill(infinite, math.inf)
    tail = advantage * log_tail.exp()
    return value, tail[:, None], -tail


def _weights(log_token: Tensor, rows: TokenInputs, recipe: Objective) -> tuple[Tensor, Tensor]:
    """Importance × extra weights [c], and where the importance was cut."""
    weights, clipped = torch.ones_like(log_token), torch.zeros_like(log_token)
    if rows.old_log_probs is not None and recipe.is_clip is not None:
        old = rows.old_log_probs.to(log_token.dtype)
        weights = importance_weights(log_token, old, clip=recipe.is_clip)
        clipped = (log_token - old > math.log(recipe.is_clip)).to(log_token.dtype)
    if rows.extra_weights is not None:
        weights = weights * rows.extra_weights.to(weights.dtype)
    return weights, clipped
