"""The runs that are compared: what each one changes, and the questions that they answer.

A module of `train.py`, `run.py` and `figures.py`; nothing to run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Method = Literal["sdpo", "grpo", "supervised"]
GROUP = 8  # completions of a prompt
SAMPLING = ("generate", "graph")  # by transformers; with one CUDA graph a token
# Seeds from here on are for choosing settings, such as GRPO's learning rate; the seeds of the results are below.
FIRST_SEED_FOR_CHOOSING = 100
# The questions that they answer, and no other.
CHOOSING = ("grpo learning rate", "settings", "lasting settings")

# The settings of every SDPO arm that says nothing else. The rate is per generation batch; the paper's .05 per 256
# samples is .013 per 64.
SDPO_SETTINGS: dict[str, Any] = {
    "alpha": 0.5,
    "k": 100,
    "teacher_update_rate": 0.01,
    "teacher_rate_samples": None,
}
# From "grpo learning rate", where all end at 0, and the best of "settings"; both on seeds for choosing.
GRPO_LEARNING_RATE = 5e-6
CHOSEN = "α=0, hybrid λ=0.5, rate 0.05, lr 2e-05"
_CHOSEN_ARMS = "SDPO, chosen settings"  # how their names begin


@dataclass(frozen=True)
class Arm:
    """One method with its settings."""

    name: str
    method: Method = "sdpo"
    learning_rate: float = 1e-5
    samples_per_step: int = 64
    shuffled_feedback: bool = False
    settings: dict[str, Any] = field(default_factory=dict)  # of `SDPOConfig`, on top of SDPO_SETTINGS
    lora_rank: int | None = None  # of adapters on all linear layers; `None`: all weights train
    length: int = 1  # its samples, as a multiple of those of other arms
    decay: bool = False  # the learning rate falls linearly to 0; otherwise it is constant

    @property
    def memory(self) -> float:
        """GPU memory, as a multiple of that of most arms."""
        all_logits = {"anchor_weight", "entry_clip"} & self.settings.keys()
        return 2.0 if self.samples_per_step > 64 or all_logits else 1.0

    def all_settings(self) -> dict[str, Any]:
        """The arguments of `SDPOConfig`; none without SDPO."""
        return {**SDPO_SETTINGS, **self.settings} if self.method == "sdpo" else {}

    def recorded(self) -> dict[str, Any]:
        """What a record says about the arm, besides its name."""
        return {
            "method": self.method,
            "learning_rate": self.learning_rate,
            "learning_rate_decay": self.decay,
            "samples_per_step": self.samples_per_step,
            "shuffled_feedback": self.shuffled_feedback,
            "lora_rank": self.lora_rank,
            "settings": self.all_settings(),
        }


_FAST_TEACHER: dict[str, Any] = {"alpha": 0.0, "teacher_update_rate": 0.05}


def _cure(name: str, **settings: Any) -> Arm:
    return Arm(f"fast teacher + {name}", settings={**_FAST_TEACHER, **settings})


# SRPO as published: with its denominator and its weights of tokens.
_SRPO: dict[str, Any] = {
    "routing": "srpo",
    "loss_aggregation": "batch-token-mean",
    "token_weights": "confidence",
}

# A fast teacher with one remedy ("cure" in names), of one option or a few. Steps without a signal change nothing in
# any of them.
_CURES: tuple[Arm, ...] = (
    _cure("rate per 256 samples", teacher_rate_samples=256),
    _cure("batch-token-mean", loss_aggregation="batch-token-mean"),
    _cure("SRPO routing", routing="srpo"),
    _cure("SRPO", **_SRPO),
    _cure("hybrid λ=0.1", grpo_weight=0.1),
    _cure("hybrid λ=0.5", grpo_weight=0.5),
    _cure("confidence weights", token_weights="confidence"),
    _cure("pass-rate weights", row_weights="pass_rate"),
    _cure("entry clip 0.05", support="full", entry_clip=0.05),
    _cure("anchor 0.1", anchor_weight=0.1),
    # As old on average as the moving average, which is 1 / rate batches.
    _cure("teacher restart", teacher_mode="frozen", teacher_restart_every=40),
    _cure("trust region", teacher_mode="trust_region"),
)
# Those with which every seed ends at 0.8 of its best or more. They run longer, and a growing share of GRPO, too.
HOLDING_CURES = tuple(
    f"fast teacher + {name}"
    for name in (
        "rate per 256 samples",
        "SRPO routing",
        "SRPO",
        "hybrid λ=0.1",
        "hybrid λ=0.5",
        "teacher restart",
    )
)
_LASTING_CURES = (
    *(arm for arm in _CURES if arm.name in HOLDING_CURES),
    _cure("hybrid λ=0.5 to 1", grpo_weight=0.5, grpo_weight_final=1.0),
)

# The arms of "settings", which run on seeds for choosing.
_CANDIDATES: tuple[Arm, ...] = (
    Arm("α=0.5"),
    Arm("α=0.1", settings={"alpha": 0.1}),
    Arm("α=0", settings={"alpha": 0.0}),
    Arm("α=0, lr 2e-05", learning_rate=2e-5, settings={"alpha": 0.0}),
    Arm("α=0, confidence weights", settings={"alpha": 0.0, "token_weights": "confidence"}),
    Arm("α=0, hybrid λ=0.5", settings={"alpha": 0.0, "grpo_weight": 0.5}),
    Arm("α=0, hybrid λ=0.5, lr 2e-05", learning_rate=2e-5, settings={"alpha": 0.0, "grpo_weight": 0.5}),
    Arm("α=0, hybrid λ=0.5, rate 0.05", settings={**_FAST_TEACHER, "grpo_weight": 0.5}),
    Arm(
        "α=0, hybrid λ=0.5, rate 0.05, lr 2e-05",
        learning_rate=2e-5,
        settings={**_FAST_TEACHER, "grpo_weight": 0.5},
    ),
    Arm("α=0.5, hybrid λ=0.5", settings={"grpo_weight": 0.5}),
    Arm("α=0, SRPO", settings={"alpha": 0.0, **_SRPO}),
    Arm("α=0, SRPO, lr 2e-05", learning_rate=2e-5, settings={"alpha": 0.0, **_SRPO}),
    Arm("α=0, SRPO, rate 0.02", settings={"alpha": 0.0, "teacher_update_rate": 0.02, **_SRPO}),
    Arm("α=0, SRPO, rate 0.05", settings={"alpha": 0.0, "teacher_update_rate": 0.05, **_SRPO}),
    Arm("α=0, SRPO, decay", settings={"alpha": 0.0, **_SRPO}, decay=True),
    Arm("α=0, SRPO, lr 2e-05, decay", learning_rate=2e-5, settings={"alpha": 0.0, **_SRPO}, decay=True),
    Arm("α=0.5, SRPO", settings=_SRPO),
)


def _chosen(name: str, **changes: Any) -> Arm:
    """The chosen candidate with something changed."""
    return replace(next(arm for arm in _CANDIDATES if arm.name == CHOSEN), name=name, **changes)


def _default_rate(name: str, *, decay: bool = False, **settings: Any) -> Arm:
    """α=0 with the default rate of the teacher."""
    rate = {"teacher_update_rate": 0.05, "teacher_rate_samples": 256}
    return Arm(f"default rate + {name}", settings={"alpha": 0.0, **rate, **settings}, decay=decay)


# Settings that may last: a slower teacher; GRPO for the rows that succeed, with half of the loss, or with a share
# that grows to all of it; a learning rate that falls. They run on seeds for choosing.
_MAY_LAST: tuple[Arm, ...] = tuple(
    replace(arm, length=5)
    for arm in (
        _cure("rate per 256 samples", teacher_rate_samples=256),
        _cure("SRPO routing", routing="srpo"),
        _default_rate("hybrid λ=0.5", grpo_weight=0.5),
        _default_rate("hybrid λ=0.5 to 1", grpo_weight=0.5, grpo_weight_final=1.0),
        _default_rate("hybrid λ=0.5 to 1, decay", decay=True, grpo_weight=0.5, grpo_weight_final=1.0),
        _chosen(f"{_CHOSEN_ARMS}, decay", decay=True),
        _chosen(
            f"{_CHOSEN_ARMS}, λ=0.5 to 1",
            settings={**_FAST_TEACHER, "grpo_weight": 0.5, "grpo_weight_final": 1.0},
        ),
    )
)
# The two of them that ended closest to their best; the first is the one that was chosen.
LASTING = ("default rate + hybrid λ=0.5 to 1, decay", "default rate + hybrid λ=0.5 to 1")


# The teacher is as fast per sample as in batches of 64.
_LARGE: dict[str, Any] = {"samples_per_step": 256, "length": 5}


def _large(name: str, *, learning_rate: float = 1e-5, **settings: Any) -> Arm:
    return Arm(name, learning_rate=learning_rate, settings={**settings, "teacher_rate_samples": 64}, **_LARGE)


QUESTIONS: dict[str, tuple[Arm, ...]] = {
    # Does SDPO learn what GRPO cannot?
    "learns": (
        Arm("SDPO"),
        _chosen(_CHOSEN_ARMS),
        Arm("GRPO", method="grpo", learning_rate=GRPO_LEARNING_RATE),
        Arm("SDPO, shuffled feedback", shuffled_feedback=True),
        _chosen(f"{_CHOSEN_ARMS}, shuffled feedback", shuffled_feedback=True),
        Arm("SDPO, peers only", settings={"include_environment_feedback": False}),
        Arm("supervised", method="supervised"),
    ),
    "grpo learning rate": tuple(
        Arm(f"GRPO, lr {rate:g}", method="grpo", learning_rate=rate) for rate in (2e-6, 5e-6, 1e-5)
    ),
    "settings": _CANDIDATES,
    # How fast may the teacher follow the student?
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
    "cures": (Arm("fast teacher", settings=_FAST_TEACHER), *_CURES),
    # Is a teacher too fast per completion, or per update?
    "large batches": (
        _large("SRPO, 0.04 per update", alpha=0.0, **_SRPO),
        _large("SRPO, 0.19 per update", **_FAST_TEACHER, **_SRPO),
        _large("hybrid λ=0.5, 0.19 per update", **_FAST_TEACHER, grpo_weight=0.5),
        _large(
            "hybrid λ=0.5, 0.19 per update, lr 2e-05", learning_rate=2e-5, **_FAST_TEACHER, grpo_weight=0.5
        ),
    ),
    # Does it last?
    "lasting": (
        _chosen(_CHOSEN_ARMS, length=5),
        Arm("fast teacher", settings=_FAST_TEACHER, length=5),
        *(replace(arm, length=5) for arm in _LASTING_CURES),
        *(next(arm for arm in _MAY_LAST if arm.name == name) for name in LASTING),
    ),
    "lasting settings": _MAY_LAST,
    "lora": (
        Arm("all weights"),
        *(Arm(f"LoRA r=16, lr {rate:g}", lora_rank=16, learning_rate=rate) for rate in (1e-4, 3e-4)),
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


def recorded_as(question: str, arm: Arm) -> tuple[str, Arm]:
    """The question and the arm that an arm is recorded as: the first with the same settings.

    Several questions have an arm in common, which runs once; the arms of a question in CHOOSING run for it alone.
    The chosen settings are another arm's where they can be: its records stay when other settings are chosen.

    Examples:
        >>> recorded_as("alpha", arms("alpha")[2])[1].name
        'SDPO'
    """
    if question in CHOOSING:
        return question, arm
    recorded = [(name, other) for name, arms in QUESTIONS.items() if name not in CHOOSING for other in arms]
    for other_question, other in sorted(recorded, key=lambda one: one[1].name.startswith(_CHOSEN_ARMS)):
        if _nameless(other) == _nameless(arm):
            return other_question, other
    raise ValueError(f"arm: expected an arm of QUESTIONS, got {arm.name!r}; add it to one of them")


def _nameless(arm: Arm) -> Arm:
    return replace(arm, name="", settings=arm.all_settings())
