"""Feedback reaches its row and the completions table; scores decide success."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import tiny
from reference_step import Recorder
from trainer_logs import FOUR, PREFIX, logs, never, texts

# --- feedback ---------------------------------------------------------------------------------------------


def feedback_on(text: str) -> str | None:
    """Feedback that names its completion; none for some."""
    return f"about [{text}]{{x}}" if len(text) % 3 else None


def pairs(completions: list[Any], **_: Any) -> list[Any]:
    return [(0.0, feedback_on(text)) for text in texts(completions)]


def mappings(completions: list[Any], **_: Any) -> list[Any]:
    return [{"score": 0.0, "feedback": feedback_on(text)} for text in texts(completions)]


def not_applicable(completions: list[Any], **_: Any) -> list[Any]:
    return [(None, feedback_on(text)) for text in texts(completions)]


def mixed(completions: list[Any], **_: Any) -> list[Any]:
    return [0.0 if feedback_on(text) is None else (0.0, feedback_on(text)) for text in texts(completions)]


async def later(completions: list[Any], **_: Any) -> list[Any]:
    return [(0.0, feedback_on(text)) for text in texts(completions)]


class WithLastFeedback:
    """Returns floats, and has the texts in an attribute."""

    last_feedback: list[str | None]

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        self.last_feedback = [feedback_on(text) for text in texts(completions)]
        return [0.0] * len(completions)


FEEDBACK_SOURCES: dict[str, tuple[Callable[[], Any], Callable[[str], str | None]]] = {
    "pairs": (lambda: pairs, feedback_on),
    "mappings": (lambda: mappings, feedback_on),
    "no score": (lambda: [not_applicable, never], feedback_on),
    "mixed": (lambda: mixed, feedback_on),
    "async": (lambda: later, feedback_on),
    "attribute": (WithLastFeedback, feedback_on),
    "beside a function without feedback": (lambda: [never, pairs], feedback_on),
    "two functions with feedback": (
        lambda: [pairs, mappings],
        lambda text: None if feedback_on(text) is None else f"{feedback_on(text)}\n\n{feedback_on(text)}",
    ),
    "floats": (lambda: never, lambda text: None),
}


def feedback_of(ids: list[int], marker: str = "earlier attempt:\n\n") -> str | None:
    """The feedback in a teacher's prompt."""
    text = "".join(tiny.VOCABULARY[i] for i in ids)
    return text.split(marker)[1].split("\n\nCorrectly solve")[0] if marker in text else None


@pytest.mark.parametrize("name", FEEDBACK_SOURCES)
def test_feedback_reaches_its_row_and_the_table(tmp_path: Path, name: str) -> None:
    make, expected = FEEDBACK_SOURCES[name]
    trainer = tiny.trainer(tmp_path, reward_funcs=make(), log_completions=True, max_steps=1, **FOUR)
    recorder = Recorder(trainer)
    contexts: list[list[int]] = []

    def watch(output: dict[str, Any], batch: Any) -> None:
        for ids, mask in zip(output["teacher_prompt_ids"], output["teacher_prompt_mask"], strict=True):
            contexts.append(ids[mask.bool()].tolist())

    recorder._alter = watch
    trainer.train()
    assert [feedback_of(ids) for ids in contexts] == [expected(row.text) for row in recorder.rows]
    table = pandas.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    shown = table["feedback"] if "feedback" in table else [None] * len(table)
    for completion, text in zip(table["completion"], shown, strict=True):
        assert (text if isinstance(text, str) else None) == expected(tiny.text_of(list(completion)))


def test_a_dataset_column_is_used_for_rows_without_live_feedback(tmp_path: Path) -> None:
    data = tiny.conversations(8, feedback=[f"static {i}" if i % 2 else None for i in range(8)])
    trainer = tiny.trainer(tmp_path, reward_funcs=pairs, train_dataset=data, max_steps=4)
    recorder = Recorder(trainer)
    checked = Counter()

    def watch(output: dict[str, Any], batch: Any) -> None:
        for row, ids, mask in zip(
            batch, output["teacher_prompt_ids"], output["teacher_prompt_mask"], strict=True
        ):
            number = int(row.prompt[-1]["content"].split()[-1])
            static = f"static {number}" if number % 2 else None
            expected = feedback_on(row.text) or static
            assert feedback_of(ids[mask.bool()].tolist()) == expected
            checked["live" if feedback_on(row.text) else static is not None] += 1

    recorder._alter = watch
    trainer.train()
    assert checked.keys() == {"live", True, False}


def test_the_table_stays_aligned_when_a_batch_has_no_feedback(tmp_path: Path) -> None:
    calls: list[int] = []

    def sometimes_feedback(completions: list[Any], **_: Any) -> list[Any]:
        calls.append(len(completions))
        if len(calls) in (1, 4):
            return [(0.0, "about " + text) for text in texts(completions)]
        return [0.0 for _ in completions]

    tables = completions_tables(tmp_path, [sometimes_feedback], True, steps=4)
    shown = 0
    for table in tables:
        for completion, text in zip(table["completion"], table["feedback"], strict=True):
            assert not isinstance(text, str) or text == "about " + tiny.text_of(list(completion))
            shown += isinstance(text, str)
    assert 0 < shown < sum(map(len, tables))


def own_column(completions: list[Any], log_extra: Any, **_: Any) -> list[float]:
    """Writes a column of the same name as this library's."""
    log_extra("feedback", ["mine: " + text for text in texts(completions)])
    return [0.0] * len(completions)


def later_column(completions: list[Any], log_extra: Any, trainer_state: Any, **given: Any) -> list[float]:
    """Writes that column from the second batch on."""
    if trainer_state.global_step:
        return own_column(completions, log_extra, **given)
    return [0.0] * len(completions)


def feedback(completions: list[Any], **_: Any) -> list[float]:
    """Has the name of that column."""
    return [float(len(text)) for text in texts(completions)]


def completions_tables(path: Path, functions: list[Any], enabled: bool, *, steps: int = 3) -> list[Any]:
    """The tables of an evaluation and of as many batches as steps."""
    trainer = tiny.trainer(
        path,
        sdpo_config=tiny.config(enabled=enabled),
        reward_funcs=functions,
        log_completions=True,
        max_steps=steps,
        eval_dataset=tiny.conversations(1),
        per_device_eval_batch_size=4,
    )
    trainer.evaluate()
    trainer.train()
    files = sorted((path / "completions").glob("*.parquet"))
    return [pandas.read_parquet(file) for file in files]


def column(table: Any, name: str, expected: Callable[[str], Any]) -> bool:
    """Whether a column of the table has what is expected of each text; a missing text is None."""
    shown = [tiny.text_of(list(completion)) for completion in table["completion"]]
    values = [value if value == value else None for value in table[name]]
    return values == [expected(text) for text in shown]


@pytest.mark.parametrize("enabled", [True, False])
def test_the_user_s_own_column_of_feedback_is_left_alone(tmp_path: Path, enabled: bool) -> None:
    for table in completions_tables(tmp_path / "alone", [own_column], enabled):
        assert column(table, "feedback", lambda text: "mine: " + text)
        assert "sdpo_feedback" not in table
    for table in completions_tables(tmp_path / "both", [own_column, pairs], enabled):
        assert column(table, "feedback", lambda text: "mine: " + text)
        assert column(table, "sdpo_feedback", feedback_on)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_reward_function_named_feedback_keeps_its_column(tmp_path: Path, enabled: bool) -> None:
    for table in completions_tables(tmp_path / "alone", [feedback], enabled):
        assert column(table, "feedback", lambda text: float(len(text)))
        assert "sdpo_feedback" not in table
    for table in completions_tables(tmp_path / "both", [feedback, pairs], enabled):
        assert column(table, "feedback", lambda text: float(len(text)))
        assert column(table, "sdpo_feedback", feedback_on)


def test_a_column_of_the_user_that_comes_later_is_not_mixed_with_ours(tmp_path: Path) -> None:
    last = completions_tables(tmp_path, [later_column, pairs], True)[-1]
    assert column(last, "feedback", lambda text: "mine: " + text)
    assert column(last, "sdpo_feedback", feedback_on)


def test_feedback_is_logged_under_grpo_too(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        sdpo_config=tiny.config(enabled=False),
        reward_funcs=pairs,
        log_completions=True,
        max_steps=1,
    )
    trainer.train()
    table = pandas.read_parquet(next((tmp_path / "completions").glob("*.parquet")))
    expected = [feedback_on(tiny.text_of(list(completion))) for completion in table["completion"]]
    assert [text if isinstance(text, str) else None for text in table["feedback"]] == expected


def test_feedback_can_be_left_out(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(include_environment_feedback=False), reward_funcs=pairs, max_steps=1
    )
    trainer.train()
    assert logs(trainer, f"{PREFIX}feedback_used_fraction") == [0.0]
    assert logs(trainer, f"{PREFIX}feedback_available_fraction")[0] > 0.0


# --- success ----------------------------------------------------------------------------------------------


def test_the_threshold_is_reached_by_a_reward_that_equals_it(tmp_path: Path) -> None:
    """0.7 in float32 is less than the double 0.7."""

    def constant(completions: list[Any], **_: Any) -> list[float]:
        return [0.7 for _ in completions]

    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(success_reward_threshold=0.7), reward_funcs=constant, max_steps=1
    )
    trainer.train()
    assert logs(trainer, f"{PREFIX}success_group_fraction") == [1.0]
    assert logs(trainer, f"{PREFIX}success_sample_fraction") == [1.0]


def test_the_score_is_the_weighted_sum_of_raw_rewards(tmp_path: Path) -> None:
    def one(completions: list[Any], **_: Any) -> list[float]:
        return [1.0 for _ in completions]

    def sometimes(completions: list[Any], **_: Any) -> list[float | None]:
        return [2.0 if tiny.score(text) else None for text in texts(completions)]

    def run(weights: list[float]) -> float:
        trainer = tiny.trainer(
            tmp_path, reward_funcs=[one, sometimes], reward_weights=weights, max_steps=1, num_generations=2
        )
        recorder = Recorder(trainer)
        trainer.train()
        solved = [tiny.score(row.text) for row in recorder.rows]
        assert 0 < sum(solved) < len(solved)
        groups = [any(solved[i : i + 2]) for i in range(0, len(solved), 2)]
        expected = 0.5 + 2 * weights[1] >= 1.0
        assert logs(trainer, f"{PREFIX}success_group_fraction") == [
            sum(groups) / len(groups) if expected else 0.0
        ]
        return sum(groups)

    assert run([0.5, 0.25])
    run([0.5, 0.2])


def test_rows_that_nobody_judged_are_no_success(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def nobody(completions: list[Any], **_: Any) -> list[None]:
        return [None for _ in completions]

    trainer = tiny.trainer(
        tmp_path, sdpo_config=tiny.config(success_reward_threshold=-1.0), reward_funcs=nobody, max_steps=1
    )
    trainer.train()
    assert logs(trainer, f"{PREFIX}success_group_fraction") == [0.0]
    assert logs(trainer, f"{PREFIX}empty_target_batch") == [1.0]
