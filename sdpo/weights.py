"""Which rows and tokens a loss counts, and how much: the weights of the papers that followed SDPO.

A weight is no path for a gradient. Every function here detaches its inputs and returns a mask, or a factor to be
multiplied into a per-token loss or an advantage::

    route_rows              policy gradient or distillation, per row
    pass_rate_weights       one factor per row, from its group's pass rate
    confidence_weights      one factor per token, from the teacher's entropy
    evidence_weights        advantages scaled by what the teacher thinks of the sampled token
    evidence_gate           a factor in (0, 1) per token, from the same evidence
    contrastive_evidence    what a right demonstration says beyond a wrong one
    select_tokens           the tokens worth training on

Throughout, the gap of a sampled token is Δ = log q(y) − log p(y), teacher minus student.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from sdpo._numerics import log_ratio, logsumexp, upcast, zero_where_not
from sdpo._validate import LARGEST, check_device, check_real, check_shape, check_tensor
from sdpo.importance import LOG_RATIO_BOUND

# TIP lowers the highest 2 % of the entropies before it scales them, so that outliers do not shrink all the others.
ONE_IN_CLIPPED = 50


def route_rows(success: Tensor, has_teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Send each row to the policy gradient or to distillation, never to both.

    Failed rows that have a teacher signal are distilled. Correct rows, and failed rows without one, keep the policy
    gradient::

        distillation    = ~success & has_teacher
        policy_gradient = ~distillation

    Args:
        success: [B] bool. Whether the completion is correct.
        has_teacher: [B] bool. Whether the row has a demonstration or feedback to show to the teacher.

    Returns:
        ``(policy_gradient, distillation)``, two [B] bool masks. Every row is in exactly one of them.

    Raises:
        TypeError: an argument is not a bool tensor.
        ValueError: the shapes or devices differ.

    Gradient: none.

    Source: SRPO, arXiv 2604.02288, section 3.1.

    Examples:
        >>> import torch
        >>> success, has_teacher = torch.tensor([True, False, False]), torch.tensor([True, True, False])
        >>> [mask.tolist() for mask in route_rows(success, has_teacher)]
        [[True, False, True], [False, True, False]]
    """
    check_tensor("success", success, "bool")
    check_tensor("has_teacher", has_teacher, "bool")
    check_shape("has_teacher", has_teacher, success.shape, like="the shape of success")
    check_device("has_teacher", has_teacher, success, like="the device of success")
    distillation = ~success & has_teacher
    return ~distillation, distillation


def pass_rate_weights(success: Tensor, group_ids: Tensor) -> Tensor:
    """Weigh rows by how undecided their group is: most at a pass rate of one half, nothing at 0 and 1.

    With p the share of correct rows in the row's group::

        raw = sqrt(p * (1 - p))
        weights = raw / raw.mean()          # zeros if every raw weight is 0

    The mean over the rows of the call is 1, so the size of the loss stays. Pass all rows of a step at once: the
    weights of a part are not the part of the weights.

    Args:
        success: [B] bool. Whether the completion is correct.
        group_ids: [B] int64. Rows of one prompt share an id. Groups need not be contiguous or of one size.

    Returns:
        [B] float32 weights, multiplied into the loss of the row's tokens.

    Raises:
        TypeError: success is not bool, or group_ids not integer.
        ValueError: success is not one-dimensional, or the shapes or devices differ.

    Gradient: none.

    Source: SC-SDPO, arXiv 2605.27765. The paper normalises per batch; that this is a mean over rows, not over
    prompts, could not be verified. For groups of one size it is the same.

    Examples:
        >>> import torch
        >>> success = torch.tensor([True, False, True, True])
        >>> pass_rate_weights(success, torch.tensor([0, 0, 1, 1])).tolist()
        [2.0, 2.0, 0.0, 0.0]
    """
    check_tensor("success", success, "bool", min_ndim=1)
    check_shape("success", success, success.shape[:1], like="one dimension")
    check_tensor("group_ids", group_ids, "integer")
    check_shape("group_ids", group_ids, success.shape, like="the shape of success")
    check_device("group_ids", group_ids, success, like="the device of success")
    same_group = rearrange(group_ids, "b -> b 1") == group_ids
    size, passed = same_group.sum(dim=-1), (same_group & success).sum(dim=-1)
    # sqrt(p · (1 − p)) from the counts: exactly 0 for a group that agrees.
    raw = (passed * (size - passed)).float().sqrt() / size
    mean = raw.sum(dim=-1, keepdim=True) / max(raw.shape[-1], 1)
    return raw / mean.masked_fill(mean == 0.0, 1.0)


def confidence_weights(teacher_entropy: Tensor, loss_mask: Tensor, *, beta: float) -> Tensor:
    """Weigh tokens by how sure the teacher is of its own prediction.

    ::

        raw = exp(-beta * teacher_entropy)
        weights = raw / raw[loss_mask].mean()     # 0 outside loss_mask

    The mean over the active tokens is 1, so the size of the loss stays. What stands at inactive positions, even
    NaN or inf, has no influence. The mean is that of the tokens of the call: for weights that do not depend on how
    a step is split, pass all tokens of the step.

    Args:
        teacher_entropy: [B, T] or any shape, in nats. Entropy of the teacher's next-token distribution.
        loss_mask: bool, shape of teacher_entropy. The active tokens; in SRPO those of the distilled rows.
        beta: non-negative. 0 weighs all alike; SRPO uses 1.

    Returns:
        Weights of the shape of teacher_entropy, float32 (float64 for float64 input), 0 at inactive tokens. Zeros if
        nothing is active.

    Raises:
        TypeError: teacher_entropy is not floating, loss_mask not bool, or beta not a number.
        ValueError: the shapes or devices differ, or beta is negative or not finite.

    Gradient: none.

    Source: SRPO, arXiv 2604.02288, section 3.2; its beta is 1 (section 4.1).

    Examples:
        >>> import torch
        >>> entropy = torch.tensor([[0.0, 1.0986, float("nan")]])
        >>> weights = confidence_weights(entropy, torch.tensor([[True, True, False]]), beta=1.0)
        >>> [[round(w, 3) for w in row] for row in weights.tolist()]
        [[1.5, 0.5, 0.0]]
    """
    check_tensor("teacher_entropy", teacher_entropy, "floating")
    check_tensor("loss_mask", loss_mask, "bool")
    check_shape("loss_mask", loss_mask, teacher_entropy.shape, like="the shape of teacher_entropy")
    check_device("loss_mask", loss_mask, teacher_entropy, like="the device of teacher_entropy")
    beta = _check_beta(beta, "how fast a weight falls with the entropy, for example 1.0")
    log_raw = -beta * zero_where_not(upcast(teacher_entropy).detach(), loss_mask)
    # In logs: exp(−βH) of every token may underflow, their ratios do not.
    log_total = logsumexp(log_raw.masked_fill(~loss_mask, -math.inf).flatten())
    weights = (log_raw - log_total.masked_fill(log_total.isneginf(), 0.0)).exp() * loss_mask.sum()
    return zero_where_not(weights, loss_mask)


def evidence_weights(
    advantages: Tensor, log_probs: Tensor, teacher_log_probs: Tensor, *, mix: float, clip: float
) -> Tensor:
    """Advantages whose direction the reward decides and whose size per token the teacher modulates.

    With the gap Δ = teacher_log_probs − log_probs, λ = mix and ε = clip::

        advantages * ((1 - mix) + mix * clamp(exp(sign(advantages) * gap), 1 - clip, 1 + clip))

    A rewarded row is pushed harder where the teacher finds the token likelier than the student does, a punished row
    where it finds it less likely. The factor is never negative: whatever the teacher reads, a punishment does not
    become a reward.

    Args:
        advantages: [B], one per row, or [B, T].
        log_probs: [B, T] log-probability of the sampled token under the student, in nats.
        teacher_log_probs: [B, T] the same under the teacher.
        mix: λ in [0, 1], the teacher's share of the factor. RLSD starts at 0.5 and lowers it to 0.
        clip: ε in (0, 1], how far the factor may leave 1. RLSD uses 0.2.

    Returns:
        [B, T] advantages, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a floating tensor, or mix or clip not a number.
        ValueError: the shapes or devices do not match, or mix or clip is out of range.

    Gradient: none.

    Source: RLSD, arXiv 2604.03128.

    Examples:
        >>> import torch
        >>> gaps = torch.tensor([[0.1, -2.0], [0.1, -2.0]])
        >>> got = evidence_weights(torch.tensor([1.0, -1.0]), torch.zeros(2, 2), gaps, mix=1.0, clip=0.2)
        >>> [[round(a, 3) for a in row] for row in got.tolist()]
        [[1.105, 0.8], [-0.905, -1.2]]
    """
    gap = _gap(log_probs, teacher_log_probs)
    advantages = _per_token(advantages, gap)
    mix = check_real("mix", mix, low=0.0, high=1.0, meaning="the teacher's share of the factor, 0 for none")
    clip = check_real(
        "clip",
        clip,
        low=0.0,
        high=1.0,
        open_low=True,
        meaning="how far the factor may leave 1, for example 0.2",
    )
    factor = (advantages.sign() * gap).exp().clamp(1.0 - clip, 1.0 + clip)
    return advantages * ((1.0 - mix) + mix * factor)


def evidence_gate(log_probs: Tensor, teacher_log_probs: Tensor, *, beta: float) -> Tensor:
    """Open for tokens that the teacher endorses, close for tokens that it rejects.

    ::

        sigmoid(beta * (teacher_log_probs - log_probs))

    Args:
        log_probs: [B, T] or any shape. Log-probability of the sampled token under the student, in nats.
        teacher_log_probs: shape of log_probs. The same under the teacher.
        beta: non-negative sharpness. 0 gives one half everywhere; SDAR uses 5.

    Returns:
        Gates in [0, 1] of the shape of log_probs, float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument is not a floating tensor, or beta not a number.
        ValueError: the shapes or devices differ, or beta is negative or not finite.

    Gradient: none.

    Source: SDAR, arXiv 2605.15155 (gap gating).

    Examples:
        >>> import torch
        >>> gate = evidence_gate(torch.tensor([-1.0, -1.0]), torch.tensor([-0.5, -1.5]), beta=5.0)
        >>> [round(g, 3) for g in gate.tolist()]
        [0.924, 0.076]
    """
    gap = _gap(log_probs, teacher_log_probs)
    beta = _check_beta(beta, "how sharply the gate opens, for example 5.0")
    return (beta * gap).sigmoid()


def contrastive_evidence(right: Tensor, wrong: Tensor, wrong_mask: Tensor) -> Tensor:
    """What a right demonstration says about a token beyond what any demonstration of that form says.

    ::

        right - log(mean(exp(wrong[:, k]) over the k with wrong_mask[:, k]))

    The student's own log-probability would cancel: a difference of two gaps is a difference of two teachers. What
    any demonstration does to the text, to its style and its length, cancels too. The mean is one of probabilities,
    as in the paper's equation, not one of gaps.

    Args:
        right: [B, T] log-probability of the sampled token under the teacher that sees a right peer, in nats.
        wrong: [B, K, T] the same under teachers that see a wrong peer each, in the same template.
        wrong_mask: [B, K] bool. Which of the K wrong peers exist. A row without any has evidence 0.

    Returns:
        [B, T] evidence in nats, within ±20, float32 (float64 for float64 inputs). Positive: the right peer makes
        the token likelier than the wrong ones do. A row without a right peer must be masked by the caller.

    Raises:
        TypeError: right or wrong is not floating, or wrong_mask not bool.
        ValueError: the shapes or devices do not match.

    Gradient: none.

    Source: RLCSD, arXiv 2606.11709, equation 7.

    Examples:
        >>> import torch
        >>> right, wrong = torch.tensor([[0.6]]).log(), torch.tensor([[[0.1], [0.2], [0.9]]]).log()
        >>> evidence = contrastive_evidence(right, wrong, torch.tensor([[True, True, False]]))
        >>> round(evidence.exp().item(), 4)
        4.0
    """
    check_tensor("right", right, "floating", min_ndim=1)
    check_tensor("wrong", wrong, "floating", min_ndim=2)
    check_tensor("wrong_mask", wrong_mask, "bool", min_ndim=1)
    peers = wrong.shape[-2]
    check_shape(
        "wrong", wrong, (*right.shape[:-1], peers, right.shape[-1]), like="right with an axis of peers"
    )
    check_shape("wrong_mask", wrong_mask, (*right.shape[:-1], peers), like="one per row and wrong peer")
    check_device("wrong", wrong, right, like="the device of right")
    check_device("wrong_mask", wrong_mask, right, like="the device of right")
    missing = rearrange(~wrong_mask, "... k -> ... 1 k")
    per_peer = rearrange(upcast(wrong).detach(), "... k t -> ... t k").masked_fill(missing, -math.inf)
    count = reduce(wrong_mask, "... k -> ... 1", "sum")
    log_mean = logsumexp(per_peer) - count.clamp(min=1).to(per_peer.dtype).log()
    return zero_where_not(_gap(log_mean, right), count > 0)


def select_tokens(
    student_entropy: Tensor, divergence: Tensor, loss_mask: Tensor, *, fraction: float
) -> Tensor:
    """Keep the tokens where the student is uncertain, or certain and at odds with the teacher.

    In each row, over its active tokens, both quantities are scaled to [0, 1] and joined by a soft "or"; the tokens
    of the highest scores stay::

        h = student_entropy, the highest active // 50 values lowered to the next one
        h, d = ((x - x.min()) / (x.max() - x.min()) for x in (h, divergence))    # 0 where all are equal
        score = 1 - (1 - h) * (1 - d)                                            # high if h or d is high
        keep the ceil(fraction * active) highest scores; of equal scores the earlier token

    The number of kept tokens is exact. The selection of a row does not depend on the other rows. What stands at
    inactive positions, even NaN or inf, has no influence.

    Args:
        student_entropy: [B, T] or [..., T], in nats. Entropy of the student's next-token distribution.
        divergence: shape of student_entropy. Any divergence between student and teacher that ranks disagreement.
        loss_mask: bool, shape of student_entropy. The active tokens.
        fraction: in (0, 1], the share of each row's active tokens to keep, rounded up.

    Returns:
        Bool mask of the shape of student_entropy, a subset of loss_mask.

    Raises:
        TypeError: student_entropy or divergence is not floating, loss_mask not bool, or fraction not a number.
        ValueError: the shapes or devices differ, there is no token dimension, or fraction is out of range.

    Gradient: none.

    Source: TIP, arXiv 2604.14084, equations 7 and 8 and section 6. The paper scales over the batch and rounds down;
    here each row is scaled by itself, so that no split of a batch changes the selection, and rounded up, so that no
    active row is left without a token.

    Examples:
        >>> import torch
        >>> entropy, divergence = torch.tensor([[2.0, 0.1, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 3.0, 0.2]])
        >>> select_tokens(entropy, divergence, torch.ones(1, 4, dtype=torch.bool), fraction=0.5).tolist()
        [[True, False, True, False]]
    """
    check_tensor("student_entropy", student_entropy, "floating", min_ndim=1)
    check_tensor("divergence", divergence, "floating")
    check_tensor("loss_mask", loss_mask, "bool")
    for name, value in (("divergence", divergence), ("loss_mask", loss_mask)):
        check_shape(name, value, student_entropy.shape, like="the shape of student_entropy")
        check_device(name, value, student_entropy, like="the device of student_entropy")
    fraction = check_real(
        "fraction", fraction, low=0.0, high=1.0, open_low=True, meaning="the share of tokens to keep"
    )
    if loss_mask.shape[-1] == 0:
        return loss_mask
    entropy = upcast(student_entropy).detach()
    # An infinite divergence ranks first, and still leaves a finite scale.
    disagreement = upcast(divergence).detach().clamp(max=1e30)
    active = reduce(loss_mask, "... t -> ... 1", "sum")
    descending = entropy.masked_fill(~loss_mask, -math.inf).sort(dim=-1, descending=True).values
    h = _scaled(torch.minimum(entropy, descending.gather(-1, active // ONE_IN_CLIPPED)), loss_mask)
    d = _scaled(disagreement, loss_mask)
    # Of h + d - h * d, rounding would say which of the two tokens with h = 1 or d = 1 ranks first.
    score = (1.0 - (1.0 - h) * (1.0 - d)).masked_fill(~loss_mask, -math.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    # The inverse of a permutation: the rank of each token.
    rank = order.sort(dim=-1).indices
    return loss_mask & (rank < rounded_up(fraction, active))


def _check_beta(beta: object, meaning: str) -> float:
    """Return ``beta`` as a finite, non-negative float."""
    return check_real("beta", beta, low=0.0, high=LARGEST, meaning=meaning)


def _gap(log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
    """Δ = teacher − student [...] of the sampled tokens, detached, within ±20; 0 where both are −inf."""
    check_tensor("log_probs", log_probs, "floating")
    check_tensor("teacher_log_probs", teacher_log_probs, "floating")
    check_shape("teacher_log_probs", teacher_log_probs, log_probs.shape, like="the shape of log_probs")
    check_device("teacher_log_probs", teacher_log_probs, log_probs, like="the device of log_probs")
    gap = log_ratio(upcast(teacher_log_probs).detach(), upcast(log_probs).detach())
    return gap.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _per_token(advantages: Tensor, like: Tensor) -> Tensor:
    """Detached advantages [..., T], from one per row [...] or per token [..., T] as ``like`` has it."""
    check_tensor("advantages", advantages, "floating")
    check_device("advantages", advantages, like, like="the device of log_probs")
    advantages = upcast(advantages).detach()
    if advantages.ndim == like.ndim - 1:
        check_shape("advantages", advantages, like.shape[:-1], like="one per row")
        return repeat(advantages, "... -> ... t", t=like.shape[-1])
    check_shape("advantages", advantages, like.shape, like="one per row or the shape of log_probs")
    return advantages


def _scaled(values: Tensor, mask: Tensor) -> Tensor:
    """Map ``values`` [..., T] to [0, 1] over the active tokens of each row; 0 elsewhere and where all are equal."""
    low = values.masked_fill(~mask, math.inf).amin(dim=-1, keepdim=True)
    high = values.masked_fill(~mask, -math.inf).amax(dim=-1, keepdim=True)
    differs = mask & (high > low)
    return zero_where_not((values - low) / (high - low).masked_fill(~(high > low), 1.0), differs)


def rounded_up(fraction: float, count: Tensor | int) -> Tensor | int:
    """ceil(fraction · count) of integers, the fraction read to nine digits."""
    # In integers: 0.07 of 100 is 7, where floats say 7.000…1. Minus one unit: a rounded digit must not add a token.
    parts = max(round(fraction * 10**9) - 1, 1)
    return -((-parts * count) // 10**9)
