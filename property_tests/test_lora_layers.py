"""Which LoRA layers get the fused forward, and that PEFT's own is back afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lora_cases import (
    IN,
    OUT,
    RANK,
    assert_equals_peft,
    count_fused,
    layer_of,
    lora_model,
    output_and_gradients,
    seeded_output,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from sdpo_rl.compat import peft_lora
from sdpo_rl.compat.peft_lora import fused_lora_forward

# --- which layers -----------------------------------------------------------------------------------------


def count_fusible(model: nn.Module) -> int:
    with fused_lora_forward(model):
        return count_fused(model)


def changed(change: Callable[[Any], Any], **settings: Any) -> PeftModel:
    model = lora_model(**settings)
    change(layer_of(model))
    return model


def with_hook(kind: str, part: str) -> PeftModel:
    def add(layer: Any) -> None:
        module = getattr(layer, part)
        module = module["default"] if isinstance(module, nn.ModuleDict) else module
        getattr(module, f"register_{kind}")(lambda *args: None)

    return changed(add)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Wrapped(Tensor):
    """A tensor subclass, as distributed and quantized tensors are."""


class UserLinear(nn.Linear):
    """A layer of a user."""


class UserLora(peft_layer.Linear):
    """A LoRA layer of a user."""


def with_forward(module: nn.Module) -> None:
    """Replace the forward of an instance, as accelerate's hooks do."""
    module.forward = module.forward


def plain_and_dora() -> PeftModel:
    model = lora_model()
    settings = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model.add_adapter("dora", LoraConfig(use_dora=True, **settings))
    model.base_model.set_adapter(["default", "dora"])
    return model


def adapters_on_different_layers() -> PeftModel:
    """Two active adapters, of which each layer has one."""
    torch.manual_seed(0)
    settings = {"r": 2, "init_lora_weights": False}
    start = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
    model = get_peft_model(start, LoraConfig(target_modules=["0"], **settings))
    model.add_adapter("second", LoraConfig(target_modules=["1"], **settings))
    model.base_model.set_adapter(["default", "second"])
    return model


def frozen() -> PeftModel:
    model = lora_model()
    model.requires_grad_(False)
    return model


def tensor_weight(layer: Any) -> None:
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(OUT, RANK).as_subclass(Wrapped))


PLAIN: dict[str, Callable[[], PeftModel]] = {
    "plain": lora_model,
    "without a bias": lambda: lora_model(nn.Linear(IN, OUT, bias=False)),
    "dropout": lambda: lora_model(lora_dropout=0.3),
    "rank-stabilized": lambda: lora_model(use_rslora=True),
    "frozen": frozen,
    "in eval mode": lambda: lora_model().eval(),
    "three adapters": lambda: lora_model(adapters=3),
    "adapters on different layers": adapters_on_different_layers,
    "unmerged again": lambda: changed(lambda layer: (layer.merge(), layer.unmerge())),
    "enabled again": lambda: changed(
        lambda layer: (layer.enable_adapters(False), layer.enable_adapters(True))
    ),
    "rescaled": lambda: changed(lambda layer: layer.set_scale("default", 3.0)),
    "hooks on the whole layer": lambda: changed(lambda layer: layer.register_forward_hook(lambda *_: None)),
}
NOT_PLAIN: dict[str, Callable[[], PeftModel]] = {
    "DoRA": lambda: lora_model(use_dora=True),
    "one adapter of two with DoRA": plain_and_dora,
    "a bias in B": lambda: lora_model(lora_bias=True),
    "merged": lambda: changed(lambda layer: layer.merge()),
    "disabled": lambda: changed(lambda layer: layer.enable_adapters(False)),
    "no active adapter": lambda: changed(lambda layer: setattr(layer, "_active_adapter", ["gone"])),
    "a scaling that is a tensor": lambda: changed(
        lambda layer: layer.scaling.update(default=torch.tensor(2.0))
    ),
    "Embedding": lambda: lora_model(nn.Embedding(20, OUT)),
    "Conv1D": lambda: lora_model(Conv1D(OUT, IN), fan_in_fan_out=True),
    "Conv2d": lambda: lora_model(nn.Conv2d(IN, OUT, 1)),
    "a base of another class": lambda: changed(
        lambda layer: setattr(layer.base_layer, "__class__", UserLinear)
    ),
    "a layer of another class": lambda: changed(lambda layer: setattr(layer, "__class__", UserLora)),
    "a parametrized B": lambda: changed(
        lambda layer: parametrize.register_parametrization(layer.lora_B["default"], "weight", Doubled())
    ),
    "a weight that is no plain tensor": lambda: changed(tensor_weight),
    "a replaced forward of the layer": lambda: changed(with_forward),
    "a replaced forward of the base": lambda: changed(lambda layer: with_forward(layer.base_layer)),
    "a replaced forward of B": lambda: changed(lambda layer: with_forward(layer.lora_B["default"])),
    "a replaced forward of the dropout": lambda: changed(
        lambda layer: with_forward(layer.lora_dropout["default"])
    ),
    "another class of dropout": lambda: changed(
        lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.1)})
    ),
    **{
        f"{kind} on {part}": partial(with_hook, kind, part)
        for kind in (
            "forward_hook",
            "forward_pre_hook",
            "full_backward_hook",
            "full_backward_pre_hook",
        )
        for part in ("base_layer", "lora_A", "lora_B", "lora_dropout")
    },
}


def example_input(model: PeftModel) -> Tensor:
    base = layer_of(model).base_layer
    if isinstance(base, nn.Embedding):
        return torch.arange(6).view(2, 3)
    return torch.randn(2, IN, 3, 3) if isinstance(base, nn.Conv2d) else torch.randn(2, 3, IN)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_layers_are_fused(kind: str) -> None:
    model = PLAIN[kind]()
    counts = assert_equals_peft(model, torch.randn(2, 3, IN))
    active = [name for layer in model.modules() for name in getattr(layer, "lora_A", {})]
    assert counts["addmm_"] == len(active)
    assert count_fused(model) == 0


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_other_layers_keep_the_forward_of_peft(kind: str) -> None:
    model = NOT_PLAIN[kind]()
    attributes = dict(vars(layer_of(model)))
    x = example_input(model)
    expected = seeded_output(model, x)
    with fused_lora_forward(model):
        assert vars(layer_of(model)) == attributes
        assert torch.equal(seeded_output(model, x), expected)
    assert vars(layer_of(model)) == attributes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_keep_the_forward_of_peft(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.model(hidden_size=64, intermediate_size=128, tie_word_embeddings=False).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    # bitsandbytes does not quantize the head.
    assert count_fusible(model) == 1
    with fused_lora_forward(model):
        assert count_fused(model.get_output_embeddings()) == 1


def peft_without_variants(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    del layer_of(model).lora_variant


def replaced_forward(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    original = peft_layer.Linear.forward
    patch.setattr(peft_layer.Linear, "forward", functools.wraps(original)(lambda self, x: original(self, x)))


def global_hook(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    patch.setitem(nn.modules.module._global_forward_hooks, 0, lambda *_: None)


def sharded(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    patch.setattr(peft_lora.shards, "is_sharded", lambda _: True)


@pytest.mark.parametrize("change", [peft_without_variants, replaced_forward, global_hook, sharded])
def test_models_that_keep_the_forward_of_peft(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model()
    assert count_fusible(model) == 1
    change(monkeypatch, model)
    assert count_fusible(model) == 0


def test_a_model_without_adapters_is_unchanged() -> None:
    model, x = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU()), torch.randn(3, IN)
    expected, attributes = model(x), [dict(vars(module)) for module in model.modules()]
    with fused_lora_forward(model):
        assert [vars(module) for module in model.modules()] == attributes
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_runs_the_forward_of_peft(bias: bool) -> None:
    model = lora_model(nn.Linear(IN, OUT, bias=bias))
    x, gradient = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, 3, OUT)
    expected = output_and_gradients(model, x, gradient)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with fused_lora_forward(model):
        result = output_and_gradients(compiled, x, gradient)
    torch.testing.assert_close(result["x"], expected["x"])
    torch.testing.assert_close(result["output"], expected["output"])


# --- entry and exit ---------------------------------------------------------------------------------------


def test_the_forward_of_peft_is_back_after_an_error() -> None:
    model = lora_model(adapters=2)
    with pytest.raises(RuntimeError, match=r"^1 fused$"), fused_lora_forward(model):
        raise RuntimeError(f"{count_fused(model)} fused")
    assert count_fused(model) == 0
    assert "forward" not in vars(layer_of(model))


def test_nested_contexts_end_with_the_outer_one() -> None:
    model = lora_model()
    with fused_lora_forward(model):
        with fused_lora_forward(model):
            assert count_fused(model) == 1
        assert count_fused(model) == 1
    assert count_fused(model) == 0


def test_changes_within_the_context_persist() -> None:
    model, x = lora_model(adapters=2), torch.randn(3, IN)
    layer = layer_of(model)
    with fused_lora_forward(model):
        model.delete_adapter("further1")
        result = model(x)
        layer.forward = replacement = functools.partial(type(layer).forward, layer)
    assert vars(layer)["forward"] is replacement
    torch.testing.assert_close(result, model(x))


def test_adapters_are_searched_on_every_entry() -> None:
    model = lora_model(use_dora=True)
    assert count_fusible(model) == 0
    model.add_adapter("later", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter("later")
    assert count_fusible(model) == 1


@pytest.mark.parametrize("autocast", [False, True])
def test_a_weight_that_is_replaced_during_a_step_is_read_by_peft(autocast: bool) -> None:
    model = lora_model()
    layer, x = layer_of(model), torch.randn(2, IN)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with fused_lora_forward(model):
            plain = layer(x)
            parametrize.register_parametrization(layer.lora_B["default"], "weight", Doubled())
            inside = layer(x)
        torch.testing.assert_close(inside, layer(x), rtol=0.0, atol=0.0)
    assert (inside - plain).norm() > 1e-3 * plain.norm()
