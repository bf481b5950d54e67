"""PEFT's LoRA layers in one product: the formula's numbers, in low precision too, and what they cost."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lora_cases import IN, OUT, Operations, answer, assert_as_peft, assert_formula, by_formula, layer_of, net
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sdpo_rl.compat import peft_lora
from sdpo_rl.compat.peft_lora import fused_lora_forward

# --- the numbers ------------------------------------------------------------------------------------------


@given(
    shape=st.sampled_from([(4,), (2, 3), (1, 1), (2, 2, 3), (0,), (2, 0), ()]),
    bias=st.booleans(),
    adapters=st.integers(1, 3),
    rslora=st.booleans(),
    x_has_gradient=st.booleans(),
    trains=st.sets(st.sampled_from(["base_layer", "lora_A", "lora_B"])),
    transposed=st.booleans(),
)
# Gradients of the base's output and of the product: of neither, one, the other, both.
@example((2, 3), True, 1, False, False, set(), False)
@example((2, 3), True, 1, False, False, {"lora_A", "lora_B"}, False)
@example((2, 3), True, 1, False, True, set(), False)
@example((2, 3), True, 1, False, True, {"lora_A", "lora_B"}, False)
@example((2, 3), False, 1, False, False, {"base_layer"}, False)
def test_output_and_gradients_are_those_of_the_formula(
    shape: tuple[int, ...],
    bias: bool,
    adapters: int,
    rslora: bool,
    x_has_gradient: bool,
    trains: set[str],
    transposed: bool,
) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias), adapters, use_rslora=rslora).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trains))
    x = torch.randn(*shape, IN, dtype=torch.float64)
    x = x.transpose(0, 1) if transposed and len(shape) == 2 else x
    assert_formula(model, x.requires_grad_(x_has_gradient))


def gradients(ctx: Any, gradient: Tensor, *, base: float = 1.0, of_a: float = 1.0, of_b: float = 1.0) -> Any:
    """Those of `_Adapted`, times factors that are not there."""
    _, weight, x, weight_a, weight_b, product = ctx.saved_tensors
    flat, rows, (scaling,) = gradient.reshape(-1, OUT), x.reshape(-1, IN), ctx.scalings
    down = of_a * scaling * flat @ weight_b
    to_x = (base * flat @ weight).addmm_(down, weight_a)
    return None, to_x.view(x.shape), None, None, None, down.T @ rows, of_b * scaling * flat.T @ product


def unscaled_for_b(ctx: Any, gradient: Tensor) -> Any:
    return gradients(ctx, gradient, of_b=1 / ctx.scalings[0])


def unscaled_for_a(ctx: Any, gradient: Tensor) -> Any:
    return gradients(ctx, gradient, of_a=1 / ctx.scalings[0])


def scaled_for_the_base(ctx: Any, gradient: Tensor) -> Any:
    return gradients(ctx, gradient, base=ctx.scalings[0])


@pytest.mark.parametrize("twin", [unscaled_for_b, unscaled_for_a, scaled_for_the_base])
@pytest.mark.parametrize("bias", [False, True])
def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch, twin: Any, bias: bool) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias)).double()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    assert_formula(model, x)
    monkeypatch.setattr(peft_lora._FusedLoRA, "backward", staticmethod(gradients))
    assert_formula(model, x)
    monkeypatch.setattr(peft_lora._FusedLoRA, "backward", staticmethod(twin))
    with pytest.raises(AssertionError, match=r"^(x|lora_A.default.weight|lora_B.default.weight): "):
        assert_formula(model, x)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_graph(mode: str, bias: bool) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias), 2).double()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    with getattr(torch, mode)(), fused_lora_forward(model):
        output = model(x)
    assert not output.requires_grad
    torch.testing.assert_close(output, by_formula(model, x, output)["output"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_under_gradient_checkpointing(bias: bool, autocast: bool, reentrant: bool) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias))
    x, gradient = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, 3, OUT)
    gradient = gradient.bfloat16() if autocast else gradient

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = model.base_model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(model, x, use_reentrant=reentrant)

    with fused_lora_forward(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = answer(model, x, gradient)
        found = answer(Checkpointed(), x, gradient)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_second_derivatives(bias: bool) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias), 2).double()
    weights = [p for p in model.parameters() if p.requires_grad]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return model(x)

    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    with fused_lora_forward(model):
        assert torch.autograd.gradcheck(function, (x, *weights))
        assert torch.autograd.gradgradcheck(function, (x, *weights))
        layer_of(model).lora_A.requires_grad_(False)
        (first,) = torch.autograd.grad(model(x).sum(), x)
        assert torch.isfinite(first).all()
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_the_output_may_be_changed_in_place() -> None:
    """As that of PEFT's may, by the model or by a hook."""
    model = net().double()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    expected = answer(nn.Sequential(model, nn.Tanh()), x, torch.ones(2, 3, OUT, dtype=torch.float64))
    with fused_lora_forward(model):
        found = answer(lambda x: model(x).tanh_(), x, torch.ones(2, 3, OUT, dtype=torch.float64))
    torch.testing.assert_close(found["x"], expected["x"])


def test_a_batch_may_mix_adapters() -> None:
    model = net(adapters=2).eval()
    x, names = torch.randn(4, 3, IN), ["default", "__base__", "further1", "default"]
    expected = model(x, adapter_names=names)
    with fused_lora_forward(model):
        torch.testing.assert_close(model(x, adapter_names=names), expected)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_applied_in_training(training: bool, p: float) -> None:
    model = net(lora_dropout=p).train(training)
    counts = assert_as_peft(model, torch.randn(2, 3, IN))
    assert counts["addmm_"] == 1
    assert (counts["bernoulli_"] + counts["native_dropout"] > 0) == (training and p > 0)


@pytest.mark.parametrize("bias", [False, True])
def test_other_weights_in_the_place_of_the_parameters_count(bias: bool) -> None:
    """A teacher's forward; the very layer is read when it runs."""
    model = net(nn.Linear(IN, OUT, bias=bias)).double()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.add_(torch.randn_like(parameter) if "lora" in name else 0)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    params = {name: p.detach() for name, p in teacher.named_parameters() if "lora" in name}
    with fused_lora_forward(model), torch.no_grad():
        student, output = model(x), functional_call(model, params, (x,))
    torch.testing.assert_close(output, by_formula(teacher, x, output)["output"])
    torch.testing.assert_close(student, by_formula(model, x, output)["output"])
    assert (output - student).abs().max() > 0.1


# --- low precision ----------------------------------------------------------------------------------------


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((value.double() - expected[name]).norm() / expected[name].norm())
        for name, value in found.items()
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("adapters", ["float32 under autocast", "bfloat16", "bfloat16 under autocast"])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_no_further_from_the_formula_than_peft(device: str, bias: bool, adapters: str) -> None:
    model = net(nn.Linear(96, 80, bias=bias), r=16, lora_alpha=27, use_rslora=True).to(device, torch.bfloat16)
    if adapters.startswith("float32"):
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "lora" in name else parameter.data
    x = torch.randn(2, 60, 96, dtype=torch.bfloat16, device=device, requires_grad=True)
    gradient = torch.randn(2, 60, 80, dtype=torch.bfloat16, device=device)
    expected = by_formula(model, x, gradient)
    with torch.autocast(device, torch.bfloat16, enabled=adapters.endswith("autocast")):
        peft = errors(answer(model, x, gradient), expected)
        with fused_lora_forward(model), Operations() as operations:
            own = answer(model, x, gradient)
    assert operations.counts["addmm_"] == 2
    assert own["output"].dtype == torch.bfloat16
    assert own["lora_B.default.weight"].dtype == layer_of(model).lora_B["default"].weight.dtype
    own = errors(own, expected)
    assert own["output"] < peft["output"]
    for name, error in own.items():
        assert error <= 1.02 * peft[name], name
        assert error < 0.01


def test_products_wider_than_the_output_are_added_as_peft_adds_them() -> None:
    """float32 adapters on a bfloat16 base without autocast: the sum is in float32."""
    model = net(adapters=2).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora" in name else parameter.data
    x = torch.randn(2, 3, IN, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(2, 3, OUT, dtype=torch.bfloat16)
    expected = answer(model, x, gradient)
    with fused_lora_forward(model):
        torch.testing.assert_close(answer(model, x, gradient), expected, rtol=0, atol=0)


# --- the cost ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_no_pass_over_the_output_but_the_products(bias: bool, checkpointed: bool) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias))
    x, gradient = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, 3, OUT)
    run = partial(checkpoint, model, use_reentrant=False) if checkpointed else model
    passes = {
        "mul",
        "add",
        "add_",
        "clone",
        "copy_",
        "as_strided",
        "empty_strided",
        "new_empty_strided",
        "_to_copy",
    }
    with fused_lora_forward(model), Operations() as operations:
        run(x).backward(gradient)
    assert not passes & operations.counts.keys()
    # Into the output, and into the gradient of the input.
    assert operations.counts["addmm_"] == 2 + checkpointed
    with Operations() as operations:
        run(x).backward(gradient)
    assert operations.counts["mul"] >= 2
    assert operations.counts["add"] > 1
