"""The fused loss as an autograd function: its gradients are computed in the forward pass."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdpo.fused import triton as kernels
from sdpo.fused._chunks import GradWeights, loss_and_grads
from sdpo.fused._derivatives import (
    FirstDerivative,
    dtypes_of,
    grads_of_inputs,
    refuse_second_derivatives,
)
from sdpo.fused._policy import PolicyTerm, policy_term
from sdpo.fused._rows import factors_of_rows
from sdpo.fused._types import Objective, Operands, Plan, RowFactors, TokenStats

_PER_TOKEN = TokenStats._fields.index("per_token")
_WEIGHTS = TokenStats._fields.index("weights")
_LOG_PROBS = TokenStats._fields.index("log_probs")


class Loss(NamedTuple):
    """The loss of all active tokens: the total with gradient; the losses of each token with one, or without."""

    total: Tensor  # []
    per_token: Tensor  # [n] divergence, unweighted
    policy_loss: Tensor | None  # [n] policy loss, unweighted; None without a policy gradient
    stats: Tensor  # [len(TokenStats), n] without gradient


def total_loss(operands: Operands, objective: Objective, plan: Plan) -> Loss:
    """The loss, of which only the total has a gradient."""
    lengths, factors = plan.row_lengths, objective.row_factors
    if factors is not None and lengths is not None and max(lengths, default=0) > plan.chunk_size:
        return _total_of_long_rows(operands, objective, plan, factors)
    total, stats, policy_loss = _TotalLoss.apply(objective, plan, *operands.flatten())[:3]
    return Loss(total, stats[_PER_TOKEN], policy_loss, stats)


def per_token_loss(operands: Operands, objective: Objective, plan: Plan) -> Loss:
    """The loss, with gradients of the total and of the losses of each token."""
    per_token, policy_loss, stats = _PerTokenLoss.apply(objective, plan, *operands.flatten())[:3]
    return Loss(_total(per_token, policy_loss, stats, operands), per_token, policy_loss, stats)


def _total_of_long_rows(operands: Operands, objective: Objective, plan: Plan, factors: RowFactors) -> Loss:
    """The loss of rows that do not fit a chunk: their factors multiply the losses of all tokens afterwards."""
    assert plan.row_lengths is not None
    plain = replace(objective, row_factors=None)
    loss = per_token_loss(operands, plain, plan._replace(row_lengths=None))
    rows = slice(0, len(plan.row_lengths))
    stats = loss.stats.clone()
    stats[_WEIGHTS] *= factors_of_rows(factors, operands.active, rows, loss.stats)
    total = _total(loss.per_token, loss.policy_loss, stats, operands)
    policy_loss = None if loss.policy_loss is None else loss.policy_loss.detach()
    return Loss(total, stats[_PER_TOKEN], policy_loss, stats)


def policy_clipped(stats: Tensor, operands: Operands, objective: Objective) -> Tensor | None:
    """1 for each active token [n] whose ratio the surrogate clips; None without a policy gradient."""
    term = _policy_term(stats, operands, objective)
    return None if term is None else term.clipped


def _policy_term(stats: Tensor, operands: Operands, objective: Objective) -> PolicyTerm | None:
    """The policy loss of the active tokens [n] from their statistics; None without a policy gradient."""
    if operands.advantages is None or objective.surrogate is None:
        return None
    advantages, old = operands.of_active(operands.advantages), operands.of_active(operands.old_log_probs)
    return policy_term(stats[_LOG_PROBS], old, advantages, objective.surrogate)


def _total(per_token: Tensor, policy_loss: Tensor | None, stats: Tensor, operands: Operands) -> Tensor:
    """Σ weights · per_token + policy_weights · policy_loss over the active tokens."""
    total = _weighted_sum(per_token, stats[_WEIGHTS])
    if policy_loss is None or operands.policy_weights is None:
        return total
    return total + _weighted_sum(policy_loss, operands.of_active(operands.policy_weights))


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · values, in which a weight of 0 removes even an infinite value."""
    return (weights * values.masked_fill(weights == 0.0, 0.0)).sum()


class _TotalLoss(FirstDerivative):
    """The total, whose gradients are outputs of the forward pass."""

    @staticmethod
    def forward(objective: Objective, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = Operands.unflatten(tensors)
        stats, *grads = loss_and_grads(operands, objective, plan)
        term = _policy_term(stats, operands, objective)
        policy_loss = None if term is None else term.loss
        return _total(stats[_PER_TOKEN], policy_loss, stats, operands), stats, policy_loss, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        total, *others = output
        ctx.input_dtypes = dtypes_of(inputs)
        ctx.mark_non_differentiable(*(tensor for tensor in others if tensor is not None))
        # Else autograd would allocate zeros for the gradients of these outputs.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, *others[2:])

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        total, *grads = ctx.saved_tensors
        if grad_total is None:
            return grads_of_inputs([None, None, None], ctx.input_dtypes)
        with torch.no_grad():
            scaled = [None if grad is None else kernels.scaled(grad, grad_total) for grad in grads]
            input_grads = grads_of_inputs(scaled, ctx.input_dtypes)
        return refuse_second_derivatives(input_grads, total, grad_total)


class _PerTokenLoss(FirstDerivative):
    """The losses of each token. What multiplies each of them is known in backward only.

    Then the hidden gradient of each token is multiplied by its factor. The gradient of a head sums over the tokens,
    and with a policy gradient each token has two factors: in both cases all chunks are computed a second time, with
    the factors as weights.
    """

    @staticmethod
    def forward(objective: Objective, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = Operands.unflatten(tensors)
        grad_hidden = plan.grad_hidden and not _is_computed_twice(plan, objective)
        plan = plan._replace(grad_hidden=grad_hidden, grad_weight=False, grad_bias=False)
        tokens = operands.tokens if operands.active is None else operands.active
        ones = torch.ones_like(tokens, dtype=torch.float32)
        out = loss_and_grads(operands, objective, plan, GradWeights(ones, None))
        term = _policy_term(out.stats, operands, objective)
        policy_loss = None if term is None else term.loss
        return out.stats[_PER_TOKEN].clone(), policy_loss, out.stats, out.grad_hidden

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.objective, ctx.plan, *tensors = inputs
        per_token, _, stats, grad_hidden = output
        ctx.input_dtypes = dtypes_of(inputs)
        ctx.mark_non_differentiable(*(tensor for tensor in (stats, grad_hidden) if tensor is not None))
        ctx.set_materialize_grads(False)
        if not _is_computed_twice(ctx.plan, ctx.objective):
            ctx.save_for_backward(per_token, grad_hidden, Operands.unflatten(tensors).active)
            return
        # Tensors created in torch.inference_mode cannot be saved, their copies can.
        saved = (t.clone() if t is not None and t.is_inference() else t for t in tensors)
        ctx.save_for_backward(per_token, *saved)

    @staticmethod
    def backward(
        ctx: Any, grad_per_token: Tensor | None, grad_policy_loss: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        per_token, *saved = ctx.saved_tensors
        present = [grad for grad in (grad_per_token, grad_policy_loss) if grad is not None]
        if not present:
            return grads_of_inputs([None, None, None], ctx.input_dtypes)
        with torch.no_grad():
            factors = torch.zeros_like(present[0]) if grad_per_token is None else grad_per_token
            if _is_computed_twice(ctx.plan, ctx.objective):
                if ctx.objective.surrogate is not None and grad_policy_loss is None:
                    grad_policy_loss = torch.zeros_like(factors)
                grad_weights = GradWeights(factors, grad_policy_loss)
                out = loss_and_grads(Operands.unflatten(saved), ctx.objective, ctx.plan, grad_weights)
                grads = [out.grad_hidden, out.grad_weight, out.grad_bias]
            else:
                grad_hidden, active = saved
                grads = [_scaled_tokens(grad_hidden, active, factors), None, None]
            input_grads = grads_of_inputs(grads, ctx.input_dtypes)
        return refuse_second_derivatives(input_grads, per_token, torch.stack(present))


for _function in (_TotalLoss, _PerTokenLoss):
    # Autograd reads it in every call; to compute it takes as long as a few kernel launches.
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010


def _is_computed_twice(plan: Plan, objective: Objective) -> bool:
    """Whether the gradients of the losses of each token are computed in backward, not in forward."""
    return plan.grad_weight or plan.grad_bias or objective.surrogate is not None


def _scaled_tokens(grad_hidden: Tensor | None, active: Tensor | None, factors: Tensor) -> Tensor | None:
    """Hidden gradients [N, D] times the factors [n] of the active tokens."""
    if grad_hidden is None:
        return None
    if active is not None:
        factors = factors.new_zeros(grad_hidden.shape[0]).index_copy(0, active, factors)
    return grad_hidden * factors[:, None]
