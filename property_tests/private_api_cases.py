"""The tiny model of the private API, and questions of a task."""

from __future__ import annotations

import random
import sys
from typing import Any

from programs import EXAMPLES

sys.path.insert(0, str(EXAMPLES / "private_api"))

from environment import Environment, Question, Split
from smoke_model import save_model

__all__ = ["HERE", "drawn", "fast_teacher", "save_model"]

HERE = EXAMPLES / "private_api"


def drawn(task: Environment, split: Split, count: int) -> list[Question]:
    """Questions of a split."""
    rng = random.Random(split)
    return [task.draw(rng, split) for _ in range(count)]


def fast_teacher(run: dict[str, Any]) -> bool:
    """Whether the teacher of a record is four times as fast as the paper's, whose rate is for 256 completions."""
    settings = run["settings"]
    if not settings or settings.get("teacher_mode", "ema") != "ema":
        return False
    per = settings.get("teacher_rate_samples") or run["samples_per_step"]
    return bool(settings["teacher_update_rate"] == 0.05 and per == 64)
