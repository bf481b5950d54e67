"""The checks of `SDPOConfig`: each option by itself, then those that contradict each other.

As in the core: a wrong type is a TypeError, a wrong value a ValueError, and the message has the name, what was
expected, what came, and the fix. Fields hold Python's own numbers: NumPy's do not go through YAML or JSON.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import numbers
import sys
from collections.abc import Mapping
from typing import Any

from sdpo._validate import check_choice, check_flag, check_int, check_real, type_name

logger = logging.getLogger("sdpo_rl")

# Arguments of `apply_chat_template` itself, which the rendering of a reprompt sets or leaves at their defaults.
_RENDERER_ARGUMENTS = (
    "conversation",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
)


def check_options(config: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Check an `SDPOConfig` that is being made, and convert its numbers.

    Args:
        config: its fields are set.
        choices: the words that an option may be, by its name.
    """
    _flag(config, "enabled", "dont_reprompt_on_self_success")
    _flag(config, "remove_thinking_from_demonstration", "include_environment_feedback")
    _flag(config, "environment_feedback_only_without_solution", "allow_control_tokens")
    _flag(config, "fused_lora_forward", "fast_checkpointing_toggle")
    _fraction(
        config, "alpha", "0 for KL(teacher‖student), 1 for KL(student‖teacher), or a weight between them"
    )
    _fraction(config, "teacher_update_rate", "the weight of the student; 0 freezes the teacher")
    _fraction(config, "trust_region_coef", "the weight of the live student")
    _positive_int(
        config,
        k="the number of tokens of a top-K support",
        num_demonstrations="successes shown per reprompt",
        max_reprompt_length="tokens of a reprompt",
        diagnostics_patience="generation batches before a warning",
    )
    config.credit_rows = check_int(
        "credit_rows",
        config.credit_rows,
        low=0,
        high=2**31 - 1,
        meaning="completions of a logged step to keep",
    )
    if config.loss_chunk_size is not None:
        _positive_int(config, loss_chunk_size="tokens of a chunk, or None")
    if config.teacher_rate_samples is not None:
        _positive_int(
            config,
            teacher_rate_samples="completions that teacher_update_rate is given for, or None: those of an update",
        )
    if config.teacher_restart_every is not None:
        _positive_int(config, teacher_restart_every="generation batches from start to start, or None")
    if config.max_tokens_per_forward is not None:
        _positive_int(config, max_tokens_per_forward="tokens of a forward, or None")
    for name in ("is_clip", "rollout_is_clip"):
        if getattr(config, name) is not None:
            fix = "pass the largest weight, or None to turn the weights off"
            _number(config, name, expected="a finite number > 0", fix=fix, low=0.0)
    _number(config, "success_reward_threshold", expected="a finite number", fix="pass the score of a success")
    _texts(config, "thinking_marks", "the two marks of a thought, before it and after it")
    if len(config.thinking_marks) != 2:
        raise ValueError(
            f"thinking_marks: expected two marks, before a thought and after it, got {config.thinking_marks}; "
            "pass both"
        )
    if config.success_reward_funcs is not None:
        _texts(config, "success_reward_funcs", "the names of the functions that judge success, or None")
    if config.token_weights_beta is not None:
        fix = "pass the factor of the teacher's entropy or evidence, or None for the published value"
        _number(config, "token_weights_beta", expected="a finite number > 0", fix=fix, low=0.0)
    if config.entry_clip is not None:
        fix = "pass the most an entry adds to a divergence, for example 0.05, or None for no bound"
        _number(config, "entry_clip", expected="a finite number > 0", fix=fix, low=0.0)
    config.token_fraction = check_real(
        "token_fraction",
        config.token_fraction,
        low=0.0,
        high=1.0,
        open_low=True,
        meaning="the share of a row's tokens, 1 for all",
    )
    config.anchor_weight = check_real(
        "anchor_weight",
        config.anchor_weight,
        low=0.0,
        high=sys.float_info.max,
        meaning="the weight of the KL to the reference model, 0 for none",
    )
    _fraction(config, "grpo_weight", "GRPO's share of the loss, 0 for none")
    if config.grpo_weight_final is not None:
        _fraction(config, "grpo_weight_final", "GRPO's share in the last step, or None for a constant one")
    _fraction(config, "evidence_mix", "the teacher's share of the advantages")
    clip_meaning = "how far an advantage may change, for example 0.2"
    config.evidence_clip = check_real(
        "evidence_clip", config.evidence_clip, low=0.0, high=1.0, open_low=True, meaning=clip_meaning
    )
    for name, words in choices.items():
        check_choice(name, getattr(config, name), words)
    _check_divergence(config)
    _check_parts(config)
    _check_teacher(config)


def _check_divergence(config: Any) -> None:
    """The options of the divergence of a token do not contradict each other."""
    if config.credit == "sequence" and config.support != "sampled":
        raise ValueError(
            f"support: expected 'sampled' with credit='sequence', got {config.support!r}; a divergence over "
            "several tokens gives each of them its own credit: set support='sampled' and alpha=1.0, or "
            "credit='token'"
        )
    if config.entry_clip is not None and config.support != "full":
        raise ValueError(
            f"support: expected 'full' with entry_clip, got {config.support!r}; it bounds the entries of the "
            "whole vocabulary: set support='full', or entry_clip=None"
        )
    if config.token_fraction < 1.0 and config.support == "sampled":
        raise ValueError(
            f"token_fraction: expected 1.0 with support='sampled', got {config.token_fraction}; the sampled "
            "token alone has no divergence to choose by: set another support"
        )
    if config.whole_logits_option and config.loss_backend in ("torch", "triton"):
        raise ValueError(
            f"loss_backend: expected 'auto' or 'logits' with {config.whole_logits_option}, got "
            f"{config.loss_backend!r}; the fused loss does not have it: change one of the two"
        )


def _check_parts(config: Any) -> None:
    """The options of GRPO's part do not contradict each other."""
    if config.routing != "none" and (config.grpo_weight > 0.0 or config.grpo_weight_final is not None):
        name = "grpo_weight" if config.grpo_weight > 0.0 else "grpo_weight_final"
        raise ValueError(
            f"{name}: expected its default with routing={config.routing!r}, got {getattr(config, name)!r}; a row "
            "then has GRPO's loss or SDPO's, not a mix: set grpo_weight=0.0 and grpo_weight_final=None, their "
            "defaults (a preset may have others), or routing='none'"
        )
    if config.grpo_weight == 1.0 and config.grpo_weight_final in (None, 1.0):
        _check_grpo_alone(config)
    if config.token_weights in ("gate", "evidence") and not config.has_policy_loss:
        raise ValueError(
            f"token_weights: expected 'none' or 'confidence' without GRPO's part of the loss, got "
            f"{config.token_weights!r}; set grpo_weight above 0"
        )
    if config.token_weights == "evidence" and config.routing != "none":
        raise ValueError(
            "token_weights: expected another value with routing='srpo', got 'evidence'; rows with GRPO's loss "
            "then have no teacher: set routing='none' and grpo_weight=1.0"
        )


def _check_grpo_alone(config: Any) -> None:
    """No option weighs SDPO's part of a loss that has none."""
    for name, off in (
        ("anchor_weight", (0.0,)),
        ("row_weights", ("none",)),
        ("token_weights", ("none", "evidence")),
        ("token_fraction", (1.0,)),
    ):
        value = getattr(config, name)
        if value not in off:
            penalty = " (GRPO's own penalty is GRPOConfig(beta=...))" if name == "anchor_weight" else ""
            raise ValueError(
                f"{name}: expected {' or '.join(map(repr, off))} with grpo_weight=1.0, got {value!r}; it weighs "
                f"the divergence, which then has no share of the loss{penalty}: lower grpo_weight, or remove it"
            )


def _check_teacher(config: Any) -> None:
    """The options of teacher and support do not contradict each other."""
    if config.teacher_restart_every is not None and config.teacher_mode != "frozen":
        raise ValueError(
            f"teacher_mode: expected 'frozen' with teacher_restart_every, got {config.teacher_mode!r}; the "
            "other teachers follow the student already: set teacher_mode='frozen', or remove "
            "teacher_restart_every"
        )
    if config.support == "sampled" and config.alpha != 1.0:
        raise ValueError(
            f"support: expected alpha=1.0 with 'sampled', got alpha={config.alpha}; only "
            "KL(student‖teacher) has an estimate from the sampled token alone: set alpha=1.0 or another support"
        )
    if config.uses_topk and config.k == 1 and config.tail == "renormalize":
        raise ValueError(
            "k: expected at least 2 with tail='renormalize', got 1; one renormalized token has probability 1 "
            "under both models, so the loss would always be 0: raise k, or set tail='bucket'"
        )


def warn_of_settings_without_effect(config: Any) -> None:
    """Log the options that were set and are not read."""
    for name, applies, where in (
        ("k", config.uses_topk, "support='student' or 'teacher'"),
        ("tail", config.uses_topk, "support='student' or 'teacher'"),
        (
            "token_weights_beta",
            config.token_weights in ("confidence", "gate"),
            "token_weights='confidence' or 'gate'",
        ),
        ("evidence_mix", config.token_weights == "evidence", "token_weights='evidence'"),
        ("evidence_clip", config.token_weights == "evidence", "token_weights='evidence'"),
        ("teacher_update_rate", config.teacher_mode in ("ema", "lora_ema"), "teacher_mode='ema'"),
        (
            "teacher_rate_samples",
            config.teacher_mode in ("ema", "lora_ema") or config.teacher_rate_samples is None,
            "teacher_mode='ema'",
        ),
        ("teacher_dtype", config.teacher_mode in ("ema", "lora_ema"), "teacher_mode='ema'"),
        ("teacher_offload", config.teacher_mode != "live", "a teacher with weights of its own"),
        ("trust_region_coef", config.teacher_mode == "trust_region", "teacher_mode='trust_region'"),
        (
            "teacher_tick",
            config.teacher_mode in ("ema", "lora_ema") or config.teacher_restart_every is not None,
            "a teacher that is updated",
        ),
        (
            "environment_feedback_only_without_solution",
            config.include_environment_feedback,
            "include_environment_feedback=True",
        ),
        (
            "loss_chunk_size",
            config.loss_backend != "logits" and config.whole_logits_option is None,
            "the fused loss",
        ),
        ("max_tokens_per_forward", config.packing != "padded", "a packing other than 'padded'"),
    ):
        default = next(f.default for f in dataclasses.fields(config) if f.name == name)
        value = getattr(config, name)
        if config.enabled and not applies and value != default:
            logger.warning("%s=%r has no effect: it applies to %s.", name, value, where)


def _flag(config: Any, *names: str) -> None:
    for name in names:
        check_flag(name, getattr(config, name), meaning="True or False")


def _fraction(config: Any, name: str, meaning: str) -> None:
    setattr(config, name, check_real(name, getattr(config, name), low=0.0, high=1.0, meaning=meaning))


def _number(config: Any, name: str, *, expected: str, fix: str, low: float = -math.inf) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type_name(value)}); {fix}")
    if not math.isfinite(value) or value <= low:
        raise ValueError(f"{name}: expected {expected}, got {value!r}; {fix}")
    setattr(config, name, float(value))


def _positive_int(config: Any, **meanings: str) -> None:
    for name, meaning in meanings.items():
        value = check_int(name, getattr(config, name), low=1, high=2**31 - 1, meaning=meaning)
        setattr(config, name, value)


def _texts(config: Any, name: str, meaning: str) -> None:
    """A list of different texts, none of them empty."""
    value = getattr(config, name)
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"{name}: expected a list of strings, got {value!r}; pass {meaning}")
    if not value or not all(value) or len(set(value)) != len(value):
        raise ValueError(
            f"{name}: expected different strings that are not empty, got {value!r}; pass {meaning}"
        )
    setattr(config, name, list(value))


def template_arguments(value: Any) -> dict[str, Any]:
    """Arguments of a chat template from a mapping, JSON or `None`; a copy, which no later change of it changes."""
    name = "apply_chat_template_kwargs"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}: expected valid JSON, got {value!r} ({error}); pass an object"
            ) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"{name}: expected a dict, JSON or None, got {type_name(value)}; pass a dict")
    taken = sorted(set(value) & set(_RENDERER_ARGUMENTS))
    if taken:
        raise ValueError(
            f"{name}: expected variables of the chat template, got {', '.join(taken)}, which the rendering of a "
            "reprompt sets itself; remove them (tools and chat template are those of the trainer)"
        )
    return dict(value)
