"""What differs between TRL releases, in one place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..step.batch import position_ids
from ..step.forward import forward_arguments, router_loss


def plain_log_probs(
    trainer: Any,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    keep: int,
    *,
    batch_size: int | None = None,
    compute_aux_loss: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and entropies [B, keep] of the last `keep` tokens, at the trainer's temperature.

    TRL 1.15 computes them with a Triton kernel alone, so that its GRPO cannot train on a CPU; this is the
    same quantity in plain torch. The third is the load-balancing loss of a Mixture-of-Experts model.
    """
    log_probs, entropies, router_losses = [], [], []
    router = {"output_router_logits": True} if compute_aux_loss else {}
    for start in range(0, len(input_ids), batch_size or len(input_ids)):
        rows = slice(start, start + (batch_size or len(input_ids)))
        ids, mask = input_ids[rows], attention_mask[rows]
        unwrapped = trainer.accelerator.unwrap_model(model)
        with trainer.accelerator.autocast():
            arguments = forward_arguments(unwrapped, ids, mask, position_ids(mask), keep + 1)
            outputs = model(**arguments, **router)
        every = torch.log_softmax(outputs.logits[:, -(keep + 1) : -1].float() / trainer.temperature, dim=-1)
        log_probs.append(every.gather(-1, ids[:, -keep:, None]).squeeze(-1))
        entropies.append(-(every.exp() * every).nan_to_num(0.0).sum(-1))
        if compute_aux_loss:
            router_losses.append(router_loss(outputs))
    aux_loss = torch.stack(router_losses).mean() if compute_aux_loss else None
    return torch.cat(log_probs), torch.cat(entropies), aux_loss


def log_probs_arguments(method: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What of a call of `_get_per_token_logps_and_entropies` concerns `plain_log_probs`, however it was passed."""
    given = inspect.signature(method).bind(*args, **kwargs).arguments
    return {name: given[name] for name in ("batch_size", "compute_aux_loss") if name in given}


def log_probs_result(
    method: Any, log_probs: Tensor, entropies: Tensor | None, aux_loss: Tensor | None
) -> tuple[Any, ...]:
    """The pair or triple that this release's callers of `_get_per_token_logps_and_entropies` unpack."""
    if "compute_aux_loss" in inspect.signature(method).parameters:
        return log_probs, entropies, aux_loss
    return log_probs, entropies
