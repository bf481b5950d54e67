"""The self-distillation losses from logits: readable, and the reference for everything faster.

Each ``*_distillation_loss`` turns student and teacher logits into nats per position;
``self_distillation_loss`` then weighs, masks and sums the positions. Divide both models' logits by the
rollout temperature before the call. The teacher never receives a gradient.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from einops import rearrange
from torch import Tensor

from sdpo._numerics import common_support, keep, log_softmax, upcast
from sdpo._validate import (
    check_alpha,
    check_choice,
    check_device,
    check_distribution,
    check_int,
    check_shape,
    check_tensor,
)
from sdpo.aggregate import MaskedSum, token_sum
from sdpo.divergence import generalized_jsd
from sdpo.topk import add_tail_bucket, gather_log_probs, renormalize


def full_distillation_loss(student_logits: Tensor, teacher_logits: Tensor, *, alpha: float) -> Tensor:
    """Divergence between student and teacher over the full vocabulary.

    Formula:
    ``generalized_jsd(log_softmax(student_logits), log_softmax(stop_gradient(teacher_logits)), alpha)``.

    Shapes: [..., V] twice to [...]. Unit: nats, float32 (float64 for float64 logits). −inf logits are exact.
    Gradient: to student_logits only; p − q for α = 0, p·(a − ⟨p, a⟩) with a = log p/q for α = 1.

    Raises:
        TypeError: logits are not floating tensors, or alpha not a number.
        ValueError: the shapes differ, or alpha is outside [0, 1].

    Source: SDPO, arXiv 2601.20802, equation 1 (α = 1); its section 3 trains with α = 0.5.

    Example:
        >>> import torch
        >>> student = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0], requires_grad=True)
        >>> loss = full_distillation_loss(student, torch.tensor([0.5, 2.0, 0.0, 1.0, -1.5, -3.0]), alpha=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4), [round(g, 4) for g in student.grad.tolist()]
        (0.1379, [0.0997, -0.0783, 0.0051, -0.0288, 0.0011, 0.0012])
    """
    alpha = check_alpha(alpha)
    _check_pair(student_logits, teacher_logits)
    return generalized_jsd(log_softmax(student_logits), log_softmax(teacher_logits.detach()), alpha=alpha)


def topk_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int,
    alpha: float,
    tail: Literal["bucket", "renormalize"],
    support: Literal["student", "teacher"] = "student",
) -> Tensor:
    """Divergence between student and teacher over the K likeliest tokens of one of them.

    Formula: the support is ``topk(student_logits)`` (or the teacher's); both models are read there, each
    normalised by its own full vocabulary. ``tail="bucket"`` adds the rest as one category: a lower bound of
    the full loss, rising with K, equal to it at K = V. ``tail="renormalize"`` conditions on the support: no
    bound, and identically 0 for K = 1. The choice of tokens is piecewise constant and carries no gradient.

    Shapes: [..., V] twice to [...]. Unit: nats, float32 (float64 for float64 logits). −inf logits are exact.
    Gradient: to student_logits only; with a bucket also to the tokens outside the support.

    Raises:
        TypeError: logits are not floating tensors, or k, alpha, tail, support of a wrong type.
        ValueError: the shapes differ, k is not in [1, V], alpha not in [0, 1], or an unknown tail or support.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation).

    Example:
        >>> import torch
        >>> student = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
        >>> teacher = torch.tensor([0.5, 2.0, 0.0, 1.0, -1.5, -3.0])
        >>> for k in (1, 3, 6):
        ...     loss = topk_distillation_loss(student, teacher, k=k, alpha=1.0, tail="bucket")
        ...     print(round(loss.item(), 4))
        0.5253
        0.5975
        0.6242
    """
    alpha = check_alpha(alpha)
    check_choice("tail", tail, ("bucket", "renormalize"))
    check_choice("support", support, ("student", "teacher"))
    _check_pair(student_logits, teacher_logits)
    vocabulary = student_logits.shape[-1]
    k = check_int(
        "k", k, low=1, high=vocabulary, meaning=f"at most the vocabulary size, min(k, {vocabulary})"
    )

    indices = (student_logits if support == "student" else teacher_logits).topk(k, dim=-1).indices
    student = gather_log_probs(student_logits, indices)
    teacher = gather_log_probs(teacher_logits.detach(), indices)
    if tail == "bucket":
        return generalized_jsd(add_tail_bucket(*student), add_tail_bucket(*teacher), alpha=alpha)
    return generalized_jsd(renormalize(student.log_probs), renormalize(teacher.log_probs), alpha=alpha)


def sampled_token_distillation_loss(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
    """One-sample surrogate of the reverse divergence, from the sampled token alone.

    Formula: ``stop_gradient(log p(y_t) - log q(y_t)) * log p(y_t)``. Its *value* means nothing; its gradient,
    with y_t drawn from the student, is an unbiased estimate of the gradient of KL(student‖teacher). Only this
    direction (α = 1) has such an estimate. A token the student cannot have drawn gives 0, one the teacher
    excludes +inf; both send no gradient.

    Shapes: logits [..., V] twice, tokens [...] int64, to [...]. Unit: nats² in form, float32 (float64 for
    float64 logits). Gradient: to student_logits only.

    Raises:
        TypeError: logits are not floating tensors, or tokens not integer.
        ValueError: the shapes do not match.

    Source: SDPO, arXiv 2601.20802, section 2 (proposition 2.1).

    Example:
        >>> import torch
        >>> student = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0])
        >>> teacher = torch.tensor([0.5, 2.0, 0.0, 1.0, -1.5, -3.0])
        >>> round(sampled_token_distillation_loss(student, teacher, torch.tensor(0)).item(), 4)
        -0.8668
    """
    _check_pair(student_logits, teacher_logits)
    check_tensor("tokens", tokens, "integer")
    check_shape("tokens", tokens, student_logits.shape[:-1], like="the leading shape of the logits")
    check_device("tokens", tokens, student_logits, like="the device of the logits")
    ids = rearrange(tokens.long(), "... -> ... 1")
    student = rearrange(log_softmax(student_logits).gather(-1, ids), "... 1 -> ...")
    teacher = rearrange(log_softmax(teacher_logits.detach()).gather(-1, ids), "... 1 -> ...")
    student, teacher, infinite = common_support(student, teacher)
    return ((student - teacher).detach() * student).masked_fill(infinite, math.inf)


class LossOutput(NamedTuple):
    """What one micro-batch gives to an optimizer step: add over micro-batches and ranks, then divide."""

    total: Tensor  # [] sum over the active tokens, carries the gradient
    count: Tensor  # type: ignore[assignment]  # [] int64, number of active tokens
    metrics: dict[str, Tensor]  # detached scalars


def self_distillation_loss(
    per_token: Tensor, loss_mask: Tensor, *, row_mask: Tensor, weights: Tensor | None = None
) -> LossOutput:
    """Sum of a per-token loss over the active tokens: completion tokens of rows with a teacher signal.

    Formula: with ``active = loss_mask & row_mask[:, None]``, the total is the sum of
    ``(weights * per_token)[active]`` and the count ``active.sum()``. The objective is Σ total / Σ count over
    all micro-batches and ranks of a step. With nothing active the total is 0, its gradient exactly 0, and
    backward legal. What stands at inactive positions, even NaN or inf, reaches neither.

    Shapes: per_token [B, T], loss_mask [B, T] bool, row_mask [B] bool, weights [B, T], to total [] and count
    []. Unit: nats, float32 (float64 for float64 input). Gradient: to per_token; weights are detached.

    Metrics: ``divergence`` and ``weight``, means over the active tokens (0 if there are none; the divergence
    unweighted), ``active_tokens`` and ``active_rows``.

    Raises:
        TypeError: per_token or weights are not floating, or a mask is not bool.
        ValueError: the shapes do not match.

    Source: SDPO, arXiv 2601.20802, section 2.

    Example:
        >>> import torch
        >>> per_token = torch.tensor([[1.0, 2.0], [float("nan"), 4.0]])
        >>> loss_mask = torch.tensor([[True, True], [True, True]])
        >>> out = self_distillation_loss(per_token, loss_mask, row_mask=torch.tensor([True, False]))
        >>> out.total.item(), out.count.item(), out.metrics["active_rows"].item()
        (3.0, 2, 1)
    """
    check_tensor("per_token", per_token, "floating", min_ndim=1)
    check_tensor("loss_mask", loss_mask, "bool")
    check_shape("loss_mask", loss_mask, per_token.shape, like="the shape of per_token")
    check_tensor("row_mask", row_mask, "bool")
    check_shape("row_mask", row_mask, per_token.shape[:-1], like="one entry per row of per_token")

    active = loss_mask & rearrange(row_mask, "... -> ... 1")
    # Silenced before the weights: inf · 0 would already be NaN.
    divergence = keep(upcast(per_token), active)
    weight = active.to(divergence.dtype)
    if weights is not None:
        check_tensor("weights", weights, "floating")
        check_shape("weights", weights, per_token.shape, like="the shape of per_token")
        weight = keep(upcast(weights).detach(), active)
    total, count = token_sum(weight * divergence, active)
    metrics = {
        "divergence": MaskedSum(divergence.detach().sum(), count).mean(),
        "weight": MaskedSum(weight.sum(), count).mean(),
        "active_tokens": count,
        "active_rows": active.any(dim=-1).sum(),
    }
    return LossOutput(total=total, count=count, metrics=metrics)


def _check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    check_distribution("student_logits", student_logits)
    check_distribution("teacher_logits", teacher_logits)
    check_shape("teacher_logits", teacher_logits, student_logits.shape, like="the shape of student_logits")
    check_device("teacher_logits", teacher_logits, student_logits, like="the device of student_logits")
