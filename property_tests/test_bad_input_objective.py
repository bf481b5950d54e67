"""Options of GRPO's objective that the loss does not have, or not so: refused before anything is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from bad_input import Case, run
from bad_trainer_input import train

from sdpo_rl import SDPOConfig

OBJECTIVE = [
    Case(
        "a KL term that would be dropped",
        lambda path: train(path, beta=0.04),
        ValueError,
        ("beta: expected 0.0", "got 0.04", "KL penalty", "grpo_weight", "enabled=False"),
    ),
    Case(
        "a loss type that TRL does not have",
        lambda path: train(path, loss_type="gspo", sdpo_config=tiny.config(grpo_weight=0.5)),
        ValueError,
        ("loss_type: expected one of", "got 'gspo'", "'vespo'"),
    ),
    Case(
        "a level of the importance weights that TRL does not have",
        lambda path: train(path, importance_sampling_level="row", sdpo_config=tiny.config(grpo_weight=0.5)),
        ValueError,
        ("importance_sampling_level: expected 'token' or 'sequence'", "got 'row'"),
    ),
    Case(
        "a largest ratio of 0",
        lambda path: train(path, delta=0.0, sdpo_config=tiny.config(grpo_weight=0.5)),
        ValueError,
        ("delta: expected a number > 0", "got 0.0", "4.0"),
    ),
    Case(
        "more than all tokens",
        lambda path: train(path, top_entropy_quantile=1.5, sdpo_config=tiny.config(routing="srpo")),
        ValueError,
        ("top_entropy_quantile: expected a number in [0, 1]", "got 1.5", "1.0 for all"),
    ),
    Case(
        "a largest ratio below 1",
        lambda path: train(path, loss_type="cispo", sdpo_config=tiny.config(routing="srpo")),
        ValueError,
        ("epsilon_high: expected at least 1 with loss_type='cispo'", "got 0.2", "5.0"),
    ),
    Case(
        "a GRPO part in a step over two generation batches",
        lambda path: train(
            path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            steps_per_generation=2,
            sdpo_config=tiny.config(grpo_weight=0.5),
        ),
        ValueError,
        (
            "steps_per_generation: expected a multiple of gradient_accumulation_steps (4)",
            "got 2",
            "change one",
        ),
    ),
    Case(
        "an entropy bonus that would be dropped",
        lambda path: train(path, entropy_coef=0.01),
        ValueError,
        ("entropy_coef", "got 0.01", "entropy bonus", "enabled=False"),
    ),
    Case(
        "a loss on some tokens alone",
        lambda path: train(path, top_entropy_quantile=0.2),
        ValueError,
        ("top_entropy_quantile", "got 0.2", "highest entropy", "top_entropy_quantile=1.0", "enabled=False"),
    ),
    Case(
        "a second clip",
        lambda path: train(path, delta=4.0),
        ValueError,
        ("delta: expected None", "got 4.0", "is_clip", "delta=None", "enabled=False"),
    ),
    Case(
        "a mask of rows",
        lambda path: train(path, off_policy_mask_threshold=0.5),
        ValueError,
        ("off_policy_mask_threshold", "got 0.5", "off-policy rows", "enabled=False"),
    ),
    Case(
        "importance weights of sequences",
        lambda path: train(path, importance_sampling_level="sequence"),
        ValueError,
        (
            "importance_sampling_level",
            "got 'sequence'",
            "whole sequences",
            "importance_sampling_level='token'",
        ),
    ),
]


@run(OBJECTIVE)
def test_objective(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "bnpo"},
        {"loss_type": "sapo", "sapo_temperature_neg": 1.1},
        {"epsilon": 0.1, "epsilon_high": 0.28},
        {"scale_rewards": "none"},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"mask_truncated_completions": True},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_what_shapes_the_replaced_objective_alone_is_accepted(tmp_path: Path, changes: Any) -> None:
    """Unsloth sets some of these by itself."""
    with pytest.raises(AssertionError, match="asked to generate"):
        train(tmp_path, **changes)


def test_terms_and_masks_are_grpo_s_when_disabled(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="asked to generate"):
        train(tmp_path, sdpo_config=SDPOConfig(enabled=False), top_entropy_quantile=0.2, delta=4.0)
