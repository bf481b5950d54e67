"""Gradient checkpointing is disabled for a rollout and restored afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from sdpo_rl.step.forward import checkpointing_disabled

REENTRANT = {"use_reentrant": True}


def checkpointed(**arguments: Any) -> Any:
    model = tiny.model()
    model.gradient_checkpointing_enable(arguments)
    return model


def state(model: nn.Module) -> list[tuple[bool, Any]]:
    """For every layer with checkpointing: whether it is on, and its function."""
    return [
        (module.gradient_checkpointing, getattr(module, "_gradient_checkpointing_func", None))
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
    ]


def test_it_is_off_inside_and_restored_afterwards() -> None:
    model = checkpointed(**REENTRANT)
    before = state(model)
    assert before
    with checkpointing_disabled(model):
        assert not model.is_gradient_checkpointing
        assert [function for _, function in state(model)] == [function for _, function in before]
    assert state(model) == before
    with pytest.raises(RuntimeError, match=r"^inside$"), checkpointing_disabled(model):
        raise RuntimeError("inside")
    assert state(model) == before


@pytest.mark.parametrize("adapters", [False, True])
def test_regions_of_one_model_may_be_nested(adapters: bool) -> None:
    """A reward function may evaluate another trainer of the model."""
    model = checkpointed(**REENTRANT)
    if adapters:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    before = state(model)
    held = dict(vars(model))
    with checkpointing_disabled(model):
        with checkpointing_disabled(model):
            assert not model.is_gradient_checkpointing
        assert not model.is_gradient_checkpointing
    assert state(model) == before
    assert vars(model) == held
    assert model.is_gradient_checkpointing


def test_what_was_off_stays_off() -> None:
    model = checkpointed()
    layer = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", False))
    layer.gradient_checkpointing = False
    before = state(model)
    with checkpointing_disabled(model):
        assert not model.is_gradient_checkpointing
    assert state(model) == before
    plain = tiny.model()
    held = [dict(vars(module)) for module in plain.modules()]
    with checkpointing_disabled(plain):
        assert [vars(module) for module in plain.modules()] == held
    assert [vars(module) for module in plain.modules()] == held


def test_the_model_inside_peft_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL asks twice in each rollout whether it is on."""
    base = checkpointed()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    attributes, searched = dict(vars(model)), []

    def search(module: nn.Module) -> bool:
        searched.append(module)
        return any(getattr(each, "gradient_checkpointing", False) for each in module.modules())

    monkeypatch.setattr(type(base), "is_gradient_checkpointing", property(search))
    with checkpointing_disabled(model):
        assert model.is_gradient_checkpointing is False
        assert not searched
    assert model.is_gradient_checkpointing is True
    assert searched == [base]
    assert vars(model) == attributes


@pytest.mark.parametrize("fast", [True, False])
def test_rollouts_run_without_checkpointing_and_the_fast_toggle_keeps_its_arguments(
    tmp_path: Path, fast: bool
) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(fast_checkpointing_toggle=fast),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=REENTRANT,
    )
    model: Any = trainer.model
    generate, enable = model.generate, model.gradient_checkpointing_enable
    during: list[bool] = []
    enabled_with: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        during.append(model.is_gradient_checkpointing)
        return generate(*args, **kwargs)

    def counted(*args: Any, **kwargs: Any) -> None:
        enabled_with.append(kwargs.get("gradient_checkpointing_kwargs"))
        enable(*args, **kwargs)

    model.generate, model.gradient_checkpointing_enable = watched, counted
    trainer.train()
    assert len(during) == 2
    assert model.is_gradient_checkpointing
    # The Trainer enables it as training begins; left alone, GRPOTrainer enables it again for each batch.
    assert enabled_with[0] == REENTRANT
    assert (len(enabled_with) == 1) == fast
    if fast:
        assert during == [False, False]
