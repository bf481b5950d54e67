"""The fused loss: from hidden states and LM heads to the numbers of the plain losses, a chunk of tokens at a time.

Logits of a whole batch are the largest tensor of a training step, and a divergence written over them keeps several.
Here the logits of a few hundred tokens exist at a time, and their gradient is made before they go.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sdpo.fused import _plan as doors
from sdpo.fused._autograd import per_token_loss, total_loss
from sdpo.fused._types import Support, Tail, TokenStats


class FusedOutput(NamedTuple):
    """Sum, count and all that the pass knows of every token. Add totals and counts over micro-batches, then divide.

    Per-token fields have the shape of ``tokens``, in float32 (float64 for float64 inputs), and hold 0 where the
    mask is false.
    """

    total: Tensor  # [] Σ weights · per_token over the active tokens, carries the gradient
    count: Tensor  # type: ignore[assignment]  # [] int64, number of active tokens
    per_token: Tensor  # divergence in nats, unweighted; carries the gradient only with reduction="none"
    weights: Tensor  # importance weight × extra weight
    log_probs: Tensor  # student's log-probability of the sampled token
    teacher_log_probs: Tensor  # teacher's log-probability of the sampled token
    student_entropy: Tensor  # nats, over the full vocabulary
    teacher_entropy: Tensor
    student_topk_mass: Tensor  # probability on the support
    teacher_topk_mass: Tensor
    student_log_tail: Tensor  # log-probability outside the support; −inf if nothing is outside
    teacher_log_tail: Tensor
    metrics: dict[str, Tensor]  # detached scalars: means over the active tokens


def fused_topk_distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    tokens: Tensor,
    *,
    k: int | None,
    alpha: float,
    tail: Tail,
    temperature: float,
    loss_mask: Tensor,
    old_log_probs: Tensor | None = None,
    is_clip: float | None = None,
    extra_weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    backend: Literal["auto", "torch", "triton"] = "auto",
    support: Support = "student",
    reference_hidden: Tensor | None = None,
    reference_head: Tensor | None = None,
    reference_bias: Tensor | None = None,
    trust_region_coef: float | None = None,
    reduction: Literal["sum", "none"] = "sum",
) -> FusedOutput:
    """Self-distillation loss from hidden states and LM heads, in the memory of one chunk of logits.

    The same numbers as::

        logits(h, W, b) = softcap · tanh(logit_scale · (h @ W.T + b) / softcap) / temperature
        student, teacher = logits(student_hidden, ...), logits(teacher_hidden, ...).detach()
        per_token = topk_distillation_loss(student, teacher, k=k, alpha=alpha, tail=tail, support=support)
        weights = importance_weights(log_softmax(student)[tokens], old_log_probs, clip=is_clip) * extra_weights
        total, count = (weights * per_token)[loss_mask].sum(), loss_mask.sum()

    without softcap: no tanh. Products accumulate in float32 whatever the inputs; what a GPU's matrix units cut off
    of such a sum on average is measured at the first call, and given back; with the kernels and a top-K support
    the likeliest tokens' logits are made again, without loss. The gradient of a bf16 head, like that of several
    micro-batches, is rounded to bf16 after each block of a few thousand tokens. Tokens outside ``loss_mask`` are
    never projected. The gradient is made in the forward pass: backward only scales it.

    ``support="student"`` or ``"teacher"`` takes that model's K likeliest tokens, ``k=None`` the full vocabulary,
    and ``support="sampled"`` (with ``k=None, alpha=1``) the surrogate of ``sampled_token_distillation_loss``.

    A trust-region teacher q ∝ q_ref^(1−c)·q_live^c comes from two hidden states: ``teacher_hidden`` of the live
    model, ``reference_hidden`` of the centre, c = ``trust_region_coef``. ``reference_head`` None means the
    teacher's head and bias; then, without soft-cap, both cost one product, or two of 16-bit tensors, in the buffer
    of one.

    ``extra_weights`` is the place of everything else that multiplies a token: rollout correction, row weights,
    1/length for a mean over sequences. ``reduction="none"`` gives ``per_token`` a gradient too, for those
    who reduce by themselves; with a learning head or bias that costs a second pass in backward. ``total`` keeps
    its own, which is that of Σ weights · per_token: differentiate one of the two, their sum counts twice.

    Shapes: student_hidden [..., D], teacher_hidden and reference_hidden [..., D'], heads [V, D] and [V, D'],
    biases [V], tokens, loss_mask (bool), old_log_probs and extra_weights [...]: one leading shape for all, such
    as [N] or [B, T]. Unit: nats, float32 (float64 for float64 inputs). Gradient: from ``total`` to
    student_hidden, student_head and student_bias; once, not twice. NaN in old_log_probs: weight 1.

    ``chunk_size`` tokens have logits at a time; None chooses from the free memory. ``backend="auto"`` takes the
    Triton kernels on a GPU, where they apply, else torch. The same inputs give the same bits on one device, given
    the same ``chunk_size``. Under ``torch.autocast`` the products run in autocast's dtype. ``torch.func.grad``
    works, ``torch.func.vmap`` does not; ``torch.compile`` of a caller breaks its graph here.

    Metrics: divergence (unweighted), weight, is_clip_fraction, student_entropy, teacher_entropy,
    student_topk_mass, teacher_topk_mass, student_tail_mass, teacher_tail_mass, sampled_token_overlap
    (its min(p, q) / max(p, q)), all means over the active tokens, and active_tokens.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, tensors on several devices, scalars out of range, a backend that cannot
            run here; on a CPU also an active token outside [0, V), which a GPU would have to be waited for.

    Source: SDPO, arXiv 2601.20802, section 2 (top-K distillation).

    Example:
        >>> import torch
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch._C.Generator object at ...>
        >>> hidden = torch.randn(2, 3, 4, requires_grad=True)
        >>> head, teacher_hidden = torch.randn(11, 4), torch.randn(2, 3, 4)
        >>> out = fused_topk_distillation_loss(
        ...     hidden, head, teacher_hidden, head, torch.zeros(2, 3, dtype=torch.long), k=5, alpha=0.5,
        ...     tail="bucket", temperature=1.0, loss_mask=torch.tensor([[True, True, False], [True, False, False]]),
        ... )
        >>> (out.total / out.count).backward()
        >>> out.count.item(), hidden.grad[1, 1:].abs().sum().item(), tuple(out.log_probs.shape)
        (3, 0.0, (2, 3))
    """
    return _fused(
        (student_hidden, student_head, student_bias),
        (teacher_hidden, teacher_head, teacher_bias),
        (reference_hidden, reference_head, reference_bias),
        _Tokens(tokens, loss_mask, old_log_probs, extra_weights),
        {
            "k": k,
            "alpha": alpha,
            "tail": tail,
            "support": support,
            "is_clip": is_clip,
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "trust_region_coef": trust_region_coef,
        },
        {"chunk_size": chunk_size, "backend": backend},
        reduction,
    )


class _Tokens(NamedTuple):
    tokens: Tensor
    loss_mask: Tensor
    old_log_probs: Tensor | None
    extra_weights: Tensor | None


# torch.compiler.disable, but without importing the compiler before the first call.
@torch._disable_dynamo
def _fused(
    student: doors.Model,
    teacher: doors.Model,
    reference: doors.Model,
    given: _Tokens,
    objective: dict[str, Any],
    execution: dict[str, Any],
    reduction: str,
) -> FusedOutput:
    recipe = doors.check_objective(vocabulary=doors.check_head("student_head", student[1]), **objective)
    operands = doors.check_operands(
        student=student,
        teacher=teacher,
        reference=reference,
        trust_region_coef=recipe.trust_region_coef,
        **given._asdict(),
    )
    plan = doors.make_plan(operands, recipe, **execution)
    loss = per_token_loss if doors.check_reduction(reduction) == "none" else total_loss
    operands = doors.find_active(operands, given.loss_mask)
    total, per_token, stats = loss(operands, recipe, plan)
    shape = given.tokens.shape

    def laid_out(values: Tensor) -> Tensor:
        """[..., n] at the active tokens of [..., *shape], zeros elsewhere."""
        if operands.active is not None:
            zeros = values.new_zeros(*values.shape[:-1], shape.numel())
            values = zeros.index_copy(-1, operands.active, values)
        return values.unflatten(-1, shape)

    stats = stats.detach()
    known = TokenStats(*laid_out(stats).unbind())._asdict()
    fields = {name: known[name] for name in FusedOutput._fields if name in known}
    fields["per_token"] = laid_out(per_token)
    count = given.loss_mask.sum()
    metrics = _metrics(TokenStats(*stats.unbind()), count)
    return FusedOutput(total=total, count=count, metrics=metrics, **fields)


def _metrics(stats: TokenStats, count: Tensor) -> dict[str, Tensor]:
    values = {
        "divergence": stats.per_token,
        "weight": stats.weights,
        "is_clip_fraction": stats.clipped,
        "student_entropy": stats.student_entropy,
        "teacher_entropy": stats.teacher_entropy,
        "student_topk_mass": stats.student_topk_mass,
        "teacher_topk_mass": stats.teacher_topk_mass,
        "student_tail_mass": stats.student_log_tail.exp(),
        "teacher_tail_mass": stats.teacher_log_tail.exp(),
        "sampled_token_overlap": (stats.log_probs - stats.teacher_log_probs).abs().neg().exp(),
    }
    # Few operations: each is a launch.
    means = torch.stack([*values.values()]).sum(dim=1) / count.clamp(min=1)
    return dict(zip(values, means.unbind(), strict=True)) | {"active_tokens": count}
