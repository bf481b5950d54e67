"""Every function under torch.func and torch.compile, in every dtype, on empty batches and with excluded tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from losses import full_loss, sampled_loss, topk_loss
from strategies import assert_near, generator
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, jacrev, vmap

import sdpo

Loss = Callable[[Tensor, Tensor], Tensor]
STATISTICS: dict[str, Any] = {"support": "student", "k": 2, "temperature": 0.7}


def masked_mean(student: Tensor, teacher: Tensor) -> Tensor:
    """The whole loss of each position, from logits [..., V] to nats [...], as the other functions here."""
    per_token = topk_loss(student, teacher, k=2, alpha=0.5, tail="bucket").unsqueeze(-1)
    everything = torch.ones_like(per_token, dtype=torch.bool)
    log_probs = sdpo.topk_log_probs(student, k=1).log_probs
    weights = sdpo.importance_weights(log_probs, log_probs - 0.1, clip=2.0)
    out = sdpo.self_distillation_loss(per_token, everything, row_mask=everything[..., 0], weights=weights)
    return sdpo.MaskedSum(out.total, out.count).mean()


LOSSES: dict[str, Loss] = {
    "full forward": lambda s, t: full_loss(s, t, alpha=0),
    "full jsd": lambda s, t: full_loss(s, t, alpha=0.3),
    "full reverse": lambda s, t: full_loss(s, t, alpha=1),
    "top-3 bucket": lambda s, t: topk_loss(s, t, k=3, alpha=0.5, tail="bucket"),
    "top-5 bucket": lambda s, t: topk_loss(s, t, k=5, alpha=1, tail="bucket"),
    "top-3 of the teacher": lambda s, t: topk_loss(s, t, k=3, alpha=0, tail="bucket", support="teacher"),
    "top-3 renormalized": lambda s, t: topk_loss(s, t, k=3, alpha=0.5, tail="renormalize"),
    "sampled token": lambda s, t: sampled_loss(s, t, s.argmax(-1)),
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


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"sampled token"}))
def test_second_derivatives(name: str) -> None:
    """Against differences of the gradient. That of the sampled token is no derivative of its value."""
    student, teacher = example_logits(2, 6, masked=False)
    loss = LOSSES[name]
    assert torch.autograd.gradgradcheck(lambda s: loss(s, teacher), student.requires_grad_())


def check_grad_is_backward(loss: Loss) -> None:
    student, teacher = example_logits(4, 6)
    leaf = student.clone().requires_grad_()
    loss(leaf, teacher).sum().backward()
    assert leaf.grad is not None
    got = grad(lambda s: loss(s, teacher).sum())(student)
    assert got.isfinite().all()
    assert_near(got, leaf.grad, 1e-14)
    assert (grad(lambda t: loss(student, t).sum())(teacher) == 0.0).all()


def check_vmap_is_a_loop(loss: Loss) -> None:
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


def check_gradients_per_position(loss: Loss) -> None:
    student, teacher = example_logits(4, 6)
    together = grad(lambda s: loss(s, teacher).sum())(student)
    assert_near(vmap(grad(loss))(student, teacher), together)
    jacobian = jacrev(lambda s: loss(s, teacher))(student)
    assert jacobian.shape == (4, 4, 6)
    assert_near(jacobian, torch.diag_embed(together.T).permute(1, 2, 0))


def check_arithmetic(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher = example_logits(5, 6, dtype=dtype)
    got, expected = loss(student, teacher), loss(student.double(), teacher.double())
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(got, expected, 1e-13 if dtype == torch.float64 else 2e-6)
    derivative = grad(lambda s: loss(s, teacher).sum())(student)
    exact = grad(lambda s: loss(s, teacher.double()).sum())(student.double())
    assert derivative.dtype == dtype
    assert_near(derivative, exact, {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 2e-6))


def check_empty_batches(loss: Loss, shape: tuple[int, ...] = (0, 3)) -> None:
    student = torch.zeros(*shape, 6, requires_grad=True)
    value = loss(student, torch.zeros(*shape, 6))
    assert value.shape == shape
    value.sum().backward()
    assert student.grad is not None


def check_hard_logits(loss: Loss) -> None:
    """The mask value of many libraries, saturated heads, and the largest logits there are."""
    lowest = torch.finfo(torch.float32).min
    student = torch.tensor([[lowest, 0.0, 1.0], [1e30, 0.0, -1e30], [60.0, 0.0, -60.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[lowest, 1.0, 0.0], [1e30, 0.0, -1e30], [-60.0, 0.0, 60.0], [0.0, -1e30, 1e30]])
    assert not loss(student, teacher).isnan().any()
    assert grad(lambda s: loss(s, teacher).sum())(student).isfinite().all()


@parametrize_losses
def test_grad_is_backward(loss: Loss) -> None:
    check_grad_is_backward(loss)


@parametrize_losses
def test_vmap_is_a_loop(loss: Loss) -> None:
    check_vmap_is_a_loop(loss)


@parametrize_losses
def test_gradients_per_position(loss: Loss) -> None:
    check_gradients_per_position(loss)


@parametrize_losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_or_better(loss: Loss, dtype: torch.dtype) -> None:
    """Low-precision logits are rounded once, by whoever made them, and never again."""
    check_arithmetic(loss, dtype)


@parametrize_losses
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_batches(loss: Loss, shape: tuple[int, ...]) -> None:
    check_empty_batches(loss, shape)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_hard_logits_in_float32(k: int, alpha: float) -> None:
    check_hard_logits(lambda s, t: topk_loss(s, t, k=k, alpha=alpha, tail="bucket"))


def with_a_trainable_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    return sdpo.generalized_jsd(student.log_softmax(-1), teacher.log_softmax(-1), alpha=0.5)


def of_its_surroundings(student: Tensor, teacher: Tensor) -> Tensor:
    value = full_loss(student, teacher, alpha=0.5)
    return value / value.shape[0] if value.ndim else value


def from_its_mean(student: Tensor, teacher: Tensor) -> Tensor:
    value = full_loss(student, teacher, alpha=0.5)
    return value * value.mean()


def rounded_on_the_way(student: Tensor, teacher: Tensor) -> Tensor:
    return full_loss(student.log_softmax(-1), teacher.log_softmax(-1).to(student.dtype), alpha=0.5)


def already_summed(student: Tensor, teacher: Tensor) -> Tensor:
    return full_loss(student, teacher, alpha=0.5).sum()


def of_textbook_formulas(student: Tensor, teacher: Tensor) -> Tensor:
    """Right wherever every token is possible."""
    p, q = student.float().softmax(-1), teacher.detach().float().softmax(-1)
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (check_grad_is_backward, with_a_trainable_teacher),
        (check_grad_is_backward, of_textbook_formulas),
        (check_vmap_is_a_loop, of_its_surroundings),
        (check_vmap_is_a_loop, from_its_mean),
        (check_gradients_per_position, from_its_mean),
        (lambda loss: check_arithmetic(loss, torch.bfloat16), rounded_on_the_way),
        (lambda loss: check_arithmetic(loss, torch.float16), rounded_on_the_way),
        (check_empty_batches, already_summed),
        (check_hard_logits, of_textbook_formulas),
    ],
)
def test_wrong_losses_are_rejected(check: Callable[[Loss], None], wrong: Loss) -> None:
    with pytest.raises(AssertionError):
        check(wrong)


def values_and_mask(*shape: int) -> tuple[Tensor, Tensor]:
    values = torch.randn(*(shape or (4, 5)), generator=generator(1), dtype=torch.float64)
    return values, values > 0


FUNCTIONS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]]]] = {
    "masked mean": (masked_mean, lambda: example_logits(4, 6)),
    "token statistics": (
        lambda s, t: torch.stack(sdpo.token_statistics(s, t, s.argmax(-1), **STATISTICS)),
        lambda: example_logits(4, 6),
    ),
    "packed sequences": (
        lambda v, m: sdpo.packed_sequence_sum(
            v.flatten(),
            m.flatten(),
            segment_ids=sdpo.packed_segment_ids(torch.tensor([0, 5, 9]), num_tokens=20),
            num_segments=3,
        ).mean(),
        values_and_mask,
    ),
    "logit advantages": (sdpo.logit_advantages, lambda: example_logits(4, 6)),
    "token advantages": (
        lambda s, t: sdpo.token_advantages(s, t, s.argmax(-1)),
        lambda: example_logits(4, 6),
    ),
    "sequence advantages": (sdpo.sequence_advantages, values_and_mask),
    "group advantages": (
        lambda r, m: sdpo.group_normalized_advantages(r[0], m[0].long(), scale_by_std=True, eps=1e-4),
        values_and_mask,
    ),
    "blended advantages": (
        lambda v, m: sdpo.blend_advantages(v[:, 0], v, reward_weight=0.3),
        values_and_mask,
    ),
    "sum over tokens": (lambda v, m: sdpo.token_sum(v, m).mean(), values_and_mask),
    "sum over sequences": (lambda v, m: sdpo.sequence_sum(v, m).mean(), values_and_mask),
}


def check_compiles_without_a_graph_break(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_near(compiled(*inputs), function(*inputs))


@parametrize_losses
def test_losses_compile_without_a_graph_break(loss: Loss) -> None:
    check_compiles_without_a_graph_break(loss, example_logits(4, 6))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compile_without_a_graph_break(name: str) -> None:
    function, inputs = FUNCTIONS[name]
    check_compiles_without_a_graph_break(function, inputs())


@pytest.mark.parametrize(
    "function",
    [
        *LOSSES.values(),
        masked_mean,
        lambda s, t: sdpo.token_statistics(s, t, s.argmax(-1), **STATISTICS).student_entropy,
        lambda s, t: sdpo.gather_log_probs(s, t.argmax(-1, keepdim=True)).log_tail,
    ],
)
def test_shapes_are_known_without_values(function: Loss) -> None:
    """Fake tensors are on the CPU, but to read a value of one is an error."""
    student, teacher = example_logits(4, 6)
    with FakeTensorMode() as mode:
        got = function(mode.from_tensor(student), mode.from_tensor(teacher))
    expected = function(student, teacher)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)


def test_a_graph_break_is_rejected() -> None:
    def looks_at_its_value(student: Tensor, teacher: Tensor) -> Tensor:
        value = full_loss(student, teacher, alpha=0.5)
        return value if value.sum() > 0 else -value

    with pytest.raises(torch._dynamo.exc.Unsupported):
        check_compiles_without_a_graph_break(looks_at_its_value, example_logits(4, 6))


def check_row_by_row(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """[R, ...] under vmap, in one call and in a loop."""
    rows = torch.stack([function(*row) for row in zip(*inputs, strict=True)])
    assert_near(vmap(function)(*inputs), rows)
    assert_near(function(*inputs), rows)


def test_advantages_under_transforms() -> None:
    student, teacher = example_logits(3, 4, 6)
    tokens = student.argmax(-1)
    per_token = sdpo.token_advantages(student, teacher, tokens)
    batches: dict[Callable[..., Tensor], tuple[Tensor, ...]] = {
        sdpo.logit_advantages: (student, teacher),
        sdpo.token_advantages: (student, teacher, tokens),
        sdpo.sequence_advantages: (per_token, per_token > -1),
        lambda a, b: sdpo.blend_advantages(a, b, reward_weight=0.3): (per_token, student),
    }
    for function, inputs in batches.items():
        check_row_by_row(function, *inputs)
        with pytest.raises(AssertionError):
            check_row_by_row(lambda *given, f=function: f(*given) - f(*given).mean(), *inputs)  # type: ignore[misc]
    groups = torch.tensor([0, 1, 0, 1])
    normalized = vmap(lambda r: sdpo.group_normalized_advantages(r, groups, scale_by_std=True, eps=1e-4))(
        per_token
    )
    one_by_one = [sdpo.group_normalized_advantages(r, groups, scale_by_std=True, eps=1e-4) for r in per_token]
    assert_near(normalized, torch.stack(one_by_one))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_whole_way_under_transforms(dtype: torch.dtype) -> None:
    student, teacher = example_logits(3, 4, 6, dtype=dtype)
    losses = vmap(masked_mean)(student, teacher)
    assert_near(losses, torch.stack([masked_mean(s, t) for s, t in zip(student, teacher, strict=True)]), 1e-6)
    gradients = vmap(grad(masked_mean))(student, teacher)
    assert gradients.isfinite().all()
    assert gradients.shape == student.shape
    assert vmap(grad(lambda s, t: of_textbook_formulas(s, t).mean()))(student, teacher).isnan().any()


def check_sums(aggregate: Callable[[Tensor, Tensor], sdpo.MaskedSum]) -> None:
    values, mask = values_and_mask(3, 4, 5)
    dirty = values.masked_fill(~mask, math.nan)
    means = vmap(lambda v, m: aggregate(v, m).mean())(dirty, mask)
    assert_near(means, torch.stack([aggregate(v, m).mean() for v, m in zip(values, mask, strict=True)]))
    derivatives = vmap(grad(lambda v, m: aggregate(v, m).mean()))(dirty, mask)
    weights = torch.ones_like(values).requires_grad_()
    for row, active in zip(values * weights, mask, strict=True):
        aggregate(row, active).mean().backward(retain_graph=True)
    assert weights.grad is not None
    assert_near(derivatives * values, weights.grad)


def test_sums_under_transforms() -> None:
    for aggregate in (sdpo.token_sum, sdpo.sequence_sum):
        check_sums(aggregate)
    with pytest.raises(AssertionError):
        check_sums(lambda v, m: sdpo.MaskedSum((v * m).sum(), m.sum()))
