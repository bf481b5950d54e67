"""The settings of the paper's experiments."""

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
    # Its batches have 16 completions, those of the other two 256.
    "test_time": ({**_RICH, "teacher_rate_samples": 16}, {**_RICH_ARGUMENTS, "num_generations": 16}),
}


def training_arguments(preset: str) -> dict[str, Any]:
    """The `GRPOConfig` side of a preset: `GRPOConfig(**training_arguments(name), output_dir=...)`.

    Learning rate, warm-up, optimizer, clipping and sampling as the paper's Appendix prints them. Batch sizes
    depend on the machine and stay with the caller: `generalization` and `rich_feedback` use 32 prompts × 8
    completions (`rich_feedback` with mini-batches of one prompt), `test_time` 1 × 16. The teacher's rate is for so
    many completions (`teacher_rate_samples`), which makes its pace that of the paper in other batches too.

    Args:
        preset: `generalization`, `rich_feedback` or `test_time`.

    Returns:
        Arguments of `GRPOConfig` by name.

    Raises:
        ValueError: an unknown preset.

    Source: arXiv 2601.20802 v2, sections 3 to 5 and appendix.

    Examples:
        >>> training_arguments("generalization")["learning_rate"]
        1e-05
    """
    return dict(_lookup(preset)[1])


def preset_settings(name: str) -> dict[str, Any]:
    """The arguments of `SDPOConfig` of a preset, by name."""
    return dict(_lookup(name)[0])


def _lookup(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if name not in _PRESETS:
        raise ValueError(f"preset: expected one of {tuple(_PRESETS)}, got {name!r}; pass one of these names")
    return _PRESETS[name]
