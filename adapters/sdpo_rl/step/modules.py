"""The modules of a model, and other tensors in the place of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn


def all_modules(model: nn.Module) -> list[nn.Module]:
    """The model and the modules below it, each once; not in the order of `model.modules()`.

    With adapters a model has thousands of modules, and a step goes through them several times. One loop takes a
    fifth of the time of `model.modules()`, which is one generator inside another for every level of the model.

    Example:
        >>> inner = nn.ReLU()
        >>> [type(module).__name__ for module in all_modules(nn.Sequential(inner, inner))]
        ['Sequential', 'ReLU']
    """
    found, seen = [model], {model}
    for module in found:  # it grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


@contextmanager
def replaced_parameters(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other tensors as the parameters of these names; its own are back afterwards.

    A tied parameter is replaced in every module that holds it. `torch.func.functional_call` with `tie_weights=True`
    leaves the replacement in a module that has two names, and without it needs every name of a parameter.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with replaced_parameters(layer, {"weight": torch.tensor([[2.0]])}):
        ...     layer(torch.tensor([3.0]))
        tensor([6.])
    """
    tensors = {parameter: params[name] for name, parameter in model.named_parameters() if name in params}
    slots = [
        (module._parameters, key, parameter)
        for module in all_modules(model)
        for key, parameter in module._parameters.items()
        if parameter in tensors
    ]
    try:
        for parameters, key, parameter in slots:
            parameters[key] = cast(nn.Parameter, tensors[parameter])
        yield
    finally:
        for parameters, key, parameter in slots:
            parameters[key] = parameter
