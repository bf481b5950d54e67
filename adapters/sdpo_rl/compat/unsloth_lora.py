"""Unsloth's LoRA function for queries, keys and values whose projections have a bias, as those of Qwen2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..step.modules import all_modules
from ..teacher import shards
from .peft_lora import has_global_hook, has_hooks

_PLAIN = "unsloth.models.llama", "original_apply_qkv"
_FUSED = "unsloth.kernels", "apply_lora_qkv"
_SLOT = "apply_qkv"  # of an attention module: the function that computes its queries, keys and values


@contextmanager
def fused_attention(model: nn.Module) -> Iterator[None]:
    """Use Unsloth's LoRA function also for query, key and value projections with a bias; undo this on exit.

    The function computes the base layers and adapters of all three projections at once. It adds no bias, so
    Unsloth leaves projections that have one to PEFT, which runs several kernels for each. Here, the biases are
    added to the function's output. PEFT's forward stays in use for float32 weights (as in Unsloth itself),
    sharded models and modules with hooks.
    """
    functions: list[Any] = [getattr(sys.modules.get(module), name, None) for module, name in (_PLAIN, _FUSED)]
    plain, fused = functions
    attentions = []
    if plain is not None and fused is not None and not (shards.is_sharded(model) or has_global_hook()):
        attentions = [
            m for m in all_modules(model) if vars(m).get(_SLOT) is plain and _has_biased_adapters(m)
        ]

    def qkv_with_biases(attention: Any, hidden: Tensor) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():  # a compiler fuses these operations itself
            return tuple(plain(attention, hidden))
        parameters = [layer.base_layer._parameters for layer in _projections(attention)]
        biases = [each["bias"] for each in parameters]
        try:
            for each in parameters:
                each["bias"] = None  # the function may call PEFT's forward, which would add the bias too
            outputs = fused(attention, hidden)
        finally:
            for each, bias in zip(parameters, biases, strict=True):
                each["bias"] = bias
        return tuple(
            output if bias is None else output + bias.to(output.dtype)
            for output, bias in zip(outputs, biases, strict=True)
        )

    try:
        for attention in attentions:
            vars(attention)[_SLOT] = qkv_with_biases
        yield
    finally:
        for attention in attentions:
            vars(attention)[_SLOT] = plain


def _has_biased_adapters(attention: Any) -> bool:
    layers = _projections(attention)
    # AdaLoRA's `lora_A` has no modules.
    if not all(isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) for layer in layers):
        return False
    if any(has_hooks(module) for layer in layers for module in all_modules(layer)):
        return False
    bases = [layer.base_layer for layer in layers]  # 4-bit ones are an `nn.Linear`, too
    return any(getattr(base, "bias", None) is not None for base in bases) and all(
        isinstance(base, nn.Linear) and base.weight.dtype is not torch.float32 for base in bases
    )


def _projections(attention: Any) -> list[Any]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]
