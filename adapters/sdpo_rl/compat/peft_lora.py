"""PEFT's plain LoRA layers, each computed at once: the base layer's product and those of its adapters.

PEFT writes the product a·Bᵀ, scales it, and adds it to the output: three passes over tensors as large as that
output, one more over its gradient, and one to add up the two gradients of the input. Products that accumulate into
what is there need none of them. A layer has this `forward` only while a loss and its gradient are computed: to
merge, save or generate with it is PEFT's own affair.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..teacher import shards
from ..teacher.swap import all_modules


@contextmanager
def fused_lora_forward(model: nn.Module) -> Iterator[None]:
    """The model with every LoRA layer that is all plain computed in this way; each is as it was afterwards.

    The layers are looked for anew each time, adapters may have come and gone. A layer with more to it (DoRA, a
    bias in B, hooks, a quantized base, a `forward` of someone else's) stays PEFT's, as does a sharded model:
    ZeRO-3 has the weights of B whole only inside B's own forward.
    """
    forwards = [] if shards.is_sharded(model) else [*_forwards(model)]
    try:
        for forward in forwards:
            forward.layer.forward = forward
        yield
    finally:
        for forward in forwards:
            if vars(forward.layer).get("forward") is forward:
                del forward.layer.forward


def _forwards(model: nn.Module) -> Iterator[_Forward]:
    """For each plain layer."""
    # Whoever has a layer of PEFT's has imported this.
    peft: Any = sys.modules.get("peft.tuners.lora.layer")
    if peft is None or getattr(peft.Linear.forward, "__globals__", None) is not vars(peft):
        return
    if _has_any_global_hook():
        return
    layers: list[Any] = all_modules(model)
    for layer in layers:
        if type(layer) is peft.Linear and "forward" not in vars(layer) and hasattr(layer, "lora_variant"):
            own = _parts(layer).lora_a
            names = [name for name in layer.active_adapters if name in own]
            if names and _is_plain(layer, names):
                yield _Forward(layer, names)


class _Parts(NamedTuple):
    """The modules of a layer, by the adapter's name where every adapter has its own."""

    base: Any
    dropout: dict[str, Any]
    lora_a: dict[str, Any]
    lora_b: dict[str, Any]


def _parts(layer: Any) -> _Parts:
    # Past `__getattr__`, which looks for parameters first: a GPU waits while hundreds of layers are looked at.
    held = layer._modules
    return _Parts(
        held["base_layer"], held["lora_dropout"]._modules, held["lora_A"]._modules, held["lora_B"]._modules
    )


def _is_plain(layer: Any, names: list[str]) -> bool:
    parts = _parts(layer)
    if layer.disable_adapters or layer.merged or not _is_bare(parts.base, _LINEAR):
        return False
    for name in names:
        part_a, part_b = parts.lora_a[name], parts.lora_b[name]
        if not (
            name not in layer.lora_variant
            and isinstance(layer.scaling[name], int | float)
            and _is_bare(parts.dropout[name], _DROPOUT)
            and _is_bare(part_a, _LINEAR)
            and _is_bare(part_b, _LINEAR)
            and part_a._parameters["bias"] is None
            and part_b._parameters["bias"] is None
        ):
            return False
    return True


_LINEAR, _DROPOUT = (nn.Linear,), (nn.Identity, nn.Dropout)


def _is_bare(module: nn.Module, classes: tuple[type, ...]) -> bool:
    """Whether a module is of such a class itself, over plain parameters, and nobody listens to its calls."""
    if (
        type(module) not in classes
        or "forward" in vars(module)
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    ):
        return False
    for parameter in module._parameters.values():
        if type(parameter) is not nn.Parameter and parameter is not None:
            return False
    return True


class _Forward:
    """What a layer computes.

    It looks into the modules' own dictionaries: of a small model the GPU is done before the next layer has begun.
    """

    def __init__(self, layer: Any, names: list[str]) -> None:
        self.layer, self._active, parts = layer, list(layer.active_adapters), _parts(layer)
        self._base = parts.base._parameters
        self._adapters = [
            (name, parts.dropout[name], parts.lora_a[name]._parameters, parts.lora_b[name]._parameters)
            for name in names
        ]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        is_plain = not (args or kwargs or layer.disable_adapters or layer.merged)
        # A compiler fuses such passes itself.
        if not is_plain or layer.active_adapters != self._active or torch.compiler.is_compiling():
            return self._theirs(x, *args, **kwargs)
        # Read now: a teacher's weights may be in place.
        weight, bias = self._base["weight"], self._base["bias"]
        pairs = [(held_a["weight"], held_b["weight"]) for _, _, held_a, held_b in self._adapters]
        dtype = _operand(x, weight, *(part for pair in pairs for part in pair))
        if dtype is None:
            return self._theirs(x)
        # Cast here, so that the gradients are cast back.
        factors: list[Tensor | None] = []
        scalings = []
        for (name, dropout, *_), (weight_a, weight_b) in zip(self._adapters, pairs, strict=True):
            own = dropout(x).to(dtype) if type(dropout) is nn.Dropout and dropout.training else None
            factors += (own, _cast(weight_a, dtype), _cast(weight_b, dtype))
            scalings.append(layer.scaling[name])
        bias = None if bias is None else _cast(bias, dtype)
        operands: Any = (_cast(x, dtype), _cast(weight, dtype), bias, *factors)
        if torch.is_grad_enabled():
            output: Tensor = _Adapted.apply(scalings, *operands)
            return output
        return _adapted(scalings, *operands)[0]

    def _theirs(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = type(self.layer).forward(self.layer, x, *args, **kwargs)
        return output


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _operand(x: Tensor, *weights: Tensor) -> torch.dtype | None:
    """Dtype of the products; `None` if they have several, of which PEFT adds in the widest."""
    found = {x.dtype, *(weight.dtype for weight in weights)}
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in found:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if len(found) == 1 else None


def _adapted(
    scalings: list[float], x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """x·Wᵀ + bias + Σ scaling · x'·Aᵀ·Bᵀ [..., out] and the x'·Aᵀ [N, r]; factors x' (`None`: x), A, B by turns."""
    output, products = x.new_empty(*x.shape[:-1], len(weight)), []
    rows, changed = _rows(x), _rows(output)
    # The base layer's product comes last: it is bound by arithmetic, and adds to what is there in passing.
    so_far = bias
    for scaling, own, weight_a, weight_b in _by_adapter(scalings, factors):
        products.append(nn.functional.linear(rows if own is None else _rows(own), weight_a))
        so_far = _sum(so_far, products[-1], weight_b.t(), scaling, out=changed)
    _sum(so_far, rows, weight.t(), out=changed)
    return output, products


def _by_adapter(scalings: list[float], factors: Sequence[Any]) -> Iterator[tuple[float, Any, Any, Any]]:
    return zip(scalings, factors[::3], factors[1::3], factors[2::3], strict=True)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _Adapted(torch.autograd.Function):
    """``_adapted`` with its gradients: one step of the graph, and one tensor for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, scalings: list[float], x: Tensor, *operands: Tensor | None) -> Tensor:
        weight, bias, *factors = operands
        assert weight is not None
        output, products = _adapted(scalings, x, weight, bias, *factors)
        # Activations are kept for the gradients of W and A alone.
        _, _, needs_weight, _, *needs = ctx.needs_input_grad
        sources = [x if own is None else own for own in factors[::3]]
        kept = [source if needs_a else None for source, needs_a in zip(sources, needs[1::3], strict=True)]
        ctx.save_for_backward(
            x if needs_weight else None, weight, *kept, *factors[1::3], *factors[2::3], *products
        )
        ctx.scalings, ctx.shape = scalings, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight, *saved = ctx.saved_tensors
        _, needs_x, needs_weight, needs_bias, *needs = ctx.needs_input_grad
        flat, n = _rows(gradients[0]), len(ctx.scalings)
        to_x: Tensor | None = None
        to_factors: list[Tensor | None] = []
        for i, scaling in enumerate(ctx.scalings):
            source, weight_a, weight_b, product = saved[i::n]
            needs_own, needs_a, needs_b = needs[3 * i : 3 * i + 3]
            if torch.is_grad_enabled():
                if source is None:
                    raise RuntimeError("a second derivative needs the input, and a frozen lora_A keeps none")
                product = nn.functional.linear(_rows(source), weight_a)
            to_own = to_a = None
            if needs_x or needs_own or needs_a:
                of_product = _product(flat, weight_b, scaling)
                to_own = (of_product @ weight_a).view(ctx.shape) if needs_own else None
                to_a = of_product.t() @ _rows(source) if needs_a else None
                # An input of its own has its own gradient.
                if needs_x and not needs_own:
                    to_x = _sum(to_x, of_product, weight_a)
            to_factors += (to_own, to_a, _product(flat.t(), product, scaling) if needs_b else None)
        if needs_x:
            to_x = _sum(to_x, flat, weight)
        return (
            None,
            None if to_x is None else to_x.view(ctx.shape),
            flat.t() @ _rows(x) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            *to_factors,
        )


def _product(left: Tensor, right: Tensor, scaling: float, out: Tensor | None = None) -> Tensor:
    """scaling · left·right, rounded once."""
    if scaling == 1.0:
        return torch.mm(left, right, out=out)
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scaling, out=out)


def _sum(
    total: Tensor | None, left: Tensor, right: Tensor, scaling: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """total + scaling · left·right: in place if the total is a matrix, else (no total, or a row) new, or in out."""
    if total is None:
        return _product(left, right, scaling, out)
    if total.dim() == 1:
        return torch.addmm(total, left, right, alpha=scaling, out=out)
    return total.addmm_(left, right, alpha=scaling)
