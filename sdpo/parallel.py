"""The distillation loss over a vocabulary that is split over processes, as tensor parallelism splits an LM head.

Every process holds the logits of its own slice of the vocabulary, [..., V/S]. The functions here never communicate
by themselves: the caller passes ``all_reduce``, so that any process group or backend will do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from sdpo._numerics import common_support, upcast
from sdpo._validate import (
    check_alpha,
    check_device,
    check_distribution,
    check_int,
    check_shape,
    check_support,
    check_temperature,
    check_tokens,
)
from sdpo.divergence import generalized_jsd

AllReduce = Callable[[Tensor, Literal["sum", "max"]], Tensor]


def vocab_parallel_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    tokens: Tensor | None = None,
    support: Literal["student", "teacher", "full", "sampled"],
    k: int | None = None,
    tail: Literal["bucket", "renormalize"] | None = None,
    alpha: float,
    temperature: float,
    vocabulary: int,
    shard: int,
    num_shards: int,
    all_reduce: AllReduce,
) -> Tensor:
    """``distillation_loss`` of logits whose vocabulary is split over processes.

    The value, on every process, is that of the whole vocabulary::

        distillation_loss(torch.cat(all_student_logits, -1), torch.cat(all_teacher_logits, -1), ...)

    ``distillation_loss`` itself would normalise each slice by its own sum and choose K tokens of each slice. Here
    the sizes of all slices must add up to ``vocabulary``, so that neither function can be mistaken for the other.

    Args:
        student_logits: [..., Vs] floating, this process's slice of the student's logits; -inf allowed.
        teacher_logits: [..., Vs] floating, the same slice of the teacher's logits.
        tokens: [...] integer, sampled token ids in the whole vocabulary; for ``support="sampled"`` alone.
        support: tokens that the divergence is summed over: the top K of the ``"student"`` or of the ``"teacher"``
            over all slices, the ``"full"`` vocabulary, or the ``"sampled"`` token.
        k: number of tokens of a top-K support, at most ``vocabulary``; None for the other supports.
        tail: ``"bucket"`` keeps the mass outside the top K as one more category, ``"renormalize"`` conditions on
            the K; None for the other supports.
        alpha: 0 for KL(teacher‖student), 1 for KL(student‖teacher), between them the generalized JSD.
        temperature: divides both models' logits.
        vocabulary: V, the sum of the sizes of all slices.
        shard: index of this slice, in the order of the token ids.
        num_shards: S, number of slices, which may be of different sizes.
        all_reduce: ``(tensor, "sum" | "max") -> tensor``, the reduction over all slices' processes. It may work in
            place; every process must call this function, and ``backward``, equally often.

    Returns:
        [...] nats per position, float32 (float64 for float64 logits), the same on every process. The
        ``"sampled"`` value is a surrogate: only its gradient means something.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that differ, scalars out of range, slices that do not add up to
            ``vocabulary``, two processes with one ``shard``, or, checked on a CPU, a token outside [0, V).

    Gradient: to student_logits, each process to its own slice. As for any replicated loss, every process calls
    ``backward`` on its own copy; do not divide by the number of slices. Second derivatives likewise.

    Source: SDPO, arXiv 2601.20802, section 2; the split as in Megatron-LM, arXiv 1909.08053, section 3.

    Examples:
        >>> import torch
        >>> from sdpo.parallel import vocab_parallel_distillation_loss
        >>> student, teacher = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([0.5, 2.0, 0.0])
        >>> loss = vocab_parallel_distillation_loss(
        ...     student, teacher, support="full", alpha=0.5, temperature=1.0,
        ...     vocabulary=3, shard=0, num_shards=1, all_reduce=lambda tensor, op: tensor,
        ... )
        >>> round(loss.item(), 4)
        0.1435
    """
    _check(student_logits, teacher_logits, vocabulary, shard, num_shards)
    alpha = check_alpha(alpha)
    check_support(support, k, tail, alpha, vocabulary=vocabulary)
    if support == "sampled":
        tokens = check_tokens(tokens, student_logits, vocabulary=vocabulary)
    temperature = check_temperature(temperature)
    first = _first_token(student_logits, vocabulary, shard, num_shards, all_reduce)
    student, teacher = (upcast(logits) / temperature for logits in (student_logits, teacher_logits.detach()))
    log_p, log_q = (_log_softmax(logits, all_reduce) for logits in (student, teacher))
    if support == "full":
        return _sum_losses(generalized_jsd(log_p, log_q, alpha=alpha), all_reduce)
    if support == "sampled":
        assert tokens is not None
        return _sampled(log_p, log_q, tokens.long() - first, num_shards, all_reduce)
    assert k is not None
    owner = student if support == "student" else teacher
    inside = _topk_mask(owner.detach(), k, shard, num_shards, all_reduce)
    return _topk(log_p, log_q, inside, tail, alpha, num_shards, all_reduce)


def _topk(
    log_p: Tensor,
    log_q: Tensor,
    inside: Tensor,
    tail: str | None,
    alpha: float,
    num_shards: int,
    all_reduce: AllReduce,
) -> Tensor:
    """Divergence [...] on the tokens of the mask ``inside`` [..., Vs]."""
    log_p_inside, log_q_inside = (log_probs.masked_fill(~inside, -math.inf) for log_probs in (log_p, log_q))
    if tail == "renormalize":
        log_p_inside, log_q_inside = (
            log_probs - rearrange(_finite_log(_mass(log_probs, all_reduce)), "... -> ... 1")
            for log_probs in (log_p_inside, log_q_inside)
        )
        return _sum_losses(generalized_jsd(log_p_inside, log_q_inside, alpha=alpha), all_reduce)
    log_p_tail, log_q_tail = (
        rearrange(_log(_mass(log_probs.masked_fill(inside, -math.inf), all_reduce)), "... -> ... 1")
        for log_probs in (log_p, log_q)
    )
    # Every process computes the tail's term, and each contributes an equal part of it.
    tail_term = generalized_jsd(log_p_tail, log_q_tail, alpha=alpha) / num_shards
    return _sum_losses(generalized_jsd(log_p_inside, log_q_inside, alpha=alpha) + tail_term, all_reduce)


def _sampled(log_p: Tensor, log_q: Tensor, ids: Tensor, num_shards: int, all_reduce: AllReduce) -> Tensor:
    """sg[log p(y) - log q(y)] · log p(y) [...], from ids [...] relative to this slice."""
    local = (ids >= 0) & (ids < log_p.shape[-1])
    index = rearrange(ids.clamp(0, log_p.shape[-1] - 1), "... -> ... 1")
    picked = [rearrange(log_probs.gather(-1, index), "... 1 -> ...") for log_probs in (log_p, log_q)]
    # An impossible token has -inf, which the slices without it must not turn into NaN.
    log_p_token, log_q_token = (
        _SumOverShards.apply(values.masked_fill(~local, 0.0), all_reduce) for values in picked
    )
    log_p_token, log_q_token, infinite = common_support(log_p_token, log_q_token)
    surrogate = (log_p_token - log_q_token).detach() * log_p_token
    return _sum_losses(surrogate.masked_fill(infinite, math.inf) / num_shards, all_reduce)


def _topk_mask(logits: Tensor, k: int, shard: int, num_shards: int, all_reduce: AllReduce) -> Tensor:
    """Which tokens of this slice [..., Vs] are among the K largest of all slices."""
    local_k = min(k, logits.shape[-1])
    values, ids = logits.topk(local_k, dim=-1)
    candidates = values.new_full((*values.shape[:-1], num_shards, k), -math.inf)
    candidates[..., shard, :local_k] = values
    everywhere = rearrange(_LargestOfShards.apply(candidates, all_reduce), "... s k -> ... (s k)")
    chosen = torch.zeros_like(everywhere, dtype=torch.bool).scatter(
        -1, everywhere.topk(k, dim=-1).indices, True
    )
    own = rearrange(chosen, "... (s k) -> ... s k", s=num_shards)[..., shard, :local_k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, own)


def _log_softmax(logits: Tensor, all_reduce: AllReduce) -> Tensor:
    """Log-probabilities [..., Vs] of this slice, normalised over all slices."""
    largest = _LargestOfShards.apply(logits.detach().amax(dim=-1), all_reduce)
    shifted = logits - rearrange(largest.masked_fill(largest.isneginf(), 0.0), "... -> ... 1")
    return shifted - rearrange(
        _SumOverShards.apply(shifted.exp().sum(dim=-1), all_reduce).log(), "... -> ... 1"
    )


def _mass(log_probs: Tensor, all_reduce: AllReduce) -> Tensor:
    """Probability [...] over all slices; an entry of -inf adds 0, in value and gradient."""
    impossible = log_probs.isneginf()
    probabilities = log_probs.masked_fill(impossible, 0.0).exp().masked_fill(impossible, 0.0)
    summed: Tensor = _SumOverShards.apply(probabilities.sum(dim=-1), all_reduce)
    return summed


def _log(mass: Tensor) -> Tensor:
    """log(mass); -inf with gradient 0 where the mass is 0."""
    empty = mass == 0.0
    return mass.masked_fill(empty, 1.0).log().masked_fill(empty, -math.inf)


def _finite_log(mass: Tensor) -> Tensor:
    return mass.masked_fill(mass == 0.0, 1.0).log()


def _sum_losses(values: Tensor, all_reduce: AllReduce) -> Tensor:
    summed: Tensor = _SumOfLosses.apply(values, all_reduce)
    return summed


class _Reduction(torch.autograd.Function):
    """A reduction over the slices. Under ``torch.func`` transforms ``all_reduce`` gets plain tensors."""

    op: Literal["sum", "max"] = "sum"

    @classmethod
    def forward(cls, values: Tensor, all_reduce: AllReduce) -> Tensor:
        return all_reduce(values.detach().clone(), cls.op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.all_reduce = inputs[1]

    @classmethod
    def vmap(
        cls, info: Any, in_dims: tuple[int, None], values: Tensor, all_reduce: AllReduce
    ) -> tuple[Tensor, int]:
        # Elementwise: the mapped dimension is one more dimension.
        return cls.apply(values, all_reduce), in_dims[0]


class _SumOverShards(_Reduction):
    """Sum over the slices. Each process goes on to use it for its own slice, so gradients are summed as well."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # By `apply`, so that second derivatives are summed, too.
        return _SumOverShards.apply(gradients[0].contiguous(), ctx.all_reduce), None


class _SumOfLosses(_Reduction):
    """Sum over the slices whose result every process differentiates alike, so the gradient passes unchanged."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _LargestOfShards(_Reduction):
    """Maximum over the slices, of numbers without gradient."""

    op = "max"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _check(
    student_logits: Tensor, teacher_logits: Tensor, vocabulary: int, shard: int, num_shards: int
) -> None:
    check_distribution("student_logits", student_logits)
    check_distribution("teacher_logits", teacher_logits)
    check_shape("teacher_logits", teacher_logits, student_logits.shape, like="the shape of student_logits")
    check_device("teacher_logits", teacher_logits, student_logits, like="the device of student_logits")
    check_int(
        "num_shards",
        num_shards,
        low=1,
        high=2**31,
        meaning="the number of processes that share the vocabulary",
    )
    check_int("shard", shard, low=0, high=num_shards - 1, meaning="the index of this process's slice")
    check_int("vocabulary", vocabulary, low=1, high=2**31, meaning="the size of the whole vocabulary")


def _first_token(logits: Tensor, vocabulary: int, shard: int, num_shards: int, all_reduce: AllReduce) -> int:
    """The id of the first token of this slice, from the sizes of all slices."""
    own = torch.zeros(2, num_shards, dtype=torch.int64, device=logits.device)
    own[:, shard] = torch.tensor([logits.shape[-1], 1])
    # Every process sees the same sums, so that all of them raise or none.
    sizes, processes = all_reduce(own, "sum").tolist()
    if processes != [1] * num_shards:
        raise ValueError(
            f"shard: expected one process for each of {num_shards} slices, got {processes} processes; pass the "
            "rank within the group"
        )
    if sum(sizes) != vocabulary:
        raise ValueError(
            f"vocabulary: expected the sum of all slices, {sum(sizes)}, got {vocabulary}; pass the whole "
            "vocabulary's size, and to each process its own slice"
        )
    return sum(sizes[:shard])
