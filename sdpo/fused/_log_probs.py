"""Log-probabilities of given tokens, and entropies, from hidden states and an LM head, chunk by chunk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdpo._validate import check_int
from sdpo.fused._log_probs_autograd import GRAD_BUFFERS, Chunks, LogProbs
from sdpo.fused._matmul import accumulation_bias, autocast_dtype, operand_dtype, working_dtype
from sdpo.fused._plan import fitting_chunk_size
from sdpo.fused._types import LMHead, Objective, Operands
from sdpo.fused._validate import check_head, check_objective, check_operands, find_active, refuse_vmap


class LogProbsAndEntropy(NamedTuple):
    """What `fused_log_probs_and_entropy` returns, 0 where the loss mask is false.

    Args:
        log_probs: [...] nats, of the sampled tokens.
        entropy: [...] nats, of the distribution over the vocabulary.

    Source: SDPO, arXiv 2601.20802, section 2.

    Examples:
        >>> import torch
        >>> LogProbsAndEntropy(torch.zeros(1), torch.zeros(1)).entropy
        tensor([0.])
    """

    log_probs: Tensor
    entropy: Tensor


def fused_log_probs(
    student: LMHead,
    tokens: Tensor,
    *,
    loss_mask: Tensor,
    temperature: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probabilities of the sampled tokens, in the memory of one chunk of logits.

    ``log_softmax(logits / temperature)[tokens]``, with the logits of ``fused_distillation_loss``. They are its
    ``log_probs`` for one model alone, without a loss: what it takes as ``old_log_probs``, or, with their gradient,
    what an objective of one's own is a function of. Products accumulate in float32, and under ``torch.autocast``
    run in autocast's dtype.

    Args:
        student: LMHead of hidden [..., D], weight [V, D] and bias [V] or None, floating.
        tokens: [...] int64 or int32. Where ``loss_mask`` is false any id will do.
        loss_mask: [...] bool, true where a log-probability is needed.
        temperature: > 0, divides the logits: the sampling temperature of the rollout.
        softcap: > 0, bound of the logits (Gemma 2's final soft-cap). None: no bound.
        logit_scale: > 0, factor of the logits before the soft-cap.
        chunk_size: number of tokens whose logits exist at a time. None: chosen by the shapes and the device.

    Returns:
        [...] nats, float32 (float64 for float64 inputs); 0 where ``loss_mask`` is false.

    Raises:
        TypeError, ValueError: as ``fused_distillation_loss``.
        NotImplementedError: under ``torch.func.vmap``, in forward mode, and for second derivatives.

    Gradient: of hidden, weight and bias where they require it; the logits of a chunk are then computed twice.

    Source: SDPO, arXiv 2601.20802, section 2, the log-probabilities at sampling.

    Examples:
        >>> import torch
        >>> head = LMHead(torch.tensor([[[1.0, 0.0]]]), torch.eye(2))
        >>> fused_log_probs(head, torch.tensor([[0]]), loss_mask=torch.tensor([[True]]), temperature=1.0)
        tensor([[-0.3133]])
    """
    return _checked(
        student,
        tokens,
        loss_mask=loss_mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_size=chunk_size,
        has_entropy=False,
    ).log_probs


def fused_log_probs_and_entropy(
    student: LMHead,
    tokens: Tensor,
    *,
    loss_mask: Tensor,
    temperature: float,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> LogProbsAndEntropy:
    """Log-probabilities of the sampled tokens and entropies, in the memory of one chunk of logits.

    ``log p[tokens]`` and ``−Σ p·log p`` with ``log p = log_softmax(logits / temperature)``, as `fused_log_probs`.

    Args:
        student: LMHead of hidden [..., D], weight [V, D] and bias [V] or None, floating.
        tokens: [...] int64 or int32. Where ``loss_mask`` is false any id will do.
        loss_mask: [...] bool, true where both are needed.
        temperature: > 0, divides the logits.
        softcap: > 0, bound of the logits. None: no bound.
        logit_scale: > 0, factor of the logits before the soft-cap.
        chunk_size: number of tokens whose logits exist at a time. None: chosen by the shapes and the device.

    Returns:
        log_probs and entropy, [...] nats, float32 (float64 for float64 inputs); 0 where ``loss_mask`` is false.

    Raises:
        TypeError, ValueError: as ``fused_distillation_loss``.
        NotImplementedError: under ``torch.func.vmap``, in forward mode, and for second derivatives.

    Gradient: of hidden, weight and bias where they require it, from both; the logits of a chunk are computed twice.

    Source: SDPO, arXiv 2601.20802, section 2; the entropy is that of an entropy bonus (A3C, arXiv 1602.01783).

    Examples:
        >>> import torch
        >>> head = LMHead(torch.zeros(1, 1, 2), torch.eye(2))
        >>> mask = torch.tensor([[True]])
        >>> fused_log_probs_and_entropy(head, torch.tensor([[0]]), loss_mask=mask, temperature=1.0).entropy
        tensor([[0.6931]])
    """
    return _checked(
        student,
        tokens,
        loss_mask=loss_mask,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_size=chunk_size,
        has_entropy=True,
    )


def _checked(
    student: LMHead,
    tokens: Tensor,
    *,
    loss_mask: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    chunk_size: int | None,
    has_entropy: bool,
) -> LogProbsAndEntropy:
    """Of checked arguments; without ``has_entropy`` the entropies are 0."""
    objective = check_objective(
        vocabulary=check_head("student", student).weight.shape[0],
        given_k=None,
        support="sampled",
        k=None,
        tail=None,
        alpha=1.0,
        is_clip=None,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        trust_region_coef=None,
        surrogate=None,
    )
    operands = check_operands(
        student=student,
        teacher=student,
        reference=None,
        tokens=tokens,
        loss_mask=loss_mask,
        old_log_probs=None,
        weights=None,
        advantages=None,
        policy_weight=None,
        objective=objective,
    )
    if chunk_size is not None:
        meaning = "a number of tokens, or None for a choice"
        chunk_size = check_int("chunk_size", chunk_size, low=1, high=2**31, meaning=meaning)
    return _of_active(operands, objective, loss_mask, chunk_size, has_entropy)


# torch.compiler.disable, but without importing the compiler before the first call.
@torch._disable_dynamo
def _of_active(
    operands: Operands, objective: Objective, loss_mask: Tensor, chunk_size: int | None, has_entropy: bool
) -> LogProbsAndEntropy:
    refuse_vmap(*operands.flatten(), loss_mask)
    operands = find_active(operands, loss_mask)
    hidden, weight, bias = operands.student
    device, dtype = hidden.device, operand_dtype(hidden, weight, autocast_dtype(hidden.device))
    if chunk_size is None:
        needs_grad = torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in operands.student
        )
        logits = 1 + (GRAD_BUFFERS if needs_grad else has_entropy)
        chunk_size = fitting_chunk_size(logits * working_dtype(dtype).itemsize * weight.shape[0], device)
    bias_of_sums = accumulation_bias(device, dtype, weight.shape[1])
    chunks = Chunks(objective, dtype, chunk_size, bias_of_sums, has_entropy)
    tokens = operands.of_active(operands.tokens)
    values = LogProbs.apply(chunks, None, operands.of_active(hidden), weight, bias, tokens)
    if operands.active is not None:
        full = torch.zeros(2, loss_mask.numel(), dtype=values.dtype, device=device)
        values = full.index_copy(1, operands.active, values)
    log_probs, entropy = values.view(2, *loss_mask.shape)
    return LogProbsAndEntropy(log_probs, entropy)
