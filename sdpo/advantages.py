"""Advantages: self-distillation as a policy gradient, and the advantages of rewards to blend it with.

∇KL(p‖sg q) = E_{v~p}[(log p(v) − log q(v))·∇log p(v)]: descending the reverse divergence is a policy gradient
whose advantage for token v is log q(v) − log p(v). All results are detached: an advantage is a weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from einops import rearrange, reduce
from torch import Tensor

from sdpo._numerics import common_support, log_softmax, upcast, zero_where_not
from sdpo._validate import (
    check_device,
    check_distribution,
    check_flag,
    check_real,
    check_shape,
    check_tensor,
    check_tokens,
    tensor_from_sequence,
)


def group_normalized_advantages(
    rewards: Tensor | Sequence[float],
    group_ids: Tensor | Sequence[int],
    *,
    scale_by_std: bool,
    eps: float,
) -> Tensor:
    """Rewards relative to their group: r − mean, divided by the group's standard deviation if asked for.

    Formula: ``(r - mean(group)) / (std(group) + eps)``, std with Bessel's correction; without
    ``scale_by_std`` only the difference. Groups need not be contiguous or of one size. A group of one, or of
    equal rewards, gets exactly 0.

    Args:
        rewards: [N] floating tensor, or a sequence of numbers.
        group_ids: [N] integer tensor, or a sequence of ints: equal for completions of one prompt.
        scale_by_std: divide by the group's standard deviation.
        eps: added to the standard deviation, in [0, 1].

    Returns:
        [N] standard deviations, or the unit of the rewards; float32 (float64 for a float64 tensor).

    Raises:
        TypeError: rewards are not floating, group_ids not integer, scale_by_std not a bool, eps not a number.
        ValueError: the shapes or devices differ, rewards are not one-dimensional, or eps is outside [0, 1].

    Gradient: none.

    Source: GRPO, arXiv 2402.03300, section 4.1; without the division arXiv 2503.20783.

    Examples:
        >>> import torch
        >>> rewards, groups = torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([7, 7, 3, 3])
        >>> group_normalized_advantages(rewards, groups, scale_by_std=False, eps=1e-4).tolist()
        [0.5, -0.5, 0.0, 0.0]
    """
    # A list goes to the device of the other argument.
    devices = [value.device for value in (rewards, group_ids) if isinstance(value, Tensor)]
    device = devices[0] if devices else None
    rewards = tensor_from_sequence("rewards", rewards, "floating", device=device)
    group_ids = tensor_from_sequence("group_ids", group_ids, "integer", device=device)
    check_tensor("rewards", rewards, "floating", min_ndim=1)
    assert isinstance(rewards, Tensor)
    check_shape("rewards", rewards, rewards.shape[:1], like="one dimension")
    check_tensor("group_ids", group_ids, "integer")
    assert isinstance(group_ids, Tensor)
    check_shape("group_ids", group_ids, rewards.shape, like="the shape of rewards")
    check_device("group_ids", group_ids, rewards, like="the device of rewards")
    check_flag("scale_by_std", scale_by_std, meaning="True to divide by the group's standard deviation")
    eps = check_real("eps", eps, low=0.0, high=1.0, meaning="a small stabiliser, for example 1e-4")
    rewards = upcast(rewards).detach()
    same_group = rearrange(group_ids, "n -> n 1") == group_ids
    size = same_group.sum(dim=-1)
    # Mean of differences rather than difference to the mean: equal rewards then cancel exactly, and no
    # rounding residue is blown up by a tiny std + eps.
    centered = zero_where_not(rearrange(rewards, "n -> n 1") - rewards, same_group).sum(dim=-1) / size
    if not scale_by_std:
        return centered
    squares = zero_where_not(centered.square().expand_as(same_group), same_group).sum(dim=-1)
    std = (squares / (size - 1).clamp(min=1)).sqrt()
    return zero_where_not(centered / (std + eps), centered != 0)


def logit_advantages(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Advantage of every vocabulary token under reverse-KL self-distillation.

    Formula: ``log_softmax(teacher_logits) - log_softmax(student_logits)``. A token the student cannot draw
    gets 0, one that only the teacher excludes gets −inf.

    Args:
        student_logits: [..., V] floating; -inf allowed.
        teacher_logits: [..., V] floating; -inf allowed.

    Returns:
        [..., V] nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: the shapes differ.

    Gradient: none.

    Source: SDPO, arXiv 2601.20802, proposition 2.1.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> [round(a, 4) for a in logit_advantages(student, teacher).tolist()]
        [-0.6931, 0.4055]
    """
    return _log_ratio(*_both_log_probs(student_logits, teacher_logits))


def token_advantages(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
    """Advantage of the sampled tokens: ``logit_advantages`` read at ``tokens``.

    Formula: ``log q(y_t) - log p(y_t)``, p the student and q the teacher.

    Args:
        student_logits: [..., V] floating; -inf allowed.
        teacher_logits: [..., V] floating; -inf allowed.
        tokens: [...] integer, sampled token ids in [0, V).

    Returns:
        [...] nats, float32 (float64 for float64 logits).

    Raises:
        TypeError: logits are not floating, or tokens not integer.
        ValueError: the shapes or devices do not match, or, checked on a CPU, a token is outside [0, V).

    Gradient: none.

    Source: SDPO, arXiv 2601.20802, proposition 2.1.

    Examples:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> round(token_advantages(student, teacher, torch.tensor([1])).item(), 4)
        0.4055
    """
    student, teacher = _both_log_probs(student_logits, teacher_logits)
    check_tokens(tokens, student, vocabulary=student.shape[-1])
    ids = rearrange(tokens.long(), "... -> ... 1")
    return rearrange(_log_ratio(student.gather(-1, ids), teacher.gather(-1, ids)), "... 1 -> ...")


def sequence_advantages(per_token: Tensor, loss_mask: Tensor) -> Tensor:
    """One advantage per sequence: the mean of its active tokens' advantages.

    Formula: ``mean(per_token[row][loss_mask[row]])``, 0 for a row without an active token.

    Args:
        per_token: [..., T] floating, advantages of the sampled tokens, nats.
        loss_mask: [..., T] bool, active tokens.

    Returns:
        [...] nats.

    Raises:
        TypeError: per_token is not floating, or loss_mask not bool.
        ValueError: the shapes differ, or there is no token dimension.

    Gradient: none.

    Source: SDPO, arXiv 2601.20802, the sequence-level variant of proposition 2.1.

    Examples:
        >>> import torch
        >>> sequence_advantages(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()
        [1.5]
    """
    check_tensor("per_token", per_token, "floating", min_ndim=1)
    check_tensor("loss_mask", loss_mask, "bool")
    check_shape("loss_mask", loss_mask, per_token.shape, like="the shape of per_token")
    total = reduce(zero_where_not(upcast(per_token).detach(), loss_mask), "... t -> ...", "sum")
    return total / reduce(loss_mask, "... t -> ...", "sum").clamp(min=1)


def blend_advantages(
    reward_advantages: Tensor, distillation_advantages: Tensor, *, reward_weight: float
) -> Tensor:
    """Hybrid of reward and self-distillation advantages.

    Formula: ``λ·reward_advantages + (1−λ)·distillation_advantages`` with λ = ``reward_weight``. A side of weight 0
    has no effect, whatever its values. Otherwise advantages of −inf (tokens that the teacher excludes) stay −inf.

    Args:
        reward_advantages: [B] or [B, T] floating.
        distillation_advantages: [B], [B, T] or [B, T, V] floating, such as ``logit_advantages``. A reward's
            advantage is repeated over the dimensions that it lacks.
        reward_weight: λ, in [0, 1].

    Returns:
        The shape of distillation_advantages, without unit.

    Raises:
        TypeError: an argument is not a floating tensor, or reward_weight not a number.
        ValueError: the shapes do not match, or reward_weight is outside [0, 1].

    Gradient: none.

    Source: SDPO, arXiv 2601.20802, section 4.5 (λ = 0.9 helped a 0.6B model and slightly hurt an 8B one).

    Examples:
        >>> import torch
        >>> blend_advantages(torch.tensor([1.0]), torch.tensor([[0.0, 2.0]]), reward_weight=0.5).tolist()
        [[0.5, 1.5]]
    """
    check_tensor("reward_advantages", reward_advantages, "floating")
    check_tensor("distillation_advantages", distillation_advantages, "floating")
    reward_weight = check_real(
        "reward_weight", reward_weight, low=0.0, high=1.0, meaning="the share of the reward advantages"
    )
    reward, distillation = upcast(reward_advantages).detach(), upcast(distillation_advantages).detach()
    leading = distillation.shape[: max(1, reward.ndim)]
    check_shape("reward_advantages", reward, leading, like="the leading shape of distillation_advantages")
    reward = reward.reshape(*reward.shape, *[1] * (distillation.ndim - reward.ndim)).expand_as(distillation)
    if reward_weight == 0.0:
        return distillation
    if reward_weight == 1.0:
        return reward
    return reward_weight * reward + (1.0 - reward_weight) * distillation


def _both_log_probs(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    check_distribution("student_logits", student_logits)
    check_distribution("teacher_logits", teacher_logits)
    check_shape("teacher_logits", teacher_logits, student_logits.shape, like="the shape of student_logits")
    return log_softmax(student_logits.detach()), log_softmax(teacher_logits.detach())


def _log_ratio(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher, infinite = common_support(student, teacher)
    return (teacher - student).masked_fill(infinite, -math.inf)
