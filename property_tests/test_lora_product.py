"""PEFT's LoRA layers in one product: the formula's numbers, for plain layers alone, within a step alone."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from by_hand import Recorder
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from sdpo_rl import lora, trl_trainer
from sdpo_rl.lora import one_product

IN, OUT, RANK = 7, 5, 3
ON_EACH_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def net(base: nn.Module | None = None, adapters: int = 1, **changes: Any) -> PeftModel:
    """One adapted layer, of an `nn.Sequential`, whose adapters are not zero."""
    torch.manual_seed(0)
    base = base or nn.Linear(IN, OUT)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.3)
    settings = {"r": RANK, "lora_alpha": 5, "target_modules": ["0"], "init_lora_weights": False}
    made = get_peft_model(nn.Sequential(base), LoraConfig(**{**settings, **changes}))
    for i in range(1, adapters):
        made.add_adapter(f"further{i}", LoraConfig(**{**settings, **changes, "lora_alpha": 5 - 2 * i}))
    made.base_model.set_adapter(["default", *(f"further{i}" for i in range(1, adapters))])
    return made


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model[0]


class Operations(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def answer(model: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Output and gradients, of the input and of every parameter that has one."""
    x = x.detach().requires_grad_(x.requires_grad)
    parameters = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    for parameter in parameters.values():
        parameter.grad = None
    output = model(x)
    found = {"output": output.detach()}
    if output.requires_grad:
        output.backward(gradient)
    for name, tensor in [("x", x), *parameters.items()]:
        if tensor.grad is not None:
            found[name.replace("base_model.model.0.", "")] = tensor.grad
    return found


def by_formula(model: PeftModel, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """y = W x + b + Σ s·B(A x) and its gradients, in float64, with s from the configuration."""
    layer = layer_of(model)
    W, x, g = (t.detach().double() for t in (layer.base_layer.weight, x, gradient))
    rows, flat = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
    output, of_x = rows @ W.T, flat @ W
    found = {"base_layer.weight": flat.T @ rows}
    if layer.base_layer.bias is not None:
        output = output + layer.base_layer.bias.detach().double()
        found["base_layer.bias"] = flat.sum(0)
    for name in layer.active_adapters:
        config = model.peft_config[name]
        s = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        A, B = (part[name].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        output = output + s * (rows @ A.T) @ B.T
        of_x = of_x + s * (flat @ B) @ A
        found[f"lora_A.{name}.weight"] = s * (flat @ B).T @ rows
        found[f"lora_B.{name}.weight"] = s * flat.T @ (rows @ A.T)
    return {"output": output.reshape(gradient.shape), "x": of_x.reshape(x.shape), **found}


def assert_formula(model: PeftModel, x: Tensor) -> None:
    """In the dtype of the model: float64, where the formula leaves no room."""
    gradient = torch.randn(*x.shape[:-1], OUT, dtype=x.dtype)
    with one_product(model), Operations() as operations:
        found = answer(model, x, gradient)
    assert operations.counts["addmm_"] == len(layer_of(model).active_adapters)
    expected = by_formula(model, x, gradient)
    trains = {
        name.replace("base_model.model.0.", "") for name, p in model.named_parameters() if p.requires_grad
    }
    assert found.keys() == {"output"} | trains | ({"x"} if x.requires_grad else set())
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


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


def unscaled_for_b(ctx: Any, gradient: Tensor) -> Any:
    a, weight = ctx.saved_tensors
    flat = gradient.reshape(-1, OUT)
    return gradient, ctx.scaling * flat @ weight, flat.T @ a, None


def unscaled_for_a(ctx: Any, gradient: Tensor) -> Any:
    a, weight = ctx.saved_tensors
    flat = gradient.reshape(-1, OUT)
    return gradient, flat @ weight, ctx.scaling * flat.T @ a, None


def scaled_for_the_base(ctx: Any, gradient: Tensor) -> Any:
    a, weight = ctx.saved_tensors
    flat = gradient.reshape(-1, OUT) * ctx.scaling
    return gradient * ctx.scaling, flat @ weight, flat.T @ a, None


@pytest.mark.parametrize("twin", [unscaled_for_b, unscaled_for_a, scaled_for_the_base])
@pytest.mark.parametrize("bias", [False, True])
def test_a_wrong_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch, twin: Any, bias: bool) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias)).double()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    assert_formula(model, x)
    monkeypatch.setattr(lora._AddProduct, "backward", staticmethod(twin))
    with pytest.raises(AssertionError, match=r"^(x|lora_A.default.weight|lora_B.default.weight): "):
        assert_formula(model, x)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("bias", [False, True])
def test_without_a_graph(mode: str, bias: bool) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias), 2).double()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    with getattr(torch, mode)(), one_product(model):
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

    with one_product(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
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
    with one_product(model):
        assert torch.autograd.gradcheck(function, (x, *weights))
        assert torch.autograd.gradgradcheck(function, (x, *weights))


def test_the_output_may_be_changed_in_place() -> None:
    """As that of PEFT's may, by the model or by a hook."""
    model = net().double()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    expected = answer(nn.Sequential(model, nn.Tanh()), x, torch.ones(2, 3, OUT, dtype=torch.float64))
    with one_product(model):
        found = answer(lambda x: model(x).tanh_(), x, torch.ones(2, 3, OUT, dtype=torch.float64))
    torch.testing.assert_close(found["x"], expected["x"])


PLACES: dict[str, Callable[[], Tensor]] = {
    "some rows": lambda: torch.randn(6, OUT)[::2],
    "the first rows": lambda: torch.randn(6, OUT)[:3],
    "some columns": lambda: torch.randn(3, 2 * OUT)[:, :OUT],
    "columns first": lambda: torch.randn(OUT, 3).T,
    "rows of what has its columns first": lambda: torch.empty_strided((OUT, 3), (1, OUT)).normal_().T,
}


@pytest.mark.parametrize("place", PLACES)
def test_an_output_that_is_a_part_of_something_is_not_changed(place: str) -> None:
    """`nn.Linear` makes none today."""
    layer, x, result = layer_of(net()), torch.randn(3, IN), PLACES[place]()
    held = result._base.clone()
    expected = result + layer(x) - layer.base_layer(x)
    with one_product(layer):
        found = layer.lora_variant["default"].forward(layer, active_adapter="default", x=x, result=result)
    torch.testing.assert_close(found, expected)
    assert torch.equal(result._base, held)


def test_a_batch_may_mix_adapters() -> None:
    model = net(adapters=2).eval()
    x, names = torch.randn(4, 3, IN), ["default", "__base__", "further1", "default"]
    expected = model(x, adapter_names=names)
    with one_product(model):
        torch.testing.assert_close(model(x, adapter_names=names), expected)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_applied_in_training(training: bool, p: float) -> None:
    model = net(lora_dropout=p).train(training)
    x = torch.randn(2, 3, IN)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with one_product(model), Operations() as operations:
        torch.testing.assert_close(model(x), expected)
    assert operations.counts["addmm_"] == 1
    assert (operations.counts["bernoulli_"] + operations.counts["native_dropout"] > 0) == (training and p > 0)


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
    with one_product(model), torch.no_grad():
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


@ON_EACH_DEVICE
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
        with one_product(model), Operations() as operations:
            own = answer(model, x, gradient)
    assert operations.counts["addmm_"] == 1
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
    with one_product(model):
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
    with one_product(model), Operations() as operations:
        run(x).backward(gradient)
    # Of the input's two gradients, one sum.
    assert {name: operations.counts[name] for name in passes & operations.counts.keys()} == {"add": 1}
    assert operations.counts["addmm_"] == 1 + checkpointed
    with Operations() as operations:
        run(x).backward(gradient)
    assert operations.counts["mul"] >= 2
    assert operations.counts["add"] > 1


# --- which layers -----------------------------------------------------------------------------------------


def there(model: nn.Module) -> int:
    """Layers that PEFT now asks for another way."""
    return sum(lora._InPlace in getattr(m, "lora_variant", {}).values() for m in model.modules())


def count(model: nn.Module) -> int:
    with one_product(model):
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
    x = torch.randn(2, 3, IN)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with one_product(model), Operations() as operations:
        torch.testing.assert_close(model(x), expected)
    active = [name for layer in model.modules() for name in getattr(layer, "lora_A", {})]
    assert operations.counts["addmm_"] == len(active)
    assert there(model) == 0


@pytest.mark.parametrize("kind", EXEMPT)
def test_other_layers_are_left_alone(kind: str) -> None:
    model = EXEMPT[kind]()
    variants = dict(layer_of(model).lora_variant)
    x = example_input(model)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with one_product(model):
        assert layer_of(model).lora_variant == variants
        assert torch.equal(model(x), expected)
    assert layer_of(model).lora_variant == variants


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
    with one_product(model):
        assert lora._InPlace in model.get_output_embeddings().lora_variant.values()


def no_variants(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    del layer_of(model).lora_variant


def another_forward(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    theirs = peft_layer.Linear.forward
    patch.setattr(peft_layer.Linear, "forward", functools.wraps(theirs)(lambda self, x: theirs(self, x)))


def hooks_everywhere(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    patch.setitem(nn.modules.module._global_forward_hooks, 0, lambda *_: None)


def sharded(patch: pytest.MonkeyPatch, model: PeftModel) -> None:
    patch.setattr(lora.ranks, "is_sharded", lambda _: True)


@pytest.mark.parametrize("change", [no_variants, another_forward, hooks_everywhere, sharded])
def test_models_that_are_left_alone(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    assert count(model) == 1
    change(monkeypatch, model)
    assert count(model) == 0


def test_a_model_without_adapters_is_left_alone() -> None:
    with one_product(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) as nothing:
        assert nothing is None


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_is_computed_as_peft_does(bias: bool) -> None:
    model = net(nn.Linear(IN, OUT, bias=bias))
    x, gradient = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, 3, OUT)
    expected = answer(model, x, gradient)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with one_product(model):
        found = answer(compiled, x, gradient)
    torch.testing.assert_close(found["x"], expected["x"])
    torch.testing.assert_close(found["output"], expected["output"])


# --- in and out -------------------------------------------------------------------------------------------


def divide(number: int, *, by: int) -> float:
    assert number
    return number / by


def test_the_layers_are_as_they_were_after_an_error() -> None:
    model = net(adapters=2)
    with pytest.raises(ZeroDivisionError), one_product(model):
        divide(there(model), by=0)
    assert layer_of(model).lora_variant == {}


def test_one_within_another_ends_with_the_outer_one() -> None:
    model = net()
    with one_product(model):
        with one_product(model):
            assert there(model) == 1
        assert there(model) == 1
    assert there(model) == 0


def test_what_has_changed_meanwhile_stays() -> None:
    model, other = net(adapters=2), object()
    with one_product(model):
        model.delete_adapter("further1")
        layer_of(model).lora_variant["default"] = other
    assert layer_of(model).lora_variant == {"default": other}


def test_adapters_are_looked_for_each_time() -> None:
    model = net(use_dora=True)
    assert count(model) == 0
    model.add_adapter("later", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter("later")
    assert count(model) == 1


# --- in a trainer's step ----------------------------------------------------------------------------------

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 2 * len(LINEAR)


def adapted() -> PeftModel:
    config = LoraConfig(
        r=4, lora_alpha=7, target_modules=LINEAR, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(tiny.model(), config)


def run(output: Path, **changes: Any) -> Any:
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "num_iterations": 2}
    return tiny.trainer(output, start=adapted(), **{**settings, **changes})


def trained(trainer: Any) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of each step."""
    recorder = Recorder(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [(loss, step.gradients) for loss, step in zip(losses, recorder.steps, strict=True)]


@contextmanager
def left_to_peft() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "one_product", lambda model: nullcontext())
        yield


CHECKPOINTING: dict[str, dict[str, Any]] = {
    "kept": {},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("backend", ["torch", "logits"])
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_step_has_the_loss_and_the_gradient_of_peft(tmp_path: Path, kind: str, backend: str) -> None:
    settings = {**CHECKPOINTING[kind], "sdpo_config": tiny.config(loss_backend=backend)}
    with left_to_peft():
        expected = trained(run(tmp_path, **settings))
    trainer = run(tmp_path, **settings)
    found = trained(trainer)
    logged = [entry["self_distillation/teacher_distance"] for entry in trainer.state.log_history[:-1]]
    assert logged[-1] > 1e-3, "the teacher is the student"
    for (loss, gradients), (expected_loss, expected_gradients) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-7)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)
    assert max(gradient.abs().max() for gradient in found[0][1].values()) > 1e-3


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_step_has_fewer_passes(tmp_path: Path, kind: str) -> None:
    counts = []
    for own in (False, True):
        trainer = run(tmp_path, max_steps=1, **CHECKPOINTING[kind])
        step = trainer.training_step

        def counted(*args: Any, step: Any = step, **kwargs: Any) -> Tensor:
            with Operations() as operations:
                loss = step(*args, **kwargs)
            counts.append(operations.counts)
            return loss

        trainer.training_step = counted
        with nullcontext() if own else left_to_peft():
            trainer.train()
    peft, own = counts
    # The model is asked once how it changes its logits; then the teacher, the student, and the student again.
    forwards = 3 + (kind != "kept")
    # A checkpoint that knows what it still needs stops before the last scaling and sum of each of the two blocks.
    stopped = 2 if kind == "checkpointed" else 0
    assert own["addmm_"] - peft["addmm_"] == forwards * LAYERS
    assert peft["mul"] - own["mul"] == (forwards + 1) * LAYERS - stopped
    assert peft["add"] - own["add"] == forwards * LAYERS - stopped
    assert own["clone"] <= peft["clone"]
    assert own["copy_"] <= peft["copy_"]


def watched(trainer: Any) -> list[tuple[str, int]]:
    """For each forward what it was for, and how many layers PEFT then asked for another way."""
    model, seen = trainer.model, []
    loss, step = trainer.compute_loss, trainer.training_step
    doing = ["generation"]

    def compute_loss(*args: Any, **kwargs: Any) -> Tensor:
        doing.append("loss" if trainer.model.training else "evaluation")
        try:
            return loss(*args, **kwargs)
        finally:
            doing.pop()

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        try:
            return step(*args, **kwargs)
        finally:
            seen.append(("after a step", there(model)))

    trainer.compute_loss, trainer.training_step = compute_loss, training_step
    model.get_base_model().register_forward_pre_hook(lambda *_: seen.append((doing[-1], there(model))))
    return seen


@pytest.mark.parametrize("enabled", [True, False])
def test_within_the_loss_and_its_gradient_alone(tmp_path: Path, enabled: bool) -> None:
    trainer = run(
        tmp_path,
        sdpo_config=tiny.config(enabled=enabled),
        eval_dataset=tiny.conversations(4),
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=4,
        per_device_eval_batch_size=4,
    )
    seen = watched(trainer)
    trainer.train()
    during = LAYERS if enabled else 0
    assert set(seen) == {("generation", 0), ("loss", during), ("evaluation", 0), ("after a step", 0)}


def test_the_layers_are_as_they_were_after_a_step_that_failed(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    seen = []

    def fail(loss: Tensor, **kwargs: Any) -> None:
        seen.append(there(trainer.model))
        raise ZeroDivisionError

    trainer.accelerator.backward = fail
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert seen == [LAYERS]
    assert there(trainer.model) == 0
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, inputs)
    assert there(trainer.model) == 0, "a loss outside of a step"


def test_adapters_may_be_merged_while_completions_are_made(tmp_path: Path) -> None:
    """As they are for an inference engine, and by a reward function that asks the model itself."""
    expected = trained(run(tmp_path))

    def merging(completions: list[Any], **columns: Any) -> Any:
        trainer.model.merge_adapter()
        trainer.model.unmerge_adapter()
        return tiny.judge(completions, **columns)

    trainer = run(tmp_path, reward_funcs=merging)
    for (loss, gradients), (expected_loss, expected_gradients) in zip(
        trained(trainer), expected, strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


def keep_products(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, keep_products),
    },
}


def test_products_that_a_checkpoint_keeps_are_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run(tmp_path, **SELECTIVE)
    seen = watched(trainer)
    trainer.train()
    assert ("loss", 0) in seen
    monkeypatch.setattr(trl_trainer.SDPOTrainer, "_may_compute_adapters", True)
    with pytest.raises(RuntimeError, match="mutated"):
        run(tmp_path, **SELECTIVE).train()


@pytest.mark.parametrize("reason", ["torch_compile", "Unsloth"])
def test_what_others_compile_or_rewrite_stays_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    trainer = run(tmp_path)
    assert trainer._may_compute_adapters
    if reason == "Unsloth":
        monkeypatch.setattr(trl_trainer, "_IS_UNSLOTH", True)
        assert not trainer._may_compute_adapters
        return
    trainer.args.torch_compile = True
    seen = watched(trainer)
    trainer.train()
    assert ("loss", 0) in seen
