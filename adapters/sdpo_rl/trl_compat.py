"""What differs between TRL releases, in one place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .alignment import position_ids
from .hidden_states import forward_arguments


def plain_log_probs(
    trainer: Any, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, batch_size: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [B, keep] of the last `keep` tokens, at the trainer's temperature.

    TRL 1.15 computes them with a Triton kernel alone, so that its GRPO cannot train on a CPU; this is the
    same quantity in plain torch.
    """
    log_probs, entropies = [], []
    for start in range(0, len(input_ids), batch_size or len(input_ids)):
        rows = slice(start, start + (batch_size or len(input_ids)))
        ids, mask = input_ids[rows], attention_mask[rows]
        unwrapped = trainer.accelerator.unwrap_model(model)
        with trainer.accelerator.autocast():
            logits = model(**forward_arguments(unwrapped, ids, mask, position_ids(mask), keep + 1)).logits
        every = torch.log_softmax(logits[:, -(keep + 1) : -1].float() / trainer.temperature, dim=-1)
        log_probs.append(every.gather(-1, ids[:, -keep:, None]).squeeze(-1))
        entropies.append(-(every.exp() * every).nan_to_num(0.0).sum(-1))
    return torch.cat(log_probs), torch.cat(entropies)


def log_probs_result(method: Any, log_probs: Tensor, entropies: Tensor | None) -> tuple[Any, ...]:
    """The pair or triple that this release's callers of `_get_per_token_logps_and_entropies` unpack."""
    if "compute_aux_loss" in inspect.signature(method).parameters:
        return log_probs, entropies, None
    return log_probs, entropies
