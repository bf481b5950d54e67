"""What a user logs with `trainer.log`: it neither has nor takes metrics of the run, and may be of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rank_driver as driver
import tiny
import torch
from trainer_logs import PREFIX
from transformers import TrainerCallback

from sdpo_rl.compat.training_hooks import is_log_of_trainer
from sdpo_rl.credit import files

EVALUATED: dict[str, Any] = {"num_generations_eval": 2, "per_device_eval_batch_size": 4}
TIMES = ("_runtime", "_per_second", "step_time")


class Talks(TrainerCallback):
    """Logs at every event of the loop."""

    trainer: Any

    def on_event(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.log({"mine": 1.0, "my_loss": 2.0, "step_runtime": 3.0})

    on_step_begin = on_step_end = on_evaluate = on_epoch_end = on_train_end = on_event


def own(entry: dict[str, Any]) -> bool:
    return "mine" in entry


def history(folder: Path, *, talks: bool, **changes: Any) -> list[dict[str, Any]]:
    """The log of a run with two evaluations after it, without times."""
    torch.manual_seed(0)
    trainer = tiny.trainer(folder, eval_dataset=tiny.conversations(4), **EVALUATED, **changes)
    if talks:
        callback = Talks()
        callback.trainer = trainer
        trainer.add_callback(callback)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(metric_key_prefix="held_out")
    return [
        {name: value for name, value in entry.items() if not name.endswith(TIMES) or own(entry)}
        for entry in trainer.state.log_history
    ]


STRATEGIES: dict[str, dict[str, Any]] = {
    "every second step": {"logging_steps": 2, "max_steps": 3},
    "the first step": {"logging_steps": 2, "max_steps": 3, "logging_first_step": True},
    "epochs": {"logging_strategy": "epoch", "num_train_epochs": 2, "max_steps": -1},
    "nothing": {"logging_strategy": "no", "max_steps": 2},
    "evaluations": {"logging_steps": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 1},
    "a table": {"logging_steps": 2, "max_steps": 3, "log_completions": True},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_log_of_the_trainer_is_that_of_a_silent_run(tmp_path: Path, name: str) -> None:
    silent = history(tmp_path / "silent", talks=False, **STRATEGIES[name])
    talking = history(tmp_path / "talking", talks=True, **STRATEGIES[name])
    assert [entry for entry in talking if not own(entry)] == silent
    for entry in silent:
        prefix = "" if {"loss", "train_loss"} & entry.keys() else "eval_"
        every = name == "every second step"  # elsewhere all steps may be logged before the last entry
        if "train_loss" not in entry or every or name == "nothing":
            assert f"{prefix}{PREFIX}divergence" in entry
            assert f"{prefix}reward" in entry
    logged = [entry for entry in talking if own(entry)]
    assert logged
    for entry in logged:
        assert entry.keys() == {"mine", "my_loss", "step_runtime", "epoch", "step"}
    lines = files.read(tmp_path / "talking" / files.LOG)
    assert [line for line in lines if own(line)] == logged


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({"loss": 1.0, "learning_rate": 0.1}, True),
        ({"loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.1}, True),
        ({"train_runtime": 1.0, "total_flos": 0.0, "train_loss": 2.0}, True),
        ({"eval_loss": 1.0, "eval_runtime": 2.0}, True),
        ({"eval_part_loss": 1.0, "eval_part_runtime": 2.0}, True),
        ({"_loss": 1.0, "_runtime": 2.0}, True),
        ({}, False),
        ({"loss": 1.0}, False),
        ({"learning_rate": 0.1}, False),
        ({"eval_reward": 1.0}, False),
        ({"judge_runtime": 1.0, "my_loss": 2.0}, False),
    ],
)
def test_which_logs_are_the_trainer_s(logs: dict[str, float], expected: bool) -> None:
    assert is_log_of_trainer(logs) == expected


def test_the_main_process_may_log_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "TIMEOUT", 150)
    driver.launch(tmp_path, "logs")
    for world, rank in ((1, 0), (2, 0), (2, 1)):
        seen = torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=False)
        assert len(seen["talking"]) == 2
        assert seen["talking"] == seen["silent"]
        assert [entry["step"] for entry in seen["own"]] == ([] if rank else [0, 1, 1, 2, 2, 3, 3, 4])
