"""What a backend of the fused loss is told, and what it answers, for one chunk of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Support = Literal["student", "teacher", "sampled"]
Tail = Literal["bucket", "renormalize"]

# Of the 16-bit formats it alone has the range for slopes that lack a factor of their row: they can be written
# before that is known.
UNSCALED_GRAD_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Objective:
    """The Python scalars of the objective: the same for every chunk."""

    k: int | None  # None: every token of the vocabulary
    alpha: float
    tail: Tail
    support: Support
    is_clip: float | None
    temperature: float
    softcap: float | None
    logit_scale: float
    trust_region_coef: float | None


class ModelChunk(NamedTuple):
    """One model's half of a chunk."""

    products: Tensor  # [c, V] states × head, working dtype; a scratch buffer the backend may overwrite
    bias: Tensor | None  # [V]
    states: Tensor | None = None  # [c, D] and
    head: Tensor | None = None  # [V, D]: what the products were made of, where they can be made more exactly
    accumulation_bias: float = 0.0  # share of itself by which a product is too small
    reference: Tensor | None = None  # [c, V] products of the trust region's centre, if it needs its own
    reference_bias: Tensor | None = None  # [V]


# Makes a model's half. That of the model made before may be gone then, where `kernels.take_turns` says so.
Make = Callable[[], ModelChunk]


class TokenInputs(NamedTuple):
    """What is known of a chunk's tokens before its logits are."""

    tokens: Tensor  # [c] int64
    old_log_probs: Tensor | None  # [c]
    extra_weights: Tensor | None  # [c]
    grad_weights: Tensor | None  # [c] weights of the gradient, where they are not the loss weights
    loss_scale: Tensor | None  # [] factor on the gradient, against underflow in fp16


class GradLogits(NamedTuple):
    """Where a backend puts the gradient of a chunk's logits: ``row_scale · values``, row by row."""

    values: Tensor  # [c, V] working dtype, or the 16-bit dtype of the products
    row_scale: Tensor | None  # [c] working dtype, with ``values`` of 16 bits; None: 1


class TokenStats(NamedTuple):
    """What is known of a chunk's tokens afterwards, [c] each in the working dtype, none with a gradient."""

    per_token: Tensor  # divergence, unweighted
    weights: Tensor  # importance × extra weights
    log_probs: Tensor  # student's log-probability of the sampled token
    teacher_log_probs: Tensor  # teacher's log-probability of the sampled token
    student_entropy: Tensor  # over the full vocabulary
    teacher_entropy: Tensor
    student_topk_mass: Tensor  # probability on the support
    teacher_topk_mass: Tensor
    student_log_tail: Tensor  # log-probability outside the support; −inf if nothing is outside
    teacher_log_tail: Tensor
    clipped: Tensor  # 1 where the importance weight was cut at is_clip
