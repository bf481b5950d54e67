"""Bad reward functions of a trainer, and bad outputs of them: refused before a weight is updated."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from bad_input import Case, run
from bad_trainer_input import build, train

from sdpo_rl import SDPOTrainer

FUNCTIONS = [
    Case(
        "a reward that cannot be called",
        lambda path: train(path, reward_funcs=[tiny.judge, 3.0]),
        TypeError,
        ("reward_funcs[1]", "a function", "float"),
    ),
    Case(
        "no reward as an item",
        lambda path: train(path, reward_funcs=[tiny.judge, None]),
        TypeError,
        ("reward_funcs[1]", "a function", "NoneType"),
    ),
    Case(
        "unknown functions of success",
        lambda path: build(
            path,
            reward_funcs=[tiny.judge, tiny.parity],
            sdpo_config=tiny.config(success_reward_funcs=["parity", "correct"]),
        ),
        ValueError,
        ("success_reward_funcs", "['judge', 'parity']", "got 'correct'", "none of them", "rename"),
    ),
    Case(
        "two functions of success with one name",
        lambda path: build(
            path,
            reward_funcs=[tiny.judge, tiny.judge],
            sdpo_config=tiny.config(success_reward_funcs=["judge"]),
        ),
        ValueError,
        ("success_reward_funcs", "got 'judge'", "2 of them have", "rename"),
    ),
]


@run(FUNCTIONS)
def test_functions(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path)


def returning(value: Any) -> Callable[[Path], None]:
    def badly_behaved(completions: list[Any], **_: Any) -> Any:
        return value(len(completions)) if callable(value) else value

    def make(path: Path) -> None:
        trainer = tiny.trainer(path, reward_funcs=badly_behaved)
        before = [p.clone() for p in trainer.model.parameters()]
        try:
            trainer.train()
        finally:
            assert all(map(torch.equal, before, trainer.model.parameters()))

    return make


def returns_text(text: Any) -> Callable[[int], Any]:
    return lambda rows: [(0.0, text)] * rows


NAME = "'badly_behaved'"
REWARDS = [
    Case(
        "too few",
        returning(lambda rows: [0.0] * (rows - 1)),
        ValueError,
        (NAME, "expected 8 items", "got 7 items"),
    ),
    Case(
        "too many",
        returning(lambda rows: [0.0] * (rows + 1)),
        ValueError,
        (NAME, "expected 8 items", "got 9 items"),
    ),
    Case(
        "scores, and then texts",
        returning(lambda rows: ([0.0] * rows, ["why"] * rows)),
        ValueError,
        (NAME, "pair of lists", "one (score, feedback) pair per row", "list(zip(scores, texts))"),
    ),
    Case(
        "infinite",
        returning(lambda rows: [0.0] * (rows - 1) + [float("inf")]),
        ValueError,
        (NAME, "row 7", "a finite score", "got inf", "clip it"),
    ),
    Case("none at all", returning(None), TypeError, (NAME, "NoneType", "one item per row")),
    Case("one number", returning(1.0), TypeError, (NAME, "float", "one item per row")),
    Case("a text", returning("12345678"), TypeError, (NAME, "str", "one item per row")),
    Case("a mapping", returning({"score": 1.0}), TypeError, (NAME, "dict", "one item per row")),
    Case("texts", returning(lambda rows: ["good"] * rows), TypeError, (NAME, "row 0", "a number", "'good'")),
    Case(
        "feedback that is no text",
        returning(returns_text(7)),
        TypeError,
        (NAME, "row 0", "string or None", "int"),
    ),
    Case(
        "triples",
        returning(lambda rows: [(1.0, "a", 2)] * rows),
        TypeError,
        (NAME, "row 0", "(score, feedback)"),
    ),
    Case(
        "pairs the wrong way round",
        returning(lambda rows: [("good", 1.0)] * rows),
        TypeError,
        (NAME, "row 0", "string or None", "float"),
    ),
    Case(
        "other keys",
        returning(lambda rows: [{"reward": 1.0}] * rows),
        ValueError,
        (NAME, "row 0", "'score'", "['reward']"),
    ),
    Case(
        "a key too many",
        returning(lambda rows: [{"score": 1.0, "feedbak": "x"}] * rows),
        ValueError,
        (NAME, "row 0", "'feedback'", "['feedbak', 'score']"),
    ),
]


@run(REWARDS)
def test_reward_functions(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path)


class RewardModel(torch.nn.Module):
    """Gives every completion the same reward."""

    def __init__(self, reward: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(_name_or_path="org/judge-model")
        self.reward = torch.nn.Parameter(torch.tensor(reward))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.reward.expand(len(input_ids), 1))


@pytest.mark.parametrize("name", ["prompts", "completions", "environments"])
def test_columns_that_no_reward_function_gets_are_accepted(tmp_path: Path, name: str) -> None:
    data = tiny.conversations(**{name: ["a"] * 8})
    tiny.trainer(tmp_path, train_dataset=data, remove_unused_columns=True, max_steps=1).train()
    if name == "environments":  # TRL has none to pass
        tiny.trainer(tmp_path, train_dataset=data, max_steps=1).train()
    trainer = SDPOTrainer(
        model=tiny.model(),
        args=tiny.arguments(tmp_path, max_steps=1),
        processing_class=tiny.tokenizer(),
        reward_funcs=RewardModel(1.0),
        reward_processing_classes=tiny.tokenizer(),
        train_dataset=data,
    )
    trainer.train()


@pytest.mark.parametrize("reward", [float("inf"), -float("inf")])
def test_an_infinite_reward_of_a_reward_model_is_refused(tmp_path: Path, reward: float) -> None:
    trainer = SDPOTrainer(
        model=tiny.model(),
        args=tiny.arguments(tmp_path),
        processing_class=tiny.tokenizer(),
        reward_funcs=[tiny.judge, RewardModel(reward)],
        reward_processing_classes=[None, tiny.tokenizer()],
        train_dataset=tiny.conversations(),
    )
    with pytest.raises(ValueError, match=f"'judge-model': expected finite rewards, got {reward}; clip"):
        trainer.train()


def test_an_infinite_sum_of_rewards_is_refused(tmp_path: Path) -> None:
    def large(completions: list[Any], **_: Any) -> list[float]:
        return [3e38] * len(completions)

    with pytest.raises(ValueError, match=r"reward_weights: expected a finite sum.*of large, parity, got"):
        tiny.trainer(tmp_path, reward_funcs=[large, tiny.parity], reward_weights=[10.0, 1.0]).train()


def test_what_is_not_judged_is_not_infinite(tmp_path: Path) -> None:
    def partly(completions: list[Any], **_: Any) -> list[Any]:
        return [(None, float("nan"), 1.0, 0.0)[row % 4] for row in range(len(completions))]

    def never(completions: list[Any], **_: Any) -> list[None]:
        return [None] * len(completions)

    trainer = tiny.trainer(tmp_path, reward_funcs=[partly, never])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["self_distillation/best_score"] == 1.0 for entry in logged)
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in logged)


def test_last_feedback_of_the_wrong_length(tmp_path: Path) -> None:
    def judge(completions: list[Any], **_: Any) -> list[float]:
        judge.last_feedback = ["only one"]  # type: ignore[attr-defined]
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"'judge\.last_feedback': expected 8 items.*got 1 items"):
        tiny.trainer(tmp_path, reward_funcs=judge).train()
