"""Validation of the fused loss's arguments, on entry."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdpo._numerics import upcast
from sdpo._validate import (
    LARGEST,
    check_alpha,
    check_choice,
    check_device,
    check_ids,
    check_int,
    check_real,
    check_shape,
    check_support,
    check_temperature,
    check_tensor,
    check_weights,
    is_readable,
    type_name,
)
from sdpo.fused._types import (
    LMHead,
    Objective,
    Operands,
    RowFactors,
    Support,
    Surrogate,
    SurrogateKind,
    Tail,
)
from sdpo.given import TeacherTopK, check_teacher_topk
from sdpo.token_factors import TokenWeights


def check_head(name: str, head: object, vocabulary: int | None = None) -> LMHead:
    """Demand an LMHead of a weight [V, D] and, unless None, a bias [V]; V the student's vocabulary, if given."""
    if not isinstance(head, LMHead):
        raise TypeError(
            f"{name}: expected an LMHead, got {type_name(head)}; pass sdpo.LMHead(hidden, weight, bias)"
        )
    check_tensor(f"{name}.hidden", head.hidden, "floating", min_ndim=2)
    check_tensor(f"{name}.weight", head.weight, "floating", min_ndim=2)
    if head.weight.ndim != 2 or 0 in head.weight.shape:
        raise ValueError(
            f"{name}.weight: expected a shape [V, D] with V, D > 0, got {tuple(head.weight.shape)}; "
            "pass the weight of the output embedding"
        )
    if vocabulary is not None:
        expected = (vocabulary, head.weight.shape[1])
        check_shape(f"{name}.weight", head.weight, expected, like="the student's vocabulary")
    if head.bias is not None:
        check_tensor(f"{name}.bias", head.bias, "floating")
        check_shape(f"{name}.bias", head.bias, head.weight.shape[:1], like=f"V of {name}.weight")
    return head


def check_teacher(teacher: object, support: object) -> int | None:
    """Demand the kind of teacher that the support needs; the number of its ids, if they are given."""
    if support != "given":
        if isinstance(teacher, TeacherTopK):
            raise TypeError(
                f"teacher: expected an LMHead with support={support!r}, got a TeacherTopK; pass support='given'"
            )
        return None
    if not isinstance(teacher, TeacherTopK):
        raise TypeError(
            f"teacher: expected a TeacherTopK with support='given', got {type_name(teacher)}; "
            "pass sdpo.TeacherTopK(ids, log_probs)"
        )
    check_tensor("teacher.ids", teacher.ids, "integer", min_ndim=2)
    check_tensor("teacher.log_probs", teacher.log_probs, "floating")
    return teacher.ids.shape[-1]


def check_objective(
    *,
    vocabulary: int,
    given_k: int | None,
    support: Support,
    k: int | None,
    tail: Tail | None,
    alpha: float,
    is_clip: float | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    trust_region_coef: float | None,
    surrogate: Surrogate | None,
) -> Objective:
    """Validate the scalars of the objective; ``given_k`` is the number of the teacher's ids, if they are given."""
    alpha = check_alpha(alpha)
    check_choice("support", support, ("student", "teacher", "full", "sampled", "given"))
    if support == "given":
        if k is not None:
            raise ValueError(
                f"k: expected None with support='given', got {k!r}; it is the number of the teacher's ids"
            )
        check_choice("tail", tail, ("bucket", "renormalize"))
        k = check_int("teacher.ids.shape[-1]", given_k, low=1, high=vocabulary, meaning="1 to V distinct ids")
    else:
        check_support(support, k, tail, alpha, vocabulary=vocabulary)
    if k == vocabulary and support != "given":
        # A support of all V tokens has no order and no tail.
        support, k, tail = "full", None, None
    if is_clip is not None:
        meaning = "the largest importance weight, or None"
        is_clip = check_real("is_clip", is_clip, low=0.0, high=math.inf, open_low=True, meaning=meaning)
    if softcap is not None:
        softcap = _check_positive("softcap", softcap, "the bound of the logits, or None")
    if trust_region_coef is not None:
        meaning = "the weight of the live teacher's logits"
        trust_region_coef = check_real(
            "trust_region_coef", trust_region_coef, low=0.0, high=1.0, meaning=meaning
        )
    return Objective(
        support=support,
        k=k if k is None else int(k),
        tail=tail,
        alpha=alpha,
        is_clip=is_clip,
        temperature=check_temperature(temperature),
        softcap=softcap,
        logit_scale=_check_positive("logit_scale", logit_scale, "the factor of the logits"),
        trust_region_coef=trust_region_coef,
        surrogate=surrogate,
    )


def check_surrogate(
    *,
    advantages: Tensor | None,
    policy_weight: float | Tensor | None,
    old_log_probs: Tensor | None,
    surrogate: SurrogateKind,
    clip_low: float | None,
    clip_high: float | None,
    sapo_temperatures: tuple[float, float] | None,
) -> Surrogate | None:
    """Validate the scalars of the policy gradient; None without one, or with one of weight 0."""
    _check_together("advantages", advantages, "policy_weight", policy_weight, "a policy gradient")
    check_choice("surrogate", surrogate, ("clipped", "cispo", "sapo"))
    if advantages is None and surrogate != "clipped":
        raise ValueError(f"surrogate: expected advantages with {surrogate!r}, got None; pass advantages")
    has_range = advantages is not None and surrogate != "sapo"
    has_temperatures = advantages is not None and surrogate == "sapo"
    owner = "no advantages" if advantages is None else f"surrogate={surrogate!r}"
    for name, value, allowed in (
        ("clip_low", clip_low, has_range),
        ("clip_high", clip_high, has_range),
        ("sapo_temperatures", sapo_temperatures, has_temperatures),
    ):
        if value is not None and not allowed:
            raise ValueError(f"{name}: expected None with {owner}, got {value!r}; leave it out")
    low, high, temperatures = 1.0, math.inf, (1.0, 1.0)
    # On-policy the ratio is 1, whatever its range.
    if has_range and not (old_log_probs is None and clip_low is clip_high is None):
        meaning = "a half-width, for example 0.2"
        low = check_real("clip_low", clip_low, low=0.0, high=1.0, meaning=meaning)
        high = check_real("clip_high", clip_high, low=0.0, high=math.inf, meaning=meaning)
    if has_temperatures:
        temperatures = _check_sapo_temperatures(sapo_temperatures)
    if advantages is None or (not isinstance(policy_weight, Tensor) and policy_weight == 0.0):
        return None
    return Surrogate(surrogate, low, high, temperatures)


def check_row_factors(
    *,
    token_fraction: float | None,
    token_weights: TokenWeights | None,
    loss_mask: Tensor,
    support: Support,
    reduction: str,
) -> RowFactors | None:
    """Validate what weighs the tokens of a row; None if nothing does."""
    for name, value in (("token_fraction", token_fraction), ("token_weights", token_weights)):
        if value is not None and reduction == "none":
            raise ValueError(
                f"{name}: expected None with reduction='none', got {value!r}; multiply per_token by "
                "sdpo.token_factors"
            )
    if token_fraction is not None:
        if support == "sampled":
            raise ValueError(
                f"token_fraction: expected None with support='sampled', got {token_fraction!r}; a surrogate does "
                "not rank tokens: choose another support"
            )
        meaning = "the share of a row's tokens to keep, or None"
        token_fraction = check_real(
            "token_fraction", token_fraction, low=0.0, high=1.0, open_low=True, meaning=meaning
        )
    if token_weights is not None and not callable(token_weights):
        raise TypeError(
            f"token_weights: expected a function of statistics and mask, or None, got {type_name(token_weights)}; "
            "pass one such as lambda statistics, mask: confidence_weights(statistics.teacher_entropy, mask, "
            "beta=1.0), or tensors as weights"
        )
    if token_fraction is None and token_weights is None:
        return None
    check_tensor("loss_mask", loss_mask, "bool", min_ndim=1)
    return RowFactors(loss_mask.shape[-1], token_fraction, token_weights)


def check_operands(
    *,
    student: LMHead,
    teacher: LMHead | TeacherTopK,
    reference: LMHead | None,
    tokens: Tensor,
    loss_mask: Tensor,
    old_log_probs: Tensor | None,
    weights: Tensor | None,
    advantages: Tensor | None,
    policy_weight: float | Tensor | None,
    objective: Objective,
) -> Operands:
    """Validate the tensors and flatten their leading dimensions; every token counts as active.

    Without a surrogate the operands have no advantages.
    """
    check_tensor("tokens", tokens, "integer", min_ndim=1)
    check_tensor("loss_mask", loss_mask, "bool")
    check_shape("loss_mask", loss_mask, tokens.shape, like="the shape of tokens")
    if advantages is not None:
        check_tensor("advantages", advantages, "floating")
    for name, value in (("old_log_probs", old_log_probs), ("weights", weights)):
        if value is not None:
            check_tensor(name, value, "floating")
            check_shape(name, value, tokens.shape, like="the shape of tokens")
    if advantages is None or old_log_probs is None:
        _check_together("old_log_probs", old_log_probs, "is_clip", objective.is_clip, "importance weights")
    coef = objective.trust_region_coef
    _check_together("reference", reference, "trust_region_coef", coef, "a trust-region teacher")
    vocabulary = student.weight.shape[0]
    heads, topk = {"student": student}, None
    if isinstance(teacher, TeacherTopK):
        topk = teacher._replace(ids=teacher.ids.long())
        if reference is not None:
            raise ValueError("reference: expected None with support='given', got an LMHead; leave it out")
        for name, value in topk._asdict().items():
            expected = (*tokens.shape, topk.ids.shape[-1])
            check_shape(f"teacher.{name}", value, expected, like="tokens, then K")
            check_device(f"teacher.{name}", value, student.hidden, like="the device of student.hidden")
    else:
        heads["teacher"] = check_head("teacher", teacher, vocabulary)
    if reference is not None:
        heads["reference"] = check_head("reference", reference, vocabulary)
    for name, head in heads.items():
        expected = (*tokens.shape, head.weight.shape[1])
        check_shape(f"{name}.hidden", head.hidden, expected, like=f"tokens, then D of {name}.weight")
    parts = {
        f"{name}.{part}": value for name, head in heads.items() for part, value in head._asdict().items()
    }
    parts |= {"tokens": tokens, "loss_mask": loss_mask, "old_log_probs": old_log_probs, "weights": weights}
    parts |= {"advantages": advantages}
    parts |= {"policy_weight": policy_weight} if isinstance(policy_weight, Tensor) else {}
    for name, value in parts.items():
        if value is not None:
            check_device(name, value, student.hidden, like="the device of student.hidden")
    if reference is not None and coef in (0.0, 1.0):
        # At either end of the trust region one of the two models is the teacher.
        heads["teacher"], reference = (reference if coef == 0.0 else heads["teacher"]), None
    weights = None if weights is None else weights.flatten()
    policy_weights = None
    if advantages is not None:
        advantages = _check_per_token("advantages", advantages, loss_mask, math.inf)
        share = _check_policy_weight(policy_weight, loss_mask)
        if objective.surrogate is None:
            advantages = None
        else:
            dtype = torch.promote_types(student.hidden.dtype, student.weight.dtype)
            factors = loss_mask.new_ones(tokens.numel(), dtype=dtype) if weights is None else weights
            weights, policy_weights = (upcast(factors) * part for part in (1.0 - share, share))
    return Operands(
        student=_flatten_tokens(student),
        teacher=None if topk is not None else _flatten_tokens(heads["teacher"]),
        reference=None if reference is None else _flatten_tokens(reference),
        teacher_topk=None if topk is None else TeacherTopK(*(values.flatten(0, -2) for values in topk)),
        tokens=tokens.flatten().long(),
        active=None,
        old_log_probs=None if old_log_probs is None else old_log_probs.flatten(),
        weights=weights,
        advantages=advantages,
        policy_weights=policy_weights,
    )


def find_active(operands: Operands, loss_mask: Tensor) -> Operands:
    """The operands with the positions of the active tokens.

    This waits for the device, which has nothing to do until the first product: what can come before it, does.
    """
    active = loss_mask.flatten().nonzero().flatten()
    vocabulary, topk = operands.student.weight.shape[0], operands.teacher_topk
    if is_readable(operands.tokens):
        fix = "mask such positions; V is the number of rows of student.weight"
        check_ids("tokens", operands.tokens[active], vocabulary, fix=fix)
    if operands.weights is not None:
        check_weights("weights", operands.weights, loss_mask.flatten())
    if active.shape[0] != loss_mask.numel():
        operands = operands._replace(active=active)
    if topk is not None and active.device.type == "cpu":  # elsewhere no value is read
        ids, log_probs = (operands.of_active(values) for values in topk)
        check_teacher_topk(ids, log_probs, vocabulary)
    return operands


def row_lengths(loss_mask: Tensor) -> tuple[int, ...]:
    """The number of active tokens of each row of a mask [..., T]."""
    return tuple(
        loss_mask.flatten(0, -2).sum(dim=-1).tolist() if loss_mask.ndim > 1 else [int(loss_mask.sum())]
    )


def unsupported(transform: str) -> NotImplementedError:
    """The error for a transform that a gradient computed chunk by chunk does not allow."""
    return NotImplementedError(
        f"sdpo's fused functions: expected first derivatives in reverse mode, got {transform}, which they do not "
        "support; use sdpo.distillation_loss, or log_softmax, on whole logits"
    )


def refuse_vmap(*tensors: Tensor | None) -> None:
    """Demand tensors that torch.func.vmap, at whatever level, does not batch."""
    functorch = torch._C._functorch
    for tensor in tensors:
        while tensor is not None and functorch.is_functorch_wrapped_tensor(tensor):
            if functorch.is_batchedtensor(tensor):
                raise unsupported("torch.func.vmap")
            tensor = functorch.get_unwrapped(tensor)


def _check_sapo_temperatures(temperatures: object) -> tuple[float, float]:
    """Return the temperatures of positive and of other advantages."""
    if not isinstance(temperatures, tuple) or len(temperatures) != 2:
        raise TypeError(
            f"sapo_temperatures: expected a tuple of two numbers with surrogate='sapo', got {temperatures!r}; "
            "pass those of positive and of other advantages, for example (1.0, 1.05)"
        )
    meaning = "a temperature, for example 1.0"
    positive, other = (
        _check_positive(f"sapo_temperatures[{i}]", value, meaning) for i, value in enumerate(temperatures)
    )
    return positive, other


def _check_policy_weight(policy_weight: object, loss_mask: Tensor) -> float | Tensor:
    """Return the share of the policy gradient, a float or [N]."""
    if not isinstance(policy_weight, Tensor):
        meaning = "the share of the policy gradient, or a tensor of it per token"
        return check_real("policy_weight", policy_weight, low=0.0, high=1.0, meaning=meaning)
    return _check_per_token("policy_weight", policy_weight, loss_mask, 1.0)


def _check_per_token(name: str, values: Tensor, loss_mask: Tensor, high: float) -> Tensor:
    """Return values per token, or per row, as [N] in the working precision, detached.

    ``high`` is 1 for numbers in [0, 1], inf for any finite ones. Values of active tokens are checked on a CPU.
    """
    check_tensor(name, values, "floating")
    if values.ndim == loss_mask.ndim - 1:
        check_shape(name, values, loss_mask.shape[:-1], like="one per row")
        values = values[..., None].expand(loss_mask.shape)
    check_shape(name, values, loss_mask.shape, like="one per row or the shape of tokens")
    values, low = upcast(values).detach(), 0.0 if high == 1.0 else -math.inf
    if is_readable(values) and is_readable(loss_mask):
        wrong = loss_mask & ~((values >= low) & (values <= high) & values.isfinite())
        if wrong.any():
            expected = "numbers in [0, 1]" if high == 1.0 else "finite numbers"
            raise ValueError(
                f"{name}: expected {expected} where loss_mask is true, got {float(values[wrong][0])}; "
                "mask such positions"
            )
    return values.flatten()


def _check_positive(name: str, value: object, meaning: str) -> float:
    """Return ``value`` as a finite float above 0."""
    return check_real(name, value, low=0.0, high=LARGEST, open_low=True, meaning=meaning)


def _check_together(name: str, value: object, other_name: str, other: object, purpose: str) -> None:
    """Demand both of two arguments or neither."""
    if (value is None) != (other is None):
        present, missing = (other_name, name) if value is None else (name, other_name)
        raise ValueError(
            f"{missing}: expected together with {present}, got None; pass both for {purpose}, else neither"
        )


def _flatten_tokens(head: LMHead) -> LMHead:
    return head._replace(hidden=head.hidden.flatten(0, -2))
