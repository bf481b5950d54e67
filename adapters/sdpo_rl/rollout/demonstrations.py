"""From a scored rollout to the teacher's prompts: everything about groups, over the rows of all processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdpo import pass_rate_weights, route_rows, select_demonstrations

from ..config import SDPOConfig
from .answers import answer_in_feedback
from .prompts import Completion, Prompt, completion_text
from .reprompt_text import has_phrase, template_phrases
from .reprompts import Reprompter, TeacherPrompts
from .written import TeacherPromptFunc, written_prompts


class Rollout(NamedTuple):
    """A generation batch. Lists hold this process's rows, `scores` and `rewards` the rows of all processes.

    Args:
        prompts: one per row.
        completions: one per row.
        completion_lengths: tokens of each completion.
        demonstrations: the text of each completion where it is shown as a solution.
        feedback: a text that is not blank, or `None`.
        scores: what is compared with the threshold of a success; float32 on the CPU; NaN: no reward function judged
            the row.
        rewards: of the F reward functions, [B, F] float32 on the CPU; NaN: a function did not judge the row.
        columns: of the dataset, besides the prompt, one mapping per row; none without a `teacher_prompt_func`.
    """

    prompts: list[Prompt]
    completions: list[Completion]
    completion_lengths: list[int]
    demonstrations: list[str]
    feedback: list[str | None]
    scores: Tensor
    rewards: Tensor
    columns: Sequence[Mapping[str, Any]] = ()


class Peer(NamedTuple):
    """A completion as a possible demonstration: its text as shown, its whole text, its tokens."""

    demonstration: str
    completion: str
    length: int
    is_eligible: bool


@dataclass(frozen=True)
class TeacherContext:
    """What a generation batch needs for its loss besides what TRL computes.

    Attributes:
        prompts: the teacher's prompts of this process's rows.
        distilled: for each row of this process whether it has a distillation loss.
        row_weights: one per row of this process; `None`: all weigh the same.
        demonstration_rows: for each row of this process the global rows whose completions its reprompt was given.
        demonstrations: their texts as they are shown, before any cut.
        metrics: statistics of the batch over all processes, by name.
    """

    prompts: TeacherPrompts
    distilled: list[bool]
    row_weights: list[float] | None
    demonstration_rows: list[list[int]]
    demonstrations: list[list[str]]
    metrics: dict[str, float]

    @property
    def shown_rows(self) -> list[list[int]]:
        """Of `demonstration_rows` those that are in the reprompts."""
        shown = zip(self.demonstration_rows, self.prompts.has_demonstration, strict=True)
        return [rows if has_demonstration else [] for rows, has_demonstration in shown]


def teacher_context(
    rollout: Rollout,
    config: SDPOConfig,
    reprompter: Reprompter,
    *,
    has_loss: Sequence[bool],
    group_size: int,
    context_length: float,
    rank: int,
    seed: int,
    gather: Callable[[list[Any]], list[Any]],
    teacher_prompt_func: TeacherPromptFunc | None = None,
) -> TeacherContext:
    """Choose demonstrations over the global batch, write this process's reprompts, and count both.

    Global row i belongs to group i // `group_size`; a process has a contiguous slice of the rows, so a group may
    be on several.

    Args:
        rollout: the generation batch.
        config: thresholds, policy and limits.
        reprompter: writes the prompts.
        has_loss: False for a completion whose tokens are all masked (`mask_truncated_completions`): it is no
            demonstration, and has no reprompt.
        group_size: completions of one prompt.
        context_length: largest number of tokens of reprompt and completion together.
        rank: index of this process.
        seed: of the random policy.
        gather: concatenates a list over processes in their order (the identity on one).
        teacher_prompt_func: writes the prompts in place of the reprompter, which then tokenizes them.
    """
    row_count = len(rollout.prompts)
    peers = [Peer(*peer) for peer in gather(_peers(rollout, has_loss))]
    chosen = _choose(peers, rollout.scores, config, group_size, seed)[rank * row_count :][:row_count]
    demonstration_rows = [rows if counts else [] for rows, counts in zip(chosen, has_loss, strict=True)]
    demonstrations = [[peers[i].demonstration for i in rows] for rows in demonstration_rows]
    feedback = [
        text if counts and config.include_environment_feedback else None
        for text, counts in zip(rollout.feedback, has_loss, strict=True)
    ]
    limits = [
        int(min(config.max_reprompt_length, context_length - length)) for length in rollout.completion_lengths
    ]
    # Compared as a tensor: 0.7 rounded to float32 is less than the double 0.7.
    success = rollout.scores >= config.success_reward_threshold
    successes = success.tolist()
    own_success = success[rank * row_count :][:row_count]
    if teacher_prompt_func is None:
        prompts = reprompter(rollout.prompts, demonstrations, feedback, limits, own_success.tolist())
    else:
        prompts = written_prompts(
            teacher_prompt_func,
            reprompter,
            rollout,
            demonstrations=demonstrations,
            feedback=feedback,
            limits=limits,
            succeeded=own_success.tolist(),
            has_loss=has_loss,
        )
    columns = {
        "success_sample_fraction": prompts.has_demonstration,
        "feedback_available_fraction": [text is not None for text in rollout.feedback],
        "feedback_used_fraction": prompts.uses_feedback,
        "reprompt_sample_fraction": prompts.row_mask,
        "truncated_reprompt_fraction": prompts.truncated,
        "dropped_reprompt_fraction": prompts.dropped,
    }
    if teacher_prompt_func is None:
        phrases = template_phrases(reprompter.templates, with_feedback=config.include_environment_feedback)
        if phrases:
            columns["reprompt_text_fraction"] = [
                has_phrase(peer.completion, prompt, phrases)
                for peer, prompt in zip(peers[rank * row_count :][:row_count], rollout.prompts, strict=True)
            ]
    distilled = prompts.row_mask
    if config.routing == "srpo":
        distilled = route_rows(own_success, torch.tensor(prompts.row_mask))[1].tolist()
        columns["distilled_row_fraction"] = distilled
    gathered = zip(*gather(list(zip(*columns.values(), strict=True))), strict=True)
    metrics = {name: _mean(column) for name, column in zip(columns, gathered, strict=True)}
    groups = [successes[start : start + group_size] for start in range(0, len(successes), group_size)]
    metrics["success_group_fraction"] = _mean([any(group) for group in groups])
    judged = rollout.scores[~rollout.scores.isnan()]
    if len(judged):
        metrics["best_score"] = judged.max().item()
    metrics["empty_target_batch"] = float(metrics["reprompt_sample_fraction"] == 0.0)
    found = gather(_answers_in_feedback(peers, successes, feedback, group_size, rank * row_count))
    found = [flag for flag in found if flag is not None]
    if found:
        metrics["answer_in_feedback_fraction"] = _mean(found)
    row_weights = None
    if config.row_weights == "pass_rate":
        weights = pass_rate_weights(success, torch.arange(len(success)) // group_size)
        row_weights = weights[rank * row_count :][:row_count].tolist()
    return TeacherContext(
        prompts,
        distilled,
        row_weights,
        demonstration_rows,
        demonstrations,
        {f"self_distillation/{name}": value for name, value in metrics.items()},
    )


def selection_seed(*position: int | bool) -> int:
    """The seed of the random policy at a position in the run, so that a resumed run draws what the first drew.

    Examples:
        >>> selection_seed(0, 1, 0, False) == selection_seed(0, 1, 0, False) != selection_seed(0, 2, 0, False)
        True
    """
    return int.from_bytes(hashlib.blake2b(repr(position).encode(), digest_size=8).digest(), "big")


def _peers(rollout: Rollout, has_loss: Sequence[bool]) -> list[Peer]:
    """This process's completions as possible demonstrations."""
    return [
        Peer(demonstration, completion_text(completion), length, counts and bool(demonstration.strip()))
        for demonstration, completion, length, counts in zip(
            rollout.demonstrations, rollout.completions, rollout.completion_lengths, has_loss, strict=True
        )
    ]


def _choose(
    peers: Sequence[Peer], scores: Tensor, config: SDPOConfig, group_size: int, seed: int
) -> list[list[int]]:
    """For every row of the global batch, the rows that are its demonstrations.

    Where a row may not be its own demonstration, peers with its text come last. They are not left out: where only
    one text is right, the rows that are right would have no loss, and the run would lose what it has learned.
    """
    successes = select_demonstrations(
        scores,
        [row // group_size for row in range(len(peers))],
        success_threshold=config.success_reward_threshold,
        exclude_self=config.dont_reprompt_on_self_success,
        policy=config.demonstration_policy,
        seed=seed,
        count=group_size,
        eligible=[peer.is_eligible for peer in peers],
        lengths=[peer.length for peer in peers],
    )
    chosen = []
    for own, candidates in zip(peers, successes, strict=True):
        others = list(candidates)
        if config.dont_reprompt_on_self_success:
            same = {i for i in others if own.completion in (peers[i].completion, peers[i].demonstration)}
            others.sort(key=same.__contains__)
        chosen.append(others[: config.num_demonstrations])
    return chosen


def _answers_in_feedback(
    peers: Sequence[Peer],
    successes: Sequence[bool],
    feedback: Sequence[str | None],
    group_size: int,
    first_row: int,
) -> list[bool | None]:
    """Whether the feedback of each row of this process has a correct completion of its group.

    `None` where it is unknown: without feedback, without a success in the group, and for a success.
    """
    found: list[bool | None] = []
    for row, text in enumerate(feedback, start=first_row):
        start = row // group_size * group_size
        answers = [peers[i].demonstration for i in range(start, start + group_size) if successes[i]]
        if text is None or not answers or successes[row]:
            found.append(None)
        else:
            found.append(answer_in_feedback(text, peers[row].completion, answers))
    return found


def _mean(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
