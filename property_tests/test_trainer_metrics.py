"""The trainer's evaluation, metrics and updates of the teacher."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig
from reference_step import Method, Recorder, ReferenceStep, trainable
from trainer_logs import FOUR, PREFIX, logs, never, same

# --- evaluation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 4, 2])
def test_evaluation_is_the_mean_divergence_and_changes_no_weight(tmp_path: Path, rows: int) -> None:
    trainer = tiny.trainer(
        tmp_path,
        eval_dataset=tiny.conversations(4),
        num_generations_eval=2,
        per_device_eval_batch_size=rows,
    )
    recorder = Recorder(trainer)
    by_batch: list[float] = []
    compute = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        by_batch.append(loss.item())
        return loss

    trainer.compute_loss = watched
    before, teacher = trainable(trainer.model), dict(trainer._teacher.state.params)
    result = trainer.evaluate()
    reference = ReferenceStep(tiny.model(), Method())
    assert len(recorder.evaluated) == 8
    assert all(len(row.peers) == 1 for row in recorder.evaluated)
    loss, _ = reference.step(recorder.evaluated, stale=False)
    assert result["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert result[f"eval_{PREFIX}divergence"] == pytest.approx(loss, rel=1e-5)
    # Batches differ in their tokens, so the mean of their means differs.
    assert len(by_batch) == 8 // rows
    assert (sum(by_batch) / len(by_batch) == pytest.approx(loss, rel=1e-4)) == (rows == 8)
    assert same(before, trainable(trainer.model))
    assert same(teacher, trainer._teacher.state.params)
    assert trainer._teacher.state.ticks == 0
    assert not trainer.model.training or trainer.train()


def test_evaluation_without_a_signal_is_zero(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, reward_funcs=never, eval_dataset=tiny.conversations(4))
    result = trainer.evaluate()
    assert result["eval_loss"] == 0.0
    assert "test_loss" not in result
    assert trainer.predict(tiny.conversations(4)).metrics["test_loss"] == 0.0
    assert result[f"eval_{PREFIX}empty_target_batch"] == 1.0


# --- metrics ----------------------------------------------------------------------------------------------

NAMES = {
    "success_group_fraction",
    "success_sample_fraction",
    "feedback_available_fraction",
    "feedback_used_fraction",
    "reprompt_sample_fraction",
    "empty_target_batch",
    "divergence",
    "student_topk_mass",
    "teacher_topk_mass",
    "student_tail_mass",
    "teacher_tail_mass",
    "student_entropy",
    "teacher_entropy",
    "sampled_token_agreement",
    "is_clip_fraction",
    "truncated_reprompt_fraction",
    "reprompt_text_fraction",
    "teacher_distance",
}


def test_metrics_are_logged_under_their_names(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, num_iterations=2, max_steps=4, logging_steps=2, **FOUR)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        names = {name.removeprefix(PREFIX) for name in entry if name.startswith(PREFIX)}
        assert names >= NAMES
        assert all(isinstance(entry[PREFIX + name], float) for name in NAMES)
        assert entry[f"{PREFIX}student_topk_mass"] + entry[f"{PREFIX}student_tail_mass"] == pytest.approx(1.0)
        json.dumps(entry)


def test_the_logged_divergence_is_the_unweighted_loss(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=3, **FOUR)
    trainer.train()
    assert logs(trainer, f"{PREFIX}divergence") == pytest.approx(logs(trainer, "loss"), rel=1e-5)


def test_the_teacher_s_distance_is_that_of_its_weights(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.train()
    student, teacher = trainable(trainer.model), trainer._teacher.state.params
    gap = torch.stack([(teacher[name] - student[name]).norm() for name in student]).norm()
    norm = torch.stack([p.norm() for p in student.values()]).norm()
    assert logs(trainer, f"{PREFIX}teacher_distance") == pytest.approx([(gap / norm).item()], rel=1e-5)


def test_a_run_without_signal_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        tiny.trainer(
            tmp_path, sdpo_config=tiny.config(diagnostics_patience=2), reward_funcs=never, max_steps=2
        ).train()
    assert "No row had a teacher signal for 2 generation batches" in caplog.text


# --- teacher updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "steps", "ticks"),
    [
        ({}, 3, 3),
        (FOUR, 3, 3),
        ({"num_iterations": 2}, 5, 2),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 2}, 5, 2),
        (
            {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
            2,
            4,
        ),
    ],
    ids=["plain", "accumulated", "two passes", "two steps a batch", "two batches a step"],
)
def test_one_tick_per_finished_generation_batch(
    tmp_path: Path, changes: dict[str, Any], steps: int, ticks: int
) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=steps, **changes)
    trainer.train()
    assert trainer._teacher.state.ticks == ticks


def test_the_teacher_starts_as_the_student_and_has_only_trainable_parameters(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    held, own = trainer._teacher.state.params, trainable(trainer.model)
    assert held.keys() == own.keys()
    assert all("lora" in name for name in held)
    assert same(held, own)
    assert all(tensor.dtype == torch.float32 for tensor in held.values())
    assert any(tensor.abs().sum() > 0 for tensor in held.values())


def test_the_teacher_runs_without_dropout_and_modes_are_restored(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5), max_steps=1
    )
    layer = next(m for n, m in trainer.model.named_modules() if n.endswith("lora_dropout.default"))
    modes: list[tuple[bool, bool]] = []
    layer.register_forward_pre_hook(
        lambda module, args: modes.append((module.training, torch.is_grad_enabled()))
    )
    compute = trainer.compute_loss

    def watched(*args: Any, **kwargs: Any) -> Any:
        modes.clear()
        return compute(*args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert (False, False) in modes
    assert modes[-1] == (True, True)
    assert (True, False) not in modes
    assert layer.training
