"""A teacher from elsewhere: the ids and log-probabilities of its top K tokens, as an inference server returns them.

The teacher's logits are not there. The mass outside the K tokens is what the K leave of 1, and log-probabilities
that were rounded on their way may leave less than nothing. The student is read at the teacher's ids.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from sdpo._numerics import logsumexp, upcast, zero_where_not
from sdpo._validate import (
    check_alpha,
    check_choice,
    check_device,
    check_distinct,
    check_distribution,
    check_ids,
    check_int,
    check_shape,
    check_temperature,
    check_tensor,
    is_readable,
)
from sdpo.divergence import generalized_jsd
from sdpo.topk import GatheredLogProbs, add_tail_bucket, gather_log_probs, renormalize

# How far the K probabilities may sum above 1. Rounding to bfloat16 adds up to about the entropy times 0.002.
MASS_TOLERANCE = 0.01
# What 1 − Σp of float32 log-probabilities cannot tell from 0.
SMALLEST_TAIL = 1e-6


class TeacherTopK(NamedTuple):
    """The top K tokens of a served teacher at each position: the ``teacher`` of ``fused_distillation_loss``.

    Args:
        ids: [..., K] int64 or int32, distinct along K, in [0, V) of the student.
        log_probs: [..., K] floating, their log-probabilities in nats, normalised over the full vocabulary, at the
            temperature of the rollout.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation), with the teacher's support.

    Examples:
        >>> import torch
        >>> teacher = TeacherTopK(torch.tensor([[3, 1]]), torch.tensor([[0.6, 0.3]]).log())
        >>> check_teacher_topk(*teacher, vocabulary=5)
    """

    ids: Tensor
    log_probs: Tensor


def check_teacher_topk(ids: Tensor, log_probs: Tensor, vocabulary: int) -> None:
    """Refuse top-K tokens that cannot be a distribution over the vocabulary.

    Shapes and dtypes are always checked. Values are read on a CPU only, outside of ``torch.func`` transforms and
    ``torch.compile``: reading them elsewhere would wait for the device. Check data where it arrives.

    Args:
        ids: [..., K] int64, distinct along K, in [0, vocabulary).
        log_probs: [..., K] log-probabilities of these tokens in nats, normalised over the full vocabulary: at most
            0, with probabilities that sum to at most 1.01. −inf is allowed, NaN is not.
        vocabulary: V of the student.

    Raises:
        TypeError: ids are not integer, log_probs not floating, or vocabulary not an int.
        ValueError: the shapes or devices differ, K is not in [1, vocabulary], ids repeat or lie outside the
            vocabulary, or log_probs are NaN, positive, or of too much mass.

    Gradient: none.

    Source: a choice of this library, for the top-K log-probabilities that inference servers return.

    Examples:
        >>> import torch
        >>> check_teacher_topk(torch.tensor([3, 1]), torch.tensor([0.6, 0.3]).log(), vocabulary=5)
        >>> check_teacher_topk(torch.tensor([3, 5]), torch.tensor([0.6, 0.3]).log(), vocabulary=5)
        Traceback (most recent call last):
        ...
        ValueError: ids: expected ids in [0, 5), got 5; use the student's tokenizer on the server
    """
    vocabulary = check_int(
        "vocabulary", vocabulary, low=1, high=2**31 - 1, meaning="the student's vocabulary size"
    )
    check_tensor("ids", ids, "integer", min_ndim=1)
    check_distribution("log_probs", log_probs)
    check_shape("log_probs", log_probs, ids.shape, like="the shape of ids")
    check_device("log_probs", log_probs, ids, like="the device of ids")
    check_int("ids.shape[-1]", ids.shape[-1], low=1, high=vocabulary, meaning="1 to V distinct ids")
    if not (is_readable(ids) and is_readable(log_probs)):
        return
    check_ids("ids", ids, vocabulary, fix="use the student's tokenizer on the server")
    check_distinct("ids", ids, fix="drop the sampled token where the server adds it to its top K")
    if log_probs.isnan().any() or (log_probs > 0).any():
        worst = math.nan if log_probs.isnan().any() else float(log_probs.max())
        raise ValueError(
            f"log_probs: expected log-probabilities, at most 0, got {worst:g}; pass logs of probabilities"
        )
    _check_mass(logsumexp(upcast(log_probs)))


def safe_tail(log_probs: Tensor) -> GatheredLogProbs:
    """Log-probabilities of K tokens and the log-mass of all others, from the K alone.

    ::

        log_tail = log(1 - exp(log_probs).sum(-1))

    Where rounding made the sum exceed 1, the K are divided by it and the tail is empty: −inf. A sum above 1.01 is
    more than rounding, and refused where values can be read (see ``check_teacher_topk``). With logits at hand use
    ``topk_log_probs`` or ``gather_log_probs``: they sum the tail from its own tokens, without a difference.

    Args:
        log_probs: [..., K] in nats, normalised over the full vocabulary.

    Returns:
        ``GatheredLogProbs(log_probs, log_tail)``: [..., K] and [...], float32 (float64 for float64 input).

    Raises:
        TypeError: log_probs are not a floating tensor.
        ValueError: there is no token, or the probabilities sum to more than 1.01.

    Gradient: to log_probs, through both results; a teacher is detached by the loss.

    Source: SDPO, arXiv 2601.20802, section 2 (the tail of a top-K support).

    Examples:
        >>> import torch
        >>> [round(x.exp().sum().item(), 4) for x in safe_tail(torch.tensor([0.5, 0.3]).log())]
        [0.8, 0.2]
        >>> [round(x.exp().sum().item(), 4) for x in safe_tail(torch.tensor([0.9, 0.105]).log())]
        [1.0, 0.0]
    """
    check_distribution("log_probs", log_probs)
    log_probs = upcast(log_probs)
    log_mass = logsumexp(log_probs)
    if is_readable(log_mass):
        _check_mass(log_mass)
    full = log_mass >= 0.0
    # log(1 − exp(x)) of the masses below 1; the others are replaced before the logarithm sees them.
    log_tail = torch.log(-torch.expm1(log_mass.masked_fill(full, -1.0))).masked_fill(full, -math.inf)
    return GatheredLogProbs(log_probs - log_mass.clamp(min=0.0).unsqueeze(-1), log_tail)


def given_topk_distillation_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    *,
    tail: Literal["bucket", "renormalize"],
    alpha: float,
    temperature: float,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """Divergence between a student and a teacher of whom only the top K tokens are given.

    ::

        student = gather_log_probs(student_logits / temperature, teacher_ids)
        teacher = safe_tail(teacher_log_probs)
        bucket         generalized_jsd(add_tail_bucket(*student), add_tail_bucket(*teacher), alpha)
        renormalize    generalized_jsd(renormalize(student.log_probs), renormalize(teacher.log_probs), alpha)

    From a teacher's own top K it is ``distillation_loss(..., support="teacher")``. In the bucket the teacher's tail
    counts as at least 1e-6, and as empty where the student's is: what K rounded numbers leave of 1 does not say
    whether the teacher excludes all other tokens, and must make neither direction infinite.

    Args:
        student_logits: [..., V] before the temperature; −inf allowed.
        teacher_ids: [..., K] int64, distinct along K.
        teacher_log_probs: [..., K] in nats, normalised over the full vocabulary, already at the temperature of the
            rollout: what the server left out cannot be tempered afterwards.
        tail: "bucket" to compare the mass of all other tokens, too, or "renormalize" to condition on the K tokens.
        alpha: in [0, 1], as in ``generalized_jsd``.
        temperature: positive; the student's logits are divided by it.
        loss_mask: [...] bool, positions with a loss. The others, padding and rows without a teacher, are 0 with
            gradient 0, and may hold anything. None: all have one.

    Returns:
        [...] nats per position, float32 (float64 for float64 logits).

    Raises:
        TypeError: a tensor of a wrong dtype, tail not a str, alpha or temperature not a number.
        ValueError: shapes or devices that do not match, an unknown tail, alpha or temperature out of range, or what
            ``check_teacher_topk`` refuses, at positions with a loss.

    Gradient: to student_logits only; with a bucket also to the tokens outside the K.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation), with the teacher's support.

    Examples:
        >>> import torch
        >>> student = torch.tensor([2.0, 1.0, 0.0])
        >>> ids, log_probs = torch.tensor([1, 2]), torch.tensor([0.7, 0.2]).log()
        >>> for tail in ("bucket", "renormalize"):
        ...     loss = given_topk_distillation_loss(student, ids, log_probs, tail=tail, alpha=0.5, temperature=1.0)
        ...     print(round(loss.item(), 4))
        0.1848
        0.0015
    """
    check_choice("tail", tail, ("bucket", "renormalize"))
    alpha = check_alpha(alpha)
    temperature = check_temperature(temperature)
    check_distribution("student_logits", student_logits)
    if loss_mask is not None:
        check_tensor("loss_mask", loss_mask, "bool")
        positions = student_logits.shape[:-1]
        check_shape("loss_mask", loss_mask, positions, like="the positions of student_logits")
        check_tensor("teacher_ids", teacher_ids, "integer", min_ndim=1)
        check_distribution("teacher_log_probs", teacher_log_probs)
        for name, tensor in (("teacher_ids", teacher_ids), ("teacher_log_probs", teacher_log_probs)):
            check_shape(name, tensor, (*positions, teacher_ids.shape[-1]), like="K entries for each position")
        student_logits, teacher_ids, teacher_log_probs = _with_fillers(
            student_logits, teacher_ids, teacher_log_probs, ~rearrange(loss_mask, "... -> ... 1")
        )
    check_teacher_topk(teacher_ids, teacher_log_probs, student_logits.shape[-1])
    student = gather_log_probs(upcast(student_logits) / temperature, teacher_ids)
    teacher = safe_tail(teacher_log_probs.detach())
    if tail == "renormalize":
        loss = generalized_jsd(renormalize(student.log_probs), renormalize(teacher.log_probs), alpha=alpha)
    else:
        log_q = teacher_categories(teacher, student.log_tail)
        loss = generalized_jsd(add_tail_bucket(*student), log_q, alpha=alpha)
    return loss if loss_mask is None else zero_where_not(loss, loss_mask)


def _with_fillers(
    logits: Tensor, ids: Tensor, log_probs: Tensor, without: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Both models with finite numbers where the mask ``without`` [..., 1] says that they may hold any."""
    distinct = torch.arange(ids.shape[-1], dtype=ids.dtype, device=ids.device)
    return (
        logits.masked_fill(without, 0.0),
        torch.where(without, distinct, ids),
        # Of half the mass at most, which rounding does not raise above 1.
        log_probs.masked_fill(without, -math.log(2 * logits.shape[-1])),
    )


def teacher_categories(teacher: GatheredLogProbs, student_log_tail: Tensor) -> Tensor:
    """Log-probabilities [..., K + 1] of the K tokens and their tail, as they are compared with a student's."""
    # What rounding left of 1 must make no divergence infinite, in either direction.
    log_tail = teacher.log_tail.clamp(min=math.log(SMALLEST_TAIL))
    log_tail = log_tail.masked_fill(student_log_tail.isneginf(), -math.inf)
    return renormalize(add_tail_bucket(teacher.log_probs, log_tail))


def _check_mass(log_mass: Tensor) -> None:
    """Refuse probabilities whose sums [...], given as logs, exceed 1 by more than rounding."""
    if log_mass.numel() and float(log_mass.max()) > math.log1p(MASS_TOLERANCE):
        raise ValueError(
            f"log_probs: expected probabilities that sum to at most {1 + MASS_TOLERANCE:g}, got a sum of "
            f"{math.exp(float(log_mass.max())):g}; normalise over the full vocabulary on the server"
        )
