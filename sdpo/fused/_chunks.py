"""The loop over chunks of tokens: products, loss, gradient of the logits, and its products with head and hidden.

The loss weights are known before the gradient is, so the gradient is made right here, in the forward pass: one
product for the student, one for the teacher, one for the gradient of the hidden states, one for that of the head
if it learns. Nothing is computed twice, and no [N, V] tensor ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, overload

import torch
from torch import Tensor

from sdpo.fused._matmul import (
    accumulate_grad_bias,
    accumulate_grad_weight,
    accumulation_bias,
    fp16_loss_scale,
    grad_hidden_from_logits,
    grad_logits_dtype,
    operand_dtype,
    project,
    working_dtype,
)
from sdpo.fused._types import GradLogits, Make, ModelChunk, Objective, TokenInputs, TokenStats

# (student, teacher, rows, recipe, stats, slope): fills stats [len(TokenStats), c] and, unless None, slope.
Backend = Callable[[Make, Make, TokenInputs, Objective, Tensor, GradLogits | None], None]


class Operands(NamedTuple):
    """The tensors of the fused loss, tokens flattened to one dimension N."""

    student_hidden: Tensor  # [N, D]
    student_head: Tensor  # [V, D]
    student_bias: Tensor | None  # [V]
    teacher_hidden: Tensor  # [N, D'], D' the teacher's own
    teacher_head: Tensor  # [V, D']
    teacher_bias: Tensor | None  # [V]
    reference_hidden: Tensor | None  # [N, D'] hidden states of the trust region's centre
    reference_head: Tensor | None  # [V, D']
    reference_bias: Tensor | None  # [V]
    tokens: Tensor  # [N] int64
    active: Tensor | None  # [n] int64, positions with loss; None if all N have it
    old_log_probs: Tensor | None  # [N]
    extra_weights: Tensor | None  # [N]


class Plan(NamedTuple):
    """How the work is cut, and what it must produce."""

    backend: Backend
    chunk_rows: int  # tokens whose logits exist at a time
    slope_rows: int  # tokens whose logit gradients are collected before the head's product
    take_turns: bool  # both models' logits lie in one buffer, one after the other
    own_reference: bool  # the trust region's centre needs a product of its own
    autocast: torch.dtype | None  # dtype of the products, if autocast was on when the loss was called
    hidden: bool  # make the gradient of the student's hidden states
    head: bool  # and of its head
    bias: bool  # and of its bias


class Outcome(NamedTuple):
    """Loss statistics [len(TokenStats), n] and the gradients of Σ weights · per_token."""

    stats: Tensor
    hidden: Tensor | None  # [N, D], zero at inactive positions
    head: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]


def run(operands: Operands, recipe: Objective, plan: Plan, grad_weights: Tensor | None = None) -> Outcome:
    """Go through all active tokens once.

    ``grad_weights`` [n] replace the loss weights in the gradients (not in the statistics).
    """
    with torch.no_grad(), torch.autocast(operands.student_hidden.device.type, enabled=False):
        return _Pass(operands, recipe, plan, grad_weights).run()


class _Pass:
    """The buffers of one pass over the tokens."""

    def __init__(
        self, operands: Operands, recipe: Objective, plan: Plan, grad_weights: Tensor | None
    ) -> None:
        self.operands, self.recipe, self.plan, self.grad_weights = operands, recipe, plan, grad_weights
        hidden, head = operands.student_hidden, operands.student_head
        self.device = hidden.device
        self.dtype = operand_dtype(hidden, head, plan.autocast)
        self.working = working_dtype(self.dtype)
        self.count = hidden.shape[0] if operands.active is None else operands.active.shape[0]
        self.vocabulary = head.shape[0]
        self.casts: dict[tuple[object, ...], Tensor] = {}
        # The first time this takes memory itself, so it comes before the buffers do.
        for states, matrix in (
            (hidden, head),
            (operands.teacher_hidden, operands.teacher_head),
            (operands.reference_hidden, operands.reference_head),
        ):
            if states is not None and matrix is not None:
                accumulation_bias(self.device, operand_dtype(states, matrix, plan.autocast), matrix.shape[1])
        self.loss_scale = self._loss_scale()
        self.stats = torch.empty(len(TokenStats._fields), self.count, dtype=self.working, device=self.device)
        self.hidden_gradient: Tensor | None = None
        self.head_gradient: Tensor | None = None
        self.bias_gradient: Tensor | None = None
        if plan.hidden:
            # fp16 gradients may underflow before a gradient scaler has seen them: they wait in float32.
            kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
            make = torch.empty if operands.active is None else torch.zeros
            self.hidden_gradient = make(hidden.shape, dtype=kept, device=self.device)
        if plan.head:
            slope_dtype = grad_logits_dtype(self.device, self.dtype)
            kept = torch.bfloat16 if slope_dtype == head.dtype == torch.bfloat16 else self.working
            make = torch.empty if self.count else torch.zeros
            self.head_gradient = make(head.shape, dtype=kept, device=self.device)
        if plan.bias:
            self.bias_gradient = torch.zeros(self.vocabulary, dtype=self.working, device=self.device)

    def run(self) -> Outcome:
        plan, width = self.plan, max(1, min(self.plan.chunk_rows, self.count))
        buffers = (1 if plan.take_turns else 2) + plan.own_reference
        self.products = [self._buffer(width, self.working) for _ in range(buffers)]
        slope_dtype = grad_logits_dtype(self.device, self.dtype)
        # In the working dtype a slope takes the place of the logits it came from, chunk by chunk.
        in_place = slope_dtype == self.working
        block = width if in_place else max(width, min(plan.slope_rows, self.count))
        makes_slope = plan.hidden or plan.head or plan.bias
        slopes = self.products[0] if in_place or not makes_slope else self._buffer(block, slope_dtype)
        gains = None if in_place or not makes_slope else self.stats.new_empty(block)
        for start in range(0, self.count, block):
            stop = min(start + block, self.count)
            for low in range(start, stop, width):
                high = min(low + width, stop)
                slope = None
                if makes_slope:
                    slope = self._slope(slopes, gains, low - start, high - start)
                self._chunk(low, high, slope)
                if slope is not None:
                    self._push_hidden(low, high, slope)
            self._push_head(start, stop, self._slope(slopes, gains, 0, stop - start))
        if self.loss_scale is not None:
            for gradient in (self.head_gradient, self.bias_gradient):
                if gradient is not None:
                    gradient.div_(self.loss_scale)
        return Outcome(self.stats, self.hidden_gradient, self.head_gradient, self.bias_gradient)

    @staticmethod
    def _slope(slopes: Tensor, gains: Tensor | None, low: int, high: int) -> GradLogits:
        return GradLogits(slopes[low:high], None if gains is None else gains[low:high])

    def _chunk(self, low: int, high: int, slope: GradLogits | None) -> None:
        """Logits, loss and slope of the tokens low to high."""
        ops = self.operands
        rows = TokenInputs(
            tokens=self._take(ops.tokens, low, high),
            old_log_probs=self._take(ops.old_log_probs, low, high),
            extra_weights=self._take(ops.extra_weights, low, high),
            grad_weights=None if self.grad_weights is None else self.grad_weights[low:high].contiguous(),
            loss_scale=self.loss_scale,
        )
        stats = self.stats[:, low:high]
        make_student, make_teacher = (partial(make, low, high) for make in (self._student, self._teacher))
        self.plan.backend(make_student, make_teacher, rows, self.recipe, stats, slope)

    def _push_hidden(self, low: int, high: int, slope: GradLogits) -> None:
        """Send the slopes of the tokens low to high on to their hidden states."""
        gradient, active = self.hidden_gradient, self.operands.active
        if gradient is None:
            return
        head = self._cast(self.operands.student_head, self.dtype)
        if active is None and self.loss_scale is None:
            grad_hidden_from_logits(slope.values, head, gradient[low:high], slope.row_scale, self.products[0])
            return
        rows = gradient.new_empty(high - low, gradient.shape[1])
        grad_hidden_from_logits(slope.values, head, rows, slope.row_scale, self.products[0])
        if self.loss_scale is not None:
            rows = rows.div_(self.loss_scale)
        positions = torch.arange(low, high, device=self.device) if active is None else active[low:high]
        gradient.index_copy_(0, positions, rows)

    def _push_head(self, start: int, stop: int, slope: GradLogits) -> None:
        """Send the slopes of the tokens start to stop on to head and bias."""
        if self.head_gradient is not None:
            hidden = self._take(self.operands.student_hidden, start, stop).to(self.dtype)
            accumulate_grad_weight(
                slope.values, hidden, self.head_gradient, slope.row_scale, first=start == 0
            )
        if self.bias_gradient is not None:
            accumulate_grad_bias(slope.values, self.bias_gradient, slope.row_scale)

    def _student(self, low: int, high: int) -> ModelChunk:
        ops = self.operands
        return self._side(ops.student_hidden, ops.student_head, ops.student_bias, low, high, self.products[0])

    def _teacher(self, low: int, high: int) -> ModelChunk:
        """The teacher, or what lies between it and the centre of its trust region."""
        ops = self.operands
        model = (ops.teacher_hidden, ops.teacher_head, ops.teacher_bias)
        products = self.products[0 if self.plan.take_turns else 1]
        if ops.reference_hidden is None:
            return self._side(*model, low, high, products)
        if self.plan.own_reference and ops.reference_head is not None:
            other = (ops.reference_hidden, ops.reference_head, ops.reference_bias)
            reference = self._side(*other, low, high, self.products[-1])
            teacher = self._side(*model, low, high, products)
            return teacher._replace(reference=reference.products, reference_bias=reference.bias)
        # The logits in between are, through one linear head, those of the states in between.
        dtype = operand_dtype(ops.teacher_hidden, ops.teacher_head, self.plan.autocast)
        centre, live = (
            self._take(hidden, low, high).to(dtype).to(working_dtype(dtype))
            for hidden in (ops.reference_hidden, ops.teacher_hidden)
        )
        assert self.recipe.trust_region_coef is not None
        # Not rounded: what 16 bits would take from the mixture is a few thousandths of the loss.
        states = centre.lerp(live, self.recipe.trust_region_coef)
        return self._product(states, self._cast(ops.teacher_head, dtype), ops.teacher_bias, products)

    def _side(
        self, hidden: Tensor, head: Tensor, bias: Tensor | None, low: int, high: int, out: Tensor
    ) -> ModelChunk:
        dtype = operand_dtype(hidden, head, self.plan.autocast)
        return self._product(self._take(hidden, low, high).to(dtype), self._cast(head, dtype), bias, out)

    def _product(self, states: Tensor, head: Tensor, bias: Tensor | None, out: Tensor) -> ModelChunk:
        lost = accumulation_bias(self.device, head.dtype, head.shape[1])
        return ModelChunk(project(states, head, out[: states.shape[0]]), bias, states, head, lost)

    @overload
    def _take(self, values: Tensor, low: int, high: int) -> Tensor: ...
    @overload
    def _take(self, values: None, low: int, high: int) -> None: ...
    def _take(self, values: Tensor | None, low: int, high: int) -> Tensor | None:
        """The active tokens low to high; contiguous, since an expanded tensor has no rows to step through."""
        if values is None:
            return None
        active = self.operands.active
        return (values[low:high] if active is None else values.index_select(0, active[low:high])).contiguous()

    def _cast(self, head: Tensor, dtype: torch.dtype) -> Tensor:
        """The head in the products' dtype: converted at most once, also where both models share its memory."""
        if head.dtype == dtype:
            return head
        key = (_address(head), head.shape, head.stride(), head.dtype, dtype)
        if key not in self.casts:
            self.casts[key] = head.to(dtype)
        return self.casts[key]

    def _buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, self.vocabulary, dtype=dtype, device=self.device)

    def _loss_scale(self) -> Tensor | None:
        if grad_logits_dtype(self.device, self.dtype) != torch.float16:
            return None
        weights = self.grad_weights
        if weights is None:
            weights = self._take(self.operands.extra_weights, 0, self.count)
        if weights is None:
            weights = torch.ones(1, device=self.device)
        bound = self.recipe.is_clip if self.recipe.is_clip is not None and self.grad_weights is None else 1.0
        return fp16_loss_scale(weights, bound)


def _address(tensor: Tensor) -> int:
    """Where a tensor lies. Inside a transform of torch.func it lies nowhere, and who it is must do."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return id(tensor)
