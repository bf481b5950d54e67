"""Log-probabilities of given tokens from hidden states and an LM head, one chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sdpo._validate import check_int
from sdpo.fused._matmul import accumulation_bias, autocast_dtype, operand_dtype, project, working_dtype
from sdpo.fused._plan import fitting_chunk_size
from sdpo.fused._torch import logits_from_products
from sdpo.fused._types import LMHead, Objective, Operands
from sdpo.fused._validate import check_head, check_objective, check_operands, find_active, refuse_vmap


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
    ``log_probs`` for one model alone, without a loss: what it takes as ``old_log_probs``. Products accumulate in
    float32, and under ``torch.autocast`` run in autocast's dtype.

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
        NotImplementedError: under ``torch.func.vmap``.

    Gradient: none.

    Source: SDPO, arXiv 2601.20802, section 2, the log-probabilities at sampling.

    Example:
        >>> import torch
        >>> head = LMHead(torch.tensor([[[1.0, 0.0]]]), torch.eye(2))
        >>> fused_log_probs(head, torch.tensor([[0]]), loss_mask=torch.tensor([[True]]), temperature=1.0)
        tensor([[-0.3133]])
    """
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
    return _log_probs(operands, objective, loss_mask, chunk_size)


# torch.compiler.disable, but without importing the compiler before the first call.
@torch._disable_dynamo
def _log_probs(operands: Operands, objective: Objective, loss_mask: Tensor, chunk_size: int | None) -> Tensor:
    refuse_vmap(*operands.flatten(), loss_mask)
    hidden, weight, bias = operands.student
    device, vocabulary = hidden.device, weight.shape[0]
    dtype = operand_dtype(hidden, weight, autocast_dtype(device))
    working = working_dtype(dtype)
    size = chunk_size or fitting_chunk_size(working.itemsize * vocabulary, device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        active = find_active(operands, loss_mask).active
        if active is None:
            active = torch.arange(loss_mask.numel(), device=device)
        bias_of_sums = accumulation_bias(device, dtype, weight.shape[1])
        weight = weight.to(dtype)
        buffer = torch.empty(min(size, active.shape[0]), vocabulary, dtype=working, device=device)
        log_probs = torch.zeros(loss_mask.numel(), dtype=working, device=device)
        for chunk in active.split(size):
            products = project(hidden.index_select(0, chunk).to(dtype), weight, buffer[: chunk.shape[0]])
            logits = logits_from_products(products, bias, bias_of_sums, objective)
            # Relative to the largest logit: near 50 float32 resolves three digits less than the differences.
            logits -= logits.amax(dim=1, keepdim=True)
            sampled = logits.gather(1, operands.tokens[chunk, None])[:, 0]
            log_probs[chunk] = sampled - logits.exp_().sum(dim=1).log_()
    return log_probs.view(loss_mask.shape)
