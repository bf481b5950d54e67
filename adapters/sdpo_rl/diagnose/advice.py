"""What to change when memory runs out or a run is slow, by the settings of that run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .report import base_precision, checkpointing

logger = logging.getLogger("sdpo_rl")

# Weights as a fraction of the GPU's memory: above the first, an unquantized base leaves too little for batches;
# below the second, activations fit without gradient checkpointing.
_LARGE_WEIGHTS = 0.5
_SMALL_WEIGHTS = 0.05

# Where accelerate passes its option to the processes, and DeepSpeed's own options for the same.
_LAYERS_VARIABLE = "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"
_LAYERS_OPTIONS = ("leaf_module", "stage3_module_granularity_threshold", "module_granularity_threshold")


class OutOfMemoryAdviceError(torch.cuda.OutOfMemoryError):
    """The GPU's memory ran out; the message names the settings that determine how much a step needs."""


@contextmanager
def memory_advice(trainer: Any) -> Iterator[None]:
    """Add what to change to an out-of-memory error; the original error is its cause."""
    try:
        yield
    except OutOfMemoryAdviceError:
        raise
    except torch.cuda.OutOfMemoryError as error:
        # The original message comes first: tools that retry with smaller batches search for it.
        raise OutOfMemoryAdviceError(f"{error}\n{advice(trainer)}") from error


def advice(trainer: Any) -> str:
    """The settings that determine a step's memory, most effective first."""
    args, config = trainer.args, trainer.sdpo_config
    model = trainer.accelerator.unwrap_model(trainer.model)
    unsloth = hasattr(model, "for_training")
    lines = []
    if checkpointing(model, args) == "off":
        lines.append(
            "gradient checkpointing is off: "
            + (
                'FastLanguageModel.get_peft_model(..., use_gradient_checkpointing="unsloth")'
                if unsloth
                else "GRPOConfig(gradient_checkpointing=True)"
            )
        )
    elif unsloth and checkpointing(model, args) != "on (unsloth)":
        lines.append('gradient checkpointing is on; use_gradient_checkpointing="unsloth" also offloads')
    if dtype := _quantizable_base(model):
        lines.append(
            f"the base is stored in {dtype}: load_in_4bit=True needs about a quarter of the memory of bfloat16"
        )
    elif all(parameter.requires_grad for parameter in model.parameters()):
        lines.append(
            f"all weights are trained, in {base_precision(model)}: with SDPOTrainer(peft_config=...) gradients, "
            "optimizer state and teacher are those of the adapters alone"
        )
    batch = args.per_device_train_batch_size
    lines.append(
        f"per_device_train_batch_size={batch}"
        + (
            f": lower it and raise gradient_accumulation_steps={args.gradient_accumulation_steps}"
            if batch > 1
            else " is the least"
        )
    )
    lines.append(
        f"num_generations={args.num_generations} × steps_per_generation={args.steps_per_generation}: "
        f"{args.per_device_train_batch_size * args.steps_per_generation} completions are generated together"
    )
    lines.append(f"max_completion_length={args.max_completion_length}: lower it")
    if config.enabled:
        lines.append(f"max_reprompt_length={config.max_reprompt_length}: lower it")
        if config.loss_backend == "logits":
            lines.append("loss_backend='logits' stores whole logits: set it to 'auto'")
        else:
            lines.append(f"loss_chunk_size={config.loss_chunk_size}: try 128")
        if config.teacher_mode != "live" and config.teacher_offload == "none":
            lines.append("teacher_offload='none': 'cpu' stores the averaged weights outside the GPU")
    return "What determines the memory of a step:\n" + "\n".join(f"  - {line}" for line in lines)


def warn_if_slow(trainer: Any) -> None:
    """One warning with every setting that makes a run slower than it needs to be, if there is any."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    reasons = slow_reasons(
        backend=trainer.sdpo_config.loss_backend,
        quantizable_base=_quantizable_base(model),
        checkpointing=checkpointing(model, trainer.args),
        unsloth=hasattr(model, "for_training"),
        layer_classes=_layer_classes(trainer, model),
        weight_bytes=_weight_bytes(trainer, model),
        gpu_bytes=gpu_bytes,
    )
    if reasons:
        logger.warning("This run is slower than it needs to be:\n%s", "\n".join(f"  - {r}" for r in reasons))


def _zero3_plugin(trainer: Any) -> Any:
    """Accelerate's settings of ZeRO-3, or `None`."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin if plugin is not None and plugin.zero_stage == 3 else None


def _quantizable_base(model: Any) -> str:
    """The dtype of a base that is not trained and not quantized; empty where there is none."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        return ""
    precision = base_precision(model)
    return "" if precision in ("4-bit", "8-bit", "unknown") else precision


def _weight_bytes(trainer: Any, model: Any) -> int | None:
    """Bytes of weights on each GPU; `None` under ZeRO-3 and FSDP, which shard them."""
    if _zero3_plugin(trainer) or getattr(trainer.accelerator.state, "fsdp_plugin", None):
        return None
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _layer_classes(trainer: Any, model: Any) -> str:
    """Classes to name so that ZeRO-3 gathers whole layers, separated by commas.

    Empty if ZeRO-3 is off, if classes are named already, or if naming them would make the backward pass fail.
    """
    plugin = _zero3_plugin(trainer)
    if plugin is None:
        return ""
    options = plugin.deepspeed_config["zero_optimization"]
    if (
        plugin.transformer_moe_cls_names
        or os.environ.get(_LAYERS_VARIABLE)
        or any(options.get(option) for option in _LAYERS_OPTIONS)
    ):
        return ""
    if checkpointing(model, trainer.args) == "off" and not _embeddings_have_a_gradient(model):
        return ""  # DeepSpeed's backward fails at a whole layer whose input has no gradient
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = {
        type(layer).__name__
        for layers in model.modules()
        if isinstance(layers, nn.ModuleList)
        for layer in layers
        if type(layer).__name__ in names and any(p.requires_grad for p in layer.parameters())
    }
    return ",".join(sorted(found))


def _embeddings_have_a_gradient(model: Any) -> bool:
    """Whether they are trained, or `enable_input_require_grads` was called."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    weight = getattr(base.get_input_embeddings(), "weight", None)
    return getattr(weight, "requires_grad", False) or bool(getattr(base, "_require_grads_hooks", None))


def slow_reasons(
    *,
    backend: str,
    quantizable_base: str,
    checkpointing: str,
    unsloth: bool,
    layer_classes: str,
    weight_bytes: int | None,
    gpu_bytes: int,
) -> list[str]:
    """Why a run is slow, each reason with what to change. `gpu_bytes` is 0 without a GPU.

    `weight_bytes` are those on each GPU; `None` leaves out what depends on them. `quantizable_base` is the dtype of
    a base that could be quantized, or empty.

    Examples:
        >>> slow_reasons(backend="logits", quantizable_base="", checkpointing="off", unsloth=True, layer_classes="",
        ...              weight_bytes=5, gpu_bytes=24)
        ["loss_backend='logits' computes and stores whole logits; 'auto' computes them in chunks"]
    """
    reasons = []
    if backend == "logits":
        reasons.append(
            "loss_backend='logits' computes and stores whole logits; 'auto' computes them in chunks"
        )
    if layer_classes:
        reasons.append(
            "ZeRO-3 gathers the weights of every module separately; if a layer fits a GPU, let it gather whole "
            f"layers: accelerate launch --deepspeed_moe_layer_cls_names {layer_classes}, or, with a DeepSpeed "
            "configuration of your own, zero_optimization.leaf_module.classes"
        )
    if not gpu_bytes:
        return reasons
    if backend == "torch":
        reasons.append("loss_backend='torch' on a GPU; 'auto' uses the kernels")
    if weight_bytes is None:
        return reasons
    fraction = weight_bytes / gpu_bytes
    if quantizable_base and fraction > _LARGE_WEIGHTS:
        how = "FastLanguageModel.from_pretrained(..., load_in_4bit=True)" if unsloth else "BitsAndBytesConfig"
        reasons.append(
            f"the base is stored in {quantizable_base} and fills {fraction:.0%} of the GPU, so batches must be "
            f"small; quantize it: {how}"
        )
    if checkpointing != "off" and fraction < _SMALL_WEIGHTS:
        reasons.append(
            f"gradient checkpointing is {checkpointing} and computes every layer twice, though the weights "
            f"fill only {fraction:.0%} of the GPU; turn it off if a step fits without"
        )
    return reasons
