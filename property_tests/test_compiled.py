"""`GRPOConfig(torch_compile=True)`: a step of a compiled model is the step of `reference_step`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from reference_step import Method, compare

from sdpo_rl import SDPOTrainer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`GRPOConfig` sets environment variables, which the next Accelerator of the process would read."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
    torch._dynamo.reset()


def make(folder: Path, layout: str, lora: bool, **changes: Any) -> SDPOTrainer:
    return tiny.trainer(
        folder,
        sdpo_config=tiny.config(packing=layout),
        peft_config=copy.deepcopy(LORA) if lora else None,
        max_steps=3,
        learning_rate=0.05,
        torch_compile=True,
        torch_compile_backend="eager",  # traces the model as every backend, and compiles nothing
        **changes,
    )


@pytest.mark.parametrize(
    ("layout", "lora"),
    [("auto", False), ("groups", True), ("padded", False)],
    ids=["auto", "groups", "padded"],
)
def test_a_step_of_a_compiled_model(tmp_path: Path, layout: str, lora: bool) -> None:
    trainer = make(tmp_path, layout, lora)
    blank = get_peft_model(tiny.model(), copy.deepcopy(LORA)) if lora else tiny.model()
    difference = compare(trainer, blank, Method())
    assert difference.gradient < TOLERANCE
    assert difference.loss < TOLERANCE
    assert hasattr(trainer.model_wrapped, "_orig_mod")
    chosen = trainer._forward_mode.layout
    assert chosen.layout == ("packed" if layout == "auto" else layout)
    assert chosen.by_row_reason == ("it is compiled" if layout == "auto" else "")


def test_a_model_compiled_before_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: expected a model, .* GRPOConfig\(torch_compile=True\)"):
        tiny.trainer(tmp_path, start=torch.compile(tiny.model(), backend="eager"))
