"""Other tensors in place of a model's parameters, for one forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def swap_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these tensors in place of the parameters of the same names; its own are back afterwards.

    A tied parameter is replaced in every module that has it. `torch.func.functional_call` does so too, but does not
    restore the parameters of a module that is registered under two names, such as PEFT's trainable tokens of a tied
    embedding.

    Args:
        model: a model that is not sharded.
        tensors: by parameter name, of the shapes of the parameters; the others stay.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in tensors}
    # `_parameters`: assignment to an attribute refuses a tensor that is no parameter.
    originals: list[tuple[dict[str, Any], str, Any]] = [
        (module._parameters, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if id(parameter) in names
    ]
    try:
        for parameters, key, parameter in originals:
            parameters[key] = tensors[names[id(parameter)]]
        yield
    finally:
        for parameters, key, parameter in originals:
            parameters[key] = parameter
