"""How the fused loss joins autograd: its gradient exists before anybody asks for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from sdpo.fused import triton as kernels
from sdpo.fused._chunks import Operands, Plan, run
from sdpo.fused._types import Objective, TokenStats

_PER_TOKEN = TokenStats._fields.index("per_token")
_WEIGHTS = TokenStats._fields.index("weights")
_LEARNING = tuple(map(Operands._fields.index, ("student_hidden", "student_head", "student_bias")))


def total_loss(operands: Operands, recipe: Objective, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Total [] with gradient; per-token losses [n] and statistics [S, n] without."""
    total, stats = _Total.apply(recipe, plan, *operands)[:2]
    return total, stats[_PER_TOKEN], stats


def per_token_loss(operands: Operands, recipe: Objective, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Total [] and per-token losses [n] with gradient; statistics [S, n] without."""
    per_token, stats = _PerToken.apply(recipe, plan, *operands)[:2]
    return _weighted_sum(per_token, stats[_WEIGHTS]), per_token, stats


def _weighted_sum(per_token: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · per_token, in which a weight of 0 silences even an infinite loss."""
    return (weights * per_token.masked_fill(weights == 0.0, 0.0)).sum()


class _Total(torch.autograd.Function):
    """Σ weights · per_token, whose gradients are outputs of the forward pass."""

    @staticmethod
    def forward(recipe: Objective, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        out = run(Operands(*tensors), recipe, plan)  # type: ignore[arg-type]
        total = _weighted_sum(out.stats[_PER_TOKEN], out.stats[_WEIGHTS])
        return total, out.stats, out.hidden, out.head, out.bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.learning = _learning(inputs)
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        # Else autograd would make zeros as large as the gradients, for outputs that have none.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        gradients = [
            None if tensor is None or grad_total is None else kernels.scaled(tensor, grad_total)
            for tensor in ctx.saved_tensors
        ]
        return _returned(gradients, ctx.learning)


class _PerToken(torch.autograd.Function):
    """The per-token losses; what multiplies each of them is known in backward only.

    Rows of the hidden gradient wait for their factors. The gradient of a head mixes rows, so a head that learns
    makes the pass run again, with the factors in it.
    """

    @staticmethod
    def forward(recipe: Objective, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = Operands(*tensors)  # type: ignore[arg-type]
        first = plan._replace(hidden=plan.hidden and not _mixes_rows(plan), head=False, bias=False)
        positions = operands.tokens if operands.active is None else operands.active
        out = run(operands, recipe, first, torch.ones_like(positions, dtype=torch.float32))
        return out.stats[_PER_TOKEN].clone(), out.stats, out.hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.recipe, ctx.plan, ctx.learning = inputs[0], inputs[1], _learning(inputs)
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        ctx.set_materialize_grads(False)
        operands = Operands(*inputs[2:])
        if not _mixes_rows(ctx.plan):
            ctx.save_for_backward(output[2], operands.active)
            return
        # Tensors from `torch.inference_mode` cannot be saved; what they hold can.
        kept = (t.clone() if t is not None and t.is_inference() else t for t in operands)
        ctx.save_for_backward(*kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_per_token: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_per_token is None:
            return _returned([None, None, None], ctx.learning)
        if _mixes_rows(ctx.plan):
            out = run(Operands(*ctx.saved_tensors), ctx.recipe, ctx.plan, grad_per_token)
            return _returned([out.hidden, out.head, out.bias], ctx.learning)
        unit, active = ctx.saved_tensors
        if unit is None:
            return _returned([None, None, None], ctx.learning)
        factors = grad_per_token
        if active is not None:
            factors = factors.new_zeros(unit.shape[0]).index_copy(0, active, factors)
        return _returned([(unit * factors[:, None]), None, None], ctx.learning)


for _function in (_Total, _PerToken):
    # Autograd asks for it at every call; to make it anew takes as long as a few launches.
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010


def _mixes_rows(plan: Plan) -> bool:
    return plan.head or plan.bias


def _learning(inputs: tuple[Any, ...]) -> list[torch.dtype | None]:
    """Dtypes of the three tensors that can learn; inputs are (recipe, plan, *operands)."""
    return [None if inputs[2 + i] is None else inputs[2 + i].dtype for i in _LEARNING]


def _returned(gradients: list[Tensor | None], dtypes: list[torch.dtype | None]) -> tuple[Tensor | None, ...]:
    """One gradient per argument of ``forward``, each in the dtype of its tensor."""
    by_operand: list[Tensor | None] = [None] * len(Operands._fields)
    for index, gradient, dtype in zip(_LEARNING, gradients, dtypes, strict=True):
        by_operand[index] = None if gradient is None else gradient.to(dtype)
    return (None, None, *by_operand)
