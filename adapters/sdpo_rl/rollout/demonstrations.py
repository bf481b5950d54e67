"""From a scored rollout to the teacher's prompts: all group logic, over the rows of every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sdpo import select_demonstrations

from ..config import SDPOConfig
from .prompts import Completion, Prompt, Reprompter, TeacherPrompts, completion_text


class Rollout(NamedTuple):
    """What one generation batch produced. Lists hold this rank's rows, `scores` the rows of all ranks."""

    prompts: list[Prompt]
    completions: list[Completion]
    completion_lengths: list[int]
    feedback: list[str | None]
    scores: Tensor  # float32 on the CPU; nan: no reward function applied to the row


class Peer(NamedTuple):
    """A completion as a possible demonstration."""

    text: str
    length: int


@dataclass(frozen=True)
class TeacherContext:
    """The teacher's prompts of this rank's rows and the batch's statistics, over all ranks."""

    prompts: TeacherPrompts
    metrics: dict[str, float]


def teacher_context(
    rollout: Rollout,
    config: SDPOConfig,
    reprompter: Reprompter,
    *,
    group_size: int,
    context_length: float,
    rank: int,
    seed: int,
    gather: Callable[[list[Any]], list[Any]],
) -> TeacherContext:
    """Choose demonstrations over the global batch, write this rank's reprompts, and count what happened.

    `gather` concatenates a list over ranks in rank order (the identity on one). Global row i belongs to group
    i // `group_size`; a rank owns a contiguous slice, so a group may span ranks. `context_length` bounds
    reprompt plus completion.
    """
    rows = len(rollout.prompts)
    peers = [Peer(*peer) for peer in gather(_peers(rollout, config))]
    first = rank * rows
    chosen = select_demonstrations(
        rollout.scores,
        [row // group_size for row in range(len(peers))],
        success_threshold=config.success_reward_threshold,
        exclude_self=config.dont_reprompt_on_self_success,
        policy=config.demonstration_policy,
        seed=seed,
        count=config.num_demonstrations,
        eligible=[bool(peer.text.strip()) for peer in peers],
        lengths=[peer.length for peer in peers],
    )[first : first + rows]
    feedback = [
        text if config.include_environment_feedback and text and text.strip() else None
        for text in rollout.feedback
    ]
    limits = [
        int(min(config.max_reprompt_length, context_length - length)) for length in rollout.completion_lengths
    ]
    prompts = reprompter(rollout.prompts, [[peers[i].text for i in row] for row in chosen], feedback, limits)
    available = [bool(text and text.strip()) for text in rollout.feedback]
    # A dropped row has no reprompt that could hold a demonstration or feedback.
    shown, used = (
        [flag and kept for flag, kept in zip(flags, prompts.row_mask, strict=True)]
        for flags in (prompts.has_demonstration, prompts.uses_feedback)
    )
    flags = gather(
        list(
            zip(
                shown,
                available,
                used,
                prompts.row_mask,
                prompts.truncated,
                prompts.dropped,
                strict=True,
            )
        )
    )
    return TeacherContext(
        prompts, _metrics(flags, rollout.scores, group_size, config.success_reward_threshold)
    )


def _peers(rollout: Rollout, config: SDPOConfig) -> list[tuple[str, int]]:
    thinking = not config.remove_thinking_from_demonstration
    texts = [completion_text(completion, thinking=thinking) for completion in rollout.completions]
    return list(zip(texts, rollout.completion_lengths, strict=True))


def _metrics(
    flags: Sequence[Sequence[bool]], scores: Tensor, group_size: int, threshold: float
) -> dict[str, float]:
    names = (
        "success_sample_fraction",
        "feedback_available_fraction",
        "feedback_used_fraction",
        "reprompt_sample_fraction",
        "truncated_reprompt_fraction",
        "dropped_reprompt_fraction",
    )
    metrics = {name: _mean(column) for name, column in zip(names, zip(*flags, strict=True), strict=True)}
    # Compared as a tensor: 0.7 held in float32 lies below the double 0.7.
    successes = (scores >= threshold).tolist()
    groups = [successes[start : start + group_size] for start in range(0, len(successes), group_size)]
    metrics["success_group_fraction"] = _mean([any(group) for group in groups])
    metrics["empty_target_batch"] = float(metrics["reprompt_sample_fraction"] == 0.0)
    return {f"self_distillation/{name}": value for name, value in metrics.items()}


def _mean(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
