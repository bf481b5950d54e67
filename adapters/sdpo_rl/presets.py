"""The settings of SDPO's paper, of two papers whose teacher reads a reference solution, and of recorded runs."""

from __future__ import annotations

from typing import Any

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
# Of both papers, arXiv 2601.18734 and 2601.19897: KL(teacher‖student) over the vocabulary, a mean over each
# completion first, and a teacher that reads the reference solution, also where a peer has succeeded.
_REFERENCE: dict[str, Any] = {
    "alpha": 0.0,
    "support": "full",
    "loss_aggregation": "sequence-mean",
    "environment_feedback_only_without_solution": False,
}
# Both sample one completion of a prompt, GRPOConfig at least two.
_REFERENCE_ARGUMENTS = {"num_generations": 2, "max_completion_length": 1024}


def _templates(introduction: str, instruction: str) -> dict[str, str]:
    """The words before a reference solution, and those after it."""
    return {
        "reprompt_template": f"{{prompt}}{{solution}}{{feedback}}{instruction}",
        "feedback_template": introduction,
        "success_feedback_template": introduction,
    }


_RICH = {"alpha": 1.0, "k": 20, "teacher_update_rate": 0.01}
_RICH_ARGUMENTS = {**_COMMON, "learning_rate": 1e-6, "warmup_steps": 0}
_SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
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
    # Its batches have 16 completions, those of the other two 256.
    "test_time": ({**_RICH, "teacher_rate_samples": 16}, {**_RICH_ARGUMENTS, "num_generations": 16}),
    "long_run": (
        {
            "alpha": 0.0,
            "k": 100,
            "teacher_update_rate": 0.05,
            "grpo_weight": 0.5,
            "grpo_weight_final": 1.0,
        },
        {
            **_COMMON,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "linear",
            "warmup_steps": 5,
            "num_generations": 8,
        },
    ),
    "opsd": (
        {
            **_REFERENCE,
            "entry_clip": 0.05,
            "teacher_mode": "frozen",
            **_templates(
                "\n\nHere is a reference solution:\n{feedback_raw}",
                "\n\nAfter understanding the reference solution, please try to solve this problem using your own "
                "approach below:",
            ),
        },
        {
            **_REFERENCE_ARGUMENTS,
            "learning_rate": 5e-6,
            "max_grad_norm": 0.1,
            "temperature": 1.1,
            "top_p": 0.95,
            "top_k": 20,
        },
    ),
    "sdft": (
        {
            **_REFERENCE,
            "teacher_update_rate": 0.01,
            "teacher_rate_samples": 32,
            **_templates(
                "\n\nThis is an example for a response to the question:\n{feedback_raw}",
                "\n\nNow answer with a response of your own, including the thinking process:",
            ),
        },
        {
            **_REFERENCE_ARGUMENTS,
            "learning_rate": 5e-5,
            "max_grad_norm": 1.0,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
        },
    ),
}

PRESETS = tuple(_SETTINGS)


def training_arguments(preset: str) -> dict[str, Any]:
    """The `GRPOConfig` side of a preset: `GRPOConfig(**training_arguments(name), output_dir=...)`.

    Of `generalization`, `rich_feedback` and `test_time`: learning rate, warm-up, optimizer, clipping and sampling
    as the appendix of SDPO's paper prints them. Batch sizes depend on the machine and stay with the caller:
    `generalization` and `rich_feedback` use 32 prompts × 8 completions (`rich_feedback` with mini-batches of one
    prompt), `test_time` 1 × 16. The teacher's rate is per `teacher_rate_samples` completions, so that it is the
    paper's in batches of another size, too.

    `long_run` has the arguments of its recorded runs, which train all weights in batches of 64 completions; the
    learning rate falls to 0.

    `opsd` is for LoRA of rank 64, `sdft` for all weights. Both papers sample 32 prompts × 1 completion; here it is
    two of a prompt, the fewest that `GRPOConfig` takes.

    Args:
        preset: `generalization`, `rich_feedback`, `test_time`, `long_run`, `opsd` or `sdft`.

    Returns:
        Arguments of `GRPOConfig` by name.

    Raises:
        ValueError: an unknown preset.

    Source: arXiv 2601.20802 v2, sections 3 to 5 and appendix. `long_run`: docs/results.md, "Does it last?". OPSD,
    arXiv 2601.18734 v3: length in section 4.2, the rest in its code (`scripts/run_opsd_4b.sh`). SDFT, arXiv
    2601.19897 v2: its code (`README.md`, `main.py`).

    Examples:
        >>> training_arguments("generalization")["learning_rate"]
        1e-05
    """
    return dict(_lookup(preset)[1])


def preset_settings(name: str) -> dict[str, Any]:
    """The arguments of `SDPOConfig` of a preset, by name."""
    return dict(_lookup(name)[0])


def _lookup(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if name not in _SETTINGS:
        raise ValueError(f"preset: expected one of {PRESETS}, got {name!r}; pass one of these names")
    return _SETTINGS[name]
