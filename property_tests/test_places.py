"""Where a model holds its parameters: shared ones in each place, modules that go in circles."""

from __future__ import annotations

import torch
from torch import nn

from sdpo_rl.teacher.swap import all_modules, places, replaced


class Tied(nn.Module):
    """One weight in two places, one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.last = nn.Linear(3, 3, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.again(self.first(x)))
        return out


def test_every_module_once_even_in_circles() -> None:
    model = Tied()
    model.last.add_module("owner", model)
    found = all_modules(model)
    assert len(found) == len(set(found))
    assert set(found) == set(model.modules())


def test_other_tensors_in_every_place() -> None:
    model, x = Tied(), torch.randn(2, 3)
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    weight, bias = others["first.weight"], others["first.bias"]
    expected = ((x @ weight.T + bias) @ weight.T + bias) @ weight.T
    before, own = model(x), {id(place.parameter) for place in places(model)}
    with replaced(model, others):
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert torch.equal(model(x), before)
    assert {id(p) for p in model.parameters()} == own
    # A wrong twin: the first place alone.
    with replaced(model.first, {"weight": weight, "bias": bias}):
        assert not torch.allclose(model(x), expected, atol=1e-5)


def test_the_parameters_come_back_after_an_error() -> None:
    model = Tied()
    before = dict(model.named_parameters())
    try:
        with replaced(model, {"first.weight": torch.zeros(3, 3)}):
            raise KeyError
    except KeyError:
        pass
    assert all(p is before[name] for name, p in model.named_parameters())
