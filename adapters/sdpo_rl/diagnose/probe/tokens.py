"""Student and teacher at single tokens, from the logits of both: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

import sdpo

from ...config import SDPOConfig

# Divergences whose gradients are compared, besides that of the run: forward KL, near it, the default, reverse KL.
ALPHAS = (0.0, 0.1, 0.5, 1.0)
# A token hardly moves where its gradient is below this fraction of what the same divergence has near agreement. At
# p=1e-5 and q=0.1 the fraction is .0017 for α=.5, .0009 for α=1 and .007 for α=.1, of which runs with the last
# start as early as with α=0.
_HARDLY_MOVES = 0.003

Sums = dict[str, float]


def alphas(config: SDPOConfig) -> list[float]:
    """The alphas to compare: the usual ones and the run's."""
    return sorted({*ALPHAS, config.alpha})


def near_agreement(alpha: float) -> float:
    """The factor c of the gradient c·(p − q) near p = q: 1 for both KL divergences, α(1−α) between them.

    Examples:
        >>> near_agreement(0.0), near_agreement(0.5), near_agreement(1.0)
        (1.0, 0.25, 1.0)
    """
    return alpha * (1.0 - alpha) if 0.0 < alpha < 1.0 else 1.0


def token_sums(
    student: Tensor, teacher: Tensor, tokens: Tensor, config: SDPOConfig, *, temperature: float
) -> Sums:
    """Sums over N tokens of what student and teacher predict there, and of the gradients of the divergences.

    With p and q the distributions of student and teacher, z the student's logits and v the teacher's most likely
    token, the gradients are those of the divergence on the run's support. At a token where v is not the student's
    most likely token ("disagreement")::

        gap = q(v) − p(v)                  what there is to move
        push(α) = −∂loss/∂z(v) · T         what a loss with this α moves; p(v) − q(v) for α = 0, all of the gap
        moved(α) = push(α) / (c(α) · gap)  with c the factor near agreement, so that 1 is a full effect

    A sampled-token support is measured with the full vocabulary, of whose gradient it is an estimate.

    Args:
        student: logits [N, V] float32.
        teacher: logits [N, V] float32.
        tokens: [N] int64, the sampled tokens.
        config: its support, K and tail.
        temperature: of the rollout; divides both.

    Returns:
        Sums by name, and `tokens`, their number. Of the gap, `hardly_moved` is the part at tokens with
        moved(α) < 0.003.
    """
    support = "full" if config.support == "sampled" else config.support
    k, tail = (config.k, config.tail) if config.uses_topk else (None, None)
    found = sdpo.token_statistics(student, teacher, tokens, support=support, k=k, temperature=temperature)
    p, q = ((logits / temperature).softmax(dim=-1) for logits in (student, teacher))
    favourite = q.argmax(dim=-1, keepdim=True)
    disagree = (p.argmax(dim=-1, keepdim=True) != favourite).squeeze(-1)
    p_at, q_at = (each.gather(-1, favourite).squeeze(-1) for each in (p, q))
    gap = torch.where(disagree, q_at - p_at, 0.0)
    # A token that the student ranks higher has less probability under the teacher, or it would be the favourite:
    # the gap of a disagreement may still be negative, where the student is sure of neither.
    gap = gap.clamp(min=0.0)
    sums = {
        "tokens": float(len(tokens)),
        "agreement": _total(~disagree),
        "student_entropy": _total(found.student_entropy),
        "teacher_entropy": _total(found.teacher_entropy),
        "student_topk_mass": _total(found.student_topk_mass),
        "teacher_topk_mass": _total(found.teacher_topk_mass),
        "disagreements": _total(disagree),
        "student_log_favourite": _total(p_at.log().clamp(min=-100.0)[disagree]),
        "teacher_log_favourite": _total(q_at.log()[disagree]),
        "gap": _total(gap),
    }
    for alpha in alphas(config):
        loss, grad = _gradient(student, teacher, support, k, tail, alpha, temperature)
        push = -grad.gather(-1, favourite).squeeze(-1) * temperature
        moved = push / (near_agreement(alpha) * gap).clamp(min=torch.finfo(gap.dtype).tiny)
        sums[f"norm {alpha:g}"] = _total(grad.norm(dim=-1))
        sums[f"push {alpha:g}"] = _total(push[disagree])
        sums[f"hardly_moved {alpha:g}"] = _total(gap[moved < _HARDLY_MOVES])
        if alpha == config.alpha:
            sums["divergence"] = _total(loss)
    return sums


def add(parts: Iterable[Mapping[str, float]]) -> Sums:
    """The sums of all parts together.

    Examples:
        >>> add([{"tokens": 1.0}, {"tokens": 2.0}])
        {'tokens': 3.0}
    """
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def evenly(count: int, limit: int) -> Sequence[int]:
    """At most `limit` of `count` positions, evenly spaced.

    Examples:
        >>> list(evenly(3, 10)), list(evenly(10, 3))
        ([0, 1, 2], [0, 3, 6])
    """
    return range(count) if count <= limit else [i * count // limit for i in range(limit)]


def _gradient(
    student: Tensor,
    teacher: Tensor,
    support: str,
    k: int | None,
    tail: str | None,
    alpha: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The loss [N] of each token and its gradient [N, V] to the student's logits."""
    with torch.enable_grad():
        logits = student.detach().requires_grad_()
        loss = sdpo.distillation_loss(
            logits,
            teacher,
            support=support,  # type: ignore[arg-type]
            k=k,
            tail=tail,  # type: ignore[arg-type]
            alpha=alpha,
            temperature=temperature,
        )
        (grad,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), grad


def _total(values: Tensor) -> float:
    return float(values.double().sum())
