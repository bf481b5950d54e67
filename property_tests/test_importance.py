"""Importance weights: 1 on-policy, truncated above only, detached."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, assert_near, generator, name_of, seeds
from torch import Tensor

from sdpo import importance_weights


def log_probs(seed: int, scale: float) -> tuple[Tensor, Tensor]:
    values = -torch.rand(2, 4, 5, generator=generator(seed), dtype=torch.float64) * scale
    return values[0], values[1]


def property_weight_is_the_truncated_ratio(weights: Any, seed: int, scale: float, clip: float) -> None:
    new, old = log_probs(seed, scale)
    expected = [
        [min(math.exp(min(max(a - b, -20.0), 20.0)), clip) for a, b in zip(*rows, strict=True)]
        for rows in zip(new.tolist(), old.tolist(), strict=True)
    ]
    got = weights(new, old, clip=clip)
    assert_near(got, expected)
    assert (got <= clip).all()


def property_on_policy_weight_is_exactly_one(weights: Any, seed: int, scale: float, clip: float) -> None:
    new, _ = log_probs(seed, scale)
    impossible = torch.full_like(new, -math.inf)
    assert (weights(new, new, clip=clip) == 1.0).all()
    assert (weights(impossible, impossible, clip=clip) == 1.0).all()


def property_unscored_token_has_weight_one(weights: Any, seed: int, scale: float, clip: float) -> None:
    new, old = log_probs(seed, scale)
    unscored = torch.rand(old.shape, generator=generator(seed)) < 0.5
    got = weights(new, old.masked_fill(unscored, math.nan), clip=clip)
    assert_near(got, torch.where(unscored, 1.0, weights(new, old, clip=clip)))


def property_weight_has_no_gradient(weights: Any, seed: int, scale: float, clip: float) -> None:
    new, old = (values.requires_grad_() for values in log_probs(seed, scale))
    assert not weights(new, old, clip=clip).requires_grad


def clipped_on_both_sides(new: Tensor, old: Tensor, *, clip: float) -> Tensor:
    return (new - old).exp().clamp(1 / clip, clip).detach()


def ratio_of_probabilities(new: Tensor, old: Tensor, *, clip: float) -> Tensor:
    return (new.exp() / (old.exp() + 1e-9)).clamp(max=clip)


def plain_ratio(new: Tensor, old: Tensor, *, clip: float) -> Tensor:
    return (new - old).exp().clamp(max=clip)


drawn = {"seed": seeds, "scale": st.sampled_from([0.1, 3.0, 50.0]), "clip": st.floats(1.0, 10.0)}
CLAIMS = [
    Claim(property_weight_is_the_truncated_ratio, importance_weights, clipped_on_both_sides, drawn),
    Claim(property_on_policy_weight_is_exactly_one, importance_weights, ratio_of_probabilities, drawn),
    Claim(property_unscored_token_has_weight_one, importance_weights, plain_ratio, drawn),
    Claim(property_weight_has_no_gradient, importance_weights, plain_ratio, drawn),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_infinite_clip_truncates_only_at_the_safety_bound() -> None:
    got = importance_weights(torch.tensor([0.0, 0.0]), torch.tensor([-5.0, -1000.0]), clip=math.inf)
    assert got.tolist() == pytest.approx([math.exp(5), math.exp(20)], rel=1e-5)


@pytest.mark.parametrize(
    ("clip", "error"),
    [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), (True, TypeError), (None, TypeError)],
)
def test_clip_is_checked(clip: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"clip: expected a number.*got.*pass the largest weight"):
        importance_weights(torch.zeros(1), torch.zeros(1), clip=clip)


def test_tensors_are_checked() -> None:
    with pytest.raises(ValueError, match=r"old_log_probs: expected shape \(2, 3\).*got \(2, 1\)"):
        importance_weights(torch.zeros(2, 3), torch.zeros(2, 1), clip=2.0)
    with pytest.raises(TypeError, match=r"log_probs: expected a tensor of floating dtype, got torch\.int64"):
        importance_weights(torch.zeros(2, dtype=torch.long), torch.zeros(2), clip=2.0)
