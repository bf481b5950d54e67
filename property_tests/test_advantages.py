"""Advantages: the divergence as a policy gradient, those of rewards in a group, and their blend."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from losses import full_loss
from strategies import Claim, assert_near, generator, logit_pairs, name_of, seeds, token_batches
from torch import Tensor

from sdpo import (
    blend_advantages,
    group_normalized_advantages,
    logit_advantages,
    sequence_advantages,
    token_advantages,
)

reward_lists = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.3, 1.0, 5.0]), st.integers(0, 3)), min_size=1, max_size=12
)


def as_tensors(rows: list[tuple[float, int]]) -> tuple[Tensor, Tensor]:
    rewards, groups = zip(*rows, strict=True)
    return torch.tensor(rewards, dtype=torch.float64), torch.tensor(groups)


# ---- groups ------------------------------------------------------------------------------------------------


def property_group_baseline_is_a_loop(normalize: Any, rows: list[tuple[float, int]], scale: bool) -> None:
    expected = []
    for reward, group in rows:
        peers = [r for r, g in rows if g == group]
        spread = statistics.stdev(peers) + 1e-4 if len(peers) > 1 else 1.0
        expected.append((reward - statistics.fmean(peers)) / (spread if scale else 1.0))
    assert_near(normalize(*as_tensors(rows), scale_by_std=scale, eps=1e-4), expected)


def property_equal_rewards_give_exactly_zero(normalize: Any, reward: float, size: int) -> None:
    """In float32, where a mean of equal numbers is often not that number."""
    rewards, groups = torch.full((size,), reward), torch.zeros(size, dtype=torch.long)
    assert (normalize(rewards, groups, scale_by_std=True, eps=1e-8) == 0.0).all()


def property_a_broken_reward_stays_in_its_group(normalize: Any, rows: list[tuple[float, int]]) -> None:
    rewards, groups = as_tensors(rows)
    broken = normalize(
        rewards.masked_fill(groups == groups[0], math.nan), groups, scale_by_std=True, eps=1e-4
    )
    clean = normalize(rewards, groups, scale_by_std=True, eps=1e-4)
    assert_near(broken[groups != groups[0]], clean[groups != groups[0]])


def normalize_by_matrix_product(rewards: Tensor, groups: Tensor, *, scale_by_std: bool, eps: float) -> Tensor:
    same = (groups[:, None] == groups).to(rewards.dtype)
    size = same.sum(-1)
    centered = rewards - same @ rewards / size
    std = (same @ centered.square() / size).sqrt()
    return centered / (std + eps) if scale_by_std else centered


# ---- self-distillation -------------------------------------------------------------------------------------


def property_policy_gradient_is_the_divergence_gradient(advantages: Any, pair: Any) -> None:
    """Σ_v p(v)·A(v)·∇log p(v) = −∇KL(p‖q), proposition 2.1."""
    student, teacher = pair
    leaf = student.clone().requires_grad_()
    full_loss(leaf, teacher, alpha=1.0).sum().backward()
    p = student.softmax(-1)
    signal = p * advantages(student, teacher)
    assert not signal.requires_grad
    policy_gradient = signal - p * signal.sum(-1, keepdim=True)
    assert leaf.grad is not None
    assert_near(policy_gradient, -leaf.grad)


def property_token_advantage_is_the_logit_advantage_of_the_token(
    advantages: Any, pair: Any, seed: int
) -> None:
    student, teacher = pair
    tokens = torch.randint(student.shape[-1], student.shape[:-1], generator=generator(seed))
    expected = logit_advantages(student, teacher).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert_near(advantages(student, teacher, tokens), expected)


def property_sequence_advantage_is_the_mean_of_active_tokens(advantages: Any, batch: Any) -> None:
    values, mask = batch
    expected = [
        statistics.fmean([v for v, m in zip(row, kept, strict=True) if m] or [0.0])
        for row, kept in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    assert_near(advantages(values.masked_fill(~mask, math.nan), mask), expected)


def property_blend_is_a_weighted_sum(blend: Any, batch: Any, weight: float) -> None:
    per_token, _ = batch
    per_row = per_token[:, 0]
    expected = [
        [weight * a + (1 - weight) * b for b in row] for a, row in zip(per_row, per_token, strict=True)
    ]
    assert_near(blend(per_row, per_token, reward_weight=weight), expected)
    assert_near(blend(per_row, per_row, reward_weight=weight), per_row)
    assert_near(blend(per_token, -per_token, reward_weight=weight), (2 * weight - 1) * per_token)
    assert_near(
        blend(per_row, torch.full_like(per_token, -math.inf), reward_weight=1.0),
        per_row[:, None].expand_as(per_token),
    )
    assert_near(blend(torch.full_like(per_row, math.nan), per_token, reward_weight=0.0), per_token)


def blend_by_lerp(reward: Tensor, distillation: Tensor, *, reward_weight: float) -> Tensor:
    if reward.ndim < distillation.ndim:
        reward = reward.unsqueeze(-1)
    return reward_weight * reward + (1 - reward_weight) * distillation


same_support = logit_pairs(same_mask=True)
CLAIMS = [
    Claim(
        property_group_baseline_is_a_loop,
        group_normalized_advantages,
        normalize_by_matrix_product,
        {"rows": reward_lists, "scale": st.booleans()},
    ),
    Claim(
        property_equal_rewards_give_exactly_zero,
        group_normalized_advantages,
        normalize_by_matrix_product,
        {"reward": st.sampled_from([0.1, 0.3, 0.7, 1.0, 123.456]), "size": st.integers(1, 16)},
    ),
    Claim(
        property_a_broken_reward_stays_in_its_group,
        group_normalized_advantages,
        normalize_by_matrix_product,
        {"rows": reward_lists},
    ),
    Claim(
        property_policy_gradient_is_the_divergence_gradient,
        logit_advantages,
        lambda student, teacher: logit_advantages(teacher, student),
        {"pair": same_support},
    ),
    Claim(
        property_token_advantage_is_the_logit_advantage_of_the_token,
        token_advantages,
        lambda student, teacher, tokens: token_advantages(student, student, tokens),
        {"pair": logit_pairs(), "seed": seeds},
    ),
    Claim(
        property_sequence_advantage_is_the_mean_of_active_tokens,
        sequence_advantages,
        lambda values, mask: (values * mask).mean(-1),
        {"batch": token_batches()},
    ),
    Claim(
        property_blend_is_a_weighted_sum,
        blend_advantages,
        blend_by_lerp,
        {"batch": token_batches(), "weight": st.floats(0.0, 1.0)},
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_excluded_tokens_have_a_meaning() -> None:
    student = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    teacher = torch.tensor([0.0, -math.inf, 0.0, -math.inf])
    assert logit_advantages(student, teacher).tolist() == [0.0, -math.inf, 0.0, 0.0]


def test_nothing_to_normalize() -> None:
    nothing = torch.zeros(0)
    assert group_normalized_advantages(nothing, nothing.long(), scale_by_std=True, eps=1e-4).shape == (0,)


def test_arguments_are_checked() -> None:
    rewards, groups = torch.zeros(4), torch.zeros(4, dtype=torch.long)
    with pytest.raises(TypeError, match=r"scale_by_std: expected a bool, got 1 \(int\)"):
        group_normalized_advantages(rewards, groups, scale_by_std=1, eps=0.0)  # type: ignore[arg-type]
    for eps in (-1, 2, math.inf):
        with pytest.raises(ValueError, match=rf"eps: expected a number in \[0, 1\], got {eps}"):
            group_normalized_advantages(rewards, groups, scale_by_std=True, eps=eps)
    with pytest.raises(ValueError, match=r"group_ids: expected shape \(4,\).*got \(3,\)"):
        group_normalized_advantages(rewards, groups[:3], scale_by_std=True, eps=0.0)
    with pytest.raises(ValueError, match=r"rewards: expected shape \(2,\) \(one dimension\), got \(2, 2\)"):
        group_normalized_advantages(rewards.view(2, 2), groups, scale_by_std=True, eps=0.0)
    with pytest.raises(ValueError, match=r"reward_weight: expected a number in \[0, 1\], got 1\.1"):
        blend_advantages(rewards, rewards, reward_weight=1.1)
    shape = r"reward_advantages: expected shape \(2,\) \(the leading shape of .*\), got \(4,\)"
    with pytest.raises(ValueError, match=shape):
        blend_advantages(rewards, torch.zeros(2, 3), reward_weight=0.5)
    with pytest.raises(TypeError, match=r"tokens: expected a tensor of integer dtype"):
        token_advantages(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(TypeError, match=r"loss_mask: expected a tensor of bool dtype"):
        sequence_advantages(torch.zeros(2, 3), torch.zeros(2, 3))


def test_rewards_are_blended_with_advantages_of_every_vocabulary_token() -> None:
    logits = logit_advantages(torch.randn(2, 3, 4), torch.randn(2, 3, 4)).index_fill(
        2, torch.tensor([1]), -math.inf
    )
    per_row, per_token = torch.tensor([1.0, -2.0]), torch.randn(2, 3)
    for reward, spread in ((per_row, per_row[:, None, None]), (per_token, per_token[..., None])):
        got = blend_advantages(reward, logits, reward_weight=0.25)
        torch.testing.assert_close(got, 0.25 * spread + 0.75 * logits)
        assert got[..., 1].isneginf().all()
        # At weight 1 the other side has no effect, whatever it holds.
        assert torch.equal(blend_advantages(reward, logits, reward_weight=1.0), spread.expand(2, 3, 4))


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
def test_lists_of_rewards_and_groups(default: torch.dtype) -> None:
    """In float32 whatever torch's default: in bfloat16 these rewards would be equal."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = group_normalized_advantages([0.7001, 0.7, 5, 5.0], (7, 7, 3, 3), scale_by_std=False, eps=1e-4)
        empty = group_normalized_advantages([], [], scale_by_std=True, eps=1e-4)
    finally:
        torch.set_default_dtype(before)
    expected = torch.tensor([5e-5, -5e-5, 0.0, 0.0])
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=0)
    assert (empty.shape, empty.dtype) == ((0,), torch.float32)
    rewards = torch.tensor([0.7001, 0.7], dtype=torch.bfloat16)
    assert (group_normalized_advantages(rewards, [7, 7], scale_by_std=False, eps=1e-4) == 0.0).all()


@pytest.mark.parametrize(
    ("rewards", "groups", "message"),
    [
        ([None, 1.0], [0, 0], r"rewards\[0\]: expected a number, got None \(NoneType\); convert the entry"),
        ([1.0, "1"], [0, 0], r"rewards\[1\]: expected a number, got '1' \(str\)"),
        ([1.0, 0.0], ["a", "a"], r"group_ids\[0\]: expected an int, got 'a' \(str\)"),
        ([1.0, 0.0], [0, True], r"group_ids\[1\]: expected an int, got True \(bool\)"),
        ([1.0, 0.0], [0, 0.5], r"group_ids\[1\]: expected an int, got 0\.5 \(float\)"),
    ],
)
def test_entries_of_lists_are_checked(rewards: Any, groups: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        group_normalized_advantages(rewards, groups, scale_by_std=True, eps=1e-4)


def test_rewards_and_groups_are_on_one_device() -> None:
    with pytest.raises(ValueError, match=r"group_ids: expected a tensor on cpu \(the device of rewards\)"):
        group_normalized_advantages(
            torch.zeros(2), torch.zeros(2, dtype=torch.long, device="meta"), scale_by_std=True, eps=1e-4
        )
    listed = group_normalized_advantages(
        [1.0, 0.0], torch.zeros(2, dtype=torch.long, device="meta"), scale_by_std=True, eps=1e-4
    )
    assert listed.device.type == "meta"
