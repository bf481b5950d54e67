"""What the trainer warns about when it is built: settings that have no effect, or are known to do harm."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable
from typing import Any

from sdpo import rate_per_tick

from ..config import SDPOConfig
from ..rollout.written import TEACHER_PROMPT_COLUMN

logger = logging.getLogger("sdpo_rl")

# Options of `GRPOConfig` that only GRPO's advantages and clipped loss read.
_GRPO_LOSS_OPTIONS = ("loss_type", "epsilon", "epsilon_high", "scale_rewards", "multi_objective_aggregation")
# The paper's moving average: its rate, and the completions of one update (32 prompts × 8).
PUBLISHED_RATE = 0.05
_PUBLISHED_SAMPLES = 256
# A teacher that moves more than this many times as fast as the paper's has a warning. The fastest published setting
# is 3.1 times as fast (0.01 per 16 completions); 0.05 per 64, with which recorded runs learned less, is 4 times
# (docs/choosing.md).
_FAST_PACE = 3.5


def warn_of_grpo_options(args: Any) -> None:
    """One warning with those of `_GRPO_LOSS_OPTIONS` that are not at their defaults, if there are any."""
    # Defaults of the constructor, not of the dataclass fields: Unsloth's configuration overrides them there.
    parameters = inspect.signature(type(args)).parameters
    changed = [
        f"{name}={getattr(args, name)!r}"
        for name in _GRPO_LOSS_OPTIONS
        if name in parameters and getattr(args, name) != parameters[name].default
    ]
    if changed:
        logger.warning(
            "%s: no effect, the self-distillation loss replaces GRPO's; remove it.", ", ".join(changed)
        )


def warn_of_best_loss(args: Any, *, has_rewards: bool) -> None:
    """One warning where the lowest loss, the Trainer's default, chooses the best checkpoint although rewards exist.

    Args:
        args: `GRPOConfig`.
        has_rewards: whether completions are scored.
    """
    if has_rewards and args.load_best_model_at_end and args.metric_for_best_model in ("loss", "eval_loss"):
        logger.warning(
            "load_best_model_at_end=True keeps the checkpoint of the lowest eval_loss (metric_for_best_model=%r), "
            "which says how far student and teacher are apart, not how good completions are. Set "
            "metric_for_best_model='eval_reward' to keep the one of the highest reward.",
            args.metric_for_best_model,
        )


def warn_of_fast_teacher(config: SDPOConfig, *, samples_per_tick: float) -> None:
    """One warning where the teacher follows the student much faster than in the paper, per completion or update.

    Args:
        config: its `teacher_*` fields are used.
        samples_per_tick: completions from one update of the teacher to the next.
    """
    if message := fast_teacher(config, samples_per_tick=samples_per_tick):
        logger.warning(message)


def rate_of_published_samples(config: SDPOConfig, *, samples_per_tick: float) -> float | None:
    """The teacher's rate per 256 completions, the paper's batch; `None` for a teacher that is no moving average."""
    if config.teacher_mode not in ("ema", "lora_ema"):
        return None
    samples = config.teacher_rate_samples or samples_per_tick
    return rate_per_tick(config.teacher_update_rate, samples=_PUBLISHED_SAMPLES, per_samples=samples)


def fast_teacher(config: SDPOConfig, *, samples_per_tick: float) -> str | None:
    """The warning where the teacher is too fast, or `None`. Arguments as for `warn_of_fast_teacher`."""
    published = rate_of_published_samples(config, samples_per_tick=samples_per_tick)
    if published is None:
        return None
    rate, samples = config.teacher_update_rate, config.teacher_rate_samples or samples_per_tick
    of_update = rate_per_tick(rate, samples=samples_per_tick, per_samples=samples)
    # Times the samples, below: multiples of the paper's pace, per completion and per update.
    pace = math.inf if rate == 1.0 else math.log1p(-rate) / math.log1p(-PUBLISHED_RATE)
    if pace * _PUBLISHED_SAMPLES / samples > _FAST_PACE:
        found = f"{published:.2g} per {_PUBLISHED_SAMPLES}"
    elif pace * samples_per_tick / samples > _FAST_PACE:
        found = f"{of_update:.2g} per update, of {samples_per_tick:g} completions"
    else:
        return None
    # In larger batches the paper's rate per 256 completions would itself be too fast per update.
    small = samples_per_tick <= _FAST_PACE * _PUBLISHED_SAMPLES
    wanted = _PUBLISHED_SAMPLES if small else None
    unit = "" if config.teacher_rate_samples == wanted else f"teacher_rate_samples={wanted} with "
    # A larger batch slows the teacher only where the rate is that of a generation batch, whatever its size.
    per_batch = config.teacher_rate_samples is None and config.teacher_tick == "generation_batch"
    larger = per_batch and pace <= _FAST_PACE
    fix = (
        f"{unit}teacher_update_rate={PUBLISHED_RATE:g}{', or enlarge the generation batch' if larger else ''}"
    )
    return (
        f"teacher_update_rate={rate:g} per {samples:g} completions is {found}, where the paper has "
        f"{PUBLISHED_RATE:g}. A teacher that follows its student so fast can amplify its errors until the run "
        f"collapses; set {fix}."
    )


def warn_of_teacher_prompt_column(datasets: Iterable[Any]) -> None:
    """One warning where a dataset has a column of teacher prompts, which only a `teacher_prompt_func` reads.

    Args:
        datasets: each a dataset, a mapping of several, or `None`.
    """
    parts = [part for data in datasets for part in (data.values() if isinstance(data, dict) else [data])]
    if any(TEACHER_PROMPT_COLUMN in (getattr(part, "column_names", None) or ()) for part in parts):
        logger.warning(
            "The column %r of the dataset does not reach the teacher; pass SDPOTrainer(teacher_prompt_func=lambda "
            "attempt: attempt.columns[%r]), or rename the column.",
            TEACHER_PROMPT_COLUMN,
            TEACHER_PROMPT_COLUMN,
        )
