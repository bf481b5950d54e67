"""A generation batch without training holds what training would see, and changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripted_turns
import tiny
import torch
from checkpoint_runs import build, differences, lora, outcome
from datasets import Dataset
from transformers import TrainerCallback

from sdpo_rl import SDPOTrainer
from sdpo_rl.diagnose.generation_batch import GenerationBatch, generation_batch

CASES: dict[str, dict[str, Any]] = {
    "full fine-tuning": {"steps_per_generation": 2},
    "within a generation batch": {"steps_per_generation": 4, "sdpo": {"demonstration_policy": "random"}},
    "LoRA with dropout": {
        "steps_per_generation": 4,
        "start": lambda: lora(lora_dropout=0.5),
        "gradient_checkpointing": True,
    },
    "a GRPO part and old log-probabilities": {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "sdpo": {"grpo_weight": 0.5},
    },
    "a stream": {
        "steps_per_generation": 2,
        "train_dataset": tiny.conversations(8).to_iterable_dataset(),
    },
    "workers": {"steps_per_generation": 2, "dataloader_num_workers": 1},
    "a table of completions": {"steps_per_generation": 2, "log_completions": True},
}


DURING = ("within a generation batch", "LoRA with dropout", "a table of completions")


class DuringTraining(TrainerCallback):
    """Draws a batch after the first two steps."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (1, 2):
            generation_batch(self.trainer)


def noisy_judge(completions: list[Any], log_extra: Any, log_metric: Any, **_: Any) -> list[Any]:
    """A judge that draws from every generator and logs all it can."""
    noise = random.random() + np.random.rand() + torch.rand(()).item()
    log_extra("noise", [noise] * len(completions))
    log_metric("noise", noise)
    return tiny.judge(completions)


def trained(folder: Path, before: Callable[[Any], None], callback: Any = None, **case: Any) -> dict[str, Any]:
    callbacks = [] if callback is None else [callback]
    trainer = build(folder, reward_funcs=noisy_judge, callbacks=callbacks, save_strategy="no", **case)
    if callback is not None:
        callback.trainer = trainer
    before(trainer)
    trainer.train()
    return outcome(trainer) | {"table": {k: list(v) for k, v in trainer._logs["extra"].items()}}


@pytest.mark.parametrize("name", CASES)
def test_training_afterwards_is_the_same_bit_for_bit(tmp_path: Path, name: str) -> None:
    plain = trained(tmp_path / "plain", lambda trainer: None, **CASES[name])
    before = trained(tmp_path / "before", generation_batch, **CASES[name])
    assert differences(plain, before) == []
    if name not in DURING:
        return
    during = trained(tmp_path / "during", lambda trainer: None, DuringTraining(), **CASES[name])
    assert differences(plain, during) == []


def test_the_comparison_notices_a_batch_that_is_not_undone(tmp_path: Path) -> None:
    def score(trainer: Any) -> None:
        trainer.model.train()
        trainer._scored_rollout(list(next(iter(trainer.get_train_dataloader()))))

    case = CASES["full fine-tuning"]
    plain = trained(tmp_path / "plain", lambda trainer: None, **case)
    assert differences(plain, trained(tmp_path / "changed", score, **case))


def everything(trainer: Any) -> dict[str, Any]:
    """What a generation batch could change, by name."""
    gradient_state = trainer.accelerator.gradient_state
    return {
        **{name: p.detach().clone() for name, p in trainer.model.named_parameters()},
        **{f"mode of {name}": module.training for name, module in trainer.model.named_modules()},
        "metrics": {mode: dict(values) for mode, values in trainer._metrics.items()},
        "logs": repr(trainer._logs),
        "pending": repr((trainer._pending_extra_logs, trainer._pending_metrics, trainer._extra_columns)),
        "state": repr(trainer.state),
        "step": trainer._step,
        "buffered": trainer._buffered_inputs is None,
        "diagnostics": trainer._diagnostics.state(),
        "ticks": trainer._teacher.state.ticks,
        "forwards": (trainer._forward_mode, trainer._rollout),
        "loaders": (len(trainer.accelerator._dataloaders), len(gradient_state.dataloader_references)),
        "attributes": sorted(vars(trainer)),
        "random numbers": (torch.get_rng_state(), random.getstate(), repr(np.random.get_state())),
    }


def test_every_part_of_the_trainer_is_as_before(tmp_path: Path) -> None:
    trainer = build(tmp_path, reward_funcs=noisy_judge, sdpo={"grpo_weight": 0.5}, num_iterations=2)
    trainer.model.eval()
    before = everything(trainer)
    generation_batch(trainer)
    assert differences(before, everything(trainer)) == []


def test_a_failed_batch_changes_nothing_either(tmp_path: Path) -> None:
    class Judge:
        def __init__(self) -> None:
            self.last_feedback = ["old"]

        def __call__(self, completions: list[Any], log_extra: Any, **_: Any) -> list[float]:
            random.random()
            log_extra("seen", [1] * len(completions))
            raise OSError("no connection")

    judge = Judge()
    kept = judge.last_feedback
    trainer = build(tmp_path, reward_funcs=judge)
    before = everything(trainer)
    with pytest.raises(OSError, match="no connection"):
        generation_batch(trainer)
    assert differences(before, everything(trainer)) == []
    assert judge.last_feedback is kept


def judged(folder: Path, **changes: Any) -> tuple[Any, GenerationBatch]:
    trainer = tiny.trainer(folder, **changes)
    return trainer, generation_batch(trainer)


def test_the_batch_is_the_first_of_training(tmp_path: Path) -> None:
    seen: list[Any] = []
    trainer = tiny.trainer(tmp_path, max_steps=1, callbacks=[])
    batch = generation_batch(trainer)
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: seen.append(score(rows)) or seen[-1]
    trainer.train()
    assert batch.inputs.keys() == seen[0].keys()
    for name, value in batch.inputs.items():
        assert torch.equal(value, seen[0][name]), name


def test_rows_hold_what_the_tensors_and_the_judge_say(tmp_path: Path) -> None:
    trainer, batch = judged(tmp_path)
    tokenizer, inputs = trainer.processing_class, batch.inputs
    assert [row.row for row in batch.rows] == [*range(8)]
    assert batch.group_size == tiny.GROUP
    assert {row.reason_without_signal is None for row in batch.rows} == {True, False}
    for index, row in enumerate(batch.rows):
        mask = inputs["completion_mask"][index].bool()
        assert row.completion_ids == inputs["completion_ids"][index][mask].tolist()
        assert row.completion == tokenizer.decode(row.completion_ids, skip_special_tokens=True)
        assert row.prompt_ids == tokenizer.apply_chat_template(
            row.prompt, add_generation_prompt=True, return_dict=False
        )
        teacher = inputs["teacher_prompt_mask"][index].bool()
        assert row.teacher_prompt_ids == inputs["teacher_prompt_ids"][index][teacher].tolist()
        assert row.score == row.rewards["judge"] == tiny.score(row.completion)
        assert row.succeeded == (row.score >= 1.0)
        assert row.feedback == (tiny.remark(row.completion) or None)
        assert (row.reason_without_signal is None) == bool(inputs["row_mask"][index])
        group = batch.rows[index // 4 * 4 :][:4]
        successes = [peer.row for peer in group if peer.succeeded and peer.row != index]
        assert row.demonstration_rows == successes[:1]
        assert row.demonstrations == [batch.rows[i].completion for i in successes[:1]]
        assert row.has_demonstration == bool(successes)


def reasons(batch: GenerationBatch) -> set[str | None]:
    return {row.reason_without_signal for row in batch.rows}


def failing(completions: list[Any], **_: Any) -> list[float]:
    return [0.25] * len(completions)


def first_succeeds(completions: list[Any], **_: Any) -> list[float]:
    return [float(row % tiny.GROUP == 0) for row in range(len(completions))]


def test_each_reason_is_named(tmp_path: Path) -> None:
    _, batch = judged(tmp_path, reward_funcs=failing)
    assert reasons(batch) == {
        "no completion of this prompt reached success_reward_threshold=1 (best score 0.25); no feedback, or a "
        "blank one"
    }

    _, batch = judged(tmp_path, reward_funcs=first_succeeds)
    assert [row.reason_without_signal for row in batch.rows[1:4]] == [None] * 3
    assert batch.rows[4].reason_without_signal == (
        "the only success of this prompt is this completion itself; no feedback, or a blank one"
    )

    options = tiny.config(include_environment_feedback=False, success_reward_threshold=2.0)
    _, batch = judged(tmp_path, sdpo_config=options)
    assert any("(include_environment_feedback=False)" in str(reason) for reason in reasons(batch))

    _, batch = judged(tmp_path, sdpo_config=tiny.config(max_reprompt_length=8))
    assert any("fits beside the prompt" in str(reason) for reason in reasons(batch))

    # The tiny model often stops at its limit of tokens.
    _, batch = judged(tmp_path, mask_truncated_completions=True, max_completion_length=2)
    cut = [row for row in batch.rows if "no token of the completion counts" in str(row.reason_without_signal)]
    assert cut
    assert all(len(row.completion_ids) == 2 for row in cut)

    _, batch = judged(tmp_path, sdpo_config=tiny.config(routing="srpo"))
    assert any("has the policy loss alone (routing='srpo')" in str(reason) for reason in reasons(batch))

    unjudged = lambda completions, **_: [None] * len(completions)  # noqa: E731
    _, batch = judged(tmp_path, reward_funcs=unjudged)
    assert all("no reward function judged" in str(reason) for reason in reasons(batch))


class Counter:
    """A hidden number, and a tool that counts."""

    feedback = ""

    def reset(self, **_: Any) -> str:
        self.count = 0
        self.feedback = ""
        return " to three"

    def add(self, number: int) -> str:
        """
        Counts on.

        Args:
            number: to add.
        """
        self.count += number
        self.feedback = f"only {self.count}"
        return "added"


def test_environments_and_tools_run_and_their_instances_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = SDPOTrainer(
        model=scripted_turns.model(),
        args=tiny.arguments(tmp_path, max_completion_length=400),
        sdpo_config=tiny.config(),
        processing_class=scripted_turns.tokenizer(),
        reward_funcs=lambda environments, **_: [each.count / 3 for each in environments],
        train_dataset=Dataset.from_dict({"prompt": [tiny.user("count")] * 2}),
        environment_factory=Counter,
    )
    turns = [scripted_turns.call("add", '{"number": 1}'), f"done{scripted_turns.END}"]
    scripted_turns.replace_sampling(trainer, [*[turns] * 7, turns[1:]])  # the last row calls no tool
    pool = {name: list(each) for name, each in trainer._environment_pool.items()}
    before = trainer.environments, sorted(vars(trainer))
    batch = generation_batch(trainer)
    assert [row.feedback for row in batch.rows] == ["only 1"] * 7 + [None]
    assert all("add" in row.completion and "added" in row.completion for row in batch.rows[:7])
    decode = trainer.processing_class.decode
    assert all("count to three" in decode(row.prompt_ids) for row in batch.rows)
    assert all("only 1" in decode(row.teacher_prompt_ids) for row in batch.rows[:7])
    assert trainer._environment_pool == pool
    assert (trainer.environments, sorted(vars(trainer))) == before


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="trainer: expected an SDPOTrainer, got object"):
        generation_batch(object())
    with pytest.raises(ValueError, match="sdpo_config: expected enabled=True"):
        generation_batch(tiny.trainer(tmp_path, sdpo_config=tiny.config(enabled=False)))
    stream = Dataset.from_dict({"prompt": [tiny.user("1")]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="train_dataset: expected at least 2 prompts"):
        generation_batch(tiny.trainer(tmp_path, train_dataset=stream))
