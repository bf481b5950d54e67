"""Statistics of student and teacher at each token, and their means over the active tokens: what a run logs."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor

from sdpo._numerics import log_ratio, log_softmax, upcast
from sdpo._validate import (
    check_device,
    check_distribution,
    check_shape,
    check_support_size,
    check_temperature,
    check_tensor,
    check_tokens,
    type_name,
)
from sdpo.topk import gather_log_probs


class TokenStatistics(NamedTuple):
    """Both models at each token. All fields have the shape of the tokens and carry no gradient.

    Args:
        log_probs: [...] student's log-probability of the sampled token, nats.
        teacher_log_probs: [...] teacher's log-probability of the sampled token, nats.
        student_entropy: [...] entropy of the student over the full vocabulary, nats.
        teacher_entropy: [...] entropy of the teacher over the full vocabulary, nats.
        student_topk_mass: [...] student's probability on the support.
        teacher_topk_mass: [...] teacher's probability on the support.
        student_log_tail: [...] log of the student's probability outside the support; -inf if nothing is
            outside.
        teacher_log_tail: [...] log of the teacher's probability outside the support; -inf if nothing is
            outside.

    Source: the names are those of ``FusedOutput``.
    """

    log_probs: Tensor
    teacher_log_probs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_topk_mass: Tensor
    teacher_topk_mass: Tensor
    student_log_tail: Tensor
    teacher_log_tail: Tensor


class _HasStatistics(Protocol):
    """Whatever has the fields of ``TokenStatistics``."""

    @property
    def log_probs(self) -> Tensor: ...
    @property
    def teacher_log_probs(self) -> Tensor: ...
    @property
    def student_entropy(self) -> Tensor: ...
    @property
    def teacher_entropy(self) -> Tensor: ...
    @property
    def student_topk_mass(self) -> Tensor: ...
    @property
    def teacher_topk_mass(self) -> Tensor: ...
    @property
    def student_log_tail(self) -> Tensor: ...
    @property
    def teacher_log_tail(self) -> Tensor: ...


@torch.no_grad()
def token_statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    *,
    support: Literal["student", "teacher", "full", "sampled"],
    k: int | None = None,
    temperature: float,
) -> TokenStatistics:
    """Log-probabilities, entropies and the probability on a support, from the logits of both models.

    Naively: ``log_p = log_softmax(student_logits / temperature)``, of which the sampled token's entry is returned;
    the entropy is ``-(exp(log_p) * log_p).sum(-1)``, and the mass ``exp(log_p)`` summed over the support. The same
    for the teacher.

    Args:
        student_logits: [..., V] floating; -inf allowed.
        teacher_logits: [..., V] floating; -inf allowed.
        tokens: [...] integer, sampled token ids in [0, V).
        support: ``"student"`` or ``"teacher"``: the top K of that model; ``"full"``: the vocabulary, whose mass
            is 1; ``"sampled"``: the sampled token alone.
        k: number of tokens of a top-K support, in [1, V]; None for the other supports.
        temperature: divides both models' logits, > 0.

    Returns:
        TokenStatistics of tensors [...], float32 (float64 for float64 logits).

    Raises:
        TypeError: logits are not floating, tokens not integer, or a scalar has the wrong type.
        ValueError: the shapes or devices differ, an unknown support, k outside [1, V] or given for a support that
            has none, temperature not positive and finite, or, checked on a CPU, a token outside [0, V).

    Gradient: none.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation).

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
        >>> found = token_statistics(student, teacher, torch.tensor([1]), support="student", k=1, temperature=1.0)
        >>> found.student_topk_mass.item(), found.teacher_topk_mass.item(), found.log_probs.exp().item()
        (0.5, 0.25, 0.25)
    """
    check_distribution("student_logits", student_logits)
    check_distribution("teacher_logits", teacher_logits)
    check_shape("teacher_logits", teacher_logits, student_logits.shape, like="the shape of student_logits")
    check_device("teacher_logits", teacher_logits, student_logits, like="the device of student_logits")
    check_tokens(tokens, student_logits, vocabulary=student_logits.shape[-1])
    check_support_size(support, k, vocabulary=student_logits.shape[-1])
    temperature = check_temperature(temperature)
    student, teacher = (upcast(logits) / temperature for logits in (student_logits, teacher_logits))
    ids = rearrange(tokens.long(), "... -> ... 1")
    indices = ids if k is None else (student if support == "student" else teacher).topk(k, dim=-1).indices
    found: dict[str, Tensor] = {}
    for prefix, logits in (("student", student), ("teacher", teacher)):
        log_probs = log_softmax(logits)
        token = rearrange(log_probs.gather(-1, ids), "... 1 -> ...")
        found["log_probs" if prefix == "student" else "teacher_log_probs"] = token
        found[f"{prefix}_entropy"] = -(
            log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0.0)
        ).sum(-1)
        if support == "full":
            mass, log_tail = torch.ones_like(token), torch.full_like(token, -math.inf)
        else:
            inside = gather_log_probs(logits, indices)
            mass, log_tail = inside.log_probs.exp().sum(-1), inside.log_tail
        found[f"{prefix}_topk_mass"], found[f"{prefix}_log_tail"] = mass, log_tail
    return TokenStatistics(**found)


def mean_metrics(
    per_token: Tensor,
    weights: Tensor,
    statistics: _HasStatistics,
    *,
    mask: Tensor | None = None,
    **others: Tensor,
) -> dict[str, Tensor]:
    """Means over the active tokens, by the names that a run logs.

    The names are ``divergence`` (of per_token, unweighted), ``weight``, ``student_entropy``, ``teacher_entropy``,
    ``student_topk_mass``, ``teacher_topk_mass``, ``student_tail_mass``, ``teacher_tail_mass``,
    ``sampled_token_log_ratio`` (log q − log p, 0 where both are −inf), ``sampled_token_agreement`` (share of tokens
    to which the teacher gives at least the student's probability), those of ``others``, and ``active_tokens``, the
    number of tokens. A mean times ``active_tokens`` is the sum that adds up over micro-batches and processes.

    Args:
        per_token: [...] floating, divergence in nats.
        weights: [...] floating, weight of each token in the loss.
        statistics: what ``token_statistics`` gives, or any object with these fields [...].
        mask: [...] bool, active tokens; None if all are. Values elsewhere, even NaN or inf, have no effect.
        **others: [...] floating, further values to average.

    Returns:
        Scalars [] by name, detached; all 0 where no token is active.

    Raises:
        TypeError: per_token, weights, a statistic or one of ``others`` is not floating, or mask not bool.
        ValueError: weights, a statistic, one of ``others`` or mask has another shape than per_token.

    Gradient: none.

    Source: the metrics of the reference implementation of SDPO, arXiv 2601.20802, and of this library.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> known = token_statistics(student, teacher, torch.tensor([1]), support="full", temperature=1.0)
        >>> metrics = mean_metrics(torch.tensor([0.1]), torch.ones(1), known, mask=torch.tensor([True]))
        >>> metrics["active_tokens"].item(), round(metrics["sampled_token_log_ratio"].item(), 4)
        (1, 0.4055)
    """
    check_tensor("per_token", per_token, "floating")
    check_statistics(statistics, per_token)
    gap = log_ratio(statistics.teacher_log_probs, statistics.log_probs)
    values = {
        "divergence": per_token,
        "weight": weights,
        "student_entropy": statistics.student_entropy,
        "teacher_entropy": statistics.teacher_entropy,
        "student_topk_mass": statistics.student_topk_mass,
        "teacher_topk_mass": statistics.teacher_topk_mass,
        "student_tail_mass": statistics.student_log_tail.exp(),
        "teacher_tail_mass": statistics.teacher_log_tail.exp(),
        "sampled_token_log_ratio": gap,
        "sampled_token_agreement": (gap >= 0.0).to(per_token.dtype),
        **others,
    }
    for name, value in {"weights": weights, **others}.items():
        check_tensor(name, value, "floating")
        check_shape(name, value, per_token.shape, like="the shape of per_token")
    # One stack and one sum: on a GPU every operation is a launch.
    stacked = torch.stack([*values.values()]).detach()
    if mask is None:
        count = torch.full((), per_token.numel(), dtype=torch.int64, device=per_token.device)
    else:
        check_tensor("mask", mask, "bool")
        check_shape("mask", mask, per_token.shape, like="the shape of per_token")
        count = mask.sum()
        stacked = stacked.masked_fill(~mask, 0.0)
    means = stacked.flatten(1).sum(dim=1) / count.clamp(min=1)
    return dict(zip(values, means.unbind(), strict=True)) | {"active_tokens": count}


def check_statistics(statistics: object, per_token: Tensor) -> None:
    """Demand the fields of ``TokenStatistics``, floating tensors of the shape of ``per_token``."""
    for name in TokenStatistics._fields:
        if not hasattr(statistics, name):
            raise TypeError(
                f"statistics: expected the fields of TokenStatistics, got {type_name(statistics)} without "
                f"{name!r}; pass what token_statistics returns, or a FusedOutput"
            )
        value = getattr(statistics, name)
        check_tensor(name, value, "floating")
        check_shape(name, value, per_token.shape, like="the shape of per_token")
