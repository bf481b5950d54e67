"""What a trainer refuses when it is built, each with the way out, before a token is generated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from .config import SDPOConfig
from .prompts import check_prompts

_ROWS_CHECKED = 1000


def check_dataset(dataset: Any, name: str) -> None:
    """A map-style dataset is not empty, has a prompt column, and its first prompts can be reprompted."""
    if dataset is None or not hasattr(dataset, "__len__"):
        return
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]")
        return
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty; expected at least one row with a 'prompt'")
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if "prompt" not in columns:
        raise ValueError(f"{name} needs a 'prompt' column, got {columns}")
    try:
        check_prompts(list(islice(dataset["prompt"], _ROWS_CHECKED)))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def check_tokenizer(processing_class: Any) -> None:
    """Reprompts are padded on the left, so the tokenizer must name a pad token."""
    if processing_class is None:
        return
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError(
            "processing_class has no pad token; set one before building the trainer, for example "
            "`tokenizer.pad_token = tokenizer.eos_token`"
        )


def check_groups(args: Any) -> None:
    """Groups tile the generation batch: `num_generations` divides it."""
    batch, group = getattr(args, "generation_batch_size", None), getattr(args, "num_generations", None)
    if batch and group and batch % group:
        raise ValueError(
            f"generation_batch_size ({batch}) must be divisible by num_generations ({group}); change one of "
            "per_device_train_batch_size, gradient_accumulation_steps or num_generations"
        )


def check_objective(args: Any) -> None:
    """No option asks for a term that this loss does not have: it would be dropped in silence."""
    terms = {"beta": "KL penalty", "entropy_coef": "entropy bonus", "use_adaptive_entropy": "entropy bonus"}
    for name, term in terms.items():
        if getattr(args, name, 0):
            raise ValueError(
                f"{name}={getattr(args, name)} asks for a {term}, which the self-distillation loss replaces; "
                f"leave {name} at its default, or set SDPOConfig(enabled=False)"
            )


def check_vocabulary(config: SDPOConfig, model: Any) -> None:
    """K fits into the model's vocabulary."""
    text_config = model.config.get_text_config()
    vocabulary = getattr(text_config, "vocab_size", None)
    if vocabulary is not None and config.topk_side is not None and config.distillation_topk > vocabulary:
        raise ValueError(
            f"distillation_topk ({config.distillation_topk}) exceeds the model's vocabulary ({vocabulary}); "
            "lower it, or set distillation_support='full'"
        )


def check_reward_functions(reward_funcs: Any) -> None:
    """Every reward is a callable, a reward model or a model's name."""
    for index, reward in enumerate(reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]):
        if reward is not None and not isinstance(reward, str) and not callable(reward):
            raise TypeError(
                f"reward_funcs[{index}] must be a function, a reward model or a model's name, got "
                f"{type(reward).__name__}"
            )


def check_rows(rows: Sequence[Any]) -> None:
    """The rows of a generation batch: text prompts that end with a user turn, and no media."""
    media = sorted({name for row in rows for name in ("image", "images", "audio", "video") if row.get(name)})
    if media:
        raise ValueError(
            f"rows carry {', '.join(media)}; SDPO reprompts text only: drop the column, or set "
            "SDPOConfig(enabled=False)"
        )
    check_prompts([row["prompt"] for row in rows if "prompt" in row])
