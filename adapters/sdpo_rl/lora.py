"""PEFT's plain LoRA layers, each with its second product added to the base layer's output in place.

PEFT writes the product a·Bᵀ, scales it, and adds it to the output: three passes over tensors as large as that
output, and one more over its gradient. A product that accumulates into the output needs none of them. PEFT asks
`layer.lora_variant[adapter]` for another way to compute an adapter, and this one is there only while a loss and
its gradient are computed: to merge, save or generate with such a layer is PEFT's own affair.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import ranks
from .places import all_modules


@contextmanager
def one_product(model: nn.Module) -> Iterator[None]:
    """The model with every LoRA layer that is all plain computed in this way; each is as it was afterwards.

    The layers are looked for anew each time, adapters may have come and gone. A layer with more to it (DoRA, a
    bias in B, hooks, a quantized base, a `forward` of someone else's) stays PEFT's, as does a sharded model:
    ZeRO-3 has the weights of B whole only inside B's own forward.
    """
    places = [] if ranks.is_sharded(model) else [*_places(model)]
    try:
        for variants, name in places:
            variants[name] = _InPlace
        yield
    finally:
        for variants, name in places:
            if variants.get(name) is _InPlace:
                del variants[name]


def _places(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where PEFT looks for a variant of each active adapter of each plain layer."""
    # Whoever has a layer of PEFT's has imported this.
    peft: Any = sys.modules.get("peft.tuners.lora.layer")
    if peft is None or getattr(peft.Linear.forward, "__globals__", None) is not vars(peft):
        return
    if _has_any_global_hook():
        return
    layers: list[Any] = all_modules(model)
    for layer in layers:
        if type(layer) is peft.Linear and "forward" not in vars(layer) and hasattr(layer, "lora_variant"):
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            if _is_plain(layer, names):
                yield from ((layer.lora_variant, name) for name in names)


def _is_plain(layer: Any, names: list[str]) -> bool:
    if layer.disable_adapters or layer.merged or not _is_bare(layer.base_layer, nn.Linear):
        return False
    return all(
        name not in layer.lora_variant
        and isinstance(layer.scaling[name], int | float)
        and _is_bare(layer.lora_dropout[name], nn.Identity, nn.Dropout)
        and _is_bare(layer.lora_A[name], nn.Linear)
        and _is_bare(layer.lora_B[name], nn.Linear)
        and layer.lora_B[name].bias is None
        for name in names
    )


def _is_bare(module: nn.Module, *classes: type) -> bool:
    """Whether a module is of such a class itself, over plain parameters, and nobody listens to its calls."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return (
        type(module) in classes
        and "forward" not in vars(module)
        and not any(hooks)
        and all(p is None or type(p) is nn.Parameter for p in module._parameters.values())
    )


class _InPlace:
    """A variant as PEFT calls it."""

    @staticmethod
    def forward(module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        a = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        # Read now: a teacher's weights may be in place.
        lora_B, scaling = module.lora_B[active_adapter], module.scaling[active_adapter]
        # Of two dtypes PEFT adds in the wider one. A compiler knows no `_base`, and fuses such passes itself.
        if torch.compiler.is_compiling() or a.dtype != result.dtype or (whole := _whole(result)) is None:
            return result + lora_B(a) * scaling
        # Cast here, so that the gradient is cast back.
        weight = lora_B.weight.to(result.dtype)
        changed: Tensor = _AddProduct.apply(whole, a.reshape(-1, a.shape[-1]), weight, scaling)
        return changed if whole is result else changed.view(result.shape)


def _whole(result: Tensor) -> Tensor | None:
    """The tensor that a layer made and of which its output is at most another shape; `None` if it is a part.

    With a bias `nn.Linear` returns such a view, and for a change to a view autograd copies the whole gradient.
    """
    whole: Any = result._base if result._is_view() else result
    same = whole.numel() == result.numel() and whole.is_contiguous() and result.is_contiguous()
    return whole if same else None


class _AddProduct(torch.autograd.Function):
    """result + scaling · a·Bᵀ, in the memory of `result` [..., out]; a [N, r], B [out, r]."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, a: Tensor, weight: Tensor, scaling: float) -> Tensor:
        ctx.mark_dirty(result)
        ctx.save_for_backward(a, weight)
        ctx.scaling = scaling
        result.view(-1, len(weight)).addmm_(a, weight.T, alpha=scaling)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        a, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, len(weight))
        _, of_a, of_weight, _ = ctx.needs_input_grad
        return (
            gradient,
            _product(flat, weight, ctx.scaling) if of_a else None,
            _product(flat.T, a, ctx.scaling) if of_weight else None,
            None,
        )


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling · left·right, rounded once."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scaling)
