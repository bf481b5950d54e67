"""A batch is generated without gradient checkpointing, which is then as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn

from sdpo_rl.step.forward import checkpointing_disabled

REENTRANT = {"use_reentrant": True}


def checkpointed(**arguments: Any) -> Any:
    model = tiny.model()
    model.gradient_checkpointing_enable(arguments)
    return model


def state(model: nn.Module) -> list[tuple[bool, Any]]:
    """Whether a layer recomputes, and by which function, for all that can."""
    return [
        (module.gradient_checkpointing, getattr(module, "_gradient_checkpointing_func", None))
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
    ]


def test_it_is_off_inside_and_as_it_was_afterwards() -> None:
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


def test_the_trainer_generates_without_it_and_never_switches_it(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=REENTRANT)
    model: Any = trainer.model
    generate, enable = model.generate, model.gradient_checkpointing_enable
    seen: list[bool] = []
    switched: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(model.is_gradient_checkpointing)
        return generate(*args, **kwargs)

    def counted(*args: Any, **kwargs: Any) -> None:
        switched.append(kwargs.get("gradient_checkpointing_kwargs"))
        enable(*args, **kwargs)

    model.generate, model.gradient_checkpointing_enable = watched, counted
    trainer.train()
    assert seen == [False, False]
    assert model.is_gradient_checkpointing
    # Once, by the Trainer as training begins; GRPOTrainer, left alone, does it twice for each batch.
    assert switched == [REENTRANT]
