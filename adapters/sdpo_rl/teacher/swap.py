"""Where a model holds its parameters, and other tensors in their places.

With adapters a model has thousands of modules. Torch's own walks through them take milliseconds each, for which a
GPU waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """A module that holds a parameter."""

    name: str  # the parameter's own, which is that of its first place
    held: dict[str, Any]  # what the module holds
    key: str
    parameter: nn.Parameter


def all_modules(model: nn.Module) -> list[nn.Module]:
    """The model and all below it, each once, in no promised order."""
    found, seen = [model], {id(model)}
    for module in found:
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def places(model: nn.Module) -> list[Place]:
    """Every place of every parameter."""
    return _named(_held(model), {id(parameter): name for name, parameter in model.named_parameters()})


def _held(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    return [
        (module._parameters, key, parameter)
        for module in all_modules(model)
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]


def _named(held: list[tuple[dict[str, Any], str, Any]], names: Mapping[int, str]) -> list[Place]:
    return [Place(names[id(parameter)], own, key, parameter) for own, key, parameter in held]


class Layout:
    """What trains in a model, and where; its names are looked up anew only where others train than before."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._names: dict[int, str] = {}
        self.places: list[Place] = []

    def trainable(self, model: nn.Module, *, walk: bool) -> dict[str, Tensor]:
        """The trainable parameters by name; without a `walk` one in a new place goes unnoticed."""
        if walk or self._model is not model or any(p.held.get(p.key) is not p.parameter for p in self.places):
            self._walk(model)
        return {name: parameter for name, _, _, parameter in self.places if parameter.requires_grad}

    def _walk(self, model: nn.Module) -> None:
        held = [place for place in _held(model) if place[-1].requires_grad]
        # Those that have names are alive: no other has taken over the address of one.
        if {id(parameter) for *_, parameter in held} != self._names.keys():
            self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._model, self.places = model, _named(held, self._names)


class Weights(dict[str, Tensor]):
    """Tensors by parameter name, with the places that they are meant for."""

    def __init__(self, tensors: Mapping[str, Tensor], places: Sequence[Place]) -> None:
        super().__init__(tensors)
        self.places = places


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these tensors for the parameters of the same names, in every place that holds one of them.

    `torch.func.functional_call` looks for each name from the top, twice, and for shared parameters each time.
    """
    known = tensors.places if isinstance(tensors, Weights) else places(model)
    own = [place for place in known if place.name in tensors]
    try:
        for name, held, key, _ in own:
            held[key] = tensors[name]
        yield
    finally:
        for _, held, key, parameter in own:
            held[key] = parameter
