"""A generation batch as it was sampled, and as it was scored."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..config import SDPOConfig
from .demonstrations import Rollout
from .prompts import Completion, Prompt
from .rewards import check_finite, success_scores
from .thinking import ParseResponse, demonstration_texts
from .written import other_columns


class Sample(NamedTuple):
    """This process's rows of a generation batch before they are scored; see `Rollout`."""

    prompts: list[Prompt]
    completions: list[Completion]
    completion_lengths: list[int]
    demonstrations: list[str]
    columns: list[dict[str, Any]]


def sample(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    completion_ids: Sequence[Sequence[int]],
    config: SDPOConfig,
    tokenizer: Any,
    parse: ParseResponse,
    *,
    rows: Sequence[Mapping[str, Any]] = (),
) -> Sample:
    """A copy, which reward functions cannot change.

    Args:
        prompts: one per row.
        completions: one per row.
        completion_ids: the tokens of each completion.
        config: whether demonstrations have their thinking, and its marks.
        tokenizer: the trainer's processing class.
        parse: as for `demonstration_texts`.
        rows: of the dataset, whose columns are wanted.
    """
    own_prompts, own_completions = copy.deepcopy((list(prompts), list(completions)))
    lengths = [len(ids) for ids in completion_ids]
    texts = demonstration_texts(completions, completion_ids, config, tokenizer, parse)
    return Sample(own_prompts, own_completions, lengths, texts, other_columns(rows))


def scored(
    sampled: Sample,
    feedback: list[str | None],
    rewards: Tensor,
    config: SDPOConfig,
    *,
    names: Sequence[str],
    weights: Tensor,
) -> Rollout:
    """The batch with its feedback and rewards.

    Args:
        sampled: this process's rows.
        feedback: of each of them.
        rewards: [B, F] of all processes.
        config: which reward functions decide about success.
        names: of the F reward functions.
        weights: [F] of their rewards.

    Raises:
        ValueError: an infinite reward, or an infinite weighted sum.
    """
    weights = weights.to(rewards.device)
    check_finite(rewards, names, weights)
    scores = success_scores(rewards, names, weights, config.success_reward_funcs)
    return Rollout(
        **sampled._asdict(),
        feedback=feedback,
        scores=scores.float().cpu(),
        rewards=rewards.float().cpu(),
    )
