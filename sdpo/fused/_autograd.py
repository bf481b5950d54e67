"""The fused loss as an autograd function: its gradients are computed in the forward pass."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor

from sdpo.fused import triton as kernels
from sdpo.fused._chunks import loss_and_grads
from sdpo.fused._types import Objective, Operands, Plan, TokenStats
from sdpo.fused._validate import unsupported

_PER_TOKEN = TokenStats._fields.index("per_token")
_WEIGHTS = TokenStats._fields.index("weights")


def total_loss(operands: Operands, objective: Objective, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Total [] with gradient; per-token losses [n] and statistics [len(TokenStats), n] without."""
    total, stats = _TotalLoss.apply(objective, plan, *operands.flatten())[:2]
    return total, stats[_PER_TOKEN], stats


def per_token_loss(operands: Operands, objective: Objective, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Total [] and per-token losses [n] with gradient; statistics [len(TokenStats), n] without."""
    per_token, stats = _PerTokenLoss.apply(objective, plan, *operands.flatten())[:2]
    return _weighted_sum(per_token, stats[_WEIGHTS]), per_token, stats


def _weighted_sum(per_token: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · per_token, in which a weight of 0 removes even an infinite loss."""
    return (weights * per_token.masked_fill(weights == 0.0, 0.0)).sum()


class _FirstDerivative(torch.autograd.Function):
    """An autograd function that has a first derivative in reverse mode, and nothing else."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise unsupported("torch.func.vmap")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise unsupported("forward-mode differentiation")


class _TotalLoss(_FirstDerivative):
    """Σ weights · per_token, whose gradients are outputs of the forward pass."""

    @staticmethod
    def forward(objective: Objective, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        stats, *grads = loss_and_grads(Operands.unflatten(tensors), objective, plan)
        return _weighted_sum(stats[_PER_TOKEN], stats[_WEIGHTS]), stats, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        total, stats, *grads = output
        ctx.input_dtypes = _dtypes(inputs)
        ctx.mark_non_differentiable(*(tensor for tensor in (stats, *grads) if tensor is not None))
        # Else autograd would allocate zeros for the gradients of these outputs.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, *grads)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        total, *grads = ctx.saved_tensors
        if grad_total is None:
            return _input_grads([None, None, None], ctx.input_dtypes)
        with torch.no_grad():
            scaled = [None if grad is None else kernels.scaled(grad, grad_total) for grad in grads]
            input_grads = _input_grads(scaled, ctx.input_dtypes)
        return _refuse_second_derivatives(input_grads, total, grad_total)


class _PerTokenLoss(_FirstDerivative):
    """The per-token losses. What multiplies each of them is known in backward only.

    Then the hidden gradient of each token is multiplied by its factor. The gradient of a head sums over the tokens,
    so with a trainable head all chunks are computed a second time, with the factors as weights.
    """

    @staticmethod
    def forward(objective: Objective, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = Operands.unflatten(tensors)
        plan = plan._replace(
            grad_hidden=plan.grad_hidden and not _trains_head(plan), grad_weight=False, grad_bias=False
        )
        tokens = operands.tokens if operands.active is None else operands.active
        ones = torch.ones_like(tokens, dtype=torch.float32)
        out = loss_and_grads(operands, objective, plan, grad_weights=ones)
        return out.stats[_PER_TOKEN].clone(), out.stats, out.grad_hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.objective, ctx.plan, *tensors = inputs
        per_token, stats, grad_hidden = output
        ctx.input_dtypes = _dtypes(inputs)
        ctx.mark_non_differentiable(*(tensor for tensor in (stats, grad_hidden) if tensor is not None))
        ctx.set_materialize_grads(False)
        if not _trains_head(ctx.plan):
            ctx.save_for_backward(per_token, grad_hidden, Operands.unflatten(tensors).active)
            return
        # Tensors created in torch.inference_mode cannot be saved, their copies can.
        saved = (t.clone() if t is not None and t.is_inference() else t for t in tensors)
        ctx.save_for_backward(per_token, *saved)

    @staticmethod
    def backward(ctx: Any, grad_per_token: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        per_token, *saved = ctx.saved_tensors
        if grad_per_token is None:
            return _input_grads([None, None, None], ctx.input_dtypes)
        with torch.no_grad():
            if _trains_head(ctx.plan):
                out = loss_and_grads(Operands.unflatten(saved), ctx.objective, ctx.plan, grad_per_token)
                grads = [out.grad_hidden, out.grad_weight, out.grad_bias]
            else:
                grad_hidden, active = saved
                grads = [_scaled_tokens(grad_hidden, active, grad_per_token), None, None]
            input_grads = _input_grads(grads, ctx.input_dtypes)
        return _refuse_second_derivatives(input_grads, per_token, grad_per_token)


for _function in (_TotalLoss, _PerTokenLoss):
    # Autograd reads it in every call; to compute it takes as long as a few kernel launches.
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010


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


def _refuse_second_derivatives(
    grads: tuple[Tensor | None, ...], result: Tensor, grad_result: Tensor
) -> tuple[Tensor | None, ...]:
    """With ``create_graph=True``, make the gradients depend on what they depend on; else return them."""
    return _SecondDerivative.apply(result, grad_result, *grads) if torch.is_grad_enabled() else grads


def _trains_head(plan: Plan) -> bool:
    return plan.grad_weight or plan.grad_bias


def _scaled_tokens(grad_hidden: Tensor | None, active: Tensor | None, factors: Tensor) -> Tensor | None:
    """Hidden gradients [N, D] times the factors [n] of the active tokens."""
    if grad_hidden is None:
        return None
    if active is not None:
        factors = factors.new_zeros(grad_hidden.shape[0]).index_copy(0, active, factors)
    return grad_hidden * factors[:, None]


def _dtypes(inputs: tuple[Any, ...]) -> list[torch.dtype | None]:
    """Dtypes of a function's inputs; None for what is no tensor."""
    return [value.dtype if isinstance(value, Tensor) else None for value in inputs]


def _input_grads(student: list[Tensor | None], dtypes: list[torch.dtype | None]) -> tuple[Tensor | None, ...]:
    """Gradients of a function's inputs, each in the dtype of its input, from those of the student's tensors."""
    grads = [None, None, *student, *[None] * (len(dtypes) - 5)]
    return tuple(None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True))
