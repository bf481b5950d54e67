"""Divergences: the definitions, the bounds, the limits, and 0 · (−∞) = 0."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, alphas, assert_near, inner_alphas, logit_pairs, name_of, seeds
from torch import Tensor

from sdpo import generalized_jsd, kl_divergence

Pair = tuple[Tensor, Tensor]


def normalized(pair: Pair) -> Pair:
    return torch.log_softmax(pair[0], -1), torch.log_softmax(pair[1], -1)


# ---- Kullback–Leibler --------------------------------------------------------------------------------------


def property_kl_is_its_definition(kl: Any, pair: Pair) -> None:
    log_p, log_q = normalized(pair)
    assert_near(kl(log_p, log_q), oracles.per_row(oracles.kl, log_p, log_q))


def kl_from_torch(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def property_kl_agrees_with_torch(kl: Any, pair: Pair) -> None:
    log_p, log_q = normalized(pair)
    categorical = partial(torch.distributions.Categorical, validate_args=False)
    assert_near(kl(log_p, log_q), kl_from_torch(log_p, log_q))
    theirs = torch.distributions.kl_divergence(categorical(logits=log_p), categorical(logits=log_q))
    assert_near(kl(log_p, log_q), theirs)


def property_excluded_tokens_are_finite_in_value_and_gradient(kl: Any, pair: Pair) -> None:
    student, teacher = pair
    student = student.clone().requires_grad_()
    value = kl(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
    assert value.isfinite().all()
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    p, log_ratio = student.softmax(-1), torch.log_softmax(student, -1) - torch.log_softmax(teacher, -1)
    log_ratio = log_ratio.nan_to_num(0.0)
    mean = (p * log_ratio).sum(-1, keepdim=True)
    assert_near(student.grad, (p * (log_ratio - mean)).detach())


def kl_masked_after_the_fact(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The value is right; the gradient is 0 · NaN."""
    return torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def property_infinite_is_inf_and_harmless(kl: Any, pair: Pair) -> None:
    """One position whose divergence is infinite, switched off afterwards, must not poison the gradient."""
    student, teacher = (logits.clone() for logits in pair)
    student[..., 0] = 0.0
    teacher[..., 0] = -math.inf
    teacher[..., 1] = 0.0
    student.requires_grad_()
    value = kl(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
    assert (value == math.inf).all()
    value.masked_fill(torch.ones_like(value, dtype=torch.bool), 0.0).sum().backward()
    assert student.grad is not None
    assert (student.grad == 0.0).all()


# ---- generalized Jensen–Shannon ----------------------------------------------------------------------------


def mixture(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return ((1 - alpha) * log_p.exp() + alpha * log_q.exp()).log()


def jsd_with_swapped_mixture(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    log_m = mixture(log_p, log_q, 1 - alpha)
    return (1 - alpha) * kl_divergence(log_p, log_m) + alpha * kl_divergence(log_q, log_m)


def jsd_without_student_half(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    return alpha * kl_divergence(log_q, mixture(log_p, log_q, alpha))


def jsd_with_swapped_arguments(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    return generalized_jsd(log_q, log_p, alpha=alpha)


def jsd_without_last_token(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    return generalized_jsd(log_p[..., :-1], log_q[..., :-1], alpha=alpha)


def entropy_of_mixture(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    return torch.distributions.Categorical(logits=mixture(log_p, log_q, alpha)).entropy()


def kl_for_every_alpha(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    return kl_divergence(log_p, log_q)


def property_jsd_is_its_definition(jsd: Any, pair: Pair, alpha: float) -> None:
    log_p, log_q = normalized(pair)
    expected = oracles.per_row(lambda p, q: oracles.jsd(p, q, alpha), log_p, log_q)
    assert_near(jsd(log_p, log_q, alpha=alpha), expected)


def property_jsd_is_zero_only_in_agreement(jsd: Any, pair: Pair, alpha: float) -> None:
    log_p, log_q = normalized(pair)
    value = jsd(log_p, log_q, alpha=alpha)
    assert (value >= -1e-12).all()
    assert_near(jsd(log_p, log_p, alpha=alpha), torch.zeros_like(value))
    differs = (log_p.exp() - log_q.exp()).abs().amax(-1) > 1e-3
    assert (value[differs] > 0).all()


def property_jsd_is_bounded_by_the_entropy_of_alpha(jsd: Any, pair: Pair, alpha: float) -> None:
    log_p, log_q = normalized(pair)
    bound = oracles.binary_entropy(alpha)
    assert (jsd(log_p, log_q, alpha=alpha) <= bound + 1e-12).all()
    assert bound <= math.log(2) + 1e-15
    apart = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).log()
    assert_near(jsd(*apart, alpha=alpha), bound)


def property_jsd_mirrors(jsd: Any, pair: Pair, alpha: float) -> None:
    log_p, log_q = normalized(pair)
    assert_near(jsd(log_p, log_q, alpha=alpha), jsd(log_q, log_p, alpha=1 - alpha))


def property_token_order_means_nothing(jsd: Any, pair: Pair, alpha: float, seed: int) -> None:
    log_p, log_q = normalized(pair)
    order = torch.randperm(log_p.shape[-1], generator=torch.Generator().manual_seed(seed))
    assert_near(jsd(log_p[..., order], log_q[..., order], alpha=alpha), jsd(log_p, log_q, alpha=alpha))


def property_derivatives_at_the_ends_are_kl(jsd: Any, pair: Pair) -> None:
    log_p, log_q = normalized(pair)
    forward, reverse = kl_from_torch(log_q, log_p), kl_from_torch(log_p, log_q)
    assert_near(jsd(log_p, log_q, alpha=1e-6) / 1e-6, forward, 1e-3)
    assert_near(jsd(log_p, log_q, alpha=1 - 1e-6) / 1e-6, reverse, 1e-3)
    assert_near(jsd(log_p, log_q, alpha=0), forward)
    assert_near(jsd(log_p, log_q, alpha=1), reverse)


def property_near_agreement_jsd_is_a_scaled_kl(jsd: Any, pair: Pair, alpha: float) -> None:
    log_p, log_q = normalized((pair[0], pair[0] + 1e-4 * pair[1]))
    scaled = alpha * (1 - alpha) * kl_from_torch(log_p, log_q)
    torch.testing.assert_close(jsd(log_p, log_q, alpha=alpha), scaled, rtol=1e-2, atol=1e-13)


def property_jsd_gradient_is_closed_form_everywhere(jsd: Any, pair: Pair, alpha: float) -> None:
    student, teacher = pair
    student = student.clone().requires_grad_()
    log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    jsd(log_p, log_q, alpha=alpha).sum().backward()
    p, q = log_p.detach().exp(), log_q.exp()
    log_ratio = (p / ((1 - alpha) * p + alpha * q)).log().masked_fill(p == 0, 0.0)
    mean = (p * log_ratio).sum(-1, keepdim=True)
    assert student.grad is not None
    assert_near(student.grad, (1 - alpha) * p * (log_ratio - mean))


def jsd_with_plain_logaddexp(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """Where both are −inf the gradient of logaddexp is NaN, hidden in the value by the masked KL."""
    log_m = torch.logaddexp(log_p + math.log1p(-alpha), log_q + math.log(alpha))
    return (1 - alpha) * kl_divergence(log_p, log_m) + alpha * kl_divergence(log_q, log_m)


any_pair = logit_pairs()
finite_pair = logit_pairs(masked=False)
mild_pair = logit_pairs(masked=False, max_scale=1.0)
same_support = logit_pairs(same_mask=True)
inner = {"pair": any_pair, "alpha": inner_alphas}
CLAIMS = [
    Claim(property_kl_is_its_definition, kl_divergence, kl_from_torch, {"pair": any_pair}),
    Claim(
        property_kl_agrees_with_torch, kl_divergence, lambda p, q: kl_divergence(q, p), {"pair": finite_pair}
    ),
    Claim(
        property_excluded_tokens_are_finite_in_value_and_gradient,
        kl_divergence,
        kl_masked_after_the_fact,
        {"pair": same_support},
    ),
    Claim(
        property_infinite_is_inf_and_harmless,
        kl_divergence,
        kl_from_torch,
        {"pair": logit_pairs(min_vocabulary=2)},
    ),
    Claim(
        property_jsd_is_its_definition,
        generalized_jsd,
        jsd_with_swapped_mixture,
        {"pair": any_pair, "alpha": alphas},
    ),
    Claim(property_jsd_is_zero_only_in_agreement, generalized_jsd, entropy_of_mixture, inner),
    Claim(property_jsd_is_bounded_by_the_entropy_of_alpha, generalized_jsd, kl_for_every_alpha, inner),
    Claim(property_jsd_mirrors, generalized_jsd, jsd_without_student_half, inner),
    Claim(
        property_token_order_means_nothing,
        generalized_jsd,
        jsd_without_last_token,
        {"pair": logit_pairs(min_vocabulary=3), "alpha": inner_alphas, "seed": seeds},
    ),
    Claim(
        property_derivatives_at_the_ends_are_kl,
        generalized_jsd,
        jsd_with_swapped_arguments,
        {"pair": mild_pair},
    ),
    Claim(
        property_near_agreement_jsd_is_a_scaled_kl,
        generalized_jsd,
        jsd_without_student_half,
        {"pair": mild_pair, "alpha": st.floats(0.1, 0.9)},
    ),
    Claim(property_jsd_gradient_is_closed_form_everywhere, generalized_jsd, jsd_with_plain_logaddexp, inner),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


@pytest.mark.parametrize(
    ("alpha", "error"),
    [
        (3, ValueError),
        (-0.1, ValueError),
        (math.nan, ValueError),
        (True, TypeError),
        ("1", TypeError),
        (None, TypeError),
    ],
)
def test_alpha_is_checked(alpha: Any, error: type[Exception]) -> None:
    log_p = torch.zeros(1)
    with pytest.raises(error, match=r"alpha: expected a number.*got.*pass 0 for KL"):
        generalized_jsd(log_p, log_p, alpha=alpha)


def test_tensors_are_checked() -> None:
    log_p = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"teacher_log_probs: expected shape \(2, 1\).*got \(1,\)"):
        generalized_jsd(log_p, torch.zeros(1), alpha=0.5)
    with pytest.raises(
        TypeError, match=r"log_q: expected a tensor of floating dtype, got torch.int64; convert"
    ):
        kl_divergence(log_p, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"log_p: expected at least one category"):
        kl_divergence(torch.zeros(2, 0), torch.zeros(2, 0))
    with pytest.raises(TypeError, match=r"log_p: expected a tensor of floating dtype, got list"):
        kl_divergence([0.0], log_p)  # type: ignore[arg-type]
