"""The rewards of a generation batch: what they may be, and which of them decide success."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..config import SDPOConfig

# What TRL itself passes to a reward function besides the columns of the dataset.
_KEYWORDS = {"prompts", "completions", "trainer_state", "log_extra", "log_metric"}


def check_columns(reward_funcs: Any, keywords: Mapping[str, Any]) -> None:
    """The columns of both datasets, as far as they are known, are no keywords that TRL passes to reward functions.

    Args:
        reward_funcs: the trainer's argument.
        keywords: the trainer's other arguments, by name.
    """
    has_environments = keywords.get("environment_factory") is not None
    for name in ("train_dataset", "eval_dataset"):
        dataset = keywords.get(name)
        parts = dataset if isinstance(dataset, dict) else {None: dataset}
        for key, part in parts.items():
            columns = getattr(part, "column_names", None) or ()
            try:
                check_keywords(columns, reward_funcs, has_environments=has_environments)
            except ValueError as error:
                raise ValueError(f"{name if key is None else f'{name}[{key!r}]'}: {error}") from error


def check_keywords(columns: Iterable[str], reward_funcs: Any, *, has_environments: bool) -> None:
    """No column of the dataset has the name of a keyword with which TRL calls a reward function.

    Args:
        columns: names; reward functions get each as a keyword.
        reward_funcs: one or a list; reward models get no columns.
        has_environments: TRL then passes the environments too, also to their own `get_reward`.
    """
    listed = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
    functions = has_environments or any(
        reward is not None and not isinstance(reward, (str, nn.Module)) for reward in listed
    )
    if not functions:
        return
    reserved = _KEYWORDS | ({"environments"} if has_environments else set())
    if taken := sorted(set(columns) & reserved):
        raise ValueError(
            f"expected columns that reward functions can take as keywords, got {', '.join(taken)}, which TRL "
            "passes to them itself; rename them"
        )


def check_success_functions(config: SDPOConfig, names: Sequence[str]) -> None:
    """`success_reward_funcs` names reward functions of the trainer, each of them one.

    Args:
        config: its `success_reward_funcs` is used.
        names: of the trainer's reward functions.
    """
    for name in config.success_reward_funcs or ():
        if names.count(name) != 1:
            raise ValueError(
                f"success_reward_funcs: expected names of reward functions, of {list(names)}, got {name!r}, which "
                f"{names.count(name) or 'none'} of them have; rename the function, or choose another"
            )


def check_finite(rewards: Tensor, names: Sequence[str], weights: Tensor) -> None:
    """No reward is infinite, nor their weighted sum: the advantages would be NaN.

    Args:
        rewards: [B, F] of all processes; NaN: a function did not judge the row.
        names: of the F reward functions.
        weights: [F].
    """
    for name, column in zip(names, rewards.unbind(dim=1), strict=True):
        if (infinite := column.isinf()).any():
            raise ValueError(
                f"reward function {name!r}: expected finite rewards, got {column[infinite][0].item()}; clip them"
            )
    if (rewards * weights).nansum(dim=1).isinf().any():
        raise ValueError(
            f"reward_weights: expected a finite sum of the weighted rewards of {', '.join(names)}, got an infinite "
            "one; scale the rewards down"
        )


def success_scores(
    rewards: Tensor, names: Sequence[str], weights: Tensor, success_reward_funcs: Sequence[str] | None
) -> Tensor:
    """What is compared with the threshold of a success: the sum of the named rewards, or the weighted sum of all.

    Args:
        rewards: [B, F]; NaN: a function did not judge the row, and adds nothing.
        names: of the F reward functions.
        weights: [F]; the named rewards have none.
        success_reward_funcs: the named ones; `None`: all of them.

    Returns:
        [B]; NaN where none of these functions judged the row.

    Examples:
        >>> import torch
        >>> rewards, weights = torch.tensor([[1.0, 0.0], [1.0, torch.nan]]), torch.tensor([0.5, 0.5])
        >>> success_scores(rewards, ["format", "correct"], weights, None).tolist()
        [0.5, 0.5]
        >>> success_scores(rewards, ["format", "correct"], weights, ["correct"]).tolist()
        [0.0, nan]
    """
    if success_reward_funcs is None:
        terms = rewards * weights
    else:
        terms = rewards[:, [names.index(name) for name in success_reward_funcs]]
    return terms.nansum(dim=1).masked_fill(terms.isnan().all(dim=1), float("nan"))
