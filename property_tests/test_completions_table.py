"""TRL's table of completions says whose completion the teacher read, and how far both models were apart."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import tiny
import torch

from sdpo_rl.compat.completions_table import CompletionsTable, table_column

SINGLE = {"per_device_train_batch_size": 1, "steps_per_generation": 8, "gradient_accumulation_steps": 1}


def tables(folder: Path) -> list[Any]:
    return [pandas.read_parquet(path) for path in sorted((folder / "completions").glob("*.parquet"))]


def values(column: Any) -> list[Any]:
    return [None if value is None or value != value else value for value in column]


def test_demonstrations_are_rows_of_the_table(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, reward_funcs=tiny.parity, log_completions=True, max_steps=2)
    trainer.train()
    for table in tables(tmp_path):
        texts = [tiny.text_of(list(completion)) for completion in table["completion"]]
        scores = [*map(tiny.score, texts)]
        assert {*scores} == {0.0, 1.0}
        for row, shown in enumerate(values(table["demonstration_rows"])):
            group = range(row // tiny.GROUP * tiny.GROUP, row // tiny.GROUP * tiny.GROUP + tiny.GROUP)
            # The first success of the others; of those with the same text as its own, the last choice.
            others = sorted(
                (i for i in group if scores[i] and i != row), key=lambda i: texts[i] == texts[row]
            )
            assert shown == (str(others[0]) if others else None)


def test_several_demonstrations_are_listed(tmp_path: Path) -> None:
    always = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
    options = tiny.config(num_demonstrations=2)
    tiny.trainer(
        tmp_path, reward_funcs=always, sdpo_config=options, log_completions=True, max_steps=1
    ).train()
    assert tables(tmp_path)[0]["demonstration_rows"][3] == "0, 1"


@pytest.mark.parametrize("backend", ["torch", "logits"])
def test_a_row_s_divergence_is_that_of_a_step_of_this_row_alone(tmp_path: Path, backend: str) -> None:
    def trained(name: str, **changes: Any) -> Any:
        options = tiny.config(loss_backend=backend, row_weights="pass_rate")
        trainer = tiny.trainer(
            tmp_path / name,
            reward_funcs=tiny.parity,
            sdpo_config=options,
            log_completions=True,
            learning_rate=0.0,
            **changes,
        )
        order: list[int] = []
        step = trainer.training_step

        def watch(model: Any, inputs: Any, *args: Any) -> Any:
            loss = step(model, inputs, *args)
            order.extend(trainer._buffered_inputs[trainer._step - 1]["rollout_row"].flatten().tolist())
            return loss

        if changes["max_steps"] == 8:
            trainer.training_step = watch
        trainer.train()
        return trainer, order

    trained("together", max_steps=1)
    alone, order = trained("alone", max_steps=8, **SINGLE)
    together = values(tables(tmp_path / "together")[0]["divergence"])
    assert sorted(order) == [*range(8)]
    expected: list[Any] = [None] * 8
    for row, entry in zip(order, alone.state.log_history, strict=False):
        expected[row] = entry.get("self_distillation/divergence")
    assert any(value is None for value in expected)
    assert together == [None if value is None else pytest.approx(value, rel=1e-5) for value in expected]
    # The table of a step knows the rows that have run until then.
    for step, table in enumerate(tables(tmp_path / "alone"), 1):
        shown = values(table["divergence"])
        known = [row for row in range(8) if row in order[:step] and expected[row] is not None]
        assert [row for row in range(8) if shown[row] is not None] == known
        assert [shown[row] for row in known] == [pytest.approx(expected[row], rel=1e-5) for row in known]


def test_an_evaluation_within_a_batch_moves_no_value_to_another_row(tmp_path: Path) -> None:
    trainer = tiny.trainer(
        tmp_path,
        log_completions=True,
        eval_dataset=tiny.conversations(1),
        eval_strategy="steps",
        eval_steps=1,
        max_steps=4,
        per_device_eval_batch_size=4,
        per_device_train_batch_size=4,
        steps_per_generation=2,
        reward_funcs=tiny.parity,
    )
    trainer.train()
    logs = trainer._logs
    assert {len(column) for column in logs["extra"].values()} == {len(logs["prompt"])} == {8}
    for shown, divergence in zip(
        logs["extra"]["demonstration_rows"], logs["extra"]["divergence"], strict=True
    ):
        assert divergence is None or shown is not None
    assert any(divergence is not None for divergence in list(logs["extra"]["divergence"])[4:])  # evaluated


def own_columns(completions: list[Any], log_extra: Any, **_: Any) -> list[float]:
    log_extra("divergence", ["mine"] * len(completions))
    return tiny.parity(completions)


def demonstration_rows(completions: list[Any], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def test_columns_of_the_user_keep_their_names(tmp_path: Path) -> None:
    functions = [own_columns, demonstration_rows]
    options = tiny.config(success_reward_funcs=["own_columns"])
    trainer = tiny.trainer(
        tmp_path, reward_funcs=functions, sdpo_config=options, log_completions=True, max_steps=2
    )
    trainer.train()
    for table in tables(tmp_path):
        assert {*table["divergence"]} == {"mine"}
        assert {*table["demonstration_rows"]} == {0.5}
        assert any(value is not None for value in values(table["sdpo_divergence"]))
        assert any(table["sdpo_demonstration_rows"])


def test_without_the_option_nothing_is_added(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.train()
    assert not {"divergence", "demonstration_rows"} & {*trainer._logs["extra"]}


def test_a_resumed_run_writes_no_value_to_rows_it_does_not_have() -> None:
    table, columns = CompletionsTable(4), {"divergence": None}
    seen = SimpleNamespace(
        batch=SimpleNamespace(
            completions={"loss_mask": torch.ones(1, 2).bool(), "rollout_row": torch.tensor([[3]])}
        ),
        tokens=SimpleNamespace(divergence=torch.ones(1, 2)),
    )
    table.observe("train", seen)  # type: ignore[arg-type]
    table.fill(columns, "divergence", list)  # type: ignore[arg-type]
    assert columns == {"divergence": None}


def test_the_column_of_the_table_has_a_free_name() -> None:
    assert table_column([]) == table_column(["judge"]) == "feedback"
    assert table_column(["feedback", "judge"]) == "sdpo_feedback"
    assert table_column(["feedback", "sdpo_feedback"]) == "sdpo_sdpo_feedback"
