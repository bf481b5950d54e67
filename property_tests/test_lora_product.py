"""The fused LoRA forward: output and gradients of the formula, errors in low precision, and operation counts."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lora_cases import (
    IN,
    OUT,
    Operations,
    assert_equals_formula,
    assert_equals_peft,
    layer_of,
    lora_model,
    output_and_gradients,
    reference,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sdpo_rl.compat import peft_lora
from sdpo_rl.compat.peft_lora import fused_lora_forward

# --- output and gradients ---------------------------------------------------------------------------------


@given(
    shape=st.sampled_from([(4,), (2, 3), (1, 1), (2, 2, 3), (0,), (2, 0), ()]),
    bias=st.booleans(),
    adapters=st.integers(1, 3),
    rslora=st.booleans(),
    x_has_gradient=st.booleans(),
    trainable=st.sets(st.sampled_from(["base_layer", "lora_A", "lora_B"])),
    transposed=st.booleans(),
)
# Gradients of: nothing, the adapter, the input, both, the base.
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
    trainable: set[str],
    transposed: bool,
) -> None:
    model = lora_model(nn.Linear(IN, OUT, bias=bias), adapters, use_rslora=rslora).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trainable))
    x = torch.randn(*shape, IN, dtype=torch.float64)
    x = x.transpose(0, 1) if transposed and len(shape) == 2 else x
    assert_equals_formula(model, x.requires_grad_(x_has_gradient))


def gradients(ctx: Any, gradient: Tensor, *, base: float = 1.0, of_a: float = 1.0, of_b: float = 1.0) -> Any:
    """The gradients of `_FusedLoRA`; a factor other than 1 is a counter-example."""
    _, weight, x, weight_a, weight_b, product = ctx.saved_tensors
    flat_g, flat_x, (scaling,) = gradient.reshape(-1, OUT), x.reshape(-1, IN), ctx.scalings
    grad_product = of_a * scaling * flat_g @ weight_b
    grad_x = (base * flat_g @ weight).addmm_(grad_product, weight_a)
    return (
        None,
        grad_x.view(x.shape),
        None,
        None,
        None,
        grad_product.T @ flat_x,
        of_b * scaling * flat_g.T @ product,
    )


def unscaled_for_b(ctx: Any, gradient: Tensor) -> Any:
    return gradients(ctx, gradient, of_b=1 / ctx.scalings[0])


def unscaled_for_a(ctx: Any, gradient: Tensor) -> Any:
    return gradients(ctx, gradient, of_a=1 / ctx.scalings[0])


def scaled_for_the_base(ctx: Any, gradient: Tensor) -> Any:
    return gradients(ctx, gradient, base=ctx.scalings[0])


@pytest.mark.parametrize("wrong", [unscaled_for_b, unscaled_for_a, scaled_for_the_base])
@pytest.mark.parametrize("bias", [False, True])
def test_a_wrong_gradient_is_rejected(monkeypatch: pytest.MonkeyPatch, wrong: Any, bias: bool) -> None:
    model = lora_model(nn.Linear(IN, OUT, bias=bias)).double()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    assert_equals_formula(model, x)
    monkeypatch.setattr(peft_lora._FusedLoRA, "backward", staticmethod(gradients))
    assert_equals_formula(model, x)
    monkeypatch.setattr(peft_lora._FusedLoRA, "backward", staticmethod(wrong))
    with pytest.raises(AssertionError, match=r"^(x|lora_A.default.weight|lora_B.default.weight): "):
        assert_equals_formula(model, x)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_graph(mode: str, bias: bool) -> None:
    model = lora_model(nn.Linear(IN, OUT, bias=bias), 2).double()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    with getattr(torch, mode)(), fused_lora_forward(model):
        output = model(x)
    assert not output.requires_grad
    torch.testing.assert_close(output, reference(model, x, output)["output"])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_under_gradient_checkpointing(bias: bool, autocast: bool, reentrant: bool) -> None:
    model = lora_model(nn.Linear(IN, OUT, bias=bias))
    x, gradient = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, 3, OUT)
    gradient = gradient.bfloat16() if autocast else gradient

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = model.base_model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(model, x, use_reentrant=reentrant)

    with fused_lora_forward(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = output_and_gradients(model, x, gradient)
        result = output_and_gradients(Checkpointed(), x, gradient)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_second_derivatives(bias: bool) -> None:
    model = lora_model(nn.Linear(IN, OUT, bias=bias), 2).double()
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
    """PEFT's output may be, by the model or by a hook."""
    model = lora_model().double()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    expected = output_and_gradients(
        nn.Sequential(model, nn.Tanh()), x, torch.ones(2, 3, OUT, dtype=torch.float64)
    )
    with fused_lora_forward(model):
        result = output_and_gradients(
            lambda x: model(x).tanh_(), x, torch.ones(2, 3, OUT, dtype=torch.float64)
        )
    torch.testing.assert_close(result["x"], expected["x"])


def test_a_batch_may_mix_adapters() -> None:
    model = lora_model(adapters=2).eval()
    x, names = torch.randn(4, 3, IN), ["default", "__base__", "further1", "default"]
    expected = model(x, adapter_names=names)
    with fused_lora_forward(model):
        torch.testing.assert_close(model(x, adapter_names=names), expected)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_applied_in_training(training: bool, p: float) -> None:
    model = lora_model(lora_dropout=p).train(training)
    counts = assert_equals_peft(model, torch.randn(2, 3, IN))
    assert counts["addmm_"] == 1
    assert (counts["bernoulli_"] + counts["native_dropout"] > 0) == (training and p > 0)


@pytest.mark.parametrize("bias", [False, True])
def test_functional_call_replaces_the_weights(bias: bool) -> None:
    """As a teacher forward does: weights are read when the layer runs."""
    model = lora_model(nn.Linear(IN, OUT, bias=bias)).double()
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            parameter.add_(torch.randn_like(parameter) if "lora" in name else 0)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    params = {name: p.detach() for name, p in teacher.named_parameters() if "lora" in name}
    with fused_lora_forward(model), torch.no_grad():
        student, output = model(x), functional_call(model, params, (x,))
    torch.testing.assert_close(output, reference(teacher, x, output)["output"])
    torch.testing.assert_close(student, reference(model, x, output)["output"])
    assert (output - student).abs().max() > 0.1


# --- low precision ----------------------------------------------------------------------------------------


def errors(result: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((value.double() - expected[name]).norm() / expected[name].norm())
        for name, value in result.items()
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("adapters", ["float32 under autocast", "bfloat16", "bfloat16 under autocast"])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16_is_no_further_from_the_formula_than_peft(device: str, bias: bool, adapters: str) -> None:
    model = lora_model(nn.Linear(96, 80, bias=bias), r=16, lora_alpha=27, use_rslora=True).to(
        device, torch.bfloat16
    )
    if adapters.startswith("float32"):
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "lora" in name else parameter.data
    x = torch.randn(2, 60, 96, dtype=torch.bfloat16, device=device, requires_grad=True)
    gradient = torch.randn(2, 60, 80, dtype=torch.bfloat16, device=device)
    expected = reference(model, x, gradient)
    with torch.autocast(device, torch.bfloat16, enabled=adapters.endswith("autocast")):
        peft = errors(output_and_gradients(model, x, gradient), expected)
        with fused_lora_forward(model), Operations() as operations:
            fused = output_and_gradients(model, x, gradient)
    assert operations.counts["addmm_"] == 2
    assert fused["output"].dtype == torch.bfloat16
    assert fused["lora_B.default.weight"].dtype == layer_of(model).lora_B["default"].weight.dtype
    fused = errors(fused, expected)
    assert fused["output"] < peft["output"]
    for name, error in fused.items():
        assert error <= 1.02 * peft[name], name
        assert error < 0.01


def test_products_wider_than_the_output_are_added_as_peft_adds_them() -> None:
    """float32 adapters on a bfloat16 base without autocast: PEFT adds in float32."""
    model = lora_model(adapters=2).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora" in name else parameter.data
    x = torch.randn(2, 3, IN, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(2, 3, OUT, dtype=torch.bfloat16)
    expected = output_and_gradients(model, x, gradient)
    with fused_lora_forward(model):
        torch.testing.assert_close(output_and_gradients(model, x, gradient), expected, rtol=0, atol=0)


# --- operation counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_only_products_write_the_output(bias: bool, checkpointed: bool) -> None:
    model = lora_model(nn.Linear(IN, OUT, bias=bias))
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
    # Products that accumulate: into the output, and into the gradient of the input.
    assert operations.counts["addmm_"] == 2 + checkpointed
    with Operations() as operations:
        run(x).backward(gradient)
    assert operations.counts["mul"] >= 2
    assert operations.counts["add"] > 1
