"""Reentrant in place of non-reentrant checkpointing: where it is used, and that loss and gradients stay."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from peft import IA3Config, LoraConfig, get_peft_model
from reference_step import Recorder
from test_packing import OTHERS, PACKABLE, ROWS, losses
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sdpo_rl.compat import checkpointing
from sdpo_rl.compat.checkpointing import reentrant_checkpointing

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
KIND = "gradient_checkpointing_kwargs"
FAMILIES = PACKABLE | OTHERS


def run(output: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {"gradient_checkpointing": True, "optim": "sgd", "learning_rate": 0.05, "max_steps": 3}
    return tiny.trainer(output, **{**settings, **changes})


def trained(trainer: Any) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of each step."""
    recorder = Recorder(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [(loss, step.gradients) for loss, step in zip(losses, recorder.steps, strict=True)]


def places_of_graphs(trainer: Any) -> set[str]:
    """Where the forwards of a layer record a graph."""
    seen: set[str] = set()
    layer = next(m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer))
    forward = layer.self_attn.forward

    def watched(*args: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            seen.add("forward" if torch._C._current_graph_task_id() == -1 else "backward")
        return forward(*args, **named)

    layer.self_attn.forward = watched
    trainer.train()
    return seen


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("dropout", "bf16"), [(0.0, False), (0.1, False), (0.0, True)])
def test_a_step_has_the_loss_and_the_gradients_of_the_other_kind(
    tmp_path: Path, peft: LoraConfig | None, dropout: float, bf16: bool
) -> None:
    """With `bf16` weights are cast, and the casts of a forward are kept until it ends."""
    settings: dict[str, Any] = {
        "peft_config": peft,
        "start": tiny.model(attention_dropout=dropout),
        "bf16": bf16,
    }
    result = trained(run(tmp_path, **settings))
    settings["start"] = tiny.model(attention_dropout=dropout)
    expected = trained(run(tmp_path, **{KIND: {"use_reentrant": False}}, **settings))
    for (loss, gradients), (expected_loss, expected_gradients) in zip(result, expected, strict=True):
        assert loss == expected_loss
        torch.testing.assert_close(gradients, expected_gradients, rtol=0.0, atol=0.0)
    assert max(gradient.abs().max() for gradient in result[0][1].values()) > 1e-3


def test_the_first_forward_has_no_graph(tmp_path: Path) -> None:
    assert places_of_graphs(run(tmp_path)) == {"backward"}
    assert places_of_graphs(run(tmp_path, peft_config=LORA)) == {"backward"}


@pytest.mark.parametrize(
    "changes",
    [
        {KIND: {"use_reentrant": False}},
        {"start": tiny.experts()},
        {"sdpo_config": tiny.config(enabled=False)},
    ],
    ids=["chosen by the user", "router loss", "GRPO"],
)
def test_the_other_kind_stays(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert places_of_graphs(run(tmp_path, **changes)) == {"forward", "backward"}


def test_where_the_kind_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny.model()

    def may(distributed: DistributedType = DistributedType.NO, model: Any = plain, **changes: Any) -> bool:
        args = {"gradient_checkpointing": True, KIND: None, "torch_compile": False, "n_gpu": 1, **changes}
        return checkpointing.may_be_reentrant(
            SimpleNamespace(**args), SimpleNamespace(distributed_type=distributed), model
        )

    assert may()
    assert not may(**{KIND: {"use_reentrant": False}})
    assert not may(gradient_checkpointing=False)
    assert not may(torch_compile=True)
    assert not may(n_gpu=2)
    assert may(n_gpu=0)
    for kind in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED):
        assert not may(kind)
    assert may(model=get_peft_model(tiny.model(), LORA))
    other = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    assert not may(model=get_peft_model(tiny.model(), other))
    monkeypatch.setattr(checkpointing, "_AUTOCAST_IS_FIXED", False)
    assert not may()


@pytest.mark.parametrize("place", ["forward", "before", "backward", "parameter", "accumulated"])
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_layer_with_hooks_keeps_the_other_kind(tmp_path: Path, place: str, is_inside: bool) -> None:
    trainer = run(tmp_path, max_steps=1)
    layer = next(m for m in trainer.model.modules() if isinstance(m, GradientCheckpointingLayer))
    module = layer.mlp.down_proj if is_inside else trainer.model.model.norm
    {
        "forward": module.register_forward_hook,
        "before": module.register_forward_pre_hook,
        "backward": module.register_full_backward_hook,
        "parameter": module.weight.register_hook,
        "accumulated": module.weight.register_post_accumulate_grad_hook,
    }[place](lambda *_: None)
    assert places_of_graphs(trainer) == ({"forward", "backward"} if is_inside else {"backward"})


# --- arguments of a layer ---------------------------------------------------------------------------------


class Layer(GradientCheckpointingLayer):
    """Adds up what it is given, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.graphs: list[bool] = []

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        self.graphs.append(torch.is_grad_enabled())
        return self.weight * (x + sum(map(total, (*others, *named.values()))))


def total(value: Any) -> Any:
    """Of all tensors within a value."""
    if isinstance(value, Tensor):
        return value.sum()
    if isinstance(value, SimpleNamespace):
        return total(value.held)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return sum(map(total, values))


class Model(nn.Module):
    """One layer with checkpointing, of a width that makes every call small."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        text = SimpleNamespace(hidden_size=width)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.layer = Layer().train()
        self.layer.gradient_checkpointing = True
        self.layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def gradients(model: Model, x: Tensor, held: Tensor, call: Callable[..., Tensor]) -> list[Any]:
    leaves = [x, held, model.layer.weight]
    for leaf in leaves:
        leaf.grad = None
    with reentrant_checkpointing(model):
        call(model.layer, x, held).sum().backward()
    return [leaf.grad for leaf in leaves]


CALLS: dict[str, tuple[bool, Callable[..., Tensor]]] = {
    "positional": (True, lambda layer, x, held: layer(x, held)),
    "without gradient": (True, lambda layer, x, held: layer(x, mask=held.detach(), flag=True, name="a")),
    "tuple": (True, lambda layer, x, held: layer(x, embeddings=(held.detach(), held.detach()))),
    "keyword": (False, lambda layer, x, held: layer(x, others=held)),
    "tuple with gradient": (False, lambda layer, x, held: layer(x, others=(None, held))),
    "positional tuple": (False, lambda layer, x, held: layer(x, (held,))),
    "dictionary": (False, lambda layer, x, held: layer(x, others={"a": held})),
    "object": (False, lambda layer, x, held: layer(x, cache=SimpleNamespace(held=held))),
    "closure": (
        False,
        lambda layer, x, held: layer._gradient_checkpointing_func(lambda y: layer.forward(y, held), x),
    ),
    "module": (True, lambda layer, x, held: layer._gradient_checkpointing_func(layer.forward, x, held)),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_gets_its_gradient(name: str) -> None:
    is_reentrant, call = CALLS[name]
    model = Model()
    x, held = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    got = gradients(model, x, held, call)
    assert model.layer.graphs == [not is_reentrant, True]
    call(model.layer, x.detach().requires_grad_(), held)  # its own kind is back
    assert model.layer.graphs[2]
    weight = 2.0 * torch.ones(())
    wanted_x = weight.expand(3)
    torch.testing.assert_close(got[0], wanted_x)
    if name in ("without gradient", "tuple"):
        assert got[1] is None
    else:
        torch.testing.assert_close(got[1], 3 * weight.expand(2))


def kept_gradient() -> Tensor | None:
    """Of the weight of a layer whose output is multiplied by 0, through what a later layer reads of it."""

    class Keeping(Layer):
        def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
            output = super().forward(x)
            named["cache"].setdefault("kept", 1.0 * output)
            return output

    model, cache = Model(), {}
    first = Keeping().train()
    first.gradient_checkpointing = True
    model.first, first._gradient_checkpointing_func = first, model.layer._gradient_checkpointing_func
    with reentrant_checkpointing(model):
        x = model.first(torch.ones(3, requires_grad=True), cache=cache)
        model.layer(0.0 * x, cache=cache).sum().backward()
    return first.weight.grad


def test_what_one_layer_leaves_for_another_has_its_gradient() -> None:
    assert kept_gradient() == 3 * 2.0 * 3


def test_a_lost_gradient_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter-example: reentrant whatever the arguments are."""
    monkeypatch.setattr(checkpointing, "_has_no_gradient", lambda value: True)
    assert kept_gradient() == 0.0


def test_an_input_without_gradient_keeps_the_other_kind() -> None:
    """Its reentrant backward pass would not reach the weight."""
    model, held = Model(), torch.ones(2, requires_grad=True)
    assert gradients(model, torch.ones(3), held, lambda layer, x, _: layer(x))[2] is not None
    assert model.layer.graphs == [True, True]


@pytest.mark.parametrize(("tokens", "is_reentrant"), [(4095, True), (4096, False)])
def test_many_tokens_keep_the_other_kind(tokens: int, is_reentrant: bool) -> None:
    """At width 3584 a GPU is busy with 4096 tokens."""
    model = Model(width=3584)
    x = torch.ones(1, tokens, 3584, requires_grad=True)
    gradients(model, x, torch.ones(1, requires_grad=True), lambda layer, x, _: layer(x))
    assert model.layer.graphs == [not is_reentrant, True]


def test_another_function_of_the_user_stays() -> None:
    model = Model()
    for function in (checkpoint, partial(checkpoint, use_reentrant=True), partial(checkpoint, debug=True)):
        model.layer._gradient_checkpointing_func = function
        with reentrant_checkpointing(model):
            assert model.layer._gradient_checkpointing_func is function


def test_its_own_function_is_back_after_a_failure() -> None:
    model = Model()
    function = model.layer._gradient_checkpointing_func
    with pytest.raises(ZeroDivisionError), reentrant_checkpointing(model):
        raise ZeroDivisionError
    assert model.layer._gradient_checkpointing_func is function


# --- models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_has_the_gradients_of_the_other_kind(name: str) -> None:
    def gradients_with(kind: Any) -> dict[str, Tensor]:
        model: Any = FAMILIES[name]().train()
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        torch.manual_seed(0)
        with kind(model):
            torch.stack(losses(model, ROWS, "padded")).sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    expected = gradients_with(nullcontext)
    torch.testing.assert_close(gradients_with(reentrant_checkpointing), expected, rtol=0.0, atol=0.0)
    assert expected
