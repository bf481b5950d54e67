"""What tests of the trainer read of a run, and settings that several of them have."""

from __future__ import annotations

from typing import Any

import tiny
import torch

FOUR: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
PREFIX = "self_distillation/"


def texts(completions: list[Any]) -> list[str]:
    return [tiny.text_of(completion) for completion in completions]


def never(completions: list[Any], **_: Any) -> list[float]:
    """No success and no feedback."""
    return [0.0 for _ in completions]


def logs(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)
