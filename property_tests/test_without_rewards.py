"""Runs without reward functions: the teacher reads a text of the dataset, and nothing judges a completion."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import scripted_turns
import tiny
import torch
from datasets import Dataset, IterableDataset

from sdpo_rl import SDPOConfig, SDPOTrainer, credit_report, probe, training_arguments

PAGE = (Path(__file__).parents[1] / "docs" / "references.md").read_text()
SOLUTIONS = [f"the sum is {row}" for row in range(8)]
NO_SOURCE = (
    "reward_funcs: expected at least one",
    "'feedback' or 'privileged_context'",
    "got neither",
    "pass",
)


def solutions(column: str = "feedback") -> Dataset:
    return tiny.conversations(**{column: SOLUTIONS})


def trainer(output: Path, **changes: Any) -> SDPOTrainer:
    """A trainer without reward functions over a dataset with a column of feedback."""
    return tiny.trainer(output, **{"reward_funcs": None, "train_dataset": solutions(), **changes})


def history(run: SDPOTrainer) -> list[dict[str, Any]]:
    return [entry for entry in run.state.log_history if "train_runtime" not in entry]


def constant(reward: float | None) -> Any:
    def judge(completions: list[Any], **_: Any) -> list[float | None]:
        return [reward] * len(completions)

    return judge


# --- what the teacher reads -------------------------------------------------------------------------------

PROMPTS = {
    "opsd": (
        "{question}\n\nHere is a reference solution:\n{solution}\n\nAfter understanding the reference solution, "
        "please try to solve this problem using your own approach below:"
    ),
    "sdft": (
        "{question}\n\nThis is an example for a response to the question:\n{solution}\n\nNow answer with a "
        "response of your own, including the thinking process:"
    ),
}


@pytest.mark.parametrize("column", ["feedback", "privileged_context"])
@pytest.mark.parametrize("preset", PROMPTS)
def test_the_teacher_reads_the_reference_solution(tmp_path: Path, preset: str, column: str) -> None:
    """As the paper prints its prompt, through the chat template."""
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, *row["prompt"]], column: row[column]}
        for row in solutions(column)
    ]
    run = trainer(tmp_path, train_dataset=Dataset.from_list(rows), sdpo_config=SDPOConfig.preset(preset))
    texts = dict(zip([row["prompt"][-1]["content"] for row in rows], SOLUTIONS, strict=True))
    shown = run.preview(8).rows
    assert len({row.prompt[-1]["content"] for row in shown}) == 2
    for row in shown:
        question = row.prompt[-1]["content"]
        filled = PROMPTS[preset].format(question=question, solution=texts[question])
        whole = f"{tiny.SYSTEM}Be brief.{tiny.USER}{filled}{tiny.BOT}"
        assert "".join(tiny.VOCABULARY[i] for i in row.teacher_prompt_ids) == whole
        assert row.student_prompt.text == f"{tiny.SYSTEM}Be brief.{tiny.USER}{question}{tiny.BOT}"


@pytest.mark.parametrize("preset", PROMPTS)
def test_beside_rewards_the_teacher_of_a_preset_still_reads_it(tmp_path: Path, preset: str) -> None:
    """Also a row that succeeded, or whose peer did."""
    rewards = lambda completions, **_: [float(row % 4 < 2) for row in range(len(completions))]  # noqa: E731
    run = trainer(tmp_path, reward_funcs=rewards, sdpo_config=SDPOConfig.preset(preset))
    introduction = PROMPTS[preset].split("{")[1].partition("}")[2]
    for row in run.preview(8).rows:
        assert row.uses_feedback
        assert f"{introduction}{row.feedback}\n" in row.teacher_prompt.text
        assert "attempt" not in row.teacher_prompt.text


def test_a_context_may_come_before_the_question(tmp_path: Path) -> None:
    """The templates of the page."""
    code = PAGE.split("## Context distillation")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    for row in trainer(tmp_path, sdpo_config=names["config"]).preview(8).rows:
        whole = f"{tiny.USER}{row.feedback}\n\n{row.prompt[0]['content']}{tiny.BOT}"
        assert row.teacher_prompt.text == whole


def test_the_page_has_the_values_of_the_presets() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    names, *rows = [line.strip("| ").split(" | ") for line in lines]
    assert names == ["`opsd`", "`sdft`"]
    cells = {name.strip("`"): found for name, *found in rows}
    for column, name in enumerate(("opsd", "sdft")):
        arguments = training_arguments(name)
        assert float(cells["learning rate"][column].split()[0]) == arguments["learning_rate"]
        assert float(cells["max_grad_norm"][column].split(":")[0]) == arguments["max_grad_norm"]
        assert f"at most {arguments['max_completion_length']} tokens" in cells["completions"][column]
        assert f"temperature {arguments.get('temperature', 1):g}" in cells["sampling"][column]
    assert f"entries of at most {SDPOConfig.preset('opsd').entry_clip}:" in cells["divergence"][0]
    average = SDPOConfig.preset("sdft")
    rate = f"{average.teacher_update_rate} per update of {average.teacher_rate_samples} completions"
    assert rate in cells["teacher"][1]


# --- the step ---------------------------------------------------------------------------------------------


def steps(run: SDPOTrainer) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses and norms of the gradients of a run, and the weights that it ends with."""
    run.train()
    return (
        [(entry["loss"], entry["grad_norm"]) for entry in history(run)],
        {name: weight.detach().clone() for name, weight in run.model.named_parameters()},
    )


def same_steps(one: Any, other: Any) -> bool:
    return one[0] == other[0] and all(torch.equal(weight, other[1][name]) for name, weight in one[1].items())


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("opsd", {}),
        ("sdft", {"gradient_accumulation_steps": 2}),
        (None, {}),
        (None, {"num_iterations": 2}),
    ],
)
def test_a_step_is_that_of_a_reward_without_a_success(
    tmp_path: Path, preset: str | None, changes: dict[str, Any]
) -> None:
    """The loss and the gradient, to the bit; a reward that makes all rows successes gives others."""
    config = tiny.config() if preset is None else SDPOConfig.preset(preset, teacher_update_rate=0.3)
    never = dataclasses.replace(config, success_reward_threshold=1e9)
    without = steps(trainer(tmp_path, sdpo_config=config, **changes))
    assert all(loss > 0 and norm > 0 for loss, norm in without[0])
    dummy = constant(0.0)
    assert same_steps(without, steps(trainer(tmp_path, sdpo_config=never, reward_funcs=dummy, **changes)))
    assert not same_steps(
        without, steps(trainer(tmp_path, sdpo_config=config, reward_funcs=constant(1.0), **changes))
    )


@pytest.mark.parametrize("threshold", [-1.0, 0.0])
def test_nothing_is_a_success_whatever_the_threshold(tmp_path: Path, threshold: float) -> None:
    run = trainer(tmp_path, sdpo_config=tiny.config(success_reward_threshold=threshold))
    run.train()
    for entry in history(run):
        assert entry["self_distillation/success_group_fraction"] == 0.0
        assert entry["self_distillation/success_sample_fraction"] == 0.0
        assert entry["self_distillation/feedback_used_fraction"] == 1.0
    assert not any(row.succeeded or row.demonstrations for row in run.preview(8).rows)


# --- the log ----------------------------------------------------------------------------------------------


def about_rewards(entry: dict[str, Any]) -> set[str]:
    return {name for name in entry if "reward" in name or name.endswith("best_score")}


def test_the_log_has_no_reward_and_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": solutions(), "max_steps": 3}
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, sdpo_config=SDPOConfig.preset("sdft"), scale_rewards="batch", **changes)
        caplog.clear()  # of the option that has no effect
        run.train()
    assert [record.message for record in caplog.records if record.name.startswith(("trl", "sdpo_rl"))] == []
    assert len(history(run)) == 6
    assert [about_rewards(entry) for entry in history(run)] == [set()] * 6
    assert all(entry["eval_loss"] > 0 for entry in history(run) if "eval_loss" in entry)


def test_a_function_that_judges_nothing_has_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the test above looks for."""
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, reward_funcs=constant(None))
        run.train()
    assert "All reward functions returned None" in caplog.text
    assert all("reward" in about_rewards(entry) for entry in history(run))


def test_options_of_rewards_are_ignored_as_with_rewards(tmp_path: Path) -> None:
    """Without GRPO's part they have no effect, and TRL would fail at rewards of no function."""
    losses = [
        steps(trainer(tmp_path, multi_objective_aggregation=name))[0]
        for name in ("sum_then_normalize", "normalize_then_sum")
    ]
    assert losses[0] == losses[1]


def test_the_table_of_completions_has_the_solutions(tmp_path: Path) -> None:
    run = trainer(tmp_path, log_completions=True, max_steps=1)
    run.train()
    (file,) = (tmp_path / "completions").glob("*.parquet")
    table = pd.read_parquet(file)
    assert set(table["feedback"]) <= set(SOLUTIONS)
    assert {"step", "prompt", "completion", "advantage", "feedback", "divergence"} <= set(table.columns)
    assert not [name for name in table.columns if "reward" in name]


def test_batches_without_a_text_are_warned_of_in_other_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stream does not say its columns before it is read."""
    rows = list(tiny.conversations(16))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    assert stream.column_names is None
    run = trainer(
        tmp_path, train_dataset=stream, sdpo_config=tiny.config(diagnostics_patience=1), max_steps=1
    )
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        run.train()
    (message,) = [
        record.message for record in caplog.records if "No row had a teacher signal" in record.message
    ]
    assert "no reward function judged a completion" in message
    assert "'feedback'" in message
    assert not [word for word in ("threshold", "success", "num_generations") if word in message]


def test_the_report_of_a_run_is_made(tmp_path: Path) -> None:
    trainer(tmp_path, sdpo_config=tiny.config(credit_rows=2)).train()
    report = credit_report(tmp_path).read_text()
    assert SOLUTIONS[0][:3] in report


def test_words_that_a_dataset_s_text_cannot_have_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    message = "as feedback on an unsuccessful attempt"
    with caplog.at_level(logging.WARNING, logger="sdpo_rl"):
        trainer(tmp_path, sdpo_config=tiny.config(feedback_template="\nSolution: {feedback_raw}"))
        trainer(tmp_path, reward_funcs=constant(0.0))
        in_environment(tmp_path, Reviewer)
        assert message not in caplog.text
        trainer(tmp_path)
    assert message in caplog.text


# --- preview and probe ------------------------------------------------------------------------------------


def test_a_preview_says_that_nothing_was_judged(tmp_path: Path) -> None:
    text = str(trainer(tmp_path, sdpo_config=SDPOConfig.preset("opsd")).preview(2))
    assert text.count(": not judged, the teacher reads the feedback\n") == 2
    assert text.count("\nrewards: none\n") == 2
    assert not [word for word in ("nan", "success", "score") if word in text]


def test_a_probe_measures_what_it_can(tmp_path: Path) -> None:
    """Neither a rate of success nor a verdict against training, but the gain of the solutions."""
    run = trainer(tmp_path, train_dataset=tiny.conversations(feedback=SOLUTIONS, answer=SOLUTIONS))
    result = probe(run, answer_column="answer", batches=1)
    assert (result.success.bare, result.success.retry, result.success.retried) == (None, None, 0)
    assert result.success.not_measured == "no reward function judged a completion"
    assert result.verdict.outlook == "not known"
    assert not {"no_better", "solved", "no_signal"} & {remark.rule for remark in result.verdict.remarks}
    assert result.right_answers is not None
    assert result.right_answers.shown == 1.0
    assert "success, bare         not known\n" in str(result)


def test_a_probe_of_a_function_that_judges_nothing_gives_no_verdict(tmp_path: Path) -> None:
    assert probe(trainer(tmp_path, reward_funcs=constant(None)), batches=1).verdict.outlook == "not known"
    judged = probe(trainer(tmp_path, reward_funcs=constant(0.0)), batches=1)
    assert (judged.success.bare, judged.verdict.outlook) == (0.0, "does not learn")


# --- other sources of the text ----------------------------------------------------------------------------


class Reviewer:
    """An environment that gives feedback and no reward."""

    def reset(self, **_: Any) -> str:
        self.feedback = "count on"
        return " to three"

    def add(self, number: int) -> str:
        """
        Counts on.

        Args:
            number: to add.
        """
        return f"added {number}"


class Referee(Reviewer):
    """One that has a reward of its own."""

    def get_reward(self) -> float:
        return 0.5


def in_environment(output: Path, environment: Any, **changes: Any) -> SDPOTrainer:
    return SDPOTrainer(
        model=scripted_turns.model(),
        args=tiny.arguments(output, max_steps=1),
        train_dataset=tiny.conversations(),
        processing_class=scripted_turns.tokenizer(),
        environment_factory=environment,
        sdpo_config=tiny.config(**changes),
    )


def test_a_function_may_write_the_teacher_s_prompt(tmp_path: Path) -> None:
    """The dataset has no column of feedback, and feedback may be off."""
    run = trainer(
        tmp_path,
        train_dataset=tiny.conversations(hint=SOLUTIONS),
        sdpo_config=tiny.config(include_environment_feedback=False),
        teacher_prompt_func=lambda attempt: [*attempt.prompt, *tiny.user(attempt.columns["hint"])],
        max_steps=1,
    )
    run.train()
    entry = history(run)[0]
    assert entry["self_distillation/reprompt_sample_fraction"] == 1.0
    assert entry["loss"] != 0.0


def test_an_environment_may_give_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    run = in_environment(tmp_path, Reviewer)
    assert [row.feedback for row in run.preview(8).rows] == ["count on"] * 8
    assert run.reward_func_names == []
    run.train()
    assert about_rewards(history(run)[0]) == set()


def test_the_reward_of_an_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    run = in_environment(tmp_path, Referee)
    assert run.reward_func_names == ["Referee"]
    run.train()
    assert history(run)[0]["rewards/Referee/mean"] == history(run)[0]["reward"] == 0.5
    with pytest.raises(ValueError, match="No reward source"):  # TRL's: it alone knows what an environment has
        in_environment(tmp_path, Reviewer, grpo_weight=0.5)


def test_a_rollout_func_may_give_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def generate(prompts: list[Any], run: Any) -> dict[str, Any]:
        ids = [
            run.processing_class.apply_chat_template(p, add_generation_prompt=True)["input_ids"]
            for p in prompts
        ]
        completions = [[10 + row, 11, 1] for row in range(len(prompts))]
        log_probs = [[-1.0] * 3 for _ in prompts]
        texts = [f"text {row}" for row in range(len(prompts))]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": log_probs, "feedback": texts}

    run = SDPOTrainer(
        model=tiny.model(),
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.conversations(),
        processing_class=tiny.tokenizer(),
        rollout_func=generate,
        sdpo_config=tiny.config(),
    )
    assert {row.feedback for row in run.preview(8).rows} == {f"text {row}" for row in range(8)}


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward_funcs", [None, []])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_dataset": tiny.conversations()}, NO_SOURCE),
        (
            {"eval_dataset": tiny.conversations()},
            ("eval_dataset: expected a column", "got ['prompt']", "add"),
        ),
        (
            {"eval_dataset": {"held out": tiny.conversations()}},
            ("eval_dataset['held out']: expected a column", "got ['prompt']"),
        ),
        (
            {"train_dataset": tiny.conversations(feedback=[*SOLUTIONS[:7], None])},
            ("train_dataset: expected a text", "'feedback'", "got None in row 7", "drop"),
        ),
        (
            {"train_dataset": tiny.conversations(privileged_context=[" \n", *SOLUTIONS[1:]])},
            ("'privileged_context'", r"got ' \n' in row 0"),
        ),
        ({"sdpo_config": tiny.config(enabled=False)}, ("reward_funcs", "enabled=False", "got none", "pass")),
        ({"sdpo_config": tiny.config(grpo_weight=0.5)}, ("reward_funcs", "grpo_weight=0.5", "remove")),
        ({"sdpo_config": tiny.config(grpo_weight_final=0.5)}, ("grpo_weight_final=0.5",)),
        ({"sdpo_config": tiny.config(routing="srpo")}, ("routing='srpo'",)),
        ({"sdpo_config": tiny.config(row_weights="pass_rate")}, ("row_weights='pass_rate'",)),
        (
            {"sdpo_config": tiny.config(include_environment_feedback=False)},
            ("include_environment_feedback=False",),
        ),
        ({"sdpo_config": tiny.config(success_reward_funcs=["judge"])}, ("success_reward_funcs=['judge']",)),
        ({"reward_weights": [1.0]}, ("reward_weights: expected None", "got [1.0]", "remove")),
    ],
)
def test_a_run_that_needs_rewards_is_refused(
    tmp_path: Path, reward_funcs: Any, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        trainer(tmp_path, reward_funcs=reward_funcs, **changes)
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_processing_classes_of_no_rewards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reward_processing_classes: expected None"):
        SDPOTrainer(
            model=tiny.model(),
            args=tiny.arguments(tmp_path),
            train_dataset=solutions(),
            processing_class=tiny.tokenizer(),
            reward_processing_classes=[tiny.tokenizer()],
        )
