"""Packed tokens have the sums of the padded ones, whatever the order and the padding of the pack."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Claim, assert_near, generator, name_of, seeds
from torch import Tensor

from sdpo.aggregate import sequence_sum, token_sum
from sdpo.packed import packed_segment_ids, packed_sequence_sum


def padded(seed: int) -> tuple[Tensor, Tensor]:
    """A loss [B, T] with NaN at inactive positions, and its mask; some sequences have no active token."""
    rng = generator(seed)
    batch, length = (int(torch.randint(1, 6, (1,), generator=rng)) for _ in range(2))
    mask = torch.rand(batch, length, generator=rng) < torch.rand(batch, 1, generator=rng)
    loss = torch.randn(batch, length, generator=rng, dtype=torch.float64)
    return loss.masked_fill(~mask, math.nan), mask


def packed(seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same tokens packed in a random order, with padding of the pack."""
    loss, mask = padded(seed)
    order = torch.randperm(loss.numel() + 3, generator=generator(seed))
    ids = torch.arange(len(loss)).repeat_interleave(loss.shape[1])
    ids = torch.cat([ids, torch.tensor([len(loss), 99, -1])])[order]
    flat = torch.cat([loss.flatten(), torch.full((3,), math.inf, dtype=loss.dtype)])[order]
    active = torch.cat([mask.flatten(), torch.zeros(3, dtype=torch.bool)])[order]
    return flat, active, ids, len(loss)


def property_equals_the_padded_sum(total: Any, seed: int) -> None:
    flat, active, ids, count = packed(seed)
    loss, mask = padded(seed)
    expected = [
        sum(values) / len(values)
        for values in (
            [x for x, on in zip(*row, strict=True) if on]
            for row in zip(loss.tolist(), mask.tolist(), strict=True)
        )
        if values
    ]
    got = total(flat, active, segment_ids=ids, num_segments=count)
    assert_near(got.total, sum(expected))
    assert int(got.count) == len(expected)


def property_has_the_padded_gradient(total: Any, seed: int) -> None:
    flat, active, ids, count = packed(seed)
    flat.requires_grad_()
    total(flat, active, segment_ids=ids, num_segments=count).total.backward()
    lengths = torch.stack([(active & (ids == s)).sum() for s in range(count)])
    expected = torch.where(active, 1.0 / lengths[ids.clamp(0, count - 1)].clamp(min=1).double(), 0.0)
    assert_near(flat.grad, expected)


def over_all_tokens(per_token: Tensor, mask: Tensor, *, segment_ids: Tensor, num_segments: int) -> Any:
    return token_sum(per_token, mask)


def over_whole_lengths(per_token: Tensor, mask: Tensor, *, segment_ids: Tensor, num_segments: int) -> Any:
    right = packed_sequence_sum(per_token, mask, segment_ids=segment_ids, num_segments=num_segments)
    return right._replace(total=right.total * 0.5, count=torch.tensor(num_segments))


CLAIMS = [
    Claim(property_equals_the_padded_sum, packed_sequence_sum, over_all_tokens, {"seed": seeds}),
    Claim(property_equals_the_padded_sum, packed_sequence_sum, over_whole_lengths, {"seed": seeds}),
    Claim(property_has_the_padded_gradient, packed_sequence_sum, over_all_tokens, {"seed": seeds}),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


@given(lengths=st.lists(st.integers(0, 4), max_size=6), padding=st.integers(0, 3))
def test_segment_ids_repeat_each_index(lengths: list[int], padding: int) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    expected = [s for s, length in enumerate(lengths) for _ in range(length)] + [len(lengths)] * padding
    assert packed_segment_ids(ends, num_tokens=len(expected)).tolist() == expected


def test_a_batch_equals_its_pack() -> None:
    values, mask = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5) < 0.6
    ids = packed_segment_ids(torch.tensor([0, 5, 10, 15]), num_tokens=15)
    got = packed_sequence_sum(values.flatten(), mask.flatten(), segment_ids=ids, num_segments=3)
    torch.testing.assert_close(got, sequence_sum(values, mask))


def test_works_under_grad() -> None:
    values, mask = torch.randn(4), torch.tensor([True, False, True, True])
    ids = torch.tensor([0, 0, 1, 1])

    def total(x: Tensor) -> Tensor:
        return packed_sequence_sum(x, mask, segment_ids=ids, num_segments=2).total

    assert torch.func.grad(total)(values).tolist() == [1.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"segment_ids": torch.zeros(3)}, TypeError, "segment_ids"),
        ({"segment_ids": torch.zeros(2).long()}, ValueError, "segment_ids"),
        ({"num_segments": 0}, ValueError, "num_segments"),
        ({"per_token": torch.zeros(1, 3), "mask": torch.ones(1, 3).bool(), "segment_ids": torch.zeros(1, 3).long()},
         ValueError, "sequence_sum"),
        ({"segment_ids": torch.tensor([0, 1, 2])}, ValueError, r"segment_ids: expected ids in \[0, 2\), got 2"),
        ({"segment_ids": torch.tensor([0, 1, -1])}, ValueError, r"segment_ids: expected ids in \[0, 2\), got -1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    good: dict[str, Any] = {
        "per_token": torch.zeros(3), "mask": torch.ones(3).bool(), "segment_ids": torch.zeros(3).long(),
        "num_segments": 2,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        packed_sequence_sum(**good | change)


@pytest.mark.parametrize("ends", [[], [1, 3], [0, 3, 2], [0, 3, 6], [-1, 3]])
def test_ends_that_are_none_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens: expected"):
        packed_segment_ids(torch.tensor(ends, dtype=torch.int32), num_tokens=5)
    assert packed_segment_ids(torch.tensor([0, 3, 5]), num_tokens=5).tolist() == [0, 0, 0, 1, 1]
