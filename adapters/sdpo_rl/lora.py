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
        and layer.lora_A[name].bias is None
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
        # Read now: a teacher's weights may be in place.
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout, scaling = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        dtype = _operand(x, lora_A.weight)
        if type(dropout) is nn.Dropout:
            x = dropout(x)
        # Of two dtypes PEFT adds in the wider one. A compiler knows no `_base`, and fuses such passes itself.
        if torch.compiler.is_compiling() or dtype != result.dtype or (whole := _whole(result)) is None:
            unchanged: Tensor = result + lora_B(lora_A(x)) * scaling
            return unchanged
        # Cast here, so that the gradients are cast back.
        factors = (x.to(dtype), lora_A.weight.to(dtype), lora_B.weight.to(dtype))
        if not torch.is_grad_enabled():
            _add(whole, *factors, scaling)
            return result
        changed: Tensor = _AddAdapter.apply(whole, *factors, scaling)
        return changed if whole is result else changed.view(result.shape)


def _operand(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Dtype of the product x·Aᵀ; `None` if it is none."""
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if x.dtype == weight.dtype else None


def _whole(result: Tensor) -> Tensor | None:
    """The tensor that a layer made and of which its output is at most another shape; `None` if it is a part.

    With a bias `nn.Linear` returns such a view, and for a change to a view autograd copies the whole gradient.
    """
    whole: Any = result._base if result._is_view() else result
    same = whole.numel() == result.numel() and whole.is_contiguous() and result.is_contiguous()
    return whole if same else None


def _add(result: Tensor, x: Tensor, weight_a: Tensor, weight_b: Tensor, scaling: float) -> Tensor:
    """Change the result [..., out]; x·Aᵀ [N, r]."""
    a = nn.functional.linear(_rows(x), weight_a)
    _rows(result).addmm_(a, weight_b.t(), alpha=scaling)
    return a


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _AddAdapter(torch.autograd.Function):
    """result + scaling · x·Aᵀ·Bᵀ, in the memory of `result` [..., out]; x [..., in], A [r, in], B [out, r]."""

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, weight_a: Tensor, weight_b: Tensor, scaling: float
    ) -> Tensor:
        a = _add(result, x, weight_a, weight_b, scaling)
        ctx.mark_dirty(result)
        ctx.scaling, ctx.shape = scaling, x.shape
        # Activations are kept for A's gradient alone.
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, a, weight_a, weight_b)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, a, weight_a, weight_b = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            if x is None:
                raise RuntimeError("a second derivative needs the input, which a frozen lora_A does not keep")
            a = nn.functional.linear(_rows(x), weight_a)
        flat, to_x, to_a = _rows(gradient), None, None
        if needs_x or needs_a:
            of_a = _product(flat, weight_b, ctx.scaling)
            to_x = (of_a @ weight_a).view(ctx.shape) if needs_x else None
            to_a = of_a.t() @ _rows(x) if needs_a else None
        return gradient, to_x, to_a, _product(flat.t(), a, ctx.scaling) if needs_b else None, None


def _product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling · left·right, rounded once."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scaling)
