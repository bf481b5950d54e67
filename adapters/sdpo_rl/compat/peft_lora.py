"""A fused forward for PEFT's plain LoRA layers: the base layer and its adapters in one autograd function.

PEFT computes ``base_layer(x) + lora_B(lora_A(x)) * scaling``: the product, its scaled copy and the sum each write
a tensor of the output's size, and backward sums two gradients of x. Here every product accumulates into the
output (``addmm_``), and backward accumulates into one gradient of x.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..step.modules import all_modules
from ..teacher import shards


@contextmanager
def fused_lora_forward(model: nn.Module) -> Iterator[None]:
    """Give every plain LoRA layer the fused forward; PEFT's own is back afterwards.

    Plain means: `nn.Linear` base and factors without hooks, no DoRA or other variant, no bias in lora_B, not merged
    or disabled. Every other layer keeps PEFT's forward, as does a sharded model, because ZeRO-3 gathers a weight
    for its own module's forward only. Layers are searched on every entry: adapters may be added or deleted.
    """
    forwards = [] if shards.is_sharded(model) else _fused_forwards(model)
    try:
        for forward in forwards:
            forward.layer.forward = forward
        yield
    finally:
        for forward in forwards:
            if vars(forward.layer).get("forward") is forward:
                del forward.layer.forward


def _fused_forwards(model: nn.Module) -> list[_FusedForward]:
    """One for each plain LoRA layer."""
    peft: Any = sys.modules.get("peft.tuners.lora.layer")  # imported by whoever built a LoRA layer
    if peft is None or has_global_hook():
        return []
    if getattr(peft.Linear.forward, "__globals__", None) is not vars(peft):  # another library replaced it
        return []
    layers = [
        module
        for module in all_modules(model)
        if type(module) is peft.Linear and "forward" not in vars(module)
    ]
    return [forward for forward in map(_FusedForward, layers) if forward.is_plain()]


def has_global_hook() -> bool:
    """Whether a hook of all modules is registered; torch 2.6 has no function that says so."""
    kinds = ("backward_pre_hooks", "backward_hooks", "forward_pre_hooks", "forward_hooks")
    return any(getattr(torch_module, f"_global_{kind}") for kind in kinds)


class _FusedForward:
    """The forward of one layer; weights are read at each call, when a teacher's may be in their place."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self._base = layer.base_layer
        self._active_adapters = list(layer.active_adapters)
        dropouts, lora_a, lora_b = layer.lora_dropout, layer.lora_A, layer.lora_B
        names = [name for name in self._active_adapters if name in lora_a]
        self._adapters = [(name, dropouts[name], lora_a[name], lora_b[name]) for name in names]
        # `module.weight` searches several dictionaries: a tenth of the time of this call.
        self._parameters = [
            m._parameters for m in (self._base, *(m for _, _, *ab in self._adapters for m in ab))
        ]

    def is_plain(self) -> bool:
        """Whether PEFT computes exactly base_layer(x) + Σ lora_B(lora_A(dropout(x))) * scaling."""
        layer = self.layer
        if layer.disable_adapters or layer.merged or not self._adapters or not hasattr(layer, "lora_variant"):
            return False
        return _is_plain_linear(self._base) and all(
            name not in layer.lora_variant
            and isinstance(layer.scaling[name], int | float)
            and type(dropout) in (nn.Identity, nn.Dropout)
            and _has_own_forward(dropout)
            and _is_plain_linear(a)
            and _is_plain_linear(b)
            and a._parameters["bias"] is b._parameters["bias"] is None
            for name, dropout, a, b in self._adapters
        )

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, bias = self.layer, self._parameters[0]["bias"]
        # W, and A and B in turn; `None` where a weight was replaced since, by a parametrization for example.
        weights: list[Any] = [each.get("weight") for each in self._parameters]
        dtype = _compute_dtype(x, *weights)
        if (
            dtype is None
            or args
            or kwargs
            or layer.disable_adapters
            or layer.merged
            or layer.active_adapters != self._active_adapters
            or torch.compiler.is_compiling()  # a compiler fuses these operations itself
        ):
            output: Tensor = type(layer).forward(layer, x, *args, **kwargs)
            return output
        # Cast outside of the function, so that autograd casts the gradients back.
        weight, *factors = [_cast(each, dtype) for each in weights]
        bias = None if bias is None else _cast(bias, dtype)
        scalings: list[float] = []
        adapters: list[Tensor | None] = []
        for i, (name, dropout, _, _) in enumerate(self._adapters):
            drops = dropout.training and type(dropout) is nn.Dropout
            adapters += (_cast(dropout(x), dtype) if drops else None, factors[2 * i], factors[2 * i + 1])
            scalings.append(layer.scaling[name])
        operands: tuple[Any, ...] = (scalings, _cast(x, dtype), weight, bias, *adapters)
        output = _FusedLoRA.apply(*operands) if torch.is_grad_enabled() else _forward(*operands)[0]
        return output


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a call is x @ W.T + bias over plain parameters: not quantized, parametrized or a tensor subclass."""
    if type(module) is not nn.Linear or not _has_own_forward(module):
        return False
    weight, bias = map(module._parameters.get, ("weight", "bias"))
    return type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a call runs the class's forward and nothing else."""
    return "forward" not in vars(module) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module, or its backward pass, runs a hook of this module."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which is slower where there is nothing to cast."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _compute_dtype(*tensors: Any) -> torch.dtype | None:
    """Dtype of all products; `None` if there are several, which PEFT adds in the widest, or a tensor is missing."""
    if any(tensor is None for tensor in tensors):
        return None
    dtypes = {tensor.dtype for tensor in tensors}
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(device)
    return dtypes.pop() if len(dtypes) == 1 else None


def _forward(
    scalings: list[float], x: Tensor, weight: Tensor, bias: Tensor | None, *adapters: Any
) -> tuple[Tensor, list[Tensor]]:
    """x @ W.T + bias + Σ scaling * (x' @ A.T) @ B.T [..., out], and the x' @ A.T [N, r].

    `adapters` are an x', A, B for each scaling; an x' of `None` is x.
    """
    output, products = x.new_empty(*x.shape[:-1], weight.shape[0]), []
    flat_x, flat_output, total = _flat(x), _flat(output), bias
    # The base product comes last: it is compute-bound, so adding to what is there costs it no time.
    for scaling, dropped, a, b in zip(scalings, adapters[::3], adapters[1::3], adapters[2::3], strict=True):
        products.append(nn.functional.linear(flat_x if dropped is None else _flat(dropped), a))
        total = _addmm(total, products[-1], b.t(), scaling, out=flat_output)
    _addmm(total, flat_x, weight.t(), out=flat_output)
    return output, products


class _FusedLoRA(torch.autograd.Function):
    """`_forward` with its gradients: one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, scalings: list[float], x: Tensor, *operands: Any) -> Tensor:
        weight, _, *adapters = operands
        output, products = _forward(scalings, x, *operands)
        # Inputs are saved for the gradients of W and A alone.
        _, _, needs_weight, _, *needs = ctx.needs_input_grad
        inputs = [x if dropped is None else dropped for dropped in adapters[::3]]
        saved = [source if needs_a else None for source, needs_a in zip(inputs, needs[1::3], strict=True)]
        ctx.save_for_backward(
            x if needs_weight else None, weight, *saved, *adapters[1::3], *adapters[2::3], *products
        )
        ctx.scalings, ctx.shape = scalings, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        x, weight, *saved = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad
        grad, count = _flat(grad_outputs[0]), len(ctx.scalings)
        grad_x: Tensor | None = None
        grad_adapters: list[Tensor | None] = []
        for i, scaling in enumerate(ctx.scalings):
            source, a, b, product = saved[i::count]
            needs_dropped, needs_a, needs_b = needs[3 * i : 3 * i + 3]
            if torch.is_grad_enabled():
                if source is None:
                    raise RuntimeError("second derivative: expected a trainable lora_A, got a frozen one")
                product = nn.functional.linear(_flat(source), a)
            grad_dropped = grad_a = None
            if needs_x or needs_dropped or needs_a:
                grad_product = _addmm(None, grad, b, scaling)
                grad_a = grad_product.t().mm(_flat(source)) if needs_a else None
                if needs_dropped:
                    grad_dropped = grad_product.mm(a).view(ctx.shape)
                elif needs_x:
                    grad_x = _addmm(grad_x, grad_product, a)
            grad_b = _addmm(None, grad.t(), product, scaling) if needs_b else None
            grad_adapters += (grad_dropped, grad_a, grad_b)
        if needs_x:
            grad_x = _addmm(grad_x, grad, weight).view(ctx.shape)
        grad_weight = grad.t() @ _flat(x) if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias else None
        return None, grad_x, grad_weight, grad_bias, *grad_adapters


def _flat(x: Tensor) -> Tensor:
    """[..., D] as [N, D]."""
    return x.reshape(-1, x.shape[-1])


def _addmm(
    total: Tensor | None, left: Tensor, right: Tensor, scaling: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """total + scaling * left @ right, rounded once; in place where the total is a matrix, not a bias or `None`."""
    if total is None:
        if scaling == 1.0:
            return torch.mm(left, right, out=out)
        return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scaling, out=out)
    if total.dim() == 2:
        return total.addmm_(left, right, alpha=scaling)
    return torch.addmm(total, left, right, alpha=scaling, out=out)
