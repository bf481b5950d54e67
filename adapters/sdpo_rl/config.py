"""The options of a run, flat, with the source of every default."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sdpo import Templates

Support = Literal["student", "teacher", "full", "sampled"]
Tail = Literal["bucket", "renormalize"]
Aggregation = Literal["token-mean", "sequence-mean"]
TeacherMode = Literal["ema", "frozen", "trust_region", "live", "lora_ema"]
TeacherTick = Literal["generation_batch", "optimizer_step"]
TeacherDtype = Literal["float32", "bfloat16"]
TeacherOffload = Literal["none", "cpu"]
TeacherOnResume = Literal["restore", "restart"]
Policy = Literal["first", "random", "shortest", "longest", "best"]
Truncation = Literal["middle", "left", "right", "error"]
Backend = Literal["auto", "torch", "triton", "logits"]

_TEMPLATES = Templates()


def _option(default: Any, text: str) -> Any:
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class SDPOConfig:
    """Everything SDPO adds to a `GRPOConfig`, one flat dataclass.

    It parses from YAML and from the command line (`TrlParser((SDPOConfig, GRPOConfig))`). A bad value is
    refused when the object is made, with the fix in the message. Sources: *paper* is arXiv 2601.20802 v2,
    *reference* the authors' published code, *ours* a choice of this library.

    Args:
        enabled: `False` is GRPO, untouched. Default `True`.
        alpha: 0 is KL(teacher‖student), 1 is KL(student‖teacher), between them the generalized
            Jensen–Shannon divergence. Default 0.5 (paper §3).
        k: K of the top-K supports. Default 100 (paper §3).
        support: tokens that the divergence is taken over: the top-K of the `student` (default, paper §3) or of
            the `teacher`, the `full` vocabulary, or the `sampled` token (needs `alpha=1`; paper Prop. 2.1).
        tail: `bucket` (default, reference) keeps the mass outside the top-K as one more category;
            `renormalize` renormalizes over the K.
        is_clip: upper truncation of π_θ/π_old per token; `None` turns the weights off. Default 2.0
            (reference).
        rollout_is_clip: the same for π_old/π_rollout, when the inference engine reports its own
            log-probabilities; `None` turns it off. Default 2.0 (reference).
        loss_aggregation: `token-mean` (default, reference) over all active tokens of the optimizer step, or
            `sequence-mean` over its active rows.
        teacher_mode: `ema` (default, reference), `frozen`, `trust_region` (best in paper Table 4), `live`,
            or `lora_ema`: `ema` that insists on adapters.
        teacher_update_rate: weight of the *student* in the moving average. Default 0.05 (paper §3).
        trust_region_coef: weight of the live student's logits in the `trust_region` teacher. Default 0.5
            (ours; the paper does not print its value).
        teacher_tick: when the average moves: once per `generation_batch` (default, reference), or per
            `optimizer_step`.
        teacher_dtype: dtype of the averaged weights: `float32` (default, ours: a bfloat16 average stands
            still at small rates), or `bfloat16` with seeded stochastic rounding. Of a bfloat16 model that
            trains whole, float32 is two copies in bytes, and a third during the teacher's forward; bfloat16
            is one. Of adapters, megabytes.
        teacher_offload: `none` (default) or `cpu`: where the averaged weights rest between forwards.
        teacher_on_resume: `restore` (default) demands a teacher in the checkpoint; `restart` begins again
            from the loaded student.
        success_reward_threshold: a completion whose score reaches it is a success. Default 1.0
            (reference's README).
        dont_reprompt_on_self_success: a row is never its own demonstration. Default `True` (paper's runs).
        demonstration_policy: which success serves: `random` (default, ours: seeded, no length bias), `first`
            (reference), `shortest`, `longest`, `best`.
        num_demonstrations: successes shown per reprompt. Default 1 (paper).
        remove_thinking_from_demonstration: strip `<think>…</think>`. Default `True` (paper's runs).
        include_environment_feedback: use the texts the reward functions return. Default `True` (paper §4).
        environment_feedback_only_without_solution: feedback is shown only where no demonstration exists.
            Default `True` (paper's runs).
        max_reprompt_length: tokens of a reprompt. Default 10240 (reference).
        reprompt_truncation: where a too long demonstration or feedback is cut: `middle` (default, ours),
            `left`, `right`; `error` raises with the sizes. The question is never cut.
        reprompt_template: default as in the paper's runs; fields `{prompt}`, `{solution}`, `{feedback}`.
        solution_template: default as in the paper's runs; field `{successful_previous_attempt}`.
        feedback_template: default as in the paper's runs; field `{feedback_raw}`.
        apply_chat_template_kwargs: extra chat-template arguments for the reprompt alone. Default `{}`
            (reference). `GRPOConfig.chat_template_kwargs` already reaches both sides.
        loss_backend: `auto` (default): the fused loss, Triton where it runs, torch elsewhere; `torch`,
            `triton`; `logits` computes whole logits with the readable loss, for unusual heads.
        loss_chunk_size: tokens projected at a time; `None` (default) chooses from free memory.
        diagnostics_patience: generation batches without a single active row before a warning. Default 10.

    Example:
        >>> SDPOConfig(alpha=1.0, k=20).teacher_mode
        'ema'
        >>> SDPOConfig.preset("rich_feedback").teacher_update_rate
        0.01
        >>> SDPOConfig(alpha=3)
        Traceback (most recent call last):
            ...
        ValueError: alpha must be a number in [0, 1] (0: KL(teacher‖student), 1: KL(student‖teacher)), got 3
    """

    enabled: bool = _option(True, "Train with SDPO; False is plain GRPO.")
    alpha: float = _option(0.5, "0: KL(teacher||student), 1: KL(student||teacher), between: generalized JSD.")
    k: int = _option(100, "K of the top-K supports.")
    support: Support = _option("student", "Which tokens the divergence is taken over.")
    tail: Tail = _option("bucket", "What becomes of the mass outside the top-K.")
    is_clip: float | None = _option(2.0, "Upper truncation of the per-token ratio student/old.")
    rollout_is_clip: float | None = _option(2.0, "Upper truncation of the per-token ratio old/rollout.")
    loss_aggregation: Aggregation = _option("token-mean", "What the loss is a mean of.")
    teacher_mode: TeacherMode = _option("ema", "Which weights read the reprompt.")
    teacher_update_rate: float = _option(0.05, "Weight of the student in the moving average.")
    trust_region_coef: float = _option(0.5, "Weight of the live student in the trust-region teacher.")
    teacher_tick: TeacherTick = _option("generation_batch", "When the moving average moves.")
    teacher_dtype: TeacherDtype = _option("float32", "Dtype of the averaged weights.")
    teacher_offload: TeacherOffload = _option("none", "Where the averaged weights rest.")
    teacher_on_resume: TeacherOnResume = _option("restore", "What to do about the teacher on resume.")
    success_reward_threshold: float = _option(1.0, "A score that reaches it is a success.")
    dont_reprompt_on_self_success: bool = _option(True, "A row is never its own demonstration.")
    demonstration_policy: Policy = _option("random", "Which success serves as the demonstration.")
    num_demonstrations: int = _option(1, "Successes shown per reprompt.")
    remove_thinking_from_demonstration: bool = _option(True, "Strip <think>...</think>.")
    include_environment_feedback: bool = _option(True, "Use the texts that reward functions return.")
    environment_feedback_only_without_solution: bool = _option(
        True, "Show feedback only where no demonstration exists."
    )
    max_reprompt_length: int = _option(10240, "Tokens of a reprompt.")
    reprompt_truncation: Truncation = _option("middle", "Where a too long demonstration or feedback is cut.")
    reprompt_template: str = _option(_TEMPLATES.reprompt, "Fields {prompt}, {solution}, {feedback}.")
    solution_template: str = _option(_TEMPLATES.solution, "Field {successful_previous_attempt}.")
    feedback_template: str = _option(_TEMPLATES.feedback, "Field {feedback_raw}.")
    # The shape of annotation that command-line parsers read as a text.
    apply_chat_template_kwargs: dict[str, Any] | str | None = _option(
        {}, "Chat-template arguments for the reprompt (JSON)."
    )
    loss_backend: Backend = _option("auto", "How the loss is computed.")
    loss_chunk_size: int | None = _option(None, "Tokens projected at a time; unset: from free memory.")
    diagnostics_patience: int = _option(10, "Generation batches without an active row before a warning.")

    def __post_init__(self) -> None:
        _flag(self, "enabled", "dont_reprompt_on_self_success")
        _flag(self, "remove_thinking_from_demonstration", "include_environment_feedback")
        _flag(self, "environment_feedback_only_without_solution")
        _fraction(self, "alpha", "(0: KL(teacher‖student), 1: KL(student‖teacher))")
        _fraction(self, "teacher_update_rate", "(the weight of the student; 0 freezes the teacher)")
        _fraction(self, "trust_region_coef", "(the weight of the live student)")
        _positive_int(self, "k", "num_demonstrations", "max_reprompt_length")
        _positive_int(self, "diagnostics_patience")
        if self.loss_chunk_size is not None:
            _positive_int(self, "loss_chunk_size")
        for name in ("is_clip", "rollout_is_clip"):
            if getattr(self, name) is not None:
                _number(self, name, "a finite number > 0, or None to turn the weights off", low=0.0)
        _number(self, "success_reward_threshold", "a finite number")
        _choice(self, "support", get_args(Support))
        _choice(self, "tail", get_args(Tail))
        _choice(self, "loss_aggregation", get_args(Aggregation))
        _choice(self, "teacher_mode", get_args(TeacherMode))
        _choice(self, "teacher_tick", get_args(TeacherTick))
        _choice(self, "teacher_dtype", get_args(TeacherDtype))
        _choice(self, "teacher_offload", get_args(TeacherOffload))
        _choice(self, "teacher_on_resume", get_args(TeacherOnResume))
        _choice(self, "demonstration_policy", get_args(Policy))
        _choice(self, "reprompt_truncation", get_args(Truncation))
        _choice(self, "loss_backend", get_args(Backend))
        if self.support == "sampled" and self.alpha != 1.0:
            raise ValueError(
                "support='sampled' estimates the gradient of KL(student‖teacher) and "
                f"needs alpha=1.0, got alpha={self.alpha}; set alpha=1.0 or another support"
            )
        self.apply_chat_template_kwargs = self.template_kwargs
        self.templates()

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """`apply_chat_template_kwargs` as a mapping; on the command line it is JSON, and `None` is none."""
        return _mapping(self.apply_chat_template_kwargs)

    def templates(self) -> Templates:
        """The three templates as the core's `Templates`."""
        return Templates(
            reprompt=self.reprompt_template, solution=self.solution_template, feedback=self.feedback_template
        )

    @property
    def uses_topk(self) -> bool:
        """Whether the support is the top-K of a model, so that `k` and `tail` apply."""
        return self.support in ("student", "teacher")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SDPOConfig:
        """The settings of one of the paper's experiments, with `overrides` on top.

        `generalization` (paper §3): α=.5, K=100, rate .05, no feedback. `rich_feedback` (§4): α=1, K=20,
        rate .01. `test_time` (§5): as `rich_feedback`. `training_arguments(name)` gives the matching part
        of `GRPOConfig`.

        Raises:
            ValueError: an unknown preset, or a bad value.
            TypeError: an unknown field.
        """
        unknown = sorted(set(overrides) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise TypeError(f"SDPOConfig has no field {', '.join(unknown)}")
        return cls(**{**_lookup(name)[0], **overrides})


def training_arguments(preset: str) -> dict[str, Any]:
    """The `GRPOConfig` side of a preset: `GRPOConfig(**training_arguments(name), output_dir=...)`.

    Learning rate, warm-up, optimizer, clipping and sampling as the paper's Appendix prints them. Batch sizes
    depend on the machine and stay with the caller: `generalization` and `rich_feedback` use 32 prompts × 8
    completions (`rich_feedback` with mini-batches of one prompt), `test_time` 1 × 16.

    Example:
        >>> training_arguments("generalization")["learning_rate"]
        1e-05
    """
    return dict(_lookup(preset)[1])


_COMMON: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "weight_decay": 0.01,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "beta": 0.0,
    "lr_scheduler_type": "constant_with_warmup",
}
_RICH = {"alpha": 1.0, "k": 20, "teacher_update_rate": 0.01}
_RICH_ARGUMENTS = {**_COMMON, "learning_rate": 1e-6, "warmup_steps": 0}
_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "generalization": (
        {
            "alpha": 0.5,
            "k": 100,
            "teacher_update_rate": 0.05,
            "include_environment_feedback": False,
        },
        {**_COMMON, "learning_rate": 1e-5, "warmup_steps": 10, "num_generations": 8},
    ),
    "rich_feedback": (_RICH, {**_RICH_ARGUMENTS, "num_generations": 8}),
    "test_time": (_RICH, {**_RICH_ARGUMENTS, "num_generations": 16}),
}


def _lookup(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if name not in _PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(map(repr, _PRESETS))}")
    return _PRESETS[name]


def _flag(config: SDPOConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def _is_number(value: object, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


# What the fields keep are Python's own numbers: NumPy's would not go through YAML or JSON.


def _fraction(config: SDPOConfig, name: str, meaning: str) -> None:
    value = getattr(config, name)
    if not _is_number(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1] {meaning}, got {value!r}")
    setattr(config, name, float(value))


def _number(config: SDPOConfig, name: str, expected: str, low: float = -math.inf) -> None:
    value = getattr(config, name)
    if not _is_number(value) or not math.isfinite(value) or value <= low:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    setattr(config, name, float(value))


def _positive_int(config: SDPOConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not _is_number(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        setattr(config, name, int(value))


def _choice(config: SDPOConfig, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"apply_chat_template_kwargs is not valid JSON: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(
            f"apply_chat_template_kwargs must be a dict, JSON or None, got {type(value).__name__}"
        )
    return value
