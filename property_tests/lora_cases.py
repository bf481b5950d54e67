"""A model of one LoRA layer, its expected output and gradients, and counters: shared by the LoRA tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdpo_rl.compat import peft_lora
from sdpo_rl.compat.peft_lora import fused_lora_forward

IN, OUT, RANK = 7, 5, 3


def lora_model(base: nn.Module | None = None, adapters: int = 1, **changes: Any) -> PeftModel:
    """An `nn.Sequential` of one LoRA layer whose factors are not zero."""
    torch.manual_seed(0)
    base = base or nn.Linear(IN, OUT)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    settings = {"r": RANK, "lora_alpha": 5, "target_modules": ["0"], "init_lora_weights": False}
    model = get_peft_model(nn.Sequential(base), LoraConfig(**{**settings, **changes}))
    for i in range(1, adapters):
        model.add_adapter(f"further{i}", LoraConfig(**{**settings, **changes, "lora_alpha": 5 - 2 * i}))
    model.base_model.set_adapter(["default", *(f"further{i}" for i in range(1, adapters))])
    return model


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model[0]


class Operations(TorchDispatchMode):
    """Counts every operation that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def output_and_gradients(model: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of the input and of every parameter that has one."""
    x = x.detach().requires_grad_(x.requires_grad)
    parameters = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    for parameter in parameters.values():
        parameter.grad = None
    output = model(x)
    result = {"output": output.detach()}
    if output.requires_grad:
        output.backward(gradient)
    for name, tensor in [("x", x), *parameters.items()]:
        if tensor.grad is not None:
            result[name.replace("base_model.model.0.", "")] = tensor.grad
    return result


def reference(model: PeftModel, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """y = W x + b + Σ s·B(A x) and its gradients, in float64, with s from the configuration."""
    layer = layer_of(model)
    W, x, g = (t.detach().double() for t in (layer.base_layer.weight, x, gradient))
    flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    output, grad_x = flat_x @ W.T, flat_g @ W
    result = {"base_layer.weight": flat_g.T @ flat_x}
    if layer.base_layer.bias is not None:
        output = output + layer.base_layer.bias.detach().double()
        result["base_layer.bias"] = flat_g.sum(0)
    for name in layer.active_adapters:
        config = model.peft_config[name]
        s = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        A, B = (part[name].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        output = output + s * (flat_x @ A.T) @ B.T
        grad_x = grad_x + s * (flat_g @ B) @ A
        result[f"lora_A.{name}.weight"] = s * (flat_g @ B).T @ flat_x
        result[f"lora_B.{name}.weight"] = s * flat_g.T @ (flat_x @ A.T)
    return {"output": output.reshape(gradient.shape), "x": grad_x.reshape(x.shape), **result}


def assert_equals_formula(model: PeftModel, x: Tensor) -> None:
    """The fused forward equals the formula, in float64."""
    gradient = torch.randn(*x.shape[:-1], OUT, dtype=x.dtype)
    with fused_lora_forward(model), Operations() as operations:
        result = output_and_gradients(model, x, gradient)
    # Products that accumulate: into the output, and into the gradient of the input.
    assert operations.counts["addmm_"] == len(layer_of(model).active_adapters) * (1 + x.requires_grad)
    expected = reference(model, x, gradient)
    trainable = {name for name, p in layer_of(model).named_parameters() if p.requires_grad}
    assert result.keys() == {"output"} | trainable | ({"x"} if x.requires_grad else set())
    for name, value in result.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def seeded_output(model: PeftModel, x: Tensor) -> Tensor:
    """The output with the same dropout mask each time."""
    torch.manual_seed(1)
    return model(x)


def assert_equals_peft(model: PeftModel, x: Tensor) -> Counter[str]:
    """The fused forward equals PEFT's; returns how often each operation ran."""
    expected = seeded_output(model, x)
    with fused_lora_forward(model), Operations() as operations:
        torch.testing.assert_close(seeded_output(model, x), expected)
    return operations.counts


def count_fused(model: nn.Module) -> int:
    """The number of layers with the fused forward now."""
    return sum(isinstance(vars(m).get("forward"), peft_lora._FusedForward) for m in model.modules())
