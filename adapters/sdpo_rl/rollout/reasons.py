"""Why rows of a generation batch have no signal from the teacher."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import SDPOConfig
from .demonstrations import Rollout, TeacherContext

# How reasons begin that a user's function decides.
OF_FUNCTION = "teacher_prompt_func"


def reasons_without_signal(
    rollout: Rollout,
    context: TeacherContext,
    config: SDPOConfig,
    *,
    has_loss: Sequence[bool],
    group_size: int,
    rank: int,
) -> list[str | None]:
    """For each row of this process why it has no distillation loss; `None`: it has one.

    Args:
        rollout: the generation batch.
        context: what the teacher reads in it.
        config: thresholds and limits.
        has_loss: False for a completion whose tokens are all masked.
        group_size: completions of one prompt.
        rank: index of this process.
    """
    reasons: list[str | None] = []
    for row, distilled in enumerate(context.distilled):
        reason = None
        if distilled:
            pass
        elif not has_loss[row]:
            reason = (
                "no token of the completion counts: it is empty, or cut at max_completion_length and masked"
            )
        elif context.prompts.dropped[row]:
            problem = "nothing of the demonstration or the feedback fits beside the prompt and the completion"
            if context.prompts.written:
                problem = f"{OF_FUNCTION} returned a prompt that does not fit beside the completion"
            reason = f"{problem} (max_reprompt_length={config.max_reprompt_length}, or the model's context)"
        elif context.prompts.row_mask[row]:
            reason = f"a success has the policy loss alone (routing={config.routing!r})"
        elif context.prompts.written:
            reason = f"{OF_FUNCTION} returned None"
        else:
            first_row = rank * len(rollout.prompts)
            reason = (
                f"{_without_demonstration(rollout, config, group_size, first_row + row)}; "
                f"{_without_feedback(rollout, config, row)}"
            )
        reasons.append(reason)
    return reasons


def _without_demonstration(rollout: Rollout, config: SDPOConfig, group_size: int, row: int) -> str:
    """Why the row, by its place among those of all processes, has no demonstration."""
    start = row // group_size * group_size
    scores = rollout.scores[start : start + group_size]
    # Compared as a tensor, as in the choice of demonstrations.
    successes = (scores >= config.success_reward_threshold).nonzero()[:, 0].tolist()
    judged = scores[~scores.isnan()]
    if not len(judged):
        return "no reward function judged a completion of this prompt"
    if not successes:
        return (
            f"no completion of this prompt reached success_reward_threshold={config.success_reward_threshold:g} "
            f"(best score {judged.max().item():g})"
        )
    if successes == [row - start] and config.dont_reprompt_on_self_success:
        return "the only success of this prompt is this completion itself"
    return "no success of this prompt can be shown: its text is blank, or it was cut and masked"


def _without_feedback(rollout: Rollout, config: SDPOConfig, row: int) -> str:
    """Why a row of this process has no feedback."""
    if rollout.feedback[row] is None:
        return "no feedback, or a blank one"
    return "its feedback is not used (include_environment_feedback=False)"
