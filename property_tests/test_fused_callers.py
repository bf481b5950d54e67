"""The fused loss under torch.func, inference mode, checkpointing, autocast and compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_cases import TRAINABLE, Case, assert_same, fused, make_case, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sdpo


def test_functional_gradient_equals_autograd() -> None:
    case = make_case(15, n=9, v=64)
    expected = fused(case)

    def total(trainable: dict[str, Tensor]) -> Tensor:
        # Teachers that share the parameters must not receive a gradient through them.
        return case.with_(**trainable).fused(backend="torch").total

    trainable = {name: case.tensors[name] for name in TRAINABLE}
    assert_same(torch.func.grad(total)(trainable), {name: expected[name] for name in TRAINABLE})


@pytest.mark.parametrize("trainable", [TRAINABLE, TRAINABLE[:1], TRAINABLE[1:2]])
def test_functional_gradient_of_the_per_token_form(trainable: tuple[str, ...]) -> None:
    case = make_case(15, n=9, v=64)
    expected = fused(case)

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        out = case.with_(**tensors).fused(backend="torch", reduction="none")
        return (out.weights * out.per_token).sum()

    gradients = torch.func.grad(loss)({name: case.tensors[name] for name in trainable})
    assert_same(gradients, {name: expected[name] for name in trainable})


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("trainable", [TRAINABLE, TRAINABLE[:1], TRAINABLE[1:2]])
def test_a_teacher_may_come_from_inference_mode(trainable: tuple[str, ...], reduction: str) -> None:
    case = make_case(22, n=9, v=64)
    expected = fused(case)
    with torch.inference_mode():
        states = {name: case.tensors[name].clone() for name in ("teacher_hidden", "old_log_probs")}
    assert all(tensor.is_inference() for tensor in states.values())
    leaves = {name: case.tensors[name].clone().requires_grad_() for name in trainable}
    out = case.with_(**states, **leaves).fused(backend="torch", reduction=reduction)
    loss = out.total if reduction == "sum" else (out.weights * out.per_token).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert_same(
        dict(zip(trainable, gradients, strict=True)), {name: expected[name] for name in trainable}, 1e-12
    )


def test_under_gradient_checkpointing() -> None:
    case, leaves = make_case(17, n=9, v=64).leaves()
    total = checkpoint(
        lambda hidden: case.with_(student_hidden=hidden).fused().total, leaves[0], use_reentrant=False
    )
    expected = fused(case)
    for name, gradient in zip(TRAINABLE, torch.autograd.grad(total, leaves), strict=True):
        assert relative_error(gradient, expected[name]) < 1e-12


def test_autocast_decides_the_dtype_of_the_products() -> None:
    case = make_case(18, n=9, d=64, v=64).cast(torch.float32)
    operands = {name: value for name, value in case.tensors.items() if name.endswith(("hidden", "weight"))}
    rounded = fused(case.with_(**{name: value.bfloat16().float() for name, value in operands.items()}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fused(case)
    assert_same(result, rounded, 1e-6)
    assert all(result[name].dtype == torch.float32 for name in TRAINABLE)
    assert relative_error(result["total"], fused(case)["total"]) > 1e-5, "autocast changed nothing"


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_in_a_compiled_caller() -> None:
    """The graph breaks around the fused loss; what surrounds it is compiled."""
    case, leaves = make_case(19, n=9, v=64).leaves()
    arguments = case.arguments()

    def step(hidden: Tensor) -> Tensor:
        student = arguments["student"]._replace(hidden=hidden * 2.0)
        out = sdpo.fused_distillation_loss(**(arguments | {"student": student}), backend="torch")
        return out.total * 3.0

    compiled = torch.compile(step, backend="aot_eager")
    (expected,) = torch.autograd.grad(step(leaves[0]), leaves[0])
    (actual,) = torch.autograd.grad(compiled(leaves[0]), leaves[0])
    assert relative_error(actual, expected) < 1e-12


# --- what a gradient computed in the forward pass does not allow ------------------------------------------


def total_of_hidden(case: Case, **options: Any) -> Callable[[Tensor], Tensor]:
    def total(hidden: Tensor) -> Tensor:
        out = case.with_(student_hidden=hidden).fused(backend="torch", **options)
        return out.total if options.get("reduction") != "none" else out.per_token.sum()

    return total


UNSUPPORTED: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "vmap": lambda total, hidden: torch.func.vmap(total)(torch.stack([hidden, hidden])),
    "gradients under vmap": lambda total, hidden: torch.func.vmap(torch.func.grad(total))(
        torch.stack([hidden, hidden])
    ),
    "jvp": lambda total, hidden: torch.func.jvp(total, (hidden,), (torch.ones_like(hidden),)),
    "forward-mode jacobian": lambda total, hidden: torch.func.jacfwd(total)(hidden),
    "hessian": lambda total, hidden: torch.func.hessian(total)(hidden),
    "gradient of a gradient": lambda total, hidden: torch.func.grad(
        lambda x: torch.func.grad(total)(x).square().sum()
    )(hidden),
    "double backward": lambda total, hidden: double_backward(total, hidden),
}


def double_backward(total: Callable[[Tensor], Tensor], hidden: Tensor) -> None:
    hidden = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(hidden), hidden, create_graph=True)
    gradient.square().sum().backward()


# Of torch's own forward-mode rules.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("transform", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_transforms_name_the_function_to_use(
    transform: Callable[[Callable[[Tensor], Tensor], Tensor], object], reduction: str
) -> None:
    case = make_case(15, n=3, v=64)
    total = total_of_hidden(case, reduction=reduction)
    with pytest.raises(NotImplementedError, match=r"not\s+support; use sdpo\.distillation_loss"):
        transform(total, case.tensors["student_hidden"])


def test_the_graph_of_a_gradient_is_no_error_by_itself() -> None:
    case = make_case(15, n=9, v=64)
    hidden = case.tensors["student_hidden"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total_of_hidden(case)(hidden), hidden, create_graph=True)
    assert relative_error(gradient.detach(), fused(case)["student_hidden"]) < 1e-12


def test_vmap_over_something_else_is_no_error() -> None:
    case = make_case(15, n=9, v=64)
    factors = torch.tensor([1.0, 2.0], dtype=torch.float64)
    totals = torch.func.vmap(lambda factor: factor * case.fused(backend="torch").total)(factors)
    assert relative_error(totals, factors * fused(case)["total"]) < 1e-12


def test_a_jacobian_in_reverse_mode() -> None:
    case = make_case(15, n=9, v=64)
    jacobian = torch.func.jacrev(total_of_hidden(case))(case.tensors["student_hidden"])
    assert relative_error(jacobian, fused(case)["student_hidden"]) < 1e-12
