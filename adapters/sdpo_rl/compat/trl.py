"""What differs between releases of TRL and transformers: log-probabilities without Triton, parsed responses."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from trl.chat_template_utils import add_response_schema, parse_response
from trl.trainer.utils import use_adapter

from ..step.batch import position_ids
from ..step.forward import forward_arguments, router_loss

# What `PreTrainedTokenizerBase.parse_response` reads.
_RESPONSE_FORMAT = (
    "response_template" if Version(transformers.__version__) >= Version("5.13.0.dev0") else "response_schema"
)


def parsed_response(tokenizer: Any, ids: Sequence[int]) -> dict[str, Any] | None:
    """A completion as a message, by the tokenizer's response template or that of a chat template that TRL knows.

    `None`: there is neither. What does not parse is a message with the whole text.
    """
    if getattr(tokenizer, _RESPONSE_FORMAT, None) is None:
        tokenizer = copy.copy(tokenizer)  # a template of its own would make TRL parse every completion
        try:
            add_response_schema(tokenizer)
        except ValueError:  # a chat template that TRL does not know
            return None
    message: dict[str, Any] = parse_response(tokenizer, list(ids), prefix=[])
    return message


@contextmanager
def reference_adapter(model: Any) -> Iterator[None]:
    """A PEFT model as GRPO's reference: with a copy of the adapter that it was loaded with, or without any."""
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        yield


def plain_log_probs(
    accelerator: Any,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    logits_to_keep: int,
    *,
    temperature: float,
    batch_size: int | None = None,
    compute_aux_loss: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and entropies [B, T] of the last T tokens, and the load-balancing loss.

    TRL 1.15 computes them with a Triton kernel only, so that its GRPO cannot train on a CPU; this computes the same
    in plain torch.

    Args:
        accelerator: for its autocast and the model inside `model`.
        model: what runs.
        input_ids: [B, L] int64.
        attention_mask: [B, L].
        logits_to_keep: T.
        temperature: divides the logits.
        batch_size: rows of one forward; `None` means all.
        compute_aux_loss: also the load-balancing loss of a Mixture-of-Experts model; `None` is returned otherwise.
    """
    log_probs, entropies, router_losses = [], [], []
    router = {"output_router_logits": True} if compute_aux_loss else {}
    unwrapped = accelerator.unwrap_model(model)
    size = batch_size or len(input_ids)
    for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
        arguments = forward_arguments(unwrapped, ids, mask, position_ids(mask), logits_to_keep + 1)
        with accelerator.autocast():
            outputs = model(**arguments, **router)
        logits = outputs.logits[:, -(logits_to_keep + 1) : -1].float() / temperature
        log_p = logits.log_softmax(dim=-1)
        log_probs.append(log_p.gather(-1, ids[:, -logits_to_keep:, None]).squeeze(-1))
        entropies.append(-(log_p.exp() * log_p).nan_to_num(0.0).sum(-1))
        if compute_aux_loss:
            router_losses.append(router_loss(outputs))
    aux_loss = torch.stack(router_losses).mean() if compute_aux_loss else None
    return torch.cat(log_probs), torch.cat(entropies), aux_loss


def log_probs_like(
    method: Any, accelerator: Any, temperature: float, *args: Any, **kwargs: Any
) -> tuple[Any, ...]:
    """`plain_log_probs` with the arguments and the result of `_get_per_token_logps_and_entropies`.

    Args:
        method: this release's, whose callers unpack two or three values.
        accelerator: the trainer's.
        temperature: divides the logits.
        *args: of the call.
        **kwargs: of the call.
    """
    signature = inspect.signature(method)
    arguments = signature.bind(*args, **kwargs).arguments
    names = ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_aux_loss")
    used = {name: arguments[name] for name in names if name in arguments}
    result = plain_log_probs(accelerator, temperature=temperature, **used)
    return result if "compute_aux_loss" in signature.parameters else result[:2]
