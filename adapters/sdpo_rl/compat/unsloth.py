"""Where Unsloth's rewritten `GRPOTrainer` differs from TRL's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..step.row_attention import grouped_kernel

IMPORT_ORDER = (
    "    from unsloth import FastLanguageModel, PatchFastRL\n"
    '    PatchFastRL("GRPO", FastLanguageModel)\n'
    "    from sdpo_rl import SDPOTrainer, SDPOConfig\n"
    "    from trl import GRPOConfig"
)
_HIDDEN_STATES = "UNSLOTH_RETURN_HIDDEN_STATES"
_ATTENTION = "unsloth.utils.attention_dispatch"


def is_unsloth(trainer_class: type) -> bool:
    """Whether a trainer class is, or derives from, one that Unsloth has rewritten."""
    return any(cls.__name__ == "UnslothGRPOTrainer" for cls in trainer_class.__mro__)


def check_unpatched(base: type, present: type) -> None:
    """The class below `SDPOTrainer` is still `trl.GRPOTrainer`.

    Args:
        base: the class below.
        present: what `trl.GRPOTrainer` is now.

    Raises:
        RuntimeError: it was patched in between.
    """
    if present is not base:
        raise RuntimeError(
            "trl.GRPOTrainer was patched after sdpo_rl.SDPOTrainer was imported, so training would run "
            f"unpatched. Import in this order:\n{IMPORT_ORDER}"
        )


def check_construction(model: Any, args: Any, peft_config: Any) -> None:
    """Refuse what Unsloth's trainer ignores silently, or fails on much later.

    Args:
        model: the trainer's.
        args: the trainer's.
        peft_config: the trainer's.

    Raises:
        ValueError: `peft_config`, a model's name, a model that Unsloth did not load, a `GRPOConfig` that was
            imported before the patch, or completions as long as `max_seq_length`; each with the fix.
    """
    if peft_config is not None:
        raise ValueError(
            "peft_config: expected None, got one; Unsloth's trainer ignores peft_config and would train the whole "
            "model: add the adapter with `model = FastLanguageModel.get_peft_model(model, r=16, ...)`"
        )
    if isinstance(model, str):
        raise ValueError(
            f"model: expected a loaded model under Unsloth, got the name {model!r}; pass the model of "
            f"`model, tokenizer = FastLanguageModel.from_pretrained({model!r}, ...)`"
        )
    if not hasattr(model, "for_training"):
        raise ValueError(
            f"model: expected one loaded by Unsloth, got a {type(model).__name__} without for_training, on which "
            "its generation fails; load it with FastLanguageModel.from_pretrained, or do not patch TRL"
        )
    if not hasattr(args, "unsloth_num_chunks"):
        raise ValueError(
            "args: expected a GRPOConfig imported after the patch, got one from before: it has no "
            "unsloth_num_chunks, which Unsloth's loss needs; import in this order, then make the config again:\n"
            f"{IMPORT_ORDER}"
        )
    limit, length = getattr(model, "max_seq_length", None), args.max_completion_length
    if limit is not None and length is not None and length >= limit:
        raise ValueError(
            f"max_completion_length: expected less than the model's max_seq_length={limit}, got "
            f"max_completion_length={length}, which leaves no room for a prompt, and Unsloth truncates longer "
            "sequences silently; lower it, or load the model with a larger max_seq_length (prompt + completion, "
            "and reprompt + completion, must fit)"
        )


def use_varlen_kernel() -> None:
    """With torch 2.11, packed rows take one call of attention in each layer of Unsloth, as with later releases.

    Unsloth calls torch's `varlen_attn` with `enable_gqa`, an argument since torch 2.12, and one row at a time where
    there is none. The kernel below it takes fewer heads of keys and values than of queries in torch 2.11, too. This
    sets an attribute of Unsloth's module, for the whole process.
    """
    attention, kernel = sys.modules.get(_ATTENTION), grouped_kernel()
    disabled = os.environ.get("UNSLOTH_TORCH_VARLEN", "1").lower() in ("0", "false", "no", "off")
    found_none = attention is not None and vars(attention).get("_TORCH_VARLEN_ATTN", ...) is None
    if disabled or kernel is None or not found_none:
        return

    def varlen_attn(*args: Any, enable_gqa: bool, **options: Any) -> Tensor:
        return kernel(*args, **options)

    vars(attention)["_TORCH_VARLEN_ATTN"] = varlen_attn


@contextmanager
def logits_not_hidden_states() -> Iterator[None]:
    """Forwards return logits, even if an interrupted pass of Unsloth left its variable set in the environment."""
    before = os.environ.get(_HIDDEN_STATES)
    os.environ[_HIDDEN_STATES] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_HIDDEN_STATES]
        else:
            os.environ[_HIDDEN_STATES] = before


def align_old_log_probs(inputs: Mapping[str, Any], pad_id: int) -> dict[str, Any]:
    """The inputs with `old_per_token_logps` [B, T] in the columns of the completion.

    Unsloth packs each row to the left, by pad id, into a wider tensor. The column of a token there is its position
    among the row's tokens that are not the pad token. A row that sampled the pad token was scored as another
    sequence; its entries become NaN, which has weight 1.

    Args:
        inputs: of a micro-batch, with `prompt_ids` [B, P], `completion_ids` and `completion_mask` [B, T].
        pad_id: token id of the padding.
    """
    old = inputs.get("old_per_token_logps")
    if old is None:
        return dict(inputs)
    completion, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
    ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
    length = completion.shape[1]
    position = (ids != pad_id).cumsum(dim=1) - 1 - (ids.shape[1] - old.shape[1])
    columns = position[:, -length:]
    valid = (columns >= 0) & (columns < old.shape[1])
    aligned: Tensor = old.gather(1, columns.clamp(0, old.shape[1] - 1))
    wrong = ((completion == pad_id) & mask).any(dim=1, keepdim=True) | ~valid
    return {**inputs, "old_per_token_logps": aligned.masked_fill(wrong, float("nan"))}
