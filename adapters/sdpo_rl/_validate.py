"""What a trainer refuses when it is built, each with the way out, before a token is generated."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

from .config import SDPOConfig
from .rollout.feedback import check_column
from .rollout.prompts import check_prompts

_ROWS_CHECKED = 1000
_MEDIA = ("image", "images", "audio", "video")
# What other trainers call it, where the nearest name would mislead.
_KEYWORDS = {
    "config": "sdpo_config (for an SDPOConfig) or args (for a GRPOConfig)",
    "dataset": "train_dataset",
    "grpo_config": "args",
    "training_args": "args",
    "tokenizer": "processing_class",
    "processor": "processing_class",
}
# What `GRPOConfig` can add to GRPO's loss: the value that leaves it out, and what it would be.
_NOT_OURS: dict[str, tuple[Any, str]] = {
    "beta": (0.0, "a KL penalty"),
    "entropy_coef": (0.0, "an entropy bonus"),
    "use_adaptive_entropy": (False, "an entropy bonus"),
    "top_entropy_quantile": (1.0, "a loss on the tokens of highest entropy alone"),
    "off_policy_mask_threshold": (None, "a mask of off-policy rows"),
    "importance_sampling_level": ("token", "importance weights of whole sequences"),
    "delta": (None, "a second bound of the importance weights (here there is one, SDPOConfig.is_clip)"),
}


def check_dataset(dataset: Any, name: str) -> None:
    """A map-style dataset is not empty, has prompts that can be reprompted, no media, and only text as feedback."""
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
        if "feedback" in columns:
            check_column(islice(dataset["feedback"], _ROWS_CHECKED))
        _refuse_media(
            media
            for media in _MEDIA
            if media in columns and any(map(_holds_media, islice(dataset[media], _ROWS_CHECKED)))
        )
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


def check_keywords(keywords: Iterable[str], trainer: type, own: Iterable[str]) -> None:
    """Every keyword is one of SDPOTrainer's `own` or one that `trainer`, the class below it, takes."""
    accepted = set(own)
    # A constructor that hands on what it does not know is followed by the next one down.
    for constructor in (vars(cls)["__init__"] for cls in trainer.__mro__ if "__init__" in vars(cls)):
        parameters = inspect.signature(constructor).parameters.values()
        accepted |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    for name in keywords:
        if name not in accepted:
            nearest = _KEYWORDS.get(name) or next(iter(get_close_matches(name, accepted, n=1)), None)
            raise TypeError(
                f"SDPOTrainer takes no keyword {name!r}; "
                + (
                    f"did you mean {nearest}?"
                    if nearest
                    else f"expected one of {sorted(accepted - {'self'})}"
                )
            )


def check_groups(args: Any) -> None:
    """Groups tile the generation batch: `num_generations` divides it."""
    batch, group = getattr(args, "generation_batch_size", None), getattr(args, "num_generations", None)
    if batch and group and batch % group:
        raise ValueError(
            f"generation_batch_size ({batch}) must be divisible by num_generations ({group}); change one of "
            "per_device_train_batch_size, gradient_accumulation_steps or num_generations"
        )


def check_arguments(args: Any) -> None:
    """`args` is a `GRPOConfig`; GRPOTrainer takes its rewards in this place."""
    if not hasattr(args, "num_generations"):
        raise TypeError(
            f"args must be a GRPOConfig, got {type(args).__name__}; pass everything by name: "
            "SDPOTrainer(model=..., args=GRPOConfig(...), reward_funcs=...)"
        )


def check_objective(args: Any) -> None:
    """No option asks for a term or a mask that this loss does not have: it would be dropped in silence."""
    for name, (off, what) in _NOT_OURS.items():
        value = getattr(args, name, off)
        if value not in (off, None):
            raise ValueError(
                f"{name}={value!r} asks for {what}, which the self-distillation loss does not have; leave it at "
                f"{name}={off!r}, or set SDPOConfig(enabled=False)"
            )


def check_vocabulary(config: SDPOConfig, model: Any) -> None:
    """K fits into the model's vocabulary."""
    text_config = model.config.get_text_config()
    vocabulary = getattr(text_config, "vocab_size", None)
    if vocabulary is not None and config.uses_topk and config.k > vocabulary:
        raise ValueError(
            f"k ({config.k}) exceeds the model's vocabulary ({vocabulary}); lower it, or set support='full'"
        )


def check_reward_functions(reward_funcs: Any) -> None:
    """Every reward is a callable, a reward model or a model's name; there may be none at all."""
    if reward_funcs is None:
        return
    for index, reward in enumerate(reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]):
        if not isinstance(reward, str) and not callable(reward):
            raise TypeError(
                f"reward_funcs[{index}] must be a function, a reward model or a model's name, got "
                f"{type(reward).__name__}"
            )


def check_rows(rows: Sequence[Any]) -> None:
    """The rows of a generation batch: text prompts that end with a user turn, feedback that is text, no media."""
    _refuse_media(media for media in _MEDIA if any(_holds_media(row.get(media)) for row in rows))
    check_prompts([row["prompt"] for row in rows if "prompt" in row])
    check_column(row.get("feedback") for row in rows)


def _refuse_media(names: Iterable[str]) -> None:
    if media := sorted(names):
        raise ValueError(
            f"rows carry {', '.join(media)}; SDPO reprompts text only: drop the column, or set "
            "SDPOConfig(enabled=False)"
        )


def _holds_media(value: Any) -> bool:
    """Neither nothing nor an empty list; of arrays the truth is not asked."""
    return value is not None and getattr(value, "__len__", lambda: 1)() > 0
