"""The modules of a model, and other tensors in the place of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

from ..teacher import shards


def all_modules(model: nn.Module) -> list[nn.Module]:
    """The model and the modules below it, each once; not in the order of `model.modules()`.

    With adapters a model has thousands of modules, and a step goes through them several times. `model.modules()`
    nests one generator for each level of the model; this is one loop.

    Examples:
        >>> inner = nn.ReLU()
        >>> [type(module).__name__ for module in all_modules(nn.Sequential(inner, inner))]
        ['Sequential', 'ReLU']
    """
    found, seen = [model], {model}
    for module in found:  # extended during the iteration
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


@contextmanager
def replaced_parameters(model: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other tensors in place of the named parameters; its own are restored on exit.

    The names are those of `shards.parameters_by_name`. A tied parameter is replaced in every module that holds it.
    `torch.func.functional_call` with `tie_weights=True` does not restore a parameter of a module that has two
    names; with `tie_weights=False` it must be given every name of a tied parameter.

    Examples:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with replaced_parameters(layer, {"weight": torch.tensor([[2.0]])}):
        ...     layer(torch.tensor([3.0]))
        tensor([6.])
    """
    own = shards.parameters_by_name(model)
    tensors = {own[name]: tensor for name, tensor in params.items()}
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
