"""Checks of a generation batch: its rows before a token is sampled, and what came back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..config import SDPOConfig
from . import rewards
from .demonstrations import Rollout
from .feedback import check_column, column_name
from .prompts import check_prompts
from .rendered import RenderedPrompts

# Rows of a dataset that are checked before anything is generated.
ROWS_CHECKED = 1000
# Columns of a dataset that TRL takes for media.
MEDIA = ("image", "images", "audio", "video")


def check_rendered(prompts: Sequence[Any], rendered: RenderedPrompts | None, config: SDPOConfig) -> None:
    """A prompt that was rendered to a string has a place for a reprompt before the assistant's turn.

    Args:
        prompts: strings, or conversations, which have one.
        rendered: how rendered prompts end; `None`: there is no chat template, so strings are plain text.
        config: the SDPOConfig, whose template has the question first: where it begins in a string is unknown.
    """
    if rendered is None:
        return
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            continue
        try:
            _, ending = rendered.split(prompt)
        except ValueError as error:
            raise ValueError(f"prompt {row}: {error}") from error
        if ending and not config.reprompt_template.startswith("{prompt}"):
            raise ValueError(
                f"reprompt_template: expected '{{prompt}}' first, with prompts that were rendered to strings, got "
                f"{config.reprompt_template!r}; pass lists of messages as prompts, or start with '{{prompt}}'"
            )


def check_generation_batch(
    rows: Sequence[Any],
    config: SDPOConfig,
    rendered: RenderedPrompts | None,
    reward_funcs: Any,
    *,
    prompts: bool,
    has_environments: bool,
) -> None:
    """What can be checked before a token is sampled.

    Args:
        rows: of the batch.
        config: the SDPOConfig.
        rendered: as for `check_rendered`.
        reward_funcs: of the trainer.
        prompts: as for `check_rows`.
        has_environments: as for `check_keywords` of rewards.
    """
    check_rows(rows, prompts=prompts)
    rewards.check_keywords(
        (name for row in rows for name in row), reward_funcs, has_environments=has_environments
    )
    check_rendered([row["prompt"] for row in rows if "prompt" in row], rendered, config)


def check_rows(rows: Sequence[Any], *, prompts: bool) -> None:
    """A generation batch has prompts of text that the model answers, feedback that is text, and no media.

    Args:
        rows: of the batch.
        prompts: whether every row must have a prompt.
    """
    for row in rows:
        if prompts and "prompt" not in row:
            raise ValueError(
                f"dataset: expected rows with a 'prompt', got one with {sorted(row)}; rename the column of "
                "the prompts"
            )
    refuse_media(media for media in MEDIA if any(holds_media(row.get(media)) for row in rows))
    check_prompts([row["prompt"] for row in rows if "prompt" in row])
    if feedback := column_name(name for row in rows for name in row):
        check_column((row.get(feedback) for row in rows), feedback)


def check_scored_batch(output: Mapping[str, Any], rollout: Rollout | None) -> Rollout:
    """A scored generation batch has no images, which tools and environments may add to the prompts.

    Args:
        output: of TRL.
        rollout: what was kept of the batch when it was scored, which is returned.
    """
    if images := [name for name in ("pixel_values", "num_images") if output.get(name) is not None]:
        raise ValueError(
            f"rollout: expected text alone, got images ({', '.join(images)}) from a tool or an environment, which "
            "do not reach the loss; return text, or set SDPOConfig(enabled=False)"
        )
    if rollout is None:
        raise RuntimeError("GRPOTrainer did not call _calculate_rewards; this TRL release is not supported")
    return rollout


def refuse_media(names: Iterable[str]) -> None:
    """There are no rows with media, whose columns these are."""
    if media := sorted(names):
        raise ValueError(
            f"prompt: expected text alone, got rows with {', '.join(media)}, which cannot be reprompted; drop the "
            "column, or set SDPOConfig(enabled=False)"
        )


def holds_media(value: Any) -> bool:
    """Whether a value is neither `None` nor empty; an array has no truth value."""
    return value is not None and getattr(value, "__len__", lambda: 1)() > 0
