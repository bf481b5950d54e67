"""One chunk of the fused loss through the kernels: what ``sdpo.fused._torch.chunk_loss`` computes, in fewer passes.

A model owns the support if the support is its own top K. The owner's vocabulary is reduced to blocks and groups,
and the support is selected from the groups. The other model's logits are gathered there and masked in its
products, so that the reduction of its vocabulary that follows covers the tokens outside alone. Small kernels on
[C, K] follow, and a pass for the gradient outside the support.

That last pass is not needed where the gradient of the logits is UNSCALED_GRAD_DTYPE: the student's reduction then
writes the *unscaled gradient* exp(z − origin) of every token, and the row scale, a factor per token that is known
later, turns it into the gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sdpo.fused._given import given_at_support
from sdpo.fused._policy import policy_scale
from sdpo.fused._torch import row_scale, teacher_logits
from sdpo.fused._types import (
    UNSCALED_GRAD_DTYPE,
    GradLogits,
    ModelChunk,
    Objective,
    Project,
    ProjectTeacher,
    TokenInputs,
    TokenStats,
)
from sdpo.fused.triton import _exact_logits, _full_vocab, _math, _reductions, _statistics, _topk, _topk_loss
from sdpo.given import TeacherTopK

# The sizes and warps below were tuned on an H200.
# Logits per program, and its warps, of a pass over one model's vocabulary, and of one over both models'.
BLOCK_V, NUM_WARPS = 4096, 4
FULL_BLOCK_V, FULL_NUM_WARPS = 8192, 8
# Summands of a recomputed dot product at a time.
BLOCK_D = 256
# Tokens per program of the kernel on [C].
BLOCK_C = 256
# Programs per token of the pass that rewrites the unscaled gradient with another origin: few, since it is rarely
# needed.
REWRITE_PROGRAMS = 4
# Neighbouring logits that form a group of the top-K selection; groups are narrower from NARROW_FROM_K on, so that
# the logits of K groups fit the registers of a program.
GROUP_V, NARROW_GROUP_V, NARROW_FROM_K = 32, 16, 256
# Neighbouring groups that form a region, and parts that a group is divided into at the end of the selection.
GROUPS_PER_REGION, PARTS_PER_GROUP = 8, 4


class _Factors(NamedTuple):
    """A model's 16-bit hidden states and weight: top logits are recomputed from them as scale · (h·w + bias)."""

    hidden: Tensor  # [C, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float


class _Model(NamedTuple):
    """One model's products and how they become logits: scale · (products + bias), or softcap · tanh of that."""

    products: Tensor  # [C, V] float32
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None
    factors: _Factors | None  # None: the products are exact, or nothing is known of them

    def kernel_args(self) -> dict[str, Any]:
        """The arguments of a kernel that reads the logits of one model."""
        return {
            "products_ptr": self.products,
            "bias_ptr": self.bias,
            "V": self.products.shape[1],
            "scale": self.scale,
            "softcap": self.softcap or 1.0,
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": self.softcap is not None,
        }


class _BlockSums(NamedTuple):
    """Sums over each token's blocks of BLOCK_V logits z, [C, blocks] each."""

    max: Tensor  # max z
    sumexp: Tensor  # Σ exp(z − max)
    moment: Tensor  # Σ (z − max) · exp(z − max)

    @property
    def number(self) -> int:
        return self.max.shape[1]


class _Support(NamedTuple):
    """One model's logits at the support, and the sums over its vocabulary."""

    logits: Tensor  # [C, K]
    token_logit: Tensor  # [C] of the sampled token
    blocks: _BlockSums  # of the whole vocabulary if owns_support, else of the tokens outside the support
    log_outside: Tensor  # [C] log Σ exp over the tokens outside, relative to max; set by the owner
    owns_support: bool  # the support is this model's top K
    grad_origin: Tensor | None  # [C] logit that the unscaled gradient is relative to, if it was written


class _NormalizedSupport(NamedTuple):
    """One model at the support; all but the anchor are relative to the anchor."""

    logits: Tensor  # [C, K]
    anchor: Tensor  # [C] the largest logit at the support
    log_outside: Tensor  # [C] log Σ exp over the tokens outside
    normalizer: Tensor  # [C] log Σ exp over the vocabulary


def chunk_loss(
    project_student: Project,
    project_teacher: ProjectTeacher,
    tokens: TokenInputs,
    objective: Objective,
    stats: Tensor,
    grad_logits: GradLogits | None,
) -> None:
    """Fill ``stats`` [len(TokenStats), C] and, unless None, the gradient w.r.t. the student's products."""
    fill = _full_chunk_loss if objective.support == "full" else _topk_chunk_loss
    with torch.cuda.device_of(stats):
        fill(project_student, project_teacher, tokens, objective, stats, grad_logits)


def _topk_chunk_loss(
    project_student: Project,
    project_teacher: ProjectTeacher,
    tokens: TokenInputs,
    objective: Objective,
    stats: Tensor,
    grad_logits: GradLogits | None,
) -> None:
    """The loss over the top-K of one model, or over the sampled token."""
    values, row_scale_out = (None, None) if grad_logits is None else grad_logits
    has_tail, has_policy = objective.tail != "renormalize", values is not None and tokens.policy is not None
    has_grad_outside = has_tail or has_policy
    is_unscaled = has_grad_outside and values is not None and values.dtype == UNSCALED_GRAD_DTYPE
    unscaled_grad = values if is_unscaled else None
    # One model is read to the end before the other is projected, because the other may overwrite its products.
    if objective.support == "student":
        student = _model(project_student(), objective)
        ids, student_support = _select_support(student, tokens.tokens, objective, unscaled_grad)
        p = _normalize(student, student_support, ids, tokens.tokens, objective, stats, is_teacher=False)
        teacher = _teacher(project_teacher(), objective)
        teacher_support = _gather_support(teacher, tokens.tokens, ids)
        q = _normalize(teacher, teacher_support, ids, tokens.tokens, objective, stats, is_teacher=True)
    elif objective.support == "given":
        topk, student = project_teacher(), _model(project_student(), objective)
        assert isinstance(topk, TeacherTopK)
        ids = topk.ids
        student_support = _gather_support(student, tokens.tokens, ids, unscaled_grad)
        p = _normalize(student, student_support, ids, tokens.tokens, objective, stats, is_teacher=False)
        q = _given(topk, tokens.tokens, student.products.shape[1], stats)
    else:
        teacher = _teacher(project_teacher(), objective)
        if objective.support == "teacher":
            ids, teacher_support = _select_support(teacher, tokens.tokens, objective)
        else:
            ids = tokens.tokens[:, None]
            teacher_support = _gather_support(teacher, tokens.tokens, ids)
        q = _normalize(teacher, teacher_support, ids, tokens.tokens, objective, stats, is_teacher=True)
        student = _model(project_student(), objective)
        student_support = _gather_support(student, tokens.tokens, ids, unscaled_grad)
        p = _normalize(student, student_support, ids, tokens.tokens, objective, stats, is_teacher=False)
    grad_scale = _token_weights(tokens, objective, stats)

    (count, k), vocabulary = ids.shape, student.products.shape[1]

    def topk_loss(
        grad_scale: Tensor, grad_support: Tensor, grad_tail: Tensor, grad_token: Tensor | None, **flags: bool
    ) -> None:
        """Write stats.per_token and the gradients."""
        has_policy, is_unscaled = flags["HAS_POLICY"], flags["UNSCALED_GRAD"]
        _topk_loss.topk_loss[(count,)](
            ids_ptr=ids, student_logits_ptr=p.logits, student_anchor_ptr=p.anchor,
            student_log_outside_ptr=p.log_outside, student_normalizer_ptr=p.normalizer,
            teacher_logits_ptr=q.logits, teacher_normalizer_ptr=q.normalizer, grad_scale_ptr=grad_scale,
            grad_origin_ptr=student_support.grad_origin if is_unscaled else None, tokens_ptr=tokens.tokens,
            policy_scale_ptr=_policy_scale(tokens, objective, stats) if has_policy else None,
            stats_ptr=stats, grad_support_ptr=grad_support, grad_tail_ptr=grad_tail, grad_token_ptr=grad_token,
            row_scale_ptr=row_scale_out,
            V=vocabulary, K=k, stride_stats=stats.stride(0), alpha=objective.alpha,
            one_minus_alpha=1 - objective.alpha, softcap=student.softcap or 1.0,
            MODE=_mode(objective), HAS_TAIL=has_tail, HAS_SOFTCAP=student.softcap is not None,
            BLOCK_K=_block(k), num_warps=_support_warps(k), **flags,
        )  # fmt: skip

    grad_tail = torch.empty_like(grad_scale)
    if tokens.row_factors is not None:
        # The factors need the divergence of the whole rows. The gradients that come with it are not read.
        flags = {"HAS_POLICY": False, "UNSCALED_GRAD": False, "HAS_ROW_SCALE": False}
        topk_loss(grad_scale, torch.empty_like(p.logits), grad_tail, None, **flags)
        grad_scale = _token_weights(tokens.weighed(stats), objective, stats)
    # An unscaled gradient takes the support's in place, in [C, V]; else it is [C, K] and scattered below.
    grad_support = unscaled_grad
    if grad_support is None:
        grad_support = torch.empty_like(p.logits, dtype=None if values is None else values.dtype)
    grad_token = None
    if has_policy and not is_unscaled:
        grad_token = grad_support.new_empty(count)
    has_row_scale = row_scale_out is not None
    flags = {"HAS_POLICY": has_policy, "UNSCALED_GRAD": is_unscaled, "HAS_ROW_SCALE": has_row_scale}
    topk_loss(grad_scale, grad_support, grad_tail, grad_token, **flags)
    if values is None or is_unscaled:
        return
    if has_grad_outside:
        _reductions.write_tail_grad[(count, triton.cdiv(vocabulary, BLOCK_V))](
            **student.kernel_args(),
            anchor_ptr=p.anchor, log_outside_ptr=p.log_outside, grad_tail_ptr=grad_tail, grad_logits_ptr=values,
            BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
        )  # fmt: skip
    else:
        values.zero_()
    _reductions.scatter_support_grad[(count,)](
        ids, tokens.tokens, grad_support, grad_token, values, vocabulary, k,
        HAS_POLICY=has_policy, BLOCK_K=_block(k), num_warps=1,
    )  # fmt: skip


def _full_chunk_loss(
    project_student: Project,
    project_teacher: ProjectTeacher,
    tokens: TokenInputs,
    objective: Objective,
    stats: Tensor,
    grad_logits: GradLogits | None,
) -> None:
    """The loss over the full vocabulary."""
    student, teacher = _model(project_student(), objective), _teacher(project_teacher(), objective)
    count, vocabulary = student.products.shape
    grid = (count, triton.cdiv(vocabulary, FULL_BLOCK_V))
    new = student.products.new_empty
    models: dict[str, Any] = {"V": vocabulary}
    for name, model in (("student", student), ("teacher", teacher)):
        anchor, normalizer = new(count), new(count)
        token_logit, blocks = _token_logits(model, tokens.tokens), _block_reductions(model)
        _full_vocab.full_statistics[(count,)](
            block_max_ptr=blocks.max, block_sumexp_ptr=blocks.sumexp, block_moment_ptr=blocks.moment,
            token_logit_ptr=token_logit, anchor_ptr=anchor, normalizer_ptr=normalizer, stats_ptr=stats,
            BLOCKS=blocks.number, stride_stats=stats.stride(0),
            IS_TEACHER=name == "teacher", BLOCK_B=_block(blocks.number), num_warps=1,
        )  # fmt: skip
        models |= {
            f"{name}_products_ptr": model.products,
            f"{name}_bias_ptr": model.bias,
            f"{name}_anchor_ptr": anchor,
            f"{name}_normalizer_ptr": normalizer,
            f"{name}_scale": model.scale,
            f"{name}_softcap": model.softcap or 1.0,
            f"{name.upper()}_HAS_BIAS": model.bias is not None,
            f"{name.upper()}_HAS_SOFTCAP": model.softcap is not None,
        }
    both: dict[str, Any] = models | {
        "alpha": objective.alpha,
        "one_minus_alpha": 1 - objective.alpha,
        "MODE": _mode(objective),
        "BLOCK_V": FULL_BLOCK_V,
        "num_warps": FULL_NUM_WARPS,
    }
    # Per block of the vocabulary: the divergence, Σ of its derivative g w.r.t. log p, and Σ g and Σ p over the
    # tokens with p ≤ 1/2.
    block_value, block_g, block_unlikely_g, block_unlikely_p = new(4, *grid)
    _full_vocab.full_divergence[grid](
        **both,
        block_value_ptr=block_value, block_g_ptr=block_g, block_unlikely_g_ptr=block_unlikely_g,
        block_unlikely_p_ptr=block_unlikely_p,
    )  # fmt: skip
    sum_g, unlikely_g, unlikely_p = new(count), new(count), new(count)
    _full_vocab.sum_blocks[(count,)](
        block_value, block_g, block_unlikely_g, block_unlikely_p, stats, sum_g, unlikely_g, unlikely_p,
        grid[1], stats.stride(0), BLOCK_B=_block(grid[1]), num_warps=1,
    )  # fmt: skip
    grad_scale = _token_weights(tokens, objective, stats)
    if tokens.row_factors is not None:
        grad_scale = _token_weights(tokens.weighed(stats), objective, stats)
    if grad_logits is None:
        return
    # The sums of the divergence have been read: their memory is free for those of the row scale.
    block_square, block_along = block_value, block_g
    _full_vocab.full_grad[grid](
        **both,
        sum_g_ptr=sum_g, unlikely_g_ptr=unlikely_g, unlikely_p_ptr=unlikely_p, grad_scale_ptr=grad_scale,
        tokens_ptr=tokens.tokens, policy_scale_ptr=_policy_scale(tokens, objective, stats),
        grad_logits_ptr=grad_logits.values, block_square_ptr=block_square, block_along_ptr=block_along,
        HAS_POLICY=tokens.policy is not None, HAS_ROW_SCALE=grad_logits.row_scale is not None,
    )  # fmt: skip
    if grad_logits.row_scale is not None:
        grad_logits.row_scale.copy_(row_scale(block_square.sum(dim=1), block_along.sum(dim=1)))


def _select_support(
    model: _Model, tokens: Tensor, objective: Objective, unscaled_grad: Tensor | None = None
) -> tuple[Tensor, _Support]:
    """The K likeliest tokens of a model, ids [C, K], and its logits there; writes ``unscaled_grad`` [C, V]."""
    assert objective.k is not None
    (count, vocabulary), k = model.products.shape, objective.k
    new = model.products.new_empty
    token_logit = _token_logits(model, tokens)
    group_v = GROUP_V if k < NARROW_FROM_K else NARROW_GROUP_V
    block_count = triton.cdiv(vocabulary, BLOCK_V)
    # Including groups beyond the vocabulary: a round number keeps each token's groups aligned in memory.
    group_count = block_count * (BLOCK_V // group_v)
    blocks, (group_max, group_sumexp) = _BlockSums(*new(3, count, block_count)), new(2, count, group_count)
    _reductions.block_and_group_reductions[(count, block_count)](
        **model.kernel_args(),
        block_max_ptr=blocks.max, block_sumexp_ptr=blocks.sumexp, block_moment_ptr=blocks.moment,
        group_max_ptr=group_max, group_sumexp_ptr=group_sumexp,
        token_logit_ptr=token_logit, grad_logits_ptr=unscaled_grad,
        GROUPS=group_count,
        UNSCALED_GRAD=unscaled_grad is not None, BLOCK_V=BLOCK_V, GROUP_V=group_v, num_warps=NUM_WARPS,
    )  # fmt: skip
    regions, groups = new(2, count, k, dtype=torch.int32)
    log_outside = new(count)
    block_r = _block(triton.cdiv(group_count, GROUPS_PER_REGION))
    _topk.select_top_regions[(count,)](
        group_max, group_sumexp, regions, log_outside, group_count, k,
        GROUPS_PER_REGION=GROUPS_PER_REGION, BLOCK_R=block_r, BLOCK_K=_block(k),
        num_warps=_selection_warps(block_r * GROUPS_PER_REGION),
    )  # fmt: skip
    block_g = _block(k) * GROUPS_PER_REGION
    _topk.select_top_groups[(count,)](
        group_max, group_sumexp, regions, groups, log_outside, group_count, k,
        GROUPS_PER_REGION=GROUPS_PER_REGION, BLOCK_G=block_g, BLOCK_K=_block(k),
        num_warps=_selection_warps(block_g),
    )  # fmt: skip
    ids, logits = new(count, k, dtype=torch.int64), new(count, k)
    parts = regions  # which have been read: scratch of the same shape
    block_p, part_v = _block(k) * PARTS_PER_GROUP, group_v // PARTS_PER_GROUP
    _topk.select_top_tokens[(count,)](
        **model.kernel_args(),
        groups_ptr=groups, parts_ptr=parts, ids_ptr=ids, support_logits_ptr=logits, log_outside_ptr=log_outside,
        K=k,
        PARTS_PER_GROUP=PARTS_PER_GROUP, PART_V=part_v,
        BLOCK_P=block_p, BLOCK_T=_block(k) * part_v, BLOCK_K=_block(k),
        num_warps=_selection_warps(block_p * part_v),
    )  # fmt: skip
    support = _Support(logits, token_logit, blocks, log_outside, owns_support=True, grad_origin=None)
    return ids, _with_grad_origin(model, support, unscaled_grad)


def _gather_support(
    model: _Model, tokens: Tensor, ids: Tensor, unscaled_grad: Tensor | None = None
) -> _Support:
    """A model's logits at ids [C, K] that it did not select; masks its products there, writes ``unscaled_grad``."""
    count, k = ids.shape
    new = model.products.new_empty
    logits, token_logit, log_outside = new(count, k), new(count), new(count)
    _topk.gather_support[(count,)](
        **model.kernel_args(),
        tokens_ptr=tokens, ids_ptr=ids, support_logits_ptr=logits, token_logit_ptr=token_logit,
        K=k,
        BLOCK_K=_block(k), num_warps=4,
    )  # fmt: skip
    blocks = _block_reductions(model, token_logit, unscaled_grad)
    support = _Support(logits, token_logit, blocks, log_outside, owns_support=False, grad_origin=None)
    return _with_grad_origin(model, support, unscaled_grad)


def _with_grad_origin(model: _Model, support: _Support, unscaled_grad: Tensor | None) -> _Support:
    """The support with the origin of each token's unscaled gradient, which is rewritten where it is out of range.

    Without ``unscaled_grad`` [C, V] the support is returned as it is.
    """
    if unscaled_grad is None:
        return support
    blocks, grad_origin = support.blocks, torch.empty_like(support.token_logit)
    _reductions.check_unscaled_grad[(grad_origin.shape[0], REWRITE_PROGRAMS)](
        **model.kernel_args(),
        block_max_ptr=blocks.max, block_sumexp_ptr=blocks.sumexp, log_outside_ptr=support.log_outside,
        token_logit_ptr=support.token_logit, grad_logits_ptr=unscaled_grad, grad_origin_ptr=grad_origin,
        BLOCKS=blocks.number,
        OWNS_SUPPORT=support.owns_support, BLOCK_V=BLOCK_V, BLOCK_B=_block(blocks.number), num_warps=1,
    )  # fmt: skip
    return support._replace(grad_origin=grad_origin)


def _normalize(
    model: _Model,
    support: _Support,
    ids: Tensor,
    tokens: Tensor,
    objective: Objective,
    stats: Tensor,
    *,
    is_teacher: bool,
) -> _NormalizedSupport:
    """Normalize a model's distribution, its likeliest logits recomputed if possible; overwrites ``support``."""
    (count, k), blocks = ids.shape, support.blocks
    anchor, normalizer = torch.empty_like(support.log_outside), torch.empty_like(support.log_outside)
    of_support: dict[str, Any] = {
        "support_logits_ptr": support.logits,
        "token_logit_ptr": support.token_logit,
        "block_max_ptr": blocks.max,
        "block_sumexp_ptr": blocks.sumexp,
        "anchor_ptr": anchor,
        "log_outside_ptr": support.log_outside,
        "K": k,
        "BLOCKS": blocks.number,
        "OWNS_SUPPORT": support.owns_support,
        "BLOCK_K": _block(k),
        "BLOCK_B": _block(blocks.number),
        "num_warps": _support_warps(k),
    }
    factors = model.factors
    if factors is not None and _recomputes_top_logits(objective):
        stride_wv, stride_wd = factors.weight.stride()
        _exact_logits.recompute_top_logits[(count,)](
            **model.kernel_args(), **of_support,
            ids_ptr=ids, tokens_ptr=tokens,
            hidden_ptr=factors.hidden, weight_ptr=factors.weight, exact_bias_ptr=factors.bias,
            D=factors.weight.shape[1], stride_wv=stride_wv, stride_wd=stride_wd, exact_scale=factors.scale,
            BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    else:
        _topk_loss.anchor_support[(count,)](**of_support)
    _topk_loss.support_statistics[(count,)](
        **of_support,
        block_moment_ptr=blocks.moment, normalizer_ptr=normalizer, stats_ptr=stats,
        stride_stats=stats.stride(0), IS_TEACHER=is_teacher,
    )  # fmt: skip
    return _NormalizedSupport(support.logits, anchor, support.log_outside, normalizer)


def _given(teacher: TeacherTopK, tokens: Tensor, vocabulary: int, stats: Tensor) -> _NormalizedSupport:
    """A teacher whose top K are given; its part of ``stats``, of which the student's is there."""
    rows = TokenStats(*stats.unbind())
    q = given_at_support(teacher, tokens, rows.student_log_tail, vocabulary)
    rows.teacher_log_probs.copy_(q.token_log_prob)
    rows.teacher_entropy.copy_(q.entropy)
    rows.teacher_topk_mass.copy_(q.log_mass.exp())
    rows.teacher_log_tail.copy_(q.log_tail)
    zeros = torch.zeros_like(q.log_mass)
    return _NormalizedSupport(q.log_probs, anchor=zeros, log_outside=q.log_tail, normalizer=zeros)


def _recomputes_top_logits(objective: Objective) -> bool:
    """Whether the largest logits are recomputed; the surrogate of a sampled token promises no such accuracy."""
    return objective.support != "sampled"


def _block_reductions(
    model: _Model, token_logit: Tensor | None = None, unscaled_grad: Tensor | None = None
) -> _BlockSums:
    """Sums over a model's blocks; with ``token_logit`` [C] as origin, writes ``unscaled_grad`` [C, V]."""
    count, vocabulary = model.products.shape
    grid = (count, triton.cdiv(vocabulary, BLOCK_V))
    blocks = _BlockSums(*model.products.new_empty(3, *grid))
    _reductions.block_reductions[grid](
        **model.kernel_args(),
        block_max_ptr=blocks.max, block_sumexp_ptr=blocks.sumexp, block_moment_ptr=blocks.moment,
        token_logit_ptr=token_logit, grad_logits_ptr=unscaled_grad,
        UNSCALED_GRAD=unscaled_grad is not None, BLOCK_V=BLOCK_V, num_warps=NUM_WARPS,
    )  # fmt: skip
    return blocks


def _token_logits(model: _Model, tokens: Tensor) -> Tensor:
    """A model's logits [C] of the sampled tokens."""
    count = model.products.shape[0]
    token_logit = model.products.new_empty(count)
    _topk.gather_token_logits[(count,)](
        **model.kernel_args(), tokens_ptr=tokens, token_logit_ptr=token_logit, num_warps=1
    )
    return token_logit


def _token_weights(tokens: TokenInputs, objective: Objective, stats: Tensor) -> Tensor:
    """Write the weights into ``stats``; the factor [C] of each token's gradient w.r.t. the products."""
    count, is_clip = stats.shape[1], objective.is_clip
    grad_scale = stats.new_empty(count)
    _statistics.token_weights[(triton.cdiv(count, BLOCK_C),)](
        old_log_probs_ptr=tokens.old_log_probs, weights_ptr=tokens.weights, grad_weights_ptr=tokens.grad_weights,
        loss_scale_ptr=tokens.loss_scale, stats_ptr=stats, grad_scale_ptr=grad_scale,
        C=count, stride_stats=stats.stride(0), is_clip=1.0 if is_clip is None else is_clip,
        log_is_clip=0.0 if is_clip is None else math.log(is_clip),
        dlogits_dproducts=objective.logit_scale / objective.temperature,
        HAS_OLD_LOG_PROBS=tokens.old_log_probs is not None and is_clip is not None,
        HAS_WEIGHTS=tokens.weights is not None, HAS_GRAD_WEIGHTS=tokens.grad_weights is not None,
        HAS_LOSS_SCALE=tokens.loss_scale is not None, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return grad_scale


def _policy_scale(tokens: TokenInputs, objective: Objective, stats: Tensor) -> Tensor | None:
    """``policy_scale`` from the log-probabilities in ``stats``."""
    return policy_scale(stats[TokenStats._fields.index("log_probs")], tokens, objective)


def _model(model: ModelChunk, objective: Objective) -> _Model:
    softcap, bias = objective.softcap, None if model.bias is None else model.bias.contiguous()
    scale = objective.logit_scale / (objective.temperature if softcap is None else softcap)
    factors = None
    if model.hidden is not None and model.weight is not None and model.weight.itemsize == 2:
        factors = _Factors(model.hidden, model.weight, bias, scale)
    if model.accumulation_bias != 0.0:
        # Tensor cores return products times this factor f:
        # scale · (products / f + b) = (scale / f) · (products + f · b).
        shrinkage = 1.0 - model.accumulation_bias
        bias = None if bias is None else bias.float() * shrinkage
        scale /= shrinkage
    softcap = None if softcap is None else softcap / objective.temperature
    return _Model(model.products, bias, scale, softcap, factors)


def _teacher(teacher: ModelChunk | TeacherTopK, objective: Objective) -> _Model:
    """The teacher; of a trust region with a reference's own products, the mixed logits, which need no mapping."""
    assert isinstance(teacher, ModelChunk)
    if teacher.reference is None or objective.trust_region_coef is None:
        return _model(teacher, objective)
    logits = teacher_logits(teacher, objective)
    return _Model(logits, bias=None, scale=1.0, softcap=None, factors=None)


def _mode(objective: Objective) -> int:
    if objective.support == "sampled":
        return _math.SAMPLED.value
    special = {0.0: _math.FORWARD_KL.value, 1.0: _math.REVERSE_KL.value}
    return special.get(objective.alpha, _math.JSD.value)


def _block(size: int) -> int:
    """The power of two, 16 at least, that covers a size."""
    return max(16, triton.next_power_of_2(size))


def _support_warps(k: int) -> int:
    """Warps of the kernels on [C, K]: 128 tokens each, 2 at least."""
    return max(2, _block(k) // 128)


def _selection_warps(block: int) -> int:
    """Warps of the selection: one per 2048 keys, at least 4 and at most 16."""
    return min(16, max(4, block // 2048))
