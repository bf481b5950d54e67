"""The losses: published numbers, closed-form gradients, bounds of the top-K forms, and the masked sum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import oracles
import pytest
import torch
from fused_cases import certain_student_logits, relative_error
from hypothesis import strategies as st
from losses import full_loss, sampled_loss, topk_loss
from strategies import (
    Claim,
    alphas,
    assert_near,
    generator,
    logit_pairs,
    name_of,
    seeds,
    token_batches,
)
from torch import Tensor

from sdpo import (
    Templates,
    add_tail_bucket,
    build_reprompts,
    distillation_loss,
    generalized_jsd,
    self_distillation_loss,
    topk_log_probs,
)

Pair = tuple[Tensor, Tensor]
STUDENT = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0], dtype=torch.float64)
TEACHER = torch.tensor([0.5, 2.0, 0.0, 1.0, -1.5, -3.0], dtype=torch.float64)
ALPHAS = (0.0, 0.25, 0.5, 1.0)
VECTORS = {
    "full": (0.5527057121, 0.1021549093, 0.1378767322, 0.6242134414),
    "3 bucket": (0.5144233314, 0.0958682865, 0.1302818694, 0.5975461062),
    "1 bucket": (0.4059257865, 0.0781872190, 0.1091267412, 0.5253114793),
    "3 renormalize": (0.5979485307, 0.1081827335, 0.1435035488, 0.6236828009),
}
GRADIENTS = {
    0.5: (0.09965197, -0.07829612, 0.00506984, -0.02880353, 0.00113123, 0.00124661),
    1.0: (0.47828935, -0.33657182, -0.01762398, -0.12381785, -0.00393244, 0.00365676),
}


def loss_on(support: str, student: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    if support == "full":
        return full_loss(student, teacher, alpha=alpha)
    k, tail = support.split()
    return topk_loss(student, teacher, k=int(k), alpha=alpha, tail=tail)  # type: ignore[arg-type]


@pytest.mark.parametrize("support", VECTORS)
@pytest.mark.parametrize("column", range(4))
def test_published_values(support: str, column: int) -> None:
    got = loss_on(support, STUDENT, TEACHER, ALPHAS[column])
    assert got.item() == pytest.approx(VECTORS[support][column], abs=1e-10)


@pytest.mark.parametrize("alpha", GRADIENTS)
def test_published_gradients(alpha: float) -> None:
    student = STUDENT.clone().requires_grad_()
    full_loss(student, TEACHER, alpha=alpha).backward()
    assert student.grad is not None
    assert student.grad.tolist() == pytest.approx(GRADIENTS[alpha], abs=1e-8)


def test_published_sampled_token_value() -> None:
    got = sampled_loss(STUDENT, TEACHER, torch.tensor(0))
    assert got.item() == pytest.approx(-0.8668011293, abs=1e-10)


# ---- divergence of logits ----------------------------------------------------------------------------------


def gradient(loss: Any, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    leaf = student.clone().requires_grad_()
    loss(leaf, teacher, **options).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def property_full_loss_is_its_definition(loss: Any, pair: Pair, alpha: float) -> None:
    definition = lambda s, t: oracles.jsd(oracles.log_softmax(s), oracles.log_softmax(t), alpha)  # noqa: E731
    assert_near(loss(*pair, alpha=alpha), oracles.per_row(definition, *pair))


def property_full_gradient_is_closed_form(loss: Any, pair: Pair, alpha: float) -> None:
    student, teacher = pair
    p, q = student.softmax(-1), teacher.softmax(-1)
    if alpha == 0.0:
        expected = p - q
    else:
        log_ratio = torch.log_softmax(student, -1) - (
            torch.log_softmax(teacher, -1) if alpha == 1.0 else ((1 - alpha) * p + alpha * q).log()
        )
        log_ratio = log_ratio.nan_to_num(0.0)
        derivative = p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True))
        expected = derivative if alpha == 1.0 else (1 - alpha) * derivative
    assert_near(gradient(loss, student, teacher, alpha=alpha), expected)


def property_teacher_gets_no_gradient(loss: Any, pair: Pair, alpha: float) -> None:
    student, teacher = (logits.clone().requires_grad_() for logits in pair)
    loss(student, teacher, alpha=alpha).sum().backward()
    assert teacher.grad is None


def teacher_attached(student: Tensor, teacher: Tensor, *, alpha: float) -> Tensor:
    return generalized_jsd(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1), alpha=alpha)


def property_only_differences_of_logits_count(loss: Any, pair: Pair, alpha: float, shift: float) -> None:
    student, teacher = pair
    assert_near(
        loss(student + shift, teacher - shift, alpha=alpha), loss(student, teacher, alpha=alpha), 1e-8
    )


def unnormalized(student: Tensor, teacher: Tensor, *, alpha: float) -> Tensor:
    return generalized_jsd(student, teacher, alpha=alpha)


# ---- top-K -------------------------------------------------------------------------------------------------


def property_topk_loss_is_its_definition(
    loss: Any, pair: Pair, alpha: float, k: int, tail: str, support: str
) -> None:
    student, teacher = pair
    k = min(k, student.shape[-1])
    ids = torch.topk(student if support == "student" else teacher, k).indices
    definition = lambda s, t, i: oracles.topk_loss(s, t, [int(x) for x in i], alpha, tail)  # noqa: E731
    expected = oracles.per_row(definition, student, teacher, ids)
    got = loss(student, teacher, k=k, alpha=alpha, tail=tail, support=support)
    assert_near(got, expected)
    assert gradient(loss, student, teacher, k=k, alpha=alpha, tail=tail, support=support).isfinite().all()


def each_at_its_own_topk(
    student: Tensor, teacher: Tensor, *, k: int, alpha: float, tail: str, support: str
) -> Tensor:
    top = [topk_log_probs(logits, k=k) for logits in (student, teacher)]
    return generalized_jsd(*(add_tail_bucket(t.log_probs, t.log_tail) for t in top), alpha=alpha)


def property_topk_gradient_is_numerical(loss: Any, pair: Pair, alpha: float, k: int, tail: str) -> None:
    """Central differences of the oracle at fixed ids; the tokens outside the support count too."""
    student, teacher = pair
    k = min(k, student.shape[-1])
    ids = torch.topk(student, k).indices
    got = gradient(loss, student, teacher, k=k, alpha=alpha, tail=tail)
    vocabulary = student.shape[-1]
    for row, other, chosen, derivative in zip(
        *(x.reshape(-1, x.shape[-1]) for x in (student, teacher, ids, got)), strict=True
    ):
        expected = oracles.numerical_gradient(
            lambda z, other=other, chosen=chosen: oracles.topk_loss(
                z, other.tolist(), chosen.tolist(), alpha, tail
            ),  # type: ignore[misc]
            row.tolist(),
        )
        assert len(expected) == vocabulary
        assert_near(derivative, expected, 1e-6)


def topk_loss_blind_to_its_tail(
    student: Tensor, teacher: Tensor, *, k: int, alpha: float, tail: str
) -> Tensor:
    """The value is right, but no gradient reaches the tokens outside, as behind a saturated clamp."""
    top = topk_log_probs(student, k=k)
    bucketed = add_tail_bucket(top.log_probs, top.log_tail.detach())
    theirs = torch.log_softmax(teacher, -1).gather(-1, top.indices)
    outside = torch.log_softmax(teacher, -1).scatter(-1, top.indices, -math.inf).logsumexp(-1)
    return generalized_jsd(bucketed, add_tail_bucket(theirs, outside), alpha=alpha)


def property_bucket_is_a_rising_lower_bound(loss: Any, pair: Pair, alpha: float) -> None:
    student, teacher = pair
    full = full_loss(student, teacher, alpha=alpha)
    values = [
        loss(student, teacher, k=k, alpha=alpha, tail="bucket") for k in range(1, student.shape[-1] + 1)
    ]
    slack = 1e-9 * (1.0 + full)
    for smaller, larger in zip(values, [*values[1:], full], strict=True):
        assert (smaller <= larger + slack).all()
    assert_near(values[-1], full)


def bucket_dropped(student: Tensor, teacher: Tensor, *, k: int, alpha: float, tail: str) -> Tensor:
    return topk_loss(student, teacher, k=k, alpha=alpha, tail="renormalize")


def property_one_renormalized_token_says_nothing(loss: Any, pair: Pair, alpha: float) -> None:
    student, teacher = pair
    value = loss(student, teacher, k=1, alpha=alpha, tail="renormalize")
    assert_near(value, torch.zeros_like(value), 1e-15)
    assert (gradient(loss, student, teacher, k=1, alpha=alpha, tail="renormalize") == 0.0).all()


def bucket_always(student: Tensor, teacher: Tensor, *, k: int, alpha: float, tail: str) -> Tensor:
    return topk_loss(student, teacher, k=k, alpha=alpha, tail="bucket")


# ---- another library ---------------------------------------------------------------------------------------


def property_agrees_with_trl(loss: Any, pair: Pair, alpha: float, k: int, tail: str) -> None:
    """On finite, moderate logits, where its clamped tail is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl_loss = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    student, teacher = pair
    k = min(k, student.shape[-1] - 1)
    options = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": tail == "bucket"}
    theirs = trl_loss.compute_topk_self_distillation_loss(student, teacher, **options)
    assert_near(loss(student, teacher, k=k, alpha=alpha, tail=tail), theirs, 1e-7)
    theirs = trl_loss.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
    assert_near(full_loss(student, teacher, alpha=alpha), theirs, 1e-7)


# ---- sampled token -----------------------------------------------------------------------------------------


def property_sampled_gradient_is_unbiased(loss: Any, pair: Pair) -> None:
    """The expectation over the student's own samples, summed exactly over the vocabulary."""
    student, teacher = pair
    expected = gradient(full_loss, student, teacher, alpha=1.0)
    p = student.softmax(-1)
    mean = torch.zeros_like(student)
    for token in range(student.shape[-1]):
        tokens = torch.full(student.shape[:-1], token)
        mean += p[..., [token]] * gradient(lambda s, t, y=tokens: loss(s, t, y), student, teacher)
    assert_near(mean, expected)


def log_ratio_of_the_sample(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Right value in expectation, and an expected gradient of zero."""
    ids = tokens.unsqueeze(-1)
    ratio = torch.log_softmax(student, -1).gather(-1, ids) - torch.log_softmax(teacher, -1).gather(-1, ids)
    return ratio.squeeze(-1)


# ---- masked sum --------------------------------------------------------------------------------------------


def property_step_is_a_loop_over_active_tokens(loss: Any, batch: Pair, seed: int) -> None:
    """What is inactive may be NaN; the weights are constants; each row and token counts once."""
    values, mask = batch
    rows = torch.rand(len(values), generator=generator(seed)) < 0.6
    weights = torch.rand(values.shape, generator=generator(seed), dtype=torch.float64)
    active = mask & rows[:, None]
    chosen = [tuple(index) for index in active.nonzero().tolist()]
    dirty = values.masked_fill(~active, math.nan).requires_grad_()
    spoilt = weights.masked_fill(~active, math.inf).requires_grad_()
    out = loss(dirty, mask, row_mask=rows, weights=spoilt)
    out.total.backward()
    assert_near(out.total, math.fsum((weights[i] * values[i]).item() for i in chosen))
    assert out.count.item() == len(chosen)
    assert dirty.grad is not None
    assert_near(dirty.grad, weights * active)
    assert spoilt.grad is None
    assert out.metrics["active_rows"].item() == len({row for row, _ in chosen})
    assert out.metrics["active_tokens"].item() == len(chosen)
    assert_near(out.metrics["divergence"], math.fsum(values[i].item() for i in chosen) / max(len(chosen), 1))
    assert_near(out.metrics["weight"], math.fsum(weights[i].item() for i in chosen) / max(len(chosen), 1))
    assert not any(metric.requires_grad for metric in out.metrics.values())


def property_unit_weights_change_nothing(loss: Any, batch: Pair) -> None:
    values, mask = batch
    rows = torch.ones(len(values), dtype=torch.bool)
    plain = loss(values, mask, row_mask=rows)
    assert_near(plain.total, loss(values, mask, row_mask=rows, weights=torch.ones_like(values)).total)
    assert_near(plain.total, values[mask].sum())


def step_ignoring_rows(
    values: Tensor, mask: Tensor, *, row_mask: Tensor, weights: Tensor | None = None
) -> Any:
    given = None if weights is None else weights.detach().nan_to_num(posinf=1.0)  # others are refused
    return self_distillation_loss(values, mask, row_mask=torch.ones_like(row_mask), weights=given)


def step_of_doubled_values(
    values: Tensor, mask: Tensor, *, row_mask: Tensor, weights: Tensor | None = None
) -> Any:
    if weights is None:
        weights = torch.full_like(values, 2.0)
    return self_distillation_loss(values, mask, row_mask=row_mask, weights=weights)


def property_no_cut_changes_the_step(combine: Any, batch: Pair, cuts: int, seed: int) -> None:
    values, mask = batch
    rows = torch.rand(len(values), generator=generator(seed)) < 0.6
    parts = [
        self_distillation_loss(v, m, row_mask=r)
        for v, m, r in zip(*(x.tensor_split(cuts) for x in (values, mask, rows)), strict=True)
    ]
    whole = self_distillation_loss(values, mask, row_mask=rows)
    assert_near(combine(parts), whole.total / whole.count.clamp(min=1))


def divide_once(parts: list[Any]) -> Tensor:
    return sum(p.total for p in parts) / sum(p.count for p in parts).clamp(min=1)  # type: ignore[attr-defined]


def divide_each(parts: list[Any]) -> Tensor:
    return torch.stack([p.total / p.count.clamp(min=1) for p in parts]).mean()


pairs = {"pair": logit_pairs(), "alpha": alphas}
same_support = {"pair": logit_pairs(same_mask=True), "alpha": alphas}
# Without ties the chosen tokens stay the same under the small steps of a numerical derivative.
smooth = {"pair": logit_pairs(same_mask=True, max_scale=1.0, min_vocabulary=2), "alpha": alphas}
ks = st.integers(1, 9)
tails = st.sampled_from(["bucket", "renormalize"])
CLAIMS = [
    Claim(
        property_full_loss_is_its_definition,
        full_loss,
        lambda s, t, alpha: full_loss(t, s, alpha=alpha),
        pairs,
    ),
    Claim(property_full_gradient_is_closed_form, full_loss, unnormalized, same_support),
    Claim(property_teacher_gets_no_gradient, full_loss, teacher_attached, pairs),
    Claim(
        property_teacher_gets_no_gradient,
        lambda s, t, alpha: topk_loss(s, t, k=1, alpha=alpha, tail="bucket", support="teacher"),
        teacher_attached,
        pairs,
    ),
    Claim(
        property_teacher_gets_no_gradient,
        lambda s, t, alpha: sampled_loss(s, t, torch.zeros(s.shape[:-1], dtype=torch.long)),
        teacher_attached,
        pairs,
    ),
    Claim(
        property_only_differences_of_logits_count,
        full_loss,
        unnormalized,
        {**pairs, "shift": st.floats(-100.0, 100.0)},
    ),
    Claim(
        property_topk_loss_is_its_definition,
        topk_loss,
        each_at_its_own_topk,
        {**pairs, "k": ks, "tail": tails, "support": st.sampled_from(["student", "teacher"])},
    ),
    Claim(
        property_topk_gradient_is_numerical,
        topk_loss,
        topk_loss_blind_to_its_tail,
        {**smooth, "k": ks, "tail": tails},
    ),
    Claim(property_bucket_is_a_rising_lower_bound, topk_loss, bucket_dropped, pairs),
    Claim(property_one_renormalized_token_says_nothing, topk_loss, bucket_always, same_support),
    Claim(
        property_agrees_with_trl,
        topk_loss,
        lambda s, t, k, alpha, tail: topk_loss(s, t, k=k, alpha=alpha, tail=tail, support="teacher"),
        {
            "pair": logit_pairs(masked=False, max_scale=1.0, min_vocabulary=2),
            "alpha": alphas,
            "k": ks,
            "tail": tails,
        },
    ),
    Claim(
        property_sampled_gradient_is_unbiased,
        sampled_loss,
        log_ratio_of_the_sample,
        {"pair": logit_pairs(same_mask=True)},
    ),
    Claim(
        property_step_is_a_loop_over_active_tokens,
        self_distillation_loss,
        step_ignoring_rows,
        {"batch": token_batches(), "seed": seeds},
    ),
    Claim(
        property_unit_weights_change_nothing,
        self_distillation_loss,
        step_of_doubled_values,
        {"batch": token_batches()},
    ),
    Claim(
        property_no_cut_changes_the_step,
        divide_once,
        divide_each,
        {"batch": token_batches(), "cuts": st.integers(1, 4), "seed": seeds},
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_sampled_tokens_that_one_side_excludes() -> None:
    student = torch.tensor([[0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 0.0], [0.0, -math.inf, 0.0]])
    loss = sampled_loss(student, teacher, torch.tensor([1, 1]))
    assert loss.tolist() == [0.0, math.inf]
    loss.sum().backward()
    assert student.grad is not None
    assert (student.grad == 0.0).all()


def test_support_without_teacher_mass_is_infinitely_far() -> None:
    student, teacher = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-math.inf, 0.0, 0.0])
    for tail in ("bucket", "renormalize"):
        assert topk_loss(student, teacher, k=1, alpha=1.0, tail=tail).item() == math.inf  # type: ignore[arg-type]
        assert topk_loss(student, teacher, k=1, alpha=0.5, tail=tail).isfinite()  # type: ignore[arg-type]


CERTAIN = {
    "top-K": lambda p, q: topk_loss(p, q, k=100, alpha=0.5, tail="bucket"),
    "reverse": lambda p, q: topk_loss(p, q, k=100, alpha=1.0, tail="renormalize"),
    "full": lambda p, q: full_loss(p, q, alpha=0.5),
    "sampled": lambda p, q: sampled_loss(p, q, torch.zeros(len(p), dtype=torch.long)),
}


def gradient_error(loss: Callable[..., Tensor]) -> float:
    """In float32, of a student that is nearly certain of what its teacher doubts, against float64."""
    student, teacher = certain_student_logits()

    def gradient(dtype: torch.dtype) -> Tensor:
        leaf = student.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(leaf, teacher.to(dtype)).sum(), leaf)[0]

    return relative_error(gradient(torch.float32), gradient(torch.float64))


@pytest.mark.parametrize("name", CERTAIN)
def test_the_gradient_of_a_nearly_certain_token_keeps_its_digits(name: str) -> None:
    assert gradient_error(CERTAIN[name]) < 2e-5


def test_without_a_reference_the_digits_are_lost() -> None:
    def counter_example(student: Tensor, teacher: Tensor) -> Tensor:
        return generalized_jsd(student.log_softmax(-1), teacher.log_softmax(-1), alpha=0.5)

    assert gradient_error(counter_example) > 1e-3


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"k": 0}, ValueError, r"k: expected an int in \[1, 4\], got 0; pass"),
        ({"k": 5}, ValueError, r"k: expected an int in \[1, 4\], got 5; .*min\(k, 4\)"),
        ({"k": True}, TypeError, r"k: expected an int, got True"),
        ({"alpha": 3}, ValueError, r"alpha: expected a number in \[0, 1\], got 3; pass 0 for"),
        ({"alpha": math.nan}, ValueError, r"alpha: .*got nan"),
        ({"alpha": True}, TypeError, r"alpha: expected a number, got True \(bool\)"),
        ({"tail": "drop"}, ValueError, r"tail: expected one of \('bucket', 'renormalize'\), got 'drop'"),
        ({"tail": True}, TypeError, r"tail: expected one of .*got True \(bool\)"),
        (
            {"support": "both"},
            ValueError,
            r"support: expected one of \('student', 'teacher', 'full', 'sampled'\), got 'both'",
        ),
        ({"support": "full"}, ValueError, r"k: expected None with support='full', got 2"),
        (
            {"support": "full", "k": None},
            ValueError,
            r"tail: expected None with support='full', got 'bucket'",
        ),
        (
            {"support": "sampled", "k": None, "tail": None},
            ValueError,
            r"alpha: expected 1 with support='sampled'",
        ),
        ({"k": None}, TypeError, r"k: expected an int, got None"),
        ({"tail": None}, TypeError, r"tail: expected one of .*got None"),
    ],
)
def test_options_are_checked(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    options: dict[str, Any] = {"k": 2, "alpha": 0.5, "tail": "bucket", "support": "student", **changed}
    with pytest.raises(error, match=message):
        topk_loss(torch.zeros(3, 4), torch.zeros(3, 4), **options)


def test_tensors_are_checked() -> None:
    logits, mask = torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"teacher_logits: expected shape \(3, 4\).*got \(4, 3\); align"):
        full_loss(logits, logits.T, alpha=0.5)
    with pytest.raises(
        TypeError, match=r"student_logits: expected a tensor of floating dtype, got torch\.int64"
    ):
        full_loss(logits.long(), logits, alpha=0.5)
    with pytest.raises(
        TypeError, match=r"tokens: .*integer dtype, got torch\.float32; convert it with `\.long\(\)`"
    ):
        sampled_loss(logits, logits, torch.zeros(3))
    with pytest.raises(ValueError, match=r"tokens: expected shape \(3,\).*got \(4,\)"):
        sampled_loss(logits, logits, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"row_mask: expected shape \(3,\) .*got \(4,\)"):
        self_distillation_loss(logits, mask, row_mask=mask[0])
    with pytest.raises(TypeError, match=r"loss_mask: .*bool dtype, got torch\.float32"):
        self_distillation_loss(logits, logits, row_mask=mask[:, 0])
    with pytest.raises(ValueError, match=r"weights: expected shape \(3, 4\).*got \(3, 1\)"):
        self_distillation_loss(logits, mask, row_mask=mask[:, 0], weights=torch.ones(3, 1))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_weights_are_finite_and_not_negative(bad: float) -> None:
    """Where a token counts; an inactive one may have any."""
    values, weights = torch.ones(2, 2), torch.tensor([[1.0, bad], [bad, bad]])
    mask = torch.tensor([[True, True], [True, True]])
    with pytest.raises(ValueError, match=rf"weights: expected finite numbers >= 0 .*got {bad}; mask such"):
        self_distillation_loss(values, mask, row_mask=[True, False], weights=weights)
    loss = self_distillation_loss(
        values, mask & torch.tensor([True, False]), row_mask=[True, False], weights=weights
    )
    assert loss.total.item() == 1.0


@pytest.mark.parametrize("poison", [0.0, math.inf, math.nan])
def test_the_mean_of_nothing_is_zero_with_gradients_of_zero(poison: float) -> None:
    leaf = torch.full((2, 3), poison, requires_grad=True)
    mean = self_distillation_loss(leaf, torch.zeros(2, 3, dtype=torch.bool), row_mask=[True, False]).mean()
    mean.backward()
    assert mean.item() == 0.0
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[0.0] * 3] * 2
    # Divided by the bare count it is NaN, in value and gradient.
    assert (leaf.detach().masked_fill(torch.ones(2, 3).bool(), 0.0).sum() / torch.tensor(0)).isnan()


def test_a_weight_of_zero_silences_an_infinite_loss() -> None:
    leaf = torch.tensor([[math.inf, 2.0]], requires_grad=True)
    loss = self_distillation_loss(
        leaf, torch.ones(1, 2, dtype=torch.bool), row_mask=[True], weights=torch.tensor([[0.0, 0.5]])
    )
    loss.mean().backward()
    assert loss.total.item() == 1.0
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [[0.0, 0.25]]


def test_logits_of_no_distribution_are_left_out_before_the_loss() -> None:
    """A position without a possible token, such as one of padding, makes its own gradient NaN when it is masked."""
    logits = torch.tensor([[[0.0, 1.0], [-math.inf, -math.inf]]], requires_grad=True)
    teacher, mask = torch.zeros(1, 2, 2), torch.tensor([[True, False]])
    masked = self_distillation_loss(full_loss(logits, teacher, alpha=0.5), mask, row_mask=[True]).mean()
    (gradient,) = torch.autograd.grad(masked, logits)
    assert gradient[mask].isfinite().all()
    assert gradient[~mask].isnan().all()
    left_out = full_loss(logits[mask], teacher[mask], alpha=0.5).mean()
    assert left_out.item() == masked.item()
    (expected,) = torch.autograd.grad(left_out, logits)
    assert torch.equal(expected[mask], gradient[mask])
    assert (expected[~mask] == 0.0).all()


@pytest.mark.parametrize("row_mask", [[True, False], (True, False), torch.tensor([True, False])])
def test_the_row_mask_is_a_tensor_or_a_sequence(row_mask: Any) -> None:
    loss = self_distillation_loss(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), row_mask=row_mask)
    assert (loss.total.item(), loss.count.item()) == (2.0, 2)
    for entries, said in (
        ([True, 1], r"\[1\]: expected a bool, got 1 \(int\)"),
        ([None, True], r"\[0\]: .* None"),
    ):
        with pytest.raises(TypeError, match=f"row_mask{said}"):
            self_distillation_loss(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), row_mask=entries)
    with pytest.raises(TypeError, match="row_mask: expected a tensor of bool dtype, got str"):
        self_distillation_loss(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), row_mask="ab")  # type: ignore[arg-type]


def test_a_batch_without_rows_has_a_loss_of_zero() -> None:
    built = build_reprompts([], [], [], templates=Templates(), feedback_only_without_solution=True)
    loss = self_distillation_loss(
        torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), row_mask=built.row_mask
    )
    assert (loss.mean().item(), loss.count.item()) == (0.0, 0)


def test_temperature_divides_both_sides() -> None:
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    options: dict[str, Any] = {"support": "student", "k": 2, "tail": "bucket", "alpha": 0.3}
    expected = distillation_loss(student / 0.6, teacher / 0.6, **options, temperature=1.0)
    assert_near(distillation_loss(student, teacher, **options, temperature=0.6), expected)
    with pytest.raises(ValueError, match=r"temperature: expected a number in \(0, inf\), got 0"):
        distillation_loss(student, teacher, **options, temperature=0)
    # −inf / inf is NaN.
    with pytest.raises(ValueError, match=r"temperature: expected a number in \(0, inf\), got inf"):
        distillation_loss(student, teacher, **options, temperature=math.inf)
