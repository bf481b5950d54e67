"""What PEFT changes when it enables, disables or switches adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..step.modules import all_modules


@contextmanager
def trainable_preserved(model: nn.Module) -> Iterator[None]:
    """Afterwards the same parameters are trainable as before; PEFT makes all of the active adapters' trainable.

    Args:
        model: the unwrapped model, with adapters or without.
    """
    if not hasattr(model, "peft_config"):
        yield
        return
    # By their places: FSDP exchanges the parameter that is in a place.
    places = [
        (module, name, parameter.requires_grad)
        for module in all_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        yield
    finally:
        for module, name, is_trainable in places:
            parameter = module._parameters[name]
            if parameter is not None and parameter.requires_grad != is_trainable:
                parameter.requires_grad_(is_trainable)
