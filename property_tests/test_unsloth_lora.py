"""Unsloth's LoRA function where attention has biases: values and gradients are those of PEFT's forward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
import unsloth_driver as driver
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sdpo_rl.compat.unsloth_lora import fused_attention

needs_unsloth = pytest.mark.skipif(driver.missing() is not None, reason=str(driver.missing()))
TARGETS = ["q_proj", "k_proj", "v_proj"]


def plain(attention: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    return attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)


class Fused:
    """In the place of Unsloth's function: what the modules compute, and whether they had a bias meanwhile."""

    def __init__(self, error: type[Exception] | None = None) -> None:
        self.saw_biases: list[bool] = []
        self.error = error

    def __call__(self, attention: Any, hidden: Tensor) -> tuple[Tensor, ...]:
        self.saw_biases.append(any(p.base_layer.bias is not None for p in projections(attention)))
        if self.error is not None:
            raise self.error
        return plain(attention, hidden)


def projections(attention: Any) -> list[Any]:
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def attentions(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "q_proj")]


def add_hook(layer: Any) -> None:
    layer.register_forward_hook(lambda *_: None)


def add_hook_of_the_base(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda *_: None)


def remove_modules_of_factors(layer: Any) -> None:
    """As AdaLoRA, which has parameters."""
    del layer.lora_A
    layer.lora_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2, 2))})


def adapted(
    *, dtype: torch.dtype = torch.float64, targets: list[str] | None = None, bias: bool = True
) -> Any:
    """A model with adapters whose attention has Unsloth's attribute."""
    model = get_peft_model(
        tiny.model(), LoraConfig(r=2, target_modules=targets or TARGETS, init_lora_weights=False)
    )
    for attention in attentions(model):
        attention.apply_qkv = plain
        for layer in projections(attention):
            base = getattr(layer, "base_layer", layer)
            base.bias = nn.Parameter(torch.randn(base.out_features)) if bias else None
    return model.to(dtype)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Fused:
    return install(monkeypatch, Fused())


def install(monkeypatch: pytest.MonkeyPatch, function: Fused) -> Fused:
    llama, kernels = ModuleType("llama"), ModuleType("kernels")
    llama.original_apply_qkv, kernels.apply_lora_qkv = plain, function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth.models.llama", llama)
    monkeypatch.setitem(sys.modules, "unsloth.kernels", kernels)
    return function


def test_the_biases_are_added_to_what_the_function_returns(fused: Fused) -> None:
    model = adapted()
    first = attentions(model)[0]
    hidden = torch.randn(2, 3, first.q_proj.in_features, dtype=torch.float64)
    expected = plain(first, hidden)
    with fused_attention(model):
        outputs = first.apply_qkv(first, hidden)
    assert fused.saw_biases == [False]
    assert all(layer.base_layer.bias is not None for layer in projections(first))
    assert first.apply_qkv is plain
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value, rtol=1e-12, atol=1e-12)


def test_biases_and_functions_are_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Fused(KeyError))
    model = adapted()
    first = attentions(model)[0]
    with pytest.raises(KeyError), fused_attention(model):
        first.apply_qkv(first, torch.randn(1, 1, first.q_proj.in_features, dtype=torch.float64))
    assert first.apply_qkv is plain
    assert all(layer.base_layer.bias is not None for layer in projections(first))


@pytest.mark.parametrize(
    "settings",
    [{"dtype": torch.float32}, {"targets": ["q_proj", "v_proj"]}, {"bias": False}],
    ids=["float32", "a projection without adapters", "no bias"],
)
def test_other_layers_keep_the_forward_of_peft(settings: dict[str, Any], fused: Fused) -> None:
    model = adapted(**settings)
    with fused_attention(model):
        assert all(attention.apply_qkv is plain for attention in attentions(model))


@pytest.mark.parametrize("change", [add_hook, add_hook_of_the_base, remove_modules_of_factors])
def test_a_changed_layer_keeps_the_forward_of_peft(change: Callable[[Any], None], fused: Fused) -> None:
    model = adapted()
    first, second = attentions(model)
    change(first.k_proj)
    with fused_attention(model):
        assert first.apply_qkv is plain
        assert second.apply_qkv is not plain


def test_compiled_layers_keep_the_forward_of_peft(fused: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    first = attentions(model)[0]
    hidden = torch.randn(1, 2, first.q_proj.in_features, dtype=torch.float64)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with fused_attention(model):
        first.apply_qkv(first, hidden)
    assert fused.saw_biases == []


def test_without_unsloth_nothing_changes() -> None:
    model = adapted()
    with fused_attention(model):
        assert all(attention.apply_qkv is plain for attention in attentions(model))


# --- in a fresh process, with Unsloth ----------------------------------------------------------------------------


def observe() -> dict[str, Any]:
    """The largest differences from PEFT's forward in float64, over all layers, and calls of Unsloth's function."""
    from unsloth import FastLanguageModel
    from unsloth.kernels import fast_lora

    tiny.model(tie_word_embeddings=False).save_pretrained("tiny")
    tiny.tokenizer().save_pretrained("tiny")
    model, _ = FastLanguageModel.from_pretrained(
        "tiny", max_seq_length=64, dtype=torch.bfloat16, load_in_4bit=False, device_map="cpu"
    )
    model = FastLanguageModel.get_peft_model(
        model, r=4, lora_alpha=8, target_modules=driver.PROJECTIONS, lora_dropout=0, bias="none",
        use_gradient_checkpointing=False,
    )  # fmt: skip
    driver.randomize_lora(model)
    model.double()
    calls, function = [], fast_lora.LoRA_QKV.apply
    fast_lora.LoRA_QKV.apply = lambda *args: calls.append(1) or function(*args)
    gaps = {"values": 0.0, "gradients": 0.0}
    torch.manual_seed(0)
    for attention in attentions(model):
        for layer in projections(attention):
            layer.base_layer.bias.data.normal_()
        hidden = torch.randn(2, 5, attention.q_proj.in_features, dtype=torch.float64)
        expected, gradients = forward_and_gradients(attention, hidden)
        count = len(calls)
        with fused_attention(model):
            outputs, fused_gradients = forward_and_gradients(attention, hidden)
        assert len(calls) == count + 1
        for name, own, other in (("values", outputs, expected), ("gradients", fused_gradients, gradients)):
            largest = max(float((a - b).abs().max()) for a, b in zip(own, other, strict=True))
            gaps[name] = max(gaps[name], largest)
    return {**gaps, "layers": len(calls)}


def forward_and_gradients(attention: Any, hidden: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys and values, and the gradients of hidden states and adapters of their weighted sum."""
    hidden = hidden.clone().requires_grad_()
    adapters = [p for layer in projections(attention) for p in layer.parameters() if p.requires_grad]
    # Unsloth writes the gradient into the memory of the input.
    outputs = [output.clone() for output in attention.apply_qkv(attention, hidden * 1.0)]
    weights = [
        torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output) for output in outputs
    ]
    total = sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True))
    return [output.detach() for output in outputs], list(torch.autograd.grad(total, [hidden, *adapters]))


@needs_unsloth
def test_values_and_gradients_are_those_of_peft(tmp_path: Path) -> None:
    seen = driver.run("test_unsloth_lora:observe", tmp_path, interpreter=True)
    assert seen["layers"] == 2
    assert seen["values"] < 1e-12
    assert seen["gradients"] < 1e-11
