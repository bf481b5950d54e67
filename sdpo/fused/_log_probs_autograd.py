"""Log-probabilities and entropies of tokens as an autograd function, whose backward computes each chunk again.

With log p = log_softmax(z), the entropy H = −Σ p·log p, and factors a of log p_y and b of H,

    ∂(a·log p_y + b·H)/∂z_v = a·(1[v = y] − p_v) − b·p_v·(log p_v + H)

The factors are known in backward only, so the gradient of a head, a sum over the tokens, cannot be made earlier.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdpo.fused._derivatives import (
    FirstDerivative,
    dtypes_of,
    grads_of_inputs,
    refuse_second_derivatives,
)
from sdpo.fused._matmul import (
    accumulate_grad_bias,
    accumulate_grad_weight,
    fp16_loss_scale,
    grad_hidden_from_logits,
    grad_logits_dtype,
    project,
    working_dtype,
)
from sdpo.fused._torch import logits_from_products, row_scale, softcap_backward_
from sdpo.fused._types import Objective

# Tensors [C, V] of the working dtype that backward needs besides the products.
GRAD_BUFFERS = 4
# A finite log-probability whose exp is 0 in every dtype, so that an impossible token adds 0 to an expectation.
_IMPOSSIBLE = -1e4


@dataclass(frozen=True)
class Chunks:
    """What the logits of a chunk depend on besides its tensors."""

    objective: Objective
    dtype: torch.dtype  # of the factors of the products
    size: int  # tokens
    accumulation_bias: float
    has_entropy: bool  # else it is 0

    def slices(self, count: int) -> Iterator[slice]:
        """Of so many tokens."""
        for start in range(0, count, self.size):
            yield slice(start, min(start + self.size, count))

    def buffer(self, count: int, weight: Tensor) -> Tensor:
        """Memory [C, V] for the products of a chunk of so many tokens in all."""
        shape = min(self.size, count), weight.shape[0]
        return torch.empty(shape, dtype=working_dtype(self.dtype), device=weight.device)

    def logits(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [C, V] relative to the largest of each token, in the memory of ``out``; the largest and its id.

        Near 50 float32 resolves three digits less than the differences.

        Args:
            hidden: [C, D] in ``dtype``.
            weight: [V, D] likewise.
            bias: [V], if the head has one.
            out: at least C rows of ``buffer``.
        """
        products = project(hidden, weight, out[: hidden.shape[0]])
        logits = logits_from_products(products, bias, self.accumulation_bias, self.objective)
        top, top_id = logits.max(dim=1, keepdim=True)
        return logits.sub_(top), top, top_id


class LogProbs(FirstDerivative):
    """Log-probabilities of tokens [n] and entropies, together [2, n], from hidden states [n, D] and an LM head."""

    @staticmethod
    def forward(
        chunks: Chunks, _: None, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            count, cast = hidden.shape[0], weight.to(chunks.dtype)
            out = chunks.buffer(count, weight)
            values = out.new_zeros(2, count)
            for chunk in chunks.slices(count):
                logits, _top, top_id = chunks.logits(hidden[chunk].to(chunks.dtype), cast, bias, out)
                values[:, chunk] = _values(logits, top_id, tokens[chunk], chunks.has_entropy)
        return values

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.chunks, _, *tensors = inputs
        ctx.input_dtypes = dtypes_of(inputs)
        # Tensors created in torch.inference_mode cannot be saved, their copies can.
        saved = (t.clone() if t is not None and t.is_inference() else t for t in tensors)
        ctx.save_for_backward(output, *saved)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        values, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:5]
        with torch.no_grad(), torch.autocast(grad_values.device.type, enabled=False):
            grads = _grads(ctx.chunks, grad_values, *tensors, needed=needed)
            input_grads = grads_of_inputs(grads, ctx.input_dtypes)
        return refuse_second_derivatives(input_grads, values, grad_values)


# Autograd reads it in every call; to compute it takes as long as a few kernel launches.
setattr(LogProbs.forward, "__signature__", inspect.signature(LogProbs.forward))  # noqa: B010


def _log_sum(exponentials: Tensor, top_id: Tensor) -> Tensor:
    """log Σ [C, 1] of exponentials [C, V] of relative logits; the largest, 1, is overwritten by 0.

    Where it has nearly all of the sum, what the others add to 1 would be lost in a sum of all.
    """
    return exponentials.scatter_(1, top_id, 0.0).sum(dim=1, keepdim=True).log1p_()


def _values(logits: Tensor, top_id: Tensor, tokens: Tensor, has_entropy: bool) -> Tensor:
    """Log-probability and entropy [2, C] from relative logits [C, V], which are overwritten."""
    sampled = logits.gather(1, tokens[:, None])
    exponentials = logits.exp() if has_entropy else logits.exp_()
    log_sum = _log_sum(exponentials, top_id)
    entropy = torch.zeros_like(log_sum)
    if has_entropy:  # the largest logit, relative to itself, adds 0 to the mean
        mean = exponentials.mul_(logits.clamp_(min=_IMPOSSIBLE)).sum(dim=1, keepdim=True)
        entropy = log_sum - mean / log_sum.exp()
    return torch.cat([sampled - log_sum, entropy], dim=1).t()


def _grads(
    chunks: Chunks,
    factors: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    *,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of hidden states [n, D], weight [V, D] and bias [V], where needed, for factors [2, n]."""
    count, cast = hidden.shape[0], weight.to(chunks.dtype)
    out = chunks.buffer(count, weight)
    objective, grad_dtype = chunks.objective, grad_logits_dtype(hidden.device, chunks.dtype)
    factors = factors.to(out.dtype) * (objective.logit_scale / objective.temperature)
    loss_scale = None
    if grad_dtype == torch.float16:
        loss_scale = fp16_loss_scale(factors.abs().sum(dim=0), 1.0)
        factors = factors * loss_scale
    # fp16 gradients may underflow before a gradient scaler has seen them: they are kept in float32.
    hidden_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    shapes = (hidden.shape, hidden_dtype), (weight.shape, out.dtype), (weight.shape[:1], out.dtype)
    grads: list[Tensor | None] = [
        torch.zeros(shape, dtype=dtype, device=hidden.device) if need else None
        for need, (shape, dtype) in zip(needed, shapes, strict=True)
    ]
    for chunk in chunks.slices(count):
        part = hidden[chunk].to(chunks.dtype)
        grad = _grad_logits(chunks, factors[:, chunk], part, cast, bias, tokens[chunk], out)
        scale = None
        if grad_dtype != grad.dtype:
            exact, grad = grad, grad.to(grad_dtype)
            scale = row_scale(exact.square().sum(dim=1), (exact * grad).sum(dim=1))
        if grads[0] is not None:
            grad_hidden_from_logits(grad, cast, grads[0][chunk], scale)
        if grads[1] is not None:
            accumulate_grad_weight(grad, part, grads[1], scale, overwrite=False)
        if grads[2] is not None:
            accumulate_grad_bias(grad, grads[2], scale)
    return grads if loss_scale is None else [None if grad is None else grad / loss_scale for grad in grads]


def _grad_logits(
    chunks: Chunks,
    factors: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    out: Tensor,
) -> Tensor:
    """The gradient [C, V] w.r.t. the products of hidden states [C, D] and weight, for factors [2, C]."""
    logits, top, top_id = chunks.logits(hidden, weight, bias, out)
    log_p = (logits - _log_sum(logits.exp(), top_id)).clamp_(min=_IMPOSSIBLE)
    p = log_p.exp()
    of_token, of_entropy = factors[:, :, None]
    entropy = -(p * log_p).sum(dim=1, keepdim=True)
    share = (log_p + entropy).mul_(of_entropy)
    token = tokens[:, None]
    # 1 − p as −expm1(log p): no difference of near equals where p is close to 1.
    at_token = -of_token * log_p.gather(1, token).expm1() - p.gather(1, token) * share.gather(1, token)
    grad = share.add_(of_token).mul_(p).neg_().scatter_(1, token, at_token)
    return softcap_backward_(grad, logits + top, chunks.objective)
