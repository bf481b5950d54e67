"""A seed gives the same run: completions, losses and weights, whatever torch's generator was before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from trainer_logs import FOUR
from transformers import set_seed

PAGE = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def own_adapters(seed: int | None) -> Any:
    """Adapters that the user adds, after `set_seed` or not."""
    if seed is not None:
        set_seed(seed)
    return get_peft_model(tiny.model(), LORA)


STARTS: dict[str, Any] = {
    "all weights": lambda: {},
    "peft_config": lambda: {"peft_config": LORA},
    "own adapters after set_seed": lambda: {"start": own_adapters(7)},
    "own adapters": lambda: {"start": own_adapters(None)},
}


def run(output: Path, name: str, before: int, seed: int = 42) -> tuple[list[Any], dict[str, Tensor]]:
    """What is logged besides times, and the trained weights of a run in a process whose generator was elsewhere."""
    torch.manual_seed(before)
    config = tiny.config(demonstration_policy="random")
    trainer = tiny.trainer(output, sdpo_config=config, seed=seed, **FOUR, **STARTS[name]())
    trainer.train()
    logged = [
        {key: value for key, value in entry.items() if not re.search("time|runtime|_per_second", key)}
        for entry in trainer.state.log_history
    ]
    weights = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    return [repr(entry) for entry in logged], weights


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [name for name in STARTS if name != "own adapters"])
def test_a_seed_gives_the_same_run_bit_by_bit(tmp_path: Path, name: str) -> None:
    logged, weights = run(tmp_path / "first", name, before=1)
    again_logged, again = run(tmp_path / "again", name, before=2)
    assert logged == again_logged
    assert equal(weights, again)
    _, other = run(tmp_path / "other", name, before=1, seed=43)
    assert not equal(weights, other), "the counter-example: another seed"


def test_adapters_that_the_user_adds_are_drawn_before_the_seed_is_set(tmp_path: Path) -> None:
    (_, weights), (_, again) = (run(tmp_path / str(i), "own adapters", before=i) for i in (1, 2))
    assert not equal(weights, again)
    text = " ".join(PAGE.read_text().split())
    assert "PEFT draws them before the trainer sets the seed: call `transformers.set_seed` first" in text
