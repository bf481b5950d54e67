"""The report of a trainer: which of its methods are TRL's, Unsloth's and this library's, and the versions."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from ..compat.unsloth import IMPORT_ORDER, is_unsloth

_PACKAGES = (
    "sdpo-rl",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "unsloth",
    "unsloth_zoo",
    "triton",
    "vllm",
)
_METHODS = (
    "__init__",
    "train",
    "training_step",
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_generate",
    "_calculate_rewards",
    "_get_per_token_logps_and_entropies",
    "compute_loss",
    "prediction_step",
    "evaluate",
    "evaluation_loop",
    "create_optimizer",
    "log",
    "_save_checkpoint",
)
_UNSLOTHS, _TRLS = "Unsloth's rewritten", "TRL's"
_OWN_CLASSES = ("SDPOTrainer", "ResumableTrainer")
# Why this library has a method of its own; every other method is inherited as it is.
_REPLACED = {
    "__init__": "checks the arguments, then calls the one below; adds the teacher",
    "train": "resolves the checkpoint and its teacher, then calls the one below",
    "training_step": "calls the one below, then counts the micro-batches of the optimizer step",
    "_prepare_inputs": "calls the one below, then counts the active tokens of the generation batch",
    "_generate_and_score_completions": "calls the one below, then adds the teacher's prompts",
    "_calculate_rewards": "calls the one below, then stores scores and feedback",
    "_get_per_token_logps_and_entropies": "the loss's own, in chunks; with enabled=False or Unsloth the one below",
    "compute_loss": "the self-distillation loss, chunked; with enabled=False the one below",
    "evaluation_loop": "calls the one below, then weights its batches by their tokens",
    "log": "adds the self-distillation metrics, then calls the one below",
    "_save_checkpoint": "calls the one below, then writes the teacher into the same folder",
}


class MethodOwners(NamedTuple):
    """Where a method comes from, outermost first: the classes that define it and their modules' short names."""

    name: str
    classes: tuple[str, ...]


def method_owners(trainer: Any) -> list[MethodOwners]:
    """For each method that matters, the classes of the trainer's resolution order that define it."""
    owners = []
    for name in _METHODS:
        classes = tuple(cls.__name__ for cls in type(trainer).__mro__ if name in vars(cls))
        if classes:
            owners.append(MethodOwners(name, classes))
    return owners


def training_report(trainer: Any) -> str:
    """Print, and return, how a trainer is set up: what applies of Unsloth, what SDPO replaces, the versions.

    Works with and without Unsloth. The last block is what a bug report needs.

    Args:
        trainer: an `SDPOTrainer` (any `GRPOTrainer` will do).

    Returns:
        The printed text.

    Raises:
        TypeError: something that is not a trainer.

    Source: a choice of this library.

    Examples:
        >>> training_report(3)
        Traceback (most recent call last):
            ...
        TypeError: trainer: expected a built SDPOTrainer, got int; call it with the trainer
    """
    if not hasattr(trainer, "accelerator") or not hasattr(trainer, "args"):
        raise TypeError(
            f"trainer: expected a built SDPOTrainer, got {type(trainer).__name__}; call it with the trainer"
        )
    lines = [
        *_section("What applies", _applies(trainer)),
        *_section("Where each method comes from", _owners(trainer)),
        *_section("For a bug report", _versions(trainer)),
    ]
    text = "\n".join(lines)
    print(text)
    return text


def _section(title: str, lines: Iterator[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)]


def _applies(trainer: Any) -> Iterator[str]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    args, config = trainer.args, getattr(trainer, "sdpo_config", None)
    patched = is_unsloth(type(trainer))
    by_unsloth = hasattr(model, "for_training")
    yield f"trainer: over {_UNSLOTHS if patched else _TRLS} GRPOTrainer"
    if not patched and "unsloth" in sys.modules:
        yield f"  Unsloth is imported but its trainer is not below this one; the order is:\n{IMPORT_ORDER}"
    yield f"model: loaded by {'Unsloth' if by_unsloth else 'transformers'}, base {base_precision(model)}"
    yield f"adapters: {', '.join(getattr(model, 'peft_config', {})) or 'none, the whole model trains'}"
    if frozen := getattr(trainer, "_frozen", []):
        yield f"frozen: {len(frozen)} tensors that text does not reach, such as {frozen[0]}"
    yield f"gradient checkpointing: {checkpointing(model, args)}"
    limit = getattr(model, "max_seq_length", None)
    yield f"max_seq_length: {limit if limit else 'not set by a loader'}"
    yield f"mixed precision: {trainer.accelerator.mixed_precision}"
    yield f"generation: {'vLLM' if getattr(args, 'use_vllm', False) else 'the model itself'}" + (
        ", Unsloth's inference mode around it" if patched else ""
    )
    if config is None:
        return
    if not config.enabled:
        yield f"loss: {_UNSLOTHS if patched else _TRLS} GRPO (enabled=False)"
        return
    chunk = config.loss_chunk_size or "chosen from the shapes"
    yield f"loss: SDPO, backend {config.loss_backend}, tokens per chunk: {chunk}"
    found = None if trainer._forward_mode is None else trainer._forward_mode.layout
    layout = f"{config.packing}, chosen at the first step" if found is None else found.layout
    yield f"forwards: {layout}" + (f" ({found.note})" if found is not None and found.note else "")
    size, count = teacher_bytes(trainer)
    yield f"teacher: {config.teacher_mode}, {count} tensors, {size / 2**20:.1f} MiB"


def _owners(trainer: Any) -> Iterator[str]:
    for name, classes in method_owners(trainer):
        overridden = classes[0] in _OWN_CLASSES and len(classes) > 1
        yield f"{name}: {' → '.join(classes)}" + (
            f"  ({_REPLACED[name]})" if overridden and name in _REPLACED else ""
        )


def _versions(trainer: Any) -> Iterator[str]:
    yield f"python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for package in _PACKAGES:
        yield f"{package} {_version(package)}"
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield f"GPU {torch.cuda.get_device_name()} ×{torch.cuda.device_count()}, {memory:.1f} GiB"
    else:
        yield "GPU none"
    yield f"classes {' → '.join(cls.__name__ for cls in type(trainer).__mro__[:-1])}"
    model = trainer.accelerator.unwrap_model(trainer.model)
    yield f"model {type(model).__name__} over {type(_base(model)).__name__}"
    if (config := getattr(trainer, "sdpo_config", None)) is not None:
        yield f"{config}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def base_precision(model: Any) -> str:
    """How the base's weights are stored: `4-bit`, `8-bit`, or a dtype."""
    base = _base(model)
    for bits in (4, 8):
        if getattr(base, f"is_loaded_in_{bits}bit", False):
            return f"{bits}-bit"
    # ZeRO-3 leaves an empty vector of a matrix that is not gathered now.
    shapes = ((getattr(p, "ds_shape", p.shape), p) for p in base.parameters() if p.is_floating_point())
    matrix = next((p for shape, p in shapes if len(shape) == 2), None)
    return "unknown" if matrix is None else str(matrix.dtype).removeprefix("torch.")


def checkpointing(model: Any, args: Any) -> str:
    """`off`, `on`, or `on (unsloth)` where activations are offloaded as well."""
    modules = [m for m in _base(model).modules() if getattr(m, "gradient_checkpointing", False)]
    if not modules:
        # The training loop enables it when it starts.
        return "on" if args.gradient_checkpointing else "off"
    return "on (unsloth)" if modules[0].gradient_checkpointing == "unsloth" else "on"


def teacher_bytes(trainer: Any) -> tuple[int, int]:
    """Bytes and number of the tensors of the teacher's state."""
    teacher = getattr(trainer, "_teacher", None)
    tensors = list(teacher.state.params.values()) if teacher is not None else []
    return sum(t.numel() * t.element_size() for t in tensors), len(tensors)
