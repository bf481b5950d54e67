"""Every function under torch.func and torch.compile, in every dtype, on empty batches and with excluded tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from strategies import assert_near, generator
from torch import Tensor
from torch.func import grad, jacrev, vmap

import sdpo

Loss = Callable[[Tensor, Tensor], Tensor]


def masked_mean(student: Tensor, teacher: Tensor) -> Tensor:
    """The whole way, from logits [..., V] to nats per position again, so that it fits among the others."""
    per_token = sdpo.topk_distillation_loss(student, teacher, k=2, alpha=0.5, tail="bucket").unsqueeze(-1)
    everything = torch.ones_like(per_token, dtype=torch.bool)
    log_probs = sdpo.topk_log_probs(student, k=1).log_probs
    weights = sdpo.importance_weights(log_probs, log_probs - 0.1, clip=2.0)
    out = sdpo.self_distillation_loss(per_token, everything, row_mask=everything[..., 0], weights=weights)
    return sdpo.MaskedSum(out.total, out.count).mean()


LOSSES: dict[str, Loss] = {
    "full forward": lambda s, t: sdpo.full_distillation_loss(s, t, alpha=0),
    "full jsd": lambda s, t: sdpo.full_distillation_loss(s, t, alpha=0.3),
    "full reverse": lambda s, t: sdpo.full_distillation_loss(s, t, alpha=1),
    "top-3 bucket": lambda s, t: sdpo.topk_distillation_loss(s, t, k=3, alpha=0.5, tail="bucket"),
    "top-5 bucket": lambda s, t: sdpo.topk_distillation_loss(s, t, k=5, alpha=1, tail="bucket"),
    "top-3 of the teacher": lambda s, t: sdpo.topk_distillation_loss(
        s, t, k=3, alpha=0, tail="bucket", support="teacher"
    ),
    "top-3 renormalized": lambda s, t: sdpo.topk_distillation_loss(s, t, k=3, alpha=0.5, tail="renormalize"),
    "sampled token": lambda s, t: sdpo.sampled_token_distillation_loss(s, t, s.argmax(-1)),
}
parametrize_losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def example_logits(
    *shape: int, dtype: torch.dtype = torch.float64, masked: bool = True
) -> tuple[Tensor, Tensor]:
    """Student and teacher with the last token of every row excluded on both sides, one more for the student."""
    student, teacher = 3.0 * torch.randn(2, *shape, generator=generator(0), dtype=torch.float64)
    if masked:
        student[..., -1] = teacher[..., -1] = -math.inf
    return student.to(dtype), teacher.to(dtype)


@parametrize_losses
def test_grad_is_backward(loss: Loss) -> None:
    student, teacher = example_logits(4, 6)
    leaf = student.clone().requires_grad_()
    loss(leaf, teacher).sum().backward()
    assert leaf.grad is not None
    got = grad(lambda s: loss(s, teacher).sum())(student)
    assert got.isfinite().all()
    assert_near(got, leaf.grad, 1e-14)
    assert (grad(lambda t: loss(student, t).sum())(teacher) == 0.0).all()


@parametrize_losses
def test_vmap_is_a_loop(loss: Loss) -> None:
    student, teacher = example_logits(3, 4, 6)
    assert_near(
        vmap(loss)(student, teacher),
        torch.stack([loss(*pair) for pair in zip(student, teacher, strict=True)]),
    )
    assert_near(vmap(vmap(loss))(student, teacher), loss(student, teacher))
    shared = vmap(loss, in_dims=(0, None))(student, teacher[0])
    assert_near(shared, torch.stack([loss(s, teacher[0]) for s in student]))
    strided = vmap(loss, in_dims=1, out_dims=1)(student, teacher)
    assert_near(strided, loss(student, teacher))


@parametrize_losses
def test_gradients_per_position(loss: Loss) -> None:
    student, teacher = example_logits(4, 6)
    together = grad(lambda s: loss(s, teacher).sum())(student)
    assert_near(vmap(grad(loss))(student, teacher), together)
    jacobian = jacrev(lambda s: loss(s, teacher))(student)
    assert jacobian.shape == (4, 4, 6)
    assert_near(jacobian, torch.diag_embed(together.T).permute(1, 2, 0))


@parametrize_losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_or_better(loss: Loss, dtype: torch.dtype) -> None:
    """Low-precision logits are rounded once, by whoever made them, and never again."""
    student, teacher = example_logits(5, 6, dtype=dtype)
    got, expected = loss(student, teacher), loss(student.double(), teacher.double())
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(got, expected, 1e-13 if dtype == torch.float64 else 2e-6)
    slope = grad(lambda s: loss(s, teacher).sum())(student)
    exact = grad(lambda s: loss(s, teacher.double()).sum())(student.double())
    assert slope.dtype == dtype
    assert_near(slope, exact, {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 2e-6))


@parametrize_losses
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_batches(loss: Loss, shape: tuple[int, ...]) -> None:
    student = torch.zeros(*shape, 6, requires_grad=True)
    value = loss(student, torch.zeros(*shape, 6))
    assert value.shape == shape
    value.sum().backward()
    assert student.grad is not None


@parametrize_losses
def test_compiled_without_a_graph_break(loss: Loss) -> None:
    torch.compiler.reset()
    student, teacher = example_logits(4, 6)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert_near(compiled(student, teacher), loss(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_whole_way_under_transforms(dtype: torch.dtype) -> None:
    student, teacher = example_logits(3, 4, 6, dtype=dtype)
    losses = vmap(masked_mean)(student, teacher)
    assert_near(losses, torch.stack([masked_mean(s, t) for s, t in zip(student, teacher, strict=True)]), 1e-6)
    gradients = vmap(grad(masked_mean))(student, teacher)
    assert gradients.isfinite().all()
    assert gradients.shape == student.shape


def test_advantages_under_transforms() -> None:
    student, teacher = example_logits(3, 4, 6)
    assert_near(vmap(sdpo.logit_advantages)(student, teacher), sdpo.logit_advantages(student, teacher))
    tokens = student.argmax(-1)
    per_token = vmap(sdpo.token_advantages)(student, teacher, tokens)
    assert_near(per_token, sdpo.token_advantages(student, teacher, tokens))
    mask = per_token > 0
    assert_near(vmap(sdpo.sequence_advantages)(per_token, mask), sdpo.sequence_advantages(per_token, mask))
    groups = torch.tensor([0, 1, 0, 1])
    normalized = vmap(lambda r: sdpo.group_normalized_advantages(r, groups, scale_by_std=True, eps=1e-4))(
        per_token
    )
    one_by_one = [sdpo.group_normalized_advantages(r, groups, scale_by_std=True, eps=1e-4) for r in per_token]
    assert_near(normalized, torch.stack(one_by_one))


def test_sums_under_transforms() -> None:
    values = torch.randn(3, 4, 5, generator=generator(1))
    mask = values > 0
    for aggregate in (sdpo.token_sum, sdpo.sequence_sum):
        means = vmap(lambda v, m, f=aggregate: f(v, m).mean())(values, mask)  # type: ignore[misc]
        assert_near(means, torch.stack([aggregate(v, m).mean() for v, m in zip(values, mask, strict=True)]))
    slopes = vmap(grad(lambda v, m: sdpo.token_sum(v, m).mean()))(values.masked_fill(~mask, math.nan), mask)
    assert_near(slopes, mask / mask.sum((-2, -1), keepdim=True))


def test_hard_logits_in_float32() -> None:
    """The mask value of many libraries, saturated heads, and the largest logits there are."""
    lowest = torch.finfo(torch.float32).min
    student = torch.tensor([[lowest, 0.0, 1.0], [1e30, 0.0, -1e30], [60.0, 0.0, -60.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[lowest, 1.0, 0.0], [1e30, 0.0, -1e30], [-60.0, 0.0, 60.0], [0.0, -1e30, 1e30]])
    for alpha in (0.0, 0.5, 1.0):
        for k in (1, 2, 3):
            value = sdpo.topk_distillation_loss(student, teacher, k=k, alpha=alpha, tail="bucket")
            slope = grad(
                lambda s, k=k, alpha=alpha: sdpo.topk_distillation_loss(  # type: ignore[misc]
                    s, teacher, k=k, alpha=alpha, tail="bucket"
                ).sum()
            )(student)
            assert not value.isnan().any()
            assert slope.isfinite().all()
