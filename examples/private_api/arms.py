"""The runs that are compared: what each one changes, and the questions that they answer.

A module of `train.py` and `run.py`; nothing to run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Method = Literal["sdpo", "grpo", "supervised"]
GROUP = 8  # completions of a prompt

# The settings of every SDPO arm that says nothing else. The rate is per generation batch of 64 samples; the paper's
# .05 per 256 samples is .013 per 64.
SDPO_SETTINGS: dict[str, Any] = {"alpha": 0.5, "k": 100, "teacher_update_rate": 0.01}


@dataclass(frozen=True)
class Arm:
    """One method with its settings."""

    name: str
    method: Method = "sdpo"
    learning_rate: float = 1e-5
    samples_per_step: int = 64
    shuffled_feedback: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # of `SDPOConfig`, on top of SDPO_SETTINGS


_COLLAPSING: dict[str, Any] = {"alpha": 0.0, "teacher_update_rate": 0.05}


def _cure(name: str, **settings: Any) -> Arm:
    return Arm(f"collapsing + {name}", settings={**_COLLAPSING, **settings})


QUESTIONS: dict[str, tuple[Arm, ...]] = {
    # Does SDPO learn what GRPO cannot?
    "learns": (
        Arm("SDPO"),
        Arm("GRPO", method="grpo", learning_rate=5e-6),
        Arm("SDPO, shuffled feedback", shuffled_feedback=True),
        Arm("SDPO, peers only", settings={"include_environment_feedback": False}),
        Arm("supervised", method="supervised"),
    ),
    "grpo learning rate": tuple(
        Arm(f"GRPO, lr {rate:g}", method="grpo", learning_rate=rate) for rate in (2e-6, 5e-6, 1e-5)
    ),
    # Is collapse the teacher's rate, and does the rate belong to samples?
    "rate": tuple(
        Arm(
            f"α={alpha:g}, rate {rate:g} per {samples}",
            samples_per_step=samples,
            settings={"alpha": alpha, "teacher_update_rate": rate},
        )
        for samples in (64, 256)
        for alpha in (0.0, 0.5)
        for rate in (0.0, 0.0025, 0.01, 0.05)
    ),
    "alpha": tuple(Arm(f"α={alpha:g}", settings={"alpha": alpha}) for alpha in (0.0, 0.1, 0.5, 1.0)),
    "support": (
        *(Arm(f"K={k}", settings={"k": k}) for k in (5, 20, 100)),
        Arm("K=20, no tail", settings={"k": 20, "tail": "renormalize"}),
        Arm("full vocabulary", settings={"support": "full"}),
    ),
}


def arms(question: str) -> tuple[Arm, ...]:
    """The arms of a question.

    Raises:
        ValueError: there is no such question.
    """
    if question not in QUESTIONS:
        raise ValueError(
            f"question: expected one of {', '.join(QUESTIONS)}, got {question!r}; pass one of them"
        )
    return QUESTIONS[question]
