"""Runs without reward functions: the teacher reads a text of each row, and nothing judges a completion."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from itertools import islice
from typing import Any

from sdpo import Templates

from ..config import SDPOConfig
from .checks import ROWS_CHECKED
from .feedback import FEEDBACK_COLUMNS, column_name

logger = logging.getLogger("sdpo_rl")

_COLUMNS = " or ".join(map(repr, FEEDBACK_COLUMNS))
# For each option that may need rewards, the values that work without them.
_VALUES_WITHOUT_REWARDS: dict[str, tuple[Any, ...]] = {
    "enabled": (True,),
    "grpo_weight": (0.0,),
    "grpo_weight_final": (None, 0.0),
    "routing": ("none",),
    "row_weights": ("none",),
    "success_reward_funcs": (None,),
}
# What TRL logs of rewards besides those of each function.
_REWARD_METRICS = ("reward", "reward_std", "frac_reward_zero_std")


def reward_functions(
    args: Any, config: SDPOConfig, keywords: Mapping[str, Any], *, writes_prompts: bool
) -> list[Any] | None:
    """The `reward_funcs` to pass to TRL, which requires one, where the user gave none.

    Args:
        args: the GRPOConfig.
        config: the SDPOConfig.
        keywords: the trainer's other arguments, by name.
        writes_prompts: there is a `teacher_prompt_func`, which needs no texts of the rows.

    Returns:
        A list with a placeholder, which `remove_placeholder` removes later; or `None` where an option needs rewards
        and there are environments, which may give them. TRL raises an error if they do not.

    Raises:
        ValueError: an option that needs rewards, or rows without a text.
    """
    texts = f" and give each row of the dataset a text in a column {_COLUMNS}"
    # The row's text is all that the teacher reads beyond the question.
    of_feedback = {} if writes_prompts else {"include_environment_feedback": (True,)}
    needs = next(
        (
            f"{name}={value!r}"
            for name, allowed in {**_VALUES_WITHOUT_REWARDS, **of_feedback}.items()
            if (value := getattr(config, name)) not in allowed
        ),
        None,
    )
    if needs and keywords.get("environment_factory") is not None:
        return None
    if needs:
        raise ValueError(
            f"reward_funcs: expected at least one reward function with {needs}, got none; pass reward_funcs=[...], "
            f"or remove {needs}{'' if writes_prompts else texts}"
        )
    for name, value in (
        ("reward_weights", args.reward_weights),
        ("reward_processing_classes", keywords.get("reward_processing_classes")),
    ):
        if value is not None:
            raise ValueError(f"{name}: expected None without reward functions, got {value!r}; remove it")
    # An environment or a rollout_func may give the texts.
    sources = (keywords.get(name) for name in ("environment_factory", "rollout_func"))
    if not writes_prompts and all(source is None for source in sources):
        for name in ("train_dataset", "eval_dataset"):
            _check_texts(keywords.get(name), name)
        if config.feedback_template == Templates().feedback:
            logger.warning(
                "The default feedback_template presents each row's text as feedback on an unsuccessful attempt, "
                "but a text of the dataset was written before any attempt; set feedback_template, or take "
                "SDPOConfig.preset('opsd') or preset('sdft')."
            )
    return [_placeholder]


def _check_texts(dataset: Any, name: str) -> None:
    """Raise where a dataset, or one of a dict of them, has no texts, or none in one of its first rows."""
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            _check_texts(part, f"{name}[{key!r}]")
        return
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        return
    if (column := column_name(columns)) is None:
        if name == "train_dataset":
            raise ValueError(
                f"reward_funcs: expected at least one reward function, or a train_dataset with a column {_COLUMNS}"
                ", got neither; pass reward_funcs=[...], or add the column with a text for each row"
            )
        raise ValueError(
            f"{name}: expected a column {_COLUMNS} without reward functions, got {columns}; add it with a text for "
            "each row"
        )
    if not hasattr(dataset, "__len__"):
        return
    for row, text in enumerate(islice(dataset[column], ROWS_CHECKED)):
        if text is None or not text.strip():
            raise ValueError(
                f"{name}: expected a text in each row of the column {column!r} without reward functions, got "
                f"{text!r} in row {row}; write one, or drop the row"
            )


def _placeholder(completions: list[Any], **_: Any) -> list[None]:
    return [None] * len(completions)


def remove_placeholder(trainer: Any) -> None:
    """Take the placeholder out of a constructed trainer; the rewards of its environments stay.

    Args:
        trainer: an `SDPOTrainer`; without the placeholder nothing changes.
    """
    if _placeholder not in trainer.reward_funcs:
        return
    for each in (trainer.reward_funcs, trainer.reward_func_names, trainer.reward_processing_classes):
        del each[0]
    trainer.reward_weights = trainer.reward_weights[1:]
    if not trainer.reward_funcs:
        # "normalize_then_sum" fails without a reward function. Neither changes a loss without GRPO's part.
        trainer.multi_objective_aggregation = "sum_then_normalize"


def drop_metrics(metrics: MutableMapping[str, Any]) -> None:
    """Remove TRL's metrics of rewards, which are NaN without reward functions.

    Args:
        metrics: of training or of evaluation, by name.
    """
    for name in _REWARD_METRICS:
        metrics.pop(name, None)
