"""What reaches the teacher's prompts of a run: columns, texts and completions, as they came from the rollout."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
from datasets import Dataset

from sdpo_rl import SDPOTrainer


def teacher_prompts(trainer: SDPOTrainer) -> list[str]:
    """The text of every row's teacher prompt in the first generation batch; '' without one."""
    batches: list[dict[str, Any]] = []
    generate = trainer._generate_and_score_completions

    def record(inputs: Any) -> Any:
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = record
    trainer.train()
    ids, mask = (batches[0][name] for name in ("teacher_prompt_ids", "teacher_prompt_mask"))
    return [
        "".join(tiny.VOCABULARY[i] for i in row[on.bool()].tolist())
        for row, on in zip(ids, mask, strict=True)
    ]


def zero(completions: list[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)


HINTS = [f"hint {row}" for row in range(8)]


@pytest.mark.parametrize("column", ["feedback", "privileged_context"])
@pytest.mark.parametrize("remove", [False, True])
def test_a_dataset_s_feedback_reaches_the_teacher(tmp_path: Path, column: str, remove: bool) -> None:
    data = tiny.conversations(**{column: HINTS, "unused": HINTS})
    trainer = tiny.trainer(
        tmp_path, train_dataset=data, reward_funcs=zero, remove_unused_columns=remove, max_steps=1
    )
    texts = teacher_prompts(trainer)
    assert all(sum(f"attempt:\n\n{hint}\n" in text for hint in HINTS) == 1 for text in texts)
    assert trainer.state.log_history[0]["self_distillation/feedback_used_fraction"] == 1.0


def test_unused_columns_are_removed_all_the_same(tmp_path: Path) -> None:
    columns = []

    def judge(completions: list[Any], **given: Any) -> list[float]:
        columns.append(sorted(given))
        return zero(completions)

    trainer = tiny.trainer(
        tmp_path,
        train_dataset=tiny.conversations(feedback=HINTS, unused=HINTS),
        reward_funcs=judge,
        remove_unused_columns=True,
        max_steps=1,
    )
    trainer.train()
    assert all("feedback" in names and "unused" not in names for names in columns)


def test_grpo_leaves_columns_of_these_names_alone(tmp_path: Path) -> None:
    """With `enabled=False` they are arguments of the reward functions, of any type."""
    data = tiny.conversations(feedback=[[1, 2]] * 8, privileged_context=[["a"]] * 8)
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(enabled=False), train_dataset=data, reward_funcs=zero, max_steps=1
    )
    trainer.train()


def spoils_prompts(prompts: list[Any], completions: list[Any], **_: Any) -> list[Any]:
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt.append({"role": "assistant", "content": "spoiled"})
        prompt[0]["content"] = "spoiled"
        completion[0]["content"] = "spoiled"
    return [(1.0 if row % 4 == 0 else 0.0, "why") for row in range(len(completions))]


def spoils_order(completions: list[Any], completion_ids: list[Any], **_: Any) -> list[Any]:
    completions.sort(key=str)
    completions.pop()
    for ids in completion_ids:
        ids.clear()
    return [(1.0 if row % 4 == 0 else 0.0, "why") for row in range(8)]


def only_scores(completions: list[Any], **_: Any) -> list[Any]:
    return [(1.0 if row % 4 == 0 else 0.0, "why") for row in range(len(completions))]


@pytest.mark.parametrize("spoils", [spoils_prompts, spoils_order])
def test_a_reward_function_may_change_what_it_is_given(tmp_path: Path, spoils: Any) -> None:
    expected = teacher_prompts(tiny.trainer(tmp_path, reward_funcs=only_scores, max_steps=1))
    got = teacher_prompts(tiny.trainer(tmp_path, reward_funcs=spoils, max_steps=1))
    assert got == expected
    assert any("Correct solution" in text for text in got)


def all_succeed(completions: list[Any], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def all_fail(completions: list[Any], **_: Any) -> list[Any]:
    return [(0.0, "wrong")] * len(completions)


@pytest.mark.parametrize("judge", [all_succeed, all_fail])
def test_a_batch_that_is_masked_whole_is_empty(tmp_path: Path, judge: Any) -> None:
    """Truncated completions are no demonstrations, and need none, nor feedback."""
    trainer = tiny.trainer(
        tmp_path,
        reward_funcs=judge,
        mask_truncated_completions=True,
        max_completion_length=1,
        max_steps=1,
        start=never_ending(),
    )
    assert teacher_prompts(trainer) == [""] * 8
    entry = trainer.state.log_history[0]
    assert entry["self_distillation/empty_target_batch"] == 1.0
    assert entry["self_distillation/success_sample_fraction"] == 0.0


def never_ending() -> Any:
    model = tiny.model()
    model.generation_config.eos_token_id = [1]
    return model


def test_without_a_pad_token_the_end_of_a_sequence_pads(tmp_path: Path) -> None:
    """As in TRL; the mask, not the id, tells padding from completions."""
    losses = []
    for changes in ({}, {"pad_token": None}):
        trainer = tiny.trainer(tmp_path, processing_class=tiny.tokenizer(**changes), max_steps=2)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert trainer.processing_class.pad_token == tiny.EOS
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert min(losses[0]) > 0.0


def test_plain_prompts_take_feedback_too(tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": [f"{row}?" for row in range(8)], "privileged_context": HINTS})
    texts = teacher_prompts(tiny.trainer(tmp_path, train_dataset=data, reward_funcs=zero, max_steps=1))
    assert all(text.startswith(tuple(f"{row}?" for row in range(8))) and "hint" in text for text in texts)


def test_arguments_that_shape_grpo_s_objective_alone_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sdpo_rl"):
        tiny.trainer(tmp_path, loss_type="bnpo", epsilon=0.3)
        tiny.trainer(tmp_path)
        tiny.trainer(tmp_path, sdpo_config=tiny.config(enabled=False), loss_type="bnpo")
    assert [message for message in caplog.messages if "no effect" in message] == [
        "loss_type='bnpo', epsilon=0.3: no effect, the self-distillation loss replaces GRPO's; remove it."
    ]


# --- what is a success ------------------------------------------------------------------------------------


def in_shape(completions: list[Any], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def correct(completions: list[Any], **_: Any) -> list[Any]:
    """Of each prompt the first completion alone."""
    return [1.0 if row % tiny.GROUP == 0 else 0.0 for row in range(len(completions))]


def not_judged(completions: list[Any], **_: Any) -> list[Any]:
    return [None if row % 2 else 0.5 for row in range(len(completions))]


def shows(path: Path, functions: list[Any], weights: list[float] | None, **options: Any) -> Any:
    """Which rows have a demonstration, and the log."""
    trainer = tiny.trainer(
        path,
        reward_funcs=functions,
        reward_weights=weights,
        sdpo_config=tiny.config(**options),
        max_steps=1,
        start=never_ending(),
    )
    texts = teacher_prompts(trainer)
    return ["Correct solution" in text for text in texts], trainer.state.log_history[0]


ALL, NONE, OTHERS = [True] * 8, [False] * 8, [row % tiny.GROUP != 0 for row in range(8)]


@pytest.mark.parametrize(
    ("functions", "weights", "options", "expected", "best"),
    [
        ([in_shape, correct], None, {}, ALL, 2.0),
        ([in_shape, correct], [0.5, 0.5], {}, OTHERS, 1.0),
        ([in_shape, correct], [0.25, 0.25], {}, NONE, 0.5),
        ([in_shape, correct], None, {"success_reward_funcs": ["correct"]}, OTHERS, 1.0),
        ([in_shape, correct], [0.5, 0.5], {"success_reward_funcs": ["correct"]}, OTHERS, 1.0),
        ([in_shape, correct], [0.5, 0.0], {"success_reward_funcs": ["correct"]}, OTHERS, 1.0),
        ([in_shape, correct], [0.5, 0.5], {"success_reward_funcs": ["in_shape"]}, ALL, 1.0),
        (
            [in_shape, correct],
            [0.5, 0.5],
            {"success_reward_funcs": ["correct", "in_shape"], "success_reward_threshold": 2.0},
            OTHERS,
            2.0,
        ),
        ([in_shape, not_judged], None, {"success_reward_funcs": ["not_judged"]}, NONE, 0.5),
        (
            [correct, not_judged],
            None,
            {"success_reward_funcs": ["not_judged", "correct"], "success_reward_threshold": 1.5},
            OTHERS,
            1.5,
        ),
    ],
)
def test_success_is_what_the_named_functions_say(
    tmp_path: Path, functions: Any, weights: Any, options: Any, expected: list[bool], best: float
) -> None:
    shown, entry = shows(tmp_path, functions, weights, **options)
    assert shown == expected
    assert entry["self_distillation/best_score"] == best


def test_a_row_that_no_named_function_judges_has_no_score(tmp_path: Path) -> None:
    def silent(completions: list[Any], **_: Any) -> list[None]:
        return [None] * len(completions)

    options = {"success_reward_funcs": ["silent"], "success_reward_threshold": 0.0}
    shown, entry = shows(tmp_path, [in_shape, silent], None, **options)
    assert shown == NONE
    assert "self_distillation/best_score" not in entry


# --- thinking in special tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("marks", [["<think>", "</think>"], ["[THINK]", "[/THINK]"]])
def test_a_demonstration_has_no_thinking_in_special_tokens(
    tmp_path: Path, marks: list[str], plain: bool
) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(marks, special_tokens=True)
    trainer = tiny.trainer(
        tmp_path,
        reward_funcs=correct,
        processing_class=tokenizer,
        start=tiny.model(vocab_size=len(tokenizer)),
        train_dataset=tiny.plain() if plain else None,
        sdpo_config=tiny.config(thinking_marks=marks),
        max_steps=1,
    )
    ids = tokenizer(f"{marks[0]}secret{marks[1]}42<eos>")["input_ids"]
    trainer._generate_single_turn = lambda prompt_ids, *_: ([ids] * len(prompt_ids), None)
    texts = [text for text in teacher_prompts(trainer) if text]
    assert len(texts) == 6
    assert all("Correct solution:\n\n42\n" in text and "secret" not in text for text in texts)
