"""One chunk of the fused loss through the kernels: what ``sdpo.fused._torch.chunk_loss`` says, in fewer passes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sdpo.fused._torch import row_scale, teacher_logits
from sdpo.fused._types import (
    UNSCALED_GRAD_DTYPE,
    GradLogits,
    ModelChunk,
    Objective,
    TokenInputs,
    TokenStats,
)
from sdpo.fused.triton import _full_vocab, _math, _reductions, _topk, _topk_loss

# Columns per program of the passes over one model's vocabulary and over both models', and their warps.
BLOCK, WARPS = 4096, 4
# Terms of a dot product that the program of a row adds up at a time.
DOT = 256
FULL_BLOCK, FULL_WARPS = 8192, 8
# Programs per row of the pass that hardly a row needs.
SELDOM = 4
# Columns that compete for the support through one maximum, where wider supports take narrower groups; neighbouring
# groups that compete together before.
GROUP, WIDE = 32, 8
NARROW_GROUP, NARROW_FROM = 16, 256
# Parts of a group, the last step before its tokens.
PARTS = 4


class _Exact(NamedTuple):
    """What 16-bit products were made of, and how those that lost nothing become logits."""

    states: Tensor  # [c, D]
    head: Tensor  # [V, D]
    bias: Tensor  # [V], or any tensor if there is none
    inner: float


class _Model(NamedTuple):
    """One model's products and how they become logits; reads ``inner·(x + bias)`` through ``outer·tanh``."""

    products: Tensor  # [c, V] float32
    bias: Tensor  # [V], or any tensor if there is none
    inner: float
    outer: float
    has_bias: bool
    softcap: bool
    exact: _Exact | None = None


class _Sums(NamedTuple):
    """Sums of each row's blocks of columns [c, blocks]."""

    tops: Tensor
    masses: Tensor
    moments: Tensor


def chunk_loss(
    student: ModelChunk,
    teacher: ModelChunk,
    tokens: TokenInputs,
    objective: Objective,
    stats: Tensor,
    grad_logits: GradLogits | None,
) -> None:
    """The loss of one chunk: fills ``stats`` [len(TokenStats), c] and, unless None, ``grad_logits``."""
    fill = _fill_full if objective.support == "full" else _fill_topk
    with torch.cuda.device_of(stats):
        fill(student, teacher, tokens, objective, stats, grad_logits)


class _Support(NamedTuple):
    """One model at the support, and the rest of its vocabulary."""

    inside: Tensor  # [c, K] logits
    token: Tensor  # [c] logit of the sampled token
    sums: _Sums
    log_outside: Tensor  # [c]
    origin: Tensor  # [c] logit that its shares are relative to, if it has any


def _fill_topk(
    student_chunk: ModelChunk,
    teacher_chunk: ModelChunk,
    rows: TokenInputs,
    recipe: Objective,
    stats: Tensor,
    slope: GradLogits | None,
) -> None:
    has_tail = recipe.tail == "bucket" or recipe.support == "sampled"
    room = (
        slope.values if slope is not None and slope.values.dtype == UNSCALED_GRAD_DTYPE and has_tail else None
    )
    shares = room is not None
    p, q = _model(student_chunk, recipe), _teacher(teacher_chunk, recipe)
    if recipe.support == "student":
        ids, student = _choose(p, rows.tokens, recipe, room)
        teacher = _take(q, rows.tokens, ids)
    else:
        if recipe.support == "teacher":
            ids, teacher = _choose(q, rows.tokens, recipe)
        else:
            ids = rows.tokens[:, None]
            teacher = _take(q, rows.tokens, ids)
        student = _take(p, rows.tokens, ids, room)
    (count, vocabulary), k, blocks = p.products.shape, ids.shape[1], student.sums.tops.shape[1]
    inside_slopes, outside_slope = room, torch.empty_like(student.token)
    if inside_slopes is None:
        inside_slopes = torch.empty_like(student.inside, dtype=None if slope is None else slope.values.dtype)
    _topk_loss.topk_rows[(count,)](
        ids, rows.tokens, student.inside, teacher.inside, student.token, teacher.token,
        *student.sums, student.log_outside, student.origin, *teacher.sums, teacher.log_outside,
        *_factors(p), *_factors(q),
        *_weight_pointers(rows, stats), stats, inside_slopes, outside_slope, _gains(slope, stats),
        stats.stride(0), k, vocabulary, blocks, recipe.alpha, 1 - recipe.alpha, *_clip(recipe),
        _chain(recipe),
        MODE=_mode(recipe), BUCKET=recipe.tail == "bucket",
        STUDENT_OWNS=recipe.support == "student", TEACHER_OWNS=recipe.support == "teacher",
        EXACT_P=_is_exact(p, recipe), EXACT_Q=_is_exact(q, recipe), BIAS_P=p.has_bias, BIAS_Q=q.has_bias,
        **_weight_flags(rows, recipe), SOFTCAP=p.softcap, GAIN=_has_gain(slope), SHARES=shares,
        BLOCK_K=_power(k), BLOCK_B=_power(blocks), BLOCK=BLOCK, BLOCK_D=DOT, num_warps=max(2, _power(k) // 128),
    )  # fmt: skip
    if slope is None or shares:
        return
    if has_tail:
        _reductions.outside_slopes[(count, blocks)](
            p.products, p.bias, slope.values, outside_slope, student.log_outside, vocabulary, p.inner, p.outer,
            BIAS=p.has_bias, SOFTCAP=p.softcap, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    else:
        slope.values.zero_()
    _reductions.inside_slopes[(count,)](
        ids, inside_slopes, slope.values, vocabulary, k, BLOCK_K=_power(k), num_warps=1
    )


def _fill_full(
    student_chunk: ModelChunk,
    teacher_chunk: ModelChunk,
    rows: TokenInputs,
    recipe: Objective,
    stats: Tensor,
    slope: GradLogits | None,
) -> None:
    p, q = _model(student_chunk, recipe), _teacher(teacher_chunk, recipe)
    count, vocabulary = p.products.shape
    grid = (count, triton.cdiv(vocabulary, FULL_BLOCK))
    new = p.products.new_empty
    known = TokenStats(*stats.unbind())
    anchored, token_logits = new(4, count), []
    for i, (model, entropy) in enumerate(((p, known.student_entropy), (q, known.teacher_entropy))):
        sums = _block_sums(model)
        blocks = sums.tops.shape[1]
        _full_vocab.normalizers[(count,)](
            *sums, *anchored[2 * i : 2 * i + 2], entropy, blocks, BLOCK_B=_power(blocks), num_warps=1
        )
        token_logits.append(_read(model, rows.tokens))
    block_terms, row_sums = new(4, *grid), new(3, count)
    values, commons = block_terms[:2]
    scale = new(count)
    both = (p.products, q.products, p.bias, q.bias, *anchored)
    maps = (vocabulary, p.inner, p.outer, q.inner, q.outer, recipe.alpha, 1 - recipe.alpha)
    flags: dict[str, Any] = {
        "BIAS_P": p.has_bias, "BIAS_Q": q.has_bias, "SOFTCAP_P": p.softcap, "SOFTCAP_Q": q.softcap,
        "MODE": _mode(recipe), "BLOCK": FULL_BLOCK, "num_warps": FULL_WARPS,
    }  # fmt: skip
    _full_vocab.full_terms[grid](*both, *block_terms, *maps, **flags)
    _full_vocab.full_rows[(count,)](
        *block_terms, *anchored, *token_logits, *_weight_pointers(rows, stats), stats, *row_sums, scale,
        stats.stride(0), grid[1], *_clip(recipe), _chain(recipe),
        **_weight_flags(rows, recipe), BLOCK_B=_power(grid[1]), num_warps=1,
    )  # fmt: skip
    known.student_topk_mass.fill_(1.0)
    known.teacher_topk_mass.fill_(1.0)
    known.student_log_tail.fill_(-math.inf)
    known.teacher_log_tail.fill_(-math.inf)
    if slope is not None:
        _full_vocab.full_slopes[grid](
            *both, *row_sums, scale, slope.values, values, commons, *maps, **flags, GAIN=_has_gain(slope)
        )
        if slope.row_scale is not None:
            slope.row_scale.copy_(row_scale(values.sum(dim=1), commons.sum(dim=1)))


def _choose(
    model: _Model, tokens: Tensor, recipe: Objective, shares: Tensor | None = None
) -> tuple[Tensor, _Support]:
    """A model's K likeliest tokens: ids [c, K], and the model there; its ``shares`` [c, V] on the way."""
    assert recipe.k is not None
    count, vocabulary = model.products.shape
    k, group = recipe.k, GROUP if recipe.k < NARROW_FROM else NARROW_GROUP
    blocks = triton.cdiv(vocabulary, BLOCK)
    # Those beyond the vocabulary hold nothing; their number is round, for the memory's sake.
    groups = blocks * (BLOCK // group)
    regions = triton.cdiv(groups, WIDE)
    new = model.products.new_empty
    sums, group_sums = _Sums(*new(3, count, blocks)), new(2, count, groups)
    token = _read(model, tokens)
    _reductions.group_sums[(count, blocks)](
        model.products, model.bias, *sums, *group_sums, token, token if shares is None else shares,
        vocabulary, groups, model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, SHARES=shares is not None,
        BLOCK=BLOCK, GROUP=group, num_warps=WARPS,
    )  # fmt: skip
    chosen_regions, chosen_groups = new(2, count, k, dtype=torch.int32)
    log_others = new(count)
    _topk.choose_regions[(count,)](
        *group_sums, chosen_regions, log_others, groups, k,
        WIDE=WIDE, BLOCK_R=_power(regions), BLOCK_K=_power(k), num_warps=_warps(_power(regions) * WIDE),
    )  # fmt: skip
    block = _power(k) * WIDE
    _topk.choose_groups[(count,)](
        *group_sums, chosen_regions, chosen_groups, log_others, groups, k,
        WIDE=WIDE, BLOCK_G=block, BLOCK_K=_power(k), num_warps=_warps(block),
    )  # fmt: skip
    ids, inside, log_outside = new(count, k, dtype=torch.int64), new(count, k), new(count)
    parts, part = _power(k) * PARTS, group // PARTS
    _topk.choose_tokens[(count,)](
        model.products, model.bias, chosen_groups, chosen_regions, log_others, ids, inside, log_outside,
        vocabulary, k, model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, PARTS=PARTS, PART=part,
        BLOCK_P=parts, BLOCK_T=_power(k) * part, BLOCK_K=_power(k), num_warps=_warps(parts * part),
    )  # fmt: skip
    origin = token if shares is None else _origins(model, token, sums, shares, log_outside)
    return ids, _Support(inside, token, sums, log_outside, origin)


def _take(model: _Model, tokens: Tensor, ids: Tensor, shares: Tensor | None = None) -> _Support:
    """A model at ids [c, K] that another one chose; its ``shares`` [c, V] on the way."""
    (count, k), vocabulary = ids.shape, model.products.shape[1]
    new = model.products.new_empty
    inside, token = new(count, k), new(count)
    _topk.take_tokens[(count,)](
        model.products, model.bias, tokens, ids, inside, token, vocabulary, k, model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, BLOCK_K=_power(k), num_warps=4,
    )  # fmt: skip
    sums = _block_sums(model, token, shares)
    origin = token if shares is None else _origins(model, token, sums, shares)
    return _Support(inside, token, sums, new(count), origin)


def _origins(
    model: _Model, token: Tensor, sums: _Sums, shares: Tensor, log_outside: Tensor | None = None
) -> Tensor:
    """The logits [c] that a model's ``shares`` are relative to; ``log_outside`` [c] if it chose the support."""
    (count, vocabulary), blocks = model.products.shape, sums.tops.shape[1]
    origins = torch.empty_like(token)
    _reductions.shares_again[(count, SELDOM)](
        model.products, model.bias, sums.tops, sums.masses, token if log_outside is None else log_outside, token,
        shares, origins, vocabulary, blocks, model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, OWNER=log_outside is not None,
        BLOCK=BLOCK, BLOCK_B=_power(blocks), num_warps=1,
    )  # fmt: skip
    return origins


def _read(model: _Model, tokens: Tensor) -> Tensor:
    """A model's logits [c] of the sampled tokens."""
    count, vocabulary = model.products.shape
    token = model.products.new_empty(count)
    _topk.read_tokens[(count,)](
        model.products, model.bias, tokens, token, vocabulary, model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, num_warps=1,
    )  # fmt: skip
    return token


def _is_exact(model: _Model, recipe: Objective) -> bool:
    """Whether the logits that count most are made again."""
    return model.exact is not None and recipe.support != "sampled"


def _factors(model: _Model) -> tuple[Tensor | int | float, ...]:
    """What a model's logits were made of, and are again; anything where they are not."""
    products, bias, inner, outer = model.products, model.bias, model.inner, model.outer
    exact = model.exact
    if exact is None:
        return products, bias, inner, products, products, bias, inner, outer, 0, 0, 0
    made_of = (exact.states, exact.head, exact.bias, exact.inner, outer)
    return products, bias, inner, *made_of, exact.head.shape[1], *exact.head.stride()


def _block_sums(model: _Model, token: Tensor | None = None, shares: Tensor | None = None) -> _Sums:
    count, vocabulary = model.products.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    sums = _Sums(*model.products.new_empty(3, count, blocks).unbind())
    _reductions.block_sums[(count, blocks)](
        model.products, model.bias, *sums, model.products if token is None else token,
        model.products if shares is None else shares, vocabulary, model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, SHARES=shares is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return sums


def _model(side: ModelChunk, recipe: Objective) -> _Model:
    capped = recipe.softcap is not None
    inner = recipe.logit_scale / (recipe.temperature if recipe.softcap is None else recipe.softcap)
    outer = 1.0 if recipe.softcap is None else recipe.softcap / recipe.temperature
    bias = side.products if side.bias is None else side.bias.contiguous()
    exact = None
    if side.hidden is not None and side.weight is not None and side.weight.itemsize == 2:
        exact = _Exact(side.hidden, side.weight, bias, inner)
    if side.accumulation_bias != 0.0:
        # products / (1 − lost) + bias, times inner
        bias = bias if side.bias is None else bias.float() * (1.0 - side.accumulation_bias)
        inner = inner / (1.0 - side.accumulation_bias)
    return _Model(side.products, bias, inner, outer, side.bias is not None, capped, exact)


def _teacher(teacher: ModelChunk, recipe: Objective) -> _Model:
    """The teacher's model, or a trust region's logits as products that need no further map."""
    if teacher.reference is None or recipe.trust_region_coef is None:
        return _model(teacher, recipe)
    logits = teacher_logits(teacher, recipe)
    return _Model(logits, logits, 1.0, 1.0, has_bias=False, softcap=False)


def _mode(recipe: Objective) -> int:
    if recipe.support == "sampled":
        return _math.SAMPLED.value
    special = {0.0: _math.FORWARD.value, 1.0: _math.REVERSE.value}
    return special.get(recipe.alpha, _math.MIXTURE.value)


def _weight_pointers(rows: TokenInputs, default: Tensor) -> list[Tensor]:
    """Pointers of the optional weights; ``default`` stands in for what is absent and never read."""
    optional = (rows.old_log_probs, rows.weights, rows.grad_weights, rows.loss_scale)
    return [default if value is None else value for value in optional]


def _weight_flags(rows: TokenInputs, recipe: Objective) -> dict[str, bool]:
    return {
        "OLD": rows.old_log_probs is not None and recipe.is_clip is not None,
        "EXTRA": rows.weights is not None,
        "OWN": rows.grad_weights is not None,
        "LIFT": rows.loss_scale is not None,
    }


def _gains(slope: GradLogits | None, default: Tensor) -> Tensor:
    return default if slope is None or slope.row_scale is None else slope.row_scale


def _has_gain(slope: GradLogits | None) -> bool:
    return slope is not None and slope.row_scale is not None


def _clip(recipe: Objective) -> tuple[float, float]:
    return (1.0, 0.0) if recipe.is_clip is None else (recipe.is_clip, math.log(recipe.is_clip))


def _chain(recipe: Objective) -> float:
    """Derivative of the logits with respect to the products where nothing is capped."""
    return recipe.logit_scale / recipe.temperature


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _warps(block: int) -> int:
    return min(16, max(4, block // 2048))
