"""One chunk of the fused loss through the kernels: what ``sdpo._fused_torch.chunk`` says, in fewer passes."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sdpo._fused_torch import map_logits
from sdpo._recipe import Recipe, Rows, Side, TokenStats
from sdpo.kernels import _full, _math, _rows, _select, _stream

# Columns per program of the passes over the vocabulary, and their warps.
BLOCK = 8192
WARPS = 8
# Columns that compete for the support through one maximum; wider supports take narrower groups.
GROUP = 32
NARROW_GROUP, NARROW_FROM = 16, 256


class _Model(NamedTuple):
    """One model's products and how they become logits; reads ``inner·(x + bias)`` through ``outer·tanh``."""

    products: Tensor  # [c, V] float32
    bias: Tensor  # [V], or any tensor if there is none
    inner: float
    outer: float
    has_bias: bool
    softcap: bool


class _Sums(NamedTuple):
    """Sums of each row's blocks of columns [c, blocks]."""

    tops: Tensor
    masses: Tensor
    moments: Tensor


def chunk(student: Side, teacher: Side, rows: Rows, recipe: Recipe, slope: Tensor | None) -> TokenStats:
    """The loss of one chunk; fills ``slope`` [c, V], which must not share memory with the student's products."""
    p, q = _model(student, recipe), _model(teacher, recipe)
    if teacher.reference is not None and recipe.trust_region_coef is not None:
        q = _between(teacher, recipe)
    with torch.cuda.device_of(student.products):
        if recipe.k is None and recipe.support != "sampled":
            return _full_chunk(p, q, rows, recipe, slope)
        return _topk_chunk(p, q, rows, recipe, slope)


def _topk_chunk(p: _Model, q: _Model, rows: Rows, recipe: Recipe, slope: Tensor | None) -> TokenStats:
    count, vocabulary = p.products.shape
    new = p.products.new_empty
    tokens = rows.tokens[:, None]
    token_p, token_q = _read(p, tokens), _read(q, tokens)
    if recipe.support == "sampled":
        ids, inside_p, inside_q, k = tokens, token_p, token_q, 1
        log_outside_p = log_outside_q = new(count)
        sums_p, sums_q = _without(p, ids), _without(q, ids)
    else:
        k = recipe.k if recipe.k is not None else 1
        owner, other = (p, q) if recipe.support == "student" else (q, p)
        ids, inside_owner, log_outside_owner, sums_owner = _choose(owner, k)
        inside_other = _read(other, ids)
        sums_other, log_outside_other = _without(other, ids), new(count)
        if recipe.support == "student":
            inside_p, sums_p, log_outside_p = inside_owner, sums_owner, log_outside_owner
            inside_q, sums_q, log_outside_q = inside_other, sums_other, log_outside_other
        else:
            inside_p, sums_p, log_outside_p = inside_other, sums_other, log_outside_other
            inside_q, sums_q, log_outside_q = inside_owner, sums_owner, log_outside_owner

    stats = new(len(TokenStats._fields), count)
    inside_slopes, outside_slope = new(count, k), new(count)
    blocks = sums_p.tops.shape[1]
    _rows.topk_rows[(count,)](
        inside_p, inside_q, token_p, token_q, *sums_p, log_outside_p, *sums_q, log_outside_q,
        *_weight_pointers(rows, stats), stats, inside_slopes, outside_slope,
        count, k, blocks, recipe.alpha, 1 - recipe.alpha, *_clip(recipe), *_chain(p, recipe),
        MODE=_mode(recipe), BUCKET=recipe.tail == "bucket",
        STUDENT_OWNS=recipe.support == "student", TEACHER_OWNS=recipe.support == "teacher",
        **_weight_flags(rows, recipe), SOFTCAP=p.softcap,
        BLOCK_K=_power(k), BLOCK_B=_power(blocks), num_warps=4,
    )  # fmt: skip
    if slope is not None:
        _stream.outside_slopes[(count, triton.cdiv(vocabulary, BLOCK))](
            p.products, p.bias, slope, outside_slope, log_outside_p, vocabulary, p.inner, p.outer,
            BIAS=p.has_bias, SOFTCAP=p.softcap, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        slope.scatter_(1, ids, inside_slopes.to(slope.dtype))
    return TokenStats(*stats.unbind())


def _full_chunk(p: _Model, q: _Model, rows: Rows, recipe: Recipe, slope: Tensor | None) -> TokenStats:
    count, vocabulary = p.products.shape
    grid = (count, triton.cdiv(vocabulary, BLOCK))
    new = p.products.new_empty
    stats = new(len(TokenStats._fields), count)
    known = TokenStats(*stats.unbind())
    normalizers = new(2, count)
    for model, normalizer, entropy in (
        (p, normalizers[0], known.student_entropy),
        (q, normalizers[1], known.teacher_entropy),
    ):
        sums = _block_sums(model)
        _full.normalizers[(count,)](*sums, normalizer, entropy, grid[1], BLOCK_B=_power(grid[1]), num_warps=1)
    values, commons, common, scale = new(grid), new(grid), new(count), new(count)
    both = (p.products, q.products, p.bias, q.bias, *normalizers.unbind())
    maps = (vocabulary, p.inner, p.outer, q.inner, q.outer, recipe.alpha, 1 - recipe.alpha)
    flags: dict[str, Any] = {
        "BIAS_P": p.has_bias, "BIAS_Q": q.has_bias, "SOFTCAP_P": p.softcap, "SOFTCAP_Q": q.softcap,
        "MODE": _mode(recipe), "BLOCK": BLOCK, "num_warps": WARPS,
    }  # fmt: skip
    _full.full_terms[grid](*both, values, commons, *maps, **flags)
    _full.full_rows[(count,)](
        values, commons, *normalizers.unbind(), _read(p, rows.tokens[:, None]), _read(q, rows.tokens[:, None]),
        *_weight_pointers(rows, stats), stats, common, scale, count, grid[1], *_clip(recipe), _chain(p, recipe)[0],
        **_weight_flags(rows, recipe), BLOCK_B=_power(grid[1]), num_warps=1,
    )  # fmt: skip
    known.student_topk_mass.fill_(1.0)
    known.teacher_topk_mass.fill_(1.0)
    known.student_log_tail.fill_(-math.inf)
    known.teacher_log_tail.fill_(-math.inf)
    if slope is not None:
        _full.full_slopes[grid](*both, common, scale, slope, *maps, **flags)
    return known


def _choose(model: _Model, k: int) -> tuple[Tensor, Tensor, Tensor, _Sums]:
    """A model's K likeliest tokens: ids and logits [c, K], logsumexp of all others [c], sums of the blocks."""
    count, vocabulary = model.products.shape
    group = GROUP if k < NARROW_FROM else NARROW_GROUP
    groups, blocks = triton.cdiv(vocabulary, group), triton.cdiv(vocabulary, BLOCK)
    new = model.products.new_empty
    sums, group_tops, group_masses = _Sums(*new(3, count, blocks).unbind()), new(count, groups), new(count, groups)
    _stream.group_sums[(count, blocks)](
        model.products, model.bias, *sums, group_tops, group_masses, vocabulary, groups, model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, BLOCK=BLOCK, GROUP=group, num_warps=WARPS,
    )  # fmt: skip
    chosen = new(count, k, dtype=torch.int32)
    log_others, log_outside = new(count), new(count)
    block_g = _power(groups)
    _select.choose_groups[(count,)](
        group_tops, group_masses, chosen, log_others, groups, k,
        BLOCK_G=block_g, BLOCK_K=_power(k), num_warps=_warps(block_g),
    )  # fmt: skip
    ids, inside = new(count, k, dtype=torch.int64), new(count, k)
    block = _power(k) * group
    _select.choose_tokens[(count,)](
        model.products, model.bias, chosen, log_others, ids, inside, log_outside, vocabulary, k,
        model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, GROUP=group, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return ids, inside, log_outside, sums


def _read(model: _Model, ids: Tensor) -> Tensor:
    """Logits [c, K] at token ids [c, K]."""
    count, k = ids.shape
    logits = model.products.new_empty(count, k)
    _select.read_tokens[(count,)](
        model.products, model.bias, ids, logits, model.products.shape[1], k, model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, BLOCK_K=_power(k), num_warps=1,
    )  # fmt: skip
    return logits


def _without(model: _Model, ids: Tensor) -> _Sums:
    """Sums of the blocks over all tokens but those at ids, which are lost from the products."""
    model.products.scatter_(1, ids, _math.MASKED.value)
    return _block_sums(model)


def _block_sums(model: _Model) -> _Sums:
    count, vocabulary = model.products.shape
    blocks = triton.cdiv(vocabulary, BLOCK)
    sums = _Sums(*model.products.new_empty(3, count, blocks).unbind())
    _stream.block_sums[(count, blocks)](
        model.products, model.bias, *sums, vocabulary, model.inner, model.outer,
        BIAS=model.has_bias, SOFTCAP=model.softcap, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return sums


def _model(side: Side, recipe: Recipe) -> _Model:
    capped = recipe.softcap is not None
    inner = recipe.logit_scale / (recipe.temperature if recipe.softcap is None else recipe.softcap)
    outer = 1.0 if recipe.softcap is None else recipe.softcap / recipe.temperature
    bias = side.products if side.bias is None else side.bias.contiguous()
    return _Model(side.products, bias, inner, outer, side.bias is not None, capped)


def _between(teacher: Side, recipe: Recipe) -> _Model:
    """The trust region's logits as products that need no further map."""
    assert teacher.reference is not None
    assert recipe.trust_region_coef is not None
    centre = map_logits(teacher.reference, teacher.reference_bias, recipe)
    live = map_logits(teacher.products, teacher.bias, recipe)
    logits = centre.mul_(1 - recipe.trust_region_coef).add_(live, alpha=recipe.trust_region_coef)
    return _Model(logits, logits, 1.0, 1.0, has_bias=False, softcap=False)


def _mode(recipe: Recipe) -> int:
    if recipe.support == "sampled":
        return _math.SAMPLED.value
    special = {0.0: _math.FORWARD.value, 1.0: _math.REVERSE.value}
    return special.get(recipe.alpha, _math.MIXTURE.value)


def _weight_pointers(rows: Rows, default: Tensor) -> list[Tensor]:
    """Pointers of the optional weights; ``default`` stands in for what is absent and never read."""
    optional = (rows.old_log_probs, rows.extra_weights, rows.slope_weights, rows.lift)
    return [default if value is None else value for value in optional]


def _weight_flags(rows: Rows, recipe: Recipe) -> dict[str, bool]:
    return {
        "OLD": rows.old_log_probs is not None and recipe.is_clip is not None,
        "EXTRA": rows.extra_weights is not None,
        "OWN": rows.slope_weights is not None,
        "LIFT": rows.lift is not None,
    }


def _clip(recipe: Recipe) -> tuple[float, float]:
    return (1.0, 0.0) if recipe.is_clip is None else (recipe.is_clip, math.log(recipe.is_clip))


def _chain(p: _Model, recipe: Recipe) -> tuple[float, float]:
    """Derivative of the logits with respect to the products where nothing is capped, and the cap."""
    return recipe.logit_scale / recipe.temperature, p.outer


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _warps(block: int) -> int:
    return min(16, max(4, block // 1024))
