"""One adapted layer, its numbers by the formula, and what ran and was there: shared by the tests of LoRA."""

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


def net(base: nn.Module | None = None, adapters: int = 1, **changes: Any) -> PeftModel:
    """One adapted layer, of an `nn.Sequential`, whose adapters are not zero."""
    torch.manual_seed(0)
    base = base or nn.Linear(IN, OUT)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    settings = {"r": RANK, "lora_alpha": 5, "target_modules": ["0"], "init_lora_weights": False}
    made = get_peft_model(nn.Sequential(base), LoraConfig(**{**settings, **changes}))
    for i in range(1, adapters):
        made.add_adapter(f"further{i}", LoraConfig(**{**settings, **changes, "lora_alpha": 5 - 2 * i}))
    made.base_model.set_adapter(["default", *(f"further{i}" for i in range(1, adapters))])
    return made


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model[0]


class Operations(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def answer(model: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Output and gradients, of the input and of every parameter that has one."""
    x = x.detach().requires_grad_(x.requires_grad)
    parameters = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    for parameter in parameters.values():
        parameter.grad = None
    output = model(x)
    found = {"output": output.detach()}
    if output.requires_grad:
        output.backward(gradient)
    for name, tensor in [("x", x), *parameters.items()]:
        if tensor.grad is not None:
            found[name.replace("base_model.model.0.", "")] = tensor.grad
    return found


def by_formula(model: PeftModel, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """y = W x + b + Σ s·B(A x) and its gradients, in float64, with s from the configuration."""
    layer = layer_of(model)
    W, x, g = (t.detach().double() for t in (layer.base_layer.weight, x, gradient))
    rows, flat = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    output, of_x = rows @ W.T, flat @ W
    found = {"base_layer.weight": flat.T @ rows}
    if layer.base_layer.bias is not None:
        output = output + layer.base_layer.bias.detach().double()
        found["base_layer.bias"] = flat.sum(0)
    for name in layer.active_adapters:
        config = model.peft_config[name]
        s = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        A, B = (part[name].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        output = output + s * (rows @ A.T) @ B.T
        of_x = of_x + s * (flat @ B) @ A
        found[f"lora_A.{name}.weight"] = s * (flat @ B).T @ rows
        found[f"lora_B.{name}.weight"] = s * flat.T @ (rows @ A.T)
    return {"output": output.reshape(gradient.shape), "x": of_x.reshape(x.shape), **found}


def assert_formula(model: PeftModel, x: Tensor) -> None:
    """In the dtype of the model: float64, where the formula leaves no room."""
    gradient = torch.randn(*x.shape[:-1], OUT, dtype=x.dtype)
    with fused_lora_forward(model), Operations() as operations:
        found = answer(model, x, gradient)
    # Into the output, and into the gradient of the input.
    assert operations.counts["addmm_"] == len(layer_of(model).active_adapters) * (1 + x.requires_grad)
    expected = by_formula(model, x, gradient)
    trains = {name for name, p in layer_of(model).named_parameters() if p.requires_grad}
    assert found.keys() == {"output"} | trains | ({"x"} if x.requires_grad else set())
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def drawn(model: PeftModel, x: Tensor) -> Tensor:
    """The output, of the same random numbers each time."""
    torch.manual_seed(1)
    return model(x)


def assert_as_peft(model: PeftModel, x: Tensor) -> Counter[str]:
    """And how often each operation ran."""
    expected = drawn(model, x)
    with fused_lora_forward(model), Operations() as operations:
        torch.testing.assert_close(drawn(model, x), expected)
    return operations.counts


def there(model: nn.Module) -> int:
    """Layers that are now computed in another way."""
    return sum(isinstance(vars(m).get("forward"), peft_lora._FusedForward) for m in model.modules())
