"""Sums and counts: what is masked does not exist, and no cut of a step changes its objective."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, assert_near, generator, name_of, seeds, token_batches
from torch import Tensor

from sdpo import MaskedSum, sequence_sum, token_sum

Batch = tuple[Tensor, Tensor]
batches = token_batches()


def property_token_sum_is_a_loop(aggregate: Any, batch: Batch) -> None:
    values, mask = batch
    active = [
        v
        for row, kept in zip(*map(Tensor.tolist, batch), strict=True)
        for v, m in zip(row, kept, strict=True)
        if m
    ]
    total, count = aggregate(values, mask)
    assert_near(total, math.fsum(active))
    assert count.item() == len(active)


def property_sequence_sum_is_a_loop(aggregate: Any, batch: Batch) -> None:
    values, mask = batch
    rows = [
        [v for v, m in zip(row, kept, strict=True) if m]
        for row, kept in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    means = [math.fsum(row) / len(row) for row in rows if row]
    total, count = aggregate(values, mask)
    assert_near(total, math.fsum(means))
    assert count.item() == len(means)


def property_masked_values_do_not_exist(aggregate: Any, batch: Batch, poison: float) -> None:
    """NaN, inf and garbage at inactive positions reach neither value nor gradient."""
    values, mask = batch
    clean = values.clone().requires_grad_()
    dirty = values.masked_fill(~mask, poison).requires_grad_()
    for leaf in (clean, dirty):
        aggregate(leaf, mask).mean().backward()
    assert_near(aggregate(dirty, mask).mean(), aggregate(clean, mask).mean().detach())
    assert clean.grad is not None
    assert dirty.grad is not None
    assert_near(dirty.grad, clean.grad)
    assert (dirty.grad[~mask] == 0.0).all()


def property_columns_of_padding_change_nothing(aggregate: Any, batch: Batch, columns: int) -> None:
    values, mask = batch
    padding = torch.full((len(values), columns), math.nan, dtype=values.dtype)
    padded = aggregate(
        torch.cat([values, padding], -1), torch.cat([mask, torch.zeros_like(padding).bool()], -1)
    )
    assert_near(padded.mean(), aggregate(values, mask).mean())
    assert padded.count == aggregate(values, mask).count


def property_no_cut_changes_the_step(step: Any, batch: Batch, cuts: int, seed: int) -> None:
    """Any order of the rows, any micro-batches on any ranks: the same loss and the same gradient."""
    values, mask = batch
    order = torch.randperm(len(values), generator=generator(seed))
    whole, parts = values.clone().requires_grad_(), values.clone().requires_grad_()
    loss = step([(whole, mask)])
    split = step(list(zip(parts[order].tensor_split(cuts), mask[order].tensor_split(cuts), strict=True)))
    assert_near(split, loss.detach())
    gradients = [torch.autograd.grad(value, leaf)[0] for value, leaf in ((loss, whole), (split, parts))]
    assert_near(gradients[1], gradients[0])


def divide_once(aggregate: Any) -> Any:
    def step(parts: list[Batch]) -> Tensor:
        totals, counts = zip(*(aggregate(*part) for part in parts), strict=True)
        return MaskedSum(torch.stack(totals).sum(), torch.stack(counts).sum()).mean()

    return step


def mean_of_means(parts: list[Batch]) -> Tensor:
    return torch.stack([token_sum(*part).mean() for part in parts]).mean()


def property_nothing_active_is_exactly_zero(aggregate: Any, batch: Batch, poison: float) -> None:
    values = torch.full_like(batch[0], poison).requires_grad_()
    loss = aggregate(values, torch.zeros_like(batch[1])).mean()
    assert loss.item() == 0.0
    loss.backward()
    assert values.grad is not None
    assert (values.grad == 0.0).all()


def masked_by_a_product(values: Tensor, mask: Tensor) -> MaskedSum:
    return MaskedSum((values * mask).sum(), mask.sum())


def mean_over_everything(values: Tensor, mask: Tensor) -> MaskedSum:
    return MaskedSum(values.masked_fill(~mask, 0.0).sum(), torch.tensor(mask.numel()))


def divided_by_a_bare_count(values: Tensor, mask: Tensor) -> Any:
    class Bare(MaskedSum):
        def mean(self) -> Tensor:
            return self.total / self.count

    return Bare(*token_sum(values, mask))


poisons = st.sampled_from([math.nan, math.inf, -math.inf, 1e30])
cut = {"batch": batches, "cuts": st.integers(1, 4), "seed": seeds}
CLAIMS = [
    Claim(property_token_sum_is_a_loop, token_sum, sequence_sum, {"batch": batches}),
    Claim(property_sequence_sum_is_a_loop, sequence_sum, token_sum, {"batch": batches}),
    *(
        claim
        for right in (token_sum, sequence_sum)
        for claim in (
            Claim(
                property_masked_values_do_not_exist,
                right,
                masked_by_a_product,
                {"batch": batches, "poison": poisons},
            ),
            Claim(
                property_columns_of_padding_change_nothing,
                right,
                mean_over_everything,
                {"batch": batches, "columns": st.integers(1, 4)},
            ),
            Claim(property_no_cut_changes_the_step, divide_once(right), mean_of_means, cut),
            Claim(
                property_nothing_active_is_exactly_zero,
                right,
                divided_by_a_bare_count,
                {"batch": batches, "poison": poisons},
            ),
        )
    ),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


@pytest.mark.parametrize("aggregate", [token_sum, sequence_sum])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_empty_batches_are_zero(aggregate: Any, shape: tuple[int, ...]) -> None:
    values = torch.zeros(shape, requires_grad=True)
    total, count = aggregate(values, torch.zeros(shape, dtype=torch.bool))
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0)


@pytest.mark.parametrize("aggregate", [token_sum, sequence_sum])
def test_tensors_are_checked(aggregate: Any) -> None:
    values = torch.zeros(2, 3)
    with pytest.raises(
        TypeError,
        match=r"mask: expected a tensor of bool dtype, got torch\.float32; convert it with `\.bool\(\)`",
    ):
        aggregate(values, values)
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\).*got \(2,\)"):
        aggregate(values, torch.ones(2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"per_token: expected a tensor of floating dtype, got torch\.int64"):
        aggregate(values.long(), values.bool())
    with pytest.raises(ValueError, match=r"per_token: expected at least 1 dimension"):
        aggregate(torch.tensor(0.0), torch.tensor(True))
