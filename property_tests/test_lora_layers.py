"""Which of PEFT's LoRA layers are computed in one product, and that each is as it was afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lora_cases import IN, OUT, RANK, answer, assert_as_peft, drawn, layer_of, net, there
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from sdpo_rl.compat import peft_lora
from sdpo_rl.compat.peft_lora import fused_lora_forward

# --- which layers -----------------------------------------------------------------------------------------


def count(model: nn.Module) -> int:
    with fused_lora_forward(model):
        return there(model)


def changed(change: Callable[[Any], Any], **settings: Any) -> PeftModel:
    model = net(**settings)
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
    """A tensor of another kind, as a distributed or quantized one is."""


class Narrow(nn.Linear):
    """Someone's own layer."""


class Own(peft_layer.Linear):
    """Someone's own adapter layer."""


def with_forward(module: nn.Module) -> None:
    """As accelerate's hooks and other libraries replace it."""
    module.forward = module.forward


def mixed() -> PeftModel:
    model = net()
    settings = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model.add_adapter("dora", LoraConfig(use_dora=True, **settings))
    model.base_model.set_adapter(["default", "dora"])
    return model


def elsewhere() -> PeftModel:
    """Of two active adapters each layer has one."""
    torch.manual_seed(0)
    settings = {"r": 2, "init_lora_weights": False}
    start = nn.Sequential(nn.Linear(IN, IN), nn.Linear(IN, IN))
    model = get_peft_model(start, LoraConfig(target_modules=["0"], **settings))
    model.add_adapter("second", LoraConfig(target_modules=["1"], **settings))
    model.base_model.set_adapter(["default", "second"])
    return model


def frozen() -> PeftModel:
    model = net()
    model.requires_grad_(False)
    return model


def tensor_weight(layer: Any) -> None:
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(OUT, RANK).as_subclass(Wrapped))


QUALIFY: dict[str, Callable[[], PeftModel]] = {
    "plain": net,
    "without a bias": lambda: net(nn.Linear(IN, OUT, bias=False)),
    "dropout": lambda: net(lora_dropout=0.3),
    "rank-stabilized": lambda: net(use_rslora=True),
    "frozen": frozen,
    "in eval mode": lambda: net().eval(),
    "three adapters": lambda: net(adapters=3),
    "adapters on different layers": elsewhere,
    "unmerged again": lambda: changed(lambda layer: (layer.merge(), layer.unmerge())),
    "enabled again": lambda: changed(
        lambda layer: (layer.enable_adapters(False), layer.enable_adapters(True))
    ),
    "rescaled": lambda: changed(lambda layer: layer.set_scale("default", 3.0)),
    "hooks on the whole layer": lambda: changed(lambda layer: layer.register_forward_hook(lambda *_: None)),
}
EXEMPT: dict[str, Callable[[], PeftModel]] = {
    "DoRA": lambda: net(use_dora=True),
    "one adapter of two with DoRA": mixed,
    "a bias in B": lambda: net(lora_bias=True),
    "merged": lambda: changed(lambda layer: layer.merge()),
    "disabled": lambda: changed(lambda layer: layer.enable_adapters(False)),
    "no active adapter": lambda: changed(lambda layer: setattr(layer, "_active_adapter", ["gone"])),
    "a scaling that is a tensor": lambda: changed(
        lambda layer: layer.scaling.update(default=torch.tensor(2.0))
    ),
    "Embedding": lambda: net(nn.Embedding(20, OUT)),
    "Conv1D": lambda: net(Conv1D(OUT, IN), fan_in_fan_out=True),
    "Conv2d": lambda: net(nn.Conv2d(IN, OUT, 1)),
    "a base of another class": lambda: changed(lambda layer: setattr(layer.base_layer, "__class__", Narrow)),
    "a layer of another class": lambda: changed(lambda layer: setattr(layer, "__class__", Own)),
    "a parametrized B": lambda: changed(
        lambda layer: parametrize.register_parametrization(layer.lora_B["default"], "weight", Doubled())
    ),
    "a weight that is no plain tensor": lambda: changed(tensor_weight),
    "a forward of the layer's own": lambda: changed(with_forward),
    "a forward of the base's own": lambda: changed(lambda layer: with_forward(layer.base_layer)),
    "a forward of B's own": lambda: changed(lambda layer: with_forward(layer.lora_B["default"])),
    "a forward of the dropout's own": lambda: changed(
        lambda layer: with_forward(layer.lora_dropout["default"])
    ),
    "another dropout": lambda: changed(
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


@pytest.mark.parametrize("kind", QUALIFY)
def test_plain_layers_qualify(kind: str) -> None:
    model = QUALIFY[kind]()
    counts = assert_as_peft(model, torch.randn(2, 3, IN))
    active = [name for layer in model.modules() for name in getattr(layer, "lora_A", {})]
    assert counts["addmm_"] == len(active)
    assert there(model) == 0


@pytest.mark.parametrize("kind", EXEMPT)
def test_other_layers_are_left_alone(kind: str) -> None:
    model = EXEMPT[kind]()
    held = dict(vars(layer_of(model)))
    x = example_input(model)
    expected = drawn(model, x)
    with fused_lora_forward(model):
        assert vars(layer_of(model)) == held
        assert torch.equal(drawn(model, x), expected)
    assert vars(layer_of(model)) == held


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_are_left_alone(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    tiny.model(hidden_size=64, intermediate_size=128, tie_word_embeddings=False).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    # The head is not quantized.
    assert count(model) == 1
    with fused_lora_forward(model):
        assert there(model.get_output_embeddings()) == 1


def no_variants(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    del layer_of(model).lora_variant


def another_forward(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    theirs = peft_layer.Linear.forward
    patch.setattr(peft_layer.Linear, "forward", functools.wraps(theirs)(lambda self, x: theirs(self, x)))


def hooks_everywhere(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    patch.setitem(nn.modules.module._global_forward_hooks, 0, lambda *_: None)


def sharded(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    patch.setattr(peft_lora.shards, "is_sharded", lambda _: True)


@pytest.mark.parametrize("change", [no_variants, another_forward, hooks_everywhere, sharded])
def test_models_that_are_left_alone(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    assert count(model) == 1
    change(monkeypatch, model)
    assert count(model) == 0


def test_a_model_without_adapters_is_left_alone() -> None:
    model, x = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU()), torch.randn(3, IN)
    expected, held = model(x), [dict(vars(module)) for module in model.modules()]
    with fused_lora_forward(model):
        assert [vars(module) for module in model.modules()] == held
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_is_computed_as_peft_does(bias: bool) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias))
    x, gradient = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, 3, OUT)
    expected = answer(model, x, gradient)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with fused_lora_forward(model):
        found = answer(compiled, x, gradient)
    torch.testing.assert_close(found["x"], expected["x"])
    torch.testing.assert_close(found["output"], expected["output"])


# --- in and out -------------------------------------------------------------------------------------------


def test_the_layers_are_as_they_were_after_an_error() -> None:
    model = net(adapters=2)
    with pytest.raises(RuntimeError, match=r"^1 there$"), fused_lora_forward(model):
        raise RuntimeError(f"{there(model)} there")
    assert there(model) == 0
    assert "forward" not in vars(layer_of(model))


def test_one_within_another_ends_with_the_outer_one() -> None:
    model = net()
    with fused_lora_forward(model):
        with fused_lora_forward(model):
            assert there(model) == 1
        assert there(model) == 1
    assert there(model) == 0


def test_what_has_changed_meanwhile_stays() -> None:
    model, x = net(adapters=2), torch.randn(3, IN)
    layer = layer_of(model)
    with fused_lora_forward(model):
        model.delete_adapter("further1")
        found = model(x)
        layer.forward = other = functools.partial(type(layer).forward, layer)
    assert vars(layer)["forward"] is other
    torch.testing.assert_close(found, model(x))


def test_adapters_are_looked_for_each_time() -> None:
    model = net(use_dora=True)
    assert count(model) == 0
    model.add_adapter("later", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter("later")
    assert count(model) == 1
