"""Top-K support: the ids, the teacher's view of them, and a tail that needs no subtraction."""

from __future__ import annotations

import math
from typing import Any

import oracles
import pytest
import torch
from hypothesis import strategies as st
from strategies import Claim, assert_near, logit_pairs, name_of
from torch import Tensor

from sdpo import TopK, add_tail_bucket, gather_log_probs, renormalize, topk_log_probs

fractions = st.floats(0.0, 1.0)


def size(fraction: float, logits: Tensor) -> int:
    """A support size in [1, V], both ends included."""
    return 1 + round(fraction * (logits.shape[-1] - 1))


def tail_by_subtraction(log_probs: Tensor) -> Tensor:
    """log(1 − Σp) behind a clamp: the usual way."""
    return torch.log(-torch.expm1(torch.logsumexp(log_probs, -1).clamp(max=-1e-7)))


def property_topk_is_torch_topk(topk: Any, pair: Any, fraction: float) -> None:
    logits = pair[0]
    k = size(fraction, logits)
    top = topk(logits, k=k)
    assert top.log_probs.shape == top.indices.shape == (*logits.shape[:-1], k)
    assert top.indices.dtype == torch.int64
    assert (logits.gather(-1, top.indices) == torch.topk(logits, k).values).all()
    assert all(len(set(row)) == k for row in top.indices.reshape(-1, k).tolist())
    assert_near(top.log_probs, torch.log_softmax(logits, -1).gather(-1, top.indices))


def topk_of_rounded_logits(logits: Tensor, *, k: int) -> TopK:
    indices = logits.bfloat16().topk(k, dim=-1).indices
    log_probs, log_tail = gather_log_probs(logits, indices)
    return TopK(log_probs, indices, log_tail)


def property_reading_is_by_the_full_vocabulary(gather: Any, pair: Any, fraction: float) -> None:
    """Values and tail of one model at the ids of another."""
    student, teacher = pair
    ids = torch.topk(student, size(fraction, student)).indices
    log_probs, log_tail = gather(teacher, ids)
    for column in range(ids.shape[-1]):
        expected = oracles.per_row(
            lambda z, i: oracles.log_softmax(z)[int(i[0])], teacher, ids[..., [column]]
        )
        assert_near(log_probs[..., column], expected)
    tail = oracles.per_row(
        lambda z, i: oracles.read_support(z, [int(x) for x in i], "bucket")[-1], teacher, ids
    )
    # Tails that underflow as probabilities have no meaning beyond being tiny.
    assert_near(log_tail.clamp(min=-700.0), tail.clamp(min=-700.0))


def gather_normalized_on_the_support(logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    _, log_tail = gather_log_probs(logits, indices)
    return torch.log_softmax(logits.gather(-1, indices), -1), log_tail


def property_small_tails_are_exact_in_float32(
    log_tail_of: Any, tail_size: int, gap: float, offset: float
) -> None:
    """Top-K mass from 0.9 to 1 − 1e-12: the tail is right to 1e-5, relative."""
    logits = torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.arange(tail_size) % 3 * 0.5 - gap]) + offset
    expected = oracles.read_support(logits.tolist(), [0, 1, 2], "bucket")[-1]
    got = log_tail_of(logits, torch.tensor([0, 1, 2]))
    assert abs(math.expm1(got.item() - expected)) < 1e-5


def property_tail_gradient_is_never_saturated(log_tail_of: Any, pair: Any, fraction: float) -> None:
    """d log_tail / dz = softmax within the tail − softmax."""
    logits = pair[0].clone().requires_grad_()
    ids = torch.topk(logits, size(fraction, logits)).indices
    tail = log_tail_of(logits, ids)
    assert (tail.isneginf() == logits.scatter(-1, ids, -math.inf).isneginf().all(-1)).all()
    tail.sum().backward()
    p = torch.softmax(logits.detach(), -1)
    within = p.scatter(-1, ids, 0.0)
    expected = (within / within.sum(-1, keepdim=True) - p).masked_fill(tail.isneginf().unsqueeze(-1), 0.0)
    expected = expected.nan_to_num(0.0)
    representable = (within.sum(-1, keepdim=True) > 0) | tail.isneginf().unsqueeze(-1)
    assert logits.grad is not None
    assert_near(torch.where(representable, logits.grad, 0.0), torch.where(representable, expected, 0.0))


def property_bucketed_is_a_distribution(bucketed: Any, pair: Any, fraction: float) -> None:
    logits = pair[0]
    k = size(fraction, logits)
    row = bucketed(topk_log_probs(logits, k=k))
    assert row.shape == (*logits.shape[:-1], k + 1)
    assert_near(row.exp().sum(-1), torch.ones(logits.shape[:-1]))
    if k == logits.shape[-1]:
        assert row[..., -1].isneginf().all()


def property_renormalized_is_conditional(condition: Any, pair: Any, fraction: float) -> None:
    student, teacher = pair
    ids = torch.topk(student, size(fraction, student)).indices
    got = condition(gather_log_probs(teacher, ids).log_probs)
    # Only ratios inside the support count; a support the teacher excludes altogether keeps no mass.
    expected = torch.log_softmax(teacher.gather(-1, ids), -1)
    assert_near(got, torch.where(expected.isnan(), -math.inf, expected))


def tail_from_outside(logits: Tensor, indices: Tensor) -> Tensor:
    return gather_log_probs(logits, indices).log_tail


def tail_from_subtraction(logits: Tensor, indices: Tensor) -> Tensor:
    log_probs, log_tail = gather_log_probs(logits, indices)
    return torch.where(log_tail.isneginf(), log_tail, tail_by_subtraction(log_probs))


drawn = {"pair": logit_pairs(), "fraction": fractions}
CLAIMS = [
    Claim(property_topk_is_torch_topk, topk_log_probs, topk_of_rounded_logits, drawn),
    Claim(
        property_reading_is_by_the_full_vocabulary, gather_log_probs, gather_normalized_on_the_support, drawn
    ),
    Claim(
        property_small_tails_are_exact_in_float32,
        tail_from_outside,
        tail_from_subtraction,
        {
            "tail_size": st.integers(1, 2000),
            "gap": st.floats(5.0, 25.0),
            "offset": st.sampled_from([0.0, 30.0, -60.0]),
        },
    ),
    Claim(property_tail_gradient_is_never_saturated, tail_from_outside, tail_from_subtraction, drawn),
    Claim(
        property_bucketed_is_a_distribution,
        lambda top: add_tail_bucket(top.log_probs, top.log_tail),
        lambda top: add_tail_bucket(top.log_probs, tail_by_subtraction(top.log_probs[..., :1])),
        drawn,
    ),
    Claim(property_renormalized_is_conditional, renormalize, lambda log_probs: log_probs, drawn),
]


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_holds(claim: Claim) -> None:
    claim.holds()


@pytest.mark.parametrize("claim", CLAIMS, ids=name_of)
def test_rejects_its_counter_example(claim: Claim) -> None:
    claim.rejects_counter_example()


def test_tail_at_the_mass_the_usual_way_loses() -> None:
    """Top-1 mass 0.999999 in float32."""
    logits = torch.tensor([0.999999, 0.5e-6, 0.5e-6], dtype=torch.float64).log().float()
    assert topk_log_probs(logits, k=1).log_tail.exp().item() == pytest.approx(1e-6, rel=1e-5)


def test_integer_ids_of_both_widths_are_read() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    wide, narrow = (
        gather_log_probs(logits, torch.tensor([[2]], dtype=d)) for d in (torch.int64, torch.int32)
    )
    assert (wide.log_probs == narrow.log_probs).all()


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, r"k: expected an int in \[1, 3\], got 0; pass"),
        (4, ValueError, r"k: expected an int in \[1, 3\], got 4; .*min\(k, 3\)"),
        (True, TypeError, r"k: expected an int, got True \(bool\)"),
        (2.0, TypeError, r"k: expected an int, got 2\.0 \(float\)"),
    ],
)
def test_k_is_checked(k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        topk_log_probs(torch.zeros(2, 3), k=k)


def test_tensors_are_checked() -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(
        TypeError, match=r"logits: expected a tensor of floating dtype, got torch\.int64; convert"
    ):
        topk_log_probs(logits.long(), k=1)
    with pytest.raises(ValueError, match=r"logits: expected at least 1 dimension"):
        topk_log_probs(torch.tensor(1.0), k=1)
    with pytest.raises(TypeError, match=r"indices: expected a tensor of integer dtype, got torch\.float32"):
        gather_log_probs(logits, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"indices: expected shape \(2, 1\) .*got \(3, 1\); align"):
        gather_log_probs(logits, torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"log_tail: expected shape \(2,\).*got \(2, 1\)"):
        add_tail_bucket(logits, torch.zeros(2, 1))
