"""The loop over chunks of tokens: products, loss, gradient of the logits, and its products with hidden and weight.

The loss weights are known before the gradient is needed, so the gradient is computed in the forward pass: one
product for the student, one for the teacher, one for the gradient of the hidden states, one for that of the head's
weight if it is trainable. Nothing is computed twice, and no [N, V] tensor ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from sdpo.fused._rows import RowChunk, factors_of_rows, kept_tokens, row_chunks
from sdpo.fused._types import (
    GradLogits,
    LMHead,
    ModelChunk,
    Objective,
    Operands,
    Plan,
    PolicyInputs,
    TokenInputs,
    TokenStats,
)
from sdpo.given import TeacherTopK


class LossAndGrads(NamedTuple):
    """Statistics of the active tokens and the gradients of the total; None where not asked for."""

    stats: Tensor  # [len(TokenStats), n]
    grad_hidden: Tensor | None  # [N, D], zero at inactive positions
    grad_weight: Tensor | None  # [V, D]
    grad_bias: Tensor | None  # [V]


class GradWeights(NamedTuple):
    """Weights [n] that replace those of the loss in the gradients (not in the statistics)."""

    per_token: Tensor  # of the divergence
    policy_loss: Tensor | None  # None without a policy gradient


def loss_and_grads(
    operands: Operands, objective: Objective, plan: Plan, grad_weights: GradWeights | None = None
) -> LossAndGrads:
    """Go through all active tokens once."""
    with torch.no_grad(), torch.autocast(operands.student.hidden.device.type, enabled=False):
        return _ChunkLoop(operands, objective, plan, grad_weights).run()


class _ChunkLoop:
    """The buffers of one traversal of the tokens, and its steps in the order in which they run.

    A chunk has the tokens whose logits exist at a time, a block the chunks whose logit gradients enter one product
    with the hidden states.
    """

    def __init__(
        self, operands: Operands, objective: Objective, plan: Plan, grad_weights: GradWeights | None
    ) -> None:
        self.operands, self.objective, self.plan, self.grad_weights = operands, objective, plan, grad_weights
        hidden, weight, _ = operands.student
        self.device, self.vocabulary = hidden.device, weight.shape[0]
        self.dtype = operand_dtype(hidden, weight, plan.autocast_dtype)
        self.working = working_dtype(self.dtype)
        self.grad_dtype = grad_logits_dtype(self.device, self.dtype)
        self.count = hidden.shape[0] if operands.active is None else operands.active.shape[0]
        self.chunk_size = max(1, min(plan.chunk_size, self.count))
        self.row_chunks: dict[int, RowChunk] = {}  # by their first token
        if plan.row_lengths is not None and objective.row_factors is not None:
            fraction = objective.row_factors.fraction
            chunks = row_chunks(plan.row_lengths, self.chunk_size, fraction)
            self.row_chunks = {chunk.tokens.start: chunk for chunk in chunks}
        self.cast_weights: dict[tuple[object, ...], Tensor] = {}
        # The first measurement allocates memory of its own, so it comes before the buffers.
        for head in (operands.student, operands.teacher, operands.reference):
            if head is not None:
                self.accumulation_bias(head)
        self.loss_scale = self.compute_loss_scale()
        self.stats = torch.empty(len(TokenStats._fields), self.count, dtype=self.working, device=self.device)
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        if plan.grad_hidden:
            # fp16 gradients may underflow before a gradient scaler has seen them: they are kept in float32.
            dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
            writes_all = operands.active is None and not self.skips_tokens
            allocate = torch.empty if writes_all else torch.zeros
            self.grad_hidden = allocate(hidden.shape, dtype=dtype, device=self.device)
        if plan.grad_weight:
            all_bf16 = self.grad_dtype == weight.dtype == torch.bfloat16
            dtype = torch.bfloat16 if all_bf16 else self.working
            allocate = torch.empty if self.count else torch.zeros
            self.grad_weight = allocate(weight.shape, dtype=dtype, device=self.device)
        if plan.grad_bias:
            self.grad_bias = torch.zeros(self.vocabulary, dtype=self.working, device=self.device)

        self.student_products = self.products_buffer()
        self.teacher_products = self.student_products if plan.shared_buffer else self.products_buffer()
        self.reference_products = self.products_buffer() if plan.separate_reference else None
        self.block_size = self.chunk_size
        self.grad_values, self.row_scale = self.student_products, None
        if self.grad_dtype != self.working:
            self.block_size = max(self.chunk_size, min(plan.grad_block_size, self.count))
            if self.needs_grad:
                shape = (self.block_size, self.vocabulary)
                self.grad_values = torch.empty(shape, dtype=self.grad_dtype, device=self.device)
                self.row_scale = self.stats.new_empty(self.block_size)

    @property
    def needs_grad(self) -> bool:
        """Whether any gradient is computed."""
        return self.plan.grad_hidden or self.plan.grad_weight or self.plan.grad_bias

    @property
    def skips_tokens(self) -> bool:
        """Whether tokens without a gradient, because their row keeps only some, are left out of a product."""
        factors, policy = self.objective.row_factors, self.operands.policy_weights
        return (
            bool(self.row_chunks) and policy is None and factors is not None and factors.fraction is not None
        )

    def run(self) -> LossAndGrads:
        """Compute all chunks."""
        for chunks in self.blocks():
            block = slice(chunks[0].start, chunks[-1].stop)
            for chunk in chunks:
                grad_logits = self.grad_logits(chunk, block) if self.needs_grad else None
                self.plan.chunk_loss(
                    partial(self.project_student, chunk),
                    partial(self.project_teacher, chunk),
                    self.token_inputs(chunk),
                    self.objective,
                    self.stats[:, chunk],
                    grad_logits,
                )
                if grad_logits is not None:
                    self.write_grad_hidden(chunk, grad_logits)
            self.accumulate_grad_head(block, self.grad_logits(block, block))
        if self.loss_scale is not None:
            for gradient in (self.grad_hidden, self.grad_weight, self.grad_bias):
                if gradient is not None:
                    gradient.div_(self.loss_scale)
        return LossAndGrads(self.stats, self.grad_hidden, self.grad_weight, self.grad_bias)

    def blocks(self) -> Iterator[list[slice]]:
        """The chunks of each block; with row factors a chunk has whole rows."""
        if self.plan.row_lengths is None:
            for block in _slices(0, self.count, self.block_size):
                yield list(_slices(block.start, block.stop, self.chunk_size))
            return
        chunks: list[slice] = []
        for chunk in self.row_chunks.values():
            if chunks and chunk.tokens.stop - chunks[0].start > self.block_size:
                yield chunks
                chunks = []
            chunks.append(chunk.tokens)
        if chunks:
            yield chunks

    def project_student(self, chunk: slice) -> ModelChunk:
        """The student's products [C, V]."""
        return self.project(self.operands.student, chunk, self.student_products)

    def project_teacher(self, chunk: slice) -> ModelChunk | TeacherTopK:
        """The teacher's products [C, V]; of a trust region, those of its reference too, or of both models mixed.

        Of a teacher whose top K are given, those [C, K].
        """
        teacher, reference, topk = self.operands.teacher, self.operands.reference, self.operands.teacher_topk
        if teacher is None:
            assert topk is not None
            return TeacherTopK(*(self.active_tokens(values, chunk) for values in topk))
        if reference is None:
            return self.project(teacher, chunk, self.teacher_products)
        if self.reference_products is not None:
            start = self.project(reference, chunk, self.reference_products)
            live = self.project(teacher, chunk, self.teacher_products)
            return live._replace(reference=start.products, reference_bias=start.bias)
        # Through one linear head, the mixture of the logits is the logits of the mixed hidden states. These are not
        # rounded: in 16 bits that would change the loss by a few thousandths.
        dtype = operand_dtype(teacher.hidden, teacher.weight, self.plan.autocast_dtype)
        reference_hidden, live_hidden = (
            self.active_tokens(hidden, chunk).to(dtype).to(working_dtype(dtype))
            for hidden in (reference.hidden, teacher.hidden)
        )
        assert self.objective.trust_region_coef is not None
        mixed = reference_hidden.lerp(live_hidden, self.objective.trust_region_coef)
        return self.project_hidden(mixed, teacher, dtype, self.teacher_products)

    def project(self, head: LMHead, chunk: slice, out: Tensor) -> ModelChunk:
        """The products of a chunk's hidden states, in the first rows of ``out``."""
        dtype = operand_dtype(head.hidden, head.weight, self.plan.autocast_dtype)
        return self.project_hidden(self.active_tokens(head.hidden, chunk).to(dtype), head, dtype, out)

    def project_hidden(self, hidden: Tensor, head: LMHead, dtype: torch.dtype, out: Tensor) -> ModelChunk:
        """The products of hidden states [C, D] with a head's weight in ``dtype``."""
        weight = self.cast_weight(head.weight, dtype)
        products = project(hidden, weight, out[: hidden.shape[0]])
        return ModelChunk(products, head.bias, hidden, weight, self.accumulation_bias(head))

    def token_inputs(self, chunk: slice) -> TokenInputs:
        """The tokens and weights [C] of a chunk."""
        ops = self.operands
        return TokenInputs(
            tokens=self.active_tokens(ops.tokens, chunk),
            old_log_probs=self.active_tokens(ops.old_log_probs, chunk),
            weights=self.active_tokens(ops.weights, chunk),
            grad_weights=None
            if self.grad_weights is None
            else self.grad_weights.per_token[chunk].contiguous(),
            loss_scale=self.loss_scale,
            policy=self.policy_inputs(chunk),
            row_factors=self.row_factors(chunk),
        )

    def row_factors(self, chunk: slice) -> Callable[[Tensor], Tensor] | None:
        """The factors of a chunk's tokens that their rows determine."""
        factors = self.objective.row_factors
        if factors is None or not self.row_chunks:
            return None
        active = self.operands.active
        positions = None if active is None else active[chunk]
        return partial(factors_of_rows, factors, positions, self.row_chunks[chunk.start].rows)

    def policy_inputs(self, chunk: slice) -> PolicyInputs | None:
        """The policy gradient's share of ``token_inputs``."""
        ops = self.operands
        if ops.advantages is None or ops.policy_weights is None:
            return None
        weights = self.active_tokens(ops.policy_weights, chunk)
        if self.grad_weights is not None and self.grad_weights.policy_loss is not None:
            weights = self.grad_weights.policy_loss[chunk].contiguous()
        return PolicyInputs(self.active_tokens(ops.advantages, chunk), weights)

    def grad_logits(self, tokens: slice, block: slice) -> GradLogits:
        """Where the gradient of ``tokens``, some of a block, is written."""
        part = slice(tokens.start - block.start, tokens.stop - block.start)
        return GradLogits(self.grad_values[part], None if self.row_scale is None else self.row_scale[part])

    def write_grad_hidden(self, chunk: slice, grad_logits: GradLogits) -> None:
        """Multiply the logit gradients of a chunk by the student's weight."""
        total, active = self.grad_hidden, self.operands.active
        if total is None:
            return
        weight = self.cast_weight(self.operands.student.weight, self.dtype)
        (values, row_scale), positions = grad_logits, None if active is None else active[chunk]
        # No products are needed any more.
        scratch = self.teacher_products
        kept = self.row_chunks[chunk.start].kept if self.skips_tokens else chunk.stop - chunk.start
        if kept < chunk.stop - chunk.start:
            rows = kept_tokens(self.stats[:, chunk], kept)
            values, scratch = _gather_rows(values, rows, scratch)
            row_scale = None if row_scale is None else row_scale[rows]
            positions = rows + chunk.start if positions is None else positions[rows]
        out = total[chunk] if positions is None else total.new_empty(kept, total.shape[1])
        grad_hidden_from_logits(values, weight, out, row_scale, scratch=scratch)
        if positions is not None:
            total.index_copy_(0, positions, out)

    def accumulate_grad_head(self, block: slice, grad_logits: GradLogits) -> None:
        """Add the gradients of weight and bias that the tokens of a block contribute."""
        if self.grad_weight is not None:
            hidden = self.active_tokens(self.operands.student.hidden, block).to(self.dtype)
            accumulate_grad_weight(
                grad_logits.values,
                hidden,
                self.grad_weight,
                grad_logits.row_scale,
                overwrite=block.start == 0,
            )
        if self.grad_bias is not None:
            accumulate_grad_bias(grad_logits.values, self.grad_bias, grad_logits.row_scale)

    @overload
    def active_tokens(self, values: Tensor, chunk: slice) -> Tensor: ...
    @overload
    def active_tokens(self, values: None, chunk: slice) -> None: ...
    def active_tokens(self, values: Tensor | None, chunk: slice) -> Tensor | None:
        """Of values [N, ...], those of a chunk's active tokens; contiguous, since kernels read no strides."""
        if values is None:
            return None
        active = self.operands.active
        return (values[chunk] if active is None else values.index_select(0, active[chunk])).contiguous()

    def accumulation_bias(self, head: LMHead) -> float:
        """That of a head's products."""
        dtype = operand_dtype(head.hidden, head.weight, self.plan.autocast_dtype)
        return accumulation_bias(self.device, dtype, head.weight.shape[1])

    def cast_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A head's weight in the dtype of the products, converted at most once, also if models share its memory."""
        if weight.dtype == dtype:
            return weight
        key = (_address(weight), weight.shape, weight.stride(), weight.dtype, dtype)
        if key not in self.cast_weights:
            self.cast_weights[key] = weight.to(dtype)
        return self.cast_weights[key]

    def compute_loss_scale(self) -> Tensor | None:
        """The scale of fp16 gradients; None where they have the range of float32."""
        if self.grad_dtype != torch.float16:
            return None
        everything = slice(0, self.count)
        weights = None if self.grad_weights is None else self.grad_weights.per_token
        bound = 1.0
        if weights is None:
            weights = self.active_tokens(self.operands.weights, everything)
            bound = 1.0 if self.objective.is_clip is None else self.objective.is_clip
        if weights is None:
            weights = torch.ones(1, device=self.device)
        factors = self.objective.row_factors
        if factors is not None and factors.fraction is not None:
            bound /= factors.fraction
        policy = self.policy_inputs(everything)
        if policy is not None:
            # A ratio of 1; larger ones, which negative advantages do not clip, use the headroom above the target.
            weights = weights.abs() * bound + (policy.grad_weights * policy.advantages).abs()
            bound = 1.0
        return fp16_loss_scale(weights, bound)

    def products_buffer(self) -> Tensor:
        """A buffer [C, V] for the products of one model."""
        return torch.empty(self.chunk_size, self.vocabulary, dtype=self.working, device=self.device)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for low in range(start, stop, size):
        yield slice(low, min(low + size, stop))


def _gather_rows(values: Tensor, rows: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of values [C, V], copied to the start of ``scratch``, and what is left of it.

    To memory of their own where the values are in ``scratch``, or do not fit.
    """
    size = len(rows) * values.shape[1]
    taken = -(-size * values.itemsize // scratch.itemsize)
    if values.data_ptr() == scratch.data_ptr() or taken > scratch.numel():
        return values.index_select(0, rows), scratch
    flat = scratch.view(-1)
    out = flat[:taken].view(values.dtype)[:size].view(len(rows), values.shape[1])
    return torch.index_select(values, 0, rows, out=out), flat[taken:]


def _address(tensor: Tensor) -> int:
    """Address of a tensor's memory; its identity inside a transform of torch.func, where it has no address."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return id(tensor)
