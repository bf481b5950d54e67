"""`distillation_loss` at temperature 1, with the options of one support each: short names for the tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdpo import distillation_loss


def full_loss(student: Tensor, teacher: Tensor, *, alpha: float) -> Tensor:
    return distillation_loss(student, teacher, support="full", alpha=alpha, temperature=1.0)


def topk_loss(
    student: Tensor, teacher: Tensor, *, k: Any, alpha: Any, tail: Any, support: Any = "student"
) -> Tensor:
    return distillation_loss(student, teacher, support=support, k=k, tail=tail, alpha=alpha, temperature=1.0)


def sampled_loss(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    return distillation_loss(student, teacher, tokens=tokens, support="sampled", alpha=1.0, temperature=1.0)
