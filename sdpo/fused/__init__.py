"""The fused loss: from hidden states and LM heads to the numbers of the plain loss, one chunk of tokens at a time.

The logits of a whole batch are the largest tensor of a training step, and a divergence computed from them allocates
several more. Here the logits of a few hundred tokens exist at a time, and their gradient is computed with them.

    _validate, _plan    arguments; backend and chunk size
    _policy             the policy gradient of a token
    _autograd           the autograd functions; _derivatives: what they refuse
    _chunks, _matmul    the loop over chunks; its matrix products
    _rows               chunks of whole rows, whose statistics weigh their tokens
    _given              the distribution of a teacher whose top K are given
    _torch, triton/     the loss of one chunk and the gradient of its logits, in plain torch and in kernels
    _log_probs          log-probabilities and entropies of one model, without a loss; _log_probs_autograd: gradients
    _types              what these modules exchange
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sdpo._numerics import log_ratio
from sdpo._validate import check_choice
from sdpo.fused._autograd import per_token_loss, policy_clipped, total_loss
from sdpo.fused._log_probs import LogProbsAndEntropy as LogProbsAndEntropy
from sdpo.fused._log_probs import fused_log_probs as fused_log_probs
from sdpo.fused._log_probs import fused_log_probs_and_entropy as fused_log_probs_and_entropy
from sdpo.fused._plan import make_plan
from sdpo.fused._types import LMHead, Objective, Operands, Support, SurrogateKind, Tail, TokenStats
from sdpo.fused._validate import (
    check_head,
    check_objective,
    check_operands,
    check_row_factors,
    check_surrogate,
    check_teacher,
    find_active,
    refuse_vmap,
    row_lengths,
)
from sdpo.given import TeacherTopK
from sdpo.metrics import mean_metrics
from sdpo.token_factors import TokenWeights


class FusedOutput(NamedTuple):
    """The loss of one micro-batch and statistics of its tokens: add totals and counts, then divide.

    Per-token fields have the shape [...] of ``tokens`` and are 0 where ``loss_mask`` is false. They are float32
    (float64 for float64 inputs), log-probabilities and divergences in nats. With support "given" the teacher's mass
    outside the K tokens, 1e-6 at least, is taken as spread evenly over all other tokens: for teacher_entropy, which
    is an upper bound then, and for teacher_log_probs of a token that is not among the K.

    Args:
        total: [] Σ weights · per_token + policy_weights · policy_loss over the active tokens.
        count: [] int64, number of active tokens.
        per_token: divergence of a token, unweighted.
        weights: importance weight × the caller's weight × (1 − policy_weight) × the factors of ``token_factors``
            for ``token_fraction`` and ``token_weights``, without unit.
        policy_loss: surrogate of the policy gradient, unweighted, in units of the advantage; None without
            advantages, or with a policy_weight of 0.0.
        policy_weights: the caller's weight × policy_weight, without unit; None likewise.
        log_probs: student's log-probability of the sampled token.
        teacher_log_probs: teacher's log-probability of the sampled token.
        student_entropy: entropy of the student over the full vocabulary.
        teacher_entropy: entropy of the teacher over the full vocabulary.
        student_topk_mass: student's probability on the support.
        teacher_topk_mass: teacher's probability on the support.
        student_log_tail: student's log-probability outside the support; −inf if nothing is outside.
        teacher_log_tail: teacher's log-probability outside the support; −inf if nothing is outside.
        metrics: detached scalars: means over the active tokens, and ``active_tokens``.

    Gradient: ``total`` carries it, ``per_token`` and ``policy_loss`` only with ``reduction="none"``; all other
    fields carry none.

    Source: SDPO, arXiv 2601.20802, section 2.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # shadows tuple.count on purpose
    per_token: Tensor
    weights: Tensor
    policy_loss: Tensor | None
    policy_weights: Tensor | None
    log_probs: Tensor
    teacher_log_probs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_topk_mass: Tensor
    teacher_topk_mass: Tensor
    student_log_tail: Tensor
    teacher_log_tail: Tensor
    metrics: dict[str, Tensor]

    def mean(self) -> Tensor:
        """``total / count``; exactly 0, with gradients of exactly 0, if no token is active.

        For one micro-batch in one process. Over several, divide the sum of all totals by the sum of all counts.

        Returns:
            [] nats. Gradient: that of ``total``.
        """
        return self.total / self.count.clamp(min=1)


def fused_distillation_loss(
    student: LMHead,
    teacher: LMHead | TeacherTopK,
    tokens: Tensor,
    *,
    support: Support,
    k: int | None = None,
    tail: Tail | None = None,
    alpha: float,
    temperature: float,
    loss_mask: Tensor,
    old_log_probs: Tensor | None = None,
    is_clip: float | None = None,
    weights: Tensor | None = None,
    advantages: Tensor | None = None,
    policy_weight: float | Tensor | None = None,
    token_fraction: float | None = None,
    token_weights: TokenWeights | None = None,
    surrogate: SurrogateKind = "clipped",
    clip_low: float | None = None,
    clip_high: float | None = None,
    sapo_temperatures: tuple[float, float] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reference: LMHead | None = None,
    trust_region_coef: float | None = None,
    reduction: Literal["sum", "none"] = "sum",
    chunk_size: int | None = None,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> FusedOutput:
    """Self-distillation loss from hidden states and LM heads, in the memory of one chunk of logits.

    With ``advantages`` the policy gradient comes from the same pass. Without, the same numbers as::

        logits(h, W, b) = softcap * tanh(logit_scale * (h @ W.T + b) / softcap)    # without softcap: no tanh
        p, q = logits(*student), logits(*teacher).detach()
        per_token = distillation_loss(p, q, tokens=tokens, support=support, k=k, tail=tail, alpha=alpha,
                                      temperature=temperature)
        log_probs = log_softmax(p / temperature)[tokens]
        weights = importance_weights(log_probs, old_log_probs, clip=is_clip) * weights
        total, count = (weights * per_token)[loss_mask].sum(), loss_mask.sum()

    Products accumulate in float32 whatever the inputs. On a GPU the accumulation bias of its tensor cores is
    measured at the first call and corrected, and the kernels recompute the logits of the likeliest tokens exactly,
    if the support is one model's top K. The gradient of a bf16 weight, like that of several micro-batches, is
    rounded to bf16 after each block of a few thousand tokens. Tokens outside ``loss_mask`` are never projected.

    A trust-region teacher q ∝ q_ref^(1−c) · q_live^c is ``teacher``, the live model, with ``reference``, the model
    that it stays near, and c = ``trust_region_coef``. If ``reference.weight is teacher.weight``, ``reference.bias
    is teacher.bias`` and there is no soft-cap, both share one product (two if the weight has 16 bits).

    With ``advantages`` A and ``policy_weight`` λ, where ``ratio`` is exp(log_probs − old_log_probs), its exponent
    bounded by ±20, and 1 where ``old_log_probs`` is NaN or not given::

        clipped    policy_loss = -min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A)
        cispo      policy_loss = -stop_gradient(clamp(ratio, 1 - clip_low, 1 + clip_high)) * A * log_probs
        sapo       policy_loss = -4 / t * sigmoid(t * (ratio - 1)) * A    # t of positive or of other advantages
        total = (weights * (λ * policy_loss + (1 - λ) * importance_weights * per_token))[loss_mask].sum()

    The loss types of TRL are a surrogate and ``weights``, with B rows of L tokens each and T tokens in the batch::

        grpo, sapo     1 / (B * L)
        bnpo           1 / T, of the micro-batch
        dapo, cispo    1 / T, of the optimizer step; cispo with clip_low 1 and clip_high epsilon_high - 1
        dr_grpo        1 / (B * max_completion_length)
        luspo          1 / B

    Not in this pass: ratios of whole sequences (GSPO, vespo), two-sided clipping, entropies. ``fused_log_probs``
    and ``fused_log_probs_and_entropy`` have the gradients that these need, for a second product with the head. Any
    objective whose derivative d w.r.t. log_probs is known before the call has the gradient of A = −d without
    ``old_log_probs``.

    The same inputs give the same bits on one device. Under ``torch.autocast`` the products run in autocast's dtype.
    ``torch.compile`` of a caller breaks its graph here.

    Args:
        student: LMHead of hidden [..., D], weight [V, D] and bias [V] or None, floating.
        teacher: LMHead of hidden [..., D'], weight [V, D'] and bias [V] or None, floating; D' may differ from D.
            With support "given" a TeacherTopK of ids and log_probs [..., K], as ``given_topk_distillation_loss``
            takes them; ``temperature``, ``softcap`` and ``logit_scale`` are of the student alone then.
        tokens: [...] int64 or int32, the sampled tokens. Where ``loss_mask`` is false any id will do.
        support: the tokens on which the models are compared: the K likeliest of the "student" or the "teacher", the
            "full" vocabulary, the "sampled" token, a surrogate for the reverse divergence (alpha 1), or the "given"
            tokens of a served teacher.
        k: number of tokens in [1, V] with support "student" or "teacher", else None.
        tail: the probability outside the support becomes one more category ("bucket"), or the models are
            conditioned on the support ("renormalize"). None with support "full" and "sampled".
        alpha: in [0, 1]: 0 for KL(teacher‖student), 1 for KL(student‖teacher), between them the generalized JSD.
        temperature: > 0, divides the logits of both models: the sampling temperature of the rollout.
        loss_mask: [...] bool, true where a token has a loss.
        old_log_probs: [...] floating, the student's log-probabilities at rollout in nats, for importance weights
            and the ratio of the policy gradient; NaN gives 1. None: no importance weights, and a ratio of 1.
        is_clip: > 0, the largest importance weight. None for no importance weights; needed with ``old_log_probs``
            unless there are ``advantages``.
        weights: [...] floating, finite and ≥ 0, further factors of each token: rollout correction, row weights,
            1/length for a mean over sequences. None: 1.
        advantages: [...], or one per row, floating and finite, of the policy gradient. None: no policy gradient.
        policy_weight: λ in [0, 1], a number or a floating tensor [...], or one per row: the share of the policy
            gradient. With the number 0 nothing of it is computed. None if and only if ``advantages`` is.
        token_fraction: in (0, 1], the share of each row's active tokens whose divergence counts, rounded up (TIP).
            If the rows fit a chunk and there is no policy gradient, the others have no part in the product for the
            hidden gradient. None: all.
        token_weights: function of ``TokenStatistics`` [R, T] of R rows and the mask [R, T] of their tokens with a
            divergence that returns factors [R, T] of it, such as the confidence of the teacher; finite, ≥ 0, and it
            must leave its arguments as they are. Called without gradient, once per chunk of whole rows. On a device
            no factor is read, which would wait for it: one below 0 makes the loss NaN, as NaN does. None: 1.
        surrogate: the policy loss: "clipped" of PPO and GRPO, "cispo" or "sapo".
        clip_low: in [0, 1], the lower half-width of the ratio's range, for example 0.2. None with "sapo", without
            ``advantages``, or, since it has no effect, without ``old_log_probs``.
        clip_high: in [0, inf], the upper half-width. None as ``clip_low``.
        sapo_temperatures: > 0, those of positive and of other advantages, for example (1.0, 1.05). None unless
            ``surrogate`` is "sapo".
        softcap: > 0, bound of the logits (Gemma 2's final soft-cap). None: no bound.
        logit_scale: > 0, factor of the logits before the soft-cap.
        reference: LMHead of the model that a trust region stays near, with the shapes of ``teacher``. None for any
            other teacher.
        trust_region_coef: c in [0, 1], the weight of the live model. None if and only if ``reference`` is.
        reduction: with "sum" ``total`` alone has a gradient, with "none" ``per_token`` and ``policy_loss`` too, for
            callers that reduce them themselves; backward then computes all chunks a second time if the head is
            trainable or there is a policy gradient. Differentiate the total or the others: their sum counts twice.
        chunk_size: number of tokens whose logits exist at a time. None: chosen by the shapes and the device's total
            memory.
        backend: "torch" runs anywhere, "triton" is the kernels, "auto" the kernels on a GPU where they apply.

    Returns:
        FusedOutput with total, count, per-token statistics, and the metrics of ``mean_metrics`` with
        ``is_clip_fraction`` and ``sampled_token_overlap`` (min(p, q) / max(p, q) of the sampled token). With a
        policy gradient also ``policy_loss`` and ``policy_clip_fraction``, the share of tokens whose gradient the
        ratio's range stops, with "cispo" limits; 0 with "sapo".

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, tensors on several devices, scalars out of range, arguments that exclude
            or need each other, a backend that cannot run here; on a CPU also an active token outside [0, V), an
            advantage that is not finite, a policy weight outside [0, 1], or what ``check_teacher_topk`` refuses.
        NotImplementedError: under ``torch.func.vmap``, and for forward-mode or second derivatives.

    Gradient: from ``total`` to student.hidden, student.weight and student.bias; first derivatives in reverse mode
    (``torch.func.grad`` included). It is computed in the forward pass and scaled in backward.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation). Policy losses: ``clipped_policy_gradient``;
    CISPO, arXiv 2506.13585; SAPO, arXiv 2511.20347; each as in TRL.

    Examples:
        >>> import torch
        >>> rng = torch.Generator().manual_seed(0)
        >>> hidden = torch.randn(2, 3, 4, generator=rng).requires_grad_()
        >>> weight, teacher_hidden = torch.randn(11, 4, generator=rng), torch.randn(2, 3, 4, generator=rng)
        >>> out = fused_distillation_loss(
        ...     LMHead(hidden, weight), LMHead(teacher_hidden, weight), torch.zeros(2, 3, dtype=torch.long),
        ...     support="student", k=5, tail="bucket", alpha=0.5, temperature=1.0,
        ...     loss_mask=torch.tensor([[True, True, False], [True, False, False]]),
        ... )
        >>> out.mean().backward()
        >>> out.count.item(), hidden.grad[1, 1:].abs().sum().item(), tuple(out.log_probs.shape)
        (3, 0.0, (2, 3))
    """
    objective = check_objective(
        vocabulary=check_head("student", student).weight.shape[0],
        given_k=check_teacher(teacher, support),
        support=support,
        k=k,
        tail=tail,
        alpha=alpha,
        is_clip=is_clip,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        trust_region_coef=trust_region_coef,
        surrogate=check_surrogate(
            advantages=advantages,
            policy_weight=policy_weight,
            old_log_probs=old_log_probs,
            surrogate=surrogate,
            clip_low=clip_low,
            clip_high=clip_high,
            sapo_temperatures=sapo_temperatures,
        ),
    )
    check_choice("reduction", reduction, ("sum", "none"))
    factors = check_row_factors(
        token_fraction=token_fraction,
        token_weights=token_weights,
        loss_mask=loss_mask,
        support=objective.support,
        reduction=reduction,
    )
    operands = check_operands(
        student=student,
        teacher=teacher,
        reference=reference,
        tokens=tokens,
        loss_mask=loss_mask,
        old_log_probs=old_log_probs,
        weights=weights,
        advantages=advantages,
        policy_weight=policy_weight,
        objective=objective,
    )
    objective = replace(objective, row_factors=factors)
    return _evaluate(operands, objective, loss_mask, reduction, chunk_size, backend)


# torch.compiler.disable, but without importing the compiler before the first call.
@torch._disable_dynamo
def _evaluate(
    operands: Operands,
    objective: Objective,
    loss_mask: Tensor,
    reduction: str,
    chunk_size: int | None,
    backend: str,
) -> FusedOutput:
    refuse_vmap(*operands.flatten(), loss_mask)
    plan = make_plan(operands, objective, chunk_size=chunk_size, backend=backend)
    operands = find_active(operands, loss_mask)
    if objective.row_factors is not None:
        plan = plan._replace(row_lengths=row_lengths(loss_mask))
    compute = per_token_loss if reduction == "none" else total_loss
    loss = compute(operands, objective, plan)

    def scatter(values: Tensor) -> Tensor:
        """Values [..., n] of the active tokens, in the shape of the mask; zeros elsewhere."""
        if operands.active is not None:
            zeros = values.new_zeros(*values.shape[:-1], loss_mask.numel())
            values = zeros.index_copy(-1, operands.active, values)
        return values.unflatten(-1, loss_mask.shape)

    stats = loss.stats.detach()
    fields = TokenStats(*scatter(stats).unbind())._asdict() | {"per_token": scatter(loss.per_token)}
    del fields["clipped"]
    policy_weights, policy_metrics = operands.of_active(operands.policy_weights), {}
    clipped = policy_clipped(stats, operands, objective)
    if loss.policy_loss is not None and clipped is not None:
        policy_metrics = {"policy_loss": loss.policy_loss, "policy_clip_fraction": clipped}
    metrics = _metrics(TokenStats(*stats.unbind()), policy_metrics)
    return FusedOutput(
        total=loss.total,
        count=metrics["active_tokens"],
        policy_loss=None if loss.policy_loss is None else scatter(loss.policy_loss),
        policy_weights=None if policy_weights is None else scatter(policy_weights),
        metrics=metrics,
        **fields,
    )


def _metrics(stats: TokenStats, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Means over the active tokens, of ``others`` too."""
    return mean_metrics(
        stats.per_token,
        stats.weights,
        stats,
        is_clip_fraction=stats.clipped,
        sampled_token_overlap=log_ratio(stats.log_probs, stats.teacher_log_probs).abs().neg().exp(),
        **others,
    )
