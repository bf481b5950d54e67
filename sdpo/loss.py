"""The self-distillation loss from logits: plain torch, and the reference for the fused loss.

``distillation_loss`` turns student and teacher logits into nats per position; ``self_distillation_loss``
weighs, masks and sums the positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from einops import rearrange
from torch import Tensor

from sdpo._numerics import common_support, log_softmax, upcast, zero_where_not
from sdpo._validate import (
    check_alpha,
    check_device,
    check_distribution,
    check_shape,
    check_support,
    check_temperature,
    check_tensor,
    check_tokens,
    check_weights,
    tensor_from_sequence,
)
from sdpo.aggregate import MaskedSum, token_sum
from sdpo.divergence import generalized_jsd
from sdpo.topk import add_tail_bucket, gather_log_probs, renormalize

Support = Literal["student", "teacher", "full", "sampled"]
Tail = Literal["bucket", "renormalize"]


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    tokens: Tensor | None = None,
    support: Support,
    k: int | None = None,
    tail: Tail | None = None,
    alpha: float,
    temperature: float,
) -> Tensor:
    """Divergence between student and teacher at each position.

    With z the student's and w the teacher's logits, both divided by ``temperature``::

        support="full"       generalized_jsd(log_softmax(z), log_softmax(w), alpha)
        support="student"    the same on the K largest entries of z, support="teacher" of w: both models are
                             gathered there, each normalised over its own full vocabulary
            tail="bucket"        the probability outside is one more category
            tail="renormalize"   both models are conditioned on the K tokens
        support="sampled"    stop_gradient(log p(y) - log q(y)) * log p(y)

    With a bucket the loss is a lower bound of that over the full vocabulary, never falls as K grows, and equals it
    at K = V. Conditioned on the K tokens it is no bound, and 0 for K = 1. The surrogate of the sampled token has a
    gradient that, with y sampled from the student, is an unbiased estimate of that of KL(student‖teacher).

    Args:
        student_logits: [..., V] floating; -inf allowed.
        teacher_logits: [..., V] floating; -inf allowed.
        tokens: [...] integer, sampled token ids in [0, V); needed by ``support="sampled"``, unused otherwise.
        support: tokens that the divergence is summed over.
        k: number of tokens of a top-K support, in [1, V]; None for ``"full"`` and ``"sampled"``.
        tail: what becomes of the probability outside a top-K support; None for ``"full"`` and ``"sampled"``.
        alpha: 0 for KL(teacher‖student), 1 for KL(student‖teacher), between them the generalized JSD;
            1 for ``support="sampled"``.
        temperature: the rollout temperature, > 0; divides both models' logits.

    Returns:
        [...] nats, float32 (float64 for float64 logits). The value of ``"sampled"`` means nothing, only its
        gradient does; a token that the student cannot have sampled gives 0, one that the teacher excludes +inf.

    Raises:
        TypeError: logits are not floating tensors, tokens not integer, k or tail None where the support needs one,
            or an option of another wrong type.
        ValueError: shapes or devices that differ, an unknown support or tail, k outside [1, V], k or tail given
            where the support has none, alpha outside [0, 1], temperature not positive and finite, or, checked on a
            CPU, a token outside [0, V).

    Gradient: to student_logits only, with a bucket also to the tokens outside the support. The choice of the
    support is piecewise constant and carries none.

    Source: SDPO, arXiv 2601.20802, section 2 and proposition 2.1.

    Examples:
        >>> import torch
        >>> student = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0], requires_grad=True)
        >>> teacher = torch.tensor([0.5, 2.0, 0.0, 1.0, -1.5, -3.0])
        >>> for k in (1, 3, 6):
        ...     loss = distillation_loss(
        ...         student, teacher, support="student", k=k, tail="bucket", alpha=0.5, temperature=1.0
        ...     )
        ...     print(round(loss.item(), 4))
        0.1091
        0.1303
        0.1379
        >>> distillation_loss(student, teacher, support="full", alpha=0.5, temperature=1.0).backward()
        >>> [round(g, 4) for g in student.grad.tolist()]
        [0.0997, -0.0783, 0.0051, -0.0288, 0.0011, 0.0012]
    """
    alpha = check_alpha(alpha)
    temperature = check_temperature(temperature)
    check_distribution("student_logits", student_logits)
    check_distribution("teacher_logits", teacher_logits)
    check_shape("teacher_logits", teacher_logits, student_logits.shape, like="the shape of student_logits")
    check_device("teacher_logits", teacher_logits, student_logits, like="the device of student_logits")
    check_support(support, k, tail, alpha, vocabulary=student_logits.shape[-1])
    student, teacher = upcast(student_logits) / temperature, upcast(teacher_logits.detach()) / temperature
    if support == "full":
        return generalized_jsd(log_softmax(student), log_softmax(teacher), alpha=alpha)
    if support == "sampled":
        return _sampled_token_loss(student, teacher, tokens)
    assert k is not None
    indices = (student if support == "student" else teacher).topk(k, dim=-1).indices
    p, q = gather_log_probs(student, indices), gather_log_probs(teacher, indices)
    if tail == "bucket":
        return generalized_jsd(add_tail_bucket(*p), add_tail_bucket(*q), alpha=alpha)
    return generalized_jsd(renormalize(p.log_probs), renormalize(q.log_probs), alpha=alpha)


def _sampled_token_loss(student: Tensor, teacher: Tensor, tokens: Tensor | None) -> Tensor:
    """stop_gradient(log p(y) − log q(y)) · log p(y) [...] from logits [..., V]."""
    tokens = check_tokens(tokens, student, vocabulary=student.shape[-1])
    ids = rearrange(tokens.long(), "... -> ... 1")
    log_p = rearrange(log_softmax(student).gather(-1, ids), "... 1 -> ...")
    log_q = rearrange(log_softmax(teacher).gather(-1, ids), "... 1 -> ...")
    log_p, log_q, infinite = common_support(log_p, log_q)
    return ((log_p - log_q).detach() * log_p).masked_fill(infinite, math.inf)


class LossOutput(NamedTuple):
    """The loss of one micro-batch: add totals and counts over micro-batches and processes, then divide.

    Args:
        total: [] weighted sum over the active tokens; carries the gradient.
        count: [] int64, number of active tokens.
        metrics: detached scalars by name.

    Source: SDPO, arXiv 2601.20802, section 2 (token-level mean).
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count on purpose
    metrics: dict[str, Tensor]

    def mean(self) -> Tensor:
        """``total / count``; where nothing is active 0, with gradients of exactly 0.

        Returns:
            [] in the dtype of total.

        Gradient: that of total, over count.

        Examples:
            >>> import torch
            >>> nothing = self_distillation_loss(torch.ones(1, 2), torch.zeros(1, 2).bool(), row_mask=[True])
            >>> nothing.mean().item()
            0.0
        """
        return self.total / self.count.clamp(min=1)


def self_distillation_loss(
    per_token: Tensor,
    loss_mask: Tensor,
    *,
    row_mask: Tensor | Sequence[bool],
    weights: Tensor | None = None,
) -> LossOutput:
    """Sum of a per-token loss over the active tokens: tokens with loss in rows with a teacher signal.

    The same numbers as::

        active = loss_mask & row_mask[:, None]
        total, count = (weights * per_token)[active].sum(), active.sum()

    The objective of a step is Σ total / Σ count over its micro-batches and processes; ``.mean()`` divides where
    there is one of each. Values at inactive positions, even NaN or inf, reach neither the total nor the gradient of
    per_token, and a weight of 0 removes even an infinite loss. Logits that are NaN, or −inf for every token, make
    their own gradient NaN even so: leave such positions out before ``distillation_loss``, as the fused loss does.

    Args:
        per_token: [B, T] floating, nats; of ``distillation_loss``, say.
        loss_mask: [B, T] bool, tokens with loss: completion tokens that the model itself sampled.
        row_mask: [B] bool tensor, or a sequence of bools as ``build_reprompts`` returns it: rows whose
            teacher has something to show.
        weights: [B, T] floating, finite and ≥ 0, factors of the tokens, detached; None for 1.

    Returns:
        LossOutput. Its metrics: ``divergence`` (unweighted) and ``weight``, means over the active tokens, 0
        if there are none; ``active_tokens`` and ``active_rows``.

    Raises:
        TypeError: per_token or weights are not floating, or a mask is not bool.
        ValueError: the shapes differ, or, checked on a CPU, a weight that counts is negative or not finite.

    Gradient: from total to per_token.

    Source: SDPO, arXiv 2601.20802, section 2.

    Examples:
        >>> import torch
        >>> per_token = torch.tensor([[1.0, 2.0], [float("nan"), 4.0]])
        >>> loss_mask = torch.tensor([[True, True], [True, True]])
        >>> loss = self_distillation_loss(per_token, loss_mask, row_mask=[True, False])
        >>> loss.total.item(), loss.count.item(), loss.mean().item(), loss.metrics["active_rows"].item()
        (3.0, 2, 1.5, 1)
    """
    check_tensor("per_token", per_token, "floating", min_ndim=1)
    check_tensor("loss_mask", loss_mask, "bool")
    check_shape("loss_mask", loss_mask, per_token.shape, like="the shape of per_token")
    row_mask = tensor_from_sequence("row_mask", row_mask, "bool", device=loss_mask.device)
    check_tensor("row_mask", row_mask, "bool")
    assert isinstance(row_mask, Tensor)
    check_shape("row_mask", row_mask, per_token.shape[:-1], like="one entry per row of per_token")

    active = loss_mask & rearrange(row_mask, "... -> ... 1")
    # Masked before the weights multiply: 0 · inf is NaN, in value and gradient.
    divergence = zero_where_not(upcast(per_token), active)
    weight = active.to(divergence.dtype)
    weighted = divergence
    if weights is not None:
        check_tensor("weights", weights, "floating")
        check_shape("weights", weights, per_token.shape, like="the shape of per_token")
        check_weights("weights", weights, active)
        weight = zero_where_not(upcast(weights).detach(), active)
        weighted = weight * zero_where_not(divergence, weight != 0.0)
    total, count = token_sum(weighted, active)
    metrics = {
        "divergence": MaskedSum(divergence.detach().sum(), count).mean(),
        "weight": MaskedSum(weight.sum(), count).mean(),
        "active_tokens": count,
        "active_rows": active.any(dim=-1).sum(),
    }
    return LossOutput(total=total, count=count, metrics=metrics)
