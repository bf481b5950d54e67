"""Terms of an objective beside the divergence of logits, each per token or per position.

From log-probabilities of the sampled tokens alone, as rollout engines and most trainers have them::

    clipped_policy_gradient    the surrogate of PPO and GRPO
    sampled_reverse_kl         distillation from the sampled token
    anchor_estimate            distance to a reference policy, estimated

From log-probabilities of the whole vocabulary::

    anchor                     distance to a reference policy
    clip_entries               a divergence whose vocabulary entries are bounded
    mixture_log_probs          one teacher made of several

Aggregate the per-token results with `token_sum`, `sequence_sum` or `self_distillation_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from einops import repeat
from torch import Tensor

from sdpo._numerics import common_support, logaddexp, logsumexp, upcast
from sdpo._validate import (
    check_alpha,
    check_choice,
    check_device,
    check_distribution,
    check_real,
    check_shape,
    check_tensor,
    type_name,
)
from sdpo.divergence import kl_divergence
from sdpo.importance import LOG_RATIO_BOUND
from sdpo.topk import renormalize

# Weights of a mixture may miss 1 by what a few decimal places round away.
SUM_TOLERANCE = 1e-6


def clipped_policy_gradient(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ratio_limit: float = math.inf,
) -> Tensor:
    """Clipped surrogate of the policy gradient, per token.

    ::

        ratio = exp(clamp(log_probs - old_log_probs, -20, 20))
        -min(min(ratio, ratio_limit) * advantages, clamp(ratio, 1 - clip_low, 1 + clip_high) * advantages)

    A token stops moving once its ratio has left the range in the direction its advantage asks for; with
    ``ratio_limit`` (two-sided clipping) also once it is above the limit with a negative advantage.

    Args:
        log_probs: [B, T] log-probability of the sampled token under the policy, in nats.
        old_log_probs: [B, T] the same when the token was sampled. On-policy: ``log_probs.detach()``. NaN, where it
            is not known, gives the ratio 1, as in ``importance_weights``.
        advantages: [B], one per row, or [B, T].
        clip_low: in [0, 1], the lower half-width of the range. GRPO uses 0.2.
        clip_high: in [0, inf], the upper half-width. GRPO uses 0.2, DAPO 0.28.
        ratio_limit: in (0, inf], the largest ratio; INTELLECT-2 uses 4. Default inf: none.

    Returns:
        [B, T] loss per token in units of the advantage, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a floating tensor, or a half-width or the limit not a number.
        ValueError: the shapes or devices do not match, or a half-width or the limit is out of range.

    Gradient: to log_probs only; on-policy it is −advantages·∇log_probs.

    Source: PPO, arXiv 1707.06347, equation 7; group-relative in GRPO, arXiv 2402.03300, equation 3; two half-widths
    in DAPO, arXiv 2503.14476; the limit in INTELLECT-2, arXiv 2505.07291.

    Examples:
        >>> import torch
        >>> log_probs = torch.tensor([[0.5, 1.0, 2.0]]).log().requires_grad_()
        >>> loss = clipped_policy_gradient(
        ...     log_probs, torch.zeros(1, 3), torch.tensor([2.0]), clip_low=0.2, clip_high=0.2
        ... )
        >>> loss.sum().backward()
        >>> loss.tolist(), log_probs.grad.tolist()
        ([[-1.0, -2.0, -2.4000000953674316]], [[-1.0, -2.0, 0.0]])
    """
    policy, old = _pair("log_probs", log_probs, "old_log_probs", old_log_probs)
    clip_low = check_real("clip_low", clip_low, low=0.0, high=1.0, meaning="a half-width, for example 0.2")
    clip_high = check_real(
        "clip_high", clip_high, low=0.0, high=math.inf, meaning="a half-width, for example 0.2"
    )
    ratio_limit = check_real(
        "ratio_limit", ratio_limit, low=0.0, high=math.inf, open_low=True, meaning="the largest ratio"
    )
    check_tensor("advantages", advantages, "floating")
    check_device("advantages", advantages, log_probs, like="the device of log_probs")
    weight = upcast(advantages).detach()
    if weight.ndim == policy.ndim - 1:
        check_shape("advantages", weight, policy.shape[:-1], like="one per row")
        weight = repeat(weight, "... -> ... t", t=policy.shape[-1])
    check_shape("advantages", weight, policy.shape, like="one per row or the shape of log_probs")
    old = torch.where(old.isnan(), policy, old).detach()
    never = policy.isneginf() & old.isneginf()
    exponent = policy.masked_fill(never, 0.0) - old.masked_fill(never, 0.0)
    ratio = exponent.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio.clamp(max=ratio_limit) * weight, clipped * weight)


def sampled_reverse_kl(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Reverse divergence KL(student‖teacher), estimated from the sampled token: value and gradient.

    With sg the stop-gradient::

        ratio = sg(log_probs - teacher_log_probs)
        ratio * (1 + log_probs - sg(log_probs))        # value: ratio; gradient: ratio * grad(log_probs)

    Averaged over tokens drawn from the student, the value is the divergence and the gradient is its gradient. One
    token's value may be negative. ``distillation_loss(..., support="sampled")`` has the same gradient, from logits,
    and a value that means nothing.

    Args:
        log_probs: [B, T] or any shape. Log-probability of the sampled token under the student, in nats.
        teacher_log_probs: shape of log_probs. The same under the teacher.

    Returns:
        Nats per token, shape of log_probs, float32 (float64 for float64 inputs). A token the student cannot have
        drawn gives 0, one the teacher excludes +inf; both send no gradient.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: the shapes or devices differ.

    Gradient: to log_probs only.

    Source: SDPO, arXiv 2601.20802, proposition 2.1; the value is the estimator k1 of
    http://joschu.net/blog/kl-approx.html.

    Examples:
        >>> import torch
        >>> log_probs = torch.tensor([-1.0, -3.0], requires_grad=True)
        >>> loss = sampled_reverse_kl(log_probs, torch.tensor([-1.5, -1.0]))
        >>> loss.sum().backward()
        >>> loss.tolist(), log_probs.grad.tolist()
        ([0.5, -2.0], [0.5, -2.0])
    """
    student, teacher = _pair("log_probs", log_probs, "teacher_log_probs", teacher_log_probs)
    student, teacher, infinite = common_support(student, teacher.detach())
    ratio = (student - teacher).detach()
    return (ratio * (1.0 + student - student.detach())).masked_fill(infinite, math.inf)


def anchor(student_log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Distance of the student from a reference policy, over the whole vocabulary.

    ::

        kl_divergence(student_log_probs, reference_log_probs.detach())

    Args:
        student_log_probs: [..., V], normalised, in nats.
        reference_log_probs: [..., V], normalised. The policy to stay near, usually the initial student.

    Returns:
        [...] nats per position, float32 (float64 for float64 inputs); +inf where the reference excludes a token
        that the student does not.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: the shapes or devices differ.

    Gradient: to student_log_probs only.

    Source: StableOPD, arXiv 2604.08527, equation 6.

    Examples:
        >>> import torch
        >>> p, reference = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(anchor(p, reference).item(), 4)
        0.1438
    """
    check_distribution("student_log_probs", student_log_probs)
    student, reference = _pair(
        "student_log_probs", student_log_probs, "reference_log_probs", reference_log_probs
    )
    return kl_divergence(student, reference.detach())


def anchor_estimate(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Distance from a reference policy, estimated from the sampled token without ever being negative.

    ::

        difference = reference_log_probs - log_probs
        exp(difference) - 1 - difference

    Averaged over tokens drawn from the policy, the value is KL(policy‖reference). The gradient is that of the other
    direction, KL(reference‖policy). The difference is bounded by 20 from above, for what ``exp`` can hold.

    Args:
        log_probs: [B, T] or any shape. Log-probability of the sampled token under the policy, in nats.
        reference_log_probs: shape of log_probs. The same under the reference.

    Returns:
        Non-negative nats per token, shape of log_probs, float32 (float64 for float64 inputs). A token the policy
        cannot have drawn gives 0, one the reference excludes +inf; both send no gradient.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: the shapes or devices differ.

    Gradient: to log_probs only.

    Source: the estimator k3 of http://joschu.net/blog/kl-approx.html, as in GRPO, arXiv 2402.03300, equation 4.

    Examples:
        >>> import torch
        >>> [round(x, 4) for x in anchor_estimate(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.5])).tolist()]
        [0.0, 0.1065]
    """
    policy, reference = _pair("log_probs", log_probs, "reference_log_probs", reference_log_probs)
    policy, reference, infinite = common_support(policy, reference.detach())
    difference = (reference - policy).clamp(max=LOG_RATIO_BOUND)
    return (torch.expm1(difference) - difference).masked_fill(infinite, math.inf)


def clip_entries(
    student_log_probs: Tensor, teacher_log_probs: Tensor, *, alpha: float, clip: float
) -> Tensor:
    """A divergence in which no entry of the vocabulary counts more than ``clip``.

    With p the student, q the teacher and M = (1−α)·p + α·q, the sum over the vocabulary of ``min(d, clip)``::

        alpha = 0        d = q * log(q / p) - q + p
        0 < alpha < 1    d = (1 - alpha) * p * log(p / M) + alpha * q * log(q / M)
        alpha = 1        d = p * log(p / q) - p + q

    No d is negative, and with clip = inf the sum is ``generalized_jsd``: the added p − q sums to 0. The terms
    q·log(q/p) alone can be negative, and clipping them from above can turn a divergence negative. Between the ends
    the terms are those of OPSD's code.

    Args:
        student_log_probs: [..., V], normalised, in nats.
        teacher_log_probs: [..., V], normalised.
        alpha: in [0, 1], as in ``generalized_jsd``.
        clip: in (0, inf], the most an entry counts, in nats. OPSD's code uses 0.05.

    Returns:
        [...] nats per position, float32 (float64 for float64 inputs). −inf entries are exact.

    Raises:
        TypeError: an argument is not a floating tensor, or alpha or clip not a number.
        ValueError: the shapes or devices differ, alpha is outside [0, 1], or clip not in (0, inf].

    Gradient: to both arguments, through the entries below the clip; detach the teacher.

    Source: OPSD, arXiv 2601.18734; the clip is in the paper's code, not in its first version. The terms at the ends
    are the Bregman form of the Kullback–Leibler divergence, not OPSD's.

    Examples:
        >>> import torch
        >>> p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.6, 0.4]).log()
        >>> [round(clip_entries(p, q, alpha=0.0, clip=clip).item(), 4) for clip in (0.05, 1.0, float("inf"))]
        [0.1, 0.3112, 0.3112]
    """
    check_distribution("student_log_probs", student_log_probs)
    log_p, log_q = _pair("student_log_probs", student_log_probs, "teacher_log_probs", teacher_log_probs)
    alpha = check_alpha(alpha)
    clip = check_real(
        "clip",
        clip,
        low=0.0,
        high=math.inf,
        open_low=True,
        meaning="the most an entry counts, for example 0.05",
    )
    if alpha == 0.0:
        entries = _kl_entries(log_q, log_p)
    elif alpha == 1.0:
        entries = _kl_entries(log_p, log_q)
    else:
        log_m = logaddexp(log_p + math.log1p(-alpha), log_q + math.log(alpha))
        entries = (1.0 - alpha) * _kl_entries(log_p, log_m) + alpha * _kl_entries(log_q, log_m)
    return entries.clamp(max=clip).sum(dim=-1)


def mixture_log_probs(
    log_probs: Sequence[Tensor], weights: Sequence[float], *, kind: Literal["geometric", "arithmetic"]
) -> Tensor:
    """One distribution made of several: what all agree on, or what any of them allows.

    ::

        geometric     log_softmax(Σ weights[i] * log_probs[i])      a token needs every teacher of weight > 0
        arithmetic    log(Σ weights[i] * exp(log_probs[i]))         a token needs one of them

    Args:
        log_probs: one tensor [..., V] per teacher, normalised, in nats, over one vocabulary.
        weights: one non-negative number per teacher; their sum is 1.
        kind: "geometric" or "arithmetic".

    Returns:
        [..., V] log-probabilities, float32 (float64 for float64 inputs). If no token is possible for all teachers,
        the geometric mixture is −inf everywhere.

    Raises:
        TypeError: log_probs is no sequence of floating tensors, a weight not a number, or kind not a str.
        ValueError: the shapes, devices or lengths differ, there is no teacher, a weight is negative, the sum is
            not 1, or an unknown kind.

    Gradient: to log_probs; the losses detach their teacher.

    Source: logarithmic and linear opinion pools (Genest and Zidek, 1986). A geometric pair is the trust region of
    SDPO, arXiv 2601.20802, section 2.

    Examples:
        >>> import torch
        >>> teachers = [torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()]
        >>> for kind in ("geometric", "arithmetic"):
        ...     print([round(p, 4) for p in mixture_log_probs(teachers, [0.5, 0.5], kind=kind).exp().tolist()])
        [0.75, 0.25]
        [0.7, 0.3]
    """
    check_choice("kind", kind, ("geometric", "arithmetic"))
    shares = _check_mixture(log_probs, weights)
    present = [
        (upcast(teacher), share) for teacher, share in zip(log_probs, shares, strict=True) if share > 0.0
    ]
    if kind == "geometric":
        # A weight of 0 is left out: 0 · (−∞) has no part in the sum.
        return renormalize(
            sum((share * teacher for teacher, share in present[1:]), present[0][1] * present[0][0])
        )
    return logsumexp(torch.stack([teacher + math.log(share) for teacher, share in present], dim=-1))


def _pair(name: str, value: Tensor, other_name: str, other: Tensor) -> tuple[Tensor, Tensor]:
    """Two floating tensors of one shape and device, in the working precision."""
    check_tensor(name, value, "floating")
    check_tensor(other_name, other, "floating")
    check_shape(other_name, other, value.shape, like=f"the shape of {name}")
    check_device(other_name, other, value, like=f"the device of {name}")
    return upcast(value), upcast(other)


def _kl_entries(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p·log(p/q) − p + q ≥ 0 per entry [..., V]; +inf without gradient where p > 0 = q, and q where p = 0."""
    p, q = log_p.exp(), log_q.exp()
    safe_p, safe_q, infinite = common_support(log_p, log_q)
    log_ratio = safe_p - safe_q
    # Near agreement p − q is a difference of near equals, q·expm1(log p/q) is not; far apart expm1 overflows.
    near = (log_ratio.abs() < 1.0) & (log_ratio != 0.0)
    difference = torch.where(near, q * torch.expm1(log_ratio.masked_fill(~near, 0.0)), p - q)
    return (p * log_ratio - difference).clamp(min=0.0).masked_fill(infinite, math.inf)


def _check_mixture(log_probs: Sequence[Tensor], weights: Sequence[float]) -> list[float]:
    """The weights of a mixture as floats, after checks of both arguments."""
    for name, value in (("log_probs", log_probs), ("weights", weights)):
        if isinstance(value, Tensor | str) or not isinstance(value, Sequence):
            raise TypeError(
                f"{name}: expected a sequence, got {type_name(value)}; pass a list, one item per teacher"
            )
    if not log_probs:
        raise ValueError("log_probs: expected at least one teacher, got none; pass one tensor [..., V] each")
    if len(weights) != len(log_probs):
        raise ValueError(
            f"weights: expected {len(log_probs)} numbers, one per teacher, got {len(weights)}; add or drop some"
        )
    for i, teacher in enumerate(log_probs):
        check_distribution(f"log_probs[{i}]", teacher)
        check_shape(f"log_probs[{i}]", teacher, log_probs[0].shape, like="the shape of log_probs[0]")
        check_device(f"log_probs[{i}]", teacher, log_probs[0], like="the device of log_probs[0]")
    meaning = "the teacher's share, at least 0"
    shares = [
        check_real(f"weights[{i}]", w, low=0.0, high=math.inf, meaning=meaning) for i, w in enumerate(weights)
    ]
    if not abs(math.fsum(shares) - 1.0) <= SUM_TOLERANCE:
        raise ValueError(f"weights: expected a sum of 1, got {math.fsum(shares):g}; divide each by the sum")
    return shares
