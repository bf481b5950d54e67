"""An exception in the middle of a step or an evaluation leaves nothing behind for what runs next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

FOUR = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_completion_length": 24}


def interrupt(trainer: Any, call: int) -> None:
    """Train until the micro-batch of this number."""
    true, calls = trainer.compute_loss, iter(range(call))

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return true(*args, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.compute_loss = true


def losses(trainer: Any) -> list[tuple[int, float, float]]:
    """Of every logged step: its number, its loss, and the mean divergence."""
    return [
        (entry["step"], entry["loss"], entry["self_distillation/divergence"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def test_the_trainer_that_was_interrupted_resumes_as_a_new_one(tmp_path: Path) -> None:
    options = {**FOUR, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = tiny.trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = tiny.trainer(tmp_path / "resumed", **options)
    interrupt(resumed, 13)  # the second micro-batch of the last step
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize("steps_per_generation", [4, 8])
@pytest.mark.parametrize("call", [2, 5, 7])
def test_training_again_divides_by_the_counts_of_its_own_steps(
    tmp_path: Path, call: int, steps_per_generation: int
) -> None:
    trainer = tiny.trainer(tmp_path, **FOUR, max_steps=2, steps_per_generation=steps_per_generation)
    interrupt(trainer, call)
    true, denominators, counts = trainer.compute_loss, [], []

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(int(inputs["loss_mask"].sum()))
        loss = true(model, inputs, *args, **kwargs)
        denominators.append(trainer._window._denominator.item())
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    assert denominators == [sum(counts[:4])] * 4 + [sum(counts[4:])] * 4


def test_training_again_controls_the_entropy_of_its_own_steps(tmp_path: Path) -> None:
    """TRL's controller sees the mean entropy of the step's tokens, those of the unfinished step not included."""
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(grpo_weight=0.5),
        **FOUR,
        max_steps=1,
        entropy_coef=0.2,
        use_adaptive_entropy=True,
        entropy_target=1.0,
    )
    interrupt(trainer, 2)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer._last_world_entropy == pytest.approx(entry["self_distillation/policy_entropy"], rel=1e-6)


def test_what_an_interrupted_reward_function_said_is_forgotten(tmp_path: Path) -> None:
    """Its `last_feedback`, and what it logged."""

    class Judge:
        __name__ = "judge"
        last_feedback: list[str] | None = None
        calls = 0

        def __call__(self, completions: list[Any], log_metric: Any, **_: Any) -> list[float]:
            self.calls += 1
            log_metric("calls", float(self.calls))
            if self.calls == 1:
                self.last_feedback = [f"old {row}" for row in range(len(completions))]
                raise KeyboardInterrupt
            return [0.0] * len(completions)

    trainer = tiny.trainer(tmp_path, reward_funcs=Judge(), max_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["calls"] == 2.0
    assert entry["self_distillation/feedback_available_fraction"] == 0.0


def test_an_interrupted_evaluation_is_no_part_of_the_next(tmp_path: Path) -> None:
    def evaluation(folder: Path, *, interrupted: bool) -> dict[str, float]:
        calls = iter([None, KeyboardInterrupt()] if interrupted else [])

        def judge(completions: Any, **_: Any) -> Any:
            if (error := next(calls, None)) is not None:
                raise error
            return tiny.judge(completions)

        trainer = tiny.trainer(
            folder,
            reward_funcs=judge,
            eval_dataset=tiny.conversations(4),
            num_generations_eval=2,
            per_device_eval_batch_size=4,
        )
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                trainer.evaluate()
        torch.manual_seed(5)
        trainer.evaluate()
        return {
            name: value
            for name, value in trainer.state.log_history[-1].items()
            if name.startswith(("eval_loss", "eval_reward", "eval_self_distillation"))
        }

    assert evaluation(tmp_path / "after", interrupted=True) == evaluation(
        tmp_path / "alone", interrupted=False
    )
