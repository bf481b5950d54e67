"""What rows with and without a signal cost, and the lengths of their reprompts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from reference_step import Recorder, trainable
from trainer_logs import FOUR, PREFIX, logs, never, same

from sdpo_rl.step import batch as step_batch
from sdpo_rl.step import runner

# --- device synchronization -------------------------------------------------------------------------------

SYNCHRONIZING = ("tolist", "item", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


def synchronizations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods by which the adapter reads values of tensors from now on; each waits for a GPU."""
    seen: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        true = getattr(torch.Tensor, name)

        def read(*args: Any, **kwargs: Any) -> Any:
            if "sdpo_rl" in Path(sys._getframe(1).f_code.co_filename).parts:
                seen.append(name)
            return true(*args, **kwargs)

        return read

    for name in SYNCHRONIZING:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    return seen


@pytest.mark.parametrize("together", [10**6, 100], ids=["one teacher's forward", "several"])
@pytest.mark.parametrize("active", [8, 3, 0])
def test_a_micro_batch_synchronizes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, active: int, together: int
) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1, reward_funcs=lambda completions, **_: [(0.0, "no")] * 8)
    trainer.train()
    inputs = trainer._prepare_inputs([*tiny.conversations()])
    inputs["loss_mask"] &= (torch.arange(8) < active)[:, None]
    monkeypatch.setattr(runner, "_TEACHER_TOKENS", together)
    monkeypatch.setattr(runner, "_TEACHER_WIDTH", 32)
    seen = synchronizations(monkeypatch)
    trainer.compute_loss(trainer.model, inputs)
    trainer._teacher.tick(trainer._unwrapped)
    assert seen == ["tolist"]


# --- rows without signal ----------------------------------------------------------------------------------


def rows_forwarded(trainer: Any) -> list[int]:
    """Rows of each training forward (sampling uses a cache, training does not)."""
    seen: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("use_cache") is False:
            seen.append(len(kwargs["input_ids"]))

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("split", [{}, FOUR], ids=["one micro-batch", "four"])
def test_rows_without_signal_cost_no_forward(tmp_path: Path, split: dict[str, Any]) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(loss_backend="logits", packing="padded"),
        reward_funcs=tiny.parity,
        max_steps=4,
        num_generations=2,
        **split,
    )
    seen = rows_forwarded(trainer)
    trainer.train()
    active = sum(round(8 * part) for part in logs(trainer, f"{PREFIX}reprompt_sample_fraction"))
    assert 0 < active < 32
    # The short rows of `reads_padding` and of `autoregression_problem`.
    assert seen[:4] == [3, 2, 2, 2]
    assert sum(seen[4:]) == 2 * active


def test_the_loss_mask_is_computed_once_per_generation_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    true = step_batch.completion_loss_mask

    def counted(completion_mask: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(len(completion_mask))
        return true(completion_mask, *args)

    monkeypatch.setattr(step_batch, "completion_loss_mask", counted)
    trainer = tiny.trainer(
        tmp_path, eval_dataset=tiny.conversations(2), num_iterations=2, max_steps=4, **FOUR
    )
    trainer.train()
    assert calls == [8, 8]
    trainer.evaluate()
    assert calls == [8, 8, 8]


def test_a_step_without_signal_has_loss_zero_and_changes_nothing(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, reward_funcs=never, weight_decay=0.0, max_steps=2, **FOUR)
    recorder, seen, before = Recorder(trainer), rows_forwarded(trainer), trainable(trainer.model)
    trainer.train()
    assert seen == []
    assert logs(trainer, "loss") == [0.0, 0.0]
    assert logs(trainer, f"{PREFIX}empty_target_batch") == [1.0, 1.0]
    assert all((g == 0).all() for step in recorder.steps for g in step.gradients.values())
    assert same(before, trainable(trainer.model))


def test_a_step_after_one_without_signal(tmp_path: Path) -> None:
    calls: list[int] = []

    def second_time(completions: list[Any], **_: Any) -> list[Any]:
        calls.append(len(completions))
        return [(0.0, "do better" if len(calls) == 2 else None) for _ in completions]

    trainer = tiny.trainer(tmp_path, reward_funcs=second_time, max_steps=3, **FOUR)
    trainer.train()
    losses = logs(trainer, "loss")
    assert losses[0] == losses[2] == 0.0
    assert losses[1] > 0.0


# --- the length of a reprompt -----------------------------------------------------------------------------


def test_a_reprompt_never_exceeds_its_limit_or_the_model(tmp_path: Path) -> None:
    def verbose(completions: list[Any], **_: Any) -> list[Any]:
        return [(0.0, "x" * 400) for _ in completions]

    for limit, positions in ((150, 512), (10240, 160)):
        trainer = tiny.trainer(
            tmp_path,
            sdpo_config=tiny.config(max_reprompt_length=limit),
            reward_funcs=verbose,
            start=tiny.model(max_position_embeddings=positions),
            max_steps=1,
        )
        widths: list[int] = []
        recorder = Recorder(
            trainer, lambda output, batch, w=widths: w.append(output["teacher_prompt_ids"].shape[1])
        )
        trainer.train()
        longest = max(len(row.completion) for row in recorder.rows)
        assert 100 < widths[0] <= min(limit, positions - 1)
        assert limit == 150 or widths[0] <= positions - min(len(row.completion) for row in recorder.rows)
        assert longest > 1
        assert logs(trainer, f"{PREFIX}truncated_reprompt_fraction") == [1.0]


def test_a_row_whose_question_fills_the_limit_is_dropped(tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": [tiny.user("why " * 30)] * 4})
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(max_reprompt_length=100), train_dataset=data, max_steps=1
    )
    trainer.train()
    assert logs(trainer, "loss") == [0.0]
    assert logs(trainer, f"{PREFIX}dropped_reprompt_fraction")[0] > 0.0
    for name in ("success_sample", "feedback_used", "reprompt_sample"):
        assert logs(trainer, f"{PREFIX}{name}_fraction") == [0.0]
    assert logs(trainer, f"{PREFIX}feedback_available_fraction")[0] > 0.0
