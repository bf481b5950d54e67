"""The data structures of the fused loss: its inputs, the plan of the work, and what a backend reads and writes.

Shapes: N tokens (flattened), n of them active, C tokens of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from sdpo.given import TeacherTopK
from sdpo.token_factors import TokenWeights

Support = Literal["student", "teacher", "full", "sampled", "given"]
Tail = Literal["bucket", "renormalize"]
SurrogateKind = Literal["clipped", "cispo", "sapo"]

# The gradient of the logits may be written before the scale of its row is known only in this 16-bit format: it has
# the range of float32.
UNSCALED_GRAD_DTYPE = torch.bfloat16


class LMHead(NamedTuple):
    """Hidden states and the LM head that turns them into logits: ``hidden @ weight.T + bias``.

    Args:
        hidden: [..., D] floating, the input of the LM head.
        weight: [V, D] floating, the weight of the output embedding.
        bias: [V] floating; None for a head without bias.

    Source: SDPO, arXiv 2601.20802, section 2.

    Examples:
        >>> import torch
        >>> head = LMHead(torch.ones(2, 3), torch.eye(4, 3))
        >>> tuple((head.hidden @ head.weight.T).shape), head.bias
        ((2, 4), None)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Surrogate:
    """The policy loss as a function of the ratio to the old policy, and its Python scalars."""

    kind: SurrogateKind
    clip_low: float  # half-widths of the range of the ratio
    clip_high: float
    sapo_temperatures: tuple[float, float]  # of positive and of other advantages; only "sapo" reads them


@dataclass(frozen=True)
class RowFactors:
    """Factors of the divergence that depend on the statistics of a whole row; see ``token_factors``."""

    length: int  # T, the tokens of a row, active or not
    fraction: float | None
    weigh: TokenWeights | None


@dataclass(frozen=True)
class Objective:
    """The Python scalars of the objective, the same for every chunk."""

    support: Support
    k: int | None  # an int in [1, V) with support "student" or "teacher", in [1, V] with "given", else None
    tail: Tail | None  # likewise
    alpha: float
    is_clip: float | None
    temperature: float
    softcap: float | None
    logit_scale: float
    trust_region_coef: float | None
    surrogate: Surrogate | None = None  # of the policy gradient; None: there is none
    row_factors: RowFactors | None = None  # None: the weights are known before the pass


class ModelChunk(NamedTuple):
    """One model's share of a chunk."""

    products: Tensor  # [C, V] hidden @ weight.T, working dtype; scratch that the backend may overwrite
    bias: Tensor | None  # [V]
    hidden: Tensor | None = (
        None  # [C, D] factors of the products, with which a backend may recompute some of them
    )
    weight: Tensor | None = None  # [V, D]
    accumulation_bias: float = 0.0  # relative error of the products: by how much of itself each is too small
    reference: Tensor | None = None  # [C, V] products of the trust region's reference, if not mixed in
    reference_bias: Tensor | None = None  # [V]


class PolicyInputs(NamedTuple):
    """What a chunk's policy gradient needs beside its log-probabilities."""

    advantages: Tensor  # [C]
    grad_weights: Tensor  # [C] weights of the policy loss in the gradient


class TokenInputs(NamedTuple):
    """The tokens of a chunk, and the weights that are known before its logits are."""

    tokens: Tensor  # [C] int64
    old_log_probs: Tensor | None  # [C]
    weights: Tensor | None  # [C] the caller's weights
    grad_weights: Tensor | None  # [C] weights of the gradient; None: the weights of the loss
    loss_scale: Tensor | None  # [] factor on the gradient of the logits, against underflow in fp16
    policy: PolicyInputs | None = None
    # Further factors [C] of the divergence, from the statistics [len(TokenStats), C] of the chunk's whole rows.
    row_factors: Callable[[Tensor], Tensor] | None = None

    def weighed(self, stats: Tensor) -> TokenInputs:
        """The inputs with the row factors among the weights, once stats are known but for those."""
        if self.row_factors is None:
            return self
        factors = self.row_factors(stats)
        weights = factors if self.weights is None else factors * self.weights.to(factors.dtype)
        return self._replace(weights=weights, row_factors=None)


class GradLogits(NamedTuple):
    """Where a backend writes the gradient w.r.t. a chunk's logits: ``row_scale[:, None] * values``."""

    values: Tensor  # [C, V] working dtype, or the 16-bit dtype of the inputs of the products
    row_scale: Tensor | None  # [C] working dtype, with 16-bit values; None: 1


class AtSupport(NamedTuple):
    """One model's distribution at a support of K tokens and the tail."""

    log_probs: Tensor  # [C, K]
    log_tail: Tensor  # [C] outside the support; −inf if nothing is outside
    log_mass: Tensor  # [C] on the support
    token_log_prob: Tensor  # [C] of the sampled token
    entropy: Tensor  # [C] over the full vocabulary


class TokenStats(NamedTuple):
    """Statistics of a chunk's tokens, [C] each in the working dtype, without gradient."""

    per_token: Tensor  # divergence, unweighted
    weights: Tensor  # importance weight × the caller's weight
    log_probs: Tensor  # student's log-probability of the sampled token
    teacher_log_probs: Tensor  # teacher's log-probability of the sampled token
    student_entropy: Tensor  # over the full vocabulary
    teacher_entropy: Tensor
    student_topk_mass: Tensor  # probability on the support
    teacher_topk_mass: Tensor
    student_log_tail: Tensor  # log-probability outside the support; −inf if nothing is outside
    teacher_log_tail: Tensor
    clipped: Tensor  # 1 where the importance weight was truncated at is_clip


class Operands(NamedTuple):
    """The tensors of the fused loss, their leading dimensions flattened to N."""

    student: LMHead  # hidden [N, D]
    teacher: LMHead | None  # hidden [N, D'] with the teacher's own hidden size D'; None: its top K are given
    reference: LMHead | None  # that of a trust region, hidden [N, D']
    teacher_topk: TeacherTopK | None  # [N, K]; None: there is a teacher
    tokens: Tensor  # [N] int64
    active: Tensor | None  # [n] int64, positions where the loss mask is true; None: all N
    old_log_probs: Tensor | None  # [N]
    weights: Tensor | None  # [N] factors of the divergence besides the importance weight
    advantages: Tensor | None  # [N] of the policy gradient; None: there is none
    policy_weights: Tensor | None  # [N] factors of the policy loss; None likewise

    @overload
    def of_active(self, values: Tensor) -> Tensor: ...
    @overload
    def of_active(self, values: None) -> None: ...
    def of_active(self, values: Tensor | None) -> Tensor | None:
        """Of values [N, ...], those of the active tokens."""
        return values if values is None or self.active is None else values.index_select(0, self.active)

    def flatten(self) -> tuple[Tensor | None, ...]:
        """All tensors, the student's hidden, weight and bias first."""
        teacher, reference = (
            (None,) * 3 if head is None else head for head in (self.teacher, self.reference)
        )
        topk = (None, None) if self.teacher_topk is None else self.teacher_topk
        return (*self.student, *teacher, *reference, *topk, *self[4:])

    @classmethod
    def unflatten(cls, tensors: Sequence[Any]) -> Operands:
        """The inverse of ``flatten``."""
        student = LMHead(*tensors[:3])
        teacher, reference = (None if tensors[i] is None else LMHead(*tensors[i : i + 3]) for i in (3, 6))
        topk = None if tensors[9] is None else TeacherTopK(*tensors[9:11])
        return cls(student, teacher, reference, topk, *tensors[11:])


# Computes a model's products. With one buffer for both models (Plan.shared_buffer) it overwrites the other's.
Project = Callable[[], ModelChunk]
# The teacher's products, or what is given of it.
ProjectTeacher = Callable[[], ModelChunk | TeacherTopK]
# Projects student and teacher, fills stats [len(TokenStats), C] and, unless None, the gradient w.r.t. the logits.
ChunkLoss = Callable[[Project, ProjectTeacher, TokenInputs, Objective, Tensor, GradLogits | None], None]


class Plan(NamedTuple):
    """How the work is divided, and which gradients it produces."""

    chunk_loss: ChunkLoss
    chunk_size: int  # tokens whose logits exist at a time
    grad_block_size: int  # tokens whose logit gradients are collected for one product with the hidden states
    shared_buffer: bool  # the backend reads one model's products before it projects the other
    separate_reference: bool  # a trust region's reference needs products of its own
    autocast_dtype: torch.dtype | None  # dtype of the products under torch.autocast
    grad_hidden: bool  # compute the gradient of the student's hidden states
    grad_weight: bool  # of its LM head's weight
    grad_bias: bool  # of its LM head's bias
    row_lengths: tuple[int, ...] | None = None  # active tokens of each row; a chunk has whole rows then
