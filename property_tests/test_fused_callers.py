"""The fused loss in its caller's hands: torch.func, inference mode, checkpointing, autocast, compilation."""

from __future__ import annotations

import pytest
import torch
from fused_cases import LEARNING, assert_same, fused, make_case, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sdpo


def test_functional_gradient_equals_autograd() -> None:
    case = make_case(15, n=9, v=64)
    expected = fused(case)

    def total(learning: dict[str, Tensor]) -> Tensor:
        # Teachers that share the parameters must not receive a gradient through them.
        return case.with_(**learning).fused(backend="torch").total

    learning = {name: case.tensors[name] for name in LEARNING}
    assert_same(torch.func.grad(total)(learning), {name: expected[name] for name in LEARNING})


@pytest.mark.parametrize("learning", [LEARNING, LEARNING[:1], LEARNING[1:2]])
def test_functional_gradient_of_the_per_token_form(learning: tuple[str, ...]) -> None:
    case = make_case(15, n=9, v=64)
    expected = fused(case)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        out = case.with_(**tensors).fused(backend="torch", reduction="none")
        return (out.weights * out.per_token).sum()

    gradients = torch.func.grad(loss)({name: case.tensors[name] for name in learning})
    assert_same(gradients, {name: expected[name] for name in learning})


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("learning", [LEARNING, LEARNING[:1], LEARNING[1:2]])
def test_a_teacher_may_come_from_inference_mode(learning: tuple[str, ...], reduction: str) -> None:
    case = make_case(22, n=9, v=64)
    expected = fused(case)
    with torch.inference_mode():
        states = {name: case.tensors[name].clone() for name in ("teacher_hidden", "old_log_probs")}
    assert all(tensor.is_inference() for tensor in states.values())
    leaves = {name: case.tensors[name].clone().requires_grad_() for name in learning}
    out = case.with_(**states, **leaves).fused(backend="torch", reduction=reduction)
    loss = out.total if reduction == "sum" else (out.weights * out.per_token).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert_same(
        dict(zip(learning, gradients, strict=True)), {name: expected[name] for name in learning}, 1e-12
    )


def test_under_gradient_checkpointing() -> None:
    case, leaves = make_case(17, n=9, v=64).leaves()
    total = checkpoint(
        lambda hidden: case.with_(student_hidden=hidden).fused().total, leaves[0], use_reentrant=False
    )
    expected = fused(case)
    for name, gradient in zip(LEARNING, torch.autograd.grad(total, leaves), strict=True):
        assert relative_error(gradient, expected[name]) < 1e-12


def test_autocast_decides_the_dtype_of_the_products() -> None:
    case = make_case(18, n=9, d=64, v=64).cast(torch.float32)
    states = {name: value for name, value in case.tensors.items() if name.endswith(("hidden", "head"))}
    rounded = fused(case.with_(**{name: value.bfloat16().float() for name, value in states.items()}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = fused(case)
    assert_same(answer, rounded, 1e-6)
    assert all(answer[name].dtype == torch.float32 for name in LEARNING)
    assert relative_error(answer["total"], fused(case)["total"]) > 1e-5, "autocast changed nothing"


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_in_a_compiled_caller() -> None:
    """The graph breaks around the fused loss; what surrounds it is compiled."""
    case, leaves = make_case(19, n=9, v=64).leaves()
    rest = {name: value for name, value in case.tensors.items() if name != "student_hidden"} | case.scalars

    def step(hidden: Tensor) -> Tensor:
        out = sdpo.fused_topk_distillation_loss(student_hidden=hidden * 2.0, backend="torch", **rest)
        return out.total * 3.0

    compiled = torch.compile(step, backend="aot_eager")
    (expected,) = torch.autograd.grad(step(leaves[0]), leaves[0])
    (got,) = torch.autograd.grad(compiled(leaves[0]), leaves[0])
    assert relative_error(got, expected) < 1e-12
