"""What the autograd functions of this package share: a first derivative in reverse mode, and nothing else."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from sdpo.fused._validate import unsupported


class FirstDerivative(torch.autograd.Function):
    """An autograd function that has a first derivative in reverse mode, and nothing else."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise unsupported("torch.func.vmap")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise unsupported("forward-mode differentiation")


class _SecondDerivative(torch.autograd.Function):
    """Gradients as they are; to differentiate them is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(result: Tensor, grad_result: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise unsupported("a second derivative")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise unsupported("a second derivative")


def refuse_second_derivatives(
    grads: tuple[Tensor | None, ...], result: Tensor, grad_result: Tensor
) -> tuple[Tensor | None, ...]:
    """With ``create_graph=True``, make the gradients depend on what they depend on; else return them."""
    return _SecondDerivative.apply(result, grad_result, *grads) if torch.is_grad_enabled() else grads


def dtypes_of(inputs: tuple[Any, ...]) -> list[torch.dtype | None]:
    """Dtypes of a function's inputs; None for what is no tensor."""
    return [value.dtype if isinstance(value, Tensor) else None for value in inputs]


def grads_of_inputs(
    student: list[Tensor | None], dtypes: list[torch.dtype | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of a function's inputs, each in the dtype of its input, from those of the student's tensors."""
    grads = [None, None, *student, *[None] * (len(dtypes) - 5)]
    return tuple(None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))
